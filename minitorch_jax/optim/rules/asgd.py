"""Averaged stochastic gradient descent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ...module.parameter import wide_dtype
from ..declaration import FINITE, Rate, setting
from ..optimizer import Optimizer
from .pieces import coupled


class ASGDState(NamedTuple):
    """The state of ASGD for one parameter."""

    eta: jax.Array  # the learning rate of the next step, a number of at least float32
    mu: jax.Array  # the weight of the next parameter in the average, a number of at least float32
    ax: jax.Array  # the average; the parameter's shape and dtype


class ASGD(Optimizer):
    r"""Gradient descent with a decaying learning rate, and the average of the parameters from step t₀ on in its state.

        g ← g + κ p
        p ← (1 - λ η) p - η g
        x ← x + μ (p - x)
        η ← lr / (1 + λ lr t)^α  (lr before the first step)
        μ ← 1 / max(1, t - t₀)  (1 before the first step)

    Raises:
        ValueError, TypeError: as `Optimizer`.

    Source: `torch.optim.ASGD`; Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992.

    Differs from PyTorch: a parameter without a gradient is stepped with zeros, not left out; for bfloat16 and float16 a
    step is computed in float32 and rounded once.

    Example:
        >>> import jax
        >>> from minitorch_jax import nn, optim
        >>> model = nn.Linear(2, 1, key=jax.random.key(0))
        >>> opt = optim.ASGD([model])
        >>> opt
        ASGD([Linear], lr=0.01, lambd=0.0001, alpha=0.75, t0=1000000.0, weight_decay=0)
        >>> opt.state_dict()["state"]["0.weight"]["ax"]
        Array([[0., 0.]], dtype=float32)
    """

    lr: Rate = setting(default=1e-2)
    lambd: float = setting(default=1e-4, within=FINITE, doc="λ")
    alpha: float = setting(default=0.75, within=FINITE, doc="α")
    t0: float = setting(default=1e6, within=FINITE, doc="t₀")
    weight_decay: float = setting(default=0, doc="κ; coupled, added to the gradient")
    maximize: bool = setting(default=False, doc="ascend instead of descend", kw_only=True)

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        dtype = wide_dtype(p.dtype)
        return ASGDState(jnp.zeros((), dtype), jnp.ones((), dtype), jnp.zeros_like(p))

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        g = coupled(p, g, h)
        eta = jnp.where(h.t == 1, h.lr, s.eta)
        p = p * (1 - h.lambd * eta) - eta * g
        ax = jnp.where(s.mu == 1, p, s.ax + s.mu * (p - s.ax))
        eta = h.lr / (1 + h.lambd * h.lr * h.t) ** h.alpha
        return p, ASGDState(eta, 1 / jnp.maximum(h.t - h.t0, 1), ax)
