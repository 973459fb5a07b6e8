"""Describing static structures in words: what a Spec holds, and how two Specs differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..state.walk import Spec, join


def short(value: Any) -> str:
    """Return a value's repr, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def statics(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """Iterate over `(path, text)` of the static values in a Spec's node."""
    if node[0] == "static":
        yield path, short(node[2])
    elif node[0] == "object":
        for inner_path, inner in node[1]._statics(node[2], path):
            yield from statics(inner, inner_path)
    elif node[0] in ("list", "tuple"):
        yield f"len({path})", str(len(node[1]))
        for i, inner in enumerate(node[1]):
            yield from statics(inner, join(path, str(i)))
    elif node[0] == "dict":
        for key, inner in node[1]:
            yield from statics(inner, join(path, key))


def _classes(node: Any, path: str) -> Iterator[tuple[str, type]]:
    """Iterate over `(path, class)` of the objects in a Spec's node."""
    if node[0] == "object":
        yield path, node[1]
        for inner_path, inner in node[1]._statics(node[2], path):
            yield from _classes(inner, inner_path)
    elif node[0] in ("list", "tuple", "dict"):
        for i, item in enumerate(node[1]):
            key, inner = item if node[0] == "dict" else (str(i), item)
            yield from _classes(inner, join(path, key))


def _facts(spec: Spec) -> dict[str, str]:
    return {
        path: "frozen" if kind == "parameter" and not trainable else kind
        for path, (kind, trainable, _) in zip(spec.paths, spec.facts, strict=True)
    }


def difference(given: Spec, mine: Spec) -> str:
    """Return how a given structure differs from the needed one, `mine`. Of many differences it names the first four."""
    found: list[str] = []
    classes = [dict(_classes(spec.node, "")) for spec in (given, mine)]
    for path in [path for path in classes[1] if path in classes[0]]:
        theirs, ours = classes[0][path], classes[1][path]
        if theirs is not ours and (theirs.__qualname__, theirs.__module__) == (ours.__qualname__, ours.__module__):
            found.append(
                f"{path or 'it'} is of a class {theirs.__name__} that was defined again since (by a notebook cell that ran"
                " twice, or a reloaded module). For Python this is another class, so make the object again, too"
            )
        elif theirs is not ours:
            found.append(f"{path or 'it'} is a {theirs.__name__}, not a {ours.__name__}")
    missing = [path for path in mine.paths if path not in given.paths]
    unexpected = [path for path in given.paths if path not in mine.paths]
    found += [f"missing {missing}"] if missing else []
    found += [f"unexpected {unexpected}"] if unexpected else []
    if not missing and not unexpected:
        values = [dict(statics(spec.node, "")) for spec in (given, mine)]
        for one, other in ((_facts(given), _facts(mine)), (values[0], values[1])):
            changed = [path for path in {**other, **one} if one.get(path) != other.get(path)]
            found += [f"{path} is {one.get(path, 'not there')}, not {other.get(path, 'there')}" for path in changed]
    more = f", and {len(found) - 4} more differences" if len(found) > 4 else ""
    return ", ".join(found[:4] or ["the same names, but other parameters are tied, or their order differs"]) + more
