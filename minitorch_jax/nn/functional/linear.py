"""Linear maps as functions."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from ...runtime.platforms import on_cpu
from .autocast import in_lower_type, in_widest_type
from .dtypes import of_one_dtype

_FEW = 32  # input features, if there are four times as many output features


@in_lower_type
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
    is_wide = weight.ndim == 2 and weight.shape[1] <= _FEW and weight.shape[0] >= 4 * weight.shape[1]
    # where there is a GPU, both forms would be traced, in a `cond` that hides the product from `jax.checkpoint`'s policies
    if is_wide and isinstance(weight, jax.core.Tracer) and jax.default_backend() == "cpu":
        return on_cpu(_product_of_few, product, input, weight, bias)
    return product(input, weight, bias)


def _product_of_few(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    """x W^T + b, whose weight gradient is computed as (in, out) and then transposed.

    As (out, in), it takes XLA on CPUs four times as long: 0.14 and 0.035 ms for 2,048 rows, 2 features and 64 (jaxlib 0.10.2,
    float32). The barrier keeps XLA from making the one the other.
    """
    return _plus(x @ lax.optimization_barrier(weight.T), bias)


def product(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """x W^T + b, for arrays of one dtype.

    As one operation, without a transpose: in a loop, XLA would transpose W at each step, or keep a transposed copy.
    """
    return _plus(lax.dot_general(x, weight, (((x.ndim - 1,), (weight.ndim - 1,)), ((), ()))), bias)


def _plus(out: jax.Array, bias: jax.Array | None) -> jax.Array:
    return out if bias is None else out + jnp.expand_dims(bias, tuple(range(out.ndim - bias.ndim)))


@in_widest_type
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
    return _plus(jnp.einsum("...i,oij,...j->...o", input1, weight, input2), bias)


def flatten(input: jax.Array, start_dim: int = 0, end_dim: int = -1) -> jax.Array:
    """The input with the axes `start_dim` to `end_dim` merged into one. `nn.Flatten` keeps the first axis, this does not.

    Args:
        input: an array of any shape. A scalar becomes a vector.
        start_dim: the first axis; 1 keeps the batch.
        end_dim: the last axis, included.

    Raises:
        ValueError: if the input does not have these axes, or `start_dim` comes after `end_dim`.

    Source: torch.flatten.

    Example:
        >>> flatten(jnp.zeros((2, 3, 4)), 1).shape
        (2, 12)
    """
    rank = max(input.ndim, 1)
    start, end = (d + rank if d < 0 else d for d in (start_dim, end_dim))
    if not (0 <= start <= end < rank):
        raise ValueError(
            f"flatten(start_dim={start_dim}, end_dim={end_dim}) cannot flatten an input of shape {tuple(input.shape)}: both"
            f" must be axes from {-rank} to {rank - 1}, and start_dim must not come after end_dim"
        )
    shape = input.shape or (1,)
    return input.reshape(*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])
