"""What a step of an optimizer computes: its rule, lifted from one array to all of them, and the step itself.

A step is a stateful function of the engine: one program per structure in eager code, part of what is traced elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..clipping import norm
from ..engine.names.libraries import is_users_code
from ..engine.sharding import Placement, constrained
from ..engine.stateful_function import Cells, StatefulFunction
from ..module import anomaly
from ..module.parameter import wide_dtype
from ..runtime import contexts
from ..runtime.bounded_cache import Kept
from ..state import access
from ..state import frame as frames
from ..state.cell import Cell, get_value
from ..state.gradient import gradient, unless_consumed
from ..state.packed import padded
from .blocks import in_blocks
from .number_vector import VectorLayout, complement
from .packed_parameters import without_padding
from .rounding import Part, Rounding, place_of, rounds

LAST = int(np.iinfo(np.int32).max)  # where the counts of steps stay


class Master(NamedTuple):
    """The state of a parameter of few bits whose value is kept in float32 beside it."""

    master_weight: Any
    rule_state: Any


class Settings(NamedTuple):
    """What a program knows of a group: its rule, its flags, its schedules, and where in the vector its numbers are."""

    rule: Any  # a class of optimizers; that of a rule of all parameters at once is not asked
    flags: tuple[tuple[str, Any], ...]
    schedules: tuple[tuple[str, Any], ...]
    layout: VectorLayout
    start: int

    @property
    def rounds(self) -> bool:
        """Whether the group's state is rounded stochastically."""
        return rounds(dict(self.flags))

    def decayed(self, shapes: tuple[tuple[int, ...], ...], size: int | None = None) -> Any:
        """Of an array made of parameters of these shapes, what weight decay is multiplied by; None for all of it.

        `size`: of a packed one, where its padding begins.
        """
        if not dict(self.flags)["decay_matrices_only"]:
            return None
        parts = [(int(np.prod(shape)), len(shape) >= 2) for shape in shapes]
        if size is not None:  # padding is as what it comes after, so that one number may do for all
            parts.append((padded(size) - size, parts[-1][1]))
        return tuple(parts)

    def numbers(self, values: Any, num_steps: Any) -> dict[str, Any]:
        """The numbers by name: scalars, or tuples of them; as `one_minus` 1 minus each, exact where one is nearly 1."""
        found: dict[str, Any] = {}
        rests: dict[str, Any] = {}
        half = values.shape[0] // 2
        for name, start, length in self.layout:
            places = range(self.start + start, self.start + start + max(length, 1))
            numbers, lost = tuple([values[i] for i in places]), tuple([values[half + i] for i in places])
            found[name], rests[name] = (numbers, lost) if length else (numbers[0], lost[0])
        for name, schedule in self.schedules:
            found[name] = jax.tree.map(jnp.asarray, schedule(num_steps))
            rests[name] = jax.tree.map(jnp.zeros_like, found[name])
        return found | {"one_minus": jax.tree.map(complement, found, rests)}


# -- all arrays of an optimizer ----------------------------------------------------------------------------------------


class Each(NamedTuple):
    """What an update knows of one array: a parameter, or several in one."""

    state: Any  # the structure of the rule's state
    positions: tuple[int, ...]  # of its parameters' step counts
    clock: int  # the position of the first parameter that has taken as many steps
    group: int
    decayed: Any  # see `Settings.decayed`
    size: int | None  # of a packed one, where its padding begins, if that is to be left out
    parts: tuple[Part, ...] = ()  # of one whose state is rounded stochastically: what its noise depends on


