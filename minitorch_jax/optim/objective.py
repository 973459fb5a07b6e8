"""The closure's loss during a step of LBFGS, as a function of all parameters as one vector."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, repeat
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..engine.kept_with_owner import kept_for
from ..engine.stateful_function import Cells, StatefulFunction
from ..runtime import contexts
from ..state import access
from ..state.cell import Cell, get_value, store
from ..state.concurrent_reads import gradient_writes, lend, lendings
from ..state.gradient import gradient
from ..state.packed import PackedLayout, stored_cells
from .quasi_newton import dot, largest_of, number_array, numbers
from .wolfe import Point

_set_lent: Callable[[Cell, bool], None] = vars(Cell)["lent"].__set__


class Before:
    """What some cells held, put back by one C call, which no signal handler comes between."""

    def __init__(self, parts: Sequence[Cell]) -> None:
        self.parts, self.layout = parts, PackedLayout(parts)
        stored = self.layout.stored
        for cell in stored:
            lend(cell)  # so that no program uses the arrays up
        self.values = list(map(get_value, stored))
        steps = chain(map(store, stored, self.values), map(_set_lent, stored, repeat(True)))
        self.put_back: Callable[[], Any] = partial(deque, steps, 0)

    def put_back_if_repacked(self) -> None:
        """What remains to be done: tell the compiled programs; and if packs have changed since, store part by part."""
        lendings.last = gradient_writes.last = object()
        if stored_cells(self.parts) != self.layout.stored:
            values = self.layout.cut(dict(enumerate(self.values)), [None] * len(self.parts))
            access.store_all(self.parts, values)


class _Vector(NamedTuple):
    """How the vector is made of arrays: what programs depend on, also those that only write the arrays."""

    dtype: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]

    def joined(self, arrays: Sequence[Any]) -> Any:
        """The vector of some arrays, of which None stands for zeros."""
        parts = [
            jnp.zeros(shape, self.dtype) if array is None else array.astype(self.dtype)
            for array, shape in zip(arrays, self.shapes, strict=True)
        ]
        return jnp.concatenate([part.reshape(-1) for part in parts])

    def cut(self, vector: Any) -> list[Any]:
        """The arrays of a vector."""
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes])
        return [part.reshape(shape) for part, shape in zip(jnp.split(vector, ends[:-1]), self.shapes, strict=True)]


def wide_dtype(params: Sequence[Cell]) -> Any:
    """The dtype of the vector of all parameters."""
    return np.dtype(np.float64 if any(cell.value.dtype == np.float64 for cell in params) else np.float32)


class Objective:
    """The closure's loss during one step of an optimizer."""

    def __init__(self, opt: Any, params: list[Cell], closure: Callable[[], Any]) -> None:
        self.opt, self.closure = opt, closure
        self.params, self.grads = _cells(opt, params)
        self.stored, self.dtype = stored_cells(params), self.params.about.dtype

    def evaluate(self, t: Any, d: Any) -> tuple[Any, Point]:
        """The loss where the parameters are now, as the closure gives it, and as the point `t` along `d`."""
        loss = self.closure()
        params = self.params.cells
        if self.opt._plan_now().params != params or stored_cells(params) != self.stored:
            raise RuntimeError(
                "LBFGS.step(): the closure changed which parameters are trained, or how they are packed. Do that between"
                " the steps."
            )
        if np.shape(loss) != () or not isinstance(loss, jax.Array | np.ndarray | np.generic | float):
            what = "nothing" if loss is None else f"{type(loss).__name__} {loss!r}"
            raise TypeError(f"LBFGS.step(): the closure must return the loss, a number; it returned {what}")
        g, g_max, gtd = numbers(_measure(self.grads, d), 1)
        return loss, Point(t, float(loss), g, g_max, gtd)


def _cells(opt: Any, params: list[Cell]) -> tuple[Cells, Cells]:
    """The parameters and their gradients, for programs; kept with the optimizer, and the same as long as nothing changes."""
    values = list(map(get_value, params))
    vector = _Vector(wide_dtype(params), tuple([v.shape for v in values]), tuple([v.dtype for v in values]))
    kept: Any = kept_for(opt)
    known: tuple[Cells, Cells] | None = kept.get(Objective)
    if known is None or known[0].about != vector or known[0].cells != params:
        known = kept[Objective] = Cells(params, vector), Cells([cell.grad for cell in params], vector)
    return known


class Line:
    """The points from where the parameters are in a direction `d`."""

    def __init__(self, objective: Objective, d: Any) -> None:
        self.objective, self.d, self.origin = objective, d, _position(objective.params)

    def move(self, t: Any) -> None:
        """Put the parameters at a distance `t`."""
        _move(self.objective.params, self.origin, self.d, number_array(t, self.objective.dtype))

    def at(self, t: Any) -> Point:
        """The point at a distance `t`."""
        self.move(t)
        return self.objective.evaluate(t, self.d)[1]


# -- programs ----------------------------------------------------------------------------------------------------------


@StatefulFunction
def _measure(grads: Cells, d: Any) -> Any:
    """The gradient as a vector, its largest element, and its slope along `d`."""
    with contexts.full_width([d]):
        g = grads.about.joined(list(map(gradient, grads)))
        return g, largest_of(g), dot(g, d)


@StatefulFunction
def _position(params: Cells) -> Any:
    """The parameters as a vector."""
    values = list(map(get_value, params))
    with contexts.full_width(values):
        return params.about.joined(values)


@StatefulFunction
def _move(params: Cells, origin: Any, d: Any, t: Any) -> None:
    """Put the parameters at a distance `t` from an origin along `d`."""
    vector: _Vector = params.about
    with contexts.full_width([d]):
        for cell, new, dtype in zip(params, vector.cut(origin + t * d), vector.dtypes, strict=True):
            access.write(cell, new.astype(dtype), "a parameter updated by LBFGS.step()")
