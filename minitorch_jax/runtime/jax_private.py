"""Every undocumented name of JAX that the package uses, each with a replacement made of public names.

No other file uses such a name (`tests/test_jax_private.py` checks this). A version of JAX that lacks one only makes the
package a little slower, or leaves a fault of JAX's (`forget_effects`, `thread_settings`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from itertools import starmap
from typing import Any

import jax
import numpy as np
from jax.extend import core as jax_core

_config: Any = jax.config
_MISSING = (ImportError, AttributeError, TypeError)  # raised by the use of a name that this JAX does not have


# -- in which trace are we? -------------------------------------------------------------------------------------------

trace_state: Callable[[], Any] = jax_core.get_opaque_trace_state


def _top_level_state() -> Any:
    """Return the trace state outside of every transform. A new thread is asked: a transform may import this module."""
    states: list[Any] = []
    thread = threading.Thread(target=lambda: states.append(trace_state()))
    thread.start()
    thread.join()
    return states[0]


_TOP_LEVEL = _top_level_state()


def _at_top_level() -> bool:
    return bool(trace_state() == _TOP_LEVEL)


# Returns True if this thread traces no JAX transform (`jit`, `grad`, `vmap`, `scan`, …).
at_top_level: Callable[[], bool] = _at_top_level
with suppress(*_MISSING):  # four times as fast: every call of this package asks
    from jax._src.core import axis_env_state as _axis_env
    from jax._src.core import eval_trace as _eval_trace
    from jax._src.core import top_axis_env as _top_axis_env
    from jax._src.core import trace_ctx as _trace_ctx
    from jax._src.core import trace_state_strong_ref as _trace

    def _at_top_level_quickly() -> bool:
        trace = _trace.value
        if trace is None:  # a Ctrl-C between two lines of JAX's has left it so, and no operation would work again
            _trace_ctx.reset()
        return (trace is _eval_trace or trace is None) and _axis_env.value is _top_axis_env

    if _at_top_level_quickly() == _at_top_level():
        at_top_level = _at_top_level_quickly


# -- settings ---------------------------------------------------------------------------------------------------------


def _is_debugging() -> bool:
    return bool(_config.jax_debug_nans or _config.jax_debug_infs)


# Returns True if JAX checks results for NaN or infinity, and so may raise after it has computed them.
is_debugging: Callable[[], bool] = _is_debugging
with suppress(*_MISSING):  # three times as fast
    from jax._src.config import debug_infs as _infs
    from jax._src.config import debug_nans as _nans

    def _is_debugging_quickly() -> bool:
        return _nans.value or _infs.value

    _is_debugging_quickly()
    is_debugging = _is_debugging_quickly

# Returns the settings that a trace depends on besides its inputs, such as the default precision. Where JAX does not show
# them, each call returns a new object, so no two traces count as equal.
trace_context: Callable[[], Any] = object
with suppress(*_MISSING):
    from jax._src.config import trace_context as _trace_context

    hash(_trace_context())
    trace_context = _trace_context


def _no_settings() -> Callable[[], None]:
    return _do_nothing


def _do_nothing() -> None:
    pass


# Returns a function that gives JAX's settings of this thread the values that they have now: the current trace, the axes,
# 64-bit types, the names that operations get.
thread_settings: Callable[[], Callable[[], None]] = _no_settings
with suppress(*_MISSING):
    from jax._src import config as _configs
    from jax._src import core as _core
    from jax._src import mesh as _meshes
    from jax._src.source_info_util import _source_info_context as _source_info

    _Setting = _configs.config_ext.Config
    _settings = [
        setting for m in (_configs, _core, _meshes) for setting in vars(m).values() if isinstance(setting, _Setting)
    ]
    _get_local, _set_local = _Setting.get_local, _Setting.set_local

    def _thread_settings() -> Callable[[], None]:
        values, source = list(map(_get_local, _settings)), _source_info.context

        def restore() -> None:
            changed = [(s, v) for s, v in zip(_settings, values, strict=True) if _get_local(s) is not v]
            deque(starmap(_set_local, changed), 0)  # one C call, so a second Ctrl-C comes before all or after all
            _source_info.context = source

        return restore

    _thread_settings()()
    thread_settings = _thread_settings


# -- calls that raised ------------------------------------------------------------------------------------------------


def forget_refusals(jitted: Any) -> None:
    """Make JAX use its fast path again for inputs with which an earlier call raised during its trace.

    Traces and compiled programs are kept. Where JAX lacks the method, such calls are correct but slower.
    """
    clear = getattr(jitted, "_clear_cache", None)
    if clear is not None:
        clear()


# Makes JAX forget the effects of a program that failed. Otherwise each later `jax.effects_barrier` raises, until the next
# ordered effect.
forget_effects: Callable[[], None] = _do_nothing
with suppress(*_MISSING):
    from jax._src.dispatch import runtime_tokens as _tokens

    forget_effects = _tokens.clear


# -- equations --------------------------------------------------------------------------------------------------------

# The value that tells JAX to inline a called function when the caller is traced. Newer versions have an enumeration.
_INLINE: Any = jax.Inline.JAX_EARLY if hasattr(jax, "Inline") else True


def context_of(eqn: Any) -> Any:
    """Return the settings under which an equation was traced, or None if JAX does not show them."""
    context = getattr(eqn, "ctx", None)
    return context if hasattr(context, "manager") else None


def under(context: Any) -> Any:
    """Return a context manager that applies these settings."""
    return nullcontext() if context is None else context.manager


def inlined(call: Any) -> Any:
    """Return the equation `call` of a jitted function, marked to be inlined. None if JAX has no such mark."""
    return call.replace(params={**call.params, "inline": _INLINE}) if "inline" in call.params else None


def calling(eqn: Any, call: Any) -> Any:
    """Return the equation `eqn` with the operation of the equation `call`."""
    return eqn.replace(primitive=call.primitive, params=call.params)


def with_equations(closed: Any, eqns: list[Any]) -> Any:
    """Return the closed jaxpr with its equations replaced."""
    return jax_core.ClosedJaxpr(closed.jaxpr.replace(eqns=eqns), closed.consts)


def as_one_call(closed: Any, inputs: Sequence[Any], name: str) -> list[Any] | None:
    """Compute a closed jaxpr within a trace as one equation, the call of a jitted function, which XLA inlines.

    To evaluate the jaxpr traces each of its equations again. Inputs that it does not use may be None. Returns None if JAX
    does not show how, or is to compute operation by operation.
    """
    call = None
    with suppress(*_MISSING):
        call = _call_of(closed.jaxpr, [value is not None for value in inputs], name)
    if call is None:
        return None
    bind, params = call
    return list(bind(*closed.consts, *(value for value in inputs if value is not None), **params))


def _call_of(jaxpr: Any, used: Sequence[bool], name: str) -> tuple[Callable[..., Any], dict[str, Any]] | None:
    """Return what calls a jaxpr with its constants and used inputs, and with which parameters."""
    (call,) = jax.make_jaxpr(jax.jit(_same))(0.0).eqns
    if _config.jax_disable_jit or is_debugging() or not {"jaxpr", "name", "donated_invars"} <= call.params.keys():
        return None
    invars = [*jaxpr.constvars, *(var for var, is_used in zip(jaxpr.invars, used, strict=True) if is_used)]
    names = jaxpr.debug_info._replace(arg_names=None)
    whole = jax_core.ClosedJaxpr(jaxpr.replace(constvars=[], invars=invars, debug_info=names), [])
    params = {**call.params, "jaxpr": whole, "name": name}
    for key, value in call.params.items():  # one entry for each input, or for each result
        if key == "donated_invars" or key.startswith("in_"):
            params[key] = value * len(invars)
        elif key.startswith("out_"):
            params[key] = value * len(jaxpr.outvars)
    return call.primitive.bind, params


def _same(x: Any) -> Any:
    return x


# -- operations --------------------------------------------------------------------------------------------------------


def _calls_that_stay() -> Any:
    """A context of calls that XLA keeps: what is called becomes no part of what calls it."""
    with suppress(*_MISSING):
        from jax.experimental.xla_metadata import set_xla_metadata

        return set_xla_metadata(inlineable="false")
    return nullcontext()


def computed_once(function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`, which XLA computes once; and its arguments once.

    On CPUs, XLA makes the loop that computes a value a part of each operation that reads it, which then computes it anew.
    It cannot do so across the call of a function. (In jaxlib 0.10.2 it ignores `lax.optimization_barrier` here.)
    """
    with _calls_that_stay():
        return jax.jit(function)(*args)


