"""What a step of an optimizer does, worked out once per structure: which cells, which states, which compiled update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import cell as cells
from ..cell import Cell
from ..live import LiveList
from ..module import Module
from ..pack import stored_cells
from ..pipeline import Compiled, Pipeline, Placement, join_mesh, placed, placement
from ..stateful import join, walk_of
from ..tracing import unaliased
from .foreign import Foreign
from .units import Unit, make_units, over_packs


class Plan:
    """The cells of an optimizer in the order in which its compiled update takes them."""

    def __init__(self, opt: Any, native: dict[Cell, str], foreign: list[Foreign], version: object) -> None:
        walks = [walk_of(module) for module in opt.modules if isinstance(module, Module)]
        around = len(opt.modules) - len(walks) - len(foreign)  # objects whose modules may change unseen
        self.version = None if around or any(walk.watched for walk in walks) else version  # None: look at every step
        self.modules = list(opt.modules)
        self.ids = [*map(id, opt.modules)]
        self.foreign = foreign
        self.named = {path: cell for cell, path in native.items()}  # frozen ones too: they keep their state
        self.params = [cell for cell in native if cell.trainable]
        self.paths = [native[cell] for cell in self.params]
        self.grads = [cell.grad for cell in self.params]
        self.fresh = True  # no step has been taken with this plan
        self.extra: list[Cell] = []
        for module in foreign:
            self.extra += module.cells
            self.named |= {f"{module.label}.{j}": cell for j, cell in enumerate(module.cells)}
        updated = [*self.params, *self.extra]
        order = {cell: i for i, cell in enumerate(opt._order)}
        singles = []
        for cell in updated:
            tree, state = opt._state[cell]
            singles.append(Unit(cell, cell.grad, tree, state, (order[cell],)))
        self.owned = [*self.params, *(c for unit in singles for c in unit.state), opt._steps]
        self._rule = type(opt), tuple(opt._flags.items()), tuple(opt._hyper.schedules.items()), opt._hyper.layout
        self._num_steps = len(order)
        self.update = _update_for(self._key(singles, len(self.params), self.owned))[1]
        self.pipeline: Any = None  # made when a step is first taken outside of traces

    def _key(self, units: list[Unit], num_native: int, owned: list[Cell]) -> Any:
        trees, positions = tuple([unit.tree for unit in units]), tuple([unit.positions for unit in units])
        return (*self._rule, num_native, trees, positions, self._num_steps, placement(owned))

    def compile(self, opt: Any) -> None:
        """Make the pipeline of a step outside of traces, which takes packed parameters as one."""
        units = make_units(opt, self.params, self.extra)
        native = [unit for unit in units if unit.grad is not None]
        owned = [*(unit.param for unit in native), *(c for unit in units for c in unit.state), opt._steps]
        grads = [unit.grad for unit in native]
        key = self._key(units, len(native), owned)
        compiled, update = _update_for(key)
        self.held, self.held_grads = stored_cells(owned), stored_cells(grads)
        if self.held != owned or self.held_grads != grads:
            compiled = _packed_update_for(key, update, owned, grads)
        self.compiled = compiled
        self.pipeline = Pipeline(compiled, self.held, self.held)


def make_plan(opt: Any) -> Plan:
    """Look at the optimizer's modules as they are now; make states for what is new, drop those of what has gone."""
    version = cells.structure.version
    if not opt.modules:
        raise ValueError(f"{type(opt).__name__}: modules is empty; give it a list with at least one module: `[model]`")
    native, foreign = _parameters(opt)
    extra = [cell for module in foreign for cell in module.cells]
    if not native and not extra:
        raise ValueError(f"{type(opt).__name__}: the modules hold no parameters, so there is nothing to train")
    _keep_state(opt, [*native, *extra], [*(c for c in native if c.trainable), *extra], foreign)
    if cells.at_top_level() and cells.local.frame is None:
        states = [cell for _, state in opt._state.values() for cell in state]
        join_mesh(stored_cells([*native, *states, opt._steps]))
    plan = Plan(opt, native, foreign, version)
    if cells.at_top_level() and cells.local.frame is None and any(cell.pack is not None for cell in plan.params):
        plan.compile(opt)  # now, so that compiled code, too, finds the state packed
    return plan


