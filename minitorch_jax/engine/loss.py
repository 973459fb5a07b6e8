"""A loss function within a trace: it is traced, differentiated, and the state that it changes is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..module import anomaly, random
from ..runtime import interrupts
from ..runtime.numpy_memory import owned_data
from ..state import access
from ..state.cell import Cell
from ..state.gradient import starting_value
from ..state.undo import all_or_nothing
from . import disabled_jit
from .arguments import Arguments, unwrap_output, wrap_output
from .differentiated_arguments import Argnums
from .names.modules import add_found, stateful_objects
from .tracing import ChangedSettings, Purpose, Traced, paths_of, settle, touch_all, trace_once


def check_loss(loss: Any, name: str) -> Any:
    """Return the loss as a scalar array. Raises TypeError if it is not a scalar floating number."""
    if not isinstance(loss, jax.Array | np.ndarray | np.generic | float):
        hint = (
            " To return more than the loss, use has_aux=True and return (loss, aux)." if isinstance(loss, tuple) else ""
        )
        raise TypeError(f"{name} must return a scalar floating loss; it returned a {type(loss).__name__}.{hint}")
    loss = jnp.asarray(loss)
    if loss.shape != ():
        raise TypeError(
            f"{name} must return a scalar loss; it returned {loss.dtype}{list(loss.shape)}. Reduce it with `.mean()` or"
            " `.sum()`."
        )
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(
            f"{name} must return a floating loss; it returned {loss.dtype}. Convert it with `.astype(float)`."
        )
    return loss


# Takes `fn(params, run)`, which returns `(value, more)`. Returns a function of the same arguments that returns
# `((value, more), found)`: `found` are the gradients by `params`, or what computes them.
Transform = Callable[[Callable[..., Any]], Callable[..., Any]]


def by_gradients(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The Transform that computes gradients at once."""
    return jax.value_and_grad(fn, has_aux=True)


def _differentiated(
    transform: Transform,
    traced: Traced,
    values: list[Any],
    data: Sequence[Any],
    train: list[int],
    places: Sequence[int],
) -> tuple[Any, Any]:
    """Return `(value, aux, written), found` of a traced function.

    `found` belongs to the cells at the positions `train`, then to the data at `places`.
    """

    def value_of(params: list[Any], run: Callable[..., Any]) -> Any:
        cells, inputs = list(values), list(data)
        for i, param in zip(train, params, strict=False):
            cells[i] = param
        for i, param in zip(places, params[len(train) :], strict=True):
            inputs[i] = param
        (value, aux), written = run(cells, inputs)
        return value, (aux, written)

    differentiated = transform(value_of)
    params = [*(values[i] for i in train), *(data[i] for i in places)]
    result = None
    with suppress(Exception), interrupts.tracing():
        result = differentiated(params, traced.differentiably)
    if result is None:  # the same without remembered derivatives: this way, JAX's error names the user's line
        result = differentiated(params, traced)
    (value, (aux, written)), found = result
    return (value, aux, written), found


def _no_parameter(name: str, lifted: list[Cell]) -> ValueError:
    """The error for a loss function that uses no trainable parameter."""
    frozen = sum(cell.kind == "parameter" and not cell.trainable for cell in lifted)
    why = f" ({frozen} parameters are frozen)" if frozen else ""
    return ValueError(
        f"{name} uses no trainable parameter of any module{why}, so nothing could be trained. Pass the model as an"
        " argument, or refer to it by a variable that the function can see. For frozen parameters call `unfreeze()`."
    )


def _checking(name: str, has_aux: bool) -> Callable[[Any, list[Any]], Any]:
    """Return a function that checks the result of a loss function and splits it into loss and aux."""

    def check(out: Any, objects: list[Any]) -> Any:
        if not has_aux:
            return check_loss(out, name), None
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(f"with has_aux=True, {name} must return (loss, aux); it returned a {type(out).__name__}")
        return check_loss(out[0], name), wrap_output(out[1], objects)

    return check


def differentiate_by_arguments(
    fn: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], has_aux: bool, argnums: Argnums
) -> tuple[Any, Any, Any]:
    """Return loss, aux, and the gradients by arguments in the form of these, within a trace."""
    call = Arguments(fn, args, kwargs)
    places = argnums.places(name, call, args)
    loss, aux, grads, _ = differentiate(fn, name, args, kwargs, has_aux, places=places)
    return loss, aux, argnums.gradients(call, args, grads)


@all_or_nothing
def differentiate(
    fn: Any,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    has_aux: bool,
    accumulates: bool = False,
    places: list[int] | None = None,
) -> tuple[Any, Any, dict[Any, Any], list[Any]]:
    """Return loss, aux, gradients by parameter, and the objects, within a trace. State that the loss changes is written.

    With `places`, the gradients are those by the data at these places, not by the parameters.
    """
    run = run_once(
        fn, name, args, kwargs, Purpose(_checking(name, has_aux)), by_gradients, places is None, places or ()
    )
    grads = {key: grad for key, grad in zip(run.keys, run.found, strict=True) if key is not None}
    if disabled_jit.is_plain():
        anomaly.check_gradients(run.value, grads, run.objects, name)
    run.store(name, list(grads) if accumulates else ())
    return run.value, unwrap_output(run.aux, run.objects), grads, run.objects


class Run(NamedTuple):
    """One run of a differentiated function within a trace, whose changes are not yet written."""

    value: Any
    aux: Any
    keys: list[
        Any
    ]  # of what is `found`: the cell of a parameter, or the place of an array; None for a parameter not read
    found: Any
    changes: dict[Cell, Any]
    settings: ChangedSettings
    objects: list[Any]

    def store(self, name: str, accumulates: Sequence[Any] = ()) -> None:
        """Write the state that the function changes. Gradients are to be added to the cells in `accumulates`."""
        objects = self.objects
        touch_all(objects)
        paths = paths_of(objects)
        if all(key is None for key in self.keys):
            raise _no_parameter(name, list(paths))
        for cell in accumulates:
            access.check_writable(cell.grad, f"the gradient of {paths[cell]}", objects[0])
        for cell, value in self.changes.items():
            access.write(cell, value, paths[cell], objects[0])
        settle(self.settings, objects)


def run_once(
    fn: Any,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    purpose: Purpose,
    transform: Transform,
    by_parameters: bool,
    places: Sequence[int],
) -> Run:
    """Run a function, and differentiate it by the parameters that it uses, and by the data at `places`."""
    call = Arguments(fn, args, kwargs)
    add_found(stateful_objects(fn), call.objects)
    call.objects.append(random.current())
    if disabled_jit.is_plain():
        plain = disabled_jit.differentiated(call, purpose, transform, by_parameters, places)
        return Run(*plain, (), call.objects)
    traced, lifted = trace_once(call, purpose)
    train = [i for i in traced.used if lifted[i].trainable and by_parameters]
    if not train and not places:
        raise _no_parameter(name, lifted)
    values = list(map(starting_value, lifted))
    (value, aux, written), found = _differentiated(transform, traced, values, owned_data(call.data), train, places)
    keys = [*(lifted[i] for i in train), *places]
    changes = {lifted[i]: value for i, value in zip(traced.written, written, strict=True)}
    return Run(value, aux, keys, found, changes, traced.settings, call.objects)
