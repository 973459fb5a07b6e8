"""The gradients of a module's parameters: setting them to zero, adding to them, freezing parameters."""

from __future__ import annotations

from typing import Any

from ..state import access
from ..state import frame as frames
from ..state.concurrent_reads import lend, lendings
from ..state.gradient import gradient, starting_value
from ..state.packed import release
from ..state.structure import cell_changed
from ..state.walk import walk_of
from . import torch_habits
from .attributes import check_restructurable
from .parameter import checked_gradient
from .structure_differences import difference
from .tree import is_module


def zero(module: Any) -> None:
    """See `Module.zero_grad`."""
    walk = walk_of(module)
    if frames.is_eager():
        if walk.looked is not lendings.last:
            torch_habits.look(walk, walk.named())
        if walk.clears_views:
            access.store_all(walk.stored_grads, [None] * len(walk.stored_grads))
        else:
            access.store_eagerly(walk.stored_grads, None)
        return
    grads = [c.grad for c in walk.params if c.trainable or starting_value(c.grad) is not None]
    for grad in grads:
        access.check_writable(grad, f"the gradient of a {type(module).__name__}", module)
    access.store_all(grads, [None] * len(grads))


def accumulate(module: Any, grads: Any) -> None:
    """See `Module.accumulate`."""
    walk = walk_of(module)
    if is_module(grads):
        theirs = walk_of(grads)
        if theirs.spec != walk.spec:
            raise ValueError(
                f"the gradients are a {type(grads).__name__} of another structure than this {type(module).__name__}:"
                f" {difference(theirs.spec, walk.spec)}. Compute the gradients with respect to this module."
            )
        values = [cell.value for cell, mine in zip(theirs.cells, walk.cells, strict=True) if mine.trainable]
        access.mark_used(theirs.cells)
    else:
        values = list(grads)
    targets = [(path, cell) for path, cell in walk.named() if cell.trainable]
    if len(values) != len(targets):
        raise ValueError(
            f"{len(values)} gradients were given for {len(targets)} trainable parameters: pass one for each item of"
            " `parameters()`"
        )
    new = []
    for (path, cell), value in zip(targets, values, strict=True):
        label = f"the gradient of {path}"
        grad = checked_gradient(value, cell.value, label)
        access.check_writable(cell.grad, label, module)
        before = gradient(cell.grad)
        new.append(grad if before is None else before + grad)
    for _, cell in targets:
        lend(cell.grad)
        cell.grad.reached = True
    access.store_all([cell.grad for _, cell in targets], new)


def set_trainable(module: Any, trainable: bool) -> None:
    """Make every parameter of the module and those below it trainable, or freeze it."""
    for cell in walk_of(module).params:
        if cell.trainable is not trainable:
            check_restructurable(module, f"{type(module).__name__} (freeze or unfreeze)")
            release(cell)
            cell.trainable = trainable
            cell_changed(cell)
