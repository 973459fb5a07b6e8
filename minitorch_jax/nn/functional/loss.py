"""Regression losses, divergences and binary cross-entropies, as functions."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...runtime.tracebacks import warn
from .autocast import in_float32, refused
from .distance import magnitude
from .dtypes import of_one_dtype, promoted, promoted_dtype, promoted_to_floats, wide
from .spatial import floating


def reduced(loss: jax.Array, reduction: str, dtype: Any = None) -> jax.Array:
    """The mean or the sum of the losses, or the losses themselves. The result has dtype `dtype`, if it is not None."""
    dtype = loss.dtype if dtype is None else dtype
    if reduction == "none":
        return loss.astype(dtype)
    if reduction == "sum":
        return loss.sum().astype(dtype)
    if reduction == "mean":
        return loss.mean().astype(dtype)
    raise ValueError(f"reduction must be 'mean', 'sum' or 'none'; got {reduction!r}")


def alike(name: str, *arrays: Any) -> tuple[list[jax.Array], Any]:
    """The arrays, broadcast and in float32 or wider, and the dtype of the result, to which the arrays promote."""
    arrays = tuple(promoted(*arrays))
    floating(arrays[0], name)
    return [wide(array) for array in jnp.broadcast_arrays(*arrays)], arrays[0].dtype


def expanded(weight: Any, like: jax.Array, name: str = "weight") -> jax.Array:
    """`weight`, broadcast to the shape of `like`, in float32 or wider."""
    shape = np.shape(weight)
    if len(shape) > like.ndim or any(n not in (1, m) for n, m in zip(shape[::-1], like.shape[::-1], strict=False)):
        raise ValueError(f"{name} must have a shape that broadcasts to the input's, {tuple(like.shape)}; got {shape}")
    (weight,) = promoted_to_floats(weight)
    return jnp.broadcast_to(wide(weight), like.shape)


def _warned(input: jax.Array, target: Any, name: str) -> tuple[list[jax.Array], Any]:
    """`alike`, with torch's warning if the shapes differ."""
    if input.shape != np.shape(target):
        warn(
            f"{name}: the target's shape {np.shape(target)} differs from the input's shape {input.shape}. They are"
            " broadcast, which is usually a mistake: pass arrays of one shape.",
        )
    return alike(name, input, target)


def _times(one: jax.Array, other: jax.Array) -> jax.Array:
    one, other = promoted(one, other)
    return one * other


def _weighted(loss: jax.Array, dtype: Any, input: jax.Array, weight: Any) -> tuple[jax.Array, Any, jax.Array | None]:
    """Multiply the losses by weights of the input's shape. Returns losses, the dtype of the result, and the weights."""
    if weight is None:
        return loss, dtype, None
    if np.shape(weight) != input.shape:
        raise ValueError(f"weight must have the input's shape {tuple(input.shape)}; got {np.shape(weight)}")
    dtype = promoted_dtype(dtype, weight)
    loss, weight = promoted(loss, weight)
    return loss * weight, dtype, weight


def _weighted_mean(loss: jax.Array, dtype: Any, input: jax.Array, weight: Any, reduction: str) -> jax.Array:
    """Reduce the losses with weights of the input's shape. The mean divides by the sum of the weights."""
    loss, dtype, weight = _weighted(loss, dtype, input, weight)
    if weight is not None and reduction == "mean":
        return (loss.sum() / weight.sum()).astype(dtype)
    return reduced(loss, reduction, dtype)


@in_float32
def l1_loss(
    input: jax.Array, target: jax.Array, *, reduction: str = "mean", weight: jax.Array | None = None
) -> jax.Array:
    """|x - y|; see `mse_loss` for the arguments.

    Example:
        >>> l1_loss(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0]))
        Array(1., dtype=float32)
    """
    (x, y), dtype = _warned(input, target, "l1_loss")
    return _weighted_mean(magnitude(x - y), dtype, input, weight, reduction)


