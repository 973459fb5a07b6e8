"""What a LossScaler does: gradients of a loss times the scale, and optimizers' steps with gradients divided by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..autograd import accumulate, loss_functions
from ..engine.loss import check_loss
from ..engine.stateful_function import StatefulFunction
from ..module.parameter import counted
from ..runtime import contexts
from ..state import access
from ..state import frame as frames
from ..state.gradient import gradient

TRACKER, SKIPPED, UNSCALED, FOUND = range(4)  # what the counts of a LossScaler are


# -- backward ----------------------------------------------------------------------------------------------------------


def backward_scaled(loss_fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], has_aux: bool, scale: Any) -> Any:
    """`backward` of the loss times the scale: `(loss, aux)`, not scaled."""
    function = _scaled_losses.get(loss_fn)
    return accumulate(function, _Scaled(loss_fn, function.name, has_aux), (*args, scale), kwargs, True)[1]


class _Scaled:
    """A loss function with the scale as one more argument, the last; it gives `(scaled loss, (loss, aux))`."""

    def __init__(self, fn: Callable[..., Any], name: str, has_aux: bool) -> None:
        self.__wrapped__ = self.stands_for = fn
        self._name, self._has_aux = name, has_aux

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _scaled(self.__wrapped__, self._name, self._has_aux, *args, **kwargs)


def _scaled(fn: Callable[..., Any], name: str, has_aux: bool, /, *args: Any, **kwargs: Any) -> Any:
    *args_, scale = args
    out = fn(*args_, **kwargs)
    if has_aux and (not isinstance(out, tuple) or len(out) != 2):
        raise TypeError(f"with has_aux=True, {name} must return (loss, aux); it returned a {type(out).__name__}")
    loss, aux = out if has_aux else (out, None)
    loss = check_loss(loss, name)
    with contexts.full_width([loss]):
        wide = loss if loss.dtype.itemsize >= 4 else loss.astype(jnp.float32)
        return wide * scale.astype(wide.dtype), (loss, aux)


_scaled_losses = loss_functions(True)


# -- step and unscale --------------------------------------------------------------------------------------------------


@StatefulFunction
def step_all(*objects: Any) -> None:
    """Step optimizers with their gradients divided by the scale of a LossScaler, the last of the objects, and update that."""
    *opts, scaler = objects
    scale, counts = scaler._read(scaler._scale), scaler._read(scaler._counts)
    plans = [opt._plan_now() for opt in opts]
    scaler._check_writable()
    for opt, plan in zip(opts, plans, strict=True):
        opt._check_writable(plan)
    held = [list(map(gradient, plan.grads)) for plan in plans]
    divisor = jnp.where(counts[UNSCALED] > 0, jnp.ones_like(scale), scale)
    divided = [[_divided(grad, divisor) for grad in grads] for grads in held]
    finite = _all_finite(divided) & (counts[FOUND] == 0)
    for opt, plan, scaled, grads in zip(opts, plans, held, divided, strict=True):
        opt._look_for_missing(plan, scaled)
        before = [cell.value for cell in plan.owned]
        new = plan.update(before, grads, opt._hyper.cell.value)
        for cell, value, old in zip(plan.owned, new, before, strict=True):
            value = jnp.where(finite, value, old)
            access.write(cell, value, f"{cell.kind} updated by {type(opt).__name__}.step()", opt)
        frame = frames.local.frame
        if frame is not None:
            frame.consumed.update(zip(plan.grads, scaled, strict=True))
    growth, backoff, interval = scaler._settings
    tracker = counts[TRACKER] + 1
    grown = scale * np.float32(growth)
    grown = jnp.where((tracker >= interval) & jnp.isfinite(grown), grown, scale)
    scaler._write(
        jnp.where(finite, grown, scale * np.float32(backoff)),
        jnp.where(finite & (tracker < interval), tracker, 0),
        jnp.where(finite, counts[SKIPPED], counted(counts[SKIPPED])),
    )


@StatefulFunction
def unscale_all(*objects: Any) -> None:
    """Divide the gradients of optimizers by the scale of a LossScaler, the last of the objects."""
    *opts, scaler = objects
    scale, counts = scaler._read(scaler._scale), scaler._read(scaler._counts)
    plans = [opt._plan_now() for opt in opts]
    scaler._check_writable()
    divisor = jnp.where(counts[UNSCALED] > 0, jnp.ones_like(scale), scale)
    found: list[Any] = []
    for opt, plan in zip(opts, plans, strict=True):
        found.append([_divided(gradient(cell), divisor) for cell in plan.grads])
        for cell in plan.grads:
            access.check_writable(cell, "a gradient", opt)
    for opt, plan, grads in zip(opts, plans, found, strict=True):
        for cell, param, grad in zip(plan.grads, plan.params, grads, strict=True):
            if grad is not None:
                with contexts.full_width([param.value]):
                    grad = grad.astype(param.value.dtype)
                access.write(cell, grad, "a gradient", opt)
    infinite = jnp.where(_all_finite(found), counts[FOUND], 1)
    scaler._write(scale, counts[TRACKER], counts[SKIPPED], jnp.ones_like(infinite), infinite)


def _divided(grad: Any, divisor: Any) -> Any:
    """A gradient divided by the scale, in at least float32; None for zeros."""
    if grad is None:
        return None
    with contexts.full_width([grad]):
        wide = grad if grad.dtype.itemsize >= 4 else grad.astype(jnp.float32)
        return wide / divisor.astype(wide.dtype)


def _all_finite(grads: list[list[Any]]) -> Any:
    found = [jnp.isfinite(grad).all() for of_one in grads for grad in of_one if grad is not None]
    return jnp.stack([jnp.array(True), *found]).all()
