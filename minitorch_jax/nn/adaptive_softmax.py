"""The adaptive softmax: a loss with parameters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..module.module import Module
from ..module.random import next_key
from ..nn import functional as F  # noqa: N812
from .container import ModuleList, Sequential
from .functional.cross_entropy import class_mask
from .linear import Linear


class AdaptiveLoss(NamedTuple):
    """The result of an AdaptiveLogSoftmaxWithLoss."""

    output: jax.Array  # the log-probability of each target, (N,) or ()
    loss: jax.Array  # minus the mean of `output`, ()


class AdaptiveLogSoftmaxWithLoss(Module):
    """An approximate softmax over many classes, sorted by frequency. Rare classes lie in clusters with small projections.

    For a frequent class y, log p(y) is the head's log-probability of y. For a rare one, it is the head's log-probability
    of its cluster plus the cluster's log-probability of y.

    Args:
        in_features: the size of the input's last axis.
        n_classes: the number of classes; the most frequent classes have the lowest numbers.
        cutoffs: the first class of each cluster: increasing, between 1 and n_classes - 1.
        div_value: the projection of cluster i has in_features // div_value^(i + 1) features.
        head_bias: True adds a bias to the head.
        dtype: the dtype of the parameters, floating.
        key: a `jax.random` key for the initial values. By default, the next key of the global stream (`mt.seed`).

    Shapes: input `(N, in_features)` and class numbers `(N,)`, or `(in_features,)` and `()`. The layer returns
    `(output, loss)`: `output`, `(N,)` or `()`, holds the log-probability of each target; `loss` is minus its mean.

    Raises:
        ValueError: if `cutoffs` are not as above, or if shapes do not fit.

    Source: torch.nn.AdaptiveLogSoftmaxWithLoss; Grave et al., "Efficient softmax approximation for GPUs", 2016.

    Differs from PyTorch: every cluster is computed for every row, since compiled code has fixed shapes. A class number
    out of range makes its output NaN.

    Example:
        >>> layer = AdaptiveLogSoftmaxWithLoss(8, 20, [5, 10], key=jax.random.key(0))
        >>> output, loss = layer(jnp.ones((3, 8)), jnp.array([0, 7, 19]))
        >>> output.shape, layer.log_prob(jnp.ones((3, 8))).shape
        ((3,), (3, 20))
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        cutoffs: Sequence[int],
        div_value: float = 4.0,
        head_bias: bool = False,
        *,
        dtype: Any = jnp.float32,
        key: Any = None,
    ) -> None:
        bounds = [0, *cutoffs, n_classes]
        if len(bounds) < 3 or any(int(b) != b or b <= a for a, b in pairwise(bounds)):
            raise ValueError(
                "cutoffs must be a sequence of increasing integers, each between 1 and n_classes - 1; got"
                f" {cutoffs} for {n_classes} classes"
            )
        self.in_features, self.n_classes = in_features, n_classes
        self.cutoffs = tuple(bounds[1:])
        self.div_value, self.head_bias = div_value, head_bias
        self.shortlist_size, self.n_clusters = self.cutoffs[0], len(self.cutoffs) - 1
        self.head_size = self.shortlist_size + self.n_clusters
        keys = iter(jax.random.split(next_key(key), 1 + 2 * self.n_clusters))

        def linear(inputs: int, outputs: int, bias: bool = False) -> Linear:
            return Linear(inputs, outputs, bias, dtype=dtype, key=next(keys))

        self.head = linear(in_features, self.head_size, head_bias)
        self.tail = ModuleList()
        for i, (low, high) in enumerate(pairwise(self.cutoffs)):
            hidden = int(in_features // div_value ** (i + 1))
            self.tail.append(Sequential(linear(in_features, hidden), linear(hidden, high - low)))

    def forward(self, input_: jax.Array, target_: jax.Array) -> AdaptiveLoss:
        input, target = jnp.asarray(input_), jnp.asarray(target_).astype(jnp.int32)
        if not 1 <= input.ndim <= 2 or target.shape != input.shape[:-1]:
            raise ValueError(
                "AdaptiveLogSoftmaxWithLoss takes an input (N, in_features) and class numbers (N,), or"
                f" (in_features,) and (); got {tuple(input.shape)} and {tuple(target.shape)}"
            )
        in_head = target
        head = F.log_softmax(self.head(input), -1)
        output = jnp.where((target < 0) | (target >= self.n_classes), jnp.nan, jnp.zeros(target.shape, head.dtype))
        for i, (low, high) in enumerate(pairwise(self.cutoffs)):
            here = (target >= low) & (target < high)
            own = _picked(F.log_softmax(self.tail[i](input), -1), target - low)
            output += jnp.where(here, own, 0)
            in_head = jnp.where(here, self.shortlist_size + i, in_head)
        output += _picked(head, in_head)
        return AdaptiveLoss(output, -output.mean())

    def log_prob(self, input: jax.Array) -> jax.Array:
        """The log-probabilities of all classes, `(N, n_classes)`."""
        head = F.log_softmax(self.head(input), -1)
        parts = [head[..., : self.shortlist_size]]
        for i, cluster in enumerate(self.tail):
            own = head[..., self.shortlist_size + i, None]
            parts.append(F.log_softmax(cluster(input), -1) + own)
        return jnp.concatenate(parts, -1)

    def predict(self, input: jax.Array) -> jax.Array:
        """The most probable class of each row, `(N,)`. As in torch, the head decides between its classes and a cluster."""
        head = jnp.argmax(self.head(input), -1)
        return jnp.where(head < self.shortlist_size, head, jnp.argmax(self.log_prob(input), -1))


def _picked(log_p: jax.Array, target: jax.Array) -> jax.Array:
    """The log-probability of each target, or 0 if the target is not one of these classes."""
    return jnp.where(class_mask(target, log_p.shape[-1], log_p.ndim - 1)[0], log_p, 0).sum(-1)
