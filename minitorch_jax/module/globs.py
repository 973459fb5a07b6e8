"""Globs over the names of parameters and buffers, as `shard` and the groups of an optimizer take them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import translate
from typing import Any


class Globs:
    """A sequence of globs. `*` also matches dots; case counts.

    Example:
        >>> Globs(["*.bias", "0.*"]).matching("0.bias")
        [0, 1]
    """

    def __init__(self, globs: Iterable[str]) -> None:
        self._names: dict[str, list[int]] = {}  # those that match one name: looked up, however many there are
        self._patterns: list[tuple[int, Callable[[str], Any]]] = []
        for i, glob in enumerate(globs):
            if re.search(r"[*?[]", glob):
                self._patterns.append((i, re.compile(translate(glob)).match))
            else:
                self._names.setdefault(glob, []).append(i)

    def matching(self, name: str) -> list[int]:
        """Return the places of the globs that match a name, in their order: the first one counts."""
        found = [i for i, match in self._patterns if match(name)]
        return sorted([*self._names[name], *found]) if name in self._names else found


def kept(globs: Sequence[str], names: Iterable[str]) -> set[str]:
    """Return the names that `keep` of a load lists.

    Raises:
        ValueError: for a glob that matches no name.
    """
    found: set[str] = set()
    matched: set[int] = set()
    patterns = Globs(globs)
    for name in names:
        if places := patterns.matching(name):
            found.add(name)
            matched.update(places)
    idle = [glob for i, glob in enumerate(globs) if i not in matched]
    if idle:
        raise ValueError(f"keep lists names of this module that stay as they are; it has none that matches {idle}")
    return found
