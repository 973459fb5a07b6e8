"""Dropout as a layer."""

from __future__ import annotations

import jax

from ..module import Module
from . import functional as F  # noqa: N812
from .functional.dropout import probability


class Dropout(Module):
    """In training, zeroes elements at random and scales the others by 1 / (1 - p); gives its input in `eval()` mode.

    Every call draws one key from the current stream (`mt.seed`, `mt.rng`) and so another mask; none is drawn where
    nothing is random: in `eval()` mode, at p = 0 and at p = 1.

    Args:
        p: the probability of an element to be zeroed, 0.5. It is static: another one compiles another program.

    Shapes: any, floating; the output has the input's shape and dtype.

    Raises:
        ValueError: if `p` is not in [0, 1].
        TypeError: if it is not a number; in training, if the input is not floating.
        TraceError: inside a plain JAX transform without `mt.rng`, see there.

    Source: torch.nn.Dropout; Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
    2014.

    Differs from PyTorch: there is no `inplace` (arrays here are immutable), and masks come from JAX's generators.

    Example:
        >>> import jax.numpy as jnp, minitorch_jax as mt
        >>> mt.seed(0)
        >>> drop = Dropout(p=0.5)
        >>> drop(jnp.ones(6))
        Array([2., 2., 0., 2., 2., 2.], dtype=float32)
        >>> drop.eval()(jnp.ones(6))
        Array([1., 1., 1., 1., 1., 1.], dtype=float32)
    """

    def __init__(self, p: float = 0.5) -> None:
        self.p = probability(p)

    def forward(self, input: jax.Array) -> jax.Array:
        return F.dropout(input, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}, inplace=False"
