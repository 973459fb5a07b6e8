"""`scan`: running many steps of stateful code in one XLA program."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, TypeVarTuple

import jax
import jax.numpy as jnp
import numpy as np

from .engine import disabled_jit
from .engine.arguments import Arguments, unwrap_output, wrap_output
from .engine.compiled_function import Function
from .engine.compiler_options import CompilerOptions, Options, as_options, refuse_inside
from .engine.kept_with_owner import Functions
from .engine.names import modules as named_modules
from .engine.tracing import Purpose, Traced, paths_of, touch_all, trace_with_all
from .module import random
from .module.torch_habits import check_function
from .runtime.bounded_cache import Kept
from .runtime.numpy_memory import owned_data
from .runtime.tracebacks import trim
from .state import access
from .state.frame import is_eager
from .state.gradient import CONSUMED, gradient, starting_value
from .state.static_values import holds_state
from .state.undo import all_or_nothing

R = TypeVar("R")
Slices = TypeVarTuple("Slices")


def scan(
    fn: Callable[[*Slices], R],
    *stacked: *Slices,
    length: int | None = None,
    unroll: int = 1,
    keep_grads: bool = False,
    compiler_options: CompilerOptions | None = None,
) -> R:
    """Run `fn` over the leading axis of its arguments in one XLA program (`jax.lax.scan`), and return the stacked results.

    `fn` is ordinary eager code, as for `mt.jit`. Its changes of modules, optimizers and random streams are passed on from
    step to step, and stored at the end. If the call raises, it changes nothing. One call runs any number of training steps.

    Args:
        fn: the function of one step, called as `fn(*slices)`.
        *stacked: arrays, or pytrees of arrays, whose leading axes have the same length. Modules, optimizers and static
            values are passed to each step unchanged.
        length: the number of steps, needed if there are no arrays.
        unroll: how many steps XLA unrolls into one iteration of the loop.
        keep_grads: as in `mt.jit`.
        compiler_options: as in `mt.jit`.

    Returns:
        The results of `fn`: each array has a new leading axis of size `length`.

    Raises:
        ValueError: if the leading axes differ in length, or if there are no arrays and no `length`; if XLA refuses an option.
        TraceError: as `mt.jit`.

    Example:
        >>> import jax, jax.numpy as jnp, minitorch_jax as mt
        >>> from minitorch_jax import nn
        >>> model = nn.Linear(2, 1, key=jax.random.key(0))
        >>> opt = mt.Optimizer([model], lr=0.1)
        >>> def train_step(x):
        ...     opt.zero_grad()
        ...     loss = mt.backward(lambda x: (model(x) ** 2).mean(), x)
        ...     opt.step()
        ...     return loss
        >>> mt.scan(train_step, jnp.ones((5, 4, 2))).shape
        (5,)
    """
    try:
        check_function(fn, "mt.scan")
        options = as_options(compiler_options, "mt.scan")
        if not is_eager():
            refuse_inside(options, "mt.scan")
            return _scan(fn, stacked, length, unroll, keep_grads)
        return _scan_eagerly(fn, stacked, length, unroll, keep_grads, options)
    except Exception as error:
        trim(error)
        raise


def _scan_eagerly(
    fn: Any, stacked: tuple[Any, ...], length: int | None, unroll: int, keep_grads: bool, options: Options
) -> Any:
    """Do what `scan` does, in eager code."""
    empty = any([np.shape(leaf)[:1] == (0,) for leaf in jax.tree.leaves(stacked)])  # no steps need another program
    key = length, unroll, keep_grads, empty, options
    scans: Kept = _scans.get(fn)
    function: Function = scans.get(key) or scans.set(key, _make_scan(keep_grads, options, fn))

    def target(*stacked: Any) -> Any:
        return _scan(fn, stacked, length, unroll, keep_grads)

    target.__wrapped__ = target.stands_for = fn  # type: ignore[attr-defined]
    (out,), binding = function.run(target, stacked, {})
    return (
        unwrap_output(out, function.objects_of(target, stacked, {}))
        if binding is not None and binding.program.wraps
        else out
    )


_scans = Functions(lambda _: Kept())  # for each function, its compiled scans by length and options


def _make_scan(keep_grads: bool, options: Options, fn: Any) -> Function:
    purpose = Purpose(wrap_output, gradients=True, keep_grads=keep_grads, statics=False, options=options)
    function = Function(fn, purpose)
    function.name = function.compilations.name = f"scan of {function.name}"
    return function


@all_or_nothing
def _scan(fn: Any, stacked: tuple[Any, ...], length: int | None, unroll: int, keep_grads: bool) -> Any:
    """Do what `scan` does, within a trace."""
    call = Arguments(fn, stacked, {})
    arrays = [jnp.asarray(array) for array in owned_data(call.data)]
    for data in filter(_is_iterated, stacked):
        raise TypeError(
            f"mt.scan takes arrays and runs over their leading axis; it was given a {type(data).__name__}. Stack what it"
            " gives: `jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)`"
        )
    length = _length(arrays, length)
    if disabled_jit.is_plain():
        if length:
            return disabled_jit.loop(fn, call, arrays, length)
        with jax.disable_jit(False):  # without a step, only a trace shows what a step would return
            return _scan(fn, stacked, length, unroll, keep_grads)
    named_modules.add_found(named_modules.stateful_objects(fn), call.objects)
    call.objects.append(random.current())
    slices = [jax.ShapeDtypeStruct(array.shape[1:], array.dtype) for array in arrays]
    purpose = Purpose(_stackable, gradients=True, keep_grads=keep_grads, statics=False)
    traced, lifted = trace_with_all(call, purpose, data=slices)
    if any(traced.settings) and length:  # the first step changes the kind of a setting, so it differs from the others
        return _first_and_rest(fn, stacked, length, unroll, keep_grads)
    touch_all(call.objects)
    values = [starting_value(cell) for cell in lifted]
    while fresh := _begun_inside(traced, values):
        for i, shape in fresh.items():
            values[i] = jnp.zeros(shape.shape, shape.dtype)
        traced = Traced(call, lifted, values, slices, purpose)
    for i in traced.observed:
        if gradient(lifted[i]) is not None:  # `gradient` also records the read for the outer run
            values[i] = gradient(lifted[i])
    ends = dict(zip(traced.written, traced.shapes[1], strict=True))
    unseen = {i for i in traced.written if lifted[i].kind == "gradient" and i not in traced.observed}
    carried = [
        i for i in traced.written if ends[i] is not None or (isinstance(values[i], jax.Array) and i not in unseen)
    ]
    for i in carried:
        if i in unseen or values[i] is None:  # each step writes it before any read, so any start value will do
            values[i] = jnp.zeros(ends[i].shape, ends[i].dtype)

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], Any]:
        inputs = list(values)
        for i, value in zip(carried, carry, strict=True):
            inputs[i] = value
        out, written = traced(inputs, xs)
        new = dict(zip(traced.written, written, strict=True))
        return [jnp.zeros_like(values[i]) if new[i] is None else new[i] for i in carried], out

    final, out = jax.lax.scan(body, [values[i] for i in carried], arrays, length=length, unroll=unroll)
    changes: dict[int, Any] = {}
    if length:  # without a step nothing changes
        changes = {**dict.fromkeys(traced.written), **dict(zip(carried, final, strict=True))}
        changes |= dict.fromkeys(traced.dropped, CONSUMED)
    paths = paths_of(call.objects)
    for i in changes:
        label = paths.get(lifted[i], "a gradient")
        access.check_writable(lifted[i], label, call.objects[0])
    for i, value in changes.items():
        lifted[i].reached = lifted[i].reached or value is not None
        access.write(lifted[i], value, paths.get(lifted[i], "a gradient"), call.objects[0])
    return unwrap_output(out, call.objects)


def _first_and_rest(fn: Any, stacked: tuple[Any, ...], length: int, unroll: int, keep_grads: bool) -> Any:
    """Run the first step before the loop, and the other steps in it."""

    def part(take: Callable[[Any], Any]) -> Any:
        return jax.tree.map(lambda leaf: leaf if holds_state(leaf) else take(leaf), stacked, is_leaf=holds_state)

    first = fn(*part(lambda leaf: jnp.asarray(leaf)[0] if _is_data(leaf) else leaf))
    rest = _scan(
        fn, part(lambda leaf: jnp.asarray(leaf)[1:] if _is_data(leaf) else leaf), length - 1, unroll, keep_grads
    )

    def joined(one: Any, others: Any) -> Any:
        return jnp.concatenate([jnp.asarray(one)[None], others]) if _is_data(others) else others

    return jax.tree.map(joined, first, rest, is_leaf=holds_state)


def _is_data(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _begun_inside(traced: Traced, values: list[Any]) -> dict[int, Any]:
    """Return the shapes of gradients that start as None and end as arrays. A loop carries one shape, so they need arrays."""
    ends = zip(traced.written, traced.shapes[1], strict=True)
    return {i: end for i, end in ends if end is not None and values[i] is None and i in traced.observed}


def _is_iterated(data: Any) -> bool:
    """True for a loader of data, whose arrays only a loop would find. JAX itself refuses generators."""
    if not isinstance(data, Iterable) or isinstance(data, str | bytes) or hasattr(data, "shape"):
        return False
    return jax.tree_util.treedef_is_leaf(jax.tree.structure(data))


def _length(arrays: list[Any], length: int | None) -> int:
    """Return the number of steps."""
    if any(array.ndim == 0 for array in arrays):
        raise ValueError(
            "mt.scan runs over the leading axis, and a scalar has none: capture it by closure, or stack it"
        )
    lengths = {array.shape[0] for array in arrays} | ({length} if length is not None else set())
    if len(lengths) != 1 or min(lengths) < 0:
        found = ", ".join(str(array.shape) for array in arrays) or "no arrays"
        asked = "" if length is None else f" and length={length}"
        raise ValueError(f"mt.scan needs one leading axis common to all its arrays, or a length; got {found}{asked}")
    return lengths.pop()


def _stackable(out: Any, objects: list[Any]) -> Any:
    def convert(leaf: Any) -> Any:
        return jnp.asarray(leaf) if isinstance(leaf, bool | int | float | complex | np.generic) else leaf

    return wrap_output(jax.tree.map(convert, out, is_leaf=holds_state), objects)
