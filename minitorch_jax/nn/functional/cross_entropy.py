"""Losses that compare scores or log-probabilities with classes, as functions."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from ...module.parameter import wide_dtype
from .dtypes import of_one_dtype, promoted, promoted_dtype, wide
from .linear import linear
from .loss import reduced
from .softmax import log_softmax_of
from .spatial import floating


def class_mask(target: jax.Array, classes: int, axis: int) -> tuple[jax.Array, jax.Array]:
    """Two masks: True at the class of each target, along a new axis; and True where the target is a class at all."""
    across = [classes if i == axis else 1 for i in range(target.ndim + 1)]
    mask = jnp.expand_dims(target, axis) == jnp.arange(classes, dtype=target.dtype).reshape(across)
    return mask, (target >= 0) & (target < classes)


def _class_axis(input: jax.Array, name: str) -> int:
    if input.ndim == 0:
        raise ValueError(f"{name} needs scores of shape (C,), (N, C) or (N, C, ...); got a scalar")
    return 0 if input.ndim == 1 else 1


def _class_weights(input: jax.Array, weight: jax.Array | None, axis: int) -> jax.Array:
    """The class weights, shaped to broadcast with the input, in float32 or wider. Ones if `weight` is None."""
    across = [n if i == axis else 1 for i, n in enumerate(input.shape)]
    if weight is None:
        return jnp.ones(across, wide_dtype(input.dtype))
    if weight.shape != (input.shape[axis],):
        raise ValueError(f"weight must have shape ({input.shape[axis]},), one per class; got {weight.shape}")
    return wide(weight).reshape(across)


def _of_classes(
    log_p: jax.Array,
    target: jax.Array,
    weights: jax.Array,
    axis: int,
    ignore_index: int,
    smoothing: float,
    reduction: str,
) -> jax.Array:
    """The loss for targets that are class numbers."""
    class_shape = log_p.shape[:axis] + log_p.shape[axis + 1 :]
    if target.shape != class_shape or not jnp.issubdtype(target.dtype, jnp.integer):
        raise ValueError(
            f"for scores {log_p.shape}, class numbers must have shape {class_shape}; got {target.shape} of"
            f" {target.dtype}"
        )
    target = target.astype(jnp.int32)
    kept = target != ignore_index
    classes = log_p.shape[axis]
    mask, valid = class_mask(jnp.where(kept, target, 0), classes, axis)
    own_weight = jnp.where(mask, weights, 0).sum(axis)
    loss = -wide(jnp.where(mask, log_p, 0).sum(axis)) * own_weight
    if smoothing:
        loss = (1 - smoothing) * loss - smoothing / max(classes, 1) * (weights * wide(log_p)).sum(axis)
    loss = jnp.where(kept, jnp.where(valid, loss, jnp.nan), 0)
    if reduction == "mean":
        return (loss.sum() / jnp.where(kept, own_weight, 0).sum()).astype(log_p.dtype)
    return reduced(loss, reduction, log_p.dtype)


def nll_loss(
    input: jax.Array,
    target: jax.Array,
    weight: jax.Array | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> jax.Array:
    """The negative log-likelihood of classes, -log(p)[y].

    Args:
        input: log-probabilities, `(C,)`, `(N, C)` or `(N, C, d1, …)`.
        target: class numbers (integers), `()`, `(N,)` or `(N, d1, …)`. Unlike torch, a class number out of range cannot
            raise in compiled code: it makes the loss NaN.
        weight: the weight of each class, `(C,)`.
        ignore_index: targets of this class number do not count.
        reduction: "mean" (the weighted mean of the targets that count), "sum" or "none".

    Returns:
        The loss, `()`. With "none", one loss for each class number.

    Raises:
        ValueError: if shapes do not fit, or for another reduction.
        TypeError: if the input is not floating, or the weight has another dtype.

    Source: torch.nn.functional.nll_loss.

    Example:
        >>> nll_loss(jnp.array([[-1.0, -2.0]]), jnp.array([1]))
        Array(2., dtype=float32)
    """
    axis = _class_axis(input, "nll_loss")
    floating(input, "nll_loss")
    input, weight = of_one_dtype("nll_loss", input=input, weight=weight)
    weights = _class_weights(input, weight, axis)
    return _of_classes(input, jnp.asarray(target), weights, axis, ignore_index, 0.0, reduction)


def cross_entropy(
    input: jax.Array,
    target: jax.Array,
    weight: jax.Array | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> jax.Array:
    """The cross-entropy between unnormalised scores and classes.

    Args:
        input: scores, `(C,)`, `(N, C)` or `(N, C, d1, …)`.
        target: class numbers (integers), `()`, `(N,)` or `(N, d1, …)`; or probabilities of the input's shape. Unlike
            torch, a class number out of range cannot raise in compiled code: it makes the loss NaN.
        weight: the weight of each class, `(C,)`.
        ignore_index: targets of this class number do not count.
        reduction: "mean" (the weighted mean of the targets that count), "sum" or "none".
        label_smoothing: the share of a uniform target, between 0 and 1.

    Returns:
        The loss, `()`. With "none", one loss for each class number.

    Raises:
        ValueError: if shapes do not fit, or an argument is out of range.
        TypeError: if the input is not floating. For class numbers, also if the weight has another dtype. For
            probabilities, the result has the dtype that all arguments promote to.

    Source: torch.nn.functional.cross_entropy.

    Example:
        >>> cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3]))
        Array(1.3862944, dtype=float32)
    """
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1]; got {label_smoothing}")
    target, axis = jnp.asarray(target), _class_axis(input, "cross_entropy")
    floating(input, "cross_entropy")
    if not jnp.issubdtype(target.dtype, jnp.floating):
        input, weight = of_one_dtype("cross_entropy", input=input, weight=weight)
        weights = _class_weights(input, weight, axis)
        log_p = log_softmax_of(input, axis)
        return _of_classes(log_p, target, weights, axis, ignore_index, label_smoothing, reduction)
    if target.shape != input.shape:
        raise ValueError(f"target probabilities must have the input's shape {input.shape}; got {target.shape}")
    if ignore_index >= 0:
        raise ValueError(
            f"ignore_index is for class numbers; the targets are probabilities; got ignore_index={ignore_index}"
        )
    input, target = promoted(input, target)
    dtype = input.dtype if weight is None else promoted_dtype(input, weight)
    weights, log_p, target = promoted(_class_weights(input, weight, axis), log_softmax_of(input, axis), target)
    smooth = target * (1 - label_smoothing) + label_smoothing / max(input.shape[axis], 1)
    loss = -(weights * smooth * log_p).sum(axis)
    return reduced(loss, reduction, dtype)


def linear_cross_entropy(
    input: jax.Array,
    linear_weight: jax.Array,
    target: jax.Array,
    *,
    linear_bias: jax.Array | None = None,
    weight: jax.Array | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """The cross-entropy of x W^T + b.

    Args:
        input: `(in_features,)` or `(N, in_features)`.
        linear_weight: `(C, in_features)`, or `(C, d1, …, in_features)` for a batch.
        target: class numbers, `()`, `(N,)` or `(N, d1, …)`; or probabilities, `(C,)`, `(N, C)` or `(N, C, d1, …)`.
        linear_bias: `(C,)` or `(C, d1, …)`.
        weight: the weight of each class, `(C,)`.
        reduction: "mean", "sum" or "none".
        ignore_index: targets of this class number do not count; -100 by default. Not allowed for probabilities.
        label_smoothing: the share of a uniform target, between 0 and 1.

    Raises:
        ValueError: if shapes do not fit, or an argument is out of range.

    Source: torch.nn.functional.linear_cross_entropy. Differs from PyTorch: it has no `options` (torch's chunking).

    Example:
        >>> linear_cross_entropy(jnp.ones((2, 3)), jnp.zeros((4, 3)), jnp.array([0, 3]))
        Array(1.3862944, dtype=float32)
    """
    shape = linear_weight.shape[:-1]
    if not 1 <= input.ndim <= 2 or not shape or input.shape[-1] != linear_weight.shape[-1]:
        raise ValueError(
            f"linear_cross_entropy takes an input (in_features,) or (N, in_features) and a linear_weight"
            f" (C, ..., in_features); got {tuple(input.shape)} and {tuple(linear_weight.shape)}"
        )
    if len(shape) > 1 and input.ndim == 1:
        raise ValueError(
            f"a linear_weight of shape {tuple(linear_weight.shape)} needs an input (N, in_features); got shape"
            f" {tuple(input.shape)}"
        )
    if linear_bias is not None and linear_bias.shape != shape:
        raise ValueError(f"linear_bias must have shape {tuple(shape)}; got {tuple(linear_bias.shape)}")
    flat: Any = None if linear_bias is None else linear_bias.reshape(-1)
    scores = linear(input, linear_weight.reshape(math.prod(shape), input.shape[-1]), flat).reshape(
        input.shape[:-1] + shape
    )
    if ignore_index is not None and jnp.shape(target) == scores.shape:
        raise ValueError(
            f"ignore_index is for class numbers; the targets are probabilities; got ignore_index={ignore_index}"
        )
    return cross_entropy(
        scores,
        target,
        weight,
        ignore_index=-100 if ignore_index is None else ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
