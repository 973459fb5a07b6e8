"""Dropout as functions."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from ...module import random
from ...runtime.tracebacks import warn

_SELU_SATURATION = 1.7580993408473766  # minus the limit of SELU at -inf


def probability(p: float) -> float:
    """`p` as a float. Raises ValueError unless it is in [0, 1]."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    return float(p)


def _drops(name: str, input: jax.Array, p: float, training: bool) -> bool:
    """True if anything may be dropped. Raises TypeError if so and the input is not floating."""
    if not training or p == 0.0:
        return False
    if not jnp.issubdtype(input.dtype, jnp.inexact):
        raise TypeError(f"{name} needs a floating input; got {input.dtype}. Convert it with `.astype(float)`.")
    return True


def _dropped(input: jax.Array, p: float, key: Any, channels: int | None = None) -> jax.Array:
    """The input with single elements set to 0. With `channels`, everything beyond the first `channels` axes is one unit."""
    if p == 1.0:
        return jnp.zeros_like(input)
    return jnp.where(_kept(input, p, key, channels), input / (1.0 - p), 0)


def _kept(input: jax.Array, p: float, key: Any, channels: int | None) -> jax.Array:
    shape = input.shape if channels is None else input.shape[:channels] + (1,) * (input.ndim - channels)
    keep = jnp.float32(1.0 - p)
    return random.draw(lambda key, shape: jax.random.bernoulli(key, keep, shape), random.next_key(key), shape)


def dropout(
    input: jax.Array, p: float = 0.5, training: bool = True, inplace: bool = False, *, key: Any = None
) -> jax.Array:
    """Sets each element to 0 with probability `p` and scales the others by 1 / (1 - p). Without `training`, no change.

    Args:
        input: any shape, floating; its dtype is kept.
        p: a number in [0, 1], static.
        training: True drops elements; False returns the input.
        inplace: accepted as in torch; it has no effect, since arrays are immutable.
        key: a `jax.random` key. By default, the next key of the current stream (`mt.seed`, `mt.rng`). No key is used if
            not `training`, at p = 0 and at p = 1.

    Raises:
        ValueError: if `p` is not in [0, 1].
        TypeError: if `p` is not a number, or if elements would be dropped from an input that is not floating.

    Source: torch.nn.functional.dropout. Differs from PyTorch: it takes `key`.

    Example:
        >>> dropout(jnp.ones(6), p=0.5, key=jax.random.key(0))
        Array([0., 0., 2., 2., 0., 2.], dtype=float32)
    """
    p = probability(p)
    return _dropped(input, p, key) if _drops("dropout", input, p, training) else input


def _channel_dropout(name: str, input: jax.Array, p: float, training: bool, key: Any, ndim: int) -> jax.Array:
    """Dropout of whole channels. The input is `(N, C, …)` or `(C, …)`, with `ndim` axes after C."""
    p = probability(p)
    if input.ndim not in (ndim + 1, ndim + 2):
        raise ValueError(
            f"{name}: expected {ndim + 1}D or {ndim + 2}D input, but received a {input.ndim}D input, of shape"
            f" {tuple(input.shape)}. Use dropout to drop single elements."
        )
    return _dropped(input, p, key, input.ndim - ndim) if _drops(name, input, p, training) else input


def dropout1d(
    input: jax.Array, p: float = 0.5, training: bool = True, inplace: bool = False, *, key: Any = None
) -> jax.Array:
    """Sets each channel to 0 with probability `p` and scales the others by 1 / (1 - p). Without `training`, no change.

    Args:
        input: `(N, C, L)` or `(C, L)`, floating.
        p, training, inplace, key: as in `dropout`.

    Raises:
        ValueError, TypeError: as `dropout`. ValueError also for an input with another number of axes.

    Source: torch.nn.functional.dropout1d.

    Example:
        >>> dropout1d(jnp.ones((3, 2)), key=jax.random.key(0))
        Array([[0., 0.],
               [0., 0.],
               [2., 2.]], dtype=float32)
    """
    return _channel_dropout("dropout1d", input, p, training, key, 1)


def dropout2d(
    input: jax.Array, p: float = 0.5, training: bool = True, inplace: bool = False, *, key: Any = None
) -> jax.Array:
    """As dropout1d, for an input `(N, C, H, W)`. Three axes mean `(N, C, L)`, with a warning, as in torch.

    Source: torch.nn.functional.dropout2d. Differs from PyTorch: other numbers of axes are an error; torch deprecates them.
    """
    if input.ndim == 3:
        warn(
            f"dropout2d takes an input of three axes as (N, C, L), as torch does, not as (C, H, W); got shape"
            f" {tuple(input.shape)}. Use dropout1d for (N, C, L), or add a batch axis for (C, H, W).",
        )
        return _channel_dropout("dropout2d", input, p, training, key, 1)
    return _channel_dropout("dropout2d", input, p, training, key, 2)


def dropout3d(
    input: jax.Array, p: float = 0.5, training: bool = True, inplace: bool = False, *, key: Any = None
) -> jax.Array:
    """As dropout1d, for an input `(N, C, D, H, W)` or `(C, D, H, W)`.

    Source: torch.nn.functional.dropout3d. Differs from PyTorch: other numbers of axes are an error; torch deprecates them.
    """
    return _channel_dropout("dropout3d", input, p, training, key, 3)


def alpha_dropout(
    input: jax.Array, p: float = 0.5, training: bool = False, inplace: bool = False, *, key: Any = None
) -> jax.Array:
    """Dropout that keeps mean 0 and variance 1. Dropped elements become SELU's limit at -inf; all are scaled and shifted.

    Args:
        input: any shape, floating.
        p, inplace, key: as in `dropout`.
        training: True drops elements. The default is False, as in torch, unlike in `dropout`.

    Raises:
        ValueError, TypeError: as `dropout`.

    Source: torch.nn.functional.alpha_dropout; Klambauer et al., "Self-normalizing neural networks", 2017.

    Example:
        >>> alpha_dropout(jnp.zeros(3), p=0.5, training=True, key=jax.random.key(0))
        Array([-0.77919394, -0.77919394,  0.77919394], dtype=float32)
    """
    p = probability(p)
    return _alpha_dropped(input, p, key, None) if _drops("alpha_dropout", input, p, training) else input


def feature_alpha_dropout(
    input: jax.Array, p: float = 0.5, training: bool = False, inplace: bool = False, *, key: Any = None
) -> jax.Array:
    """alpha_dropout of whole channels, for an input `(N, C, *)`.

    Source: torch.nn.functional.feature_alpha_dropout.
    """
    p = probability(p)
    if not _drops("feature_alpha_dropout", input, p, training):
        return input
    if input.ndim < 2:
        raise ValueError(f"feature_alpha_dropout needs an input of shape (N, C, *); got {tuple(input.shape)}")
    return _alpha_dropped(input, p, key, 2)


def _alpha_dropped(input: jax.Array, p: float, key: Any, channels: int | None) -> jax.Array:
    if p == 1.0:
        return jnp.zeros_like(input)
    scale = 1 / math.sqrt((_SELU_SATURATION**2 * p + 1) * (1 - p))
    shift = _SELU_SATURATION * scale * p
    return jnp.where(_kept(input, p, key, channels), scale * input + shift, shift - _SELU_SATURATION * scale)
