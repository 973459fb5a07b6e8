"""Adafactor: second moments of a matrix from its rows and columns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from ..optimizer import Optimizer, Options


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

    Args:
        modules: a list of modules; see `Optimizer`.
        lr: the largest relative step ρ, and the factor of the weight decay; >= 0, or a schedule.
        beta2_decay: τ, <= 0.
        eps: (ε₁, ε₂), >= 0; None for ε₁ is float32's, 2⁻²³.
        d: clipping threshold, >= 1.
        weight_decay: λ, >= 0; decoupled.
        maximize: ascend instead of descend.
        **options: `skip_nonfinite`, `track_grad_norm`, `decay_matrices_only`, `master_weights`; see `Optimizer`.

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

    _ranges: ClassVar = {"beta2_decay": (-3.4e38, 0.0), "d": (1.0, float(jnp.finfo("float32").max))}

    def __init__(
        self,
        modules: Any,
        lr: Any = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        if isinstance(eps, tuple) and eps and eps[0] is None:
            eps = (float(jnp.finfo("float32").eps), *eps[1:])
        super().__init__(
            modules,
            lr,
            beta2_decay=beta2_decay,
            eps=eps,
            d=d,
            weight_decay=weight_decay,
            maximize=maximize,
            **options,
        )

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        if p.ndim < 2:
            return AdafactorState(variance=jnp.zeros_like(p))
        return AdafactorState(jnp.zeros_like(p[..., :1]), jnp.zeros_like(p[..., :1, :]))

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        eps1, eps2 = h.eps
        g = -g if h.maximize else g
        share = h.t**h.beta2_decay
        alpha = jnp.maximum(eps2, _rms(p)) * jnp.minimum(h.lr, 1 / jnp.sqrt(h.t))
        p = p * (1 - h.lr * h.weight_decay)
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
