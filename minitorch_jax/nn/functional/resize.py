"""Resizing images, as a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .adaptive_pooling import adaptive_avg_pool
from .autocast import in_float32
from .spatial import floating, not_empty, sizes, wide

_DIMENSIONS = {"linear": (1,), "bilinear": (2,), "trilinear": (3,), "bicubic": (2,), "lanczos": (2,)}
_MODES = ("nearest", "nearest-exact", "area", *_DIMENSIONS)


def interpolate(
    input: jax.Array,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> jax.Array:
    """Resizes images.

    Args:
        input: `(N, C, L)`, `(N, C, H, W)` or `(N, C, D, H, W)`. Floating, except for the nearest modes.
        size: the new size, an integer or one for each axis. Pass either this or `scale_factor`.
        scale_factor: the factor from the old size to the new size, which is rounded down; a number or one for each axis.
        mode: "nearest" (with the rounding of old OpenCV), "nearest-exact", "area" (as `adaptive_avg_pool2d`), "linear"
            for one axis, "bilinear" and "bicubic" for two, "trilinear" for three, "lanczos" for two with `antialias`.
        align_corners: True keeps the centres of the corner pixels in place; False keeps the outer edges of the image.
            For the linear and cubic modes; None stands for False.
        recompute_scale_factor: True interpolates by the ratio of the rounded sizes, not by `scale_factor`.
        antialias: True widens the kernel when the image shrinks, for "bilinear", "bicubic" and "lanczos".

    Returns:
        `(N, C, *size)`.

    Raises:
        ValueError: if arguments exclude each other, or do not fit the input.
        TypeError: if the input is not floating and the mode needs it to be.

    Source: torch.nn.functional.interpolate.

    Example:
        >>> interpolate(jnp.array([[[0.0, 1.0]]]), size=4, mode="linear")
        Array([[[0.  , 0.25, 0.75, 1.  ]]], dtype=float32)
    """
    ndim = input.ndim - 2
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, _MODES))}; got {mode!r}")
    if ndim not in _DIMENSIONS.get(mode, (1, 2, 3)):
        raise ValueError(
            f"interpolate with mode={mode!r} takes an input with {_DIMENSIONS.get(mode, (1, 2, 3))} axes after N and C;"
            f" got shape {tuple(input.shape)}"
        )
    if align_corners is not None and mode not in _DIMENSIONS:
        raise ValueError(f"align_corners is for the linear and cubic modes; got mode={mode!r}")
    if antialias and mode not in ("bilinear", "bicubic", "lanczos"):
        raise ValueError(f"antialias is for the modes 'bilinear', 'bicubic' and 'lanczos'; got {mode!r}")
    if mode == "lanczos" and (align_corners or not antialias):
        raise ValueError(
            "mode='lanczos' needs antialias=True and takes no align_corners; got"
            f" antialias={antialias} and align_corners={align_corners}"
        )
    shape = input.shape[2:]
    target, factors = _target(shape, size, scale_factor, recompute_scale_factor)
    if min((*shape, *target)) < 1:
        raise ValueError(f"interpolate needs positive sizes; got {target} for an input of sizes {tuple(shape)}")
    if mode == "area":
        return adaptive_avg_pool(ndim, input, target)
    not_empty(input, f"interpolate with mode={mode!r}", ndim + 1)
    return _resampled(input, target, factors, mode, bool(align_corners), antialias)


@in_float32
def _resampled(
    input: jax.Array, target: Sequence[int], factors: Sequence[float | None], mode: str, align: bool, antialias: bool
) -> jax.Array:
    shape = input.shape[2:]
    if mode.startswith("nearest"):
        for axis, (n, m, factor) in enumerate(zip(shape, target, factors, strict=True), 2):
            input = _nearest(input, axis, n, m, factor, mode == "nearest-exact")
        return input
    floating(input, f"interpolate with mode={mode!r}")
    dtype = wide(input.dtype)
    operands: list[Any] = [input.astype(dtype), list(range(input.ndim))]
    result = list(range(input.ndim))
    for axis, (n, m, factor) in enumerate(zip(shape, target, factors, strict=True), 2):
        weights = _weights(n, m, factor, mode, align, antialias)
        if n != m or (weights != np.eye(n)).any():
            result[axis] = input.ndim + axis
            operands += [jnp.asarray(weights, dtype), [result[axis], axis]]
    if len(operands) == 2:
        return input
    return jnp.einsum(*operands, result, precision="highest").astype(input.dtype)


def _target(
    shape: Sequence[int], size: Any, scale_factor: Any, recompute: bool | None
) -> tuple[tuple[int, ...], tuple[float | None, ...]]:
    """The new size, and the factor to interpolate by for each axis. None stands for the ratio of the two sizes."""
    ndim = len(shape)
    if (size is None) == (scale_factor is None):
        raise ValueError(f"interpolate takes either size or scale_factor; got {size!r} and {scale_factor!r}")
    if size is not None:
        if recompute:
            raise ValueError("recompute_scale_factor needs scale_factor; got size. Leave recompute_scale_factor out.")
        return sizes(size, ndim, "size", 1), (None,) * ndim
    factors = tuple(scale_factor) if isinstance(scale_factor, tuple | list) else (scale_factor,) * ndim
    if len(factors) != ndim or not all(factor > 0 for factor in factors):
        raise ValueError(f"scale_factor must be a positive number, or {ndim} of them; got {scale_factor!r}")
    target = tuple(int(n * factor) for n, factor in zip(shape, factors, strict=True))
    return target, (None,) * ndim if recompute else factors


def _step(n: int, m: int, factor: float | None) -> np.float32:
    """The distance in the input between two neighbours of the result. In float32 as in torch, to round as torch does."""
    return np.float32(n) / np.float32(m) if factor is None else np.float32(1.0 / factor)


def _nearest(x: jax.Array, axis: int, n: int, m: int, factor: float | None, exact: bool) -> jax.Array:
    step = _step(n, m, factor)
    rows = np.floor((np.arange(m, dtype=np.float32) + np.float32(0.5 if exact else 0.0)) * step)
    rows = np.minimum(rows.astype(np.int64), n - 1)
    if m % n == 0 and (rows == np.repeat(np.arange(n), m // n)).all():
        return jnp.repeat(x, m // n, axis) if m != n else x
    return jnp.take(x, rows, axis, mode="clip")


def _weights(n: int, m: int, factor: float | None, mode: str, align: bool, antialias: bool) -> np.ndarray:
    """The weight of each of n input elements in each of m output elements, (m, n)."""
    if align:
        step, offset = np.float32((n - 1) / (m - 1) if m > 1 else 0.0), np.float32(0.0)
    else:
        step, offset = _step(n, m, factor), np.float32(0.5)
    if antialias:
        return _widened(n, m, float(step), mode)
    places = (np.arange(m, dtype=np.float32) + offset) * step - offset
    if mode == "bicubic":
        first, taps, kernel = np.floor(places), np.arange(-1, 3), _cubic(-0.75)
    else:
        places = np.clip(places, 0, n - 1)
        first, taps, kernel = np.floor(places), np.arange(2), _triangle
    part = np.clip(places - first, 0, 1).astype(np.float64)
    weights = np.zeros((m, n))
    for tap in taps:
        columns = np.clip(first + tap, 0, n - 1).astype(np.int64)
        np.add.at(weights, (np.arange(m), columns), kernel(part - tap))
    return weights


def _widened(n: int, m: int, step: float, mode: str) -> np.ndarray:
    """As `_weights`, with a kernel widened to the spacing of the output elements."""
    radius, kernel = {"bilinear": (1, _triangle), "bicubic": (2, _cubic(-0.5)), "lanczos": (3, _lanczos)}[mode]
    scale = max(step, 1.0)
    centres = step * (np.arange(m) + 0.5)
    low = np.maximum((centres - radius * scale + 0.5).astype(np.int64), 0)[:, None]
    high = np.minimum((centres + radius * scale + 0.5).astype(np.int64), n)[:, None]
    columns = np.arange(n)
    weights = kernel((columns - centres[:, None] + 0.5) / scale) * ((columns >= low) & (columns < high))
    total = weights.sum(1, keepdims=True)
    return weights / np.where(total == 0, 1, total)


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _cubic(a: float) -> Callable[[np.ndarray], np.ndarray]:
    """Keys's cubic convolution."""

    def kernel(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * a
        return np.where(x < 1, near, np.where(x < 2, far, 0.0))

    return kernel


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)
