"""Linear, Identity, Flatten."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from ..module import Module
from ..parameter import fresh_parameter
from ..random import next_key
from . import init


class Linear(Module):
    """y = x W^T + b.

    Args:
        in_features: size of the input's last axis.
        out_features: size of the output's last axis.
        bias: whether to add b.
        dtype: of the parameters, floating.
        key: a `jax.random` key for the initial values; without it, the next of the global stream (`mt.seed`).

    Shapes: input `(*, in_features)`, output `(*, out_features)`; `weight` is `(out_features, in_features)`, `bias`
    `(out_features,)`, both from U(-k, k), k = 1 / sqrt(in_features).

    Raises:
        ValueError: if a size is negative, or an input's last axis is not `in_features`.

    Source: torch.nn.Linear.

    Example:
        >>> layer = Linear(3, 2, key=jax.random.key(0))
        >>> layer(jnp.ones((5, 3))).shape
        (5, 2)
    """

    weight: Any
    bias: Any

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, dtype: Any = jnp.float32, key: Any = None
    ) -> None:
        if in_features < 0 or out_features < 0:
            raise ValueError(f"Linear needs sizes >= 0; got in_features={in_features}, out_features={out_features}")
        self.in_features, self.out_features = in_features, out_features
        weight_key, bias_key = jax.random.split(next_key(key))
        bound = 1 / math.sqrt(in_features) if in_features else 0.0
        self.weight = fresh_parameter(init.uniform(weight_key, (out_features, in_features), -bound, bound, dtype))
        self.bias = fresh_parameter(init.uniform(bias_key, (out_features,), -bound, bound, dtype)) if bias else None

    def forward(self, input: jax.Array) -> jax.Array:
        if input.ndim == 0 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"Linear({self.in_features}, {self.out_features}) takes inputs of shape (..., {self.in_features});"
                f" got {tuple(input.shape)}"
            )
        out = input @ self.weight.T
        return out if self.bias is None else out + jnp.expand_dims(self.bias, tuple(range(out.ndim - 1)))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Identity(Module):
    """Gives its input; takes and ignores any arguments, as torch's does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def forward(self, input: jax.Array) -> jax.Array:
        return input


class Flatten(Module):
    """Makes axes `start_dim` to `end_dim` one.

    Args:
        start_dim: the first axis; 1 keeps the batch.
        end_dim: the last axis, itself included.

    Raises:
        ValueError: if an input has no such axes, or they are in the wrong order.

    Example:
        >>> Flatten()(jnp.zeros((2, 3, 4))).shape
        (2, 12)
    """

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        self.start_dim, self.end_dim = start_dim, end_dim

    def forward(self, input: jax.Array) -> jax.Array:
        rank = max(input.ndim, 1)
        start, end = (d + rank if d < 0 else d for d in (self.start_dim, self.end_dim))
        if not (0 <= start <= end < rank):
            raise ValueError(f"{self!r} cannot flatten an input of shape {tuple(input.shape)}")
        shape = input.shape or (1,)
        return input.reshape(*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])

    def extra_repr(self) -> str:
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}"
