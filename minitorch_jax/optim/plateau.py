"""A learning rate that follows a measured value, where `schedules` follow the step count."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import jax

from ..module.checks import as_count, as_number, as_one_of
from .optimizer import Optimizer

_SETTINGS = ("mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lr", "eps")
_STATE = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")


class ReduceOnPlateau:
    """Multiplies `opt.lr` by `factor` once more than `patience` measurements in a row were no better than the best.

    Call `step(metric)` after each validation, in eager code; the next `opt.step()` uses the new rate, and nothing is
    compiled again. Of an optimizer with groups each group's rate is reduced.

    Args:
        opt: an optimizer whose `lr` is a number.
        mode: "min", if a lower value is better, or "max".
        factor: by which the rate is multiplied, in [0, 1).
        patience: how many measurements without improvement are let pass, >= 0.
        threshold: how much better than the best a value must be to count, >= 0.
        threshold_mode: "rel", for a share of the best value, or "abs".
        cooldown: for how many measurements after a reduction bad ones do not count, >= 0.
        min_lr: the rate does not go below it, >= 0; or a list, one for each group.
        eps: a reduction by no more than this is left out, >= 0.

    Raises:
        ValueError: if an argument is out of its range.
        TypeError: if `opt` is no optimizer, or its `lr` is a schedule, which has no value to be reduced.

    Source: `torch.optim.lr_scheduler.ReduceLROnPlateau`.

    Differs from PyTorch: a negative `factor`, `patience` or `cooldown` is an error.

    Example:
        >>> import jax
        >>> from minitorch_jax import nn, optim
        >>> opt = optim.SGD([nn.Linear(2, 1, key=jax.random.key(0))], lr=0.5)
        >>> plateau = ReduceOnPlateau(opt, factor=0.5, patience=1)
        >>> for loss in [1.0, 0.8, 0.8, 0.8, 0.7]:
        ...     plateau.step(loss)
        ...     print(opt.lr)
        0.5
        0.5
        0.5
        0.25
        0.25
    """

    mode: str
    factor: float
    patience: int
    threshold: float
    threshold_mode: str
    cooldown: int
    min_lr: float | tuple[float, ...]
    eps: float
    _leads_to_state = True

    def __init__(
        self,
        opt: Any,
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: float | Sequence[float] = 0.0,
        eps: float = 1e-8,
    ) -> None:
        if not isinstance(opt, Optimizer):
            raise TypeError(f"ReduceOnPlateau: opt must be an optimizer; got a {type(opt).__name__}")
        self.opt = opt
        given = (mode, factor, patience, threshold, threshold_mode, cooldown, min_lr, eps)
        vars(self).update(_checked(dict(zip(_SETTINGS, given, strict=True))))
        self._check_numbers()
        self._floors(self.min_lr)
        self.best = math.inf if self.mode == "min" else -math.inf
        self.num_bad_epochs = self.cooldown_counter = self.last_epoch = 0

    def step(self, metric: Any) -> None:
        """Take note of a measured value (a number, or an array of one), and reduce the rate if it is due.

        Raises:
            TypeError: if `metric` is not a number, or is traced: what is measured within a compiled function is known
                only after it.
        """
        if isinstance(metric, jax.core.Tracer):
            raise TypeError(
                "ReduceOnPlateau.step() needs a measured value; got a traced one. Return it from the compiled function,"
                " and call step() with it outside."
            )
        try:
            value = float(metric)
        except (TypeError, ValueError):
            raise TypeError(f"ReduceOnPlateau.step() needs a number; got {metric!r}") from None
        bad = 0 if self._is_better(value) else self.num_bad_epochs + 1
        best = value if bad == 0 else self.best
        cooldown = self.cooldown_counter
        if cooldown > 0:
            cooldown, bad = cooldown - 1, 0
        if bad > self.patience:
            self._reduce()
            cooldown, bad = self.cooldown, 0
        self.best, self.num_bad_epochs, self.cooldown_counter = best, bad, cooldown
        self.last_epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """Settings and counts, as plain numbers and strings; the rate itself is in `opt.state_dict()`."""
        return {name: getattr(self, name) for name in (*_SETTINGS, *_STATE)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what another's `state_dict()` gave.

        Raises:
            ValueError: if something is missing, unexpected or out of its range; nothing has changed then.
        """
        wrong = [f"missing: {name}" for name in (*_SETTINGS, *_STATE) if name not in state_dict]
        wrong += [f"unexpected: {name}" for name in state_dict if name not in (*_SETTINGS, *_STATE)]
        if wrong:
            raise ValueError(f"state_dict does not fit ReduceOnPlateau; nothing was loaded: {', '.join(wrong)}")
        settings = _checked({name: state_dict[name] for name in _SETTINGS})
        self._floors(settings["min_lr"])
        counts = {name: as_count("ReduceOnPlateau", name, state_dict[name]) for name in _STATE[1:]}
        vars(self).update(
            settings,
            best=as_number("ReduceOnPlateau", "best", state_dict["best"], -math.inf, math.inf, what="a number"),
            **counts,
        )

    def _is_better(self, value: float) -> bool:
        sign = -1.0 if self.mode == "min" else 1.0
        if self.threshold_mode == "rel":
            bound = self.best * (1.0 + sign * self.threshold)
        else:
            bound = self.best + sign * self.threshold
        return value < bound if self.mode == "min" else value > bound

    def _check_numbers(self) -> None:
        """Raise TypeError if a rate is a schedule."""
        if any(callable(self.opt._stated("lr", i)) for i in range(len(self.opt.groups))):
            raise TypeError(
                "ReduceOnPlateau cannot reduce a schedule, which sets the rate at every step; assign a number to"
                " `opt.lr`, or leave the rate to the schedule"
            )

    def _reduce(self) -> None:
        self._check_numbers()
        default, groups = self.opt._stated("lr"), self.opt.groups  # without groups, one that is the optimizer itself
        reduced = [
            (group, self._reduced(group.lr, low)) for group, low in zip(groups, self._floors(self.min_lr), strict=True)
        ]
        if not callable(default) and not isinstance(self.min_lr, tuple):
            with suppress(AttributeError):  # every group has a rate of its own, and the optimizer's is none's
                self.opt.lr = self._reduced(default, self.min_lr)
        for group, rate in reduced:
            if group.lr != rate:
                group.lr = rate

    def _floors(self, low: float | tuple[float, ...]) -> tuple[float, ...]:
        """`min_lr` of each group."""
        count = len(self.opt.groups)
        floors = low if isinstance(low, tuple) else (low,) * count
        if len(floors) != count:
            raise ValueError(f"ReduceOnPlateau: min_lr must be a number or a list of {count}; got {low!r}")
        return floors

    def _reduced(self, rate: Any, low: float) -> float:
        new = max(float(rate) * self.factor, low)
        return new if float(rate) - new > self.eps else float(rate)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in _SETTINGS)
        return f"{type(self).__name__}({type(self.opt).__name__}, {shown})"


def _checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as they are kept; ValueError if one is out of its range."""
    owner = "ReduceOnPlateau"
    as_one_of(owner, "mode", settings["mode"], ("min", "max"))
    as_one_of(owner, "threshold_mode", settings["threshold_mode"], ("rel", "abs"))
    factor = as_number(owner, "factor", settings["factor"], 0, 1, below=True)
    numbers: dict[str, Any] = {name: as_number(owner, name, settings[name]) for name in ("threshold", "eps")}
    low = settings["min_lr"]
    several = isinstance(low, list | tuple)
    numbers["min_lr"] = (
        tuple(as_number(owner, "min_lr", n) for n in low) if several else as_number(owner, "min_lr", low)
    )
    counts = {name: as_count(owner, name, settings[name]) for name in ("patience", "cooldown")}
    return {**settings, "factor": factor, **numbers, **counts}
