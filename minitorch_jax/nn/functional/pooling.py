"""Pooling as functions."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...runtime.platforms import on_cpu
from ...runtime.xla_faults import largest_in_windows
from .autocast import in_float32
from .spatial import Size, floating, not_empty, over_batch, sizes, wide
from .windows import Windows, at_places, first_places, lowest, separable_maxima, separable_sums, windows

LONGEST = 8  # elements of a window along an axis, for which it is faster on a CPU to go along one axis after another


def max_pool(
    ndim: int,
    input: jax.Array,
    kernel_size: Size,
    stride: Size | None,
    padding: Size,
    dilation: Size,
    ceil_mode: bool,
    return_indices: bool,
) -> Any:
    """Max pooling over `ndim` axes."""
    name = f"max_pool{ndim}d"

    def batch(x: jax.Array) -> Any:
        not_empty(x, name, ndim + 1)
        frame = windows(name, x.shape[2:], kernel_size, stride, padding, dilation, ceil_mode)
        if return_indices:
            return _maxima(x, frame), _places(x, frame)
        return _maxima(x, frame)

    return over_batch(batch, input, ndim, name)


def _maxima(x: jax.Array, frame: Windows) -> jax.Array:
    if max(frame.kernel) > LONGEST:
        return _whole_maxima(x, frame)
    return on_cpu(partial(_separable_maxima, frame=frame), partial(_whole_maxima, frame=frame), x)


def _whole_maxima(x: jax.Array, frame: Windows) -> jax.Array:
    if max(frame.dilation) > 1:  # JAX has no gradient of dilated windows
        return at_places(x, _places(x, frame))
    return largest_in_windows(
        x,
        lowest(x.dtype).item(),
        (1, 1, *frame.kernel),
        (1, 1, *frame.stride),
        ((0, 0), (0, 0), *map(tuple, frame.pads)),
    )


@partial(jax.jit, static_argnums=1)
def _places(x: jax.Array, frame: Windows) -> jax.Array:
    return first_places(x, [frame.rows(axis) for axis in range(x.ndim - 2)], frame.pads)


_separable_maxima = jax.jit(separable_maxima, static_argnames="frame")
_separable_sums = jax.jit(separable_sums, static_argnames="frame")


def _sums(x: jax.Array, frame: Windows) -> jax.Array:
    if max(frame.kernel) > LONGEST:
        return _whole_sums(x, frame)
    return on_cpu(partial(_separable_sums, frame=frame), partial(_whole_sums, frame=frame), x)


def _whole_sums(x: jax.Array, frame: Windows) -> jax.Array:
    around = ((0, 0), (0, 0), *frame.pads)
    return lax.reduce_window(x, np.zeros((), x.dtype), lax.add, (1, 1, *frame.kernel), (1, 1, *frame.stride), around)


def avg_pool(
    ndim: int,
    input: jax.Array,
    kernel_size: Size,
    stride: Size | None,
    padding: Size,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None = None,
) -> jax.Array:
    """Average pooling over `ndim` axes."""
    name = f"avg_pool{ndim}d"
    floating(input, name)
    if divisor_override == 0:
        raise ValueError(f"{name}: divisor_override must not be 0; use None for the size of the window")

    def batch(x: jax.Array) -> jax.Array:
        not_empty(x, name, ndim + 1)
        shape = x.shape[2:]
        frame = windows(name, shape, kernel_size, stride, padding, 1, ceil_mode)
        sums = _sums(x.astype(wide(x.dtype)), frame)
        if divisor_override is not None:
            return (sums / divisor_override).astype(x.dtype)
        counts = np.ones((1, 1))
        for axis, (size, (before, _)) in enumerate(zip(shape, frame.pads, strict=True)):
            # elements that `ceil_mode` adds after the padding never count
            low, high = (0, size + 2 * before) if count_include_pad else (before, before + size)
            rows = frame.rows(axis)
            counts = counts[..., None] * ((rows >= low) & (rows < high)).sum(1)
        divisor = float(counts.flat[0]) if (counts == counts.flat[0]).all() else jnp.asarray(counts, sums.dtype)
        return (sums / divisor).astype(x.dtype)

    return over_batch(batch, input, ndim, name)


@in_float32
def lp_pool(
    ndim: int, input: jax.Array, norm_type: float, kernel_size: Size, stride: Size | None, ceil_mode: bool
) -> jax.Array:
    """Power-average pooling over `ndim` axes."""
    if norm_type == 0:
        raise ValueError(f"lp_pool{ndim}d: norm_type must not be 0")
    if math.isinf(norm_type):
        sign = 1 if norm_type > 0 else -1
        return sign * max_pool(ndim, sign * jnp.abs(input), kernel_size, stride, 0, 1, ceil_mode, False)
    power = int(norm_type) if norm_type == int(norm_type) else float(norm_type)  # an integer power is a product
    x = input.astype(wide(input.dtype)) if jnp.issubdtype(input.dtype, jnp.floating) else input
    means = avg_pool(ndim, x**power, kernel_size, stride, 0, ceil_mode, True)
    sums = means * math.prod(sizes(kernel_size, ndim, "kernel_size", 1))
    there = sums != 0
    return jnp.where(there, jnp.where(there, sums, 1) ** (1 / norm_type), 0).astype(input.dtype)


def max_pool1d(
    input: jax.Array,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Max pooling over one axis; arguments as in `max_pool2d`.

    Example:
        >>> max_pool1d(jnp.array([[1.0, 3.0, 2.0, 0.0]]), 2)
        Array([[3., 2.]], dtype=float32)
    """
    return max_pool(1, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool2d(
    input: jax.Array,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Max pooling over two axes. If several elements of a window are the maximum, the first one gets the gradient.

    Args:
        input: `(N, C, H, W)` or `(C, H, W)`.
        kernel_size: the size of the windows. This and the next three arguments are an integer, or one for each axis.
        stride: the step of the windows; None or () stands for `kernel_size`.
        padding: the number of elements that windows reach beyond each edge, at most half of `kernel_size`. They never
            are the maximum.
        dilation: the distance between the elements of a window.
        ceil_mode: True adds a last window that reaches beyond the end, if it starts in the input or in the padding
            before it.
        return_indices: True also returns the indices of the maxima.

    Returns:
        `(N, C, H', W')` or `(C, H', W')`. With `return_indices`, a pair of this array and an int32 array of the same
        shape: the index of each window's first maximum in the flattened H W.

    Raises:
        ValueError: if shapes do not fit, or a number is out of its range.

    Source: torch.nn.functional.max_pool2d.

    Example:
        >>> max_pool2d(jnp.arange(16.0).reshape(1, 4, 4), 2)
        Array([[[ 5.,  7.],
                [13., 15.]]], dtype=float32)
    """
    return max_pool(2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool3d(
    input: jax.Array,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Max pooling over three axes; arguments as in `max_pool2d`."""
    return max_pool(3, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def avg_pool1d(
    input: jax.Array,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> jax.Array:
    """Average pooling over one axis; arguments as in `avg_pool2d`."""
    return avg_pool(1, input, kernel_size, stride, padding, ceil_mode, count_include_pad)


def avg_pool2d(
    input: jax.Array,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> jax.Array:
    """Average pooling over two axes.

    Args:
        input: `(N, C, H, W)` or `(C, H, W)`, floating.
        kernel_size: the size of the windows. This and the next two arguments are an integer, or one for each axis.
        stride: the step of the windows; None or () stands for `kernel_size`.
        padding: the number of zeros on both sides of each axis, at most half of `kernel_size`.
        ceil_mode: True adds a last window that reaches beyond the end, if it starts in the input or in the padding
            before it.
        count_include_pad: True counts the zeros of the padding in the mean.
        divisor_override: the divisor of the sums, instead of the number of elements of a window.

    Returns:
        `(N, C, H', W')` or `(C, H', W')`.

    Raises:
        ValueError: if shapes do not fit, or a number is out of its range.
        TypeError: if the input is not floating.

    Source: torch.nn.functional.avg_pool2d.

    Example:
        >>> avg_pool2d(jnp.arange(16.0).reshape(1, 4, 4), 2)
        Array([[[ 2.5,  4.5],
                [10.5, 12.5]]], dtype=float32)
    """
    return avg_pool(2, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def avg_pool3d(
    input: jax.Array,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> jax.Array:
    """Average pooling over three axes; arguments as in `avg_pool2d`."""
    return avg_pool(3, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def lp_pool1d(
    input: jax.Array, norm_type: float, kernel_size: Size, stride: Size | None = None, ceil_mode: bool = False
) -> jax.Array:
    """Power-average pooling over one axis; arguments as in `lp_pool2d`."""
    return lp_pool(1, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool2d(
    input: jax.Array, norm_type: float, kernel_size: Size, stride: Size | None = None, ceil_mode: bool = False
) -> jax.Array:
    """Power-average pooling over two axes: (Σ x^p)^(1/p) of each window. Where the sum is 0, its gradient is 0.

    Args:
        input: `(N, C, H, W)` or `(C, H, W)`, floating.
        norm_type: p, not 0. Infinity takes the maximum of |x|, minus infinity the minimum.
        kernel_size: the size of the windows, an integer or one for each axis.
        stride: the step of the windows; None or () stands for `kernel_size`.
        ceil_mode: True adds a last window that reaches beyond the end.

    Raises:
        ValueError: if shapes do not fit, or a number is out of its range.
        TypeError: if the input is not floating.

    Source: torch.nn.functional.lp_pool2d. As in torch, x^p keeps its sign, so odd powers may cancel out.

    Example:
        >>> lp_pool2d(jnp.array([[[3.0, 4.0]]]), 2, (1, 2))
        Array([[[5.]]], dtype=float32)
    """
    return lp_pool(2, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool3d(
    input: jax.Array, norm_type: float, kernel_size: Size, stride: Size | None = None, ceil_mode: bool = False
) -> jax.Array:
    """Power-average pooling over three axes; arguments as in `lp_pool2d`."""
    return lp_pool(3, input, norm_type, kernel_size, stride, ceil_mode)
