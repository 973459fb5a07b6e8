"""The comparisons of layers: each kind at each size, forward with backward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from ..comparison import CPU, Comparison, Row, costs
from ..peers import torch
from . import by_hand, flax, ours
from .kinds import KINDS, Kind

OURS, TORCH, FLAX, JAX = "mt.jit", "torch", "flax", "plain JAX"


def comparisons(quick: bool) -> list[Comparison]:
    """All of them; of a quick run, each sixth kind."""
    return [
        _comparison(name, size)
        for name, kind in (list(KINDS.items())[:: 6 if quick else 1])
        for size in ([kind.tiny] if quick else kind.sizes)
    ]


def _comparison(name: str, size: Sequence[int]) -> Comparison:
    makers: dict[str, Any] = {OURS: partial(ours.side, name, size), TORCH: partial(torch.differentiated, name, size)}
    if name in flax.LAYERS:
        makers[FLAX] = partial(flax.side, name, size)
    if name in by_hand.CALLS:
        makers[JAX] = partial(by_hand.side, name, size)
    rows = [Row(OURS, TORCH, 1.0), Row(OURS + CPU, TORCH + CPU, 1.0)]
    rows += [Row(OURS + end, peer + end) for peer in (FLAX, JAX) if peer in makers for end in ("", CPU)]
    title = f"{name}, {_shapes(KINDS[name], size)}"
    return Comparison(f"layers/{title}", title, rows, costs(makers))


def _shapes(kind: Kind, size: Sequence[int]) -> str:
    """The shapes of the input and of the largest weight that is a matrix or more."""
    found = kind.shapes(*size)
    weights = [shape for name, shape in found.items() if name.startswith("weight") and len(shape) > 1]
    text = " x ".join(map(str, found["x"]))
    return text + (f", weight {' x '.join(map(str, weights[-1]))}" if weights else "")
