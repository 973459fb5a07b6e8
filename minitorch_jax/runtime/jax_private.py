"""Every undocumented name of JAX that the package uses, each with a replacement made of public names.

No other file uses such a name (`tests/test_jax_private.py` checks this). A version of JAX that lacks one only makes the
package a little slower.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import jax
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
with suppress(*_MISSING):  # three times as fast
    from jax._src.core import trace_ctx as _trace_ctx

    _trace_ctx.is_top_level()
    at_top_level = _trace_ctx.is_top_level


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


# -- calls that raised ------------------------------------------------------------------------------------------------


def forget_refusals(jitted: Any) -> None:
    """Make JAX use its fast path again for inputs with which an earlier call raised during its trace.

    Traces and compiled programs are kept. Where JAX lacks the method, such calls are correct but slower.
    """
    clear = getattr(jitted, "_clear_cache", None)
    if clear is not None:
        clear()


def _forget_no_effects() -> None:
    pass


# Makes JAX forget the effects of a program that failed. Otherwise each later `jax.effects_barrier` raises, until the next
# ordered effect.
forget_effects: Callable[[], None] = _forget_no_effects
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
