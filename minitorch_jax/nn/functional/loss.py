"""Losses of numbers against numbers, as functions."""

from __future__ import annotations

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .distance import magnitude


def reduced(loss: jax.Array, reduction: str) -> jax.Array:
    """The mean or the sum of the losses, or the losses."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.mean()
    raise ValueError(f"reduction must be 'mean', 'sum' or 'none'; got {reduction!r}")


def alike(input: jax.Array, target: Any) -> tuple[jax.Array, jax.Array]:
    """Both with their common shape, in the input's dtype."""
    input, target = jnp.broadcast_arrays(input, target)
    return input, target.astype(input.dtype)


def expanded(weight: Any, like: jax.Array, name: str = "weight") -> jax.Array:
    """`weight` with the shape and dtype of `like`."""
    shape = np.shape(weight)
    if len(shape) > like.ndim or any(n not in (1, m) for n, m in zip(shape[::-1], like.shape[::-1], strict=False)):
        raise ValueError(f"{name} must have a shape that broadcasts to the input's, {tuple(like.shape)}; got {shape}")
    return jnp.broadcast_to(jnp.asarray(weight, like.dtype), like.shape)


def _warned(input: jax.Array, target: Any, name: str) -> tuple[jax.Array, jax.Array]:
    """`alike`, with torch's warning if the shapes differ."""
    if input.shape != np.shape(target):
        warnings.warn(
            f"{name}: the target's shape {np.shape(target)} differs from the input's {input.shape}: they are broadcast,"
            " which is seldom what was meant",
            stacklevel=3,
        )
    return alike(input, target)


def _weighted(loss: jax.Array, input: jax.Array, weight: Any, reduction: str) -> jax.Array:
    """Reduced, with weights of the input's shape, by whose sum the mean divides."""
    if weight is None:
        return reduced(loss, reduction)
    weight = _weight_like(weight, input)
    loss = loss * expanded(weight, loss)
    return loss.sum() / weight.sum() if reduction == "mean" else reduced(loss, reduction)


def _weight_like(weight: Any, input: jax.Array) -> jax.Array:
    if np.shape(weight) != input.shape:
        raise ValueError(f"weight must have the input's shape {tuple(input.shape)}; got {np.shape(weight)}")
    return jnp.asarray(weight, input.dtype)


def l1_loss(
    input: jax.Array, target: jax.Array, *, reduction: str = "mean", weight: jax.Array | None = None
) -> jax.Array:
    """|x - y|; see `mse_loss` for the arguments.

    Example:
        >>> l1_loss(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0]))
        Array(1., dtype=float32)
    """
    x, y = _warned(input, target, "l1_loss")
    return _weighted(magnitude(x - y), input, weight, reduction)


def mse_loss(
    input: jax.Array, target: jax.Array, *, reduction: str = "mean", weight: jax.Array | None = None
) -> jax.Array:
    """(x - y)², averaged over all elements.

    Args:
        input: any shape.
        target: the same shape; another one is broadcast, with a warning, as in torch.
        reduction: "mean", "sum" or "none".
        weight: of each element, of the input's shape; the mean divides by its sum.

    Raises:
        ValueError: if shapes do not fit, or for another reduction.

    Source: torch.nn.functional.mse_loss.

    Example:
        >>> mse_loss(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0]))
        Array(2., dtype=float32)
    """
    x, y = _warned(input, target, "mse_loss")
    return _weighted((x - y) ** 2, input, weight, reduction)


def smooth_l1_loss(input: jax.Array, target: jax.Array, *, reduction: str = "mean", beta: float = 1.0) -> jax.Array:
    """d² / (2 beta) where d = |x - y| < beta, d - beta / 2 elsewhere (Girshick, 2015).

    Args:
        input: any shape.
        target: the same shape; another one is broadcast, with a warning, as in torch.
        reduction: "mean", "sum" or "none".
        beta: where the parabola ends, at least 0.

    Raises:
        ValueError: if shapes do not fit, beta < 0, or for another reduction.

    Example:
        >>> smooth_l1_loss(jnp.array([0.0, 0.0]), jnp.array([1.0, 3.0]), reduction="none")
        Array([0.5, 2.5], dtype=float32)
    """
    if beta < 0:
        raise ValueError(f"smooth_l1_loss needs beta >= 0; got {beta}")
    x, y = _warned(input, target, "smooth_l1_loss")
    d = magnitude(x - y)
    return reduced(d if beta == 0 else jnp.where(d < beta, 0.5 / beta * d * d, d - 0.5 * beta), reduction)


def huber_loss(
    input: jax.Array,
    target: jax.Array,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: jax.Array | None = None,
) -> jax.Array:
    """d² / 2 where d = |x - y| < delta, delta (d - delta / 2) elsewhere.

    Args:
        input: any shape.
        target: the same shape; another one is broadcast, with a warning, as in torch.
        reduction: "mean", "sum" or "none".
        delta: where the parabola ends, above 0.
        weight: of each element, of the input's shape; the mean divides by the number of elements, as in torch.

    Raises:
        ValueError: if shapes do not fit, delta <= 0, or for another reduction.

    Example:
        >>> huber_loss(jnp.array([0.0, 0.0]), jnp.array([1.0, 3.0]), delta=2.0, reduction="none")
        Array([0.5, 4. ], dtype=float32)
    """
    if delta <= 0:
        raise ValueError(f"huber_loss needs delta > 0; got {delta}")
    x, y = _warned(input, target, "huber_loss")
    d = magnitude(x - y)
    loss = jnp.where(d < delta, 0.5 * d * d, delta * (d - 0.5 * delta))
    return reduced(loss if weight is None else loss * expanded(_weight_like(weight, input), loss), reduction)


def poisson_nll_loss(
    input: jax.Array,
    target: jax.Array,
    log_input: bool = True,
    full: bool = False,
    *,
    eps: float = 1e-8,
    reduction: str = "mean",
) -> jax.Array:
    """The negative log-likelihood of counts under Poisson distributions, exp(x) - y x.

    Args:
        input: the logarithms of the expected counts; or, with `log_input=False`, the expected counts.
        target: the counts; shapes broadcast.
        log_input: what the input is.
        full: whether to add Stirling's approximation of log(y!), for y > 1.
        eps: added to an expected count before its logarithm is taken.
        reduction: "mean", "sum" or "none".

    Source: torch.nn.functional.poisson_nll_loss.

    Example:
        >>> poisson_nll_loss(jnp.array([0.0]), jnp.array([3.0]))
        Array(1., dtype=float32)
    """
    x, y = alike(input, target)
    loss = jnp.exp(x) - y * x if log_input else x - y * jnp.log(x + eps)
    if full:
        safe = jnp.where(y > 1, y, 1)
        loss += jnp.where(y > 1, y * jnp.log(safe) - y + 0.5 * jnp.log(2 * math.pi * safe), 0)
    return reduced(loss, reduction)


