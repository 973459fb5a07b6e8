"""Constant learning rates, and those that are constant piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...module.checks import as_number, as_tuple
from .arithmetic import piece, power
from .base import Schedule, as_steps


@dataclass(frozen=True)
class constant(Schedule):
    """The same rate at every step; useful as a part of `join`.

    Args:
        value: the rate, a finite number >= 0.

    Raises:
        ValueError: if `value` is out of its range.

    Source: `optax.constant_schedule`.

    Example:
        >>> constant(0.1)(1000)
        0.1
    """

    value: float

    def __post_init__(self) -> None:
        self._settle(value=self._number("value"))

    def _at(self, t: Any, xp: Any) -> Any:
        return self.value


@dataclass(frozen=True)
class piecewise(Schedule):
    """`values[0]` before step `boundaries[0]`, `values[1]` from there on, and so forth.

    Args:
        values: the rates, finite numbers >= 0.
        boundaries: increasing steps >= 0, one fewer than values.

    Raises:
        ValueError: if numbers are out of their ranges, boundaries do not increase, or their count does not fit.

    Source: `optax.piecewise_constant_schedule`, which takes factors instead of values.

    Example:
        >>> rate = piecewise([0.1, 0.01], boundaries=[100])
        >>> rate(99), rate(100)
        (0.1, 0.01)
    """

    values: Sequence[float]
    boundaries: Sequence[int]

    def __post_init__(self) -> None:
        values = as_tuple("piecewise", "values", self.values)
        numbers = tuple([as_number("piecewise", f"values[{i}]", value) for i, value in enumerate(values)])
        self._settle(values=numbers, boundaries=as_steps("piecewise", "boundaries", self.boundaries, len(numbers)))

    def _at(self, t: Any, xp: Any) -> Any:
        return piece(self.values, self.boundaries, t, xp)


@dataclass(frozen=True)
class step(Schedule):
    """Multiplied by `gamma` every `step_size` steps: lr gamma^⌊t / step_size⌋.

    Args:
        lr: the rate at first, >= 0.
        step_size: after how many steps it changes, >= 1.
        gamma: the factor, > 0.

    Raises:
        ValueError: if an argument is out of its range.

    Source: `torch.optim.lr_scheduler.StepLR`.

    Example:
        >>> rate = step(0.5, step_size=30, gamma=0.5)
        >>> rate(29), rate(30), rate(60)
        (0.5, 0.25, 0.125)
    """

    lr: float
    step_size: int
    gamma: float = 0.1

    def __post_init__(self) -> None:
        gamma = self._number("gamma", above=True)
        self._settle(lr=self._number("lr"), step_size=self._count("step_size"), gamma=gamma)

    def _at(self, t: Any, xp: Any) -> Any:
        return self.lr * power(self.gamma, t // self.step_size, xp)


@dataclass(frozen=True)
class multistep(Schedule):
    """Multiplied by `gamma` at each of some steps.

    Args:
        lr: the rate at first, >= 0.
        milestones: increasing steps >= 0; the new rate holds from each of them on.
        gamma: the factor, > 0.

    Raises:
        ValueError: if an argument is out of its range, or the milestones do not increase.

    Source: `torch.optim.lr_scheduler.MultiStepLR`.

    Differs from PyTorch: milestones must be sorted, and none may come twice.

    Example:
        >>> rate = multistep(0.5, milestones=[30, 80], gamma=0.5)
        >>> rate(29), rate(30), rate(80)
        (0.5, 0.25, 0.125)
    """

    lr: float
    milestones: Sequence[int]
    gamma: float = 0.1

    def __post_init__(self) -> None:
        milestones = as_steps("multistep", "milestones", self.milestones)
        self._settle(lr=self._number("lr"), milestones=milestones, gamma=self._number("gamma", above=True))

    def _at(self, t: Any, xp: Any) -> Any:
        rates = [self.lr * self.gamma**i for i in range(len(self.milestones) + 1)]
        return piece(rates, self.milestones, t, xp)
