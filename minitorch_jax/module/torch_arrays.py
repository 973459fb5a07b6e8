"""What to write instead of a method of torch's tensors: a note on the error that JAX raises for it on an array.

Methods that are functions of torch, too, such as `unsqueeze`, have their rows in `torch_names.py`.
"""

from __future__ import annotations

import re

import jax
import numpy as np

from ..runtime import tracebacks
from .torch_names import answer

_ROWS = {
    "backward": "`loss = mt.backward(loss_fn, model, x)`, on the function that computes the loss",
    "grad": "`mt.grad(loss_fn, argnums=1)(model, x)`, or `model.grads()` for parameters",
    "requires_grad requires_grad_ retain_grad is_leaf grad_fn": (
        "nothing, since `mt.backward` and `mt.grad` differentiate by what they are given; `freeze()` of a module"
    ),
    "data": "`x` itself, or `jax.lax.stop_gradient(x)` in a loss",
    "view view_as reshape_as": "`x.reshape(shape)`",
    "expand expand_as": "`jnp.broadcast_to(x, shape)`",
    "numpy": "`np.asarray(x)`",
    "to cuda cpu": "`jax.device_put(x, device)`, and `x.astype(dtype)` for a dtype",
    "is_cuda get_device": "`x.devices()`",
    "float": "`x.astype(jnp.float32)`",
    "double": "`x.astype(jnp.float64)`, where `jax_enable_x64` is on",
    "half": "`x.astype(jnp.float16)`",
    "bfloat16": "`x.astype(jnp.bfloat16)`",
    "long int": "`x.astype(jnp.int32)`",
    "bool": "`x.astype(bool)`",
    "type type_as": "`x.astype(dtype)`",
    "dim": "`x.ndim`",
    "contiguous": "nothing, since arrays are",
    "split": "`jnp.split(x, n, axis)`: n is the number of parts, in torch it is their size",
    "new_zeros new_ones new_full new_tensor": "`jnp.zeros(shape, x.dtype)`, `jnp.ones`, `jnp.full`, `jnp.array`",
}
METHODS = {name: text for names, text in _ROWS.items() for name in names.split()}
_OF_TENSORS = "is of torch's tensors"


def instead_of_method(name: str) -> str | None:
    """Return what to write instead of a method or attribute of torch's tensors, or None if it is none of them."""
    found = METHODS.get(name) or answer("mt", name)
    if found is None and name.endswith("_") and not name.startswith("_"):
        return (
            f"the operation without `_`, since arrays never change: `x = x.at[...].set(value)` for a part of x ({name})"
        )
    return found


def explain_method(error: Exception) -> None:
    """Add a note to an error of a method of torch's on an array: what to write. It is read on the error path only."""
    if not isinstance(error, AttributeError | TypeError | NotImplementedError) or any(
        _OF_TENSORS in n for n in getattr(error, "__notes__", ())
    ):
        return
    name = None
    if isinstance(error, AttributeError) and isinstance(error.obj, jax.Array | np.ndarray):
        name = error.name
    elif re.match(r"_view\(\) takes|`type` argument of array.view|Cannot interpret '-?\d+' as a data type", str(error)):
        name = "view"  # JAX's method takes a dtype
    instead = instead_of_method(name) if name else None
    if instead is not None:
        error.add_note(f"`{name}` {_OF_TENSORS}. Instead: {instead}")


tracebacks.explainers.append(explain_method)
