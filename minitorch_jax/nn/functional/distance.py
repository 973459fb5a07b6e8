"""Distances and similarities as functions. The gradient of a norm at 0 is 0, as in torch, not NaN."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...runtime.xla_faults import largest
from .autocast import in_float32
from .dtypes import promoted, promoted_to_floats, wide
from .spatial import floating


def magnitude(x: jax.Array) -> jax.Array:
    """|x| with derivative 0 at 0, as in torch. The derivative of `jnp.abs` is 1 there."""
    return x * jnp.sign(x)


def norm(x: jax.Array, p: float, axis: Any, keepdims: bool = False) -> jax.Array:
    """sum(|x|^p)^(1/p) along axes. p = 0 counts nonzeros; inf and -inf return the largest and the smallest |x|."""
    axis = (axis,) if np.ndim(axis) == 0 else tuple(axis) or tuple(range(x.ndim))
    if x.ndim == 0 and axis in ((0,), (-1,)):  # as in torch, a scalar has one axis
        axis = ()
    if (p < 0 or p == math.inf) and 0 in [x.shape[i] for i in axis]:
        raise ValueError(
            f"a norm with p={p} needs at least one element along axis {axis}; got an array of shape {tuple(x.shape)}"
        )
    dtype, x = x.dtype, wide(x)
    return _norm(x, p, axis, keepdims).astype(dtype)


def _norm(x: jax.Array, p: float, axis: Any, keepdims: bool) -> jax.Array:
    size = magnitude(x)
    if p < 0:  # where any element is 0, the norm and its gradient are 0
        none = size == 0
        inverse = norm(1 / jnp.where(none, 1, size), -p, axis, keepdims)
        return jnp.where(none.any(axis, keepdims=keepdims), 0, 1 / inverse)
    if p == 0:
        return (size != 0).sum(axis, keepdims=keepdims).astype(x.dtype)
    if p == 1:
        return size.sum(axis, keepdims=keepdims)
    if p == math.inf:
        return largest(size, axis, keepdims)
    least = 16 * float(jnp.finfo(x.dtype).tiny)  # 1 / least is not subnormal: XLA flushes subnormal numbers to 0
    unit = jnp.clip(jax.lax.stop_gradient(size).max(axis, keepdims=True, initial=0), least, 1 / least)
    if p == 2:  # divided by `unit`, no power overflows
        total = ((x / unit) ** 2).sum(axis, keepdims=True)
    else:
        size = size / unit
        total = jnp.where(size == 0, 0, jnp.where(size == 0, 1, size) ** p).sum(axis, keepdims=True)
    safe = jnp.where(total == 0, 1, total)
    out = jnp.where(total == 0, 0, unit * (jnp.sqrt(safe) if p == 2 else safe ** (1 / p)))
    return out if keepdims else out.squeeze(axis)


@in_float32
def pairwise_distance(
    x1: jax.Array, x2: jax.Array, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> jax.Array:
    """‖x1 - x2 + eps‖_p along the last axis.

    Args:
        x1: `(*, D)`.
        x2: a shape that broadcasts with that of `x1`.
        p: the exponent of the norm; `math.inf` and `-math.inf` are allowed.
        eps: added to every difference.
        keepdim: True keeps the last axis, with size 1.

    Returns:
        `(*)`, or `(*, 1)`.

    Raises:
        ValueError: if the shapes do not broadcast, or if p < 0 or p is infinite and the last axis is empty.

    Source: torch.nn.functional.pairwise_distance.

    Example:
        >>> pairwise_distance(jnp.array([3.0, 4.0]), jnp.zeros(2), eps=0.0)
        Array(5., dtype=float32)
    """
    x1, x2 = jnp.broadcast_arrays(*promoted(x1, x2))
    (difference,) = promoted_to_floats(x1 - x2)
    return norm(wide(difference) + eps, p, -1, keepdim).astype(difference.dtype)


@in_float32
def cosine_similarity(x1: jax.Array, x2: jax.Array, dim: int = 1, eps: float = 1e-8) -> jax.Array:
    """x1 · x2 / (max(‖x1‖, eps) max(‖x2‖, eps)) along `dim`.

    Args:
        x1: any shape.
        x2: a shape that broadcasts with that of `x1`.
        dim: an axis of the broadcast shape.
        eps: the smallest norm to divide by.

    Returns:
        The broadcast shape without this axis.

    Raises:
        ValueError: if the shapes do not broadcast, or the axis does not exist.

    Source: torch.nn.functional.cosine_similarity.

    Example:
        >>> cosine_similarity(jnp.array([[1.0, 1.0]]), jnp.array([[0.0, 2.0]]))
        Array([0.70710677], dtype=float32)
    """
    x1, x2 = jnp.broadcast_arrays(*promoted(x1, x2))
    floating(x1, "cosine_similarity")
    if x1.ndim == 0 and dim in (0, -1):  # as in torch, a scalar has one axis
        x1, x2 = x1[None], x2[None]
    if not -x1.ndim <= dim < x1.ndim:
        raise ValueError(f"cosine_similarity has no axis {dim} in inputs whose common shape is {tuple(x1.shape)}")

    def length(x: jax.Array) -> jax.Array:  # in torch the gradient is the norm's, even where eps replaces the norm
        plain = norm(x, 2, dim, keepdims=True)
        return jnp.where(plain < eps, eps + (plain - jax.lax.stop_gradient(plain)), plain)

    dtype, x1, x2 = x1.dtype, wide(x1), wide(x2)
    return ((x1 / length(x1)) * (x2 / length(x2))).sum(dim).astype(dtype)


@in_float32
def pdist(input: jax.Array, p: float = 2.0) -> jax.Array:
    """The distances ‖x_i - x_j‖_p of all pairs of rows, i < j.

    Args:
        input: `(N, M)`.
        p: the exponent of the norm, at least 0; `math.inf` is allowed.

    Returns:
        `(N (N - 1) / 2,)`.

    Raises:
        ValueError: if the input does not have two dimensions, or p < 0.

    Source: torch.nn.functional.pdist.

    Example:
        >>> pdist(jnp.array([[0.0], [1.0], [5.0]]))
        Array([1., 5., 4.], dtype=float32)
    """
    if input.ndim != 2:
        raise ValueError(f"pdist takes an input of shape (N, M); got {tuple(input.shape)}")
    floating(input, "pdist")
    if p < 0:
        raise ValueError(f"pdist needs p >= 0; got p={p}")
    x = wide(input)
    every = norm(x[:, None] - x[None], p, -1).astype(input.dtype)  # XLA fuses this: the differences are never stored
    return every[np.triu_indices(len(input), 1)]
