"""Learning rates that follow half a cosine, once, again and again, or up and down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...module.checks import LAST
from .arithmetic import done_and_left, half_cosine, piece, real
from .base import Schedule


@dataclass(frozen=True)
class cosine(Schedule):
    """Half a cosine from `lr` to `eta_min`: eta_min + (lr - eta_min) (1 + cos(π t / num_steps)) / 2, then `eta_min`.

    Args:
        lr: the rate at first, >= 0.
        num_steps: from which step on it is `eta_min`, >= 1 (`T_max` in torch).
        eta_min: the last rate, >= 0.

    Raises:
        ValueError: if an argument is out of its range.

    Source: `torch.optim.lr_scheduler.CosineAnnealingLR`; Loshchilov and Hutter, "SGDR: stochastic gradient descent with
    warm restarts", 2017.

    Differs from PyTorch: the rate stays at `eta_min` after the end, where PyTorch's rises again.

    Example:
        >>> rate = cosine(0.1, num_steps=90)
        >>> rate(0), round(rate(30), 9), rate(90), rate(1000)
        (0.1, 0.075, 0.0, 0.0)
    """

    lr: float
    num_steps: int
    eta_min: float = 0.0

    def __post_init__(self) -> None:
        self._settle(lr=self._number("lr"), num_steps=self._count("num_steps"), eta_min=self._number("eta_min"))

    def _at(self, t: Any, xp: Any) -> Any:
        shares = done_and_left(xp.minimum(t, self.num_steps), 0, self.num_steps, xp)
        done, rest = half_cosine(*shares, xp)
        return self.lr * rest + self.eta_min * done


@dataclass(frozen=True)
class cosine_restarts(Schedule):
    """Half a cosine from `lr` to `eta_min` again and again, `t_0` steps long at first, each `t_mult` times the one before.

    A cycle's first step has the rate `lr`; none has `eta_min` itself.

    Args:
        lr: the rate at each start, >= 0.
        t_0: how many steps the first cycle has, >= 1.
        t_mult: by how much each cycle is longer than the one before, an integer >= 1.
        eta_min: the rate that each cycle goes to, >= 0.

    Raises:
        ValueError: if an argument is out of its range.

    Source: `torch.optim.lr_scheduler.CosineAnnealingWarmRestarts`; Loshchilov and Hutter, "SGDR: stochastic gradient
    descent with warm restarts", 2017.

    Example:
        >>> rate = cosine_restarts(0.1, t_0=9, t_mult=2)
        >>> rate(0), round(rate(3), 9), rate(9), round(rate(9 + 6), 9)
        (0.1, 0.075, 0.1, 0.075)
    """

    lr: float
    t_0: int
    t_mult: int = 1
    eta_min: float = 0.0

    def __post_init__(self) -> None:
        eta_min = self._number("eta_min")
        self._settle(lr=self._number("lr"), t_0=self._count("t_0"), t_mult=self._count("t_mult"), eta_min=eta_min)

    def _at(self, t: Any, xp: Any) -> Any:
        if self.t_mult == 1:
            shares = done_and_left(t % self.t_0, 0, self.t_0, xp)
        else:
            starts, lengths = [0], [self.t_0]
            while starts[-1] + lengths[-1] <= LAST:
                starts.append(starts[-1] + lengths[-1])
                lengths.append(lengths[-1] * self.t_mult)
            start, length = (piece(values, starts[1:], t, xp) for values in (starts, [*map(float, lengths)]))
            # the last cycle may end where no step count reaches, so its end is not one integer but the sum of two
            end = piece([*starts[1:], LAST], starts[1:], t, xp)
            beyond = xp.where(t < starts[-1], 0.0, float(starts[-1] + lengths[-1] - LAST))
            shares = real(t - start, xp) / length, (real(end - t, xp) + beyond) / length
        done, rest = half_cosine(*shares, xp)
        return self.lr * rest + self.eta_min * done


@dataclass(frozen=True)
class one_cycle(Schedule):
    """From `max_lr / div_factor` up to `max_lr` in `pct_start` of the steps, and down to the first / `final_div_factor`.

    Args:
        max_lr: the highest rate, >= 0.
        total_steps: how many steps the cycle has, >= 1; the last of them, t = total_steps - 1, has the lowest rate.
        pct_start: the share of steps that go up, in [0, 1].
        anneal_strategy: "cos", for half a cosine each way, or "linear".
        div_factor: by how much the first rate is lower than `max_lr`, > 0.
        final_div_factor: by how much the last rate is lower than the first, > 0.
        three_phase: go down to the first rate in as many steps as up, and only then to the last.

    Raises:
        ValueError: if an argument is out of its range.

    Source: `torch.optim.lr_scheduler.OneCycleLR`; Smith and Topin, "Super-convergence: very fast training of neural
    networks using large learning rates", 2018.

    Differs from PyTorch: only the learning rate is scheduled, not the momentum (as with `cycle_momentum=False`); after
    the last step the last rate stays, where PyTorch raises.

    Example:
        >>> rate = one_cycle(1.0, total_steps=11, pct_start=0.5, anneal_strategy="linear", div_factor=10)
        >>> rate(0), round(rate(4), 3), round(rate(5), 3), rate(10)
        (0.1, 0.9, 0.909, 1e-05)
    """

    max_lr: float
    total_steps: int
    pct_start: float = 0.3
    anneal_strategy: str = "cos"
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    three_phase: bool = False

    def __post_init__(self) -> None:
        if self.anneal_strategy not in ("cos", "linear"):
            raise ValueError(f"one_cycle: anneal_strategy must be 'cos' or 'linear'; got {self.anneal_strategy!r}")
        if not isinstance(self.three_phase, bool):
            raise ValueError(f"one_cycle: three_phase must be a bool; got {self.three_phase!r}")
        self._settle(max_lr=self._number("max_lr"), total_steps=self._count("total_steps"))
        self._settle(pct_start=self._number("pct_start", 0.0, 1.0), div_factor=self._number("div_factor", above=True))
        self._settle(final_div_factor=self._number("final_div_factor", above=True))

    def _at(self, t: Any, xp: Any) -> Any:
        first, last, peak = self.max_lr / self.div_factor, self.total_steps - 1, self.pct_start * self.total_steps - 1
        lowest = first / self.final_div_factor
        corners = [(0.0, first), (peak, self.max_lr), (last, lowest)]  # steps, in general no integers, and their rates
        if self.three_phase:
            corners.insert(2, (2 * peak, first))
        t = xp.clip(t, 0, last)
        value: Any = lowest
        for (a, start), (b, end) in reversed([*zip(corners, corners[1:], strict=False)]):
            if b - a > 1e-6:
                done, rest = done_and_left(t, a, b, xp)
                if self.anneal_strategy == "cos":
                    done, rest = half_cosine(done, rest, xp)
                here = start * rest + end * done
                value = here if b == last else xp.where(t <= math.floor(b), here, value)
        return value
