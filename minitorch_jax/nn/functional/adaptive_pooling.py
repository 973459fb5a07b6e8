"""Adaptive pooling (to a given output size) and fractional pooling (random windows), as functions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...module import random
from .dtypes import of_one_dtype
from .pooling import avg_pool, max_pool
from .spatial import Size, floating, not_empty, over_batch, sizes, wide
from .windows import first_maxima

SomeSize = int | None | Sequence[int | None]


def _target(output_size: Any, shape: Sequence[int], name: str) -> tuple[int, ...]:
    """`output_size` as one integer for each axis. None stands for the input's size."""
    given = tuple(output_size) if isinstance(output_size, tuple | list) else (output_size,) * len(shape)
    given = given * len(shape) if len(given) == 1 else given
    if len(given) == len(shape):
        given = tuple(n if size is None else size for size, n in zip(given, shape, strict=True))
    target = sizes(given, len(shape), f"{name}: output_size", 1)
    if min(shape) < 1:
        raise ValueError(f"{name} takes an input that is not empty; got axes of {tuple(shape)}")
    return target


def _rows(size: int, count: int) -> np.ndarray:
    """The indices of `count` windows that cover an axis, (count, longest). Shorter windows repeat their last index."""
    starts = np.arange(count) * size // count
    ends = -(-(np.arange(1, count + 1) * size) // count)
    return np.minimum(starts[:, None] + np.arange((ends - starts).max()), ends[:, None] - 1)


def _divided(shape: Sequence[int], target: Sequence[int]) -> tuple[int, ...] | None:
    """The size of the windows if all have the same size, else None."""
    if any(n % t for n, t in zip(shape, target, strict=True)):
        return None
    return tuple(n // t for n, t in zip(shape, target, strict=True))


def adaptive_avg_pool(ndim: int, input: jax.Array, output_size: Any) -> jax.Array:
    """The means of `output_size` windows over `ndim` axes."""
    name = f"adaptive_avg_pool{ndim}d"
    floating(input, name)

    def batch(x: jax.Array) -> jax.Array:
        shape = x.shape[2:]
        target = _target(output_size, shape, name)
        if set(target) == {1}:
            return x.mean(tuple(range(2, x.ndim)), keepdims=True)
        kernel = _divided(shape, target)
        if kernel is not None and x.size:  # the windows of `pooling` need an image and channels
            return avg_pool(ndim, x, kernel, None, 0, False, True)
        sums: Any = x.astype(wide(x.dtype))
        for axis, (n, t) in enumerate(zip(shape, target, strict=True), 2):
            if n == t:
                continue
            rows = _rows(n, t)
            members = (rows[:, :, None] == np.arange(n)).any(1)
            means = jnp.asarray(members / members.sum(1, keepdims=True), sums.dtype)
            sums = jnp.moveaxis(jnp.tensordot(sums, means, (axis, 1), precision="highest"), -1, axis)
        return sums.astype(x.dtype)

    return over_batch(batch, input, ndim, name)


def adaptive_max_pool(ndim: int, input: jax.Array, output_size: Any, return_indices: bool) -> Any:
    """The maxima of `output_size` windows over `ndim` axes."""
    name = f"adaptive_max_pool{ndim}d"
    not_empty(input, name, input.ndim - 1)

    def batch(x: jax.Array) -> Any:
        shape = x.shape[2:]
        target = _target(output_size, shape, name)
        kernel = _divided(shape, target)
        if kernel is not None and x.size:  # the windows of `pooling` need an image and channels
            return max_pool(ndim, x, kernel, None, 0, 1, False, return_indices)
        found = _with_places(x, target)
        return found if return_indices else found[0]

    return over_batch(batch, input, ndim, name)


@partial(jax.jit, static_argnums=1)
def _with_places(x: jax.Array, target: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    rows = [_rows(n, t) for n, t in zip(x.shape[2:], target, strict=True)]
    return first_maxima(x, rows, ((0, 0),) * len(target))


def fractional_size(name: str, ndim: int, output_size: Any, output_ratio: Any) -> tuple[Any, Any]:
    """Check the two settings and return them. Exactly one of them is None."""
    if (output_size is None) == (output_ratio is None):
        raise ValueError(f"{name} takes either output_size or output_ratio; got {output_size!r} and {output_ratio!r}")
    if output_size is not None:
        return sizes(output_size, ndim, "output_size", 1), None
    ratios = tuple(output_ratio) if isinstance(output_ratio, tuple | list) else (output_ratio,) * ndim
    if len(ratios) != ndim or not all(0 < ratio < 1 for ratio in ratios):
        raise ValueError(f"output_ratio must be a number between 0 and 1, or {ndim} of them; got {output_ratio!r}")
    return None, ratios


def fractional_max_pool(
    ndim: int,
    input: jax.Array,
    kernel_size: Size,
    output_size: Any,
    output_ratio: Any,
    return_indices: bool,
    samples: Any,
    key: Any,
) -> Any:
    """The maxima of windows at random distances, over `ndim` axes."""
    name = f"fractional_max_pool{ndim}d"
    not_empty(input, name, input.ndim - 1)
    kernel = sizes(kernel_size, ndim, "kernel_size", 1)
    wanted, ratios = fractional_size(name, ndim, output_size, output_ratio)
    floating(input, name)

    def batch(x: jax.Array) -> Any:
        shape = x.shape[2:]
        target = wanted or tuple(int(n * ratio) for n, ratio in zip(shape, ratios, strict=True))
        if min(target) < 1 or any(t + k - 1 > n for t, k, n in zip(target, kernel, shape, strict=True)):
            raise ValueError(f"{name} cannot pool an input of axes {shape} to {target} with windows of {kernel}")
        expected = *x.shape[:2], ndim
        drawn = random.draw(jax.random.uniform, random.next_key(key), expected) if samples is None else samples
        of_one_dtype(name, input=input, _random_samples=samples)
        if (
            drawn.ndim != 3 or drawn.shape[0] < len(x) or drawn.shape[1:] != expected[1:]
        ):  # torch also ignores samples beyond the batch
            raise ValueError(f"{name} takes _random_samples of shape {expected} here; got {tuple(drawn.shape)}")
        found = _at_random(x, drawn[: len(x)], kernel, target)
        return found if return_indices else found[0]

    return over_batch(batch, input, ndim, name)


@partial(jax.jit, static_argnums=(2, 3))
def _at_random(
    x: jax.Array, samples: jax.Array, kernel: tuple[int, ...], target: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    ndim = len(kernel)
    order = (
        range(ndim) if ndim == 3 else reversed(range(ndim))
    )  # for two axes, torch's samples start with the last axis
    rows = [
        _spread(samples[..., i].astype(jnp.float32), n, k, t)
        for i, n, k, t in zip(order, x.shape[2:], kernel, target, strict=True)
    ]
    return first_maxima(x, rows, ((0, 0),) * ndim)


def _spread(sample: jax.Array, size: int, kernel: int, count: int) -> jax.Array:
    """The indices of windows, (N, C, count, kernel). Starts are about `step` apart; the last window ends the axis."""
    step = (size - kernel) / max(count - 1, 1)
    i = jnp.arange(count - 1, dtype=sample.dtype).reshape(1, 1, -1)
    sample = sample[..., None]
    starts = jnp.floor((i + sample) * step) - jnp.floor(sample * step)
    starts = jnp.pad(starts.astype(jnp.int32), [(0, 0), (0, 0), (0, 1)], constant_values=size - kernel)
    return starts[..., None] + jnp.arange(kernel, dtype=jnp.int32).reshape(1, 1, 1, -1)


def adaptive_avg_pool1d(input: jax.Array, output_size: SomeSize) -> jax.Array:
    """Average pooling over one axis to a given size; arguments as in `adaptive_avg_pool2d`."""
    return adaptive_avg_pool(1, input, output_size)


def adaptive_avg_pool2d(input: jax.Array, output_size: SomeSize) -> jax.Array:
    """Average pooling over two axes to a given size. Window i of n covers floor(i H / n) to ceil((i + 1) H / n) - 1.

    Args:
        input: `(N, C, H, W)` or `(C, H, W)`, floating.
        output_size: an integer, or one for each axis; None stands for the input's size.

    Raises:
        ValueError: if shapes do not fit, or a size is less than 1.
        TypeError: if a size is not an integer, or the input is not floating.

    Source: torch.nn.functional.adaptive_avg_pool2d.

    Example:
        >>> adaptive_avg_pool2d(jnp.arange(6.0).reshape(1, 2, 3), (1, 2))
        Array([[[2., 3.]]], dtype=float32)
    """
    return adaptive_avg_pool(2, input, output_size)


def adaptive_avg_pool3d(input: jax.Array, output_size: SomeSize) -> jax.Array:
    """Average pooling over three axes to a given size; arguments as in `adaptive_avg_pool2d`."""
    return adaptive_avg_pool(3, input, output_size)


def adaptive_max_pool1d(input: jax.Array, output_size: SomeSize, return_indices: bool = False) -> Any:
    """Max pooling over one axis to a given size; arguments as in `adaptive_max_pool2d`."""
    return adaptive_max_pool(1, input, output_size, return_indices)


def adaptive_max_pool2d(input: jax.Array, output_size: SomeSize, return_indices: bool = False) -> Any:
    """Max pooling over two axes to a given size, with the windows of `adaptive_avg_pool2d`.

    Args:
        input: `(N, C, H, W)` or `(C, H, W)`.
        output_size: an integer, or one for each axis; None stands for the input's size.
        return_indices: True also returns the indices of the maxima in the flattened H W, int32.

    Raises:
        ValueError: if shapes do not fit, or a size is less than 1.
        TypeError: if a size is not an integer.

    Source: torch.nn.functional.adaptive_max_pool2d.

    Example:
        >>> adaptive_max_pool2d(jnp.arange(6.0).reshape(1, 2, 3), (1, 2))
        Array([[[4., 5.]]], dtype=float32)
    """
    return adaptive_max_pool(2, input, output_size, return_indices)


def adaptive_max_pool3d(input: jax.Array, output_size: SomeSize, return_indices: bool = False) -> Any:
    """Max pooling over three axes to a given size; arguments as in `adaptive_max_pool2d`."""
    return adaptive_max_pool(3, input, output_size, return_indices)


def fractional_max_pool2d(
    input: jax.Array,
    kernel_size: Size,
    output_size: Size | None = None,
    output_ratio: float | Sequence[float] | None = None,
    return_indices: bool = False,
    _random_samples: Any = None,
    *,
    key: Any = None,
) -> Any:
    """Max pooling over two axes with windows at random distances, drawn for each image and channel.

    Args:
        input: `(N, C, H, W)` or `(C, H, W)`, floating.
        kernel_size: the size of the windows, an integer or one for each axis.
        output_size: the number of windows, an integer or one for each axis.
        output_ratio: the output size divided by the input size, between 0 and 1. Pass either this or `output_size`.
        return_indices: True also returns the indices of the maxima in the flattened H W, int32.
        key: a `jax.random` key. By default, the next key of the current stream (`mt.seed`, `mt.rng`).

    Raises:
        ValueError: if shapes do not fit, or a number is out of its range.
        TypeError: if a size is not an integer, or the input is not floating.

    Source: torch.nn.functional.fractional_max_pool2d; Graham, "Fractional max-pooling", 2014.

    Example:
        >>> fractional_max_pool2d(jnp.ones((1, 8, 8)), 2, output_size=5, key=jax.random.key(0)).shape
        (1, 5, 5)
    """
    return fractional_max_pool(2, input, kernel_size, output_size, output_ratio, return_indices, _random_samples, key)


def fractional_max_pool3d(
    input: jax.Array,
    kernel_size: Size,
    output_size: Size | None = None,
    output_ratio: float | Sequence[float] | None = None,
    return_indices: bool = False,
    _random_samples: Any = None,
    *,
    key: Any = None,
) -> Any:
    """Max pooling over three axes with windows at random distances; arguments as in `fractional_max_pool2d`."""
    return fractional_max_pool(3, input, kernel_size, output_size, output_ratio, return_indices, _random_samples, key)
