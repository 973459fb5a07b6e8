"""Linear maps, and layers that only pass on or reshape their input."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from ..module.module import Module
from ..module.parameter import fresh_parameter
from ..module.random import next_key
from ..nn import functional as F  # noqa: N812
from . import init


class Linear(Module):
    """y = x W^T + b.

    Args:
        in_features: the size of the input's last axis.
        out_features: the size of the output's last axis.
        bias: True adds b.
        dtype: the dtype of the parameters, floating.
        key: a `jax.random` key for the initial values. By default, the next key of the global stream (`mt.seed`).

    Shapes: input `(*, in_features)`, output `(*, out_features)`. `weight` is `(out_features, in_features)`, `bias` is
    `(out_features,)`. Both are drawn from U(-k, k) with k = 1 / sqrt(in_features).

    Raises:
        ValueError: if a size is negative, or an input's last axis is not `in_features`.

    Source: torch.nn.Linear.

    Example:
        >>> layer = Linear(3, 2, key=jax.random.key(0))
        >>> layer(jnp.ones((5, 3))).shape
        (5, 2)
    """

    weight: jax.Array
    bias: jax.Array | Any  # None without a bias

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
        return F.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Bilinear(Module):
    """y = x1^T A x2 + b, with one matrix A for each output feature.

    Args:
        in1_features: the size of the first input's last axis.
        in2_features: the size of the second input's last axis.
        out_features: the size of the output's last axis.
        bias: True adds b.
        dtype: the dtype of the parameters, floating.
        key: a `jax.random` key for the initial values. By default, the next key of the global stream (`mt.seed`).

    Shapes: inputs `(*, in1_features)` and `(*, in2_features)`, output `(*, out_features)`. `weight` is `(out_features,
    in1_features, in2_features)`, `bias` is `(out_features,)`. Both are drawn from U(-k, k) with k = 1 / sqrt(in1_features).

    Raises:
        ValueError: if `in1_features` is not positive, another size is negative, or inputs do not fit.

    Source: torch.nn.Bilinear.

    Example:
        >>> layer = Bilinear(3, 4, 2, key=jax.random.key(0))
        >>> layer(jnp.ones((5, 3)), jnp.ones((5, 4))).shape
        (5, 2)
    """

    weight: jax.Array
    bias: jax.Array | Any

    def __init__(
        self,
        in1_features: int,
        in2_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: Any = jnp.float32,
        key: Any = None,
    ) -> None:
        if in1_features <= 0 or in2_features < 0 or out_features < 0:
            raise ValueError(
                "Bilinear needs in1_features > 0, in2_features >= 0 and out_features >= 0; got"
                f" {in1_features}, {in2_features}, {out_features}"
            )
        self.in1_features, self.in2_features, self.out_features = in1_features, in2_features, out_features
        weight_key, bias_key = jax.random.split(next_key(key))
        bound = 1 / math.sqrt(in1_features)
        shape = (out_features, in1_features, in2_features)
        self.weight = fresh_parameter(init.uniform(weight_key, shape, -bound, bound, dtype))
        self.bias = fresh_parameter(init.uniform(bias_key, (out_features,), -bound, bound, dtype)) if bias else None

    def forward(self, input1: jax.Array, input2: jax.Array) -> jax.Array:
        sizes = input1.shape[-1:], input2.shape[-1:]
        if sizes != ((self.in1_features,), (self.in2_features,)) or input1.shape[:-1] != input2.shape[:-1]:
            raise ValueError(
                f"{self!r} takes inputs of shapes (*, {self.in1_features}) and (*, {self.in2_features}) with the same *;"
                f" got {tuple(input1.shape)} and {tuple(input2.shape)}"
            )
        return F.bilinear(input1, input2, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in1_features={self.in1_features}, in2_features={self.in2_features}, out_features={self.out_features},"
            f" bias={self.bias is not None}"
        )


class Identity(Module):
    """Returns its input. The constructor accepts and ignores any arguments, as in torch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def forward(self, input: jax.Array) -> jax.Array:
        return input


class Flatten(Module):
    """Merges the axes `start_dim` to `end_dim` into one.

    Args:
        start_dim: the first axis; 1 keeps the batch.
        end_dim: the last axis, included.

    Raises:
        ValueError: if an input does not have these axes, or `start_dim` comes after `end_dim`.

    Example:
        >>> Flatten()(jnp.zeros((2, 3, 4))).shape
        (2, 12)
    """

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        self.start_dim, self.end_dim = start_dim, end_dim

    def forward(self, input: jax.Array) -> jax.Array:
        return F.flatten(input, self.start_dim, self.end_dim)

    def extra_repr(self) -> str:
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}"


class Unflatten(Module):
    """Splits one axis into several.

    Args:
        dim: the axis.
        unflattened_size: the sizes of the new axes. Their product is the size of the old axis; one of them may be -1.

    Raises:
        TypeError: if `unflattened_size` is not a tuple or list of integers.
        ValueError: if `unflattened_size` does not fit an input.

    Source: torch.nn.Unflatten. Differs from PyTorch: JAX's arrays have no named dimensions.

    Example:
        >>> Unflatten(1, (2, 3))(jnp.zeros((4, 6))).shape
        (4, 2, 3)
    """

    def __init__(self, dim: int, unflattened_size: Any) -> None:
        if not isinstance(dim, int):
            raise TypeError(f"Unflatten takes an integer dim; got {dim!r}")
        if not isinstance(unflattened_size, tuple | list) or not all(isinstance(n, int) for n in unflattened_size):
            raise TypeError(f"unflattened_size must be a tuple of ints; got {unflattened_size!r}")
        self.dim, self.unflattened_size = dim, tuple(unflattened_size)

    def forward(self, input: jax.Array) -> jax.Array:
        if not -input.ndim <= self.dim < input.ndim:
            raise ValueError(
                f"{self!r} cannot unflatten an input of shape {tuple(input.shape)}: it has no axis {self.dim}"
            )
        dim, sizes = self.dim % input.ndim, self.unflattened_size
        known = math.prod(n for n in sizes if n != -1)
        fits = input.shape[dim] % known == 0 if known and sizes.count(-1) == 1 else input.shape[dim] == known
        if not fits or sizes.count(-1) > 1 or min(sizes, default=0) < -1:
            raise ValueError(f"{self!r} cannot split an axis of size {input.shape[dim]} into axes of sizes {sizes}")
        sizes = tuple(
            [input.shape[dim] // known if n == -1 else n for n in sizes]
        )  # JAX cannot infer -1 for an empty array
        return input.reshape(*input.shape[:dim], *sizes, *input.shape[dim + 1 :])

    def extra_repr(self) -> str:
        return f"dim={self.dim}, unflattened_size={self.unflattened_size}"
