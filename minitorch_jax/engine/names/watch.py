"""Places that are looked at again at each call of a compiled function, and whether any holds something else by now.

Each look is a C function, and `map` calls it over all places of its kind: 0.05 µs a place.
"""

from __future__ import annotations

import enum
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import attrgetter, call, getitem, is_
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


class Watch:
    """Notices when any of some places holds something else than it did."""

    __slots__ = ("_of", "_keys", "_items", "_looks", "_objects", "_seen", "_sizes", "_sized", "_contents")

    def __init__(self, places: Iterable[Place]) -> None:
        of, keys, held = [], [], []  # of dicts, lists and namespaces
        looks, objects, seen = [], [], []  # of whatever else, to be compared by identity
        sizes, sized, contents = [], [], []  # and by value: these results are new objects at each call
        known: set[tuple[Any, int, int]] = set()
        for place in places:
            mark = place.look, id(place.of), id(place.key)
            if place.look is itself or mark in known:
                continue
            known.add(mark)
            if place.look is getitem:
                of.append(place.of)
                keys.append(place.key)
                held.append(place.was)
            elif place.look in _BY_VALUE:
                sizes.append(place.look)
                sized.append(place.of)
                contents.append(place.was)
            else:
                looks.append(partial(place.look, place.of) if place.look in BINARY else place.look)
                objects.append(place.key if place.look in BINARY else place.of)
                seen.append(place.was)
        self._of, self._keys, self._items = of, keys, held
        self._looks, self._objects, self._seen = looks, objects, seen
        self._sizes, self._sized, self._contents = sizes, sized, contents

    def rebound(self) -> bool:
        """True if any does."""
        try:
            if self._of and not all(map(is_, map(getitem, self._of, self._keys), self._items)):
                if _differ(self._items, list(map(getitem, self._of, self._keys))):
                    return True
            if self._looks and not all(map(is_, map(call, self._looks, self._objects), self._seen)):
                if _differ(self._seen, list(map(call, self._looks, self._objects))):
                    return True
            return bool(self._sizes) and list(map(call, self._sizes, self._sized)) != self._contents
        except GONE:
            return True

    def __len__(self) -> int:
        return len(self._items) + len(self._seen) + len(self._contents)


def _differ(known: list[Any], now: list[Any]) -> bool:
    """Compare by value what is not identical; remember what is equal, for the next time."""
    for i, (value, was) in enumerate(zip(now, known, strict=True)):
        if value is not was:
            before = constant(was)
            if before is None or constant(value) != before:
                return True
            known[i] = value
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

    def weakened(self, weaken: Any) -> Any:
        """What stands for it in a `Kept`, where an entry goes when the object goes."""
        value = self._get() if type(self._get) is ref else None
        return self if value is None else weaken.identity(value)
