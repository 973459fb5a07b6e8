"""Where the arrays of cells are, and that they stay there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from ..state.access import store_all
from ..state.cell import Cell, is_concrete

Placement = tuple[Any, ...]  # of each cell its sharding, None on one device; empty if that is all of them


def placement(cells: Sequence[Cell]) -> Placement:
    """Where the cells' arrays are. XLA would give results whichever sharding it likes; ours stay where they were."""
    found: list[Any] = []
    for cell in cells:
        if cell.pack is not None or cell.kind not in ("parameter", "packed", "buffer", "state"):  # others follow them
            found.append(None)
            continue
        known = is_concrete(cell.value)
        sharding = cell.value.sharding if known else None
        found.append(sharding if sharding is not None and len(sharding.device_set) > 1 else None)
    return tuple(found) if any(sharding is not None for sharding in found) else ()


def follow(param: Cell, others: Sequence[Cell]) -> None:
    """Bring arrays that were left behind on other devices, when `Module.to` moved a parameter, to where that is now."""
    here = param.value
    if not is_concrete(here) or not here.committed:
        return
    whole = here.sharding
    if isinstance(whole, jax.sharding.NamedSharding):
        whole = jax.sharding.NamedSharding(whole.mesh, jax.sharding.PartitionSpec())
    for cell in others:
        array = cell.value
        if is_concrete(array) and array.committed and array.sharding.device_set != here.sharding.device_set:
            target = here.sharding if array.shape == here.shape else whole
            store_all([cell], [jax.device_put(array, target, may_alias=False)])


def join_mesh(cells: Sequence[Cell]) -> None:
    """Bind arrays that are bound to no device, but lie beside some on a mesh, to all of it: after a call XLA would have."""
    arrays = [cell for cell in cells if is_concrete(cell.value)]
    meshes = [
        cell.value.sharding.mesh for cell in arrays if isinstance(cell.value.sharding, jax.sharding.NamedSharding)
    ]
    loose = [cell for cell in arrays if not cell.value.committed and cell.kind != "hyperparameters"]
    if loose and meshes and meshes[0].size > 1:
        whole = jax.sharding.NamedSharding(meshes[0], jax.sharding.PartitionSpec())
        store_all(loose, jax.device_put([cell.value for cell in loose], whole, may_alias=False))


def constrained(value: Any, sharding: Any) -> Any:
    """`value` of a traced computation, in the sharding that its cell has."""
    return value if sharding is None else jax.lax.with_sharding_constraint(value, sharding)
