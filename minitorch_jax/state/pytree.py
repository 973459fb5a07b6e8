"""`Stateful`, the base class of modules and optimizers, which makes them pytrees: a `Spec` and leaves."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn, Self

import jax
from jax.tree_util import GetAttrKey

from ..runtime.numpy_memory import as_numpy, owned_data
from . import access, dropped_copies
from . import cell as cells
from . import frame as frames
from .cell import Cell
from .concurrent_reads import flights, get_lent, gradient_writes, is_steady, steadily
from .dropped_copies import Birth
from .structure import Structure, changed, process, structure_of
from .tracked_containers import TrackedDict, TrackedList
from .walk import Node, Spec, Walk, Walker, walk_of


class Builder:
    """Makes an object from a Spec and leaves, and collects what the walk over the new object needs."""

    def __init__(self, spec: Spec, leaves: Sequence[Any], birth: Birth | None) -> None:
        self.cells = [
            Cell(leaf, kind, trainable=trainable, lent=True, encoding=encoding, birth=birth)
            for leaf, (kind, trainable, encoding) in zip(leaves, spec.facts, strict=True)
        ]
        self.objects: list[Any] = []
        self.birth, self.frame = dropped_copies.birth_state(), frames.local.frame
        self.walker = Walker()
        self.walker.parts, self.walker.stamps = list(self.cells), [None] * len(self.cells)

    def begin(self, obj: Any) -> None:
        """Number a new object, of which only `__new__` was called so far."""
        structure = _begin(obj, self.birth, Structure(), self.frame)
        self.walker.objects[id(obj)] = len(self.objects)
        self.walker.note(structure)
        self.objects.append(obj)

    def build(self, node: Node) -> Any:
        """Return the value that a node of the Spec describes."""
        tag = node[0]
        if tag == "static":
            return node[2]
        if tag == "object":
            return node[1]._rebuild(node[2], self)
        if tag == "list" or tag == "dict":
            made: Any = (
                TrackedList(map(self.build, node[1]))
                if tag == "list"
                else TrackedDict((k, self.build(v)) for k, v in node[1])
            )
            made._birth = self.birth
            self.walker.note(structure_of(made))
            return made
        if tag == "tuple":
            return tuple(map(self.build, node[1]))
        return self.objects[node[1]]  # "shared"


def _begin(obj: Any, birth: Any, structure: Any, frame: Any) -> Any:
    """Set the slots that every Stateful object has, and return its structure."""
    object.__setattr__(obj, "_walk", None)
    object.__setattr__(obj, "_birth", birth)
    object.__setattr__(obj, "_structure", structure)
    if frame is not None:
        frame.own[id(obj)] = obj
    return structure


class Stateful:
    """Base of Module and Optimizer. Subclasses are registered as pytrees when they are defined."""

    __slots__ = ("_walk", "_birth", "_structure", "__weakref__")  # `_birth`: the trace in which it was made
    _structure: Any
    _birth: Any
    _walk: Any
    _holds_cells = True
    _is_registered = False
    _entry_points: tuple[str, ...] = ()  # the methods of a user's subclass that compiled code calls

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._register()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if "_is_registered" not in cls.__dict__:  # the user's `__init_subclass__` did not call `super()`
            cls._register()
        self = object.__new__(cls)
        _begin(self, dropped_copies.birth_state(), None, frames.local.frame)
        return self

    @classmethod
    def _register(cls) -> None:
        """Make the class a pytree for JAX."""
        jax.tree_util.register_pytree_with_keys(cls, _flatten_with_keys, _unflatten, _flatten)
        cls._is_registered = True

    def __hash__(self) -> NoReturn:
        name = type(self).__name__
        raise TypeError(
            f"{name} objects change, so they have no hash. They cannot be keys (of a dict, or of `functools.cache` on a"
            " method), static arguments, or the function that `jax.jit` compiles. Pass the object as an argument:"
            " `jax.jit(lambda model, x: model(x))(model, x)`."
        )

    def _describe(self, walker: Walker, path: str) -> Node:
        """Return the object's payload in its node: what `_rebuild` makes a copy from."""
        raise NotImplementedError

    def _facts(self, found: list[Cell]) -> tuple[Any, ...]:
        """Return the static facts about its cells."""
        return tuple([(cell.kind, cell.trainable, cell.encoding) for cell in found])

    @classmethod
    def _statics(cls, payload: Node, path: str) -> Iterator[tuple[str, Any]]:
        """Iterate over `(path, part)` of the parts of a payload that are not cells: values, or nodes of inner objects."""
        return iter(())

    @classmethod
    def _rebuild(cls, payload: Node, builder: Builder) -> Any:
        """Return the copy that a payload describes."""
        raise NotImplementedError

    @classmethod
    def _from_leaves(cls, spec: Spec, leaves: list[Any]) -> Any:
        """Return the copy that is made from a Spec of this class and leaves."""
        return build(spec, leaves, dropped_copies.birth_here(f"A copy of {cls.__name__}"))

    def _unopened(self) -> tuple[Spec, list[Any]] | None:
        """Return the Spec and the leaves of a copy whose parts have not been made yet, or None."""
        return None

    def _followed_classes(self) -> tuple[Any, ...]:
        """The classes whose `_entry_points` compiled code comes to by way of this object."""
        return (type(self),)

    def _follows(self) -> Iterator[tuple[str, Any]]:
        """Iterate over `(name, value)` of inner objects, and of the user's values that may be code or hold plain values."""
        return iter(())

    def _leaves(self, walk: Walk) -> list[Any]:
        """Return the leaves of the pytree: the values of the walk's cells."""
        return list(map(cells.get_value, walk.cells))

    def _held_cells(self) -> list[Cell]:
        """Return every cell in the object, gradients included."""
        return walk_of(self).with_gradients()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a copy of the state between two calls. Calls in other threads do not disturb it."""

        def copied(memo: dict[int, Any]) -> Any:
            return copy._reconstruct(self, memo, *self.__reduce_ex__(4))  # type: ignore[attr-defined]

        if is_steady() or not frames.is_eager():
            return copied(memo)
        tried: list[dict[int, Any]] = []

        def anew() -> Any:
            tried.append(dict(memo))
            return copied(tried[-1])

        new = steadily(self._held_cells(), anew)
        memo.setdefault(id(memo), []).append(tried)  # keeps the originals alive while `memo` holds their ids
        memo.update({key: value for key, value in tried[-1].items() if key != id(tried[-1])})
        return new


def change_class(obj: Any, cls: type) -> None:
    """Change the class of an object, as a notebook's autoreload does."""
    object.__setattr__(obj, "__class__", cls)
    changed(obj)


