"""Moving a module's arrays to other devices, and converting them to another dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..state import access
from ..state.packed import release
from ..state.structure import cell_changed
from ..state.walk import walk_of


def move(module: Any, target: Any) -> None:
    """See `Module.to`."""
    if not isinstance(target, jax.Device | jax.sharding.Sharding):
        raise TypeError(f"to() takes a jax Device or Sharding, not {target!r}; for a dtype use `astype(dtype)`")
    _replace_arrays(module, lambda values: jax.device_put(values, target))


def convert(module: Any, dtype: Any) -> None:
    """See `Module.astype`."""
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise TypeError(f"parameters must be floating: astype() cannot make them {jnp.dtype(dtype)}")
    _replace_arrays(module, lambda values: [value.astype(dtype) for value in values], floating_only=True)


def _replace_arrays(module: Any, function: Callable[[list[Any]], list[Any]], floating_only: bool = False) -> None:
    """Replace all arrays, those of the gradients included, by what `function` returns for them."""
    walk = walk_of(module)
    chosen = [c for c in walk.cells if c.encoding is None or not floating_only]
    chosen += [c.grad for c in walk.params if hasattr(c.grad.value, "dtype")]
    for cell in chosen:
        access.check_writable(cell, f"a {cell.kind} of {type(module).__name__}", module)
    if any(cell.pack is not None for cell in chosen):
        access.check_restructurable(module._birth, type(module).__name__, "was moved or converted out of its pack")
    new = function([cell.value for cell in chosen])
    for cell in walk.params:
        release(cell)
    access.store_all(chosen, new)  # `lent` is left as it was: the new arrays may share the old ones' buffers
    for cell in chosen:
        cell_changed(cell)
