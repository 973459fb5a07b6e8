"""Programs, which are functions compiled for one structure, and bindings of programs to the cells of objects."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import jax

from ..module import kept_values, torch_habits
from ..runtime.xla_faults import avoided_in, options_without
from ..state import access
from ..state.cell import Cell
from ..state.concurrent_reads import lendings
from ..state.gradient import starting_value
from ..state.packed import KEPT, PackedLayout, stored_cells
from ..state.static_values import describe
from ..state.structure import Structure
from ..state.walk import Walk
from .arguments import Arguments
from .call_and_store import Compiled, FirstRun, Pipeline
from .names.followed import Followed, random_state
from .recompiles import Compilations
from .sharding import constrained, placement
from .tracing import Purpose, Traced, unaliased


class Repartition(Exception):  # noqa: N818
    """The function uses or changes other cells for new shapes than it did before."""


class Partition:
    """What a program does with the stored cells, by index: which it writes, drops, donates (`owned`) and only reads.

    `named` holds the paths of the arrays that it reads by name. The paths of one array are in one tuple.
    """

    def __init__(
        self, used: set[int], written: set[int], dropped: set[int], named: tuple[tuple[str, ...], ...] = ()
    ) -> None:
        self.named = named
        self.used, self.written = sorted(used), sorted(written)
        self.dropped = sorted(dropped - written)
        self.owned = [i for i in self.used if i in written]
        self.read = [i for i in self.used if i not in written]

    def covers(self, other: Partition) -> bool:
        """True if a program with this partition can do what one with the other partition does."""
        return (
            set(other.used) <= set(self.used)
            and set(other.written) <= set(self.written)
            and set(self.written) <= {*other.written, *self.used}  # an unchanged cell is passed through, so it is used
            and other.dropped == self.dropped
            and set(other.named) <= set(self.named)
        )

    def extended(self, other: Partition) -> Partition:
        """Return a partition that covers both. A gradient is dropped only if both drop the same gradients."""
        kept = set() if other.dropped == self.dropped else {*other.dropped, *self.dropped}
        mine, theirs = {*self.written, *kept}, {*other.written, *kept}
        used = {*self.used, *other.used, *(mine ^ theirs), *kept}
        named = tuple(dict.fromkeys([*self.named, *other.named]))
        return Partition(used, mine | theirs, {*self.dropped} - kept, named)


class _Now(threading.local):
    """What a thread that runs a program for the first time passes to its trace."""

    call: Any = None
    traced: Traced | None = None  # the trace that has found out what the function reaches; it is used once
    inner: Any = None  # traces of losses that may be used again; see `tracing.trace_once`


class Program:
    """One function compiled for one structure, as one XLA program."""

    def __init__(
        self,
        name: str,
        purpose: Purpose,
        compilations: Compilations,
        traced: Traced,
        lifted: Sequence[Cell],
        num_donated: int,
        followed: Followed,
    ) -> None:
        self.name, self.purpose, self.compilations = name, purpose, compilations
        self.num_donated = num_donated  # how many data, from the first on, are donated
        self.layout = PackedLayout(lifted)
        stored, self.layout.stored = self.layout.stored, []  # the cells would keep the first model alive
        self.places = placement(stored)
        self.wraps, self.changes_statics = traced.wraps, traced.changes_statics
        self.returns_hooks = traced.returns_hooks  # those of its key
        self.settings = traced.settings
        self.writes_gradients = any(lifted[i].kind == "gradient" for i in traced.written)
        self.gradients = {i for i, cell in enumerate(lifted) if cell.kind == "gradient"}
        self.reaches: set[int] = set()  # the indices of gradients that a loss has written, with each view by itself
        self.structure = Structure()  # changes with its partition and options
        self.classes: frozenset[type] = frozenset()  # the classes of the objects
        self.mark = object()  # stands for the program in a key
        self.now = _Now()
        self.now.traced = traced
        self.avoided = avoided_in(traced.jaxpr)
        self._set(self._partition(traced, followed))
        self.others = followed.others(self.version[1].named)  # arrays that are constants: new ones need a new program

    def _partition(self, traced: Traced, followed: Followed) -> Partition:
        """Return what `traced` does with the stored cells, and which arrays it reads by name."""
        of, packs = self.layout.of, self.layout.packs
        used, written, dropped = ({of[i] for i in parts} for parts in (traced.used, traced.written, traced.dropped))
        if packs:
            values = dict(zip(traced.written, traced.shapes[1], strict=True))
            for j in packs:
                views, whole = packs[j].views, packs[j].whole
                covered = whole and set(views) <= {*traced.written, *traced.dropped}
                if j in dropped and covered and all(values.get(i) is None for i in views):
                    written.discard(j)  # all gradients of the pack are dropped
                elif j in dropped:  # some gradients of the pack are kept, so all are kept
                    self.purpose = self.purpose.keeping_grads()
                    self.now.traced = None
                    dropped.discard(j)
                    written.add(j)
                if j in written and not covered:
                    used.add(j)
        named = followed.named(traced.constants, traced.inner_constants()) if followed.arrays or followed.long else ()
        return Partition(used, written, dropped, named)

    def _set(self, partition: Partition) -> None:
        # one tuple, so that another thread reads either both old values or both new ones
        body = partial(self._traced_body, partition)
        options = {**(options_without(self.avoided) or {}), **dict(self.purpose.options)}
        self.version = Compiled(body, self.name, asks=True, options=options or None), partition

    def _traced_body(self, partition: Partition, owned: list[Any], read: list[Any], data: Any) -> list[Any]:
        now = self.now
        if now.call is None:  # JAX must trace, which only `run_first` may ask for
            raise FirstRun
        if partition is not self.version[1]:  # another thread has extended the partition
            raise Repartition
        if self.num_donated:
            cut = len(owned) - self.num_donated
            owned, data = owned[:cut], (*owned[cut:], *data)
        traced, now.traced = now.traced, None
        fn, call_args, kwargs, reached, lifted, followed = now.call
        named = [followed.place_of(group[0]).was for group in partition.named]
        if traced is not None:
            traced.take(named)
        if traced is None:
            arguments = Arguments(fn, call_args, kwargs)
            arguments.objects += reached
            values = self.values_of(list(map(starting_value, lifted)), partition, owned, read)
            before = random_state(followed.generators)
            with kept_values.refused(within=True):
                traced = Traced(arguments, lifted, values, data[: len(data) - len(named)], self.purpose, now.inner)
            self.compilations.note_draws(arguments.objects[0], before, random_state(followed.generators))
            needed = self._partition(traced, followed)
            if not partition.covers(needed):
                if needed.dropped != partition.dropped:
                    self.purpose = self.purpose.keeping_grads()
                self._set(partition.extended(needed))
                for group in needed.named:
                    for path in group:
                        self.others.pop(path, None)
                self.structure.change()  # bindings regroup their cells
                raise Repartition
            if not (avoided := avoided_in(traced.jaxpr)) <= self.avoided:
                self.avoided |= avoided
                self._set(partition.extended(partition))
                self.structure.change()
                raise Repartition
            self.wraps = self.wraps or traced.wraps
            once = traced.changes_statics or traced.settings != self.settings
            self.changes_statics = self.changes_statics or once or traced.returns_hooks > self.returns_hooks
            self.settings = traced.settings
            traced.take(named)
        out = self._run(traced, partition, owned, read, data)
        self.compilations.note(now.call, self.others.keys())
        return out

    def _run(self, traced: Traced, part: Partition, owned: list[Any], read: list[Any], data: Any) -> list[Any]:
        """Return the new values of the written stored cells, followed by the result of the function."""
        old = self.stored_values(part, owned, read)
        out, written = traced.as_one_call(self.layout.cut(old, [None] * len(self.layout.of)), data, self.name)
        if self.purpose.marks_reached:
            computed = [i for i, shape in zip(traced.written, traced.shapes[1], strict=True) if shape is not None]
            self.reaches |= self.gradients.intersection([*computed, *traced.dropped])
        stored = self.new_values(part, traced, written, old)
        flat, tree = jax.tree.flatten(out)
        unique = unaliased([*stored, *flat], jax.tree.leaves((owned, read, data)))
        return [*unique[: len(stored)], jax.tree.unflatten(tree, unique[len(stored) :])]

    def values_of(self, values: list[Any], part: Partition, owned: list[Any], read: list[Any]) -> list[Any]:
        """Return the values of the lifted cells: those from the program's arguments, and `values` for the other cells."""
        return self.layout.cut(self.stored_values(part, owned, read), values)

    def stored_values(self, part: Partition, owned: list[Any], read: list[Any]) -> dict[int, Any]:
        """Return the values of the stored cells among the program's arguments, by index."""
        return dict(zip([*part.owned, *part.read], [*owned, *read], strict=True))

    def new_values(self, part: Partition, traced: Traced, written: Sequence[Any], old: dict[int, Any]) -> list[Any]:
        """Return the new values of the written stored cells, from the values that the trace returned."""
        changed = dict(zip(traced.written, written, strict=True))
        new = [self.layout.joined(j, lambda i: changed.get(i, KEPT), old.get(j)) for j in part.written]
        return [constrained(v, self.places[j]) for v, j in zip(new, part.written, strict=True)] if self.places else new


