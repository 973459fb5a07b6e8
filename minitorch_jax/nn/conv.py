"""Convolutions as layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ..module.module import Module
from ..module.parameter import fresh_parameter
from ..module.random import next_key
from ..nn import functional as F  # noqa: N812
from . import init
from .functional.conv import conv, conv_transpose, margins
from .functional.spatial import Size, sizes


class _Convolution(Module):
    """Base of the convolutions."""

    weight: jax.Array
    bias: jax.Array | Any  # None without a bias
    padding: Any
    _ndim: ClassVar[int]
    _transposed: ClassVar[bool] = False

    def _set_up(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size,
        padding: Any,
        output_padding: Size,
        groups: int,
        bias: bool,
        dilation: Size,
        padding_mode: str,
        dtype: Any,
        key: Any,
    ) -> None:
        if groups < 1 or in_channels < 1 or out_channels < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"{type(self).__name__} needs positive groups, in_channels and out_channels, both divisible by groups;"
                f" got in_channels={in_channels}, out_channels={out_channels}, groups={groups}"
            )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = sizes(kernel_size, self._ndim, "kernel_size", 1)
        self.stride = sizes(stride, self._ndim, "stride", 1)
        self.padding = padding if isinstance(padding, str) else sizes(padding, self._ndim, "padding", 0)
        self.dilation = sizes(dilation, self._ndim, "dilation", 1)
        margins(padding, self.kernel_size, self.stride, self.dilation)  # raises for a wrong string
        self.output_padding = sizes(output_padding, self._ndim, "output_padding", 0)
        self.groups, self.padding_mode = groups, padding_mode
        ends = (in_channels, out_channels // groups) if self._transposed else (out_channels, in_channels // groups)
        shape = *ends, *self.kernel_size
        weight_key, bias_key = jax.random.split(next_key(key))
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        self.weight = fresh_parameter(init.uniform(weight_key, shape, -bound, bound, dtype))
        self.bias = fresh_parameter(init.uniform(bias_key, (out_channels,), -bound, bound, dtype)) if bias else None

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        zeros = (0,) * self._ndim
        unusual = {
            "padding": self.padding != zeros,
            "dilation": self.dilation != (1,) * self._ndim,
            "output_padding": self.output_padding != zeros,
            "groups": self.groups != 1,
        }
        parts += [f"{name}={getattr(self, name)}" for name, shown in unusual.items() if shown]
        parts += ["bias=False"] * (self.bias is None)
        parts += [f"padding_mode={self.padding_mode}"] * (self.padding_mode != "zeros")
        return ", ".join(parts)


class _Conv(_Convolution):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Any = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        dtype: Any = jnp.float32,
        key: Any = None,
    ) -> None:
        if padding_mode not in ("zeros", "reflect", "replicate", "circular"):
            raise ValueError(
                f"padding_mode must be 'zeros', 'reflect', 'replicate' or 'circular'; got {padding_mode!r}"
            )
        self._set_up(
            in_channels, out_channels, kernel_size, stride, padding, 0, groups, bias, dilation, padding_mode, dtype, key
        )

    def forward(self, input: jax.Array) -> jax.Array:
        padding = self.padding
        if self.padding_mode != "zeros":
            widths = margins(padding, self.kernel_size, self.stride, self.dilation)
            input = F.pad(input, [width for pair in reversed(widths) for width in pair], self.padding_mode)
            padding = 0
        return conv(self._ndim, input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


class Conv1d(_Conv):
    """A convolution over one axis; arguments as in `Conv2d`.

    Shapes: input `(N, in_channels, L)` or `(in_channels, L)`; `weight` is `(out_channels, in_channels / groups, kernel)`.

    Source: torch.nn.Conv1d.

    Example:
        >>> Conv1d(3, 8, 5, key=jax.random.key(0))(jnp.ones((2, 3, 20))).shape
        (2, 8, 16)
    """

    _ndim = 1


class Conv2d(_Conv):
    """y[o] = b[o] + Σ_i w[o, i] ⋆ x[i], where ⋆ slides w over x.

    Args:
        in_channels: the number of channels of the input.
        out_channels: the number of channels of the output.
        kernel_size: the size of w. This and the next three arguments are an integer, or one for each axis.
        stride: the step of w.
        padding: the number of elements added on both sides of each axis. "valid" adds none; "same" (for stride 1) adds as
            many as the output needs to have the input's size.
        dilation: the distance between the elements of w.
        groups: the number of groups of channels. Each group of the output sees one group of the input.
        bias: True adds b.
        padding_mode: the values added: "zeros", or "reflect", "replicate" or "circular" as in `functional.pad`.
        dtype: the dtype of the parameters, floating.
        key: a `jax.random` key for the initial values. By default, the next key of the global stream (`mt.seed`).

    Shapes: input `(N, in_channels, H, W)` or `(in_channels, H, W)`, output `(N, out_channels, H', W')` or
    `(out_channels, H', W')` with H' = (H + 2 padding - dilation (kernel - 1) - 1) // stride + 1. `weight` is
    `(out_channels, in_channels / groups, kernel height, kernel width)`, `bias` is `(out_channels,)`. Both are drawn from
    U(-k, k) with k = 1 / sqrt(in_channels / groups * kernel height * kernel width).

    Raises:
        ValueError: if an argument is out of its range, or an input does not fit.
        TypeError: if a size is not an integer, or an input's dtype is not that of the parameters.

    Source: torch.nn.Conv2d.

    Example:
        >>> layer = Conv2d(3, 8, 3, padding=1, key=jax.random.key(0))
        >>> layer(jnp.ones((5, 3, 32, 32))).shape
        (5, 8, 32, 32)
    """

    _ndim = 2


class Conv3d(_Conv):
    """A convolution over three axes; arguments as in `Conv2d`.

    Shapes: input `(N, in_channels, D, H, W)` or `(in_channels, D, H, W)`; `weight` is `(out_channels, in_channels /
    groups, *kernel_size)`.

    Source: torch.nn.Conv3d.
    """

    _ndim = 3


class _ConvTranspose(_Convolution):
    _transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        *,
        dtype: Any = jnp.float32,
        key: Any = None,
    ) -> None:
        name = type(self).__name__
        if padding_mode != "zeros":
            raise ValueError(f"{name} takes padding_mode='zeros' only; got {padding_mode!r}")
        if isinstance(padding, str):
            raise TypeError(f"{name} takes padding as integers; got {padding!r}")
        self._set_up(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            dtype,
            key,
        )

    def forward(self, input: jax.Array, output_size: Sequence[int] | None = None) -> jax.Array:
        extra = self.output_padding if output_size is None else self._extra(input, tuple(output_size))
        return conv_transpose(
            self._ndim, input, self.weight, self.bias, self.stride, self.padding, extra, self.groups, self.dilation
        )

    def _extra(self, input: jax.Array, output_size: tuple[int, ...]) -> tuple[int, ...]:
        """The output_padding that leads to this output size."""
        wanted = output_size[-self._ndim :]
        if len(output_size) not in (self._ndim, input.ndim):
            raise ValueError(f"output_size must have {self._ndim} or {input.ndim} integers here; got {output_size}")
        settings = zip(
            input.shape[-self._ndim :], self.stride, self.padding, self.dilation, self.kernel_size, strict=True
        )
        least = tuple((n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in settings)
        most = tuple(n + s - 1 for n, s in zip(least, self.stride, strict=True))
        if any(not low <= n <= high for low, n, high in zip(least, wanted, most, strict=True)):
            raise ValueError(
                f"output_size must be from {least} to {most} for an input of shape {tuple(input.shape)}; got {wanted}"
            )
        return tuple(n - low for n, low in zip(wanted, least, strict=True))


class ConvTranspose1d(_ConvTranspose):
    """A transposed convolution over one axis; arguments as in `ConvTranspose2d`.

    Shapes: input `(N, in_channels, L)` or `(in_channels, L)`; `weight` is `(in_channels, out_channels / groups, kernel)`.

    Source: torch.nn.ConvTranspose1d.
    """

    _ndim = 1


class ConvTranspose2d(_ConvTranspose):
    """The gradient of a convolution with respect to its input: each element of the input adds a multiple of the kernel.

    Args:
        in_channels: the number of channels of the input.
        out_channels: the number of channels of the output.
        kernel_size: the size of w. This, the next three arguments and `dilation` are an integer, or one for each axis.
        stride: the distance between the kernels in the output.
        padding: the number of elements cut off on both sides of each axis.
        output_padding: the number of elements added at the end of each axis, smaller than `stride` or `dilation`. With a
            stride above 1, `Conv2d` maps several input sizes to one output size; `output_padding` selects one of them.
        groups: the number of groups of channels. Each group of the output sees one group of the input.
        bias: True adds b.
        dilation: the distance between the elements of w.
        padding_mode: must be "zeros".
        dtype: the dtype of the parameters, floating.
        key: a `jax.random` key for the initial values. By default, the next key of the global stream (`mt.seed`).

    A call takes `output_size` in place of `output_padding`: the size of the last two axes, or the whole shape.

    Shapes: input `(N, in_channels, H, W)` or `(in_channels, H, W)`, output `(N, out_channels, H', W')` or
    `(out_channels, H', W')` with H' = (H - 1) stride - 2 padding + dilation (kernel - 1) + output_padding + 1. `weight`
    is `(in_channels, out_channels / groups, kernel height, kernel width)`, `bias` is `(out_channels,)`. Both are drawn
    from U(-k, k) with k = 1 / sqrt(out_channels / groups * kernel height * kernel width).

    Raises:
        ValueError: if an argument is out of its range, or an input or `output_size` does not fit.
        TypeError: if a size is not an integer, or an input's dtype is not that of the parameters.

    Source: torch.nn.ConvTranspose2d; Zeiler et al., "Deconvolutional networks", 2010.

    Example:
        >>> layer = ConvTranspose2d(8, 3, 3, stride=2, padding=1, key=jax.random.key(0))
        >>> layer(jnp.ones((5, 8, 16, 16)), output_size=(32, 32)).shape
        (5, 3, 32, 32)
    """

    _ndim = 2


class ConvTranspose3d(_ConvTranspose):
    """A transposed convolution over three axes; arguments as in `ConvTranspose2d`.

    Shapes: input `(N, in_channels, D, H, W)` or `(in_channels, D, H, W)`; `weight` is `(in_channels, out_channels /
    groups, *kernel_size)`.

    Source: torch.nn.ConvTranspose3d.
    """

    _ndim = 3
