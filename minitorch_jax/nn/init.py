"""Initial distributions, as torch.nn.init defines them: functions of a key and a shape.

Fans follow torch: a weight is `(out, in, *kernel)`, its fan_in is `in` and its fan_out `out` times the kernel's size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

_GAINS = {
    "linear": 1.0,
    **{f"conv{transposed}{n}d": 1.0 for transposed in ("", "_transpose") for n in (1, 2, 3)},
    "sigmoid": 1.0,
    "tanh": 5.0 / 3.0,
    "relu": math.sqrt(2.0),
    "selu": 3.0 / 4.0,
}


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """The factor by which a nonlinearity wants its weights' standard deviation scaled (torch.nn.init.calculate_gain).

    Example:
        >>> calculate_gain("relu") ** 2
        2.0000000000000004
    """
    if nonlinearity == "leaky_relu":
        return math.sqrt(2.0 / (1 + (0.01 if param is None else param) ** 2))
    if nonlinearity not in _GAINS:
        raise ValueError(f"unknown nonlinearity {nonlinearity!r}; known are {', '.join([*_GAINS, 'leaky_relu'])}")
    return _GAINS[nonlinearity]


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight of this shape."""
    if len(shape) < 2:
        raise ValueError(f"fans need a weight of at least 2 dimensions; got shape {tuple(shape)}")
    kernel = math.prod(shape[2:])
    return shape[1] * kernel, shape[0] * kernel


def uniform(key: Any, shape: Sequence[int], a: float = 0.0, b: float = 1.0, dtype: Any = jnp.float32) -> jax.Array:
    """Numbers from U(a, b)."""
    return jax.random.uniform(key, tuple(shape), dtype, a, b)


def normal(key: Any, shape: Sequence[int], mean: float = 0.0, std: float = 1.0, dtype: Any = jnp.float32) -> jax.Array:
    """Numbers from N(mean, std²)."""
    return mean + std * jax.random.normal(key, tuple(shape), dtype)


def constant(shape: Sequence[int], val: float, dtype: Any = jnp.float32) -> jax.Array:
    """One number everywhere."""
    return jnp.full(tuple(shape), val, dtype)


def zeros(shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Zeros."""
    return constant(shape, 0.0, dtype)


def ones(shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Ones."""
    return constant(shape, 1.0, dtype)


def xavier_uniform(key: Any, shape: Sequence[int], gain: float = 1.0, dtype: Any = jnp.float32) -> jax.Array:
    """U(-a, a) with a = gain sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio, 2010)."""
    bound = gain * math.sqrt(6.0 / sum(fans(shape)))
    return uniform(key, shape, -bound, bound, dtype)


def xavier_normal(key: Any, shape: Sequence[int], gain: float = 1.0, dtype: Any = jnp.float32) -> jax.Array:
    """N(0, std²) with std = gain sqrt(2 / (fan_in + fan_out)) (Glorot and Bengio, 2010)."""
    return normal(key, shape, 0.0, gain * math.sqrt(2.0 / sum(fans(shape))), dtype)


def _kaiming_std(shape: Sequence[int], a: float, mode: str, nonlinearity: str) -> float:
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"mode must be 'fan_in' or 'fan_out'; got {mode!r}")
    return calculate_gain(nonlinearity, a) / math.sqrt(fans(shape)[mode == "fan_out"])


def kaiming_uniform(
    key: Any,
    shape: Sequence[int],
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    dtype: Any = jnp.float32,
) -> jax.Array:
    """U(-b, b) with b = gain sqrt(3 / fan) (He et al., 2015); `a` is the slope of a leaky ReLU.

    Example:
        >>> import jax
        >>> kaiming_uniform(jax.random.key(0), (8, 2)).shape
        (8, 2)
    """
    bound = math.sqrt(3.0) * _kaiming_std(shape, a, mode, nonlinearity)
    return uniform(key, shape, -bound, bound, dtype)


def kaiming_normal(
    key: Any,
    shape: Sequence[int],
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    dtype: Any = jnp.float32,
) -> jax.Array:
    """N(0, std²) with std = gain / sqrt(fan) (He et al., 2015)."""
    return normal(key, shape, 0.0, _kaiming_std(shape, a, mode, nonlinearity), dtype)
