"""Resilient backpropagation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..declaration import FINITE, Rate, setting
from ..optimizer import Optimizer
from .pieces import ascended


class RpropState(NamedTuple):
    """The state of Rprop for one parameter: arrays of its shape and dtype."""

    prev: jax.Array  # the last gradient, 0 where it was not followed
    step_size: jax.Array


class Rprop(Optimizer):
    r"""Steps whose sizes grow while the gradient keeps its sign, and shrink when it changes.

        s ← lr at the first step
        η ← η₊ where g g' > 0, η₋ where g g' < 0, else 1
        s ← η s, within [s_min, s_max]
        g ← 0 where η = η₋
        p ← p - sign(g) s
        g' ← g

    Raises:
        ValueError, TypeError: as `Optimizer`.

    Source: `torch.optim.Rprop`; Riedmiller and Braun, "A Direct Adaptive Method for Faster Backpropagation Learning: The
    RPROP Algorithm", 1993.

    Differs from PyTorch: a parameter without a gradient is stepped with zeros, not left out; for bfloat16 and float16 a
    step is computed in float32 and rounded once.

    Example:
        >>> import jax
        >>> from minitorch_jax import nn, optim
        >>> model = nn.Linear(2, 1, key=jax.random.key(0))
        >>> optim.Rprop([model])
        Rprop([Linear], lr=0.01, etas=(0.5, 1.2), step_sizes=(1e-06, 50))
    """

    elementwise = True
    lr: Rate = setting(default=1e-2, doc="the first step size; without effect later")
    etas: tuple[float, float] = setting(default=(0.5, 1.2), doc="(η₋, η₊); 0 < η₋ < 1 < η₊")
    step_sizes: tuple[float, float] = setting(default=(1e-6, 50), within=FINITE, doc="(s_min, s_max)")
    maximize: bool = setting(default=False, doc="ascend instead of descend", kw_only=True)

    def _validate(self) -> None:
        if not 0 < self.etas[0] < 1 < self.etas[1]:
            raise ValueError(f"Rprop: etas must be (η₋, η₊) with 0 < η₋ < 1 < η₊; got {self.etas!r}")

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        return RpropState(jnp.zeros_like(p), jnp.zeros_like(p))

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        (minus, plus), (smallest, largest) = h.etas, h.step_sizes
        g = ascended(g, h)
        agreement = jnp.sign(g * s.prev)
        eta = jnp.where(agreement > 0, plus, jnp.where(agreement < 0, minus, 1))
        size = jnp.clip(eta * jnp.where(h.t == 1, h.lr, s.step_size), smallest, largest)
        g = jnp.where(agreement < 0, 0, g)
        return p - jnp.sign(g) * size, RpropState(g, size)
