"""Activations as layers."""

from __future__ import annotations

import jax

from ..module import Module
from . import functional as F  # noqa: N812


class ReLU(Module):
    """max(x, 0), elementwise.

    Args:
        inplace: accepted as in torch, where it saves memory; arrays here are immutable, the result is the same.

    Example:
        >>> import jax.numpy as jnp
        >>> ReLU()(jnp.array([-1.0, 2.0]))
        Array([0., 2.], dtype=float32)
    """

    def __init__(self, inplace: bool = False) -> None:
        self.inplace = inplace

    def forward(self, input: jax.Array) -> jax.Array:
        return F.relu(input)

    def extra_repr(self) -> str:
        return "inplace=True" if self.inplace else ""


class Tanh(Module):
    """The hyperbolic tangent, elementwise."""

    def forward(self, input: jax.Array) -> jax.Array:
        return F.tanh(input)


class Sigmoid(Module):
    """1 / (1 + exp(-x)), elementwise."""

    def forward(self, input: jax.Array) -> jax.Array:
        return F.sigmoid(input)


class GELU(Module):
    """x Φ(x), elementwise.

    Args:
        approximate: "none" for the error function, "tanh" for the approximation.

    Raises:
        ValueError: for another `approximate`.

    Example:
        >>> GELU(approximate="tanh")
        GELU(approximate='tanh')
    """

    def __init__(self, approximate: str = "none") -> None:
        if approximate not in ("none", "tanh"):
            raise ValueError(f"approximate must be 'none' or 'tanh'; got {approximate!r}")
        self.approximate = approximate

    def forward(self, input: jax.Array) -> jax.Array:
        return F.gelu(input, self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class Softmax(Module):
    """exp(x) / sum(exp(x)) along `dim`.

    Args:
        dim: the axis that sums to 1; without it torch's old rule chooses, with a warning.

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
