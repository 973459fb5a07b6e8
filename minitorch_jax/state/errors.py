"""Errors and warnings about changes of state that would be lost."""

from __future__ import annotations

TWO_SPELLINGS = (
    "Either pass it in and return it (`return opt, loss` in `step`): `opt, loss = jax.jit(step)(opt, x, y)`; or compile"
    " the stateful code with `mt.jit(step)`, which keeps its changes."
)


class TraceError(RuntimeError):
    """A module, optimizer or random stream was changed where JAX would silently forget the change."""


class DroppedUpdateWarning(UserWarning):
    """A copy made inside a JAX transform was changed, and then neither returned nor passed on."""


def changed_by_closure(label: str) -> TraceError:
    """The error for a change of an object that a JAX transform reaches by closure."""
    return TraceError(
        f"{label} was changed inside a JAX transform, which reaches it by closure (or from an outer transform). The change"
        f" would happen once, while JAX traces the code, and leave a tracer behind. {TWO_SPELLINGS}"
    )
