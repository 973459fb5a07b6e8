"""The Optimizer facade: mutable `modules` and `lr`, `step()` and `zero_grad()`, over one compiled update."""

from __future__ import annotations

import difflib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import lru_cache, partial
from threading import RLock, get_ident
from types import SimpleNamespace
from typing import Any, ClassVar, Self, TypedDict
from weakref import ref

import jax
import jax.numpy as jnp
import numpy as np

from ..engine.call_and_store import Pipeline
from ..engine.tracing import Met
from ..module import habits
from ..module.module import Module
from ..runtime import contexts, interrupts
from ..state import access, births
from ..state import frame as frames
from ..state.cell import Cell, get_stored, get_value
from ..state.errors import TraceError
from ..state.gradient import CONSUMED, gradient, starting_value
from ..state.lending import lendings, steadily, using
from ..state.pytree import Builder, Stateful, build, change_class
from ..state.structure import Structure, changed, structure_of
from ..state.undo import all_or_nothing
from ..state.walk import Node, Spec, Walk, Walker, join
from . import state_dict as state
from .groups import Group, as_list, group_modules, own_settings, split
from .hyperparameters import Hyperparameters
from .plan import Plan, begin_states, begins_state, field_names, forget_older, ids_of, make_plan

# `_traced`: within a traced run, the modules that there were at its start.
_CACHES: dict[str, Any] = {**{"_plan": None, "_planner": None, "_traced": None}}


class Options(TypedDict, total=False):
    """What every optimizer takes by keyword; see `Optimizer`."""

    skip_nonfinite: bool
    track_grad_norm: bool
    decay_matrices_only: bool
    master_weights: bool


