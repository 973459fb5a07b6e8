"""What functions of images share: sizes given as one number or as one for each axis, and inputs without a batch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Size = int | Sequence[int]


def sizes(value: Any, ndim: int, name: str, low: int | None = None) -> tuple[int, ...]:
    """`value`, an integer or `ndim` of them, as `ndim` integers, none of them below `low`."""
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
    """A size as a module keeps it: a list could not be hashed."""
    return tuple(value) if isinstance(value, list) else value


def step_of(stride: Any, kernel_size: Size) -> Any:
    """How far windows move: without a stride, None or an empty one, by their own size, as in torch."""
    given = stride is not None and not (isinstance(stride, tuple | list) and not stride)
    return stride if given else kernel_size


def not_empty(input: jax.Array, name: str, ndim: int) -> None:
    """An error unless a batch of none is all that is missing from an input whose last `ndim` axes are no batch."""
    if 0 in input.shape[-ndim:]:
        raise ValueError(f"{name} takes an input that is not empty, or a batch of none; got shape {tuple(input.shape)}")


def over_batch(function: Callable[..., Any], input: jax.Array, ndim: int, name: str) -> Any:
    """`function(input)` for an input `(N, C, …)` of `ndim` axes more, or `(C, …)`, whose results have no batch either."""
    if input.ndim not in (ndim + 1, ndim + 2):
        raise ValueError(
            f"{name} takes an input of {ndim + 1} or {ndim + 2} dimensions, (C, ...) or (N, C, ...); got shape"
            f" {tuple(input.shape)}"
        )
    if input.ndim == ndim + 2:
        return function(input)
    return jax.tree.map(lambda out: out[0], function(input[None]))


def floating(input: Any, name: str, what: str = "input") -> None:
    """An error for an input of integers."""
    dtype = input.dtype if isinstance(input, jax.Array) else jnp.result_type(input)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} takes a floating {what}; got {dtype}. Convert it with `.astype(float)`.")


def wide(dtype: Any) -> Any:
    """The dtype to add many numbers in: float32 for those of half precision."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype
