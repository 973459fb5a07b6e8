"""Learning rates for each element from its past gradients: Adagrad, Adadelta, RMSprop."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from ..optimizer import Optimizer, Options
from .moments import decayed


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

    Args:
        modules: a list of modules; see `Optimizer`.
        lr: learning rate, >= 0, or a schedule.
        lr_decay: η, >= 0.
        weight_decay: λ, >= 0; coupled, added to the gradient.
        initial_accumulator_value: what G starts from, >= 0.
        eps: ε, >= 0.
        maximize: ascend instead of descend.
        **options: `skip_nonfinite`, `track_grad_norm`, `decay_matrices_only`, `master_weights`; see `Optimizer`.

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

    def __init__(
        self,
        modules: Any,
        lr: Any = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            modules,
            lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
            maximize=maximize,
            **options,
        )

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        return AdagradState(jnp.full_like(p, h.initial_accumulator_value))

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        g = decayed(-g if h.maximize else g, p, h.weight_decay)
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

    Args:
        modules: a list of modules; see `Optimizer`.
        lr: learning rate, >= 0, or a schedule.
        rho: ρ, in [0, 1].
        eps: ε, >= 0.
        weight_decay: λ, >= 0; coupled, added to the gradient.
        maximize: ascend instead of descend.
        **options: `skip_nonfinite`, `track_grad_norm`, `decay_matrices_only`, `master_weights`; see `Optimizer`.

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

    _ranges: ClassVar = {"rho": (0.0, 1.0)}
    elementwise = True

    def __init__(
        self,
        modules: Any,
        lr: Any = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            modules,
            lr,
            rho=rho,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
            **options,
        )

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        return AdadeltaState(jnp.zeros_like(p), jnp.zeros_like(p))

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        g = decayed(-g if h.maximize else g, p, h.weight_decay)
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

    Args:
        modules: a list of modules; see `Optimizer`.
        lr: learning rate, >= 0, or a schedule.
        alpha: α, >= 0.
        eps: ε, >= 0.
        weight_decay: λ, >= 0; coupled, added to the gradient.
        momentum: μ, >= 0.
        centered: divide by an estimate of the standard deviation.
        maximize: ascend instead of descend.
        **options: `skip_nonfinite`, `track_grad_norm`, `decay_matrices_only`, `master_weights`; see `Optimizer`.

    Raises:
        ValueError, TypeError: as `Optimizer`; for momentum or centered switched on after construction.

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

    def __init__(
        self,
        modules: Any,
        lr: Any = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            modules,
            lr,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum,
            centered=centered,
            maximize=maximize,
            **options,
        )

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        momentum_buffer = jnp.zeros_like(p) if h.momentum else None
        return RMSpropState(jnp.zeros_like(p), momentum_buffer, jnp.zeros_like(p) if h.centered else None)

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        g = decayed(-g if h.maximize else g, p, h.weight_decay)
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
