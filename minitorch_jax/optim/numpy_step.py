"""Steps on small NumPy arrays, taken by NumPy itself: moving them to XLA and back costs many times the arithmetic."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain, repeat
from operator import attrgetter, is_, setitem
from typing import Any

import jax
import numpy as np

from ..engine.disabled_jit import is_plain
from ..runtime import contexts, interrupts
from ..runtime.jax_private import is_debugging
from ..state.concurrent_reads import gradient_writes
from ..state.numpy_cell import as_numpy, get_held, hold
from ..state.numpy_parts import Latest, Part
from .numpy_program import NotInNumpy, Program
from .packed_parameters import Unit, single
from .plan import Plan
from .update import Update, take_step

# Above this number of elements, the mean of an optimizer's arrays, XLA takes the steps. It needs about 50 µs for each array
# that goes in and out, and then less for an element: fewer passes over memory, and all cores. Measured on two cores with 20
# arrays, both take equally long at 65,000 elements for Adam, at half as many for LAMB, and above a million for plain SGD.
# Arrays for an accelerator would have to be moved there and back as well, which takes longer still.
LARGEST_MEAN = 65_536
TOGETHER = (
    32_768  # elements that are laid end to end at most: few calls of NumPy, and all of it in the processor's cache
)

_facts, _grad_facts = attrgetter("flags.writeable", "shape"), attrgetter("shape", "dtype")
_replace: Callable[[Latest, Any], None] = vars(Latest)["arrays"].__set__  # C slot setters
_note_write: Callable[[Any, object], None] = vars(type(gradient_writes))["last"].__set__


def make_numpy_step(opt: Any, plan: Plan) -> NumpyStep:
    """Return what takes the steps of an optimizer by NumPy.

    Raises:
        NotInNumpy: if XLA is to take them, as the arrays are large or the rule needs what NumPy has not.
    """
    if plan.params or opt._form is not None:
        raise NotInNumpy("it trains Modules, too" if plan.params else "its rule is of all parameters at once")
    if opt._seed is not None:
        raise NotInNumpy("its state is rounded stochastically")
    arrays = [array for foreign in plan.foreign for array in foreign.arrays()]
    for array in arrays:
        if type(array) is not np.ndarray or array.dtype not in (np.float32, np.float64):
            raise NotInNumpy(f"it trains a {type(array).__name__} of {array.dtype}")
    if sum([array.size for array in arrays]) > LARGEST_MEAN * len(arrays):
        raise NotInNumpy("its arrays are large")
    if not opt._hyper.is_plain() or plan.update.places:
        raise NotInNumpy("its state is on several devices, or of several optimizers")
    reads = plan.step.reads(plan.inside)
    if reads is None:
        raise NotInNumpy("its code reads arrays or other objects by name")
    return NumpyStep(opt, plan, arrays, reads)


class NumpyStep:
    """The steps of one plan. Called, it takes one; or it returns False, and has changed nothing: XLA is to take this one.

    A step computes everything first. One call in C then writes the parameters and puts the new state in place of the old
    one: Python handles no signal in between.
    """

    def __init__(self, opt: Any, plan: Plan, arrays: list[Any], reads: Any) -> None:
        self._foreign, self._hyper, self._reads = plan.foreign, opt._hyper, None if reads.is_empty else reads
        self._units = _units(opt, plan, [array.dtype for array in arrays])
        self._tail = plan.tail
        self._counts = [len(foreign.cells) for foreign in plan.foreign]
        self._wide = any([array.dtype == np.float64 for array in arrays])
        self._facts = [(True, array.shape) for array in arrays]
        self._grad_facts = [(array.shape, array.dtype) for array in arrays]
        self._outs, self._pieces = _laid_out(self._units, arrays)
        # Of the last step: the parameters, the gradients and the hyperparameters, each with what the program is given for
        # them. Pairs, so that a Ctrl-C finds both or none replaced. (Parameters whose flat form is a copy: with nothing.)
        self._params: tuple[list[Any], tuple[Any, ...]] = [], ()
        self._grads: tuple[list[Any], tuple[Any, ...]] = [], ()
        self._vector: tuple[Any, Any] = None, ()
        self._take_state()
        self._program = self._compiled(plan, arrays)

    # -- once per plan ------------------------------------------------------------------------------------------------

    def _take_state(self) -> None:
        """Have the cells of the optimizer's state hold parts of NumPy arrays."""
        latest, cells, parts, held = Latest(()), list[Any](), list[Part](), list[Any]()
        for unit in self._units:
            for k in range(unit.tree.num_leaves):
                mine = unit.state[k :: unit.tree.num_leaves]
                values = list(map(as_numpy, mine))
                start = 0
                for cell, value in zip(mine, values, strict=True):
                    parts.append(Part(latest, len(held), start if len(mine) > 1 else None, value.shape))
                    cells.append(cell)
                    start += value.size
                held.append(np.concatenate(values, None) if len(mine) > 1 else values[0])
        for cell in self._tail:
            parts.append(Part(latest, len(held), None, ()))
            cells.append(cell)
            held.append(as_numpy(cell))
        latest.arrays = tuple(held)
        with interrupts.deferred:
            hold(cells, parts)
        self._latest, self._cells, self._parts = latest, cells, parts

    def _compiled(self, plan: Plan, arrays: list[Any]) -> Program:
        """The program of a step, tried out on zeros."""
        update = Update(*plan._rule, 0, tuple(map(plan.each, self._units)), plan._num_steps, ())
        held = [jax.ShapeDtypeStruct(np.shape(array), array.dtype) for array in self._latest.arrays]
        params = [jax.ShapeDtypeStruct(out.shape, out.dtype) for out in self._outs]
        values = self._numbers()
        try:
            with contexts.full_width(params):
                closed = jax.make_jaxpr(update)(held, [], values, params, params)
            program = Program(closed, [len(unit.positions) > 1 for unit in self._units])
            zeros = self._given([np.zeros(array.shape, array.dtype) for array in arrays])
            with np.errstate(all="ignore"):
                new = program.step(self._latest.arrays, program.prepare(values), zeros, zeros, self._outs)
        except NotInNumpy:
            raise
        except Exception as error:  # of code that needs the engine's trace, say; that of a wrong rule comes again
            raise NotInNumpy(f"it raises: {error}") from error
        for before, after in zip(held, new, strict=True):
            if (before.shape, before.dtype) != (np.shape(after), after.dtype):
                raise NotInNumpy(f"NumPy computes {after.dtype}{np.shape(after)} for {before.dtype}{before.shape}")
        return program

    # -- once per step ------------------------------------------------------------------------------------------------

    def __call__(self) -> bool:
        if self._reads is not None and not self._reads.are_same(take_step):
            return False
        if not all(map(is_, map(get_held, self._cells), self._parts)):
            self._take_state()
        arrays = list(chain.from_iterable([foreign.module.parameters() for foreign in self._foreign]))
        known, params = self._params
        if len(arrays) != len(known) or not all(map(is_, arrays, known)):
            arrays = [array for foreign in self._foreign for array in foreign.own_arrays()]
            if [(type(a), a.shape, a.dtype) for a in arrays] != [(np.ndarray, *facts) for facts in self._grad_facts]:
                return False
            are_views = all([array.flags.c_contiguous for array in arrays])
            self._params = known, params = arrays, self._given(arrays) if are_views else ()
        if list(map(_facts, arrays)) != self._facts:
            return False
        grads = self._gradients(arrays)
        latest, vector = self._latest, self._hyper.cell.stored
        with np.errstate(all="ignore"):
            if vector is not self._vector[0]:
                self._vector = vector, self._program.prepare(self._numbers())
            new = self._program.step(latest.arrays, self._vector[1], params or self._given(arrays), grads, self._outs)
        before = latest.arrays  # noqa: F841  # freed when all is stored
        stores = chain(
            map(setitem, arrays, repeat(...), self._pieces),
            map(_replace, (latest,), (new,)),
            map(_note_write, (gradient_writes,), (object(),)),
        )
        deque(stores, 0)
        return True

    def _numbers(self) -> Any:
        """The vector of hyperparameters, in as many digits as the arithmetic has."""
        with contexts.constants():
            return np.asarray(self._hyper.numbers(), np.float64) if self._wide else np.asarray(self._hyper.cell.stored)

    def _given(self, arrays: list[Any]) -> tuple[Any, ...]:
        """The parameters as the program takes them: flat, where they are laid end to end."""
        flat = self._by_unit([array.reshape(-1) for array in arrays])
        return tuple([f if type(f) is list else a for f, a in zip(flat, self._by_unit(arrays), strict=True)])

    def _gradients(self, arrays: list[Any]) -> tuple[Any, ...]:
        """The gradients as the program takes them."""
        by_module = [list(foreign.module.grads()) for foreign in self._foreign]
        grads = list(chain.from_iterable(by_module))
        if list(map(len, by_module)) == self._counts:
            known, given = self._grads
            if len(grads) == len(known) and all(map(is_, grads, known)):
                return given
            if set(map(type, grads)) == {np.ndarray} and list(map(_grad_facts, grads)) == self._grad_facts:
                self._grads = grads, self._by_unit(grads)
                return self._grads[1]
        rest = iter(arrays)
        aligned = [
            f.aligned([next(rest) for _ in f.cells], mine) for f, mine in zip(self._foreign, by_module, strict=True)
        ]
        return self._by_unit(list(chain.from_iterable(aligned)))

    def _by_unit(self, arrays: list[Any]) -> tuple[Any, ...]:
        """Arrays of the parameters as the program takes them: a list for each unit of several, else the array itself."""
        found, start = [], 0
        for unit in self._units:
            end = start + len(unit.shapes)
            found.append(arrays[start:end] if end > start + 1 else arrays[start])
            start = end
        return tuple(found)


