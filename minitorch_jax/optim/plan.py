"""What a step of an optimizer does, worked out once per structure: which cells, which states, which compiled update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakSet

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from ..engine.call_and_store import Compiled, Pipeline
from ..engine.sharding import Placement, constrained, follow, join_mesh, placement
from ..engine.tracing import unaliased
from ..module.live_lists import LiveList
from ..module.module import Module
from ..module.parameter import is_narrow, wide_dtype
from ..runtime import contexts
from ..runtime.bounded_cache import Kept
from ..runtime.jax_private import is_debugging
from ..runtime.memory import owned
from ..state import frame as frames
from ..state.cell import Cell
from ..state.gradient import unless_consumed
from ..state.lending import using
from ..state.packed import padded, stored_cells
from ..state.structure import Snapshot, get_stamp, process, structure_of
from ..state.walk import Walk, join, walk_of
from .clip import norm
from .hyperparameters import VectorLayout, complement
from .numpy_modules import Foreign, overlapping
from .reading import Reading
from .units import Unit, make_units, over_packs, single, without_padding


def ids_of(lists: list[list[Any]]) -> list[Any]:
    """Which modules there are, group by group."""
    return [*map(id, lists[0])] if len(lists) == 1 else [[*map(id, modules)] for modules in lists]


class Plan:
    """The cells of an optimizer in the order in which its compiled update takes them."""

    def __init__(
        self, opt: Any, native: dict[Cell, str], foreign: list[Foreign], groups: dict[Cell, int], version: object
    ) -> None:
        self.modules = list(opt.modules)
        walks = [walk_of(module) for module in self.modules if isinstance(module, Module)]
        self.around = len(self.modules) - len(walks) - len(foreign)  # objects whose modules may change unseen
        self._seen = [(walk.cells, walk.spec.paths) for walk in walks]
        self._depend_on(version, opt, walks)
        self.ids = ids_of(opt._lists)
        self.foreign = foreign
        self.named = {path: cell for cell, path in native.items()}  # frozen ones too: they keep their state
        self.params = [cell for cell in native if cell.trainable]
        self.paths = [native[cell] for cell in self.params]
        self.grads = [cell.grad for cell in self.params]
        self.fresh = True  # no step has been taken with this plan
        self.looked: object = None  # see `habits.look`
        self.extra: list[Cell] = []
        for module in foreign:
            self.extra += module.cells
            self.named |= {f"{module.label}.{j}": cell for j, cell in enumerate(module.cells)}
        self.groups = groups
        self.shapes = {cell: getattr(cell.value, "shape", ()) for cell in self.params}  # whatever leaves were put in
        for module in foreign:
            self.shapes |= {cell: a.shape for cell, a in zip(module.cells, module.arrays(), strict=True)}
        order = {cell: i for i, cell in enumerate(opt._order)}
        singles = [single(opt, cell, order, groups, shape) for cell, shape in self.shapes.items()]
        self.tail = [*opt._shared.values(), *([] if opt._seen is None else [opt._seen]), opt._steps]
        self.owned = [*self.params, *(c for unit in singles for c in unit.state), *self.tail]
        hyper = opt._hyper
        settings = [
            Settings(tuple(hyper.flags_of(g).items()), tuple(hyper.schedules_of(g).items()), hyper.start_of(g))
            for g in range(len(opt._lists))
        ]
        self.reading = Reading(opt)
        self.keys: list[Any] = []  # of its programs
        self.rule = opt._form or type(opt), tuple(settings), hyper.layout, self.reading.key
        self._num_steps, self._clocks = len(order), opt._clocks
        self.update = _update_for(self, self._key(singles, len(self.params), self.owned))[1]
        self.pipeline: Any = None  # made when a step is first taken outside of traces

    def _depend_on(self, version: object, opt: Any, walks: list[Walk]) -> None:
        """Note what the plan follows from: `_parts` decide about it; with the modules' structure unchanged, so are these."""
        parts = [structure_of(opt), opt._hyper.structure, *opt._shared.values(), opt._steps]
        parts += [cell for _, state in opt._state.values() for cell in state]
        stamps = list(map(get_stamp, parts))
        cells_of = list(dict.fromkeys(cell for walk in walks for cell in walk.cells))
        known = {part: stamp for walk in walks for part, stamp in zip(walk.parts, walk.stamps, strict=True)}
        parts += [*cells_of, *dict.fromkeys(cell.pack.structure for cell in cells_of if cell.pack is not None)]
        stamps += [known.get(part) for part in parts[len(stamps) :]]
        self._parts = Snapshot(version, parts, stamps)
        self._see(version, walks)

    def _see(self, version: object, walks: list[Walk]) -> None:
        parts, stamps = list(self._parts.parts), list(self._parts.stamps)
        for walk in walks:
            parts += walk.parts
            stamps += walk.stamps
        self._all = Snapshot(version, parts, stamps)
        self.watched = [look for walk in walks for look in walk.watched]  # see `Walker.watch`

    def unchanged(self) -> bool:
        """True if nothing that the plan was made of has changed."""
        return not self.around and self._all.holds()

    def still_fits(self) -> bool:
        """True if the modules have the parameters that they had: their modes and other static attributes do not matter."""
        version = process.version
        if self.around or not self._parts.holds():
            return False
        walks = [walk_of(module) for module in self.modules if isinstance(module, Module)]
        if [(walk.cells, walk.spec.paths) for walk in walks] != self._seen:
            return False
        self._see(version, walks)
        return True

    def _key(self, units: list[Unit], num_native: int, owned: list[Cell]) -> Any:
        settings = self.rule[1]

        def structure_of(unit: Unit) -> Any:
            clock, decayed = self._clocks[unit.positions[0]], settings[unit.group].decayed(unit.shapes, unit.size)
            return unit.tree, unit.positions, clock, unit.group, decayed, unit.size

        structures = tuple(map(structure_of, units))
        return (*self.rule, num_native, structures, self._num_steps, placement(owned))

    def rename(self) -> None:
        """Have this plan's programs be found by what is read by name, less what the rule and schedules change themselves."""
        before = self.rule
        self.rule = (*before[:3], self.reading.key)
        for key in self.keys:
            found = _updates.get(key)
            if found is not None:
                _updates.set((*self.rule, *key[4:]), found)
        for settings in before[1]:
            jitted = _rules.get((before[0], settings.flags, before[3]))
            if jitted is not None:
                _rules.set((before[0], settings.flags, self.reading.key), jitted)

    def values(self) -> dict[str, Any]:
        """The parameters' arrays by path, frozen ones and those of NumPy included."""
        arrays = [array for module in self.foreign for array in module.arrays()]
        foreign = dict(zip(self.extra, arrays, strict=True))
        return {path: foreign.get(cell, cell.value) for path, cell in self.named.items()}

    def compile(self, opt: Any) -> None:
        """Make the pipeline of a step outside of traces, which takes packed parameters as one."""
        units = make_units(opt, self.shapes, self.groups)
        native = [unit for unit in units if unit.grad is not None]
        owned = [*(unit.param for unit in native), *(c for unit in units for c in unit.state), *self.tail]
        grads = [unit.grad for unit in native]
        key = self._key(units, len(native), owned)
        compiled, update = _update_for(self, key)
        self.held, self.held_grads = stored_cells(owned), stored_cells(grads)
        if self.held != owned or self.held_grads != grads:
            compiled = _packed_update_for(key, update, owned, grads)
        self.compiled = compiled
        self.pipeline = Pipeline(compiled, self.held, self.held)


