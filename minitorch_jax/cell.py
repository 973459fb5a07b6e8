"""The one thing that changes over time: a cell.

A parameter, a buffer, a gradient, an optimizer's state, its step counts and hyperparameters, a random stream: each is a
`Cell` holding one value. Modules and optimizers are trees of cells and static values, and nothing else keeps arrays,
so the hard questions are answered once: who may read and change a cell (`read`, `write`), what happens when code runs with
tracers in cells (`substituted`), and what a copy made inside a JAX transform has to say when its changes are dropped
(`Birth`). When a cell's buffer may be donated, and how results are stored, is in `pipeline.py`.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import repeat
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core

from .encoding import Encoding

TWO_SPELLINGS = (
    "Either pass it in and return it (`return opt, loss` in `step`): `opt, loss = jax.jit(step)(opt, x, y)`; or run the"
    " stateful code outside of plain JAX transforms, where `mt.backward` and `opt.step()` compile it themselves."
)


class TraceError(RuntimeError):
    """A module, optimizer or random stream was changed where JAX would silently forget the change."""


class DroppedUpdateWarning(UserWarning):
    """A copy made inside a JAX transform was changed, and then neither returned nor read."""


# ---------------------------------------------------------------------------------------------------------------------
# Which trace are we in?


trace_state: Callable[[], Any] = jax_core.get_opaque_trace_state


def _top_level_state() -> Any:
    """The trace state outside of every transform, asked of a new thread: this module may be imported inside one."""
    states: list[Any] = []
    thread = threading.Thread(target=lambda: states.append(trace_state()))
    thread.start()
    thread.join()
    return states[0]


_TOP_LEVEL = _top_level_state()


def _at_top_level() -> bool:
    return bool(trace_state() == _TOP_LEVEL)


try:  # the same at a third of the price, where this JAX has it
    from jax._src.core import trace_ctx as _trace_ctx

    _at_top_level = _trace_ctx.is_top_level
    _at_top_level()
except (ImportError, AttributeError, TypeError):
    pass

# Whether no JAX transform (`jit`, `grad`, `vmap`, `scan`, …) is being traced in this thread.
at_top_level: Callable[[], bool] = _at_top_level


# ---------------------------------------------------------------------------------------------------------------------
# The static structure of everything has one version: a compiled call compares it to know that nothing moved.


class _Structure:
    __slots__ = ("version",)

    def __init__(self) -> None:
        self.version = object()


structure = _Structure()


def structure_changed() -> None:
    """Record that a static part of some module or optimizer has changed. A fresh object cannot lose a race."""
    structure.version = object()


class _Lendings:
    __slots__ = ("last",)

    def __init__(self) -> None:
        self.last = object()


lendings = _Lendings()  # its `last` is another object after each lending: while it is the same, nothing was lent


def lend(cell: Cell) -> None:
    """Record that someone outside may hold this cell's buffer from now on."""
    cell.lent = True
    lendings.last = object()


# ---------------------------------------------------------------------------------------------------------------------
# The cell


class Birth:
    """Where cells made inside a JAX transform came from, and which of them were changed and not used since.

    All cells of one unflattened copy share one Birth, so it dies with the last of them: if any is still `dirty` then,
    an update was lost, and the user is told.
    """

    __slots__ = ("state", "label", "dirty")

    def __init__(self, state: Any, label: str | None) -> None:
        self.state = state
        self.label = label  # None: not a copy of anything, so dropping it loses nothing
        self.dirty: dict[int, str] = {}

    def __del__(self) -> None:
        if self.dirty and self.label is not None:
            names = list(dict.fromkeys(self.dirty.values()))
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            warnings.warn(
                f"{self.label} was changed inside a JAX transform ({shown}), but on a temporary copy that was then"
                f" dropped, so nothing outside has changed. {TWO_SPELLINGS}",
                DroppedUpdateWarning,
                stacklevel=2,
            )


def birth_here(label: str | None = None) -> Birth | None:
    """The Birth of cells that are made now: None outside of transforms."""
    return None if at_top_level() else Birth(trace_state(), label)


