"""The update of a large array on a CPU: block by block, in place.

XLA on CPUs makes a loop over the whole memory for each array that a rule writes, and each loop reads most of what the others
have read or written: Adam moves 10 arrays through memory where 7 would do. On blocks that fit into a core's cache, memory is
read and written once. Any rule can be done so whose trace (a jaxpr) is elementwise.

XLA splits a loop over the cores, but not what overwrites a part of an array. So blocks run on one core, and are used only
where that is faster by the clock. (Blocks that are computed on all cores, and then copied into the arrays, are slower than
the plain rule on two cores: their copies cost more than the memory that is not read twice.)

In a block, one result after the other is stored in place of the array that it replaces. It may overwrite only what no later
one reads. A later one may read the stored result instead: Adam's parameter is computed from the stored averages.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jax_core

from ..runtime.platforms import on_cpu

# Measured with Adam and momentum on one and on two x86 cores, JAX 0.10.2 and 0.12.
BLOCK = 32_768  # numbers; a quarter and twice as many are as fast
# Numbers of a parameter from which blocks are faster, by the number of cores. With fewer, arrays stay in the last cache.
SMALLEST = {1: 24_000_000, 2: 1_000_000}

_CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call")
_ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt ceil clamp"
    " complex conj convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag"
    " integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or pow real"
    " reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt"
    " square sub tan tanh xor".split()
)


def in_blocks(rule: Callable[..., Any], flat: bool) -> Callable[..., Any]:
    """Return the update of one array, `(parameter, gradient, state, *others)`, by blocks where that is faster.

    The parameter and the state are overwritten if nothing reads them afterwards; otherwise XLA copies them first. Results
    may differ from those of `rule` by rounding, where XLA fuses a product and a sum in one form only.

    `flat`: whether the rule may be given arrays with all their axes joined.
    """

    def update(p: Any, g: Any, s: Any, *others: Any) -> Any:
        states = [x.shape for x in jax.tree.leaves(s)]
        if p.shape in states and _is_faster(p.shape):
            return on_cpu(lambda *args: _computed(rule, flat, args), rule, p, g, s, *others)
        return rule(p, g, s, *others)

    return update


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_faster(shape: tuple[int, ...]) -> bool:
    """Whether one core by blocks is faster than the plain rule on all cores.

    With two cores it is so for one axis of an odd length, since XLA does not vectorize a loop of which the halves differ.
    """
    size, cores = math.prod(shape), _cores()
    slow_in_halves = len(shape) == 1 and size % 2 == 1
    return cores in SMALLEST and SMALLEST[cores] <= size < 2**31 and (cores == 1 or slow_in_halves)


def _computed(rule: Callable[..., Any], flat: bool, args: tuple[Any, ...]) -> Any:
    """Compute a rule by blocks, or as it is if it is not elementwise."""
    shape = args[0].shape
    traced_shape = (args[0].size,) if flat else shape
    given, tree = jax.tree.flatten(args)
    given = list(map(jnp.asarray, given))
    likes = [jax.ShapeDtypeStruct(traced_shape if x.shape == shape else x.shape, x.dtype) for x in given]
    closed, out = jax.make_jaxpr(rule, return_shape=True)(*jax.tree.unflatten(tree, likes))
    num_state, after_g = len(jax.tree.leaves(args[2])), len(jax.tree.leaves(args[:2]))
    program = _elementwise(closed, traced_shape, [0, *range(after_g, after_g + num_state)])
    if program is None:
        return rule(*args)

    @jax.custom_jvp
    def run(*given: Any) -> list[Any]:
        results = program.run([x.reshape(-1) if x.shape == shape else x for x in given])
        return [x.reshape(shape) if x.size == args[0].size else x for x in results]

    @run.defjvp
    def derivative(primals: Any, tangents: Any) -> Any:  # of the loop, JAX would keep the arrays of every block
        return jax.jvp(lambda *given: jax.tree.leaves(rule(*jax.tree.unflatten(tree, given))), primals, tangents)

    return jax.tree.unflatten(jax.tree.structure(out), run(*given))


# -- an elementwise rule -----------------------------------------------------------------------------------------------

Atom = Any  # a variable, as an index, or a literal


class Operation(NamedTuple):
    """An equation of a jaxpr, outside of all calls."""

    primitive: Any
    params: dict[str, Any]
    inputs: list[Atom]
    outputs: list[int]
    on_arrays: bool


class Trace:
    """A jaxpr, with the functions that it calls taken apart."""

    def __init__(self, closed: Any, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.shapes: list[tuple[int, ...]] = []
        self.operations: list[Operation] = []
        self.consts: dict[int, Any] = {}
        self.inputs = [self._new(var) for var in closed.jaxpr.invars]
        self.results = self._take(closed.jaxpr, closed.consts, self.inputs)

    def _new(self, var: Any) -> int:
        self.shapes.append(var.aval.shape)
        return len(self.shapes) - 1

    def is_array(self, atom: Atom) -> bool:
        """Whether a variable has an element for each of the parameter's."""
        return isinstance(atom, int) and self.shapes[atom] == self.shape

    def _take(self, jaxpr: Any, consts: Sequence[Any], given: Sequence[Atom]) -> list[Atom]:
        """Append the operations of a jaxpr, and return its results."""
        env: dict[Any, Atom] = dict(zip(jaxpr.invars, given, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self._new(var)
            self.consts[env[var]] = value

        def atom(var: Any) -> Atom:
            return var if isinstance(var, jax_core.Literal) else env[var]

        for eqn in jaxpr.eqns:
            inputs = list(map(atom, eqn.invars))
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")) if eqn.primitive.name in _CALLS else None
            if inner is not None:
                outputs = self._take(inner.jaxpr, inner.consts, inputs)
            elif eqn.primitive.name == "optimization_barrier":
                outputs = inputs  # each result comes from one input, and blocks have their own order
            else:
                outputs = list(map(self._new, eqn.outvars))
                on_arrays = any(map(self.is_array, [*inputs, *outputs]))
                self.operations.append(Operation(eqn.primitive, eqn.params, inputs, outputs, on_arrays))
            env |= dict(zip(eqn.outvars, outputs, strict=True))
        return list(map(atom, jaxpr.outvars))

    def is_elementwise(self, operation: Operation) -> bool:
        """Whether each element of an operation's results depends on that element of its inputs, and on numbers."""
        name, params = operation.primitive.name, operation.params
        atoms = [*operation.inputs, *operation.outputs]
        if any(isinstance(atom, int) and self.shapes[atom] not in ((), self.shape) for atom in atoms):
            return False
        if name == "broadcast_in_dim":
            return params["shape"] == self.shape
        return name == "iota" or name in _ELEMENTWISE


class Store(NamedTuple):
    """One result that is stored in a block."""

    slot: int  # which of the arrays that are written
    is_saved: bool  # what it overwrites is needed, and copied first
    behind: list[int]  # slots of which the results were computed from what it overwrites


def _elementwise(closed: Any, shape: tuple[int, ...], owned: Sequence[int]) -> BlockProgram | None:
    """Return what runs a traced rule by blocks, or None for one that is not elementwise. Results replace `owned` inputs."""
    trace = Trace(closed, shape)
    pairs = [(trace.inputs[i], result) for i, result in zip(owned, trace.results, strict=True)]
    if not all(trace.is_elementwise(operation) for operation in trace.operations if operation.on_arrays):
        return None
    if any(trace.is_array(old) != trace.is_array(new) for old, new in pairs):
        return None
    return BlockProgram(trace, pairs)


class BlockProgram:
    """An elementwise rule, and the order in which its results are stored."""

    def __init__(self, trace: Trace, pairs: Sequence[tuple[int, Atom]]) -> None:
        self._traced = trace
        self._maker = {var: operation for operation in trace.operations for var in operation.outputs}
        written = [(old, new) for old, new in pairs if trace.is_array(old) and old != new]
        self._old, self._new = [old for old, _ in written], [new for _, new in written]
        self._replaced = {old: slot for slot, old in enumerate(self._old)}
        self._order = list(self._stores())

    def _stores(self) -> Iterator[Store]:
        left, done = [*range(1, len(self._old)), 0], list[int]()  # the parameter mostly comes last
        saved: set[int] = set()
        reads: dict[int, set[int]] = {}
        while left:
            free = [i for i in left if not any(i in self._reads(j, [*done, i])[0] - saved for j in left if j != i)]
            slot = (free or [min(left)])[0]
            reads[slot], through = self._reads(slot, done)
            behind = [j for j in done if slot in reads[j] and j not in through]
            yield Store(slot, not free, behind)
            saved |= set() if free else {slot}
            left.remove(slot)
            done.append(slot)

    def _reads(self, slot: int, stored: Sequence[int]) -> tuple[set[int], set[int]]:
        """The slots whose old arrays a result is computed from, and those of `stored` whose new ones it is computed from."""
        new = {self._new[i]: i for i in reversed(stored)}
        old, through, seen = set[int](), set[int](), set[int]()
        ahead: list[Atom] = [self._new[slot]]
        while ahead:
            atom = ahead.pop()
            if not isinstance(atom, int) or atom in seen:
                continue
            seen.add(atom)
            if atom in new:
                through.add(new[atom])
            elif atom in self._replaced:
                old.add(self._replaced[atom])
            elif atom in self._maker:
                ahead += self._maker[atom].inputs
        return old, through

    def run(self, given: Sequence[Any]) -> list[Any]:
        """Return the results for inputs of one axis, or none."""
        trace = self._traced
        known: dict[Atom, Any] = dict(zip(trace.inputs, given, strict=True))
        for var, value in trace.consts.items():
            known[var] = jnp.reshape(value, -1) if trace.is_array(var) else value
        for operation in trace.operations:  # what is computed from numbers alone is so once
            if not operation.on_arrays and all(x in known for x in operation.inputs if isinstance(x, int)):
                inputs = [_value(x, known) for x in operation.inputs]
                known |= zip(operation.outputs, self._apply(operation, inputs, 0, 0), strict=True)
        arrays = [known.pop(var) for var in self._old]
        spares = [jnp.zeros(2 * BLOCK if one.is_saved else 0, arrays[one.slot].dtype) for one in self._order]
        size = arrays[0].size
        length = next((n for n in range(BLOCK, BLOCK // 4, -1) if size % n == 0), BLOCK)
        rest = size % length  # a shorter block, with operations of its own to compile

        def stored(carried: Any, end: int, step: int) -> Any:
            """The arrays with their blocks from a start, which is carried, up to an end."""

            def block(carried: Any) -> Any:
                start, arrays, spares = carried
                # the next start is no product: on numbers, too, each operation is a kernel to compile and to launch
                return start + step, *self._block(start, step, arrays, spares, known)

            return lax.while_loop(lambda carried: carried[0] < end, block, carried)

        carried = stored((jnp.int32(0), arrays, spares), size - rest, length)
        # the rest is in a loop, too: outside of one, XLA joins a reshape to what is stored, and copies the array
        _, arrays, _ = stored(carried, size, rest) if rest else carried
        known |= zip(self._new, arrays, strict=True)
        return [_value(atom, known) for atom in trace.results]

    def _block(
        self, start: Any, length: int, arrays: Sequence[Any], spares: Sequence[Any], known: Mapping[Atom, Any]
    ) -> tuple[list[Any], list[Any]]:
        """Store one block of each result in `arrays`; `known` are numbers, and arrays that are only read."""
        arrays, spares = list(arrays), list(spares)
        copied: dict[Atom, Any] = {}
        stored: dict[Atom, int] = {}

        def cut(array: Any) -> Any:
            return lax.dynamic_slice(array, (start,), (length,), allow_negative_indices=False)

        def put(array: Any, block: Any, place: Any) -> Any:
            """The array with a block. The barrier keeps XLA from computing that again where it is read."""
            return lax.optimization_barrier(
                lax.dynamic_update_slice(array, block, (place,), allow_negative_indices=False)
            )

        def value(atom: Atom, values: dict[Atom, Any]) -> Any:
            if not isinstance(atom, int):
                return atom.val
            if atom not in values:
                if atom in stored:
                    values[atom] = cut(arrays[stored[atom]])
                elif atom in self._replaced:
                    values[atom] = cut(arrays[self._replaced[atom]])
                elif atom in known:
                    values[atom] = cut(known[atom]) if self._traced.is_array(atom) else known[atom]
                else:
                    operation = self._maker[atom]
                    inputs = [value(x, values) for x in operation.inputs]
                    values |= zip(operation.outputs, self._apply(operation, inputs, start, length), strict=True)
            return values[atom]

        for place, (slot, is_saved, behind) in enumerate(self._order):
            if is_saved:
                spares[place] = put(spares[place], cut(arrays[slot]), jnp.zeros_like(start))
                copied[self._old[slot]] = lax.slice(spares[place], (0,), (length,))
            new = value(self._new[slot], dict(copied))
            for other in [*(cut(arrays[j]) for j in behind), *copied.values()][: len(behind) + is_saved]:
                new = _after(other, cut(arrays[slot]), new)
            arrays[slot] = put(arrays[slot], new, start)
            stored.setdefault(self._new[slot], slot)
        return arrays, spares

    def _apply(self, operation: Operation, inputs: list[Any], start: Any, length: int) -> Sequence[Any]:
        """The results of an operation, of a block if it is one on arrays."""
        primitive, params = operation.primitive, operation.params
        if operation.on_arrays and primitive.name == "broadcast_in_dim":
            return [jnp.broadcast_to(inputs[0], (length,))]
        if operation.on_arrays and primitive.name == "iota":
            places = lax.iota(start.dtype, length) + start
            axis, shape = params["dimension"], params["shape"]
            rows = places // math.prod(shape[axis + 1 :])
            return [(rows % shape[axis] if axis else rows).astype(params["dtype"])]
        results = primitive.bind(*inputs, **params)
        return results if primitive.multiple_results else [results]


def _value(atom: Atom, known: Mapping[Atom, Any]) -> Any:
    return known[atom] if isinstance(atom, int) else atom.val


def _after(first: Any, old: Any, new: Any) -> Any:
    """`new`, which XLA computes once `first` has been, since it does not see that no number is below itself."""
    return jnp.where(lax.optimization_barrier(first) < first, old, new)