class Binding:
    """A program, and the cells of some objects in the program's order."""

    __slots__ = (
        *("program", "walks", "cells", "stored", "read", "partition", "pipeline", "quick", "looked", "reads", "inner"),
        "__weakref__",
    )

    def __init__(self, program: Program, walks: Sequence[Walk], lifted: list[Cell]) -> None:
        self.program = program
        self.walks = [weakref.ref(walk) for walk in walks]
        for walk in walks:
            for path, cell in zip(walk.spec.paths, walk.cells, strict=True):
                if cell.unseen:
                    access.check_encoded(cell, cell.value, f"{walk.spec.node[1].__name__}.{path}")
        self.cells = lifted
        self.stored = stored_cells(lifted)
        self.looked: object = None  # see `torch_habits.look`
        self.inner: dict[Any, Any] = {}  # traces of losses, which go with the objects: see `tracing.trace_once`
        self.reads: Any = None  # the values that the function reads by name (a `reads.Reads`)
        self.regroup()

    def regroup(self) -> None:
        """Sort the cells by the program's present partition, and make the pipeline."""
        compiled, self.partition = self.program.version
        part = self.partition
        stored, owned, dropped, self.read = (
            [self.stored[j] for j in indices] for indices in (part.written, part.owned, part.dropped, part.read)
        )
        self.pipeline = Pipeline(compiled, stored, owned, dropped)
        self.quick: Any = None  # the fast path of the last call; see `quick_call.quick_call`
        self.mark_reached()

    def look(self) -> None:
        """Raise TypeError if torch's attributes were set on arrays lent since the last check; see `torch_habits.look`."""
        if self.looked is not lendings.last:
            torch_habits.look(self, chain.from_iterable(walk.named() for walk in self.live_walks()))

    def live_walks(self) -> list[Walk]:
        """Return the walks that are still alive."""
        return [walk for reference in self.walks if (walk := reference()) is not None]

    def named_arrays(self, data: Sequence[Any]) -> Iterator[tuple[str, Any]]:
        """The arrays of a call, with their names in messages."""
        used = {*self.pipeline.owned, *self.read}
        names = {
            cell: f"{walk.spec.node[1].__name__}.{path}" for walk in self.live_walks() for path, cell in walk.named()
        }
        for cell in self.cells:
            if not used.isdisjoint(stored_cells([cell])):
                yield names.get(cell, f"a {cell.kind}"), cell.value
        for array in data:
            yield f"an argument, {describe(array)},", array

    def mark_reached(self) -> None:
        """Mark the gradients that the program computes as reached by a loss."""
        for i in self.program.reaches:
            self.cells[i].reached = True

    def dissolve(self, stored: int) -> None:
        """Dissolve the pack whose packed cell is the stored cell of this index."""
        for pack in {cell.pack for cell in self.cells if cell.pack is not None}:
            if pack.cell is self.stored[stored]:
                pack.dissolve()

    def takes(self, cell: Cell) -> bool:
        """True if the program uses or changes a cell."""
        return cell in self.pipeline.stored or cell in self.read

    def fits(self, walks: list[Walk]) -> bool:
        """True if the binding is for exactly these walks."""
        return [reference() for reference in self.walks] == walks
