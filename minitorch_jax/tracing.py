"""Running stateful code as a pure function over its cells.

A `Function` belongs to one function of the user and keeps its compiled programs, one for each distinct structure of
what it is given. A call is bound to cells once per object; after that it compares, gathers, and commits.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import jax
from jax.extend import core as jax_core
from jax.tree_util import tree_unflatten

from . import cell as cells
from . import closures, interrupts, random
from .arguments import DATA, FLAT, OBJECT, Arguments, Static
from .cell import Cell, Frame, Unread, get_value, gradients, lendings, structure, structure_changed
from .containers import holds_state
from .pack import KEPT, Layout, PartlyConsumed, stored_cells
from .pipeline import Compiled, Pipeline, is_debugging, join_mesh, placed, placement, repeated
from .recompiles import Compilations
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


class Purpose:
    """What a function is traced for: what becomes of its result, and of gradients."""

    def __init__(
        self,
        check: Callable[[Any, list[Any]], Any],  # (result, objects) -> what the traced function returns
        gradients: bool = False,  # whether gradients are lifted like other cells; a loss function may not touch them
        keep_grads: bool = True,  # whether those that an optimizer's step has used up are given out
        statics: bool = True,  # whether static attributes may be other ones at the end
    ) -> None:
        self.check, self.gradients, self.keep_grads, self.statics = check, gradients, keep_grads, statics

    def keeping_grads(self) -> Purpose:
        """The same with every gradient given out."""
        return Purpose(self.check, self.gradients, True, self.statics)


class Traced:
    """One run of the user's function as a jaxpr over cell values and data."""

    def __init__(
        self, args: Arguments, lifted: Sequence[Cell], values: Sequence[Any], data: Sequence[Any], purpose: Purpose
    ) -> None:
        self.written: list[int] = []
        self.dropped: list[int] = []  # gradients that end up CONSUMED
        self.wraps = False  # whether the result holds more than arrays

        def pure(values: list[Any], data: tuple[Any, ...]) -> Any:
            start = list(values)

            def run(frame: Frame) -> Any:
                if purpose.gradients:
                    for i, cell in enumerate(lifted):
                        if cell.kind == "gradient":
                            cell.value = start[i] = Unread(values[i], frame)
                out = args.run(data)
                if not purpose.statics:
                    _check_statics(frame)
                return purpose.check(out, args.objects)

            out, new, frame = cells.substituted(lifted, values, run, purpose.gradients)
            if frame.met:
                raise Met(_owners(frame))
            self.observed = {i for i, cell in enumerate(lifted) if cell in frame.observed}
            self.written = [i for i, value in enumerate(new) if value is not start[i]]
            self.dropped = [
                i
                for i in self.written
                if new[i] is cells.CONSUMED
                or (not purpose.keep_grads and i not in self.observed and _is_used_up(frame, lifted[i], new[i]))
            ]
            self.written = [i for i in self.written if i not in self.dropped]
            self.wraps = any(isinstance(leaf, Static) for leaf in jax.tree.leaves(out, is_leaf=_is_static))
            return out, [new[i] for i in self.written]

        with _run(object()):
            closed, shapes = jax.make_jaxpr(pure, return_shape=True)(list(values), tuple(data))
        self._out_tree = jax.tree.structure(shapes)
        self.shapes = shapes
        self._closed = closed
        present = [i for i, value in enumerate(values) if value is not None and value is not cells.CONSUMED]
        used = {v for eqn in closed.jaxpr.eqns for v in eqn.invars if isinstance(v, jax_core.Var)}
        used |= {v for v in closed.jaxpr.outvars if isinstance(v, jax_core.Var)}
        in_jaxpr = {i for i, var in zip(present, closed.jaxpr.invars, strict=False) if var in used}
        self.used = sorted(in_jaxpr | self.observed)
        self.present = present
        self.calls_back = bool(closed.effects) or _calls_back(closed.jaxpr)

    def __call__(self, values: Sequence[Any], data: Sequence[Any]) -> Any:
        """The result and the written cells' new values. `values` of unused cells may be anything."""
        flat = jax_core.jaxpr_as_fun(self._closed)(*[values[i] for i in self.present], *data)
        return tree_unflatten(self._out_tree, flat)


