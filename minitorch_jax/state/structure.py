"""Stamps: how code learns, without a walk, that the structure of some modules and optimizers has not changed.

Each module, container and optimizer that was walked over has a `Structure` with a `stamp`, and each cell has a `stamp` of its
own. A change replaces the stamp by a new object. Code that depends on some of them keeps a `Snapshot` of their stamps. A
change elsewhere in the process therefore costs that code one comparison of two lists, in C.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any


class _Process:
    """`version` is replaced at each change of any structure. While it is the same, no stamp has changed."""

    __slots__ = ("version",)

    def __init__(self) -> None:
        self.version = object()


process = _Process()
get_stamp = attrgetter("stamp")


class Structure:
    """The stamp of one module, container or optimizer, and the stamps that it had in its other modes."""

    __slots__ = ("stamp", "modes")

    def __init__(self) -> None:
        self.stamp = object()
        self.modes: dict[Any, object] | None = None

    def change(self) -> None:
        """Record a change. The stamp is set first, so that a thread that sees the new version also sees the new stamp."""
        self.stamp, self.modes = object(), None
        process.version = object()

    def switch(self, before: Any, now: Any) -> None:
        """Record that only the mode has changed. A return to an earlier mode brings back the stamp of that mode."""
        modes = self.modes = self.modes or {}
        modes[before] = self.stamp
        self.stamp = modes.get(now) or object()
        process.version = object()


def changed(owner: Any) -> None:
    """Record a change of a module, container or optimizer. If no walk has seen it, nothing depends on it."""
    structure = owner._structure
    if structure is not None:
        structure.change()


def cell_changed(cell: Any) -> None:
    """Record a change of a cell's static facts: `trainable`, the device or sharding of its array, its pack."""
    cell.stamp = object()
    process.version = object()


def structure_of(owner: Any) -> Structure:
    """Return the Structure of a module, container or optimizer. The first call creates it."""
    structure: Structure | None = owner._structure
    if structure is None:
        structure = Structure()
        object.__setattr__(owner, "_structure", structure)
    return structure


class Snapshot:
    """The stamps of some structures and cells at one moment.

    The caller must read `version` before the stamps, and the stamps before anything else of the objects.
    """

    __slots__ = ("version", "parts", "stamps")

    def __init__(self, version: object, parts: Sequence[Any], stamps: Sequence[object]) -> None:
        self.version, self.parts, self.stamps = version, parts, stamps

    def holds(self) -> bool:
        """True if none of the structures and cells has changed since."""
        now = process.version
        if self.version is not now:
            if list(map(get_stamp, self.parts)) != self.stamps:
                return False
            self.version = now
        return True

    def may_hold_again(self) -> bool:
        """True if nothing but modes has changed since. Other stamps never come back."""
        parts = zip(self.parts, self.stamps, strict=True)
        return all(part.stamp is was or was in (getattr(part, "modes", None) or {}).values() for part, was in parts)
