"""`jit`: compiling stateful code into one XLA program."""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable, Sequence
from functools import partial, update_wrapper, wraps
from typing import TYPE_CHECKING, Any, Concatenate, Generic, NamedTuple, ParamSpec, TypeVar, overload

import jax

from .engine.arguments import Arguments, Fixed, unfold, unwrap_output, wrap_output
from .engine.compiled_function import Function
from .engine.compiler_options import CompilerOptions, Options, as_options, refuse_inside
from .engine.kept_with_owner import Functions, kept_for
from .engine.names.libraries import is_library
from .engine.tally import Tally
from .engine.tracing import Purpose
from .module import compiled_calls
from .module.torch_habits import check_function
from .runtime.bounded_cache import Kept
from .runtime.tracebacks import trim, warn
from .state.frame import is_eager
from .state.static_values import holds_state
from .state.undo import all_or_nothing

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
T = TypeVar("T")


class _Options(NamedTuple):
    """The options of `jit`: static and donated arguments by position and by name, and the others."""

    static_nums: frozenset[int] = frozenset()
    static_names: frozenset[str] = frozenset()
    donate_nums: frozenset[int] = frozenset()
    donate_names: frozenset[str] = frozenset()
    keep_grads: bool = False
    compiler_options: Options = ()

    def without_self(self) -> _Options:
        """Return the options for a bound method, whose arguments do not include `self`."""
        static, donate = (frozenset(i - 1 for i in nums) for nums in (self.static_nums, self.donate_nums))
        return self._replace(static_nums=static, donate_nums=donate)


