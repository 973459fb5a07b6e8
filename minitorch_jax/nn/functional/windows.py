"""Windows over an image and their maxima. All kinds of pooling use them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .spatial import Size, sizes, step_of


class Windows(NamedTuple):
    """The positions of the windows of a pooling on an image. Each field has one entry for each axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]  # (before, after); with `ceil_mode`, `after` may exceed the requested padding
    counts: tuple[int, ...]

    def rows(self, axis: int) -> np.ndarray:
        """The indices of each window's elements on a padded axis, (count, kernel)."""
        starts = np.arange(self.counts[axis])[:, None] * self.stride[axis]
        return starts + np.arange(self.kernel[axis]) * self.dilation[axis]

    def steps(self, axis: int) -> int:
        """The smallest number of strides that covers all windows of an axis."""
        reach = self.dilation[axis] * (self.kernel[axis] - 1)
        return self.counts[axis] + reach // self.stride[axis]

    def padded(self, x: jax.Array, value: Any) -> jax.Array:
        """`(N, C, …)`, padded or cut to whole strides."""
        if not any(map(any, self.pads)) and all(self.steps(i) * s == x.shape[i + 2] for i, s in enumerate(self.stride)):
            return x
        sizes = (self.steps(i) * s for i, s in enumerate(self.stride))
        around = [
            (before, size - before - n, 0) for n, size, (before, _) in zip(x.shape[2:], sizes, self.pads, strict=True)
        ]
        return lax.pad(x, jnp.asarray(value, x.dtype), [(0, 0, 0), (0, 0, 0), *around])

    def members(self, x: jax.Array, axis: int) -> list[jax.Array]:
        """The first, second, … elements of the windows along an axis of a `padded` array."""
        stride, count = self.stride[axis], self.counts[axis]
        starts = [j * self.dilation[axis] for j in range(self.kernel[axis])]
        return [lax.slice_in_dim(x, start, start + (count - 1) * stride + 1, stride, axis + 2) for start in starts]

    def linear_members(self, x: jax.Array, axis: int) -> list[jax.Array]:
        """As `members`, for what is differentiated.

        The transpose of a slice with a stride is a pad with gaps, at which XLA on CPUs is slow. Here the array is first
        split by the stride, so that the transpose is a concatenation.
        """
        at, stride, count = axis + 2, self.stride[axis], self.counts[axis]
        if stride == 1:
            return self.members(x, axis)
        shape = (*x.shape[:at], self.steps(axis), stride, *x.shape[at + 1 :])
        parts = [lax.squeeze(part, [at + 1]) for part in lax.split(x.reshape(shape), [1] * stride, at + 1)]
        places = [divmod(j * self.dilation[axis], stride) for j in range(self.kernel[axis])]
        return [lax.slice_in_dim(parts[part], start, start + count, 1, at) for start, part in places]


