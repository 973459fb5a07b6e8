"""The one thing that changes over time: a cell.

A parameter, a buffer, a gradient, an optimizer's state, its step counts and hyperparameters, a random stream: each is a
`Cell` holding one value. Modules and optimizers are trees of cells and static values, and nothing else keeps arrays,
so the hard questions are answered once: who may read and change a cell (`read`, `write`), what happens when code runs with
tracers in place of the values (`substituted`), and what a copy made inside a JAX transform has to say when its changes are
dropped (`Birth`). When a cell's buffer may be donated, and how results are stored, is in `pipeline.py`.
"""

from __future__ import annotations

import gc
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from operator import attrgetter
from typing import Any
from weakref import WeakValueDictionary

import jax
import jax.numpy as jnp
import numpy as np

from .encoding import Encoding, from_halves
from .jax_private import at_top_level as at_top_level
from .jax_private import trace_state
from .lending import gradients as gradients
from .lending import lend as lend
from .lending import lendings as lendings
from .lending import overridden, overrides, taken
from .lending import using as using
from .memory import owned

TWO_SPELLINGS = (
    "Either pass it in and return it (`return opt, loss` in `step`): `opt, loss = jax.jit(step)(opt, x, y)`; or compile"
    " the stateful code with `mt.jit(step)`, which keeps what it changes."
)
_DRAWN = (
    "a random number was drawn inside a JAX transform (by a random layer, or a constructor without `key=`) from a stream"
    " outside of it: that would advance only while tracing, so every run would draw the same numbers. Pass a key"
    " to the transformed function, such as `mt.next_key()` or `jax.random.key(0)`, and draw from that: `with"
    " mt.rng(key): ...`, or `nn.Linear(3, 2, key=key)`; or compile the stateful code with `mt.jit`."
)


class TraceError(RuntimeError):
    """A module, optimizer or random stream was changed where JAX would silently forget the change."""


class DroppedUpdateWarning(UserWarning):
    """A copy made inside a JAX transform was changed, and then neither returned nor handed on."""


# ---------------------------------------------------------------------------------------------------------------------
# Which trace are we in?


def is_eager() -> bool:
    """Whether the code that calls runs eagerly: in no JAX transform, and in nothing that `mt.jit` or `backward` traces."""
    return at_top_level() and local.frame is None


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


# ---------------------------------------------------------------------------------------------------------------------
# Gradients that are not there


class _Consumed:
    """Stands for a gradient that a compiled function computed, used up in an optimizer's step, and did not give out."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "CONSUMED"

    def __reduce__(self) -> str:
        return "CONSUMED"


CONSUMED = _Consumed()
jax.tree_util.register_pytree_node(_Consumed, lambda _: ((), None), lambda *_: CONSUMED)


class Unread:
    """What stands for a gradient in a compiled function until that writes it: its value, and who looked at it."""

    __slots__ = ("value", "frame")

    def __init__(self, value: Any, frame: Frame) -> None:
        self.value, self.frame = value, frame


def gradient(cell: Cell) -> Any:
    """The gradient that a cell holds: an array, or None for zeros."""
    value = cell.value
    if type(value) is Unread:
        value.frame.observed.add(cell)
        value = value.value
    return unless_consumed(value)


def unless_consumed(value: Any) -> Any:
    """A gradient's value, or the error that says that it is not there any more."""
    if value is CONSUMED:
        raise RuntimeError(
            "this gradient was computed inside a function compiled by mt.jit (or mt.scan) and used up there by"
            " opt.step(); to give every gradient out would cost time and memory at each call. Return what you need from"
            " the function, or compile it with `mt.jit(keep_grads=True)`; to go on from here, call zero_grad() first."
        )
    return value


def added(before: Any, new: Any) -> Any:
    """The sum of a gradient's value (None for zeros) and another one."""
    return new if unless_consumed(before) is None else before + new


def held(cell: Cell) -> Any:
    """What a cell holds, for another run to begin with."""
    value = cell.value
    return value.value if type(value) is Unread else value


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


class _Registry:
    __slots__ = ("cells",)

    def __init__(self) -> None:
        self.cells: WeakValueDictionary[int, Cell] | None = None  # by id; None until somebody asks, as most never do


_registry = _Registry()


def all_cells() -> list[Cell]:
    """Every cell that there is."""
    if _registry.cells is None:
        _registry.cells = WeakValueDictionary()
        _registry.cells.update({id(found): found for found in gc.get_objects() if isinstance(found, Cell)})
    return [cell for reference in _registry.cells.valuerefs() if (cell := reference()) is not None]


