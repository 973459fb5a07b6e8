"""Margin losses, as functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .autocast import in_float32
from .cross_entropy import class_mask
from .distance import norm, pairwise_distance
from .dtypes import of_one_dtype, promoted, promoted_dtype, promoted_to_floats, wide
from .loss import alike, expanded, reduced
from .spatial import floating


def _positive(x: jax.Array) -> jax.Array:
    """max(x, 0) with derivative 1 at 0, as torch's clamp."""
    return jnp.where(x < 0, 0, x)


def _is(target: jax.Array, sign: int) -> jax.Array:
    """True where the target equals `sign` (1 or -1) in the target's dtype: 255 is uint8's -1, as in torch."""
    return target == jnp.asarray(sign).astype(target.dtype)


@in_float32
def margin_ranking_loss(
    input1: jax.Array, input2: jax.Array, target: jax.Array, margin: float = 0.0, *, reduction: str = "mean"
) -> jax.Array:
    """max(0, margin - y (x1 - x2)).

    Args:
        input1: scores, any shape.
        input2: scores; shapes of the same number of dimensions broadcast.
        target: 1 where `input1` must be larger, -1 where `input2` must be larger.
        margin: the required difference.
        reduction: "mean", "sum" or "none".

    Raises:
        ValueError: if the arrays do not have the same number of dimensions.

    Source: torch.nn.functional.margin_ranking_loss.

    Example:
        >>> margin_ranking_loss(jnp.array([1.0]), jnp.array([3.0]), jnp.array([1]))
        Array(2., dtype=float32)
    """
    shapes = [tuple(jnp.shape(x)) for x in (input1, input2, target)]
    if len({len(shape) for shape in shapes}) > 1:
        raise ValueError(f"margin_ranking_loss needs three arrays of the same number of dimensions; got {shapes}")
    (x1, x2, y), dtype = alike("margin_ranking_loss", *promoted_to_floats(input1, input2, target))
    return reduced(_positive(margin - y * (x1 - x2)), reduction, dtype)


@in_float32
def hinge_embedding_loss(
    input: jax.Array, target: jax.Array, margin: float = 1.0, *, reduction: str = "mean"
) -> jax.Array:
    """x where y = 1, max(0, margin - x) where y = -1.

    Args:
        input: distances of pairs, any shape.
        target: 1 for similar pairs, -1 for dissimilar pairs; shapes broadcast.
        margin: dissimilar pairs at this distance or more have loss 0.
        reduction: "mean", "sum" or "none".

    Source: torch.nn.functional.hinge_embedding_loss.

    Example:
        >>> hinge_embedding_loss(jnp.array([0.25, 0.25]), jnp.array([1, -1]), reduction="none")
        Array([0.25, 0.75], dtype=float32)
    """
    input = jnp.asarray(input)
    floating(input, "hinge_embedding_loss")
    x, y = jnp.broadcast_arrays(wide(input), jnp.asarray(target))
    loss = jnp.where(_is(y, -1), 0, x) + jnp.where(_is(y, 1), 0, _positive(margin - x))
    return reduced(loss, reduction, input.dtype)


@in_float32
def soft_margin_loss(input: jax.Array, target: jax.Array, *, reduction: str = "mean") -> jax.Array:
    """log(1 + exp(-y x)), where y, the target, is 1 or -1; shapes broadcast.

    Example:
        >>> soft_margin_loss(jnp.array([0.0, 1000.0]), jnp.array([1, -1]), reduction="none")
        Array([6.931472e-01, 1.000000e+03], dtype=float32)
    """
    input = jnp.asarray(input)
    floating(input, "soft_margin_loss")
    (x, y), _ = alike("soft_margin_loss", input, target)
    return reduced(jax.nn.softplus(-y * x), reduction, input.dtype)


@in_float32
def multilabel_soft_margin_loss(
    input: jax.Array, target: jax.Array, weight: jax.Array | None = None, *, reduction: str = "mean"
) -> jax.Array:
    """The binary cross-entropy of sigmoid(x), averaged over the last axis.

    Args:
        input: scores, `(*, C)`.
        target: 1 for each class that applies, else 0; shapes broadcast.
        weight: the weight of each class, `(C,)`, or any shape that broadcasts to the input's.
        reduction: "mean", "sum" or "none", over the remaining axes.

    Source: torch.nn.functional.multilabel_soft_margin_loss.

    Example:
        >>> multilabel_soft_margin_loss(jnp.zeros((1, 3)), jnp.array([[1, 0, 1]]))
        Array(0.6931472, dtype=float32)
    """
    if input.ndim == 0:
        raise ValueError("multilabel_soft_margin_loss needs scores of shape (..., C); got a scalar")
    floating(input, "multilabel_soft_margin_loss")
    (x, y), dtype = alike("multilabel_soft_margin_loss", input, target)
    loss = -(y * jax.nn.log_sigmoid(x) + (1 - y) * jax.nn.log_sigmoid(-x))
    if weight is not None:
        dtype = promoted_dtype(dtype, weight)
        loss, weight = promoted(loss, expanded(weight, loss))
        loss = loss * weight
    return reduced(loss.mean(-1), reduction, dtype)


