"""Layers that rearrange or resize images."""

from __future__ import annotations

from typing import Any

import jax

from ..module.module import Module
from ..nn import functional as F  # noqa: N812
from .functional.spatial import Size, sizes, static


class PixelShuffle(Module):
    """Turns r^2 channels into one channel of r times the height and width.

    Args:
        upscale_factor: r.

    Shapes: input `(*, C r^2, H, W)`, output `(*, C, H r, W r)`.

    Raises:
        ValueError: if an input does not fit.

    Source: torch.nn.PixelShuffle; Shi et al., 2016.

    Example:
        >>> import jax.numpy as jnp
        >>> PixelShuffle(2)(jnp.arange(4).reshape(4, 1, 1))
        Array([[[0, 1],
                [2, 3]]], dtype=int32)
    """

    def __init__(self, upscale_factor: int) -> None:
        self.upscale_factor = upscale_factor

    def forward(self, input: jax.Array) -> jax.Array:
        return F.pixel_shuffle(input, self.upscale_factor)

    def extra_repr(self) -> str:
        return f"upscale_factor={self.upscale_factor}"


class PixelUnshuffle(Module):
    """The inverse of `PixelShuffle`: `(*, C, H r, W r)` becomes `(*, C r^2, H, W)`, for r = `downscale_factor`."""

    def __init__(self, downscale_factor: int) -> None:
        self.downscale_factor = downscale_factor

    def forward(self, input: jax.Array) -> jax.Array:
        return F.pixel_unshuffle(input, self.downscale_factor)

    def extra_repr(self) -> str:
        return f"downscale_factor={self.downscale_factor}"


class ChannelShuffle(Module):
    """Interleaves `groups` groups of channels: the first channel of each group, then the second, and so on.

    Shapes: input and output `(N, C, *)`; `groups` divides C.

    Source: torch.nn.ChannelShuffle; Zhang et al., "ShuffleNet", 2018.
    """

    def __init__(self, groups: int) -> None:
        self.groups = groups

    def forward(self, input: jax.Array) -> jax.Array:
        return F.channel_shuffle(input, self.groups)

    def extra_repr(self) -> str:
        return f"groups={self.groups}"


class Upsample(Module):
    """Resizes images. `functional.interpolate` documents the arguments in full.

    Args:
        size: the new size, an integer or one for each axis. Pass either this or `scale_factor`.
        scale_factor: the factor from the old size to the new size, a number or a tuple.
        mode: "nearest", "linear", "bilinear", "bicubic" or "trilinear", or another mode of `interpolate`.
        align_corners: True keeps the centres of the corner pixels in place.
        recompute_scale_factor: True interpolates by the ratio of the rounded sizes, not by `scale_factor`.

    Shapes: input `(N, C, L)`, `(N, C, H, W)` or `(N, C, D, H, W)`; output `(N, C, *size)`.

    Raises:
        ValueError: if arguments exclude each other, or do not fit an input.

    Source: torch.nn.Upsample.

    Example:
        >>> import jax.numpy as jnp
        >>> Upsample(scale_factor=2)(jnp.array([[[0.0, 1.0]]]))
        Array([[[0., 0., 1., 1.]]], dtype=float32)
    """

    def __init__(
        self,
        size: Size | None = None,
        scale_factor: float | tuple[float, ...] | None = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
        recompute_scale_factor: bool | None = None,
    ) -> None:
        self.size = static(size)
        if isinstance(scale_factor, tuple):
            self.scale_factor: Any = tuple(map(float, scale_factor))
        else:
            self.scale_factor = None if scale_factor is None else float(scale_factor)
        self.mode, self.align_corners, self.recompute_scale_factor = mode, align_corners, recompute_scale_factor

    def forward(self, input: jax.Array) -> jax.Array:
        return F.interpolate(
            input, self.size, self.scale_factor, self.mode, self.align_corners, self.recompute_scale_factor
        )

    def extra_repr(self) -> str:
        size = f"size={self.size}" if self.scale_factor is None else f"scale_factor={self.scale_factor}"
        return f"{size}, mode={self.mode!r}"


class UpsamplingNearest2d(Upsample):
    """`Upsample` of images with mode "nearest"."""

    def __init__(self, size: Size | None = None, scale_factor: float | tuple[float, float] | None = None) -> None:
        super().__init__(size, scale_factor, mode="nearest")


class UpsamplingBilinear2d(Upsample):
    """`Upsample` of images with mode "bilinear" and `align_corners`."""

    def __init__(self, size: Size | None = None, scale_factor: float | tuple[float, float] | None = None) -> None:
        super().__init__(size, scale_factor, mode="bilinear", align_corners=True)


class Unfold(Module):
    """The blocks of an image that a convolution's kernel covers, as columns (im2col).

    Args:
        kernel_size: the size of the blocks. This and the next three arguments are an integer, or one for each axis.
        dilation: the distance between the elements of a block.
        padding: the number of zeros on both sides of each axis.
        stride: the distance between the blocks.

    Shapes: input `(N, C, H, W)`, output `(N, C kernel height kernel width, L)` for L blocks; or both without N.

    Raises:
        ValueError: if a number is out of its range, or an input does not fit.
        TypeError: if a size is not an integer.

    Source: torch.nn.Unfold.

    Example:
        >>> import jax.numpy as jnp
        >>> Unfold(2)(jnp.ones((5, 3, 4, 4))).shape
        (5, 12, 9)
    """

    def __init__(self, kernel_size: Size, dilation: Size = 1, padding: Size = 0, stride: Size = 1) -> None:
        sizes(kernel_size, 2, "kernel_size", 1)
        sizes(dilation, 2, "dilation", 1)
        sizes(padding, 2, "padding", 0)
        sizes(stride, 2, "stride", 1)
        self.kernel_size, self.dilation = static(kernel_size), static(dilation)
        self.padding, self.stride = static(padding), static(stride)

    def forward(self, input: jax.Array) -> jax.Array:
        return F.unfold(input, self.kernel_size, self.dilation, self.padding, self.stride)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, dilation={self.dilation}, padding={self.padding}, stride={self.stride}"


class Fold(Unfold):
    """Adds overlapping blocks up to an image (col2im). It is the transpose of `Unfold`, not its inverse.

    Args:
        output_size: the size of the image, an integer or one for each axis. The other arguments are those of `Unfold`.

    Shapes: input `(N, C kernel height kernel width, L)`, floating, output `(N, C, *output_size)`; or both without N.

    Raises:
        ValueError: if a number is out of its range, or an input does not fit.
        TypeError: if a size is not an integer, or an input is not floating.

    Source: torch.nn.Fold.

    Example:
        >>> import jax.numpy as jnp
        >>> Fold((2, 3), 2)(jnp.ones((4, 2)))
        Array([[[1., 2., 1.],
                [1., 2., 1.]]], dtype=float32)
    """

    def __init__(
        self, output_size: Size, kernel_size: Size, dilation: Size = 1, padding: Size = 0, stride: Size = 1
    ) -> None:
        super().__init__(kernel_size, dilation, padding, stride)
        sizes(output_size, 2, "output_size", 1)
        self.output_size = static(output_size)

    def forward(self, input: jax.Array) -> jax.Array:
        return F.fold(input, self.output_size, self.kernel_size, self.dilation, self.padding, self.stride)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, {super().extra_repr()}"
