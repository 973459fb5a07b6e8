"""Cells whose values are NumPy arrays between the steps that NumPy takes, and JAX arrays whenever anyone reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from .cell import Cell, store
from .numpy_parts import Part


class NumpyCell(Cell):
    """A cell that holds a `Part`, or what was stored in it since. Each read of a part returns a new JAX array."""

    __slots__ = ()

    @property
    def stored(self) -> Any:
        held = get_held(self)
        return held.value() if type(held) is Part else held

    @stored.setter
    def stored(self, new: Any) -> None:
        store(self, new)


get_held: Callable[[Cell], Any] = attrgetter("held")  # the slot itself: a Part, where there is one


def as_numpy(cell: Cell) -> Any:
    """A cell's value as a NumPy array, which nobody may change."""
    held = get_held(cell)
    return held.array() if type(held) is Part else np.array(cell.value)


def hold(cells: Sequence[Cell], parts: Sequence[Part]) -> None:
    """Have cells hold parts, of equal values."""
    for cell, part in zip(cells, parts, strict=True):
        cell.__class__ = NumpyCell
        store(cell, part)
