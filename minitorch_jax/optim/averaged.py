"""Averages of a model's parameters over the course of training."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..engine.sharding import follow
from ..engine.stateful_function import Cells, StatefulFunction, remembered
from ..engine.tracing import unaliased
from ..module.checks import as_number
from ..module.module import Module
from ..module.parameter import Buffer, counted, is_narrow, wide_dtype
from ..runtime import contexts
from ..state import access, dropped_copies
from ..state import frame as frames
from ..state.cell import Cell, get_value, is_concrete, store
from ..state.packed import stored_cells
from ..state.pytree import build
from ..state.static_values import describe, module_of, shown
from ..state.walk import Walk, walk_of


class _Averages(Module):
    """The averages of parameters of few bits, in float32, as buffers by the parameters' paths."""


class AveragedModel(Module):
    r"""A copy of a model whose parameters are averages of those that the model has had at each `update`.

    With `decay=None` of all equally (stochastic weight averaging), else exponentially (EMA); w̄ are the averages, n is
    the number of updates before, and the first one copies:

        w̄ ← w̄ + (w - w̄) / (n + 1)        decay=None
        w̄ ← w̄ + (1 - decay) (w - w̄)

    It is a Module: call it to evaluate, save its `state_dict()`. `update` works in eager code, where it is one compiled
    call, in `mt.jit` and `mt.scan`, and on copies in a plain JAX transform. The averages of bfloat16 and float16
    parameters are kept and added up in float32, as buffers `averages.…`; `module` has them in the model's dtype.

    Args:
        model: what to average; of it a copy is kept, and no more.
        decay: None, or a number in [0, 1].
        use_buffers: average floating buffers too, in place of taking over the model's.

    Attributes:
        module: the copy, with frozen parameters, which `update` alone changes.
        num_averaged: how many updates there have been; a buffer, shape `()`, int32.

    Raises:
        TypeError: if `model` is no Module.
        ValueError: if `decay` is out of its range, or `model` holds no parameter.

    Source: `torch.optim.swa_utils.AveragedModel`, with `get_ema_multi_avg_fn(decay)`; Izmailov et al., "Averaging Weights
    Leads to Wider Optima and Better Generalization", 2018.

    Differs from PyTorch: `update` is torch's `update_parameters`, and `num_averaged` its `n_averaged`. Averages of fewer
    than 32 bits lose no small changes. With `use_buffers`, buffers that are not floating (counts, keys) are taken over
    from the model, where torch averages and truncates them. Parameters of the copy are frozen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from minitorch_jax import nn, optim
        >>> model = nn.Linear(2, 1, key=jax.random.key(0))
        >>> averaged = optim.AveragedModel(model, decay=0.75)
        >>> for value in (0.0, 4.0):
        ...     model.bias = jnp.array([value])
        ...     averaged.update(model)
        >>> averaged.module.bias, int(averaged.num_averaged), averaged(jnp.ones((3, 2))).shape
        (Array([1.], dtype=float32), 2, (3, 1))
    """

    module: Module
    num_averaged: Any
    decay: float | None
    use_buffers: bool

    def __init__(self, model: Module, decay: float | None = None, use_buffers: bool = False) -> None:
        model = module_of(model)
        if not isinstance(model, Module):
            raise TypeError(f"AveragedModel takes a Module; got {shown(model)} ({type(model).__name__})")
        params = [(p, c) for p, c in zip(*_paths_and_cells(model), strict=True) if c.kind == "parameter"]
        if not params:
            raise ValueError(
                f"AveragedModel: the {type(model).__name__} holds no parameters, so there is nothing to average"
            )
        self.decay = None if decay is None else _checked(decay)
        self.use_buffers = bool(use_buffers)
        self.num_averaged = Buffer(jax.device_put(np.int32(0)))
        leaves = jax.tree.leaves(model)  # arrays are shared until the first update
        self.module = build(walk_of(model).spec, leaves, dropped_copies.birth_here()).freeze()
        self.averages = _Averages()
        for path, cell in params:
            if is_narrow(cell.value):
                setattr(self.averages, path, Buffer(cell.value.astype(jnp.float32)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the averaged model gives."""
        return self.module(*args, **kwargs)

    def update(self, model: Module) -> None:
        """Take the model's present parameters into the averages, in place: all of them, or none if it raises.

        Args:
            model: the model that is trained, of the structure that it had when it was given to the constructor. Modes
                (`train`, `eval`), static attributes and what is frozen may differ, as may floating dtypes and devices.

        Raises:
            TypeError: if `model` is no Module.
            ValueError: if its structure differs: the first difference, by its path.
        """
        model = module_of(model)
        if not isinstance(model, Module):
            raise TypeError(f"AveragedModel.update takes a Module; got {shown(model)} ({type(model).__name__})")
        weight = (
            1.0
            if self.decay is None
            else 1 - as_number("AveragedModel", "decay", self.decay, 0, 1, what="None or a number")
        )
        walks = walk_of(self), walk_of(model)
        plan: _Plan = remembered(walks, _Plan, partial(_Plan, self, model))
        if frames.is_eager():
            plan.update(walks, contexts.number(weight))
            return
        for cell in plan.source:
            if frames.local.frame is not None:
                frames.local.frame.touch(cell, model)
        for cell in plan.averages:
            access.check_writable(cell, _LABEL, self)
        _update(plan.averages, plan.source, np.float32(weight))


_LABEL = "an average of an AveragedModel"


class _How(NamedTuple):
    """What is averaged: static, and the same for many models."""

    counter: Any  # the encoding of the number of updates
    equally: bool  # whether all updates have the same weight
    is_averaged: tuple[bool, ...]  # of each parameter and buffer; else it is copied
    is_wide: tuple[bool, ...]  # whether its average is kept in float32 beside it
    dtypes: tuple[Any, ...]  # of the averages (JAX sees only those of arrays that are read)


class _Plan:
    """Which cells an update of an AveragedModel from a model is about, for as long as no structure changes."""

    def __init__(self, averaged: AveragedModel, model: Module) -> None:
        _check_same_structure(averaged.module, model)
        paths, held = _paths_and_cells(averaged.module)
        theirs = dict(walk_of(model).named())
        wide = [averaged.averages._cells.get(path) for path in paths]
        how = _How(
            averaged._cells["num_averaged"].encoding,
            averaged.decay is None,
            tuple([c.kind == "parameter" or (averaged.use_buffers and c.encoding is None) for c in held]),
            tuple([cell is not None for cell in wide]),
            tuple([getattr(cell.value, "dtype", None) for cell in held]),
        )
        self.held = held
        self.kept = [[c, *([] if w is None else [w])] for c, w in zip(held, wide, strict=True)]  # of each of the source
        self.averages = Cells([averaged._cells["num_averaged"], *held, *(c for c in wide if c is not None)], how)
        self.source = Cells([theirs[path] for path in paths], paths=paths)
        self.moved: Cells | None = None  # stand for the source's cells where these are on other devices
        self.stamps: tuple[Any, Any] = None, None  # of both when their devices were looked at
        self.places = list(map(_place_of, self.source))  # where the source lay then

    def update(self, walks: tuple[Walk, Walk], weight: Any) -> None:
        """Update outside of traces."""
        mine, theirs = self.stamps
        if walks[0].stamps is not mine or walks[1].stamps is not theirs:  # something may have been moved
            self._follow()
            self.stamps = walks[0].stamps, walks[1].stamps
            elsewhere = _devices(self.source) != _devices(self.held)
            self.moved = Cells([Cell(None, "moved") for _ in self.source]) if elsewhere else None
        if self.moved is None:
            _update(self.averages, self.source, weight)
            return
        try:
            for cell, theirs, mine in zip(self.moved, self.source, self.held, strict=True):
                store(cell, jax.device_put(theirs.value, mine.value.sharding))
            _update(self.averages, self.moved, weight)
        finally:
            for cell in self.moved:
                store(cell, None)

    def _follow(self) -> None:
        """Have averages follow what was moved since, or what is bound to devices as they are not. Others stay in place."""
        before, self.places = self.places, list(map(_place_of, self.source))
        for cell, kept, was, now in zip(self.source, self.kept, before, self.places, strict=True):
            if now is not None and (now != was or not all([_place_of(own) for own in kept])):
                follow(cell, [*kept, self.averages.cells[0]])


def _place_of(cell: Cell) -> Any:
    """The sharding of a cell's array, or None if it is bound to no device."""
    return cell.value.sharding if is_concrete(cell.value) and cell.value.committed else None


@StatefulFunction
def _update(averages: Cells, source: Cells, weight: Any) -> None:
    """Take the source's values into the number of updates, the parameters and buffers, and the averages in float32."""
    how: _How = averages.about
    before, values = list(map(get_value, averages)), list(map(get_value, source))
    with contexts.full_width(before):
        count = how.counter.decode(before[0])
        mine, wide = before[1 : 1 + len(values)], iter(before[1 + len(values) :])
        new, new_wide = [], []
        for old, value, averaged, has_wide in zip(mine, values, how.is_averaged, how.is_wide, strict=True):
            if has_wide:
                kept = next(wide)
                at = jnp.where(kept.astype(old.dtype) == old, kept, old.astype(kept.dtype))  # unless it was assigned
                new_wide.append(_averaged(at, value, count, None if how.equally else weight))
                new.append(new_wide[-1].astype(old.dtype))
            elif averaged:
                new.append(_averaged(old, value, count, None if how.equally else weight))
            else:
                new.append(value.astype(old.dtype))
        changed = [how.counter.encode(counted(count), before[0]), *new, *new_wide]
        for cell, value in zip(averages, unaliased(changed, [*before, *values]), strict=True):
            access.write(cell, value, _LABEL)


def _averaged(average: Any, value: Any, count: Any, weight: Any) -> Any:
    """The new average, computed in at least float32; `weight` of the new value, None for an equal one."""
    dtype = wide_dtype(average.dtype)
    a, b = average.astype(dtype), value.astype(dtype)
    if weight is None:
        new = a + (b - a) / (count.astype(dtype) + 1)
    else:
        w = jnp.asarray(weight, dtype)
        new = jnp.where(w < 0.5, a + w * (b - a), b - (b - a) * (1 - w))  # as torch.lerp
    return jnp.where(count == 0, b, new).astype(average.dtype)


# -- structures --------------------------------------------------------------------------------------------------------


def _paths_and_cells(model: Module) -> tuple[tuple[str, ...], list[Cell]]:
    walk = walk_of(model)
    return walk.spec.paths, walk.cells


def _check_same_structure(mine: Module, theirs: Module) -> None:
    """Raise for the first difference: names, kinds, shapes, dtypes, and what is tied to what."""
    found, given = _entries(mine), _entries(theirs)
    name = type(theirs).__name__
    for path, (cell, first) in found.items():
        if path not in given:
            raise _differs(name, f"it has no {path}")
        other, other_first = given[path]
        old, new = describe(cell.value), describe(other.value)
        both_floating = cell.encoding is None and other.encoding is None
        if (cell.kind, cell.encoding) != (other.kind, other.encoding):
            raise _differs(name, f"its {path} is a {other.kind} ({new}), and the average's a {cell.kind} ({old})")
        if np.shape(cell.value) != np.shape(other.value) or not (both_floating or old == new):
            raise _differs(name, f"its {path} is {new}, and the average's {old}")
        if first != other_first:
            ties = [f"tied to {tie}" if tie != path else "not tied" for tie in (other_first, first)]
            raise _differs(name, f"its {path} is {ties[0]}, and the average's {ties[1]}")
    for path in given:
        if path not in found:
            raise _differs(name, f"its {path} is new")


def _differs(name: str, difference: str) -> ValueError:
    return ValueError(
        f"AveragedModel.update: the {name} has another structure than the model that is averaged: {difference}. Give it"
        " that model, or make a new AveragedModel"
    )


def _entries(model: Module) -> dict[str, tuple[Cell, str]]:
    """Each parameter and buffer by each of its names, with the first of them."""
    firsts: dict[Cell, str] = {}
    return {path: (cell, firsts.setdefault(cell, path)) for path, _, _, cell in model._entries()}


def _devices(held: Iterable[Cell]) -> set[Any]:
    arrays = [cell.value for cell in stored_cells(list(held))]
    return {device for array in arrays if isinstance(array, jax.Array) for device in array.sharding.device_set}


def _checked(decay: Any) -> float:
    return as_number("AveragedModel", "decay", decay, 0, 1, what="None or a number")
