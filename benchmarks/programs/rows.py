"""The comparisons of whole training steps, and of their first calls."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..comparison import CPU, Comparison, Row, costs
from ..peers import torch
from . import by_hand, first, flax_nnx, ours
from .networks import PROGRAMS

OURS, TORCH, NNX, JAX = "mt.jit", "torch", "nnx.jit", "plain JAX"
SIDES = {OURS: ours, NNX: flax_nnx, JAX: by_hand}
QUICK = ("maml",)
TOLERANCE = 1e-3  # Adam divides by the size of a gradient, so rounding shows after three steps


def steps(quick: bool) -> list[Comparison]:
    """A training step when everything is compiled."""
    return [_step(name, quick) for name in (QUICK if quick else PROGRAMS)]


def _step(name: str, quick: bool) -> Comparison:
    makers: dict[str, Any] = {side: partial(module.side, name, quick) for side, module in SIDES.items()}
    makers[TORCH] = partial(torch.program, name, quick)
    aims = {TORCH: 1.1, NNX: 1.0, JAX: 1.0}
    rows = [Row(OURS + end, peer + end, aim) for peer, aim in aims.items() for end in ("", CPU)]
    return Comparison(f"programs/{name}", _title(name, quick), rows, costs(makers, TOLERANCE))


def first_calls(quick: bool) -> list[Comparison]:
    """The first call of a training step, and that of a second start with JAX's persistent cache."""
    return [_first_call(name, quick) for name in (QUICK if quick else PROGRAMS)]


def _first_call(name: str, quick: bool) -> Comparison:
    modules = {side: module.__name__ for side, module in SIDES.items() if side == OURS or not quick}
    ends = "", first.AGAIN
    rows = [Row(OURS + end, peer + end) for peer in modules if peer != OURS for end in ends]
    rows = rows or [Row(OURS + first.AGAIN, OURS)]
    title = f"first call of {_title(name, quick)}"
    return Comparison(f"first/{name}", title, rows, lambda names, effort: first.measure(names, modules, name, quick))


def _title(name: str, quick: bool) -> str:
    title = PROGRAMS[name].title
    return f"{title.partition(',')[0]}, tiny" if quick else title