@in_float32
def mse_loss(
    input: jax.Array, target: jax.Array, *, reduction: str = "mean", weight: jax.Array | None = None
) -> jax.Array:
    """(x - y)², averaged over all elements.

    Args:
        input: any shape.
        target: the same shape. Another shape is broadcast, with a warning, as in torch.
        reduction: "mean", "sum" or "none".
        weight: a weight for each element, of the input's shape. The mean divides by the sum of the weights.

    Most losses promote dtypes as torch does: float32 and bfloat16 to float32, integers and bfloat16 to bfloat16. Half
    precision is computed in float32, and only the result is rounded.

    Raises:
        ValueError: if shapes do not fit, or for another reduction.
        TypeError: if neither array is floating.

    Source: torch.nn.functional.mse_loss.

    Example:
        >>> mse_loss(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0]))
        Array(2., dtype=float32)
    """
    (x, y), dtype = _warned(input, target, "mse_loss")
    return _weighted_mean((x - y) ** 2, dtype, input, weight, reduction)


@in_float32
def smooth_l1_loss(input: jax.Array, target: jax.Array, *, reduction: str = "mean", beta: float = 1.0) -> jax.Array:
    """d² / (2 beta) where d = |x - y| < beta, d - beta / 2 elsewhere (Girshick, 2015).

    Args:
        input: any shape.
        target: the same shape. Another shape is broadcast, with a warning, as in torch.
        reduction: "mean", "sum" or "none".
        beta: the distance at which the parabola ends, at least 0.

    Raises:
        ValueError: if shapes do not fit, beta < 0, or for another reduction.
        TypeError: if neither array is floating.

    Example:
        >>> smooth_l1_loss(jnp.array([0.0, 0.0]), jnp.array([1.0, 3.0]), reduction="none")
        Array([0.5, 2.5], dtype=float32)
    """
    if beta < 0:
        raise ValueError(f"smooth_l1_loss needs beta >= 0; got {beta}")
    (x, y), dtype = _warned(input, target, "smooth_l1_loss")
    d = magnitude(x - y)
    if beta == 0:
        return reduced(d, reduction, dtype)
    near = jnp.where(d < beta, d, 0)  # the square of a large d would overflow and make the gradient NaN
    return reduced(jnp.where(d < beta, 0.5 / beta * near * near, d - 0.5 * beta), reduction, dtype)


@in_float32
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
        target: the same shape. Another shape is broadcast, with a warning, as in torch.
        reduction: "mean", "sum" or "none".
        delta: the distance at which the parabola ends, above 0.
        weight: a weight for each element, of the input's shape. The mean divides by the number of elements, as in torch.

    Raises:
        ValueError: if shapes do not fit, delta <= 0, or for another reduction.
        TypeError: if the input is not floating. The result has the input's dtype, as in torch.

    Example:
        >>> huber_loss(jnp.array([0.0, 0.0]), jnp.array([1.0, 3.0]), delta=2.0, reduction="none")
        Array([0.5, 4. ], dtype=float32)
    """
    if delta <= 0:
        raise ValueError(f"huber_loss needs delta > 0; got {delta}")
    floating(input, "huber_loss")
    (x, y), _ = _warned(input, target, "huber_loss")
    d = magnitude(x - y)
    near = jnp.where(d < delta, d, 0)  # as in smooth_l1_loss
    loss = jnp.where(d < delta, 0.5 * near * near, delta * (d - 0.5 * delta))
    loss, dtype, _ = _weighted(loss, promoted_dtype(input), input, weight)
    return reduced(loss, reduction, dtype)


@in_float32
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
        log_input: True if the input holds logarithms.
        full: True adds Stirling's approximation of log(y!), for y > 1.
        eps: added to an expected count before its logarithm is taken.
        reduction: "mean", "sum" or "none".

    Source: torch.nn.functional.poisson_nll_loss.

    Example:
        >>> poisson_nll_loss(jnp.array([0.0]), jnp.array([3.0]))
        Array(1., dtype=float32)
    """
    (x, y), dtype = alike("poisson_nll_loss", promoted_to_floats(input)[0], target)
    loss = jnp.exp(x) - y * x if log_input else x - y * jnp.log(x + eps)
    if full:
        safe = jnp.where(y > 1, y, 1)
        loss += jnp.where(y > 1, y * jnp.log(safe) - y + 0.5 * jnp.log(2 * math.pi * safe), 0)
    return reduced(loss, reduction, dtype)


