"""Normalisation as functions. Half precision is computed in float32; the output has the input's dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ...module.parameter import wide_dtype
from ...runtime.platforms import on_cpu
from .autocast import in_float32
from .distance import norm
from .dtypes import check_parameters, wide
from .spatial import floating


def moments(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The mean and the biased variance along `axes`, which keep size 1.

    Var[x] = E[d²] - E[d]² with d = x - s holds for any constant s. With s close to the mean, nothing cancels. Since s is
    a constant, derivatives of any order need not pass through it.
    """
    s = jax.lax.stop_gradient(x.mean(axes, keepdims=True)) if x.size else 0.0
    d = x - s
    rest = d.mean(axes, keepdims=True)
    return s + rest, jnp.maximum((d * d).mean(axes, keepdims=True) - rest * rest, 0)


def scaled(x: jax.Array, mean: Any, var: jax.Array, weight: Any, bias: Any, eps: float, dtype: Any) -> jax.Array:
    """(x - mean) / sqrt(var + eps) * weight + bias, for arrays that broadcast; the result has dtype `dtype`."""
    scale = jax.lax.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight.astype(x.dtype)
    out = (x - mean) * scale
    return (out if bias is None else out + bias.astype(x.dtype)).astype(dtype)


def check_channels(name: str, input: jax.Array, eps: float, **arrays: jax.Array | None) -> None:
    """Raise unless `input` is floating with channels on axis 1, and each array has one element for each channel."""
    floating(input, name)
    if input.ndim < 2:
        raise ValueError(f"{name} needs an input of shape (N, C, ...); got {tuple(input.shape)}")
    if eps < 0:
        raise ValueError(f"{name} eps must be non-negative, but got {eps}")
    check_parameters(name, input, **arrays)
    channels = input.shape[1]
    for argument, array in arrays.items():
        if array is not None and array.shape != (channels,):
            raise ValueError(f"{name} needs a {argument} of shape ({channels},), one per channel; got {array.shape}")


@in_float32
def group_norm(
    input: jax.Array,
    num_groups: int,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    eps: float = 1e-5,
) -> jax.Array:
    """(x - mean) / sqrt(var + eps) * weight + bias. Each group of channels of a sample has its own mean and variance.

    Args:
        input: `(N, C, *)`, floating.
        num_groups: the number of groups of neighbouring channels; it divides C.
        weight: `(C,)`.
        bias: `(C,)`.
        eps: added to the (biased) variance.

    Raises:
        ValueError: if shapes do not fit.
        TypeError: if the input is not floating.

    Source: torch.nn.functional.group_norm; Wu and He, "Group normalization", 2018.

    Example:
        >>> group_norm(jnp.array([[1.0, 3.0, 0.0, 4.0]]), 2).round(4)
        Array([[-1.,  1., -1.,  1.]], dtype=float32)
    """
    input = jnp.asarray(input)
    check_channels("group_norm", input, eps, weight=weight, bias=bias)
    batch, channels, *sizes = input.shape
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the number of channels, {channels}; got {num_groups}")
    if input.size == num_groups:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(input.shape)}")
    groups = num_groups, channels // num_groups
    x = wide(input).reshape(batch, *groups, *sizes)
    mean, var = moments(x, tuple(range(2, x.ndim)))
    shape = (1, *groups, *[1] * len(sizes))
    weight, bias = (None if array is None else array.reshape(shape) for array in (weight, bias))
    return scaled(x, mean, var, weight, bias, eps, input.dtype).reshape(input.shape)


def _last_axes(name: str, input: jax.Array, normalized_shape: Sequence[int], **arrays: Any) -> tuple[int, ...]:
    """The numbers of the last axes, which `normalized_shape` describes. Raises if the shapes do not fit."""
    floating(input, name)
    if name == "layer_norm":  # rms_norm takes a weight of any dtype and returns the input's, as in torch
        check_parameters(name, input, **arrays)
    shape = tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"{name} with normalized_shape={list(shape)} needs an input whose last axes have these sizes, and at least"
            f" one size; got {tuple(input.shape)}"
        )
    for argument, array in arrays.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} needs a {argument} of the normalized_shape, {shape}; got {array.shape}")
    return tuple(range(input.ndim - len(shape), input.ndim))


