"""Dropout as functions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ... import random


def probability(p: float) -> float:
    """`p` as a float, or the error that says why it is no probability of dropout."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    return float(p)


def dropout(input: jax.Array, p: float = 0.5, training: bool = True, *, key: Any = None) -> jax.Array:
    """Zeroes each element with probability `p`, scales the others by 1 / (1 - p); the input itself if not `training`.

    Args:
        input: any shape, floating; its dtype is kept.
        p: a number in [0, 1], static.
        training: whether to drop anything.
        key: a `jax.random` key; without it, the next of the current stream (`mt.seed`, `mt.rng`). None is drawn if not
            `training`, at p = 0 and at p = 1.

    Raises:
        ValueError: if `p` is not in [0, 1].
        TypeError: if it is not a number, or something is to be dropped from an input that is not floating.

    Source: torch.nn.functional.dropout. Differs from PyTorch: takes `key`, and no `inplace`.

    Example:
        >>> dropout(jnp.ones(6), p=0.5, key=jax.random.key(0))
        Array([0., 0., 2., 2., 0., 2.], dtype=float32)
    """
    p = probability(p)
    if not training or p == 0.0:
        return input
    if not jnp.issubdtype(input.dtype, jnp.inexact):
        raise TypeError(f"dropout needs a floating input; got {input.dtype}. Convert it with `.astype(float)`.")
    if p == 1.0:
        return jnp.zeros_like(input)
    kept = jax.random.bernoulli(random.next_key(key), jnp.float32(1.0 - p), input.shape)
    return jnp.where(kept, input / (1.0 - p), 0)
