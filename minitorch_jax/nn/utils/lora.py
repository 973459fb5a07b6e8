"""The `lora` parametrization."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from ...module import parametrized
from ...module.module import Module
from ...module.parameter import fresh_parameter
from ...module.random import next_key
from ...module.tree import is_module, own_cells
from ...state.static_values import module_of, shown
from ...state.walk import join
from .. import init
from .parametrize import ParametrizationList, attach, matching

M = TypeVar("M", bound=Module)


class _LoRA(Module):
    """W + (alpha / rank) B A. A weight of more than two axes is a matrix of its first axis by all others."""

    def __init__(self, weight: jax.Array, rank: int, alpha: float, key: jax.Array) -> None:
        self.rank, self.alpha = rank, alpha
        rows, columns = weight.shape[0], math.prod(weight.shape[1:])
        bound = 1 / math.sqrt(columns) if columns else 0.0
        self.lora_A = fresh_parameter(init.uniform(key, (rank, columns), -bound, bound, weight.dtype))
        self.lora_B = fresh_parameter(jnp.zeros((rows, rank), weight.dtype))

    def _change(self, weight: jax.Array) -> jax.Array:
        return (self.alpha / self.rank * (self.lora_B @ self.lora_A)).reshape(weight.shape)

    def forward(self, weight: jax.Array) -> jax.Array:
        return weight + self._change(weight)

    def right_inverse(self, weight: jax.Array) -> jax.Array:
        return weight - self._change(weight)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}"


def lora(module: M, rank: int = 8, alpha: float = 8.0, name: str | Iterable[str] = "weight", *, key: Any = None) -> M:
    """Fine-tune a model by low-rank changes of its weights: W + (alpha / rank) B A, with W frozen.

    Every parameter of `module` is frozen, and the adapters A, `lora_A` of shape `(rank, in)`, and B, `lora_B` of shape
    `(out, rank)`, are what an optimizer of the model trains and keeps state for. B begins with zeros, so that at first
    nothing changes. Adapters of an earlier call stay as they are. `model.head.unfreeze()` has another part trained, too.

    `dict(model.named_parameters())` holds the adapters alone, and `model.load_state_dict(adapters, strict=False)` loads
    them. `parametrize.remove_parametrizations(model, "*")` merges them into the weights.

    Args:
        module: a layer, or a whole model.
        rank: the number of rows of A, positive. A change of that rank has `rank * (in + out)` numbers.
        alpha: the change is scaled by `alpha / rank`.
        name: the name of a parameter of `module`, a path, a glob over paths, in which `*` also matches dots, or a list of
            these: `"*.weight"`, `("*.q_proj.weight", "*.v_proj.weight")`, `"*.self_attn.*weight"`. Of what a glob
            matches, vectors are left out.
        key: a `jax.random` key for A. By default, the next key of the global stream (`mt.seed`).

    Returns:
        The module.

    Raises:
        ValueError: if a name matches no parameter of at least two axes, or `rank` or `alpha` is not positive. Nothing has
            changed then.

    A weight of a convolution is a matrix of outputs by everything else, a table of an embedding one of rows by columns. A
    weight that two layers share gets one adapter, which they share.

    The whole changed weight is computed at each call. There is no dropout: LoRA's acts on the input of the adapter, which
    a parametrization of the weight does not see.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021). A is drawn from U(-k, k) with
    k = 1 / sqrt(in), and the defaults of `rank` and `alpha` are 8, as in the library peft.

    Example:
        >>> from minitorch_jax import nn, optim
        >>> from minitorch_jax.nn.utils import parametrizations, parametrize
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> model = parametrizations.lora(model, rank=4, alpha=8, name="*.weight")
        >>> model.num_parameters(trainable_only=True)   # 4 * (64 + 64) + 4 * (64 + 10)
        808
        >>> opt = optim.Adam([model])                   # trains the adapters
        >>> model = parametrize.remove_parametrizations(model, "*")
    """
    given, module = module, module_of(module)
    if not is_module(module):
        raise TypeError(f"lora takes a Module; got {shown(module)} ({type(module).__name__})")
    if isinstance(rank, bool) or not hasattr(rank, "__index__") or rank <= 0:
        raise ValueError(f"lora: rank must be a positive integer; got {rank!r}")
    if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ValueError(f"lora: alpha must be a positive number; got {alpha!r}")
    found = _places(module, [name] if isinstance(name, str) else list(name))
    trained = [part for part in module.modules() if isinstance(part, _LoRA) and part.parameters()]
    module.freeze()
    made: dict[Any, _LoRA] = {}  # by the weight's cells, so that tied weights share one
    for (_, holder, attribute), k in zip(found, jax.random.split(next_key(key), len(found)), strict=True):
        sources = _sources(holder, attribute)
        if sources not in made:
            made[sources] = _LoRA(getattr(holder, attribute), int(rank), float(alpha), k)
        attach(holder, attribute, made[sources], trusted=True)
    for part in [*trained, *made.values()]:
        part.unfreeze()
    return given


def _places(module: Module, names: list[str]) -> list[tuple[str, Any, str]]:
    """Return `(path, module, attribute)` of each weight that is to get an adapter."""
    places = [
        (join(prefix, name), holder, name)
        for prefix, holder in module.named_modules()
        if not isinstance(holder, ParametrizationList | _LoRA)
        for name in [*(n for n, cell in own_cells(holder) if cell.kind == "parameter"), *parametrized.names(holder)]
    ]
    found: dict[str, tuple[str, Any, str]] = {}
    for name in names:
        of_name = [place for place in matching(name, places) if _has_axes(place)]
        if not of_name:
            known = [place[0] for place in places if _has_axes(place)]
            listed = ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "")
            line = f' Write `name="*.{name}"` for those of all submodules.' if "." not in name and known else ""
            raise ValueError(
                f"lora: {name!r} names no parameter of two or more axes in this {type(module).__name__}; there are"
                f" {listed or 'none'}.{line}"
            )
        found |= {path: (path, holder, attribute) for path, holder, attribute in of_name}
    return list(found.values())


def _has_axes(place: tuple[str, Any, str]) -> bool:
    _, holder, name = place
    held = parametrized.list_of(holder, name)
    return len(held._shape if held is not None else holder._cells[name].value.shape) >= 2


def _sources(holder: Any, name: str) -> tuple[Any, ...]:
    """Return the cells and parametrizations from which an attribute is computed."""
    held = parametrized.list_of(holder, name)
    return (holder._cells[name],) if held is None else (*held._cells.values(), *map(id, held._modules()))