def _laid_out(units: Sequence[Unit], arrays: Sequence[Any]) -> tuple[tuple[Any, ...], list[Any]]:
    """Arrays for the new parameters, one for each unit, and the views of them that are one parameter's each."""
    outs, pieces, rest = [], list[Any](), iter(arrays)
    for unit in units:
        mine = [next(rest) for _ in unit.shapes]
        if len(mine) == 1:
            outs.append(np.empty(mine[0].shape, mine[0].dtype))
            pieces.append(outs[-1])
        else:
            ends = np.cumsum([array.size for array in mine])
            outs.append(np.empty(ends[-1], mine[0].dtype))
            parts = zip(np.split(outs[-1], ends[:-1]), mine, strict=True)
            pieces += [part.reshape(array.shape) for part, array in parts]
    return tuple(outs), pieces


def _units(opt: Any, plan: Plan, dtypes: Sequence[Any]) -> list[Unit]:
    """The parameters in their order, neighbours in one unit where the rule allows it. Its state is by parameter."""
    order = {cell: i for i, cell in enumerate(opt._order)}
    units: list[Unit] = []
    last, size = None, 0
    for cell, dtype in zip(plan.extra, dtypes, strict=True):
        unit = single(opt, cell, order, plan.groups, plan.shapes[cell])
        clock, count = plan.each(unit).clock, int(np.prod(unit.shapes[0]))
        states = [(held.value.shape, held.value.dtype) for held in unit.state]
        fits = opt._rule_of(unit.group).elementwise and all(shape == unit.shapes[0] for shape, _ in states)
        alike = (clock, unit.group, unit.tree, dtype, [dtype for _, dtype in states]) if fits else None
        size += count
        if alike is not None and alike == last and size <= TOGETHER:
            known = units[-1]
            state, shapes = [*known.state, *unit.state], (*known.shapes, *unit.shapes)
            units[-1] = Unit(known.param, unit.tree, state, (*known.positions, *unit.positions), unit.group, shapes)
        else:
            units.append(unit)
            size = count
        last = alike
    return units


def step_by_numpy(opt: Any, plan: Plan) -> bool:
    """Take a step by NumPy, if it can be; else nothing has changed, and it returns False."""
    if is_debugging() or is_plain():
        return False
    if plan.by_numpy is None:
        try:
            with contexts.constants():
                plan.by_numpy = make_numpy_step(opt, plan)
        except NotInNumpy:
            plan.by_numpy = False
    return plan.by_numpy is not False and plan.by_numpy()
