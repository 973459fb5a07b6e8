"""Moving a module's arrays to other devices, and converting them to another dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from ..state import access
from ..state.cell import Cell
from ..state.packed import release
from ..state.structure import cell_changed
from ..state.walk import walk_of
from .parameter import X64, declared


def move(module: Any, target: Any) -> None:
    """See `Module.to`."""
    if not isinstance(target, jax.Device | Sharding):
        raise TypeError(
            f"to() takes a jax Device or Sharding, not {target!r}: write `model.to(jax.devices('gpu')[0])`, or 'cpu'; for a"
            " dtype use `astype(dtype)`, such as `model.astype(jnp.bfloat16)`"
        )
    sharding = SingleDeviceSharding(target) if isinstance(target, jax.Device) else target
    named = list(walk_of(module).named())
    found = [(path, misfit(sharding, getattr(declared(cell), "shape", ()))) for path, cell in named]
    problems = [f"  {path}: {problem}" for path, problem in found if problem]
    if problems:
        listed = "\n".join(problems)
        raise ValueError(
            f"to() gives every array of this {type(module).__name__} one sharding, and {sharding} does not fit all; nothing"
            f" was moved:\n{listed}\nGive each array a sharding of its own by `mt.shard(module, mesh, rules)`"
        )
    place(module, {cell: sharding for _, cell in named})


def misfit(sharding: Sharding, shape: tuple[int, ...]) -> str | None:
    """Return why an array of this shape cannot have this sharding, or None."""
    if isinstance(sharding, NamedSharding):
        spec, sizes = sharding.spec, sharding.mesh.shape
        if len(spec) > len(shape):
            return f"{spec} has {len(spec)} entries, and the shape {tuple(shape)} has {len(shape)} dimensions"
        for i, entry in enumerate(spec):
            axes = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
            parts = prod([sizes.get(axis, 1) for axis in axes])
            if shape[i] % parts:
                over = " x ".join(f"{axis!r} of {sizes[axis]}" for axis in axes)
                return (
                    f"{spec} splits dimension {i}, which is {shape[i]}, into {parts} parts ({over}): it does not divide"
                )
    try:
        sharding.shard_shape(tuple(shape))
    except ValueError as error:
        return str(error)
    return None


def place(module: Any, where: Mapping[Cell, Sharding]) -> None:
    """Give each array its sharding, and each gradient the sharding of its parameter."""
    where = {**where, **{cell.grad: sharding for cell, sharding in where.items() if cell.grad is not None}}
    _replace_arrays(module, lambda cells: _put([cell.value for cell in cells], [where[cell] for cell in cells]))


def _put(values: list[Any], shardings: list[Sharding]) -> list[Any]:
    """Return values in their shardings. A `jax.ShapeDtypeStruct` notes its sharding."""
    arrays = [i for i, value in enumerate(values) if isinstance(value, jax.Array)]
    moved = jax.device_put([values[i] for i in arrays], [shardings[i] for i in arrays])
    new = [
        value.update(sharding=sharding) if isinstance(value, jax.ShapeDtypeStruct) else value
        for value, sharding in zip(values, shardings, strict=True)
    ]
    for i, array in zip(arrays, moved, strict=True):
        new[i] = array
    return new


def convert(module: Any, dtype: Any) -> None:
    """See `Module.astype`."""
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise TypeError(f"parameters must be floating: astype() cannot make them {jnp.dtype(dtype)}")
    if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        raise ValueError(f"astype({jnp.dtype(dtype)}): JAX's 64-bit types are off; call {X64} first, at the start")
    _replace_arrays(module, lambda cells: [_converted(cell.value, dtype) for cell in cells], floating_only=True)


def _converted(value: Any, dtype: Any) -> Any:
    return value.update(dtype=dtype) if isinstance(value, jax.ShapeDtypeStruct) else value.astype(dtype)


def _replace_arrays(module: Any, function: Callable[[list[Cell]], list[Any]], floating_only: bool = False) -> None:
    """Replace all arrays, those of the gradients included, by what `function` returns for their cells."""
    walk = walk_of(module)
    chosen = [c for c in walk.cells if c.encoding is None or not floating_only]
    chosen += [c.grad for c in walk.params if hasattr(c.grad.value, "dtype")]
    for cell in chosen:
        access.check_writable(cell, f"a {cell.kind} of {type(module).__name__}", module)
    if any(cell.pack is not None for cell in chosen):
        access.check_restructurable(module._birth, type(module).__name__, "was moved or converted out of its pack")
    new = function(chosen)
    for cell in walk.params:
        release(cell)
    access.store_all(chosen, new)  # `lent` is left as it was: the new arrays may share the old ones' buffers
    for cell in chosen:
        cell_changed(cell)
