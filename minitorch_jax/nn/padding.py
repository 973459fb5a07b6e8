"""Padding as layers."""

from __future__ import annotations

from typing import ClassVar

import jax

from ..module.module import Module
from ..nn import functional as F  # noqa: N812
from .functional.spatial import Size, sizes


class _Pad(Module):
    """Base of the layers that add elements around the last `_ndim` axes."""

    _ndim: ClassVar[int]
    _mode: ClassVar[str]

    def __init__(self, padding: Size) -> None:
        self.padding = sizes(padding, 2 * self._ndim, "padding")

    def forward(self, input: jax.Array) -> jax.Array:
        if self._mode != "constant" and input.ndim not in (self._ndim + 1, self._ndim + 2):
            raise ValueError(
                f"{type(self).__name__} takes an input of {self._ndim + 1} or {self._ndim + 2} dimensions; got shape"
                f" {tuple(input.shape)}"
            )
        return F.pad(input, self.padding, self._mode)

    def extra_repr(self) -> str:
        return f"{self.padding}"


class _ConstantPad(_Pad):
    _mode = "constant"

    def __init__(self, padding: Size, value: float) -> None:
        super().__init__(padding)
        self.value = value

    def forward(self, input: jax.Array) -> jax.Array:
        return F.pad(input, self.padding, "constant", self.value)

    def extra_repr(self) -> str:
        return f"padding={self.padding}, value={self.value}"


class ConstantPad1d(_ConstantPad):
    """`ConstantPad2d` for one axis: `padding` is an integer, or (left, right)."""

    _ndim = 1


class ConstantPad2d(_ConstantPad):
    """Adds elements of one value around the last two axes.

    Args:
        padding: the number of elements on each side: an integer, or (left, right, top, bottom). A negative number
            removes elements.
        value: the value.

    Raises:
        TypeError: if `padding` does not hold integers.
        ValueError: if an input does not fit.

    Source: torch.nn.ConstantPad2d.

    Example:
        >>> import jax.numpy as jnp
        >>> ConstantPad2d((1, 0, 0, 1), 7.0)(jnp.ones((1, 2)))
        Array([[7., 1., 1.],
               [7., 7., 7.]], dtype=float32)
    """

    _ndim = 2


class ConstantPad3d(_ConstantPad):
    """`ConstantPad2d` for three axes: `padding` is an integer, or (left, right, top, bottom, front, back)."""

    _ndim = 3


class _ZeroPad(_Pad):
    _mode = "constant"


class ZeroPad1d(_ZeroPad):
    """Adds zeros around the last axis: `padding` is an integer, or (left, right)."""

    _ndim = 1


class ZeroPad2d(_ZeroPad):
    """Adds zeros around the last two axes: `padding` is an integer, or (left, right, top, bottom)."""

    _ndim = 2


class ZeroPad3d(_ZeroPad):
    """Adds zeros around the last three axes: `padding` is an integer, or (left, right, top, bottom, front, back)."""

    _ndim = 3


class _ReflectionPad(_Pad):
    _mode = "reflect"


class ReflectionPad1d(_ReflectionPad):
    """Mirrors the last axis at its edge elements: `padding` is an integer, or (left, right).

    Shapes: input `(N, C, L)` or `(C, L)`.

    Example:
        >>> import jax.numpy as jnp
        >>> ReflectionPad1d(2)(jnp.array([[1, 2, 3]]))
        Array([[3, 2, 1, 2, 3, 2, 1]], dtype=int32)
    """

    _ndim = 1


class ReflectionPad2d(_ReflectionPad):
    """`ReflectionPad1d` for two axes: `padding` is an integer, or (left, right, top, bottom)."""

    _ndim = 2


class ReflectionPad3d(_ReflectionPad):
    """`ReflectionPad1d` for three axes: `padding` is an integer, or (left, right, top, bottom, front, back)."""

    _ndim = 3


class _ReplicationPad(_Pad):
    _mode = "replicate"


class ReplicationPad1d(_ReplicationPad):
    """Repeats the edge elements of the last axis: `padding` is an integer, or (left, right).

    Shapes: input `(N, C, L)` or `(C, L)`.

    Example:
        >>> import jax.numpy as jnp
        >>> ReplicationPad1d(2)(jnp.array([[1, 2, 3]]))
        Array([[1, 1, 1, 2, 3, 3, 3]], dtype=int32)
    """

    _ndim = 1


class ReplicationPad2d(_ReplicationPad):
    """`ReplicationPad1d` for two axes: `padding` is an integer, or (left, right, top, bottom)."""

    _ndim = 2


class ReplicationPad3d(_ReplicationPad):
    """`ReplicationPad1d` for three axes: `padding` is an integer, or (left, right, top, bottom, front, back)."""

    _ndim = 3


class _CircularPad(_Pad):
    _mode = "circular"


class CircularPad1d(_CircularPad):
    """Continues the last axis with its opposite end: `padding` is an integer, or (left, right).

    Shapes: input `(N, C, L)` or `(C, L)`.

    Example:
        >>> import jax.numpy as jnp
        >>> CircularPad1d(2)(jnp.array([[1, 2, 3]]))
        Array([[2, 3, 1, 2, 3, 1, 2]], dtype=int32)
    """

    _ndim = 1


class CircularPad2d(_CircularPad):
    """`CircularPad1d` for two axes: `padding` is an integer, or (left, right, top, bottom)."""

    _ndim = 2


class CircularPad3d(_CircularPad):
    """`CircularPad1d` for three axes: `padding` is an integer, or (left, right, top, bottom, front, back)."""

    _ndim = 3
