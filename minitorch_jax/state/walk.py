"""The walk over a module or optimizer. It finds the cells, their paths, and the static structure (a `Spec`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from .cell import Cell
from .hidden_state import PLAIN
from .static_values import check_walked, holds_state
from .structure import Snapshot, process, structure_of
from .tracked_containers import TrackedDict, TrackedList, check_source, watched

Node = tuple[Any, ...]


def join(path: str, name: str) -> str:
    """A dotted path, as torch writes them."""
    return f"{path}.{name}" if path else name


class Spec:
    """A static structure: nested nodes, and the facts about each cell. Equal structures are one object."""

    __slots__ = ("node", "facts", "paths", "_hash", "_is_weak", "__weakref__")

    def __init__(self, node: Node, facts: tuple[Any, ...], paths: tuple[str, ...]) -> None:
        self.node = node
        self.facts = facts  # (kind, trainable, encoding) of each cell
        self.paths = paths
        self._hash = hash((node, facts))
        self._is_weak = False  # True once it is known to hold no object that a key may not keep alive

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, Spec)
            and self._hash == other._hash
            and self.facts == other.facts
            and self.paths == other.paths
            and self.node == other.node
        )

    def weakened(self, weaken: Any) -> Any:
        """Return its weak form for a cache key, which keeps no functions alive; see `bounded_cache.py`."""
        if not self._is_weak:
            node = weaken(self.node)
            if node is not self.node:
                return node, self.facts, self.paths
            self._is_weak = True
        return self

    def classes(self) -> set[type]:
        """The classes in the structure."""
        return set(_classes_in(self.node))

    def __repr__(self) -> str:
        return f"Spec({self.node[1].__name__}, {len(self.facts)} arrays)"


def _classes_in(node: Any) -> Iterator[type]:
    for part in node:
        if isinstance(part, type):
            yield part
        elif type(part) is tuple:
            yield from _classes_in(part)


_specs: WeakKeyDictionary[Spec, ReferenceType[Spec]] = WeakKeyDictionary()


def _canonical(spec: Spec) -> Spec:
    known = _specs.get(spec)
    same = known() if known is not None else None
    if same is None:
        _specs[spec] = ref(spec)
        return spec
    return same


class Walk(Snapshot):
    """The result of a walk over an object: its cells, each once, in the order of its pytree's leaves."""

    __slots__ = (
        *("spec", "cells", "params", "grads", "stored_grads", "clears_views", "packs", "all", "objects", "watched"),
        *("is_packed", "optimizers", "bindings", "remembered", "looked", "before", "__weakref__"),
    )

    def __init__(self, version: object, spec: Spec, found: list[Cell], walker: Walker) -> None:
        super().__init__(version, walker.parts, walker.stamps)
        self.spec = spec
        self.cells = found
        self.packs = _packs(found)
        self.is_packed = any([cell.pack is not None for cell in found])
        self.all: list[Cell] = []
        self.objects = set(walker.objects)  # the ids of the modules in the tree
        self.watched = walker.watched  # checks of objects that do not report their changes
        self.optimizers = walker.optimizers  # the optimizers in the tree: traced code may change their settings
        self.bindings: dict[Any, Any] = {}  # the bindings of compiled functions to these cells
        self.remembered: dict[Any, Any] = {}  # objects made for these cells, by key; see `stateful_function.remembered`
        self.looked: object = None  # see `torch_habits.look`
        self.before: Walk | None = None  # the previous walk, which holds again when `train()` follows `eval()`

    def __getattr__(self, name: str) -> Any:
        """Compute the lists that follow from the cells at the first use. Most copies never need them."""
        if name not in ("params", "grads", "stored_grads", "clears_views"):
            raise AttributeError(name)
        self.params = [cell for cell in self.cells if cell.kind == "parameter"]
        self.grads = [cell.grad for cell in self.params]
        self.stored_grads = _stored_grads(self.grads)
        self.clears_views = any([grad.pack is not None for grad in self.stored_grads])  # parts of a pack
        return object.__getattribute__(self, name)

    def renew(self, version: object, walker: Walker) -> None:
        """Take the stamps of a later walk that found the same cells and structure."""
        self.version, self.parts, self.stamps = version, walker.parts, walker.stamps
        self.objects, self.watched, self.optimizers = set(walker.objects), walker.watched, walker.optimizers

    def named(self) -> Iterator[tuple[str, Cell]]:
        """Iterate over `(path, cell)`."""
        return zip(self.spec.paths, self.cells, strict=True)

    def with_gradients(self) -> list[Cell]:
        """Return the cells, followed by the gradients that are not among them."""
        if not self.all:
            self.all = list(dict.fromkeys([*self.cells, *(c.grad for c in self.cells if c.grad is not None)]))
        return self.all


