"""Losses as functions."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp


def _reduced(loss: jax.Array, reduction: str) -> jax.Array:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.mean()
    raise ValueError(f"reduction must be 'mean', 'sum' or 'none'; got {reduction!r}")


def mse_loss(input: jax.Array, target: jax.Array, reduction: str = "mean") -> jax.Array:
    """The squared difference, averaged over all elements.

    Args:
        input: any shape.
        target: the same shape; another one is broadcast, with a warning, as in torch.
        reduction: "mean", "sum" or "none".

    Example:
        >>> mse_loss(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0]))
        Array(2., dtype=float32)
    """
    target = jnp.asarray(target)
    if input.shape != target.shape:
        warnings.warn(
            f"mse_loss: the target's shape {target.shape} differs from the input's {input.shape}: they are broadcast,"
            " which is seldom what was meant",
            stacklevel=2,
        )
        input, target = jnp.broadcast_arrays(input, target)
    return _reduced((input - target.astype(input.dtype)) ** 2, reduction)


def cross_entropy(
    input: jax.Array,
    target: jax.Array,
    weight: jax.Array | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> jax.Array:
    """The cross-entropy between unnormalised scores and classes.

    Args:
        input: scores, `(C,)`, `(N, C)` or `(N, C, d1, …)`.
        target: class numbers (integers), `()`, `(N,)` or `(N, d1, …)`; or probabilities of the input's shape. Unlike
            torch, a class number out of range cannot raise in compiled code: it makes the loss NaN.
        weight: of each class, `(C,)`.
        ignore_index: a class number that counts for nothing.
        reduction: "mean" (over what is not ignored, weighted), "sum" or "none".
        label_smoothing: between 0 and 1, the share of a uniform target.

    Returns:
        The loss, `()`; with "none", of the shape of the class numbers.

    Raises:
        ValueError: if shapes do not fit, or an argument is out of range.

    Source: torch.nn.functional.cross_entropy.

    Example:
        >>> cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3]))
        Array(1.3862944, dtype=float32)
    """
    target = jnp.asarray(target)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1]; got {label_smoothing}")
    axis = 0 if input.ndim == 1 else 1
    if input.ndim == 0:
        raise ValueError("cross_entropy needs scores of shape (C,), (N, C) or (N, C, ...); got a scalar")
    classes = input.shape[axis]
    class_shape = input.shape[:axis] + input.shape[axis + 1 :]
    if weight is not None and weight.shape != (classes,):
        raise ValueError(f"weight must have shape ({classes},), one per class; got {weight.shape}")
    across = tuple(classes if i == axis else 1 for i in range(input.ndim))
    weights = jnp.ones(across, input.dtype) if weight is None else weight.astype(input.dtype).reshape(across)
    log_p = jax.nn.log_softmax(input, axis=axis)
    if jnp.issubdtype(target.dtype, jnp.floating):
        if target.shape != input.shape:
            raise ValueError(f"probabilities must have the input's shape {input.shape}; got {target.shape}")
        if ignore_index >= 0:
            raise ValueError("ignore_index is for class numbers; these targets are probabilities")
        smooth = target.astype(input.dtype) * (1 - label_smoothing) + label_smoothing / classes
        loss = -(weights * smooth * log_p).sum(axis)
        count: Any = max(loss.size, 1)
    else:
        if target.shape != class_shape:
            raise ValueError(
                f"for scores {input.shape}, class numbers must have shape {class_shape}; got {target.shape}"
            )
        kept = target != ignore_index
        index = jnp.expand_dims(jnp.where(kept, target, 0), axis)
        one_hot = index == jnp.arange(classes, dtype=index.dtype).reshape(across)
        in_range = (index >= 0) & (index < classes)
        own_weight = jnp.where(one_hot, weights, 0).sum(axis)
        loss = -jnp.where(one_hot, log_p, 0).sum(axis) * own_weight
        if label_smoothing:
            loss = (1 - label_smoothing) * loss - label_smoothing / classes * (weights * log_p).sum(axis)
        loss = jnp.where(in_range.squeeze(axis), loss, jnp.nan)
        loss = jnp.where(kept, loss, 0)
        count = jnp.where(kept, own_weight, 0).sum()
    return loss.sum() / count if reduction == "mean" else _reduced(loss, reduction)
