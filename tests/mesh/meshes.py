"""Meshes, layouts of a small model on them, and what tests ask of arrays there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from training import mean_square

import minitorch_jax as mt
from minitorch_jax.state.cell import Cell
from minitorch_jax.state.walk import walk_of

P = PartitionSpec
SHAPES = {"data": (8, 1), "fsdp": (8, 1), "tensor": (1, 8), "2d": (4, 2)}  # of the axes "data" and "model"
SPECS = {  # of weights (out, in): those that divide their outputs, and those that divide their inputs
    "data": (P(), P()),
    "fsdp": (P("data"), P(None, "data")),
    "tensor": (P("model"), P(None, "model")),
    "2d": (P("model", "data"), P("data", "model")),
}


def mesh(*shape: int, names: tuple[str, ...] = ("data", "model")) -> jax.sharding.Mesh:
    """The first devices, with axes that XLA shards by itself."""
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names[: len(shape)], axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def on(layout: str, *spec: Any) -> NamedSharding:
    """A sharding on the mesh of a layout."""
    return NamedSharding(mesh(*SHAPES[layout]), P(*spec))


def place(model: mt.Module, layout: str) -> mt.Module:
    """Put a model's arrays on the mesh of a layout: every second matrix is cut the other way round."""
    matrices = 0
    for path, array in model.state_dict().items():
        spec = P()
        if array.ndim == 2:
            spec, matrices = SPECS[layout][matrices % 2], matrices + 1
        holder, name = model._holder(path)
        setattr(holder, name, jax.device_put(array, on(layout, *spec)))
    return model


def batch(x: Any, layout: str, axis: int = 0) -> Any:
    """A batch, or batches stacked along their first axis, divided over the axis "data"."""
    return jax.device_put(x, on(layout, *(None,) * axis, "data"))


def parameters(model: mt.Module) -> Iterator[tuple[str, Cell]]:
    """The cells of a model's parameters by path."""
    return ((path, cell) for path, cell in walk_of(model).named() if cell.kind == "parameter")


def check_all_follow(model: mt.Module, *optimizers: Any) -> None:
    """Gradients, and the states of optimizers, lie as their parameters do; what is kept for all, on the same devices."""
    jax.tree.leaves(optimizers)  # a reader of an optimizer's state finds it moved
    for path, cell in parameters(model):
        value = cell.value
        if hasattr(cell.grad.value, "sharding"):
            assert cell.grad.value.sharding.is_equivalent_to(value.sharding, value.ndim), path
        for opt in optimizers:
            for state in opt._state.get(cell, (None, ()))[1]:
                if state.value.shape == value.shape:
                    assert state.value.sharding.is_equivalent_to(value.sharding, value.ndim), path
                else:
                    assert state.value.sharding.device_set == value.sharding.device_set, path
    for opt in optimizers:
        devices = next(cell.value.sharding.device_set for _, cell in parameters(model))
        for cell in (opt._hyper.cell, opt._steps, *opt._shared.values()):
            assert cell.value.sharding.device_set == devices, cell.kind


def step(model: Any, opt: Any, x: Any) -> Any:
    """The three lines of a training loop."""
    opt.zero_grad()
    loss = mt.backward(mean_square, model, x)
    opt.step()
    return loss
