"""What is measured together, and the rows that compare two of its sides."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from . import timing
from .timing import Side, Times

Makers = Mapping[str, Callable[[], Side]]


class Effort(NamedTuple):
    """How long to measure."""

    rounds: int
    block: float  # about how many seconds a side runs in a round


@dataclass(frozen=True)
class Row:
    """Two sides of a comparison: the ratio ours / peer must be at most `aim`, if there is one."""

    ours: str
    peer: str
    aim: float | None = None
    per_array: int | None = None  # also tell the difference of the two, divided by this number of packed arrays


@dataclass(frozen=True)
class Comparison:
    """Sides that are measured together: `measure(names, effort)` gives the figures of those that are named."""

    key: str
    title: str
    rows: Sequence[Row]
    measure: Callable[[Sequence[str], Effort], Times]
    unit: str = "s"


def steady(makers: Makers, trains: bool = True) -> Callable[[Sequence[str], Effort], Times]:
    """Time per step when everything is compiled; `trains`: the steps change what they compute."""

    def measure(names: Sequence[str], effort: Effort) -> Times:
        sides = {name: make() for name, make in makers.items() if name in names}
        try:
            return timing.steady(sides, effort.rounds, effort.block, trains)
        finally:
            for side in sides.values():
                side.close()
            sides.clear()
            gc.collect()

    return measure


CPU = ", CPU"  # after a side's name: the processor's time


def rounds_of(rounds: int) -> int:
    """How many rounds those comparisons have that also tell the processor's time, which varies less."""
    return max(1, rounds // 3)


def costs(makers: Makers, tolerance: float = timing.TOLERANCE) -> Callable[[Sequence[str], Effort], Times]:
    """Time per call when everything is compiled, by the clock, and under another name the processor's."""

    def measure(names: Sequence[str], effort: Effort) -> Times:
        chosen = {name.removesuffix(CPU) for name in names}
        sides: dict[str, Side] = {}
        try:
            sides |= {name: make() for name, make in makers.items() if name in chosen}
            found = timing.costs(sides, rounds_of(effort.rounds), effort.block, False, fewest=1, tolerance=tolerance)
        finally:
            for side in sides.values():
                side.close()
            sides.clear()
            gc.collect()
        wall = {name: [cost.wall for cost in side] for name, side in found.items()}
        return wall | {f"{name}{CPU}": [cost.cpu for cost in side] for name, side in found.items()}

    return measure


def first_calls(makers: Makers) -> Callable[[Sequence[str], Effort], Times]:
    """Time of the first call."""

    def measure(names: Sequence[str], effort: Effort) -> Times:
        chosen = {name: make for name, make in makers.items() if name in names}
        return timing.first_calls(chosen, max(2, effort.rounds // 6))

    return measure
