"""The program of a function that is compiled whole, for `jit` and `scan`."""

from __future__ import annotations

from typing import Any

import jax

from ..state.cell import Cell
from . import plain
from .arguments import Arguments
from .function import Function
from .program import Partition, Program
from .tracing import Traced, unaliased


class _WholeProgram(Program):
    """Everything that a function does."""

    def group(self, stored: list[Cell], part: Partition) -> Any:
        return ([stored[j] for j in indices] for indices in (part.written, part.owned, part.dropped))

    def body(self, traced: Traced, part: Partition, owned: list[Any], read: list[Any], data: Any) -> list[Any]:
        values = self.values_of([None] * len(self.layout.of), part, owned, read)
        out, written = traced(values, data)
        given = [i for i, shape in zip(traced.written, traced.shapes[1], strict=True) if shape is not None]
        self.reaches |= self.gradients.intersection([*given, *traced.dropped])
        stored = self.new_values(part, traced, written, self.stored_values(part, owned, read))
        flat, tree = jax.tree.flatten(out)
        all_out = unaliased([*stored, *flat], jax.tree.leaves((owned, read, data)))
        return [*all_out[: len(stored)], jax.tree.unflatten(tree, all_out[len(stored) :])]

    @classmethod
    def plainly(cls, function: Function, call: Arguments) -> list[Any]:
        return [plain.all_or_nothing(call.objects, lambda: call.run(plain.arrays_of(call.data)), statics=False)]