def _with_axes(array: jax.Array | None, ndim: int) -> Any:
    """`array` with new leading axes, `ndim` axes in all."""
    return None if array is None else jnp.expand_dims(array, tuple(range(ndim - array.ndim)))


@in_float32
def layer_norm(
    input: jax.Array,
    normalized_shape: Sequence[int],
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    eps: float = 1e-5,
) -> jax.Array:
    """(x - mean) / sqrt(var + eps) * weight + bias, with the mean and the variance over the last axes.

    Args:
        input: `(*, *normalized_shape)`, floating.
        normalized_shape: the sizes of the last axes.
        weight: of shape `normalized_shape`.
        bias: of shape `normalized_shape`.
        eps: added to the (biased) variance.

    Raises:
        ValueError: if shapes do not fit.
        TypeError: if the input is not floating.

    Source: torch.nn.functional.layer_norm; Ba et al., "Layer normalization", 2016.

    Example:
        >>> layer_norm(jnp.array([1.0, 3.0]), (2,))
        Array([-0.999995,  0.999995], dtype=float32)
    """
    input = jnp.asarray(input)
    axes = _last_axes("layer_norm", input, normalized_shape, weight=weight, bias=bias)
    return _over_last_axes(input, weight, bias, axes, eps, True)


def _over_last_axes(
    input: jax.Array, weight: Any, bias: Any, axes: tuple[int, ...], eps: float, centred: bool
) -> jax.Array:
    """layer_norm, or rms_norm if it is not `centred`."""
    if not input.size:
        return _plain(input, weight, bias, axes, eps, centred)

    def by_rows(input: jax.Array, weight: Any, bias: Any) -> jax.Array:
        x = wide(input).reshape(-1, math.prod(input.shape[axis] for axis in axes))
        weight, bias = (None if array is None else array.astype(x.dtype).reshape(1, -1) for array in (weight, bias))
        return _rows_normed(eps, centred, x, weight, bias).reshape(input.shape).astype(input.dtype)

    plain = partial(_plain, axes=axes, eps=eps, centred=centred)
    return on_cpu(by_rows, plain, input, weight, bias)


def _plain(input: jax.Array, weight: Any, bias: Any, axes: tuple[int, ...], eps: float, centred: bool) -> jax.Array:
    x = wide(input)
    mean, var = _about(x, axes, centred)
    return scaled(x, mean, var, _with_axes(weight, x.ndim), _with_axes(bias, x.ndim), eps, input.dtype)


def _about(x: jax.Array, axes: tuple[int, ...], centred: bool) -> tuple[Any, jax.Array]:
    """What is subtracted, and the mean square of the rest."""
    return moments(x, axes) if centred else (0.0, (x * x).mean(axes, keepdims=True))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _rows_normed(eps: float, centred: bool, x: jax.Array, weight: Any, bias: Any) -> jax.Array:
    """The rows of `(N, D)`, normalised, times a weight `(1, D)`, plus a bias `(1, D)`."""
    mean, var = _about(x, (1,), centred)
    return _affine((x - mean) * jax.lax.rsqrt(var + eps), weight, bias)


def _affine(h: jax.Array, weight: Any, bias: Any) -> jax.Array:
    h = h if weight is None else h * weight
    return h if bias is None else h + bias


