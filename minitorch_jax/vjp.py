"""`vjp`: run a function once, and later, any number of times, pull gradients of its output back to its parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any, Generic, ParamSpec, TypeVar, cast, overload

import jax
import jax.numpy as jnp

from .engine import disabled_jit
from .engine.arguments import Arguments, unfold, unwrap_output, wrap_output
from .engine.compiled_function import Function
from .engine.differentiated_arguments import Argnums, as_argnums
from .engine.kept_with_owner import Functions
from .engine.loss import run_once
from .engine.tracing import Purpose
from .module import anomaly
from .module.torch_habits import check_function
from .runtime.bounded_cache import Kept
from .runtime.tracebacks import trim
from .state import access
from .state import frame as frames
from .state.cell import Cell
from .state.frame import is_eager
from .state.gradient import added, gradient
from .state.static_values import describe, holds_state, is_array, shown
from .state.undo import all_or_nothing
from .state.walk import walk_of

P = ParamSpec("P")
R = TypeVar("R")
G = TypeVar("G")


class _About:
    """What one trace says of a Pullback: a static part of its structure, compared by identity."""

    def __init__(self, name: str, out: Any, tree: Any, keys: Sequence[Any], trees: Sequence[Any], one: bool) -> None:
        self.name = name
        self.treedef = jax.tree.structure(out)  # of the output
        self.types = [jax.typeof(leaf) for leaf in jax.tree.leaves(out)]
        self.tree = tree  # of JAX's function that pulls a gradient back; its leaves are the saved arrays
        self.keys = keys  # for each gradient, `(object, path, shape, dtype)` of its parameter, or None
        self.trees = trees  # of the arguments by which gradients are returned
        self.is_one = one  # True if there is one such argument, given as a number

    def checked(self, given: Any) -> Any:
        """Return a gradient of the output, with numbers as arrays. Raises ValueError or TypeError if it does not fit."""
        treedef: Any = jax.tree.structure(given)
        if treedef != self.treedef:
            raise TypeError(
                f"the pullback of {self.name} takes the gradient of its output, in the output's form, {self._form()}; got"
                f" {jax.tree.map(_described, given)}"
            )
        leaves = zip(jax.tree.leaves(given), self.types, strict=True)
        return jax.tree.unflatten(treedef, [self._fitting(*pair) for pair in leaves])

    def _fitting(self, leaf: Any, wanted: Any) -> Any:
        if isinstance(leaf, int | float | complex) and not isinstance(leaf, bool) and wanted.shape == ():
            return jnp.asarray(leaf, wanted.dtype)
        if not is_array(leaf) or leaf.shape != wanted.shape or leaf.dtype != wanted.dtype:
            fix = f" Convert it with `.astype({wanted.dtype})`." if getattr(leaf, "shape", 0) == wanted.shape else ""
            raise ValueError(
                f"the pullback of {self.name} takes a gradient of the shape and dtype of the output, {self._form()}; got"
                f" {_described(leaf)}.{fix}"
            )
        return leaf

    def _form(self) -> Any:
        return jax.tree.unflatten(self.treedef, [_Shown(describe(kind)) for kind in self.types])


class _Shown(str):
    """A text that prints without quotes."""

    __repr__ = str.__str__


def _described(leaf: Any) -> Any:
    return _Shown(describe(leaf) if is_array(leaf) else f"{shown(leaf)} ({type(leaf).__name__})")


class _Saved:
    """The arrays that a run has saved for its pullback. A pytree of them."""

    __slots__ = ("arrays", "about")

    def __init__(self, arrays: Sequence[Any], about: _About) -> None:
        self.arrays, self.about = arrays, about


class Pullback(Generic[R, G]):
    """What `mt.vjp` returns besides the output: a function of the output's gradient. See `vjp`.

    It holds the arrays that the run has saved. It is a pytree, so compiled functions take and return it.
    """

    __slots__ = ("_objects", "_saved", "__weakref__")

    def __init__(self, objects: Sequence[Any], saved: _Saved) -> None:
        self._objects, self._saved = tuple(objects), saved

    def __call__(self, gradient: R) -> G:
        """Add the gradients by the parameters to their accumulated gradients. Returns those by the arguments in `argnums`.

        Args:
            gradient: the gradient of a loss by the output, in the output's form, shapes and dtypes.

        Raises:
            TypeError, ValueError: if `gradient` is not of the output's form; if a parameter is no longer in its module.
        """
        try:
            args = *self._objects, self._saved, self._saved.about.checked(gradient)
            if not is_eager():
                return cast(G, _pull_here(*args))
            return cast(G, _pulled.run(_pull, args, {}, id(self._saved.about))[0][0])
        except Exception as error:
            trim(error)
            raise

    def __repr__(self) -> str:
        arrays = self._saved.arrays
        return f"<pullback of {self._saved.about.name}, {len(arrays)} saved arrays>"


jax.tree_util.register_pytree_node(
    _Saved, lambda saved: (saved.arrays, saved.about), lambda about, arrays: _Saved(arrays, about)
)
jax.tree_util.register_pytree_node(
    Pullback, lambda pull: ((pull._objects, pull._saved), None), lambda _, parts: Pullback(*parts)
)


def _pull(*args: Any) -> Any:
    """Do what a call of a Pullback does. The last arguments are what it has saved, and the gradient."""
    *objects, saved, given = args
    about = saved.about
    (grads,) = jax.tree.unflatten(about.tree, saved.arrays)(given)
    found: dict[Any, Any] = {}
    for key, grad in zip(about.keys, grads, strict=True):
        if key is not None:
            found[_cell_of(about.name, objects, *key)] = grad, objects[key[0]]
    if disabled_jit.is_plain():
        anomaly.check_gradients(None, {cell: new for cell, (new, _) in found.items()}, objects, about.name)
    for cell, (new, owner) in found.items():
        if cell.trainable and cell.grad is not None:  # else it was frozen after the run
            if frames.local.frame is not None:
                frames.local.frame.touch(cell.grad, owner)
            cell.grad.reached = True
            access.write(cell.grad, added(gradient(cell.grad), new), "a gradient")
    rest = iter(grads[len(grads) - sum(tree.num_leaves for tree in about.trees) :])
    trees = [jax.tree.unflatten(tree, [next(rest) for _ in range(tree.num_leaves)]) for tree in about.trees]
    return trees[0] if about.is_one else tuple(trees) if trees else None


def _cell_of(name: str, objects: Sequence[Any], index: int, path: str, shape: Any, dtype: Any) -> Cell:
    """Return the cell of a parameter."""
    obj = objects[index]
    cell = dict(walk_of(obj).named()).get(path)
    if cell is None or not hasattr(cell.value, "shape") or (cell.value.shape, cell.value.dtype) != (shape, dtype):
        raise ValueError(
            f"{type(obj).__name__}.{path} is no longer the {dtype}{list(shape)} of which the pullback of {name} has the"
            " gradient. Call the pullback before the module changes, or call `mt.vjp` again"
        )
    return cell


_pull_here = all_or_nothing(_pull)
_pulled = Function(_pull, Purpose(lambda out, _: out, gradients=True, statics=False), per_object=True)
_pulled.name = _pulled.compilations.name = "a pullback"


def _checking(name: str) -> Callable[[Any, list[Any]], Any]:
    """Return a function that checks the output of the function that `vjp` runs."""

    def check(out: Any, objects: list[Any]) -> Any:
        leaves = jax.tree.leaves(out, is_leaf=holds_state)
        for leaf in leaves:
            dtype = leaf.dtype if is_array(leaf) else None
            if not (isinstance(leaf, float) or (dtype is not None and jnp.issubdtype(dtype, jnp.inexact))):
                what = describe(leaf) if dtype is not None else f"{shown(leaf)} ({type(leaf).__name__})"
                raise TypeError(
                    f"mt.vjp pulls gradients back, so {name} must return floating arrays; it returned {what}. Return it"
                    " from another function, or convert it with `.astype(jnp.float32)`"
                )
        if not leaves:
            raise TypeError(f"mt.vjp pulls gradients back, so {name} must return floating arrays; it returned {out!r}")
        return jax.tree.map(jnp.asarray, out), None

    return check


def _by_pullback(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The Transform (see `loss.py`) that runs a function, and leaves its gradients to later."""

    def run(params: list[Any], how: Any) -> Any:
        value, pull, more = jax.vjp(lambda params: fn(params, how), params, has_aux=True)
        return (value, more), pull

    return run


