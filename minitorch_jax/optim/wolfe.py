"""A line search for the strong Wolfe conditions, as torch's `LBFGS` has it: Python decides, point by point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

C1, C2 = 1e-4, 0.9  # how much of the decrease, and of the flattening, that the slope promises is asked for


class Point(NamedTuple):
    """The loss at a distance `t` along the direction `d`. As in torch, numbers of Python's are weak beside arrays'."""

    t: Any
    f: float  # the loss
    g: jax.Array  # its gradient
    g_max: Any  # max |g|
    gtd: Any  # g · d, the slope


@np.errstate(all="ignore")
def cubic_minimum(a: Point, b: Point, bounds: tuple[Any, Any] | None = None) -> Any:
    """The minimum of the cubic through two points with their slopes, within bounds; else the middle of these."""
    low, high = bounds if bounds is not None else (a.t, b.t) if a.t <= b.t else (b.t, a.t)
    secant = 3 * (a.f - b.f) / (a.t - b.t) if a.t != b.t else np.nan
    d1 = a.gtd + b.gtd - secant
    square = d1**2 - a.gtd * b.gtd
    if not square >= 0:
        return (low + high) / 2.0
    d2 = np.sqrt(square)
    if a.t <= b.t:
        found = b.t - (b.t - a.t) * ((b.gtd + d2 - d1) / (b.gtd - a.gtd + 2 * d2))
    else:
        found = a.t - (a.t - b.t) * ((a.gtd + d2 - d1) / (a.gtd - b.gtd + 2 * d2))
    return min(max(found, low), high)


@np.errstate(all="ignore")
def _is_too_high(new: Point, start: Point) -> bool:
    """Armijo's condition fails: the loss has not decreased enough."""
    return bool(new.f > start.f + C1 * new.t * start.gtd)


@np.errstate(all="ignore")
def _is_flat(new: Point, start: Point) -> bool:
    """The curvature condition: the slope is much smaller than at the start."""
    return bool(abs(new.gtd) <= -C2 * start.gtd)


def strong_wolfe(
    evaluate: Callable[[Any], Point], start: Point, t: Any, d_max: Any, max_steps: int, tolerance_change: float
) -> tuple[Point, int]:
    """A point on the line that fulfils the conditions, or the lowest one found, and how often the loss was evaluated.

    Args:
        evaluate: the point at a distance.
        start: the point at 0.
        t: the distance to try first.
        d_max: the largest element of the direction, in absolute value.
        max_steps: how many further points to try.
        tolerance_change: the length of step, by its largest element, below which to give up.
    """
    new, previous = evaluate(t), start
    step, done = 0, False
    bracket = []
    while step < max_steps:
        if _is_too_high(new, start) or (step > 1 and new.f >= previous.f):
            bracket = [previous, new]
            break
        if _is_flat(new, start):
            bracket, done = [new], True
            break
        if new.gtd >= 0:
            bracket = [previous, new]
            break
        bounds = new.t + 0.01 * (new.t - previous.t), new.t * 10
        t = cubic_minimum(previous, new, bounds)
        previous, new = new, evaluate(t)
        step += 1
    else:
        bracket = [start, new]
    tried = step + 1
    if not done and step < max_steps:
        return _zoom(evaluate, start, bracket, d_max, step, max_steps, tolerance_change)
    return bracket[0 if bracket[0].f <= bracket[-1].f else -1], tried


def _zoom(
    evaluate: Callable[[Any], Point],
    start: Point,
    bracket: list[Point],
    d_max: Any,
    step: int,
    max_steps: int,
    tolerance_change: float,
) -> tuple[Point, int]:
    """Narrow a bracket of two points, between which there is one that fulfils the conditions."""
    low, high = (0, 1) if bracket[0].f <= bracket[1].f else (1, 0)
    insufficient, done = False, False
    while not done and step < max_steps:
        if abs(bracket[1].t - bracket[0].t) * d_max < tolerance_change:
            break
        t, insufficient = _inside(cubic_minimum(bracket[0], bracket[1]), bracket[0].t, bracket[1].t, insufficient)
        new = evaluate(t)
        step += 1
        if _is_too_high(new, start) or new.f >= bracket[low].f:
            bracket[high] = new
            low, high = (0, 1) if bracket[0].f <= bracket[1].f else (1, 0)
            continue
        if _is_flat(new, start):
            done = True
        elif new.gtd * (bracket[high].t - bracket[low].t) >= 0:
            bracket[high] = bracket[low]
        bracket[low] = new
    return bracket[low], step + 1


def _inside(t: Any, a: Any, b: Any, insufficient: bool) -> tuple[Any, bool]:
    """A distance moved away from the ends of its bracket, if it was close to one twice, and whether it is close now."""
    least, most = min(a, b), max(a, b)
    margin = 0.1 * (most - least)
    if not min(most - t, t - least) < margin:
        return t, False
    if not (insufficient or t >= most or t <= least):
        return t, True
    return (most - margin if abs(t - most) < abs(t - least) else least + margin), False
