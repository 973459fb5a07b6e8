"""Softmax, log-softmax, softmin and Gumbel-softmax, as functions."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ...module import random
from ...module.parameter import is_narrow
from ...runtime.tracebacks import warn
from .autocast import in_float32
from .dtypes import wide
from .spatial import floating


def _prepared(input: jax.Array, dim: int | None, dtype: Any, name: str) -> tuple[jax.Array, int]:
    """The input, converted to `dtype`, and the axis. Without `dim`, torch's old rule selects it, with a warning."""
    if dim is None:
        dim = 0 if input.ndim in (0, 1, 3) else 1
        warn(f"{name} got no dim and uses dim={dim}, as torch does for {input.ndim} axes; pass dim={dim}")
    input = jnp.asarray(input, dtype)
    floating(input, name)
    return input, dim


def log_softmax_of(input: jax.Array, axis: int) -> jax.Array:
    """log(softmax(x)) along one axis, with sums in float32 or wider."""
    return _narrow_log_softmax(input, axis) if is_narrow(input) else jax.nn.log_softmax(input, axis=axis)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _narrow_log_softmax(input: jax.Array, axis: int) -> jax.Array:
    return jax.nn.log_softmax(wide(input), axis=axis).astype(input.dtype)


@_narrow_log_softmax.defjvp
def _narrow_log_softmax_jvp(axis: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """The derivative is computed from the result, so the backward pass keeps no float32 array."""
    (x,), (dx,) = primals, tangents
    out = _narrow_log_softmax(x, axis)
    mean = (jnp.exp(wide(out)) * wide(dx)).sum(axis, keepdims=True)
    return out, (wide(dx) - mean).astype(dx.dtype)


def _along(function: Any, input: jax.Array, dim: int) -> jax.Array:
    """`function` along an axis. A scalar counts as one element on axis 0, as in torch."""
    return function(input[None], axis=dim)[0] if input.ndim == 0 and dim in (0, -1) else function(input, axis=dim)


@in_float32
def softmax(input: jax.Array, dim: int | None = None, *, dtype: Any = None) -> jax.Array:
    """exp(x) / sum(exp(x)) along `dim`.

    Args:
        input: any shape, floating unless `dtype` is given.
        dim: the axis that sums to 1. Without it, torch's old rule selects the axis, with a warning.
        dtype: the input is converted to this dtype first.

    Raises:
        TypeError: if the input is not floating and `dtype` is None.

    Example:
        >>> softmax(jnp.zeros((1, 4)), dim=1)
        Array([[0.25, 0.25, 0.25, 0.25]], dtype=float32)
    """
    input, dim = _prepared(input, dim, dtype, "softmax")
    return _along(jax.nn.softmax, wide(input), dim).astype(input.dtype)


@in_float32
def softmin(input: jax.Array, dim: int | None = None, *, dtype: Any = None) -> jax.Array:
    """softmax(-x) along `dim`; see `softmax` for the arguments."""
    input, dim = _prepared(input, dim, dtype, "softmin")
    return _along(jax.nn.softmax, wide(-input), dim).astype(input.dtype)


@in_float32
def log_softmax(input: jax.Array, dim: int | None = None, *, dtype: Any = None) -> jax.Array:
    """log(softmax(x)) along `dim`, without overflow; see `softmax` for the arguments."""
    input, dim = _prepared(input, dim, dtype, "log_softmax")
    return _along(log_softmax_of, input, dim)


@in_float32
def gumbel_softmax(
    logits: jax.Array, tau: float = 1.0, hard: bool = False, eps: float = 1e-10, dim: int = -1, *, key: Any = None
) -> jax.Array:
    """A sample from the Gumbel-softmax distribution, softmax((x + g) / tau) with g from Gumbel(0, 1).

    Args:
        logits: log-probabilities up to a constant, any shape, floating.
        tau: the temperature.
        hard: True returns one-hot vectors with the gradient of the soft sample.
        eps: has no effect, as in torch.
        dim: the axis of the categories.
        key: a `jax.random` key. By default, the next key of the current stream (`mt.seed`, `mt.rng`).

    Source: torch.nn.functional.gumbel_softmax; Jang et al., 2016; Maddison et al., 2016.

    Example:
        >>> gumbel_softmax(jnp.zeros(3), hard=True, key=jax.random.key(0))
        Array([0., 1., 0.], dtype=float32)
    """
    if eps != 1e-10:
        warn(f"gumbel_softmax: `eps` has no effect and torch deprecates it; got eps={eps}. Leave it out.")
    if logits.ndim == 0 and dim in (0, -1):
        return gumbel_softmax(logits[None], tau, hard, dim=0, key=key)[0]
    noise = random.draw(
        lambda key, shape: jax.random.gumbel(key, shape, logits.dtype), random.next_key(key), logits.shape
    )
    soft = jax.nn.softmax((logits + noise) / tau, axis=dim)
    if not hard:
        return soft
    largest = jnp.argmax(soft, axis=dim)
    one_hot = jax.nn.one_hot(largest, logits.shape[dim], dtype=soft.dtype, axis=dim % logits.ndim)
    return one_hot + (soft - jax.lax.stop_gradient(soft))  # added in this order, the result is exactly one-hot
