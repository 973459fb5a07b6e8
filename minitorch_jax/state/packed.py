"""Packing: many small cells as views of one flat array.

A compiled call costs about half a microsecond for each array that goes in or comes out. `pack` lays small parameters end
to end in one array, and their gradients in another; an optimizer's step then takes one array for all of them (and one for
each part of its state). The cells stay the same objects, so modules, ties and optimizers need not know: each becomes a
`View`, and programs take the packed cells and slice them inside (`PackedLayout`).

A flat array ends in padding (`padded`). In gradients it is zeros, which no norm and no check for NaN notices. In parameters
and state a rule may make anything of it: nothing but the rule reads it, element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np

from ..runtime import contexts, interrupts
from ..runtime.copies import everywhere
from . import access
from .cell import Cell, store
from .concurrent_reads import using
from .gradient import CONSUMED
from .structure import Structure, cell_changed

# XLA:CPU cuts a loop over a large array into parts, which cores share. If there are two parts, and the size is odd, it does
# not vectorise the loop, which then takes two to five times as long. (Three parts or more need not be equal.) 64 = 2 * 32:
# both parts begin on a cache line of 64 bytes, even of floats of two bytes. It is the same on every machine, so that programs
# and results are.
PAD_TO = 64


def padded(size: int) -> int:
    """The length of the flat array for so many numbers."""
    return -(-size // PAD_TO) * PAD_TO


class View(Cell):
    """A cell whose value is a part of a packed one."""

    __slots__ = ()

    @property
    def stored(self) -> Any:
        return self.pack.part(self)

    @stored.setter
    def stored(self, new: Any) -> None:
        access.store_all([self], [new])


class Place:
    """Where a view is in its pack."""

    __slots__ = ("start", "size", "shape")

    def __init__(self, start: int, shape: tuple[int, ...]) -> None:
        self.start, self.shape = start, shape
        self.size = int(np.prod(shape))

    @property
    def end(self) -> int:
        return self.start + self.size


@partial(jax.jit, static_argnums=2)
def _part(flat: Any, start: int, shape: tuple[int, ...]) -> Any:
    return jax.lax.dynamic_slice(flat, (start,), (int(np.prod(shape)),)).reshape(shape)


@jax.jit
def _replaced(flat: Any, start: int, new: Any) -> Any:
    return jax.lax.dynamic_update_slice(flat, new.reshape(-1), (start,))


class Pack:
    """A flat cell, and the views of it that are alive; `size` numbers, and padding."""

    def __init__(self, cell: Cell, size: int, dtype: Any) -> None:
        self.cell, self.size, self.dtype = cell, size, dtype
        self.structure = Structure()  # which views there are
        self.params: Pack | None = None  # of gradients: the pack of their parameters, with the same places
        self.places: WeakKeyDictionary[Cell, Place] = WeakKeyDictionary()
        self._parts: tuple[Any, WeakKeyDictionary[Cell, Any]] = (
            None,
            WeakKeyDictionary(),
        )  # already cut out, of which array

    def add(self, view: Cell, place: Place) -> None:
        """Make a cell a view; its value is in the flat array already."""
        self.places[view] = place
        view.pack = self
        view.__class__ = View
        store(view, None)  # it keeps no array itself
        cell_changed(view)

    def part(self, view: Cell) -> Any:
        """A view's value: an array of its own."""
        return using(self.cell, partial(self._cut, view))

    def _cut(self, view: Cell, flat: Any) -> Any:
        if flat is None or flat is CONSUMED:
            return flat
        known = self._parts
        if known[0] is not flat:
            known = self._parts = flat, WeakKeyDictionary()
        found = known[1].get(view)
        if found is None:
            place = self.places[view]
            with interrupts.deferred, jax.ensure_compile_time_eval(), contexts.constants(), contexts.unchecked():
                found = known[1][view] = _part(flat, place.start, place.shape)
        return found

    def known_part(self, view: Cell) -> Any:
        """A view's value if it has been cut out already, else None."""
        return self._parts[1].get(view) if self._parts[0] is self.cell.value else None

    def parts(self) -> list[Any]:
        """The parts that have been cut out of the present array."""
        return list(self._parts[1].values())

    def has_holes(self) -> bool:
        """Whether views have left."""
        return sum(place.size for place in self.places.values()) < self.size

    def with_parts(self, new: Iterable[tuple[Cell, Any]]) -> Any:
        """What to store for other values of some views (arrays; None for zeros), if they do not split the pack."""
        flat = self.cell.value
        pairs = [(self.places[view], value) for view, value in new]
        if all(value is None for _, value in pairs) and (flat is None or len(pairs) == len(self.places)):
            return None
        if any(value is CONSUMED for _, value in pairs):
            return CONSUMED
        with (
            interrupts.deferred,
            jax.ensure_compile_time_eval(),
            contexts.full_width([self]),
            contexts.constants(),
            contexts.unchecked(),
        ):
            if flat is None:
                flat = jnp.zeros(padded(self.size), self.dtype)
            for place, value in pairs:
                value = jnp.zeros(place.shape, self.dtype) if value is None else value
                flat = _replaced(flat, place.start, value)
        return flat

    def splits(self, new: Sequence[tuple[Cell, Any]]) -> bool:
        """Whether storing these values would leave some gradients of the pack CONSUMED, and others not."""
        whole = len(new) == len(self.places)
        values = [value for _, value in new] if whole else [*(value for _, value in new), self.cell.value]
        return 0 < sum(value is CONSUMED for value in values) < len(values)

    def release(self, view: Cell) -> None:
        """Give a cell its own array again."""
        value = view.stored
        with interrupts.deferred:
            view.__class__ = Cell
            view.pack = None
            store(view, value)
            view.lent = True  # the part may have been handed out
            del self.places[view]
            cell_changed(view)
            self.structure.change()

    def release_both(self, view: Cell) -> None:
        """Release a parameter with its gradient, given either."""
        start, params = self.places[view].start, self.params or self
        release(next(cell for cell, place in params.places.items() if place.start == start))

    def dissolve(self) -> None:
        """Release all parameters with their gradients."""
        with interrupts.deferred:
            for view in list((self.params or self).places):
                release(view)


