"""Learning rates for each element from its past gradients: Adagrad, Adadelta, RMSprop."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..declaration import Rate, setting
from ..optimizer import Optimizer
from .pieces import coupled


class AdagradState(NamedTuple):
    """The state of Adagrad for one parameter."""

    sum: jax.Array  # the parameter's shape and dtype


class AdadeltaState(NamedTuple):
    """The state of Adadelta for one parameter: arrays of its shape and dtype."""

    square_avg: jax.Array
    acc_delta: jax.Array


class RMSpropState(NamedTuple):
    """The state of RMSprop for one parameter: arrays of its shape and dtype."""

    square_avg: jax.Array
    momentum_buffer: jax.Array | None = None  # where momentum is used
    grad_avg: jax.Array | None = None  # where centered


class Adagrad(Optimizer):
    r"""Adagrad: steps divided by the root of the sum of all squared gradients.

        g ← g + λ p
        G ← G + g²
        p ← p - lr / (1 + (t - 1) η) g / (√G + ε)

    Raises:
        ValueError, TypeError: as `Optimizer`.

    Source: `torch.optim.Adagrad`; Duchi et al., "Adaptive Subgradient Methods for Online Learning and Stochastic
    Optimization", 2011.

    Differs from PyTorch: a parameter without a gradient is stepped with zeros, not left out; for bfloat16 and float16 a
    step is computed in float32 and rounded once.

    Example:
        >>> import jax
        >>> from minitorch_jax import nn, optim
        >>> model = nn.Linear(2, 1, key=jax.random.key(0))
        >>> optim.Adagrad([model])
        Adagrad([Linear], lr=0.01, lr_decay=0, weight_decay=0, initial_accumulator_value=0, eps=1e-10)
    """

    elementwise = True
    lr: Rate = setting(default=1e-2)
    lr_decay: float = setting(default=0, doc="η")
    weight_decay: float = setting(default=0, doc="λ; coupled, added to the gradient")
    initial_accumulator_value: float = setting(default=0, doc="what G starts from")
    eps: float = setting(default=1e-10, doc="ε")
    maximize: bool = setting(default=False, doc="ascend instead of descend", kw_only=True)

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        return AdagradState(jnp.full_like(p, h.initial_accumulator_value))

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        g = coupled(p, g, h)
        total = s.sum + g * g
        lr = h.lr / (1 + (h.t - 1) * h.lr_decay)
        return p - lr * (g / (jnp.sqrt(total) + h.eps)), AdagradState(total)


class Adadelta(Optimizer):
    r"""Adadelta: gradients scaled by the ratio of past steps to past gradients.

        g ← g + λ p
        v ← ρ v + (1 - ρ) g²
        d ← √(a + ε) / √(v + ε) g
        a ← ρ a + (1 - ρ) d²
        p ← p - lr d

    Raises:
        ValueError, TypeError: as `Optimizer`.

    Source: `torch.optim.Adadelta`; Zeiler, "ADADELTA: An Adaptive Learning Rate Method", 2012.

    Differs from PyTorch: as `Adagrad`.

    Example:
        >>> import jax
        >>> from minitorch_jax import nn, optim
        >>> model = nn.Linear(2, 1, key=jax.random.key(0))
        >>> optim.Adadelta([model])
        Adadelta([Linear], lr=1.0, rho=0.9, eps=1e-06, weight_decay=0)
    """

    elementwise = True
    lr: Rate = setting(default=1.0)
    rho: float = setting(default=0.9, within=(0.0, 1.0), doc="ρ")
    eps: float = setting(default=1e-6, doc="ε")
    weight_decay: float = setting(default=0, doc="λ; coupled, added to the gradient")
    maximize: bool = setting(default=False, doc="ascend instead of descend", kw_only=True)

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        return AdadeltaState(jnp.zeros_like(p), jnp.zeros_like(p))

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        g = coupled(p, g, h)
        v = h.rho * s.square_avg + h.one_minus.rho * g * g
        d = jnp.sqrt(s.acc_delta + h.eps) / jnp.sqrt(v + h.eps) * g
        return p - h.lr * d, AdadeltaState(v, h.rho * s.acc_delta + h.one_minus.rho * d * d)


class RMSprop(Optimizer):
    r"""RMSprop: steps divided by the root of a running average of squared gradients.

        g ← g + λ p
        v ← α v + (1 - α) g²
        a ← α a + (1 - α) g (centered)
        d ← g / (√(v - a²) + ε) (centered), or g / (√v + ε)
        b ← μ b + d
        p ← p - lr b, or p - lr d (μ = 0)

    Raises:
        ValueError, TypeError: as `Optimizer`.

    Source: `torch.optim.RMSprop`; Tieleman and Hinton, "Lecture 6.5: RMSprop", 2012; centered: Graves, "Generating
    Sequences With Recurrent Neural Networks", 2013.

    Differs from PyTorch: as `Adagrad`; where rounding makes v - a² negative it counts as 0, not NaN.

    Example:
        >>> import jax
        >>> from minitorch_jax import nn, optim
        >>> model = nn.Linear(2, 1, key=jax.random.key(0))
        >>> optim.RMSprop([model], momentum=0.9, centered=True)
        RMSprop([Linear], lr=0.01, alpha=0.99, eps=1e-08, weight_decay=0, momentum=0.9, centered=True)
    """

    elementwise = True
    lr: Rate = setting(default=1e-2)
    alpha: float = setting(default=0.99, doc="α")
    eps: float = setting(default=1e-8, doc="ε")
    weight_decay: float = setting(default=0, doc="λ; coupled, added to the gradient")
    momentum: float = setting(default=0, doc="μ")
    centered: bool = setting(default=False, doc="divide by an estimate of the standard deviation")
    maximize: bool = setting(default=False, doc="ascend instead of descend", kw_only=True)

    def _validate(self) -> None:
        if self.centered and self.state_dtype == jnp.bfloat16:
            raise ValueError(
                "RMSprop: centered=True divides by the root of v - a², of which two bfloat16 averages leave no correct digit:"
                " leave out `centered` or `state_dtype`"
            )

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        momentum_buffer = jnp.zeros_like(p) if h.momentum else None
        return RMSpropState(jnp.zeros_like(p), momentum_buffer, jnp.zeros_like(p) if h.centered else None)

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        g = coupled(p, g, h)
        v, a, b = h.alpha * s.square_avg + h.one_minus.alpha * g * g, s.grad_avg, s.momentum_buffer
        variance = v
        if h.centered:
            a = h.alpha * a + h.one_minus.alpha * g
            variance = jnp.maximum(v - a * a, 0)
        d = g / (jnp.sqrt(variance) + h.eps)
        if b is not None:
            b = jnp.where(h.momentum > 0, h.momentum * b + d, b)
            d = jnp.where(h.momentum > 0, b, d)
        return p - h.lr * d, RMSpropState(v, b, a)
