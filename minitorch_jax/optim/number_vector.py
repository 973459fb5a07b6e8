"""How the hyperparameters of an optimizer and its groups lie in one vector of numbers, and how exact they are in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .declaration import as_flags

VectorLayout = tuple[tuple[str, int, int], ...]


def vector_layout(given: Mapping[str, Any]) -> VectorLayout:
    """(name, start, length; 0 for a number) of each in a part of the vector."""
    layout, start = [], 0
    for name, value in given.items():
        length = len(value) if isinstance(value, tuple) else 0
        layout.append((name, start, length))
        start += max(length, 1)
    return tuple(layout)


def own_layout(main: VectorLayout, rule: Any, own: dict[str, Any]) -> VectorLayout:
    """The layout of a group's part: the optimizer's, or that of the numbers of its own rule."""
    flags = () if rule is None else as_flags(rule, own)
    return main if rule is None else vector_layout({name: own[name] for name in own if name not in flags})


def width(layout: VectorLayout) -> int:
    """The length of a part of the vector."""
    return sum([max(length, 1) for _, _, length in layout])


def unknown(length: int) -> Any:
    """What stands for a setting of which the vector alone knows the number, or the numbers."""
    return (0.0,) * length if length else 0.0


def split(number: Any, dtype: Any) -> tuple[Any, Any]:
    """A number, or an array of them, in a dtype, and what it lost by that."""
    if isinstance(number, jax.core.Tracer):
        traced = number.astype(dtype)
        return traced, (number - traced.astype(number.dtype)).astype(dtype)
    exact = np.asarray(number, float)
    rounded = exact.astype(dtype)
    return rounded, (exact - rounded).astype(dtype)


@jax.jit
def merged(vector: Any, chosen: Any, new: Any) -> Any:
    return jnp.where(chosen, new, vector)


def numbers_at(vector: Any, places: Sequence[int]) -> tuple[Any, ...]:
    """Numbers of a vector as they were given: floats; tracers of a traced one, arrays (NumPy's) of a stacked one."""
    if isinstance(vector, jax.core.Tracer) or not isinstance(vector, jax.Array | np.ndarray):
        return tuple([vector[..., i] for i in places])
    array: Any = jax.device_get(vector)
    half = array.shape[-1] // 2
    if array.ndim > 1:
        return tuple([array[..., i].astype(float) + array[..., half + i] for i in places])
    return tuple([short(array[i], array[half + i]) for i in places])


def short(value: Any, rest: Any = 0.0) -> Any:
    """A concrete number as the shortest float that stands for it: 0.1, not 0.10000000149. `rest`: what it was rounded by."""
    if isinstance(value, jax.core.Tracer) or np.shape(value) != ():
        return value
    number = np.asarray(jax.device_get(value))[()]
    if not rest:
        return float(str(number))
    exact = float(number) + float(rest)
    shorter = (float(f"{exact:.{digits}g}") for digits in range(1, 17))
    return next((x for x in shorter if split(x, number.dtype) == (number, rest)), exact)


def complement(number: Any, rest: Any = 0.0) -> Any:
    """1 minus a number that was rounded by `rest`, exact where the number is nearly 1."""
    return (1 - number) - rest
