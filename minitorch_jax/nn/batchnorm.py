"""Normalisation layers that can keep running statistics: BatchNorm and InstanceNorm."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ..module.parameter import Buffer, counted
from ..module.parametrized import like
from ..nn import functional as F  # noqa: N812
from ..runtime.contexts import constants
from ..runtime.tracebacks import warn
from . import init
from .functional.batchnorm import batch_norm_by_input, instance_norm_by_input
from .functional.dtypes import check_parameters
from .normalization import Affine


class _RunningNorm(Affine):
    """Base of the layers that normalise channels and can keep running statistics."""

    running_mean: jax.Array | Any
    running_var: jax.Array | Any
    num_batches_tracked: jax.Array | Any
    _ranks: tuple[int, ...]

    def _set_up(
        self,
        num_features: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        dtype: Any,
        bias: bool,
    ) -> None:
        if num_features < 0:
            raise ValueError(f"{type(self).__name__} needs num_features >= 0; got {num_features}")
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self._declare((num_features,), affine, bias, dtype)
        if track_running_stats:
            self.running_mean = Buffer(init.zeros((num_features,), dtype))
            self.running_var = Buffer(init.ones((num_features,), dtype))
            self.num_batches_tracked = Buffer(jnp.zeros((), int))
        else:
            self.running_mean = self.running_var = self.num_batches_tracked = None

    def reset_running_stats(self) -> None:
        """Reset the running statistics: mean 0, variance 1, 0 batches."""
        if self.track_running_stats:
            self.running_mean = jnp.zeros_like(self.running_mean)
            self.running_var = jnp.ones_like(self.running_var)
            self.num_batches_tracked = jnp.zeros_like(self.num_batches_tracked)

    def _check(self, input: jax.Array, axis: int) -> None:
        arrays = {name: like(self, name) for name in ("weight", "bias", "running_mean", "running_var")}
        check_parameters(type(self).__name__, input, **arrays)
        if input.ndim not in self._ranks:
            raise ValueError(
                f"{type(self).__name__}: expected {' or '.join(f'{n}D' for n in self._ranks)} input (got {input.ndim}D"
                f" input, of shape {tuple(input.shape)})"
            )
        if input.shape[axis] == self.num_features:
            return
        message = (
            f"{self!r} takes inputs with num_features={self.num_features} channels on axis {axis}; got"
            f" {tuple(input.shape)}"
        )
        if self.affine or self.track_running_stats:
            raise ValueError(message)
        warn(f"{message}. Nothing in the layer has that size, so it continues, as in torch")

    def _update(self, mean: jax.Array, var: jax.Array, momentum: Any) -> None:
        """Move the running statistics towards the statistics of a batch."""
        self.running_mean = _moved(self.running_mean, mean, momentum)
        self.running_var = _moved(self.running_var, var, momentum)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine},"
            f" bias={self.bias is not None}, track_running_stats={self.track_running_stats}"
        )


def _moved(old: jax.Array, new: jax.Array, momentum: Any) -> jax.Array:
    new = jax.lax.stop_gradient(new)
    return ((1 - momentum) * old.astype(new.dtype) + momentum * new).astype(old.dtype)


class _BatchNorm(_RunningNorm):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        dtype: Any = jnp.float32,
        bias: bool = True,
    ) -> None:
        self._set_up(num_features, eps, momentum, affine, track_running_stats, dtype, bias)

    def forward(self, input: jax.Array) -> jax.Array:
        self._check(input, 1)
        with constants():
            return self._normalized(input)

    def _normalized(self, input: jax.Array) -> jax.Array:
        if not self.training and self.running_mean is not None:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        out, mean, var = batch_norm_by_input(input, self.weight, self.bias, self.eps)
        if self.training and self.track_running_stats:
            self.num_batches_tracked = count = counted(self.num_batches_tracked)
            if input.size:  # as in torch, an empty batch counts but does not change the statistics
                self._update(mean, var, 1 / count.astype(mean.dtype) if self.momentum is None else self.momentum)
        return out


class BatchNorm1d(_BatchNorm):
    """(x - mean) / sqrt(var + eps) * weight + bias, with a mean and a variance for each channel.

    In training, the mean and the variance are those of the batch over all axes but the channels, and the running
    statistics move towards them. In `eval()` mode, the layer uses the running statistics.

    Args:
        num_features: the number of channels, C.
        eps: added to the variance.
        momentum: the weight of a batch in the update, running = (1 - momentum) running + momentum new. None averages
            over all batches.
        affine: True adds a weight and a bias.
        track_running_stats: True keeps running statistics. Without them, `eval()` mode uses the batch's statistics.
        dtype: the dtype of the parameters and the running statistics, floating.
        bias: False leaves out the bias, with `affine`.

    Shapes: input and output `(N, C)` or `(N, C, L)`. `weight`, `bias`, `running_mean` and `running_var` are `(C,)`,
    initially ones, zeros, zeros and ones. `num_batches_tracked` is `()`. `running_var` follows the unbiased variance.

    Raises:
        ValueError: if an input does not fit, or if statistics are computed and each channel has only one element.

    Source: torch.nn.BatchNorm1d; Ioffe and Szegedy, "Batch normalization", 2015.

    Example:
        >>> norm = BatchNorm1d(1)
        >>> norm(jnp.array([[1.0], [3.0]]))
        Array([[-0.999995],
               [ 0.999995]], dtype=float32)
        >>> norm.running_mean, norm.eval()(jnp.array([[0.2]])).round(4)
        (Array([0.2], dtype=float32), Array([[0.]], dtype=float32))
    """

    _ranks = (2, 3)


class BatchNorm2d(_BatchNorm):
    """As BatchNorm1d, for images `(N, C, H, W)`."""

    _ranks = (4,)


class BatchNorm3d(_BatchNorm):
    """As BatchNorm1d, for volumes `(N, C, D, H, W)`."""

    _ranks = (5,)


class _InstanceNorm(_RunningNorm):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        *,
        dtype: Any = jnp.float32,
        bias: bool = True,
    ) -> None:
        self._set_up(num_features, eps, momentum, affine, track_running_stats, dtype, bias)

    def forward(self, input: jax.Array) -> jax.Array:
        axis = input.ndim - min(self._ranks)
        self._check(input, axis)
        out = self._normalize(input if axis else jnp.expand_dims(input, 0))
        return out if axis else out.squeeze(0)

    def _normalize(self, input: jax.Array) -> jax.Array:
        if not self.training and self.track_running_stats:
            running = self.running_mean, self.running_var
            return F.instance_norm(input, *running, self.weight, self.bias, False, eps=self.eps)
        out, mean, var = instance_norm_by_input(input, self.weight, self.bias, self.eps)
        if self.track_running_stats and self.momentum is not None and input.size:
            self._update(mean, var, self.momentum)
        return out


class InstanceNorm1d(_InstanceNorm):
    """(x - mean) / sqrt(var + eps) * weight + bias, with a mean and a variance for each channel of each sample.

    Args:
        num_features: the number of channels, C.
        eps: added to the variance.
        momentum: the weight of a batch in the update, running = (1 - momentum) running + momentum new. None makes no
            update.
        affine: True adds a weight and a bias.
        track_running_stats: True keeps running statistics in training and uses them in `eval()` mode.
        dtype: the dtype of the parameters and the running statistics, floating.
        bias: False leaves out the bias, with `affine`.

    Shapes: input and output `(C, L)` or `(N, C, L)`; parameters and statistics as in BatchNorm1d. As in torch,
    `num_batches_tracked` stays 0.

    Raises:
        ValueError: if an input does not fit, or if statistics are computed and each channel has only one element.

    Source: torch.nn.InstanceNorm1d; Ulyanov et al., "Instance normalization", 2016.

    Example:
        >>> InstanceNorm1d(2)(jnp.array([[1.0, 3.0], [0.0, 4.0]]))[0]
        Array([-0.999995,  0.999995], dtype=float32)
    """

    _ranks = (2, 3)


class InstanceNorm2d(_InstanceNorm):
    """As InstanceNorm1d, for images `(C, H, W)` or `(N, C, H, W)`."""

    _ranks = (3, 4)


class InstanceNorm3d(_InstanceNorm):
    """As InstanceNorm1d, for volumes `(C, D, H, W)` or `(N, C, D, H, W)`."""

    _ranks = (4, 5)
