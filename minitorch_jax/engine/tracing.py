"""Tracing stateful code as a pure function over its cells. The result is the jaxpr of one run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jax_core
from jax.tree_util import tree_unflatten

from ..module import kept_values
from ..module.attributes import MISSING
from ..module.hooks import hooks_below
from ..runtime import interrupts
from ..runtime.jax_private import as_one_call, trace_context
from ..state import frame as frames
from ..state.cell import Cell
from ..state.errors import TraceError
from ..state.frame import Frame
from ..state.gradient import CONSUMED, Unread, starting_value
from ..state.static_values import holds_state
from ..state.walk import Walk, walk_of
from . import argument_names
from .arguments import Arguments, Static
from .derivatives import with_cached_derivatives
from .sharding import explicit_axes, is_explicit


class Met(Exception):  # noqa: N818  # a signal to the code that traces; users never see it
    """A run reached cells that were not lifted. It is repeated with their owners lifted, too."""

    def __init__(self, owners: list[Any]) -> None:
        self.owners = owners


# Part of the key of all of JAX's caches. Each run sets a new value. A jitted function of the user that reads a module by
# closure is therefore traced again in each run, with the tracers of that run.
_run = jax.make_user_context()


class Purpose:
    """How a function is traced: what happens with its result, with gradients and with static attributes."""

    def __init__(
        self,
        check: Callable[[Any, list[Any]], Any],  # (result, objects) -> what the traced function returns
        gradients: bool = False,  # True: gradients are lifted like other cells. False: the function may not touch them
        keep_grads: bool = True,  # True: gradients that an optimizer's step has used are results of the program, too
        statics: bool = True,  # True: static attributes may have other values at the end
        marks_reached: bool = True,  # True: a written gradient shows that a loss reaches its parameter
        options: tuple[tuple[str, Any], ...] = (),  # the user's options for XLA: see `compiler_options.py`
    ) -> None:
        self.check, self.gradients, self.keep_grads, self.statics = check, gradients, keep_grads, statics
        self.marks_reached, self.options = marks_reached, options

    def keeping_grads(self) -> Purpose:
        """Return the same Purpose with `keep_grads`."""
        return Purpose(self.check, self.gradients, True, self.statics, self.marks_reached, self.options)


# For each optimizer, `(place, name)` of each setting that became a number in the run: it was a schedule, or a group had it
# from the optimizer. Place 0 is the optimizer itself, 1 its first group.
ChangedSettings = tuple[tuple[tuple[int, str], ...], ...]


class Traced:
    """The jaxpr of one run of the user's function, over cell values and data."""

    def __init__(
        self,
        args: Arguments,
        lifted: Sequence[Cell],
        values: Sequence[Any],
        data: Sequence[Any],
        purpose: Purpose,
        inner: dict[Any, dict[Any, Traced]] | None = None,
    ) -> None:
        refuse_explicit_axes(args, lifted, values, data)
        self.inner = {} if inner is None else inner  # traces of losses in it, by JAX's settings; see `trace_once`
        context = trace_context()
        self.written: list[int] = []
        self.dropped: list[int] = []  # gradients that are CONSUMED at the end
        self.wraps = False  # True if the result holds more than arrays
        self.returns_hooks = False  # True if a module with hooks is a part of the result
        self.changes_statics = False  # True if static attributes changed: the program is for this call only
        self.settings: ChangedSettings = ()  # settings of the optimizers among the objects that became numbers

        def pure(values: list[Any], data: tuple[Any, ...]) -> Any:
            start = list(values)
            optimizers = optimizers_of(args.objects)
            before = [opt.begin_run() for opt in optimizers]

            def run(frame: Frame) -> Any:
                frame.inner = self.inner.setdefault(context, {})
                if purpose.gradients:
                    for i, cell in enumerate(lifted):
                        if cell.kind == "gradient":
                            cell.value = start[i] = Unread(values[i], frame)
                frame.undo += [(opt.undo_run, (kept,)) for opt, kept in zip(optimizers, before, strict=True)]
                out = args.run(data)
                self.settings = tuple([opt.end_run(kept) for opt, kept in zip(optimizers, before, strict=True)])
                self.changes_statics = check_statics(frame, purpose.statics)
                return purpose.check(out, args.objects)

            out, new, frame = frames.substituted(lifted, values, run, purpose.gradients)
            if frame.met:
                raise Met(owners_met(frame))
            for opt, kept in zip(optimizers, before, strict=True):
                opt.undo_run(kept)  # `settle` repeats the changes after each call of the program
            self.observed = {i for i, cell in enumerate(lifted) if cell in frame.observed}
            self.written = [i for i, value in enumerate(new) if value is not start[i]]
            self.dropped = [
                i
                for i in self.written
                if new[i] is CONSUMED
                or (not purpose.keep_grads and i not in self.observed and _is_used_up(frame, lifted[i], new[i]))
            ]
            self.written = [i for i in self.written if i not in self.dropped]
            parts = filter(holds_state, jax.tree.leaves(out, is_leaf=holds_state))
            self.returns_hooks = any(any(hooks_below(part)) for part in parts)
            self.wraps = any(isinstance(leaf, Static) for leaf in jax.tree.leaves(out, is_leaf=_is_static))
            return out, [new[i] for i in self.written]

        with kept_values.refused(), _run(object()), interrupts.tracing():
            function, given = argument_names.named(pure, args, lifted, values, data)
            closed, shapes = jax.make_jaxpr(function, return_shape=True)(*given)
        self.constants = closed.consts  # arrays in the jaxpr; `take` turns some into inputs
        self._taken: list[int | None] = []
        self._out_tree = jax.tree.structure(shapes)
        self.shapes = shapes
        self._closed = closed
        present = [i for i, value in enumerate(values) if value is not None and value is not CONSUMED]
        used = {v for eqn in closed.jaxpr.eqns for v in eqn.invars if isinstance(v, jax_core.Var)}
        used |= {v for v in closed.jaxpr.outvars if isinstance(v, jax_core.Var)}
        in_jaxpr = {i for i, var in zip(present, closed.jaxpr.invars, strict=False) if var in used}
        self.used = sorted(in_jaxpr | self.observed)
        self.present = present

    def inner_constants(self) -> set[int]:
        """Return the ids of the constants of inner jitted functions. These cannot become inputs."""
        return set(map(id, _inner_constants(self._closed.jaxpr)))

    def take(self, arrays: Sequence[Any]) -> None:
        """Turn the constants that are these arrays into inputs: `data` ends with their values from now on."""
        places = {id(constant): i for i, constant in enumerate(self.constants)}
        self._taken = [places.get(id(array)) for array in arrays]
        left = [None if i in self._taken else constant for i, constant in enumerate(self.constants)]
        self.constants = left
        self._closed = jax_core.ClosedJaxpr(self._closed.jaxpr, left)

    @property
    def jaxpr(self) -> Any:
        return self._closed.jaxpr

    def __call__(self, values: Sequence[Any], data: Sequence[Any]) -> Any:
        """Return the result and the new values of the written cells. The `values` of unused cells are ignored."""
        return self._evaluated(self._closed, values, data)

    def differentiably(self, values: Sequence[Any], data: Sequence[Any]) -> Any:
        """Do the same as a call, in a form that `jax.value_and_grad` differentiates faster."""
        return self._evaluated(with_cached_derivatives(self._closed), values, data)

    def as_one_call(self, values: Sequence[Any], data: Sequence[Any], name: str) -> Any:
        """Do the same as a call within a trace, as one equation of it."""
        closed, inputs = self._with_taken(self._closed, values, data)
        flat = as_one_call(closed, inputs, name)
        return self(values, data) if flat is None else tree_unflatten(self._out_tree, flat)

    def _evaluated(self, closed: Any, values: Sequence[Any], data: Sequence[Any]) -> Any:
        closed, inputs = self._with_taken(closed, values, data)
        avals = closed.in_avals  # jax_enable_checks checks unused inputs, too, so they get zeros of the right shape
        inputs = [free_zeros(aval) if x is None else x for x, aval in zip(inputs, avals, strict=True)]
        return tree_unflatten(self._out_tree, jax_core.jaxpr_as_fun(closed)(*inputs))

    def _with_taken(self, closed: Any, values: Sequence[Any], data: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Return the jaxpr with the arrays that `data` ends with in place of constants, and its inputs."""
        if self._taken:
            cut, constants = len(data) - len(self._taken), list(closed.consts)
            for i, value in zip(self._taken, data[cut:], strict=True):
                if i is not None:
                    constants[i] = value
            closed, data = jax_core.ClosedJaxpr(closed.jaxpr, constants), data[:cut]
        return closed, [*(values[i] for i in self.present), *data]


def refuse_explicit_axes(args: Arguments, lifted: Sequence[Cell], values: Sequence[Any], data: Sequence[Any]) -> None:
    """Raise TypeError for an array on a mesh with Explicit axes.

    Layers, scans, clipping and steps would have to say how each of their operations divides its result.
    """
    for i, value in enumerate((*values, *data)):
        mesh = jax.typeof(value).sharding.mesh if isinstance(value, jax.Array) else None
        if mesh is not None and is_explicit(mesh):
            name = paths_of(args.objects).get(lifted[i], "a gradient") if i < len(values) else "an argument"
            raise explicit_axes(f"{name} lies on", mesh)


def optimizers_of(objects: Sequence[Any]) -> list[Any]:
    """Return the optimizers among some objects and inside them, in the order of their structure."""
    return [opt for obj in objects for reference in walk_of(obj).optimizers if (opt := reference()) is not None]


def settle(settings: ChangedSettings, objects: Sequence[Any]) -> None:
    """Repeat in the optimizers what a traced run did to settings, other than new numbers."""
    if any(settings):
        for opt, changed in zip(optimizers_of(objects), settings, strict=True):
            opt.settle(changed)


def _is_static(leaf: Any) -> bool:
    return isinstance(leaf, Static)


def _is_used_up(frame: Frame, cell: Cell, value: Any) -> bool:
    return cell.kind == "gradient" and value is not None and frame.consumed.get(cell) is value


def check_statics(frame: Frame, may: bool) -> bool:
    """True if the run has left a static attribute of an older module with another value.

    Raises:
        TraceError: if an attribute has changed, and it `may` not.
    """
    seen: set[tuple[int, str]] = set()
    for module, name, before in frame.statics:
        if id(module) in frame.own or (id(module), name) in seen:
            continue
        seen.add((id(module), name))
        now = vars(module).get(name, MISSING)
        if now is not before and now != before:
            if may:
                return True
            change = "" if now is MISSING else f" (to {now!r})"
            raise TraceError(
                f"{type(module).__name__}.{name} was changed{change} inside compiled code. Only the first call would change"
                f" it, since later calls run the compiled program. Change it outside (`model.eval()` before the call),"
                " change it back in the function, or, if it counts something, declare it as a Buffer."
            )
    return False


def owners_met(frame: Frame) -> list[Any]:
    """Return the objects whose cells a run has reached although they were not lifted."""
    owners = {id(owner): owner for owner, _ in frame.met.values()}
    if None in owners.values():
        raise RuntimeError("a cell without an owner was reached while tracing")
    return list(owners.values())


def _inner_constants(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, jax_core.ClosedJaxpr):
                    yield from inner.consts
        for inner in jax_core.jaxprs_in_params(eqn.params):
            yield from _inner_constants(inner)


def free_zeros(like: Any) -> Any:
    """Return NumPy zeros of the shape and dtype of `like`, in the memory of one number."""
    return np.broadcast_to(np.zeros((), like.dtype), like.shape)


def unaliased(outputs: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """Return the outputs of a traced function, with copies of those that are an input or another output."""
    seen = {id(value) for value in inputs}
    result = []
    for value in outputs:
        if id(value) in seen and isinstance(value, jax.Array):
            value = jax.numpy.copy(value)
        seen.add(id(value))
        result.append(value)
    return result


def unique_cells(walks: Sequence[Walk], gradients: bool) -> tuple[list[Cell], tuple[int, ...]]:
    """Return the cells of the objects, each once, and a signature that tells which cells the objects share."""
    index: dict[Cell, int] = {}
    groups = [walk.with_gradients() if gradients else walk.cells for walk in walks]
    order = [index.setdefault(cell, len(index)) for group in groups for cell in group]
    return list(index), tuple(order) if len(order) > len(index) else ()


def trace_with_all(
    args: Arguments, purpose: Purpose, met: list[Any] | None = None, data: Sequence[Any] | None = None
) -> tuple[Traced, list[Cell]]:
    """Trace the function with the cells' present values, and repeat it while it reaches objects not in `args.objects`."""
    while True:
        lifted, _ = unique_cells([walk_of(obj) for obj in args.objects], purpose.gradients)
        try:
            return Traced(
                args, lifted, list(map(starting_value, lifted)), args.data if data is None else data, purpose
            ), lifted
        except Met as error:
            args.objects += error.owners
            if met is not None:
                met += [weakref.ref(owner) for owner in error.owners]


def trace_once(args: Arguments, purpose: Purpose) -> tuple[Traced, list[Cell]]:
    """Do what `trace_with_all` does, within a run. A trace of an earlier run with inputs of the same types is reused.

    The code around a loss may be traced again, for example when there are gradients to add to. The user's code in the loss
    is then not traced again, unless it reads arrays by name, because these names may hold other arrays by then.
    """
    frame: Any = frames.local.frame
    if frame is None or frame.inner is None:
        return trace_with_all(args, purpose)
    frame.losses += 1
    lifted, _ = unique_cells([walk_of(obj) for obj in args.objects], purpose.gradients)
    if any(cell not in frame.values for cell in lifted):
        return trace_with_all(args, purpose)
    inputs = jax.tree.leaves((list(map(starting_value, lifted)), args.data))
    key = frame.losses, frames.places_of(lifted), tuple(map(jax.typeof, inputs))
    known = frame.inner.get(key)
    if known is not None:
        return known, lifted
    traced, found = trace_with_all(args, purpose)
    repeats = found == lifted and not traced.changes_statics and not any(traced.settings)
    if repeats and not any(
        isinstance(constant, jax.Array) for constant in traced.constants
    ):  # others may be there then
        frame.inner[key] = traced
    return traced, found


def touch_all(objects: list[Any]) -> None:
    """Record in the outer run that an inner run has reached these objects."""
    frame = frames.local.frame
    if frame is not None:
        for obj in objects:
            for cell in walk_of(obj).cells:
                frame.touch(cell, obj)


def paths_of(objects: list[Any]) -> dict[Cell, str]:
    """Return the names of the cells of some objects, for messages."""
    return {
        cell: f"{type(obj).__name__}.{path}"
        for obj in reversed(objects)
        for path, cell in zip(walk_of(obj).spec.paths, walk_of(obj).cells, strict=True)
    }