@in_float32
def multilabel_margin_loss(input: jax.Array, target: jax.Array, *, reduction: str = "mean") -> jax.Array:
    """sum over j, i of max(0, 1 - (x[y[j]] - x[i])) / C, where the classes y[j] apply and the classes i do not.

    Args:
        input: scores, `(C,)` or `(N, C)`.
        target: the same shape. Each row holds the numbers of the classes that apply, then -1; anything after -1 is
            ignored. Unlike torch, a number out of range cannot raise in compiled code: it makes the loss NaN.
        reduction: "mean", "sum" or "none".

    Raises:
        ValueError: if shapes do not fit.

    Source: torch.nn.functional.multilabel_margin_loss.

    Example:
        >>> multilabel_margin_loss(jnp.array([0.1, 0.2, 0.4, 0.8]), jnp.array([3, 0, -1, 1]))
        Array(0.85, dtype=float32)
    """
    input = jnp.asarray(input)
    floating(input, "multilabel_margin_loss")
    dtype, input, target = input.dtype, wide(input), jnp.asarray(target)
    if max(input.ndim, target.ndim) <= 1 and input.size == target.size:  # as in torch, a scalar is one class
        input, target = input.reshape(input.size), target.reshape(input.size)
    if input.shape != target.shape or not 1 <= input.ndim <= 2 or not input.shape[-1]:
        raise ValueError(
            "multilabel_margin_loss takes an input and a target of one shape, (C,) or (N, C), with at least one class;"
            f" got {tuple(input.shape)} and {tuple(target.shape)}"
        )
    classes = input.shape[-1]
    listed = jnp.cumprod((target >= 0).astype(jnp.int32), -1) == 1
    mask, valid = class_mask(jnp.where(listed, target.astype(jnp.int32), 0), classes, input.ndim)  # (..., j, i)
    own = jnp.where(mask, input[..., None, :], 0).sum(-1)
    applies = (mask & listed[..., None]).any(-2)
    counted = listed[..., None] & ~applies[..., None, :]
    loss = jnp.where(counted, jax.nn.relu(1 - own[..., None] + input[..., None, :]), 0).sum((-2, -1)) / classes
    return reduced(jnp.where(valid.all(-1), loss, jnp.nan), reduction, dtype)


@in_float32
def multi_margin_loss(
    input: jax.Array,
    target: jax.Array,
    p: int = 1,
    margin: float = 1.0,
    weight: jax.Array | None = None,
    *,
    reduction: str = "mean",
) -> jax.Array:
    """sum over the other classes i of w[y] max(0, margin - x[y] + x[i])^p / C.

    Args:
        input: scores, `(C,)` or `(N, C)`.
        target: class numbers, `()` or `(N,)`. Unlike torch, a class number out of range cannot raise in compiled code:
            it makes the loss NaN.
        p: 1 or 2.
        margin: the required difference between the score of the target class and the others.
        weight: the weight of each class, `(C,)`.
        reduction: "mean", "sum" or "none".

    Raises:
        ValueError: if shapes do not fit, or for another `p`.

    Source: torch.nn.functional.multi_margin_loss.

    Example:
        >>> multi_margin_loss(jnp.array([[0.1, 0.2, 0.4, 0.8]]), jnp.array([3]))
        Array(0.325, dtype=float32)
    """
    input = jnp.asarray(input)
    floating(input, "multi_margin_loss")
    input, weight = of_one_dtype("multi_margin_loss", input=input, weight=weight)
    dtype, input, target = input.dtype, wide(input), jnp.asarray(target)
    if p not in (1, 2):
        raise ValueError(f"multi_margin_loss takes p = 1 or 2; got {p}")
    classes = input.shape[-1] if input.ndim else 1  # as in torch, a scalar is one class
    if input.ndim > 2 or target.ndim > 1 or not classes or target.size * classes != input.size:
        raise ValueError(
            "multi_margin_loss takes an input (C,) or (N, C), of at least one class, and class numbers () or (N,); got"
            f" {tuple(input.shape)} and {tuple(target.shape)}"
        )
    input = input.reshape(*target.shape, classes)
    if weight is not None and weight.shape != (classes,):
        raise ValueError(f"weight must have shape ({classes},), one per class; got {tuple(weight.shape)}")
    mask, valid = class_mask(target.astype(jnp.int32), classes, target.ndim)
    own = jnp.where(mask, input, 0).sum(-1, keepdims=True)
    short = jax.nn.relu(margin - own + input)
    loss = jnp.where(mask, 0, short if p == 1 else short * short).sum(-1) / classes
    if weight is not None:
        loss = loss * jnp.where(mask, expanded(weight, input), 0).sum(-1)
    return reduced(jnp.where(valid, loss, jnp.nan), reduction, dtype)


