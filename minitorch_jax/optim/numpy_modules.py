"""Objects that are not our Modules, but have `parameters()` and `grads()` giving lists of NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from numpy.lib.array_utils import byte_bounds

from ..state.cell import Cell


def same_memory(one: Any, other: Any) -> bool:
    """Whether two arrays are one, or NumPy's with elements in common."""
    arrays = isinstance(one, np.ndarray) and isinstance(other, np.ndarray)
    return one is other or (arrays and np.shares_memory(one, other))


def overlapping(arrays: Sequence[Any]) -> list[tuple[int, int]]:
    """Which NumPy arrays share memory, two by two."""
    found: list[tuple[int, int]] = []
    reached: list[tuple[int, int]] = []  # those before that end behind the start of this one
    for low, high, i in sorted((*byte_bounds(array), i) for i, array in enumerate(arrays)):
        reached = [(end, j) for end, j in reached if end > low]
        found += [(min(i, j), max(i, j)) for _, j in reached if np.shares_memory(arrays[i], arrays[j])]
        reached.append((high, i))
    return sorted(found)


def is_zero(grad: Any) -> bool:
    """Whether a gradient is None or the number 0, which stand for zeros."""
    return grad is None or (np.isscalar(grad) and grad == 0)


class Foreign:
    """One such object. Its arrays are read anew at each step and written back in place."""

    def __init__(self, module: Any, label: str) -> None:
        self.module, self.label = module, label
        self.cells = [Cell(None, "foreign") for _ in module.parameters()]  # keys for the optimizer's state

    def is_as_it_was(self) -> bool:
        """Whether there are as many arrays as before."""
        return len(self.module.parameters()) == len(self.cells)

    def arrays(self) -> list[Any]:
        """The parameters, checked to be such as can be updated."""
        found = self.module.parameters()
        if len(found) != len(self.cells):
            raise ValueError(
                f"{self.label}.parameters() gave {len(found)} arrays, and {len(self.cells)} before: assign"
                " `optimizer.modules` anew after such a change"
            )
        persistent = isinstance(found, list) and found is self.module.parameters()
        for i, array in enumerate(found):
            where = f"{self.label}.parameters()[{i}]"
            if not isinstance(array, np.ndarray | jax.Array):
                raise TypeError(f"{where} is a {type(array).__name__}; the optimizer updates NumPy arrays in place")
            if not jax.numpy.issubdtype(array.dtype, np.floating):
                raise TypeError(f"{where} is {array.dtype}; only floating parameters can be trained")
            fixed = not isinstance(array, np.ndarray) or not array.flags.writeable
            if fixed and not (persistent and isinstance(array, jax.Array)):
                fresh = "" if persistent else ", in a list made afresh at each call"
                raise TypeError(
                    f"{where} is an immutable array{fresh}: an update could not be written back. Let parameters() give"
                    " writable NumPy arrays, or the module's own list each time, or make the object a"
                    " minitorch_jax.Module."
                )
        return list(found)

    def own_arrays(self) -> list[Any]:
        """The parameters, found to be the module's own: what `parameters()` gives again."""
        found = self.arrays()
        for i, (array, again) in enumerate(zip(found, self.module.parameters(), strict=True)):
            where = f"{self.label}.parameters()[{i}]"
            if array.size and not same_memory(array, again):
                raise ValueError(
                    f"{where} is a copy, which an update would change to no effect: let parameters() give the module's"
                    " array itself, or a view of it"
                )
            if not array.dtype.isnative or array.dtype.itemsize > 8:
                raise TypeError(f"{where} is {array.dtype.str}, which JAX lacks: convert it with `astype(np.float32)`")
        return found

    def gradients(self, arrays: list[Any]) -> list[Any]:
        """The gradients, aligned with the parameters' `arrays`; zeros where the module has None."""
        return self.aligned(arrays, list(self.module.grads()))

    def aligned(self, arrays: list[Any], grads: list[Any]) -> list[Any]:
        """`gradients`, of what the module has given."""
        if len(grads) != len(arrays):
            raise ValueError(
                f"{self.label} gives {len(arrays)} parameters and {len(grads)} gradients: they must be aligned"
            )
        for i, (array, grad) in enumerate(zip(arrays, grads, strict=True)):
            if is_zero(grad):
                grads[i] = np.zeros_like(array)
            elif np.shape(grad) != array.shape:
                raise ValueError(
                    f"{self.label}.grads()[{i}] has shape {np.shape(grad)}, its parameter has {array.shape}: they must"
                    " be the same (a gradient of another shape may come from a sum over the wrong axis)"
                )
        return [np.asarray(grad, dtype=array.dtype) for grad, array in zip(grads, arrays, strict=True)]

    def write(self, new: list[Any]) -> None:
        """Put new values into the very arrays of the module (or, for immutable ones, into its list)."""
        found = self.module.parameters()
        for i, value in enumerate(new):
            if isinstance(found[i], np.ndarray):
                np.copyto(found[i], value)
            else:
                found[i] = jax.numpy.asarray(value)