def release(cell: Cell) -> None:
    """Take a cell, and its gradient, out of their packs."""
    with interrupts.deferred:
        for view in (cell, cell.grad):
            if view is not None and view.pack is not None:
                view.pack.release(view)


def make_pack(parts: Sequence[Cell], places: Sequence[Place], size: int, dtype: Any, kind: str) -> Pack:
    """Pack cells of one dtype into a new flat cell."""
    values = [part.value for part in parts]
    flat: Any = None
    arrays = [value for value in values if isinstance(value, jax.Array)]
    if arrays or len({id(value) for value in values}) > 1:
        whole = np.zeros(padded(size), dtype)
        for value, place in zip(values, places, strict=True):
            whole[place.start : place.end] = 0 if value is None else np.asarray(value).reshape(-1)
        committed = [value for value in arrays if value.committed]
        with contexts.full_width([whole]):
            flat = jax.device_put(whole, everywhere(committed[0].sharding) if committed else None, may_alias=False)
    elif values and values[0] is CONSUMED:
        flat = CONSUMED
    pack = Pack(Cell(flat, kind), size, dtype)
    for part, place in zip(parts, places, strict=True):
        pack.add(part, place)
    return pack


def _pack_together(members: Sequence[Cell]) -> None:
    """Pack parameters of one dtype on one device, and their gradients."""
    places, end = [], 0
    for cell in members:
        places.append(Place(end, cell.value.shape))
        end = places[-1].end
    dtype = members[0].value.dtype
    packed = make_pack(members, places, end, dtype, "packed")
    packed.cell.trainable = True
    grads = make_pack([cell.grad for cell in members], places, end, dtype, "gradient")
    grads.params = packed
    packed.cell.grad = grads.cell


def compact(pack: Pack) -> None:
    """Pack the views that are left in a pack anew, without holes."""
    views = sorted(pack.places, key=lambda view: pack.places[view].start)
    with interrupts.deferred:
        for view in views:
            release(view)
        if len(views) > 1:
            _pack_together(views)