def make_plan(opt: Any) -> Plan:
    """Look at the optimizer's modules as they are now; make states for what is new, drop those of what has gone."""
    version = process.version
    if not opt.modules:
        raise ValueError(f"{type(opt).__name__}: modules is empty; give it a list with at least one module: `[model]`")
    native, foreign, groups = _parameters(opt)
    extra = [cell for module in foreign for cell in module.cells]
    if not native and not extra:
        raise ValueError(f"{type(opt).__name__}: the modules hold no parameters, so there is nothing to train")
    names = native | {cell: f"{module.label}.{j}" for module in foreign for j, cell in enumerate(module.cells)}
    _keep_state(opt, names, [*(c for c in native if c.trainable), *extra], foreign, groups)
    _keep_seen(opt)
    if frames.is_eager():
        states = [*opt._shared.values(), *(cell for _, state in opt._state.values() for cell in state)]
        seen = [] if opt._seen is None else [opt._seen]
        for param, (_, state) in opt._state.items():
            follow(param, state)
        for param in list(native)[:1]:
            follow(param, [*opt._shared.values(), opt._steps, *seen])
        join_mesh(stored_cells([*native, *states, opt._steps, *seen]))
    plan = Plan(opt, native, foreign, groups, version)
    if frames.is_eager() and any(cell.pack is not None for cell in plan.params):
        plan.compile(opt)  # now, so that compiled code, too, finds the state packed
    return plan


