"""batch_norm and instance_norm, which can use running statistics. normalization.py holds what they share."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ...runtime.platforms import on_cpu
from .dtypes import wide
from .normalization import check_channels, moments, scaled

# With channels last, whole steps took 0.80 to 0.87 of the time up to these sizes, and up to 1.5 above (CPU, jaxlib 0.10.2).
_FEW_CHANNELS = 64
_SMALL_IMAGE = 32 * 32
Normed = tuple[jax.Array, jax.Array, jax.Array]  # the result, the mean and the variance


def _per_channel(array: jax.Array | None, ndim: int) -> Any:
    """`(C,)` as `(1, C, 1, …)`."""
    return None if array is None else array.reshape(1, -1, *[1] * (ndim - 2))


def _refuse_update(name: str, running_mean: Any, running_var: Any) -> None:
    if running_mean is not None or running_var is not None:
        raise ValueError(
            f"{name} cannot update running_mean and running_var in place: arrays are immutable. Pass None for both to use"
            " the input's own statistics, and update the running ones yourself. Or use the layer, which does both."
        )


def _by_running(
    name: str, input: jax.Array, running_mean: Any, running_var: Any, weight: Any, bias: Any, eps: float
) -> jax.Array:
    """Normalise the input by running statistics."""
    if running_mean is None or running_var is None:
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(
            f"{name} needs running_mean and running_var unless the input's own statistics are used; {missing} is None"
        )
    input = jnp.asarray(input)
    check_channels(name, input, eps, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    x = wide(input)
    mean, var = (_per_channel(wide(array).astype(x.dtype), x.ndim) for array in (running_mean, running_var))
    return scaled(x, mean, var, _per_channel(weight, x.ndim), _per_channel(bias, x.ndim), eps, input.dtype)


def _by_input(
    name: str, input: jax.Array, weight: Any, bias: Any, eps: float, axes: tuple[int, ...], what: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalise the input by its own statistics along `axes`.

    Returns the result, the mean and the unbiased variance of each channel.
    """
    input = jnp.asarray(input)
    check_channels(name, input, eps, weight=weight, bias=bias)
    count = math.prod(input.shape[axis] for axis in axes)
    if count == 1:
        raise ValueError(f"Expected more than 1 {what} when training, got input size {list(input.shape)}")
    x = wide(input)
    weight, bias = _per_channel(weight, x.ndim), _per_channel(bias, x.ndim)
    plain = partial(_normed, axes=axes, eps=eps, dtype=input.dtype)
    if not count:  # the mean of no element is NaN, and would make the gradients of weight and bias NaN
        mean = var = jnp.zeros([1 if axis in axes else n for axis, n in enumerate(x.shape)], x.dtype)
        out = scaled(x, mean, var, weight, bias, eps, input.dtype)
    elif 0 in axes and x.shape[1] <= _FEW_CHANNELS and math.prod(x.shape[2:]) <= _SMALL_IMAGE:
        out, mean, var = on_cpu(partial(_with_channels_last, plain), plain, x, weight, bias)
    else:
        out, mean, var = plain(x, weight, bias)
    rest = tuple(axis for axis in range(x.ndim) if axis != 1)
    return out, mean.mean(rest), var.mean(rest) * (count / (count - 1))


def _normed(x: jax.Array, weight: Any, bias: Any, axes: tuple[int, ...], eps: float, dtype: Any) -> Normed:
    mean, var = moments(x, axes)
    return scaled(x, mean, var, weight, bias, eps, dtype), mean, var


def _with_channels_last(normed: Callable[..., Normed], x: jax.Array, weight: Any, bias: Any) -> Normed:
    """Normalise with the axis of channels last in memory, as the convolutions before and after it (`conv_forms.py`).

    XLA drops the transposes between them. Where the layer before is none of these, large images cost more than they save.
    """
    moved = [None if array is None else jnp.moveaxis(array, 1, -1) for array in (x, weight, bias)]
    out, mean, var = (jnp.moveaxis(array, -1, 1) for array in normed(*moved, axes=tuple(range(x.ndim - 1))))
    return out, mean, var


def batch_norm_by_input(input: jax.Array, weight: Any, bias: Any, eps: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """batch_norm in training. Returns the result, the mean and the unbiased variance of each channel."""
    if eps == 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    axes = (0, *range(2, input.ndim))
    return _by_input("batch_norm", input, weight, bias, eps, axes, "value per channel")


def instance_norm_by_input(
    input: jax.Array, weight: Any, bias: Any, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """instance_norm by the input's statistics. Returns the result and the statistics, averaged over the batch."""
    return _by_input("instance_norm", input, weight, bias, eps, tuple(range(2, input.ndim)), "spatial element")


def batch_norm(
    input: jax.Array,
    running_mean: jax.Array | None,
    running_var: jax.Array | None,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> jax.Array:
    """(x - mean) / sqrt(var + eps) * weight + bias, with a mean and a variance for each channel.

    Args:
        input: `(N, C, *)`, floating.
        running_mean: `(C,)`; None in training.
        running_var: `(C,)`; None in training.
        weight: `(C,)`.
        bias: `(C,)`.
        training: True normalises by the mean and the (biased) variance of the input, over all axes but the channels.
            False normalises by the running ones.
        momentum: accepted as in torch; it has no effect. The layers update the running statistics.
        eps: added to the variance.

    Raises:
        ValueError: if shapes do not fit. In training, also if running statistics are passed (arrays are immutable), or if
            a channel has only one element.
        TypeError: if the input is not floating.

    Source: torch.nn.functional.batch_norm; Ioffe and Szegedy, "Batch normalization", 2015. Differs from PyTorch:
    running statistics are not updated.

    Example:
        >>> batch_norm(jnp.array([[1.0], [3.0]]), None, None, training=True)
        Array([[-0.999995],
               [ 0.999995]], dtype=float32)
    """
    if not training:
        return _by_running("batch_norm", input, running_mean, running_var, weight, bias, eps)
    _refuse_update("batch_norm", running_mean, running_var)
    return batch_norm_by_input(input, weight, bias, eps)[0]


def instance_norm(
    input: jax.Array,
    running_mean: jax.Array | None = None,
    running_var: jax.Array | None = None,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> jax.Array:
    """(x - mean) / sqrt(var + eps) * weight + bias, with a mean and a variance for each channel of each sample.

    Args:
        input: `(N, C, *)`, floating.
        running_mean: `(C,)`; None with `use_input_stats`.
        running_var: `(C,)`; None with `use_input_stats`.
        weight: `(C,)`.
        bias: `(C,)`.
        use_input_stats: True normalises by the mean and the (biased) variance of the input, False by the running ones.
        momentum: accepted as in torch; it has no effect. The layers update the running statistics.
        eps: added to the variance.

    Raises:
        ValueError: if shapes do not fit. With `use_input_stats`, also if running statistics are passed (arrays are
            immutable), or if a channel has only one element.
        TypeError: if the input is not floating.

    Source: torch.nn.functional.instance_norm; Ulyanov et al., "Instance normalization", 2016. Differs from PyTorch:
    running statistics are not updated.

    Example:
        >>> instance_norm(jnp.array([[[1.0, 3.0], [0.0, 4.0]]]))[0, 0]
        Array([-0.999995,  0.999995], dtype=float32)
    """
    if not use_input_stats:
        return _by_running("instance_norm", input, running_mean, running_var, weight, bias, eps)
    _refuse_update("instance_norm", running_mean, running_var)
    return instance_norm_by_input(input, weight, bias, eps)[0]