class Cell:
    """One value that changes over time.

    `value` is a `jax.Array`, while it is traced a tracer, `None` for a gradient of zeros that was never written, or
    whatever leaf `jax.tree.map` put there. `lent` says that someone outside may hold the array's buffer, so that it must
    be copied before it is donated. (The reference count of the array would not tell: `jax.device_put` and others give
    new array objects that share the buffer, and die with it.)
    """

    __slots__ = ("value", "lent", "kind", "trainable", "grad", "encoding", "birth", "reached", "__weakref__")

    def __init__(
        self,
        value: Any,
        kind: str,
        *,
        trainable: bool = False,
        lent: bool = False,
        encoding: Encoding | None = None,
        birth: Birth | None = None,
    ) -> None:
        self.value = value
        self.lent = lent
        self.kind = kind
        self.trainable = trainable
        self.encoding = encoding
        self.birth = birth
        self.reached = False  # of a gradient: whether any loss has ever given one
        self.grad: Any = Cell(None, "gradient", birth=birth) if kind == "parameter" else None
        frame = local.frame
        if frame is not None:
            frame.own[id(self)] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Cell:
        """A new cell with the same array: both are lent, so that whichever is updated first copies it."""
        new = Cell(
            self.value, self.kind, trainable=self.trainable, lent=True, encoding=self.encoding, birth=birth_here()
        )
        lend(self)
        memo[id(self)] = new
        if self.grad is not None and new.grad is not None:
            new.grad.value, new.grad.lent = self.grad.value, True
            lend(self.grad)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle_cell, (_to_numpy(self.value), self.kind, self.trainable, self.encoding), self._grad_state()

    def _grad_state(self) -> Any:
        return None if self.grad is None or self.grad.value is None else (_to_numpy(self.grad.value),)

    def __setstate__(self, state: tuple[Any]) -> None:
        if self.grad is not None:
            self.grad.value = jnp.array(state[0])

    def __repr__(self) -> str:
        return f"Cell({self.kind}, {self.value!r})"


def _to_numpy(value: Any) -> Any:
    return np.asarray(value) if isinstance(value, jax.Array) else value


def _unpickle_cell(value: Any, kind: str, trainable: bool, encoding: Encoding | None) -> Cell:
    value = jnp.array(value) if isinstance(value, np.ndarray) else value
    return Cell(value, kind, trainable=trainable, encoding=encoding)


get_value = attrgetter("value")
store: Callable[[Cell, Any], None] = vars(Cell)["value"].__set__  # the C slot setter


class Frame:
    """One run of stateful code with tracers in place of values: which cells were lifted, and which were met besides."""

    __slots__ = ("known", "own", "met", "undo", "parent", "state")

    def __init__(self, cells: Iterable[Cell]) -> None:
        self.known = set(cells)
        self.own: dict[int, Any] = {}  # cells and modules made during the run, by id
        self.met: dict[int, tuple[Any, Cell]] = {}  # reached, but not lifted: (owner, cell)
        self.undo: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []  # what takes back changes to static parts
        self.parent = local.frame
        self.state: Any = None

    def touch(self, cell: Cell, owner: Any) -> None:
        if cell not in self.known and id(cell) not in self.own:
            if cell.kind == "gradient":
                raise TraceError(
                    "accumulated gradients were read or changed inside a loss function, which runs only while it is"
                    " traced. Call zero_grad(), accumulate() and grads() outside of it."
                )
            self.met.setdefault(id(cell), (owner, cell))


class _Local(threading.local):
    frame: Frame | None = None


local = _Local()


def read(cell: Cell, owner: Any = None) -> Any:
    """The value for a caller outside: it is theirs from now on, so it is never donated without a copy."""
    if local.frame is None:
        lend(cell)
    else:
        local.frame.touch(cell, owner)
    if cell.birth is not None and cell.kind == "gradient":
        cell.birth.dirty.pop(id(cell), None)
    return cell.value if cell.encoding is None else cell.encoding.decode(cell.value)


