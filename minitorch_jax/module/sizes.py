"""Finding the sizes of lazy layers: by a call, by an abstract run of a call (`Search`), by the arrays of a state_dict.

Whatever gives layers their sizes does so for all of them or, if something raises, for none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from ..runtime import interrupts
from ..state import frame as frames
from ..state.structure import changed
from ..state.uninitialized import is_unsized, local
from ..state.walk import walk_of
from . import random


def with_any_key(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: jax.random.key(0) if name == "key" else value for name, value in settings.items()}


def of_shapes(make: Callable[[], Any]) -> Any:
    """Return a module of shapes (`jax.ShapeDtypeStruct`) that belongs to no trace and no run."""
    frame, frames.local.frame = frames.local.frame, None
    try:
        made = jax.eval_shape(make)
    finally:
        frames.local.frame = frame
    object.__setattr__(made, "_birth", None)
    for cell in walk_of(made).with_gradients():
        cell.birth = None
    return made


@contextmanager
def all_or_nothing() -> Iterator[list[Callable[[], None]]]:
    """A block that gives layers their sizes. If it raises, they are lazy again, and the random stream is where it was."""
    undo: list[Callable[[], None]] = []
    stream = random.current() if frames.is_eager() else None
    before = None if stream is None else stream.cell.value
    try:
        yield undo
    except BaseException:
        with interrupts.deferred:
            for change in reversed(undo):
                change()
            if stream is not None and stream.cell.value is not before:
                stream.cell.value = before
        raise


class Found(NamedTuple):
    """A lazy layer that a search has reached."""

    layer: Any
    sizes: dict[str, int]
    stand_in: Any


class Search:
    """An abstract run of a call, in a `with` block, that finds the sizes of the lazy layers that it calls."""

    def __init__(self) -> None:
        self.found: dict[int, Found] = {}  # by the id of the layer, in the order of the first calls

    def __enter__(self) -> Self:
        self.outer, local.search = local.search, self
        return self

    def __exit__(self, *_: object) -> None:
        local.search = self.outer

    def stand_in(self, layer: Any) -> Any:
        """Return the plain layer that stands for a lazy one in this search; None if no input has reached it."""
        found = self.found.get(id(layer))
        return None if found is None else found.stand_in

    def add(self, layer: Any, sizes: dict[str, int]) -> Any:
        """Return the stand-in of a layer that is called. The first call makes it, for these sizes."""
        if id(layer) not in self.found:
            stand_in = of_shapes(partial(layer._plain, **sizes, **with_any_key(layer._settings())))
            with jax.ensure_compile_time_eval():
                for cell in walk_of(stand_in).cells:
                    cell.stored = jnp.zeros(cell.stored.shape, cell.stored.dtype)
            vars(stand_in)["training"] = layer.training
            self.found[id(layer)] = Found(layer, sizes, stand_in)
            changed(layer)
        return self.found[id(layer)].stand_in

    @contextmanager
    def made(self) -> Iterator[None]:
        """A block in which the layers that were found have their parameters. If it raises, they are lazy again."""
        found = [(layer, sizes) for layer, sizes, _ in self.found.values()]
        self.found.clear()  # the stand-ins' memory
        with all_or_nothing() as undo:
            for layer, sizes in found:
                if is_unsized(layer):  # else the search itself was under `jax.disable_jit()`
                    layer._make(sizes, undo)
            yield


@contextmanager
def sized_by(states: Iterable[tuple[Any, Mapping[str, Any]]]) -> Iterator[None]:
    """A block that loads `(module, state_dict)` pairs: lazy layers have the sizes of the arrays that are loaded into them.

    If the block raises, they are lazy again. Values that are loaded need no random numbers.
    """
    with all_or_nothing() as undo:
        for module, state in states:
            for path, layer in module.named_modules(remove_duplicate=False):
                if not is_unsized(layer):
                    continue
                start = f"{path}." if path else ""
                names = [name for name in layer._cells.like._cells if f"{start}{name}" in state]
                shapes = {name: tuple(getattr(state[f"{start}{name}"], "shape", ())) for name in names}
                sizes = layer._sizes_of(shapes)
                if sizes is not None:
                    layer._make(sizes, undo, jax.random.key(0) if len(names) == len(layer._cells.like._cells) else None)
        yield
