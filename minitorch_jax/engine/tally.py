"""How many programs one function compiled by `mt.jit` has."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from ..state.static_values import holds_state
from .compiled_function import Function


class Tally:
    """How many programs one `Jitted` has. Others made from the same code may have compiled some of them."""

    def __init__(self, function: Function) -> None:
        self._function = function
        self._compiled = 0
        self._taken = 0  # programs that another has compiled
        self._known: set[Any] = set()  # for which program and data the calls were
        self._last: tuple[Any, list[Any]] = None, []  # the same of the last call whose arguments `_kind` knows

    @property
    def count(self) -> int:
        return self._compiled + self._taken

    def add(self, binding: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count what a call has compiled, or run for the first time."""
        compiled, self._function.latest.compiled = self._function.latest.compiled, 0
        self._compiled += compiled
        if binding is not None:
            leaves = jax.tree.leaves((args, kwargs), is_leaf=holds_state)
            data = [leaf if isinstance(leaf, jax.Array | np.ndarray | np.generic) else type(leaf) for leaf in leaves]
            key = binding.program.mark, *[(a, None) if isinstance(a, type) else (a.shape, a.dtype) for a in data]
            if key not in self._known:
                self._known.add(key)
                self._taken += not compiled
            _array_types.update(type(leaf) for leaf in leaves if isinstance(leaf, jax.Array | np.ndarray))
            self._last = binding.program.mark, [*map(_kind, args)] if not kwargs else [object()]

    def is_as_before(self, binding: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """True if the last call that was counted used the same program for data of the same shapes and dtypes."""
        mark, kinds = self._last
        return not kwargs and binding.program.mark is mark and [_kind(arg) for arg in args] == kinds


_array_types: set[type] = set()  # those that were met
_NUMBERS = (int, float, complex)


def _kind(arg: Any) -> Any:
    """The shape and dtype of an array, a number's type, None for an object. Else a new object, which equals nothing."""
    if type(arg) in _array_types:
        return arg.shape, arg.dtype
    if type(arg) in _NUMBERS:
        return type(arg)
    return None if holds_state(arg) else object()
