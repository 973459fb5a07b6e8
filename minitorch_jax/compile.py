"""`jit` and `scan`: stateful code as one XLA program."""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Callable, Sequence
from functools import partial, update_wrapper
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import cell as cells
from . import closures, plain, random
from .arguments import Arguments, Fixed, unfold, unwrap_output, wrap_output
from .autograd import objects_of, paths_of, touch_all
from .cell import CONSUMED, Cell, held, is_eager
from .containers import holds_state
from .function import Function, Functions, kept_for
from .memory import owned_data
from .program import Partition, Program
from .tracing import Purpose, Traced, trace_with_all, unaliased
from .undo import all_or_nothing


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


# -- jit --------------------------------------------------------------------------------------------------------------


class _Options(NamedTuple):
    """Of `jit`, by position and by name."""

    static_nums: frozenset[int] = frozenset()
    static_names: frozenset[str] = frozenset()
    donate_nums: frozenset[int] = frozenset()
    donate_names: frozenset[str] = frozenset()
    keep_grads: bool = False

    def without_self(self) -> _Options:
        """The same for a bound method."""
        static, donate = (frozenset(i - 1 for i in nums) for nums in (self.static_nums, self.donate_nums))
        return self._replace(static_nums=static, donate_nums=donate)


class _Order(NamedTuple):
    """How the arguments of a call were rearranged, those to be donated first."""

    places: tuple[int | str, ...]  # of each: its position, or its name

    def restored(self, values: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        by_place = dict(zip(self.places, (v.value if type(v) is Fixed else v for v in values), strict=True))
        args = [by_place[i] for i in range(len(by_place)) if i in by_place]
        return args, {name: value for name, value in by_place.items() if isinstance(name, str)}


class Jitted:
    """A function compiled by `mt.jit`."""

    def __init__(self, fn: Callable[..., Any], options: _Options) -> None:
        update_wrapper(self, fn if hasattr(fn, "__name__") else type(fn).__call__)
        self.__wrapped__ = fn
        self._options = options
        self._fn, self._before, self._kwargs = unfold(fn, (), {})
        self._arranges = bool(
            options.static_nums or options.static_names or options.donate_nums or options.donate_names
        )
        target = _arranged(self._fn) if self._arranges else self._fn
        count = _count_donated if options.donate_nums or options.donate_names else None
        purpose = Purpose(wrap_output, gradients=True, keep_grads=options.keep_grads, statics=False)
        self._target, self._function = target, Function(target, _WholeProgram, purpose, count)
        self._function.name = self._function.compilations.name = getattr(fn, "__name__", type(fn).__name__)
        self._changes_args = self._arranges or bool(self._before or self._kwargs)
        self._warned = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not is_eager():
            return all_or_nothing(self.__wrapped__)(*args, **kwargs)  # part of the program that is being traced
        if self._changes_args:
            args, kwargs = self._arrange(args, kwargs)
        (out,), binding = self._function.run(self._target, args, kwargs)
        if self._function.met and not self._warned:
            self._warn_of_met()
        return self._unwrap(out, args, kwargs) if binding is not None and binding.program.wraps else out

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        if holds_state(instance):  # an argument like others
            return types.MethodType(self, instance)
        return _bound_to(instance, self)

    @property
    def num_compiles(self) -> int:
        """How many programs have been compiled: one for each structure, shape and dtype."""
        return self._function.compilations.count

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """The program for these arguments, not run: `.as_text()`, `.compile().cost_analysis()`; see `jax.stages`."""
        args, kwargs = self._arrange(args, kwargs)
        return self._function.lower(self._target, args, kwargs)

    def _arrange(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as the compiled function takes them: static ones marked, those to be donated first."""
        options, before = self._options, self._before
        if not self._arranges:
            return (*before, *args), {**self._kwargs, **kwargs}
        named: list[tuple[int | str, Any]] = [*enumerate((*before, *args)), *{**self._kwargs, **kwargs}.items()]
        n = len(before)
        static = {*(i + n for i in options.static_nums), *options.static_names}
        donate = {*(i + n for i in options.donate_nums), *options.donate_names}
        named = [(place, Fixed(value) if place in static else value) for place, value in named]
        named = [item for item in named if item[0] in donate] + [item for item in named if item[0] not in donate]
        count = sum(place in donate for place, _ in named)
        order = _Order(tuple(place for place, _ in named))
        return (Fixed(order), Fixed(count), *(value for _, value in named)), {}

    def _unwrap(self, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return unwrap_output(out, objects_of(self._function, self._target, args, kwargs))

    def _warn_of_met(self) -> None:
        self._warned = True
        names = ", ".join(sorted({type(reference()).__name__ for reference in self._function.met}))
        warnings.warn(
            f"{self.__name__} reaches a {names} in a way that cannot be followed by name, so it must be traced at every"
            " call to see whether it still does. Pass it as an argument, or refer to it by a variable or attribute.",
            stacklevel=3,
        )

    __name__: str


def _arranged(fn: Any) -> Callable[..., Any]:
    def call(order: Fixed, count: Fixed, *values: Any) -> Any:
        args, kwargs = order.value.restored(values)
        return fn(*args, **kwargs)

    call.__wrapped__ = call.stands_for = fn  # type: ignore[attr-defined]
    return call


def _count_donated(call: Arguments) -> int:
    """How many of the data come first because they may be used up."""
    count: int = call.template[1][1].value
    return call.count_data(2 + count)


def _bound_to(instance: Any, method: Jitted) -> Jitted:
    def bound() -> Jitted:
        return Jitted(types.MethodType(method.__wrapped__, instance), method._options.without_self())

    kept = kept_for(instance)
    if kept is None:
        return bound()
    if method not in kept:
        kept.setdefault(method, bound())
    found: Jitted = kept[method]
    return found


def jit(
    fn: Callable[..., Any] | None = None,
    *,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    donate_argnums: int | Sequence[int] = (),
    donate_argnames: str | Sequence[str] = (),
    keep_grads: bool = False,
) -> Any:
    """Compile a function that reads and changes modules, optimizers and random streams into one XLA program.

    The body is ordinary eager code: `opt.zero_grad()`, `mt.backward`, `opt.step()`. What
    it uses may come as arguments (anywhere in a pytree) or by closure. Results are those of the eager code to the
    rounding of XLA's fusion, and happen wholly or not at all. Inside another `mt.jit`, or a plain JAX transform, the
    function is part of that.

    A second model or optimizer of the same structure uses the same program, as do new values, data and
    hyperparameters; a new shape, dtype, `training` mode or static attribute compiles another (`num_compiles` counts
    them). From the sixth on, a `RecompileWarning` says what changed. What its code names is followed, as in `backward`.

    Args:
        fn: the function; without it, `jit` gives a decorator. Methods and modules are fine.
        static_argnums, static_argnames: arguments that are part of what is compiled for; they must be hashable. Strings,
            booleans, functions and other hashable values are static anyway; numbers are traced.
        donate_argnums, donate_argnames: data that may be used up: their arrays are gone afterwards, but for those that a
            module, an optimizer or another argument holds too, which are copied. (Modules and optimizers are always
            updated in place.)
        keep_grads: give out, as `grads()`, also those gradients that an optimizer's step in the function has used up.
            Without it, reading one after the call is an error that says so: they would cost as many results as there
            are parameters. Gradients that no step has used are always given out.

    Returns:
        The compiled function, with `num_compiles` and `lower(*args)` (see `jax.stages`).

    Raises:
        TypeError, ValueError: for options that do not fit the function's signature.
        TraceError: when called, if a static attribute of a module (such as `training`) ends up changed, or an optimizer is
            given a schedule, a flag or other modules, or a setting that needs a state (momentum, say) goes from 0 to
            something else. (Numbers may be assigned: each call does so, for each optimizer that it is called with.)

    Example:
        >>> import jax, jax.numpy as jnp, minitorch_jax as mt
        >>> from minitorch_jax import nn
        >>> model = nn.Linear(2, 1, key=jax.random.key(0))
        >>> opt = mt.Optimizer([model], lr=0.1)
        >>> @mt.jit
        ... def train_step(x):
        ...     opt.zero_grad()
        ...     loss = mt.backward(lambda x: (model(x) ** 2).mean(), x)
        ...     opt.step()
        ...     return loss
        >>> losses = [float(train_step(jnp.ones((4, 2)))) for _ in range(3)]
        >>> losses[2] < losses[1] < losses[0], train_step.num_compiles
        (True, 1)
    """
    if fn is None:
        return partial(
            jit,
            static_argnums=static_argnums,
            static_argnames=static_argnames,
            donate_argnums=donate_argnums,
            donate_argnames=donate_argnames,
            keep_grads=keep_grads,
        )
    if not callable(fn):
        raise TypeError(f"mt.jit takes a function, not {fn!r}")
    static = _places(fn, static_argnums, static_argnames, "static_arg")
    donate = _places(fn, donate_argnums, donate_argnames, "donate_arg")
    if static[0] & donate[0] or static[1] & donate[1]:
        raise ValueError("mt.jit: an argument cannot be both static and donated")
    return Jitted(fn, _Options(*static, *donate, keep_grads))


def _places(
    fn: Any, nums: int | Sequence[int], names: str | Sequence[str], option: str
) -> tuple[frozenset[int], frozenset[str]]:
    """Positions and names of arguments that an option means, each found from the other."""
    nums = (nums,) if isinstance(nums, int) else tuple(nums)
    names = (names,) if isinstance(names, str) else tuple(names)
    if not nums and not names:
        return frozenset(), frozenset()
    parameters = list(inspect.signature(fn).parameters.values())
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    more = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for num in nums:
        if not -len(positional) <= num < len(positional) and not (more and num >= 0):
            raise ValueError(f"mt.jit: {option}nums has {num}, but the function takes {len(positional)} arguments")
    for name in names:
        if name not in [p.name for p in parameters] and not any_name:
            raise ValueError(f"mt.jit: {option}names has {name!r}, which is no argument of the function")
    found = {num + len(positional) if num < 0 else num for num in nums}
    found |= {positional.index(name) for name in names if name in positional}
    return frozenset(found), frozenset(names) | {positional[i] for i in found if i < len(positional)}


# -- scan -------------------------------------------------------------------------------------------------------------


def scan(
    fn: Callable[..., Any], *stacked: Any, length: int | None = None, unroll: int = 1, keep_grads: bool = False
) -> Any:
    """Run `fn` over the leading axis of its arguments inside one XLA program (`jax.lax.scan`); give the stacked results.

    `fn` is ordinary eager code, as for `mt.jit`: what it changes in modules, optimizers and random streams carries on
    from step to step, and is stored at the end, all of it or nothing. One call runs any number of training steps.

    Args:
        fn: called as `fn(*slices)`.
        *stacked: arrays, or pytrees of arrays, with one leading axis in common. Modules and optimizers among them, and
            static values, are handed to each call as they are.
        length: the number of steps, needed if there are no arrays.
        unroll: how many steps XLA lays out in one turn of the loop.
        keep_grads: as in `mt.jit`.

    Returns:
        What `fn` returned, each array with a leading axis of `length`.

    Raises:
        ValueError: if leading axes differ, or there is none and no `length`.
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
    if not callable(fn):
        raise TypeError(f"mt.scan takes a function, not {fn!r}")
    if not is_eager():
        return _scan(fn, stacked, length, unroll, keep_grads)
    empty = any([np.shape(leaf)[:1] == (0,) for leaf in jax.tree.leaves(stacked)])  # runs nothing: another program
    key = length, unroll, keep_grads, empty
    scans: dict[Any, Function] = _scans.get(fn)
    function = scans.get(key)
    if function is None:
        for oldest in list(scans)[: 1 - _MOST_SCANS]:
            del scans[oldest]
        function = scans[key] = _make_scan(keep_grads, fn)

    def target(*stacked: Any) -> Any:
        return _scan(fn, stacked, length, unroll, keep_grads)

    target.__wrapped__ = target.stands_for = fn  # type: ignore[attr-defined]
    (out,), binding = function.run(target, stacked, {})
    return (
        unwrap_output(out, objects_of(function, target, stacked, {}))
        if binding is not None and binding.program.wraps
        else out
    )


_scans: Any = Functions(lambda _: {})  # of each function, by length and options
_MOST_SCANS = 64


def _make_scan(keep_grads: bool, fn: Any) -> Function:
    purpose = Purpose(wrap_output, gradients=True, keep_grads=keep_grads, statics=False)
    function = Function(fn, _WholeProgram, purpose)
    function.name = function.compilations.name = f"scan of {function.name}"
    return function


@all_or_nothing
def _scan(fn: Any, stacked: tuple[Any, ...], length: int | None, unroll: int, keep_grads: bool) -> Any:
    """The scan, within a trace."""
    call = Arguments(fn, stacked, {})
    arrays = [jnp.asarray(array) for array in owned_data(call.data)]
    length = _length(arrays, length)
    if plain.is_plain():
        if length:
            return plain.loop(fn, call, arrays, length)
        with jax.disable_jit(False):  # what a step would return, only a trace can tell
            return _scan(fn, stacked, length, unroll, keep_grads)
    call.objects += closures.stateful_objects(fn)[0]
    call.objects.append(random.current())
    slices = [jax.ShapeDtypeStruct(array.shape[1:], array.dtype) for array in arrays]
    purpose = Purpose(_stackable, gradients=True, keep_grads=keep_grads, statics=False)
    traced, lifted = trace_with_all(call, purpose, data=slices)
    if any(traced.settings) and length:  # the first step leaves settings of another kind: it is no step like others
        return _first_and_rest(fn, stacked, length, unroll, keep_grads)
    touch_all(call.objects)
    values = [held(cell) for cell in lifted]
    while fresh := _begun_inside(traced, values):
        for i, shape in fresh.items():
            values[i] = jnp.zeros(shape.shape, shape.dtype)
        traced = Traced(call, lifted, values, slices, purpose)
    for i in traced.observed:
        if cells.gradient(lifted[i]) is not None:  # now the run around this one has looked at it, too
            values[i] = cells.gradient(lifted[i])
    ends = dict(zip(traced.written, traced.shapes[1], strict=True))
    unseen = {i for i in traced.written if lifted[i].kind == "gradient" and i not in traced.observed}
    carried = [
        i for i in traced.written if ends[i] is not None or (isinstance(values[i], jax.Array) and i not in unseen)
    ]
    for i in carried:
        if i in unseen or values[i] is None:  # each step writes it anew: what it was before is no matter
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
    if length:  # no steps change nothing
        changes = {**dict.fromkeys(traced.written), **dict(zip(carried, final, strict=True))}
        changes |= dict.fromkeys(traced.dropped, CONSUMED)
    paths = paths_of(call.objects)
    for i in changes:
        label = paths.get(lifted[i], "a gradient")
        cells.check_writable(lifted[i], label, call.objects[0])
    for i, value in changes.items():
        lifted[i].reached = lifted[i].reached or value is not None
        cells.write(lifted[i], value, paths.get(lifted[i], "a gradient"), call.objects[0])
    return unwrap_output(out, call.objects)


def _first_and_rest(fn: Any, stacked: tuple[Any, ...], length: int, unroll: int, keep_grads: bool) -> Any:
    """A scan whose first step is taken before the loop."""

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
    """Gradients that are zeros never written at the start and arrays at the end: what a loop carries has one shape."""
    ends = zip(traced.written, traced.shapes[1], strict=True)
    return {i: end for i, end in ends if end is not None and values[i] is None and i in traced.observed}


def _length(arrays: list[Any], length: int | None) -> int:
    """The number of steps."""
    if any(array.ndim == 0 for array in arrays):
        raise ValueError("mt.scan runs over the leading axis, and a scalar has none: capture it, or stack it")
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
