"""`export`: a model or a step as a program that runs without this library and without the user's code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.tree_util import tree_unflatten

from .engine.argument_names import names_of_cells
from .engine.arguments import DATA, FLAT, Arguments, abstract_data, unfold
from .engine.names.modules import stateful_objects
from .engine.tracing import Purpose, Traced, trace_with_all
from .jit import Jitted
from .module import random
from .module.module import Module
from .module.torch_habits import check_function
from .runtime.install import command
from .runtime.platforms import for_other_platforms
from .runtime.tracebacks import trim
from .state.cell import Cell
from .state.errors import TraceError
from .state.frame import is_eager
from .state.gradient import starting_value
from .state.static_values import holds_state, is_array, shown


class _Exported(jax.export.Exported):
    """A `jax.export.Exported` that says how to install what `serialize` needs."""

    def serialize(self, vjp_order: int = 0) -> bytearray:
        try:
            return super().serialize(vjp_order)
        except ImportError as error:
            if "flatbuffers" not in str(error):
                raise
            raise ImportError(
                f"serialising an exported program needs a library that cannot be imported here ({error}). Install it"
                f" {command('export')}",
                name="flatbuffers",
            ) from error


@overload
def export(
    fn: Callable[..., Any],
    *args: Any,
    with_state: Literal[True],
    platforms: Sequence[str] | None = None,
    **kwargs: Any,
) -> tuple[jax.export.Exported, dict[str, jax.Array]]: ...
@overload
def export(
    fn: Callable[..., Any],
    *args: Any,
    with_state: Literal[False] = False,
    platforms: Sequence[str] | None = None,
    **kwargs: Any,
) -> jax.export.Exported: ...
def export(
    fn: Callable[..., Any],
    *args: Any,
    with_state: bool = False,
    platforms: Sequence[str] | None = None,
    **kwargs: Any,
) -> Any:
    """Return a model or a function as a `jax.export.Exported`, which runs without this library and without your code.

    `exported.serialize()` returns its bytes. In another process, `jax.export.deserialize(data).call(*args)` runs them. That
    process needs JAX, of this version or up to some months newer (JAX says how long), and nothing else.

    Without `with_state`, parameters, buffers and arrays that the code names are constants of the program, with the values of
    now. The function may not change state: call `model.eval()` first, since BatchNorm and Dropout change it while training.
    A function that draws random numbers takes a key: `mt.export(fn, key, x)`, with `with mt.rng(key):` around what draws.

    With `with_state`, the program is a pure function of a state: `result, state = exported.call(state, *args)`. It may be a
    training step. The state is a dict of the arrays that the function reads or changes, by names such as `model.0.weight`
    and `random_stream`: parameters, buffers, the optimizer's state, step counts and hyperparameters. Each new state has the
    names of the old one. A module's entries without the first name are those of its `state_dict()`; an optimizer's are its
    leaves, which have no other use.

    Args:
        fn: the function, or a module, a method or what `mt.jit` returns. It takes modules as arguments or by name.
        *args, **kwargs: as in a call. Each array may be a `jax.ShapeDtypeStruct`, with dimensions of
            `jax.export.symbolic_shape` for a batch of any size. Values of arrays do not count. Arguments without arrays
            (modules, strings, booleans, None) become part of the program, and the exported call leaves them out. In a
            container, None stands for them.
        with_state: True for a function of its state, as said above.
        platforms: the platforms for which the program is lowered, such as `("cpu", "cuda")`; by default the present one.

    Returns:
        The `jax.export.Exported`. With `with_state`, it and the present state.

    Raises:
        ValueError: if the function changes state, and `with_state` is False; if arrays of a module are not there.
        TypeError: if the result holds anything but arrays and numbers.
        TraceError: in compiled code, or as `mt.jit`; also for a step that turns a schedule into a number.
        ImportError: from `exported.serialize()`, if flatbuffers, the extra `export`, is not installed.

    Options for XLA are not part of it: give them where it runs, `jax.jit(exported.call, compiler_options=...)`.

    Source: `jax.export`.

    Example:
        >>> import jax, jax.numpy as jnp, minitorch_jax as mt
        >>> from minitorch_jax import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
        >>> (n,) = jax.export.symbolic_shape("n")
        >>> exported = mt.export(model, jax.ShapeDtypeStruct((n, 3), jnp.float32))
        >>> exported.call(jnp.ones((5, 3))).shape
        (5, 2)
    """
    try:
        check_function(fn, "mt.export")
        if not is_eager():
            raise TraceError(
                "mt.export was called in code that is traced. Call it outside: the program is one of its own"
            )
        away = for_other_platforms() if platforms is not None and set(platforms) != {"cpu"} else nullcontext()
        with jax.disable_jit(False), away:
            return _export(fn, args, kwargs, with_state, platforms)
    except Exception as error:
        trim(error)
        raise


def _export(fn: Any, args: Any, kwargs: Any, with_state: bool, platforms: Sequence[str] | None) -> Any:
    name = getattr(fn, "__name__", type(fn).__name__)
    is_module = holds_state(fn) or holds_state(getattr(fn, "__wrapped__", None))
    if isinstance(fn, Jitted):
        fn, args, kwargs = fn.with_statics_fixed(args, kwargs)
    fn, args, kwargs = unfold(fn, *abstract_data((args, kwargs)))
    call = Arguments(fn, args, kwargs)
    reached = sorted(stateful_objects(fn).objects, key=lambda obj: not isinstance(obj, Module))
    call.objects += [*reached, random.current()]  # modules first: a parameter is named after the first that has it
    shapes = [jax.ShapeDtypeStruct(t.shape, t.dtype, weak_type=t.weak_type) for t in map(_type_of, call.data)]
    purpose = Purpose(_checking(name), gradients=True, keep_grads=False, statics=False)
    traced, lifted = trace_with_all(call, purpose, data=shapes)
    values = [starting_value(cell) for cell in lifted]
    names = _names(call, lifted, is_module)
    abstract = [names[c] for c, value in zip(lifted, values, strict=True) if isinstance(value, jax.ShapeDtypeStruct)]
    if abstract:
        raise ValueError(f"mt.export needs the arrays of modules, and {abstract[0]} has none: it is a model of shapes")
    if any(traced.settings):
        raise TraceError(
            f"{name} gives an optimizer another kind of setting (a number for a schedule, say), which the exported program"
            " could not repeat. Assign it before"
        )
    if not with_state:
        _refuse_changes(name, [lifted[i] for i in (*traced.written, *traced.dropped)], names)

        def pure(*args: Any, **kwargs: Any) -> Any:
            return traced(values, jax.tree.leaves((args, kwargs)))[0]

        return _exported(pure, name, platforms, (), *_in_call(call, shapes))
    begun = [i for i in traced.written if values[i] is None]
    if begun:  # gradients that the step begins: a state has the same arrays before and after it
        for i in begun:
            end = traced.shapes[1][traced.written.index(i)]
            values[i] = None if end is None else jnp.zeros(end.shape, end.dtype)
        traced = Traced(call, lifted, values, shapes, purpose)
    held = sorted({*traced.used, *traced.written})
    held = [i for i in held if values[i] is not None and i not in traced.dropped]
    state = {names[lifted[i]]: _shown_value(lifted[i], values[i]) for i in held}

    def step(state: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs = list(values)
        for i in held:
            inputs[i] = _kept_value(lifted[i], state[names[lifted[i]]], values[i])
        out, written = traced(inputs, jax.tree.leaves((args, kwargs)))
        new = dict(zip(traced.written, written, strict=True))
        after = {i: jnp.zeros_like(inputs[i]) if new.get(i, i) is None else new.get(i, inputs[i]) for i in held}
        return out, {names[lifted[i]]: _shown_value(lifted[i], after[i]) for i in held}

    return _exported(step, name, platforms, (state,), *_in_call(call, shapes)), state


def _exported(
    pure: Callable[..., Any], name: str, platforms: Sequence[str] | None, first: tuple[Any, ...], args: Any, kwargs: Any
) -> jax.export.Exported:
    pure.__name__ = pure.__qualname__ = name
    found = jax.export.export(jax.jit(pure), platforms=platforms)(*first, *args, **kwargs)
    exported = object.__new__(_Exported)
    vars(exported).update(vars(found))
    return exported


def _in_call(call: Arguments, shapes: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of an exported call: those of the call without what is no array."""
    data = iter(shapes)
    leaves = [next(data) if code is DATA else None for code in call.template]
    args, kwargs = (leaves, {}) if call.treedef is FLAT else tree_unflatten(call.treedef, leaves)
    return tuple([arg for arg in args if jax.tree.leaves(arg)]), {k: v for k, v in kwargs.items() if jax.tree.leaves(v)}