@partial(_rows_normed.defjvp, symbolic_zeros=True)
def _rows_normed_jvp(eps: float, centred: bool, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """A tangent whose transpose, the backward pass, sums by products: over each row with its weights, and over all rows.

    XLA on CPUs computes them many times faster than the sums of JAX's own derivative, and keeps fewer arrays.
    """
    (x, weight, bias), (dx, d_weight, d_bias) = primals, tangents
    mean, var = _about(x, (1,), centred)
    scale = jax.lax.rsqrt(var + eps)
    h = (x - mean) * scale
    tangent = jnp.zeros_like(x)
    if not isinstance(dx, SymbolicZero):
        row = jnp.ones_like(x[:1]) if weight is None else weight
        tangent = dx * scale * row - h * (_row_means(h * dx, scale) @ row)
        if centred:
            tangent = tangent - _row_means(dx, scale) @ row
    column = jnp.ones_like(x[:, :1])
    if not (d_weight is None or isinstance(d_weight, SymbolicZero)):
        tangent = tangent + h * (column @ d_weight)
    if not (d_bias is None or isinstance(d_bias, SymbolicZero)):
        tangent = tangent + column @ d_bias
    return _affine(h, weight, bias), tangent


def _row_means(d: jax.Array, scale: jax.Array) -> jax.Array:
    return d.sum(1, keepdims=True) * (scale / d.shape[1])


@in_float32
def rms_norm(
    input: jax.Array,
    normalized_shape: Sequence[int],
    weight: jax.Array | None = None,
    eps: float | None = None,
) -> jax.Array:
    """x / sqrt(mean(x²) + eps) * weight, with the mean over the last axes.

    Args:
        input: `(*, *normalized_shape)`, floating.
        normalized_shape: the sizes of the last axes.
        weight: of shape `normalized_shape`.
        eps: added to the mean. None stands for the machine epsilon of float32, or of float64 for an input of float64.

    Raises:
        ValueError: if shapes do not fit.
        TypeError: if the input is not floating.

    Source: torch.nn.functional.rms_norm; Zhang and Sennrich, "Root mean square layer normalization", 2019.

    Example:
        >>> rms_norm(jnp.array([3.0, 3.0]), (2,))
        Array([1., 1.], dtype=float32)
    """
    input = jnp.asarray(input)
    axes = _last_axes("rms_norm", input, normalized_shape, weight=weight)
    eps = float(jnp.finfo(wide_dtype(input.dtype)).eps) if eps is None else eps
    return _over_last_axes(input, weight, None, axes, eps, False)


@in_float32
def local_response_norm(
    input: jax.Array, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> jax.Array:
    """x / (k + alpha mean(x²))^beta, with the mean over `size` neighbouring channels (zeros beyond the ends).

    Args:
        input: `(N, C, L, *)`, floating.
        size: the number of channels in the mean. If it is even, one more channel comes from before than from after.
        alpha: multiplies the mean.
        beta: the exponent.
        k: added to the mean.

    Raises:
        ValueError: if the input has fewer than 3 axes, or `size` is not positive.
        TypeError: if the input is not floating.

    Source: torch.nn.functional.local_response_norm; Krizhevsky et al., "ImageNet classification with deep convolutional
    neural networks", 2012.

    Example:
        >>> local_response_norm(jnp.ones((1, 3, 1)), 3, alpha=3.0, beta=1.0).ravel()
        Array([0.33333334, 0.25      , 0.33333334], dtype=float32)
    """
    input = jnp.asarray(input)
    floating(input, "local_response_norm")
    if input.ndim < 3:
        raise ValueError(f"local_response_norm needs an input of 3 axes or more; got {tuple(input.shape)}")
    if size < 1:
        raise ValueError(f"local_response_norm needs a size > 0; got {size}")
    x = wide(input)
    window = [size if axis == 1 else 1 for axis in range(x.ndim)]
    padding = [(size // 2, (size - 1) // 2) if axis == 1 else (0, 0) for axis in range(x.ndim)]
    total = jax.lax.reduce_window(x * x, 0.0, jax.lax.add, window, [1] * x.ndim, padding)
    return (x * (k + alpha / size * total) ** -beta).astype(input.dtype)


@in_float32
def normalize(input: jax.Array, p: float = 2.0, dim: Any = 1, eps: float = 1e-12) -> jax.Array:
    """x / max(norm(x), eps), with the p-norm along `dim`.

    Args:
        input: any shape, floating.
        p: the exponent of the norm. 0 counts the nonzero elements; `math.inf` takes the largest absolute value, and
            `-math.inf` the smallest.
        dim: an axis, or several.
        eps: the smallest divisor.

    Raises:
        TypeError: if the input is not floating.
        ValueError: if the axis does not exist, or if p < 0 or p is infinite and the axis is empty.

    Source: torch.nn.functional.normalize. Differs from PyTorch: it has no `out`, since arrays are immutable.

    Example:
        >>> normalize(jnp.array([[3.0, 4.0]]))
        Array([[0.6, 0.8]], dtype=float32)
    """
    input = jnp.asarray(input)
    floating(input, "normalize")
    x = wide(input)
    return (x / jnp.maximum(norm(x, p, dim, keepdims=True), eps)).astype(input.dtype)
