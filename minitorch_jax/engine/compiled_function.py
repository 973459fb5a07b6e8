"""A function of the user's and its programs: it compiles one for each distinct structure of what it is called with.

The first call with some objects traces the function, finds or compiles a program, and binds the program to the cells of those
objects (`program.py`). Later calls with the same objects go by `quick_call.py`: they compare, gather arrays, call, store.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from ..module import random
from ..module.hooks import without_functions
from ..runtime import interrupts
from ..runtime.bounded_cache import Kept, Weaken
from ..runtime.numpy_memory import owned_data
from ..state.cell import Cell, get_stored, is_concrete
from ..state.packed import PackedLayout, PartlyConsumed
from ..state.structure import Snapshot, process
from ..state.walk import Walk, walk_of
from .arguments import OBJECT, Arguments, abstract_data
from .call_and_store import FirstRun
from .compiler_options import naming_options
from .disabled_jit import arrays_of, is_plain, run_all_or_nothing
from .donation import safe_to_donate
from .first_sizes import finds_sizes
from .kept_with_owner import kept_for
from .last_calls import Latest
from .names import modules as named_modules
from .names.followed import Followed, random_state
from .names.reads import Reads
from .names.roots import root_of, settings_of
from .names.values import follow
from .names.watch import Watch
from .program import Binding, Program, Repartition
from .quick_call import quick_call
from .recompiles import Compilations
from .sharding import is_on_mesh, join_mesh, naming_devices, placement
from .tracing import Met, Purpose, Traced, settle, trace_with_all, unique_cells

_SIGNALS = (Repartition, PartlyConsumed, Met)  # a trace raises one to have the call made again


class _Reached(NamedTuple):
    """What a call reaches besides its arguments."""

    found: named_modules.Found
    stream: random.Stream
    met: list[Any]  # weak references to what only a trace could find


class Function:
    """A function of the user's, and its programs. All function objects that are made from the same code share it."""

    def __init__(
        self,
        fn: Callable[..., Any],
        purpose: Purpose,
        count_donated: Callable[[Arguments], int] | None = None,
        wrap: Callable[[Any, str], Callable[..., Any]] | None = None,
        per_object: bool = False,
    ) -> None:
        self.bound: weakref.WeakSet[Binding] = weakref.WeakSet()  # first, since `__del__` needs it
        self.name = getattr(fn, "__name__", type(fn).__name__)
        self.purpose = purpose
        self.wrap = wrap  # makes what is compiled of the user's function and its name: to keep it would make a cycle
        self.count_donated = count_donated  # how many of a call's data may be used up: the first ones
        self.programs = Kept()  # by key, lists: the programs of one key differ in the arrays that they read by name
        self.latest = Latest()
        self.compilations = Compilations(self.name, per_object, self.latest)
        self.is_shared = False  # by several that count their programs
        self.token = object()  # stands for this function where holding it would make a cycle
        self.lock = threading.RLock()
        self.met: list[Any] = []  # weak references to what only a trace could find
        self.own_changes: set[str] = set()  # the paths of values that the function itself changes while it is traced

    def __del__(self) -> None:
        for binding in list(self.bound):  # they may live as long as their modules, and would keep what was read
            binding.reads = binding.quick = None

    def find(self, fn: Callable[..., Any], again: bool = False) -> named_modules.Found:
        """Find by name what `fn` reaches by closure; with `again`, even if nothing seems to have changed."""
        fn = root_of(fn)
        kept = kept_for(getattr(fn, "__self__", fn))
        key = _FOUND, getattr(fn, "__func__", None)
        if kept is not None and key in kept and not again:
            found, watch = kept[key]
            if not watch.rebound():
                return found
        found = named_modules.stateful_objects(fn)
        if kept is not None:
            kept[key] = found, Watch(found.places)  # one object, so that a thread sees both parts old or both new
        return found

    def follow(self, args: Arguments) -> Followed:
        """Find what a call reads by name, besides modules and optimizers."""
        return follow(root_of(args.fn), args.statics(), args.objects, self.own_changes)

    def _follow_again(self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], reached: list[Any]) -> Followed:
        """What a call that is about to be traced reads by name."""
        call = Arguments(fn, args, kwargs)
        call.objects += reached
        return self.follow(call)

    def run(
        self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], number: int = 0
    ) -> tuple[list[Any], Binding | None]:
        """Call `fn`'s program for these arguments and store new values of cells; return the other results and the binding.

        Calls of one `number` are looked for among each other first: by default, those of one function object.
        Under `jax.disable_jit()` there is no program, and the binding is None.
        """
        found = self.repeat(fn, args, kwargs, number or id(fn))
        return self.run_slowly(self._wrapped(fn), args, kwargs) if found is None else found

    def repeat(
        self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], number: int
    ) -> tuple[list[Any], Binding] | None:
        """`run` for a call that differs from an earlier one only in its data; None for any other."""
        latest = self.latest
        if latest.number != number:
            latest.turn(number)
        for reference in latest.bindings:
            binding = reference()
            if binding is not None and binding.quick is not None:
                results = binding.quick(fn, args, kwargs)
                if results is not None:
                    return results, binding
        return None

    def _wrapped(self, fn: Any) -> Any:
        return fn if self.wrap is None else self.wrap(fn, self.name)

    @finds_sizes
    def run_slowly(self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Binding | None]:
        """`run`, the long way, and for a program's first run with these shapes."""
        if is_plain():
            call = Arguments(fn, args, kwargs)
            self.add_reached(call)
            run = partial(call.run, arrays_of(call.data))
            return [run_all_or_nothing(call.objects, run, self.purpose.statics)], None
        binding, data, reached = self._bind(fn, args, kwargs)
        binding.look()
        program, data = binding.program, tuple(owned_data(data))
        donated, data = data[: program.num_donated], data[program.num_donated :]
        others = list(map(get_stored, binding.read)), data
        now = program.now
        try:
            if now.traced is None:
                run = partial(binding.pipeline.run, others, safe_to_donate(donated, others))
                with naming_devices(self.name, partial(binding.named_arrays, data)):
                    return self._settled(run, program, fn, args, kwargs) if any(program.settings) else run(), binding
        except FirstRun:
            pass
        now.call = fn, args, kwargs, reached, binding.cells, self._follow_again(fn, args, kwargs, reached)
        now.inner = binding.inner
        results: Any = None
        try:
            run = partial(binding.pipeline.run_first, others, safe_to_donate(donated, others))
            named = naming_devices(self.name, partial(binding.named_arrays, data))
            with named, naming_options(self.purpose.options, self.name, partial(self._forget, program)):
                results = self._settled(run, program, fn, args, kwargs)
        except _SIGNALS as signal:
            self._heed(signal, binding)
        finally:
            now.traced = now.call = now.inner = None
            if program.changes_statics:
                self._forget(program)
        if results is None:
            return self.run_slowly(fn, args, kwargs)
        binding.mark_reached()
        self.compilations.explain()
        return results, binding

    def _settled(
        self, run: Callable[[], list[Any]], program: Program, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Any]:
        """Run a program, and do to optimizers what it does not do itself, together with what it stores."""
        with interrupts.deferred if any(program.settings) else nullcontext():
            results = run()
            if any(program.settings):
                call = Arguments(fn, args, kwargs)
                self.add_reached(call)
                settle(program.settings, call.objects)
        return results

    def objects_of(self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The objects of a call, as its trace numbered them."""
        call = Arguments(fn, args, kwargs)
        self.add_reached(call)
        return call.objects

    def lower(self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`fn`'s program for these arguments, lowered and not run. Arrays may be `jax.ShapeDtypeStruct`s."""
        return self._lower(fn, *abstract_data((args, kwargs)))

    @finds_sizes
    def _lower(self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        binding, data, reached = self._bind(fn, args, kwargs)
        donated, data = data[: binding.program.num_donated], data[binding.program.num_donated :]
        others = list(map(get_stored, binding.read)), data
        owned = [*map(get_stored, binding.pipeline.owned), *donated]
        now = binding.program.now
        now.call = fn, args, kwargs, reached, binding.cells, self._follow_again(fn, args, kwargs, reached)
        now.inner = binding.inner
        try:
            with interrupts.tracing():
                return binding.pipeline.compiled.donating.lower(owned, others)
        except _SIGNALS as signal:
            self._heed(signal, binding)
            return self._lower(fn, args, kwargs)
        finally:
            now.traced = now.call = now.inner = None
            if binding.program.changes_statics:
                self._forget(binding.program)
            interrupts.release()

    def _heed(self, signal: Exception, binding: Binding) -> None:
        """Prepare the next attempt of a call whose trace has raised one of `_SIGNALS`."""
        if isinstance(signal, PartlyConsumed):
            binding.dissolve(signal.stored)
        elif isinstance(signal, Met):  # these shapes reach other objects: from now on each call traces first
            self.met = [weakref.ref(owner) for owner in signal.owners]

    def _forget(self, program: Program) -> None:
        """Drop a program whose trace had effects in Python that a later run would not repeat."""
        with self.lock:
            self.programs.drop(lambda entry: program in entry.value)
            self.token = object()
            self.latest.clear()

    def _bind(
        self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Binding, tuple[Any, ...], list[Any]]:
        """The long way: take the arguments apart, walk the objects if their structure may have changed, compare.

        Gives the binding, the data with what is read by name at their end, and the objects that are no arguments.
        """
        call = Arguments(fn, args, kwargs)
        own, version = len(call.objects), process.version
        reached = self.add_reached(call)
        walks = [walk_of(obj) for obj in call.objects]
        if any(map(is_on_mesh, call.data)) and join_mesh(self._unique(walks)[0], call.data):
            version = process.version
            walks = [walk_of(obj) for obj in call.objects]
        key = self._binding_key(call)
        binding: Any = walks[0].bindings.get(key)
        named = None
        if binding is not None and binding.fits(walks) and binding.program.places == placement(binding.stored):
            if binding.reads is not None and binding.reads.are_same(fn):
                named = self._read(binding, fn)
        while named is None:  # more than once only if another thread rebinds an array at this moment
            binding = self._bind_slowly(call, reached, walks)
            walks = [walk_of(obj) for obj in call.objects]
            named = self._read(binding, fn) if binding.reads.are_same(fn) else None
        if not reached.met and not self.met:
            snapshot = _snapshot(version, walks, binding.program)
            binding.quick = quick_call(call, args, kwargs, reached.stream, binding, snapshot)
            self.latest.note(binding)
        return binding, (*call.data, *named), call.objects[own:]

    def _read(self, binding: Binding, fn: Any) -> tuple[Any, ...] | None:
        """The arrays that a bound program reads by name; None if it has to be bound anew."""
        partition = binding.program.version[1]
        if binding.partition is not partition:
            binding.regroup()
        named: tuple[Any, ...] | None = binding.reads.fetch(fn) if binding.reads.partition is partition else None
        return named

    def add_reached(self, args: Arguments) -> _Reached:
        """Add to the arguments' objects what the function reaches by closure, and the stream that it may draw from."""
        found = named_modules.add_found(self.find(args.fn), args.objects)
        stream = random.current()
        if stream.is_committed():
            stream.move(_devices(args))
        args.objects.append(stream)
        met: list[Any] = []
        if self.met:  # nothing but a trace can tell whether these are still the ones
            trace_with_all(args, self.purpose, met)
            self.met = met
        return _Reached(found, stream, met)

    def _bind_slowly(self, args: Arguments, reached: _Reached, walks: list[Walk]) -> Binding:
        with self.lock:
            lifted, alias = self._unique(walks)
            join_mesh(lifted)
            followed = self.follow(args)
            forms = dict.fromkeys([_specs(walks, exact) for exact in (False, True)])  # one, if there are no hooks
            keys = [self._key(args, specs, lifted, alias, followed) for specs in forms]
            program = next(filter(None, [self._program_for(key, followed) for key in keys]), None)
            inner: dict[Any, Any] = {}
            if program is None:
                known = list(map(id, args.objects))
                traced, lifted, followed = self._traced(args, reached, followed)
                if known != list(map(id, args.objects)):
                    walks = [walk_of(obj) for obj in args.objects]
                    lifted, alias = self._unique(walks)
                key = self._key(args, _specs(walks, traced.returns_hooks), lifted, alias, followed)
                program, inner = self._program_for(key, followed), traced.inner
                if program is None:
                    donated = 0 if self.count_donated is None else self.count_donated(args)
                    program = Program(self.name, self.purpose, self.compilations, traced, lifted, donated, followed)
                    program.classes = frozenset(chain.from_iterable(walk.spec.classes() for walk in walks))
                    self._drop_of_old_classes(program)
                    self.programs.set(key, [*(self.programs.get(key) or ()), program])
            binding = Binding(program, walks, lifted)
            binding.inner = inner
            binding.reads = Reads(args.fn, followed, reached.found, binding.partition)
            self.bound.add(binding)
            bindings, kept = walks[0].bindings, list[Any]()
            kept.append(self._binding_key(args, lambda _: bindings.pop(kept[0], None)))
            _keep(binding, bindings, kept[0])
            return binding

    def _drop_of_old_classes(self, new: Program) -> None:
        """Let programs go whose objects have gone, and of which a class has been defined again, as in a notebook."""
        now = {(cls.__module__, cls.__qualname__): cls for cls in new.classes}
        used = {binding.program for binding in list(self.bound)}

        def is_old(program: Program) -> bool:
            again = any(now.get((cls.__module__, cls.__qualname__), cls) is not cls for cls in program.classes)
            return again and program not in used

        self.programs.drop(lambda entry: all(map(is_old, entry.value)))

    def _traced(self, args: Arguments, reached: _Reached, followed: Followed) -> tuple[Traced, list[Cell], Followed]:
        """Trace a call, add to its objects what the trace has met; note what values the function itself has changed."""
        for _ in range(_MAX_TRACES):
            draws = random_state(followed.generators)
            met = reached.met
            traced, lifted = trace_with_all(args, self.purpose, met)
            self.compilations.note_draws(args.objects[0], draws, random_state(followed.generators))
            if met:
                objects = args.objects[: args.template.count(OBJECT)]
                by_now = self.find(args.fn, again=True)  # it may be found by name
                found = named_modules.add_found(by_now, objects)
                if {id(ref()) for ref in met} <= {id(obj) for obj in found.objects}:
                    met.clear()
                    args.objects[:] = [*objects, reached.stream]
                    traced, lifted = trace_with_all(args, self.purpose, met)
                self.met = met
            after = self.follow(args)
            self.own_changes |= followed.changed_by(after)
            before, followed = followed, self.follow(args) if self.own_changes else after
            if all(before.entries.get(path, entry) == entry for path, entry in followed.entries.items()):
                break  # else another thread has changed something meanwhile, and the trace may have seen either
        return traced, lifted, followed

    def _program_for(self, key: Any, followed: Followed) -> Program | None:
        for program in self.programs.get(key) or ():
            if followed.fits(program.version[1].named, program.others):
                return program
        return None

    def _binding_key(self, args: Arguments, gone: Callable[[Any], Any] | None = None) -> Any:
        """Of calls of which the last binding is kept. Threads have other streams, so each has a binding of its own.

        Functions of the same code that close over other numbers or functions have other programs, and may take turns.
        `gone` is called when a static argument of the call has gone, which the key does not keep.
        """
        template: Any = args.template
        if any([type(code) is tuple for code in template]):
            template = Weaken(gone)(template)
        return self.token, args.treedef, template, threading.get_ident(), settings_of(root_of(args.fn))

    def _key(self, args: Arguments, specs: Any, lifted: list[Cell], alias: Any, followed: Followed) -> Any:
        """What a program is compiled for, apart from shapes and dtypes of data."""
        packed = PackedLayout(lifted).key if any(cell.pack is not None for cell in lifted) else ()
        return args.treedef, args.template, specs, alias, _shapes(lifted), placement(lifted), packed, followed.key

    def _unique(self, walks: Sequence[Walk]) -> tuple[list[Cell], tuple[int, ...]]:
        return unique_cells(walks, self.purpose.gradients)


def _specs(walks: Sequence[Walk], exact: bool) -> tuple[Any, ...]:
    """The structures of a key. Unless it is `exact`, hooks of one code share a program: `follow` tells what differs.

    A program that returns a module with hooks returns the functions of its trace, so it has an exact key.
    """
    return tuple([walk.spec if exact else without_functions(walk.spec) for walk in walks])


def _shapes(lifted: list[Cell]) -> tuple[Any, ...]:
    """Shapes and dtypes of cells, also of those that are no inputs: code may look at `weight.shape` alone."""
    values = [cell.value for cell in lifted if cell.kind != "gradient"]
    return tuple([(value.shape, value.dtype) if hasattr(value, "dtype") else type(value) for value in values])


def _snapshot(version: object, walks: Sequence[Walk], program: Program) -> Snapshot:
    """Of everything that a call depends on, as the walks over its objects found it."""
    parts, stamps = [program.structure], [program.structure.stamp]
    for walk in walks:
        parts += walk.parts
        stamps += walk.stamps
    return Snapshot(version, parts, stamps)


def _keep(binding: Binding, bindings: dict[Any, Binding], key: Any) -> None:
    """Keep a binding among those of its first object, and let those go that can serve no more."""
    for other, known in list(bindings.items()):
        if any(walk() is None for walk in known.walks):
            bindings.pop(other, None)
    while len(bindings) >= _MAX_BINDINGS:
        bindings.pop(next(iter(bindings), None), None)
    bindings[key] = binding


_FOUND = "found"
_MAX_BINDINGS = 64
_MAX_TRACES = 3


def _devices(args: Arguments) -> Any:
    """The devices that a call is bound to by its arrays, or None."""
    values = (cell.value for obj in args.objects for cell in walk_of(obj).cells)
    for value in (*values, *args.data):
        if is_concrete(value) and value.committed:
            return value.sharding.device_set
    return None
