"""Stamps: how code knows, without a walk, that the structure of some modules and optimizers is as it was.

Each module, container and optimizer that was walked over has a `Structure`, and a cell is one itself: its `stamp` is another
object after each change. Code that depends on some of them keeps a `Snapshot` of their stamps. A change elsewhere in the
process therefore costs it one comparison, in C.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any


class _Process:
    """`version` is replaced at each change of any structure. While it is the same, no stamp need be looked at."""

    __slots__ = ("version",)

    def __init__(self) -> None:
        self.version = object()


process = _Process()
get_stamp = attrgetter("stamp")


class Structure:
    """The stamp of one module, container or optimizer, and the stamps that it had in other modes."""

    __slots__ = ("stamp", "modes")

    def __init__(self) -> None:
        self.stamp = object()
        self.modes: dict[Any, object] | None = None

    def change(self) -> None:
        """Record a change. The stamp comes before the version, so that whoever sees the new version sees the new stamp."""
        self.stamp, self.modes = object(), None
        process.version = object()

    def switch(self, before: Any, now: Any) -> None:
        """Record that a mode has changed and nothing else: going back to a mode goes back to its stamp."""
        modes = self.modes = self.modes or {}
        modes[before] = self.stamp
        self.stamp = modes.get(now) or object()
        process.version = object()


def changed(owner: Any) -> None:
    """Record a change of a module, container or optimizer. Nothing depends on one that no walk has seen."""
    structure = owner._structure
    if structure is not None:
        structure.change()


def cell_changed(cell: Any) -> None:
    """Record that what is static about a cell has changed: whether it is trained, where its array lies, its pack."""
    cell.stamp = object()
    process.version = object()


def structure_of(owner: Any) -> Structure:
    """The structure of a module, container or optimizer, from now on."""
    structure: Structure | None = owner._structure
    if structure is None:
        structure = Structure()
        object.__setattr__(owner, "_structure", structure)
    return structure


class Snapshot:
    """The stamps that some structures and cells had at one moment.

    `version` must have been read before the stamps, and the stamps before whatever is concluded from the objects.
    """

    __slots__ = ("version", "parts", "stamps")

    def __init__(self, version: object, parts: Sequence[Any], stamps: Sequence[object]) -> None:
        self.version, self.parts, self.stamps = version, parts, stamps

    def holds(self) -> bool:
        """True if none of the structures has changed since."""
        now = process.version
        if self.version is not now:
            if list(map(get_stamp, self.parts)) != self.stamps:
                return False
            self.version = now
        return True
