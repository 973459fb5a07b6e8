"""What is done to accumulated gradients before a step: clipping and scaling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .engine.stateful_function import Cells, Sizes, StatefulFunction, remembered, whole_cells
from .module.checks import LARGEST, as_number
from .module.module import Module
from .module.parameter import wide_dtype
from .runtime import contexts
from .runtime.xla_faults import largest
from .state import access
from .state import frame as frames
from .state.errors import TraceError
from .state.gradient import gradient
from .state.static_values import module_of, shown
from .state.walk import Walk, walk_of


def clip_grad_norm(
    modules: Any, max_norm: Any, norm_type: float = 2.0, *, error_if_nonfinite: bool = False
) -> jax.Array:
    """Scale all gradients, as if they were one vector, to a norm of at most `max_norm`; in place.

    Call it between `backward` and `step`, in eager code or in a compiled function. One pass computes the norm, one scales.

    Args:
        modules: a module, a list of them, or an optimizer, for its modules.
        max_norm: a number > 0; a new one does not compile again.
        norm_type: p of the p-norm; `float("inf")` for the largest absolute value.
        error_if_nonfinite: raise if the norm is infinite or NaN, and change nothing. This waits for the result, so it
            cannot be used in compiled code; without it the norm is there for whoever reads it.

    Returns:
        The norm before, a float32 scalar (float64 for float64 gradients); 0 if there are no gradients.

    Raises:
        TypeError: if something is no Module, or `max_norm` no number.
        ValueError: if `max_norm` is negative or not finite, or `norm_type` is not > 0.
        RuntimeError: with `error_if_nonfinite`, if the norm is not finite.

    Source: `torch.nn.utils.clip_grad_norm_`, with its `max_norm / (norm + 1e-6)`.

    Example:
        >>> import jax.numpy as jnp, minitorch_jax as mt
        >>> from minitorch_jax import nn
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer.accumulate([jnp.array([[3.0, 4.0]])])
        >>> float(mt.clip_grad_norm(layer, 1.0))
        5.0
        >>> layer.grads()[0].round(3)
        Array([[0.6, 0.8]], dtype=float32)
    """
    if not norm_type > 0:
        raise ValueError(f"clip_grad_norm: norm_type must be > 0; got {norm_type!r}")
    if error_if_nonfinite and not frames.is_eager():
        raise TraceError("clip_grad_norm: error_if_nonfinite would need the norm's value, which compiled code has not")
    grads = _gradients("clip_grad_norm", modules, float(norm_type))
    limit = _number("clip_grad_norm", "max_norm", max_norm)
    if error_if_nonfinite:
        found = _norm(grads)
        if not np.isfinite(found):
            raise RuntimeError(f"clip_grad_norm: the norm of the gradients is {found}; nothing was changed")
    result: jax.Array = _clip_norm(grads, limit)
    return result


def clip_grad_value(modules: Any, clip_value: Any) -> None:
    """Bring each element of all gradients into [-clip_value, clip_value], in place. See `clip_grad_norm`.

    Source: `torch.nn.utils.clip_grad_value_`.

    Example:
        >>> import jax.numpy as jnp, minitorch_jax as mt
        >>> from minitorch_jax import nn
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer.accumulate([jnp.array([[3.0, -0.5]])])
        >>> mt.clip_grad_value(layer, 1.0)
        >>> layer.grads()[0]
        Array([[ 1. , -0.5]], dtype=float32)
    """
    grads = _gradients("clip_grad_value", modules)
    _clip_value(grads, _number("clip_grad_value", "clip_value", clip_value))


def scale_grads(modules: Any, factor: Any) -> None:
    """Multiply all gradients by a number, in place: by 1/k after k micro-batches, for their mean. See `clip_grad_norm`.

    Example:
        >>> import jax.numpy as jnp, minitorch_jax as mt
        >>> from minitorch_jax import nn
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> loss_fn = lambda x: layer(x).sum()
        >>> for x in (jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]])):
        ...     loss = mt.backward(loss_fn, x)
        >>> mt.scale_grads(layer, 1 / 2)
        >>> layer.grads()[0]
        Array([[2., 3.]], dtype=float32)
    """
    grads = _gradients("scale_grads", modules)
    _scale(grads, _number("scale_grads", "factor", factor, low=-LARGEST))


# -- what is done to gradients -----------------------------------------------------------------------------------------


def norm(grads: Sequence[Any], norm_type: float = 2.0) -> Any:
    """The p-norm of all gradients (None for none) as one vector, computed in at least float32."""
    # never flattened: of an array that is divided over devices, each device would need the whole
    wide = [g.astype(wide_dtype(g.dtype)) for g in grads if g is not None and g.size]
    if not wide:
        return jnp.zeros((), jnp.float32)
    if norm_type == np.inf:
        return largest(jnp.stack([largest(jnp.abs(g)) for g in wide]))
    if norm_type == 2:
        return jnp.sqrt(jnp.stack([jnp.tensordot(g, g, g.ndim) for g in wide]).sum())
    return jnp.stack([(jnp.abs(g) ** norm_type).sum() for g in wide]).sum() ** (1 / norm_type)


@StatefulFunction
def _norm(grads: Cells) -> Any:
    values = list(map(gradient, grads))
    with contexts.full_width(values):
        return norm(values, grads.about.norm_type)


@StatefulFunction
def _clip_norm(grads: Cells, limit: Any) -> Any:
    values = list(map(gradient, grads))
    with contexts.full_width(values):
        total = norm(values, grads.about.norm_type)
        factor = jnp.minimum(limit.astype(total.dtype) / (total + 1e-6), 1.0)
        _change(grads, lambda g: g * factor.astype(g.dtype))
        return total


@StatefulFunction
def _clip_value(grads: Cells, limit: Any) -> None:
    _change(grads, lambda g: jnp.clip(g, -limit.astype(g.dtype), limit.astype(g.dtype)))


@StatefulFunction
def _scale(grads: Cells, factor: Any) -> None:
    _change(grads, lambda g: g * factor.astype(g.dtype))


def _change(grads: Cells, update: Callable[[Any], Any]) -> None:
    """Apply `update` to each gradient, in at least float32; those that are None, which stands for zeros, stay so.

    The padding of packed ones stays zero, too, though a factor of NaN would make NaN of it.
    """
    values, sizes = list(map(gradient, grads)), dict(grads.about.sizes)
    with contexts.full_width(values):
        for i, (cell, g) in enumerate(zip(grads, values, strict=True)):
            new = None if g is None else update(g.astype(wide_dtype(g.dtype))).astype(g.dtype)
            if new is not None and sizes.get(i, new.size) < new.size:
                new = jnp.where(jnp.arange(new.size) < sizes[i], new, jnp.zeros((), new.dtype))
            access.write(cell, new, "a gradient")


# -- arguments ---------------------------------------------------------------------------------------------------------


def _gradients(name: str, modules: Any, norm_type: float | None = None) -> Cells:
    """The gradients of the trainable parameters, each once."""
    modules = module_of(modules)
    listed = getattr(modules, "modules", None) if not isinstance(modules, Module) else [modules]
    listed = modules if listed is None or callable(listed) else listed
    if isinstance(listed, str | bytes | dict) or not hasattr(listed, "__iter__"):
        raise TypeError(f"{name} takes a Module, a list of them, or an optimizer; got {shown(modules)}")
    listed = list(map(module_of, listed))
    for module in listed:
        if not isinstance(module, Module):
            raise TypeError(
                f"{name} takes Modules; the list holds {shown(module)} ({type(module).__name__}). Write `{name}(model, ...)`,"
                f" not `{name}(model.parameters(), ...)`: a module's gradients are found by the module"
            )
    walks = tuple(map(walk_of, listed))
    find = partial(_trained, walks, norm_type)
    cells: Cells = remembered(walks, (_trained, norm_type), find) if walks and frames.is_eager() else find()
    return cells


def _trained(walks: Sequence[Walk], norm_type: float | None) -> Cells:
    grads = dict.fromkeys(cell.grad for walk in walks for cell in walk.params if cell.trainable)
    cells, sizes = whole_cells(list(grads))
    return Cells(cells, _About(norm_type, sizes))


class _About(NamedTuple):
    """What a program knows of gradients besides their shapes."""

    norm_type: float | None
    sizes: Sizes  # of packed ones


def _number(name: str, argument: str, value: Any, low: float = 0.0) -> Any:
    """A number as data of type float32, so that a new one does not compile again."""
    if not isinstance(value, jax.core.Tracer):
        if isinstance(value, bool | str) or not hasattr(value, "__float__"):
            raise TypeError(f"{name}: {argument} must be a number; got {value!r}")
        number = as_number(name, argument, value, low)
        return contexts.number(number) if frames.is_eager() else np.float32(number)
    return value.astype(jnp.float32)
