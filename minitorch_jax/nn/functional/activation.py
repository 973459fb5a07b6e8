"""Activations as functions. They accept `inplace` as torch does, but it has no effect: arrays are immutable."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from ...module import random
from .autocast import in_float32, in_lower_type
from .dtypes import of_one_dtype, promoted_to_floats, wide
from .spatial import floating


def threshold(input: jax.Array, threshold: float, value: float, inplace: bool = False) -> jax.Array:
    """x where x > threshold, `value` elsewhere.

    Example:
        >>> threshold(jnp.array([0.5, 2.0]), 1.0, 7.0)
        Array([7., 2.], dtype=float32)
    """
    limit, other = (jnp.asarray(number).astype(jnp.result_type(input)) for number in (threshold, value))
    return jnp.where(input <= limit, other, input)


def relu(input: jax.Array, inplace: bool = False) -> jax.Array:
    """max(x, 0), elementwise; its derivative at 0 is 0.

    Example:
        >>> relu(jnp.array([-1.0, 2.0]))
        Array([0., 2.], dtype=float32)
    """
    return jax.nn.relu(input)


def hardtanh(input: jax.Array, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> jax.Array:
    """x clipped to [min_val, max_val]; its derivative at both ends is 0."""
    if min_val > max_val:
        raise ValueError(f"hardtanh needs min_val <= max_val; got {min_val} and {max_val}")
    dtype = jnp.result_type(input)
    if min_val < 0 and jnp.issubdtype(dtype, jnp.unsignedinteger):
        raise ValueError(f"hardtanh of {dtype} needs min_val >= 0; got {min_val}. Convert the input: `.astype(float)`.")
    low, high = (jnp.asarray(number).astype(dtype) for number in (min_val, max_val))
    return jnp.where(input <= low, low, jnp.where(input >= high, high, input))


def relu6(input: jax.Array, inplace: bool = False) -> jax.Array:
    """min(max(x, 0), 6), elementwise."""
    return hardtanh(input, 0.0, 6.0)


def leaky_relu(input: jax.Array, negative_slope: float = 0.01, inplace: bool = False) -> jax.Array:
    """x where x > 0, `negative_slope` x elsewhere."""
    floating(input, "leaky_relu")
    return jnp.where(input > 0, input, negative_slope * input)


def rrelu(
    input: jax.Array,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    inplace: bool = False,
    *,
    key: Any = None,
) -> jax.Array:
    """A leaky ReLU with a random slope for each element, drawn from U(lower, upper). If not `training`, their mean.

    Args:
        input: any shape, floating.
        lower: the smallest slope.
        upper: the largest slope.
        training: True draws the slopes; False uses (lower + upper) / 2.
        inplace: accepted as in torch; it has no effect.
        key: a `jax.random` key. By default, the next key of the current stream (`mt.seed`, `mt.rng`). No key is used if
            not `training`, or if lower == upper.

    Raises:
        ValueError: if lower > upper.

    Source: torch.nn.functional.rrelu; Xu et al., "Empirical evaluation of rectified activations in convolutional
    network", 2015.
    """
    if lower > upper:
        raise ValueError(f"rrelu needs lower <= upper; got {lower} and {upper}")
    if not training or lower == upper:
        return leaky_relu(input, (lower + upper) / 2)
    slopes = random.draw(
        lambda key, shape: jax.random.uniform(key, shape, input.dtype, lower, upper), random.next_key(key), input.shape
    )
    return jnp.where(input > 0, input, slopes * input)


@in_lower_type
def prelu(input: jax.Array, weight: jax.Array) -> jax.Array:
    """x where x > 0, w x elsewhere.

    Args:
        input: any shape; axis 1 holds the channels.
        weight: the slopes, `()`, `(1,)` or one for each channel.

    Raises:
        ValueError: if there are several slopes, and their number is not that of the channels.
        TypeError: if the dtypes differ, or are not floating.

    Example:
        >>> prelu(jnp.array([[-1.0, -1.0]]), jnp.array([0.5, 0.25]))
        Array([[-0.5 , -0.25]], dtype=float32)
    """
    input, weight = of_one_dtype("prelu", input=input, weight=weight)
    floating(input, "prelu")
    channels = input.shape[1] if input.ndim > 1 else 1
    if weight.ndim > 1 or weight.size not in (1, channels):
        raise ValueError(
            f"weight must have shape () or (1,), or ({channels},) for an input of shape {tuple(input.shape)}; got"
            f" {tuple(weight.shape)}"
        )
    shape = [weight.size if axis == 1 else 1 for axis in range(input.ndim)]
    return jnp.where(input > 0, input, weight.reshape(shape) * input)


def elu(input: jax.Array, alpha: float = 1.0, inplace: bool = False) -> jax.Array:
    """x where x > 0, alpha (exp(x) - 1) elsewhere (Clevert et al., 2015)."""
    floating(input, "elu")
    return jax.nn.elu(input, alpha)


def selu(input: jax.Array, inplace: bool = False) -> jax.Array:
    """scale elu(x, alpha), with the constants that keep mean 0 and variance 1 (Klambauer et al., 2017)."""
    floating(input, "selu")
    return jax.nn.selu(input)


def celu(input: jax.Array, alpha: float = 1.0, inplace: bool = False) -> jax.Array:
    """max(x, 0) + min(0, alpha (exp(x / alpha) - 1)) (Barron, 2017)."""
    if alpha == 0:
        raise ValueError("celu divides by alpha, which must not be 0; got alpha=0. Use relu for the limit.")
    floating(input, "celu")
    return jax.nn.celu(input, alpha)


def gelu(input: jax.Array, approximate: str = "none") -> jax.Array:
    """x Φ(x), elementwise (Hendrycks and Gimpel, 2016).

    Args:
        input: any shape.
        approximate: "none" for the error function, "tanh" for the approximation by a tanh.

    Raises:
        ValueError: for another `approximate`.
        TypeError: if the input is not floating. Most activations raise it.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh'; got {approximate!r}")
    input = jnp.asarray(input)
    floating(input, "gelu")
    x = wide(input)
    if approximate == "tanh":
        return jax.nn.gelu(x).astype(input.dtype)
    # By erf, as torch. By erfc, as in jax.nn.gelu, more digits of the results below -4 are right, at three times the time.
    return (x * (0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5))))).astype(input.dtype)


