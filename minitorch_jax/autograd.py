"""Gradients: `backward` accumulates them in the modules, `value_and_grad` and `grad` return them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from types import FunctionType
from typing import Any, Literal, ParamSpec, TypeVar, overload

from .engine import disabled_jit
from .engine.arguments import Static, unfold, unwrap_output, wrap_output
from .engine.compiled_function import Function
from .engine.differentiated_arguments import Argnums, as_argnums
from .engine.kept_with_owner import Functions
from .engine.loss import differentiate, differentiate_by_arguments
from .engine.tracing import Purpose, free_zeros
from .module.module import Module
from .module.torch_habits import check_function
from .runtime.bounded_cache import Kept
from .runtime.tracebacks import trim
from .state import access, dropped_copies
from .state import frame as frames
from .state.cell import Cell
from .state.frame import is_eager
from .state.gradient import added, gradient
from .state.pytree import build
from .state.undo import all_or_nothing
from .state.walk import walk_of

P = ParamSpec("P")
R = TypeVar("R")
Aux = TypeVar("Aux")


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

    def call(*args: Any, **kwargs: Any) -> Any:
        loss, aux, grads, _ = differentiate(fn, name, args, kwargs, has_aux)
        places = tuple(grads) if disabled_jit.is_plain() else frames.places_of(grads)
        return loss, aux, list(grads.values()), Static(places)

    call.__wrapped__ = call.stands_for = fn  # type: ignore[attr-defined]
    return call


def _returning_by_arguments(fn: Any, name: str, has_aux: bool, argnums: Argnums) -> Callable[..., Any]:
    """Return the function that `value_and_grad` with `argnums` compiles. It returns `loss, aux, gradients`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return differentiate_by_arguments(fn, name, args, kwargs, has_aux, argnums)

    call.__wrapped__ = call.stands_for = fn  # type: ignore[attr-defined]
    return call


def _by_arguments_of(fn: Any, has_aux: bool, argnums: Argnums) -> Function:
    """Return the compiled form of a loss function for `value_and_grad` with `argnums`."""
    kept: Kept = _by_arguments.get(fn)
    known: Function | None = kept.get((has_aux, argnums))
    if known is None:
        wrap = partial(_returning_by_arguments, has_aux=has_aux, argnums=argnums)
        known = Function(fn, Purpose(wrap_output, gradients=True), wrap=wrap, per_object=True)
        kept.set((has_aux, argnums), known)
    return known


_backward = (loss_functions(False), loss_functions(True))
_gradients = (loss_functions(False, accumulates=False), loss_functions(True, accumulates=False))
_by_arguments = Functions(lambda _: Kept())  # of each loss function, by `has_aux` and `argnums`