def _parameters(opt: Any) -> tuple[dict[Cell, str], list[Foreign]]:
    """The parameters' cells with their paths, each once, and the modules that are not ours."""
    native: dict[Cell, str] = {}
    foreign: list[Foreign] = []
    arrays: dict[int, str] = {}
    _no_overlap(opt)
    for i, module in enumerate(opt.modules):
        if isinstance(module, Module):
            walk = walk_of(module)
            for path, cell in zip(walk.spec.paths, walk.cells, strict=True):
                if cell.kind == "parameter":
                    native.setdefault(cell, join(str(i), path))
            continue
        has_both = callable(getattr(module, "parameters", None)) and callable(getattr(module, "grads", None))
        if not has_both or isinstance(module, type):
            raise TypeError(
                f"{type(opt).__name__}: modules[{i}] is {module!r} ({type(module).__name__}), which has no"
                " `parameters()` and `grads()`. List Modules, or objects with both."
            )
        found = module.parameters()
        if isinstance(found, LiveList):  # an object around a Module of ours
            for path, cell in zip(found._paths, found.cells(), strict=True):
                if cell in native:
                    raise _twice(opt, native[cell], join(str(i), path))
                native[cell] = join(str(i), path)
            continue
        known = next((f for f in opt._foreign if f.module is module), None) or Foreign(module, str(i))
        known.label = str(i)
        for j, array in enumerate(known.arrays()):
            path = arrays.setdefault(id(array), f"{i}.{j}")
            if path != f"{i}.{j}":
                raise _twice(opt, path, f"{i}.{j}")
        foreign.append(known)
    vars(opt)["_foreign"] = foreign
    return native, foreign


def _twice(opt: Any, first: str, second: str, why: str = "") -> ValueError:
    return ValueError(
        f"{type(opt).__name__}: the same parameter is reached twice through modules, as {first} and as {second}{why}."
        " List only one of the two."
    )


def _no_overlap(opt: Any) -> None:
    """Raise if one listed module is, or is inside, another one: its parameters would be reached twice."""
    for i, module in enumerate(opt.modules):
        for j, other in enumerate(opt.modules):
            if i == j:
                continue
            if module is other and not isinstance(module, Module):
                raise _twice(opt, str(i), str(j))
            both = isinstance(module, Module) and isinstance(other, Module)
            if both and id(module) in walk_of(other).objects and walk_of(module).cells:
                inner, outer = walk_of(module), walk_of(other)
                second = outer.spec.paths[outer.cells.index(inner.cells[0])]
                why = f": modules[{i}] is part of modules[{j}]"
                raise _twice(opt, join(str(i), inner.spec.paths[0]), join(str(j), second), why)


def _keep_state(opt: Any, every: list[Cell], trainable: list[Cell], foreign: list[Foreign]) -> None:
    """Bring `opt._state`, `_order` and `_steps` in line with the parameters that there are."""
    h = SimpleNamespace(**{name: opt._hyper.given_number(name) for name in opt._hyper.given}, **opt._flags)
    values = {c: a for module in foreign for c, a in zip(module.cells, module.arrays(), strict=True)}
    state = {cell: opt._state[cell] for cell in every if cell in opt._state}
    begun = set()  # parameters whose state begins now: they count their steps from here
    for cell in trainable:
        if cell not in state or not state[cell][1]:
            with jax.enable_x64(True) if cell in values and values[cell].dtype == np.float64 else nullcontext():
                p = jnp.asarray(values[cell]) if cell in values else cell.value
                leaves, tree = jax.tree.flatten(type(opt).init_state(p, h))
            state[cell] = tree, [Cell(leaf, "state", birth=cell.birth) for leaf in unaliased(leaves, [p])]
            if leaves and cell in opt._state:
                begun.add(cell)
    if every != opt._order or begun:
        old = {cell: i for i, cell in enumerate(opt._order) if cell not in begun}
        steps = opt._steps.value
        if isinstance(steps, jax.core.Tracer) or np.ndim(steps) != 1:
            columns = [steps[..., old[c]] if c in old else jnp.zeros_like(steps[..., -1]) for c in every]
            new = jnp.stack([*columns, steps[..., -2], steps[..., -1]], axis=-1)
        else:
            counts = np.asarray(steps)
            new = jnp.asarray([*(counts[old[c]] if c in old else 0 for c in every), counts[-2], counts[-1]], jnp.int32)
        opt._steps.value = new
        opt._steps.lent = False
    opt._state, opt._order = state, list(every)


_updates: dict[Any, tuple[Compiled, Callable[..., Any]]] = {}