class Optimizer(Stateful):
    """Plain SGD, `p = p - lr * grad`, and the base of every optimizer.

    `modules` and `lr` are readable and can be changed at any time, effective at the next step: assigning `lr` never
    compiles again, and a change of the list keeps the state of what stays.

    A new optimizer is a subclass with two pure functions of one array, as static methods: `init_state(p, h)`, the state
    of a parameter (any pytree of arrays), and `update(p, g, s, h)`, giving the new parameter and state. `h` holds the
    hyperparameters by name, the 1-based step `t`, and as `one_minus` 1 minus each number, exact where that is nearly 1.
    Its `__init__` passes hyperparameters on by keyword: numbers become dynamic, booleans and strings static. Arithmetic is
    in float32 for parameters of fewer bits; dtypes never change. A rule that treats each element by itself should say so
    with `elementwise = True`: then packed parameters (`mt.pack`) are updated as one array.

    Unlike torch, a step takes parameters that no loss has used, too, with gradients of zeros: momentum, weight decay and
    Adam's averages go on moving them. `freeze()` leaves them out.

    Args:
        modules: a list of Modules, or of any objects whose `parameters()` and `grads()` give lists of NumPy arrays, which
            are updated in place; or a list of groups, `{"modules": [...], "lr": ...}`, with settings of their own (see
            `groups`).
        lr: learning rate, a finite number >= 0, or a function of the step count (0 at the first step).
        skip_nonfinite: leave everything as it is at a step whose gradients are not all finite; `skipped` counts them.
        track_grad_norm: have each step note the norm of the gradients and whether they are finite: `grad_norm`,
            `grads_finite`.
        decay_matrices_only: leave parameters of fewer than two dimensions (biases, the scales of normalisation layers)
            out of weight decay.
        master_weights: keep a float32 copy of parameters of fewer bits (bfloat16, float16), which the steps add up in:
            otherwise a step smaller than their rounding is lost.

    Raises:
        ValueError: if `modules` is empty, reaches a parameter twice, or holds no parameter; if a hyperparameter is out of
            its range.
        TypeError: if `modules` is not a list, or holds something without the parameters API.

    Example:
        >>> import jax, minitorch_jax as mt
        >>> from minitorch_jax import nn
        >>> model = nn.Linear(2, 1, key=jax.random.key(0))
        >>> opt = mt.Optimizer([model], lr=0.5)
        >>> loss = mt.backward(lambda model, x: model(x).sum(), model, jnp.ones((1, 2)))
        >>> before = model.bias
        >>> opt.step()
        >>> model.bias - before
        Array([-0.5], dtype=float32)
    """

    __slots__ = ("__dict__",)
    _entry_points = ("init_state", "update")
    _ranges: ClassVar[dict[str, tuple[float, float]]] = {}  # of float hyperparameters, ends included; else >= 0
    elementwise: ClassVar[bool] = (
        True  # whether the rule treats each element by itself; a subclass's, unless it says so
    )
    lr: Any
    skip_nonfinite: bool

    @classmethod
    def _register(cls) -> None:
        if "elementwise" not in vars(cls) and not {"update", "init_state"}.isdisjoint(vars(cls)):
            cls.elementwise = False  # not known: it may use norms
        forget_older(cls)
        for name in ("init_state", "update"):
            if name in vars(cls) and not isinstance(vars(cls)[name], staticmethod):
                raise TypeError(
                    f"{cls.__name__}.{name} must be a @staticmethod, a pure function of one array: one compiled program"
                    " serves every optimizer of the class, so what it needs comes in `h`"
                )
        super()._register()

    def __init__(
        self,
        modules: Any,
        lr: Any = 0.01,
        *,
        skip_nonfinite: bool = False,
        track_grad_norm: bool = False,
        decay_matrices_only: bool = False,
        master_weights: bool = False,
        **hyperparameters: Any,
    ) -> None:
        options = {
            "skip_nonfinite": skip_nonfinite,
            "track_grad_norm": track_grad_norm,
            "decay_matrices_only": decay_matrices_only,
            "master_weights": master_weights,
        }
        _check_names(type(self), hyperparameters)
        self._configure(modules, {"lr": lr, **hyperparameters, **options})

    def _configure(self, modules: Any, settings: dict[str, Any]) -> None:
        """Everything that `__init__` does, once it is known what the settings are."""
        flags = _flags(type(self), settings)
        given = {name: value for name, value in _tuples(type(self), settings).items() if name not in flags}
        lists, own = split(type(self).__name__, as_list(modules))
        own = [self._checked(mine, given, flags) for mine in own]
        steps = Cell(jax.device_put(np.zeros(2, np.int32), may_alias=False), "steps", birth=births.birth_here())
        self._setup(lists, Hyperparameters(type(self).__name__, self._ranges, given, flags, own), steps)
        self._validate_now()
        self._plan_now()

    def _setup(self, lists: list[list[Any]], hyper: Hyperparameters, steps: Cell) -> None:
        """The plain attributes, for `__init__` and for copies."""
        vars(self).update(
            _lists=lists,  # the modules of each group; of the optimizer, if it has none
            _hyper=hyper,
            _steps=steps,  # of each parameter in `_order`; after them, steps taken and steps skipped
            _seen=None,  # with `track_grad_norm`, a cell: the norm of the last step's gradients, and 1 if they were finite
            _order=[],
            _clocks=(),  # for each in `_order`, the place of the first that has taken as many steps
            _state={},  # of each parameter's cell: (structure of the rule's state, its cells)
            _form=None,  # of a rule of all parameters at once: how its state is made of `_state` and `_shared`
            _shared={},  # and what it keeps for all of them: cells by name
            _foreign=[],  # the modules that are not ours, with the keys of their states
            _warned=set(),
            _grows=False,  # whether the rule may need more state than before
            **_CACHES,
        )

    def _checked(self, settings: dict[str, Any], given: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
        """A group's own settings, with flags as booleans."""
        unknown = [name for name in settings if name not in given and name not in flags]
        if unknown:
            near = difflib.get_close_matches(unknown[0], [*given, *flags, "modules"], 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it takes {', '.join([*given, *flags])}"
            raise ValueError(f"{type(self).__name__}: a group has {unknown[0]!r}{hint}")
        own = _tuples(type(self), settings)
        return own | _flags(type(self), {name: value for name, value in own.items() if name in flags})

    # -- the rule -----------------------------------------------------------------------------------------------------

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        """The state of one parameter before its first step."""
        return ()

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        """One step of one parameter `p` with gradient `g`, state `s`, hyperparameters `h`."""
        return p - h.lr * g, s

    def _begin_states(
        self,
        state: dict[Cell, Any],
        trainable: list[Cell],
        names: Mapping[Cell, str],
        groups: Mapping[Cell, int],
        arrays: Mapping[Cell, Any],
    ) -> set[Cell]:
        """Add to `state` what parameters have none of; gives those that had no state before, and begin now."""
        return begin_states(self, state, trainable, groups, arrays)

    # -- the facade ---------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Update every trainable parameter of `modules` from its gradient, in place: all of them, or none if it raises.

        Call it once per batch. Gradients stay as they are until `zero_grad()`.
        """
        self._step()

    def _step(self, *extra: Any) -> None:
        """`step`, with what a rule of all parameters is given besides."""
        plan = self._plan_now()
        if not frames.is_eager():
            self._step_inline(plan, *extra)
            return
        if plan.looked is not lendings.last:
            habits.look(plan, zip(plan.paths, plan.params, strict=True))
        if plan.pipeline is None:
            plan.compile(self)
        grads = list(map(get_stored, plan.held_grads))
        if plan.fresh or (grads and grads[0] is None):
            self._look_for_missing(plan, list(map(get_value, plan.grads)))
        if plan.foreign:
            self._step_foreign(plan, grads, *extra)
        else:
            others = grads, self._hyper.cell.stored
            plan.pipeline.run((*others, (), (), *extra) if extra else others)
        if plan.reading.is_new and plan.reading.finds_own_changes():
            plan.rename()

    def zero_grad(self) -> None:
        """Reset the gradients of every module to zeros; an object without a `zero_grad` is skipped."""
        for module in self.modules:
            zero_grad = getattr(module, "zero_grad", None)
            if zero_grad is not None:
                zero_grad()

    @property
    def skipped(self) -> Any:
        """How many steps `skip_nonfinite=True` has left out."""
        return self._counts()[1]

    @property
    def num_steps(self) -> Any:
        """How many steps have been taken: the argument of schedules. Counts stay at 2147483647, the end of int32."""
        return self._counts()[0]

    @property
    def grad_norm(self) -> jax.Array:
        """The 2-norm of the last step's gradients, all as one vector; 0 before. With `track_grad_norm=True` only.

        A float32 scalar, computed in the program of the step: reading it waits for nothing, using its value does.

        Raises:
            RuntimeError: without `track_grad_norm=True`.

        Example:
            >>> import jax, minitorch_jax as mt
            >>> from minitorch_jax import nn
            >>> layer = nn.Linear(2, 1, bias=False, key=jax.random.key(0))
            >>> opt = mt.Optimizer([layer], lr=0.1, track_grad_norm=True)
            >>> layer.accumulate([jnp.array([[3.0, 4.0]])])
            >>> opt.step()
            >>> float(opt.grad_norm), bool(opt.grads_finite)
            (5.0, True)
        """
        with contexts.constants():
            return self._last_seen(lambda seen: seen[..., 0])

    @property
    def grads_finite(self) -> jax.Array:
        """Whether all gradients of the last step were finite, a boolean scalar; True before. See `grad_norm`."""
        with contexts.constants():
            return self._last_seen(lambda seen: seen[..., 1] > 0)

    def _last_seen(self, function: Callable[[Any], Any]) -> Any:
        self._plan_now()
        if self._seen is None:
            raise RuntimeError(
                f"{type(self).__name__} takes no note of its gradients: construct it with `track_grad_norm=True`, or"
                " assign `opt.track_grad_norm = True`"
            )
        self._touch()
        return using(self._seen, function)

    def _check_writable(self, plan: Plan) -> None:
        """Within a trace: raise unless what a step changes belongs to this very trace."""
        if plan.foreign:
            raise TypeError(
                "NumPy modules are updated in place, which cannot be traced: call step() outside of transforms"
            )
        for cell in plan.owned:
            access.check_writable(cell, f"what {type(self).__name__}.step() updates", self)

    @all_or_nothing
    def _step_inline(self, plan: Plan, *extra: Any) -> None:
        self._check_writable(plan)
        grads = list(map(gradient, plan.grads))
        self._look_for_missing(plan, grads)
        new = plan.update(list(map(get_value, plan.owned)), grads, self._hyper.cell.value, (), (), *extra)
        for cell, value in zip(plan.owned, new, strict=True):
            access.write(cell, value, f"{cell.kind} updated by {type(self).__name__}.step()", self)
        frame = frames.local.frame
        if frame is not None:
            frame.consumed.update(zip(plan.grads, grads, strict=True))

    def _step_foreign(self, plan: Plan, grads: list[Any], *extra: Any) -> None:
        """The same update with NumPy arrays in it, written back into those arrays, put off from any Ctrl-C."""
        landing = [Cell(None, "foreign") for foreign in plan.foreign for _ in foreign.cells]
        by_module = [foreign.arrays() for foreign in plan.foreign]
        arrays = [array for found in by_module for array in found]
        gradients = [
            g for foreign, found in zip(plan.foreign, by_module, strict=True) for g in foreign.gradients(found)
        ]
        wide = any(array.dtype == np.float64 for array in arrays)
        with jax.enable_x64(True) if wide else nullcontext():
            values = np.asarray(self._hyper.numbers(), np.float64) if wide else self._hyper.cell.value
            with interrupts.deferred:
                pipeline = Pipeline(plan.compiled, [*plan.held, *landing], plan.held)
                pipeline.run((grads, values, arrays, gradients, *extra))
                new = iter([np.asarray(cell.value) for cell in landing])
                for foreign in plan.foreign:
                    foreign.write([next(new) for _ in foreign.cells])

    def _look_for_missing(self, plan: Plan, grads: list[Any]) -> None:
        """Warn of parameters that no loss has read, or of a step without any gradient."""
        without = [path for path, grad in zip(plan.paths, grads, strict=True) if grad is None]
        if without and len(without) == len(grads) and not plan.foreign:
            self._warn_once(
                ["backward"],
                f"{type(self).__name__}.step() was called with no gradient accumulated since zero_grad(): every gradient"
                " is taken as zeros. Call `mt.backward(loss_fn, ...)`, or `module.accumulate(grads)`, first.",
            )
            return
        plan.fresh = False
        unread = zip(plan.paths, plan.grads, grads, strict=True)
        without = [
            path
            for path, cell, grad in unread
            if (grad is None or cell.pack is not None) and not cell.reached and path not in self._warned
        ]
        if without:
            shown = ", ".join(without[:8]) + (f" and {len(without) - 8} more" if len(without) > 8 else "")
            self._warn_once(
                without,
                f"{type(self).__name__} holds parameters that no loss has read so far, so they have no gradient:"
                f" {shown}. Use them in the loss, freeze() them, or leave their module out.",
            )

    def _warn_once(self, about: list[str], message: str) -> None:
        if not self._warned.issuperset(about):
            self._warned.update(about)
            warnings.warn(message, stacklevel=_frames_to_the_user())

    def _plan_now(self) -> Plan:
        """The plan for the modules as they are now."""
        if frames.local.frame is not None:
            self._have_lifted()  # a plan makes states, which are to be arrays, and to last
            self._refuse_other_modules()
        plan: Plan | None = self._plan
        if plan is not None:
            _look(self._lists, plan.ids, structure_of(self))
            for look in plan.watched if plan.unchanged() else ():
                look()
            if plan.unchanged() and not plan.reading.changed():
                return plan
        if self._planner == get_ident():
            name = type(self).__name__
            raise RuntimeError(
                f"this {name} trains a module that holds the {name} itself, so each would be a part of the other. Keep"
                f" the optimizer outside of it, or have it train the parts: `{name}([self.net])`."
            )
        with interrupts.deferred, contexts.constants():  # states and step counts change together
            vars(self)["_planner"] = get_ident()
            try:
                if plan is None or plan.reading.changed() or not plan.still_fits():
                    plan = make_plan(self)
            finally:
                vars(self)["_planner"] = None
            vars(self)["_plan"] = plan
        return plan

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

    # -- modules and groups -------------------------------------------------------------------------------------------

    @property
    def modules(self) -> Any:
        """The list given to the constructor; with groups, a tuple of the modules of all of them."""
        self._have_lifted()
        lists = self._lists
        return tuple([m for modules in lists for m in modules]) if self._hyper.own else lists[0]

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups; without any, one that is the optimizer itself."""
        return tuple([Group(self, i) for i in range(len(self._lists))])

    param_groups = groups  # torch's name

    def add_group(self, group: Mapping[str, Any]) -> None:
        """Add `{"modules": [...], ...}`, with settings of its own. What was there so far becomes a group, if it is none.

        Raises:
            ValueError, TypeError: as the constructor; nothing has changed then.
        """
        access.check_restructurable(self._birth, f"{type(self).__name__}.groups", "were changed")
        before, hyper = self._lists, self._hyper
        name = type(self).__name__
        own = [*(hyper.own or [{}]), self._checked(own_settings(group), hyper.given, hyper.flags)]
        numbers = {key: self._stated(key) for key in hyper.given}
        owned = [{key: self._stated(key, g) for key in mine} for g, mine in enumerate(own[:-1])]
        lists = [*before, group_modules(name, group)]
        new = Hyperparameters(name, self._ranges, numbers, hyper.flags, [*owned, own[-1]])
        with interrupts.deferred:
            vars(self).update(_lists=lists, _hyper=new, _plan=None)
            try:
                self._validate_now()
                self._plan_now()
            except BaseException:
                vars(self).update(_lists=before, _hyper=hyper, _plan=None)
                raise
            finally:
                changed(self)

    def _set_modules(self, value: Any, group: int) -> None:
        access.check_restructurable(self._birth, f"{type(self).__name__}.modules", "was assigned")
        lists, foreign = self._lists, self._foreign
        with interrupts.deferred:
            vars(self)["_lists"] = [*lists[:group], as_list(value), *lists[group + 1 :]]
            vars(self)["_plan"] = None
            try:
                listed = {id(module) for modules in self._lists for module in modules}
                stay = [known for known in foreign if id(known.module) in listed and known.is_as_it_was()]
                vars(self)["_foreign"] = stay
                self._plan_now()
            except BaseException:
                vars(self).update(_lists=lists, _foreign=foreign, _plan=None)
                raise
            finally:
                changed(self)

    # -- hyperparameters ----------------------------------------------------------------------------------------------

    def _validate(self) -> None:
        """Raise ValueError for hyperparameters that do not go together. Called at first and at every assignment."""

    def _validate_now(self) -> None:
        """`_validate` for each group, unless the numbers are traced, or those of an ensemble."""
        if self._hyper.is_plain():
            for group in self.groups if self._hyper.own else (self,):
                type(self)._validate(group)  # type: ignore[arg-type]  # a Group has the attributes that it reads

    def _stated(self, name: str, group: int | None = None) -> Any:
        """A setting, a schedule as it is."""
        self._touch()
        return self._whole(name, self._hyper.stated(name, lambda: self._counts()[0], group))

    def _whole(self, name: str, value: Any) -> Any:
        """A setting that is declared as an integer as one: the vector has floats."""
        if isinstance(value, float) and value.is_integer() and str(_annotation_of(type(self), name)).startswith("int"):
            return int(value)
        return value

    def _counts(self) -> tuple[Any, Any]:
        """Steps taken and skipped: integers, or for a traced or stacked optimizer arrays."""
        self._touch()
        steps = self._steps.value
        steps = steps if isinstance(steps, jax.core.Tracer) else using(self._steps, jax.device_get)
        pair = steps[..., -2], steps[..., -1]
        return pair if steps.ndim > 1 or isinstance(steps, jax.core.Tracer) else (int(pair[0]), int(pair[1]))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            _open(self)
            return object.__getattribute__(self, name)
        return self._get_setting(name, None)

    def _get_setting(self, name: str, group: int | None) -> Any:
        if name in self._hyper.given or name in self._hyper.flags:
            self._touch()
            return self._whole(name, self._hyper.get(name, lambda: self._counts()[0], group))
        raise AttributeError(f"{type(self).__name__} has no attribute `{name}`{self._hint(name)}")

    def _hint(self, name: str) -> str:
        known = [*self._hyper.given, *self._hyper.flags, *(n for n in dir(type(self)) if not n.startswith("_"))]
        near = difflib.get_close_matches(name, known, 1)
        return f"; did you mean `{near[0]}`?" if near else f"; it has {', '.join(known)}"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            change_class(self, value)
        elif name.startswith("_"):
            if isinstance(getattr(type(self), name, None), property):
                object.__setattr__(self, name, value)
            else:
                vars(self)[name] = value
        elif name == "modules":
            if self._hyper.own:
                raise AttributeError(
                    f"{type(self).__name__} has groups: assign `opt.groups[i].modules`, or change those lists"
                )
            self._set_modules(value, 0)
        elif name in self._hyper.given or name in self._hyper.flags:
            own = self._hyper.own
            if own and all(name in mine for mine in own):
                raise AttributeError(
                    f"{type(self).__name__}: every group has a `{name}` of its own: assign `opt.groups[i].{name}`"
                )
            self._set_setting(name, value, None)
        elif hasattr(type(self), name) and not isinstance(getattr(type(self), name), property):
            object.__setattr__(self, name, value)
        else:
            raise AttributeError(f"{type(self).__name__} has no `{name}` to set{self._hint(name)}")

    def _set_setting(self, name: str, value: Any, group: int | None) -> None:
        """Assign a setting of the optimizer or of a group; one that does not fit, or goes with no other, changes nothing."""
        hyper, owner = self._hyper, type(self).__name__
        self._have_lifted()
        if frames.local.undo is not None:
            kept = [(settings, dict(settings)) for settings in (hyper.given, hyper.flags, *hyper.own)]
            frames.on_failure(self._put_back, kept, hyper.exact)
        if name in hyper.given:
            value = _tuples(type(self), {name: value})[name]
            if not hyper.is_plain() and begins_state(self, self._plan_now(), name, value, group):
                raise TraceError(
                    f"{owner}.{name} was changed from 0 where the state that it needs cannot begin (in compiled code, or for"
                    " an ensemble): assign it before"
                )
            own = dict(hyper._own(group))
            before = self._stated(name, group)
            hyper.set(name, value, self, group)
            self._validate_or(partial(hyper.set, name, before, self, group), name, group, own)
            if isinstance(before, int | float) and not before:
                vars(self).update(_grows=True, _plan=None)  # from zero: the rule may need a state now
                changed(self)
                changed(self)
        elif name in hyper.flags:
            access.check_restructurable(self._birth, f"{owner}.{name}", "was assigned")
            known, own = hyper.flags_of(group)[name], dict(hyper._own(group))
            optional = _is_optional(type(self), name)
            if (isinstance(known, str) or optional) and not isinstance(value, str) and not (optional and value is None):
                raise ValueError(f"{owner}: {name} must be a str{' or None' if optional else ''}; got {value!r}")
            hyper.set_flag(name, _flags(type(self), {name: value})[name], group)
            self._validate_or(partial(hyper.set_flag, name, known, group), name, group, own)
            vars(self).update(_grows=True, _plan=None)
            changed(self)
        else:
            self._get_setting(name, group)  # the error for a name that is not there

    def _put_back(self, kept: list[tuple[dict[str, Any], dict[str, Any]]], exact: Any) -> None:
        """Take assignments back: settings as they were, and the vector that they stood for."""
        for now, before in kept:
            now.clear()
            now.update(before)
        self._hyper.exact = exact
        vars(self)["_plan"] = None
        changed(self)

    def _validate_or(self, undo: Callable[[], None], name: str, group: int | None, own: dict[str, Any]) -> None:
        """Take an assignment back that goes with no other setting; `own` are those that the group had before."""
        try:
            self._validate_now()
        except ValueError:
            undo()
            if group is not None and self._hyper.own and name not in own:
                del self._hyper.own[group][name]
            raise

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything but the parameters: steps taken, hyperparameters, and each parameter's state by its path.

        Returns:
            `{"num_steps": int, "skipped": int, "hyperparameters": {name: value}, "fingerprints": {path: pair}, "state":
            {path: {"step": int, field: array}}}`; if there are groups, `"groups"`: a list of what each has of its own;
            if the rule keeps something for all parameters, `"shared"`: `{field: array}`. Paths start with the module's
            place in `modules`. A fingerprint is two numbers of a parameter's values, by which `load_state_dict` sees that
            modules are listed in another order.

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

    def _check_setting(self, name: str, value: Any) -> None:
        """Raise ValueError for a value that a setting cannot have."""
        if name in self._hyper.given:
            self._hyper.check(name, value)
            self._hyper.check_length(name, value)
        else:
            _flags(type(self), {name: value})

    def _load_hyperparameters(self, hyper: dict[str, Any], own: list[dict[str, Any]]) -> None:
        """Assign all of them; if they do not go together, none."""
        before = self._hyper
        given, flags = ({name: hyper[name] for name in names} for names in (before.given, before.flags))
        vars(self)["_hyper"] = Hyperparameters(type(self).__name__, self._ranges, given, flags, own, before.members)
        try:
            self._validate_now()
        except ValueError:
            vars(self)["_hyper"] = before
            raise
        changed(self)

    def _held_cells(self) -> list[Cell]:
        plan = self._plan_now()
        states = [cell for _, held in self._state.values() for cell in held]
        own = [
            *states,
            *self._shared.values(),
            *([] if self._seen is None else [self._seen]),
            self._steps,
            self._hyper.cell,
        ]
        native = [cell for module in self.modules if isinstance(module, Module) for cell in module._held_cells()]
        return list(dict.fromkeys([*native, *plan.named.values(), *plan.grads, *own]))

    def __getstate__(self) -> dict[str, Any]:
        self._plan_now()
        return {name: value for name, value in vars(self).items() if name not in _CACHES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, **_CACHES)

    def __repr__(self) -> str:
        shown = [f"{name}={self._stated(name)!r}" for name in self._hyper.given]
        shown += [
            f"{name}=True" if value is True else f"{name}={value!r}"
            for name, value in self._hyper.flags.items()
            if value
        ]
        names = (type(module).__name__ for module in self.modules)
        listed = ", ".join(map(repr, self.groups) if self._hyper.own else names)
        return f"{type(self).__name__}({', '.join([f'[{listed}]', *shown])})"

    # -- pytree -------------------------------------------------------------------------------------------------------

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
            state.append((walker.index[param], tree, numbers))
        state.append(self._clocks)
        steps = walker.cell(self._steps, join(path, "steps"))
        values = walker.cell(self._hyper.cell, join(path, "hyperparameters"))
        seen = None if self._seen is None else walker.cell(self._seen, join(path, "seen"))
        shared = tuple([(name, walker.cell(c, join(path, f"shared.{name}"))) for name, c in self._shared.items()])
        counts = steps, seen, shared, self._form
        return modules, tuple(map(len, self._lists)), grads, tuple(state), counts, values, self._hyper.statics()

    @classmethod
    def _statics(cls, payload: Node, path: str) -> Iterator[tuple[str, Any]]:
        modules, _, _, _, _, _, (_, schedules, flags, groups) = payload
        for i, node in enumerate(modules):
            yield join(path, f"modules.{i}"), node
        own = [
            (f"groups.{i}.{name}", dict(known).get(name, "its own"))
            for i, (names, known) in enumerate(groups)
            for name in names
        ]
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
        modules, lengths, grads, state, (steps, seen, shared, form), values, statics = payload
        self = object.__new__(cls)
        builder.begin(self)
        made = builder.cells
        *state, clocks = state
        hyper = Hyperparameters.rebuilt(cls.__name__, cls._ranges, statics, made[values])
        nodes = iter(modules)
        self._setup([[builder.build(next(nodes)) for _ in range(length)] for length in lengths], hyper, made[steps])
        for param, grad in grads:
            made[param].grad = made[grad]
        vars(self)["_state"] = {made[p]: (tree, [made[n] for n in held]) for p, tree, held in state if tree is not None}
        vars(self).update(
            _order=[made[p] for p, _, _ in state],
            _clocks=clocks,
            _seen=None if seen is None else made[seen],
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

    def _unopened(self) -> tuple[Spec, list[Any]] | None:
        return vars(self).get("_closed")

    def _note_in(self, walker: Walker) -> None:
        """Have a walk over this optimizer depend on what changes beside its attributes."""
        walker.note(self._hyper.structure)
        walker.watch(partial(_look, self._lists, ids_of(self._lists), structure_of(self)))
        walker.optimizers.append(ref(self))


_opening = RLock()


def _open(opt: Any) -> None:
    """Make the parts of a copy that nobody has looked into so far."""
    with _opening:
        closed = vars(opt).get("_closed")
        if closed is not None:
            spec, leaves = closed
            made = build(spec, leaves, None)
            vars(opt).update(vars(made))
            object.__setattr__(opt, "_structure", made._structure)
            object.__setattr__(opt, "_walk", made._walk)
            found = made._walk.optimizers
            found[:] = [ref(opt) if reference() is made else reference for reference in found]
            del vars(opt)["_closed"]


def _look(lists: list[list[Any]], ids: list[Any], structure: Structure) -> None:
    """Notice that a list of modules was changed in place."""
    if ids_of(lists) != ids:
        structure.change()


def _frames_to_the_user() -> int:
    """How far up, from whoever calls this, the first frame outside of this package is."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "minitorch_jax":
        frame, level = frame.f_back, level + 1
    return level


def _on_devices(pairs: list[tuple[Any, Any]]) -> list[Any]:
    """NumPy arrays as those of JAX, each where another array lies, in one call."""
    if any(isinstance(like, jax.core.Tracer) for _, like in pairs):
        return [jnp.asarray(array) for array, _ in pairs]
    return jax.device_put([array for array, _ in pairs], [like.sharding for _, like in pairs])


@lru_cache(maxsize=256)
def _parameters_of(cls: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a class's constructor: looked up once, as assigning a setting needs them."""
    return inspect.signature(cls.__init__).parameters


def _annotation_of(cls: Any, name: str) -> Any:
    """What a class's constructor says a setting is; None if it says nothing of it."""
    parameter = _parameters_of(cls).get(name)
    return parameter and parameter.annotation


def _check_names(cls: type, hyperparameters: Mapping[str, Any]) -> None:
    """Raise TypeError for a name that came through `**options` of a constructor and means nothing."""
    own = _parameters_of(cls).values()
    if cls is not Optimizer and not any(p.kind is p.VAR_KEYWORD for p in own):
        return  # those that it passes on are its own
    classes = cls.__mro__[: cls.__mro__.index(Optimizer)]
    known = {name for each in classes for name in _parameters_of(each)} | {"lr"}
    for name in hyperparameters:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *Options.__annotations__], 1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise TypeError(f"{cls.__name__}() got an unexpected keyword argument {name!r}{hint}")


def _tuples(cls: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with lists as tuples, where a tuple is the default (`betas`): of as many numbers."""
    plural = {name: len(p.default) for name, p in _parameters_of(cls).items() if isinstance(p.default, tuple)}
    found = {name: tuple(v) if name in plural and isinstance(v, list) else v for name, v in settings.items()}
    for name, value in found.items():
        if name in plural and not callable(value) and not (isinstance(value, tuple) and len(value) == plural[name]):
            raise ValueError(f"{cls.__name__}: {name} must be a tuple of {plural[name]} numbers; got {value!r}")
    return found


def _flags(cls: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings that are static: booleans, by their default or their value, strings, and None."""
    defaults = {name: p.default for name, p in _parameters_of(cls).items()}
    flags: dict[str, Any] = {}
    for name, value in settings.items():
        default = defaults.get(name)
        if isinstance(default, bool) or name in Options.__annotations__:
            if not isinstance(value, bool | np.bool_) and not (
                np.shape(value) == () and np.asarray(value).dtype == bool
            ):
                raise ValueError(f"{cls.__name__}: {name} must be a bool; got {value!r}")
            flags[name] = bool(value)
        elif isinstance(value, bool | str) and not isinstance(default, int | float) and name != "lr":
            flags[name] = value
        elif value is None and _is_optional(cls, name):
            flags[name] = value
    return flags


def _is_optional(cls: type, name: str) -> bool:
    """Whether a setting may be None: that is its default."""
    parameter = _parameters_of(cls).get(name)
    return parameter is not None and parameter.default is None
