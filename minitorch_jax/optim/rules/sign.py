"""Lion: steps along the sign of momentum."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from ..optimizer import Optimizer, Options
from .moments import after


class LionState(NamedTuple):
    """The state of Lion for one parameter."""

    exp_avg: jax.Array  # the parameter's shape and dtype


class Lion(Optimizer):
    r"""Lion: steps of the size lr in every element, along the sign of an interpolation of momentum and gradient.

        d ← sign(β₁ m + (1 - β₁) g)
        m ← β₂ m + (1 - β₂) g
        p ← p - lr (d + λ p)

    Args:
        modules: a list of modules; see `Optimizer`.
        lr: learning rate, >= 0, or a schedule.
        betas: (β₁, β₂), each in [0, 1).
        weight_decay: λ, >= 0; decoupled.
        **options: `skip_nonfinite`, `track_grad_norm`, `decay_matrices_only`, `master_weights`; see `Optimizer`.

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

    _ranges: ClassVar = {"betas": (0.0, 0.99999994)}
    elementwise = True

    def __init__(
        self,
        modules: Any,
        lr: Any = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-3,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(modules, lr, betas=betas, weight_decay=weight_decay, **options)

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        return LionState(jnp.zeros_like(p))

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        (beta1, beta2), (rest1, rest2) = h.betas, h.one_minus.betas
        d = jnp.sign(beta1 * s.exp_avg + rest1 * g)
        p = p - h.lr * (d + h.weight_decay * p)
        return p, LionState(after(p, s.exp_avg, beta2 * s.exp_avg + rest2 * g))