@in_float32
def gaussian_nll_loss(
    input: jax.Array,
    target: jax.Array,
    var: jax.Array | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> jax.Array:
    """The negative log-likelihood of samples under normal distributions, (log(v) + (x - y)² / v) / 2.

    Args:
        input: the means, `(*, D)`.
        target: the samples; a shape that broadcasts with that of `input`.
        var: the variances: a number, an array of the input's shape, of that shape without its last axis, or with one
            axis of size 1.
        full: True adds log(2π) / 2.
        eps: the smallest variance. Smaller ones are replaced by it, but keep their gradients, as in torch.
        reduction: "mean", "sum" or "none".

    Raises:
        ValueError: if shapes do not fit, or `var` is a negative number. Unlike torch, negative variances in an array
            cannot raise in compiled code: they make the loss NaN.
        TypeError: if `var` is an array of integers.

    Source: torch.nn.functional.gaussian_nll_loss; Nix and Weigend, 1994.

    Example:
        >>> gaussian_nll_loss(jnp.array([0.0, 0.0]), jnp.array([1.0, 3.0]), 1.0)
        Array(2.5, dtype=float32)
    """
    if not isinstance(var, int | float):
        floating(var, "gaussian_nll_loss", "var")
    elif var < 0:
        raise ValueError(f"var must be at least 0; got {var}")
    (x, y), dtype = alike("gaussian_nll_loss", promoted_to_floats(input)[0], target)
    dtype = promoted_dtype(dtype, var)
    v = jnp.asarray(var, x.dtype if isinstance(var, int | float) else None)
    if v.ndim and v.shape == input.shape[:-1]:
        v = v[..., None]
    off = [n for n, m in zip(v.shape, input.shape, strict=False) if n != m]
    if v.ndim and (v.ndim != input.ndim or off not in ([], [1])):
        raise ValueError(
            f"var must be a number, or have the input's shape {tuple(input.shape)}, that shape without its last axis, or"
            f" that shape with one axis of size 1; got {np.shape(var)}"
        )
    x, y, v = promoted(x, y, expanded(v, x, "var"))
    clamped = jnp.where(v < 0, jnp.nan, jnp.maximum(v, eps))
    v = jax.lax.stop_gradient(clamped) + (v - jax.lax.stop_gradient(v))
    loss = 0.5 * (jnp.log(v) + (x - y) * ((x - y) / v))
    return reduced(loss + 0.5 * math.log(2 * math.pi) if full else loss, reduction, dtype)


@in_float32
def kl_div(input: jax.Array, target: jax.Array, *, reduction: str = "mean", log_target: bool = False) -> jax.Array:
    """The Kullback-Leibler divergence, q (log(q) - log(p)).

    Args:
        input: the logarithms of p, any shape.
        target: q, or its logarithms; shapes broadcast.
        reduction: "batchmean" (the sum divided by the size of axis 0, which is the divergence), "mean" (over all
            elements, with torch's warning), "sum" or "none".
        log_target: True if the target holds logarithms.

    Raises:
        ValueError: if shapes do not broadcast, or for another reduction.
        TypeError: if the input or the target is not floating.

    Source: torch.nn.functional.kl_div.

    Example:
        >>> half = jnp.array([[0.5, 0.5]])
        >>> kl_div(jnp.log(half), half, reduction="batchmean")
        Array(0., dtype=float32)
    """
    if reduction == "mean":
        warn(
            "kl_div: reduction='mean' divides by the number of elements, not by the batch size as the divergence is"
            " defined. Pass reduction='batchmean' for the divergence.",
        )
    floating(input, "kl_div")
    floating(target, "kl_div", "target")
    (x, y), dtype = alike("kl_div", input, target)
    if log_target:
        loss = jnp.exp(y) * (y - x)
    else:
        loss = jnp.where(y == 0, 0, y * jnp.log(jnp.where(y == 0, 1, y))) - y * x
    if reduction == "batchmean":
        return (loss.sum() / (input.shape[0] if input.ndim else 1)).astype(dtype)
    return reduced(loss, reduction, dtype)


@jax.custom_jvp
def _cross_entropy_of(p: jax.Array, y: jax.Array) -> jax.Array:
    return -(y * jnp.maximum(jnp.log(p), -100) + (1 - y) * jnp.maximum(jnp.log1p(-p), -100))


@_cross_entropy_of.defjvp
def _tangent(primals: Any, tangents: Any) -> Any:
    (p, y), (dp, dy) = primals, tangents
    by_p = (p - y) / jnp.maximum(p * (1 - p), 1e-12)  # as in torch: finite at p = 0 and p = 1
    by_y = jnp.maximum(jnp.log1p(-p), -100) - jnp.maximum(jnp.log(p), -100)
    return _cross_entropy_of(p, y), by_p * dp + by_y * dy


def _same_shape(input: jax.Array, target: Any, name: str) -> tuple[list[jax.Array], Any]:
    floating(input, name)
    floating(target, name, "target")
    if input.shape != np.shape(target):
        raise ValueError(f"{name} needs a target of the input's shape {tuple(input.shape)}; got {np.shape(target)}")
    return alike(name, input, target)


@refused("binary_cross_entropy_with_logits")
def binary_cross_entropy(
    input: jax.Array, target: jax.Array, weight: jax.Array | None = None, *, reduction: str = "mean"
) -> jax.Array:
    """-(y log(p) + (1 - y) log(1 - p)), where the logarithms are at least -100.

    Args:
        input: probabilities, any shape. Unlike torch, numbers outside [0, 1] cannot raise in compiled code: they make
            the loss NaN.
        target: numbers in [0, 1], of the same shape.
        weight: a weight for each element; a shape that broadcasts to the input's.
        reduction: "mean", "sum" or "none".

    Raises:
        ValueError: if shapes do not fit, or for another reduction.
        TypeError: if the input and the target do not have the same floating dtype, as in torch.

    Source: torch.nn.functional.binary_cross_entropy.

    Example:
        >>> binary_cross_entropy(jnp.array([0.5, 0.0]), jnp.array([1.0, 1.0]), reduction="none")
        Array([  0.6931472, 100.       ], dtype=float32)
    """
    input, target = of_one_dtype("binary_cross_entropy", input=input, target=target)
    (p, y), dtype = _same_shape(input, target, "binary_cross_entropy")
    loss = _cross_entropy_of(p, y)
    return reduced(loss if weight is None else _times(loss, expanded(weight, loss)), reduction, dtype)


@in_float32
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
        weight: a weight for each element; a shape that broadcasts to the input's.
        reduction: "mean", "sum" or "none".
        pos_weight: the weight of positive examples; a shape that broadcasts to the input's.

    Raises:
        ValueError: if shapes do not fit, or for another reduction.
        TypeError: if the input or the target is not floating, as in torch: class numbers need `.astype(float)`.

    Source: torch.nn.functional.binary_cross_entropy_with_logits. Differs from PyTorch: the result has the dtype that
    input and target promote to. In torch it has the target's.

    Example:
        >>> binary_cross_entropy_with_logits(jnp.array([0.0, 1000.0]), jnp.array([1.0, 1.0]), reduction="none")
        Array([0.6931472, 0.       ], dtype=float32)
    """
    (x, y), dtype = _same_shape(input, target, "binary_cross_entropy_with_logits")
    loss = jax.nn.softplus(-x)
    if pos_weight is not None:
        loss = _times(loss, 1 + _times(expanded(pos_weight, x, "pos_weight") - 1, y))
    loss = (1 - y) * x + loss.astype(x.dtype)
    return reduced(loss if weight is None else _times(loss, expanded(weight, loss)), reduction, dtype)
