"""Activations as functions."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp


def relu(input: jax.Array) -> jax.Array:
    """max(x, 0), elementwise; its derivative at 0 is 0.

    Example:
        >>> relu(jnp.array([-1.0, 2.0]))
        Array([0., 2.], dtype=float32)
    """
    return jax.nn.relu(input)


def tanh(input: jax.Array) -> jax.Array:
    """The hyperbolic tangent, elementwise."""
    return jnp.tanh(input)


def sigmoid(input: jax.Array) -> jax.Array:
    """1 / (1 + exp(-x)), elementwise."""
    return jax.nn.sigmoid(input)


def gelu(input: jax.Array, approximate: str = "none") -> jax.Array:
    """x Φ(x), elementwise (Hendrycks and Gimpel, 2016).

    Args:
        input: any shape.
        approximate: "none" for the error function, "tanh" for the approximation by a tanh.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh'; got {approximate!r}")
    return jax.nn.gelu(input, approximate=approximate == "tanh")


def _softmax_dim(input: jax.Array, dim: int | None, name: str) -> int:
    if dim is None:
        dim = 0 if input.ndim in (0, 1, 3) else 1
        warnings.warn(f"{name} without dim takes {dim} here, as torch does; pass dim={dim} to say so", stacklevel=3)
    return dim


def softmax(input: jax.Array, dim: int | None = None) -> jax.Array:
    """exp(x) / sum(exp(x)) along `dim`.

    Example:
        >>> softmax(jnp.zeros((1, 4)), dim=1)
        Array([[0.25, 0.25, 0.25, 0.25]], dtype=float32)
    """
    return jax.nn.softmax(input, axis=_softmax_dim(input, dim, "softmax"))


def log_softmax(input: jax.Array, dim: int | None = None) -> jax.Array:
    """log(softmax(x)) along `dim`, without overflow."""
    return jax.nn.log_softmax(input, axis=_softmax_dim(input, dim, "log_softmax"))