def check_writable(cell: Cell, label: str, owner: Any = None) -> None:
    """Raise unless a change of `cell` made here lasts: at top level, in a run of ours, or on a copy of this transform."""
    frame = local.frame
    if at_top_level():
        if frame is not None:  # only with `jax.disable_jit()`
            _note_write(frame, cell, owner)
        return
    state = trace_state()
    birth = cell.birth
    if birth is not None and birth.state == state:
        birth.dirty[id(cell)] = label
        return
    if frame is not None and frame.state == state:
        _note_write(frame, cell, owner)
        return
    raise changed_by_closure(label)


def changed_by_closure(label: str) -> TraceError:
    return TraceError(
        f"{label} was changed inside a JAX transform that it came into by closure (or from an outer transform): the"
        f" change would happen once, while tracing, and leave a tracer behind. {TWO_SPELLINGS}"
    )


def birth_state() -> Any:
    """The trace in which something static is made now: None outside of transforms."""
    return None if at_top_level() else trace_state()


def check_restructurable(birth: Any, label: str, what: str, own: bool = False) -> None:
    """Raise unless the structure of something made in trace `birth` (or, if `own`, in this very run) may change here."""
    if own or at_top_level() and local.frame is None:
        return
    if local.frame is not None and (at_top_level() or local.frame.state == trace_state()):
        raise TraceError(
            f"{label} {what} inside compiled code: the structure of a module cannot change while it runs. Declare it in"
            " `__init__`, or change it between calls."
        )
    if birth is None or birth != trace_state():
        raise changed_by_closure(label)


def _note_write(frame: Frame, cell: Cell, owner: Any) -> None:
    if cell not in frame.known and id(cell) not in frame.own:
        frame.touch(cell, owner)
        frame.undo.append((store, (cell, cell.value)))


def write(cell: Cell, value: Any, label: str, owner: Any = None) -> None:
    """Give `cell` a new value from outside. Shapes and dtypes have been checked by whoever knows the path."""
    check_writable(cell, label, owner)
    if isinstance(value, jax.core.Tracer) and at_top_level():
        raise TraceError(f"{label} was given a tracer of a JAX transform that has ended. {TWO_SPELLINGS}")
    if local.frame is None:
        lend(cell)
        if at_top_level() and getattr(cell.value, "sharding", None) != getattr(value, "sharding", None):
            structure_changed()  # compiled functions keep results where they were
    cell.value = value


def mark_used(cells: Iterable[Cell]) -> None:
    """These cells' values have been handed on (flattened), so a change of them is not lost."""
    for cell in cells:
        lend(cell)
        if cell.birth is not None:
            cell.birth.dirty.pop(id(cell), None)


def store_all(cells: Sequence[Cell], values: Iterable[Any]) -> None:
    """Store `values`, already computed, in one C call: all of them or, if the interrupt came first, none."""
    deque(map(store, cells, values), 0)


def clear(cells: Sequence[Cell]) -> None:
    """Set the cells to None (gradients: zeros) in one C call."""
    deque(map(store, cells, repeat(None)), 0)


def substituted(cells: Sequence[Cell], values: Sequence[Any], run: Callable[[], Any]) -> tuple[Any, list[Any], Frame]:
    """Run `run()` while `cells` hold `values`; give its result, the cells' values at the end, and the frame.

    The cells get their own values back whatever happens: each clean-up is a single C call in a `finally`, which no
    signal handler can come before.
    """
    frame = Frame(cells)
    restore: Any = partial(deque, map(store, cells, list(map(get_value, cells))), 0)
    leave = partial(setattr, local, "frame", frame.parent)
    failed = True
    try:
        frame.state = trace_state()
        local.frame = frame
        deque(map(store, cells, values), 0)
        out = run()
        new = list(map(get_value, cells))
        failed = False
    finally:
        try:
            restore()
        finally:
            try:
                if failed or frame.met:  # `met`: the run will be repeated with those cells lifted
                    deque(map(_call, reversed(frame.undo)), 0)
            finally:
                leave()
    return out, new, frame


def _call(undo: tuple[Callable[..., Any], tuple[Any, ...]]) -> None:
    undo[0](*undo[1])
