"""Schedules made of other schedules: a warm-up, and one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...module.checks import as_number, as_tuple
from .arithmetic import done_and_left
from .base import Schedule, as_steps
from .stepped import constant


@dataclass(frozen=True)
class warmup(Schedule):
    """A linear warm-up, then the given schedule from its own beginning.

        (start_factor + (1 - start_factor) t / num_steps) schedule(0) for t < num_steps, schedule(t - num_steps) after

    The inner count starts after the warm-up: for `total` steps in all, warm up `cosine(lr, total - num_steps)`.

    Args:
        schedule: what to warm up to: a rate, or any function of the step, such as one of optax.
        num_steps: how many steps are below it, >= 0.
        start_factor: the share of the rate at step 0, in [0, 1]. At 0.0 the first step changes nothing.

    Raises:
        ValueError: if an argument is out of its range.
        TypeError: if `schedule` is a class or cannot be hashed.

    Source: `optax.join_schedules` after `optax.linear_schedule`; `torch.optim.lr_scheduler.LinearLR`, then another, in
    `SequentialLR`.

    Differs from PyTorch: `start_factor` is 0.0, not 1/3.

    Example:
        >>> rate = warmup(cosine(0.5, num_steps=100), num_steps=4)
        >>> [rate(t) for t in range(5)], rate(104)
        ([0.0, 0.125, 0.25, 0.375, 0.5], 0.0)
    """

    schedule: Any
    num_steps: int
    start_factor: float = 0.0

    def __post_init__(self) -> None:
        start_factor = self._number("start_factor", 0.0, 1.0)
        schedule = _as_schedule("warmup", "schedule", self.schedule)
        self._settle(schedule=schedule, num_steps=self._count("num_steps", 0), start_factor=start_factor)

    def _at(self, t: Any, xp: Any) -> Any:
        value = _inner(self.schedule, xp.maximum(t, self.num_steps) - self.num_steps, xp)
        if self.num_steps == 0:
            return value
        done, rest = done_and_left(xp.minimum(t, self.num_steps), 0, self.num_steps, xp)
        return (self.start_factor * rest + done) * value


@dataclass(frozen=True)
class join(Schedule):
    """One schedule after another; each counts its own steps, from the boundary where it begins.

    Args:
        schedules: rates, or any functions of the step, such as those of optax.
        boundaries: increasing steps >= 0, one fewer than schedules: `schedules[1]` begins at step `boundaries[0]`.

    Raises:
        ValueError: if a rate or a boundary is out of its range, boundaries do not increase, or their count does not fit.
        TypeError: if a schedule is a class or cannot be hashed.

    Source: `optax.join_schedules`; `torch.optim.lr_scheduler.SequentialLR`.

    Example:
        >>> rate = join([0.5, linear(1.0, 0.0, num_steps=4)], boundaries=[10])
        >>> rate(9), rate(10), rate(11), rate(14)
        (0.5, 1.0, 0.75, 0.0)
    """

    schedules: Sequence[Any]
    boundaries: Sequence[int]

    def __post_init__(self) -> None:
        given = as_tuple("join", "schedules", self.schedules)
        schedules = tuple([_as_schedule("join", f"schedules[{i}]", item) for i, item in enumerate(given)])
        self._settle(schedules=schedules, boundaries=as_steps("join", "boundaries", self.boundaries, len(schedules)))

    def _at(self, t: Any, xp: Any) -> Any:
        value = _inner(self.schedules[0], t, xp)
        for start, schedule in zip(self.boundaries, self.schedules[1:], strict=True):
            value = xp.where(t < start, value, _inner(schedule, xp.maximum(t, start) - start, xp))
        return value


def _inner(schedule: Callable[[Any], Any], t: Any, xp: Any) -> Any:
    """A part of another schedule, which may be anyone's: an int goes in as an int."""
    if isinstance(schedule, Schedule):
        return schedule._at(t, xp)
    value = schedule(int(t) if xp is np and t.ndim == 0 and np.issubdtype(t.dtype, np.integer) else t)
    return xp.asarray(value, xp.result_type(float))


def _as_schedule(owner: str, name: str, value: Any) -> Any:
    """A schedule, or a number as the schedule that is constant."""
    if not callable(value):
        return constant(as_number(owner, name, value))
    if isinstance(value, type):
        raise TypeError(f"{owner}: {name} must be a rate or a schedule; got {value!r}, which is to be called first")
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"{owner}: {name} must be hashable, as programs are compiled for it; got {value!r}. Use a function, or a"
            " frozen dataclass with __call__."
        ) from None
    return value
