"""Adaptive pooling (to a given output size) and fractional pooling (random windows), as layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax

from ..module.module import Module
from ..module.parameter import Buffer
from .functional.adaptive_pooling import (
    SomeSize,
    adaptive_avg_pool,
    adaptive_max_pool,
    fractional_max_pool,
    fractional_size,
)
from .functional.spatial import Size, sizes, static


class _AdaptivePool(Module):
    _ndim: ClassVar[int]
    output_size: Any

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}"


class _AdaptiveAvgPool(_AdaptivePool):
    def __init__(self, output_size: SomeSize) -> None:
        self.output_size = static(output_size)

    def forward(self, input: jax.Array) -> jax.Array:
        return adaptive_avg_pool(self._ndim, input, self.output_size)


class AdaptiveAvgPool1d(_AdaptiveAvgPool):
    """Average pooling over the last axis of `(N, C, L)` or `(C, L)` to a given size; see `AdaptiveAvgPool2d`."""

    _ndim = 1


class AdaptiveAvgPool2d(_AdaptiveAvgPool):
    """Average pooling over two axes to a given size. Window i of n covers floor(i H / n) to ceil((i + 1) H / n) - 1.

    Args:
        output_size: an integer, or one for each axis; None stands for the input's size.

    Shapes: input `(N, C, H, W)` or `(C, H, W)`, floating. The output has the sizes `output_size` on its last two axes.

    Raises:
        ValueError: if a size is less than 1, or an input does not fit.
        TypeError: if a size is not an integer, or an input is not floating.

    Source: torch.nn.AdaptiveAvgPool2d.

    Example:
        >>> import jax.numpy as jnp
        >>> AdaptiveAvgPool2d((1, 2))(jnp.arange(6.0).reshape(1, 2, 3))
        Array([[[2., 3.]]], dtype=float32)
    """

    _ndim = 2


class AdaptiveAvgPool3d(_AdaptiveAvgPool):
    """Average pooling over the last three axes of `(N, C, D, H, W)` or `(C, D, H, W)`; see `AdaptiveAvgPool2d`."""

    _ndim = 3


class _AdaptiveMaxPool(_AdaptivePool):
    def __init__(self, output_size: SomeSize, return_indices: bool = False) -> None:
        self.output_size, self.return_indices = static(output_size), return_indices

    def forward(self, input: jax.Array) -> Any:
        return adaptive_max_pool(self._ndim, input, self.output_size, self.return_indices)


class AdaptiveMaxPool1d(_AdaptiveMaxPool):
    """Max pooling over the last axis of `(N, C, L)` or `(C, L)` to a given size; see `AdaptiveMaxPool2d`."""

    _ndim = 1


class AdaptiveMaxPool2d(_AdaptiveMaxPool):
    """Max pooling over two axes to a given size, with the windows of `AdaptiveAvgPool2d`.

    Args:
        output_size: an integer, or one for each axis; None stands for the input's size.
        return_indices: True also returns the indices of the maxima in the flattened H W, int32.

    Shapes: input `(N, C, H, W)` or `(C, H, W)`. The output has the sizes `output_size` on its last two axes.

    Raises:
        ValueError: if a size is less than 1, or an input does not fit.
        TypeError: if a size is not an integer.

    Source: torch.nn.AdaptiveMaxPool2d.

    Example:
        >>> import jax.numpy as jnp
        >>> AdaptiveMaxPool2d((1, 2))(jnp.arange(6.0).reshape(1, 2, 3))
        Array([[[4., 5.]]], dtype=float32)
    """

    _ndim = 2


class AdaptiveMaxPool3d(_AdaptiveMaxPool):
    """Max pooling over the last three axes of `(N, C, D, H, W)` or `(C, D, H, W)`; see `AdaptiveMaxPool2d`."""

    _ndim = 3


class _FractionalMaxPool(Module):
    _ndim: ClassVar[int]
    _random_samples: Any

    def __init__(
        self,
        kernel_size: Size,
        output_size: Size | None = None,
        output_ratio: float | Sequence[float] | None = None,
        return_indices: bool = False,
        _random_samples: Any = None,
    ) -> None:
        self.kernel_size = sizes(kernel_size, self._ndim, "kernel_size", 1)
        self.output_size, self.output_ratio = fractional_size(
            type(self).__name__, self._ndim, output_size, output_ratio
        )
        self.return_indices = return_indices
        self._random_samples = None if _random_samples is None else Buffer(_random_samples)

    def forward(self, input: jax.Array) -> Any:
        return fractional_max_pool(
            self._ndim,
            input,
            self.kernel_size,
            self.output_size,
            self.output_ratio,
            self.return_indices,
            self._random_samples,
            None,
        )

    def extra_repr(self) -> str:
        return ""


class FractionalMaxPool2d(_FractionalMaxPool):
    """Max pooling over two axes with windows at random distances, drawn for each image and channel.

    Each call uses one key of the current stream (`mt.seed`, `mt.rng`), in `eval()` mode too, as in torch.

    Args:
        kernel_size: the size of the windows, an integer or one for each axis.
        output_size: the number of windows, an integer or one for each axis.
        output_ratio: the output size divided by the input size, between 0 and 1. Pass either this or `output_size`.
        return_indices: True also returns the indices of the maxima in the flattened H W, int32.

    Shapes: input `(N, C, H, W)` or `(C, H, W)`, floating.

    Raises:
        ValueError: if a number is out of its range, or an input does not fit.
        TypeError: if a size is not an integer, or an input is not floating.
        TraceError: inside a plain JAX transform without `mt.rng`; see `mt.rng`.

    Source: torch.nn.FractionalMaxPool2d; Graham, "Fractional max-pooling", 2014. As in torch, `_random_samples` replaces
    the uniform samples that place the windows.

    Example:
        >>> import jax.numpy as jnp
        >>> FractionalMaxPool2d(2, output_ratio=0.7)(jnp.ones((1, 8, 8))).shape
        (1, 5, 5)
    """

    _ndim = 2


class FractionalMaxPool3d(_FractionalMaxPool):
    """Max pooling over three axes with windows at random distances; arguments as in `FractionalMaxPool2d`."""

    _ndim = 3
