"""Functions of the user's, and their programs: one for each distinct structure of what they are given.

A call is bound to cells once per object; after that it compares, gathers, and commits.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax

from . import closures, interrupts, random
from .arguments import DATA, FLAT, OBJECT, Arguments
from .cell import Cell, get_stored, gradients, is_concrete, lendings, structure
from .containers import holds_state
from .pack import Layout, PartlyConsumed, stored_cells
from .pipeline import is_debugging, join_mesh, placement
from .program import Binding, FirstRun, Program, Repartition
from .recompiles import Compilations
from .stateful import IdMap, Walk, walk_of
from .tracing import Purpose, trace_with_all, unique_cells


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
        "watched",
        "binding",
        "settled",
        "gradients",
    )

    def __init__(
        self,
        template: tuple[Any, ...],
        args: tuple[Any, ...],
        stream: Any,
        watch: closures.Watch,
        watched: list[Walk],
        binding: Binding,
    ) -> None:
        self.version = structure.version
        self.count, self.types = len(args), tuple(map(type, args))
        self.objects = [(i, weakref.ref(args[i])) for i, code in enumerate(template) if code is OBJECT]
        places = [i for i, code in enumerate(template) if code is DATA]
        first = len(args) - len(places)  # where data begin, if they come last, which is quicker
        self.data: Any = slice(first, None) if places == list(range(first, len(args))) else places
        self.stream: Any = stream if binding.takes(stream.cell) else None
        self.sharding = getattr(stream.cell.stored, "sharding", None)  # of the stream, which goes from device to device
        self.watch, self.watched = watch, list(map(weakref.ref, watched))
        self.binding = weakref.ref(binding)
        self.settled: object = None
        self.gradients: object = None

    def applies(self, args: tuple[Any, ...]) -> bool:
        """Whether all but the data is as in the last call. (Whether they are data, JAX sees: else they are new to it.)"""
        if len(args) != self.count or self.watch.rebound():
            return False
        stream, current = self.stream, cast(Any, random.local.stream)
        if stream is not None and (stream is not current or current.cell.stored.sharding != self.sharding):
            return False
        for place, reference in self.objects:
            if reference() is not args[place]:
                return False
        for known in self.watched:
            walk = known()
            if walk is None:
                return False
            for look in walk.watched:
                look()
        return not self.watched or self.version is structure.version

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
        others = list(map(get_stored, binding.read)), data
        results = binding.pipeline.run(others, binding.program.calls_back)
        self.settled = None if binding.program.calls_back else binding.pipeline.last_seen
        self.gradients = gradients.last if binding.pipeline.dropped else None
        return results, binding


class _Latest(threading.local):
    shortcut: Shortcut | None = None


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
        places = closures.search(getattr(fn, "stands_for", fn))  # a wrapper of ours: what it reaches is the user's
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
        others = list(map(get_stored, binding.read)), data
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
            if program.changes_statics:
                self._forget(program)
        if results is None:
            return self._run_slowly(fn, args, kwargs)
        binding.mark_reached()
        self.compilations.explain()
        return results, binding

    def lower(self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`fn`'s program for these arguments, lowered and not run."""
        binding, data, reached = self._bind(fn, args, kwargs)
        donated, data = data[: binding.program.num_donated], data[binding.program.num_donated :]
        others = list(map(get_stored, binding.read)), data
        owned = [*map(get_stored, binding.pipeline.owned), *donated]
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
            if binding.program.changes_statics:
                self._forget(binding.program)
            interrupts.release()

    def _forget(self, program: Program) -> None:
        """Have no later call run a program in which Python would not do what it did when that was traced."""
        with self.lock:
            self.programs = {key: known for key, known in self.programs.items() if known is not program}
            self.token = object()
            self.latest.shortcut = None

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
        key = self._binding_key(call)
        binding = walks[0].bindings.get(key)
        if binding is None or not binding.fits(walks) or binding.program.places != placement(binding.stored):
            binding = self._bind_slowly(call, walks)
        if binding.partition is not binding.program.version[1]:
            binding.regroup()
        if not self.met and own + len(call.data) == len(args) and call.treedef is FLAT and self.count_donated is None:
            watched = [walk for walk in walks if walk.watched]
            self.latest.shortcut = Shortcut(call.template, args, call.objects[-1], self.watch, watched, binding)
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
                    program = self.program(self.name, self.purpose, self.compilations, traced, lifted, donated)
                    self.programs[key] = program
            binding = Binding(program, walks, lifted)
            bindings = walks[0].bindings
            if len(bindings) >= 16:
                bindings.clear()
            bindings[self._binding_key(args)] = binding
            return binding

    def _binding_key(self, args: Arguments) -> Any:
        """Of calls that are bound alike if their objects are the same; threads that share a model have each its own."""
        return self.token, args.treedef, args.template, id(random.current())

    def _key(self, args: Arguments, walks: Sequence[Walk], lifted: list[Cell], alias: Any) -> Any:
        """What a program is compiled for, apart from shapes and dtypes."""
        packed = Layout(lifted).key if any(cell.pack is not None for cell in lifted) else ()
        return args.treedef, args.template, tuple(walk.spec for walk in walks), alias, placement(lifted), packed

    def _unique(self, walks: Sequence[Walk]) -> tuple[list[Cell], tuple[int, ...]]:
        return unique_cells(walks, self.purpose.gradients)


def _devices(args: Arguments) -> Any:
    """The devices that a call is bound to by its arrays, or None."""
    values = (cell.value for obj in args.objects for cell in walk_of(obj).cells)
    for value in (*values, *args.data):
        if is_concrete(value) and value.committed:
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
