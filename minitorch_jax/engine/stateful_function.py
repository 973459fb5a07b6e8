"""Code of ours that reads and writes cells, written once: a compiled program in eager code, ordinary code in a trace."""

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
from .function import Function
from .tracing import Purpose


class StatefulFunction:
    """A function of modules, optimizers, `Cells` and arrays that changes cells in place. Use it as a decorator.

    Called in eager code, it runs one program per structure, as `mt.jit` does. Called in a trace, or under
    `jax.disable_jit()`, it is part of what is traced. Either way all of its changes happen, or none.
    """

    def __init__(self, body: Callable[..., Any]) -> None:
        update_wrapper(self, body)
        self._body, self._inside = body, all_or_nothing(body)
        self._function = Function(
            body,
            Purpose(_as_it_is, gradients=True, statics=False, marks_reached=False),
            per_object=True,  # it serves many: programs are to be explained for one of them only
        )
        self._function.name = self._function.compilations.name = body.__name__.lstrip("_")

    def __call__(self, *args: Any) -> Any:
        if not is_eager():
            return self._inside(*args)
        return self._function.run(self._body, args, {}, id(args[0]))[0][0]  # it serves many objects in turn


def _as_it_is(out: Any, _: list[Any]) -> Any:
    return out


class Cells(Stateful):
    """Cells in an order, as one argument: for a function whose program depends on these alone.

    What else their module is (its mode, its other attributes, what of it is frozen) is no part of what is compiled for.
    `about` is: a hashable value that says how the function treats the cells.
    """

    __slots__ = ("cells", "about", "paths")

    def __init__(self, cells: Sequence[Cell], about: Any = None, paths: Sequence[str] = ()) -> None:
        self.cells, self.about = list(cells), about
        self.paths = paths or list(map(str, range(len(self.cells))))  # what messages call them

    def __iter__(self) -> Iterator[Cell]:
        return iter(self.cells)

    def _describe(self, walker: Walker, path: str) -> Node:
        return self.about, tuple(map(walker.cell, self.cells, self.paths))

    def _facts(self, found: list[Cell]) -> tuple[Any, ...]:
        return tuple([(cell.kind, False, cell.encoding) for cell in found])


def whole_cells(cells: Sequence[Cell]) -> tuple[list[Cell], Sizes]:
    """`cells` with a packed cell in place of the views of its pack, if they are all that it holds; and where each ends.

    It is one array for a program, and may stand for its views where order and shapes do not matter. A trace around the
    call knows the views themselves.
    """
    packs = {cell.pack for cell in cells if cell.pack is not None}
    views = {view for pack in packs for view in pack.places}
    if not is_eager() or any([pack.has_holes() for pack in packs]) or not views.issubset(cells):
        return list(cells), ()
    stored, sizes = stored_cells(cells), {pack.cell: pack.size for pack in packs}
    return stored, tuple([(i, sizes[cell]) for i, cell in enumerate(stored) if cell in sizes])


Sizes = tuple[
    tuple[int, int], ...
]  # places of packed cells among others, and how many numbers come before their padding


def remembered(walks: tuple[Walk, ...], key: Any, make: Callable[[], Any]) -> Any:
    """What `make()` returns for some objects, by their walks: the same object again as long as all of the walks are there.

    That is until an object goes, or its structure changes. A compiled call goes by the identity of the `Cells` it is given.
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


_MOST = 8  # of one object


def _forget(first: ReferenceType[Walk], key: Any, _: Any) -> None:
    walk = first()
    if walk is not None:
        walk.remembered.pop(key, None)