def _is_static(leaf: Any) -> bool:
    return isinstance(leaf, Static)


def _is_used_up(frame: Frame, cell: Cell, value: Any) -> bool:
    return cell.kind == "gradient" and value is not None and frame.consumed.get(cell) is value


def _check_statics(frame: Frame) -> None:
    """Raise if a static attribute of a module that was there before ends with another value than it had."""
    seen: set[tuple[int, str]] = set()
    for module, name, before in frame.statics:
        if id(module) in frame.own or (id(module), name) in seen:
            continue
        seen.add((id(module), name))
        if name not in vars(module) or vars(module)[name] != before:
            change = "" if name not in vars(module) else f" (to {vars(module)[name]!r})"
            raise cells.TraceError(
                f"{type(module).__name__}.{name} was changed{change} inside compiled code: that would happen at the first"
                f" call only, since later ones run the compiled program. Change it outside (`model.eval()` before the"
                " call), change it back in the function, or, if it counts something, declare it as a Buffer."
            )


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

    __slots__ = ("program", "walks", "cells", "stored", "groups", "partition", "pipeline", "run_again", "__weakref__")

    def __init__(self, program: Program, walks: Sequence[Walk], lifted: list[Cell]) -> None:
        self.program = program
        self.walks = [weakref.ref(walk) for walk in walks]
        self.cells = lifted
        self.stored = stored_cells(lifted)
        self.regroup()

    def regroup(self) -> None:
        compiled, self.partition = self.program.version
        stored, owned, dropped, *self.groups = self.program.group(self.stored, self.partition)
        self.pipeline = Pipeline(compiled, stored, owned, dropped)
        self.run_again = repeated(self.pipeline, self.groups)
        self.mark_reached()

    def mark_reached(self) -> None:
        """Note of which parameters the program gives gradients."""
        for i in self.program.reaches:
            cell = self.cells[i]
            (cell.grad or cell).reached = True

    def dissolve(self) -> None:
        """Release the packs of which it has only a part, and whose gradients are not there any more."""
        for pack in {cell.pack for cell in self.cells if cell.pack is not None}:
            if pack.cell.value is cells.CONSUMED and not {*pack.places} <= {*self.cells}:
                pack.dissolve()

    def takes(self, cell: Cell) -> bool:
        """Whether the program uses or changes a cell."""
        return cell in self.pipeline.stored or any(cell in group for group in self.groups)

    def fits(self, walks: list[Walk]) -> bool:
        return [reference() for reference in self.walks] == walks


class Shortcut:
    """The last call's binding, for calls that differ from it only in data: objects and arrays as they are, no more.

    `settled` is `lendings.last` after the last call: while it is the same, no structure has changed, and all that the
    pipeline owns is ours alone. `gradients` is the same of `gradients.last`, None if no gradients are dropped.
    """

    __slots__ = (
        "version",
        "count",
        "types",
        "objects",
        "data",
        "stream",
        "sharding",
        "watch",
        "binding",
        "settled",
        "gradients",
    )

    def __init__(
        self, template: tuple[Any, ...], args: tuple[Any, ...], stream: Any, watch: closures.Watch, binding: Binding
    ) -> None:
        self.version = structure.version
        self.count, self.types = len(args), tuple(map(type, args))
        self.objects = [(i, weakref.ref(args[i])) for i, code in enumerate(template) if code is OBJECT]
        places = [i for i, code in enumerate(template) if code is DATA]
        first = len(args) - len(places)  # where data begin, if they come last, which is quicker
        self.data: Any = slice(first, None) if places == list(range(first, len(args))) else places
        self.stream: Any = stream if binding.takes(stream.cell) else None
        self.sharding = getattr(stream.cell.value, "sharding", None)  # of the stream, which goes from device to device
        self.watch = watch
        self.binding = weakref.ref(binding)
        self.settled: object = None
        self.gradients: object = None

    def applies(self, args: tuple[Any, ...]) -> bool:
        """Whether all but the data is as in the last call. (Whether they are data, JAX sees: else they are new to it.)"""
        if len(args) != self.count or self.watch.rebound():
            return False
        stream, current = self.stream, cast(Any, random.local.stream)
        if stream is not None and (stream is not current or current.cell.value.sharding != self.sharding):
            return False
        for place, reference in self.objects:
            if reference() is not args[place]:
                return False
        return True

    def run(self, args: tuple[Any, ...], settled: bool) -> tuple[list[Any], Binding] | None:
        """The call's results; None if it is another kind of call. `settled`: nothing was lent, and no gradient changed."""
        binding = self.binding()
        if binding is None:
            return None
        data = args[self.data] if type(self.data) is slice else tuple([args[i] for i in self.data])
        if settled:
            try:
                results = binding.run_again(data)
            except TypeError:  # JAX takes something for no data, before anything is done
                return None
            if binding.program.writes_gradients:
                gradients.last = object()
                self.gradients = self.gradients and gradients.last
            return results, binding
        if self.types != tuple(map(type, args)):
            return None
        others = (*[list(map(get_value, group)) for group in binding.groups], data)
        results = binding.pipeline.run(others, binding.program.calls_back)
        self.settled = None if binding.program.calls_back else binding.pipeline.last_seen
        self.gradients = gradients.last if binding.pipeline.dropped else None
        return results, binding


