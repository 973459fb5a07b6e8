"""Distances and similarities as layers."""

from __future__ import annotations

import jax

from ..module.module import Module
from ..nn import functional as F  # noqa: N812


class PairwiseDistance(Module):
    """‖x1 - x2 + eps‖_p along the last axis.

    Args:
        p: the exponent of the norm; `math.inf` and `-math.inf` are allowed.
        eps: added to every difference.
        keepdim: True keeps the last axis, with size 1.

    Shapes: two inputs `(*, D)` that broadcast, output `(*)` or `(*, 1)`.

    Source: torch.nn.PairwiseDistance. Differs from PyTorch: p < 0 is an error.

    Example:
        >>> import jax.numpy as jnp
        >>> PairwiseDistance(eps=0.0)(jnp.array([3.0, 4.0]), jnp.zeros(2))
        Array(5., dtype=float32)
    """

    def __init__(self, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> None:
        self.norm, self.eps, self.keepdim = p, eps, keepdim

    def forward(self, x1: jax.Array, x2: jax.Array) -> jax.Array:
        return F.pairwise_distance(x1, x2, self.norm, self.eps, self.keepdim)


class CosineSimilarity(Module):
    """x1 · x2 / (max(‖x1‖, eps) max(‖x2‖, eps)) along `dim`.

    Args:
        dim: an axis of the inputs' broadcast shape.
        eps: the smallest norm to divide by.

    Shapes: two inputs that broadcast. The output has their broadcast shape without this axis.

    Source: torch.nn.CosineSimilarity.

    Example:
        >>> import jax.numpy as jnp
        >>> CosineSimilarity()(jnp.array([[1.0, 1.0]]), jnp.array([[0.0, 2.0]]))
        Array([0.70710677], dtype=float32)
    """

    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        self.dim, self.eps = dim, eps

    def forward(self, x1: jax.Array, x2: jax.Array) -> jax.Array:
        return F.cosine_similarity(x1, x2, self.dim, self.eps)