class Cell:
    """One value that changes over time.

    `stored` is a `jax.Array`, `None` for a gradient of zeros that was never written, `CONSUMED` for one that stayed inside
    a compiled function, or whatever leaf `jax.tree.map` put there. `value` is the same, but for code that this thread runs
    with another value in its place (`Frame`): that never comes into the cell, so no other thread meets it, and an
    exception or a Ctrl-C leaves nothing to be taken out again. `lent` says that someone outside may hold the array's
    buffer, so that it must be copied before it is donated. (The reference count of the array would not tell:
    `jax.device_put` and others give new array objects that share the buffer, and die with it.)
    """

    __slots__ = (
        "stored",
        "lent",
        "kind",
        "trainable",
        "grad",
        "encoding",
        "birth",
        "reached",
        "pack",
        "unseen",
        "__weakref__",
    )

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
        self.stored = value
        self.lent = lent
        self.kind = kind
        self.trainable = trainable
        self.encoding = encoding
        self.birth = birth
        self.reached = False  # of a gradient: whether any loss has ever given one
        self.unseen = encoding is not None  # whether nobody has looked yet if its floats stand for a value
        self.pack: Any = None  # the Pack that holds its value, if it is a view of one
        self.grad: Any = Cell(None, "gradient", birth=birth) if kind == "parameter" else None
        frame = local.frame
        if frame is not None:
            frame.own[id(self)] = self
        if _registry.cells is not None:
            _registry.cells[id(self)] = self

    @property
    def value(self) -> Any:
        """What code that runs in this thread sees, and changes by assigning."""
        frame = _frame_of(self)
        if frame is None:
            return overridden(self) if overrides else self.stored
        return frame.values[self]

    @value.setter
    def value(self, new: Any) -> None:
        if not _substitute(self, new):
            on_failure(setattr, self, "stored", self.stored)
            self.stored = new

    def __deepcopy__(self, memo: dict[int, Any]) -> Cell:
        """A new cell with a copy of the array: neither shares a buffer that someone may donate."""
        value = using(self, _copied)
        new = Cell(value, self.kind, trainable=self.trainable, encoding=self.encoding, birth=birth_here())
        memo[id(self)] = new
        if self.grad is not None and new.grad is not None:
            new.grad.value = CONSUMED if held(self.grad) is CONSUMED else using(self.grad, _copied_gradient)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored_cell, (using(self, _to_numpy), self.kind, self.trainable, self.encoding), self._grad_state()

    def _grad_state(self) -> Any:
        grad = None if self.grad is None else using(self.grad, _to_numpy)
        return None if grad is None else (grad,)

    def __setstate__(self, state: tuple[Any]) -> None:
        if self.grad is not None:
            with full_width(state), constants():
                self.grad.value = state[0] if state[0] is CONSUMED else jnp.array(owned(state[0]))

    def __repr__(self) -> str:
        return f"Cell({self.kind}, {self.value!r})"


def is_concrete(value: Any) -> bool:
    """Whether a value is an array of JAX's that is there, not a traced one."""
    return isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer)


def full_width(values: Iterable[Any]) -> AbstractContextManager[Any]:
    """A context in which float64 stays what it is, if some value is of it: JAX makes float32 of it outside of x64 mode."""
    wide = any([getattr(value, "dtype", None) in (np.float64, np.complex128) for value in values])
    return jax.enable_x64(True) if wide else nullcontext()


def constants() -> AbstractContextManager[Any]:
    """Around eager code of ours that brings numbers of its own to a device or back, for users of `jax.transfer_guard`."""
    config: Any = jax.config
    guards = config.jax_transfer_guard_host_to_device, config.jax_transfer_guard_device_to_host
    return nullcontext() if guards == (None, None) else jax.transfer_guard("allow")


def _copied(value: Any) -> Any:
    return jnp.copy(value) if isinstance(value, jax.Array) and at_top_level() else value


def _copied_gradient(value: Any) -> Any:
    return _copied(unless_consumed(value))


def _to_numpy(value: Any) -> Any:
    return np.asarray(value) if isinstance(value, jax.Array) else value


def _restored_cell(value: Any, kind: str, trainable: bool, encoding: Encoding | None) -> Cell:
    with full_width([value]), constants():
        value = jnp.array(owned(value)) if isinstance(value, np.ndarray) else value
    return Cell(value, kind, trainable=trainable, encoding=encoding)


def _unpickle_cell(value: Any, kind: str, trainable: bool, encoding: Encoding | None) -> Cell:
    """A cell of a pickle that was written when floats stood for 16 bits each."""
    if encoding is not None and isinstance(value, np.ndarray):
        value = np.asarray(from_halves(encoding, value))
    return _restored_cell(value, kind, trainable, encoding)