class _Latest(threading.local):
    shortcut: Shortcut | None = None


class Partition:
    """What a program does with the stored cells (as indices): those it differentiates by, changes, only reads."""

    def __init__(self, used: set[int], written: set[int], dropped: set[int], trainable: Sequence[bool]) -> None:
        self.used, self.written = sorted(used), sorted(written)
        self.dropped = sorted(dropped - written)
        self.train = [i for i in self.used if trainable[i]]
        self.owned = [i for i in self.used if i in written and i not in self.train]
        self.rest = [i for i in self.used if i not in self.train and i not in self.owned]

    def covers(self, other: Partition) -> bool:
        return (
            set(other.used) <= set(self.used)
            and set(other.written) <= set(self.written)
            and set(self.written) <= {*other.written, *self.used}  # what is not changed is passed through
            and other.dropped == self.dropped
        )

    def extended(self, other: Partition, trainable: Sequence[bool]) -> Partition:
        """One that covers `other` too, with all gradients given out unless both drop them."""
        kept = set() if other.dropped == self.dropped else {*other.dropped, *self.dropped}
        mine, theirs = {*self.written, *kept}, {*other.written, *kept}
        used = {*self.used, *other.used, *(mine ^ theirs), *kept}
        return Partition(used, mine | theirs, {*self.dropped} - kept, trainable)


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
    """The compiled form of one function for one structure. Subclasses say what is computed, in `group` and `body`."""

    differentiates = False

    def __init__(self, function: Function, traced: Traced, lifted: Sequence[Cell], num_donated: int) -> None:
        self.name, self.purpose, self.compilations = function.name, function.purpose, function.compilations
        self.num_donated = num_donated  # of the data, the first ones
        self.layout = Layout(lifted)
        stored, self.layout.stored = self.layout.stored, []  # which would keep the first model alive
        self.trainable = [self.differentiates and cell.trainable for cell in stored]
        self.places = placement(stored)
        self.calls_back, self.wraps = traced.calls_back, traced.wraps
        self.writes_gradients = self.differentiates or any(lifted[i].kind == "gradient" for i in traced.written)
        self.gradients = {i for i, cell in enumerate(lifted) if cell.kind == "gradient"}
        self.reaches: set[int] = set()  # parameters, or gradients, of which a loss gives gradients; views one by one
        self.last: tuple[Any, Traced] | None = None  # the last trace, and for which inputs it was made
        self.now = _Now()
        self.now.traced = traced
        self._set(self._partition(traced))

    def _partition(self, traced: Traced) -> Partition:
        """What `traced` does with the cells, for the stored ones."""
        of, packs = self.layout.of, self.layout.packs
        used, written, dropped = ({of[i] for i in parts} for parts in (traced.used, traced.written, traced.dropped))
        if packs:
            values = dict(zip(traced.written, traced.shapes[1], strict=True))
            for j in packs:
                views, whole = packs[j].views, packs[j].whole
                covered = whole and set(views) <= {*traced.written, *traced.dropped}
                if j in dropped and covered and all(values.get(i) is None for i in views):
                    written.discard(j)  # no gradient of the pack is given out
                elif j in dropped:  # some are: then all
                    self.purpose = self.purpose.keeping_grads()
                    self.now.traced = None
                    dropped.discard(j)
                    written.add(j)
                if j in written and not covered:
                    used.add(j)
        return Partition(used, written, dropped, self.trainable)

    def _set(self, partition: Partition) -> None:
        # one object, so that a thread sees either both old or both new
        self.version = Compiled(partial(self._traced_body, partition), self.name), partition

    def group(self, lifted: list[Cell], part: Partition) -> Any:
        """(stored, owned, dropped) cells for the pipeline, and groups of cells whose values are further arguments."""
        raise NotImplementedError

    def body(self, traced: Traced, part: Partition, *args: Any) -> list[Any]:
        """What is computed, from the values of the owned cells, those of the groups, and the data."""
        raise NotImplementedError

    def _traced_body(self, partition: Partition, owned: list[Any], *others: Any) -> list[Any]:
        now = self.now
        if now.call is None:  # JAX traces, for inputs that are new to it
            raise FirstRun
        if partition is not self.version[1]:  # another thread has found that it takes more
            raise Repartition
        if self.num_donated:
            cut = len(owned) - self.num_donated
            others = (*others[:-1], (*owned[cut:], *others[-1]))
            owned = owned[:cut]
        traced, now.traced = now.traced, None
        inputs = tuple(map(jax.typeof, jax.tree.leaves(others))), _context()
        if traced is None and self.last is not None and self.last[0] == inputs and not self.purpose.gradients:
            traced = self.last[1]  # the same again, but for which gradients there are to add to
        if traced is None:
            fn, call_args, kwargs, reached, lifted = now.call
            arguments = Arguments(fn, call_args, kwargs)
            arguments.objects += reached
            values = self.values_of(list(map(cells.held, lifted)), partition, owned, *others)
            traced = Traced(arguments, lifted, values, others[-1], self.purpose)
            needed = self._partition(traced)
            if not partition.covers(needed):
                if needed.dropped != partition.dropped:
                    self.purpose = self.purpose.keeping_grads()
                self._set(partition.extended(needed, self.trainable))
                structure_changed()  # bindings are to be made anew
                raise Repartition
            self.calls_back = self.calls_back or traced.calls_back
            self.wraps = self.wraps or traced.wraps
        self.last = inputs, traced
        out = self.body(traced, partition, owned, *others)
        self.compilations.note(now.call)
        return out

    def values_of(self, values: list[Any], part: Partition, *args: Any) -> list[Any]:
        """The lifted cells' values: `values`, but for those that come from the arguments."""
        return self.layout.cut(self.stored_values(part, *args), values)

    def stored_values(self, part: Partition, *args: Any) -> dict[int, Any]:
        """The values of stored cells among the arguments."""
        raise NotImplementedError

    def new_values(self, part: Partition, traced: Traced, written: Sequence[Any], old: dict[int, Any]) -> list[Any]:
        """The changed stored cells' new values, from those that the trace gave."""
        changed = dict(zip(traced.written, written, strict=True))
        new = [self.layout.joined(j, lambda i: changed.get(i, KEPT), old.get(j)) for j in part.written]
        return [placed(v, self.places[j]) for v, j in zip(new, part.written, strict=True)] if self.places else new


