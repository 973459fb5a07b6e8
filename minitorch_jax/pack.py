"""Packing: many small cells as views of one flat array.

A compiled call costs about half a microsecond for each array that goes in or comes out. `pack` lays small parameters end
to end in one array, and their gradients in another; an optimizer's step then takes one array for all of them (and one for
each part of its state). The cells stay the same objects, so modules, ties and optimizers need not know: each becomes a
`View`, and programs take the packed cells and slice them inside (`Layout`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np

from . import cell as cells
from . import interrupts
from .cell import CONSUMED, Cell, store
from .stateful import walk_of


class View(Cell):
    """A cell whose value is a part of a packed one."""

    __slots__ = ()

    @property
    def stored(self) -> Any:
        return self.pack.part(self)

    @stored.setter
    def stored(self, new: Any) -> None:
        cells.store_all([self], [new])


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
    """A flat cell, and the views of it that are alive."""

    def __init__(self, cell: Cell, length: int, dtype: Any) -> None:
        self.cell, self.length, self.dtype = cell, length, dtype
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

    def part(self, view: Cell) -> Any:
        """A view's value: an array of its own."""
        return cells.using(self.cell, partial(self._cut, view))

    def _cut(self, view: Cell, flat: Any) -> Any:
        if flat is None or flat is CONSUMED:
            return flat
        known = self._parts
        if known[0] is not flat:
            known = self._parts = flat, WeakKeyDictionary()
        found = known[1].get(view)
        if found is None:
            place = self.places[view]
            with interrupts.held, jax.ensure_compile_time_eval(), cells.constants():
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
        return sum(place.size for place in self.places.values()) < self.length

    def with_parts(self, new: Iterable[tuple[Cell, Any]]) -> Any:
        """What to store for other values of some views (arrays; None for zeros), if they do not split the pack."""
        flat = self.cell.value
        pairs = [(self.places[view], value) for view, value in new]
        if all(value is None for _, value in pairs) and (flat is None or len(pairs) == len(self.places)):
            return None
        if any(value is CONSUMED for _, value in pairs):
            return CONSUMED
        with interrupts.held, jax.ensure_compile_time_eval(), cells.full_width([self]), cells.constants():
            if flat is None:
                flat = jnp.zeros(self.length, self.dtype)
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
        with interrupts.held:
            view.__class__ = Cell
            view.pack = None
            store(view, value)
            view.lent = True  # the part may have been handed out
            del self.places[view]
            cells.structure_changed()

    def release_both(self, view: Cell) -> None:
        """Release a parameter with its gradient, given either."""
        start, params = self.places[view].start, self.params or self
        release(next(cell for cell, place in params.places.items() if place.start == start))

    def dissolve(self) -> None:
        """Release all parameters with their gradients."""
        with interrupts.held:
            for view in list((self.params or self).places):
                release(view)


def release(cell: Cell) -> None:
    """Take a cell, and its gradient, out of their packs."""
    with interrupts.held:
        for view in (cell, cell.grad):
            if view is not None and view.pack is not None:
                view.pack.release(view)


def make_pack(parts: Sequence[Cell], places: Sequence[Place], length: int, dtype: Any, kind: str) -> Pack:
    """Pack cells of one dtype into a new flat cell."""
    values = [part.value for part in parts]
    flat: Any = None
    arrays = [value for value in values if isinstance(value, jax.Array)]
    if arrays or len({id(value) for value in values}) > 1:
        whole = np.zeros(length, dtype)
        for value, place in zip(values, places, strict=True):
            whole[place.start : place.end] = 0 if value is None else np.asarray(value).reshape(-1)
        committed = [value for value in arrays if value.committed]
        with cells.full_width([whole]):
            flat = jax.device_put(whole, committed[0].sharding if committed else None, may_alias=False)
    elif values and values[0] is CONSUMED:
        flat = CONSUMED
    pack = Pack(Cell(flat, kind), length, dtype)
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
    with interrupts.held:
        for view in views:
            release(view)
        if len(views) > 1:
            _pack_together(views)
        cells.structure_changed()


