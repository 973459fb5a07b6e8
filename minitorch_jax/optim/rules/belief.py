"""Adam with another second moment: AdaBelief, Yogi."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..declaration import BELOW_ONE, Rate, setting
from ..optimizer import Optimizer
from .pieces import bias_correction, in_place


class AdaBeliefState(NamedTuple):
    """The state of AdaBelief for one parameter: arrays of its shape and dtype."""

    exp_avg: jax.Array
    exp_avg_var: jax.Array


class YogiState(NamedTuple):
    """The state of Yogi for one parameter: arrays of its shape and dtype."""

    exp_avg: jax.Array
    exp_avg_sq: jax.Array


class AdaBelief(Optimizer):
    r"""Adam, divided by how far gradients are from their running average.

        m ← β₁ m + (1 - β₁) g
        v ← β₂ v + (1 - β₂) (g - m)² + ε̄
        m̂ = m / (1 - β₁ᵗ), or β₁ m / (1 - β₁ᵗ⁺¹) + (1 - β₁) g / (1 - β₁ᵗ) (nesterov)
        p ← p - lr m̂ / (√(v / (1 - β₂ᵗ)) + ε)

    Raises:
        ValueError, TypeError: as `Optimizer`.

    Source: `optax.adabelief`; Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed
    Gradients", 2020.

    Differs from optax: `lr` has a default.

    Example:
        >>> import jax
        >>> from minitorch_jax import nn, optim
        >>> model = nn.Linear(2, 1, key=jax.random.key(0))
        >>> optim.AdaBelief([model])
        AdaBelief([Linear], lr=0.001, betas=(0.9, 0.999), eps=1e-16, eps_root=1e-16)
    """

    elementwise = True
    lr: Rate = setting(default=1e-3)
    betas: tuple[float, float] = setting(default=(0.9, 0.999), within=BELOW_ONE, doc="(β₁, β₂), each")
    eps: float = setting(default=1e-16, doc="ε")
    eps_root: float = setting(default=1e-16, doc="ε̄")
    nesterov: bool = setting(default=False, doc="Nesterov momentum")

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        return AdaBeliefState(jnp.zeros_like(p), jnp.zeros_like(p))

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        (beta1, beta2), (rest1, rest2) = h.betas, h.one_minus.betas
        m = beta1 * s.exp_avg + rest1 * g
        v = beta2 * s.exp_avg_var + rest2 * (g - m) ** 2 + h.eps_root
        m_hat = m / bias_correction(rest1, h.t)
        if h.nesterov:
            m_hat = beta1 * m / bias_correction(rest1, h.t + 1) + rest1 * g / bias_correction(rest1, h.t)
        return p - h.lr * m_hat / (jnp.sqrt(v / bias_correction(rest2, h.t)) + h.eps), AdaBeliefState(m, v)


class Yogi(Optimizer):
    r"""Adam with a second moment that goes towards the squared gradient by steps of that gradient's size.

        m ← β₁ m + (1 - β₁) g
        v ← v - (1 - β₂) sign(v - g²) g²
        p ← p - lr (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)

    Both averages begin at 1e-6.

    Raises:
        ValueError, TypeError: as `Optimizer`.

    Source: `optax.yogi`; Zaheer et al., "Adaptive Methods for Nonconvex Optimization", 2018.

    Differs from optax: `lr` has a default, the paper's.

    Example:
        >>> import jax
        >>> from minitorch_jax import nn, optim
        >>> model = nn.Linear(2, 1, key=jax.random.key(0))
        >>> optim.Yogi([model])
        Yogi([Linear], lr=0.01, betas=(0.9, 0.999), eps=0.001)
    """

    elementwise = True
    lr: Rate = setting(default=1e-2)
    betas: tuple[float, float] = setting(default=(0.9, 0.999), within=BELOW_ONE, doc="(β₁, β₂), each")
    eps: float = setting(default=1e-3, doc="ε")

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        return YogiState(jnp.full_like(p, 1e-6), jnp.full_like(p, 1e-6))

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        (beta1, _), (rest1, rest2) = h.betas, h.one_minus.betas
        m = beta1 * s.exp_avg + rest1 * g
        v = s.exp_avg_sq - rest2 * jnp.sign(s.exp_avg_sq - g * g) * g * g
        m, v, p = in_place(h, p, exp_avg=m, exp_avg_sq=v)
        return p - h.lr * m / bias_correction(rest1, h.t) / (
            jnp.sqrt(v / bias_correction(rest2, h.t)) + h.eps
        ), YogiState(m, v)
