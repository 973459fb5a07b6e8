"""Stateful functions of this package. In eager code they run a compiled program, in a trace they become part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial, update_wrapper
from operator import call
from typing import Any
from weakref import ReferenceType, ref

from ..state.cell import Cell
from ..state.frame import is_eager
from ..state.packed import stored_cells
from ..state.pytree import Stateful
from ..state.undo import all_or_nothing
from ..state.walk import Node, Walk, Walker
from .arguments import Arguments
from .compiled_function import Function
from .names.reads import Reads
from .program import Partition
from .tracing import Purpose


class StatefulFunction:
    """A function of modules, optimizers, `Cells` and arrays that changes cells in place. Use it as a decorator.

    Called in eager code, it runs one program per structure, as `mt.jit` does. Called in a trace, it becomes part of the
    trace. Under `jax.disable_jit()` it runs as plain Python. In each case it makes all of its changes, or none.
    """

    def __init__(self, body: Callable[..., Any], name: str | None = None) -> None:
        update_wrapper(self, body)
        self._body, self._inside = body, all_or_nothing(body)
        self._function = Function(
            body,
            Purpose(_as_it_is, gradients=True, statics=False, marks_reached=False),
            per_object=True,  # many objects use it, so recompiles are explained for each object by itself
        )
        self._function.name = self._function.compilations.name = name or body.__name__.lstrip("_")

    def quick(self) -> Any:
        """Return what repeats this thread's last call in eager code, or None; see `quick_call.quick_call`."""
        bindings = self._function.latest.bindings
        binding = bindings[0]() if bindings else None
        return None if binding is None else binding.quick

    def reads(self, *args: Any) -> Reads | None:
        """Return what a call reads by name, if that is nothing but code and plain values. `Reads` notices a change."""
        followed, found = self._function.follow(Arguments(self._body, args, {})), self._function.find(self._body)
        more = followed.arrays, followed.long, followed.large, followed.generators, followed.cut, found.objects
        return None if any(more) else Reads(self._body, followed, found, Partition(set(), set(), set()))

    def __call__(self, *args: Any) -> Any:
        if not is_eager():
            return self._inside(*args)
        return self._function.run(self._body, args, {}, id(args[0]))[0][0]  # many objects use it in turn


def _as_it_is(out: Any, _: list[Any]) -> Any:
    return out


class Cells(Stateful):
    """A list of cells as one argument, for a function whose program depends on nothing else of their modules.

    A change of a module's mode, its other attributes or its frozen parameters compiles nothing. `about` is a hashable value
    that says how the function treats the cells; a new value compiles another program.
    """

    __slots__ = ("cells", "about", "paths")

    def __init__(self, cells: Sequence[Cell], about: Any = None, paths: Sequence[str] = ()) -> None:
        self.cells, self.about = list(cells), about
        self.paths = paths or list(map(str, range(len(self.cells))))  # their names in messages

    def __iter__(self) -> Iterator[Cell]:
        return iter(self.cells)

    def _describe(self, walker: Walker, path: str) -> Node:
        return self.about, tuple(map(walker.cell, self.cells, self.paths))

    def _facts(self, found: list[Cell]) -> tuple[Any, ...]:
        return tuple([(cell.kind, False, cell.encoding) for cell in found])


def whole_cells(cells: Sequence[Cell]) -> tuple[list[Cell], Sizes]:
    """Return `cells` with each packed cell in place of its views, if `cells` holds all views of all packs, and `Sizes`.

    A packed cell is one array for a program. It may replace its views where their order and shapes do not matter. Within a
    trace the cells are returned unchanged, because an outer trace has lifted the views.
    """
    packs = {cell.pack for cell in cells if cell.pack is not None}
    views = {view for pack in packs for view in pack.places}
    if not is_eager() or any([pack.has_holes() for pack in packs]) or not views.issubset(cells):
        return list(cells), ()
    stored, sizes = stored_cells(cells), {pack.cell: pack.size for pack in packs}
    return stored, tuple([(i, sizes[cell]) for i, cell in enumerate(stored) if cell in sizes])


# For each packed cell in a list of cells: its index, and how many numbers come before the padding of its array.
Sizes = tuple[tuple[int, int], ...]


def remembered(walks: tuple[Walk, ...], key: Any, make: Callable[[], Any]) -> Any:
    """Return `make()`, cached under `key` for some objects, which are given by their walks.

    The same object is returned until one of the walks is freed, with its object or after a change of structure. A compiled
    call compares its `Cells` by identity, so it needs the same object.
    """
    known = walks[0].remembered
    found = known.get(key)
    if found is not None and tuple(map(call, found[0])) == walks:
        return found[1]
    made = make()
    if len(known) >= _MOST:
        known.clear()
    forget = partial(_forget, ref(walks[0]), key)
    known[key] = [ref(walk, forget) for walk in walks], made
    return made


_MOST = 8  # entries per walk


def _forget(first: ReferenceType[Walk], key: Any, _: Any) -> None:
    walk = first()
    if walk is not None:
        walk.remembered.pop(key, None)
