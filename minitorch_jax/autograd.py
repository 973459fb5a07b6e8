"""Gradients: `backward` accumulates them in the modules, `value_and_grad` and `grad` return them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial, wraps
from types import FunctionType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .engine import disabled_jit
from .engine.arguments import Arguments, Static, unfold, unwrap_output, wrap_output
from .engine.compiled_function import Function
from .engine.kept_with_owner import Functions
from .engine.names.modules import stateful_objects
from .engine.tracing import ChangedSettings, Purpose, Traced, free_zeros, paths_of, settle, touch_all, trace_once
from .module import random
from .module.module import Module
from .runtime import interrupts
from .runtime.numpy_memory import owned_data
from .state import access, dropped_copies
from .state import frame as frames
from .state.cell import Cell
from .state.frame import is_eager
from .state.gradient import added, gradient, starting_value
from .state.pytree import build
from .state.undo import all_or_nothing
from .state.walk import walk_of


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


def _value_and_grad(traced: Traced, values: list[Any], data: Any, train: list[int]) -> tuple[Any, list[Any]]:
    """Return `(loss, aux, written), gradients` of a traced loss, with respect to the cells at the positions `train`."""

    def loss_of(params: list[Any], run: Callable[..., Any]) -> Any:
        inputs = list(values)
        for i, param in zip(train, params, strict=True):
            inputs[i] = param
        (loss, aux), written = run(inputs, data)
        return loss, (aux, written)

    differentiated = jax.value_and_grad(loss_of, has_aux=True)
    params = [values[i] for i in train]
    found = None
    with suppress(Exception), interrupts.unwrapped():
        found = differentiated(params, traced.differentiably)
    if found is None:  # the same without remembered derivatives: this way, JAX's error names the user's line
        found = differentiated(params, traced)
    (loss, (aux, written)), grads = found
    return (loss, aux, written), grads


def _no_parameter(name: str, lifted: list[Cell]) -> ValueError:
    """The error for a loss function that uses no trainable parameter."""
    frozen = sum(cell.kind == "parameter" and not cell.trainable for cell in lifted)
    why = f" ({frozen} parameters are frozen)" if frozen else ""
    return ValueError(
        f"{name} uses no trainable parameter of any module{why}, so nothing could be trained. Pass the model as an"
        " argument, or refer to it by a variable that the function can see. For frozen parameters call `unfreeze()`."
    )


def loss_functions(has_aux: bool, accumulates: bool = True) -> Functions:
    """Return the compiled forms of loss functions: with `accumulates` for `backward`, else for `value_and_grad`."""
    form = _accumulating if accumulates else _returning

    def make(fn: Any) -> Function:
        wrap = partial(form, has_aux=has_aux)
        return Function(fn, Purpose(wrap_output, gradients=True), wrap=wrap, per_object=True)

    return Functions(make)


def _accumulating(fn: Any, name: str, has_aux: bool) -> Callable[..., Any]:
    """Return the function that `backward` compiles for a loss function."""

    def accumulate(*args: Any, **kwargs: Any) -> Any:
        return _accumulate_here(fn, name, args, kwargs, has_aux)

    accumulate.__wrapped__ = accumulate.stands_for = fn  # type: ignore[attr-defined]
    return accumulate


def _returning(fn: Any, name: str, has_aux: bool) -> Callable[..., Any]:
    """Return the function that `value_and_grad` compiles. It returns `loss, aux, gradients`, and whose gradients they are."""

    def differentiate(*args: Any, **kwargs: Any) -> Any:
        loss, aux, grads, _ = _differentiate(fn, name, args, kwargs, has_aux)
        places = tuple(grads) if disabled_jit.is_plain() else frames.places_of(grads)
        return loss, aux, list(grads.values()), Static(places)

    differentiate.__wrapped__ = differentiate.stands_for = fn  # type: ignore[attr-defined]
    return differentiate


_backward = (loss_functions(False), loss_functions(True))
_gradients = (loss_functions(False, accumulates=False), loss_functions(True, accumulates=False))


def backward(loss_fn: Callable[..., Any], *args: Any, has_aux: bool = False, **kwargs: Any) -> Any:
    """Compute a loss and add its gradients to the modules' accumulated gradients, in one compiled program.

    Gradients are taken with respect to every trainable parameter of every module that `loss_fn` uses. A module may be an
    argument (anywhere in a pytree) or be reached by closure. Other state that the call changes (buffers, such as running
    statistics) is written back. If anything raises, nothing is changed.

    A parameter that the loss does not use keeps its gradient. This is zeros at first, never None as in torch, so a step may
    still move the parameter by momentum, weight decay or Adam's averages. To prevent that, `freeze()` the parameter, or give
    it an optimizer of its own.

    Args:
        loss_fn: a function of `args` and `kwargs` that returns a scalar floating loss; also a module, or a module's method.
        *args: arrays, numbers, modules, pytrees of these, and static values. Arrays and numbers are traced: a new shape or
            dtype compiles again, a new value does not. The arrays of modules are inputs. Strings, booleans, functions and
            other hashable values are static. Values that the code of `loss_fn` refers to by name are followed: JAX arrays
            are inputs, and a change of another value, or of the code, compiles again (see `docs/following.md`).
        has_aux: True if `loss_fn` returns `(loss, aux)`.
        **kwargs: as `args`.

    Returns:
        The loss, shape `()`, or `(loss, aux)`.

    Raises:
        TypeError: if the loss is not a scalar floating array.
        ValueError: if no trainable parameter is used.

    Example:
        >>> import jax, minitorch_jax as mt
        >>> from minitorch_jax import nn
        >>> layer = nn.Linear(2, 1, key=jax.random.key(0))
        >>> loss = mt.backward(lambda layer, x: (layer(x) ** 2).mean(), layer, jnp.ones((4, 2)))
        >>> loss.shape, [g.shape for g in layer.grads()]
        ((), [(1, 2), (1,)])
    """
    if type(loss_fn) is not FunctionType:
        loss_fn, args, kwargs = unfold(loss_fn, args, kwargs)
    return accumulate(_backward[has_aux].get(loss_fn), loss_fn, args, kwargs, has_aux)


def accumulate(function: Function, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], has_aux: bool) -> Any:
    """Do what `backward` does, with one of the compiled forms of `loss_functions`."""
    if not is_eager():
        return _accumulate_here(fn, function.name, args, kwargs, has_aux)
    (out,), binding = function.run(fn, args, kwargs)
    if binding is not None and binding.program.wraps:
        out = unwrap_output(out, function.objects_of(fn, args, kwargs))
    return out


@all_or_nothing
def _accumulate_here(fn: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], has_aux: bool) -> Any:
    """Do what `backward` does, within a trace."""
    loss, aux, grads, objects = _differentiate(fn, name, args, kwargs, has_aux, accumulates=True)
    for param, new in grads.items():
        if param.grad is not None:
            param.grad.reached = True
            access.write(param.grad, added(gradient(param.grad), new), "a gradient")
    return (loss, aux) if has_aux else loss


def _checking(name: str, has_aux: bool) -> Callable[[Any, list[Any]], Any]:
    """Return a function that checks the result of a loss function and splits it into loss and aux."""

    def check(out: Any, objects: list[Any]) -> Any:
        if not has_aux:
            return check_loss(out, name), None
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(f"with has_aux=True, {name} must return (loss, aux); it returned a {type(out).__name__}")
        return check_loss(out[0], name), wrap_output(out[1], objects)

    return check


@all_or_nothing
def _differentiate(
    fn: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], has_aux: bool, accumulates: bool = False
) -> tuple[Any, Any, dict[Cell, Any], list[Any]]:
    """Return loss, aux, gradients by parameter, and the objects, within a trace. State that the loss changes is written."""
    call = Arguments(fn, args, kwargs)
    call.objects += [*stateful_objects(fn).objects, random.current()]
    purpose = Purpose(_checking(name, has_aux))
    if disabled_jit.is_plain():
        loss, aux, grads, changes = disabled_jit.value_and_grad(call, purpose)
        settings: ChangedSettings = ()
    else:
        traced, lifted = trace_once(call, purpose)
        train = [i for i in traced.used if lifted[i].trainable]
        if not train:
            raise _no_parameter(name, lifted)
        values = list(map(starting_value, lifted))
        (loss, aux, written), found = _value_and_grad(traced, values, owned_data(call.data), train)
        grads = {lifted[i]: grad for i, grad in zip(train, found, strict=True)}
        changes = {lifted[i]: value for i, value in zip(traced.written, written, strict=True)}
        settings = traced.settings
    touch_all(call.objects)
    paths = paths_of(call.objects)
    if not grads:
        raise _no_parameter(name, list(paths))
    for cell in grads if accumulates else ():
        access.check_writable(cell.grad, f"the gradient of {paths[cell]}", call.objects[0])
    for cell, value in changes.items():
        access.write(cell, value, paths[cell], call.objects[0])
    settle(settings, call.objects)
    return loss, unwrap_output(aux, call.objects), grads, call.objects


def value_and_grad(fn: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., Any]:
    """Return a function that returns a loss and its gradients, and does not change the modules' accumulated gradients.

    Args:
        fn: as `loss_fn` of `backward`.
        has_aux: True if `fn` returns `(loss, aux)`.

    Returns:
        A function of `fn`'s arguments that returns `(loss, grads)`, or `((loss, aux), grads)`. `grads` is a Module of the
        same structure as the module that `fn` uses, for `jax.tree.map` and `accumulate`. If `fn` uses several modules, it is
        a tuple of Modules, those of arguments first. In place of frozen parameters and buffers it has zeros, which take no
        memory.

    Raises:
        TypeError, ValueError: as `backward`, when called.

    Example:
        >>> import jax, minitorch_jax as mt
        >>> from minitorch_jax import nn
        >>> layer = nn.Linear(2, 1, key=jax.random.key(0))
        >>> loss, grads = mt.value_and_grad(lambda layer, x: layer(x).sum())(layer, jnp.ones((4, 2)))
        >>> grads.bias
        Array([4.], dtype=float32)
    """

    @wraps(fn if hasattr(fn, "__name__") else type(fn).__call__)
    def loss_and_grads(*args: Any, **kwargs: Any) -> Any:
        inner, args, kwargs = unfold(fn, args, kwargs)
        function = _gradients[has_aux].get(inner)
        if is_eager():
            (out,), binding = function.run(inner, args, kwargs)
            objects = function.objects_of(inner, args, kwargs)
            if binding is None:
                loss, aux, found, places = out
                owners = places.value
            else:
                loss, aux, found, places = unwrap_output(out, objects)
                owners = [binding.cells[i] for i in places]
            grads = dict(zip(owners, found, strict=True))
        else:
            loss, aux, grads, objects = _differentiate(inner, function.name, args, kwargs, has_aux)
        gradients = _as_modules(objects, grads)
        return ((loss, aux), gradients) if has_aux else (loss, gradients)

    return loss_and_grads


def grad(fn: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., Any]:
    """Return a function that returns the gradients of a loss, or `(grads, aux)` with `has_aux`. See `value_and_grad`.

    Example:
        >>> import jax, minitorch_jax as mt
        >>> from minitorch_jax import nn
        >>> layer = nn.Linear(2, 1, key=jax.random.key(0))
        >>> mt.grad(lambda layer, x: layer(x).sum())(layer, jnp.ones((4, 2))).weight
        Array([[4., 4.]], dtype=float32)
    """
    both = value_and_grad(fn, has_aux=has_aux)

    @wraps(both)
    def gradients(*args: Any, **kwargs: Any) -> Any:
        value, grads = both(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return gradients


def _as_modules(objects: list[Any], grads: dict[Cell, Any]) -> Any:
    """Return the gradients as copies of their modules. Modules that were reached only through an optimizer come last."""
    walks = [walk_of(obj) for obj in objects if isinstance(obj, Module)]
    left = grads.keys() - {cell for walk in walks for cell in walk.cells}
    for module in [module for obj in objects for module in _modules_of(obj)] if left else ():
        if not left.isdisjoint(walk_of(module).cells):
            walks.append(walk_of(module))
            left -= {*walks[-1].cells}
    used = [walk for walk in dict.fromkeys(walks) if any(cell in grads for cell in walk.cells)]
    copies = [
        build(
            walk.spec,
            [grads[c] if c in grads else free_zeros(c.value) for c in walk.cells],
            dropped_copies.birth_here(),
        )
        for walk in used
    ]
    return copies[0] if len(copies) == 1 else tuple(copies)


def _modules_of(optimizer: Any) -> list[Module]:
    listed = () if isinstance(optimizer, Module) else getattr(optimizer, "modules", ())
    return [module for module in listed if isinstance(module, Module)]
