"""Steps scaled layer by layer, by the norm of the parameter over the norm of the step: LAMB, LARS."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..declaration import BELOW_ONE, Rate, setting
from ..optimizer import Optimizer
from .pieces import bias_correction, moments


class LAMBState(NamedTuple):
    """The state of LAMB for one parameter: arrays of its shape and dtype."""

    exp_avg: jax.Array
    exp_avg_sq: jax.Array


class LARSState(NamedTuple):
    """The state of LARS for one parameter, where momentum is used."""

    momentum_buffer: jax.Array  # of steps, lr included; the parameter's shape and dtype


class LAMB(Optimizer):
    r"""Adam's direction, with a step as long as lr times the norm of the parameter.

        m ← β₁ m + (1 - β₁) g
        v ← β₂ v + (1 - β₂) g²
        u ← (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ) + ε̄) + ε) + λ p
        p ← p - lr ‖p‖ / ‖u‖ u, with 1 for the ratio if either norm is 0

    Raises:
        ValueError, TypeError: as `Optimizer`.

    Source: `optax.lamb`; You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 Minutes", 2019.

    Differs from optax: `lr` has a default; no mask.

    Example:
        >>> import jax
        >>> from minitorch_jax import nn, optim
        >>> model = nn.Linear(2, 1, key=jax.random.key(0))
        >>> optim.LAMB([model], weight_decay=0.01)
        LAMB([Linear], lr=0.001, betas=(0.9, 0.999), eps=1e-06, weight_decay=0.01, eps_root=0.0)
    """

    lr: Rate = setting(default=1e-3)
    betas: tuple[float, float] = setting(default=(0.9, 0.999), within=BELOW_ONE, doc="(β₁, β₂), each")
    eps: float = setting(default=1e-6, doc="ε")
    weight_decay: float = setting(default=0.0, doc="λ; part of the direction whose norm is taken")
    eps_root: float = setting(default=0.0, doc="ε̄")

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        return LAMBState(jnp.zeros_like(p), jnp.zeros_like(p))

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        rest1, rest2 = h.one_minus.betas
        m, v = moments(g, s, h)
        u = (
            m / bias_correction(rest1, h.t) / (jnp.sqrt(v / bias_correction(rest2, h.t) + h.eps_root) + h.eps)
            + h.weight_decay * p
        )
        return p - h.lr * _trust_ratio(p, u) * u, LAMBState(m, v)


class LARS(Optimizer):
    r"""SGD with momentum, with a gradient as long as a fixed share of the norm of the parameter.

        u ← g + λ p
        d ← lr τ ‖p‖ / (‖u‖ + ε) u, with 1 for the ratio, τ included, if either norm is 0
        b ← μ b + d
        p ← p - (d + μ b) (nesterov), or p - b

    Raises:
        ValueError, TypeError: as `Optimizer`.

    Source: `optax.lars`; You et al., "Large Batch Training of Convolutional Networks", 2017.

    Differs from optax: `lr` has a default; no masks; without momentum there is no state.

    Example:
        >>> import jax
        >>> from minitorch_jax import nn, optim
        >>> model = nn.Linear(2, 1, key=jax.random.key(0))
        >>> optim.LARS([model], lr=0.5)
        LARS([Linear], lr=0.5, momentum=0.9, weight_decay=0.0, trust_coefficient=0.001, eps=0.0)
    """

    lr: Rate = setting(default=1.0)
    momentum: float = setting(default=0.9, doc="μ")
    weight_decay: float = setting(default=0.0, doc="λ; coupled, added to the gradient")
    trust_coefficient: float = setting(default=0.001, doc="τ")
    eps: float = setting(default=0.0, doc="ε")
    nesterov: bool = setting(default=False, doc="Nesterov momentum")

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        return LARSState(jnp.zeros_like(p)) if h.momentum else ()

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        u = g + h.weight_decay * p
        d = h.lr * _trust_ratio(p, u, h.trust_coefficient, h.eps) * u
        if not s:
            return p - d, s
        b = h.momentum * s.momentum_buffer + d
        return p - (d + h.momentum * b if h.nesterov else b), LARSState(b)


def _trust_ratio(p: jax.Array, u: jax.Array, coefficient: Any = 1, eps: Any = 0) -> jax.Array:
    """How much longer the parameter is than the step; 1 if either is zero."""
    p_sq, u_sq = jnp.sum(p * p), jnp.sum(u * u)
    either = (p_sq == 0) | (u_sq == 0)
    p_norm, u_norm = jnp.sqrt(jnp.where(either, 1, p_sq)), jnp.sqrt(jnp.where(either, 1, u_sq))
    return jnp.where(either, 1, coefficient * p_norm / (u_norm + eps))
