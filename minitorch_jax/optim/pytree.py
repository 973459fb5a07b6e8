"""An optimizer as a pytree, as a state dict, and as what compiled code reads and changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from threading import RLock
from typing import Any, Self, dataclass_transform
from weakref import ref

import jax
import jax.numpy as jnp
import numpy as np

from ..engine.tracing import Met
from ..module.module import Module
from ..runtime import contexts
from ..state import frame as frames
from ..state.cell import Cell
from ..state.concurrent_reads import steadily
from ..state.errors import TraceError
from ..state.gradient import CONSUMED, gradient, starting_value
from ..state.pytree import Builder, Stateful, build
from ..state.structure import Structure, changed, structure_of
from ..state.walk import Node, Spec, Walk, Walker, join
from . import state_dict as state
from .declaration import setting
from .hyperparameters import Hyperparameters
from .plan import Plan, ids_of
from .settings import Configured
from .states import field_names

# `_traced`: within a traced run, the modules that there were at its start.
CACHES: dict[str, Any] = {"_plan": None, "_planner": None, "_traced": None}

_opening = RLock()


@dataclass_transform(eq_default=False, field_specifiers=(setting,))
class Tree(Configured):
    """The part of an optimizer that is saved, copied, flattened and traced; see `Optimizer`.

    To type checkers the annotated attributes of a subclass are what its constructor takes; `declaration.py` makes it so.
    """

    __slots__ = ()

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything but the parameters: steps taken, hyperparameters, and each parameter's state by its path.

        Returns:
            `{"num_steps": int, "skipped": int, "hyperparameters": {name: value}, "fingerprints": {path: pair}, "state":
            {path: {"step": int, field: array}}}`; if there are groups, `"groups"`: a list of what each has of its own;
            if the rule keeps something for all parameters, `"shared"`: `{field: array}`; with `state_dtype=jnp.bfloat16`,
            the `"seed"` of its rounding (the arrays have the dtype, so it is no hyperparameter there). Paths start with
            the module's place in `modules`. A fingerprint is two numbers of a parameter's values, by which
            `load_state_dict` sees that modules are listed in another order.

        Example:
            >>> import jax
            >>> from minitorch_jax import nn, optim
            >>> opt = optim.SGD([nn.Linear(2, 1, key=jax.random.key(0))], lr=0.1, momentum=0.9)
            >>> {path: sorted(state) for path, state in opt.state_dict()["state"].items()}
            {'0.weight': ['momentum_buffer', 'step'], '0.bias': ['momentum_buffer', 'step']}
        """
        plan = self._known("state_dict")
        read_all = partial(state.state_dict, self, plan)
        return steadily(self._held_cells(), read_all) if frames.is_eager() else read_all()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what another optimizer's `state_dict()` gave. Load the modules' own states first.

        This optimizer keeps its `state_dtype`: state that was saved in another one is converted (to bfloat16: rounded to
        nearest), and it goes on with the seed that was saved, if there is one, or with its own.

        Raises:
            ValueError: one error that lists everything that does not fit, and each parameter whose state was saved for
                another one of those that there are; nothing has changed then.
        """
        state.load_state_dict(self, self._known("load_state_dict"), state_dict)

    def _known(self, method: str) -> Plan:
        """The plan, for a method that needs to know numbers, which compiled code does not."""
        plan = self._plan_now()
        if isinstance(self._steps.value, jax.core.Tracer):
            raise TraceError(
                f"{type(self).__name__}.{method}() was called inside compiled code (mt.jit, mt.scan, or a JAX transform),"
                " where the values of its counts and settings are not known. Call it outside, between calls"
            )
        return plan

    def _held_cells(self) -> list[Cell]:
        plan = self._plan_now()
        states = [cell for _, held in self._state.values() for cell in held]
        own = [*states, *self._common_cells(), self._hyper.cell]
        native = [cell for module in self.modules if isinstance(module, Module) for cell in module._held_cells()]
        return list(dict.fromkeys([*native, *plan.named.values(), *plan.grads, *own]))

    def _common_cells(self) -> list[Cell]:
        """What is kept for all parameters, in the order in which a step takes it."""
        optional = [cell for cell in (self._seen, self._seed) if cell is not None]
        return [*self._shared.values(), *optional, self._steps]

    def __getstate__(self) -> dict[str, Any]:
        self._plan_now()
        return {name: value for name, value in vars(self).items() if name not in CACHES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        older = {"_names": [None] * len(state["_lists"]), "_homes": {}}  # for a state of a version without these
        vars(self).update(older | state, **CACHES)

    # -- pytree -------------------------------------------------------------------------------------------------------

    def _followed_classes(self) -> tuple[Any, ...]:
        return tuple(dict.fromkeys([type(self), *(rule for rule in self._hyper.rules if rule is not None)]))

    def _follows(self) -> Iterator[tuple[str, Any]]:
        for settings in (self._hyper.given, *self._hyper.own):
            yield from ((name, value) for name, value in settings.items() if callable(value))
        yield from ((str(i), module) for i, module in enumerate(self.modules) if isinstance(module, Stateful))

    def _describe(self, walker: Walker, path: str) -> Node:
        plan = self._plan_now()
        if plan.foreign:
            raise TypeError(
                f"{type(self).__name__} holds modules of NumPy arrays, which are updated in place and cannot be traced:"
                " such an optimizer is no pytree. Convert them with `minitorch_jax.adapters.numpy`."
            )
        self._note_in(walker)
        if plan.around:
            walker.watch(structure_of(self).change)
        modules = tuple([walker.visit(m, join(path, f"modules.{i}")) for i, m in enumerate(self.modules)])
        grads = tuple(
            [
                (walker.index[param], walker.cell(grad, join(path, f"grads.{name}")))
                for name, param, grad in zip(plan.paths, plan.params, plan.grads, strict=True)
            ]
        )
        state = []
        names = {param: name for name, param in plan.named.items()}
        for param in self._order:
            tree, held = self._state.get(param, (None, []))
            fields = field_names(tree) if held else []
            numbers = tuple(
                [walker.cell(c, join(path, f"state.{names[param]}.{f}")) for c, f in zip(held, fields, strict=True)]
            )
            state.append((walker.index[param], tree, numbers, self._homes[param]))
        state.append(self._clocks)
        steps = walker.cell(self._steps, join(path, "steps"))
        values = walker.cell(self._hyper.cell, join(path, "hyperparameters"))
        seen = None if self._seen is None else walker.cell(self._seen, join(path, "seen"))
        seed = None if self._seed is None else walker.cell(self._seed, join(path, "seed"))
        shared = tuple([(name, walker.cell(c, join(path, f"shared.{name}"))) for name, c in self._shared.items()])
        counts = steps, seen, seed, shared, self._form
        places = {id(module): i for i, module in enumerate(self.modules)}
        lists = tuple([tuple([places[id(module)] for module in listed]) for listed in self._lists])
        which = lists, tuple(self._names)
        return modules, which, grads, tuple(state), counts, values, self._hyper.statics()

    @classmethod
    def _statics(cls, payload: Node, path: str) -> Iterator[tuple[str, Any]]:
        modules, (_, names), _, _, _, _, (_, schedules, flags, groups, rules) = payload
        for i, node in enumerate(modules):
            yield join(path, f"modules.{i}"), node
        own = [
            (f"groups.{i}.{name}", dict(known).get(name, "its own"))
            for i, (names, known) in enumerate(groups)
            for name in names
        ]
        own += [(f"groups.{i}.names", globs) for i, globs in enumerate(names)]
        own += [(f"groups.{i}.rule", rule) for i, rule in enumerate(rules)]
        for name, value in (*flags, *schedules, *own):
            yield join(path, name), ("static", type(value), value)

    def _leaves(self, walk: Walk) -> list[Any]:
        values = super()._leaves(walk)
        params = {param.grad: param.value for param in walk.params}
        absent: dict[int, Any] = {}
        for i, cell in enumerate(walk.cells):
            like = params.get(cell)
            if isinstance(like, jax.Array):
                # no value stands for a gradient that is not there any more, but NaN shows wherever it is used
                lost = starting_value(cell) is CONSUMED
                values[i] = None if lost else gradient(cell)
                if values[i] is None:
                    absent[i] = np.full(like.shape, np.nan if lost else 0, like.dtype), like
        with contexts.constants(), contexts.full_width(values):
            for i, value in zip(absent, _on_devices(list(absent.values())), strict=True):
                values[i] = value
        return values

    @classmethod
    def _rebuild(cls, payload: Node, builder: Builder) -> Self:
        nodes, (lists, names), grads, state, (steps, seen, seed, shared, form), values, statics = payload
        self = object.__new__(cls)
        builder.begin(self)
        made = builder.cells
        *state, clocks = state
        hyper = Hyperparameters.rebuilt(cls.__name__, cls._ranges, statics, made[values])
        modules = list(map(builder.build, nodes))
        self._setup([[modules[i] for i in listed] for listed in lists], hyper, made[steps])
        for param, grad in grads:
            made[param].grad = made[grad]
        vars(self)["_state"] = {
            made[p]: (tree, [made[n] for n in held]) for p, tree, held, _ in state if tree is not None
        }
        vars(self).update(
            _names=list(names),
            _homes={made[p]: home for p, _, _, home in state},
            _order=[made[p] for p, _, _, _ in state],
            _clocks=clocks,
            _seen=None if seen is None else made[seen],
            _seed=None if seed is None else made[seed],
            _form=form,
            _shared={name: made[number] for name, number in shared},
        )
        self._note_in(builder.walker)
        return self

    @classmethod
    def _from_leaves(cls, spec: Spec, leaves: list[Any]) -> Any:
        """A copy; outside of transforms one that is opened when something of it is asked for.

        What `opt, loss = step(opt, x)` returns is mostly given to the next step as it is, and thousands of objects would be
        made for nothing.
        """
        if not frames.is_eager():
            return super()._from_leaves(spec, leaves)
        self: Any = Stateful.__new__(cls)
        object.__delattr__(self, "_walk")  # so that `__getattr__` is asked for it
        vars(self)["_closed"] = spec, leaves
        return self

    def _open(self) -> None:
        """Make the parts of a copy that nobody has looked into so far."""
        with _opening:
            closed = vars(self).get("_closed")
            if closed is not None:
                spec, leaves = closed
                made = build(spec, leaves, None)
                vars(self).update(vars(made))
                object.__setattr__(self, "_structure", made._structure)
                object.__setattr__(self, "_walk", made._walk)
                found = made._walk.optimizers
                found[:] = [ref(self) if reference() is made else reference for reference in found]
                del vars(self)["_closed"]

    def _unopened(self) -> tuple[Spec, list[Any]] | None:
        return vars(self).get("_closed")

    def _note_in(self, walker: Walker) -> None:
        """Have a walk over this optimizer depend on what changes beside its attributes."""
        walker.note(self._hyper.structure)
        walker.watch(partial(notice, self._lists, ids_of(self._lists), structure_of(self)))
        walker.optimizers.append(ref(self))

    def _touch(self) -> None:
        """Within a trace that has not been told of this optimizer, of which something is read: have it repeated."""
        frame = frames.local.frame
        if frame is not None:
            frame.touch(self._steps, self)

    def _have_lifted(self) -> None:
        """Within a trace that has not been told of this optimizer: have it repeated, now."""
        frame = frames.local.frame
        if frame is not None and frames.is_unlifted(self._steps):
            frame.touch(self._steps, self)  # it is repeated even if the user's code catches this
            raise Met([self])

    # -- what compiled code does besides writing cells: `tracing.Traced` calls these ----------------------------------

    def begin_run(self) -> Any:
        """What `undo_run` and `end_run` take, at the start of a traced run."""
        kept = (
            self._hyper.keep(),
            self._hyper.kinds(),
            [(modules, list(modules)) for modules in self._lists],
            self._traced,
        )
        vars(self)["_traced"] = ids_of(self._lists)
        return kept

    def end_run(self, kept: Any) -> tuple[tuple[int, str], ...]:
        """Which settings have become numbers, or a group's own; raises for what a compiled program would not do again."""
        self._refuse_other_modules()
        pairs = enumerate(zip(self._hyper.kinds(), kept[1], strict=True))
        return tuple((i, name) for i, (now, was) in pairs for name in now if was.get(name, now) is not now[name])

    def undo_run(self, kept: Any) -> None:
        """Have settings and modules as they were."""
        hyper, kinds, lists, vars(self)["_traced"] = kept
        for modules, before in lists:
            if [*map(id, modules)] != [*map(id, before)]:
                modules[:] = before
        if self._hyper.kinds() != kinds:
            self._hyper.put_back(hyper)
            vars(self)["_plan"] = None
            changed(self)

    def _refuse_other_modules(self) -> None:
        """Within a traced run: raise if a list of modules was changed in it, before anything is made of that."""
        if self._traced is not None and self._traced != ids_of(self._lists):
            raise TraceError(
                f"{type(self).__name__}.modules was changed inside compiled code, which would happen at the first call only:"
                " later ones run the compiled program. Change the list between calls"
            )

    def settle(self, settings: tuple[tuple[int, str], ...]) -> None:
        """Have settings be numbers, those that the vector has, as at the end of a traced run."""
        if settings:
            self._hyper.become_numbers(settings)
            vars(self)["_plan"] = None
            changed(self)


def notice(lists: list[list[Any]], ids: list[Any], structure: Structure) -> None:
    """Notice that a list of modules was changed in place."""
    if ids_of(lists) != ids:
        structure.change()


def _on_devices(pairs: list[tuple[Any, Any]]) -> list[Any]:
    """NumPy arrays as those of JAX, each where another array lies, in one call."""
    if any(isinstance(like, jax.core.Tracer) for _, like in pairs):
        return [jnp.asarray(array) for array, _ in pairs]
    if not any(like.committed for _, like in pairs):  # a device that is named would bind the arrays to it
        return jax.device_put([array for array, _ in pairs])
    return [jax.device_put(array, like.sharding if like.committed else None) for array, like in pairs]
