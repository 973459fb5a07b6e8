"""Muon: orthogonalized momentum for matrices."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..declaration import FINITE, Rate, setting
from ..optimizer import Optimizer
from .pieces import decoupled


class MuonState(NamedTuple):
    """The state of Muon for one parameter."""

    momentum_buffer: jax.Array  # the parameter's shape and dtype


class Muon(Optimizer):
    r"""Steps along momentum made nearly orthogonal, for the matrices of hidden layers.

        B ← μ B + (1 - μ) g
        u ← μ B + (1 - μ) g (nesterov), or B
        O ← u / max(‖u‖, ε), then k times: G = O Oᵀ, O ← a O + (b G + c G²) O; in bfloat16, the shorter side first
        p ← (1 - lr λ) p - lr r O
        r = √max(1, rows / columns) ("original"), or 0.2 √max(rows, columns) ("match_rms_adamw")

    It takes matrices only. A group with another rule takes the rest (biases, norms, kernels of convolutions), and by name
    what is better left to it (embeddings, heads).

    Raises:
        ValueError, TypeError: as `Optimizer`; for a trainable parameter that is no matrix and in no such group.

    Source: `torch.optim.Muon`; Jordan et al., "Muon: An Optimizer for Hidden Layers in Neural Networks", 2024; Liu et
    al., "Muon is Scalable for LLM Training", 2025.

    Differs from PyTorch: a parameter without a gradient is stepped with zeros, not left out; for bfloat16 and float16 a
    step is computed in float32, but for O, and rounded once.

    Example:
        >>> import jax
        >>> from minitorch_jax import nn, optim
        >>> model = nn.Linear(2, 3, key=jax.random.key(0))
        >>> opt = optim.Muon([model, {"rule": optim.AdamW, "lr": 3e-4}], lr=0.02)
        >>> [(row.path, row.rule) for row in opt.summary().rows]
        [('0.weight', 'Muon'), ('0.bias', 'AdamW')]
    """

    modules: Any = setting(doc="a list of modules, with groups for what is no matrix; see `Optimizer`")
    lr: Rate = setting(default=1e-3)
    weight_decay: float = setting(default=0.1, doc="λ; decoupled")
    momentum: float = setting(default=0.95, doc="μ")
    nesterov: bool = setting(default=True, doc="Nesterov momentum")
    ns_coefficients: tuple[float, float, float] = setting(
        default=(3.4445, -4.775, 2.0315), within=FINITE, doc="(a, b, c)"
    )
    eps: float = setting(default=1e-7, within=FINITE, doc="ε")
    ns_steps: int = setting(default=5, within=(0.0, 99.0), doc="k")
    adjust_lr_fn: str | None = setting(default=None, doc='"original" (None means it, too) or "match_rms_adamw"')

    @staticmethod
    def _completed(settings: dict[str, Any]) -> dict[str, Any]:
        return settings | {"adjust_lr_fn": "original" if (how := settings["adjust_lr_fn"]) is None else how}

    def _validate(self) -> None:
        if self.adjust_lr_fn not in ("original", "match_rms_adamw"):
            raise ValueError(f"Muon: adjust_lr_fn must be 'original' or 'match_rms_adamw'; got {self.adjust_lr_fn!r}")
        if self.ns_steps != int(self.ns_steps):
            raise ValueError(f"Muon: ns_steps must be a whole number; got {self.ns_steps!r}")

    @staticmethod
    def takes(p: jax.ShapeDtypeStruct) -> bool:
        """Parameters of two axes."""
        return len(p.shape) == 2

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        return MuonState(jnp.zeros_like(p))

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        rows, columns = p.shape
        b = h.momentum * s.momentum_buffer + h.one_minus.momentum * g
        u = h.momentum * b + h.one_minus.momentum * g if h.nesterov else b
        o = _orthogonalized(u, h) if rows <= columns else _orthogonalized(u.T, h).T
        original = h.adjust_lr_fn == "original"
        ratio = math.sqrt(max(1, rows / columns)) if original else 0.2 * math.sqrt(max(rows, columns))
        return decoupled(p, h) - h.lr * ratio * o, MuonState(b)


def _orthogonalized(u: jax.Array, h: SimpleNamespace) -> jax.Array:
    """Nearly U Vᵀ of the singular value decomposition of `u`, by Newton and Schulz's iteration."""
    a, b, c = h.ns_coefficients

    def rounded(x: jax.Array) -> jax.Array:  # to bfloat16: a mere cast may be left out where it is cast back
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.matmul(x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), preferred_element_type=u.dtype)

    def step(_: Any, o: jax.Array) -> jax.Array:
        gram = rounded(product(o, o.T))
        return rounded(a * o + product(rounded(b * gram + c * product(gram, gram)), o))

    o = rounded(u)
    norm = rounded(jnp.sqrt(jnp.sum(o * o)))
    return jax.lax.fori_loop(0, h.ns_steps.astype(jnp.int32), step, rounded(o / jnp.maximum(norm, rounded(h.eps))))
