"""Objects that are not our Modules, but have `parameters()` and `grads()` giving lists of NumPy arrays."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from ..cell import Cell


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

    def gradients(self, arrays: list[Any]) -> list[Any]:
        """The gradients, aligned with the parameters' `arrays`; zeros where the module has None."""
        grads = list(self.module.grads())
        if len(grads) != len(arrays):
            raise ValueError(
                f"{self.label} gives {len(arrays)} parameters and {len(grads)} gradients: they must be aligned"
            )
        for i, (array, grad) in enumerate(zip(arrays, grads, strict=True)):
            if grad is None:
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
