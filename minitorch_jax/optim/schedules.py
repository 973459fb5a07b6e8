"""Learning rates that follow the step count: pass one as `lr`.

Each is a function of the 0-based step `t`, and a value: two that were made with the same numbers are equal, hash alike
and share compiled programs, and the repr is the call that makes one. A Python int gives a Python float computed in float64,
a NumPy array an array of float64, a JAX array (traced or not) one of JAX's default float, so float32 unless x64 is on.
Counts end where int32 does, at 2147483647.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_LARGEST = float(np.finfo(np.float32).max)
_LAST = int(np.iinfo(np.int32).max)


class _Schedule:
    """What schedules share: `_at(t, xp)` computes with NumPy or jax.numpy, whichever the step belongs to."""

    def _at(self, t: Any, xp: Any) -> Any:
        raise NotImplementedError

    def __call__(self, step: Any) -> Any:
        """The learning rate at a step >= 0, or element by element at an array of them."""
        if isinstance(step, jax.Array):
            small = jnp.issubdtype(step.dtype, jnp.integer) and step.dtype.itemsize < 4
            t = step.astype(jnp.int32) if small else step
            return jnp.broadcast_to(jnp.asarray(self._at(t, jnp), jnp.result_type(float)), t.shape)
        steps = np.asarray(step)
        steps = steps.astype(np.int64) if np.issubdtype(steps.dtype, np.integer) else steps
        with np.errstate(over="ignore"):
            value = np.asarray(self._at(steps, np), np.float64)
        return float(value) if steps.ndim == 0 else np.array(np.broadcast_to(value, steps.shape))

    def _settle(self, **values: Any) -> None:
        """Set fields to what they were checked to be: floats, ints and tuples, so that equal schedules look equal."""
        vars(self).update(values)

    def _number(self, name: str, low: float = 0.0, high: float = _LARGEST, *, above: bool = False) -> float:
        """A field as a float in [low, high], or (low, high] where it must be `above`."""
        return _as_number(type(self).__name__, name, getattr(self, name), low, high, above=above)

    def _count(self, name: str, low: int = 1) -> int:
        """A field as an int >= low."""
        return _as_count(type(self).__name__, name, getattr(self, name), low)


# -- constants, and those that are constant piece by piece ------------------------------------------------------------


@dataclass(frozen=True)
class constant(_Schedule):
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
class piecewise(_Schedule):
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
        values = _as_tuple("piecewise", "values", self.values)
        numbers = tuple([_as_number("piecewise", f"values[{i}]", value) for i, value in enumerate(values)])
        self._settle(values=numbers, boundaries=_as_steps("piecewise", "boundaries", self.boundaries, len(numbers)))

    def _at(self, t: Any, xp: Any) -> Any:
        return _piece(self.values, self.boundaries, t, xp)


@dataclass(frozen=True)
class step(_Schedule):
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
        return self.lr * _power(self.gamma, t // self.step_size, xp)


@dataclass(frozen=True)
class multistep(_Schedule):
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
        milestones = _as_steps("multistep", "milestones", self.milestones)
        self._settle(lr=self._number("lr"), milestones=milestones, gamma=self._number("gamma", above=True))

    def _at(self, t: Any, xp: Any) -> Any:
        rates = [self.lr * self.gamma**i for i in range(len(self.milestones) + 1)]
        return _piece(rates, self.milestones, t, xp)


# -- decays -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class exponential(_Schedule):
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
        return self.lr * _power(self.gamma, t, xp)


@dataclass(frozen=True)
class polynomial(_Schedule):
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
        _, rest = _shares(xp.minimum(t, self.total_iters), 0, self.total_iters, xp)
        return self.lr * (rest if self.power == 1 else xp.power(rest, self.power))


@dataclass(frozen=True)
class linear(_Schedule):
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
        done, rest = _shares(xp.minimum(t, self.num_steps), 0, self.num_steps, xp)
        return self.start * rest + self.end * done


@dataclass(frozen=True)
class inverse_sqrt(_Schedule):
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
        done, _ = _shares(xp.minimum(t, top), 0, top, xp)
        return self.lr * done * xp.sqrt(float(top) / _real(xp.maximum(t, top), xp))


# -- cosines ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class cosine(_Schedule):
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
        shares = _shares(xp.minimum(t, self.num_steps), 0, self.num_steps, xp)
        done, rest = _half_cosine(*shares, xp)
        return self.lr * rest + self.eta_min * done


@dataclass(frozen=True)
class cosine_restarts(_Schedule):
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
            shares = _shares(t % self.t_0, 0, self.t_0, xp)
        else:
            starts, lengths = [0], [self.t_0]
            while starts[-1] + lengths[-1] <= _LAST:
                starts.append(starts[-1] + lengths[-1])
                lengths.append(lengths[-1] * self.t_mult)
            start, length = (_piece(values, starts[1:], t, xp) for values in (starts, [*map(float, lengths)]))
            # the last cycle may end where no step count reaches, so its end is not one integer but the sum of two
            end = _piece([*starts[1:], _LAST], starts[1:], t, xp)
            beyond = xp.where(t < starts[-1], 0.0, float(starts[-1] + lengths[-1] - _LAST))
            shares = _real(t - start, xp) / length, (_real(end - t, xp) + beyond) / length
        done, rest = _half_cosine(*shares, xp)
        return self.lr * rest + self.eta_min * done


@dataclass(frozen=True)
class one_cycle(_Schedule):
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
                done, rest = _shares(t, a, b, xp)
                if self.anneal_strategy == "cos":
                    done, rest = _half_cosine(done, rest, xp)
                here = start * rest + end * done
                value = here if b == last else xp.where(t <= math.floor(b), here, value)
        return value


# -- of other schedules -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class warmup(_Schedule):
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
        done, rest = _shares(xp.minimum(t, self.num_steps), 0, self.num_steps, xp)
        return (self.start_factor * rest + done) * value


@dataclass(frozen=True)
class join(_Schedule):
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
        given = _as_tuple("join", "schedules", self.schedules)
        schedules = tuple([_as_schedule("join", f"schedules[{i}]", item) for i, item in enumerate(given)])
        self._settle(schedules=schedules, boundaries=_as_steps("join", "boundaries", self.boundaries, len(schedules)))

    def _at(self, t: Any, xp: Any) -> Any:
        value = _inner(self.schedules[0], t, xp)
        for start, schedule in zip(self.boundaries, self.schedules[1:], strict=True):
            value = xp.where(t < start, value, _inner(schedule, xp.maximum(t, start) - start, xp))
        return value


# -- arithmetic -------------------------------------------------------------------------------------------------------


def _real(t: Any, xp: Any) -> Any:
    return t.astype(xp.result_type(float))


def _shares(t: Any, a: float, b: float, xp: Any) -> tuple[Any, Any]:
    """How much of the way from step `a` to step `b` is done at `t`, and how much is left.

    Both come from differences of integers: `1 - done` would have no correct digit near the end of many steps.
    """
    low, high = math.floor(a), math.ceil(b)
    done, left = _real(t - low, xp), _real(high - t, xp)
    if low != a or high != b:
        done, left = done - (a - low), left - (high - b)
    return done / float(b - a), left / float(b - a)


def _half_cosine(done: Any, rest: Any, xp: Any) -> tuple[Any, Any]:
    """(1 - cos(π done)) / 2 and (1 + cos(π done)) / 2, without a difference of numbers that are nearly equal."""
    return xp.square(xp.sin(0.5 * math.pi * done)), xp.square(xp.sin(0.5 * math.pi * rest))


def _power(gamma: float, k: Any, xp: Any) -> Any:
    """gamma^k. In float32 by a logarithm of full precision, for gamma itself, rounded, would be off by k roundings."""
    return np.power(gamma, k) if xp is np else xp.exp(_real(k, xp) * math.log(gamma))


def _piece(values: Sequence[Any], boundaries: Sequence[int], t: Any, xp: Any) -> Any:
    """The value whose turn it is; by comparisons with scalars, so that a program holds no table as a constant array."""
    value = values[0]
    for start, following in zip(boundaries, values[1:], strict=True):
        value = xp.where(t < start, value, following)
    return value


def _inner(schedule: Callable[[Any], Any], t: Any, xp: Any) -> Any:
    """A part of another schedule, which may be anyone's: an int goes in as an int."""
    if isinstance(schedule, _Schedule):
        return schedule._at(t, xp)
    value = schedule(int(t) if xp is np and t.ndim == 0 and np.issubdtype(t.dtype, np.integer) else t)
    return xp.asarray(value, xp.result_type(float))


