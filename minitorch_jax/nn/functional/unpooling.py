"""The partial inverse of max pooling, as functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from .spatial import Size, not_empty, over_batch, sizes


def max_unpool(
    ndim: int,
    input: jax.Array,
    indices: jax.Array,
    kernel_size: Size,
    stride: Size | None,
    padding: Size,
    output_size: Sequence[int] | None,
) -> jax.Array:
    """The partial inverse of max pooling over `ndim` axes."""
    name = f"max_unpool{ndim}d"
    kernel = sizes(kernel_size, ndim, "kernel_size", 1)
    step = kernel if stride is None else sizes(stride, ndim, "stride", 1)
    pads = sizes(padding, ndim, "padding", 0)
    not_empty(input, name, input.ndim - 1)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(
            f"{name} takes integer indices, as max_pool{ndim}d returns with return_indices=True; got {indices.dtype}"
        )
    if indices.shape != input.shape:
        raise ValueError(
            f"{name} takes indices of the input's shape; got {tuple(indices.shape)} for {tuple(input.shape)}"
        )

    def batch(x: jax.Array) -> jax.Array:
        shape = tuple((n - 1) * s + k - 2 * p for n, s, k, p in zip(x.shape[2:], step, kernel, pads, strict=True))
        if output_size is not None:
            given = tuple(output_size)[-ndim:]
            if len(output_size) not in (ndim, ndim + 2) or any(
                not n - s < g < n + s for n, s, g in zip(shape, step, given, strict=True)
            ):
                raise ValueError(
                    f"{name}: output_size must have {ndim} or {ndim + 2} integers, and its last {ndim} must differ from"
                    f" {shape} by less than the stride {step}; got {tuple(output_size)}"
                )
            shape = given
        if min(shape) < 0:
            raise ValueError(f"{name} has no output of shape {shape}; use less padding")
        size = math.prod(shape)
        places, flat = (a.reshape(*x.shape[:2], math.prod(x.shape[2:])) for a in (indices, x))
        inside = (places >= 0) & (places < size)
        flat = jnp.where(inside, flat, jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else flat
        out = jnp.zeros((*x.shape[:2], size), x.dtype)
        out = jnp.put_along_axis(out, places.clip(0, size - 1), flat, 2, inplace=False)
        return out.reshape(*x.shape[:2], *shape)

    return over_batch(batch, input, ndim, name)


def max_unpool1d(
    input: jax.Array,
    indices: jax.Array,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: Sequence[int] | None = None,
) -> jax.Array:
    """The partial inverse of max pooling over one axis; arguments as in `max_unpool2d`."""
    return max_unpool(1, input, indices, kernel_size, stride, padding, output_size)


def max_unpool2d(
    input: jax.Array,
    indices: jax.Array,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: Sequence[int] | None = None,
) -> jax.Array:
    """Puts the maxima of `max_pool2d` back at their indices, with zeros elsewhere.

    Args:
        input: the maxima, `(N, C, H, W)` or `(C, H, W)`.
        indices: the indices of the maxima, integers of the same shape.
        kernel_size: the `kernel_size` of the pooling.
        stride: the `stride` of the pooling; None stands for `kernel_size`.
        padding: the `padding` of the pooling.
        output_size: the size of the pooling's input: its last two axes, or its whole shape. Needed where the size H'
            below is not that of the pooling's input.

    Returns:
        `(N, C, H', W')` or `(C, H', W')`, with H' = (H - 1) stride - 2 padding + kernel, or `output_size`.

    Raises:
        ValueError: if shapes do not fit, or a number is out of its range.
        TypeError: if `indices` are not integers.

    Source: torch.nn.functional.max_unpool2d. Differs from PyTorch: an index out of range cannot raise in compiled code;
    it makes the element at the nearest index NaN. If overlapping windows share a maximum, one of them gets its gradient.

    Example:
        >>> max_unpool2d(jnp.array([[[7.0]]]), jnp.array([[[2]]]), 2)
        Array([[[0., 0.],
                [7., 0.]]], dtype=float32)
    """
    return max_unpool(2, input, indices, kernel_size, stride, padding, output_size)


def max_unpool3d(
    input: jax.Array,
    indices: jax.Array,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: Sequence[int] | None = None,
) -> jax.Array:
    """The partial inverse of max pooling over three axes; arguments as in `max_unpool2d`."""
    return max_unpool(3, input, indices, kernel_size, stride, padding, output_size)
