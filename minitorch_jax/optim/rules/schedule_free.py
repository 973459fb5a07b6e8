"""Schedule-free AdamW: an average in place of a decaying learning rate."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from ...module.parameter import wide_dtype
from ..optimizer import Optimizer, Options
from .moments import bias_correction


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

    Args:
        modules: a list of modules; see `Optimizer`.
        lr: learning rate, >= 0, or a schedule, which need not decay.
        betas: (β₁, β₂), each in [0, 1), β₁ > 0.
        eps: ε, >= 0.
        weight_decay: λ, >= 0; decoupled.
        warmup_steps: over how many steps the learning rate rises from 0 to lr, >= 0.
        weight_lr_power: r, >= 0.
        **options: `skip_nonfinite`, `track_grad_norm`, `decay_matrices_only`, `master_weights`; see `Optimizer`.

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

    _ranges: ClassVar = {"betas": (0.0, 0.99999994)}

    def __init__(
        self,
        modules: Any,
        lr: Any = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: float = 0,
        weight_lr_power: float = 2.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            modules,
            lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            weight_lr_power=weight_lr_power,
            **options,
        )

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
