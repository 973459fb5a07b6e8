"""Networks of any classes that keep `W`, `b` and `dW`, `db`, as one object that our optimizers train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitorch_jax import interrupts

from .objects import describe, is_floating, listing
from .pairs import Listed, Pair, Scan, patterns


def wrap(
    network: Any,
    *,
    gradients: Mapping[str, str] | None = None,
    frozen: str | Iterable[str] = (),
    ignored: str | Iterable[str] = (),
) -> WrappedNetwork:
    """Make a NumPy network of any classes one that the optimizers of this library train, in place.

    A parameter is a floating array `x` kept beside its gradient: an attribute `x` beside `dx`, `d_x`, `grad_x` or `x_grad`,
    which is an array, or None for zeros; items of a dict likewise; or lists or dicts of both, `params` beside `grads`, item
    by item. They are looked for in all objects, lists, tuples and dicts that the network holds, to any depth, in each once.
    An object that has `parameters()` and `grads()` is used as it is.

    Arrays and gradients are looked up by name at each step: a `backward` may assign `self.dW = ...` or add to it, and an
    array that is replaced by one of its shape and dtype is noticed and used. One array in two places is one parameter; its
    gradient is the sum of those beside it.

    Wrap a network before its first `forward`: an input that it keeps as `x` beside `dx` looks like a parameter.

    Args:
        network: an object, or a list, tuple or dict of objects.
        gradients: for parameters with gradients of other names, those names: `{"W": "gW"}`, or by path, `{"0.W": "gW"}`.
        frozen: dotted paths of arrays that are not trained, but are part of `state_dict()`; `*` stands for anything, as in
            `"*.running_mean"`.
        ignored: the same for arrays that are neither, such as cached inputs.

    Returns:
        An object for the list `modules` of an optimizer, and for `mt.save` and `mt.load`.

    Raises:
        ValueError: one error that lists every array without a gradient and whatever else is not clear; if there are no
            parameters; if a name in `gradients` or `frozen` matches nothing.

    Example:
        >>> import minitorch_jax as mt
        >>> class Scale:
        ...     def __init__(self, size):
        ...         self.w, self.dw = np.ones(size), None
        ...     def forward(self, x):
        ...         self.x = x
        ...         return self.w * x
        ...     def backward(self, dout):
        ...         self.dw = (dout * self.x).sum(0)
        ...         return dout * self.w
        >>> layers = [Scale(2), Scale(2)]
        >>> network = wrap(layers)
        >>> network
        WrappedNetwork(
          0.w: float64[2]
          1.w: float64[2]
        )
        >>> opt = mt.Optimizer([network], lr=0.5)
        >>> y = layers[1].forward(layers[0].forward(np.ones((1, 2))))
        >>> dx = layers[0].backward(layers[1].backward(np.ones((1, 2))))
        >>> opt.step()
        >>> layers[0].w
        array([0.5, 0.5])
    """
    return WrappedNetwork(network, gradients or {}, patterns(frozen), patterns(ignored))


class WrappedNetwork:
    """What `wrap` gives: `parameters()` and `grads()` of a network, aligned lists of its arrays as they are now.

    Example:
        see `wrap`.
    """

    def __init__(
        self, network: Any, gradients: Mapping[str, str], frozen: tuple[str, ...], ignored: tuple[str, ...]
    ) -> None:
        self.network = network
        self._settings = gradients, frozen, ignored
        found = Scan(gradients, frozen, ignored).look(network)
        problems = [
            f"{path} is {describe(array)} and has no gradient beside it ({_looked_for(path)})"
            for path, array in found.lonely.items()
        ]
        problems += found.problems
        problems += [f"{name!r} matches nothing" for name in found.unused()]
        if problems:
            fix = (
                ' Assign the gradient, or None, in `__init__`; or say its name, gradients={"W": "gW"}; or name what is not'
                " trained in `frozen`, and what forward() has kept in `ignored`."
                if found.lonely
                else ""
            )
            raise ValueError(f"wrap() does not know all arrays of this network.{fix}{listing(problems)}")
        self._sources = found.sources
        self._apart: list[NDArray[Any]] = []  # arrays that are known to share no memory
        self._described: dict[str, str] = {}  # each parameter's dtype and shape by path, which must stay
        self._described = {path: describe(array) for path, array, _ in self._entries()}
        if not self._described:
            raise ValueError(
                "wrap() found no parameters: no object has an array `x` beside `dx`, `d_x`, `grad_x` or `x_grad`, nor"
                " `parameters()` and `grads()`"
            )
        self._all()  # raises for arrays that overlap

    def named_parameters(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """The trained arrays themselves, with their dotted paths."""
        return ((path, array) for path, array, _ in self._trained())

    def parameters(self) -> list[NDArray[Any]]:
        """The trained arrays themselves, not copies, each once."""
        return [array for _, array, _ in self._trained()]

    def grads(self) -> list[NDArray[Any]]:
        """The gradients, aligned with `parameters()`: the network's own arrays; zeros where it has None."""
        return [_sum(path, array, grads) for path, array, grads in self._trained()]

    def zero_grad(self) -> None:
        """Reset all gradients to zeros, in place; those that are None stay so."""
        for source in self._now():
            if isinstance(source, Listed) and hasattr(source.owner, "zero_grad"):
                source.owner.zero_grad()
            elif isinstance(source, Listed):
                for grad in source.arrays()[1]:
                    grad.fill(0)
            elif source.gradient is not None:
                grad = source.gradient.get()
                if isinstance(grad, np.ndarray) and grad.flags.writeable:
                    grad.fill(0)
                elif grad is not None:
                    source.gradient.set(np.zeros(np.shape(grad), getattr(grad, "dtype", None)))

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Copies of all arrays, the frozen ones too, by their dotted paths."""
        return {path: np.array(array) for path, array, _ in self._all()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy arrays into those of the network, in place.

        Args:
            state_dict: what `state_dict()` gave, of this network or another one of the same paths, shapes and dtypes.

        Raises:
            ValueError: one error that lists all that is missing, unexpected, or of another shape or dtype; nothing has
                changed then.
        """
        mine = {path: array for path, array, _ in self._all()}
        problems = [f"missing: {path}" for path in mine if path not in state_dict]
        problems += [f"unexpected: {path}" for path in state_dict if path not in mine]
        values = {path: np.asarray(value) for path, value in state_dict.items() if path in mine}
        problems += [
            f"{path}: {describe(value)} was given for {describe(mine[path])}"
            for path, value in values.items()
            if describe(value) != describe(mine[path])
        ]
        problems += [f"{path}: the array is read-only" for path, array in mine.items() if not array.flags.writeable]
        if problems:
            raise ValueError(f"state_dict does not fit this network; nothing was loaded:{listing(problems)}")
        values = {path: np.array(value) for path, value in values.items()}  # they may be the very arrays, or views
        with interrupts.held:
            for path, value in values.items():
                np.copyto(mine[path], value)

    def __repr__(self) -> str:
        frozen = {s.path for s in self._sources if isinstance(s, Pair) and s.gradient is None}
        lines = [f"  {path}: {describe(array)}{', frozen' * (path in frozen)}\n" for path, array, _ in self._all()]
        return f"WrappedNetwork(\n{''.join(lines)})"

    # -- what there is now --------------------------------------------------------------------------------------------

    def _now(self) -> list[Pair | Listed]:
        """Where parameters are, after a look whether the network holds others than before."""
        found = Scan(*self._settings).look(self.network)
        before, now = _owners(self._sources), _owners(found.sources)
        problems = [f"{path} is new" for key, path in now.items() if key not in before]
        problems += [f"{path} has gone" for key, path in before.items() if key not in now]
        if problems:
            raise ValueError(
                "the network holds other parameters than at wrap(): wrap it again, and give the optimizer that, or name"
                f" what forward() has kept in `ignored`{listing(problems)}"
            )
        self._sources = found.sources  # with the containers and names that there are now
        return found.sources

    def _entries(self) -> Iterator[tuple[str, Any, Any]]:
        """Path, array and gradient of each place; the gradient is a frozen array's own path."""
        for source in self._sources:
            if isinstance(source, Listed):
                yield from source.named()
            else:
                yield source.path, source.place.get(), source.path if source.gradient is None else source.gradient.get()

    def _all(self) -> list[tuple[str, NDArray[Any], list[Any]]]:
        """Path, array and gradients of each array, once; a frozen one has no list of gradients."""
        self._now()
        found: dict[int, tuple[str, Any, list[Any]]] = {}
        problems = [
            f"{source.path}: the gradients beside it are {', '.join(map(repr, _keys(others)))}, and none is its own"
            for source in self._sources
            if isinstance(source, Pair) and source.gradient and (others := source.gradient.missing()) is not None
        ]
        for path, array, grad in self._entries():
            was = self._described.get(path, describe(array))
            if not is_floating(array) or describe(array) != was:
                problems.append(f"{path} was {was}, and is {describe(array)} now")
                continue
            grads = found.setdefault(id(array), (path, array, []))[2]
            if not any(grad is other for other in grads):
                grads.append(grad)
        arrays = list(found.values())
        if [id(array) for _, array, _ in arrays] != [id(array) for array in self._apart]:
            problems += self._overlaps(arrays)
        if problems:
            raise ValueError(f"the arrays of this network cannot be trained as they are:{listing(problems)}")
        self._apart = [array for _, array, _ in arrays]
        return arrays

    def _overlaps(self, arrays: list[tuple[str, NDArray[Any], list[Any]]]) -> list[str]:
        frozen = self._frozen()
        return [
            f"{other} shares memory with {path}, as another array: keep the same array in both, or freeze one"
            for i, (path, array, _) in enumerate(arrays)
            for other, second, _ in arrays[:i]
            if np.shares_memory(array, second) and not {path, other} & frozen
        ]

    def _frozen(self) -> set[str]:
        return {s.path for s in self._sources if isinstance(s, Pair) and s.gradient is None}

    def _trained(self) -> list[tuple[str, NDArray[Any], list[Any]]]:
        """The arrays that have gradients; one that is frozen in one place and trained in another is trained."""
        found = [(path, a, [g for g in grads if not isinstance(g, str)]) for path, a, grads in self._all()]
        found = [(path, array, grads) for path, array, grads in found if grads]
        fixed = [f"{path} is read-only" for path, array, _ in found if not array.flags.writeable]
        if fixed:
            raise ValueError(f"parameters are updated in place, so they must be writable arrays:{listing(fixed)}")
        return found


