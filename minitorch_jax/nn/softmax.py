"""Softmax, softmin and log-softmax, as layers."""

from __future__ import annotations

import jax

from ..module.module import Module
from ..nn import functional as F  # noqa: N812


class Softmax(Module):
    """exp(x) / sum(exp(x)) along `dim`.

    Args:
        dim: the axis that sums to 1. Without it, torch's old rule selects the axis, with a warning.

    Example:
        >>> import jax.numpy as jnp
        >>> Softmax(dim=-1)(jnp.zeros(2))
        Array([0.5, 0.5], dtype=float32)
    """

    def __init__(self, dim: int | None = None) -> None:
        self.dim = dim

    def forward(self, input: jax.Array) -> jax.Array:
        return F.softmax(input, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Softmin(Softmax):
    """softmax(-x) along `dim`."""

    def forward(self, input: jax.Array) -> jax.Array:
        return F.softmin(input, self.dim)


class LogSoftmax(Softmax):
    """log(softmax(x)) along `dim`, without overflow."""

    def forward(self, input: jax.Array) -> jax.Array:
        return F.log_softmax(input, self.dim)


class Softmax2d(Module):
    """Softmax over the channels of `(N, C, H, W)` or `(C, H, W)`."""

    def forward(self, input: jax.Array) -> jax.Array:
        if input.ndim not in (3, 4):
            raise ValueError(f"Softmax2d takes an input of 3 or 4 dimensions; got shape {tuple(input.shape)}")
        return F.softmax(input, -3)