def build(spec: Spec, leaves: Sequence[Any], birth: Birth | None) -> Any:
    """Return a copy of the object that `spec` describes, with `leaves` in its cells. Its walk is set, too."""
    version, builder = process.version, Builder(spec, leaves, birth)
    made = builder.build(spec.node)
    object.__setattr__(made, "_walk", Walk(version, spec, builder.cells, builder.walker))
    return made


def _flatten(obj: Any) -> tuple[list[Any], Spec]:
    unopened = obj._unopened()
    if unopened is not None and frames.local.frame is None:
        spec, leaves = unopened
        return leaves, spec
    walk = walk_of(obj)
    frame, before = frames.local.frame, gradient_writes.last
    if frame is not None:
        for cell in walk.cells:
            frame.touch(cell, obj)
    access.mark_used(walk.cells)
    if frame is not None:
        return obj._leaves(walk), walk.spec
    if not flights and not walk.is_packed:  # a faster `steadily`, for when no thread is in a call
        leaves = obj._leaves(walk)
        if not flights and gradient_writes.last is before and all(map(get_lent, walk.cells)):
            return leaves, walk.spec
    return steadily(walk.cells, partial(obj._leaves, walk)), walk.spec


def _flatten_with_keys(obj: Any) -> tuple[list[tuple[Any, Any]], Spec]:
    leaves, spec = _flatten(obj)
    return [(GetAttrKey(path), leaf) for path, leaf in zip(spec.paths, leaves, strict=True)], spec


def _unflatten(spec: Spec, leaves: Iterable[Any]) -> Any:
    copied: Any = spec.node[1]._from_leaves(spec, list(owned_data(tuple(leaves), as_numpy)))
    return copied
