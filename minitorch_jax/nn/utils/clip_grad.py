"""Clipping of gradients under the names of torch.nn.utils."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...clipping import clip_grad_norm, clip_grad_value, norm, scale_grads
from ...state.static_values import is_array, shown


def clip_grad_norm_(
    parameters: Any,
    max_norm: Any,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> jax.Array:
    """Scale all gradients to a norm of at most `max_norm`, in place: `mt.clip_grad_norm` under torch's name.

    Args:
        parameters: a module, a list of them, or an optimizer, for its modules; not a list of arrays.
        max_norm: a number > 0.
        norm_type: p of the p-norm; `float("inf")` for the largest absolute value.
        error_if_nonfinite: raise if the norm is infinite or NaN, and change nothing.
        foreach: torch's choice of a kernel, without effect.

    Returns:
        The norm before, a float32 scalar.

    Raises:
        TypeError, ValueError, RuntimeError: as `mt.clip_grad_norm`.

    Example:
        >>> import jax.numpy as jnp
        >>> from minitorch_jax import nn
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer.accumulate([jnp.array([[3.0, 4.0]])])
        >>> float(nn.utils.clip_grad_norm_(layer, 1.0))
        5.0
    """
    return clip_grad_norm(parameters, max_norm, norm_type, error_if_nonfinite=error_if_nonfinite)


def clip_grad_value_(parameters: Any, clip_value: Any, foreach: bool | None = None) -> None:
    """Bring each element of all gradients into [-clip_value, clip_value], in place. See `clip_grad_norm_`."""
    clip_grad_value(parameters, clip_value)


def get_total_norm(
    tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
) -> jax.Array:
    """Return the norm of arrays as if they were one vector, computed in at least float32.

    Args:
        tensors: arrays, such as `model.grads()`, or one array.
        norm_type: p of the p-norm; `float("inf")` for the largest absolute value.
        error_if_nonfinite: raise if the norm is infinite or NaN. It needs the value, so it cannot be used in compiled code.
        foreach: torch's choice of a kernel, without effect.

    Returns:
        A scalar; 0 if there are no arrays.

    Raises:
        TypeError: if something is no array.
        ValueError: if `norm_type` is not > 0.
        RuntimeError: with `error_if_nonfinite`, if the norm is not finite.

    Source: torch.nn.utils.get_total_norm. Differs from PyTorch: the norm of bfloat16 and float16 arrays is float32.

    Example:
        >>> float(get_total_norm([jnp.array([3.0, 0.0]), jnp.array([[4.0]])]))
        5.0
    """
    if not norm_type > 0:
        raise ValueError(f"get_total_norm: norm_type must be > 0; got {norm_type!r}")
    arrays = [tensors] if is_array(tensors) else list(tensors) if isinstance(tensors, Iterable) else [tensors]
    for array in arrays:
        if not is_array(array):
            raise TypeError(f"get_total_norm takes arrays, such as `model.grads()`; got {shown(array)}")
    total: jax.Array = norm([jnp.asarray(array) for array in arrays], float(norm_type))
    if error_if_nonfinite and not np.isfinite(total):
        raise RuntimeError(f"get_total_norm: the norm is {total}")
    return total


def clip_grads_with_norm_(parameters: Any, max_norm: Any, total_norm: Any, foreach: bool | None = None) -> None:
    """Scale all gradients by `max_norm / (total_norm + 1e-6)`, by 1 at most, in place, for a norm that is known already.

    Args:
        parameters: a module, a list of them, or an optimizer, for its modules; not a list of arrays.
        max_norm: a number >= 0.
        total_norm: the norm, such as that of `get_total_norm(model.grads())`.
        foreach: torch's choice of a kernel, without effect.

    Raises:
        TypeError, ValueError: as `mt.scale_grads`.

    Source: torch.nn.utils.clip_grads_with_norm_.

    Example:
        >>> from minitorch_jax import nn
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer.accumulate([jnp.array([[3.0, 4.0]])])
        >>> clip_grads_with_norm_(layer, 1.0, get_total_norm(layer.grads()))
        >>> layer.grads()[0].round(3)
        Array([[0.6, 0.8]], dtype=float32)
    """
    scale_grads(parameters, jnp.minimum(max_norm / (total_norm + 1e-6), 1.0))
