"""The quick way of a call that differs from the last one only in data, and what a bound program reads by name."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from ..module import random
from ..runtime.memory import owned_data
from ..state.cell import get_stored, is_concrete
from ..state.lending import gradient_writes
from ..state.walk import Walk
from .arguments import DATA, OBJECT
from .followed import Followed
from .program import Binding, Partition
from .watch import BINARY, GONE, Place, Watch


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


class Shortcut:
    """The last call's binding, for calls that differ from it only in data: objects and arrays as they are, no more.

    `settled` is `lendings.last` after the last call: while it is the same, no structure has changed, and all that the
    pipeline owns is ours alone. `gradients` is the same of `gradient_writes.last`, None if no gradients are dropped.
    """

    __slots__ = (
        "count",
        "types",
        "objects",
        "data",
        "stream",
        "sharding",
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
        watched: list[Walk],
        binding: Binding,
    ) -> None:
        self.count, self.types = len(args), tuple(map(type, args))
        self.objects = [(i, weakref.ref(args[i])) for i, code in enumerate(template) if code is OBJECT]
        places = [i for i, code in enumerate(template) if code is DATA]
        first = len(args) - len(places)  # where data begin, if they come last, which is quicker
        self.data: Any = slice(first, None) if places == list(range(first, len(args))) else places
        self.stream: Any = stream if binding.takes(stream.cell) else None
        self.sharding = getattr(stream.cell.stored, "sharding", None)  # of the stream, which goes from device to device
        self.watched = list(map(weakref.ref, watched))
        self.binding = weakref.ref(binding)
        self.settled: object = None
        self.gradients: object = None

    def applies(self, args: tuple[Any, ...]) -> bool:
        """Whether all but the data is as in the last call. (Whether they are data, JAX sees: else they are new to it.)"""
        binding = self.binding()
        if binding is None or len(args) != self.count or not binding.snapshot.holds():
            return False
        if binding.reads is None or binding.reads.watch.rebound():
            return False
        stream = self.stream
        if stream is not None:
            current: Any = random.local.stream if random.innermost_block.get() is None else random.current()
            if stream is not current or current.cell.stored.sharding != self.sharding:
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
        return not self.watched or binding.snapshot.holds()

    def run(self, args: tuple[Any, ...], settled: bool) -> tuple[list[Any], Binding] | None:
        """The call's results; None if it is another kind of call. `settled`: no gradient changed."""
        binding = self.binding()
        if binding is None:
            return None
        data = owned_data(args[self.data] if type(self.data) is slice else tuple([args[i] for i in self.data]))
        reads = binding.reads
        if reads is not None and reads.inputs:
            named = reads.fetch()
            if named is None:
                return None
            data += named
        if settled:
            try:
                results = binding.run_again(data, self.settled)
            except TypeError:  # JAX takes something for no data, before anything is done
                return None
            if results is not None:
                if binding.program.writes_gradients:
                    gradient_writes.last = object()
                    self.gradients = self.gradients and gradient_writes.last
                return results, binding
        if self.types != tuple(map(type, args)):
            return None
        binding.look()
        others = list(map(get_stored, binding.read)), data
        results = binding.pipeline.run(others)
        self.settled = None if binding.pipeline.compiled.calls_back else binding.pipeline.last_seen
        self.gradients = gradient_writes.last if binding.pipeline.dropped else None
        return results, binding
