"""Lion: steps along the sign of momentum."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..declaration import BELOW_ONE, Rate, setting
from ..optimizer import Optimizer
from .pieces import after


class LionState(NamedTuple):
    """The state of Lion for one parameter."""

    exp_avg: jax.Array  # the parameter's shape and dtype


class Lion(Optimizer):
    r"""Lion: steps of the size lr in every element, along the sign of an interpolation of momentum and gradient.

        d ← sign(β₁ m + (1 - β₁) g)
        m ← β₂ m + (1 - β₂) g
        p ← p - lr (d + λ p)

    Raises:
        ValueError, TypeError: as `Optimizer`.

    Source: `optax.lion`; Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023.

    Differs from optax: `lr` has a default, the paper's code's; no mask.

    Example:
        >>> import jax
        >>> from minitorch_jax import nn, optim
        >>> model = nn.Linear(2, 1, key=jax.random.key(0))
        >>> optim.Lion([model])
        Lion([Linear], lr=0.0001, betas=(0.9, 0.99), weight_decay=0.001)
    """

    elementwise = True
    lr: Rate = setting(default=1e-4)
    betas: tuple[float, float] = setting(default=(0.9, 0.99), within=BELOW_ONE, doc="(β₁, β₂), each")
    weight_decay: float = setting(default=1e-3, doc="λ; decoupled")

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        return LionState(jnp.zeros_like(p))

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        (beta1, beta2), (rest1, rest2) = h.betas, h.one_minus.betas
        d = jnp.sign(beta1 * s.exp_avg + rest1 * g)
        p = p - h.lr * (d + h.weight_decay * p)
        return p, LionState(after(p, s.exp_avg, beta2 * s.exp_avg + rest2 * g))
