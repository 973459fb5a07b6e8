"""Adam and its relatives: AdamW, Adamax, NAdam, RAdam."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ...module.parameter import wide_dtype
from ..declaration import BELOW_ONE, Rate, setting
from ..optimizer import Optimizer
from .pieces import ascended, bias_correction, coupled, decoupled, in_place, moments


class AdamState(NamedTuple):
    """The state of Adam, AdamW and RAdam for one parameter: arrays of its shape and dtype."""

    exp_avg: jax.Array
    exp_avg_sq: jax.Array
    max_exp_avg_sq: jax.Array | None = None  # with amsgrad


class AdamaxState(NamedTuple):
    """The state of Adamax for one parameter: arrays of its shape and dtype."""

    exp_avg: jax.Array
    exp_inf: jax.Array


class NAdamState(NamedTuple):
    """The state of NAdam for one parameter."""

    exp_avg: jax.Array  # the parameter's shape and dtype
    exp_avg_sq: jax.Array  # the parameter's shape and dtype
    mu_product: jax.Array  # a number, of at least float32


def _to_follow(p: jax.Array, g: jax.Array, h: SimpleNamespace) -> jax.Array:
    """The gradient to descend along, with weight decay in it unless that is decoupled."""
    return ascended(g, h) if h.decoupled_weight_decay else coupled(p, g, h)


def _shrunk(p: jax.Array, h: SimpleNamespace) -> jax.Array:
    """The parameter after weight decay, if that is decoupled."""
    return decoupled(p, h) if h.decoupled_weight_decay else p


class Adam(Optimizer):
    r"""Adam: steps of the size of lr, from running averages of the gradient and of its square.

        g ← g + λ p (coupled), or p ← (1 - lr λ) p (decoupled)
        m ← β₁ m + (1 - β₁) g
        v ← β₂ v + (1 - β₂) g²
        u ← max(u, v) (amsgrad), or v
        p ← p - lr (m / (1 - β₁ᵗ)) / (√(u / (1 - β₂ᵗ)) + ε)

    Raises:
        ValueError, TypeError: as `Optimizer`.

    Source: `torch.optim.Adam`; Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2014; Reddi et al., "On the
    Convergence of Adam and Beyond", 2018.

    Differs from PyTorch: a parameter without a gradient is stepped with zeros, not left out; for bfloat16 and float16 a
    step is computed in float32 and rounded once.

    Example:
        >>> import jax
        >>> from minitorch_jax import nn, optim
        >>> model = nn.Linear(2, 1, key=jax.random.key(0))
        >>> optim.Adam([model], lr=0.1, amsgrad=True)
        Adam([Linear], lr=0.1, betas=(0.9, 0.999), eps=1e-08, weight_decay=0, amsgrad=True)
    """

    elementwise = True
    lr: Rate = setting(default=1e-3)
    betas: tuple[float, float] = setting(default=(0.9, 0.999), within=BELOW_ONE, doc="(β₁, β₂), each")
    eps: float = setting(default=1e-8, doc="ε")
    weight_decay: float = setting(default=0, doc="λ")
    amsgrad: bool = setting(default=False, doc="divide by the largest v so far")
    maximize: bool = setting(default=False, doc="ascend instead of descend", kw_only=True)
    decoupled_weight_decay: bool = setting(
        default=False, doc="decay the parameter itself, as `AdamW` does", kw_only=True
    )

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        return AdamState(jnp.zeros_like(p), jnp.zeros_like(p), jnp.zeros_like(p) if h.amsgrad else None)

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        rest1, rest2 = h.one_minus.betas
        m, v = moments(_to_follow(p, g, h), s, h)
        m, v, p = in_place(h, p, exp_avg=m, exp_avg_sq=v)
        u, p = in_place(h, p, max_exp_avg_sq=jnp.maximum(s.max_exp_avg_sq, v)) if h.amsgrad else (v, p)
        p = _shrunk(p, h)
        d = m / (jnp.sqrt(u) / jnp.sqrt(bias_correction(rest2, h.t)) + h.eps)
        return p - h.lr / bias_correction(rest1, h.t) * d, AdamState(m, v, u if h.amsgrad else s.max_exp_avg_sq)


class AdamW(Adam):
    r"""Adam with decoupled weight decay: `Adam` with another default.

        p ← (1 - lr λ) p, then as `Adam`

    Raises:
        ValueError, TypeError: as `Adam`.

    Source: `torch.optim.AdamW`; Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2017.

    Differs from PyTorch: as `Adam`.

    Example:
        >>> import jax
        >>> from minitorch_jax import nn, optim
        >>> model = nn.Linear(2, 1, key=jax.random.key(0))
        >>> optim.AdamW([model])
        AdamW([Linear], lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01, decoupled_weight_decay=True)
    """

    weight_decay: float = setting(default=1e-2, doc="λ; decoupled")
    decoupled_weight_decay: bool = setting(default=True, init=False)


class Adamax(Optimizer):
    r"""Adam with the infinity norm in place of the second moment.

        g ← g + λ p
        m ← β₁ m + (1 - β₁) g
        u ← max(β₂ u, |g| + ε)
        p ← p - lr / (1 - β₁ᵗ) m / u

    Raises:
        ValueError, TypeError: as `Optimizer`.

    Source: `torch.optim.Adamax`; Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2014.

    Differs from PyTorch: as `Adam`.

    Example:
        >>> import jax
        >>> from minitorch_jax import nn, optim
        >>> model = nn.Linear(2, 1, key=jax.random.key(0))
        >>> optim.Adamax([model])
        Adamax([Linear], lr=0.002, betas=(0.9, 0.999), eps=1e-08, weight_decay=0)
    """

    elementwise = True
    lr: Rate = setting(default=2e-3)
    betas: tuple[float, float] = setting(default=(0.9, 0.999), within=BELOW_ONE, doc="(β₁, β₂), each")
    eps: float = setting(default=1e-8, doc="ε")
    weight_decay: float = setting(default=0, doc="λ; coupled, added to the gradient")
    maximize: bool = setting(default=False, doc="ascend instead of descend", kw_only=True)

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        return AdamaxState(jnp.zeros_like(p), jnp.zeros_like(p))

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        (beta1, beta2), (rest1, _) = h.betas, h.one_minus.betas
        g = coupled(p, g, h)
        m = beta1 * s.exp_avg + rest1 * g
        u = jnp.maximum(beta2 * s.exp_inf, jnp.abs(g) + h.eps)
        m, u, p = in_place(h, p, exp_avg=m, exp_inf=u)
        return p - h.lr / bias_correction(rest1, h.t) * (m / u), AdamaxState(m, u)


class NAdam(Optimizer):
    r"""Adam with Nesterov momentum, of which the share grows with time.

        g ← g + λ p (coupled), or p ← (1 - lr λ) p (decoupled)
        m ← β₁ m + (1 - β₁) g
        v ← β₂ v + (1 - β₂) g²
        μ(t) = β₁ (1 - 0.96^(t ψ) / 2)
        π ← μ(t) π
        d ← (1 - μ(t)) / (1 - π) g + μ(t+1) / (1 - μ(t+1) π) m
        p ← p - lr d / (√(v / (1 - β₂ᵗ)) + ε)

    Raises:
        ValueError, TypeError: as `Optimizer`.

    Source: `torch.optim.NAdam`; Dozat, "Incorporating Nesterov Momentum into Adam", 2016.

    Differs from PyTorch: as `Adam`.

    Example:
        >>> import jax
        >>> from minitorch_jax import nn, optim
        >>> model = nn.Linear(2, 1, key=jax.random.key(0))
        >>> optim.NAdam([model])
        NAdam([Linear], lr=0.002, betas=(0.9, 0.999), eps=1e-08, weight_decay=0, momentum_decay=0.004)
    """

    lr: Rate = setting(default=2e-3)
    betas: tuple[float, float] = setting(default=(0.9, 0.999), within=BELOW_ONE, doc="(β₁, β₂), each")
    eps: float = setting(default=1e-8, doc="ε")
    weight_decay: float = setting(default=0, doc="λ")
    momentum_decay: float = setting(default=4e-3, doc="ψ")
    decoupled_weight_decay: bool = setting(default=False, doc="decay the parameter itself, as `AdamW` does")
    maximize: bool = setting(default=False, doc="ascend instead of descend", kw_only=True)

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        one = jnp.ones((), wide_dtype(p.dtype))
        return NAdamState(jnp.zeros_like(p), jnp.zeros_like(p), one)

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        (beta1, _), (rest1, rest2) = h.betas, h.one_minus.betas
        m, v = moments(_to_follow(p, g, h), s, h)
        m, v, p = in_place(h, p, exp_avg=m, exp_avg_sq=v)
        p, g = _shrunk(p, h), _to_follow(p, g, h)
        shares = [0.5 * 0.96 ** (t * h.momentum_decay) for t in (h.t, h.t + 1)]
        mu, mu_next = [beta1 * (1 - share) for share in shares]
        product = s.mu_product * mu
        d = (rest1 + beta1 * shares[0]) / (1 - product) * g + mu_next / (1 - product * mu_next) * m
        return p - h.lr * d / (jnp.sqrt(v / bias_correction(rest2, h.t)) + h.eps), NAdamState(m, v, product)


class RAdam(Optimizer):
    r"""Rectified Adam: plain momentum, until the running average of g² is long enough to be trusted.

        g ← g + λ p (coupled), or p ← (1 - lr λ) p (decoupled)
        m ← β₁ m + (1 - β₁) g
        v ← β₂ v + (1 - β₂) g²
        ρ∞ = 2 / (1 - β₂) - 1,  ρ = ρ∞ - 2 t β₂ᵗ / (1 - β₂ᵗ)
        r = √((ρ - 4) (ρ - 2) ρ∞ / ((ρ∞ - 4) (ρ∞ - 2) ρ))
        d ← r √(1 - β₂ᵗ) / (√v + ε) if ρ > 5, else 1
        p ← p - lr d m / (1 - β₁ᵗ)

    Raises:
        ValueError, TypeError: as `Optimizer`.

    Source: `torch.optim.RAdam`; Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", 2019.

    Differs from PyTorch: as `Adam`.

    Example:
        >>> import jax
        >>> from minitorch_jax import nn, optim
        >>> model = nn.Linear(2, 1, key=jax.random.key(0))
        >>> optim.RAdam([model], weight_decay=0.1, decoupled_weight_decay=True)
        RAdam([Linear], lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.1, decoupled_weight_decay=True)
    """

    elementwise = True
    lr: Rate = setting(default=1e-3)
    betas: tuple[float, float] = setting(default=(0.9, 0.999), within=BELOW_ONE, doc="(β₁, β₂), each")
    eps: float = setting(default=1e-8, doc="ε")
    weight_decay: float = setting(default=0, doc="λ")
    decoupled_weight_decay: bool = setting(default=False, doc="decay the parameter itself, as `AdamW` does")
    maximize: bool = setting(default=False, doc="ascend instead of descend", kw_only=True)

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        return AdamState(jnp.zeros_like(p), jnp.zeros_like(p))

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        rest1, rest2 = h.one_minus.betas
        m, v = moments(_to_follow(p, g, h), s, h)
        m, v, p = in_place(h, p, exp_avg=m, exp_avg_sq=v)
        p = _shrunk(p, h)
        length = _average_length(rest2, h.t)
        rho, rho_inf = jnp.maximum(length, 5), jnp.maximum(2 / rest2 - 1, 5)  # no NaN where neither is used
        r = jnp.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        d = jnp.where(length > 5, r * jnp.sqrt(bias_correction(rest2, h.t)) / (jnp.sqrt(v) + h.eps), 1)
        return p - h.lr / bias_correction(rest1, h.t) * m * d, AdamState(m, v)


def _average_length(rest2: Any, t: Any) -> Any:
    """RAdam's ρ, which is the small difference of two large numbers at first: there by a series in t (1 - β₂)."""

    def rest(y: Any) -> Any:  # coth(y) - 1 / y
        return y / 3 - y**3 / 45 + 2 * y**5 / 945

    x = -jnp.log1p(-rest2)
    small = jnp.minimum(x, 0.1 / t)
    early = t + rest(small / 2) - t * rest(t * small / 2)
    return jnp.where(t * x < 0.1, early, 2 / rest2 - 1 - 2 * t / jnp.expm1(t * x))