def windows(
    name: str,
    shape: Sequence[int],
    kernel_size: Size,
    stride: Size | None,
    padding: Size,
    dilation: Size = 1,
    ceil_mode: bool = False,
) -> Windows:
    """The windows over axes of this shape, as torch places them."""
    ndim = len(shape)
    kernel = sizes(kernel_size, ndim, "kernel_size", 1)
    step = sizes(step_of(stride, kernel), ndim, "stride", 1)
    pads, apart = sizes(padding, ndim, "padding", 0), sizes(dilation, ndim, "dilation", 1)
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, apart, strict=True)]
    if any(p > r // 2 for p, r in zip(pads, reach, strict=True)):
        raise ValueError(f"{name}: padding may be at most half of the kernel; got padding={pads}, kernel_size={kernel}")
    counts, after = [], []
    for n, r, s, p in zip(shape, reach, step, pads, strict=True):
        count = (n + 2 * p - r + (s - 1 if ceil_mode else 0)) // s + 1
        count -= ceil_mode and (count - 1) * s >= n + p  # a window may not begin in the padding after the input
        counts.append(count)
        after.append(max((count - 1) * s + r - n - p, 0))
    if min(counts) < 1:
        raise ValueError(f"{name}: a window of {tuple(reach)} does not fit the padded input of shape {tuple(shape)}")
    return Windows(kernel, step, apart, tuple(zip(pads, after, strict=True)), tuple(counts))


def _pick(x: jax.Array, rows: Any, axis: int) -> jax.Array:
    """The elements at the indices `rows` of an axis: (count,), or (N, C, count) if each image has its own indices."""
    if isinstance(rows, jax.Array):
        shape = [rows.shape[2] if a == axis else 1 for a in range(2, x.ndim)]
        return jnp.take_along_axis(x, rows.reshape(*rows.shape[:2], *shape), axis, mode="promise_in_bounds")
    steps = np.diff(rows)
    if rows.size > 1 and (steps[0] < 1 or (steps != steps[0]).any()):
        return jnp.take(x, rows, axis, mode="clip")
    return lax.slice_in_dim(x, int(rows[0]), int(rows[-1]) + 1, int(steps[0]) if rows.size > 1 else 1, axis)


def first_maxima(input: jax.Array, rows: Sequence[Any], pads: Sequence[tuple[int, int]]) -> tuple[jax.Array, jax.Array]:
    """The maxima of the windows of `(N, C, …)`, and their `first_places`."""
    places = first_places(input, rows, pads)
    return at_places(input, places), places


def first_places(input: jax.Array, rows: Sequence[Any], pads: Sequence[tuple[int, int]]) -> jax.Array:
    """The indices of the maxima of the windows of `(N, C, …)` in the flattened image.

    The axes are reduced one after another, starting with the last. A k by k window then needs 2 k comparisons, not k^2.
    Of equal elements, the first one in row-major order wins.
    """
    shape, x = input.shape[2:], lax.stop_gradient(input)
    places = lax.iota(jnp.int32, math.prod(shape)).reshape(1, 1, *shape)
    places = jnp.broadcast_to(places, input.shape)
    if any(map(any, pads)):
        around = [(0, 0), (0, 0), *pads]
        x = jnp.pad(x, around, constant_values=lowest(x.dtype))
        places = jnp.pad(places, around, constant_values=-1)
    for i in reversed(range(len(shape))):
        best, at = (_pick(a, rows[i][..., 0], i + 2) for a in (x, places))
        for j in range(1, rows[i].shape[-1]):
            other, there = (_pick(a, rows[i][..., j], i + 2) for a in (x, places))
            better = (other > best) | (other != other) | (at < 0)  # NaN wins, as in torch; padding never does
            best, at = jnp.where(better, other, best), jnp.where(better, there, at)
        x, places = best, at
    return jnp.maximum(places, 0)


def separable_sums(input: jax.Array, frame: Windows) -> jax.Array:
    """The sums of the windows of `(N, C, …)`, one axis after another."""
    x = frame.padded(input, 0)
    for axis in reversed(range(len(frame.kernel))):
        first, *others = frame.linear_members(x, axis)
        x = sum(others, start=first)
    return x


def separable_maxima(input: jax.Array, frame: Windows) -> jax.Array:
    """The maxima of the windows of `(N, C, …)`, one axis after another. Ties and NaN are as in `first_places`.

    The gradient goes to one element of each window, as in torch. For it, only the places of the maxima within their
    windows are kept, a small integer for each axis.
    """
    return _maxima(input, frame) if jnp.issubdtype(input.dtype, jnp.floating) else _maxima_and_places(input, frame)[0]


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _maxima(input: jax.Array, frame: Windows) -> jax.Array:
    return _maxima_and_places(input, frame)[0]


def _maxima_and_places(input: jax.Array, frame: Windows) -> tuple[jax.Array, list[jax.Array]]:
    """The maxima, and their places within the windows along each axis, the last axis first."""
    x, found = frame.padded(input, lowest(input.dtype)), []
    for axis in reversed(range(len(frame.kernel))):
        best, *others = frame.members(x, axis)
        number = jnp.int8 if frame.kernel[axis] < 128 else jnp.int32
        places = jnp.zeros(best.shape, number)
        # in a window of nothing but -inf, the first element wins that is not in the padding
        first = (frame.rows(axis) >= frame.pads[axis][0]).argmax(1)
        for window in np.flatnonzero(first):
            places = jnp.where(
                lax.broadcasted_iota(jnp.int32, best.shape, axis + 2) == int(window), number(first[window]), places
            )
        for j, other in enumerate(others, 1):
            better = (other > best) | (other != other)  # NaN wins, as in torch
            best, places = jnp.where(better, other, best), jnp.where(better, number(j), places)
        x = best
        found.append(places)
    return x, found


@_maxima.defjvp
def _tangent(frame: Windows, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    out, found = _maxima_and_places(x, frame)
    dx = frame.padded(dx, 0)
    for axis, places in zip(reversed(range(len(frame.kernel))), found, strict=True):
        own = [jnp.where(places == j, part, 0) for j, part in enumerate(frame.linear_members(dx, axis))]
        dx = sum(own[1:], start=own[0])
    return out, dx


def at_places(input: jax.Array, places: jax.Array) -> jax.Array:
    """The elements of `(N, C, …)` at these indices of the flattened images."""
    flat, rows = (a.reshape(*a.shape[:2], math.prod(a.shape[2:])) for a in (input, places))
    return jnp.take_along_axis(flat, rows, 2, mode="promise_in_bounds").reshape(places.shape)


def lowest(dtype: Any) -> Any:
    """The lowest value of this dtype: -inf, or the smallest integer."""
    floats = jnp.issubdtype(dtype, jnp.floating)
    return np.asarray(-np.inf if floats else jnp.iinfo(dtype).min, dtype)
