"""A BatchNorm in evaluation, folded into the convolution or Linear before it."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from ...module import parametrized
from ...module.module import Module
from ...module.parameter import Parameter
from ...state.static_values import module_of, shown
from ..batchnorm import _BatchNorm
from ..conv import _Convolution
from ..linear import Linear
from .parametrize import remove_parametrizations

M = TypeVar("M", bound=Module)


def fuse_conv_bn_eval(conv: M, bn: Module, transpose: bool = False) -> M:
    """Return a new convolution that computes `bn(conv(x))`, for evaluation.

    Args:
        conv: a convolution in `eval()` mode. It is not changed.
        bn: a BatchNorm in `eval()` mode, with running statistics.
        transpose: True for a transposed convolution, which has one group.

    Raises:
        TypeError: if the layers are of other kinds.
        ValueError: if one is in training mode, has no statistics, or does not fit.

    Source: torch.nn.utils.fusion.fuse_conv_bn_eval.

    Example:
        >>> from minitorch_jax import nn
        >>> conv, bn = nn.Conv2d(3, 8, 3, bias=False).eval(), nn.BatchNorm2d(8).eval()
        >>> x = jnp.ones((2, 3, 5, 5))
        >>> bool(jnp.allclose(fuse_conv_bn_eval(conv, bn)(x), bn(conv(x)), atol=1e-6))
        True
    """
    name, conv, bn = "fuse_conv_bn_eval", module_of(conv), module_of(bn)
    _check(name, conv, _Convolution, "a convolution", bn)
    is_transposed = bool(getattr(type(conv), "_transposed", False))
    if bool(transpose) != is_transposed:
        raise ValueError(f"{name}: write transpose={is_transposed} for a {type(conv).__name__}")
    return _fused(conv, bn, fuse_conv_bn_weights, transpose)


def fuse_linear_bn_eval(linear: M, bn: Module) -> M:
    """Return a new Linear that computes `bn(linear(x))`, for evaluation. See `fuse_conv_bn_eval`.

    Raises:
        TypeError, ValueError: as `fuse_conv_bn_eval`.

    Source: torch.nn.utils.fusion.fuse_linear_bn_eval.

    Example:
        >>> from minitorch_jax import nn
        >>> linear, bn = nn.Linear(3, 4).eval(), nn.BatchNorm1d(4).eval()
        >>> bool(jnp.allclose(fuse_linear_bn_eval(linear, bn)(jnp.ones((2, 3))), bn(linear(jnp.ones((2, 3)))), atol=1e-6))
        True
    """
    linear, bn = module_of(linear), module_of(bn)
    _check("fuse_linear_bn_eval", linear, Linear, "a Linear", bn)
    return _fused(linear, bn, fuse_linear_bn_weights)


def fuse_conv_bn_weights(
    conv_w: jax.Array,
    conv_b: jax.Array | None,
    bn_rm: jax.Array,
    bn_rv: jax.Array,
    bn_eps: float,
    bn_w: jax.Array | None,
    bn_b: jax.Array | None,
    transpose: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Return the weight and the bias of a convolution with a BatchNorm folded in: w s, (b - mean) s + b_bn.

    Args:
        conv_w: the weight of the convolution.
        conv_b: its bias, `(out_channels,)`.
        bn_rm, bn_rv: running mean and variance, `(out_channels,)`. s = bn_w / sqrt(bn_rv + bn_eps).
        bn_eps: the BatchNorm's `eps`.
        bn_w, bn_b: its weight and bias.
        transpose: True for the weight of a transposed convolution, `(in_channels, out_channels, *)`.

    Raises:
        ValueError: if the sizes differ.

    Source: torch.nn.utils.fusion.fuse_conv_bn_weights. Differs from PyTorch: it returns arrays, not Parameters.
    """
    axis = 1 if transpose else 0
    if conv_w.shape[axis] != bn_rm.size:
        raise ValueError(
            f"fuse_conv_bn_weights: a weight of shape {tuple(conv_w.shape)} has {conv_w.shape[axis]} channels on axis {axis},"
            f" and the statistics are of {bn_rm.size}"
        )
    scale, bias = _scale_and_bias(conv_w, conv_b, bn_rm, bn_rv, bn_eps, bn_w, bn_b)
    shape = [-1 if i == axis else 1 for i in range(conv_w.ndim)]
    return (conv_w * scale.reshape(shape)).astype(conv_w.dtype), bias


def fuse_linear_bn_weights(
    linear_w: jax.Array,
    linear_b: jax.Array | None,
    bn_rm: jax.Array,
    bn_rv: jax.Array,
    bn_eps: float,
    bn_w: jax.Array | None,
    bn_b: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Return the weight and the bias of a Linear with a BatchNorm folded in. See `fuse_conv_bn_weights`.

    Raises:
        ValueError: if the sizes differ.

    Source: torch.nn.utils.fusion.fuse_linear_bn_weights. Differs from PyTorch: it returns arrays, not Parameters.
    """
    if bn_rm.size not in (1, linear_w.shape[0]):
        raise ValueError(
            f"fuse_linear_bn_weights: the Linear has {linear_w.shape[0]} features, and the statistics are of {bn_rm.size}"
        )
    scale, bias = _scale_and_bias(linear_w, linear_b, bn_rm, bn_rv, bn_eps, bn_w, bn_b)
    return (linear_w * scale[:, None]).astype(linear_w.dtype), jnp.broadcast_to(bias, linear_w.shape[:1])


def _scale_and_bias(
    w: jax.Array,
    b: jax.Array | None,
    mean: jax.Array,
    var: jax.Array,
    eps: float,
    bn_w: jax.Array | None,
    bn_b: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Return the factor of the weight, and the new bias."""
    scale = jax.lax.rsqrt(var + eps)
    scale = scale if bn_w is None else scale * bn_w
    bias = -mean * scale if b is None else (b - mean) * scale
    bias = bias if bn_b is None else bias + bn_b
    return scale, bias.astype(w.dtype if b is None else b.dtype)


def _check(name: str, layer: Any, kind: Any, what: str, bn: Any) -> None:
    if not isinstance(layer, kind) or not isinstance(bn, _BatchNorm):
        raise TypeError(f"{name} takes {what} and a BatchNorm; got {shown(layer)} and {shown(bn)}")
    if layer.training or bn.training:
        raise ValueError(f"{name} is for evaluation: call `eval()` on both layers first")
    if bn.running_mean is None:
        raise ValueError(f"{name}: {bn!r} keeps no running statistics")


def _fused(layer: Any, bn: Any, fuse: Any, *more: Any) -> Any:
    statistics = bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    weight, bias = fuse(layer.weight, layer.bias, *statistics, *more)
    fused = copy.deepcopy(layer)
    for name in parametrized.names(fused):  # the values below are new parameters, not what originals are computed from
        remove_parametrizations(fused, name)
    fused.weight = weight
    fused.bias = bias if layer.bias is not None else Parameter(bias)
    return fused
