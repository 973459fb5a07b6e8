"""Running stateful code as a pure function over its cells.

A `Function` belongs to one function of the user and keeps its compiled programs, one for each distinct structure of
what it is given. A call is bound to cells once per object; after that it compares, gathers, and commits.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jax_core
from jax.tree_util import tree_unflatten

from . import cell as cells
from . import closures
from .arguments import FLAT, OBJECT, Arguments
from .cell import Cell, Frame, get_value, structure
from .containers import holds_state
from .pipeline import Compiled, Pipeline, placement
from .stateful import IdMap, Walk, walk_of


class Met(Exception):  # noqa: N818  # a signal between the parts of this file, never an error of the user's
    """A run reached cells that were not lifted; it is repeated with their owners lifted too."""

    def __init__(self, owners: list[Any]) -> None:
        self.owners = owners


class Repartition(Exception):  # noqa: N818
    """For new shapes the function uses or changes other cells than before."""


class FirstRun(Exception):  # noqa: N818
    """A program has been traced for inputs that it has not run for yet; it is to be called by `run_first`."""


# Part of the key of every cache of JAX's: another value for each run, so that a function of the user's that is jitted
# and reads a module by closure is traced in each run anew, with that run's tracers.
_run = jax.make_user_context()


class Traced:
    """One run of the user's function as a jaxpr over cell values and data."""

    def __init__(self, args: Arguments, lifted: Sequence[Cell], values: Sequence[Any], data: Sequence[Any], check: Any):
        self.written: list[int] = []

        def pure(values: list[Any], data: tuple[Any, ...]) -> Any:
            (out, new, frame) = cells.substituted(lifted, values, lambda: check(args.run(data), args.objects))
            if frame.met:
                raise Met(_owners(frame))
            self.written = [i for i, value in enumerate(new) if value is not values[i]]
            return out, [new[i] for i in self.written]

        with _run(object()):
            closed, shapes = jax.make_jaxpr(pure, return_shape=True)(list(values), tuple(data))
        self._out_tree = jax.tree.structure(shapes)
        self._closed = closed
        present = [i for i, value in enumerate(values) if value is not None]
        used = {v for eqn in closed.jaxpr.eqns for v in eqn.invars if isinstance(v, jax_core.Var)}
        used |= {v for v in closed.jaxpr.outvars if isinstance(v, jax_core.Var)}
        self.used = [i for i, var in zip(present, closed.jaxpr.invars, strict=False) if var in used]
        self.present = present
        self.calls_back = bool(closed.effects) or _calls_back(closed.jaxpr)

    def __call__(self, values: Sequence[Any], data: Sequence[Any]) -> Any:
        """The result and the written cells' new values. `values` of unused cells may be anything."""
        flat = jax_core.jaxpr_as_fun(self._closed)(*[values[i] for i in self.present], *data)
        return tree_unflatten(self._out_tree, flat)


def _owners(frame: Frame) -> list[Any]:
    owners = {id(owner): owner for owner, _ in frame.met.values()}
    if None in owners.values():
        raise RuntimeError("a cell without an owner was reached while tracing")
    return list(owners.values())