def _keys(container: Any) -> Iterable[Any]:
    return container if isinstance(container, dict) else range(len(container))


def _looked_for(path: str) -> str:
    name = path.rpartition(".")[2]
    return (
        "an item of a list: keep another list of gradients beside it"
        if name.isdigit()
        else f"d{name}, d_{name}, grad_{name} or {name}_grad"
    )


def _owners(sources: Iterable[Pair | Listed]) -> dict[Any, str]:
    """What holds parameters, by identity: an attribute of an object, or an object with its own lists."""
    keys = {}
    for source in sources:
        key = source.place.keys[:1] if isinstance(source, Pair) else ()
        keys[id(source.owner), key] = source.path
    return keys


def _sum(path: str, array: NDArray[Any], grads: list[Any]) -> NDArray[Any]:
    """The gradient of one array, which may be kept in several places."""
    given = [grad for grad in grads if grad is not None]
    for grad in given:
        if np.shape(grad) != array.shape:
            raise ValueError(
                f"{path} has shape {array.shape} and its gradient {np.shape(grad)}: they must be the same (a gradient of"
                " another shape may come from a sum over the wrong axis)"
            )
    if not given:
        return np.zeros_like(array)
    return np.asarray(given[0]) if len(given) == 1 else np.sum(given, axis=0)
