"""Rearranging the elements of images, as functions."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from .spatial import Size, floating, not_empty, sizes


def pixel_shuffle(input: jax.Array, upscale_factor: int) -> jax.Array:
    """Turns r^2 channels into one channel of r times the height and width.

    Args:
        input: `(*, C r^2, H, W)`.
        upscale_factor: r.

    Returns:
        `(*, C, H r, W r)`.

    Raises:
        ValueError: if the input does not fit.

    Source: torch.nn.functional.pixel_shuffle; Shi et al., 2016.

    Example:
        >>> pixel_shuffle(jnp.arange(4).reshape(4, 1, 1), 2)
        Array([[[0, 1],
                [2, 3]]], dtype=int32)
    """
    r = upscale_factor
    if input.ndim < 3 or r < 1 or input.shape[-3] % r**2:
        raise ValueError(
            f"pixel_shuffle takes an input (*, C r^2, H, W) for a positive upscale_factor r; got shape"
            f" {tuple(input.shape)} and {r}"
        )
    *batch, channels, height, width = input.shape
    parts = input.reshape(math.prod(batch), channels // r**2, r, r, height, width).transpose(0, 1, 4, 2, 5, 3)
    return parts.reshape(*batch, channels // r**2, height * r, width * r)


def pixel_unshuffle(input: jax.Array, downscale_factor: int) -> jax.Array:
    """The inverse of `pixel_shuffle`: `(*, C, H r, W r)` becomes `(*, C r^2, H, W)`.

    Raises:
        ValueError: if the input does not fit.

    Source: torch.nn.functional.pixel_unshuffle.
    """
    r = downscale_factor
    if input.ndim < 3 or r < 1 or input.shape[-2] % r or input.shape[-1] % r:
        raise ValueError(
            f"pixel_unshuffle takes an input (*, C, H r, W r) for a positive downscale_factor r; got shape"
            f" {tuple(input.shape)} and {r}"
        )
    *batch, channels, height, width = input.shape
    parts = input.reshape(math.prod(batch), channels, height // r, r, width // r, r).transpose(0, 1, 3, 5, 2, 4)
    return parts.reshape(*batch, channels * r**2, height // r, width // r)


def channel_shuffle(input: jax.Array, groups: int) -> jax.Array:
    """Interleaves groups of channels: the first channel of each group, then the second of each group, and so on.

    Args:
        input: `(N, C, *)`.
        groups: the number of groups of consecutive channels; it divides C.

    Raises:
        ValueError: if the input does not fit.

    Source: torch.nn.functional.channel_shuffle; Zhang et al., "ShuffleNet", 2018.

    Example:
        >>> channel_shuffle(jnp.arange(4).reshape(1, 4, 1), 2).ravel()
        Array([0, 2, 1, 3], dtype=int32)
    """
    if input.ndim < 3 or groups < 1 or input.shape[1] % groups:
        raise ValueError(
            f"channel_shuffle takes an input (N, C, *) of at least 3 dimensions, and positive groups that divide C; got"
            f" shape {tuple(input.shape)} and groups={groups}"
        )
    batch, channels, *rest = input.shape
    return input.reshape(batch, groups, channels // groups, *rest).swapaxes(1, 2).reshape(input.shape)


_Pair = tuple[int, ...]


def _blocks(shape: _Pair, kernel: _Pair, dilation: _Pair, padding: _Pair, stride: _Pair, name: str) -> _Pair:
    """The number of blocks along each of two axes."""
    settings = zip(shape, kernel, dilation, padding, stride, strict=True)
    counts = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, d, p, s in settings)
    if min(counts) < 1:
        raise ValueError(f"{name}: a block of {kernel} with dilation {dilation} does not fit an image of {shape}")
    return counts


def unfold(input: jax.Array, kernel_size: Size, dilation: Size = 1, padding: Size = 0, stride: Size = 1) -> jax.Array:
    """The blocks of an image that a convolution's kernel covers, as columns (im2col).

    Args:
        input: `(N, C, H, W)` or `(C, H, W)`.
        kernel_size: the size of the blocks. This and the next three arguments are an integer, or one for each axis.
        dilation: the distance between the elements of a block.
        padding: the number of zeros on both sides of each axis.
        stride: the distance between the blocks.

    Returns:
        `(N, C kernel height kernel width, L)` for L blocks, or the same without N.

    Raises:
        ValueError: if the input does not fit, or a number is out of its range.

    Source: torch.nn.functional.unfold.

    Example:
        >>> unfold(jnp.arange(6).reshape(1, 2, 3), (2, 2))
        Array([[0, 1],
               [1, 2],
               [3, 4],
               [4, 5]], dtype=int32)
    """
    kernel, apart = sizes(kernel_size, 2, "kernel_size", 1), sizes(dilation, 2, "dilation", 1)
    pads, step = sizes(padding, 2, "padding", 0), sizes(stride, 2, "stride", 1)
    if input.ndim not in (3, 4):
        raise ValueError(f"unfold takes an input (N, C, H, W) or (C, H, W); got shape {tuple(input.shape)}")
    not_empty(input, "unfold", 3)
    return _columns(input, kernel, apart, pads, step)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _columns(input: jax.Array, kernel: _Pair, dilation: _Pair, padding: _Pair, stride: _Pair) -> jax.Array:
    counts = _blocks(input.shape[-2:], kernel, dilation, padding, stride, "unfold")
    out = jnp.pad(input, [(0, 0)] * (input.ndim - 2) + [(p, p) for p in padding])
    for axis, k, d, s, count in zip((-2, -1), kernel, dilation, stride, counts, strict=True):
        last = (count - 1) * s + 1
        out = jnp.stack([lax.slice_in_dim(out, j * d, j * d + last, s, axis) for j in range(k)], -3)
    return out.reshape(*input.shape[:-3], input.shape[-3] * math.prod(kernel), math.prod(counts))


def fold(
    input: jax.Array, output_size: Size, kernel_size: Size, dilation: Size = 1, padding: Size = 0, stride: Size = 1
) -> jax.Array:
    """Adds overlapping blocks up to an image (col2im). It is the transpose of `unfold`, not its inverse.

    Args:
        input: `(N, C kernel height kernel width, L)`, or the same without N.
        output_size: the size of the image. This and the next four arguments are an integer, or one for each axis.
        kernel_size: the size of the blocks.
        dilation: the distance between the elements of a block.
        padding: the number of elements cut off on both sides of each axis.
        stride: the distance between the blocks.

    Returns:
        `(N, C, *output_size)` or `(C, *output_size)`.

    Raises:
        ValueError: if the input does not fit, or a number is out of its range.
        TypeError: if the input is not floating.

    Source: torch.nn.functional.fold.

    Example:
        >>> fold(jnp.ones((4, 2)), (2, 3), (2, 2))
        Array([[[1., 2., 1.],
                [1., 2., 1.]]], dtype=float32)
    """
    shape, kernel = sizes(output_size, 2, "output_size", 1), sizes(kernel_size, 2, "kernel_size", 1)
    apart, step = sizes(dilation, 2, "dilation", 1), sizes(stride, 2, "stride", 1)
    pads = sizes(padding, 2, "padding", 0)
    floating(input, "fold")
    counts = _blocks(shape, kernel, apart, pads, step, "fold")
    area = math.prod(kernel)
    if input.ndim not in (2, 3) or input.shape[-2] % area or input.shape[-1] != math.prod(counts):
        raise ValueError(
            f"fold takes an input (N, C {area}, {math.prod(counts)}) or (C {area}, {math.prod(counts)}) here; got shape"
            f" {tuple(input.shape)}"
        )
    not_empty(input, "fold", 2)
    return _summed(input, shape, kernel, apart, pads, step)


@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _summed(input: jax.Array, shape: _Pair, kernel: _Pair, dilation: _Pair, padding: _Pair, stride: _Pair) -> jax.Array:
    channels = input.shape[-2] // math.prod(kernel)
    image = jax.ShapeDtypeStruct((*input.shape[:-2], channels, *shape), input.dtype)
    (out,) = jax.linear_transpose(lambda x: _columns(x, kernel, dilation, padding, stride), image)(input)
    return out
