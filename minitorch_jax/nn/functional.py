"""The stateless forms of layers and losses, as in torch.nn.functional."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp

from .. import random


def relu(input: jax.Array) -> jax.Array:
    """max(x, 0), elementwise; its derivative at 0 is 0.

    Example:
        >>> relu(jnp.array([-1.0, 2.0]))
        Array([0., 2.], dtype=float32)
    """
    return jax.nn.relu(input)


def tanh(input: jax.Array) -> jax.Array:
    """The hyperbolic tangent, elementwise."""
    return jnp.tanh(input)


def sigmoid(input: jax.Array) -> jax.Array:
    """1 / (1 + exp(-x)), elementwise."""
    return jax.nn.sigmoid(input)


def gelu(input: jax.Array, approximate: str = "none") -> jax.Array:
    """x Φ(x), elementwise (Hendrycks and Gimpel, 2016).

    Args:
        input: any shape.
        approximate: "none" for the error function, "tanh" for the approximation by a tanh.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh'; got {approximate!r}")
    return jax.nn.gelu(input, approximate=approximate == "tanh")


def _softmax_dim(input: jax.Array, dim: int | None, name: str) -> int:
    if dim is None:
        dim = 0 if input.ndim in (0, 1, 3) else 1
        warnings.warn(f"{name} without dim takes {dim} here, as torch does; pass dim={dim} to say so", stacklevel=3)
    return dim


def softmax(input: jax.Array, dim: int | None = None) -> jax.Array:
    """exp(x) / sum(exp(x)) along `dim`.

    Example:
        >>> softmax(jnp.zeros((1, 4)), dim=1)
        Array([[0.25, 0.25, 0.25, 0.25]], dtype=float32)
    """
    return jax.nn.softmax(input, axis=_softmax_dim(input, dim, "softmax"))


def log_softmax(input: jax.Array, dim: int | None = None) -> jax.Array:
    """log(softmax(x)) along `dim`, without overflow."""
    return jax.nn.log_softmax(input, axis=_softmax_dim(input, dim, "log_softmax"))


def _probability(p: float) -> float:
    """`p` as a float, or the error that says why it is no probability of dropout."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    return float(p)


def dropout(input: jax.Array, p: float = 0.5, training: bool = True, *, key: Any = None) -> jax.Array:
    """Zeroes each element with probability `p`, scales the others by 1 / (1 - p); the input itself if not `training`.

    Args:
        input: any shape, floating; its dtype is kept.
        p: a number in [0, 1], static.
        training: whether to drop anything.
        key: a `jax.random` key; without it, the next of the current stream (`mt.seed`, `mt.rng`). None is drawn if not
            `training`, at p = 0 and at p = 1.

    Raises:
        ValueError: if `p` is not in [0, 1].
        TypeError: if it is not a number, or something is to be dropped from an input that is not floating.

    Source: torch.nn.functional.dropout. Differs from PyTorch: takes `key`, and no `inplace`.

    Example:
        >>> dropout(jnp.ones(6), p=0.5, key=jax.random.key(0))
        Array([0., 0., 2., 2., 0., 2.], dtype=float32)
    """
    p = _probability(p)
    if not training or p == 0.0:
        return input
    if not jnp.issubdtype(input.dtype, jnp.inexact):
        raise TypeError(f"dropout needs a floating input; got {input.dtype}. Convert it with `.astype(float)`.")
    if p == 1.0:
        return jnp.zeros_like(input)
    kept = jax.random.bernoulli(random.next_key(key), jnp.float32(1.0 - p), input.shape)
    return jnp.where(kept, input / (1.0 - p), 0)


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
