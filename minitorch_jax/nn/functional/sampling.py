"""Sampling images at given coordinates, as functions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .autocast import in_widest_type
from .spatial import floating, wide


def affine_grid(theta: jax.Array, size: Sequence[int], align_corners: bool | None = None) -> jax.Array:
    """The coordinates to which affine maps take the pixels of an image, for `grid_sample`.

    Args:
        theta: the maps, `(N, 2, 3)`, or `(N, 3, 4)` for volumes.
        size: the shape of the image, `(N, C, H, W)` or `(N, C, D, H, W)`.
        align_corners: True if -1 and 1 are the centres of the corner pixels, False if they are the outer edges of the
            image. None stands for False.

    Returns:
        `(N, H, W, 2)` or `(N, D, H, W, 3)`. The last axis starts with x.

    Raises:
        ValueError: if shapes do not fit.
        TypeError: if `theta` is not floating.

    Source: torch.nn.functional.affine_grid; Jaderberg et al., "Spatial transformer networks", 2015.

    Example:
        >>> affine_grid(jnp.array([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]), (1, 1, 1, 2))
        Array([[[[-0.5,  0. ],
                 [ 0.5,  0. ]]]], dtype=float32)
    """
    floating(theta, "affine_grid")
    ndim = len(size) - 2
    if ndim not in (2, 3) or min(size) < 1:
        raise ValueError(f"affine_grid takes a size (N, C, H, W) or (N, C, D, H, W), positive; got {tuple(size)}")
    if theta.shape != (size[0], ndim, ndim + 1):
        raise ValueError(
            f"affine_grid takes a theta of shape {(size[0], ndim, ndim + 1)} for size {tuple(size)}; got"
            f" {tuple(theta.shape)}"
        )
    axes = [np.linspace(-1, 1, n) * (1 if align_corners else (n - 1) / n) if n > 1 else np.zeros(1) for n in size[2:]]
    places = np.stack([*np.meshgrid(*axes, indexing="ij")[::-1], np.ones(tuple(size[2:]))], -1)
    dtype = wide(theta.dtype)
    grid = jnp.tensordot(theta.astype(dtype), jnp.asarray(places, dtype), (2, ndim), precision="highest")
    return jnp.moveaxis(grid, 1, -1).astype(theta.dtype)


@in_widest_type
def grid_sample(
    input: jax.Array,
    grid: jax.Array,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> jax.Array:
    """Interpolates images at given coordinates.

    Args:
        input: `(N, C, H, W)` or `(N, C, D, H, W)`, floating.
        grid: the coordinates, `(N, H', W', 2)` or `(N, D', H', W', 3)`, from -1 to 1, starting with x. The dtype is
            that of `input`.
        mode: "bilinear" (for volumes too), "nearest" or, for images only, "bicubic".
        padding_mode: the values outside the image: "zeros", "border" (the nearest pixel) or "reflection".
        align_corners: True if -1 and 1 are the centres of the corner pixels, False if they are the outer edges of the
            image. None stands for False.

    Returns:
        `(N, C, H', W')` or `(N, C, D', H', W')`.

    Raises:
        ValueError: if shapes do not fit, or for an unknown mode.
        TypeError: if the input is not floating, or the grid has another dtype.

    Source: torch.nn.functional.grid_sample; Jaderberg et al., "Spatial transformer networks", 2015.

    Example:
        >>> image = jnp.array([[[[1.0, 2.0], [3.0, 4.0]]]])
        >>> grid_sample(image, jnp.zeros((1, 1, 1, 2)))
        Array([[[[2.5]]]], dtype=float32)
    """
    ndim = input.ndim - 2
    if mode not in ("bilinear", "nearest", "bicubic"):
        raise ValueError(f"mode must be 'bilinear', 'nearest' or 'bicubic'; got {mode!r}")
    if padding_mode not in ("zeros", "border", "reflection"):
        raise ValueError(f"padding_mode must be 'zeros', 'border' or 'reflection'; got {padding_mode!r}")
    if ndim not in (2, 3) or (mode == "bicubic" and ndim == 3):
        raise ValueError(
            f"grid_sample takes an input (N, C, H, W), or (N, C, D, H, W) except for 'bicubic'; got shape"
            f" {tuple(input.shape)} with mode={mode!r}"
        )
    if grid.ndim != input.ndim or grid.shape[0] != input.shape[0] or grid.shape[-1] != ndim:
        raise ValueError(
            f"grid_sample takes a grid of shape ({input.shape[0]}, {'..., ' * (ndim > 2)}H', W', {ndim}) here; got"
            f" {tuple(grid.shape)}"
        )
    if min(input.shape[2:]) < 1:
        raise ValueError(f"grid_sample takes images that are not empty; got shape {tuple(input.shape)}")
    floating(input, "grid_sample")
    if grid.dtype != input.dtype:
        raise TypeError(f"grid_sample takes a grid of the input's dtype {input.dtype}; got {grid.dtype}")
    return _sampled(input, grid, mode, padding_mode, bool(align_corners))


@partial(jax.jit, static_argnums=(2, 3, 4))
def _sampled(input: jax.Array, grid: jax.Array, mode: str, padding_mode: str, aligned: bool) -> jax.Array:
    dtype = wide(input.dtype)
    batch, channels, *shape = input.shape
    flat = input.reshape(batch, channels, math.prod(shape))
    wanted = grid.shape[1:-1]
    out: Any = 0.0
    axes = [
        _taps(grid[..., -1 - axis].astype(dtype).reshape(batch, math.prod(wanted)), n, mode, padding_mode, aligned)
        for axis, n in enumerate(shape)
    ]
    read = jax.vmap(lambda image, places: image[:, places])
    for corner in itertools.product(*axes):
        place: Any = 0
        weight: Any = 1.0
        for (index, share), n in zip(corner, shape, strict=True):
            place, weight = place * n + index, weight * share
        out = out + read(flat, place).astype(dtype) * weight[:, None]
    return out.astype(input.dtype).reshape(batch, channels, *wanted)


def _taps(places: jax.Array, n: int, mode: str, padding_mode: str, aligned: bool) -> list[tuple[jax.Array, jax.Array]]:
    """The indices on one axis that each coordinate is interpolated from, and their weights (0 outside the image)."""
    x = (places + 1) * ((n - 1) / 2) if aligned else ((places + 1) * n - 1) / 2

    def tap(index: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        if mode == "bicubic":
            index = _brought_inside(index, n, padding_mode, aligned)
        inside = (index >= 0) & (index <= n - 1)
        return jnp.where(inside, index, 0).astype(jnp.int32), jnp.where(inside, weight, 0)

    if mode != "bicubic":
        x = _brought_inside(x, n, padding_mode, aligned)
    if mode == "nearest":
        return [tap(jnp.round(x), jnp.ones_like(x))]
    first = jnp.floor(x)
    part = x - first
    if mode == "bilinear":
        return [tap(first, 1 - part), tap(first + 1, part)]
    return [tap(first + j, _cubic(jnp.abs(part - j), near=j in (0, 1))) for j in (-1, 0, 1, 2)]


def _cubic(x: jax.Array, near: bool) -> jax.Array:
    """Keys's cubic convolution with a = -0.75, for distances below 1 (`near`) or from 1 to 2."""
    return (1.25 * x - 2.25) * x * x + 1 if near else (((x - 5) * x + 8) * x - 4) * -0.75


def _brought_inside(x: jax.Array, n: int, padding_mode: str, aligned: bool) -> jax.Array:
    """Coordinates outside the image, moved inside by `padding_mode`."""
    if padding_mode == "zeros":
        return x
    if padding_mode == "reflection":
        low, span = (0.0, n - 1.0) if aligned else (-0.5, float(n))
        if span == 0:
            return jnp.zeros_like(x)
        away = jnp.abs(x - low)
        turns, rest = jnp.floor(away / span), jnp.fmod(away, span)
        x = jnp.where(jnp.fmod(turns, 2.0) == 0, rest + low, span + low - rest)
    return jnp.where(x > 0, jnp.where(x < n - 1, x, n - 1.0), 0.0)  # no gradient at the edge and outside, as in torch
