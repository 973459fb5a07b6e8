"""The quick way of a call that differs from the last one only in data, and what a bound program reads by name."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import chain, repeat, starmap
from operator import is_
from typing import Any

import jax

from ..module import random
from ..runtime.jax_private import is_debugging
from ..runtime.memory import owned_data
from ..state.cell import get_stored, is_concrete, store
from ..state.containers import holds_state
from ..state.gradient import CONSUMED
from ..state.lending import flights, get_ident, get_lent, gradient_writes, lendings
from ..state.structure import Snapshot, process
from .arguments import FLAT, OBJECT, Arguments
from .call_and_store import FirstRun
from .followed import Followed
from .program import Binding, Partition, Repartition
from .watch import BINARY, GONE, Place, Watch

from_iterable = chain.from_iterable


class Part:
    """Places of what is read by name: those that are watched, and those of the arrays that are a program's inputs."""

    __slots__ = ("watch", "looks", "__weakref__")

    def __init__(self, places: list[Place], arrays: dict[str, Place], inputs: set[str]) -> None:
        self.watch = Watch([*places, *(place for path, place in arrays.items() if path not in inputs)])
        self.looks = {path: _looking(place) for path, place in arrays.items() if path in inputs}


class Reads:
    """What a bound program reads by name.

    It lies with the binding, and so with a module. What static arguments lead to may not live as long as that: with a
    `keeper`, the place where those arguments keep things, that part lies there.
    """

    __slots__ = ("watch", "inputs", "again", "partition", "_looks", "_outer")

    def __init__(self, followed: Followed, places: list[Place], partition: Partition, keeper: Any = None) -> None:
        inputs = {path for group in partition.named for path in group}
        for path in inputs:
            followed.place_of(path)  # an item of a long container becomes one of the arrays
        all_places, arrays = [*places, *followed.places], list(followed.arrays.items())
        self._outer = None
        if keeper is not None:
            cut, arrays_cut = len(places) + followed.num_by_name, followed.num_arrays_by_name
            outer = Part(all_places[:cut], dict(arrays[:arrays_cut]), inputs)
            keeper.append(outer)
            self._outer = weakref.ref(outer)
            all_places, arrays = all_places[cut:], arrays[arrays_cut:]
        own = Part(all_places, dict(arrays), inputs)
        self.watch, self._looks, self.partition = own.watch, own.looks, partition
        self.inputs: list[Any] = []
        self.again: list[Any] = []
        if keeper is None:
            self.inputs, self.again = _in_order(partition, own.looks)

    def rebound(self) -> bool:
        """True if anything else is there by now."""
        if self._outer is not None:
            outer = self._outer()
            if outer is None or outer.watch.rebound():
                return True
        return self.watch.rebound()

    def fetch(self) -> tuple[Any, ...] | None:
        """The inputs as they are now; None if any is no array of JAX's, or one that had two names has become two."""
        inputs, again = self.inputs, self.again
        if self._outer is not None:
            outer = self._outer()
            if outer is None:
                return None
            inputs, again = _in_order(self.partition, {**outer.looks, **self._looks})
        try:
            arrays = tuple([look() for look in inputs])
            for i, look in again:
                if look() is not arrays[i]:
                    return None
        except GONE:
            return None
        return arrays if all(map(is_concrete, arrays)) else None


