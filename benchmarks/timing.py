"""Timing of several sides in one process, in turn, round by round; and the check that they compute the same."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

TOLERANCE = 1e-4  # by which the sides' results may differ after each of the first steps, relatively
STEPS_CHECKED = 3

Times = dict[str, list[float]]  # of each side, the seconds per step of each round


class Cost(NamedTuple):
    """Seconds by the clock, and of the processor: of all threads of the process that does the work."""

    wall: float
    cpu: float

    @classmethod
    def since(cls, start: Cost) -> Cost:
        now = cls.now()
        return cls(now.wall - start.wall, now.cpu - start.cpu)

    @classmethod
    def now(cls) -> Cost:
        return cls(time.perf_counter(), time.process_time())


class Side:
    """One way to do some work: `run(calls)` does it that often and gives what to wait for, its last call's result.

    `value(result)` is what is compared between the sides: the loss or, for an update alone, a parameter; the result
    itself unless it is given. With `steps` above 1, one call does that many steps, and gives an array of their losses.
    With `before`, each call is timed alone, and `before()` comes first, untimed.
    """

    def __init__(
        self,
        run: Callable[[int], Any],
        value: Callable[[Any], Any] = lambda result: result,
        steps: int = 1,
        before: Callable[[], Any] | None = None,
    ) -> None:
        self.run = run
        self.value = value
        self.steps = steps
        self.before = before

    def cost(self, calls: int, warm: int = 0) -> Cost:
        """The time of `calls` calls, after `warm` ones that are not counted; the last one is waited for."""
        if self.before is not None:
            alone = [self._alone(self.before) for _ in range(warm + calls)][warm:]
            return Cost(*map(sum, zip(*alone, strict=True)))
        if warm:
            jax.block_until_ready(self.run(warm))
        start = Cost.now()
        jax.block_until_ready(self.run(calls))
        return Cost.since(start)

    def _alone(self, before: Callable[[], Any]) -> Cost:
        before()
        start = Cost.now()
        jax.block_until_ready(self.run(1))
        return Cost.since(start)

    def seconds(self, calls: int, warm: int = 0) -> float:
        """The same by the clock alone."""
        return self.cost(calls, warm).wall

    def first(self) -> NDArray[Any]:
        """The values of the first steps."""
        if self.steps > 1:
            return np.array(self.value(self.run(1)))[:STEPS_CHECKED]
        found = []
        for _ in range(STEPS_CHECKED):
            if self.before is not None:
                self.before()
            found.append(_sample(self.value(self.run(1))))
        return np.array(found)

    def close(self) -> None:
        """Free what is held outside of this process."""


def flattened(tree: Any, calls: int) -> Any:
    """A pytree, flattened and put together again that often."""
    for _ in range(calls):
        leaves, structure = jax.tree.flatten(tree)
        tree = jax.tree.unflatten(structure, leaves)
    return tree


def _sample(value: Any) -> Any:
    """A copy of an array's first numbers; NumPy's view of a whole one would keep its buffer from being donated."""
    return np.array(value[:16] if np.ndim(value) else value)


def check_same(results: Mapping[str, NDArray[Any]], trains: bool = True, tolerance: float = TOLERANCE) -> None:
    """Raise unless all sides gave the same results in their first steps, and trained, if they are to."""
    (reference, expected), *_ = results.items()
    for name, result in results.items():
        if trains and not np.abs(result[-1] - result[0]).max() > 10 * TOLERANCE * np.abs(result[0]).max():
            raise RuntimeError(f"{name} does not train: its first results are {result.tolist()}")
        if not np.allclose(result, expected, rtol=tolerance, atol=0):
            raise RuntimeError(
                f"{name} computes something else than {reference}: {result.tolist()} and {expected.tolist()}"
            )


def steady(sides: Mapping[str, Side], rounds: int, block: float, trains: bool = True) -> Times:
    """The time of a step when everything is compiled; `block` is about how long a side runs in a round, in seconds."""
    found = costs(sides, rounds, block, trains)
    return {name: [cost.wall for cost in side] for name, side in found.items()}


def costs(
    sides: Mapping[str, Side],
    rounds: int,
    block: float,
    trains: bool = True,
    fewest: int = 4,
    tolerance: float = TOLERANCE,
) -> dict[str, list[Cost]]:
    """The same with the processor's time; a round has `fewest` calls or more."""
    check_same({name: side.first() for name, side in sides.items()}, trains, tolerance)
    calls = {name: _calls_for(side, block, fewest) for name, side in sides.items()}
    found: dict[str, list[Cost]] = {name: [] for name in sides}
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection would fall on whoever's turn it is
    try:
        for i in range(rounds):
            gc.collect()
            for name in list(sides)[:: -1 if i % 2 else 1]:
                side = sides[name]
                count = calls[name]
                warm = max(1, count // 10)  # after which the processor's caches are this side's again
                cost, steps = side.cost(count, warm), count * side.steps
                found[name].append(Cost(cost.wall / steps, cost.cpu / steps))
    finally:
        gc.enable()
        gc.unfreeze()
    return found


def _calls_for(side: Side, block: float, fewest: int) -> int:
    calls, seconds = 1, side.seconds(1)
    while seconds < block / 4:
        calls *= 4
        seconds = side.seconds(calls)
    return max(fewest, round(calls * block / seconds))


def first_calls(makers: Mapping[str, Callable[[], Side]], rounds: int) -> Times:
    """The time of the first call, trace and compilation included: each time of new functions, with empty caches."""
    times: Times = {name: [] for name in makers}
    for i in range(-1, rounds):  # the first round is not counted: it loads parts of the libraries
        results = {}
        for name in list(makers)[:: -1 if i % 2 else 1]:
            jax.clear_caches()
            side = makers[name]()
            gc.collect()
            seconds = side.seconds(1)
            if i >= 0:
                times[name].append(seconds)
            else:
                results[name] = side.first()
        if results:
            check_same(results)
    return times


class Summary(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def summary(values: Sequence[float]) -> Summary:
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return Summary(statistics.median(ordered), ordered[quarter], ordered[-1 - quarter])


def ratio(times: Times, ours: str, peer: str) -> Summary:
    """Of the rounds' ratios: what disturbs a whole round disturbs both sides."""
    return summary([a / b for a, b in zip(times[ours], times[peer], strict=True)])
