"""What schedules share: how they are called, and the checks of their numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...module.checks import LARGEST, as_count, as_number, as_tuple


class Schedule:
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

    def _number(self, name: str, low: float = 0.0, high: float = LARGEST, *, above: bool = False) -> float:
        """A field as a float in [low, high], or (low, high] where it must be `above`."""
        return as_number(type(self).__name__, name, getattr(self, name), low, high, above=above)

    def _count(self, name: str, low: int = 1) -> int:
        """A field as an int >= low."""
        return as_count(type(self).__name__, name, getattr(self, name), low)


def as_steps(owner: str, name: str, value: Any, num_parts: int | None = None) -> tuple[int, ...]:
    """Increasing steps; if they are boundaries of some parts, as many as it takes."""
    steps = tuple([as_count(owner, f"{name}[{i}]", item, 0) for i, item in enumerate(as_tuple(owner, name, value))])
    if any(b <= a for a, b in zip(steps, steps[1:], strict=False)):
        raise ValueError(f"{owner}: {name} must increase; got {value!r}")
    if num_parts is not None and len(steps) + 1 != num_parts:
        raise ValueError(f"{owner}: {name} must be one fewer than what they divide; got {len(steps)} for {num_parts}")
    return steps
