"""Learning rates that decay: exponential, polynomial, linear, inverse square root."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .arithmetic import done_and_left, power, real
from .base import Schedule


@dataclass(frozen=True)
class exponential(Schedule):
    """Multiplied by `gamma` at every step: lr gamma^t.

    Args:
        lr: the rate at first, >= 0.
        gamma: the factor, > 0; above 1 the rate grows, as a search for the largest usable one wants it.

    Raises:
        ValueError: if an argument is out of its range.

    Source: `torch.optim.lr_scheduler.ExponentialLR`.

    Example:
        >>> rate = exponential(0.5, gamma=0.5)
        >>> [rate(t) for t in range(4)]
        [0.5, 0.25, 0.125, 0.0625]
    """

    lr: float
    gamma: float

    def __post_init__(self) -> None:
        self._settle(lr=self._number("lr"), gamma=self._number("gamma", above=True))

    def _at(self, t: Any, xp: Any) -> Any:
        return self.lr * power(self.gamma, t, xp)


@dataclass(frozen=True)
class polynomial(Schedule):
    """To zero in `total_iters` steps, and zero after them: lr (1 - t / total_iters)^power.

    Args:
        lr: the rate at first, >= 0.
        total_iters: at which step it is zero, >= 1.
        power: of the polynomial, > 0; 1 is a straight line.

    Raises:
        ValueError: if an argument is out of its range.

    Source: `torch.optim.lr_scheduler.PolynomialLR`.

    Example:
        >>> rate = polynomial(1.0, total_iters=4, power=2)
        >>> [rate(t) for t in range(6)]
        [1.0, 0.5625, 0.25, 0.0625, 0.0, 0.0]
    """

    lr: float
    total_iters: int
    power: float = 1.0

    def __post_init__(self) -> None:
        power = self._number("power", above=True)
        self._settle(lr=self._number("lr"), total_iters=self._count("total_iters"), power=power)

    def _at(self, t: Any, xp: Any) -> Any:
        _, rest = done_and_left(xp.minimum(t, self.total_iters), 0, self.total_iters, xp)
        return self.lr * (rest if self.power == 1 else xp.power(rest, self.power))


@dataclass(frozen=True)
class linear(Schedule):
    """A straight line from `start` to `end` in `num_steps` steps, and `end` after them.

    Args:
        start: the rate at step 0, >= 0.
        end: the rate from step `num_steps` on, >= 0.
        num_steps: how long it takes, >= 1.

    Raises:
        ValueError: if an argument is out of its range.

    Source: `optax.linear_schedule`; `torch.optim.lr_scheduler.LinearLR`, which takes factors instead of rates.

    Example:
        >>> rate = linear(1.0, 0.0, num_steps=4)
        >>> [rate(t) for t in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    start: float
    end: float
    num_steps: int

    def __post_init__(self) -> None:
        self._settle(start=self._number("start"), end=self._number("end"), num_steps=self._count("num_steps"))

    def _at(self, t: Any, xp: Any) -> Any:
        done, rest = done_and_left(xp.minimum(t, self.num_steps), 0, self.num_steps, xp)
        return self.start * rest + self.end * done


@dataclass(frozen=True)
class inverse_sqrt(Schedule):
    """Up from zero in a straight line to `lr` at step `warmup_steps`, then down: lr √(warmup_steps / t).

    Args:
        lr: the highest rate, >= 0.
        warmup_steps: the step that has it, >= 1.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Vaswani et al., "Attention is all you need", 2017, with lr = (d_model · warmup_steps)^-½.

    Example:
        >>> rate = inverse_sqrt(0.5, warmup_steps=100)
        >>> rate(0), rate(50), rate(100), rate(400)
        (0.0, 0.25, 0.5, 0.25)
    """

    lr: float
    warmup_steps: int

    def __post_init__(self) -> None:
        self._settle(lr=self._number("lr"), warmup_steps=self._count("warmup_steps"))

    def _at(self, t: Any, xp: Any) -> Any:
        top = self.warmup_steps
        done, _ = done_and_left(xp.minimum(t, top), 0, top, xp)
        return self.lr * done * xp.sqrt(float(top) / real(xp.maximum(t, top), xp))
