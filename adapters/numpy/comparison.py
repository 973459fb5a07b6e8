"""Comparison of the gradients from `backward` with the slopes of forward along random directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .differences import Evidence, MovedError, Slopes
from .hints import Context, hint_for
from .objects import is_floating, walk
from .report import GradientComparison
from .subject import Key, Subject, outputs_of, replace_in

_MOST = 400  # an array of at most so many elements is compared element by element, once it is known to be wrong
_WORK = 1e7  # and only if this number times the elements that forward handles is at most so large


class Comparison:
    """The comparison for one layer, with one call and the incoming gradient of its `backward`."""

    slopes: Slopes
    rtol: float
    moved: list[int]  # the arguments to vary: those with a gradient, and so not a target, which may have to sum to 1

    def __init__(self, subject: Subject, dout: Sequence[Any]) -> None:
        self.subject, self.dout = subject, [np.asarray(each, np.float64) for each in dout]
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.unsure: list[str] = []  # reasons why the layer cannot be judged
        self.rng = np.random.default_rng(subject.settings.seed)
        args = enumerate(subject.args)
        nested = [str(i) for i, arg in args if not isinstance(arg, np.ndarray) and _holds_arrays(arg)]
        if nested:
            self.notes.append(
                f"the gradients by arrays inside argument {', '.join(nested)} are not checked: only those by arguments"
                " that are arrays"
            )

    def name(self, key: Key) -> str:
        if isinstance(key, str):
            return key
        return "input" if len(self.subject.floating) == 1 else f"input {key}"

    def prepare(self, got: Mapping[Key, Any]) -> None:
        """Run forward for the slopes, and set the accuracy that `backward` must have."""
        self.slopes = Slopes(self.subject, self.dout)
        floating = self.subject.floating
        self.moved = [i for i in floating if got.get(i) is not None] or floating
        kinds = [np.asarray(each).dtype for each in got.values() if each is not None]
        eps = max([self.slopes.eps, *(float(np.finfo(kind).eps) for kind in kinds if kind.kind == "f")])
        if eps > 1e-12:
            self.notes.append("its code rounds to fewer bits than float64, so the check is less exact")
        rtol = self.subject.settings.rtol
        self.rtol = max(1e-6, min(500 * eps, 0.05)) if rtol is None else rtol
        self._exact = 1e-8 if eps < 1e-12 else self.rtol  # a larger difference has a reason

    def compared(self, got: Mapping[Key, Any]) -> list[GradientComparison]:
        """Compare all gradients: first all along common directions, then each that may be wrong."""
        together = self._together(got)
        return [
            GradientComparison(self.name(key), value.shape, together[key], True)
            if key in together
            else self._compare(key, got.get(key), value.shape, got)
            for key, value in self.slopes.values.items()
        ]

    def _together(self, got: Mapping[Key, Any]) -> dict[Key, float]:
        """The errors of gradients that are right along common directions."""
        sizes = {
            key: float(np.linalg.norm(got[key])) * self.slopes.scales[key]
            for key, value in self.slopes.values.items()
            if got.get(key) is not None and np.shape(got[key]) == value.shape
        }
        most = max([size for size in sizes.values() if np.isfinite(size)], default=0.0)
        # their parts are made equally large, so that none hides the others
        shares = {key: size for key, size in sizes.items() if 1e-3 * most < size < np.inf}
        if not shares:
            return {}
        least, error = min(shares.values()), 0.0
        for _ in range(2):
            direction = {key: self.slopes.draw(self.rng, key) * (least / size) for key, size in shares.items()}
            slope, mine = self.slopes.along(direction), self.slopes.product(got, direction)
            error = max(error, abs(mine - slope.value) / least)
            if (
                slope.kink
                or slope.error > 1e-4 * least
                or not slope.near(mine, self.rtol * least)
                or error > self._exact
            ):
                return {}
        return dict.fromkeys(shares, error)

    def evidence(self, key: Key, slopes: Slopes, count: int = 2) -> Evidence:
        return Evidence(slopes, key, self.rtol).more(np.random.default_rng(self.subject.settings.seed + 1), count)

    def _compare(self, key: Key, got: Any, shape: tuple[int, ...], every: Mapping[Key, Any]) -> GradientComparison:
        name = self.name(key)
        if got is None and not isinstance(key, str):
            return GradientComparison(name, shape, None, True, remark="not computed")
        evidence = self.evidence(key, self.slopes)
        if got is None:
            right = evidence.zero
            hint = "" if right else "backward() computes none"
            return GradientComparison(name, shape, None, right, hint=hint, remark="not computed")
        claimed = got.reshape(shape) if got.size == np.prod(shape) else None
        if claimed is None:
            context = self.context(key, every, evidence)
            return GradientComparison(name, shape, None, False, hint=hint_for(got, None, context))
        if got.shape == shape and evidence.fits(claimed) and all(s.finite and not s.kink for s in evidence.found):
            if evidence.zero:
                return self._at_zero(key, name, shape, every)
            remark = self._epsilon(key, name, evidence, claimed) if self._error(evidence, claimed) > self._exact else ""
            return GradientComparison(name, shape, self._error(evidence, claimed), True, remark=remark)
        if got.shape != shape:
            right = evidence.fits(claimed)
            context = self.context(key, every, evidence)
            error = self._error(evidence, claimed)
            return GradientComparison(name, shape, error, False, hint=hint_for(got, None, context, right))
        if not evidence.sharp:
            return self._nearby(key, name, shape)
        if remark := self._epsilon(key, name, evidence, claimed):
            return GradientComparison(name, shape, self._error(evidence, claimed), True, remark=remark)
        if np.isfinite(claimed).all() and self._rests_on_epsilon(self.subject):
            if (there := self._unsaturated(key, name, shape)) is not None:
                return there
        return self._wrong(key, name, claimed, every, evidence)

    def _error(self, evidence: Evidence, grad: Any) -> float:
        size = float(np.linalg.norm(grad)) * evidence.slopes.scales[evidence.key]
        pairs = zip(evidence.products(grad), evidence.found, strict=True)
        return max(
            abs(mine - s.value) / max(abs(s.value), size, 1e-300) if mine != s.value else 0.0 for mine, s in pairs
        )

    def _at_zero(self, key: Key, name: str, shape: tuple[int, ...], every: Mapping[Key, Any]) -> GradientComparison:
        """A right gradient that is zero for this input: it is tested at a point nearby, too."""
        found = self._at(key, self.subject.near(self.rng, 0, self.moved))
        if found is not None and found[0].sharp and not found[0].fits(found[1].get(key)):
            evidence, theirs = found
            return (
                self._wrong(key, name, np.asarray(theirs[key]), theirs, evidence)
                if theirs.get(key) is not None
                else (GradientComparison(name, shape, None, False, hint="backward() computes none"))
            )
        tested = found is not None and not found[0].zero
        return GradientComparison(
            name, shape, 0.0, True, remark="" if tested else "zero for this input, so hardly tested"
        )

    def _rests_on_epsilon(self, subject: Subject) -> bool:
        """True if a small constant decides the output, as in log(y + 1e-7) where y is zero."""
        try:
            plain, smaller = (outputs_of(s.run().forward()) for s in (subject, replace_in(subject, tiny=1e-200)))
        except Exception:
            return False
        return any(not np.allclose(a, b, rtol=1e-2) for a, b in zip(plain, smaller, strict=True))

    def _unsaturated(self, key: Key, name: str, shape: tuple[int, ...]) -> GradientComparison | None:
        """The comparison with smaller arguments, for which no small constant decides the output; None if there are none."""
        for largest in (10.0, 3.0, 1.0):
            subject = self.subject.smaller(largest, self.moved)
            found = None if self._rests_on_epsilon(subject) else self._at(key, replace_in(subject, tiny=1e-200))
            if found is None or not found[0].sharp:
                continue
            evidence, every = found
            got = every.get(key)
            if got is None or np.shape(got) != shape:
                return None
            if not evidence.fits(got):
                return self._wrong(key, name, np.asarray(got), every, evidence, "with smaller arguments")
            self.notes.append(
                f"for this {name}, a small constant decides the output of forward, such as the epsilon in log(y + 1e-7) where"
                f" y is 0: the gradient was judged with arguments of at most {largest:g}, and is right there"
            )
            return GradientComparison(
                name, shape, self._error(evidence, got), True, remark="judged with smaller arguments"
            )
        return None

    def _at(self, key: Key, subject: Subject) -> tuple[Evidence, dict[Key, Any]] | None:
        """The slopes and the gradients from backward at another point. None if the layer does not run there."""
        try:
            run = subject.run()
            run.fill()
            if not all(np.isfinite(each).all() for each in outputs_of(run.forward())):
                return None
            got = run.backward(self.dout) | run.grads()
            return self.evidence(key, Slopes(subject, self.dout)), got
        except Exception:  # the layer may not accept such arguments
            return None

    def _nearby(self, key: Key, name: str, shape: tuple[int, ...]) -> GradientComparison:
        """At a kink, forward has no gradient: backward is judged at a random point nearby."""
        for kind in range(8):
            found = self._at(key, self.subject.near(self.rng, kind, self.moved))
            if found is None or not found[0].sharp:
                continue
            evidence, every = found
            got = every.get(key)
            if got is not None and np.shape(got) == shape and not np.isfinite(got).all():
                continue
            if evidence.fits(got):
                self.notes.append(
                    f"forward has a kink at this {name}, where the left and right slopes differ: the gradient was judged at"
                    " a random point nearby"
                )
                return GradientComparison(name, shape, self._error(evidence, got), True, remark="judged beside a kink")
            return self._wrong(key, name, np.asarray(got), every, evidence, "beside a kink")
        self.unsure.append(f"forward has no derivative by {name}, here or at random points nearby")
        return GradientComparison(name, shape, None, True, remark="not judged")

    def _epsilon(self, key: Key, name: str, evidence: Evidence, claimed: Any) -> str:
        """A remark if a gradient is right once the small constants of forward are all but zero; "" if it is not."""
        try:
            smaller = self.evidence(key, Slopes(replace_in(self.subject, tiny=1e-200), self.dout))
        except MovedError:
            return ""
        error = self._error(evidence, claimed)
        if not smaller.fits(claimed) or not self._error(smaller, claimed) < 0.1 * error:
            return ""
        self.notes.append(
            f"the gradient by {name} differs by {error:.0e} from that of forward, because of a small constant in it, such as"
            " the epsilon in log(y + 1e-7). Without the constant it is right"
        )
        return "right but for an epsilon"

    # -- where it is wrong, and how -----------------------------------------------------------------------------------

    def _wrong(
        self, key: Key, name: str, got: Any, every: Mapping[Key, Any], evidence: Evidence, remark: str = ""
    ) -> GradientComparison:
        evidence.more(self.rng, 2)
        want = None
        if got.size <= _MOST and got.size * evidence.slopes.count <= _WORK:
            want = evidence.slopes.full(key)
            difference = np.where(got == want, 0.0, np.abs(got - want))
            difference = np.where(np.isfinite(difference), difference, np.inf)
            index = tuple(map(int, np.unravel_index(int(np.argmax(difference)), got.shape)))
            size = max(_largest(want), 1e-3 * max(map(_largest, self.dout), default=0.0), 1e-300)
            error, expected = float(difference[index]) / size, float(want[index])
        else:
            index, expected = self._bisected(key, got, evidence)
            error = self._error(evidence, got)
        context = self.context(key, every, evidence)
        hint = hint_for(got, want, context)
        return GradientComparison(
            name, got.shape, error, False, index, float(got[index]), expected, hint, remark, context.factor(got)
        )

    def _bisected(self, key: Key, got: Any, evidence: Evidence) -> tuple[tuple[int, ...], float]:
        """The index of a wrong element, and its right value, by slopes along halves of a direction."""
        slopes, v = evidence.slopes, evidence.directions[0]

        def excess(low: int, high: int) -> float:
            part = np.zeros(v.size)
            part[low:high] = v.reshape(-1)[low:high]
            direction = {key: part.reshape(v.shape)}
            return slopes.product({key: got}, direction) - slopes.along(direction).value

        low, high = 0, v.size
        whole = evidence.products(got)[0] - evidence.found[0].value
        while high - low > 1:
            middle = (low + high) // 2
            left = excess(low, middle)
            if abs(left) >= abs(whole - left):
                high, whole = middle, left
            else:
                low, whole = middle, whole - left
        index = tuple(map(int, np.unravel_index(low, got.shape)))
        unit = np.zeros(got.shape)
        unit[index] = 1
        return index, slopes.along({key: unit}).value / slopes.scales[key]

    def context(self, key: Key, every: Mapping[Key, Any], evidence: Evidence) -> Context:
        """What hints compare with."""

        def fits_another(grad: Any) -> str:
            for other, value in evidence.slopes.values.items():
                if other != key and value.shape == np.shape(grad):
                    found = self.evidence(other, evidence.slopes, 3)
                    if not found.zero and found.fits(grad, 10):
                        return self.name(other)
            return ""

        params = {name: value for name, value in evidence.slopes.values.items() if isinstance(name, str)}
        return Context(
            key, self.subject.args, self.dout, params, evidence, fits_another, lambda: self._stale(key, every)
        )

    def _stale(self, key: Key, got: Mapping[Key, Any]) -> str:
        """The array that backward uses, forward does not, and neither sets: a cache of an earlier call."""
        for name in self.subject.kept:
            shift = np.random.default_rng(0).normal(size=np.shape(self.subject.arrays[name]))
            run = replace_in(self.subject, shifts={name: shift}).run()
            try:
                run.fill()
                run.forward()
                moved = (run.backward(self.dout) | run.grads()).get(key)
            except Exception:
                continue
            if not self.close(moved, got.get(key)) and not self.subject.matters(name):
                return name
        return ""

    def close(self, one: Any, other: Any) -> bool:
        """True if two results of backward are equal but for rounding."""
        if one is None or other is None:
            return (one is None or not np.any(one)) and (other is None or not np.any(other))
        if np.shape(one) != np.shape(other):
            return False
        near = (one == other) | (np.abs(one - other) <= 10 * self.rtol * max(_largest(other), 1e-300))
        return bool((near | np.isnan(other)).all())


def _holds_arrays(value: Any) -> bool:
    """True if a list, tuple or dict has floating arrays somewhere inside."""
    found: list[Any] = []

    def enter(path: str, part: Any) -> bool:
        found.extend([part] if is_floating(part) else [])
        return isinstance(part, list | tuple | dict)

    walk(value, enter)
    return bool(found)


def _largest(array: Any) -> float:
    """The largest absolute value of the finite elements of an array."""
    return float(np.max(np.abs(array), where=np.isfinite(array), initial=0.0))
