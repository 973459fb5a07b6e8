"""The quick way of a call that differs from the last one only in data, and what a bound program reads by name."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from . import random
from .arguments import DATA, OBJECT
from .cell import get_stored, is_concrete, structure
from .followed import Followed
from .lending import gradients
from .memory import owned_data
from .program import Binding, Partition
from .stateful import Walk
from .watch import BINARY, GONE, Place, Watch


class Reads:
    """What a bound program reads by name: what is watched, and the places of the arrays that are its inputs."""

    __slots__ = ("followed", "watch", "inputs", "again", "partition")

    def __init__(self, followed: Followed, places: list[Place], partition: Partition) -> None:
        self.followed = followed
        self.watch = Watch(
            [*places, *followed.places, *(followed.arrays[path] for path in followed.others(partition.named))]
        )
        self.regroup(partition)

    def regroup(self, partition: Partition) -> None:
        """Take what another partition of the program reads."""
        groups = [[self.followed.place_of(path) for path in group] for group in partition.named]
        self.partition = partition
        self.inputs = [_looking(group[0]) for group in groups]
        self.again = [(i, _looking(place)) for i, group in enumerate(groups) for place in group[1:]]

    def fetch(self) -> tuple[Any, ...] | None:
        """The inputs as they are now; None if any is no array of JAX's, or one that had two names has become two."""
        try:
            arrays = tuple([look() for look in self.inputs])
            for i, look in self.again:
                if look() is not arrays[i]:
                    return None
        except GONE:
            return None
        return arrays if all(map(is_concrete, arrays)) else None


def _looking(place: Place) -> Callable[[], Any]:
    return partial(place.look, place.of, place.key) if place.look in BINARY else partial(place.look, place.of)


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
        "reads",
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
        reads: Reads,
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
        self.reads, self.watched = reads, list(map(weakref.ref, watched))
        self.binding = weakref.ref(binding)
        self.settled: object = None
        self.gradients: object = None

    def applies(self, args: tuple[Any, ...]) -> bool:
        """Whether all but the data is as in the last call. (Whether they are data, JAX sees: else they are new to it.)"""
        if len(args) != self.count or self.reads.watch.rebound():
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
        return not self.watched or self.version is structure.version

    def run(self, args: tuple[Any, ...], settled: bool) -> tuple[list[Any], Binding] | None:
        """The call's results; None if it is another kind of call. `settled`: no gradient changed."""
        binding = self.binding()
        if binding is None:
            return None
        data = owned_data(args[self.data] if type(self.data) is slice else tuple([args[i] for i in self.data]))
        if self.reads.inputs:
            named = self.reads.fetch()
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
                    gradients.last = object()
                    self.gradients = self.gradients and gradients.last
                return results, binding
        if self.types != tuple(map(type, args)):
            return None
        binding.look()
        others = list(map(get_stored, binding.read)), data
        results = binding.pipeline.run(others)
        self.settled = None if binding.pipeline.compiled.calls_back else binding.pipeline.last_seen
        self.gradients = gradients.last if binding.pipeline.dropped else None
        return results, binding