class _Order(NamedTuple):
    """The original order of the arguments of a call, which were rearranged so that the donated ones come first."""

    places: tuple[int | str, ...]  # the position or the name of each argument

    def restored(self, values: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return the positional and the keyword arguments of the original call."""
        by_place = dict(zip(self.places, (v.value if type(v) is Fixed else v for v in values), strict=True))
        args = [by_place[i] for i in range(len(by_place)) if i in by_place]
        return args, {name: value for name, value in by_place.items() if isinstance(name, str)}


class Jitted(Generic[P, R]):
    """A function compiled by `mt.jit`. That of a module has the module's attributes and methods, too."""

    def __init__(self, fn: Callable[P, R], options: _Options) -> None:
        named: Any = fn if hasattr(fn, "__name__") else type(fn).__call__
        update_wrapper(self, named)
        if holds_state(fn):
            self.__name__ = self.__qualname__ = type(fn).__name__
        self.__wrapped__ = fn
        self._options = options
        self._fn, self._before, self._kwargs = unfold(fn, (), {})
        self._arranges = bool(
            options.static_nums or options.static_names or options.donate_nums or options.donate_names
        )
        target = _arranged(self._fn) if self._arranges else self._fn
        self._target, self._function = target, _function_for(fn, self._fn, options)
        self._tally, self._me = Tally(self._function), weakref.ref(self)
        self._changes_args = self._arranges or bool(self._before or self._kwargs)
        self._warned = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            if not is_eager():
                refuse_inside(self._options.compiler_options, self.__name__)
                return all_or_nothing(self.__wrapped__)(*args, **kwargs)  # becomes part of the outer program
            if self._changes_args:
                args, kwargs = self._arrange(args, kwargs)  # type: ignore[assignment]
            function, target = self._function, self._target
            found = function.repeat(target, args, kwargs, id(target))
            if found is None:
                (out,), binding = self._run_slowly(args, kwargs)
            else:
                (out,), binding = found
                if function.is_shared and not self._tally.is_as_before(binding, args, kwargs):
                    self._tally.add(binding, args, kwargs)
            return self._unwrap(out, args, kwargs) if binding is not None and binding.program.wraps else out
        except Exception as error:
            trim(error)
            raise

    def _run_slowly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
        function, binding = self._function, None
        function.latest.caller = self._me
        try:
            results, binding = function.run_slowly(self._target, args, kwargs)
        finally:
            if function.latest.compiled or (function.is_shared and binding is not None):
                self._tally.add(binding, args, kwargs)
        if function.met and not self._warned:
            self._warn_of_met()
        return results, binding

    @overload
    def __get__(self, instance: None, owner: Any = None) -> Jitted[P, R]: ...
    @overload
    def __get__(self: Jitted[Concatenate[T, Q], R], instance: T, owner: Any = None) -> Jitted[Q, R]: ...
    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        if holds_state(instance):  # a module is passed as an ordinary argument
            return types.MethodType(self, instance)
        return _bound_to(instance, self)

    @property
    def num_compiles(self) -> int:
        """The number of compiled programs: one for each structure, shape and dtype."""
        return self._tally.count

    def lower(self, *args: P.args, **kwargs: P.kwargs) -> jax.stages.Lowered:
        """Return the program for these arguments without running it: `.as_text()`, `.compile()`; see `jax.stages`.

        Data, and the arrays of modules and optimizers, may be `jax.ShapeDtypeStruct`s, with or without shardings, as
        `jax.eval_shape` and `mt.shard` make them. Nothing is allocated then.
        """
        try:
            args, kwargs = self._arrange(args, kwargs)  # type: ignore[assignment]
            self._function.latest.caller = self._me
            lowered: jax.stages.Lowered = self._function.lower(self._target, args, kwargs)
            self._tally.add(None, args, kwargs)
            return lowered
        except Exception as error:
            trim(error)
            raise

    def with_statics_fixed(self, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
        """Return the function that was compiled, with the arguments that the options make static marked as such."""
        options, fn = self._options, self.__wrapped__
        if not options.static_nums and not options.static_names:
            return fn, args, kwargs
        named = [*enumerate(args), *kwargs.items()]
        places = tuple([place for place, _ in named])
        static = {*options.static_nums, *options.static_names}
        values = [Fixed(value) if place in static else value for place, value in named]
        return _arranged(fn), (Fixed(_Order(places)), Fixed(0), *values), {}

    def _arrange(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments in the form that the compiled function takes: static ones marked, donated ones first."""
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
        return unwrap_output(out, self._function.objects_of(self._target, args, kwargs))

    def _warn_of_met(self) -> None:
        self._warned = True
        names = ", ".join(sorted({type(reference()).__name__ for reference in self._function.met}))
        warn(
            f"{self.__name__} reaches a {names} in a way that cannot be followed by name. Every call must trace"
            f" {self.__name__} to find out if it still does. Pass the {names} as an argument, or refer to it by a variable or"
            " attribute.",
        )

    __name__: str

    def __repr__(self) -> str:
        module = self._module()
        return super().__repr__() if module is None else f"mt.jit({module!r})"

    def __reduce__(self) -> str | tuple[Any, ...]:
        """A copy of a compiled module compiles a copy of the module; a compiled function is copied as functions are."""
        fn = self.__wrapped__
        if type(fn) is types.FunctionType:
            return fn.__qualname__
        return type(self), (fn, self._options)

    if not TYPE_CHECKING:  # for type checkers, these are errors already

        def __getattr__(self, name: str) -> Any:
            module = self._module()
            if module is None or name.startswith("_"):
                raise AttributeError(f"`mt.jit` returned a function, which has no attribute `{name}`")
            value = getattr(module, name)
            return self._keeping_compiled(value) if isinstance(value, types.MethodType) else value

        def __setattr__(self, name: str, value: Any) -> None:
            module = None if name.startswith("_") else self._module()
            setattr(module, name, value) if module is not None else object.__setattr__(self, name, value)

        def __dir__(self) -> list[str]:
            return sorted({*super().__dir__(), *(dir(self._module()) if self._module() is not None else ())})

    def _module(self) -> Any:
        """The module whose calls are compiled, and whose attributes are at hand here. None for a function."""
        module = vars(self).get("__wrapped__")
        return module if holds_state(module) else None

    def _keeping_compiled(self, method: types.MethodType) -> Callable[..., Any]:
        """A method of the module that returns this in place of the module, as `eval()` does."""

        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            out = method(*args, **kwargs)
            return self if out is self.__wrapped__ else out

        return call


class _JittedModule(Jitted[P, R]):
    """That of a module. It is a pytree of the module, so that functions that take it as an argument find the module."""


jax.tree_util.register_pytree_node(
    _JittedModule,
    lambda jitted: ((jitted.__wrapped__,), jitted._options),
    lambda options, parts: _JittedModule(parts[0], options) if holds_state(parts[0]) else parts[0],
)


def _function_for(fn: Any, inner: Any, options: _Options) -> Function:
    """The programs of a function: those of its code, if it is the user's own (a lambda or a local function, say)."""

    def make() -> Function:
        count = _count_donated if options.donate_nums or options.donate_names else None
        keep, xla = options.keep_grads, options.compiler_options
        purpose = Purpose(wrap_output, gradients=True, keep_grads=keep, statics=False, options=xla)
        function = Function(fn, purpose, count)
        function.name = function.compilations.name = getattr(fn, "__name__", type(fn).__name__)
        return function

    if isinstance(fn, types.MethodType) or type(inner) is not types.FunctionType or is_library(inner.__module__):
        return make()
    kept: Kept = _functions.get(inner)
    known: Function | None = kept.get(options)
    if known is None:
        return kept.set(options, make())
    known.is_shared = True
    return known


_functions = Functions(lambda _: Kept())  # of each function, by options


def _compiled_call(plain: Callable[..., Any], name: str, options: Options) -> Callable[..., Any]:
    """Return the `__call__` of a class of modules, compiled. Its modules share programs, as those of `backward` do."""
    purpose = Purpose(wrap_output, gradients=True, statics=False, options=options)
    function = Function(plain, purpose, per_object=True)
    function.name = function.compilations.name = name

    def call(*args: Any, **kwargs: Any) -> Any:
        (out,), binding = function.run(plain, args, kwargs, id(args[0]))
        if binding is not None and binding.program.wraps:
            out = unwrap_output(out, function.objects_of(plain, args, kwargs))
        return out

    return call


compiled_calls.compiler, compiled_calls.as_options = _compiled_call, as_options


def _arranged(fn: Any) -> Callable[..., Any]:
    def call(order: Fixed, count: Fixed, *values: Any) -> Any:
        args, kwargs = order.value.restored(values)
        return fn(*args, **kwargs)

    call.restored = lambda order, count, *values: order.value.restored(values)  # type: ignore[attr-defined]
    call.__wrapped__ = call.stands_for = fn  # type: ignore[attr-defined]
    return call


def _count_donated(call: Arguments) -> int:
    """Return how many of the data, which come first, are donated."""
    count: int = call.template[1][1].value
    return call.count_data(2 + count)


def _bound_to(instance: Any, method: Jitted[..., Any]) -> Jitted[..., Any]:
    def bound() -> Jitted[..., Any]:
        return Jitted(types.MethodType(method.__wrapped__, instance), method._options.without_self())

    kept = kept_for(instance)
    if kept is None:
        return bound()
    if method not in kept:
        kept.setdefault(method, bound())
    found: Jitted[..., Any] = kept[method]
    return found


@overload
def jit(
    fn: Callable[P, R],
    *,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    donate_argnums: int | Sequence[int] = (),
    donate_argnames: str | Sequence[str] = (),
    keep_grads: bool = False,
    compiler_options: CompilerOptions | None = None,
) -> Jitted[P, R]: ...
@overload
def jit(
    fn: None = None,
    *,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    donate_argnums: int | Sequence[int] = (),
    donate_argnames: str | Sequence[str] = (),
    keep_grads: bool = False,
    compiler_options: CompilerOptions | None = None,
) -> Callable[[Callable[P, R]], Jitted[P, R]]: ...
def jit(
    fn: Callable[..., Any] | None = None,
    *,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    donate_argnums: int | Sequence[int] = (),
    donate_argnames: str | Sequence[str] = (),
    keep_grads: bool = False,
    compiler_options: CompilerOptions | None = None,
) -> Any:
    """Compile a function that reads and changes modules, optimizers and random streams into one XLA program.

    The body is ordinary eager code: `opt.zero_grad()`, `mt.backward`, `opt.step()`. Its modules and optimizers may be
    arguments (anywhere in a pytree) or be reached by closure. The results equal those of the eager code up to the rounding
    of XLA's fusion. If a call raises, it changes nothing. Inside another `mt.jit`, or a plain JAX transform, the function
    becomes part of the outer program.

    A second model or optimizer of the same structure uses the same program, as do new values, data and hyperparameters. A
    new shape, dtype, `training` mode or static attribute compiles another program (`num_compiles` counts them). From the
    sixth program on, a `RecompileWarning` says what changed. Values that the code refers to by name are followed, as in
    `backward`.

    Args:
        fn: the function, which may be a method or a module. Without it, `jit` returns a decorator. The compiled function of a
            module has the module's attributes and methods: `model = mt.jit(model)`, `model.eval()`.
        static_argnums, static_argnames: arguments that are static: each new value compiles another program. They must be
            hashable. Strings, booleans, functions and other hashable values are always static, numbers are traced.
        donate_argnums, donate_argnames: arguments that may be donated: their arrays are deleted by the call. An array that
            a module, an optimizer or another argument also holds is copied first. (Modules and optimizers are always
            updated in place.)
        keep_grads: True keeps also those gradients that an optimizer's step in the function has used, so that `grads()`
            returns them. Without it, reading one after the call is an error that says so, because each gradient would be
            one more result of the program. Gradients that no step has used are always kept.
        compiler_options: options for XLA, as those of `jax.jit`: a dict such as `{"xla_cpu_enable_fast_math": True}`. XLA
            checks them at the first call. Only the outermost compiled function may have some.

    Returns:
        The compiled function, with `num_compiles` and `lower(*args)` (see `jax.stages`).

    Raises:
        TypeError, ValueError: if an option does not fit the function's signature; in the first call, if XLA refuses one of
            `compiler_options`, by its name.
        TraceError: in a call, if a static attribute of a module (such as `training`) has another value at the end, if the
            function assigns a schedule, a flag or other modules to an optimizer, or if it changes a setting that needs a
            state (such as momentum) from 0. (It may assign numbers: each call does so, for each optimizer in the call.)

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
            compiler_options=compiler_options,
        )
    check_function(fn, "mt.jit")
    if isinstance(fn, Jitted) and fn._module() is not None:
        fn = fn.__wrapped__  # its own options would not count within this one
    xla = as_options(compiler_options, "mt.jit")
    static = _places(fn, static_argnums, static_argnames, "static_arg")
    donate = _places(fn, donate_argnums, donate_argnames, "donate_arg")
    if static[0] & donate[0] or static[1] & donate[1]:
        raise ValueError("mt.jit: an argument cannot be both static and donated")
    return (_JittedModule if holds_state(fn) else Jitted)(fn, _Options(*static, *donate, keep_grads, xla))


def _places(
    fn: Any, nums: int | Sequence[int], names: str | Sequence[str], option: str
) -> tuple[frozenset[int], frozenset[str]]:
    """Return the positions and the names of the arguments that an option names in either way."""
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
            raise ValueError(f"mt.jit: {option}names has {name!r}, but the function has no such argument")
    found = {num + len(positional) if num < 0 else num for num in nums}
    found |= {positional.index(name) for name in names if name in positional}
    return frozenset(found), frozenset(names) | {positional[i] for i in found if i < len(positional)}
