"""What a compiled step updates: parameters one by one, and packed ones as one array where the rule allows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..state.cell import Cell
from ..state.concurrent_reads import using
from ..state.packed import Pack, compact, make_pack, padded


class Unit:
    """A parameter, or a pack of them: its gradient, state, step counts' places, group, and the shapes it is made of.

    `size`: of a pack that ends in padding, how many numbers come before it.
    """

    __slots__ = ("param", "grad", "tree", "state", "positions", "group", "shapes", "size")

    def __init__(
        self,
        param: Cell,
        tree: Any,
        state: list[Cell],
        positions: tuple[int, ...],
        group: int,
        shapes: tuple[tuple[int, ...], ...],
        size: int | None = None,
    ) -> None:
        self.param, self.grad, self.tree, self.state = param, param.grad, tree, state
        self.positions, self.group, self.shapes, self.size = positions, group, shapes, size


def single(opt: Any, cell: Cell, order: dict[Cell, int], groups: dict[Cell, int], shape: tuple[int, ...]) -> Unit:
    """The unit of a parameter that is updated by itself."""
    tree, state = opt._state[cell]
    return Unit(cell, tree, state, (order[cell],), groups[cell], (shape,))


def make_units(opt: Any, shapes: dict[Cell, tuple[int, ...]], groups: dict[Cell, int]) -> list[Unit]:
    """The units of an optimizer, for parameters of some shapes; states are packed as their parameters are, or unpacked."""
    params = [cell for cell in shapes if cell.kind == "parameter"]
    order = {cell: i for i, cell in enumerate(opt._order)}
    mine = set(params)
    for pack in {cell.pack for cell in params if cell.pack is not None}:
        if pack.has_holes():
            compact(pack)
    packs = {cell.pack for cell in params if cell.pack is not None}
    flat = {pack for pack in packs if set(pack.places) <= mine and _goes_as_one(opt, pack, order, groups)}
    units = []
    for cell, shape in shapes.items():
        tree, state = opt._state[cell]
        pack = cell.pack
        if pack not in flat:
            for held in state:
                if held.pack is not None:
                    held.pack.release(held)
            units.append(single(opt, cell, order, groups, shape))
        elif pack in packs:  # the first of its views
            packs.discard(pack)
            views = sorted(pack.places, key=lambda view: pack.places[view].start)
            packed = [_packed_state([opt._state[v][1][k] for v in views], views, pack) for k in range(tree.num_leaves)]
            positions = tuple([order[view] for view in views])
            parts = tuple([pack.places[view].shape for view in views])
            size = None if padded(pack.size) == pack.size else pack.size
            units.append(Unit(pack.cell, tree, packed, positions, groups[cell], parts, size))
    return units


def _goes_as_one(opt: Any, pack: Pack, order: dict[Cell, int], groups: dict[Cell, int]) -> bool:
    """Whether the rule may be applied to the flat array: it says so, and all parts are of one group and as many steps."""
    of = {groups[view] for view in pack.places}
    if len(of) != 1 or not opt._rule_of(of.pop()).elementwise:
        return False
    steps = using(opt._steps, np.asarray)
    trees = {opt._state[view][0] for view in pack.places}
    if len(trees) != 1 or len({int(steps[order[view]]) for view in pack.places}) != 1:
        return False
    dtypes = {tuple([c.value.dtype for c in opt._state[view][1]]) for view in pack.places}
    shapes_fit = all(c.value.shape == place.shape for view, place in pack.places.items() for c in opt._state[view][1])
    return len(dtypes) == 1 and shapes_fit


def _packed_state(parts: list[Cell], views: list[Cell], pack: Pack) -> Cell:
    """One part of the state of a pack's parameters, packed in the same places."""
    known = parts[0].pack
    places = [pack.places[view] for view in views]
    if (
        known is None
        or known.size != pack.size
        or any(
            part.pack is not known or known.places[part].start != place.start
            for part, place in zip(parts, places, strict=True)
        )
    ):
        for part in parts:
            if part.pack is not None:
                part.pack.release(part)
        known = make_pack(parts, places, pack.size, parts[0].value.dtype, "state")
    for gone in set(known.places) - set(parts):  # of a parameter that has left its pack, and keeps its state as it is
        known.release(gone)
    cell: Cell = known.cell
    return cell


def without_padding(update: Callable[..., Any], size: int) -> Callable[..., Any]:
    """The update of a packed parameter, `(parameter, gradient, state, numbers, t, *others)`, kept from its padding.

    A rule may make NaN of padding, where `jax_debug_nans` would find it. Slower, as the sizes are uneven.
    """

    def real(p: Any, g: Any, s: Any, numbers: dict[str, Any], t: Any, *others: Any) -> Any:
        def cut(array: Any) -> Any:
            return array[:size] if jnp.shape(array) == p.shape else array

        new = update(*jax.tree.map(cut, (p, g, s, numbers)), t, *jax.tree.map(cut, others))
        return jax.tree.map(lambda array: jnp.pad(array, (0, p.size - size)), new)

    return real