def twin_of(original: Any, on_cpu: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return the binding of a new operation, which is what a bilinear `original` is, and is computed by `on_cpu` on CPUs.

    Its derivatives and its `jax.vmap` are what JAX has for the original, in twins. None if JAX does not show how.
    """
    with suppress(*_MISSING):
        return _twin_of(original, on_cpu)
    return None


def _twin_of(original: Any, on_cpu: Callable[..., Any]) -> Callable[..., Any]:
    from jax._src.dispatch import apply_primitive
    from jax.interpreters import ad, batching, mlir

    transpose, batch = ad.primitive_transposes[original], batching.fancy_primitive_batchers[original]
    twin: Any = jax_core.Primitive(original.name)

    def in_twins(fun: Callable[..., Any], *args: Any) -> Any:
        """Return `fun(*args)`, with a twin for each original in it."""
        closed = jax.make_jaxpr(fun)(*args)
        values = dict(zip((*closed.jaxpr.constvars, *closed.jaxpr.invars), (*closed.consts, *args), strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, jax_core.Literal) else values[atom]

        for eqn in closed.jaxpr.eqns:
            chosen = twin if eqn.primitive is original else eqn.primitive
            outs = chosen.bind(*map(read, eqn.invars), **chosen.get_bind_params(eqn.params))
            values.update(zip(eqn.outvars, outs if chosen.multiple_results else (outs,), strict=True))
        (out,) = map(read, closed.jaxpr.outvars)
        return out

    def by_lhs(cotangent: Any, lhs: Any, rhs: Any, **params: Any) -> Any:
        def rule(cotangent: Any, rhs: Any) -> Any:
            return ad.instantiate_zeros(transpose(cotangent, ad.UndefinedPrimal(lhs.aval), rhs, **params)[0])

        return in_twins(rule, cotangent, rhs)

    def by_rhs(cotangent: Any, lhs: Any, rhs: Any, **params: Any) -> Any:
        def rule(cotangent: Any, lhs: Any) -> Any:
            return ad.instantiate_zeros(transpose(cotangent, lhs, ad.UndefinedPrimal(rhs.aval), **params)[1])

        return in_twins(rule, cotangent, lhs)

    def batched(axis: Any, args: Sequence[Any], dims: Sequence[Any], **params: Any) -> Any:
        place: list[Any] = []

        def rule(*args: Any) -> Any:
            out, dim = batch(axis, args, dims, **params)
            place.append(dim)
            return out

        return in_twins(rule, *args), place[0]

    twin.def_impl(lambda *args, **params: apply_primitive(twin, *args, **params))
    twin.def_effectful_abstract_eval(original.abstract_eval)
    ad.defbilinear(twin, by_lhs, by_rhs)
    batching.fancy_primitive_batchers[twin] = batched
    mlir.register_lowering(twin, mlir.lower_fun(original.bind, multiple_results=False))
    mlir.register_lowering(twin, mlir.lower_fun(on_cpu, multiple_results=False), platform="cpu")
    bind: Callable[..., Any] = twin.bind
    return bind


# -- the values of tracers --------------------------------------------------------------------------------------------


def _showing(name: str, convert: Callable[..., Any]) -> None:
    usual = getattr(jax.core.Tracer, name)

    def method(self: Any, *args: Any) -> Any:
        if _config.jax_disable_jit and (value := value_of(self)) is not None:
            return convert(value, *args)
        return usual(self, *args)

    method.__name__ = name
    setattr(jax.core.Tracer, name, method)


def value_of(tracer: Any) -> Any:
    """Return the array behind a tracer of an uncompiled `jax.grad`. None if there is none, or JAX does not show it."""
    with suppress(AttributeError):
        return tracer.to_concrete_value()
    return None


def value_behind(value: Any) -> Any:
    """Return the array behind any tracer of uncompiled code, `jax.vmap`'s too: all of the batch. None if there is none."""
    while isinstance(value, jax.core.Tracer):
        inner = value_of(value)
        if inner is None:
            inner = getattr(value, "val", None)  # of vmap
        if inner is value or not isinstance(inner, jax.Array | np.ndarray):
            return None
        value = inner
    return value


def tracer_inside(tracer: Any) -> Any:
    """Return the tracer that one of `jax.vmap` or `jax.grad` holds. None if there is none, or JAX does not show it."""
    inner = getattr(tracer, "val", None), getattr(tracer, "primal", None)
    return next((value for value in inner if isinstance(value, jax.core.Tracer)), None)


def show_values() -> None:
    """Make `float(x)`, `complex(x)` and `f"{x:.3f}"` of such tracers work under `jax.disable_jit()`.

    JAX supports `int`, `bool`, `item` and `print` there, but not these three. Where this fails, they raise JAX's error.
    """
    global _shown
    if not _shown:
        _shown = True
        with suppress(*_MISSING):
            for name, convert in (("__float__", float), ("__complex__", complex), ("__format__", format)):
                _showing(name, convert)


_shown = False
