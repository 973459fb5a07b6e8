"""Limited-memory BFGS: a quasi-Newton method over all parameters as one vector."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple, NoReturn, Self

import jax
import jax.numpy as jnp
import numpy as np

from ..module.module import Module
from ..module.parameter import placed_as
from ..runtime import contexts
from ..runtime.copies import fresh_copies
from ..runtime.tracebacks import trimmed
from ..state import access
from ..state import frame as frames
from ..state.cell import Cell, get_value
from ..state.errors import TraceError
from ..state.pytree import Builder
from ..state.structure import changed
from ..state.walk import Node, walk_of
from .declaration import OPTIONS, Rate, default_of, setting
from .hyperparameters import Hyperparameters, is_schedule
from .objective import Before, Line, Objective, wide_dtype
from .optimizer import Optimizer
from .plan import Plan
from .quasi_newton import direction, number_array, numbers, steepest
from .update import LAST
from .wolfe import Point, strong_wolfe

_CLOSURE = """a closure, a function that computes the loss and its gradients anew each time that it is called:

    def closure():
        opt.zero_grad()
        return mt.backward(loss_fn, model, x, y)

    opt.step(closure)"""
_INTEGERS = ("max_iter", "max_eval", "history_size")
_COUNT = (1.0, 2.0**24)


class LBFGSState(NamedTuple):
    """The state of LBFGS, one for all parameters: n elements as one vector of float32 (or float64)."""

    d: jax.Array  # (n,), the last direction
    t: jax.Array  # (), how far the last step went along it
    prev_flat_grad: jax.Array  # (n,), the gradient before that step
    old_dirs: jax.Array  # (history_size, n), the changes of the gradient y; pair i is in row i mod history_size
    old_stps: jax.Array  # (history_size, n), the steps s
    ro: jax.Array  # (history_size,), 1 / (y · s)
    H_diag: jax.Array  # (), the scale of the first approximation of the inverse Hessian
    num_stored: jax.Array  # (), int32: pairs stored so far, those that have been overwritten included
    n_iter: jax.Array  # (), int32: iterations
    func_evals: jax.Array  # (), int32: evaluations of the closure


class LBFGS(Optimizer):
    r"""L-BFGS: Newton's method, with an inverse Hessian made of the last steps and changes of the gradient.

        s ← the last step, y ← the change of g over it; kept, the last m of them, where y · s > 1e-10
        q ← -g;  from the newest pair to the oldest: α ← (s · q) / (y · s), q ← q - α y
        d ← q (s · y) / (y · y) of the newest pair
        from the oldest to the newest: d ← d + (α - (y · d) / (y · s)) s
        p ← p + t d, with t = lr, or from a line search that begins there

    The first t is smaller, lr min(1, 1 / Σ|g|). One call of `step(closure)` does up to `max_iter` such iterations; the
    closure calls `zero_grad()` and `mt.backward(...)` and returns the loss, and may be compiled (`mt.jit`). If it raises,
    or a Ctrl-C comes, modules and state are what they were before the step.

    Raises:
        ValueError, TypeError: as `Optimizer`; for groups, modules of NumPy arrays, and options of other optimizers
            (`skip_nonfinite`, `track_grad_norm`, …), which do not apply here.
        TraceError: by `step` in compiled code, since what the closure gives decides, in Python, how to go on.

    Source: `torch.optim.LBFGS`; Nocedal and Wright, "Numerical Optimization", 2006, algorithms 7.4, 3.5 and 3.6.

    Differs from PyTorch: when other parameters become trainable, or fewer, the history begins anew; a new `history_size`
    keeps the newest pairs; for bfloat16 and float16 the vector is float32; if the closure raises, nothing has changed.

    Example:
        >>> import jax, jax.numpy as jnp, minitorch_jax as mt
        >>> from minitorch_jax import nn, optim
        >>> model = nn.Linear(1, 1, key=jax.random.key(0))
        >>> opt = optim.LBFGS([model], history_size=10, line_search_fn="strong_wolfe")
        >>> x = jnp.linspace(-1.0, 1.0, 8)[:, None]
        >>> def loss_fn(model, x):
        ...     return ((model(x) - 3 * x - 1) ** 2).mean()
        >>> def closure():
        ...     opt.zero_grad()
        ...     return mt.backward(loss_fn, model, x)
        >>> loss = opt.step(closure)
        >>> round(model.weight.item(), 3), round(model.bias.item(), 3)
        (3.0, 1.0)
    """

    elementwise = False
    _has_groups = False
    modules: Any = setting(
        doc="a list of modules; see `Optimizer`. All trainable parameters are one vector, so there are no groups"
    )
    lr: Rate = setting(default=1, doc="length of a step; with a line search, where it begins")
    max_iter: int = setting(default=20, within=_COUNT, doc="iterations of a step")
    max_eval: int | None = setting(
        default=None, within=_COUNT, doc="evaluations of the closure after which a step ends; None: 5/4 of max_iter"
    )
    tolerance_grad: float = setting(default=1e-7, doc="a step ends when no element of g is larger")
    tolerance_change: float = setting(
        default=1e-9, doc="a step ends when the loss changes by less, or no element of p by more"
    )
    history_size: int = setting(
        default=100, within=_COUNT, doc="m; the state has the size of 2 m + 2 models, and during a step of 2 m more"
    )
    line_search_fn: str | None = setting(default=None, doc='"strong_wolfe", or None')
    skip_nonfinite: bool = setting(default=False, init=False)
    track_grad_norm: bool = setting(default=False, init=False)
    decay_matrices_only: bool = setting(default=False, init=False)
    master_weights: bool = setting(default=False, init=False)
    state_dtype: Any = setting(default=None, init=False)

    @staticmethod
    def _completed(settings: dict[str, Any]) -> dict[str, Any]:
        if settings["max_eval"] is not None:
            return settings
        most = settings["max_iter"]
        return settings | {"max_eval": max(most * 5 // 4, 1) if isinstance(most, int | float) else most}

    def _setup(self, lists: list[list[Any]], hyper: Hyperparameters, steps: Cell) -> None:
        vars(self)["_members"] = []  # the parameters, in their order, that the state is about
        super()._setup(lists, hyper, steps)

    def _validate(self) -> None:
        for name in _INTEGERS:
            value = self._stated(name)
            if is_schedule(value) or value != int(value):
                raise ValueError(f"LBFGS: {name} must be an integer >= 1; got {value!r}")
        if self.line_search_fn not in (None, "strong_wolfe"):
            raise ValueError(f"LBFGS: line_search_fn must be 'strong_wolfe' or None; got {self.line_search_fn!r}")
        for name in OPTIONS:
            if getattr(self, name):
                raise ValueError(
                    f"LBFGS: {name} does not apply, since all parameters are one vector, of which the line search and"
                    f" the tolerances decide; leave it {default_of(type(self), name)}"
                )

    def _check_groups(self) -> NoReturn:
        raise ValueError(
            "LBFGS doesn't support per-parameter options (groups): all parameters are one vector. Give it the modules"
            " themselves, `LBFGS([body, head], lr=1)`, or an optimizer of its own to each"
        )

    # -- state: under the first trainable parameter, as in torch ------------------------------------------------------

    def _plan_now(self) -> Plan:
        plan = super()._plan_now()
        if plan.foreign:
            raise TypeError(
                "LBFGS trains Modules only, and was given one of NumPy arrays. Convert it with"
                " `minitorch_jax.adapters.numpy`."
            )
        if plan.params and not self._state_fits(plan):
            self._begin(plan)
        return plan

    def _state_fits(self, plan: Plan) -> bool:
        held = self._state.get(plan.params[0], (None, []))[1]
        if plan.params != self._members or not held:
            return False
        known = LBFGSState(*map(get_value, held))
        if not self._hyper.is_plain() or not isinstance(known.old_dirs, jax.Array) or known.old_dirs.ndim != 2:
            return True  # traced, or those of an ensemble
        return len(known.ro) == int(self.history_size) and known.d.dtype == wide_dtype(plan.params)

    def _begin(self, plan: Plan) -> None:
        with contexts.full_width([cell.value for cell in plan.params]), contexts.constants():
            self._begin_wide(plan)

    def _begin_wide(self, plan: Plan) -> None:
        """Make an empty state for the parameters that there are; for another `history_size`, keep the newest pairs."""
        first = plan.params[0]
        held = self._state[first][1] if plan.params == self._members else []
        rows = int(self._hyper.given_number("history_size", 0)) if self._hyper.is_plain() or not held else 0
        dtype, n = wide_dtype(plan.params), sum(int(np.prod(plan.shapes[cell])) for cell in plan.params)
        if held and held[0].value.dtype == dtype:
            state = _resized(LBFGSState(*map(get_value, held)), rows)
        else:
            count, number, vector = jnp.zeros((), jnp.int32), jnp.zeros((), dtype), jnp.zeros(n, dtype)
            table = jnp.zeros((rows, n), dtype)
            state = LBFGSState(
                d=vector,
                t=number,
                prev_flat_grad=jnp.copy(vector),
                old_dirs=table,
                old_stps=jnp.copy(table),
                ro=jnp.zeros(rows, dtype),
                H_diag=number + 1,
                num_stored=count,
                n_iter=jnp.copy(count),
                func_evals=jnp.copy(count),
            )
        leaves, tree = jax.tree.flatten(state)
        none = jax.tree.structure(())
        states: dict[Cell, Any] = {cell: (none, []) for cell in self._state}
        states[first] = tree, [Cell(leaf, "state", birth=first.birth) for leaf in leaves]
        vars(self).update(_state=states, _members=list(plan.params))
        changed(self)

    @classmethod
    def _rebuild(cls, payload: Node, builder: Builder) -> Self:
        self = super()._rebuild(payload, builder)
        vars(self)["_members"] = [builder.cells[param] for param, _ in payload[2]]
        return self

    # -- a step -------------------------------------------------------------------------------------------------------

    @trimmed
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Minimise the loss over up to `max_iter` iterations, in place: all of them, or none if anything is raised.

        Args:
            closure: a function that calls `zero_grad()`, then `mt.backward(...)`, and returns the loss.

        Returns:
            What the closure returned at first: the loss before the step.
        """
        if not callable(closure):
            was = "none was given" if closure is None else f"got {closure!r}"
            raise TypeError(f"LBFGS.step() takes {_CLOSURE}\n\n({was})")
        if not frames.is_eager():
            raise TraceError(
                "LBFGS.step() was called inside compiled code (mt.jit, mt.scan, or a JAX transform): the losses that the"
                " closure gives decide, in Python, how the step goes on. Call it outside; the closure itself may be"
                " compiled: `opt.step(mt.jit(closure))`."
            )
        plan = self._plan_now()
        if not plan.params:
            raise ValueError("LBFGS: every parameter is frozen, so there is nothing to train; unfreeze() some")
        if not self._hyper.is_plain():
            raise TypeError("LBFGS.step() cannot be taken by an ensemble (stacked optimizers): step each by itself")
        held = self._state[plan.params[0]][1]
        objective = Objective(self, plan.params, closure)
        before = Before([*self._everything(plan), *held, self._steps])
        done = False
        try:
            state = LBFGSState(*map(get_value, held))
            loss, start = objective.evaluate(0.0, state.d)
            if plan.fresh:
                self._look_for_missing(plan, list(map(get_value, plan.grads)))
            state = self._minimized(objective, state, start)
            steps = np.array(self._steps.value)
            ticking = [*map(self._order.index, plan.params), -2]
            steps[ticking] = np.minimum(steps[ticking], LAST - 1) + 1
            cells = [*held, self._steps]
            new = [*state, jax.device_put(steps, may_alias=False)]
            # no comprehension: in Python 3.13, an interrupt at its end escapes this `try`
            new = list(map(placed_as, new, map(get_value, cells)))
            access.store_all(cells, new)
            done = True
        finally:
            if not done:
                before.put_back()
                before.put_back_if_repacked()
        return loss

    def _everything(self, plan: Plan) -> list[Cell]:
        """The cells of the modules and their gradients."""
        walks = [walk_of(module).with_gradients() for module in self.modules if isinstance(module, Module)]
        return list(dict.fromkeys([*chain.from_iterable(walks), *plan.params, *plan.grads]))

    def _minimized(self, objective: Objective, state: LBFGSState, x: Point) -> LBFGSState:
        """The state after some iterations, which begin at `x`. Its arrays are not used up; those made here are."""
        lr, max_iter, max_eval = float(self.lr), int(self.max_iter), int(self.max_eval or 1)
        tolerance_grad, tolerance_change = float(self.tolerance_grad), float(self.tolerance_change)
        evals, n_iter, total = 1, int(state.n_iter), int(state.func_evals) + 1
        memory: Any = None
        t: Any = state.t
        d, last_g = state.d, state.prev_flat_grad
        for iteration in range(1, max_iter + 1) if not x.g_max <= tolerance_grad else ():
            n_iter += 1
            if n_iter == 1:
                d, gtd, d_max, t = numbers(steepest(x.g), 1)
                t = min(1.0, t) * lr
            else:
                memory = memory or fresh_copies([*state[3:8]])
                memory, d, gtd, d_max = numbers(direction(memory, d, number_array(t, d.dtype), last_g, x.g), 2)
                t = lr
            last_g, last_f = x.g, x.f
            x = x._replace(t=0, gtd=gtd)
            if gtd > -tolerance_change:
                break
            new_evals = 0
            line = Line(objective, d)
            if self.line_search_fn is not None:
                x, new_evals = strong_wolfe(line.at, x, t, d_max, max_eval - evals, tolerance_change)
                t = x.t
                line.move(t)
            else:
                line.move(t)
                if iteration != max_iter:  # after the last one nothing asks for it
                    x, new_evals = objective.evaluate(t, d)[1], 1
            evals, total = evals + new_evals, total + new_evals
            with np.errstate(all="ignore"):
                small = abs(t * d_max) <= tolerance_change
            if evals >= max_eval or x.g_max <= tolerance_grad or small or abs(x.f - last_f) < tolerance_change:
                break
        counts = (jnp.asarray(min(count, LAST), jnp.int32) for count in (n_iter, total))
        with contexts.full_width([d]), contexts.constants():
            return LBFGSState(d, jnp.asarray(t, d.dtype), last_g, *(memory or state[3:8]), *counts)


def _resized(state: LBFGSState, rows: int) -> LBFGSState:
    """A state with room for another number of pairs, of which it keeps the newest."""
    stored, had = int(state.num_stored), len(state.ro)
    kept = min(stored, had, rows)
    newest = np.array([i % had for i in range(stored - kept, stored)], int)

    def moved(table: Any) -> Any:
        return jnp.zeros((rows, *table.shape[1:]), table.dtype).at[:kept].set(table[newest])

    return state._replace(
        old_dirs=moved(state.old_dirs),
        old_stps=moved(state.old_stps),
        ro=moved(state.ro),
        num_stored=jnp.asarray(kept, jnp.int32),
    )
