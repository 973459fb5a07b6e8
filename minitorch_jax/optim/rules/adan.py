"""Adan: adaptive Nesterov momentum."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..declaration import BELOW_ONE, Rate, setting
from ..optimizer import Optimizer
from .pieces import bias_correction


class AdanState(NamedTuple):
    """The state of Adan for one parameter: arrays of its shape and dtype."""

    exp_avg: jax.Array
    exp_avg_diff: jax.Array
    exp_avg_sq: jax.Array
    pre_grad: jax.Array  # the last gradient


class Adan(Optimizer):
    r"""Adan: Adam with Nesterov momentum estimated from differences of gradients.

        δ ← g - g', or 0 at the first step
        m ← β₁ m + (1 - β₁) g
        v ← β₂ v + (1 - β₂) δ
        n ← β₃ n + (1 - β₃) (g + (1 - β₂) δ)²
        m̂, v̂, n̂ = m / (1 - β₁ᵗ), v / (1 - β₂ᵗ), n / (1 - β₃ᵗ)
        p ← p - lr ((m̂ + (1 - β₂) v̂) / (√(n̂ + ε̄) + ε) + λ p)
        g' ← g

    Raises:
        ValueError, TypeError: as `Optimizer`.

    Source: `optax.adan`; Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models",
    2022.

    Differs from optax: `lr` has a default, the paper's code's; no mask.

    Example:
        >>> import jax
        >>> from minitorch_jax import nn, optim
        >>> model = nn.Linear(2, 1, key=jax.random.key(0))
        >>> optim.Adan([model])
        Adan([Linear], lr=0.001, betas=(0.98, 0.92, 0.99), eps=1e-08, weight_decay=0.0, eps_root=1e-08)
    """

    elementwise = True
    lr: Rate = setting(default=1e-3)
    betas: tuple[float, float, float] = setting(default=(0.98, 0.92, 0.99), within=BELOW_ONE, doc="(β₁, β₂, β₃), each")
    eps: float = setting(default=1e-8, doc="ε")
    weight_decay: float = setting(default=0.0, doc="λ; decoupled")
    eps_root: float = setting(default=1e-8, doc="ε̄")

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        return AdanState(jnp.zeros_like(p), jnp.zeros_like(p), jnp.zeros_like(p), jnp.zeros_like(p))

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        (beta1, beta2, beta3), (rest1, rest2, rest3) = h.betas, h.one_minus.betas
        diff = jnp.where(h.t == 1, 0, g - s.pre_grad)
        m = beta1 * s.exp_avg + rest1 * g
        v = beta2 * s.exp_avg_diff + rest2 * diff
        n = beta3 * s.exp_avg_sq + rest3 * (g + rest2 * diff) ** 2
        u = m / bias_correction(rest1, h.t) + rest2 * v / bias_correction(rest2, h.t)
        d = u / (jnp.sqrt(n / bias_correction(rest3, h.t) + h.eps_root) + h.eps)
        return p - h.lr * (d + h.weight_decay * p), AdanState(m, v, n, g)
