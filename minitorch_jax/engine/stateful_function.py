"""Code of ours that reads and writes cells, written once: a compiled program in eager code, ordinary code in a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial, update_wrapper
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from ..state import births
from ..state.cell import Cell
from ..state.frame import is_eager
from ..state.packed import stored_cells
from ..state.pytree import Builder, Stateful
from ..state.undo import all_or_nothing
from ..state.walk import Node, Walk, Walker
from .function import Function
from .program import Partition
from .tracing import Purpose, Traced
from .whole_program import _WholeProgram


class StatefulFunction:
    """A function of modules, optimizers, `Cells` and arrays that changes cells in place. Use it as a decorator.

    Called in eager code, it runs one program per structure, as `mt.jit` does. Called in a trace, or under
    `jax.disable_jit()`, it is part of what is traced. Either way all of its changes happen, or none.
    """

    def __init__(self, body: Callable[..., Any]) -> None:
        update_wrapper(self, body)
        self._body, self._inside = body, all_or_nothing(body)
        self._function = Function(body, _InternalProgram, Purpose(_as_it_is, gradients=True, statics=False))
        self._function.name = self._function.compilations.name = body.__name__.lstrip("_")
        self._function.compilations.per_object = (
            True  # it serves many: programs are to be explained for one of them only
        )

    def __call__(self, *args: Any) -> Any:
        if not is_eager():
            return self._inside(*args)
        return self._function.run(self._body, args, {})[0][0]


def _as_it_is(out: Any, _: list[Any]) -> Any:
    return out


class _InternalProgram(_WholeProgram):
    """It says nothing about which parameters a loss reaches: the gradients that it changes came from elsewhere."""

    def body(self, traced: Traced, part: Partition, owned: list[Any], read: list[Any], data: Any) -> list[Any]:
        out = super().body(traced, part, owned, read, data)
        self.reaches = set()
        return out


class Cells(Stateful):
    """Cells in an order, as one argument: for a function whose program depends on these alone.

    What else their module is (its mode, its other attributes) is no part of what is compiled for. `about` is: a hashable
    value that says how the function treats the cells.
    """

    __slots__ = ("cells", "about")

    def __init__(self, cells: Sequence[Cell], about: Any = None) -> None:
        self._walk: Any = None
        self._birth = births.birth_state()
        self.cells, self.about = list(cells), about

    def __iter__(self) -> Iterator[Cell]:
        return iter(self.cells)

    def _describe(self, walker: Walker, path: str) -> Node:
        return self.about, tuple([walker.cell(cell, str(i)) for i, cell in enumerate(self.cells)])

    @classmethod
    def _rebuild(cls, payload: Node, builder: Builder) -> Cells:
        return cls([builder.cells[i] for i in payload[1]], payload[0])


def whole_cells(cells: Sequence[Cell]) -> list[Cell]:
    """`cells` with a packed cell in place of the views of its pack, if they are all that it holds.

    It is one array for a program, and may stand for its views where order and shapes do not matter. A trace around the
    call knows the views themselves.
    """
    packs = {cell.pack for cell in cells if cell.pack is not None}
    views = {view for pack in packs for view in pack.places}
    if not is_eager() or any([pack.has_holes() for pack in packs]) or not views.issubset(cells):
        return list(cells)
    return stored_cells(cells)


_chosen: WeakKeyDictionary[Walk, dict[Any, tuple[list[ReferenceType[Walk]], Cells]]] = WeakKeyDictionary()
_MOST = 8  # kinds of choices that are remembered for one object


def choose(walks: Sequence[Walk], find: Callable[[Sequence[Walk]], Sequence[Cell]], about: Any = None) -> Cells:
    """`Cells(find(walks), about)`; the same object as for the last call with these walks, which compiled calls go by.

    It is remembered as long as all of the walks are there: until an object goes, or its structure changes.
    """
    if not walks or not is_eager():
        return Cells(find(walks), about)
    known = _chosen.get(walks[0])
    if known is None:
        known = _chosen[walks[0]] = {}
    key = find, about
    found = known.get(key)
    if found is not None and len(found[0]) == len(walks):
        if all([reference() is walk for reference, walk in zip(found[0], walks, strict=True)]):
            return found[1]
    if len(known) >= _MOST:
        known.clear()
    cells = Cells(find(walks), about)
    forget = partial(_forget, ref(walks[0]), key)
    known[key] = [ref(walk, forget) for walk in walks], cells
    return cells


def _forget(first: ReferenceType[Walk], key: Any, _: Any) -> None:
    walk = first()
    if walk is not None:
        _chosen.get(walk, {}).pop(key, None)
