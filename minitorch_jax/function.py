"""Functions of the user's, and their programs: one for each distinct structure of what they are given.

A call is bound to cells once per object; after that it compares, gathers, and commits.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from . import closures, interrupts, random
from .arguments import DATA, FLAT, OBJECT, Arguments
from .cell import Cell, get_stored, gradients, is_concrete, lendings, structure
from .containers import holds_state
from .memory import owned_data
from .pack import Layout, PartlyConsumed, stored_cells
from .pipeline import is_debugging, join_mesh, placement
from .program import Binding, FirstRun, Program, Repartition
from .recompiles import Compilations
from .stateful import IdMap, Walk, walk_of
from .tracing import Met, Purpose, trace_with_all, unique_cells


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
        stream = self.stream
        if stream is not None:
            current: Any = random.local.stream if random.innermost_block.get() is None else random.current()
            if stream is not current or stream.cell.stored.sharding != self.sharding:
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
        data = owned_data(args[self.data] if type(self.data) is slice else tuple([args[i] for i in self.data]))
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


_SIGNALS = (Repartition, PartlyConsumed, Met)  # a trace raises one to have the call made again


class _Latest(threading.local):
    shortcut: Shortcut | None = None


class _Found(NamedTuple):
    """What a function reaches by closure, found by name. One object, so that a thread sees both parts old or both new."""

    watch: closures.Watch
    objects: list[Any]


class _Reached(NamedTuple):
    """What a call reaches besides its arguments."""

    watch: closures.Watch
    stream: random.Stream
    met: list[Any]  # weak references to what only a trace could find


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
        self.found: _Found | None = None  # made at the first call: names may be bound after the function is defined

    def look(self, fn: Callable[..., Any]) -> _Found:
        """Find by name what `fn` reaches by closure."""
        places = closures.search(getattr(fn, "stands_for", fn))  # a wrapper of ours: what it reaches is the user's
        objects = list({id(was): was for _, _, was in places if holds_state(was)}.values())
        self.found = found = _Found(closures.Watch(places), objects)
        return found

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
        program, data = binding.program, tuple(owned_data(data))
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
        except _SIGNALS as signal:
            self._heed(signal, binding)
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
        except _SIGNALS as signal:
            self._heed(signal, binding)
            return self.lower(fn, args, kwargs)
        finally:
            now.traced = now.call = None
            if binding.program.changes_statics:
                self._forget(binding.program)
            interrupts.release()

    def _heed(self, signal: Exception, binding: Binding) -> None:
        """What a call is to be made again after, when its trace was ended by a signal."""
        if isinstance(signal, PartlyConsumed):
            binding.dissolve()
        elif isinstance(signal, Met):  # with these shapes only: now a trace is to look for them first
            self.met = [weakref.ref(owner) for owner in signal.owners]

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
        reached = self.add_reached(call)
        walks = [walk_of(obj) for obj in call.objects]
        key = self._binding_key(call)
        binding = walks[0].bindings.get(key)
        if binding is None or not binding.fits(walks) or binding.program.places != placement(binding.stored):
            binding = self._bind_slowly(call, reached, walks)
        if binding.partition is not binding.program.version[1]:
            binding.regroup()
        simple = own + len(call.data) == len(args) and call.treedef is FLAT and self.count_donated is None
        if simple and not reached.met and not self.met:
            watched = [walk for walk in walks if walk.watched]
            self.latest.shortcut = Shortcut(call.template, args, reached.stream, reached.watch, watched, binding)
        return binding, call.data, call.objects[own:]

    def add_reached(self, args: Arguments) -> _Reached:
        """Add to the arguments' objects what the function reaches by closure, and the stream that it may draw from."""
        found = self.found
        if found is None or found.watch.rebound():
            found = self.look(args.fn)
        args.objects += found.objects
        stream = random.current()
        if stream.is_committed():
            stream.move(_devices(args))
        args.objects.append(stream)
        met: list[Any] = []
        if self.met:  # nothing but a trace can tell whether these are still the ones
            trace_with_all(args, self.purpose, met)
            self.met = met
        return _Reached(found.watch, stream, met)

    def _bind_slowly(self, args: Arguments, reached: _Reached, walks: list[Walk]) -> Binding:
        with self.lock:
            lifted, alias = self._unique(walks)
            join_mesh(stored_cells(lifted))
            key = self._key(args, walks, lifted, alias)
            program = self.programs.get(key)
            if program is None:
                before, met = len(args.objects), reached.met
                traced, lifted = trace_with_all(args, self.purpose, met)
                if met:
                    found = self.look(args.fn)  # by now it may be found by name
                    if {id(ref()) for ref in met} <= {id(obj) for obj in found.objects}:
                        met.clear()
                        args.objects[:] = [
                            *args.objects[: args.template.count(OBJECT)],
                            *found.objects,
                            reached.stream,
                        ]
                        traced, lifted = trace_with_all(args, self.purpose, met)
                        before = -1
                    self.met = met
                walks = [walk_of(obj) for obj in args.objects]
                if len(args.objects) > before:
                    lifted, alias = self._unique(walks)
                    key = self._key(args, walks, lifted, alias)
                program = self.programs.get(key)
                if program is None:
                    donated = 0 if self.count_donated is None else self.count_donated(args)
                    program = self.program(self.name, self.purpose, self.compilations, traced, lifted, donated)
            binding = Binding(program, walks, lifted)
            self.programs[key] = program
            _keep(binding, walks[0].bindings, self._binding_key(args))
            return binding

    def _binding_key(self, args: Arguments) -> Any:
        """Of calls of which the last binding is kept. Threads have other streams, so each has a binding of its own."""
        return self.token, args.treedef, args.template, threading.get_ident()

    def _key(self, args: Arguments, walks: Sequence[Walk], lifted: list[Cell], alias: Any) -> Any:
        """What a program is compiled for, apart from shapes and dtypes."""
        packed = Layout(lifted).key if any(cell.pack is not None for cell in lifted) else ()
        return args.treedef, args.template, tuple(walk.spec for walk in walks), alias, placement(lifted), packed

    def _unique(self, walks: Sequence[Walk]) -> tuple[list[Cell], tuple[int, ...]]:
        return unique_cells(walks, self.purpose.gradients)


