"""Convolutions as functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from .autocast import in_lower_type
from .conv_forms import convolution
from .dtypes import of_one_dtype
from .spatial import Size, over_batch, sizes


def margins(padding: Any, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Any:
    """The padding of each axis, as (before, after)."""
    if not isinstance(padding, str):
        return tuple((p, p) for p in sizes(padding, len(kernel), "padding", 0))
    if padding not in ("same", "valid"):
        raise ValueError(f"padding must be integers, 'same' or 'valid'; got {padding!r}")
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if any(s != 1 for s in stride):
        raise ValueError(f"padding='same' needs stride 1; got stride {tuple(stride)}. Pass the padding as integers.")
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return tuple((r // 2, r - r // 2) for r in reach)


def _checked(
    name: str, ndim: int, input: jax.Array, weight: jax.Array, bias: jax.Array | None, groups: int
) -> list[Any]:
    if weight.ndim != ndim + 2:
        raise ValueError(f"{name} takes a weight of {ndim + 2} dimensions; got shape {tuple(weight.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"{name}: groups must be positive and divide the weight's first axis; got groups={groups} and a weight of"
            f" shape {tuple(weight.shape)}"
        )
    return of_one_dtype(name, input=input, weight=weight, bias=bias)


def _convolved(
    name: str,
    input: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    channels: tuple[int, int],
    pads: Any,
    groups: int,
    *,
    stride: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
    spread: Sequence[int] | None = None,
) -> jax.Array:
    """The convolution of an input whose elements are first set `spread` apart, with zeros between them."""
    ndim = weight.ndim - 2
    ones = (1,) * ndim
    stride, dilation, spread = stride or ones, dilation or ones, spread or ones

    def batch(x: jax.Array) -> jax.Array:
        if x.shape[1] != channels[0]:
            last = f". If its last axis is the channels: `jnp.moveaxis(x, -1, {input.ndim - ndim - 1})`"
            raise ValueError(
                f"{name} takes {channels[0]} channels here; got an input of shape {tuple(input.shape)}, with"
                f" {x.shape[1]} channels on axis {input.ndim - ndim - 1}{last if x.shape[-1] == channels[0] else ''}"
            )
        if 0 in x.shape[2:]:
            raise ValueError(
                f"{name} takes no empty image; got an input of shape {tuple(input.shape)}. Only the batch and the"
                " channels may have size 0."
            )
        settings = zip(x.shape[2:], weight.shape[2:], dilation, spread, pads, strict=True)
        if any((n - 1) * between + sum(pad) < d * (k - 1) for n, k, d, between, pad in settings):
            raise ValueError(f"{name}: the kernel is larger than the padded input of shape {tuple(input.shape)}")
        out = convolution(x, weight, stride, pads, spread, dilation, groups)
        return out if bias is None else out + bias.reshape(1, channels[1], *ones)

    if bias is not None and bias.shape != (channels[1],):
        raise ValueError(f"{name} takes a bias of shape ({channels[1]},) here; got {tuple(bias.shape)}")
    return over_batch(batch, input, ndim, name)


@in_lower_type
def conv(
    ndim: int,
    input: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    stride: Size,
    padding: Any,
    dilation: Size,
    groups: int,
) -> jax.Array:
    """A convolution over `ndim` axes."""
    name = f"conv{ndim}d"
    input, weight, bias = _checked(name, ndim, input, weight, bias, groups)
    stride, dilation = sizes(stride, ndim, "stride", 1), sizes(dilation, ndim, "dilation", 1)
    pads = margins(padding, weight.shape[2:], stride, dilation)
    channels = weight.shape[1] * groups, weight.shape[0]
    return _convolved(name, input, weight, bias, channels, pads, groups, stride=stride, dilation=dilation)


@in_lower_type
def conv_transpose(
    ndim: int,
    input: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    stride: Size,
    padding: Size,
    output_padding: Size,
    groups: int,
    dilation: Size,
) -> jax.Array:
    """A transposed convolution over `ndim` axes."""
    name = f"conv_transpose{ndim}d"
    input, weight, bias = _checked(name, ndim, input, weight, bias, groups)
    stride, dilation = sizes(stride, ndim, "stride", 1), sizes(dilation, ndim, "dilation", 1)
    padding, extra = sizes(padding, ndim, "padding", 0), sizes(output_padding, ndim, "output_padding", 0)
    if any(e >= max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
        raise ValueError(
            f"output_padding must be smaller than stride or dilation; got output_padding={extra}, stride={stride},"
            f" dilation={dilation}"
        )
    inner, outer, *kernel = weight.shape
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    pads = [(r - p, r - p + e) for r, p, e in zip(reach, padding, extra, strict=True)]
    turned = lax.rev(weight, range(2, weight.ndim)).reshape(groups, inner // groups, outer, *kernel)
    turned = turned.swapaxes(1, 2).reshape(groups * outer, inner // groups, *kernel)
    channels = inner, groups * outer
    return _convolved(name, input, turned, bias, channels, pads, groups, dilation=dilation, spread=stride)


def conv1d(
    input: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    stride: Size = 1,
    padding: Any = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> jax.Array:
    """A convolution over one axis; arguments as in `conv2d`.

    Example:
        >>> import jax.numpy as jnp
        >>> conv1d(jnp.ones((1, 1, 4)), jnp.ones((1, 1, 3)))
        Array([[[3., 3.]]], dtype=float32)
    """
    return conv(1, input, weight, bias, stride, padding, dilation, groups)


def conv2d(
    input: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    stride: Size = 1,
    padding: Any = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> jax.Array:
    """y[o] = b[o] + Σ_i w[o, i] ⋆ x[i], where ⋆ slides w over x.

    Args:
        input: `(N, C, H, W)` or `(C, H, W)`.
        weight: `(out, C / groups, kernel height, kernel width)`.
        bias: `(out,)`.
        stride: the step of the kernel, an integer or one for each axis.
        padding: the number of zeros on both sides of each axis, an integer or one for each axis. "valid" adds none;
            "same" (for stride 1) adds as many as the output needs to have the input's size.
        dilation: the distance between the kernel's elements, an integer or one for each axis.
        groups: the number of groups of channels. Each group of the output sees one group of the input.

    Returns:
        `(N, out, H', W')` or `(out, H', W')`, with H' = (H + 2 padding - dilation (kernel - 1) - 1) // stride + 1.

    Raises:
        ValueError: if shapes do not fit, or a number is out of its range.
        TypeError: if the arrays differ in dtype.

    Source: torch.nn.functional.conv2d.

    Example:
        >>> import jax.numpy as jnp
        >>> conv2d(jnp.ones((5, 3, 8, 8)), jnp.ones((4, 3, 3, 3)), padding="same").shape
        (5, 4, 8, 8)
    """
    return conv(2, input, weight, bias, stride, padding, dilation, groups)


def conv3d(
    input: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    stride: Size = 1,
    padding: Any = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> jax.Array:
    """A convolution over three axes; arguments as in `conv2d`."""
    return conv(3, input, weight, bias, stride, padding, dilation, groups)


def conv_transpose1d(
    input: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> jax.Array:
    """A transposed convolution over one axis; arguments as in `conv_transpose2d`."""
    return conv_transpose(1, input, weight, bias, stride, padding, output_padding, groups, dilation)


def conv_transpose2d(
    input: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> jax.Array:
    """The gradient of `conv2d` with respect to its input: each element of the input adds a multiple of the kernel.

    Args:
        input: `(N, C, H, W)` or `(C, H, W)`.
        weight: `(C, out / groups, kernel height, kernel width)`.
        bias: `(out,)`.
        stride: the distance between the kernels in the output, an integer or one for each axis.
        padding: the number of elements cut off on both sides of each axis.
        output_padding: the number of elements added at the end of each axis, smaller than `stride` or `dilation`. With a
            stride above 1, `conv2d` maps several input sizes to one output size; `output_padding` selects one of them.
        groups: the number of groups of channels. Each group of the output sees one group of the input.
        dilation: the distance between the kernel's elements, an integer or one for each axis.

    Returns:
        `(N, out, H', W')` or `(out, H', W')`, with
        H' = (H - 1) stride - 2 padding + dilation (kernel - 1) + output_padding + 1.

    Raises:
        ValueError: if shapes do not fit, or a number is out of its range.
        TypeError: if the arrays differ in dtype.

    Source: torch.nn.functional.conv_transpose2d.

    Example:
        >>> import jax.numpy as jnp
        >>> conv_transpose2d(jnp.ones((5, 3, 4, 4)), jnp.ones((3, 2, 2, 2)), stride=2).shape
        (5, 2, 8, 8)
    """
    return conv_transpose(2, input, weight, bias, stride, padding, output_padding, groups, dilation)


def conv_transpose3d(
    input: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> jax.Array:
    """A transposed convolution over three axes; arguments as in `conv_transpose2d`."""
    return conv_transpose(3, input, weight, bias, stride, padding, output_padding, groups, dilation)
