"""Resilient backpropagation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from ..optimizer import Optimizer, Options


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

    Args:
        modules: a list of modules; see `Optimizer`.
        lr: the first step size, >= 0; without effect later.
        etas: (η₋, η₊), with 0 < η₋ < 1 < η₊.
        step_sizes: (s_min, s_max).
        maximize: ascend instead of descend.
        **options: `skip_nonfinite`, `track_grad_norm`, `decay_matrices_only`, `master_weights`; see `Optimizer`.

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

    _ranges: ClassVar = {"step_sizes": (-3.4e38, 3.4e38)}
    elementwise = True

    def __init__(
        self,
        modules: Any,
        lr: Any = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(modules, lr, etas=etas, step_sizes=step_sizes, maximize=maximize, **options)

    def _validate(self) -> None:
        if not 0 < self.etas[0] < 1 < self.etas[1]:
            raise ValueError(f"Rprop: etas must be (η₋, η₊) with 0 < η₋ < 1 < η₊; got {self.etas!r}")

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        return RpropState(jnp.zeros_like(p), jnp.zeros_like(p))

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        (minus, plus), (smallest, largest) = h.etas, h.step_sizes
        g = -g if h.maximize else g
        agreement = jnp.sign(g * s.prev)
        eta = jnp.where(agreement > 0, plus, jnp.where(agreement < 0, minus, 1))
        size = jnp.clip(eta * jnp.where(h.t == 1, h.lr, s.step_size), smallest, largest)
        g = jnp.where(agreement < 0, 0, g)
        return p - jnp.sign(g) * size, RpropState(g, size)