get_value = attrgetter("value")
get_stored = attrgetter("stored")  # the quick one, for code that no Frame can be around
store: Callable[[Cell, Any], None] = vars(Cell)["stored"].__set__  # the C slot setter


Undo = tuple[Callable[..., Any], tuple[Any, ...]]


class Frame:
    """One run of stateful code with tracers in place of values: those of the lifted cells, and which cells were met besides.

    In the run of a loss function no gradient may be touched; with `gradients`, they are lifted too.
    """

    __slots__ = ("values", "own", "met", "undo", "parent", "state", "gradients", "observed", "consumed", "statics")

    def __init__(self, values: dict[Cell, Any], gradients: bool = False) -> None:
        self.values = values  # of lifted cells, and of others that were changed
        self.own: dict[int, Any] = {}  # cells and modules made during the run, by id
        self.met: dict[int, tuple[Any, Cell]] = {}  # reached, but not lifted: (owner, cell)
        self.undo: list[Undo] = []  # what takes back changes to static parts
        self.statics: list[tuple[Any, str, Any]] = []  # which those were: (module, attribute, value before)
        self.parent = local.frame
        self.state: Any = None
        self.gradients = gradients
        self.observed: set[Cell] = set()  # gradients looked at before they were written
        self.consumed: dict[Cell, Any] = {}  # gradients that an optimizer's step has used

    def touch(self, cell: Cell, owner: Any) -> None:
        if cell not in self.values and id(cell) not in self.own:
            if cell.kind == "gradient" and not self.gradients:
                raise TraceError(
                    "accumulated gradients were read or changed inside a loss function, which runs only while it is"
                    " traced. Call zero_grad(), accumulate() and grads() outside of it."
                )
            self.met.setdefault(id(cell), (owner, cell))


class _Local(threading.local):
    frame: Frame | None = None
    undo: list[Undo] | None = None  # what takes back changes outside of frames, in a block that is all or nothing


local = _Local()


def on_failure(function: Callable[..., Any], *args: Any) -> None:
    """Have a change taken back by `function(*args)` if the block around it (see `undo.py`) raises."""
    if local.undo is not None:
        local.undo.append((function, args))


def _frame_of(cell: Cell) -> Frame | None:
    """The innermost run of this thread that has a value in place of the cell's own."""
    frame = local.frame
    while frame is not None and cell not in frame.values:
        frame = frame.parent
    return frame


def _substitute(cell: Cell, new: Any) -> bool:
    """Change the value that stands in place of the cell's own in this thread, if one does."""
    frame = _frame_of(cell)
    if frame is not None:
        frame.values[cell] = new
    return frame is not None


def is_foreign(cell: Cell) -> bool:
    """Whether code of ours is being traced that has not been told of the cell: it sees what the cell itself holds."""
    frame = local.frame
    return frame is not None and id(cell) not in frame.own and _frame_of(cell) is None


def is_lifted(cell: Cell) -> bool:
    """Whether code of ours is being traced in which the cell is not new: what is done besides writing it is not repeated."""
    frame = local.frame
    return frame is not None and id(cell) not in frame.own


def read(cell: Cell, owner: Any = None) -> Any:
    """The value for a caller outside: it is theirs from now on, so it is never donated without a copy."""
    frame = local.frame
    if frame is not None:
        frame.touch(cell, owner)
    if cell.kind == "gradient":
        if cell.birth is not None:
            cell.birth.dirty.pop(id(cell), None)
        return unless_consumed(taken(cell)) if frame is None else gradient(cell)
    value = taken(cell) if frame is None else cell.value
    if cell.encoding is None:
        return value
    if cell.unseen:
        names = getattr(owner, "_cells", {}).items()
        name = next((name for name, mine in names if mine is cell), "a buffer")
        check_encoded(cell, value, f"{type(owner).__name__}.{name}")
    return cell.encoding.decode(value)


def check_encoded(cell: Cell, value: Any, label: str) -> None:
    """Raise ValueError if the floats of a cell stand for no value, as after a map over leaves that computes with them."""
    encoding: Any = cell.encoding
    problem = encoding.problem(value)
    if problem is not None:
        raise ValueError(
            f"{label} is {encoding.dtype}, which a module's pytree keeps as floats: {problem}."
            " Maps over all leaves of a module may cast them to float16, bfloat16 or wider, and copy them; compute with"
            " parameters alone (`model.parameters()`), or use `model.astype(dtype)`."
        )
    cell.unseen = not is_concrete(value)


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
        if id(cell) not in birth.dirty:
            on_failure(birth.dirty.pop, id(cell), None)
        birth.dirty[id(cell)] = label
        return
    if frame is not None and frame.state == state:
        _note_write(frame, cell, owner)
        return
    raise TraceError(_DRAWN) if cell.kind == "stream" else changed_by_closure(label)


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
    if own or is_eager():
        return
    if local.frame is not None and (at_top_level() or local.frame.state == trace_state()):
        raise TraceError(
            f"{label} {what} inside compiled code: the structure of a module cannot change while it runs. Declare it in"
            " `__init__`, or change it between calls."
        )
    if birth is None or birth != trace_state():
        raise changed_by_closure(label)