# -- checks -----------------------------------------------------------------------------------------------------------


def _as_number(
    owner: str, name: str, value: Any, low: float = 0.0, high: float = _LARGEST, *, above: bool = False
) -> float:
    try:
        number = math.nan if isinstance(value, bool | str) or np.shape(value) != () else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (low <= number <= high) or (above and number == low):
        sign = ">" if above else ">="
        span = f"{sign} {low:g}" if high == _LARGEST else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{owner}: {name} must be a finite number {span}; got {value!r}")
    return number


def _as_count(owner: str, name: str, value: Any, low: int) -> int:
    try:
        number = low - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = low - 1
    if not low <= number <= _LAST:
        raise ValueError(f"{owner}: {name} must be an integer in [{low}, {_LAST}]; got {value!r}")
    return number


def _as_tuple(owner: str, name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise ValueError(f"{owner}: {name} must be a list; got {value!r}")
    return tuple(value)


def _as_steps(owner: str, name: str, value: Any, num_parts: int | None = None) -> tuple[int, ...]:
    """Increasing steps; if they are boundaries of some parts, as many as it takes."""
    steps = tuple([_as_count(owner, f"{name}[{i}]", item, 0) for i, item in enumerate(_as_tuple(owner, name, value))])
    if any(b <= a for a, b in zip(steps, steps[1:], strict=False)):
        raise ValueError(f"{owner}: {name} must increase; got {value!r}")
    if num_parts is not None and len(steps) + 1 != num_parts:
        raise ValueError(f"{owner}: {name} must be one fewer than what they divide; got {len(steps)} for {num_parts}")
    return steps


def _as_schedule(owner: str, name: str, value: Any) -> Any:
    """A schedule, or a number as the schedule that is constant."""
    if not callable(value):
        return constant(_as_number(owner, name, value))
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
