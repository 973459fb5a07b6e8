"""Checks of numbers that a user gives: each returns the value as it is kept, or raises an error that states the range."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..state.static_values import shown

LARGEST = float(np.finfo(np.float32).max)
LAST = int(np.iinfo(np.int32).max)  # where counts of steps stay


def range_of(low: float, high: float = LARGEST, above: bool = False, below: bool = False) -> str:
    """A range in words: `>= 0`, `in [0, 1)`. The ends belong to it unless the number must be `above` or `below` them."""
    if high < LARGEST:
        return f"in {'(' if above else '['}{low:g}, {high:.8g}{')' if below else ']'}"
    return "" if low <= -LARGEST else f"{'>' if above else '>='} {low:g}"


def as_number(
    owner: str,
    name: str,
    value: Any,
    low: float = 0.0,
    high: float = LARGEST,
    *,
    above: bool = False,
    below: bool = False,
    what: str = "a finite number",
) -> float:
    """A float in [low, high]; without the end that it must be `above` or `below`.

    Raises:
        ValueError: for anything else, booleans and arrays with dimensions included.
    """
    try:
        number = math.nan if isinstance(value, bool | str) or np.shape(value) != () else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high or (above and number == low) or (below and number == high):
        raise ValueError(
            f"{owner}: {name} must be {f'{what} {range_of(low, high, above, below)}'.strip()}; got {shown(value)}"
        )
    return number


def as_count(owner: str, name: str, value: Any, low: int = 0) -> int:
    """An int in [low, 2**31 - 1], where counts of steps end.

    Raises:
        ValueError: for anything else, booleans and floats included.
    """
    try:
        number = low - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = low - 1
    if not low <= number <= LAST:
        raise ValueError(f"{owner}: {name} must be an integer in [{low}, {LAST}]; got {shown(value)}")
    return number


def as_one_of(owner: str, name: str, value: Any, choices: Sequence[Any]) -> Any:
    """One of some choices. Raises ValueError for anything else."""
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices):
        raise ValueError(f"{owner}: {name} must be {' or '.join(map(repr, choices))}; got {shown(value)}")
    return value


def as_tuple(owner: str, name: str, value: Any) -> tuple[Any, ...]:
    """The items of a list. Raises ValueError for anything that is none, strings included."""
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise ValueError(f"{owner}: {name} must be a list; got {shown(value)}")
    return tuple(value)