@dataclass(frozen=True)
class Update:
    """`(owned, gradients, hyperparameters) -> owned`: a rule on one array, lifted to all of an optimizer's.

    `owned` are parameters, states, what is kept for all parameters, and step counts, in this order. Equal updates share
    a program.
    """

    rule: Any  # the optimizer's class, or the Form of a rule of all parameters at once
    settings: tuple[Settings, ...]  # of each group
    num_native: int  # how many arrays are cells' own; NumPy's come after these
    arrays: tuple[Each, ...]
    num_steps: int  # the position of the number of steps taken
    places: Placement

    def __call__(
        self,
        owned: Sequence[Any],
        grads: Sequence[Any],
        values: Any,
        foreign: Sequence[Any] = (),
        foreign_grads: Sequence[Any] = (),
        extra: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """The new values of what is owned, then those of `foreign`. A gradient of None stands for zeros."""
        with contexts.full_width(owned):
            params = [*owned[: self.num_native], *foreign]
            grads = [*map(unless_consumed, grads), *foreign_grads]
            return self._computed(params, owned[self.num_native :], grads, values, extra or {})

    def _computed(
        self, params: list[Any], rest: Sequence[Any], grads: list[Any], values: Any, extra: Mapping[str, Any]
    ) -> list[Any]:
        skips, tracks = self._any("skip_nonfinite"), self._any("track_grad_norm")
        finite: Any = None
        if skips or tracks:
            finite = jnp.stack([jnp.isfinite(g).all() for g in grads if g is not None] or [jnp.array(True)]).all()
        *kept, steps = rest
        seeds = [kept.pop()] if self.rounds() else []
        kept = kept[:-1] if tracks else kept
        held = iter(kept)
        states = [each.state.unflatten([next(held) for _ in range(each.state.num_leaves)]) for each in self.arrays]
        if isinstance(self.rule, type):
            kept_if = finite if skips else None
            new_params, new_kept = self._one_by_one(params, grads, states, jnp.asarray(values), steps, kept_if, seeds)
        else:
            shared = dict(zip(self.rule.shared_names, held, strict=True))
            new_params, new_kept = self.rule.update(params, grads, states, shared, extra)
            if skips:
                new_params = [jnp.where(finite, new, old) for new, old in zip(new_params, params, strict=True)]
                new_kept = [jnp.where(finite, new, old) for new, old in zip(new_kept, kept, strict=True)]
        ticks = np.zeros(self.num_steps + 2, np.int32)
        ticks[[*(i for each in self.arrays for i in each.positions), self.num_steps]] = 1
        new_steps = jnp.minimum(steps, LAST - ticks) + ticks
        if skips:
            skip = np.zeros_like(ticks)
            skip[self.num_steps + 1] = 1
            new_steps = jnp.where(finite, new_steps, jnp.minimum(steps, LAST - skip) + skip)
        seen = [jnp.stack([norm(grads).astype(jnp.float32), finite.astype(jnp.float32)])] if tracks else []
        out = [*new_params[: self.num_native], *new_kept, *seen, *seeds, new_steps]
        if self.places:
            out = [constrained(value, place) for value, place in zip(out, self.places, strict=True)]
        return [*out, *new_params[self.num_native :]]

    def _any(self, flag: str) -> bool:
        return any(dict(group.flags)[flag] for group in self.settings)

    def _overwrites(self) -> bool:
        """Whether large arrays may be written in place: donated ones, as the engine's are, on the only device.

        Not in a program with a loss, which reads the parameters, too: XLA would copy them before they are overwritten.
        """
        frame = frames.local.frame
        alone = frame is not None and frame.parent is None and not frame.losses
        return alone and not self.places and jax.device_count() == 1

    def rounds(self) -> bool:
        """Whether a state is rounded stochastically."""
        return any(group.rounds for group in self.settings)

    def _one_by_one(
        self,
        params: Sequence[Any],
        grads: Sequence[Any],
        states: Sequence[Any],
        values: Any,
        steps: Any,
        finite: Any,
        seeds: Sequence[Any],
    ) -> tuple[list[Any], list[Any]]:
        """The rule on each array: new parameters, and the leaves of their states."""
        numbers = [group.numbers(values, steps[self.num_steps]) for group in self.settings]
        clocks = {each.clock: jnp.minimum(steps[each.clock], LAST - 1) + 1 for each in self.arrays}
        overwrites = self._overwrites()
        rules = {(group.rule, group.flags): _jitted(group.rule, group.flags, overwrites) for group in self.settings}
        new_params, new_states = [], []
        for p, g, s, each in zip(params, grads, states, self.arrays, strict=True):
            mine = numbers[each.group] | masked_decay(numbers[each.group], each.decayed)
            rule = rules[self.settings[each.group][:2]]
            if each.size is not None:
                rule = without_padding(rule, each.size)
            noise = (*seeds, place_of(each.parts, p.size)) if each.parts else ()
            new_p, new_s = rule(p, g, s, mine, clocks[each.clock], finite, *noise)
            new_params.append(new_p)
            new_states += jax.tree.leaves(new_s)
        return new_params, new_states


# -- a step ------------------------------------------------------------------------------------------------------------


class StepCells(Cells):
    """The cells of a step: those that an update (`about`) owns, the gradients, and the hyperparameters."""

    __slots__ = ()
    about: Update

    def __init__(self, update: Update, owned: Sequence[Cell], grads: Sequence[Cell], hyper: Cell) -> None:
        super().__init__([*owned, *grads, hyper], update)

    @property
    def owned(self) -> list[Cell]:
        return self.cells[: -1 - self.about.num_native]

    @property
    def grads(self) -> list[Cell]:
        return self.cells[-1 - self.about.num_native : -1]

    def _followed_classes(self) -> tuple[Any, ...]:
        rules = dict.fromkeys([self.about.rule, *(group.rule for group in self.about.settings)])
        return tuple([rule if is_users_code(rule) else type(self) for rule in rules])

    def _follows(self) -> Iterator[tuple[str, Any]]:
        for group in self.about.settings:
            yield from group.schedules


def take_step(
    cells: StepCells,
    extra: Mapping[str, Any] | None = None,
    foreign: Sequence[Any] = (),
    foreign_grads: Sequence[Any] = (),
    values: Any = None,
) -> list[Any]:
    """Update the cells, from `values` of the hyperparameters or those that there are; gives the new `foreign` arrays."""
    update, owned = cells.about, cells.owned
    grads = list(map(gradient, cells.grads))
    values = cells.cells[-1].value if values is None else values
    before = list(map(get_value, owned))
    new = update(before, grads, values, foreign, foreign_grads, extra)
    if anomaly.local.on:
        anomaly.check_step(f"{update.rule.__name__}.step()", owned[: update.num_native], before, new, grads)
    for cell, value in zip(owned, new, strict=False):
        access.write(cell, value, f"{cell.kind} updated by {update.rule.__name__}.step()")
    frame = frames.local.frame
    if frame is not None:
        frame.consumed.update(zip(cells.grads, grads, strict=True))
    return new[len(owned) :]


_steps = Kept()


def step_function(update: Update) -> StatefulFunction:
    """Return the step that optimizers of one rule and equal settings share. Others may read other values by name."""
    key = update.rule, update.settings
    found: StatefulFunction | None = _steps.get(key)
    return found or _steps.set(key, StatefulFunction(take_step, f"{update.rule.__name__}_step"))


def forget_older(cls: type) -> None:
    """Drop what was compiled for an earlier class of the same name: the code that defines it was run again."""
    names = cls.__module__, cls.__qualname__

    def is_older(entry: Any) -> bool:
        first, settings = entry.key
        rules = [rule for rule in (first, *(group[0] for group in settings)) if isinstance(rule, type)]
        return any([rule is not cls and (rule.__module__, rule.__qualname__) == names for rule in rules])

    _steps.drop(is_older)


# -- one array ---------------------------------------------------------------------------------------------------------


def masked_decay(numbers: dict[str, Any], decayed: Any) -> dict[str, Any]:
    """The weight decay of an array of which some parts may have none."""
    if decayed is None or "weight_decay" not in numbers:
        return {}
    sizes, chosen = zip(*decayed, strict=True)
    decay = numbers["weight_decay"]
    if len(set(chosen)) > 1:
        return {"weight_decay": decay * np.repeat(np.asarray(chosen, decay.dtype), sizes)}
    return {"weight_decay": decay if chosen[0] else jnp.zeros_like(decay)}


def _jitted(rule: Any, flags: tuple[tuple[str, Any], ...], overwrites: bool) -> Callable[..., tuple[Any, Any]]:
    """A rule's update of one array; jitted, so that a trace goes through it once for all arrays of a shape.

    It is `(parameter, gradient, state, numbers, t, finite, *noise)`. If `finite` is False, and not None, nothing changes.
    `overwrites`: whether it may write into the parameter and the state, by blocks.
    """

    def update(p: Any, g: Any, s: Any, numbers: dict[str, Any], t: Any, finite: Any, *noise: Any) -> tuple[Any, Any]:
        new = lifted(rule, p, g, s, numbers, dict(flags), t, *noise)
        return new if finite is None else jax.tree.map(partial(jnp.where, finite), new, (p, s))

    chosen = in_blocks(update, rule.elementwise) if overwrites else update
    chosen.__name__ = rule.__name__
    return jax.jit(chosen)


def lifted(
    rule: Any, p: Any, g: Any, s: Any, numbers: dict[str, Any], flags: dict[str, Any], t: Any, *noise: Any
) -> tuple[Any, Any]:
    """One parameter's update, computed in at least float32, with the dtypes that went in.

    `noise`: for a state that is rounded stochastically, a seed and `rounding.place_of` the parameter.
    """
    dtype = wide_dtype(p.dtype)
    if isinstance(s, Master):  # unless the parameter has been given another value since
        same = s.master_weight.astype(p.dtype) == p
        master = jnp.where(same, s.master_weight, p.astype(dtype))
        master, state = lifted(rule, master, g, s.rule_state, numbers, flags, t, *noise)
        return master.astype(p.dtype), Master(master, state)

    def widen(x: Any) -> Any:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    numbers = jax.tree.map(widen, numbers)
    one_minus = numbers.pop("one_minus")
    h = SimpleNamespace(one_minus=SimpleNamespace(**one_minus), t=t.astype(dtype), **flags)
    vars(h).update(numbers)
    rounding = None
    if noise:
        seed, place = noise
        rounding = vars(h)["_rounding"] = Rounding(seed, place, t, p, s)  # for `pieces.in_place`
    wide_g = jnp.zeros(p.shape, dtype) if g is None else widen(g).astype(dtype)
    new_p, new_s = rule.update(widen(p), wide_g, jax.tree.map(widen, s), h)
    if rounding is not None:
        return new_p.astype(p.dtype), rounding.stored(new_s, s)
    return new_p.astype(p.dtype), jax.tree.map(lambda new, old: new.astype(old.dtype), new_s, s)
