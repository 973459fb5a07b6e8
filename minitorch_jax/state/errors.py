"""What goes wrong where a change of state would be lost."""

from __future__ import annotations

TWO_SPELLINGS = (
    "Either pass it in and return it (`return opt, loss` in `step`): `opt, loss = jax.jit(step)(opt, x, y)`; or compile"
    " the stateful code with `mt.jit(step)`, which keeps what it changes."
)


class TraceError(RuntimeError):
    """A module, optimizer or random stream was changed where JAX would silently forget the change."""


class DroppedUpdateWarning(UserWarning):
    """A copy made inside a JAX transform was changed, and then neither returned nor handed on."""


def changed_by_closure(label: str) -> TraceError:
    return TraceError(
        f"{label} was changed inside a JAX transform that it came into by closure (or from an outer transform): the"
        f" change would happen once, while tracing, and leave a tracer behind. {TWO_SPELLINGS}"
    )
