"""Adafactor: second moments of a matrix from its rows and columns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ...module.checks import LARGEST
from ..declaration import FINITE, Rate, setting
from ..optimizer import Optimizer
from .pieces import ascended, decoupled


class AdafactorState(NamedTuple):
    """The state of Adafactor for one parameter, in its dtype."""

    row_var: jax.Array | None = None  # (..., rows, 1), for a parameter of two axes or more
    col_var: jax.Array | None = None  # (..., 1, columns), for a parameter of two axes or more
    variance: jax.Array | None = None  # the parameter's shape, for one of fewer axes


class Adafactor(Optimizer):
    r"""Adafactor: Adam without momentum, with the second moments of a matrix held as one of its rows and one of its columns.

        b = t^τ,  ρ = min(lr, 1 / √t),  α = max(ε₂, RMS(p)) ρ
        p ← (1 - lr λ) p
        R ← (1 - b) R + b mean of g² over columns;  C ← (1 - b) C + b mean of g² over rows
        v ← R C / max(mean of R over rows, ε₁), or (1 - b) v + b g² with fewer than two axes
        u ← g / √max(v, ε₁²)
        p ← p - α u / max(1, RMS(u) / d)

    Raises:
        ValueError, TypeError: as `Optimizer`.

    Source: `torch.optim.Adafactor`; Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
    2018.

    Differs from PyTorch: None for ε₁ is float32's for every dtype; a parameter without a gradient is stepped with zeros,
    not left out; for bfloat16 and float16 a step is computed in float32 and rounded once.

    Example:
        >>> import jax
        >>> from minitorch_jax import nn, optim
        >>> opt = optim.Adafactor([nn.Linear(2, 3, key=jax.random.key(0))], lr=0.1)
        >>> {path: sorted(state) for path, state in opt.state_dict()["state"].items()}
        {'0.weight': ['col_var', 'row_var', 'step'], '0.bias': ['step', 'variance']}
    """

    lr: Rate = setting(default=1e-2, doc="the largest relative step ρ, and the factor of the weight decay")
    beta2_decay: float = setting(default=-0.8, within=(FINITE[0], 0.0), doc="τ")
    eps: tuple[float | None, float] = setting(default=(None, 1e-3), doc="(ε₁, ε₂); None for ε₁ is float32's, 2⁻²³")
    d: float = setting(default=1.0, within=(1.0, LARGEST), doc="clipping threshold")
    weight_decay: float = setting(default=0.0, doc="λ; decoupled")
    maximize: bool = setting(default=False, doc="ascend instead of descend", kw_only=True)

    @staticmethod
    def _completed(settings: dict[str, Any]) -> dict[str, Any]:
        eps = settings["eps"]
        if isinstance(eps, tuple) and eps and eps[0] is None:
            eps = (float(jnp.finfo("float32").eps), *eps[1:])
        return settings | {"eps": eps}

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        if p.ndim < 2:
            return AdafactorState(variance=jnp.zeros_like(p))
        return AdafactorState(jnp.zeros_like(p[..., :1]), jnp.zeros_like(p[..., :1, :]))

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        eps1, eps2 = h.eps
        g = ascended(g, h)
        share = h.t**h.beta2_decay
        alpha = jnp.maximum(eps2, _rms(p)) * jnp.minimum(h.lr, 1 / jnp.sqrt(h.t))
        p = decoupled(p, h)
        if p.ndim < 2:
            v = s.variance + share * (g * g - s.variance)
            s = AdafactorState(variance=v)
        else:
            row = s.row_var + share * (jnp.mean(g * g, -1, keepdims=True) - s.row_var)
            col = s.col_var + share * (jnp.mean(g * g, -2, keepdims=True) - s.col_var)
            v = row * col / jnp.maximum(jnp.mean(row, -2, keepdims=True), eps1)
            s = AdafactorState(row, col)
        u = g * jax.lax.rsqrt(jnp.maximum(v, eps1 * eps1))
        return p - alpha / jnp.maximum(1, _rms(u) / h.d) * u, s


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(x * x))
