"""The values of cells that are NumPy arrays: parts of a few arrays, which a step of NumPy's replaces all at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..runtime import contexts


class Latest:
    """The newest values of some cells, in one tuple: one store replaces all of them. The arrays in it never change."""

    __slots__ = ("arrays",)

    def __init__(self, arrays: tuple[Any, ...]) -> None:
        self.arrays = arrays


class Part:
    """A cell's part of the latest arrays: from `start` on in array `index`, or all of it if `start` is None."""

    __slots__ = ("latest", "index", "start", "shape")

    def __init__(self, latest: Latest, index: int, start: int | None, shape: tuple[int, ...]) -> None:
        self.latest, self.index, self.start, self.shape = latest, index, start, shape

    def array(self, arrays: tuple[Any, ...] | None = None) -> Any:
        """The value, which may share memory with one of the `arrays`: the latest, or those of an earlier moment."""
        whole = np.asarray((self.latest.arrays if arrays is None else arrays)[self.index])
        if self.start is None:
            return whole
        return whole[self.start : self.start + int(np.prod(self.shape))].reshape(self.shape)

    def value(self, arrays: tuple[Any, ...] | None = None) -> jax.Array:
        """The same as a new JAX array."""
        array = np.array(self.array(arrays))
        with jax.ensure_compile_time_eval(), contexts.full_width([array]), contexts.constants(), contexts.unchecked():
            return jnp.array(array)


def values_of(held: Sequence[Any]) -> list[Any]:
    """What some cells hold, with a JAX array for each part: all parts of one `Latest` are of one moment."""
    moments: dict[Latest, tuple[Any, ...]] = {}
    return [
        item.value(moments.setdefault(item.latest, item.latest.arrays)) if type(item) is Part else item for item in held
    ]
