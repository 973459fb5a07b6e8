"""Comparison of the gradients from `backward` with the right ones. At a kink there is no right gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .hints import Context, hint_for
from .objects import is_floating, walk
from .reference import Differences, Reference, by_differences, by_jax
from .report import GradientComparison
from .subject import Key, Subject

_MOST_KINKS = 64  # at most so many elements are tested one by one


class Comparison:
    """The comparison for one layer, with one call and the incoming gradient of its `backward`."""

    outputs: list[Any]
    reference: Reference
    rtol: float

    def __init__(self, subject: Subject, dout: Sequence[Any], is_random: bool = False) -> None:
        self.subject, self.dout = subject, [np.asarray(each, np.float64) for each in dout]
        self.problems: list[str] = []
        self.notes: list[str] = []
        if is_random:
            self.notes.append("the incoming gradient is random")
        nested = [
            str(i) for i, arg in enumerate(subject.args) if not isinstance(arg, np.ndarray) and _holds_arrays(arg)
        ]
        if nested:
            self.notes.append(
                f"the gradients by arrays inside argument {', '.join(nested)} are not checked: only those by arguments"
                " that are arrays"
            )
        if subject.constants:
            self.notes.append(f"treated as constants, since they have no gradient: {', '.join(subject.constants)}")

    def tolerance(self, got: dict[Key, Any]) -> float:
        """The relative accuracy that `backward` can have. It is lower if its code rounds to fewer bits than float64."""
        arrays = [*self.outputs, *(each for each in got.values() if each is not None)]
        eps = max([float(np.finfo(a.dtype).eps) for a in arrays if a.dtype.kind == "f"], default=0.0)
        eps = max(eps, float(np.finfo(np.float32).eps)) if self.reference.rough else eps
        self.narrow = eps > 1e-12
        if self.narrow:
            self.notes.append("its code rounds to fewer bits than float64, so the check is less exact")
        if self.subject.settings.rtol is not None:
            return self.subject.settings.rtol
        exact = max(1e-6, min(500 * eps, 0.05))
        return exact if self.reference.by_jax else max(exact, 5e-2 if self.narrow else 1e-5)

    def name(self, key: Key) -> str:
        if isinstance(key, str):
            return key
        return "input" if len(self.subject.floating) == 1 else f"input {key}"

    def _scale(self, want: Any) -> float:
        incoming = max([float(np.abs(each).max(initial=0.0)) for each in self.dout], default=0.0)
        return max(_largest(want), 1e-3 * incoming, 1e-300)

    def _misses(self, got: Any, want: Any) -> Any:
        """True for elements that differ too much."""
        near = _near(got, want, self.rtol * self._scale(want))
        return ~near & ~np.isnan(want) if not self.reference.by_jax else ~near

    def compared(self, got: dict[Key, Any]) -> list[GradientComparison]:
        found = [self._compare(key, got.get(key), want) for key, want in self.reference.grads.items()]
        if self.reference.by_jax and any(each is None for each in found):
            self.reference = by_differences(self.subject, self.dout, "jax.grad disagrees with them")
            self.rtol = max(self.rtol, 1e-5) if self.subject.settings.rtol is None else self.rtol
            found = [self._compare(key, got.get(key), want) for key, want in self.reference.grads.items()]
        return [each for each in found if each is not None]

    def _compare(self, key: Key, got: Any, want: Any) -> GradientComparison | None:
        """Compare one gradient. None if the reference itself is wrong."""
        name = self.name(key)
        if got is None:
            needed = isinstance(key, str) and _largest(want) > self.rtol * self._scale(want)
            hint = "backward() computes none" if needed else ""
            return GradientComparison(name, want.shape, None, not needed, hint=hint, remark="not computed")
        if got.shape != want.shape:
            return GradientComparison(name, want.shape, None, False, hint=hint_for(key, got, want, self.context()))
        misses, remark = self._misses(got, want), ""
        if misses.any():
            kinks = self._kinks(key, got, want, misses)
            if kinks is None:
                return None
            misses &= ~kinks
            got = np.where(kinks, want, got)
            remark = f"{int(kinks.sum())} elements at a kink" if kinks.any() else ""
            if kinks.any():
                self.notes.append(
                    f"forward has a kink in {int(kinks.sum())} elements of {name}, where the left and right slopes differ:"
                    " the gradient there is not judged"
                )
        where = misses if misses.any() else np.ones(want.shape, bool)
        error = np.where(where & ~np.isnan(want) & (got != want), np.abs(got - want), 0.0)
        error = np.where(np.isfinite(error), error, np.inf)
        index = tuple(map(int, np.unravel_index(int(np.argmax(error)), error.shape))) if error.size else ()
        largest = float(error[index]) / self._scale(want) if error.size else 0.0
        if not misses.any():
            if _largest(want) <= self.rtol * self._scale(want):
                remark = remark or "zero for this input, so hardly tested"
            return GradientComparison(name, want.shape, largest, True, remark=remark)
        hint = hint_for(key, got, want, self.context())
        numbers = float(got[index]), float(want[index])
        return GradientComparison(name, want.shape, largest, False, index, *numbers, hint, remark)

    def context(self) -> Context:
        """The values that hints compare with. They include gradients for another batch, if JAX can trace the layer."""
        if not hasattr(self, "_known_context"):
            others: dict[Key, Any] = {}
            theirs: dict[Key, Any] = {}
            try:
                if self.reference.by_jax:
                    others = by_jax(self.subject.on(self.subject.other_args()), self.dout)
                run = self.subject.run()
                run.clear()
                run.forward(self.subject.other_args())
                theirs = run.backward(self.dout) | run.grads()
            except Exception:  # the layer may not accept another batch
                pass
            right = {self.name(name): grad for name, grad in self.reference.grads.items()}
            params = self.subject.run().params()
            self._known_context = Context(self.subject.args, self.dout, params, right, others, theirs, self.rtol)
        return self._known_context

    def _kinks(self, key: Key, got: Any, want: Any, misses: Any) -> Any:
        """True for wrong elements at a kink of forward. None if finite differences show that `want` is wrong."""
        probe = Differences(self.subject, self.dout)
        kinks, scale = np.zeros(want.shape, bool), self._scale(want)
        errors = np.where(misses, np.nan_to_num(np.abs(got - want), nan=np.inf), -1.0)
        order = np.argsort(-errors, axis=None)[: int(misses.sum())]
        tested = order[:_MOST_KINKS]
        for count, place in enumerate(tested):
            index = tuple(map(int, np.unravel_index(int(place), want.shape)))
            slope = probe.smooth(key, index, scale)
            if slope is None or np.isnan(slope) and not np.isfinite(want[index]):
                kinks[index] = bool(np.isfinite(got[index]))
            elif self.reference.by_jax and not np.isnan(slope):
                if not abs(slope - want[index]) <= probe.coarse * max(abs(slope), scale):
                    return None
            if count >= 4 and not kinks.any():
                return kinks  # they are plainly wrong
        if len(order) > len(tested) and kinks.sum() == len(tested) and self._right_nearby(key):
            kinks = misses.copy()  # all the worst elements are at kinks, and near them, without kinks, all is right
        return kinks

    def _right_nearby(self, key: Key) -> bool:
        """True if a gradient is right for arguments that differ slightly from these."""
        rng = np.random.default_rng(self.subject.settings.seed)
        args = list(self.subject.args)
        for i in self.subject.floating:
            args[i] = args[i] + 1e-3 * max(float(args[i].std()), 1e-3) * rng.normal(size=args[i].shape)
        subject = self.subject.on(tuple(args))
        run = subject.run()
        run.clear()
        run.forward()
        got = run.backward(self.dout) | run.grads()
        want = by_jax(subject, self.dout) if self.reference.by_jax else Differences(subject, self.dout).all()
        return self.close(got.get(key), want[key])

    def close(self, one: Any, other: Any) -> bool:
        if one is None or other is None:
            return (one is None or not np.any(one)) and (other is None or not np.any(other))
        if np.shape(one) != np.shape(other):
            return False
        near = _near(one, other, 10 * self.rtol * self._scale(other))
        return bool((near | np.isnan(other)).all())


def _holds_arrays(value: Any) -> bool:
    """True if a list, tuple or dict has floating arrays somewhere inside."""
    found: list[Any] = []

    def enter(path: str, part: Any) -> bool:
        found.extend([part] if is_floating(part) else [])
        return isinstance(part, list | tuple | dict)

    walk(value, enter)
    return bool(found)


def _near(one: Any, other: Any, within: float) -> Any:
    return (one == other) | (np.abs(one - other) <= within)  # infinite ones are equal


def _largest(array: Any) -> float:
    """The largest absolute value of the finite elements of an array."""
    return float(np.max(np.abs(array), where=np.isfinite(array), initial=0.0))