def _calls_back(jaxpr: Any) -> bool:
    """Whether running this may call Python, which may raise."""
    return any(
        eqn.primitive.name.endswith("callback") or any(map(_calls_back, jax_core.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def unaliased(outputs: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """Outputs of a traced function of which none shares a buffer with an input or another output."""
    seen = {id(value) for value in inputs}
    result = []
    for value in outputs:
        if id(value) in seen and isinstance(value, jax.Array):
            value = jax.numpy.copy(value)
        seen.add(id(value))
        result.append(value)
    return result


class Binding:
    """A program, and the cells of some objects in the order in which it takes them."""

    __slots__ = ("program", "walks", "cells", "groups", "partition", "pipeline", "__weakref__")

    def __init__(self, program: Program, walks: Sequence[Walk], lifted: list[Cell]) -> None:
        self.program = program
        self.walks = [weakref.ref(walk) for walk in walks]
        self.cells = lifted
        self.regroup()

    def regroup(self) -> None:
        self.partition = self.program.partition
        stored, owned, *self.groups = self.program.group(self.cells)
        self.pipeline = Pipeline(self.program.compiled, stored, owned)

    def fits(self, walks: list[Walk]) -> bool:
        return [reference() for reference in self.walks] == walks


class Shortcut:
    """The last call's binding, for calls that differ from it only in data: one object or none, among flat arguments."""

    __slots__ = ("version", "types", "place", "object", "binding")

    def __init__(self, types: tuple[type, ...], place: int, objects: list[Any], binding: Binding) -> None:
        self.version = structure.version
        self.types, self.place = types, place
        self.object: Any = weakref.ref(objects[0]) if place >= 0 else None
        self.binding = weakref.ref(binding)


class Partition:
    """Which of the lifted cells a program differentiates, changes, or only reads (as indices)."""

    def __init__(self, used: Sequence[int], written: Sequence[int], trainable: Sequence[bool]) -> None:
        self.used, self.written = sorted(used), sorted(written)
        self.train = [i for i in self.used if trainable[i]]
        self.owned = [i for i in self.written if i not in self.train]
        self.rest = [i for i in self.used if i not in self.train and i not in self.owned]

    def covers(self, traced: Traced) -> bool:
        return set(traced.used) <= set(self.used) and set(traced.written) <= set(self.written)


try:  # what else, besides its inputs, a trace depends on: settings such as the default precision
    from jax._src.config import trace_context as _context
except ImportError:

    def _context() -> Any:
        return object()  # then no two traces are the same


class _Now(threading.local):
    """What a thread that runs a program for the first time hands to the tracing of it."""

    call: Any = None
    traced: Traced | None = None  # made already, to find out what the function reaches


class Program:
    """The compiled form of one function for one structure. Subclasses say what is computed, in `body`."""

    def __init__(self, name: str, check: Callable[..., Any], traced: Traced, lifted: Sequence[Cell]) -> None:
        self.name, self.check = name, check
        self.trainable = [cell.trainable for cell in lifted]
        self.places = placement(lifted)
        self.partition = Partition(traced.used, traced.written, self.trainable)
        self.calls_back = traced.calls_back
        self.last: tuple[Any, Traced] | None = None  # the last trace, and for which inputs it was made
        self.now = _Now()
        self.now.traced = traced
        self.compiled = Compiled(self._traced_body, name)

    def group(self, lifted: list[Cell]) -> Any:
        raise NotImplementedError

    def body(self, traced: Traced, *args: Any) -> list[Any]:
        raise NotImplementedError

    def spread(self, indices: Sequence[int], values: Sequence[Any], into: list[Any]) -> None:
        for i, value in zip(indices, values, strict=True):
            into[i] = value

    def _traced_body(self, *args: Any) -> list[Any]:
        now = self.now
        if now.call is None:  # JAX traces, for inputs that are new to it
            raise FirstRun
        traced, now.traced = now.traced, None
        inputs = tuple(map(jax.typeof, jax.tree.leaves(args[1:]))), _context()
        if traced is None and self.last is not None and self.last[0] == inputs:
            traced = self.last[1]  # the same again, but for which gradients there are to add to
        if traced is None:
            fn, call_args, kwargs, reached, lifted = now.call
            arguments = Arguments(fn, call_args, kwargs)
            arguments.objects += reached
            values = self.values_for_trace(list(map(get_value, lifted)), *args)
            traced = Traced(arguments, lifted, values, args[-1], self.check)
            if not self.partition.covers(traced):
                used, written = {*self.partition.used, *traced.used}, {*self.partition.written, *traced.written}
                self.partition = Partition(list(used), list(written), self.trainable)
                self.compiled = Compiled(self._traced_body, self.name)
                raise Repartition
            self.calls_back = self.calls_back or traced.calls_back
        self.last = inputs, traced
        return self.body(traced, *args)

    def values_for_trace(self, values: list[Any], *args: Any) -> list[Any]:
        raise NotImplementedError


class Function:
    """A function of the user's, and its programs."""

    def __init__(self, fn: Callable[..., Any], make_program: Callable[..., Program], check: Callable[..., Any]) -> None:
        self.name = getattr(fn, "__name__", type(fn).__name__)
        self.make_program, self.check = make_program, check
        self.programs: dict[Any, Program] = {}
        self.token = object()  # stands for this function where holding it would make a cycle
        self.lock = threading.RLock()
        self.shortcut: Shortcut | None = None
        self.met: list[Any] = []  # weak references to what only a trace could find
        self.look(fn)

    def look(self, fn: Callable[..., Any]) -> None:
        """Find by name what `fn` reaches by closure."""
        self.places = closures.search(fn)
        self.reached = list({id(was): was for _, _, was in self.places if holds_state(was)}.values())

    def run(self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Binding]:
        """Call `fn`'s program for these arguments and store its results; gives the other results, and the binding."""
        short = self.shortcut
        if (
            short is not None
            and short.version is structure.version
            and short.types == tuple(map(type, args))
            and not kwargs
            and ((place := short.place) < 0 or short.object() is args[place])
            and (not self.places or not closures.rebound(self.places))
            and (binding := short.binding()) is not None
            and binding.partition is binding.program.partition
        ):
            data = args[1:] if place == 0 else args if place < 0 else args[:place] + args[place + 1 :]
            train, rest = binding.groups
            try:
                others = list(map(get_value, train)), list(map(get_value, rest)), data
                return binding.pipeline.run(others, binding.program.calls_back), binding
            except FirstRun:
                pass
        return self._run_slowly(fn, args, kwargs)

    def _run_slowly(self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Binding]:
        """`run`, the long way, and for a program's first run with these shapes."""
        binding, data, reached = self._bind(fn, args, kwargs)
        others = (*[list(map(get_value, group)) for group in binding.groups], data)
        now = binding.program.now
        try:
            if now.traced is None:
                return binding.pipeline.run(others, binding.program.calls_back), binding
        except FirstRun:
            pass
        now.call = fn, args, kwargs, reached, binding.cells
        try:
            return binding.pipeline.run_first(others), binding
        except Repartition:
            return self._run_slowly(fn, args, kwargs)
        finally:
            now.traced = now.call = None

    def _bind(
        self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Binding, tuple[Any, ...], list[Any]]:
        """The long way: take the arguments apart, walk the objects if their structure may have changed, compare."""
        call = Arguments(fn, args, kwargs)
        own = len(call.objects)
        self.add_reached(call)
        walks = [walk_of(obj) for obj in call.objects]
        key = (self.token, call.treedef, call.template)
        binding = walks[0].bindings.get(key) if walks else None
        if binding is None or not binding.fits(walks) or binding.program.places != placement(binding.cells):
            binding = self._bind_slowly(call, walks)
        if binding.partition is not binding.program.partition:
            binding.regroup()
        reached = call.objects[own:]
        if (
            own < 2
            and not self.met
            and not any(walk.watched for walk in walks)
            and own + len(call.data) == len(args)
            and call.treedef is FLAT
        ):
            place = call.template.index(OBJECT) if own else -1
            self.shortcut = Shortcut(tuple(map(type, args)), place, call.objects, binding)
        return binding, call.data, reached

    def add_reached(self, args: Arguments) -> None:
        """Add to the arguments' objects what the function reaches by closure."""
        if self.places and closures.rebound(self.places):
            self.look(args.fn)
        args.objects += self.reached
        if self.met:  # nothing but a trace can tell whether these are still the ones
            self.met = []
            trace_with_all(args, self.check, self.met)

    def _bind_slowly(self, args: Arguments, walks: list[Walk]) -> Binding:
        with self.lock:
            lifted, alias = unique_cells(walks)
            key = (args.treedef, args.template, tuple(walk.spec for walk in walks), alias, placement(lifted))
            program = self.programs.get(key)
            if program is None:
                before = len(args.objects)
                traced, lifted = trace_with_all(args, self.check, self.met)
                walks = [walk_of(obj) for obj in args.objects]
                if len(args.objects) > before:
                    lifted, alias = unique_cells(walks)
                    key = (args.treedef, args.template, tuple(walk.spec for walk in walks), alias, placement(lifted))
                program = self.programs.get(key)
                if program is None:
                    program = self.programs[key] = self.make_program(self.name, self.check, traced, lifted)
            binding = Binding(program, walks, lifted)
            if walks:
                bindings = walks[0].bindings
                if len(bindings) >= 16:
                    bindings.clear()
                bindings[self.token, args.treedef, args.template] = binding
            return binding


def unique_cells(walks: Sequence[Walk]) -> tuple[list[Cell], tuple[int, ...]]:
    """The cells of several objects, each once, and a signature of which of them the objects share."""
    if len(walks) == 1:
        return walks[0].cells, ()
    index: dict[Cell, int] = {}
    order = [index.setdefault(cell, len(index)) for walk in walks for cell in walk.cells]
    return list(index), tuple(order) if len(order) > len(index) else ()


def trace_with_all(args: Arguments, check: Any, met: list[Any] | None = None) -> tuple[Traced, list[Cell]]:
    """Trace the function at the cells' present values, again as long as it reaches objects not in `args.objects`."""
    while True:
        lifted, _ = unique_cells([walk_of(obj) for obj in args.objects])
        try:
            return Traced(args, lifted, list(map(get_value, lifted)), args.data, check), lifted
        except Met as error:
            args.objects += error.owners
            if met is not None:
                met += [weakref.ref(owner) for owner in error.owners]


class Functions:
    """The Functions kept for one use of functions (`backward`, say), for as long as those live."""

    def __init__(self, make: Callable[[Any], Function]) -> None:
        self._make = make
        self._plain = IdMap()  # of functions
        self._methods = IdMap()  # of objects: dicts by function

    def get(self, fn: Any) -> Function:
        known = self._plain.items.get(id(fn))
        return known[1] if known is not None and known[0]() is fn else self._new(fn)

    def _new(self, fn: Any) -> Function:
        try:
            if not isinstance(fn, types.MethodType):
                function = self._make(fn)
                self._plain.set(fn, function)
                return function
            known = self._methods.get(fn.__self__)
            if known is None:
                known = {}
                self._methods.set(fn.__self__, known)
        except TypeError:  # cannot be referred to weakly: traced anew at each call
            return self._make(fn)
        if fn.__func__ not in known:
            known[fn.__func__] = self._make(fn)
        found: Function = known[fn.__func__]
        return found