def _update_for(key: Any) -> tuple[Compiled, Callable[..., Any]]:
    """The update of a structure, one for all optimizers that share it."""
    found = _updates.get(key)
    if found is None:
        update = _make_update(*key)
        found = _updates[key] = Compiled(update, f"{key[0].__name__}_step"), update
    return found


_packed_updates: dict[Any, Compiled] = {}


def _packed_update_for(
    key: Any, update: Callable[..., list[Any]], owned: Sequence[Cell], grads: Sequence[Cell]
) -> Compiled:
    """The same over packed cells, of which some are taken view by view."""
    stored_update, layout = over_packs(update, owned, grads)
    found = _packed_updates.get((key, layout))
    if found is None:
        found = _packed_updates[key, layout] = Compiled(stored_update, f"{key[0].__name__}_step")
    return found


def _make_update(
    rule: Any,
    flags: tuple[tuple[str, Any], ...],
    schedules: tuple[tuple[str, Any], ...],
    layout: tuple[tuple[str, int, int], ...],
    num_native: int,
    trees: Sequence[Any],
    positions: Sequence[tuple[int, ...]],
    num_steps: int,
    places: Placement,
) -> Callable[..., Any]:
    """Lift a rule on one array to all of an optimizer's: `(owned, gradients, hyperparameters) -> owned`."""
    skip_nonfinite = dict(flags)["skip_nonfinite"]
    ticks = np.zeros(num_steps + 2, np.int32)
    ticks[[*(i for places in positions for i in places), num_steps]] = 1

    def update(
        owned: list[Any], grads: list[Any], values: Any, foreign: Sequence[Any] = (), foreign_grads: Sequence[Any] = ()
    ) -> list[Any]:
        params, steps = [*owned[:num_native], *foreign], owned[-1]
        held = iter(owned[num_native:-1])
        states = [jax.tree.unflatten(tree, [next(held) for _ in range(tree.num_leaves)]) for tree in trees]
        grads = [*map(cells.unless_consumed, grads), *foreign_grads]
        numbers = _unpack(values, layout)
        for name, schedule in schedules:
            numbers[name] = jnp.asarray(schedule(steps[num_steps]))
        new_params, new_states = [], []
        for p, g, s, (position, *_) in zip(params, grads, states, positions, strict=True):
            new_p, new_s = _lifted(rule, p, g, s, numbers, dict(flags), steps[position] + 1)
            new_params.append(new_p)
            new_states += jax.tree.leaves(new_s)
        new_steps = steps + ticks
        if skip_nonfinite:
            finite = jnp.stack([jnp.isfinite(g).all() for g in grads if g is not None] or [jnp.array(True)]).all()
            old = [*params, *owned[num_native:-1]]
            kept = [jnp.where(finite, new, was) for new, was in zip([*new_params, *new_states], old, strict=True)]
            new_params, new_states = kept[: len(params)], kept[len(params) :]
            skipped = steps.at[num_steps + 1].add(1)
            new_steps = jnp.where(finite, new_steps, skipped)
        out = [*new_params[:num_native], *new_states, new_steps]
        if places:
            out = [placed(value, place) for value, place in zip(out, places, strict=True)]
        out += new_params[num_native:]
        return unaliased(out, [*jax.tree.leaves((grads, values)), *foreign])

    return update


def _unpack(values: Any, layout: Sequence[tuple[str, int, int]]) -> dict[str, Any]:
    """The hyperparameters by name: scalars, or tuples of them."""
    values = jnp.asarray(values)
    return {
        name: tuple(values[start + i] for i in range(length)) if length else values[start]
        for name, start, length in layout
    }


def _lifted(
    rule: Any, p: Any, g: Any, s: Any, numbers: dict[str, Any], flags: dict[str, Any], t: Any
) -> tuple[Any, Any]:
    """One parameter's update, computed in at least float32, with the dtypes that went in."""
    dtype = p.dtype if p.dtype.itemsize >= 4 else jnp.dtype(jnp.float32)

    def widen(x: Any) -> Any:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    h = SimpleNamespace(**jax.tree.map(widen, numbers), **flags, t=t.astype(dtype))
    wide_g = jnp.zeros(p.shape, dtype) if g is None else widen(g)
    new_p, new_s = rule.update(widen(p), wide_g, jax.tree.map(widen, s), h)
    return new_p.astype(p.dtype), jax.tree.map(lambda new, old: new.astype(old.dtype), new_s, s)