def pack(*modules: Any, max_size: int = 1024) -> None:
    """Lay the small parameters of modules end to end in one array, and their gradients in another, in place.

    Nothing else changes: reading, assigning, tying, freezing, `state_dict`, pytrees and copies work as before (copies are
    not packed). An optimizer over packed modules keeps its state packed too, where its rule works element by element,
    and applies it to the parameters one by one, inside the same program, where it does not. `step()` then costs the same
    for any number of parameters, and an eager loop over many small ones about half. The price is compile time: each
    packed array is cut out of the flat one by a kernel of its own in every program that uses it (docs/performance.md).

    Packed are trainable parameters on one device; what is frozen, sharded, moved or converted later leaves its pack.
    Modules trained by different optimizers should be packed by calls of their own.

    Args:
        *modules: Modules; those that are packed already are packed anew, together.
        max_size: pack arrays of at most so many elements; for larger ones the copy costs more than it saves.

    Raises:
        TypeError: if something is not a Module.
        ValueError: if no module is given.
        TraceError: inside a JAX transform or a compiled function.

    Example:
        >>> import jax, jax.numpy as jnp, minitorch_jax as mt
        >>> from minitorch_jax import nn
        >>> model = nn.Sequential(*[nn.Linear(4, 4, key=jax.random.key(i)) for i in range(10)])
        >>> opt = mt.Optimizer([model], lr=0.1)
        >>> mt.pack(model)
        >>> loss = mt.backward(lambda x: model(x).sum(), jnp.ones((2, 4)))
        >>> opt.step()
        >>> model[0].weight.shape, model.num_parameters()
        ((4, 4), 200)
    """
    params = _parameters("pack", modules)
    with interrupts.held:
        for cell in params:
            release(cell)
        groups: dict[Any, list[Cell]] = {}
        for cell in params:
            value = cell.value
            single = isinstance(value, jax.Array) and isinstance(value.sharding, jax.sharding.SingleDeviceSharding)
            if cell.trainable and single and 0 < value.size <= max_size:
                consumed = cell.grad.value is CONSUMED
                groups.setdefault((value.dtype, value.sharding, value.committed, consumed), []).append(cell)
        for members in groups.values():
            if len(members) > 1:
                _pack_together(members)
        cells.structure_changed()


def unpack(*modules: Any) -> None:
    """Undo `pack`: every parameter has an array of its own again. Raises as `pack`."""
    params = _parameters("unpack", modules)
    with interrupts.held:
        for cell in params:
            release(cell)


def _parameters(name: str, modules: Sequence[Any]) -> list[Cell]:
    """The modules' parameters, each once."""
    if not modules:
        raise ValueError(f"mt.{name} takes one or more modules; it was given none")
    for module in modules:
        if isinstance(module, type) or not hasattr(module, "_cells"):
            raise TypeError(f"mt.{name} takes Modules, not {type(module).__name__}: `mt.{name}(model)`")
        cells.check_restructurable(module._birth, type(module).__name__, f"was given to mt.{name}")
        if not cells.at_top_level():
            raise cells.TraceError(f"mt.{name} was called inside a JAX transform: call it before")
    return list(dict.fromkeys(cell for module in modules for cell in walk_of(module).params))


# ---------------------------------------------------------------------------------------------------------------------
# Programs over packed cells


class PartlyConsumed(Exception):  # noqa: N818  # a signal to the caller of the program, never an error of the user's
    """A program gives some gradients of a pack (the index of its stored cell) of which the others are not there any more."""

    def __init__(self, stored: int) -> None:
        self.stored = stored


class _Packed:
    """What a program knows of a pack: its views among the cells (`whole`: all there are), its length and dtype."""

    def __init__(self, pack: Pack) -> None:
        self.views: list[int] = []
        self.length, self.dtype = pack.length, pack.dtype
        self.whole: int | bool = len(pack.places)


class Layout:
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
            packs = tuple((packed.length, packed.dtype, packed.whole) for packed in self.packs.values())
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
        views, length, dtype = packed.views, packed.length, packed.dtype
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
        keep(length)
        return jnp.concatenate(pieces)


KEPT = object()


def stored_cells(parts: Sequence[Cell]) -> list[Cell]:
    """The cells that hold the values of `parts`, each once."""
    if all(part.pack is None for part in parts):
        return list(parts)
    return list(dict.fromkeys(part if part.pack is None else part.pack.cell for part in parts))
