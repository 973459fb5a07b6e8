"""Margin losses as layers. Their functions in nn.functional document formulas and shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from ..nn import functional as F  # noqa: N812
from .distance import PairwiseDistance
from .loss import Loss, WeightedLoss


class MarginRankingLoss(Loss):
    """max(0, margin - y (x1 - x2)); see `functional.margin_ranking_loss`."""

    def __init__(self, margin: float = 0.0, *, reduction: str = "mean") -> None:
        self.margin, self.reduction = margin, reduction

    def forward(self, input1: jax.Array, input2: jax.Array, target: jax.Array) -> jax.Array:
        return F.margin_ranking_loss(input1, input2, target, self.margin, reduction=self.reduction)


class HingeEmbeddingLoss(Loss):
    """x where y = 1, max(0, margin - x) where y = -1; see `functional.hinge_embedding_loss`."""

    def __init__(self, margin: float = 1.0, *, reduction: str = "mean") -> None:
        self.margin, self.reduction = margin, reduction

    def forward(self, input: jax.Array, target: jax.Array) -> jax.Array:
        return F.hinge_embedding_loss(input, target, self.margin, reduction=self.reduction)


class SoftMarginLoss(Loss):
    """log(1 + exp(-y x)), where y, the target, is 1 or -1; see `functional.soft_margin_loss`."""

    def forward(self, input: jax.Array, target: jax.Array) -> jax.Array:
        return F.soft_margin_loss(input, target, reduction=self.reduction)


class MultiLabelSoftMarginLoss(WeightedLoss):
    """The binary cross-entropy of sigmoid(x), averaged over the classes; see `functional.multilabel_soft_margin_loss`."""

    def forward(self, input: jax.Array, target: jax.Array) -> jax.Array:
        return F.multilabel_soft_margin_loss(input, target, self.weight, reduction=self.reduction)


class MultiLabelMarginLoss(Loss):
    """A margin between each class that applies and each class that does not; see `functional.multilabel_margin_loss`."""

    def forward(self, input: jax.Array, target: jax.Array) -> jax.Array:
        return F.multilabel_margin_loss(input, target, reduction=self.reduction)


class MultiMarginLoss(WeightedLoss):
    """A margin between the target class and all others; see `functional.multi_margin_loss`.

    Args:
        p: the power, 1 or 2.
        margin: the required difference between the score of the target class and the others.
        weight: the weight of each class, `(C,)`. Kept in a buffer.
        reduction: "mean", "sum" or "none".

    Raises:
        ValueError: for another `p`, or if `weight` is not a vector.

    Example:
        >>> import jax.numpy as jnp
        >>> MultiMarginLoss()(jnp.array([[0.0, 3.0]]), jnp.array([1]))
        Array(0., dtype=float32)
    """

    def __init__(self, p: int = 1, margin: float = 1.0, weight: Any = None, *, reduction: str = "mean") -> None:
        if p not in (1, 2):
            raise ValueError(f"MultiMarginLoss takes p = 1 or 2; got {p}")
        if weight is not None and weight.ndim != 1:
            raise ValueError(f"MultiMarginLoss takes a weight of shape (C,); got {tuple(weight.shape)}")
        super().__init__(weight, reduction=reduction)
        self.p, self.margin = p, margin

    def forward(self, input: jax.Array, target: jax.Array) -> jax.Array:
        return F.multi_margin_loss(input, target, self.p, self.margin, self.weight, reduction=self.reduction)


class CosineEmbeddingLoss(Loss):
    """1 - cos(x1, x2) where y = 1, max(0, cos(x1, x2) - margin) where y = -1; see `functional.cosine_embedding_loss`."""

    def __init__(self, margin: float = 0.0, *, reduction: str = "mean") -> None:
        self.margin, self.reduction = margin, reduction

    def forward(self, input1: jax.Array, input2: jax.Array, target: jax.Array) -> jax.Array:
        return F.cosine_embedding_loss(input1, input2, target, self.margin, reduction=self.reduction)


def _check_margin(margin: float, name: str) -> float:
    if margin <= 0:
        raise ValueError(f"{name} needs a margin greater than 0; got {margin}")
    return margin


class TripletMarginLoss(Loss):
    """max(0, margin + d(anchor, positive) - d(anchor, negative)); see `functional.triplet_margin_loss`.

    Args:
        margin: the required difference of the two distances, above 0.
        p: the exponent of the norm.
        eps: added to every difference.
        swap: True replaces d(anchor, negative) by d(positive, negative) where that is smaller.
        reduction: "mean", "sum" or "none".

    Example:
        >>> import jax.numpy as jnp
        >>> TripletMarginLoss(p=1.0, eps=0.0)(jnp.zeros((1, 2)), jnp.ones((1, 2)), jnp.ones((1, 2)))
        Array(1., dtype=float32)
    """

    def __init__(
        self, margin: float = 1.0, p: float = 2.0, eps: float = 1e-6, swap: bool = False, *, reduction: str = "mean"
    ) -> None:
        self.margin = _check_margin(margin, "TripletMarginLoss")
        self.p, self.eps, self.swap, self.reduction = p, eps, swap, reduction

    def forward(self, anchor: jax.Array, positive: jax.Array, negative: jax.Array) -> jax.Array:
        return F.triplet_margin_loss(
            anchor, positive, negative, self.margin, self.p, self.eps, self.swap, reduction=self.reduction
        )


class TripletMarginWithDistanceLoss(Loss):
    """As TripletMarginLoss, for any distance; see `functional.triplet_margin_with_distance_loss`.

    Args:
        distance_function: a function of two arrays, or a module; `PairwiseDistance()` by default.
        margin: the required difference of the two distances, above 0.
        swap: True replaces d(anchor, negative) by d(positive, negative) where that is smaller.
        reduction: "mean", "sum" or "none".
    """

    def __init__(
        self,
        *,
        distance_function: Callable[[Any, Any], Any] | None = None,
        margin: float = 1.0,
        swap: bool = False,
        reduction: str = "mean",
    ) -> None:
        self.margin = _check_margin(margin, "TripletMarginWithDistanceLoss")
        self.distance_function = PairwiseDistance() if distance_function is None else distance_function
        self.swap, self.reduction = swap, reduction

    def forward(self, anchor: jax.Array, positive: jax.Array, negative: jax.Array) -> jax.Array:
        return F.triplet_margin_with_distance_loss(
            anchor,
            positive,
            negative,
            distance_function=self.distance_function,
            margin=self.margin,
            swap=self.swap,
            reduction=self.reduction,
        )
