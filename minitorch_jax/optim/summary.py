"""`opt.summary()`: a table of what an optimizer trains, with which settings, and what it keeps for each parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..module.module import Module
from ..module.parameter import declared
from ..runtime.tables import as_html, as_text, in_bytes
from ..state.cell import Cell
from ..state.static_values import describe, module_of, shown
from ..state.walk import walk_of


class OptimizerRow(NamedTuple):
    """One parameter of an `OptimizerSummary`."""

    path: str  # as in the optimizer's `state_dict()`: its module's place in `modules`, and its path there
    parameter: str  # as "float32[8, 3]"
    group: int | None  # None for a parameter that the optimizer does not hold; `path` is then that in the model
    rule: str  # the class whose `update` steps it; "frozen", or "not held"
    settings: tuple[
        str, ...
    ]  # those that differ from the optimizer's, as "lr=0.01"; for another rule, from its defaults
    state_bytes: int  # of what is kept for it; LBFGS keeps what it has for all of them with the first

    def texts(self) -> tuple[str, ...]:
        """Return the cells of the printed row."""
        group = "" if self.group is None else str(self.group)
        state = in_bytes(self.state_bytes) if self.state_bytes else ""
        return self.path, self.parameter, group, self.rule, ", ".join(self.settings), state


_HEADINGS = ("parameter", "array", "group", "rule", "own settings", "state")
_NUMBERS = (2, 5)


@dataclass(frozen=True, repr=False)
class OptimizerSummary:
    """The result of `opt.summary()`: a row for each parameter, and totals. Prints as a table."""

    rows: tuple[OptimizerRow, ...]
    optimizer: str  # its repr
    state_bytes: int  # of all that it keeps, what it keeps for all parameters at once included

    @property
    def not_held(self) -> tuple[str, ...]:
        """The paths of the model's trainable parameters that the optimizer does not hold."""
        return tuple([row.path for row in self.rows if row.group is None])

    def _totals(self) -> str:
        held = sum(row.group is not None for row in self.rows)
        left = f", {len(self.not_held)} not held" if self.not_held else ""
        state = f", {in_bytes(self.state_bytes)} of state"
        return f"{held} parameter{'' if held == 1 else 's'}{left}{state}: {self.optimizer}"

    def __repr__(self) -> str:
        return as_text(_HEADINGS, [row.texts() for row in self.rows], _NUMBERS, self._totals())

    def _repr_html_(self) -> str:
        """Return the table as HTML, for a notebook."""
        return as_html(_HEADINGS, [row.texts() for row in self.rows], _NUMBERS, self._totals())


def summary_of(opt: Any, model: Any) -> OptimizerSummary:
    """Return what `Optimizer.summary` returns."""
    model = module_of(model)
    if model is not None and not isinstance(model, Module):
        raise TypeError(
            f"{type(opt).__name__}.summary() takes a Module, to show which of its parameters the optimizer does not hold; got"
            f" {shown(model)} ({type(model).__name__}). For the optimizer alone, leave it out"
        )
    plan = opt._plan_now()
    arrays = {cell: array for (_, array), cell in zip(plan.values().items(), plan.named.values(), strict=True)}
    rows = []
    for path, cell in plan.named.items():
        group = plan.groups[cell]
        array = arrays[cell] if isinstance(arrays[cell], np.ndarray) else declared(cell)
        rule = opt._rule_of(group).__name__ if cell in plan.shapes else "frozen"
        settings = _own_settings(opt, group, array.shape)
        rows.append(
            OptimizerRow(path, describe(array), group, rule, settings, _bytes(opt._state.get(cell, (None, []))[1]))
        )
    for path, cell in walk_of(model).named() if model is not None else ():
        if cell.trainable and cell not in plan.named.values():
            rows.append(OptimizerRow(path, describe(declared(cell)), None, "not held", (), 0))
    common = opt._common_cells()
    return OptimizerSummary(tuple(rows), repr(opt), sum(row.state_bytes for row in rows) + _bytes(common))


def _own_settings(opt: Any, group: int, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The settings of a parameter that differ from the optimizer's."""
    settings = opt._texts_of(group)
    has_decay = opt._hyper.is_number("weight_decay", group)
    if opt._hyper.flags_of(group)["decay_matrices_only"] and len(shape) < 2 and has_decay:
        if repr(opt._stated("weight_decay", group)) not in ("0", "0.0"):
            settings["weight_decay"] = "0"
    if opt._hyper.rule_of(group) is None:
        settings = {name: text for name, text in settings.items() if text != repr(opt._stated(name))}
    return tuple([f"{name}={text}" for name, text in settings.items()])


def _bytes(cells: list[Cell]) -> int:
    values: list[Any] = [cell.value for cell in cells]
    return sum([int(np.prod(value.shape)) * np.dtype(value.dtype).itemsize for value in values])
