"""The directions of L-BFGS: functions of vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..runtime import contexts
from ..runtime.xla_faults import largest


def number_array(number: Any, dtype: Any) -> Any:
    """A number as an array, so that its type does not compile again."""
    with contexts.full_width([np.empty(0, dtype)]):
        return number if isinstance(number, jax.Array) else jax.device_put(np.asarray(number, dtype))


def numbers(results: Sequence[Any], first: int) -> list[Any]:
    """Results of a program, of which those from `first` on are numbers, as NumPy's scalars."""
    return [*results[:first], *(number[()] for number in jax.device_get([*results[first:]]))]


def dot(a: Any, b: Any) -> Any:
    return jnp.vdot(a, b, precision=jax.lax.Precision.HIGHEST)


def largest_of(a: Any) -> Any:
    return largest(jnp.abs(a), initial=0.0)


def _wide(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, computed where float64 stays float64 if it is given any."""

    @wraps(function)
    def call(*args: Any) -> Any:
        with contexts.full_width(jax.tree.leaves(args)):
            return function(*args)

    return call


@jax.jit
@_wide
def steepest(g: Any) -> Any:
    """The first direction, its slope, its largest element, and 1 / Σ|g|."""
    return -g, -dot(g, g), largest_of(g), 1 / jnp.sum(jnp.abs(g))


@partial(jax.jit, donate_argnums=0)
@_wide
def direction(memory: Sequence[Any], d: Any, t: Any, last_g: Any, g: Any) -> Any:
    """The history with another pair, the direction that follows from it (in two loops), its slope, its largest element."""
    dirs, stps, ro, diag, stored = memory
    size = len(ro)
    y, s = g - last_g, d * t
    ys, row = dot(y, s), stored % size
    keep = ys > 1e-10
    dirs = dirs.at[row].set(jnp.where(keep, y, dirs[row]))
    stps = stps.at[row].set(jnp.where(keep, s, stps[row]))
    ro = ro.at[row].set(jnp.where(keep, 1 / ys, ro[row]))
    diag = jnp.where(keep, ys / dot(y, y), diag)
    stored = stored + keep.astype(stored.dtype)
    count = jnp.minimum(stored, size)

    def back(k: Any, carry: Any) -> Any:
        q, al = carry
        i = (stored - 1 - k) % size
        a = dot(stps[i], q) * ro[i]
        return q - a * dirs[i], al.at[i].set(a)

    def forth(k: Any, carry: Any) -> Any:
        r, al = carry
        i = (stored - count + k) % size
        b = dot(dirs[i], r) * ro[i]
        return r + (al[i] - b) * stps[i], al

    q, al = jax.lax.fori_loop(0, count, back, (-g, jnp.zeros_like(ro)))
    d, _ = jax.lax.fori_loop(0, count, forth, (q * diag, al))
    return [dirs, stps, ro, diag, stored], d, dot(g, d), largest_of(d)
