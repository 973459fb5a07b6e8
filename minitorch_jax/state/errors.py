"""Errors and warnings about state: changes that would be lost, arrays that are not declared."""

from __future__ import annotations

TWO_SPELLINGS = (
    "Either pass it in and return it (`return opt, loss` in `step`): `opt, loss = jax.jit(step)(opt, x, y)`; or compile"
    " the stateful code with `mt.jit(step)`, which keeps its changes."
)


class TraceError(RuntimeError):
    """A module, optimizer or random stream was changed where JAX would silently forget the change."""


class UndeclaredArrayError(AttributeError, TypeError):
    """A bare array was assigned to an attribute of a module: `self.scale = jnp.ones(3)`, also in a list, tuple or dict.

    Each array of a module is declared, as `Parameter(array)`, which an optimizer trains, or as `Buffer(array)`. The message
    has the line to write. It is an AttributeError, since the attribute is not set, and a TypeError, since the value is of
    the wrong type.

    Example:
        >>> import jax.numpy as jnp, minitorch_jax as mt
        >>> class Scale(mt.Module):
        ...     def __init__(self):
        ...         self.scale = jnp.ones(3)
        >>> try:
        ...     Scale()
        ... except mt.UndeclaredArrayError as error:
        ...     print(str(error).splitlines()[0])
        Scale.scale was given a bare array (float32[3]), but each array of a module is declared. Declare it in `__init__`:
    """


class UninitializedError(RuntimeError):
    """A lazy layer was used where its parameters are needed, and it has none: no input has shown their sizes yet.

    Example:
        >>> import jax.numpy as jnp, minitorch_jax as mt
        >>> from minitorch_jax import nn
        >>> model = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
        >>> try:
        ...     mt.Optimizer([model])
        ... except mt.UninitializedError as error:
        ...     print(str(error).partition(":")[0])
        `0`, a LazyLinear(in_features=0, out_features=3, bias=True), has no parameters yet
    """


class DroppedUpdateWarning(UserWarning):
    """A copy made inside a JAX transform was changed, and then neither returned nor passed on."""


def changed_by_closure(label: str) -> TraceError:
    """The error for a change of an object that a JAX transform reaches by closure."""
    return TraceError(
        f"{label} was changed inside a JAX transform, which reaches it by closure (or from an outer transform). The change"
        f" would happen once, while JAX traces the code, and leave a tracer behind. {TWO_SPELLINGS}"
    )
