"""What was compiled, kept for later calls: not more than so much, and no object of the user's with it.

What a program is compiled for may name functions, and through them objects: a schedule `trainer.rate`, a loss function. A
key here refers to them weakly. When a function has gone, nothing can ask for its program again, and the program goes too.
(A program must not refer to them either, or they would never go.)
"""

from __future__ import annotations

import dataclasses
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple


class _Entry(NamedTuple):
    key: Any
    value: Any
    references: list[Any]  # those in the key


class Kept:
    """A dict of at most `most` entries, those that were used last, whose keys do not keep the user's objects alive.

    Those are what is equal to nothing but itself, functions above all, and bound methods. They are looked for in tuples and
    dataclasses; an object of another class that holds some has a method `weakened(weaken)` for what stands for it.
    """

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._entries: dict[Any, _Entry] = {}

    def get(self, key: Any) -> Any:
        """What is kept under an equal key, or None."""
        entry = self._entries.pop(Weaken()(key), None)
        if entry is None:
            return None
        self._entries[entry.key] = entry  # the last one now
        return entry.value

    def set(self, key: Any, value: Any) -> Any:
        """Keep a value, and return it."""
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
        """Forget some entries. (Python's garbage collector may call this, anywhere.)"""
        for entry in list(self._entries.values()):
            if unwanted(entry):
                self._entries.pop(entry.key, None)

    def __len__(self) -> int:
        return len(self._entries)


class Weaken:
    """Makes weak keys of keys: with weak references in place of objects, which call `gone` when one has gone."""

    def __init__(self, gone: Callable[[Any], None] | None = None) -> None:
        self._gone = gone
        self.references: list[Any] = []

    def __call__(self, value: Any) -> Any:
        """The value itself, if there is no such object in it."""
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
        """What is equal for the very same object only, as long as that is alive."""
        bound = isinstance(value, types.MethodType)
        try:
            reference: Any = (weakref.WeakMethod if bound else weakref.ref)(value, self._gone)
        except TypeError:  # it cannot be referred to weakly
            return value
        self.references.append(reference)
        return _Weak(reference, hash((id(value.__self__), id(value.__func__))) if bound else id(value))


class _Weak:
    """An object in a key."""

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
    if isinstance(value, types.BuiltinFunctionType):  # `table.get`
        return not isinstance(value.__self__, types.ModuleType | None)
    own: Any = type(value).__eq__
    return isinstance(value, types.MethodType) or own is object.__eq__


def _has_equality_of_fields(cls: Any) -> bool:
    """Whether a dataclass compares as `dataclass` makes it, and can be part of a key."""
    code = getattr(cls.__eq__, "__code__", None)
    return cls.__hash__ is not None and code is not None and code.co_filename == "<string>"
