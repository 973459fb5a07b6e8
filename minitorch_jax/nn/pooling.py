"""Pooling as layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax

from ..module.module import Module
from ..nn import functional as F  # noqa: N812
from .functional.pooling import avg_pool, lp_pool, max_pool
from .functional.spatial import Size, sizes, static, step_of
from .functional.unpooling import max_unpool


class _Pool(Module):
    """Base of the pooling layers: windows over the last `_ndim` axes."""

    _ndim: ClassVar[int]

    def _set_up(self, kernel_size: Size, stride: Size | None, padding: Size = 0) -> None:
        sizes(kernel_size, self._ndim, "kernel_size", 1)
        sizes(step_of(stride, kernel_size), self._ndim, "stride", 1)
        sizes(padding, self._ndim, "padding", 0)
        self.kernel_size = static(kernel_size)
        self.stride = self.kernel_size if stride is None else static(stride)
        self.padding = static(padding)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class _MaxPool(_Pool):
    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        dilation: Size = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
    ) -> None:
        self._set_up(kernel_size, stride, padding)
        sizes(dilation, self._ndim, "dilation", 1)
        self.dilation = static(dilation)
        self.return_indices, self.ceil_mode = return_indices, ceil_mode

    def forward(self, input: jax.Array) -> Any:
        return max_pool(
            self._ndim,
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dilation={self.dilation}, ceil_mode={self.ceil_mode}"


class MaxPool1d(_MaxPool):
    """Max pooling over the last axis of `(N, C, L)` or `(C, L)`; arguments as in `MaxPool2d`."""

    _ndim = 1


class MaxPool2d(_MaxPool):
    """Max pooling over two axes. If several elements of a window are the maximum, the first one gets the gradient.

    Args:
        kernel_size: the size of the windows. This and the next three arguments are an integer, or one for each axis.
        stride: the step of the windows; None or () stands for `kernel_size`.
        padding: the number of elements that windows reach beyond each edge, at most half of `kernel_size`. They never
            are the maximum.
        dilation: the distance between the elements of a window.
        return_indices: True also returns the indices of the maxima in the flattened H W, int32.
        ceil_mode: True adds a last window that reaches beyond the end, if it starts in the input or in the padding
            before it.

    Shapes: input `(N, C, H, W)` or `(C, H, W)`, output `(N, C, H', W')` or `(C, H', W')` with
    H' = (H + 2 padding - dilation (kernel - 1) - 1) // stride + 1, rounded up with `ceil_mode`.

    Raises:
        ValueError: if a number is out of its range, or an input does not fit.
        TypeError: if a size is not an integer.

    Source: torch.nn.MaxPool2d.

    Example:
        >>> import jax.numpy as jnp
        >>> MaxPool2d(2)(jnp.arange(16.0).reshape(1, 4, 4))
        Array([[[ 5.,  7.],
                [13., 15.]]], dtype=float32)
    """

    _ndim = 2


class MaxPool3d(_MaxPool):
    """Max pooling over the last three axes of `(N, C, D, H, W)` or `(C, D, H, W)`; arguments as in `MaxPool2d`."""

    _ndim = 3


class _MaxUnpool(_Pool):
    def __init__(self, kernel_size: Size, stride: Size | None = None, padding: Size = 0) -> None:
        self.kernel_size = sizes(kernel_size, self._ndim, "kernel_size", 1)
        self.stride = self.kernel_size if stride is None else sizes(stride, self._ndim, "stride", 1)
        self.padding = sizes(padding, self._ndim, "padding", 0)

    def forward(self, input: jax.Array, indices: jax.Array, output_size: Sequence[int] | None = None) -> jax.Array:
        return max_unpool(self._ndim, input, indices, self.kernel_size, self.stride, self.padding, output_size)


class MaxUnpool1d(_MaxUnpool):
    """Puts the maxima of `MaxPool1d` back at their indices; arguments as in `MaxUnpool2d`."""

    _ndim = 1


class MaxUnpool2d(_MaxUnpool):
    """Puts the maxima of `MaxPool2d` back at their indices, with zeros elsewhere.

    Args:
        kernel_size: the `kernel_size` of the pooling.
        stride: the `stride` of the pooling; None stands for `kernel_size`.
        padding: the `padding` of the pooling.

    A call takes the maxima and their indices. It also takes `output_size`, the size of the pooling's input, which is
    needed where several input sizes have the same output size.

    Raises:
        ValueError: if a number is out of its range, or an input does not fit.
        TypeError: if a size is not an integer, or the indices are not integers.

    Source: torch.nn.MaxUnpool2d. Differs from PyTorch as `functional.max_unpool2d` does.

    Example:
        >>> import jax.numpy as jnp
        >>> pooled, indices = MaxPool2d(2, return_indices=True)(jnp.array([[[1.0, 2.0], [7.0, 3.0]]]))
        >>> MaxUnpool2d(2)(pooled, indices)
        Array([[[0., 0.],
                [7., 0.]]], dtype=float32)
    """

    _ndim = 2


class MaxUnpool3d(_MaxUnpool):
    """Puts the maxima of `MaxPool3d` back at their indices; arguments as in `MaxUnpool2d`."""

    _ndim = 3


class AvgPool1d(_Pool):
    """Average pooling over the last axis of `(N, C, L)` or `(C, L)`; arguments as in `AvgPool2d`."""

    _ndim = 1

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> None:
        given = kernel_size if stride is None else stride
        step = sizes(given, 1, "stride") if step_of(stride, kernel_size) is given else ()
        self._set_up(sizes(kernel_size, 1, "kernel_size"), step, sizes(padding, 1, "padding"))
        self.ceil_mode, self.count_include_pad = ceil_mode, count_include_pad

    def forward(self, input: jax.Array) -> jax.Array:
        return F.avg_pool1d(input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)


class _AvgPool(_Pool):
    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> None:
        self._set_up(kernel_size, stride, padding)
        self.ceil_mode, self.count_include_pad, self.divisor_override = ceil_mode, count_include_pad, divisor_override

    def forward(self, input: jax.Array) -> jax.Array:
        return avg_pool(
            self._ndim,
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AvgPool2d(_AvgPool):
    """Average pooling over two axes.

    Args:
        kernel_size: the size of the windows. This and the next two arguments are an integer, or one for each axis.
        stride: the step of the windows; None or () stands for `kernel_size`.
        padding: the number of zeros on both sides of each axis, at most half of `kernel_size`.
        ceil_mode: True adds a last window that reaches beyond the end, if it starts in the input or in the padding
            before it.
        count_include_pad: True counts the zeros of the padding in the mean.
        divisor_override: the divisor of the sums, instead of the number of elements of a window.

    Shapes: input `(N, C, H, W)` or `(C, H, W)`, floating, output `(N, C, H', W')` or `(C, H', W')` with
    H' = (H + 2 padding - kernel) // stride + 1, rounded up with `ceil_mode`.

    Raises:
        ValueError: if a number is out of its range, or an input does not fit.
        TypeError: if a size is not an integer, or an input is not floating.

    Source: torch.nn.AvgPool2d.

    Example:
        >>> import jax.numpy as jnp
        >>> AvgPool2d(2)(jnp.arange(16.0).reshape(1, 4, 4))
        Array([[[ 2.5,  4.5],
                [10.5, 12.5]]], dtype=float32)
    """

    _ndim = 2


class AvgPool3d(_AvgPool):
    """Average pooling over the last three axes of `(N, C, D, H, W)` or `(C, D, H, W)`; arguments as in `AvgPool2d`."""

    _ndim = 3


class _LPPool(_Pool):
    def __init__(
        self, norm_type: float, kernel_size: Size, stride: Size | None = None, ceil_mode: bool = False
    ) -> None:
        if norm_type == 0:
            raise ValueError(f"{type(self).__name__}: norm_type must not be 0")
        self._set_up(kernel_size, stride)
        self.norm_type, self.stride, self.ceil_mode = norm_type, static(stride), ceil_mode

    def forward(self, input: jax.Array) -> jax.Array:
        return lp_pool(self._ndim, input, self.norm_type, self.kernel_size, self.stride, self.ceil_mode)

    def extra_repr(self) -> str:
        return (
            f"norm_type={self.norm_type}, kernel_size={self.kernel_size}, stride={self.stride},"
            f" ceil_mode={self.ceil_mode}"
        )


class LPPool1d(_LPPool):
    """Power-average pooling over the last axis of `(N, C, L)` or `(C, L)`; arguments as in `LPPool2d`."""

    _ndim = 1


class LPPool2d(_LPPool):
    """Power-average pooling over two axes: (Σ x^p)^(1/p) of each window. Where the sum is 0, its gradient is 0.

    Args:
        norm_type: p, not 0. Infinity takes the maximum of |x|.
        kernel_size: the size of the windows, an integer or one for each axis.
        stride: the step of the windows; None or () stands for `kernel_size`.
        ceil_mode: True adds a last window that reaches beyond the end.

    Shapes: input `(N, C, H, W)` or `(C, H, W)`, floating.

    Raises:
        ValueError: if a number is out of its range, or an input does not fit.
        TypeError: if a size is not an integer, or an input is not floating.

    Source: torch.nn.LPPool2d. As in torch, x^p keeps its sign, so odd powers may cancel out.

    Example:
        >>> import jax.numpy as jnp
        >>> LPPool2d(2, (1, 2))(jnp.array([[[3.0, 4.0]]]))
        Array([[[5.]]], dtype=float32)
    """

    _ndim = 2


class LPPool3d(_LPPool):
    """Power-average pooling over three axes of `(N, C, D, H, W)` or `(C, D, H, W)`; arguments as in `LPPool2d`."""

    _ndim = 3
