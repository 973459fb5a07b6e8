"""What modules and optimizers have in common: trees of cells and static values, and pytrees for JAX.

`walk_of(object)` gives the cells of an object, their paths, and its static structure (a `Spec`), and remembers them until
some structure changes. A Spec is the pytree's static part; from it and new leaves `build` makes a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn, Self
from weakref import ReferenceType, WeakKeyDictionary, ref

import jax
from jax.tree_util import GetAttrKey

from . import cell as cells
from .cell import Birth, Cell
from .containers import TrackedDict, TrackedList, check_source, check_walked, watched
from .lending import flights, get_lent, gradients, is_steady, steadily
from .reach import PLAIN

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
        """What stands for it in a key that keeps no functions alive; see `kept.py`."""
        node = weaken(self.node)
        return self if node is self.node else (node, self.facts, self.paths)

    def __repr__(self) -> str:
        return f"Spec({self.node[1].__name__}, {len(self.facts)} arrays)"


_specs: WeakKeyDictionary[Spec, ReferenceType[Spec]] = WeakKeyDictionary()


def _canonical(spec: Spec) -> Spec:
    known = _specs.get(spec)
    same = known() if known is not None else None
    if same is None:
        _specs[spec] = ref(spec)
        return spec
    return same


class Walk:
    """What a walk over an object found: its cells, each once, in the order of its pytree's leaves."""

    __slots__ = (
        *("version", "spec", "cells", "params", "grads", "stored_grads", "packs", "all", "objects", "watched"),
        *("is_packed", "optimizers", "bindings", "looked", "__weakref__"),
    )

    def __init__(self, version: object, spec: Spec, found: list[Cell], objects: set[int]) -> None:
        self.version = version
        self.spec = spec
        self.cells = found
        self.params = [cell for cell in found if cell.kind == "parameter"]
        self.grads = [cell.grad for cell in self.params]
        self.packs = _packs(found)
        self.is_packed = any(cell.pack is not None for cell in found)
        self.stored_grads = _stored_grads(self.grads)
        self.all: list[Cell] = []
        self.objects = objects  # the ids of the modules in the tree
        self.watched: list[Callable[[], None]] = []  # what looks whether something changed that tells nobody
        self.optimizers: list[
            ReferenceType[Any]
        ] = []  # those in the tree, of which code that is traced may change settings
        self.bindings: dict[Any, Any] = {}  # of compiled functions to these cells
        self.looked: object = None  # see `habits.look`

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
        self.watched: list[Callable[[], None]] = []
        self.optimizers: list[ReferenceType[Any]] = []

    def cell(self, cell: Cell, path: str) -> int:
        number = self.index.setdefault(cell, len(self.cells))
        if number == len(self.cells):
            self.cells.append(cell)
            self.paths.append(path)
        return number

    def visit(self, value: Any, path: str) -> Node:
        kind = type(value)
        if isinstance(value, Stateful):
            if id(value) in self.objects:
                return ("shared", self.objects[id(value)])
            self.objects[id(value)] = len(self.objects)
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
        check_source(container, path)
        if watched(container):
            self.watch(partial(check_source, container, path))

    def watch(self, look: Callable[[], None]) -> None:
        """Have `look()` called whenever the walk is asked for again: it raises, or calls `cells.structure_changed()`."""
        self.watched.append(look)


class Builder:
    """Makes an object from a Spec and new cells."""

    def __init__(self, made: list[Cell]) -> None:
        self.cells = made
        self.objects: list[Any] = []
        self.birth = cells.birth_state()

    def build(self, node: Node) -> Any:
        tag = node[0]
        if tag == "static":
            return node[2]
        if tag == "object":
            return node[1]._rebuild(node[2], self)
        if tag == "list":
            items = TrackedList(map(self.build, node[1]))
            items._birth = self.birth
            return items
        if tag == "dict":
            named = TrackedDict((k, self.build(v)) for k, v in node[1])
            named._birth = self.birth
            return named
        if tag == "tuple":
            return tuple(map(self.build, node[1]))
        return self.objects[node[1]]  # "shared"


