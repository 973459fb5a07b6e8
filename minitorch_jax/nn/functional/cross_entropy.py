"""Losses that compare scores or log-probabilities with classes, as functions."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ...module.parameter import is_narrow, wide_dtype
from ...runtime.platforms import on_cpu
from .autocast import in_float32
from .dtypes import of_one_dtype, promoted, promoted_dtype, wide
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


def _normalized(input: jax.Array, axis: int) -> tuple[jax.Array, Any, Any]:
    """Scores, and two numbers for each place without the class axis: log(softmax(x)) is scores - shift - log_sum.

    The difference of arrays of the input's size is left to be computed only where it is used.
    """
    if is_narrow(input):
        return log_softmax_of(input, axis), 0.0, 0.0
    shift = lax.stop_gradient(jnp.max(input, axis, keepdims=True, initial=-jnp.inf))
    return input, shift.squeeze(axis), jnp.log(jnp.exp(input - shift).sum(axis))


def _at_class(scores: jax.Array, target: jax.Array, axis: int) -> jax.Array:
    """The score of each target's class."""

    def gathered(scores: jax.Array, target: jax.Array) -> jax.Array:
        own = jnp.take_along_axis(scores, jnp.expand_dims(target, axis), axis, mode="promise_in_bounds")
        return own.squeeze(axis)

    def masked(scores: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.where(class_mask(target, scores.shape[axis], axis)[0], scores, 0).sum(axis)

    if not scores.shape[axis]:
        return masked(scores, target)
    return on_cpu(gathered, masked, scores, target)


class Losses(NamedTuple):
    """Losses before they are reduced."""

    each: jax.Array  # in float32 or wider
    weights: jax.Array | None  # for the mean, 0 for targets that do not count; None if the mean is not weighted


def reduced_losses(losses: Losses, reduction: str, dtype: Any) -> jax.Array:
    if reduction == "mean" and losses.weights is not None:
        return (losses.each.sum() / losses.weights.sum()).astype(dtype)
    return reduced(losses.each, reduction, dtype)


def _of_classes(
    scores: jax.Array,
    shift: Any,
    log_sum: Any,
    target: jax.Array,
    weight: jax.Array | None,
    axis: int,
    ignore_index: int,
    smoothing: float,
) -> Losses:
    """The losses for targets that are class numbers, and log-probabilities scores - shift - log_sum."""
    weights = _class_weights(scores, weight, axis)
    class_shape = scores.shape[:axis] + scores.shape[axis + 1 :]
    if target.shape != class_shape or not jnp.issubdtype(target.dtype, jnp.integer):
        raise ValueError(
            f"for scores {scores.shape}, class numbers must have shape {class_shape}; got {target.shape} of"
            f" {target.dtype}"
        )
    target = target.astype(jnp.int32)
    classes = scores.shape[axis]
    kept, valid = target != ignore_index, (target >= 0) & (target < classes)
    own_class = jnp.where(kept & valid, target, 0)
    own_weight: Any = jnp.ones(class_shape, weights.dtype)
    if weight is not None:  # by a mask: on a mesh, weights and targets may lie differently
        own_weight = jnp.where(class_mask(own_class, classes, axis)[0], weights, 0).sum(axis)
    loss = -(wide(_at_class(scores, own_class, axis)) - shift - log_sum) * own_weight
    if smoothing:
        shifted = scores - jnp.expand_dims(shift, axis) if isinstance(shift, jax.Array) else scores
        rest = (weights * wide(shifted)).sum(axis) - log_sum * jnp.broadcast_to(weights, scores.shape).sum(axis)
        loss = (1 - smoothing) * loss - smoothing / max(classes, 1) * rest
    loss = jnp.where(kept, jnp.where(valid, loss, jnp.nan), 0)
    return Losses(loss, jnp.where(kept, own_weight, 0))


@in_float32
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
    losses = _of_classes(input, 0.0, 0.0, jnp.asarray(target), weight, axis, ignore_index, 0.0)
    return reduced_losses(losses, reduction, input.dtype)


@in_float32
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
    losses, dtype = cross_entropies(input, jnp.asarray(target), weight, ignore_index, label_smoothing)
    return reduced_losses(losses, reduction, dtype)


@in_float32
def cross_entropies(
    input: jax.Array, target: jax.Array, weight: jax.Array | None, ignore_index: int, label_smoothing: float
) -> tuple[Losses, Any]:
    """The losses of `cross_entropy` before they are reduced, and the dtype of the result."""
    axis = _class_axis(input, "cross_entropy")
    floating(input, "cross_entropy")
    if not jnp.issubdtype(target.dtype, jnp.floating):
        input, weight = of_one_dtype("cross_entropy", input=input, weight=weight)
        losses = _of_classes(*_normalized(input, axis), target, weight, axis, ignore_index, label_smoothing)
        return losses, input.dtype
    if target.shape != input.shape:
        raise ValueError(
            f"target probabilities must have the input's shape {input.shape}; got {target.shape}. Class numbers must be"
            " integers: `y.astype(int)`"
        )
    if ignore_index >= 0:
        raise ValueError(
            f"ignore_index is for class numbers; the targets are probabilities; got ignore_index={ignore_index}"
        )
    input, target = promoted(input, target)
    dtype = input.dtype if weight is None else promoted_dtype(input, weight)
    scores, shift, log_sum = _normalized(input, axis)
    scores = scores - jnp.expand_dims(shift, axis) if isinstance(shift, jax.Array) else scores
    weights, scores, log_sum, target = promoted(_class_weights(input, weight, axis), scores, log_sum, target)
    share = weights * (target * (1 - label_smoothing) + label_smoothing / max(input.shape[axis], 1))
    return Losses(log_sum * share.sum(axis) - (share * scores).sum(axis), None), dtype