def _parameters(opt: Any) -> tuple[dict[Cell, str], list[Foreign], dict[Cell, int]]:
    """The parameters' cells with their paths, each once; the modules that are not ours; and the group of each cell."""
    native: dict[Cell, str] = {}
    foreign: list[Foreign] = []
    groups: dict[Cell, int] = {}
    group_of = [group for group, modules in enumerate(opt._lists) for _ in modules]
    arrays: dict[int, tuple[str, Any]] = {}
    _no_overlap(opt)
    for i, module in enumerate(opt.modules):
        if isinstance(module, Module):
            walk = walk_of(module)
            for path, cell in zip(walk.spec.paths, walk.cells, strict=True):
                if cell.kind == "parameter":
                    found_at = native.setdefault(cell, join(str(i), path))
                    if groups.setdefault(cell, group_of[i]) != group_of[i]:
                        raise _in_two_groups(opt, found_at, groups[cell], join(str(i), path), group_of[i])
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
                native[cell], groups[cell] = join(str(i), path), group_of[i]
            continue
        known = next((f for f in opt._foreign if f.module is module), None) or Foreign(module, str(i))
        known.label = str(i)
        for j, array in enumerate(known.own_arrays()):
            path = arrays.setdefault(id(array), (f"{i}.{j}", array))[0]
            if path != f"{i}.{j}":
                raise _twice(opt, path, f"{i}.{j}")
        foreign.append(known)
        groups.update(dict.fromkeys(known.cells, group_of[i]))
    held = [(path, array) for path, array in arrays.values() if isinstance(array, np.ndarray)]
    for first, second in overlapping([array for _, array in held]):
        raise _twice(opt, held[first][0], held[second][0], ", in arrays that share memory")
    vars(opt)["_foreign"] = foreign
    return native, foreign, groups


def _twice(opt: Any, first: str, second: str, why: str = "") -> ValueError:
    return ValueError(
        f"{type(opt).__name__}: the same parameter is reached twice through modules, as {first} and as {second}{why}."
        " List only one of the two."
    )


def _in_two_groups(opt: Any, first: str, its_group: int, second: str, group: int) -> ValueError:
    return ValueError(
        f"{type(opt).__name__}: one tied parameter is in two groups, as {first} in groups[{its_group}] and as {second} in"
        f" groups[{group}], and it can have the settings of one only. Put the modules that share it into one group."
    )


def _no_overlap(opt: Any) -> None:
    """Raise if one listed module is, or is inside, another one: its parameters would be reached twice."""
    modules = list(opt.modules)
    places: dict[int, int] = {}
    for i, module in enumerate(modules):
        first = places.setdefault(id(module), i)
        if first != i:
            _refuse_overlap(opt, modules, first, i)
    for j, module in enumerate(modules):
        for inner in walk_of(module).objects if isinstance(module, Module) else ():
            if places.get(inner, j) != j:
                _refuse_overlap(opt, modules, places[inner], j)


def _refuse_overlap(opt: Any, modules: list[Any], i: int, j: int) -> None:
    """Raise for `modules[i]`, which `modules[j]` is or holds, unless there is nothing in it to be reached."""
    if not isinstance(modules[i], Module):
        raise _twice(opt, str(i), str(j))
    inner, outer = walk_of(modules[i]), walk_of(modules[j])
    if inner.cells:
        second = outer.spec.paths[outer.cells.index(inner.cells[0])]
        why = f": modules[{i}] is part of modules[{j}]"
        raise _twice(opt, join(str(i), inner.spec.paths[0]), join(str(j), second), why)