def _packs(found: list[Cell]) -> list[Any]:
    """Return for each cell its pack and the pack of its gradient (None if it is not a view)."""
    return [(cell.pack, cell.grad and cell.grad.pack) for cell in found]


def _stored_grads(grads: list[Cell]) -> list[Cell]:
    """Return the cells to clear for these gradients: one packed cell in place of all views of a pack, else the gradients."""
    mine = set(grads)
    whole = {grad.pack for grad in grads if grad.pack is not None and mine.issuperset(grad.pack.places)}
    return list(dict.fromkeys(grad.pack.cell if grad.pack in whole else grad for grad in grads))


class Walker:
    """Visits an object and everything in it, numbers the cells, and finds shared objects."""

    def __init__(self) -> None:
        self.cells: list[Cell] = []
        self.paths: list[str] = []
        self.index: dict[Cell, int] = {}
        self.objects: dict[int, int] = {}
        self.packs: set[Any] = set()
        self.parts: list[Any] = []  # structures and cells
        self.stamps: list[object] = []  # their stamps, each read before anything else of the part
        self.watched: list[Callable[[], None]] = []
        self.optimizers: list[ReferenceType[Any]] = []

    def cell(self, cell: Cell, path: str) -> int:
        """Return the number of a cell. The first visit adds it, with its path."""
        number = self.index.setdefault(cell, len(self.cells))
        if number == len(self.cells):
            self.note(cell)
            if cell.pack is not None and cell.pack not in self.packs:
                self.packs.add(cell.pack)
                self.note(cell.pack.structure)
            self.cells.append(cell)
            self.paths.append(path)
        return number

    def note(self, part: Any) -> None:
        """Record the stamp of a structure or a cell. The caller has read nothing else of it yet."""
        self.parts.append(part)
        self.stamps.append(part.stamp)

    def visit(self, value: Any, path: str) -> Node:
        """Return the node of a value, and visit what is in it."""
        kind = type(value)
        if holds_state(value):
            if id(value) in self.objects:
                return ("shared", self.objects[id(value)])
            self.objects[id(value)] = len(self.objects)
            self.note(structure_of(value))
            return ("object", kind, value._describe(self, path))
        if kind is TrackedList:
            self._watch(value, path)
            return ("list", tuple([self.visit(v, join(path, str(i))) for i, v in enumerate(value)]))
        if kind is TrackedDict:
            self._watch(value, path)
            return ("dict", tuple([(k, self.visit(v, join(path, k))) for k, v in value.items()]))
        if kind is tuple:
            return ("tuple", tuple([self.visit(v, join(path, str(i))) for i, v in enumerate(value)]))
        if kind not in PLAIN:
            check_walked(value, path)
        return ("static", kind, value)

    def _watch(self, container: Any, path: str) -> None:
        self.note(structure_of(container))
        check_source(container, path)
        if watched(container):
            self.watch(partial(check_source, container, path))

    def watch(self, look: Callable[[], None]) -> None:
        """Call `look()` at each later `walk_of`. It raises, or records a change of a structure."""
        self.watched.append(look)


def walk_of(obj: Any) -> Walk:
    """Return the walk over `obj`. The last walk is reused if no structure in it has changed since."""
    walk: Walk | None = obj._walk
    if walk is None:
        return _rewalk(obj)
    if walk.version is process.version or walk.holds():
        if not walk.watched:
            return walk
        for look in walk.watched:
            look()
        if walk.holds():
            return walk
    before, walk.before = walk.before, None
    if before is not None and before.holds():
        before.before = walk
        object.__setattr__(obj, "_walk", before)
        return before
    return _rewalk(obj)


def _rewalk(obj: Any) -> Walk:
    version, old = process.version, obj._walk
    walker = Walker()
    node = walker.visit(obj, "")
    facts = obj._facts(walker.cells)
    spec = _canonical(Spec(node, facts, tuple(walker.paths)))
    if old is not None and old.spec is spec and old.cells == walker.cells and old.packs == _packs(walker.cells):
        old.renew(version, walker)
        return old
    walk = Walk(version, spec, walker.cells, walker)
    if old is not None and (old.cells, old.packs) == (walk.cells, walk.packs) and old.may_hold_again():
        walk.before, old.before = old, None  # any other would keep arrays, or functions, alive for nothing
    object.__setattr__(obj, "_walk", walk)
    return walk