@in_float32
def cosine_embedding_loss(
    input1: jax.Array, input2: jax.Array, target: jax.Array, margin: float = 0.0, *, reduction: str = "mean"
) -> jax.Array:
    """1 - cos(x1, x2) where y = 1, max(0, cos(x1, x2) - margin) where y = -1.

    Args:
        input1: vectors, `(D,)` or `(N, D)`.
        input2: vectors of the same shape.
        target: 1 or -1, `()` or `(N,)`.
        margin: dissimilar vectors of this cosine or less have loss 0; between -1 and 1.
        reduction: "mean", "sum" or "none".

    Raises:
        ValueError: if shapes do not fit.

    Source: torch.nn.functional.cosine_embedding_loss.

    Example:
        >>> x = jnp.array([[1.0, 0.0]])
        >>> cosine_embedding_loss(x, -x, jnp.array([1]))
        Array(2., dtype=float32)
    """
    y = jnp.asarray(target)
    if not 1 <= input1.ndim <= 2 or input1.ndim != input2.ndim or y.ndim != input1.ndim - 1:
        raise ValueError(
            "cosine_embedding_loss takes inputs (D,) and a target (), or inputs (N, D) and a target (N,); got"
            f" {tuple(input1.shape)}, {tuple(input2.shape)} and {tuple(y.shape)}"
        )
    (x1, x2), dtype = alike("cosine_embedding_loss", *promoted_to_floats(input1), *promoted_to_floats(input2))

    def unit(x: jax.Array) -> jax.Array:  # x / sqrt(x² + 1e-12), without overflow
        return x / norm(jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)], constant_values=1e-6), 2, -1, keepdims=True)

    cosine, y = jnp.broadcast_arrays((unit(x1) * unit(x2)).sum(-1), y)
    loss = jnp.where(_is(y, 1), 1 - cosine, jnp.where(_is(y, -1), _positive(cosine - margin), 0))
    return reduced(loss, reduction, dtype)


@in_float32
def triplet_margin_loss(
    anchor: jax.Array,
    positive: jax.Array,
    negative: jax.Array,
    margin: float = 1.0,
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
    *,
    reduction: str = "mean",
) -> jax.Array:
    """max(0, margin + d(a, p) - d(a, n)), where d is `pairwise_distance` with `p` and `eps`.

    Args:
        anchor: vectors, `(D,)` or `(N, D)`.
        positive: vectors that must be near the anchor, with as many dimensions.
        negative: vectors that must be far from the anchor, with as many dimensions.
        margin: the required difference of the two distances, above 0.
        p: the exponent of the norm.
        eps: added to every difference.
        swap: True replaces d(a, n) by d(p, n) where that is smaller (Balntas et al., 2016).
        reduction: "mean", "sum" or "none".

    Raises:
        ValueError: if shapes do not fit, or margin <= 0.

    Source: torch.nn.functional.triplet_margin_loss.

    Example:
        >>> zero = jnp.zeros((1, 2))
        >>> triplet_margin_loss(zero, zero + 3, zero + 4, p=1.0, eps=0.0)
        Array(0., dtype=float32)
    """

    def distance(x: jax.Array, y: jax.Array) -> jax.Array:
        return pairwise_distance(x, y, p, eps)

    return triplet_margin_with_distance_loss(
        anchor, positive, negative, distance_function=distance, margin=margin, swap=swap, reduction=reduction
    )


def triplet_margin_with_distance_loss(
    anchor: jax.Array,
    positive: jax.Array,
    negative: jax.Array,
    *,
    distance_function: Callable[[Any, Any], Any] | None = None,
    margin: float = 1.0,
    swap: bool = False,
    reduction: str = "mean",
) -> jax.Array:
    """max(0, margin + d(a, p) - d(a, n)) for any distance d.

    Args:
        anchor: any shape that the distance takes.
        positive: samples that must be near the anchor, with as many dimensions.
        negative: samples that must be far from the anchor, with as many dimensions.
        distance_function: d, a function of two arrays; `pairwise_distance` by default.
        margin: the required difference of the two distances, above 0.
        swap: True replaces d(a, n) by d(p, n) where that is smaller (Balntas et al., 2016).
        reduction: "mean", "sum" or "none".

    Raises:
        ValueError: if the arrays do not have the same number of dimensions, or margin <= 0.

    Source: torch.nn.functional.triplet_margin_with_distance_loss.

    Example:
        >>> zero = jnp.zeros((1, 2))
        >>> triplet_margin_with_distance_loss(zero, zero, zero, distance_function=lambda x, y: abs(x - y).max(-1))
        Array(1., dtype=float32)
    """
    if margin <= 0:
        raise ValueError(f"margin must be greater than 0; got {margin}")
    if not anchor.ndim == positive.ndim == negative.ndim:
        raise ValueError(
            "anchor, positive and negative must have the same number of dimensions; got shapes"
            f" {tuple(anchor.shape)}, {tuple(positive.shape)} and {tuple(negative.shape)}"
        )
    distance = distance_function or pairwise_distance
    near, far = promoted_to_floats(distance(anchor, positive), distance(anchor, negative))
    if swap:
        far, other = promoted(far, distance(positive, negative))
        near, far = promoted(near, jnp.minimum(far, other))
    return reduced(_positive(margin + wide(near) - wide(far)), reduction, near.dtype)