class Stateful:
    """Base of Module and Optimizer. Subclasses are registered as pytrees when they are defined."""

    __slots__ = ("_walk", "_birth", "__weakref__")  # `_birth`: the trace in which it was made
    _holds_cells = True
    _is_registered = False
    _entry_points: tuple[str, ...] = ()  # the methods by which compiled code comes to a user's subclass

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._register()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if "_is_registered" not in cls.__dict__:  # an `__init_subclass__` of the user's did not call `super()`
            cls._register()
        return object.__new__(cls)

    @classmethod
    def _register(cls) -> None:
        """Make the class a pytree for JAX."""
        jax.tree_util.register_pytree_with_keys(cls, _flatten_with_keys, _unflatten, _flatten)
        cls._is_registered = True

    def __hash__(self) -> NoReturn:
        name = type(self).__name__
        raise TypeError(
            f"{name} objects change, so they have no hash: they can be neither keys (of a dict, or of `functools.cache` on"
            " a method) nor static arguments nor what `jax.jit` is called on. Pass the object as an argument:"
            " `jax.jit(lambda model, x: model(x))(model, x)`."
        )

    def _describe(self, walker: Walker, path: str) -> Node:
        raise NotImplementedError

    @classmethod
    def _statics(cls, payload: Node, path: str) -> Iterator[tuple[str, Any]]:
        """The parts of what `_describe` gave that are not cells, by path: values, or nodes of what is below."""
        return iter(())

    @classmethod
    def _rebuild(cls, payload: Node, builder: Builder) -> Any:
        raise NotImplementedError

    def _follows(self) -> Iterator[tuple[str, Any]]:
        """Objects below this one, and what a user has put in that may be code or hold plain values, by name."""
        return iter(())

    def _leaves(self, walk: Walk) -> list[Any]:
        """The values of the walk's cells, as they are leaves of the pytree."""
        return list(map(cells.get_value, walk.cells))

    def _held_cells(self) -> list[Cell]:
        """Every cell that it holds."""
        return walk_of(self).with_gradients()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of its state between two calls, whatever other threads do."""

        def copied(memo: dict[int, Any]) -> Any:
            return copy._reconstruct(self, memo, *self.__reduce_ex__(4))  # type: ignore[attr-defined]

        if is_steady() or not cells.is_eager():
            return copied(memo)
        tried: list[dict[int, Any]] = []

        def anew() -> Any:
            tried.append(dict(memo))
            return copied(tried[-1])

        new = steadily(self._held_cells(), anew)
        memo.setdefault(id(memo), []).append(tried)  # what it was copied from lives as long as its ids are known
        memo.update({key: value for key, value in tried[-1].items() if key != id(tried[-1])})
        return new


def change_class(obj: Any, cls: type) -> None:
    """Give an object another class, as a notebook's autoreload does."""
    object.__setattr__(obj, "__class__", cls)
    cells.structure_changed()


def walk_of(obj: Any) -> Walk:
    """The walk over `obj`, made anew only if some static structure has changed since the last one."""
    walk = obj._walk
    if walk is not None and walk.version is cells.structure.version:
        for look in walk.watched:
            look()
    if walk is None or walk.version is not cells.structure.version:
        return _rewalk(obj)
    return walk


def _rewalk(obj: Any) -> Walk:
    version = cells.structure.version
    walker = Walker()
    node = walker.visit(obj, "")
    facts = tuple([(cell.kind, cell.trainable, cell.encoding) for cell in walker.cells])
    spec = _canonical(Spec(node, facts, tuple(walker.paths)))
    old = obj._walk
    same = old is not None and old.spec is spec and old.packs == _packs(walker.cells)
    if same and all(a is b for a, b in zip(old.cells, walker.cells, strict=True)):
        old.version, old.objects = version, set(walker.objects)
        old.watched, old.optimizers = walker.watched, walker.optimizers
        return old
    walk = Walk(version, spec, walker.cells, set(walker.objects))
    walk.watched, walk.optimizers = walker.watched, walker.optimizers
    object.__setattr__(obj, "_walk", walk)
    return walk


def build(spec: Spec, leaves: Sequence[Any], birth: Birth | None) -> Any:
    """A copy of the object that `spec` describes, with `leaves` in its cells."""
    made = [
        Cell(leaf, kind, trainable=trainable, lent=True, encoding=encoding, birth=birth)
        for leaf, (kind, trainable, encoding) in zip(leaves, spec.facts, strict=True)
    ]
    return Builder(made).build(spec.node)


def _flatten(obj: Any) -> tuple[list[Any], Spec]:
    walk = walk_of(obj)
    frame, before = cells.local.frame, gradients.last
    if frame is not None:
        for cell in walk.cells:
            frame.touch(cell, obj)
    cells.mark_used(walk.cells)
    if frame is not None:
        return obj._leaves(walk), walk.spec
    if not flights and not walk.is_packed:  # `steadily`, where no thread is in a call, quicker
        leaves = obj._leaves(walk)
        if not flights and gradients.last is before and all(map(get_lent, walk.cells)):
            return leaves, walk.spec
    return steadily(walk.cells, partial(obj._leaves, walk)), walk.spec


def _flatten_with_keys(obj: Any) -> tuple[list[tuple[Any, Any]], Spec]:
    leaves, spec = _flatten(obj)
    return [(GetAttrKey(path), leaf) for path, leaf in zip(spec.paths, leaves, strict=True)], spec


def _unflatten(spec: Spec, leaves: Iterable[Any]) -> Any:
    return build(spec, list(leaves), cells.birth_here(f"A copy of {spec.node[1].__name__}"))


class IdMap:
    """A map from objects, by identity, that does not keep them alive (and does not need their hash)."""

    def __init__(self) -> None:
        self.items: dict[int, tuple[Any, Any]] = {}

    def get(self, key: Any) -> Any:
        item = self.items.get(id(key))
        return item[1] if item is not None and item[0]() is key else None

    def set(self, key: Any, value: Any) -> None:
        number, items = id(key), self.items
        items[number] = (ref(key, lambda _: items.pop(number, None)), value)
