"""The hyperparameters of an optimizer and its groups: numbers in one vector in one cell, flags beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..module.checks import range_of
from ..module.parameter import placed_as
from ..runtime import contexts
from ..runtime.numpy_memory import owned
from ..state import access, dropped_copies
from ..state import cell as cells
from ..state import frame as frames
from ..state.cell import Cell
from ..state.errors import TraceError
from ..state.static_values import shown
from ..state.structure import Structure
from .declaration import NOT_NEGATIVE, OPTIONS
from .number_vector import VectorLayout, merged, numbers_at, own_layout, short, split, unknown, vector_layout, width


class Hyperparameters:
    """Numbers, tuples of numbers, schedules and flags, by name: the optimizer's, and what its groups have of their own.

    The compiled update takes the vector, so a new number never compiles again. The vector has one part for the optimizer's
    numbers and, if it has groups, one of the same layout for each of them. Its second half has what each number in the
    first half lost by rounding: 1 - 0.999999 would have no more than four right digits without it. A group is given by its
    index, the optimizer itself by None. A group with a rule of its own (`rules`, None for the others) has all settings of
    that rule of its own, and a part of another layout. For the stacked optimizers of an ensemble the vector is a matrix, and
    a number may be an array of the shape `members`.
    """

    def __init__(
        self,
        owner: str,
        ranges: Mapping[str, tuple[float, float]],
        given: dict[str, Any],
        flags: dict[str, Any],
        own: Sequence[dict[str, Any]] = (),
        members: tuple[int, ...] = (),
        rules: Sequence[Any] = (),
    ) -> None:
        self.owner, self.ranges, self.members = owner, ranges, members
        self.given, self.flags, self.own = owned(given), flags, [dict(owned(settings)) for settings in own]
        self.rules = tuple(rules) or (None,) * len(self.own)
        main = vector_layout(given)
        self.layouts = (main, *map(partial(own_layout, main), self.rules, self.own))
        for g, settings in enumerate((given, *self.own), -1):
            for name, value in settings.items():
                if self.is_number(name, g if g >= 0 else None):
                    self.check(name, value, g if g >= 0 else None)
        self.structure = Structure()  # which settings are schedules, flags, or a group's own
        self.cell = Cell(self._vector(), "hyperparameters", birth=dropped_copies.birth_here())
        self.exact: Any = self.cell.value  # the vector that the numbers were brought into

    @classmethod
    def rebuilt(cls, owner: str, ranges: Any, statics: Any, cell: Cell) -> Hyperparameters:
        """For a copy of an optimizer, around a cell with a leaf in it."""
        self = object.__new__(cls)
        self.owner, self.ranges, self.cell, self.exact = owner, ranges, cell, None
        self.structure = Structure()
        self.members = tuple(getattr(cell.value, "shape", ()))[:-1]
        self.layouts, given, flags, own, self.rules = statics
        main, *parts = [{name: unknown(length) for name, _, length in layout} for layout in self.layouts]
        self.given, self.flags = main | dict(given), dict(flags)
        pairs = zip(parts, own, strict=True)
        self.own = [{name: part.get(name) for name in names} | dict(known) for part, (names, known) in pairs]
        return self

    def statics(self) -> Any:
        """What of it is part of what a program is compiled for; see `rebuilt`."""
        own = [
            (tuple(mine), tuple((k, v) for k, v in mine.items() if self._is_static(k, v, g)))
            for g, mine in enumerate(self.own)
        ]
        given = tuple((name, value) for name, value in self.given.items() if is_schedule(value))
        return self.layouts, given, tuple(self.flags.items()), tuple(own), self.rules

    def _is_static(self, name: str, value: Any, group: int | None) -> bool:
        return not self.is_number(name, group) or is_schedule(value)

    # -- by group -----------------------------------------------------------------------------------------------------

    def rule_of(self, group: int | None) -> Any:
        """The rule that a group has of its own, or None."""
        return None if group is None or not self.own else self.rules[group]

    def layout_of(self, group: int | None) -> VectorLayout:
        """The layout of a group's part of the vector, from 0."""
        return self.layouts[0 if group is None or not self.own else group + 1]

    def is_number(self, name: str, group: int | None) -> bool:
        """Whether a setting of a group is in the vector: a number, a tuple of numbers, or a schedule."""
        return any([key == name for key, _, _ in self.layout_of(group)])

    def has(self, name: str, group: int | None) -> bool:
        """Whether a group's rule has a setting of this name."""
        return self.is_number(name, group) or name in self.flags_of(group)

    def names_of(self, group: int | None) -> list[str]:
        """The settings of a group's rule, numbers first."""
        return [*(name for name, _, _ in self.layout_of(group)), *self.flags_of(group)]

    def flags_of(self, group: int | None) -> dict[str, Any]:
        """The flags that hold in a group."""
        own, flags = self._own(group), self.flags
        if self.rule_of(group) is not None:  # what every optimizer takes is the optimizer's; all else is the rule's
            flags = {name: value for name, value in flags.items() if name in OPTIONS}
            flags |= {name: value for name, value in own.items() if not self.is_number(name, group)}
        return {name: own.get(name, value) for name, value in flags.items()}

    def schedules_of(self, group: int | None) -> dict[str, Any]:
        """The hyperparameters of a group that follow a schedule."""
        values = {name: self._value(name, group) for name, _, _ in self.layout_of(group)}
        return {name: value for name, value in values.items() if is_schedule(value)}

    def start_of(self, group: int | None) -> int:
        """Where a group's part of the vector begins."""
        return 0 if group is None or not self.own else sum(map(width, self.layouts[: group + 1]))

    def _own(self, group: int | None) -> dict[str, Any]:
        return {} if group is None or not self.own else self.own[group]

    def _value(self, name: str, group: int | None) -> Any:
        """A setting as it was given, to the group or to the optimizer."""
        own = self._own(group)
        return own[name] if name in own else self.given[name]

    # -- reading and assigning ----------------------------------------------------------------------------------------

    def check(self, name: str, value: Any, group: int | None = None) -> None:
        """Raise ValueError unless `value` fits hyperparameter `name`."""
        if is_schedule(value) or isinstance(value, jax.core.Tracer):
            return
        rule = self.rule_of(group)
        low, high = (self.ranges if rule is None else rule._ranges).get(name, NOT_NEGATIVE)
        for item in value if isinstance(value, tuple) else (value,):
            try:
                item = jax.device_get(item) if isinstance(item, jax.Array) else item
                numbers = np.asarray(math.nan if isinstance(item, bool | str) else item, float)
            except (TypeError, ValueError):
                numbers = np.asarray(math.nan)
            if numbers.shape not in ((), self.members) or not ((low <= numbers) & (numbers <= high)).all():
                what = "a finite number" if name != "lr" else "a finite number, or a schedule (a function of the step),"
                owner = self.owner if rule is None else rule.__name__
                raise ValueError(f"{owner}: {name} must be {what} {range_of(low, high)}; got {shown(value)}")

    def check_length(self, name: str, value: Any, group: int | None = None) -> None:
        """Raise ValueError for a number where there is a tuple of them, or the other way round."""
        length = self._place(name, group)[1]
        right = len(value) == length if isinstance(value, tuple) else not length
        if not right and not is_schedule(value):
            wanted = f"a tuple of {length} numbers" if length else "a number"
            raise ValueError(f"{self.owner}.{name} must be {wanted}; got {shown(value)}")

    def get(self, name: str, num_steps: Callable[[], Any], group: int | None = None) -> Any:
        """The value now: as it was given, or what a schedule says at `num_steps()`."""
        if not self.is_number(name, group):
            return self.flags_of(group)[name]
        value: Any = self._value(name, group)
        if is_schedule(value):
            return short(value(num_steps()))
        vector = self.cell.value
        if vector is self.exact:
            return value
        start, length = self._place(name, group)
        numbers = numbers_at(vector, range(start, start + max(length, 1)))
        return numbers if length else numbers[0]

    def stated(self, name: str, num_steps: Callable[[], Any], group: int | None = None) -> Any:
        """`get`, but for a schedule, which is given as it is."""
        value = self._value(name, group) if self.is_number(name, group) else None
        return value if is_schedule(value) else self.get(name, num_steps, group)

    def set(self, name: str, value: Any, owner: Any, group: int | None = None) -> None:
        """Assign a number or a schedule; in a trace, to the traced vector. A group then has its own."""
        value = owned(value)
        self.check(name, value, group)
        self.check_length(name, value, group)
        label, (_, length) = f"{self.owner}.{name}", self._place(name, group)
        if is_schedule(value) and frames.is_lifted(self.cell):
            raise TraceError(
                f"{label} was given a schedule inside compiled code, which would happen at the first call only: later ones"
                " run the compiled program. Assign it before the call; in compiled code, assign a number"
            )
        own = self._settings_of(group)
        restructures = is_schedule(value) or is_schedule(own.get(name)) or name not in own
        if restructures:
            access.check_writable(self.cell, label, owner)
        if self.cell.value is self.exact and not isinstance(value, jax.core.Tracer):
            before = dict(own)
            own[name] = value
            try:
                exact = placed_as(self._vector(), self.cell.value)
                access.write(self.cell, exact, label, owner)
            except BaseException:
                own.clear()
                own.update(before)
                raise
            self.exact = exact
        else:
            if not is_schedule(value):
                access.write(self.cell, self._with(name, value, group), label, owner)
            if restructures:
                own[name] = value if is_schedule(value) else unknown(length)
        if restructures:
            self.structure.change()

    def kinds(self) -> Any:
        """Of each setting whether it is a number, a schedule or a flag, and whose: what compiled code may not change."""
        return [
            {
                name: value if self._is_static(name, value, g if g >= 0 else None) else None
                for name, value in own.items()
            }
            for g, own in enumerate(self._all(), -1)
        ]

    def keep(self) -> Any:
        """What `put_back` takes."""
        return [dict(own) for own in self._all()], self.exact

    def put_back(self, kept: Any) -> None:
        """Undo what has become of the settings since `keep`. (The vector is its cell's, which is undone by itself.)"""
        for own, before in zip(self._all(), kept[0], strict=True):
            own.clear()
            own.update(before)
        self.exact = kept[1]

    def become_numbers(self, changed: Sequence[tuple[int, str]]) -> None:
        """Have the vector's numbers in place of schedules, and of what a group had from the optimizer."""
        for i, name in changed:
            self._all()[i][name] = unknown(self._place(name, i - 1 if i else None)[1])

    def _all(self) -> list[dict[str, Any]]:
        return [self.given, *self.own]

    def _settings_of(self, group: int | None) -> dict[str, Any]:
        return self.own[group] if group is not None and self.own else self.given

    def set_flag(self, name: str, value: Any, group: int | None) -> None:
        """Assign a flag that has been checked."""
        (self.flags if group is None or not self.own else self.own[group])[name] = value
        self.structure.change()

    def _with(self, name: str, value: Any, group: int | None) -> Any:
        """The vector with another number in a group, or in the optimizer and all groups without one of their own."""
        vector, items = self.cell.value, value if isinstance(value, tuple) else (value,)
        theirs = zip(self.own, self.rules, strict=True) if group is None else ()
        followers = [g for g, (own, rule) in enumerate(theirs) if name not in own and rule is None]
        starts = [self._place(name, g)[0] for g in (group, *followers)]
        places = [start + i for start in starts for i in range(len(items))]
        if not cells.is_concrete(vector) or any(isinstance(item, jax.core.Tracer) for item in items):
            vector = jnp.asarray(vector)
            for place, number in zip(places, items * len(starts), strict=True):
                for at, part in zip((place, place + vector.shape[-1] // 2), split(number, vector.dtype), strict=True):
                    vector = vector.at[..., at].set(part)
            return vector
        new, chosen = np.zeros(vector.shape, float), np.zeros(vector.shape[-1], bool)
        for place, number in zip(places, items * len(starts), strict=True):
            for at, part in zip((place, place + len(chosen) // 2), split(number, vector.dtype), strict=True):
                new[..., at], chosen[at] = part, True
        where = vector.sharding if vector.committed else None
        changed: Any = merged(vector, *jax.device_put((chosen, new.astype(vector.dtype)), where))
        return changed

    def place(self, sharding: Any) -> None:
        """Put the vector where the parameters are, so that no call has to send it there."""
        vector = self.cell.value
        if cells.is_concrete(vector) and not (
            vector.committed and vector.sharding.is_equivalent_to(sharding, vector.ndim)
        ):
            placed = jax.device_put(vector, sharding)
            if vector is self.exact:
                self.exact = placed
            self.cell.value = placed

    def numbers(self) -> list[float]:
        """The vector, as exact as it was given."""
        if self.cell.value is self.exact:
            numbers = [float(number) for number in self._numbers()]
            return numbers + [0.0] * len(numbers)
        return [float(number) for number in jax.device_get(self.cell.value)]

    def given_number(self, name: str, group: int) -> Any:
        """A value that decides about structure (is there a state for momentum?), even where the vector is traced."""
        value = self._value(name, group)
        return value if is_schedule(value) or not self.is_plain() else self.get(name, int, group)

    def is_plain(self) -> bool:
        """Whether the numbers are known, and those of one optimizer."""
        vector = self.cell.value
        plain = isinstance(vector, jax.Array | np.ndarray) and not isinstance(vector, jax.core.Tracer)
        return plain and vector.ndim == 1

    def _place(self, name: str, group: int | None) -> tuple[int, int]:
        start, length = next((start, length) for key, start, length in self.layout_of(group) if key == name)
        return start + self.start_of(group), length

    def _numbers(self) -> list[Any]:
        """The numbers of the optimizer and of each group, one after another."""
        numbers: list[Any] = []
        for group in (None, *range(len(self.own))):
            for name, _, length in self.layout_of(group):
                value = self._value(name, group)
                if is_schedule(value):
                    numbers += (0.0,) * max(length, 1)
                else:
                    numbers += value if length else (value,)
        return numbers

    def _vector(self) -> Any:
        numbers, dtype = self._numbers(), jnp.result_type(float)
        if any(isinstance(number, jax.core.Tracer) for number in numbers):
            parts = [split(number, dtype) for number in numbers]
            return jnp.stack([jnp.asarray(number, dtype) for half in zip(*parts, strict=True) for number in half])
        stacked = np.empty((*self.members, len(numbers)))
        for i, number in enumerate(numbers):
            stacked[..., i] = number
        with contexts.constants():  # jax.device_put takes twice as long
            return jnp.array(np.concatenate(split(stacked, dtype), -1))

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in vars(self).items() if name != "structure"}
        return {**kept, "exact": self.exact is self.cell.value}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, structure=Structure())
        if "layouts" not in state:  # of a version where all groups had one rule
            main = vars(self).pop("layout")
            self.layouts, self.rules = (main,) * (len(self.own) + 1), (None,) * len(self.own)
        if np.shape(self.cell.value)[-1:] == (len(self._numbers()),):  # of a version that kept no rest
            self.cell.value = self._vector()
        self.exact = self.cell.value if state["exact"] else None


def is_schedule(value: Any) -> bool:
    """Whether a value is a function of the step."""
    return callable(value) and not isinstance(value, type)