def silu(input: jax.Array, inplace: bool = False) -> jax.Array:
    """x sigmoid(x), elementwise; also called swish."""
    floating(input, "silu")
    return jax.nn.silu(input)


def mish(input: jax.Array, inplace: bool = False) -> jax.Array:
    """x tanh(softplus(x)), elementwise (Misra, 2019)."""
    floating(input, "mish")
    return jax.nn.mish(input)


def glu(input: jax.Array, dim: int = -1) -> jax.Array:
    """a sigmoid(b), where a and b are the halves of x along `dim` (Dauphin et al., 2016).

    Raises:
        ValueError: if the axis has an odd size.

    Example:
        >>> glu(jnp.array([3.0, 0.0]))
        Array([1.5], dtype=float32)
    """
    if input.shape[dim] % 2:
        raise ValueError(f"glu halves axis {dim}, whose size must be even; got an input of shape {tuple(input.shape)}")
    return jax.nn.glu(input, axis=dim)


def sigmoid(input: jax.Array) -> jax.Array:
    """1 / (1 + exp(-x)), elementwise."""
    return jax.nn.sigmoid(*promoted_to_floats(input))


def logsigmoid(input: jax.Array) -> jax.Array:
    """log(sigmoid(x)), elementwise, without overflow."""
    floating(input, "logsigmoid")
    return jax.nn.log_sigmoid(input)


def hardsigmoid(input: jax.Array, inplace: bool = False) -> jax.Array:
    """relu6(x + 3) / 6, elementwise."""
    floating(input, "hardsigmoid")
    return relu6(input + 3) / 6


def hardswish(input: jax.Array, inplace: bool = False) -> jax.Array:
    """x relu6(x + 3) / 6, elementwise (Howard et al., 2019)."""
    floating(input, "hardswish")
    return input * (relu6(input + 3) / 6)


def tanh(input: jax.Array) -> jax.Array:
    """The hyperbolic tangent, elementwise."""
    return jnp.tanh(input)


def tanhshrink(input: jax.Array) -> jax.Array:
    """x - tanh(x), elementwise."""
    (x,) = promoted_to_floats(input)
    return x - jnp.tanh(x)


def softsign(input: jax.Array) -> jax.Array:
    """x / (1 + |x|), elementwise."""
    return jax.nn.soft_sign(input)


@in_float32
def softplus(input: jax.Array, beta: float = 1.0, threshold: float = 20.0) -> jax.Array:
    """log(1 + exp(beta x)) / beta, elementwise; x itself where beta x > threshold."""
    floating(input, "softplus")
    scaled = beta * input
    return jnp.where(scaled > threshold, input, jax.nn.softplus(scaled) / beta)


def hardshrink(input: jax.Array, lambd: float = 0.5) -> jax.Array:
    """x where |x| > lambd, 0 elsewhere."""
    floating(input, "hardshrink")
    return jnp.where(abs(input) <= lambd, 0, input)


def softshrink(input: jax.Array, lambd: float = 0.5) -> jax.Array:
    """x moved towards 0 by `lambd`, and 0 where |x| <= lambd.

    Example:
        >>> softshrink(jnp.array([-2.0, 0.25, 2.0]))
        Array([-1.5,  0. ,  1.5], dtype=float32)
    """
    if lambd < 0:
        raise ValueError(f"softshrink needs lambd >= 0; got {lambd}")
    floating(input, "softshrink")
    return jnp.where(abs(input) <= lambd, 0, input - lambd * jnp.sign(input))