def _note_write(frame: Frame, cell: Cell, owner: Any) -> None:
    if cell not in frame.values and id(cell) not in frame.own:
        frame.touch(cell, owner)
        frame.values[cell] = cell.value  # from here on; the run will be repeated with the cell lifted


def write(cell: Cell, value: Any, label: str, owner: Any = None) -> None:
    """Give `cell` a new value from outside. Shapes and dtypes have been checked by whoever knows the path."""
    check_writable(cell, label, owner)
    if isinstance(value, jax.core.Tracer) and at_top_level():
        raise TraceError(f"{label} was given a tracer of a JAX transform that has ended. {TWO_SPELLINGS}")
    if local.frame is None:
        lend(cell)
        gradients.last = object()
        if at_top_level() and getattr(cell.value, "sharding", None) != getattr(value, "sharding", None):
            structure_changed()  # compiled functions keep results where they were
    cell.value = value


def mark_used(cells: Iterable[Cell]) -> None:
    """These cells' values have been handed on (flattened), so a change of them is not lost."""
    for cell in cells:
        lend(cell)
        if cell.birth is not None:
            cell.birth.dirty.pop(id(cell), None)


def store_all(cells: Sequence[Cell], values: Sequence[Any]) -> None:
    """Store `values`, already computed, in one C call: all of them or, if the interrupt came first, none."""
    gradients.last = object()
    if local.frame is not None:
        left = [(cell, value) for cell, value in zip(cells, values, strict=True) if not _substitute(cell, value)]
        cells, values = [cell for cell, _ in left], [value for _, value in left]
    if any([cell.pack is not None for cell in cells]):
        cells, values = _into_packs(cells, values)
    for cell in cells if local.undo is not None else ():
        on_failure(setattr, cell, "stored", cell.stored)
    before = list(map(get_stored, cells))  # freeing an array lets other threads in: not before all are stored
    deque(map(store, cells, values), 0)
    del before


def _into_packs(cells: Sequence[Cell], values: Sequence[Any]) -> tuple[list[Cell], list[Any]]:
    """For views, their packed cells with new values."""
    plain: list[tuple[Cell, Any]] = []
    packed: dict[Any, list[tuple[Cell, Any]]] = {}
    for cell, value in zip(cells, values, strict=True):
        if cell.pack is not None:
            sharding = getattr(value, "sharding", None)
            if sharding is not None and sharding != getattr(cell.pack.cell.stored, "sharding", sharding):
                cell.pack.release_both(cell)  # its array lies elsewhere from now on
            else:
                packed.setdefault(cell.pack, []).append((cell, value))
                continue
        plain.append((cell, value))
    for pack in [pack for pack, new in packed.items() if pack.splits(new)]:
        pack.dissolve()
        plain += packed.pop(pack)
    plain += [(pack.cell, pack.with_parts(new)) for pack, new in packed.items()]
    return [cell for cell, _ in plain], [value for _, value in plain]


def substituted(
    cells: Sequence[Cell], values: Sequence[Any], run: Callable[[Frame], Any], gradients: bool = False
) -> tuple[Any, list[Any], Frame]:
    """Run `run(frame)` while `values` stand in place of the cells'; give its result, the values at the end, and the frame."""
    frame = Frame(dict(zip(cells, values, strict=True)), gradients)
    leave = partial(setattr, local, "frame", frame.parent)
    failed = True
    try:
        frame.state = trace_state()
        local.frame = frame
        out = run(frame)
        new = [frame.values[cell] for cell in cells]
        if frame.parent is not None:
            frame.parent.own.update(frame.own)  # what was made in this run is no stranger to the one around it
            frame.parent.undo += frame.undo
            frame.parent.statics += frame.statics
        failed = False
    finally:  # each step of it is a single C call, which no signal handler can come before
        try:
            leave()
        finally:
            frame.values.clear()  # or a cycle of references would keep the cells alive
            if failed or frame.met:  # `met`: the run will be repeated with those cells lifted
                deque(map(call_undo, reversed(frame.undo)), 0)
    return out, new, frame


def call_undo(undo: Undo) -> None:
    """Take one change back."""
    undo[0](*undo[1])
