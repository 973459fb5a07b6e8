"""A traced step as a Python function of NumPy arrays.

What is run is the very program that XLA would compile: an optimizer's rule is traced by JAX, and each operation of the trace
becomes a line of NumPy, with the trace's dtypes. A rule therefore has one source, and need not know of NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core as jax_core

from .numpy_source import Key, Layout, Statement, in_tuple


class NotInNumpy(Exception):  # noqa: N818  # a decision, not an error
    """NumPy does not take this step; the message says why."""


class Value(NamedTuple):
    """What stands for a variable of the trace. `scalar`: it is one number, whatever the trace says of its shape."""

    key: Key
    scalar: bool
    shape: tuple[int, ...]
    dtype: Any


_OPERATORS = {
    **{"add": ("+", "add"), "sub": ("-", "subtract"), "mul": ("*", "multiply"), "div": ("/", "divide")},
    **{"eq": ("==", ""), "ne": ("!=", ""), "lt": ("<", ""), "le": ("<=", ""), "gt": (">", ""), "ge": (">=", "")},
    **{"and": ("&", ""), "or": ("|", ""), "xor": ("^", "")},
}
_FUNCTIONS = {
    **{"max": "maximum", "min": "minimum", "sqrt": "sqrt", "abs": "absolute", "sign": "sign", "neg": "negative"},
    **{"square": "square", "exp": "exp", "exp2": "exp2", "expm1": "expm1", "log": "log", "log1p": "log1p"},
    **{"sin": "sin", "cos": "cos", "tan": "tan", "tanh": "tanh", "atan2": "arctan2", "cbrt": "cbrt"},
    **{"floor": "floor", "ceil": "ceil", "rem": "fmod", "is_finite": "isfinite", "not": "logical_not"},
}
_REDUCTIONS = {"reduce_sum": "add", "reduce_prod": "multiply", "reduce_max": "maximum", "reduce_min": "minimum"}
_REDUCTIONS |= {"reduce_and": "logical_and", "reduce_or": "logical_or"}
_NAMES = {ufunc for _, ufunc in _OPERATORS.values() if ufunc} | {*_FUNCTIONS.values(), *_REDUCTIONS.values()}
_NAMES |= {"array", "asarray", "broadcast_to", "concatenate", "dot", "stack", "tensordot", "where"}
_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")
_IDENTITIES = ("optimization_barrier", "copy", "copy_p", "stop_gradient")


class Program:
    """A traced update in two functions: `prepare(values)`, and `step(held, prepared, params, grads, outs)`.

    `prepare` computes what depends on the hyperparameters alone. `step` returns the new `held`, which is the state, and
    writes the new parameters to `outs`. All are tuples in the order of the trace's arguments. Where `flat` is True, an item
    of `params` and of `grads` is a list of arrays, which are laid end to end; those of `params` are flat. Nothing else is
    changed.

    Raises:
        NotInNumpy: if the trace has an operation that is not among those above.
    """

    def __init__(self, closed: Any, flat: Sequence[bool]) -> None:
        self.statements: list[Statement] = []
        self.constants: dict[str, Any] = {name: getattr(np, name) for name in _NAMES}
        self._values: dict[Any, Value] = {}
        self._gathered: dict[Any, str] = {}  # how arguments that are lists are laid end to end, as long as they are not
        count = len(flat)
        jaxpr = closed.jaxpr
        self._num_held = len(jaxpr.invars) - 2 * count - 1
        names = [*(f"held{i}" for i in range(self._num_held)), "values"]
        names += [f"{kind}{i}" for kind in ("param", "grad") for i in range(count)]
        are_lists = [*[False] * (self._num_held + 1), *flat, *flat]
        for name, var, is_list in zip(names, jaxpr.invars, are_lists, strict=True):
            if is_list:
                self._gathered[var] = f"concatenate({name}{', None' if name[0] == 'g' else ''})"
            else:
                self._values[var] = Value(name, not var.aval.shape, var.aval.shape, np.dtype(var.aval.dtype))
        for var, constant in zip(jaxpr.constvars, closed.consts, strict=True):
            self._values[var] = self._constant(np.asarray(constant))
        self._equations(jaxpr)
        held = [self._lasting(self._read(var)) for var in jaxpr.outvars[: self._num_held]]
        params = [self._full(self._read(var)).key for var in jaxpr.outvars[self._num_held :]]
        space: dict[str, Any] = dict(self.constants)
        exec("\n".join(self._source(held, params, count)), space)  # noqa: S102  # nothing of it comes from outside
        self.prepare: Callable[[Any], tuple[Any, ...]] = space["prepare"]
        self.step: Callable[..., tuple[Any, ...]] = space["step"]

    # -- the operations -----------------------------------------------------------------------------------------------

    def _read(self, atom: Any) -> Value:
        aval: Any = atom.aval
        if isinstance(atom, jax_core.Literal):
            return self._constant(np.asarray(atom.val, aval.dtype))
        if atom in self._gathered:  # where it is used first, so that the arrays are in the processor's cache
            self._values[atom] = self._add(self._gathered.pop(atom), [], aval)
        return self._values[atom]

    def _constant(self, array: Any) -> Value:
        name = f"constant{len(self.constants)}"
        self.constants[name] = array
        return Value(name, not array.shape, array.shape, array.dtype)

    def _add(self, template: str, args: Sequence[Value], aval: Any, scalar: bool = False, **more: Any) -> Value:
        out, dtype = len(self.statements), np.dtype(aval.dtype)
        scalar = scalar or not aval.shape
        size = () if scalar else (aval.shape, dtype)
        self.statements.append(Statement(out, template, tuple([arg.key for arg in args]), size=size, **more))
        return Value(out, scalar, aval.shape, dtype)

    def _full(self, value: Value) -> Value:
        """A value with the shape that the trace says it has."""
        if not value.scalar or not value.shape:
            return value
        return self._add(f"broadcast_to({{0}}, {value.shape})", [value], _like(value), is_own=False)

    def _lasting(self, value: Value) -> Key:
        """An output that shares no memory with what else is there."""
        value = self._full(value)
        if isinstance(value.key, int) and (value.scalar or self.statements[value.key].is_own):
            return value.key
        return self._add("array({0})", [value], _like(value)).key

    def _equations(self, jaxpr: Any) -> None:
        for eqn in jaxpr.eqns:
            name, ins = eqn.primitive.name, [self._read(var) for var in eqn.invars]
            if name in _CALLS:
                inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
                body = getattr(inner, "jaxpr", inner)
                constants = map(self._constant, map(np.asarray, getattr(inner, "consts", ())))
                self._values |= zip(body.constvars, constants, strict=True)
                self._values |= zip(body.invars, ins, strict=True)
                self._equations(body)
                outs = [self._read(var) for var in body.outvars]
            elif name in _IDENTITIES:
                outs = ins
            else:
                outs = [self._operation(name, eqn, ins, eqn.outvars[0].aval)]
            self._values |= zip(eqn.outvars, outs, strict=True)

    def _operation(self, name: str, eqn: Any, ins: list[Value], aval: Any) -> Value:
        first, params = ins[0], eqn.params
        scalar = all([value.scalar for value in ins])
        if name in _OPERATORS and not (name == "div" and first.dtype.kind != "f"):
            symbol, ufunc = _OPERATORS[name]
            return self._add(f"{{0}} {symbol} {{1}}", ins, aval, scalar, ufunc=ufunc)
        if name == "div" and first.dtype.kind == "i":  # towards zero
            return self._add("({0} - fmod({0}, {1})) // {1}", ins, aval, scalar)
        if name in _FUNCTIONS and not (name == "not" and first.dtype.kind != "b"):
            places = ", ".join(f"{{{i}}}" for i in range(len(ins)))
            ufunc = _FUNCTIONS[name]
            return self._add(f"{ufunc}({places})", ins, aval, scalar, ufunc=ufunc)
        if name in _REDUCTIONS:
            axes, dtype = tuple(params["axes"]), self._constant(np.empty(0, aval.dtype)).key
            return self._add(f"{_REDUCTIONS[name]}.reduce({{0}}, {axes}, {dtype}.dtype)", [self._full(first)], aval)
        operation = getattr(self, f"_{name}", None)
        if operation is None:
            raise NotInNumpy(f"it uses {name}")
        found: Value = operation(ins, params, aval, scalar)
        return found

    def _rsqrt(self, ins: list[Value], params: Any, aval: Any, scalar: bool) -> Value:
        return self._add("1 / sqrt({0})", ins, aval, scalar)

    def _logistic(self, ins: list[Value], params: Any, aval: Any, scalar: bool) -> Value:
        return self._add("1 / (1 + exp(-{0}))", ins, aval, scalar)

    def _integer_pow(self, ins: list[Value], params: Any, aval: Any, scalar: bool) -> Value:
        return self._add(f"{{0}} ** {params['y']}", ins, aval, scalar)

    def _pow(self, ins: list[Value], params: Any, aval: Any, scalar: bool) -> Value:
        base, exponent = ins
        if exponent.dtype != base.dtype:
            exponent = self._convert(exponent, jax.ShapeDtypeStruct(exponent.shape, base.dtype))
        return self._add("{0} ** {1}", [base, exponent], aval, scalar)

    def _clamp(self, ins: list[Value], params: Any, aval: Any, scalar: bool) -> Value:
        return self._add("minimum(maximum({1}, {0}), {2})", ins, aval, scalar)

    def _select_n(self, ins: list[Value], params: Any, aval: Any, scalar: bool) -> Value:
        chooser, *cases = ins
        if len(cases) != 2 or chooser.dtype.kind != "b":
            raise NotInNumpy(f"it uses select_n of {len(cases)} cases")
        if not chooser.scalar:
            return self._add("where({0}, {2}, {1})", ins, aval)
        if not all([case.scalar for case in cases]):
            cases = [self._full(case) for case in cases]
        return self._add("{2} if {0} else {1}", [chooser, *cases], aval, scalar, is_choice=True, is_own=False)

    def _convert_element_type(self, ins: list[Value], params: Any, aval: Any, scalar: bool) -> Value:
        return self._convert(ins[0], aval)

    def _convert(self, value: Value, aval: Any) -> Value:
        new = np.dtype(aval.dtype)
        if new == value.dtype:
            return value
        if new.kind != "f" and value.dtype.kind not in "bi" or new.kind not in "fi":
            raise NotInNumpy(f"it converts {value.dtype} to {new}")
        dtype = self._constant(np.empty(0, new)).key
        return self._add(f"{{0}}.astype({dtype}.dtype)", [value], aval, value.scalar)

    def _dot_general(self, ins: list[Value], params: Any, aval: Any, scalar: bool) -> Value:
        contracted, batch = params["dimension_numbers"]
        if any(batch) or {value.dtype for value in ins} != {np.dtype(aval.dtype)}:
            raise NotInNumpy("it uses dot_general of batches, or of several dtypes")
        axes = tuple(map(tuple, contracted))
        call = "dot({0}, {1})" if axes == ((0,), (0,)) and not aval.shape else f"tensordot({{0}}, {{1}}, {axes})"
        return self._add(call, list(map(self._full, ins)), aval)

    # -- shapes -------------------------------------------------------------------------------------------------------

    def _view(self, template: str, value: Value, aval: Any) -> Value:
        return self._add(template, [self._full(value)], aval, is_own=False)

    def _broadcast_in_dim(self, ins: list[Value], params: Any, aval: Any, scalar: bool) -> Value:
        if scalar:
            return ins[0]._replace(shape=aval.shape)
        ones = [1] * len(aval.shape)
        for axis, place in enumerate(params["broadcast_dimensions"]):
            ones[place] = ins[0].shape[axis]
        return self._view(f"broadcast_to({{0}}.reshape({tuple(ones)}), {aval.shape})", ins[0], aval)

    def _reshape(self, ins: list[Value], params: Any, aval: Any, scalar: bool) -> Value:
        if params.get("dimensions") is not None:
            raise NotInNumpy("it uses reshape of permuted dimensions")
        return ins[0]._replace(shape=aval.shape) if scalar else self._view(f"{{0}}.reshape({aval.shape})", ins[0], aval)

    def _squeeze(self, ins: list[Value], params: Any, aval: Any, scalar: bool) -> Value:
        made = self.statements[ins[0].key] if isinstance(ins[0].key, int) else None
        if made is not None and ins[0].shape == (1,) and made.template.endswith(":1]"):  # an element of a vector
            return self._add(f"{{0}}[{made.template[4:].partition(':')[0]}]", [ins[0]._replace(key=made.args[0])], aval)
        return self._reshape(ins, {}, aval, scalar)

    def _slice(self, ins: list[Value], params: Any, aval: Any, scalar: bool) -> Value:
        starts, steps = params["start_indices"], params["strides"] or [1] * len(aval.shape)
        parts = [f"{a}:{b}:{c}" for a, b, c in zip(starts, params["limit_indices"], steps, strict=True)]
        if aval.shape == (1,):
            parts = [f"{starts[0]}:{starts[0] + 1}:1"]
        return self._view(f"{{0}}[{', '.join(parts)}]", ins[0], aval)

    def _transpose(self, ins: list[Value], params: Any, aval: Any, scalar: bool) -> Value:
        return self._view(f"{{0}}.transpose({tuple(params['permutation'])})", ins[0], aval)

    def _concatenate(self, ins: list[Value], params: Any, aval: Any, scalar: bool) -> Value:
        places = "".join(f"{{{i}}}, " for i in range(len(ins)))
        return self._add(f"concatenate(({places}), {params['dimension']})", [self._full(value) for value in ins], aval)

    def _stack(self, ins: list[Value], params: Any, aval: Any, scalar: bool) -> Value:
        places = "".join(f"{{{i}}}, " for i in range(len(ins)))
        return self._add(f"stack(({places}), {params['axis']})", [self._full(value) for value in ins], aval)

    # -- the source ---------------------------------------------------------------------------------------------------

    def _source(self, held: list[Key], params: list[Key], count: int) -> Iterator[str]:
        """The lines of `prepare` and of `step`."""
        outputs: set[Key] = {*held, *params}
        needed = set(outputs)
        for statement in reversed(self.statements):
            if statement.out in needed:
                needed.update(statement.args)
        early: set[Key] = {"values", *self.constants}  # what depends on the hyperparameters alone
        first: list[Statement] = []
        later: list[Statement] = []
        for statement in self.statements:
            if statement.out in needed:
                is_early = bool(statement.args) and early.issuperset(statement.args)
                early |= {statement.out} if is_early else set()
                (first if is_early else later).append(statement)
        used = outputs.union(*(statement.args for statement in later))
        passed = [statement.out for statement in first if statement.out in used]
        lines, names = Layout(first, passed, {}, {}).written()
        yield from ("def prepare(values):", *lines)
        yield f"    return {in_tuple([f'asarray({names[key]})' for key in passed])}"
        yield "def step(held, prepared, params, grads, outs):"
        yield f"    {in_tuple([f'held{i}' for i in range(self._num_held)])} = held"
        yield f"    {in_tuple([f'known{key}' for key in passed])} = prepared"
        for kind in ("param", "grad", "out"):
            yield f"    {in_tuple([f'{kind}{i}' for i in range(count)])} = {kind}s"
        into: dict[Key, str] = {key: f"out{i}" for i, key in enumerate(params) if key not in held}
        lines, names = Layout(later, [*held, *params], {key: f"known{key}" for key in passed}, into).written()
        yield from lines
        yield from (f"    out{i}[...] = {names[key]}" for i, key in enumerate(params) if names[key] != f"out{i}")
        yield f"    return {in_tuple([names[key] for key in held])}"


def _like(value: Value) -> Any:
    return jax.ShapeDtypeStruct(value.shape, value.dtype)
