"""Schedule-free AdamW: an average in place of a decaying learning rate."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ...module.parameter import wide_dtype
from ..declaration import BELOW_ONE, Rate, setting
from ..optimizer import Optimizer
from .pieces import bias_correction


class ScheduleFreeAdamWState(NamedTuple):
    """The state of ScheduleFreeAdamW for one parameter."""

    z: jax.Array  # the steps themselves; the parameter's shape and dtype
    exp_avg_sq: jax.Array  # the parameter's shape and dtype
    weight_sum: jax.Array  # a number of at least float32
    lr_max: jax.Array  # a number of at least float32


class ScheduleFreeAdamW(Optimizer):
    r"""AdamW without momentum at z, gradients at y, and an average x to use in the end; modules hold y.

        v ← β₂ v + (1 - β₂) g²
        u ← g / (√(v / (1 - β₂ᵗ)) + ε) + λ y
        w ← (the largest lr so far)^r,  c ← w / (sum of all w)
        y ← (1 - c) y + c z - lr (1 - β₁ (1 - c)) u
        z ← z - lr u

    With x = (y - (1 - β₁) z) / β₁, which `averaged` gives, this is x ← (1 - c) x + c z and y = β₁ x + (1 - β₁) z.

    Raises:
        ValueError, TypeError: as `Optimizer`.

    Source: `optax.contrib.schedule_free_adamw`; Defazio et al., "The Road Less Scheduled", 2024.

    Differs from optax: with a schedule for `lr`, w is from the same step's lr, not from the next one's; z begins at the
    parameter as the first step finds it.

    Example:
        >>> import jax
        >>> from types import SimpleNamespace
        >>> from minitorch_jax import nn, optim
        >>> model = nn.Linear(2, 1, key=jax.random.key(0))
        >>> opt = optim.ScheduleFreeAdamW([model], lr=0.01)
        >>> state = SimpleNamespace(**opt.state_dict()["state"]["0.bias"])
        >>> x = opt.averaged(model.bias, state, opt)  # what to evaluate with; `bias` itself before the first step
    """

    lr: Rate = setting(default=0.0025, doc="learning rate; a schedule need not decay")
    betas: tuple[float, float] = setting(default=(0.9, 0.999), within=BELOW_ONE, doc="(β₁, β₂), each; β₁ > 0")
    eps: float = setting(default=1e-8, doc="ε")
    weight_decay: float = setting(default=0.0, doc="λ; decoupled")
    warmup_steps: float = setting(default=0, doc="over how many steps the learning rate rises from 0 to lr")
    weight_lr_power: float = setting(default=2.0, doc="r")

    def _validate(self) -> None:
        if self.betas[0] == 0:
            raise ValueError(f"ScheduleFreeAdamW: betas[0] must be > 0; got betas={self.betas!r}")

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        zero = jnp.zeros((), wide_dtype(p.dtype))
        return ScheduleFreeAdamWState(jnp.copy(p), jnp.zeros_like(p), zero, jnp.zeros_like(zero))

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        (beta1, beta2), (rest1, rest2) = h.betas, h.one_minus.betas
        z = jnp.where(h.t == 1, p, s.z)
        v = beta2 * s.exp_avg_sq + rest2 * g * g
        u = g / (jnp.sqrt(v / bias_correction(rest2, h.t)) + h.eps) + h.weight_decay * p
        lr_max = jnp.maximum(s.lr_max, h.lr * _warmth(h.t, h))
        weight = lr_max**h.weight_lr_power
        weight_sum = s.weight_sum + weight
        c = jnp.where(weight_sum > 0, weight / jnp.where(weight_sum > 0, weight_sum, 1), 0)
        lr = h.lr * _warmth(h.t - 1, h)
        y = (1 - c) * p + c * z - lr * (rest1 + beta1 * c) * u
        return y, ScheduleFreeAdamWState(z - lr * u, v, weight_sum, lr_max)

    @staticmethod
    def averaged(p: jax.Array, s: Any, h: Any) -> jax.Array:
        """The average x, to evaluate and to deploy, of a parameter `p` with state `s` (`.z`) and `h.betas`."""
        return (p - (1 - h.betas[0]) * s.z) / h.betas[0]


def _warmth(t: Any, h: SimpleNamespace) -> Any:
    """The share of the learning rate at step `t`."""
    return jnp.where(h.warmup_steps > 0, jnp.minimum(t / jnp.maximum(h.warmup_steps, 1), 1), 1)