@all_or_nothing
def _run_here(fn: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], argnums: Argnums | None) -> Any:
    """Do what `vjp` does, within a trace."""
    if args and holds_state(args[0]) and fn is type(args[0]).__call__:
        name = type(args[0]).__name__
    places = [] if argnums is None else argnums.places(name, Arguments(fn, args, kwargs), args)
    run = run_once(fn, name, args, kwargs, Purpose(_checking(name)), _by_pullback, True, places)
    run.store(name)
    cells = {key for key in run.keys if isinstance(key, Cell)}
    owners, keys = list[Any](), dict[Cell, Any]()
    for obj in run.objects:
        mine = {cell: path for path, cell in walk_of(obj).named() if cell in cells and cell not in keys}
        if mine:
            keys |= {cell: (len(owners), path, cell.value.shape, cell.value.dtype) for cell, path in mine.items()}
            owners.append(obj)
    leaves, tree = jax.tree.flatten(run.found)
    trees = [] if argnums is None else argnums.trees(args)
    one = argnums is not None and argnums.is_one
    about = _About(name, run.value, tree, [keys.get(key) for key in run.keys], trees, one)
    return run.value, Pullback(owners, _Saved(leaves, about))


def _running(fn: Any, name: str, argnums: Argnums | None) -> Callable[..., Any]:
    """Return the function that `vjp` compiles."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return _run_here(fn, name, args, kwargs, argnums)

    call.__wrapped__ = call.stands_for = fn  # type: ignore[attr-defined]
    return call


def _function_of(fn: Any, argnums: Argnums | None) -> Function:
    kept: Kept = _runs.get(fn)
    known: Function | None = kept.get(argnums)
    if known is None:
        wrap = partial(_running, argnums=argnums)
        known = kept.set(argnums, Function(fn, Purpose(wrap_output, gradients=True), wrap=wrap, per_object=True))
    return known


_runs = Functions(lambda _: Kept())  # of each function, by `argnums`


@overload
def vjp(
    fn: Callable[..., R], *args: Any, argnums: int | Sequence[int], **kwargs: Any
) -> tuple[R, Pullback[R, Any]]: ...
@overload
def vjp(fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> tuple[R, Pullback[R, None]]: ...
def vjp(  # type: ignore[misc]  # for type checkers, the second form has no `argnums`
    fn: Callable[..., Any], *args: Any, argnums: int | Sequence[int] | None = None, **kwargs: Any
) -> Any:
    """Run a function once; return its output, and a function that pulls a gradient of the output back to the parameters.

    For an output that several losses use, such as the images of a GAN's generator: the generator runs once, so its
    BatchNorm's statistics and the random stream change once, and what it computes is one array. `pull(gradient)` adds to the
    accumulated gradients, as `mt.backward` of `(fn(*args) * gradient).sum()` would, for the values that parameters had in
    the run: a step in between changes nothing (torch raises an error then). It may be called several times, as in torch
    with `retain_graph=True`. The saved arrays are freed when `pull` is (`del pull`).

    In eager code the run and each pull are one compiled program; within `mt.jit`, `mt.scan` or a JAX transform they become
    part of the program around them. In eager code the weights that the pull needs are among the saved arrays, as copies.

    Args:
        fn: a function of `args` and `kwargs`, as `loss_fn` of `backward`, that returns a floating array, or a pytree of them.
        *args, **kwargs: as in `backward`.
        argnums: the positions of arguments, counted from 0: `pull` also returns the gradients by these, in their form; for
            a sequence, a tuple. (In `mt.grad`, `argnums` leaves the parameters out. Here `freeze()` does.)

    Returns:
        `(output, pull)`. `pull(gradient)` takes a gradient of the output's form, shapes and dtypes, and returns None without
        `argnums`. `pull` is a pytree.

    Raises:
        TypeError: if the output holds anything but floating arrays; as `mt.grad`, for `argnums`.
        ValueError: if no trainable parameter is used, and there are no `argnums`.

    Source: `jax.vjp`, for modules.

    Example:
        One step of each network of a GAN:

        >>> import jax.numpy as jnp, minitorch_jax as mt
        >>> from minitorch_jax import nn, optim
        >>> G, D = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), nn.Linear(3, 1)
        >>> opt_G, opt_D = optim.Adam([G]), optim.Adam([D])
        >>> bce = nn.functional.binary_cross_entropy_with_logits
        >>> def loss_D(real, fake):
        ...     return bce(D(real), jnp.ones((4, 1))) + bce(D(fake), jnp.zeros((4, 1)))
        >>> def loss_G(fake):
        ...     return bce(D(fake), jnp.ones((4, 1)))
        >>> @mt.jit
        ... def step(real, z):
        ...     fake, pull = mt.vjp(G, z)
        ...     opt_D.zero_grad()
        ...     mt.backward(loss_D, real, fake)
        ...     opt_D.step()
        ...     opt_G.zero_grad()
        ...     loss, gradient = mt.value_and_grad(loss_G, argnums=0)(fake)
        ...     pull(gradient)
        ...     opt_G.step()
        ...     return loss
        >>> loss = step(jnp.ones((4, 3)), jnp.arange(8.0).reshape(4, 2))
        >>> loss.shape, int(G[1].num_batches_tracked)
        ((), 1)
    """
    try:
        check_function(fn, "mt.vjp")
        nums = as_argnums(argnums, "mt.vjp")
        name = getattr(fn, "__name__", type(fn).__name__)
        count = len(args)
        if type(fn) is not FunctionType:
            fn, args, kwargs = unfold(fn, args, kwargs)
        if nums is not None:
            nums = nums.within(name, count, len(args) - count)
        function = _function_of(fn, nums)
        if not is_eager():
            return _run_here(fn, function.name, args, kwargs, nums)
        (out,), binding = function.run(fn, args, kwargs)
        if binding is not None and binding.program.wraps:
            out = unwrap_output(out, function.objects_of(fn, args, kwargs))
        return out
    except Exception as error:
        trim(error)
        raise
