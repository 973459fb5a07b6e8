"""Distances and similarities as functions. Gradients are torch's where a norm is 0: zeros, no NaN."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from ...ynnpack import largest


def magnitude(x: jax.Array) -> jax.Array:
    """|x|, whose derivative at 0 is 0, as torch's; that of `abs` is 1 there."""
    return x * jnp.sign(x)


def norm(x: jax.Array, p: float, axis: int, keepdims: bool = False) -> jax.Array:
    """sum(|x|^p)^(1/p) along one axis; the number of nonzeros for p = 0, the largest for p = inf."""
    if p < 0:
        raise ValueError(f"a norm needs p >= 0; got p={p}")
    size = magnitude(x)
    if p == 0:
        return (size != 0).sum(axis, keepdims=keepdims).astype(x.dtype)
    if p == 1:
        return size.sum(axis, keepdims=keepdims)
    if p == math.inf:
        return largest(size, axis, keepdims)
    if p == 2:
        total = (x * x).sum(axis, keepdims=keepdims)
    else:
        total = jnp.where(size == 0, 0, jnp.where(size == 0, 1, size) ** p).sum(axis, keepdims=keepdims)
    safe = jnp.where(total == 0, 1, total)
    return jnp.where(total == 0, 0, jnp.sqrt(safe) if p == 2 else safe ** (1 / p))


def pairwise_distance(
    x1: jax.Array, x2: jax.Array, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> jax.Array:
    """‖x1 - x2 + eps‖_p along the last axis.

    Args:
        x1: `(*, D)`.
        x2: a shape that broadcasts with it.
        p: of the norm, at least 0, `math.inf` included.
        eps: added to every difference.
        keepdim: whether to keep the last axis, of size 1.

    Returns:
        `(*)`, or `(*, 1)`.

    Raises:
        ValueError: if the shapes do not broadcast, or p < 0 (which torch takes).

    Source: torch.nn.functional.pairwise_distance.

    Example:
        >>> pairwise_distance(jnp.array([3.0, 4.0]), jnp.zeros(2), eps=0.0)
        Array(5., dtype=float32)
    """
    x1, x2 = jnp.broadcast_arrays(x1, x2)
    return norm(x1 - x2 + eps, p, -1, keepdim)


def cosine_similarity(x1: jax.Array, x2: jax.Array, dim: int = 1, eps: float = 1e-8) -> jax.Array:
    """x1 · x2 / (max(‖x1‖, eps) max(‖x2‖, eps)) along `dim`.

    Args:
        x1: any shape.
        x2: a shape that broadcasts with it.
        dim: the axis of their common shape.
        eps: the smallest norm to divide by.

    Returns:
        The common shape without the axis.

    Raises:
        ValueError: if the shapes do not broadcast, or there is no such axis.

    Source: torch.nn.functional.cosine_similarity.

    Example:
        >>> cosine_similarity(jnp.array([[1.0, 1.0]]), jnp.array([[0.0, 2.0]]))
        Array([0.70710677], dtype=float32)
    """
    x1, x2 = jnp.broadcast_arrays(x1, x2)
    if not -x1.ndim <= dim < x1.ndim:
        raise ValueError(f"cosine_similarity has no axis {dim} in inputs whose common shape is {tuple(x1.shape)}")

    def length(x: jax.Array) -> jax.Array:  # torch's gradient is that of the norm, even where eps replaces it
        plain = norm(x, 2, dim)
        return jax.lax.stop_gradient(jnp.maximum(plain, eps)) + (plain - jax.lax.stop_gradient(plain))

    return (x1 * x2).sum(dim) / (length(x1) * length(x2))


def pdist(input: jax.Array, p: float = 2.0) -> jax.Array:
    """The distances ‖x_i - x_j‖_p of all pairs of rows, i < j.

    Args:
        input: `(N, M)`.
        p: of the norm, at least 0, `math.inf` included.

    Returns:
        `(N (N - 1) / 2,)`.

    Raises:
        ValueError: if the input has not two dimensions, or p < 0.

    Source: torch.nn.functional.pdist.

    Example:
        >>> pdist(jnp.array([[0.0], [1.0], [5.0]]))
        Array([1., 5., 4.], dtype=float32)
    """
    if input.ndim != 2:
        raise ValueError(f"pdist takes an input of shape (N, M); got {tuple(input.shape)}")
    every = norm(input[:, None] - input[None], p, -1)  # fused: the differences are never stored
    return every[np.triu_indices(len(input), 1)]
