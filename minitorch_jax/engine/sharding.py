"""Keeping the arrays of cells on their devices, in their sharding.

Placement belongs to the parameter: its gradient, its optimizer state and whatever else is kept for it follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from ..runtime.copies import everywhere
from ..state.access import store_all
from ..state.cell import Cell, bound_to, is_concrete
from ..state.packed import stored_cells
from ..state.structure import cell_changed

Placement = tuple[Any, ...]  # the sharding of each cell, None on one device; empty if all cells are on one device

_KEPT = "parameter", "packed", "buffer", "state", "gradient"


def placement(cells: Sequence[Cell]) -> Placement:
    """Return the shardings of the cells' arrays. A program keeps results in them; XLA alone might choose others.

    A gradient has the sharding of its parameter, where that is among the cells.
    """
    params = {cell.grad: cell for cell in cells if cell.grad is not None}
    found = [_sharding_of(params.get(cell, cell)) if cell.kind in _KEPT else None for cell in cells]
    return tuple(found) if any(sharding is not None for sharding in found) else ()


def _sharding_of(cell: Cell) -> Any:
    """Return the sharding of a cell's array, or None if it is on one device."""
    sharding = None if cell.pack is not None else bound_to(cell.value)
    return sharding if sharding is not None and len(sharding.device_set) > 1 else None


def follow(param: Cell, others: Iterable[Cell]) -> None:
    """Put arrays that belong to a parameter where it lies: those of its shape in its sharding, others on all its devices."""
    here, sharding = param.value, bound_to(param.value)
    if sharding is None:
        return
    moved, arrays, targets = [], [], []
    for cell in others:
        array = cell.value
        target = sharding if getattr(array, "shape", None) == here.shape else everywhere(sharding)
        if isinstance(array, jax.ShapeDtypeStruct) and array.sharding != target:
            cell.value = array.update(sharding=target)
            cell_changed(cell)
        elif is_concrete(array):
            if not (array.committed and array.sharding.is_equivalent_to(target, array.ndim)):
                moved.append(cell)
                arrays.append(array)
                targets.append(target)
    if moved:
        store_all(moved, jax.device_put(arrays, targets, may_alias=False))
        for cell in moved:
            cell_changed(cell)


def join_mesh(cells: Sequence[Cell], data: Iterable[Any] = ()) -> bool:
    """Replicate arrays that are bound to no device over the mesh of the other arrays, as the first XLA call would do.

    `data` are arrays that are used beside the cells. Returns True if it has moved an array.
    """
    held = [cell for cell in stored_cells(cells) if is_concrete(cell.value)]
    loose = [cell for cell in held if not cell.value.committed and cell.kind != "hyperparameters"]
    if not loose:
        return False
    arrays = [*(cell.value for cell in held), *data]
    mesh = next((array.sharding.mesh for array in arrays if is_on_mesh(array)), None)
    if mesh is None:
        return False
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    store_all(loose, jax.device_put([cell.value for cell in loose], whole, may_alias=False))
    for cell in loose:
        cell_changed(cell)
    return True


def is_on_mesh(array: Any) -> bool:
    """True for an array on a mesh, of one device or more, whose axes XLA shards by itself."""
    if not is_concrete(array) or not isinstance(array.sharding, jax.sharding.NamedSharding):
        return False
    return not is_explicit(array.sharding.mesh)


def is_explicit(mesh: Any) -> bool:
    """True for a mesh of several devices with Explicit axes, where the sharding of an array is a part of its type."""
    return mesh.size > 1 and jax.sharding.AxisType.Explicit in mesh.axis_types


def explicit_axes(name: str, mesh: Any) -> TypeError:
    """Return the error that refuses a mesh with Explicit axes."""
    return TypeError(
        f"{name} a mesh with Explicit axes, as `jax.make_mesh` makes them by default. They are not supported: use"
        f" `jax.make_mesh({mesh.axis_sizes}, {mesh.axis_names}, axis_types=(jax.sharding.AxisType.Auto,) *"
        f" {len(mesh.axis_names)})`, which leaves the sharding of all results to XLA"
    )


@contextmanager
def naming_devices(name: str, named: Callable[[], Iterable[tuple[str, Any]]]) -> Iterator[None]:
    """A block that calls a program with the arrays `named()`. Where they are on different devices, an error names two."""
    try:
        yield
    except ValueError as error:
        places: dict[frozenset[Any], tuple[str, Any]] = {}
        for label, array in named():
            if is_concrete(array) and array.committed:
                places.setdefault(frozenset(array.sharding.device_set), (label, array))
        if len(places) < 2:
            raise
        found = [f"{label} is on {_listed(devices)} ({array.sharding})" for devices, (label, array) in places.items()]
        raise ValueError(
            f"{name}: the arrays of one call must be on the same devices, and {', '.join(found[:-1])} and {found[-1]}. Move"
            " them: `model.to(sharding)` moves a module, `jax.device_put(array, sharding)` one array"
        ) from error


def _listed(devices: Iterable[Any]) -> str:
    numbers = sorted(device.id for device in devices)
    return f"device {numbers[0]}" if len(numbers) == 1 else f"devices {numbers}"


def constrained(value: Any, sharding: Any) -> Any:
    """Return a traced value, constrained to the sharding of its cell."""
    if sharding is None or not isinstance(value, jax.Array):
        return value
    return jax.lax.with_sharding_constraint(value, sharding)
