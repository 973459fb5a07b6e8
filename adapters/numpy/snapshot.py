"""Knowing, without another search, that a network is made of the same objects as at the last one."""

from __future__ import annotations

from itertools import chain
from operator import getitem, is_
from typing import Any

import numpy as np

from .objects import attribute, attributes_of, is_container, is_object, items_of, slots_of
from .pairs import Scan

_PLAIN = (int, float, str, np.generic)


class Attributes:
    """The attributes of an object as items: those that are not in its `__dict__`."""

    def __init__(self, obj: Any) -> None:
        self.obj = obj

    def __getitem__(self, name: str) -> Any:
        return attribute(self.obj, name)


def lookup(holder: Any, key: Any) -> tuple[Any, Any]:
    """What `operator.getitem` takes to read an attribute of an object, or an item of a container."""
    if is_container(holder) and key in items_of(holder):
        return holder, key
    own = getattr(holder, "__dict__", {})
    return (own if key in own else Attributes(holder)), key


class Snapshot:
    """The names, types and identities that a search has met. Comparing them runs in C, without a call for each."""

    def __init__(self, found: Scan) -> None:
        entered = [value for value in found.entered if not _is_record(value)]
        self._objects = [value for value in entered if hasattr(value, "__dict__")]
        self._slotted = [value for value in entered if is_object(value) and any(slots_of(type(value)))]
        self._owned: list[Any] = list(map(vars, self._objects))
        self._dicts: list[Any] = [*self._owned, *(value for value in entered if isinstance(value, dict))]
        self._lists: list[Any] = [value for value in entered if is_container(value) and not isinstance(value, dict)]
        # the names in what may be replaced by its like: containers, and objects that are gradients
        self._keys = {id(each): _names(each) for each in entered if is_container(each) or id(each) in found.consumed}
        places = [
            lookup(value, key)
            for value in entered
            for key in items_of(value) | (attributes_of(value) if is_object(value) else {})
            if not found.leaves_out(value, key)
        ]
        values = [getitem(*place) for place in places]
        self._parts = [value for value in values if is_part(value)]
        self._part_places = _columns([place for place, value in zip(places, values, strict=True) if is_part(value)])
        self._leaf_places = _columns([place for place, value in zip(places, values, strict=True) if not is_part(value)])
        self._described = self._now()

    def _now(self) -> Any:
        names = list(chain.from_iterable(self._dicts))
        names += [name for obj in self._slotted for name in slots_of(type(obj)) if hasattr(obj, name)]
        return names, list(map(len, self._lists)), list(map(type, map(getitem, *self._leaf_places)))

    def holds(self) -> bool:
        """True if no object has been replaced, and no attribute or item has come, gone, or become one of another type."""
        try:
            same = all(map(is_, map(getitem, *self._part_places), self._parts))
            return same and all(map(is_, map(vars, self._objects), self._owned)) and self._now() == self._described
        except (LookupError, TypeError):
            return False

    def watched(self) -> set[tuple[int, Any]]:
        """The ids of the holders, and the keys, of all parts that are noticed when they are replaced."""
        return {(id(holder), key) for holder, key in zip(*self._part_places, strict=True)}

    def adopt(self) -> dict[int, Any] | None:
        """Accept collections and gradients that were replaced by like ones, such as a new dict of gradients.

        Returns:
            What took the place of containers, and of the `__dict__` of objects, by their ids. None if more has changed.
        """
        new: dict[int, Any] = {}
        now = []
        for holder, key, old in zip(*self._part_places, self._parts, strict=True):
            try:
                value = new.get(id(holder), holder)[key]
            except (LookupError, TypeError):
                return None
            if value is not old:
                if type(value) is not type(old) or self._keys.get(id(old)) != _names(value):
                    return None
                if new.setdefault(id(old), value) is not value:
                    return None
                if hasattr(old, "__dict__"):
                    new[id(vars(old))] = vars(value)
            now.append(value)
        replaced = self._parts  # alive while their ids are used
        self._parts = now
        for kept in (
            self._part_places[0],
            self._leaf_places[0],
            self._dicts,
            self._lists,
            self._objects,
            self._owned,
            self._slotted,
        ):
            kept[:] = [new.get(id(each), each) for each in kept]
        self._keys |= {
            id(new[id(old)]): self._keys.pop(id(old)) for old in {id(p): p for p in replaced}.values() if id(old) in new
        }
        return new if new and self.holds() else None


def is_part(value: Any) -> bool:
    """True if a value has parts of its own."""
    return is_container(value) or is_object(value)


def _is_record(value: Any) -> bool:
    """True for a collection of numbers or words, such as a history or a vocabulary, which is not watched."""
    return is_container(value) and bool(len(value)) and all(isinstance(i, _PLAIN) for i in items_of(value).values())


def _names(value: Any) -> list[Any]:
    return list(items_of(value)) if is_container(value) else list(getattr(value, "__dict__", ()))


def _columns(places: list[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    return [holder for holder, _ in places], [key for _, key in places]