def _keep(binding: Binding, bindings: dict[Any, Binding], key: Any) -> None:
    """Keep a binding among those of its first object, and let those go that can serve no more."""
    for other, known in list(bindings.items()):
        if any(walk() is None for walk in known.walks):
            bindings.pop(other, None)
    if len(bindings) >= _MAX_BINDINGS:
        bindings.clear()
    bindings[key] = binding


_MAX_BINDINGS = 64


def _devices(args: Arguments) -> Any:
    """The devices that a call is bound to by its arrays, or None."""
    values = (cell.value for obj in args.objects for cell in walk_of(obj).cells)
    for value in (*values, *args.data):
        if is_concrete(value) and value.committed:
            return value.sharding.device_set
    return None


class Functions:
    """The Functions for one use of functions (`backward`, say), each kept for as long as the user's function lives."""

    def __init__(self, make: Callable[[Any], Function]) -> None:
        self._make = make
        self._others = IdMap()  # what is kept for objects without a `__dict__`

    def get(self, fn: Any) -> Function:
        if type(fn) is types.FunctionType:
            kept = fn.__dict__.get(_KEPT)
            known: Function | None = kept.items.get(self) if kept is not None and kept.owner() is fn else None
            if known is not None:
                return known
        return self._find(fn)

    def _find(self, fn: Any) -> Function:
        owner, key = (fn.__self__, (self, fn.__func__)) if isinstance(fn, types.MethodType) else (fn, self)
        kept = kept_for(owner)
        if kept is None:
            try:
                kept = self._others.get(owner)
                if kept is None:
                    kept = {}
                    self._others.set(owner, kept)
            except TypeError:  # cannot be referred to weakly: traced anew at each call
                return self._make(fn)
        if key not in kept:
            kept.setdefault(key, self._make(fn))
        found: Function = kept[key]
        return found


_KEPT = "_minitorch_jax_compiled"


class _Kept:
    """What was compiled for one object, in its `__dict__`: it goes when that goes, and is not copied with it.

    (It may refer to the object, by what a function reaches. A map of the library's would then keep both for ever.)
    """

    def __init__(self, owner: Any = None) -> None:
        self.items: dict[Any, Any] = {}
        self.owner = _nobody if owner is None else weakref.ref(owner)  # a shallow copy has another's

    def __reduce__(self) -> Any:
        return _Kept, ()


def _nobody() -> None:
    return None


def kept_for(owner: Any) -> dict[Any, Any] | None:
    """What was compiled for an object, by keys of the caller's; None if the object cannot keep anything."""
    attributes = getattr(owner, "__dict__", None)
    if not isinstance(attributes, dict):  # none, or that of a class
        return None
    kept = attributes.get(_KEPT)
    if kept is None or kept.owner() is not owner:
        try:
            kept = attributes[_KEPT] = _Kept(owner)
        except TypeError:  # cannot be referred to weakly
            return None
    items: dict[Any, Any] = kept.items
    return items
