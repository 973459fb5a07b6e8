"""Keeping the arrays of cells on their devices, in their sharding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from ..state.access import store_all
from ..state.cell import Cell, is_concrete

Placement = tuple[Any, ...]  # the sharding of each cell, None on one device; empty if all cells are on one device


def placement(cells: Sequence[Cell]) -> Placement:
    """Return the shardings of the cells' arrays. A program keeps results in them; XLA alone might choose others."""
    found: list[Any] = []
    for cell in cells:
        if cell.pack is not None or cell.kind not in (
            "parameter",
            "packed",
            "buffer",
            "state",
        ):  # gradients and others follow these
            found.append(None)
            continue
        known = is_concrete(cell.value)
        sharding = cell.value.sharding if known else None
        found.append(sharding if sharding is not None and len(sharding.device_set) > 1 else None)
    return tuple(found) if any(sharding is not None for sharding in found) else ()


def move_to(param: Cell, others: Sequence[Cell]) -> None:
    """Move arrays to the devices of a parameter, if they stayed on others when `Module.to` moved the parameter."""
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
    """Replicate arrays that are bound to no device over the mesh of the other arrays, as the first XLA call would do."""
    arrays = [cell for cell in cells if is_concrete(cell.value)]
    meshes = [
        cell.value.sharding.mesh for cell in arrays if isinstance(cell.value.sharding, jax.sharding.NamedSharding)
    ]
    loose = [cell for cell in arrays if not cell.value.committed and cell.kind != "hyperparameters"]
    if loose and meshes and meshes[0].size > 1:
        whole = jax.sharding.NamedSharding(meshes[0], jax.sharding.PartitionSpec())
        store_all(loose, jax.device_put([cell.value for cell in loose], whole, may_alias=False))


def constrained(value: Any, sharding: Any) -> Any:
    """Return a traced value, constrained to the sharding of its cell."""
    return value if sharding is None else jax.lax.with_sharding_constraint(value, sharding)
