"""All of JAX that is used and not documented, each with what public JAX offers in its place.

Nothing else in the package names such a thing (`tests/test_jax_private.py` looks), so a JAX that lacks one costs a little
speed and no more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import jax
from jax.extend import core as jax_core

_config: Any = jax.config
_MISSING = (ImportError, AttributeError, TypeError)  # what the use of a name raises that this JAX does not have


# -- in which trace are we? -------------------------------------------------------------------------------------------

trace_state: Callable[[], Any] = jax_core.get_opaque_trace_state


def _top_level_state() -> Any:
    """The trace state outside of every transform, asked of a new thread: this module may be imported inside one."""
    states: list[Any] = []
    thread = threading.Thread(target=lambda: states.append(trace_state()))
    thread.start()
    thread.join()
    return states[0]


_TOP_LEVEL = _top_level_state()


def _at_top_level() -> bool:
    return bool(trace_state() == _TOP_LEVEL)


# Whether no JAX transform (`jit`, `grad`, `vmap`, `scan`, …) is being traced in this thread.
at_top_level: Callable[[], bool] = _at_top_level
with suppress(*_MISSING):  # the same at a third of the price
    from jax._src.core import trace_ctx as _trace_ctx

    _trace_ctx.is_top_level()
    at_top_level = _trace_ctx.is_top_level


# -- settings ---------------------------------------------------------------------------------------------------------


def _is_debugging() -> bool:
    return bool(_config.jax_debug_nans or _config.jax_debug_infs)


# Whether JAX is to look for NaN or infinity in results, and so may raise when they have been computed.
is_debugging: Callable[[], bool] = _is_debugging
with suppress(*_MISSING):  # the same at a third of the price
    from jax._src.config import debug_infs as _infs
    from jax._src.config import debug_nans as _nans

    def _is_debugging_quickly() -> bool:
        return _nans.value or _infs.value

    _is_debugging_quickly()
    is_debugging = _is_debugging_quickly

# What else, besides its inputs, a trace depends on: settings such as the default precision. If unknown, no two are the same.
trace_context: Callable[[], Any] = object
with suppress(*_MISSING):
    from jax._src.config import trace_context as _trace_context

    hash(_trace_context())
    trace_context = _trace_context


# -- calls that raised ------------------------------------------------------------------------------------------------


def forget_refusals(jitted: Any) -> None:
    """Have JAX take its fast path again: for inputs at which a call has raised while it was traced, it never would.

    What was traced and compiled stays. Without it calls are right, and slower.
    """
    clear = getattr(jitted, "_clear_cache", None)
    if clear is not None:
        clear()


def _forget_no_effects() -> None:
    pass


# Have JAX forget the effects of a program that failed. Without it each `jax.effects_barrier` from then on raises, until
# effects come in order again.
forget_effects: Callable[[], None] = _forget_no_effects
with suppress(*_MISSING):
    from jax._src.dispatch import runtime_tokens as _tokens

    forget_effects = _tokens.clear


# -- equations --------------------------------------------------------------------------------------------------------

# What tells JAX to put a function's equations where it is called as soon as it is traced: an enumeration in newer versions.
_INLINE: Any = jax.Inline.JAX_EARLY if hasattr(jax, "Inline") else True


def context_of(eqn: Any) -> Any:
    """The settings under which an equation was traced; None if JAX does not tell."""
    context = getattr(eqn, "ctx", None)
    return context if hasattr(context, "manager") else None


def under(context: Any) -> Any:
    """The settings of a context, to be entered."""
    return nullcontext() if context is None else context.manager


def inlined(call: Any) -> Any:
    """An equation that calls a jitted function, with that inlined wherever it is traced; None where that cannot be said."""
    return call.replace(params={**call.params, "inline": _INLINE}) if "inline" in call.params else None


def calling(eqn: Any, call: Any) -> Any:
    """The equation `eqn`, computed by the call."""
    return eqn.replace(primitive=call.primitive, params=call.params)


def with_equations(closed: Any, eqns: list[Any]) -> Any:
    """The closed jaxpr with others in its equations' places."""
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
    """The array that a tracer stands for where `jax.grad` runs uncompiled; None if there is none, or JAX does not tell."""
    with suppress(AttributeError):
        return tracer.to_concrete_value()
    return None


def show_values() -> None:
    """Have `float(x)`, `complex(x)` and `f"{x:.3f}"` of such tracers work under `jax.disable_jit()`.

    JAX lets `int`, `bool`, `item` and `print` look at them, and forgets these. Where this fails they raise JAX's error.
    """
    global _shown
    if not _shown:
        _shown = True
        with suppress(*_MISSING):
            for name, convert in (("__float__", float), ("__complex__", complex), ("__format__", format)):
                _showing(name, convert)


_shown = False
