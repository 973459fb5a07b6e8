"""Linear maps as functions."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .dtypes import of_one_dtype


def linear(input: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """x W^T + b.

    Args:
        input: `(*, in_features)`.
        weight: `(out_features, in_features)`, or `(in_features,)`.
        bias: `(out_features,)`, or `()`.

    Returns:
        `(*, out_features)`, or `(*)`.

    Raises:
        TypeError: if the dtypes differ, as in torch.

    Source: torch.nn.functional.linear.

    Example:
        >>> linear(jnp.ones((5, 3)), jnp.ones((2, 3))).shape
        (5, 2)
    """
    input, weight, bias = of_one_dtype("linear", input=input, weight=weight, bias=bias)
    out = input @ weight.T
    return out if bias is None else out + jnp.expand_dims(bias, tuple(range(out.ndim - bias.ndim)))


def bilinear(input1: jax.Array, input2: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """x1^T A x2 + b, with one matrix A for each output feature.

    Args:
        input1: `(*, in1_features)`.
        input2: `(*, in2_features)`.
        weight: `(out_features, in1_features, in2_features)`.
        bias: `(out_features,)`.

    Returns:
        `(*, out_features)`.

    Raises:
        TypeError: if the dtypes differ, as in torch.

    Source: torch.nn.functional.bilinear.

    Example:
        >>> bilinear(jnp.ones((5, 3)), jnp.ones((5, 2)), jnp.ones((4, 3, 2))).shape
        (5, 4)
    """
    input1, input2, weight, bias = of_one_dtype("bilinear", input1=input1, input2=input2, weight=weight, bias=bias)
    out = jnp.einsum("...i,oij,...j->...o", input1, weight, input2)
    return out if bias is None else out + jnp.expand_dims(bias, tuple(range(out.ndim - 1)))
