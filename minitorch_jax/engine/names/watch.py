"""Places that are looked at again at each call of a compiled function, and whether any holds something else by now.

Each look is a C function, called in a plain loop: 0.03 to 0.05 µs a place. (`all(map(is_, map(getitem, …), …))` takes as
long for each place, and 0.25 µs more for each kind of place.)
"""

from __future__ import annotations

import enum
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import attrgetter, getitem
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

    __slots__ = ("_items", "_looks", "_by_value")

    def __init__(self, places: Iterable[Place]) -> None:
        self._items: list[tuple[Any, Any, Any]] = []  # of dicts, lists and namespaces: where, the key, what was there
        self._looks: list[tuple[Any, Any, Any]] = []  # of whatever else: how to look, where, what was there
        self._by_value: list[tuple[Any, Any, Any]] = []  # the same, where the results are new objects at each call
        known: set[tuple[Any, int, int]] = set()
        for look, of, key, was in places:
            mark = look, id(of), id(key)
            if look is itself or mark in known:
                continue
            known.add(mark)
            if look is getitem:
                self._items.append((of, key, was))
            elif look in _BY_VALUE:
                self._by_value.append((look, of, was))
            elif look in BINARY:
                self._looks.append((partial(look, of), key, was))
            else:
                self._looks.append((look, of, was))

    def rebound(self) -> bool:
        """True if any does."""
        try:
            for of, key, was in self._items:
                if of[key] is not was:
                    if _differ(self._items, [of[key] for of, key, _ in self._items]):
                        return True
                    break
            for look, of, was in self._looks:
                if look(of) is not was:
                    if _differ(self._looks, [look(of) for look, of, _ in self._looks]):
                        return True
                    break
            for look, of, was in self._by_value:
                if look(of) != was:
                    return True
        except GONE:
            return True
        return False

    def __len__(self) -> int:
        return len(self._items) + len(self._looks) + len(self._by_value)


def _differ(places: list[tuple[Any, Any, Any]], now: list[Any]) -> bool:
    """Compare by value what is not identical; remember what is equal, for the next time."""
    for i, (value, (look, of, was)) in enumerate(zip(now, places, strict=True)):
        if value is not was:
            if not is_equal(value, was):
                return True
            places[i] = look, of, value
    return False


def is_equal(value: Any, was: Any) -> bool:
    """True for two equal plain values of one type."""
    before = constant(was)
    return before is not None and bool(constant(value) == before)


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
