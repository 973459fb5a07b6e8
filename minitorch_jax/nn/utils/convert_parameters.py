"""The parameters of a model as one vector, and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from ...module.live_lists import LiveList
from ...module.module import Module
from ...state.static_values import describe, is_array, module_of, shown


def parameters_to_vector(parameters: Module | Iterable[Any]) -> jax.Array:
    """Return all elements of the parameters in one vector, each array row by row.

    Args:
        parameters: a module, for its `parameters()`; or a list of arrays, such as `model.parameters()` or `model.grads()`.

    Returns:
        An array of shape `(n,)`, in the dtype to which JAX promotes those of the parameters.

    Raises:
        TypeError: if `parameters` is something else.
        ValueError: if there are no arrays.

    Source: torch.nn.utils.parameters_to_vector. Differs from PyTorch: frozen parameters are not among `parameters()`.

    Example:
        >>> import jax.numpy as jnp
        >>> from minitorch_jax import nn
        >>> layer = nn.Linear(2, 1)
        >>> nn.utils.vector_to_parameters(jnp.arange(3.0), layer)
        >>> layer.weight, nn.utils.parameters_to_vector(layer)
        (Array([[0., 1.]], dtype=float32), Array([0., 1., 2.], dtype=float32))
    """
    parameters = module_of(parameters)
    if not isinstance(parameters, Module) and (is_array(parameters) or not isinstance(parameters, Iterable)):
        raise TypeError(
            f"parameters_to_vector takes a Module or a list of arrays, such as `model.parameters()`; got {shown(parameters)}"
        )
    arrays = list(parameters.parameters() if isinstance(parameters, Module) else parameters)
    for i, array in enumerate(arrays):
        if not is_array(array):
            raise TypeError(f"parameters_to_vector takes arrays; item {i} is {shown(array)} ({type(array).__name__})")
    if not arrays:
        raise ValueError("parameters_to_vector: there are no parameters; a model's may all be frozen")
    return jnp.concatenate([jnp.ravel(array) for array in arrays])


def vector_to_parameters(vec: Any, parameters: Module | LiveList) -> None:
    """Assign the slices of a vector to the parameters, in place. See `parameters_to_vector`.

    Args:
        vec: an array of shape `(n,)`. Each slice is converted to the dtype of its parameter.
        parameters: a module, for its `parameters()`; or `model.parameters()` or `model.grads()`, which change the model.

    Raises:
        TypeError: if `parameters` is something else: arrays in a list of yours never change.
        ValueError: if `vec` is not one-dimensional, or its length is not the number of elements. Nothing is changed then.

    Source: torch.nn.utils.vector_to_parameters. Differs from PyTorch: a vector that is too long is an error, and the
    parameters keep their dtype.
    """
    parameters = module_of(parameters)
    live = parameters.parameters() if isinstance(parameters, Module) else parameters
    if not isinstance(live, LiveList):
        raise TypeError(
            f"vector_to_parameters takes a Module or its `parameters()`; got {shown(parameters)}"
            f" ({type(parameters).__name__}), whose arrays cannot change: write `vector_to_parameters(vec, model)`"
        )
    if not is_array(vec) or vec.ndim != 1:
        raise ValueError(f"vector_to_parameters takes a one-dimensional array; got {describe(vec)}")
    old = list(live)
    count = sum(array.size for array in old)
    if vec.size != count:
        raise ValueError(f"vector_to_parameters: the parameters have {count} elements, and the vector has {vec.size}")
    pieces, start = [], 0
    for array in old:
        pieces.append(jnp.asarray(vec[start : start + array.size], array.dtype).reshape(array.shape))
        start += array.size
    live[:] = pieces
