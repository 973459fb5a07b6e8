"""The float hyperparameters of an optimizer: one vector in one cell, read and assigned by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import cell as cells
from ..cell import Cell

_LARGEST = float(np.finfo(np.float32).max)


class Hyperparameters:
    """Numbers, tuples of numbers, and (for those allowed one) schedules, by name.

    The compiled update takes the vector, so a new value never compiles again. A number is read back as it was assigned,
    for as long as the vector is the one made from it.
    """

    def __init__(self, owner: str, ranges: Mapping[str, tuple[float, float]], given: dict[str, Any]) -> None:
        self.owner, self.ranges = owner, ranges
        for name, value in given.items():
            self.check(name, value)
        self.given = given
        self.schedules = {name: value for name, value in given.items() if callable(value)}
        self.layout = _layout(given)
        self.cell = Cell(_vector(given), "hyperparameters", birth=cells.birth_here())
        self.exact: Any = self.cell.value  # the vector that `given` was brought into

    @classmethod
    def rebuilt(cls, owner: str, ranges: Any, layout: Any, schedules: dict[str, Any], cell: Cell) -> Hyperparameters:
        """For a copy of an optimizer, around a cell with a leaf in it."""
        self = object.__new__(cls)
        self.owner, self.ranges, self.layout, self.schedules, self.cell = owner, ranges, layout, schedules, cell
        self.given = {name: (0.0,) * length if length else 0.0 for name, _, length in layout} | schedules
        self.exact = None
        return self

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError unless `value` fits hyperparameter `name`."""
        if (name == "lr" and callable(value)) or isinstance(value, jax.core.Tracer):
            return
        low, high = self.ranges.get(name, (0.0, _LARGEST))
        for item in value if isinstance(value, tuple) else (value,):
            try:
                bad = isinstance(item, bool | str) or np.shape(item) != ()
                number = math.nan if bad else float(item)
            except (TypeError, ValueError):
                number = math.nan
            if not (low <= number <= high):
                span = f">= {low:g}" if high == _LARGEST else f"in [{low:g}, {high:g}]"
                what = "a finite number" if name != "lr" else "a finite number, or a schedule (a function of the step),"
                raise ValueError(f"{self.owner}: {name} must be {what} {span}; got {value!r}")

    def get(self, name: str, num_steps: Callable[[], Any]) -> Any:
        """The value now: as it was given, or what a schedule says at `num_steps()`."""
        if name in self.schedules:
            return _short(self.schedules[name](num_steps()))
        vector = self.cell.value
        if vector is self.exact:
            return self.given[name]
        start, length = self._place(name)
        if length:
            return tuple(_short(vector[..., start + i]) for i in range(length))
        return _short(vector[..., start])

    def set(self, name: str, value: Any, owner: Any) -> None:
        """Assign a value; in a trace, to the traced vector."""
        self.check(name, value)
        label = f"{self.owner}.{name}"
        start, length = self._place(name)
        if length and (not isinstance(value, tuple) or len(value) != length):
            raise ValueError(f"{label} must be a tuple of {length} numbers; got {value!r}")
        if callable(value) or name in self.schedules:
            cells.check_writable(self.cell, label, owner)
            self.schedules = {k: v for k, v in self.schedules.items() if k != name}
            self.schedules |= {name: value} if callable(value) else {}
            cells.structure_changed()
        vector = self.cell.value
        if vector is self.exact and not isinstance(value, jax.core.Tracer):
            given = {**self.given, name: value}
            exact = _vector(given)
            cells.write(self.cell, exact, label, owner)
            self.given, self.exact = given, exact
        elif not callable(value):
            vector = jnp.asarray(vector)
            for i, item in enumerate(value if isinstance(value, tuple) else (value,)):
                vector = vector.at[..., start + i].set(jnp.asarray(item, vector.dtype))
            cells.write(self.cell, vector, label, owner)

    def numbers(self) -> list[float]:
        """The vector, as exact as it was given."""
        numbers: list[float] = []
        for name in self.given:
            value = 0.0 if name in self.schedules else self.get(name, int)
            numbers += value if isinstance(value, tuple) else (float(value),)
        return numbers

    def given_number(self, name: str) -> Any:
        """A value that decides about structure (is there a state for momentum?), even where the vector is traced."""
        return self.get(name, int) if self.is_plain() and name not in self.schedules else self.given[name]

    def is_plain(self) -> bool:
        """Whether the numbers are known, and those of one optimizer."""
        vector = self.cell.value
        plain = isinstance(vector, jax.Array | np.ndarray) and not isinstance(vector, jax.core.Tracer)
        return plain and vector.ndim == 1

    def _place(self, name: str) -> tuple[int, int]:
        return next((start, length) for key, start, length in self.layout if key == name)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "exact": self.exact is self.cell.value}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.exact = self.cell.value if state["exact"] else None


def _layout(given: Mapping[str, Any]) -> tuple[tuple[str, int, int], ...]:
    """(name, start, length; 0 for a number) of each in the vector."""
    layout, start = [], 0
    for name, value in given.items():
        length = len(value) if isinstance(value, tuple) else 0
        layout.append((name, start, length))
        start += max(length, 1)
    return tuple(layout)


def _vector(given: Mapping[str, Any]) -> Any:
    if any(isinstance(value, jax.core.Tracer) for value in given.values()):
        return jnp.stack([jnp.asarray(value, jnp.result_type(float)) for value in given.values()])
    numbers: list[float] = []
    for value in given.values():
        numbers += (0.0,) if callable(value) else value if isinstance(value, tuple) else (float(value),)
    return jnp.asarray(np.array(numbers, jnp.result_type(float)))


def _short(value: Any) -> Any:
    """A concrete number as the shortest float that stands for it: 0.1, not 0.10000000149."""
    if isinstance(value, jax.core.Tracer) or np.shape(value) != ():
        return value
    return float(str(np.asarray(value)[()]))
