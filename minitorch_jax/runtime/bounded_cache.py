"""A cache of compiled programs that is bounded, and that keeps no object of the user alive.

The key of a program may hold functions, such as a loss function or a schedule `trainer.rate`, and through them other
objects. The cache holds weak references to them. When a function is freed, nobody can ask for its program again, so the
entry is dropped. (The program itself must not refer to the function, or neither would ever be freed.)
"""

from __future__ import annotations

import dataclasses
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple


class _Entry(NamedTuple):
    key: Any
    value: Any
    references: list[Any]  # the weak references in the key


class Kept:
    """A dict of the `most` entries that were used last. Its keys do not keep the user's objects alive.

    The user's objects are bound methods, and objects that are equal only to themselves, mostly functions. `Weaken` finds
    them in tuples and dataclasses. An object of another class that holds some has a method `weakened(weaken)`, which
    returns its weak key.
    """

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._entries: OrderedDict[Any, _Entry] = OrderedDict()

    def get(self, key: Any) -> Any:
        """Return the value stored under an equal key, or None."""
        entry = self._entries.get(Weaken()(key))
        if entry is None:
            return None
        with suppress(KeyError):  # dropped just now
            self._entries.move_to_end(entry.key)  # as the one used last
        return entry.value

    def set(self, key: Any, value: Any) -> Any:
        """Store a value, and return it."""
        mine = weakref.ref(self)

        def gone(_: Any) -> None:
            kept = mine()
            if kept is not None:
                kept.drop(lambda entry: any(reference() is None for reference in entry.references))

        weaken = Weaken(gone)
        weak = weaken(key)
        self._entries[weak] = _Entry(weak, value, weaken.references)
        for oldest in list(self._entries)[: -self._most]:
            self._entries.pop(oldest, None)
        return value

    def drop(self, unwanted: Callable[[_Entry], bool]) -> None:
        """Drop the unwanted entries. (The garbage collector may call this at any line of any thread.)"""
        for entry in list(self._entries.values()):
            if unwanted(entry):
                self._entries.pop(entry.key, None)

    def __len__(self) -> int:
        return len(self._entries)


class Weaken:
    """Turns a key into a weak key, which holds weak references in place of the user's objects.

    `gone` is called with the reference when an object is freed.
    """

    def __init__(self, gone: Callable[[Any], None] | None = None) -> None:
        self._gone = gone
        self.references: list[Any] = []

    def __call__(self, value: Any) -> Any:
        """Return the weak form of `value`: `value` itself, if it holds no object of the user."""
        if isinstance(value, tuple):
            items = [self(item) for item in value]
            return value if all(map(_is, items, value)) else tuple(items)
        if isinstance(value, str | int | float | type | None):
            return value
        if hasattr(type(value), "weakened"):
            return value.weakened(self)
        if dataclasses.is_dataclass(value) and _has_equality_of_fields(type(value)):
            fields = [getattr(value, field.name) for field in dataclasses.fields(value) if field.compare]
            found = [self(field) for field in fields]
            return value if all(map(_is, found, fields)) else (type(value), *found)
        return self.identity(value) if _is_only_itself(value) else value

    def identity(self, value: Any) -> Any:
        """Return a weak reference that equals only references to the same object, and only while that object is alive."""
        bound = isinstance(value, types.MethodType)
        try:
            reference: Any = (weakref.WeakMethod if bound else weakref.ref)(value, self._gone)
        except TypeError:  # its type supports no weak references
            return value
        self.references.append(reference)
        return _Weak(reference, hash((id(value.__self__), id(value.__func__))) if bound else id(value))


class _Weak:
    """Stands for an object of the user in a key."""

    __slots__ = ("get", "_hash")

    def __init__(self, get: Callable[[], Any], number: int) -> None:
        self.get, self._hash = get, number

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        one, two = self.get(), other.get() if isinstance(other, _Weak) else None
        if isinstance(one, types.MethodType) and isinstance(two, types.MethodType):
            return one.__self__ is two.__self__ and one.__func__ is two.__func__
        return one is not None and one is two


def _is(one: Any, other: Any) -> bool:
    return one is other


def _is_only_itself(value: Any) -> bool:
    """True for a bound method, and for an object that is equal only to itself."""
    if isinstance(value, types.BuiltinFunctionType):  # such as `table.get`, a method of a dict
        return not isinstance(value.__self__, types.ModuleType | None)
    own: Any = type(value).__eq__
    return isinstance(value, types.MethodType) or own is object.__eq__


def _has_equality_of_fields(cls: Any) -> bool:
    """True for a dataclass that has a hash and whose `__eq__` was generated by `dataclass`."""
    code = getattr(cls.__eq__, "__code__", None)
    return cls.__hash__ is not None and code is not None and code.co_filename == "<string>"