class PartlyConsumed(Exception):  # noqa: N818  # a signal to the caller of the program, never an error of the user's
    """A program gives some gradients of a pack (the index of its stored cell) of which the others are not there any more."""

    def __init__(self, stored: int) -> None:
        self.stored = stored


class _Packed:
    """What a program knows of a pack: its views among the cells (`whole`: all there are), its size and dtype."""

    def __init__(self, pack: Pack) -> None:
        self.views: list[int] = []
        self.size, self.dtype = pack.size, pack.dtype
        self.whole: int | bool = len(pack.places)


class PackedLayout:
    """Some cells, and the cells that programs take for them: packed ones for views, else themselves."""

    def __init__(self, parts: Sequence[Cell]) -> None:
        self.parts = len(parts)
        index: dict[Cell, int] = {}
        self.of = [index.setdefault(part if part.pack is None else part.pack.cell, len(index)) for part in parts]
        self.stored = list(index)
        self.places: list[Place | None] = [None if part.pack is None else part.pack.places[part] for part in parts]
        self.packs: dict[int, _Packed] = {}  # of those stored cells that are packed
        for i, part in enumerate(parts):
            if part.pack is not None:
                self.packs.setdefault(self.of[i], _Packed(part.pack)).views.append(i)
        for packed in self.packs.values():
            packed.whole = packed.whole == len(packed.views)
            packed.views.sort(key=lambda i: self.places[i].start)  # type: ignore[union-attr]
        self.key: Any = ()
        if self.packs:
            starts = tuple(place and (place.start, place.shape) for place in self.places)
            packs = tuple((packed.size, packed.dtype, packed.whole) for packed in self.packs.values())
            self.key = tuple(self.of), starts, packs

    def cut(self, values: dict[int, Any], parts: list[Any]) -> list[Any]:
        """Put the values of stored cells, by index, into the places of `parts`, cutting packed ones up."""
        if not self.packs and len(values) == self.parts:
            return [values[i] for i in range(self.parts)]
        for i, (j, place) in enumerate(zip(self.of, self.places, strict=True)):
            if j in values:
                flat = values[j]
                absent = flat is None or flat is CONSUMED
                parts[i] = flat if place is None or absent else flat[place.start : place.end].reshape(place.shape)
        return parts

    def joined(self, j: int, changed: Callable[[int], Any], old: Any) -> Any:
        """The new value of stored cell `j`: `changed(i)` gives a part's new value, or KEPT for what `old` has.

        Raises:
            PartlyConsumed: if it would be a pack of whose gradients some are not there any more.
        """
        if j not in self.packs:
            new = changed(self.of.index(j) if self.packs else j)
            return old if new is KEPT else new
        packed = self.packs[j]
        views, size, dtype = packed.views, packed.size, packed.dtype
        new = {i: changed(i) for i in views}
        if all(value is None for value in new.values()) and (packed.whole or old is None):
            return None
        pieces: list[Any] = []
        end = 0

        def keep(upto: int) -> None:
            if upto > end:
                if old is CONSUMED:
                    raise PartlyConsumed(j)
                kept = old[end:upto] if isinstance(old, jax.Array) else jnp.zeros(upto - end, dtype)
                pieces.append(kept)

        for i in views:
            place: Any = self.places[i]
            if new[i] is not KEPT:
                keep(place.start)
                value = new[i]
                pieces.append(jnp.zeros(place.size, dtype) if value is None else value.reshape(-1))
                end = place.end
        keep(size)
        if padded(size) > size:
            pieces.append(jnp.zeros(padded(size) - size, dtype))
        return jnp.concatenate(pieces)


KEPT = object()


def stored_cells(parts: Sequence[Cell]) -> list[Cell]:
    """The cells that hold the values of `parts`, each once."""
    if all(part.pack is None for part in parts):
        return list(parts)
    return list(dict.fromkeys(part if part.pack is None else part.pack.cell for part in parts))
