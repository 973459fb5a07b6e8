"""The user's names for what a trace is given, for JAX's messages: `x`, `batch['image']`, `model.0.weight`."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, groupby, islice
from typing import Any

import jax
from jax.tree_util import keystr, tree_flatten_with_path, tree_unflatten

from ..module.module import Module
from ..module.random import Stream
from ..state.cell import Cell
from ..state.static_values import holds_state
from ..state.walk import walk_of
from .arguments import DATA, FLAT, OBJECT, Arguments

Name = tuple[str, str]  # of a parameter of the user's function; and what follows it, such as ".0.weight" or "['image']"


class Given:
    """Consecutive inputs of a trace that come from one argument of the user's function. A pytree that names its leaves."""

    def __init__(self, ends: tuple[str, ...], values: Sequence[Any]) -> None:
        self.ends, self.values = ends, values


jax.tree_util.register_pytree_with_keys(
    Given,
    lambda given: (zip(given.ends, given.values, strict=True), given.ends),
    lambda ends, values: Given(ends, list(values)),
    lambda given: (given.values, given.ends),
)


def names_of_cells(call: Arguments, lifted: Sequence[Cell]) -> list[Name]:
    """Return the names of cells of a call, with what follows the name of the parameter or variable."""
    return _names(call, _target_of(call), lifted, 0)


def named(
    pure: Callable[[list[Any], tuple[Any, ...]], Any],
    call: Arguments,
    lifted: Sequence[Cell],
    values: Sequence[Any],
    data: Sequence[Any],
) -> tuple[Callable[..., Any], list[Given]]:
    """Return `pure(values, data)` as a function of other arguments, and these arguments, named for JAX's messages.

    JAX takes the name, the file and the line of a function from the one that it wraps, and the names of arguments from its
    signature and the keys of pytrees.
    """
    target = _target_of(call)
    try:
        names = _names(call, target, lifted, len(data))
        parameters, sizes = _parameters(names)
    except Exception:  # of code of the user's that is looked at, such as a `__getattr__`: a name is not worth an error
        names = [("values", "")] * len(lifted) + [("data", "")] * len(data)
        parameters, sizes = _parameters(names)
    inputs, ends = iter([*values, *data]), iter([end for _, end in names])
    groups = [Given(tuple(islice(ends, size)), list(islice(inputs, size))) for size in sizes]

    def run(*groups: Given) -> Any:
        flat = list(chain.from_iterable(group.values for group in groups))
        return pure(flat[: len(values)], tuple(flat[len(values) :]))

    run.__wrapped__ = target if hasattr(target, "__code__") else type(target).__call__  # type: ignore[attr-defined]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run, groups


def _target_of(call: Arguments) -> Any:
    """Return the user's function of a call."""
    target = inspect.unwrap(call.fn)
    return type(call.objects[0]).forward if target is Module.__call__ and call.objects else target


class _Leaf(int):
    """Stands for an object or an array among the arguments: its number."""


def _names(call: Arguments, target: Any, lifted: Sequence[Cell], num_data: int) -> list[Name]:
    """Return the names of the cells of a trace and of its data."""
    marks: list[Any] = [_Leaf(i) if item in (DATA, OBJECT) else item[1] for i, item in enumerate(call.template)]
    args, kwargs = (marks, {}) if call.treedef is FLAT else tree_unflatten(call.treedef, marks)
    restored = getattr(call.fn, "restored", None)  # see `jit.py`: arguments in another order than the user's
    if restored is not None:
        args, kwargs = restored(*args)
    found: dict[int, Name] = {}
    for label, leaf in named_leaves(target, args, kwargs):
        if type(leaf) is _Leaf:
            name, bracket, end = label.partition("[")
            found[leaf] = name, bracket + end
    objects, data = ([found[i] for i, item in enumerate(call.template) if item is kind] for kind in (OBJECT, DATA))
    others = call.objects[len(objects) :]
    known = dict(_names_in(target)) if len(others) > 1 else {}  # one is the random stream
    for obj in others:
        name = "random_stream" if isinstance(obj, Stream) else type(obj).__name__
        objects.append(known.get(id(obj), (name, "")))
    cells = _names_of_cells(call.objects, objects)
    extra = [("data", f"[{i}]") for i in range(len(data), num_data)]
    return [*(cells[cell] for cell in lifted), *data[:num_data], *extra]


def named_leaves(fn: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Leaves of the arguments, named as the function's signature names them."""
    names = _parameter_names(fn, len(args))
    for name, value in [*zip(names, args, strict=True), *sorted(kwargs.items())]:
        for path, leaf in tree_flatten_with_path(value, is_leaf=holds_state)[0]:
            yield name + keystr(path), leaf


def _parameter_names(fn: Any, count: int) -> list[str]:
    parameters: list[inspect.Parameter] = []
    with suppress(Exception):  # also of the user's `__signature__`
        parameters = list(inspect.signature(fn).parameters.values())
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")
    more = [f"{rest}[{i}]" for i in range(count - len(positional))]
    return [*positional, *more][:count]


def _names_of_cells(objects: Sequence[Any], names: Sequence[Name]) -> dict[Cell, Name]:
    """Return a name for each cell of some objects, after the first object that holds it."""
    found: dict[Cell, Name] = {}
    for obj, (name, end) in zip(objects, names, strict=True):
        for path, cell in walk_of(obj).named():
            end_of_cell = f"{end}.{path}" if path else end
            found.setdefault(cell, (name, end_of_cell))
            if cell.grad is not None:
                found.setdefault(cell.grad, (name, f"{end_of_cell}'s gradient"))
    return found


def _names_in(fn: Any) -> Iterator[tuple[int, Name]]:
    """`(id, name)` of the objects that a function refers to by name, or by an attribute of a name: `net`, `self.net`."""
    code = getattr(fn, "__code__", None)
    if not isinstance(code, types.CodeType):
        return
    named = {name: fn.__globals__.get(name) for name in _global_names(code)}
    for name, variable in zip(code.co_freevars, fn.__closure__ or (), strict=True):
        with suppress(ValueError):  # not yet bound
            named[name] = variable.cell_contents
    if isinstance(fn, types.MethodType):
        named[code.co_varnames[0]] = fn.__self__
    for name, value in named.items():
        if not holds_state(value) and not isinstance(value, types.ModuleType):
            for key, inner in list(getattr(value, "__dict__", {}).items()):
                yield id(inner), (name, f".{key}")
    yield from ((id(value), (name, "")) for name, value in named.items())  # the shorter name counts


def _global_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)


def _parameters(names: Sequence[Name]) -> tuple[list[inspect.Parameter], list[int]]:
    """Return a parameter for each run of equal first names, and the lengths of the runs.

    All names differ: of the two runs of `step((model, x))` the model's gets a "_".
    """
    used: dict[str, int] = {}
    for name, run in reversed([(name, len(list(run))) for name, run in groupby(name for name, _ in names)]):
        while name in used:
            name += "_"
        used[name] = run
    kind = inspect.Parameter.POSITIONAL_ONLY
    return [inspect.Parameter(name, kind) for name in reversed(used)], list(reversed(used.values()))