class Function:
    """A function of the user's, and its programs."""

    def __init__(
        self,
        fn: Callable[..., Any],
        program: type[Program],
        purpose: Purpose,
        count_donated: Callable[[Arguments], int] | None = None,
    ) -> None:
        self.name = getattr(fn, "__name__", type(fn).__name__)
        self.program, self.purpose = program, purpose
        self.count_donated = count_donated  # how many of a call's data may be used up: the first ones
        self.programs: dict[Any, Program] = {}
        self.compilations = Compilations(self.name, per_object=not purpose.gradients)
        self.token = object()  # stands for this function where holding it would make a cycle
        self.lock = threading.RLock()
        self.latest = _Latest()
        self.met: list[Any] = []  # weak references to what only a trace could find
        self.watch: Any = None  # made at the first call: names may be bound after the function is defined

    def look(self, fn: Callable[..., Any]) -> None:
        """Find by name what `fn` reaches by closure."""
        places = closures.search(fn)
        self.watch = closures.Watch(places)
        self.reached = list({id(was): was for _, _, was in places if holds_state(was)}.values())

    def run(self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Binding]:
        """Call `fn`'s program for these arguments and store its results; gives the other results, and the binding."""
        short = self.latest.shortcut
        if short is not None and not kwargs and short.version is structure.version and short.applies(args):
            settled = (
                short.settled is lendings.last
                and (short.gradients is None or short.gradients is gradients.last)
                and not is_debugging()
            )
            try:
                if (done := short.run(args, settled)) is not None:
                    return done
            except (FirstRun, Repartition, ValueError):  # the last: of JAX, that data are on other devices
                pass
        return self._run_slowly(fn, args, kwargs)

    def _run_slowly(self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Binding]:
        """`run`, the long way, and for a program's first run with these shapes."""
        binding, data, reached = self._bind(fn, args, kwargs)
        program = binding.program
        donated, data = data[: program.num_donated], data[program.num_donated :]
        others = (*[list(map(get_value, group)) for group in binding.groups], data)
        now = program.now
        try:
            if now.traced is None:
                return binding.pipeline.run(others, program.calls_back, self._not_ours(donated, binding)), binding
        except FirstRun:
            pass
        now.call = fn, args, kwargs, reached, binding.cells
        results: Any = None
        try:
            results = binding.pipeline.run_first(others, self._not_ours(donated, binding))
        except Repartition:
            pass
        except PartlyConsumed:
            binding.dissolve()
        finally:
            now.traced = now.call = None
        if results is None:
            return self._run_slowly(fn, args, kwargs)
        binding.mark_reached()
        self.compilations.explain()
        return results, binding

    def lower(self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`fn`'s program for these arguments, lowered and not run."""
        binding, data, reached = self._bind(fn, args, kwargs)
        donated, data = data[: binding.program.num_donated], data[binding.program.num_donated :]
        others = (*[list(map(get_value, group)) for group in binding.groups], data)
        owned = [*map(get_value, binding.pipeline.owned), *donated]
        now = binding.program.now
        now.call = fn, args, kwargs, reached, binding.cells
        try:
            return binding.pipeline.compiled.donating.lower(owned, others)
        except (Repartition, PartlyConsumed) as reason:
            if isinstance(reason, PartlyConsumed):
                binding.dissolve()
            return self.lower(fn, args, kwargs)
        finally:
            now.traced = now.call = None
            interrupts.release()

    def _not_ours(self, donated: Sequence[Any], binding: Binding) -> list[Any]:
        """Data that may be used up; copies of what our cells hold themselves."""
        if not donated:
            return []
        packs = {cell.pack for cell in binding.cells if cell.pack is not None}
        ours = {id(cell.value) for cell in binding.stored} | {id(part) for pack in packs for part in pack.parts()}
        return [jax.numpy.copy(array) if id(array) in ours else array for array in donated]

    def _bind(
        self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Binding, tuple[Any, ...], list[Any]]:
        """The long way: take the arguments apart, walk the objects if their structure may have changed, compare."""
        call = Arguments(fn, args, kwargs)
        own = len(call.objects)
        self.add_reached(call)
        walks = [walk_of(obj) for obj in call.objects]
        key = (self.token, call.treedef, call.template)
        binding = walks[0].bindings.get(key)
        if binding is None or not binding.fits(walks) or binding.program.places != placement(binding.stored):
            binding = self._bind_slowly(call, walks)
        if binding.partition is not binding.program.version[1]:
            binding.regroup()
        if (
            not self.met
            and not any(walk.watched for walk in walks)
            and own + len(call.data) == len(args)
            and call.treedef is FLAT
            and self.count_donated is None
        ):
            self.latest.shortcut = Shortcut(call.template, args, call.objects[-1], self.watch, binding)
        return binding, call.data, call.objects[own:]

    def add_reached(self, args: Arguments) -> None:
        """Add to the arguments' objects what the function reaches by closure, and the stream that it may draw from."""
        if self.watch is None or self.watch.rebound():
            self.look(args.fn)
        args.objects += self.reached
        stream = random.current()
        if stream.is_committed():
            stream.move(_devices(args))
        args.objects.append(stream)
        if self.met:  # nothing but a trace can tell whether these are still the ones
            self.met = []
            trace_with_all(args, self.purpose, self.met)

    def _bind_slowly(self, args: Arguments, walks: list[Walk]) -> Binding:
        with self.lock:
            lifted, alias = self._unique(walks)
            join_mesh(stored_cells(lifted))
            key = self._key(args, walks, lifted, alias)
            program = self.programs.get(key)
            if program is None:
                before = len(args.objects)
                traced, lifted = trace_with_all(args, self.purpose, self.met)
                if self.met:
                    self.look(args.fn)  # by now it may be found by name
                    if {id(ref()) for ref in self.met} <= {id(obj) for obj in self.reached}:
                        self.met = []
                        args.objects[:] = [
                            *args.objects[: args.template.count(OBJECT)],
                            *self.reached,
                            random.current(),
                        ]
                        traced, lifted = trace_with_all(args, self.purpose, self.met)
                        before = -1
                walks = [walk_of(obj) for obj in args.objects]
                if len(args.objects) > before:
                    lifted, alias = self._unique(walks)
                    key = self._key(args, walks, lifted, alias)
                program = self.programs.get(key)
                if program is None:
                    donated = 0 if self.count_donated is None else self.count_donated(args)
                    program = self.program(self, traced, lifted, donated)
                    self.programs[key] = program
            binding = Binding(program, walks, lifted)
            bindings = walks[0].bindings
            if len(bindings) >= 16:
                bindings.clear()
            bindings[self.token, args.treedef, args.template] = binding
            return binding

    def _key(self, args: Arguments, walks: Sequence[Walk], lifted: list[Cell], alias: Any) -> Any:
        """What a program is compiled for, apart from shapes and dtypes."""
        packed = Layout(lifted).key if any(cell.pack is not None for cell in lifted) else ()
        return args.treedef, args.template, tuple(walk.spec for walk in walks), alias, placement(lifted), packed

    def _unique(self, walks: Sequence[Walk]) -> tuple[list[Cell], tuple[int, ...]]:
        return unique_cells(walks, self.purpose.gradients)


def unique_cells(walks: Sequence[Walk], gradients: bool) -> tuple[list[Cell], tuple[int, ...]]:
    """The cells of the objects, each once, and a signature of which of them the objects share."""
    index: dict[Cell, int] = {}
    groups = [walk.with_gradients() if gradients else walk.cells for walk in walks]
    order = [index.setdefault(cell, len(index)) for group in groups for cell in group]
    return list(index), tuple(order) if len(order) > len(index) else ()


def trace_with_all(
    args: Arguments, purpose: Purpose, met: list[Any] | None = None, data: Sequence[Any] | None = None
) -> tuple[Traced, list[Cell]]:
    """Trace the function at the cells' present values, again as long as it reaches objects not in `args.objects`."""
    while True:
        lifted, _ = unique_cells([walk_of(obj) for obj in args.objects], purpose.gradients)
        try:
            return Traced(
                args, lifted, list(map(cells.held, lifted)), args.data if data is None else data, purpose
            ), lifted
        except Met as error:
            args.objects += error.owners
            if met is not None:
                met += [weakref.ref(owner) for owner in error.owners]


def _devices(args: Arguments) -> Any:
    """The devices that a call is bound to by its arrays, or None."""
    values = (cell.value for obj in args.objects for cell in walk_of(obj).cells)
    for value in (*values, *args.data):
        if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer) and value.committed:
            return value.sharding.device_set
    return None


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
