"""Normalisation as layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..module.module import Module
from ..module.parameter import fresh_parameter
from ..nn import functional as F  # noqa: N812
from . import init


class Affine(Module):
    """Base of the layers with a weight, initially ones, and a bias, initially zeros. Both are optional."""

    weight: jax.Array | Any
    bias: jax.Array | Any

    def _declare(self, shape: Sequence[int], weight: bool, bias: bool, dtype: Any) -> None:
        self.weight = fresh_parameter(init.ones(shape, dtype)) if weight else None
        self.bias = fresh_parameter(init.zeros(shape, dtype)) if weight and bias else None


class GroupNorm(Affine):
    """(x - mean) / sqrt(var + eps) * weight + bias. Each group of channels of a sample has its own mean and variance.

    Args:
        num_groups: the number of groups of neighbouring channels; it divides `num_channels`.
        num_channels: the number of channels, C.
        eps: added to the (biased) variance.
        affine: True adds a weight and a bias.
        dtype: the dtype of the parameters, floating.
        bias: False leaves out the bias, with `affine`.

    Shapes: input and output `(N, C, *)`; `weight` (initially ones) and `bias` (initially zeros) are `(C,)`.

    Raises:
        ValueError: if `num_groups` does not divide `num_channels`, or an input does not fit.

    Source: torch.nn.GroupNorm; Wu and He, "Group normalization", 2018.

    Example:
        >>> GroupNorm(2, 4)(jnp.array([[1.0, 3.0, 0.0, 4.0]])).round(4)
        Array([[-1.,  1., -1.,  1.]], dtype=float32)
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        dtype: Any = jnp.float32,
        bias: bool = True,
    ) -> None:
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(f"num_channels ({num_channels}) must be divisible by num_groups ({num_groups})")
        self.num_groups, self.num_channels, self.eps, self.affine = num_groups, num_channels, eps, affine
        self._declare((num_channels,), affine, bias, dtype)

    def forward(self, input: jax.Array) -> jax.Array:
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine},"
            f" bias={self.bias is not None}"
        )


class LayerNorm(Affine):
    """(x - mean) / sqrt(var + eps) * weight + bias, with the mean and the variance over the last axes.

    Args:
        normalized_shape: the sizes of these axes; an integer for one axis.
        eps: added to the (biased) variance.
        elementwise_affine: True adds a weight and a bias.
        bias: False leaves out the bias, with `elementwise_affine`.
        dtype: the dtype of the parameters, floating.

    Shapes: input and output `(*, *normalized_shape)`. `weight` (initially ones) and `bias` (initially zeros) have the
    shape `normalized_shape`.

    Raises:
        ValueError: if an input does not fit.

    Source: torch.nn.LayerNorm; Ba et al., "Layer normalization", 2016.

    Example:
        >>> LayerNorm(2)(jnp.array([[1.0, 3.0]]))
        Array([[-0.999995,  0.999995]], dtype=float32)
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        dtype: Any = jnp.float32,
    ) -> None:
        self.normalized_shape = _shape(normalized_shape)
        self.eps, self.elementwise_affine = eps, elementwise_affine
        self._declare(self.normalized_shape, elementwise_affine, bias, dtype)

    def forward(self, input: jax.Array) -> jax.Array:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine},"
            f" bias={self.bias is not None}"
        )


class RMSNorm(Module):
    """x / sqrt(mean(x²) + eps) * weight, with the mean over the last axes.

    Args:
        normalized_shape: the sizes of these axes; an integer for one axis.
        eps: added to the mean. None stands for the machine epsilon of float32, or of float64 for inputs of float64.
        elementwise_affine: True adds a weight.
        dtype: the dtype of the weight, floating.

    Shapes: input and output `(*, *normalized_shape)`; `weight` (initially ones) has the shape `normalized_shape`.

    Raises:
        ValueError: if an input does not fit.

    Source: torch.nn.RMSNorm; Zhang and Sennrich, "Root mean square layer normalization", 2019.

    Example:
        >>> RMSNorm(2)(jnp.array([[3.0, 3.0]]))
        Array([[1., 1.]], dtype=float32)
    """

    weight: jax.Array | Any

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        dtype: Any = jnp.float32,
    ) -> None:
        self.normalized_shape = _shape(normalized_shape)
        self.eps, self.elementwise_affine = eps, elementwise_affine
        self.weight = fresh_parameter(init.ones(self.normalized_shape, dtype)) if elementwise_affine else None

    def forward(self, x: jax.Array) -> jax.Array:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


def _shape(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or min(shape) < 0:
        raise ValueError(f"normalized_shape must hold one or more sizes, each >= 0; got {normalized_shape!r}")
    return shape


class LocalResponseNorm(Module):
    """x / (k + alpha mean(x²))^beta, with the mean over `size` neighbouring channels (zeros beyond the ends).

    Args:
        size: the number of channels in the mean. If it is even, one more channel comes from before than from after.
        alpha: multiplies the mean.
        beta: the exponent.
        k: added to the mean.

    Shapes: input and output `(N, C, L, *)`.

    Raises:
        ValueError: if an input has fewer than 3 axes, or `size` is not positive.

    Source: torch.nn.LocalResponseNorm; Krizhevsky et al., "ImageNet classification with deep convolutional neural
    networks", 2012.

    Example:
        >>> LocalResponseNorm(3, alpha=3.0, beta=1.0)(jnp.ones((1, 3, 1))).ravel()
        Array([0.33333334, 0.25      , 0.33333334], dtype=float32)
    """

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> None:
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, input: jax.Array) -> jax.Array:
        return F.local_response_norm(input, self.size, self.alpha, self.beta, self.k)

    def extra_repr(self) -> str:
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"