def _type_of(value: Any) -> Any:
    return value if isinstance(value, jax.ShapeDtypeStruct) else jax.typeof(value)


def _names(call: Arguments, lifted: Sequence[Cell], is_module: bool) -> dict[Cell, str]:
    """Return the name of each cell: `model.0.weight`, and in a module that is exported itself `0.weight`."""
    found: dict[str, Cell] = {}
    for cell, (first, end) in zip(lifted, names_of_cells(call, lifted), strict=True):
        text = end.removeprefix(".") if is_module and first == "self" else first + end
        number = 2
        while text in found:  # two objects that have no name of their own
            text, number = f"{first}_{number}{end}", number + 1
        found[text] = cell
    return {cell: text for text, cell in found.items()}


def _refuse_changes(name: str, changed: Sequence[Cell], names: dict[Cell, str]) -> None:
    """Raise ValueError if the function changes state."""
    if not changed:
        return
    listed = ", ".join([names[cell] for cell in changed[:3]]) + (f" and {len(changed) - 3} more" if changed[3:] else "")
    if all(cell is random.current().cell for cell in changed):
        fix = (
            "draws random numbers. Call `model.eval()` first, or give the function a key: `with mt.rng(key): model(x)`"
        )
    else:
        fix = f"changes {listed}. Call `model.eval()` first, if that is a model that trains"
    raise ValueError(
        f"an exported program is a pure function, and {name} {fix}; or write `mt.export({name}, ..., with_state=True)` for a"
        " function `(state, *args) -> (result, state)`"
    )


def _checking(name: str) -> Callable[[Any, list[Any]], Any]:
    def check(out: Any, objects: list[Any]) -> Any:
        for leaf in jax.tree.leaves(out, is_leaf=holds_state):
            if not is_array(leaf) and not isinstance(leaf, bool | int | float | complex):
                raise TypeError(
                    f"an exported program returns arrays, and {name} returns {shown(leaf)} ({type(leaf).__name__}). Leave it"
                    " out of the result"
                )
        return out

    return check


def _shown_value(cell: Cell, value: Any) -> Any:
    """Return a cell's value as a state has it, in a dtype of its own."""
    return value if cell.encoding is None else cell.encoding.decode(value)


def _kept_value(cell: Cell, value: Any, like: Any) -> Any:
    """Undo `_shown_value`."""
    return value if cell.encoding is None else cell.encoding.encode(value, like)
