"""The Optimizer facade: mutable `modules` and `lr`, `step()` and `zero_grad()`, over one compiled update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from threading import get_ident
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from jax.typing import DTypeLike

from ..module import anomaly, torch_habits, torch_names
from ..runtime import contexts, interrupts
from ..runtime.tracebacks import trim, warn
from ..state import access, dropped_copies
from ..state import frame as frames
from ..state.cell import Cell, get_value
from ..state.concurrent_reads import lendings, using
from ..state.gradient import gradient
from ..state.structure import structure_of
from ..state.undo import all_or_nothing
from .declaration import NOT_NEGATIVE, Rate, as_flags, as_tuples, check_names, declare, setting
from .groups import Asked, as_list, specs_of
from .hyperparameters import Hyperparameters
from .numpy_step import step_by_numpy
from .plan import Plan, ids_of, make_plan
from .pytree import CACHES, Tree
from .selection import takes_any
from .states import begin_states
from .update import forget_older


class Optimizer(Tree):
    """Plain SGD, `p = p - lr * grad`, and the base of every optimizer.

    You can read and assign `modules` and `lr` at any time; the next step uses them. Assigning `lr` compiles nothing. A
    change of the list keeps the state of the parameters that stay.

    A rule of your own is a subclass with two static methods, pure functions of one array. `init_state(p, h)` returns the
    state of a parameter, any pytree of arrays. `update(p, g, s, h)` returns the new parameter and the new state. `h` holds
    the hyperparameters by name, the step `t`, which starts at 1, and `one_minus`: `h.one_minus.momentum` is
    `1 - h.momentum`, exact also where the momentum is nearly 1. The class declares its hyperparameters,
    `momentum: float = 0.9`, or with `optim.setting`, which also takes a range. Numbers are dynamic; booleans and strings
    are static. The constructor, its signature, its checks and the docstring's `Args` follow from that. An `__init__` of
    its own passes hyperparameters on by keyword. For parameters of fewer than 32 bits the arithmetic is in float32; dtypes
    do not change. If the update is elementwise, write `elementwise = True`: packed parameters (`mt.pack`) are then updated
    as one array.

    Unlike in torch, a step also updates parameters that no loss has used, with gradients of zeros: momentum, weight decay
    and Adam's averages still change them. `freeze()` excludes them.

    Args:
        modules: a list of Modules, or of any objects whose `parameters()` and `grads()` return lists of NumPy arrays,
            which are updated in place; or groups with settings of their own, `{"modules": [...], "lr": ...}`, or, beside the
            modules, `{"names": [...], "lr": ...}`, where names are globs over `state_dict`
            (`docs/optim/groups-and-tools.md`).
        lr: learning rate, a finite number >= 0, or a function of the step count (0 at the first step).
        skip_nonfinite: leave everything as it is at a step whose gradients are not all finite; `skipped` counts them.
        track_grad_norm: have each step note the norm of the gradients and whether they are finite: `grad_norm`,
            `grads_finite`.
        decay_matrices_only: leave parameters of fewer than two dimensions (biases, the scales of normalisation layers)
            out of weight decay.
        master_weights: keep a float32 copy of parameters of fewer bits (bfloat16, float16), which the steps add up in:
            otherwise a step smaller than their rounding is lost.
        state_dtype: `jnp.bfloat16` keeps those arrays of the state that have a parameter's shape in half of float32's
            memory. A step computes with them in float32, and rounds them stochastically: up or down by chance, right on
            average. The noise is a function of a seed, the step count, the parameter's path and the state's name. The seed
            is made from the random stream (`mt.seed`, `mt.rng`), which does not advance. `jnp.float32` keeps the state of
            parameters of fewer bits in float32. None: the rule's choice, the parameter's dtype mostly.

    Raises:
        ValueError: if `modules` is empty, reaches a parameter twice, or holds no parameter; if groups do not fit them; if
            a hyperparameter is out of its range; if `state_dtype` is another one, or given for a parameter of 64 bits.
        TypeError: if `modules` is not a list, or holds something without the parameters API.

    Example:
        >>> import jax, jax.numpy as jnp, minitorch_jax as mt
        >>> from minitorch_jax import nn
        >>> model = nn.Linear(2, 1, key=jax.random.key(0))
        >>> opt = mt.Optimizer([model], lr=0.5)
        >>> loss = mt.backward(lambda model, x: model(x).sum(), model, jnp.ones((1, 2)))
        >>> before = model.bias
        >>> opt.step()
        >>> model.bias - before
        Array([-0.5], dtype=float32)
        >>> opt = mt.optim.Adam([model], state_dtype=jnp.bfloat16)
        >>> opt.state_dict()["state"]["0.bias"]["exp_avg_sq"].dtype
        dtype(bfloat16)
    """

    __slots__ = ("__dict__",)
    _entry_points = ("init_state", "update")
    elementwise: ClassVar[bool] = True  # subclasses with a rule of their own default to False
    modules: Any = setting(doc="a list of modules; see `Optimizer`")
    lr: Rate = setting(default=0.01, within=NOT_NEGATIVE, doc="learning rate")
    skip_nonfinite: bool = setting(default=False, kw_only=True)
    track_grad_norm: bool = setting(default=False, kw_only=True)
    decay_matrices_only: bool = setting(default=False, kw_only=True)
    master_weights: bool = setting(default=False, kw_only=True)
    state_dtype: DTypeLike | None = setting(default=None, kw_only=True)

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
        declare(cls)
        super()._register()

    def __init__(
        self,
        modules: Any,
        lr: float | jax.Array | np.ndarray | np.generic | Callable[[Any], Any] = 0.01,
        *,
        skip_nonfinite: bool = False,
        track_grad_norm: bool = False,
        decay_matrices_only: bool = False,
        master_weights: bool = False,
        state_dtype: DTypeLike | None = None,
        **hyperparameters: Any,
    ) -> None:
        options = {
            "skip_nonfinite": skip_nonfinite,
            "track_grad_norm": track_grad_norm,
            "decay_matrices_only": decay_matrices_only,
            "master_weights": master_weights,
            "state_dtype": state_dtype,
        }
        check_names(type(self), hyperparameters)
        self._configure(modules, {"lr": lr, **hyperparameters, **options})

    def _configure(self, modules: Any, settings: dict[str, Any]) -> None:
        """Everything that `__init__` does, once it is known what the settings are."""
        settings = self._completed(settings)
        flags = as_flags(type(self), settings)
        given = {name: value for name, value in as_tuples(type(self), settings).items() if name not in flags}
        if isinstance(modules, Asked):
            modules.given, modules.flags = given, flags
            return
        listed = as_list(modules)
        specs = specs_of(type(self).__name__, listed)
        if specs:
            self._check_groups()
        own = [self._own_of(spec, given, flags) for spec in specs]
        steps = Cell(jax.device_put(np.zeros(2, np.int32), may_alias=False), "steps", birth=dropped_copies.birth_here())
        hyper = Hyperparameters(type(self).__name__, self._ranges, given, flags, own, (), [spec.rule for spec in specs])
        self._setup([spec.modules for spec in specs] or [listed], hyper, steps)
        vars(self)["_names"] = [spec.names for spec in specs] or [None]
        self._validate_now()
        self._plan_now()

    @staticmethod
    def _completed(settings: dict[str, Any]) -> dict[str, Any]:
        """The constructor's settings, those worked out that were left open."""
        return settings

    def _setup(self, lists: list[list[Any]], hyper: Hyperparameters, steps: Cell) -> None:
        """The plain attributes, for `__init__` and for copies."""
        vars(self).update(
            _lists=lists,  # the modules of each group; of the optimizer, if it has none
            _names=[None] * len(lists),  # of each group, which parameters of the modules it has; None for all
            _homes={},  # of each parameter's cell: the group that it was in when its state began, or was stepped last
            _hyper=hyper,
            _steps=steps,  # of each parameter in `_order`; after them, steps taken and steps skipped
            _seen=None,  # with `track_grad_norm`, a cell: the norm of the last step's gradients, and 1 if they were finite
            _seed=None,  # with `state_dtype=jnp.bfloat16`, a cell: the seed of the noise of its rounding
            _order=[],
            _clocks=(),  # for each in `_order`, the place of the first that has taken as many steps
            _state={},  # of each parameter's cell: (structure of the rule's state, its cells)
            _form=None,  # of a rule of all parameters at once: how its state is made of `_state` and `_shared`
            _shared={},  # and what it keeps for all of them: cells by name
            _foreign=[],  # the modules that are not ours, with the keys of their states
            _warned=set(),
            _grows=False,  # whether the rule may need more state than before
            **CACHES,
        )

    # -- the rule -----------------------------------------------------------------------------------------------------

    takes = staticmethod(takes_any)

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
        return begin_states(self, state, trainable, names, groups, arrays)

    # -- the facade ---------------------------------------------------------------------------------------------------

    def step(self, closure: None = None) -> None:
        """Update every trainable parameter of `modules` from its gradient, in place: all of them, or none if it raises.

        Call it once per batch. Gradients stay as they are until `zero_grad()`.
        """
        try:
            if closure is not None:
                torch_names.refuse("step", f"{type(self).__name__}.step()", ["closure"])
            plan = self._plan
            if plan is None or not plan.repeat(self._lists):
                with anomaly.within([self]) if anomaly.local.on else nullcontext():
                    self._step()
        except Exception as error:
            trim(error)
            raise

    def _step(self, *extra: Any) -> None:
        """`step`, with what a rule of all parameters is given besides."""
        plan = self._plan_now()
        if not frames.is_eager():
            self._step_inline(plan, *extra)
            return
        if plan.looked is not lendings.last:
            torch_habits.look(plan, zip(plan.paths, plan.params, strict=True))
        cells = plan.outside(self)
        if plan.fresh or (plan.first_grad is not None and plan.first_grad.stored is None):
            self._look_for_missing(plan, list(map(get_value, plan.grads)))
        if plan.foreign:
            self._step_foreign(plan, cells, *extra)
        else:
            plan.take(cells, extra)

    def zero_grad(self, set_to_none: Literal[False] = False) -> None:
        """Reset the gradients of every module to zeros; an object without a `zero_grad` is skipped.

        `set_to_none` is torch's, and can only be False.
        """
        if set_to_none:
            torch_names.refuse("zero_grad", "zero_grad()", ["set_to_none"])
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
            >>> import jax, jax.numpy as jnp, minitorch_jax as mt
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
        self._look_for_missing(plan, list(map(gradient, plan.grads)))
        plan.step(plan.inside, *extra)

    def _step_foreign(self, plan: Plan, cells: Any, extra: Any = None) -> None:
        """The same with NumPy arrays as data, whose new values are written back into them, put off from any Ctrl-C."""
        if not extra and step_by_numpy(self, plan):
            return
        by_module = [foreign.arrays() for foreign in plan.foreign]
        pairs = zip(plan.foreign, by_module, strict=True)
        grads = [grad for foreign, arrays in pairs for grad in foreign.gradients(arrays)]
        arrays = [array for found in by_module for array in found]
        wide = any(array.dtype == np.float64 for array in arrays)
        with jax.enable_x64(True) if wide else nullcontext(), interrupts.deferred:
            values = np.asarray(self._hyper.numbers(), np.float64) if wide else None
            new = map(np.asarray, plan.step(cells, extra, *jax.device_put((arrays, grads, values))))
            for foreign, found in zip(plan.foreign, by_module, strict=True):
                foreign.write([next(new) for _ in found])

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
            warn(message)

    def _plan_now(self) -> Plan:
        """The plan for the modules as they are now."""
        if frames.local.frame is not None:
            self._have_lifted()  # a plan makes states, which are to be arrays, and to last
            self._refuse_other_modules()
        plan: Plan | None = self._plan
        if plan is not None:
            if ids_of(self._lists) != plan.ids:
                structure_of(self).change()
            if plan.unchanged():
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
                if plan is None or not plan.still_fits():
                    plan = make_plan(self)
            finally:
                vars(self)["_planner"] = None
            vars(self)["_plan"] = plan
        return plan
