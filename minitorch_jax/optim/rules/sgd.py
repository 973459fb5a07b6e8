"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..declaration import FINITE, setting
from ..optimizer import Optimizer
from .pieces import ascended, decayed, in_place


class SGDState(NamedTuple):
    """The state of SGD for one parameter, where momentum is used."""

    momentum_buffer: jax.Array  # the parameter's shape and dtype


class SGD(Optimizer):
    r"""Stochastic gradient descent, with momentum, dampening, weight decay and Nesterov's variant.

        g ← g + λ p
        b ← g at the first step, μ b + (1 - τ) g after it
        d ← g + μ b (nesterov), b (momentum), or g (μ = 0)
        p ← p - lr d

    Raises:
        ValueError, TypeError: as `Optimizer`; for nesterov without momentum or with dampening.

    Source: `torch.optim.SGD`; Sutskever et al., "On the importance of initialization and momentum", 2013.

    Differs from PyTorch: `lr` defaults to 0.01; a parameter without a gradient is stepped with zeros, not left out; for
    bfloat16 and float16 a step is computed in float32 and rounded once.

    Example:
        >>> import jax
        >>> from minitorch_jax import nn, optim
        >>> model = nn.Linear(2, 1, key=jax.random.key(0))
        >>> opt = optim.SGD([model], lr=0.1, momentum=0.9, weight_decay=1e-4)
        >>> opt
        SGD([Linear], lr=0.1, momentum=0.9, dampening=0, weight_decay=0.0001)
    """

    elementwise = True
    momentum: float = setting(default=0, doc="μ")
    dampening: float = setting(default=0, within=FINITE, doc="τ")
    weight_decay: float = setting(default=0, doc="λ; coupled, added to the gradient")
    nesterov: bool = setting(default=False, doc="Nesterov momentum; needs momentum > 0 and dampening = 0")
    maximize: bool = setting(default=False, doc="ascend instead of descend", kw_only=True)

    def _validate(self) -> None:
        if self.nesterov and (self.momentum <= 0 or self.dampening != 0):
            raise ValueError("SGD: nesterov needs a momentum > 0 and zero dampening")

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        return SGDState(jnp.zeros_like(p)) if h.momentum else ()

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        g = ascended(g, h)
        if not s:
            return p - h.lr * (g + h.weight_decay * p), s
        keep = jnp.where(h.momentum == 0, 1, h.momentum)  # without momentum b stays as it is
        take = jnp.where(h.momentum == 0, 0, jnp.where(h.t == 1, 1, h.one_minus.dampening))
        b = keep * s.momentum_buffer + take * decayed(g, p, h.weight_decay)  # at t = 1 it is zeros
        b, p = in_place(h, p, momentum_buffer=b)
        gp = decayed(g, p, h.weight_decay)
        d = gp + h.momentum * b if h.nesterov else jnp.where(h.momentum == 0, gp, b)
        return p - h.lr * d, SGDState(b)
