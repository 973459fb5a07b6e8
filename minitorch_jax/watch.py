"""Places that are looked at again at each call of a compiled function, and whether any holds something else by now.

Each look is a C function, and `map` calls it over all places of its kind: 0.05 µs a place.
"""

from __future__ import annotations

import enum
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter, getitem, is_
from typing import Any, NamedTuple
from weakref import ref

import numpy as np

contents: Callable[[Any], Any] = attrgetter("cell_contents")
code_of: Callable[[Any], Any] = attrgetter("__code__")
defaults_of: Callable[[Any], Any] = attrgetter("__defaults__")
keyword_defaults_of: Callable[[Any], Any] = attrgetter("__kwdefaults__")
content_of: Callable[[Any], bytes] = np.ndarray.tobytes

GETTERS: dict[Any, Callable[[Any, Any], Any]] = {
    kind: kind.__getitem__ for kind in (list, tuple, dict, deque)
}  # for subclasses, whose own methods may be a user's
LENGTHS: dict[Any, Callable[[Any], int]] = {kind: kind.__len__ for kind in (list, tuple, dict, deque, set, frozenset)}
BINARY = (getitem, *GETTERS.values())
_BY_VALUE = (len, *LENGTHS.values(), content_of, frozenset)  # their results are new objects at each call


class Place(NamedTuple):
    """Where something was found: `look(of, key)`, or `look(of)`, and what that was."""

    look: Callable[..., Any]
    of: Any
    key: Any
    was: Any

    def now(self) -> Any:
        """What is there now. KeyError, IndexError, AttributeError or ValueError: nothing."""
        return self.look(self.of, self.key) if self.look in BINARY else self.look(self.of)


def item(of: Any, key: Any) -> Place:
    """An item of a dict, a list, a namespace."""
    return Place(getitem, of, key, of[key])


def getter(container: Any) -> Callable[[Any, Any], Any]:
    """What looks up an item, without any method of a user's class."""
    if type(container) in (list, tuple, dict, deque):
        return getitem
    return next(get for kind, get in GETTERS.items() if isinstance(container, kind))


def length(container: Any) -> Place:
    """The length of a container, without any method of a user's class."""
    kind = next(kind for kind in LENGTHS if isinstance(container, kind))
    look = len if type(container) is kind else LENGTHS[kind]
    return Place(look, container, None, look(container))


def items(container: Any) -> Iterator[tuple[Any, Any]]:
    """The keys, or places, and items of a container, without any method of a user's class."""
    if isinstance(container, dict):
        return iter(list(dict.items(container)))
    kind: Any = next(kind for kind in GETTERS if isinstance(container, kind))
    return enumerate(list(kind.__iter__(container)))


def itself(value: Any) -> Any:
    """The look of a place that nothing can change."""
    return value


GONE = (KeyError, IndexError, AttributeError, ValueError, ReferenceError)  # what looking raises where nothing is left


class _Group:
    """The places that one function looks at."""

    __slots__ = ("look", "of", "keys", "known")

    def __init__(self, look: Callable[..., Any]) -> None:
        self.look = look
        self.of: list[Any] = []
        self.keys: list[Any] = []
        self.known: list[Any] = []

    def fetch(self) -> Iterable[Any]:
        return map(self.look, self.of, self.keys) if self.keys else map(self.look, self.of)

    def changed(self) -> bool:
        """Compare by value what is not identical; remember what is equal, for the next time."""
        now = list(self.fetch())
        for i, (value, was) in enumerate(zip(now, self.known, strict=True)):
            if value is not was:
                known = constant(was)
                if known is None or constant(value) != known:
                    return True
                self.known[i] = value
        return False


class Watch:
    """Notices when any of some places holds something else than it did."""

    __slots__ = ("_same", "_equal")

    def __init__(self, places: Iterable[Place]) -> None:
        groups: dict[Any, _Group] = {}
        seen: set[tuple[Any, int, Any]] = set()
        for place in places:
            if place.look is itself:
                continue
            mark = place.look, id(place.of), id(place.key)
            if mark in seen:
                continue
            seen.add(mark)
            group = groups.get(place.look)
            if group is None:
                group = groups[place.look] = _Group(place.look)
            group.of.append(place.of)
            group.known.append(place.was)
            if place.look in BINARY:
                group.keys.append(place.key)
        self._same = [group for look, group in groups.items() if look not in _BY_VALUE]
        self._equal = [group for look, group in groups.items() if look in _BY_VALUE]

    def rebound(self) -> bool:
        """True if any does."""
        try:
            for group in self._same:
                if not all(map(is_, group.fetch(), group.known)) and group.changed():
                    return True
            for group in self._equal:
                if list(group.fetch()) != group.known:
                    return True
        except GONE:
            return True
        return False


def constant(value: Any) -> Any:
    """A plain value as a key: equal only for the same type and value. None if it is none.

    1, 1.0 and True differ, 0.0 and -0.0 differ, NaN equals itself. No method of a user's class is called.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str, bytes):
        return kind, value
    if kind in (float, complex, slice, range) or kind.__module__.partition(".")[0] in _VALUES:
        return kind, repr(value)
    if isinstance(value, np.generic):
        return kind, value.dtype, value.tobytes()
    if isinstance(value, enum.Enum):
        return None
    for base in (int, float, complex, str, bytes):  # a user's subclass of one
        if isinstance(value, base):
            return kind, base.__repr__(value)
    return None


_VALUES = ("datetime", "decimal", "fractions", "pathlib", "uuid")


class Same:
    """An object as a key: equal only to itself. It does not keep the object alive, where that can be avoided."""

    __slots__ = ("_number", "_get")

    def __init__(self, value: Any) -> None:
        self._number = id(value)
        try:
            self._get: Callable[[], Any] = ref(value)
        except TypeError:
            self._get = types.MethodType(itself, value)

    def __eq__(self, other: object) -> bool:
        mine = self._get()
        return type(other) is Same and mine is not None and mine is other._get()

    def __hash__(self) -> int:
        return self._number
