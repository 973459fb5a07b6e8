"""The right derivatives of a layer: differences of its own forward in float64, along directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .subject import Key, Subject, outputs_of

_EPS = float(np.finfo(np.float64).eps)


class MovedError(Exception):
    """Forward raises for values that differ slightly from the layer's own."""


@dataclass(frozen=True)
class Slope:
    """The derivative along a direction. `error` bounds its own error; `kink` is True if the slopes on both sides differ."""

    value: float
    error: float
    kink: bool

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.value))

    def near(self, value: float, within: float) -> bool:
        return bool(abs(value - self.value) <= within + self.error)


class Slopes:
    """Derivatives of the sum of `dout * output` by a layer's floating arguments and parameters.

    A direction holds an array for each of some of them. It is scaled by the size of the argument or parameter, so that a
    step of 1e-4 changes it by 1e-4 of its size. The derivative is a central difference of fourth order. Its step is the
    first whose result changes little with a step ten times smaller.
    """

    def __init__(self, subject: Subject, dout: Sequence[Any]) -> None:
        self.subject, self.dout = subject, dout
        self.start = self._outputs({}, 0.0)
        self.values: dict[Key, Any] = {i: subject.args[i] for i in subject.floating}
        self.values |= {name: np.asarray(array) for name, array in subject.run().params().items()}
        self.scales = {key: _size(value) or 1.0 for key, value in self.values.items()}
        self.eps = self._rounding()
        self.count = max((each.size for each in [*self.start, *self.values.values()]), default=1)
        # a large array has more elements near a kink, which a smaller step does not reach
        self._first = 0.1 if self.narrow else 1e-4 if self.count < 1000 else 1e-5 if self.count < 20000 else 1e-6
        pairs = zip(self.dout, self.start, strict=True)
        self._size = float(np.sqrt(sum(np.sum(np.square(d * np.asarray(o, np.float64))) for d, o in pairs)))

    @property
    def narrow(self) -> bool:
        """True if the layer's code rounds to fewer bits than float64."""
        return self.eps > 1e-12

    def _rounding(self) -> float:
        """The relative rounding of the layer's code. It rounds to float32 if a very small step does not change the output."""
        found = max(float(np.finfo(each.dtype).eps) if each.dtype.kind == "f" else _EPS for each in self.start)
        if found > 1e-12:
            return found
        rng = np.random.default_rng(0)
        direction = {key: rng.normal(size=value.shape) for key, value in self.values.items()}
        plain, small, large = self.start, self._outputs(direction, 1e-9), self._outputs(direction, 1e-2)
        moved = [a != b for a, b in zip(plain, large, strict=True)]
        still = sum(int(((a == b) & m).sum()) for a, b, m in zip(plain, small, moved, strict=True))
        return float(np.finfo(np.float32).eps) if still > 0.5 * sum(int(m.sum()) for m in moved) else found

    def draw(self, rng: np.random.Generator, key: Key) -> Any:
        return rng.normal(size=self.values[key].shape)

    def product(self, grads: Mapping[Key, Any], direction: Mapping[Key, Any]) -> float:
        """The derivative along a direction that a gradient says. No gradient counts as zeros."""
        return sum(
            float(np.sum(grads[key] * v)) * self.scales[key]
            for key, v in direction.items()
            if grads.get(key) is not None
        )

    def _outputs(self, direction: Mapping[Key, Any], step: float) -> list[Any]:
        run = self.subject.run()
        args = list(self.subject.args)
        params = run.params() if any(isinstance(key, str) for key in direction) else {}
        for key, v in direction.items():
            if isinstance(key, str):
                params[key][...] += step * self.scales[key] * v
            else:
                args[key] = args[key] + step * self.scales[key] * v
        try:
            return [np.array(each) for each in outputs_of(run.forward(args))]
        except Exception as error:
            raise MovedError(
                f"forward() raised {type(error).__name__} for values that differ slightly from those of the network: {error}"
            ) from error

    def _change(self, direction: Mapping[Key, Any], step: float) -> float:
        total = 0.0
        for d, a, b in zip(self.dout, self._outputs(direction, step), self.start, strict=True):
            total += float(np.sum(d * (np.asarray(a, np.float64) - np.asarray(b, np.float64))))
        return total

    def along(self, direction: Mapping[Key, Any]) -> Slope:
        """The derivative along a direction."""
        best = Slope(np.nan, np.inf, False)
        central, jump, h = [], [], self._first
        for _ in range(4 if self.narrow else 8):
            up, down = self._change(direction, h) / h, -self._change(direction, -h) / h
            central.append((up + down) / 2)
            jump.append(abs(up - down))
            if len(central) > 1:
                gap, value = abs(central[-1] - central[-2]), (100 * central[-1] - central[-2]) / 99
                noise = 4 * self.eps * self._size / h
                if np.isfinite(gap) and gap + noise < best.error:
                    kink = jump[-1] > max(jump[-2] / 2, 10 * noise, 1e-9 * abs(value))
                    best = Slope(value, gap + noise, kink)
                if best.error <= 1e-7 * abs(value) or (gap == 0 and not self.narrow):
                    break
            h /= 10
        return best

    def full(self, key: Key) -> Any:
        """The gradient by one argument or parameter, element by element."""
        found = np.empty(self.values[key].shape)
        for index in np.ndindex(found.shape):
            unit = np.zeros(found.shape)
            unit[index] = 1
            found[index] = self.along({key: unit}).value / self.scales[key]
        return found


@dataclass
class Evidence:
    """The slopes along some directions of one argument or parameter."""

    slopes: Slopes
    key: Key
    rtol: float
    directions: list[Any] = field(default_factory=list)
    found: list[Slope] = field(default_factory=list)

    def more(self, rng: np.random.Generator, count: int) -> Evidence:
        for _ in range(count):
            self.directions.append(self.slopes.draw(rng, self.key))
            self.found.append(self.slopes.along({self.key: self.directions[-1]}))
        return self

    def products(self, grad: Any) -> list[float]:
        return [self.slopes.product({self.key: grad}, {self.key: v}) for v in self.directions]

    def within(self, grad: Any, slope: Slope) -> float:
        """The largest difference from a slope that a right gradient can have."""
        size = 0.0 if grad is None else float(np.linalg.norm(grad)) * self.slopes.scales[self.key]
        return self.rtol * max(abs(slope.value), size)

    def fits(self, grad: Any, factor: float = 1.0) -> bool:
        """True if this is the right gradient, as far as the directions show."""
        if grad is not None and np.shape(grad) != self.slopes.values[self.key].shape:
            return False
        pairs = zip(self.products(grad), self.found, strict=True)
        return all(slope.near(mine, factor * self.within(grad, slope)) for mine, slope in pairs)

    @property
    def sharp(self) -> bool:
        """True if the slopes are exact enough to say that a gradient is wrong."""
        return all(s.finite and not s.kink and s.error <= 1e-2 * abs(s.value) + 1e-9 * self.least for s in self.found)

    @property
    def least(self) -> float:
        """The size of the incoming gradient."""
        return float(np.sqrt(sum(float(np.sum(np.square(each))) for each in self.slopes.dout)))

    @property
    def zero(self) -> bool:
        return all(abs(s.value) <= max(s.error, 1e-13 * self.least) for s in self.found)


def _size(array: Any) -> float:
    """The root of the mean square of an array."""
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64)))) if array.size else 0.0
