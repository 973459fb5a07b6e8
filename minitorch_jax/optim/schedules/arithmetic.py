"""What schedules compute with: shares of a way, half cosines, powers, and one of several values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def real(t: Any, xp: Any) -> Any:
    return t.astype(xp.result_type(float))


def done_and_left(t: Any, a: float, b: float, xp: Any) -> tuple[Any, Any]:
    """How much of the way from step `a` to step `b` is done at `t`, and how much is left.

    Both come from differences of integers: `1 - done` would have no correct digit near the end of many steps.
    """
    low, high = math.floor(a), math.ceil(b)
    done, left = real(t - low, xp), real(high - t, xp)
    if low != a or high != b:
        done, left = done - (a - low), left - (high - b)
    return done / float(b - a), left / float(b - a)


def half_cosine(done: Any, rest: Any, xp: Any) -> tuple[Any, Any]:
    """(1 - cos(π done)) / 2 and (1 + cos(π done)) / 2, without a difference of numbers that are nearly equal."""
    return xp.square(xp.sin(0.5 * math.pi * done)), xp.square(xp.sin(0.5 * math.pi * rest))


def power(gamma: float, k: Any, xp: Any) -> Any:
    """gamma^k. In float32 by a logarithm of full precision, for gamma itself, rounded, would be off by k roundings."""
    return np.power(gamma, k) if xp is np else xp.exp(real(k, xp) * math.log(gamma))


def piece(values: Sequence[Any], boundaries: Sequence[int], t: Any, xp: Any) -> Any:
    """The value whose turn it is; by comparisons with scalars, so that a program holds no table as a constant array."""
    value = values[0]
    for start, following in zip(boundaries, values[1:], strict=True):
        value = xp.where(t < start, value, following)
    return value
