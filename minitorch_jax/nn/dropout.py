"""Dropout as layers."""

from __future__ import annotations

import jax

from ..module.module import Module
from ..nn import functional as F  # noqa: N812
from .functional.dropout import probability


class _Dropout(Module):
    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        self.p, self.inplace = probability(p), inplace

    def extra_repr(self) -> str:
        return f"p={self.p}, inplace={self.inplace}"


class Dropout(_Dropout):
    """In training, sets random elements to 0 and scales the others by 1 / (1 - p). In `eval()` mode, returns its input.

    Each call uses one key of the current stream (`mt.seed`, `mt.rng`), so each call has another mask. In `eval()` mode,
    at p = 0 and at p = 1 nothing is random, and no key is used.

    Args:
        p: the probability that an element is set to 0; 0.5 by default. `p` is static: another value compiles another
            program.
        inplace: accepted as in torch; it has no effect, since arrays are immutable.

    Shapes: any, floating; the output has the input's shape and dtype.

    Raises:
        ValueError: if `p` is not in [0, 1].
        TypeError: if `p` is not a number. In training, also if the input is not floating.
        TraceError: inside a plain JAX transform without `mt.rng`; see `mt.rng`.

    Source: torch.nn.Dropout; Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
    2014.

    Differs from PyTorch: JAX's generators draw the masks.

    Example:
        >>> import jax.numpy as jnp, minitorch_jax as mt
        >>> mt.seed(0)
        >>> drop = Dropout(p=0.5)
        >>> drop(jnp.ones(6))
        Array([2., 2., 0., 2., 2., 2.], dtype=float32)
        >>> drop.eval()(jnp.ones(6))
        Array([1., 1., 1., 1., 1., 1.], dtype=float32)
    """

    def forward(self, input: jax.Array) -> jax.Array:
        return F.dropout(input, self.p, self.training)


class Dropout1d(_Dropout):
    """As Dropout, for whole channels of an input `(N, C, L)` or `(C, L)`.

    Raises:
        ValueError: if the input has another number of axes.

    Source: torch.nn.Dropout1d; Tompson et al., "Efficient object localization using convolutional networks", 2015.

    Example:
        >>> import jax.numpy as jnp, minitorch_jax as mt
        >>> mt.seed(0)
        >>> Dropout1d()(jnp.ones((3, 2)))
        Array([[2., 2.],
               [2., 2.],
               [0., 0.]], dtype=float32)
    """

    def forward(self, input: jax.Array) -> jax.Array:
        return F.dropout1d(input, self.p, self.training)


class Dropout2d(_Dropout):
    """As Dropout1d, for images `(N, C, H, W)`. An input of three axes is `(N, C, L)`, with a warning, as in torch."""

    def forward(self, input: jax.Array) -> jax.Array:
        return F.dropout2d(input, self.p, self.training)


class Dropout3d(_Dropout):
    """As Dropout1d, for volumes `(N, C, D, H, W)` or `(C, D, H, W)`."""

    def forward(self, input: jax.Array) -> jax.Array:
        return F.dropout3d(input, self.p, self.training)


class AlphaDropout(_Dropout):
    """As Dropout, but it keeps mean 0 and variance 1.

    Dropped elements become SELU's limit at -inf. Then all elements are scaled and shifted.

    Source: torch.nn.AlphaDropout; Klambauer et al., "Self-normalizing neural networks", 2017.

    Example:
        >>> import jax.numpy as jnp, minitorch_jax as mt
        >>> mt.seed(0)
        >>> AlphaDropout()(jnp.zeros(3))
        Array([ 0.77919394,  0.77919394, -0.77919394], dtype=float32)
    """

    def forward(self, input: jax.Array) -> jax.Array:
        return F.alpha_dropout(input, self.p, self.training)


class FeatureAlphaDropout(_Dropout):
    """As AlphaDropout, for whole channels of an input `(N, C, *)`."""

    def forward(self, input: jax.Array) -> jax.Array:
        return F.feature_alpha_dropout(input, self.p, self.training)
