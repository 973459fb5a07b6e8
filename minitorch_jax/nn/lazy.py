"""Lazy layers: without `in_features`, `in_channels` or `num_features`, which their first input shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ..module.lazy import Lazy
from .batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from .conv import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from .functional.spatial import Size
from .linear import Linear


class LazyLinear(Lazy, Linear):
    """A Linear whose `in_features` is the size of the last axis of its first input.

    The first call in eager code makes the parameters, and the layer is a `Linear` from then on: `type(layer) is nn.Linear`.
    So does the first call of a function that `mt.backward`, `mt.grad`, `mt.jit`, `mt.scan` or `model.compile()` compiles
    (it is run abstractly before), `mt.summary(model, x)`, and `load_state_dict`. If such a call raises, the layer is lazy
    again. Until then, whatever needs the parameters raises a `mt.UninitializedError` that names the layer: an optimizer,
    `state_dict`, a copy, a plain JAX transform.

    Initial values are those of a `Linear` that is made at that moment. In a model of several lazy layers, they are made in
    the order of their calls. In eager code, each layer is made in its call; if a later layer raises, those before it stay.

    Args:
        out_features: the size of the output's last axis.
        bias: True adds a bias.
        dtype: the dtype of the parameters, floating.
        key: a `jax.random` key for the initial values. By default, the next key of the global stream (`mt.seed`) when they
            are made.

    Raises:
        ValueError: if an argument is out of its range, or if the first input has no axis.

    Source: torch.nn.LazyLinear.

    Example:
        >>> model = LazyLinear(2, key=jax.random.key(0))
        >>> model
        LazyLinear(in_features=0, out_features=2, bias=True)
        >>> model(jnp.ones((5, 3))).shape
        (5, 2)
        >>> model
        Linear(in_features=3, out_features=2, bias=True)
    """

    _plain = Linear

    def __init__(self, out_features: int, bias: bool = True, *, dtype: Any = jnp.float32, key: Any = None) -> None:
        self._wait({"in_features": 0}, out_features=out_features, bias=bias, dtype=dtype, key=key)

    def _sizes(self, input: jax.Array) -> dict[str, int]:
        if input.ndim == 0:
            raise ValueError(f"{self!r} takes inputs of shape (..., in_features); got ()")
        return {"in_features": input.shape[-1]}

    def _sizes_of(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int] | None:
        weight = shapes.get("weight", ())
        return {"in_features": weight[1]} if len(weight) == 2 else None


class _LazyConvolution(Lazy):
    """Base of the lazy convolutions."""

    groups: int
    _ndim: ClassVar[int]
    _transposed: ClassVar[bool]

    def _sizes(self, input: jax.Array, *_: Any, **__: Any) -> dict[str, int]:
        if input.ndim not in (self._ndim + 1, self._ndim + 2):
            axes = ", ".join("DHW"[3 - self._ndim :] if self._ndim > 1 else "L")
            raise ValueError(
                f"{self!r} takes inputs of shape (N, in_channels, {axes}) or (in_channels, {axes}); got {tuple(input.shape)}"
            )
        return {"in_channels": input.shape[-self._ndim - 1]}

    def _sizes_of(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int] | None:
        weight = shapes.get("weight", ())
        if len(weight) != self._ndim + 2:
            return None
        return {"in_channels": weight[0] if self._transposed else weight[1] * self.groups}


class _LazyConv(_LazyConvolution):
    def __init__(
        self,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Any = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        dtype: Any = jnp.float32,
        key: Any = None,
    ) -> None:
        self._wait(
            {"in_channels": groups},
            out_channels=out_channels,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,
            dtype=dtype,
            key=key,
        )


class LazyConv1d(_LazyConv, Conv1d):
    """A Conv1d whose `in_channels` is that of its first input, `(N, C, L)` or `(C, L)`. See `LazyLinear`.

    Source: torch.nn.LazyConv1d.
    """

    _plain = Conv1d


class LazyConv2d(_LazyConv, Conv2d):
    """A Conv2d whose `in_channels` is that of its first input, `(N, C, H, W)` or `(C, H, W)`. See `LazyLinear`.

    The other arguments are those of `Conv2d`.

    Raises:
        ValueError: if an argument is out of its range, or if the first input has another rank, or channels that `groups`
            does not divide.

    Source: torch.nn.LazyConv2d.

    Example:
        >>> layer = LazyConv2d(8, 3, padding=1)
        >>> layer(jnp.ones((5, 3, 32, 32))).shape
        (5, 8, 32, 32)
        >>> layer
        Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """

    _plain = Conv2d


class LazyConv3d(_LazyConv, Conv3d):
    """A Conv3d whose `in_channels` is that of its first input, `(N, C, D, H, W)` or `(C, D, H, W)`. See `LazyLinear`.

    Source: torch.nn.LazyConv3d.
    """

    _plain = Conv3d


class _LazyConvTranspose(_LazyConvolution):
    def __init__(
        self,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        *,
        dtype: Any = jnp.float32,
        key: Any = None,
    ) -> None:
        self._wait(
            {"in_channels": groups},
            out_channels=out_channels,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            output_padding=output_padding,
            groups=groups,
            bias=bias,
            dilation=dilation,
            padding_mode=padding_mode,
            dtype=dtype,
            key=key,
        )


class LazyConvTranspose1d(_LazyConvTranspose, ConvTranspose1d):
    """A ConvTranspose1d whose `in_channels` is that of its first input, `(N, C, L)` or `(C, L)`. See `LazyLinear`.

    Source: torch.nn.LazyConvTranspose1d.
    """

    _plain = ConvTranspose1d


class LazyConvTranspose2d(_LazyConvTranspose, ConvTranspose2d):
    """A ConvTranspose2d whose `in_channels` is that of its first input, `(N, C, H, W)` or `(C, H, W)`. See `LazyLinear`.

    Source: torch.nn.LazyConvTranspose2d.
    """

    _plain = ConvTranspose2d


class LazyConvTranspose3d(_LazyConvTranspose, ConvTranspose3d):
    """A ConvTranspose3d whose `in_channels` is that of its first input, `(N, C, D, H, W)` or `(C, D, H, W)`.

    See `LazyLinear`.

    Source: torch.nn.LazyConvTranspose3d.
    """

    _plain = ConvTranspose3d


class _LazyNorm(Lazy):
    """Base of the lazy layers that normalise channels."""

    _ranks: Any  # the ranks that the plain layer takes
    _is_batched: ClassVar[bool] = True  # whether each input has a batch axis

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        dtype: Any = jnp.float32,
        bias: bool = True,
    ) -> None:
        self._wait(
            {"num_features": 0},
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            dtype=dtype,
            bias=bias,
        )

    def _sizes(self, input: jax.Array) -> dict[str, int]:
        if input.ndim not in self._ranks:
            raise ValueError(
                f"{type(self).__name__}: expected {' or '.join(f'{n}D' for n in self._ranks)} input (got {input.ndim}D"
                f" input, of shape {tuple(input.shape)})"
            )
        return {"num_features": input.shape[1 if self._is_batched else input.ndim - self._ranks[0]]}

    def _sizes_of(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int] | None:
        found = [shape for name, shape in shapes.items() if name != "num_batches_tracked" and len(shape) == 1]
        return {"num_features": found[0][0]} if found else None


class LazyBatchNorm1d(_LazyNorm, BatchNorm1d):
    """A BatchNorm1d whose `num_features` is the number of channels of its first input. See `LazyLinear`.

    The arguments are those of `BatchNorm1d`.

    Raises:
        ValueError: if the first input is not `(N, C)` or `(N, C, L)`.

    Source: torch.nn.LazyBatchNorm1d.

    Example:
        >>> layer = LazyBatchNorm1d()
        >>> layer(jnp.ones((5, 3))).shape
        (5, 3)
        >>> layer
        BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """

    _plain = BatchNorm1d


class LazyBatchNorm2d(_LazyNorm, BatchNorm2d):
    """As LazyBatchNorm1d, for images `(N, C, H, W)`.

    Source: torch.nn.LazyBatchNorm2d.
    """

    _plain = BatchNorm2d


class LazyBatchNorm3d(_LazyNorm, BatchNorm3d):
    """As LazyBatchNorm1d, for volumes `(N, C, D, H, W)`.

    Source: torch.nn.LazyBatchNorm3d.
    """

    _plain = BatchNorm3d


class LazyInstanceNorm1d(_LazyNorm, InstanceNorm1d):
    """An InstanceNorm1d whose `num_features` is the number of channels of its first input. See `LazyLinear`.

    The arguments are those of `InstanceNorm1d`, with torch's other defaults: `affine` and `track_running_stats` are True.

    Raises:
        ValueError: if the first input is not `(C, L)` or `(N, C, L)`.

    Source: torch.nn.LazyInstanceNorm1d. Differs from PyTorch: the first input may be without a batch, too.
    """

    _plain = InstanceNorm1d
    _is_batched = False


class LazyInstanceNorm2d(_LazyNorm, InstanceNorm2d):
    """As LazyInstanceNorm1d, for images `(C, H, W)` or `(N, C, H, W)`.

    Source: torch.nn.LazyInstanceNorm2d.
    """

    _plain = InstanceNorm2d
    _is_batched = False


class LazyInstanceNorm3d(_LazyNorm, InstanceNorm3d):
    """As LazyInstanceNorm1d, for volumes `(C, D, H, W)` or `(N, C, D, H, W)`.

    Source: torch.nn.LazyInstanceNorm3d.
    """

    _plain = InstanceNorm3d
    _is_batched = False
