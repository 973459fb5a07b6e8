"""Losses as layers. Their functions in nn.functional document formulas and shapes."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from ..module.module import Module
from ..module.parameter import Buffer
from ..nn import functional as F  # noqa: N812
from .functional.linear_cross_entropy import LinearCrossEntropyOptions as LinearCrossEntropyOptions
from .linear import Linear


class Loss(Module):
    """Base of the losses.

    Args:
        reduction: "mean", "sum" or "none".
    """

    reduction: str

    def __init__(self, *, reduction: str = "mean") -> None:
        self.reduction = reduction

    def extra_repr(self) -> str:
        return ""


class WeightedLoss(Loss):
    """Base of the losses that keep weights in a buffer.

    Args:
        weight: an array of weights. Each loss documents its shape.
        reduction: "mean", "sum" or "none".
    """

    weight: jax.Array | Any

    def __init__(self, weight: Any = None, *, reduction: str = "mean") -> None:
        self.weight = None if weight is None else Buffer(weight)
        self.reduction = reduction


class L1Loss(Loss):
    """|x - y|; see `functional.l1_loss`."""

    def forward(self, input: jax.Array, target: jax.Array) -> jax.Array:
        return F.l1_loss(input, target, reduction=self.reduction)


class MSELoss(Loss):
    """(x - y)²; see `functional.mse_loss`.

    Args:
        reduction: "mean", "sum" or "none".

    Example:
        >>> MSELoss()(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0]))
        Array(2., dtype=float32)
    """

    def forward(self, input: jax.Array, target: jax.Array) -> jax.Array:
        return F.mse_loss(input, target, reduction=self.reduction)


class SmoothL1Loss(Loss):
    """d² / (2 beta) where d = |x - y| < beta, d - beta / 2 elsewhere; see `functional.smooth_l1_loss`."""

    def __init__(self, *, reduction: str = "mean", beta: float = 1.0) -> None:
        self.reduction, self.beta = reduction, beta

    def forward(self, input: jax.Array, target: jax.Array) -> jax.Array:
        return F.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(Loss):
    """d² / 2 where d = |x - y| < delta, delta (d - delta / 2) elsewhere; see `functional.huber_loss`."""

    def __init__(self, reduction: str = "mean", delta: float = 1.0) -> None:
        if not isinstance(delta, int | float):
            raise TypeError(f"delta must be a number; got {delta!r}")
        self.reduction, self.delta = reduction, delta

    def forward(self, input: jax.Array, target: jax.Array) -> jax.Array:
        return F.huber_loss(input, target, self.reduction, self.delta)


class PoissonNLLLoss(Loss):
    """The negative log-likelihood of counts under Poisson distributions; see `functional.poisson_nll_loss`."""

    def __init__(
        self, log_input: bool = True, full: bool = False, *, eps: float = 1e-8, reduction: str = "mean"
    ) -> None:
        self.log_input, self.full, self.eps, self.reduction = log_input, full, eps, reduction

    def forward(self, log_input: jax.Array, target: jax.Array) -> jax.Array:
        return F.poisson_nll_loss(log_input, target, self.log_input, self.full, eps=self.eps, reduction=self.reduction)


class GaussianNLLLoss(Loss):
    """The negative log-likelihood of samples under normal distributions; see `functional.gaussian_nll_loss`."""

    def __init__(self, *, full: bool = False, eps: float = 1e-6, reduction: str = "mean") -> None:
        self.full, self.eps, self.reduction = full, eps, reduction

    def forward(self, input: jax.Array, target: jax.Array, var: jax.Array | float) -> jax.Array:
        return F.gaussian_nll_loss(input, target, var, self.full, self.eps, self.reduction)


class KLDivLoss(Loss):
    """The Kullback-Leibler divergence, q (log(q) - log(p)); see `functional.kl_div`."""

    def __init__(self, *, reduction: str = "mean", log_target: bool = False) -> None:
        self.reduction, self.log_target = reduction, log_target

    def forward(self, input: jax.Array, target: jax.Array) -> jax.Array:
        return F.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


class BCELoss(WeightedLoss):
    """The binary cross-entropy of probabilities; see `functional.binary_cross_entropy`."""

    def forward(self, input: jax.Array, target: jax.Array) -> jax.Array:
        return F.binary_cross_entropy(input, target, self.weight, reduction=self.reduction)


class BCEWithLogitsLoss(WeightedLoss):
    """The binary cross-entropy of sigmoid(x), without overflow; see `functional.binary_cross_entropy_with_logits`.

    Args:
        weight: a weight for each element; a shape that broadcasts to the input's. Kept in a buffer.
        reduction: "mean", "sum" or "none".
        pos_weight: the weight of positive examples; a shape that broadcasts to the input's. Kept in a buffer.

    Example:
        >>> BCEWithLogitsLoss()(jnp.zeros(3), jnp.array([0.0, 1.0, 0.5]))
        Array(0.6931472, dtype=float32)
    """

    pos_weight: jax.Array | Any

    def __init__(self, weight: Any = None, *, reduction: str = "mean", pos_weight: Any = None) -> None:
        super().__init__(weight, reduction=reduction)
        self.pos_weight = None if pos_weight is None else Buffer(pos_weight)

    def forward(self, input: jax.Array, target: jax.Array) -> jax.Array:
        return F.binary_cross_entropy_with_logits(
            input, target, self.weight, reduction=self.reduction, pos_weight=self.pos_weight
        )


class NLLLoss(WeightedLoss):
    """The negative log-likelihood of classes, -log(p)[y]; see `functional.nll_loss`.

    Args:
        weight: the weight of each class, `(C,)`. Kept in a buffer.
        ignore_index: targets of this class number do not count.
        reduction: "mean", "sum" or "none".
    """

    def __init__(self, weight: Any = None, *, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__(weight, reduction=reduction)
        self.ignore_index = ignore_index

    def forward(self, input: jax.Array, target: jax.Array) -> jax.Array:
        return F.nll_loss(input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction)


class CrossEntropyLoss(WeightedLoss):
    """The cross-entropy between unnormalised scores and classes; see `functional.cross_entropy`.

    Args:
        weight: the weight of each class, `(C,)`. Kept in a buffer.
        ignore_index: targets of this class number do not count.
        reduction: "mean" (the weighted mean of the targets that count), "sum" or "none".
        label_smoothing: the share of a uniform target, between 0 and 1.

    Shapes: scores `(C,)`, `(N, C)` or `(N, C, d1, …)`; class numbers `()`, `(N,)` or `(N, d1, …)`, or probabilities of
    the scores' shape.

    Source: torch.nn.CrossEntropyLoss. Differs from PyTorch: a class number out of range makes the loss NaN.

    Example:
        >>> CrossEntropyLoss()(jnp.zeros((2, 4)), jnp.array([0, 3]))
        Array(1.3862944, dtype=float32)
    """

    def __init__(
        self, weight: Any = None, *, ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0
    ) -> None:
        super().__init__(weight, reduction=reduction)
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing

    def forward(self, input: jax.Array, target: jax.Array) -> jax.Array:
        return F.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class LinearCrossEntropyLoss(WeightedLoss):
    """The cross-entropy of a linear map of the input; see `functional.linear_cross_entropy`.

    Args:
        in_features: the size of the input's last axis.
        num_classes: C, the number of classes.
        out_features: the sizes of further axes `(d1, …)` of the scores.
        bias: True adds a bias to the linear map.
        dtype: the dtype of the parameters, floating.
        reduction: "mean", "sum" or "none".
        weight: the weight of each class, `(C,)`. Kept in a buffer.
        ignore_index: targets of this class number do not count.
        label_smoothing: the share of a uniform target, between 0 and 1.
        options: None, or a `LinearCrossEntropyOptions`: the scores are then computed by blocks of rows.
        key: a `jax.random` key for the initial values. By default, the next key of the global stream (`mt.seed`).

    Shapes: input `(N, in_features)`, class numbers `(N, d1, …)`. The parameters are those of `linear`, a Linear.

    Raises:
        ValueError: if `weight` has another shape, or label_smoothing is out of range.

    Source: torch.nn.LinearCrossEntropyLoss.

    Example:
        >>> loss = LinearCrossEntropyLoss(3, 4, key=jax.random.key(0))
        >>> loss(jnp.ones((2, 3)), jnp.array([0, 3])).shape
        ()
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        dtype: Any = jnp.float32,
        reduction: str = "mean",
        weight: Any = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: LinearCrossEntropyOptions | None = None,
        key: Any = None,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise ValueError(f"weight must have shape ({num_classes},), one per class; got {tuple(weight.shape)}")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1]; got {label_smoothing}")
        super().__init__(weight, reduction=reduction)
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.ignore_index, self.label_smoothing, self.options = ignore_index, label_smoothing, options
        self.linear = Linear(in_features, math.prod(out_features, start=num_classes), bias, dtype=dtype, key=key)

    def forward(self, input: jax.Array, target: jax.Array) -> jax.Array:
        shape = (self.num_classes, *self.out_features)
        weight, bias = self.linear.weight, self.linear.bias
        return F.linear_cross_entropy(
            input,
            weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, out_features={self.out_features},"
            f" bias={self.linear.bias is not None}, reduction={self.reduction}, ignore_index={self.ignore_index},"
            f" label_smoothing={self.label_smoothing}, options={self.options}"
        )


class CTCLoss(Loss):
    """Connectionist temporal classification; see `functional.ctc_loss`.

    Args:
        blank: the class number of the blank.
        reduction: "mean" (the mean of loss / target length), "sum" or "none".
        zero_infinity: True returns 0 where the input is too short for the labels; False returns infinity.

    Example:
        >>> log_probs = jax.nn.log_softmax(jnp.zeros((2, 1, 3)), axis=2)
        >>> CTCLoss()(log_probs, jnp.array([[1]]), (2,), (1,))
        Array(1.0986123, dtype=float32)
    """

    def __init__(self, blank: int = 0, reduction: str = "mean", zero_infinity: bool = False) -> None:
        self.blank, self.reduction, self.zero_infinity = blank, reduction, zero_infinity

    def forward(self, log_probs: jax.Array, targets: jax.Array, input_lengths: Any, target_lengths: Any) -> jax.Array:
        return F.ctc_loss(
            log_probs, targets, input_lengths, target_lengths, self.blank, self.reduction, self.zero_infinity
        )
