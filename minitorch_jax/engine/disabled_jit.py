"""`backward`, `mt.jit` and `mt.scan` under `jax.disable_jit()`: the user's code runs as plain Python on concrete values.

Nothing is traced or compiled, so `print(float(x))`, `pdb` and `if x > 0` work in the user's code. The code still runs in a
frame (`frame.substituted`), and the new values are stored in the cells when all of it has succeeded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..module import anomaly
from ..runtime import interrupts
from ..runtime.jax_private import show_values
from ..state import access
from ..state import frame as frames
from ..state.cell import Cell, get_value
from ..state.concurrent_reads import lend
from ..state.frame import Frame
from ..state.gradient import starting_value
from ..state.static_values import holds_state
from ..state.structure import cell_changed
from ..state.walk import walk_of
from .arguments import Arguments
from .tracing import Met, Purpose, check_statics, owners_met, unique_cells

_config: Any = jax.config


def is_plain() -> bool:
    """True under `jax.disable_jit()`: code runs as plain Python."""
    return bool(_config.jax_disable_jit)


def arrays_of(data: Sequence[Any]) -> tuple[Any, ...]:
    """Return data as the arrays that compiled code would get. NumPy memory belongs to the caller, so it is copied."""
    return tuple([jnp.asarray(np.array(value) if isinstance(value, np.ndarray) else value) for value in data])


def run_all_or_nothing(objects: list[Any], run: Callable[[], Any], statics: bool = True) -> Any:
    """Run eager code that changes the objects' cells, and store the changes when all of it has succeeded.

    If the code reaches an object that is not in `objects`, the object is added and the code runs again. `statics` says that
    static attributes may have other values at the end.
    """

    def checked(frame: Frame) -> Any:
        with anomaly.within(objects):
            out = run()
        check_statics(frame, statics)
        return out

    while True:
        lifted, _ = unique_cells([walk_of(obj) for obj in objects], True)
        start = list(map(starting_value, lifted))
        with interrupts.tracing():
            out, new, frame = frames.substituted(lifted, start, checked, True)
        if not frame.met:
            break
        objects += owners_met(frame)
    for cell in lifted:  # the user's code may keep any array that it has read
        lend(cell)
    changed = [(cell, value) for cell, value, before in zip(lifted, new, start, strict=True) if value is not before]
    moved = [c for c, new in changed if getattr(c.value, "sharding", None) != getattr(new, "sharding", None)]
    jax.block_until_ready([value for _, value in changed])
    access.store_all([cell for cell, _ in changed], [value for _, value in changed])
    for cell in moved:
        cell_changed(cell)  # a compiled function puts results where the arrays were when it was compiled
    return out


class _Noted(dict[Cell, Any]):
    """The values of a run. `seen` collects the cells that were read."""

    def __init__(self, values: dict[Cell, Any]) -> None:
        super().__init__(values)
        self.seen: set[Cell] = set()

    def __getitem__(self, cell: Cell) -> Any:
        self.seen.add(cell)
        return super().__getitem__(cell)


def differentiated(
    call: Arguments, purpose: Purpose, transform: Callable[..., Any], by_parameters: bool, places: Sequence[int]
) -> tuple[Any, Any, list[Any], Any, dict[Cell, Any]]:
    """Run a function once and differentiate it: see `loss.run_once`. Returns `value, aux, keys, found, changes`.

    The inputs that are differentiated, and the values computed from them, are tracers that know their values.
    """
    show_values()
    data = arrays_of(call.data)
    while True:
        try:
            return _differentiated(call, purpose, transform, by_parameters, places, data)
        except Met as met:
            call.objects += met.owners


def _differentiated(
    call: Arguments,
    purpose: Purpose,
    transform: Callable[..., Any],
    by_parameters: bool,
    places: Sequence[int],
    data: tuple[Any, ...],
) -> Any:
    lifted, _ = unique_cells([walk_of(obj) for obj in call.objects], purpose.gradients)
    start = list(map(get_value, lifted))
    train = [i for i, cell in enumerate(lifted) if cell.trainable and by_parameters]
    written: list[int] = []
    seen: set[Cell] = set()

    def run(inputs: list[Any], frame: Frame) -> Any:
        noted = _Noted(frame.values)
        frame.values = noted
        with anomaly.within(call.objects):
            out = call.run(inputs)
        seen.update(noted.seen)
        check_statics(frame, purpose.statics)
        return purpose.check(out, call.objects)

    def value_of(params: list[Any], _: None) -> Any:
        values, inputs = list(start), list(data)
        for i, param in zip(train, params, strict=False):
            values[i] = param
        for i, param in zip(places, params[len(train) :], strict=True):
            inputs[i] = param
        (value, aux), new, frame = frames.substituted(lifted, values, partial(run, inputs), purpose.gradients)
        if frame.met:
            raise Met(owners_met(frame))
        written.extend(i for i, now in enumerate(new) if now is not values[i])
        return value, (aux, [new[i] for i in written])

    with interrupts.tracing():
        params = [*(start[i] for i in train), *(data[i] for i in places)]
        (value, (aux, changed)), found = transform(value_of)(params, None)
    keys = [*(lifted[i] if lifted[i] in seen else None for i in train), *places]
    return value, aux, keys, found, {lifted[i]: value for i, value in zip(written, changed, strict=True)}


def loop(fn: Callable[..., Any], call: Arguments, arrays: Sequence[Any], length: int) -> Any:
    """Run the steps of `mt.scan` as a Python loop, and return the stacked results."""
    outs = []
    for i in range(length):
        with anomaly.within(call.objects, f"Step {i} of mt.scan, from 0: "):
            outs.append(call.run([array[i] for array in arrays]))

    def stacked(*leaves: Any) -> Any:
        first = leaves[0]
        is_data = isinstance(first, jax.Array | np.ndarray | np.generic | bool | int | float | complex)
        return jnp.stack([jnp.asarray(leaf) for leaf in leaves]) if is_data else leaves[-1]

    return jax.tree.map(stacked, *outs, is_leaf=holds_state)
