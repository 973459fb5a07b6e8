"""The walk over a module or optimizer: its cells, their paths, and its static structure (a `Spec`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from .cell import Cell
from .containers import TrackedDict, TrackedList, check_source, check_walked, holds_state, watched
from .reach import PLAIN
from .structure import Snapshot, process, structure_of

Node = tuple[Any, ...]


def join(path: str, name: str) -> str:
    """A dotted path, as torch writes them."""
    return f"{path}.{name}" if path else name


class Spec:
    """A static structure: nested nodes, and the facts about each cell. Equal structures are one object."""

    __slots__ = ("node", "facts", "paths", "_hash", "__weakref__")

    def __init__(self, node: Node, facts: tuple[Any, ...], paths: tuple[str, ...]) -> None:
        self.node = node
        self.facts = facts  # (kind, trainable, encoding) of each cell
        self.paths = paths
        self._hash = hash((node, facts))

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
        """What stands for it in a key that keeps no functions alive; see `bounded_cache.py`."""
        node = weaken(self.node)
        return self if node is self.node else (node, self.facts, self.paths)

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
    """What a walk over an object found: its cells, each once, in the order of its pytree's leaves."""

    __slots__ = (
        *("spec", "cells", "params", "grads", "stored_grads", "packs", "all", "objects", "watched"),
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
        self.watched = walker.watched  # what looks whether something changed that tells nobody
        self.optimizers = walker.optimizers  # those in the tree, of which code that is traced may change settings
        self.bindings: dict[Any, Any] = {}  # of compiled functions to these cells
        self.remembered: dict[Any, Any] = {}  # what was made for them, by what; see `stateful_function.remembered`
        self.looked: object = None  # see `habits.look`
        self.before: Walk | None = None  # the one before this, to which `train()` after `eval()` goes back

    def __getattr__(self, name: str) -> Any:
        """What follows from the cells, when it is first asked for: of most copies it never is."""
        if name not in ("params", "grads", "stored_grads"):
            raise AttributeError(name)
        self.params = [cell for cell in self.cells if cell.kind == "parameter"]
        self.grads = [cell.grad for cell in self.params]
        self.stored_grads = _stored_grads(self.grads)
        return object.__getattribute__(self, name)

    def renew(self, version: object, walker: Walker) -> None:
        """Have it stand for a later walk that found the same."""
        self.version, self.parts, self.stamps = version, walker.parts, walker.stamps
        self.objects, self.watched, self.optimizers = set(walker.objects), walker.watched, walker.optimizers

    def named(self) -> Iterator[tuple[str, Cell]]:
        """The cells with their paths."""
        return zip(self.spec.paths, self.cells, strict=True)

    def with_gradients(self) -> list[Cell]:
        """The cells, and the gradients that are not among them."""
        if not self.all:
            self.all = list(dict.fromkeys([*self.cells, *(c.grad for c in self.cells if c.grad is not None)]))
        return self.all


def _packs(found: list[Cell]) -> list[Any]:
    """The packs that the cells, and their gradients, are views of."""
    return [(cell.pack, cell.grad and cell.grad.pack) for cell in found]


def _stored_grads(grads: list[Cell]) -> list[Cell]:
    """What to set to zero them: a packed cell for all views of a pack, other cells for themselves."""
    mine = set(grads)
    whole = {grad.pack for grad in grads if grad.pack is not None and mine.issuperset(grad.pack.places)}
    return list(dict.fromkeys(grad.pack.cell if grad.pack in whole else grad for grad in grads))


class Walker:
    """Visits an object once: numbers its cells, notices what is shared."""

    def __init__(self) -> None:
        self.cells: list[Cell] = []
        self.paths: list[str] = []
        self.index: dict[Cell, int] = {}
        self.objects: dict[int, int] = {}
        self.packs: set[Any] = set()
        self.parts: list[Any] = []  # what has a stamp, and the stamp that it had before anything else was read of it
        self.stamps: list[object] = []
        self.watched: list[Callable[[], None]] = []
        self.optimizers: list[ReferenceType[Any]] = []

    def cell(self, cell: Cell, path: str) -> int:
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
        """Depend on the stamp of a structure or a cell, of which nothing has been read yet."""
        self.parts.append(part)
        self.stamps.append(part.stamp)

    def visit(self, value: Any, path: str) -> Node:
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
        """Have `look()` called whenever the walk is asked for again: it raises, or records a change of a structure."""
        self.watched.append(look)


def walk_of(obj: Any) -> Walk:
    """The walk over `obj`, made anew only if the structure of something in it has changed since the last one."""
    walk: Walk | None = obj._walk
    if walk is None:
        return _rewalk(obj)
    if walk.holds():
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
    if old is not None and old.cells == walk.cells:  # of others it would keep the arrays alive
        walk.before, old.before = old, None
    object.__setattr__(obj, "_walk", walk)
    return walk