@overload
def backward(
    loss_fn: Callable[..., tuple[R, Aux]], *args: Any, has_aux: Literal[True], **kwargs: Any
) -> tuple[R, Aux]: ...
@overload
def backward(loss_fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R: ...
def backward(  # type: ignore[misc]  # for type checkers, the second form has no `has_aux`
    loss_fn: Callable[..., Any], *args: Any, has_aux: bool = False, **kwargs: Any
) -> Any:
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
        >>> import jax, jax.numpy as jnp, minitorch_jax as mt
        >>> from minitorch_jax import nn
        >>> layer = nn.Linear(2, 1, key=jax.random.key(0))
        >>> loss = mt.backward(lambda layer, x: (layer(x) ** 2).mean(), layer, jnp.ones((4, 2)))
        >>> loss.shape, [g.shape for g in layer.grads()]
        ((), [(1, 2), (1,)])
    """
    try:
        if type(loss_fn) is not FunctionType:
            check_function(loss_fn, "mt.backward")
            loss_fn, args, kwargs = unfold(loss_fn, args, kwargs)
        return accumulate(_backward[has_aux].get(loss_fn), loss_fn, args, kwargs, has_aux)
    except Exception as error:
        trim(error)
        raise


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
    loss, aux, grads, objects = differentiate(fn, name, args, kwargs, has_aux, accumulates=True)
    for param, new in grads.items():
        if param.grad is not None:
            param.grad.reached = True
            access.write(param.grad, added(gradient(param.grad), new), "a gradient")
    return (loss, aux) if has_aux else loss


@overload
def value_and_grad(
    fn: Callable[P, tuple[R, Aux]], argnums: int | Sequence[int] | None = None, *, has_aux: Literal[True]
) -> Callable[P, tuple[tuple[R, Aux], Any]]: ...
@overload
def value_and_grad(
    fn: Callable[P, R], argnums: int | Sequence[int] | None = None, *, has_aux: Literal[False] = False
) -> Callable[P, tuple[R, Any]]: ...
def value_and_grad(
    fn: Callable[..., Any], argnums: int | Sequence[int] | None = None, *, has_aux: bool = False
) -> Callable[..., Any]:
    """Return a function that returns a loss and its gradients, and does not change the modules' accumulated gradients.

    Args:
        fn: as `loss_fn` of `backward`.
        argnums: the positions of arguments, counted from 0: the gradients are those by these arguments, instead of those by
            the modules' parameters. Such an argument is a floating array or a pytree of them, as for `jax.grad`. State that
            the call changes, such as BatchNorm's statistics, is written back as in `backward`. Parameters, frozen or
            trainable, are constants then.
        has_aux: True if `fn` returns `(loss, aux)`.

    Returns:
        A function of `fn`'s arguments that returns `(loss, grads)`, or `((loss, aux), grads)`. `grads` is a Module of the
        same structure as the module that `fn` uses, for `jax.tree.map` and `accumulate`. If `fn` uses several modules, it is
        a tuple of Modules, those of arguments first. In place of frozen parameters and buffers it has zeros, which take no
        memory. With `argnums`, `grads` has the structure of the argument; for a sequence, it is a tuple of such.

    Raises:
        TypeError, ValueError: as `backward`, when called; also for an argument in `argnums` that was not passed, is a
            module, or holds anything but floating arrays.

    Example:
        >>> import jax, jax.numpy as jnp, minitorch_jax as mt
        >>> from minitorch_jax import nn
        >>> layer = nn.Linear(2, 1, key=jax.random.key(0))
        >>> loss, grads = mt.value_and_grad(lambda layer, x: layer(x).sum())(layer, jnp.ones((4, 2)))
        >>> grads.bias
        Array([4.], dtype=float32)
    """

    check_function(fn, "mt.value_and_grad")
    return _value_and_grad_of(fn, as_argnums(argnums, "mt.value_and_grad"), has_aux)


def _value_and_grad_of(fn: Callable[..., Any], argnums: Argnums | None, has_aux: bool) -> Callable[..., Any]:
    """Return what `value_and_grad` returns, for checked arguments."""

    @wraps(fn if hasattr(fn, "__name__") else type(fn).__call__)
    def loss_and_grads(*args: Any, **kwargs: Any) -> Any:
        try:
            inner, all_args, kwargs = unfold(fn, args, kwargs)
            if argnums is None:
                loss, aux, grads = _by_parameters(inner, all_args, kwargs, has_aux)
            else:
                name = getattr(fn, "__name__", type(fn).__name__)
                of_call = argnums.within(name, len(args), len(all_args) - len(args))
                loss, aux, grads = _by_arguments_here(inner, all_args, kwargs, has_aux, of_call)
        except Exception as error:
            trim(error)
            raise
        return ((loss, aux), grads) if has_aux else (loss, grads)

    return loss_and_grads


def _by_parameters(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], has_aux: bool) -> tuple[Any, Any, Any]:
    """Return loss, aux, and the gradients by parameters as Modules."""
    function = _gradients[has_aux].get(fn)
    if not is_eager():
        loss, aux, grads, objects = differentiate(fn, function.name, args, kwargs, has_aux)
        return loss, aux, _as_modules(objects, grads)
    (out,), binding = function.run(fn, args, kwargs)
    objects = function.objects_of(fn, args, kwargs)
    if binding is None:
        loss, aux, found, places = out
        owners = places.value
    else:
        loss, aux, found, places = unwrap_output(out, objects)
        owners = [binding.cells[i] for i in places]
    return loss, aux, _as_modules(objects, dict(zip(owners, found, strict=True)))


def _by_arguments_here(
    fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], has_aux: bool, argnums: Argnums
) -> tuple[Any, Any, Any]:
    """Return loss, aux, and the gradients by arguments."""
    function = _by_arguments_of(fn, has_aux, argnums)
    if not is_eager():
        return differentiate_by_arguments(fn, function.name, args, kwargs, has_aux, argnums)
    (out,), binding = function.run(fn, args, kwargs)
    if binding is not None and binding.program.wraps:
        out = unwrap_output(out, function.objects_of(fn, args, kwargs))
    result: tuple[Any, Any, Any] = out
    return result


@overload
def grad(
    fn: Callable[P, tuple[Any, Aux]], argnums: int | Sequence[int] | None = None, *, has_aux: Literal[True]
) -> Callable[P, tuple[Any, Aux]]: ...
@overload
def grad(
    fn: Callable[P, Any], argnums: int | Sequence[int] | None = None, *, has_aux: Literal[False] = False
) -> Callable[P, Any]: ...
def grad(
    fn: Callable[..., Any], argnums: int | Sequence[int] | None = None, *, has_aux: bool = False
) -> Callable[..., Any]:
    """Return a function that returns the gradients of a loss, or `(grads, aux)` with `has_aux`. See `value_and_grad`.

    Example:
        >>> import jax, jax.numpy as jnp, minitorch_jax as mt
        >>> from minitorch_jax import nn
        >>> layer = nn.Linear(2, 1, key=jax.random.key(0))
        >>> mt.grad(lambda layer, x: layer(x).sum())(layer, jnp.ones((4, 2))).weight
        Array([[4., 4.]], dtype=float32)

        The gradient penalty of a critic, by its input, while its BatchNorm trains:

        >>> critic = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        >>> def penalty(x):
        ...     slope = mt.grad(lambda x: critic(x).sum(), argnums=0)(x)
        ...     return ((jnp.linalg.norm(slope, axis=1) - 1) ** 2).mean()
        >>> loss = mt.backward(penalty, jnp.arange(8.0).reshape(4, 2))
        >>> loss.shape, int(critic[1].num_batches_tracked)
        ((), 1)
    """
    check_function(fn, "mt.grad")
    both = _value_and_grad_of(fn, as_argnums(argnums, "mt.grad"), has_aux)

    @wraps(both)
    def gradients(*args: Any, **kwargs: Any) -> Any:
        try:
            value, grads = both(*args, **kwargs)
        except Exception as error:
            trim(error)
            raise
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