def _keep_state(
    opt: Any, names: dict[Cell, str], trainable: list[Cell], foreign: list[Foreign], groups: dict[Cell, int]
) -> None:
    """Bring `opt._state`, `_order` and `_steps` in line with the parameters that there are."""
    arrays = {c: a for module in foreign for c, a in zip(module.cells, module.arrays(), strict=True)}
    every = list(names)
    state = {cell: opt._state[cell] for cell in every if cell in opt._state}
    begun = opt._begin_states(state, trainable, names, groups, arrays)  # they count their steps from here
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
    opt._clocks = _clocks(opt, every, trainable)
    opt._state, opt._order, opt._grows = state, list(every), False


def begin_states(
    opt: Any, state: dict[Cell, Any], trainable: list[Cell], groups: Mapping[Cell, int], arrays: Mapping[Cell, Any]
) -> set[Cell]:
    """Ask the rule for the states of parameters that have none, or may have more now; gives those that begin now."""
    settings = [_settings(opt, g) for g in range(len(opt._lists))]
    begun = set()
    lent = not type(opt).__module__.startswith("minitorch_jax.")  # a user's rule may hold an array that it gives
    for cell in trainable:
        if cell not in state or not state[cell][1] or opt._grows:
            with contexts.full_width([arrays.get(cell, cell.value)]):
                p = jnp.asarray(owned(arrays[cell])) if cell in arrays else cell.value
                if settings[groups[cell]].master_weights and is_narrow(p):
                    p = p.astype(jnp.float32)
                leaves, tree = jax.tree.flatten(type(opt).init_state(p, settings[groups[cell]]))
            made = [Cell(leaf, "state", lent=lent, birth=cell.birth) for leaf in unaliased(leaves, [p])]
            if cell in state and state[cell][1]:
                tree, made = _grown(state[cell], tree, made)
            elif leaves and cell in opt._state:
                begun.add(cell)
            state[cell] = tree, made
        _keep_master(state, cell, settings[groups[cell]].master_weights and is_narrow(cell.value))
    return begun


def _settings(opt: Any, group: int) -> SimpleNamespace:
    """What decides which states there are."""
    hyper = opt._hyper
    return SimpleNamespace(**{name: hyper.given_number(name, group) for name in hyper.given}, **hyper.flags_of(group))


def begins_state(opt: Any, plan: Plan, name: str, value: Any, group: int | None) -> bool:
    """Whether the rule, with another value of a setting, would keep more of some parameter than it does now."""
    asked = set()
    for cell in plan.params:
        g, (tree, held) = plan.groups[cell], opt._state.get(cell, (None, []))
        like = jax.ShapeDtypeStruct(cell.value.shape, cell.value.dtype)
        follows = g == group or (group is None and not (opt._hyper.own and name in opt._hyper.own[g]))
        if not follows or (g, like, tree) in asked:
            continue
        asked.add((g, like, tree))
        settings = _settings(opt, g)
        setattr(settings, name, value if isinstance(value, int | float) else 1.0)
        needed = jax.eval_shape(lambda p, h=settings: type(opt).init_state(p, h), like)
        now = jax.tree.unflatten(tree, held) if held else ()
        if len(jax.tree.leaves(needed)) > len(jax.tree.leaves(now.rule_state if isinstance(now, Master) else now)):
            return True
    return False


def _keep_seen(opt: Any) -> None:
    """Make the cell of what a step sees of its gradients, if it is to, or drop it."""
    if not any(opt._hyper.flags_of(g)["track_grad_norm"] for g in range(len(opt._lists))):
        opt._seen = None
    elif opt._seen is None:
        one = jnp.ones_like(opt._steps.value[..., -1], jnp.float32)  # of an ensemble, one each
        opt._seen = Cell(jnp.stack([0 * one, one], axis=-1), "seen", birth=opt._steps.birth)


def _clocks(opt: Any, every: list[Cell], trainable: Iterable[Cell]) -> tuple[int, ...]:
    """For each parameter, the place of the first that ticks with it: what depends on t is computed once for all."""
    steps, ticking = opt._steps.value, set(trainable)
    first: dict[Any, int] = {}
    counts: Any
    if isinstance(steps, jax.Array | np.ndarray) and not isinstance(steps, jax.core.Tracer):
        columns = using(opt._steps, np.asarray)
        counts = [columns[..., i].tobytes() for i in range(len(every))]
    else:  # within a trace nothing begins to tick apart, or together
        known = dict(zip(opt._order, opt._clocks, strict=True))
        counts = [known.get(cell) for cell in every]
    return tuple([first.setdefault(counts[i], i) if cell in ticking else i for i, cell in enumerate(every)])


def field_names(tree: Any) -> list[str]:
    """Names of the leaves of a rule's state: `momentum_buffer` of a NamedTuple's field."""
    state = jax.tree.unflatten(tree, range(tree.num_leaves))
    names = [keystr(path, simple=True, separator=".") or "state" for path, _ in tree_flatten_with_path(state)[0]]
    names = [name.removeprefix("rule_state.") for name in names]  # beside a master weight
    return ["state.step" if name == "step" else name for name in names]  # "step" is the parameter's step count


class Master(NamedTuple):
    """The state of a parameter of few bits whose value is kept in float32 beside it."""

    master_weight: Any
    rule_state: Any


def _grown(known: tuple[Any, list[Cell]], tree: Any, made: list[Cell]) -> tuple[Any, list[Cell]]:
    """A parameter's state, with what a rule's new one has besides."""
    now = jax.tree.unflatten(*known)
    rule_state = now.rule_state if isinstance(now, Master) else now
    leaves, old_tree = jax.tree.flatten(rule_state)
    old, new = dict(zip(field_names(old_tree), leaves, strict=True)), dict(zip(field_names(tree), made, strict=True))
    if new.keys() <= old.keys():
        return known
    rule_state = jax.tree.unflatten(tree, [old.get(name, cell) for name, cell in new.items()])
    leaves, tree = jax.tree.flatten(now._replace(rule_state=rule_state) if isinstance(now, Master) else rule_state)
    return tree, leaves


def _keep_master(state: dict[Cell, Any], cell: Cell, wanted: bool) -> None:
    """Add a float32 copy to a parameter's state, or drop it."""
    tree, held = state[cell]
    now = jax.tree.unflatten(tree, held)
    if wanted and not isinstance(now, Master):
        master = Cell(cell.value.astype(jnp.float32), "state", birth=cell.birth)
        leaves, tree = jax.tree.flatten(Master(master, now))
        state[cell] = tree, leaves
    elif isinstance(now, Master) and not wanted:
        leaves, tree = jax.tree.flatten(now.rule_state)
        state[cell] = tree, leaves


LAST = int(np.iinfo(np.int32).max)  # where the counts of steps stay


_updates, _rules = Kept(), Kept()


def _update_for(plan: Plan, key: Any) -> tuple[Compiled, Callable[..., Any]]:
    """The update of a structure, one for all optimizers that share it."""
    plan.keys.append(key)
    found = _updates.get(key)
    if found is None:
        users: WeakSet[Plan] = WeakSet()
        update = _make_update(lambda: next(iter(users)).rule, *key[4:])
        found = _updates.set(key, (Compiled(update, f"{key[0].__name__}_step"), update, users))
    compiled, update, users = found
    users.add(plan)
    return compiled, update


def forget_older(cls: type) -> None:
    """Drop what was compiled for an earlier class of the same name: the code that defines it was run again."""
    names = cls.__module__, cls.__qualname__

    def is_older(entry: Any) -> bool:
        rule = entry.key[0]
        return isinstance(rule, type) and rule is not cls and (rule.__module__, rule.__qualname__) == names

    _updates.drop(is_older)
    _rules.drop(is_older)


def _packed_update_for(
    key: Any, update: Callable[..., list[Any]], owned: Sequence[Cell], grads: Sequence[Cell]
) -> Compiled:
    """The same over packed cells, of which some are taken view by view."""
    stored_update, layout = over_packs(update, owned, grads)
    found: Compiled | None = _updates.get((*key, layout))
    return found or _updates.set((*key, layout), Compiled(stored_update, f"{key[0].__name__}_step"))


class Settings(NamedTuple):
    """What a program knows of a group's settings: its flags, its schedules, and where in the vector its numbers are."""

    flags: tuple[tuple[str, Any], ...]
    schedules: tuple[tuple[str, Any], ...]
    start: int

    def decayed(self, shapes: tuple[tuple[int, ...], ...], size: int | None = None) -> Any:
        """Of an array made of parameters of these shapes, what weight decay is multiplied by; None for all of it.

        `size`: of a packed one, where its padding begins.
        """
        if not dict(self.flags)["decay_matrices_only"]:
            return None
        parts = [(int(np.prod(shape)), len(shape) >= 2) for shape in shapes]
        if size is not None:  # padding is as what it comes after, so that one number may do for all
            parts.append((padded(size) - size, parts[-1][1]))
        return tuple(parts)

    def numbers(self, values: Any, layout: VectorLayout, num_steps: Any) -> dict[str, Any]:
        """The numbers by name: scalars, or tuples of them; as `one_minus` 1 minus each, exact where one is nearly 1."""
        found: dict[str, Any] = {}
        rests: dict[str, Any] = {}
        half = values.shape[0] // 2
        for name, start, length in layout:
            places = range(self.start + start, self.start + start + max(length, 1))
            numbers, lost = tuple([values[i] for i in places]), tuple([values[half + i] for i in places])
            found[name], rests[name] = (numbers, lost) if length else (numbers[0], lost[0])
        for name, schedule in self.schedules:
            found[name] = jax.tree.map(jnp.asarray, schedule(num_steps))
            rests[name] = jax.tree.map(jnp.zeros_like, found[name])
        return found | {"one_minus": jax.tree.map(complement, found, rests)}


def _make_update(
    source: Callable[[], tuple[Any, Sequence[Settings], VectorLayout, Any]],
    num_native: int,
    structures: Sequence[tuple[Any, tuple[int, ...], int, int, Any, int | None]],
    num_steps: int,
    places: Placement,
) -> Callable[..., Any]:
    """Lift a rule on one array to all of an optimizer's: `(owned, gradients, hyperparameters) -> owned`.

    `source` gives the rule, the settings of each group, their layout, and a key of what is read by name, while it is
    traced: it keeps none of them alive.
    """
    ticks = np.zeros(num_steps + 2, np.int32)
    ticks[[*(i for _, positions, *_ in structures for i in positions), num_steps]] = 1

    def each(params: Any, grads: Any, states: Any, values: Any, steps: Any) -> tuple[list[Any], list[Any]]:
        rule, settings, layout, reads = source()
        numbers = [group.numbers(values, layout, steps[num_steps]) for group in settings]
        clocks = {clock: jnp.minimum(steps[clock], LAST - 1) + 1 for _, _, clock, *_ in structures}
        new_params, new_states = [], []
        for p, g, s, (_, _, clock, group, decayed, size) in zip(params, grads, states, structures, strict=True):
            mine = numbers[group] | masked_decay(numbers[group], decayed)
            update_one = _one(rule, settings[group].flags, reads)
            if size is not None and is_debugging():
                update_one = without_padding(update_one, size)
            new_p, new_s = update_one(p, g, s, mine, clocks[clock])
            new_params.append(new_p)
            new_states += jax.tree.leaves(new_s)
        return new_params, new_states

    def update(
        owned: list[Any],
        grads: list[Any],
        values: Any,
        foreign: Sequence[Any] = (),
        foreign_grads: Sequence[Any] = (),
        extra: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[Any]:
        with contexts.full_width(owned):
            return update_all(owned, grads, values, foreign, foreign_grads, extra)

    def update_all(
        owned: list[Any],
        grads: list[Any],
        values: Any,
        foreign: Sequence[Any],
        foreign_grads: Sequence[Any],
        extra: Mapping[str, Any],
    ) -> list[Any]:
        rule, settings, *_ = source()
        skip_nonfinite, tracks = (
            any(dict(group.flags)[flag] for group in settings) for flag in ("skip_nonfinite", "track_grad_norm")
        )
        last = -2 if tracks else -1  # where the states end
        params, steps = [*owned[:num_native], *foreign], owned[-1]
        held = iter(owned[num_native:last])
        states = [jax.tree.unflatten(tree, [next(held) for _ in range(tree.num_leaves)]) for tree, *_ in structures]
        grads = [*map(unless_consumed, grads), *foreign_grads]
        if isinstance(rule, type):
            new_params, new_states = each(params, grads, states, jnp.asarray(values), steps)
        else:
            shared = dict(zip(rule.shared_names, held, strict=True))
            new_params, new_states = rule.update(params, grads, states, shared, extra)
        new_steps = jnp.minimum(steps, LAST - ticks) + ticks
        if skip_nonfinite or tracks:
            finite = jnp.stack([jnp.isfinite(g).all() for g in grads if g is not None] or [jnp.array(True)]).all()
        if skip_nonfinite:
            old = [*params, *owned[num_native:last]]
            kept = [jnp.where(finite, new, was) for new, was in zip([*new_params, *new_states], old, strict=True)]
            new_params, new_states = kept[: len(params)], kept[len(params) :]
            skipped = steps.at[num_steps + 1].set(jnp.minimum(steps[num_steps + 1], LAST - 1) + 1)
            new_steps = jnp.where(finite, new_steps, skipped)
        seen = [jnp.stack([norm(grads).astype(jnp.float32), finite.astype(jnp.float32)])] if tracks else []
        out = [*new_params[:num_native], *new_states, *seen, new_steps]
        if places:
            out = [constrained(value, place) for value, place in zip(out, places, strict=True)]
        out += new_params[num_native:]
        return unaliased(out, [*jax.tree.leaves((grads, values)), *foreign])

    return update


def masked_decay(numbers: dict[str, Any], decayed: Any) -> dict[str, Any]:
    """The weight decay of an array of which some parts may have none."""
    if decayed is None or "weight_decay" not in numbers:
        return {}
    sizes, chosen = zip(*decayed, strict=True)
    decay = numbers["weight_decay"]
    if len(set(chosen)) > 1:
        return {"weight_decay": decay * np.repeat(np.asarray(chosen, decay.dtype), sizes)}
    return {"weight_decay": decay if chosen[0] else jnp.zeros_like(decay)}


def _one(rule: Any, flags: tuple[tuple[str, Any], ...], reads: Any) -> Callable[..., tuple[Any, Any]]:
    """A rule's update of one parameter; jitted, so that it is traced once for all of a shape."""
    known: Callable[..., tuple[Any, Any]] | None = _rules.get((rule, flags, reads))
    if known is not None:
        return known

    def update(p: Any, g: Any, s: Any, numbers: dict[str, Any], t: Any) -> tuple[Any, Any]:
        return lifted(rule, p, g, s, numbers, dict(flags), t)

    update.__name__ = rule.__name__
    made: Callable[..., tuple[Any, Any]] = _rules.set((rule, flags, reads), jax.jit(update))
    return made


def lifted(
    rule: Any, p: Any, g: Any, s: Any, numbers: dict[str, Any], flags: dict[str, Any], t: Any
) -> tuple[Any, Any]:
    """One parameter's update, computed in at least float32, with the dtypes that went in."""
    dtype = wide_dtype(p.dtype)
    if isinstance(s, Master):  # unless the parameter has been given another value since
        same = s.master_weight.astype(p.dtype) == p
        master = jnp.where(same, s.master_weight, p.astype(dtype))
        master, state = lifted(rule, master, g, s.rule_state, numbers, flags, t)
        return master.astype(p.dtype), Master(master, state)

    def widen(x: Any) -> Any:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    numbers = jax.tree.map(widen, numbers)
    one_minus = numbers.pop("one_minus")
    h = SimpleNamespace(one_minus=SimpleNamespace(**one_minus), t=t.astype(dtype), **flags)
    vars(h).update(numbers)
    wide_g = jnp.zeros(p.shape, dtype) if g is None else widen(g).astype(dtype)
    new_p, new_s = rule.update(widen(p), wide_g, jax.tree.map(widen, s), h)
    return new_p.astype(p.dtype), jax.tree.map(lambda new, old: new.astype(old.dtype), new_s, s)