def gaussian_nll_loss(
    input: jax.Array,
    target: jax.Array,
    var: jax.Array | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> jax.Array:
    """The negative log-likelihood of numbers under normal distributions, (log(v) + (x - y)² / v) / 2.

    Args:
        input: the means, `(*, D)`.
        target: the numbers; a shape that broadcasts.
        var: the variances: a number, an array of the input's shape, of that shape without its last axis, or with one
            axis of size 1.
        full: whether to add log(2π) / 2.
        eps: smaller variances are taken for it; their gradients pass, as in torch.
        reduction: "mean", "sum" or "none".

    Raises:
        ValueError: if shapes do not fit, or `var` is a negative number. Unlike torch, negative variances in an array
            cannot raise in compiled code: they make the loss NaN.

    Source: torch.nn.functional.gaussian_nll_loss; Nix and Weigend, 1994.

    Example:
        >>> gaussian_nll_loss(jnp.array([0.0, 0.0]), jnp.array([1.0, 3.0]), 1.0)
        Array(2.5, dtype=float32)
    """
    if isinstance(var, int | float) and var < 0:
        raise ValueError(f"var must not be negative; got {var}")
    x, y = alike(input, target)
    v = jnp.asarray(var, x.dtype)
    if v.ndim and v.shape == input.shape[:-1]:
        v = v[..., None]
    off = [n for n, m in zip(v.shape, input.shape, strict=False) if n != m]
    if v.ndim and (v.ndim != input.ndim or off not in ([], [1])):
        raise ValueError(
            f"var must have the input's shape {tuple(input.shape)}, that shape without its last axis or with one axis"
            f" of size 1, or be a number; got {np.shape(var)}"
        )
    v = expanded(v, x, "var")
    clamped = jnp.where(v < 0, jnp.nan, jnp.maximum(v, eps))
    v = jax.lax.stop_gradient(clamped) + (v - jax.lax.stop_gradient(v))
    loss = 0.5 * (jnp.log(v) + (x - y) ** 2 / v)
    return reduced(loss + 0.5 * math.log(2 * math.pi) if full else loss, reduction)


def kl_div(input: jax.Array, target: jax.Array, *, reduction: str = "mean", log_target: bool = False) -> jax.Array:
    """The Kullback-Leibler divergence, q (log(q) - log(p)).

    Args:
        input: the logarithms of p, any shape.
        target: q, or its logarithms; shapes broadcast.
        reduction: "batchmean" (the divergence: the sum divided by the size of axis 0), "mean" (over all elements, with
            torch's warning), "sum" or "none".
        log_target: whether the target holds logarithms.

    Source: torch.nn.functional.kl_div.

    Example:
        >>> half = jnp.array([[0.5, 0.5]])
        >>> kl_div(jnp.log(half), half, reduction="batchmean")
        Array(0., dtype=float32)
    """
    if reduction == "mean":
        warnings.warn(
            "kl_div: reduction='mean' divides by the number of elements; 'batchmean' divides by the batch size, as the"
            " definition of the divergence does",
            stacklevel=2,
        )
    x, y = alike(input, target)
    if log_target:
        loss = jnp.exp(y) * (y - x)
    else:
        loss = jnp.where(y == 0, 0, y * jnp.log(jnp.where(y == 0, 1, y))) - y * x
    if reduction == "batchmean":
        return loss.sum() / (input.shape[0] if input.ndim else 1)
    return reduced(loss, reduction)


@jax.custom_jvp
def _cross_entropy_of(p: jax.Array, y: jax.Array) -> jax.Array:
    return -(y * jnp.maximum(jnp.log(p), -100) + (1 - y) * jnp.maximum(jnp.log1p(-p), -100))


@_cross_entropy_of.defjvp
def _tangent(primals: Any, tangents: Any) -> Any:
    (p, y), (dp, dy) = primals, tangents
    by_p = (p - y) / jnp.maximum(p * (1 - p), 1e-12)  # torch's: finite at p = 0 and p = 1
    by_y = jnp.maximum(jnp.log1p(-p), -100) - jnp.maximum(jnp.log(p), -100)
    return _cross_entropy_of(p, y), by_p * dp + by_y * dy


def _same_shape(input: jax.Array, target: Any, name: str) -> tuple[jax.Array, jax.Array]:
    if input.shape != np.shape(target):
        raise ValueError(f"{name} needs a target of the input's shape {tuple(input.shape)}; got {np.shape(target)}")
    return alike(input, target)


def binary_cross_entropy(
    input: jax.Array, target: jax.Array, weight: jax.Array | None = None, *, reduction: str = "mean"
) -> jax.Array:
    """-(y log(p) + (1 - y) log(1 - p)), where the logarithms are at least -100.

    Args:
        input: probabilities, any shape. Unlike torch, numbers outside [0, 1] cannot raise in compiled code: they make
            the loss NaN.
        target: numbers in [0, 1], of the same shape.
        weight: of each element; a shape that broadcasts to the input's.
        reduction: "mean", "sum" or "none".

    Raises:
        ValueError: if shapes do not fit, or for another reduction.

    Source: torch.nn.functional.binary_cross_entropy.

    Example:
        >>> binary_cross_entropy(jnp.array([0.5, 0.0]), jnp.array([1.0, 1.0]), reduction="none")
        Array([  0.6931472, 100.       ], dtype=float32)
    """
    p, y = _same_shape(input, target, "binary_cross_entropy")
    loss = _cross_entropy_of(p, y)
    return reduced(loss if weight is None else loss * expanded(weight, loss), reduction)


def binary_cross_entropy_with_logits(
    input: jax.Array,
    target: jax.Array,
    weight: jax.Array | None = None,
    *,
    reduction: str = "mean",
    pos_weight: jax.Array | None = None,
) -> jax.Array:
    """The binary cross-entropy of sigmoid(x), without overflow.

    Args:
        input: scores, any shape.
        target: numbers in [0, 1], of the same shape.
        weight: of each element; a shape that broadcasts to the input's.
        reduction: "mean", "sum" or "none".
        pos_weight: what positive examples count, a shape that broadcasts to the input's.

    Raises:
        ValueError: if shapes do not fit, or for another reduction.

    Source: torch.nn.functional.binary_cross_entropy_with_logits.

    Example:
        >>> binary_cross_entropy_with_logits(jnp.array([0.0, 1000.0]), jnp.array([1.0, 1.0]), reduction="none")
        Array([0.6931472, 0.       ], dtype=float32)
    """
    x, y = _same_shape(input, target, "binary_cross_entropy_with_logits")
    positive = 1 if pos_weight is None else 1 + (expanded(pos_weight, x, "pos_weight") - 1) * y
    loss = (1 - y) * x + positive * jax.nn.softplus(-x)
    return reduced(loss if weight is None else loss * expanded(weight, loss), reduction)