def _in_order(partition: Partition, looks: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """The inputs of a program, and what must be the same array as one of them."""
    again = [(i, looks[path]) for i, group in enumerate(partition.named) for path in group[1:]]
    return [looks[group[0]] for group in partition.named], again


def _looking(place: Place) -> Callable[[], Any]:
    return partial(place.look, place.of, place.key) if place.look in BINARY else partial(place.look, place.of)


Quick = Callable[[tuple[Any, ...], dict[str, Any]], list[Any] | None]


def quick_call(
    call: Arguments, args: tuple[Any, ...], kwargs: dict[str, Any], stream: Any, binding: Binding, snapshot: Snapshot
) -> Quick | None:
    """A function that repeats a call with other data and returns its results; None where a call cannot be repeated so.

    It returns None for a call that is not the same but for its data, which must go the long way. Shapes and dtypes are left
    to JAX, which asks for a trace when they change. `snapshot` is of all structures that the call depends on.

    It is for the thread that makes it. What it needs is in its closure, where Python finds it fastest. The binding, which
    keeps it, is referred to weakly.
    """
    program, pipeline, reads = binding.program, binding.pipeline, binding.reads
    take = _taking(call, args, kwargs)
    if take is None or program.num_donated or pipeline.compiled.calls_back or any(program.settings):
        return None
    holds, rebound = snapshot.holds, reads.watch.rebound if len(reads.watch) else None
    fetch = reads.fetch if reads.inputs else None
    watched = [weakref.ref(walk) for walk in binding.live_walks() if walk.watched]  # their looks lead to the objects
    sharding = getattr(stream.cell.stored, "sharding", None)  # the stream goes from device to device
    stream = stream if binding.takes(stream.cell) else None
    donating, dropped, replaced = pipeline.compiled.donating, pipeline.dropped, pipeline.replaced
    stored, owned, read = pipeline.stored, pipeline.owned, binding.read
    gradients = [cell.grad for cell in binding.cells if cell.grad is not None]
    lendable = list(dict.fromkeys([*binding.cells, *gradients, *stored, *owned]))
    writes_gradients, bound, types = program.writes_gradients, weakref.ref(binding), list(map(type, args))
    ident, calls = get_ident(), flights
    lent_at = written_at = None  # what `lendings.last` and `gradient_writes.last` were when the cells were looked at

    def quick(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        nonlocal lent_at, written_at
        if snapshot.version is not process.version and not holds():
            return None
        data = take(args, kwargs)
        if data is None or (rebound is not None and rebound()) or is_debugging():
            return None
        if stream is not None:
            now: Any = random.local.stream if random.innermost_block.get() is None else random.current()
            if stream is not now or stream.cell.stored.sharding != sharding:
                return None
        if watched:
            for reference in watched:
                walk = reference()
                for look in walk.watched if walk is not None else ():
                    look()
            if not holds():
                return None
        data = owned_data(data)
        if fetch is not None:
            named = fetch()
            if named is None:
                return None
            data += named
        calls[ident] = pipeline  # before the look at what is lent; see `lending.py`
        try:
            last, written = lendings.last, gradient_writes.last
            if (last is lent_at or not any(map(get_lent, lendable))) and (
                not dropped or written is written_at or all(map(is_, map(get_stored, dropped), repeat(CONSUMED)))
            ):
                given = list(map(get_stored, owned)), (list(map(get_stored, read)), data)
                results = from_iterable(starmap(donating, (given,)))
                before = list(map(get_stored, replaced)) if replaced else None  # noqa: F841  # see `Pipeline.replaced`
                deque(map(store, stored, results), 0)
                lent_at, written_at = last, written
                if writes_gradients:
                    written_at = gradient_writes.last = object()
                return list(results)
        except (FirstRun, Repartition, ValueError, TypeError):
            return None  # (the last two are JAX's, before anything is done: data on other devices, or that are no data)
        finally:
            if ident in calls:
                del calls[ident]
        mine = bound()
        if mine is None or types != list(map(type, args)):
            return None
        mine.look()
        try:
            out = pipeline.run((list(map(get_stored, read)), data))
        except (FirstRun, Repartition, ValueError):
            return None
        lent_at, written_at = pipeline.last_seen, gradient_writes.last
        return out

    return quick


def _taking(call: Arguments, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function that takes the data out of arguments that are otherwise those of this call; of others it returns None.

    None where that cannot be told quickly: with static arguments, or modules inside of containers.
    """
    objects = [(i, weakref.ref(arg)) for i, arg in enumerate(args) if holds_state(arg)]
    if any([type(code) is tuple for code in call.template]) or call.template.count(OBJECT) != len(objects):
        return None
    count, flat = len(args), call.treedef is FLAT
    if flat and not objects:
        return lambda args, kwargs: None if kwargs or len(args) != count else args
    places = [i for i in range(count) if not holds_state(args[i])]
    first = count - len(places)  # where data begin, if they come last, which is quicker
    last = places == list(range(first, count))
    known: Any = jax.tree.structure(([args[i] for i in places], kwargs))

    def take(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        if len(args) != count:
            return None
        for place, reference in objects:
            if reference() is not args[place]:
                return None
        if flat:
            return None if kwargs else args[first:] if last else tuple([args[i] for i in places])
        leaves, treedef = jax.tree.flatten(([args[i] for i in places], kwargs))
        return tuple(leaves) if treedef == known else None

    return take
