"""Shared by the functions on images: sizes as one integer or one for each axis, and inputs without a batch axis."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Size = int | Sequence[int]


def sizes(value: Any, ndim: int, name: str, low: int | None = None) -> tuple[int, ...]:
    """`value`, an integer or `ndim` of them, as `ndim` integers. Raises if one is below `low`."""
    given = tuple(value) if isinstance(value, tuple | list) else (value,)
    try:
        numbers = tuple(map(operator.index, given if len(given) != 1 else given * ndim))
    except TypeError:
        numbers = ()
    if len(numbers) != ndim:
        raise TypeError(f"{name} must be an integer or a tuple of {ndim}; got {value!r}")
    if low is not None and min(numbers) < low:
        raise ValueError(f"{name} must be at least {low}; got {value!r}")
    return numbers


def static(value: Any) -> Any:
    """A size as modules store it: a list becomes a tuple, which is hashable."""
    return tuple(value) if isinstance(value, list) else value


def step_of(stride: Any, kernel_size: Size) -> Any:
    """The step of windows. As in torch, it is `kernel_size` if `stride` is None or empty."""
    given = stride is not None and not (isinstance(stride, tuple | list) and not stride)
    return stride if given else kernel_size


def not_empty(input: jax.Array, name: str, ndim: int) -> None:
    """Raise if one of the last `ndim` axes has size 0. A batch of size 0 is allowed."""
    if 0 in input.shape[-ndim:]:
        raise ValueError(
            f"{name} takes an input that is not empty (only the batch may have size 0); got shape {tuple(input.shape)}"
        )


def over_batch(function: Callable[..., Any], input: jax.Array, ndim: int, name: str) -> Any:
    """`function(input)` for `(N, C, …)` or `(C, …)`, with `ndim` axes after C. For `(C, …)` the result has no batch axis."""
    if input.ndim not in (ndim + 1, ndim + 2):
        raise ValueError(
            f"{name} takes an input of {ndim + 1} or {ndim + 2} dimensions, (C, ...) or (N, C, ...); got shape"
            f" {tuple(input.shape)}"
        )
    if input.ndim == ndim + 2:
        return function(input)
    return jax.tree.map(lambda out: out[0], function(input[None]))


def floating(input: Any, name: str, what: str = "input") -> None:
    """Raise TypeError unless `input` is floating."""
    dtype = input.dtype if isinstance(input, jax.Array) else jnp.result_type(input)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} takes a floating {what}; got {dtype}. Convert it with `.astype(float)`.")


def wide(dtype: Any) -> Any:
    """The dtype for sums of many elements: float32 for half precision, else `dtype`."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype
