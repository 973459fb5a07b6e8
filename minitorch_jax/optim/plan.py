"""What a step of an optimizer is about, worked out once per structure: which cells, with which states and settings."""

from __future__ import annotations

from collections.abc import Sequence
from threading import get_ident
from typing import Any

import numpy as np

from ..engine.sharding import follow, join_mesh, placement
from ..module.live_lists import LiveList
from ..module.module import Module
from ..runtime.copies import everywhere
from ..runtime.jax_private import is_debugging
from ..state import frame as frames
from ..state.cell import Cell, bound_to
from ..state.concurrent_reads import lendings
from ..state.packed import stored_cells
from ..state.static_values import module_of
from ..state.structure import Snapshot, get_stamp, process, structure_of
from ..state.walk import Walk, join, walk_of
from .groups import no_module
from .numpy_modules import Foreign, overlapping
from .packed_parameters import Unit, make_units, single
from .rounding import Part
from .selection import Found, Selection
from .states import keep_seed, keep_seen, keep_state
from .update import Each, Settings, StepCells, Update, step_function, take_step


def ids_of(lists: list[list[Any]]) -> list[Any]:
    """Which modules there are, group by group."""
    return [id(module) for module in lists[0]] if len(lists) == 1 else [[*map(id, modules)] for modules in lists]


class Plan:
    """The cells of an optimizer in the order in which its update takes them."""

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
        self.looked: object = None  # see `torch_habits.look`
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
        self.tail = opt._common_cells()
        self.owned = [*self.params, *(c for unit in singles for c in unit.state), *self.tail]
        hyper = opt._hyper
        settings = [
            Settings(
                opt._rule_of(g),
                tuple(hyper.flags_of(g).items()),
                tuple(hyper.schedules_of(g).items()),
                hyper.layout_of(g),
                hyper.start_of(g),
            )
            for g in range(len(opt._lists))
        ]
        self._rule = opt._form or type(opt), tuple(settings)
        self._debugs = False  # whether JAX looks for NaN, of which padding may be full
        self._num_steps, self._clocks, self._hyper = len(order), opt._clocks, hyper.cell
        self._paths = list(self.named)
        self.inside = self._cells(singles)  # what a step in a trace is about
        self.update = self.inside.about
        self.step = step_function(self.update)
        self._outside: StepCells | None = None
        self.by_numpy: Any = (
            None  # what takes the steps by NumPy; False if nothing does, None if that was not asked yet
        )

    def _depend_on(self, version: object, opt: Any, walks: list[Walk]) -> None:
        """Take the snapshots that tell if the plan still holds: of the cells that it names, and of all that leads to them."""
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
        # the thread of the last step in eager code, what repeats it, and its arguments
        self._last: tuple[int, Any, Any] = 0, None, ()

    def unchanged(self) -> bool:
        """True if nothing that the plan was made of has changed."""
        seen = self._all
        if self.around or not (seen.version is process.version or seen.holds()):
            return False
        for look in self.watched:
            look()
        return not self.watched or seen.holds()

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

    def _cells(self, units: Sequence[Unit]) -> StepCells:
        """What a step over some units is about."""
        native = [unit for unit in units if unit.grad is not None]
        owned = [*(unit.param for unit in native), *(c for unit in units for c in unit.state), *self.tail]
        update = Update(*self._rule, len(native), tuple(map(self.each, units)), self._num_steps, placement(owned))
        return StepCells(update, owned, [unit.grad for unit in native], self._hyper)

    def each(self, unit: Unit) -> Each:
        """What an update knows of a unit."""
        settings = self._rule[1][unit.group]
        decayed = settings.decayed(unit.shapes, unit.size)
        size = unit.size if self._debugs else None
        parts: tuple[Part, ...] = ()
        if settings.rounds:
            parts = tuple([(self._paths[i], shape) for i, shape in zip(unit.positions, unit.shapes, strict=True)])
        return Each(unit.tree, unit.positions, self._clocks[unit.positions[0]], unit.group, decayed, size, parts)

    def outside(self, opt: Any) -> StepCells:
        """What a step in eager code is about: packed parameters go in as one array."""
        if self._outside is None or (self._outside is not self.inside and self._debugs is not is_debugging()):
            self._debugs = is_debugging()
            packed = any([cell.pack is not None for cell in self.owned])
            self._outside = self._cells(make_units(opt, self.shapes, self.groups)) if packed else self.inside
            grads = stored_cells(self._outside.grads)
            self.first_grad = grads[0] if grads else None
        return self._outside

    def take(self, cells: StepCells, extra: tuple[Any, ...]) -> None:
        """Take a step in eager code."""
        self.step(cells, *extra)
        quick = None if extra or self.fresh or self.around or self.watched or self._debugs else self.step.quick()
        self._last = (0, None, ()) if quick is None else (get_ident(), quick, (cells,))

    def repeat(self, lists: list[list[Any]]) -> bool:
        """Take a step as the last one was, for an optimizer with these modules. False: that needs the long way."""
        thread, quick, args = self._last
        if thread != get_ident() or self._all.version is not process.version or self.looked is not lendings.last:
            return False
        first = self.first_grad
        if (first is not None and first.stored is None) or ids_of(lists) != self.ids or not frames.is_eager():
            return False
        return quick(take_step, args, {}) is not None

    def values(self) -> dict[str, Any]:
        """The parameters' arrays by path, frozen ones and those of NumPy included."""
        arrays = [array for module in self.foreign for array in module.arrays()]
        foreign = dict(zip(self.extra, arrays, strict=True))
        return {path: foreign.get(cell, cell.value) for path, cell in self.named.items()}


def make_plan(opt: Any) -> Plan:
    """Look at the optimizer's modules as they are now; make states for what is new, drop those of what has gone."""
    version = process.version
    if any(module_of(module) is not module for module in opt.modules):
        vars(opt)["_lists"] = [list(map(module_of, modules)) for modules in opt._lists]
    if not opt.modules:
        raise ValueError(f"{type(opt).__name__}: modules is empty; give it a list with at least one module: `[model]`")
    native, foreign, groups = _parameters(opt)
    extra = [cell for module in foreign for cell in module.cells]
    if not native and not extra:
        raise ValueError(f"{type(opt).__name__}: the modules hold no parameters, so there is nothing to train")
    names = native | {cell: f"{module.label}.{j}" for module in foreign for j, cell in enumerate(module.cells)}
    keep_state(opt, names, [*(c for c in native if c.trainable), *extra], foreign, groups)
    keep_seen(opt)
    keep_seed(opt)
    if frames.is_eager():
        _place(opt, list(native))
    plan = Plan(opt, native, foreign, groups, version)
    if frames.is_eager() and any(cell.pack is not None for cell in plan.params):
        plan.outside(opt)  # now, so that compiled code, too, finds the state packed
    return plan


def _place(opt: Any, params: list[Cell]) -> None:
    """Put what the optimizer keeps where its parameters lie; what it keeps for all of them, on all their devices."""
    common = opt._common_cells()
    join_mesh([*params, *(cell for _, state in opt._state.values() for cell in state), *common])
    for param, (_, state) in opt._state.items():
        follow(param, state)
    for param in params:
        sharding = bound_to(param.value)
        if sharding is not None:
            follow(param, common)
            opt._hyper.place(everywhere(sharding))
            break


def _parameters(opt: Any) -> tuple[dict[Cell, str], list[Foreign], dict[Cell, int]]:
    """The parameters' cells with their paths, each once; the modules that are not ours; and the group of each cell."""
    native: dict[Cell, str] = {}
    foreign: list[Foreign] = []
    candidates: list[Found] = []
    arrays: dict[int, tuple[str, Any]] = {}
    by_name = any(names is not None for names in opt._names)
    _no_overlap(opt)
    for i, module in enumerate(opt.modules):
        if isinstance(module, Module):
            for path, cell in walk_of(module).named():
                if cell.kind == "parameter":
                    native.setdefault(cell, join(str(i), path))
            every_name = (
                ((path, cell) for path, _, _, cell in module._entries()) if by_name else walk_of(module).named()
            )
            candidates += [
                Found(i, path, cell, cell.value, cell.trainable)
                for path, cell in every_name
                if cell.kind == "parameter"
            ]
            continue
        error = no_module(type(opt).__name__, i, module)
        if error is not None:
            raise error
        found = module.parameters()
        if isinstance(found, LiveList):  # an object around a Module of ours
            for path, cell in zip(found._paths, found.cells(), strict=True):
                if cell in native:
                    raise _twice(opt, native[cell], join(str(i), path))
                native[cell] = join(str(i), path)
                candidates.append(Found(i, path, cell, cell.value, cell.trainable))
            continue
        known = next((f for f in opt._foreign if f.module is module), None) or Foreign(module, str(i))
        known.label = str(i)
        mine = known.own_arrays()
        for j, array in enumerate(mine):
            path = arrays.setdefault(id(array), (f"{i}.{j}", array))[0]
            if path != f"{i}.{j}":
                raise _twice(opt, path, f"{i}.{j}")
        foreign.append(known)
        candidates += [Found(i, str(j), known.cells[j], array, True) for j, array in enumerate(mine)]
    held = [(path, array) for path, array in arrays.values() if isinstance(array, np.ndarray)]
    for first, second in overlapping([array for _, array in held]):
        raise _twice(opt, held[first][0], held[second][0], ", in arrays that share memory")
    groups = Selection(opt).groups(candidates)
    vars(opt)["_foreign"] = foreign
    return {cell: path for cell, path in native.items() if cell in groups}, foreign, groups


def _twice(opt: Any, first: str, second: str, why: str = "") -> ValueError:
    return ValueError(
        f"{type(opt).__name__}: the same parameter is reached twice through modules, as {first} and as {second}{why}."
        " List only one of the two."
    )


def _no_overlap(opt: Any) -> None:
    """Raise if one listed module is, or is inside, another one: its parameters would be reached twice.

    One module may be in several groups, if all but one of them have only some of it, by name.
    """
    listed = [(g, module) for g, modules in enumerate(opt._lists) for module in modules]
    modules = [module for _, module in listed]
    places: dict[int, int] = {}
    whole: set[int] = set()
    for i, (g, module) in enumerate(listed):
        first = places.setdefault(id(module), i)
        again = first != i and (listed[first][0] == g or (opt._names[g] is None and id(module) in whole))
        if again:
            _refuse_overlap(opt, modules, first, i)
        whole |= {id(module)} if opt._names[g] is None else set()
    for j, module in enumerate(modules):
        for inner in walk_of(module).objects if isinstance(module, Module) and places[id(module)] == j else ():
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
