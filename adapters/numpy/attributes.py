"""`wrap`: networks of any classes that keep `W`, `b` and `dW`, `db`, as one object that our optimizers train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitorch_jax.optim.numpy_modules import is_zero, overlapping, same_memory
from minitorch_jax.runtime import interrupts

from .objects import describe, held_by, is_floating, listing
from .pairs import Listed, Pair, Scan, gradient_names, patterns


def wrap(
    network: Any,
    *,
    gradients: Mapping[str, str] | None = None,
    frozen: str | Iterable[str] = (),
    ignored: str | Iterable[str] = (),
) -> WrappedNetwork:
    """Wrap a NumPy network of any classes, so that the optimizers of this library train it in place.

    A parameter is a floating array `x` kept beside its gradient. Both may be attributes, `x` beside `dx`, `d_x`, `grad_x`
    or `x_grad`; items of a dict with such names; or items of two lists or dicts, `params` beside `grads`. A gradient is an
    array, or None for zeros. `wrap` searches all objects, lists, tuples, deques and dicts that the network holds, to any
    depth. For an object with `parameters()` and `grads()`, it uses these methods.

    Arrays and gradients are looked up by name at each step. So `backward` may assign `self.dW = ...` or add to it, and may
    replace an array by one of the same shape and dtype. An array in two places is one parameter. Its gradient is the sum
    of the gradients beside it, without those in objects that forward() makes at each call.

    Wrap a network before its first `forward`: an input that it keeps as `x` beside `dx` looks like a parameter.

    Args:
        network: an object, or a list, tuple or dict of objects.
        gradients: the names of gradients that have other names: `{"W": "gW"}`, or by path, `{"0.W": "gW"}`.
        frozen: the dotted paths of arrays that are not trained, but are part of `state_dict()`. `*` matches anything, as in
            `"*.running_mean"`. An attribute may be None until forward() makes it.
        ignored: the dotted paths of arrays that are neither, such as cached inputs.

    Returns:
        An object for an optimizer's list `modules`, and for `mt.save` and `mt.load`.

    Raises:
        ValueError: if an array has no gradient, or anything else is unclear: one error lists all of it. Also if there are no
            parameters, if they are copies, or if a name in `gradients` or `frozen` matches nothing.

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
    """The result of `wrap`. Its `parameters()` and `grads()` are aligned lists of the network's current arrays.

    Example:
        see `wrap`.
    """

    def __init__(
        self, network: Any, gradients: Mapping[str, str], frozen: tuple[str, ...], ignored: tuple[str, ...]
    ) -> None:
        self.network = network
        self._settings = gradients, frozen, ignored
        found = Scan(gradients, frozen, ignored).look(network)
        entries = [entry for source in found.sources for entry in source.named()]
        known = {id(array) for _, array, _ in entries}
        lonely = [
            f"{path} is {describe(array)} and has no gradient beside it ({_looked_for(path)})"
            for path, array in found.lonely.items()
            if id(array) not in known
        ]
        problems = [*lonely, *found.problems, *(f"{name!r} matches nothing" for name in found.unused())]
        if problems:
            fix = (
                ' Assign the gradient, or None, in `__init__`; or pass its name, gradients={"W": "gW"}; or name arrays that'
                " are not trained in `frozen`, and arrays that forward() keeps in `ignored`."
                if lonely
                else ""
            )
            raise ValueError(f"wrap() does not know all arrays of this network.{fix}{listing(problems)}")
        self._sources = found.sources
        self._apart: list[NDArray[Any]] = []  # arrays that are known to share no memory
        # the dtype and shape of each parameter, by path; they must not change
        self._described = {path: describe(array) for path, array, _ in entries if array is not None}
        if not self._described:
            raise ValueError(
                "wrap() found no parameters: no object has an array `x` beside `dx`, `d_x`, `grad_x` or `x_grad`, nor"
                " `parameters()` and `grads()`"
            )
        twice = zip(self._all(), self._all(), strict=True)  # raises for arrays that overlap
        lost = [path for (path, one, _), (_, other, _) in twice if one.size and not same_memory(one, other)]
        if lost:
            raise ValueError(
                "parameters() returns copies, so an update would have no effect: let it return the arrays themselves, or"
                f" views of them{listing(lost)}"
            )

    def named_parameters(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """The trained arrays themselves, with their dotted paths."""
        return ((path, array) for path, array, _ in self._trained())

    def parameters(self) -> list[NDArray[Any]]:
        """The trained arrays themselves, not copies. Each occurs once."""
        return [array for _, array, _ in self._trained()]

    def grads(self) -> list[NDArray[Any]]:
        """The gradients, aligned with `parameters()`: the network's own arrays, or zeros for None."""
        return [_sum(path, array, grads) for path, array, grads in self._trained()]

    def zero_grad(self) -> None:
        """Reset all gradients to zeros, in place. None stays None.

        Raises:
            ValueError: if an object has no `zero_grad()`, and its `grads()` returns new arrays at each call.
        """
        for source in self._now():
            if isinstance(source, Listed) and hasattr(source.owner, "zero_grad"):
                source.owner.zero_grad()
            elif isinstance(source, Listed):
                for grad, again in zip(source.arrays()[1], source.arrays()[1], strict=True):
                    if is_zero(grad):
                        continue
                    if not (isinstance(grad, np.ndarray) and same_memory(grad, again)):
                        raise ValueError(
                            f"{source.path or type(source.owner).__name__}: grads() returns new arrays at each call, which"
                            " cannot be reset in place: write a zero_grad() for the object"
                        )
                    grad.fill(0)
            elif source.gradient is not None:
                grad = source.gradient.get()
                if isinstance(grad, np.ndarray) and grad.flags.writeable:
                    grad.fill(0)
                elif grad is not None:
                    zeros = 0 if np.isscalar(grad) else np.zeros(np.shape(grad), getattr(grad, "dtype", None))
                    source.gradient.set(zeros)

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Copies of all arrays by their dotted paths, existing frozen ones included."""
        return {path: np.array(array) for path, array, _ in self._all()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy arrays into those of the network, in place.

        Args:
            state_dict: a result of `state_dict()`, of this network or of one with the same paths, shapes and dtypes.

        Raises:
            ValueError: if entries are missing, unexpected, or have another shape or dtype. One error lists all of them, and
                nothing has changed.
        """
        late = {s.path: s.place for s in self._now() if isinstance(s, Pair) and self._is_late(s)}
        mine = {path: array for path, array, _ in self._all() if path not in late}
        problems = [f"missing: {path}" for path in mine if path not in state_dict]
        problems += [f"unexpected: {path}" for path in state_dict if path not in mine and path not in late]
        values = {path: np.asarray(value) for path, value in state_dict.items() if path in mine}
        problems += [
            f"{path}: got {describe(value)} for {describe(mine[path])}"
            for path, value in values.items()
            if describe(value) != describe(mine[path])
        ]
        problems += [f"{path}: the array is read-only" for path, array in mine.items() if not array.flags.writeable]
        if problems:
            raise ValueError(f"state_dict does not fit this network; nothing was loaded:{listing(problems)}")
        values = {path: np.array(value) for path, value in values.items()}  # they may be views of the network's
        made = {path: np.array(state_dict[path]) if path in state_dict else None for path in late}
        with interrupts.deferred:
            for path, value in values.items():
                np.copyto(mine[path], value)
            for path, place in late.items():
                place.set(made[path])

    def __repr__(self) -> str:
        arrays = self._all()
        frozen = self._frozen()
        lines = [f"  {path}: {describe(array)}{', frozen' * (path in frozen)}\n" for path, array, _ in arrays]
        return f"WrappedNetwork(\n{''.join(lines)})"

    # -- the current arrays -------------------------------------------------------------------------------------------

    def _now(self) -> list[Pair | Listed]:
        """The current sources of parameters. Raises if the network holds other parameters than before."""
        found = Scan(*self._settings).look(self.network).sources
        before, now = ({_key(source): source.path for source in sources} for sources in (self._sources, found))
        new = [source for source in found if _key(source) not in before and not source.frozen]
        again = self._again(new)
        problems = [f"{source.path} is new" for source in new if id(source) not in again]
        gone = [source for source in self._sources if _key(source) not in now and not self._is_late(source)]
        problems += [f"{path} has gone" for path in dict.fromkeys(before[_key(source)] for source in gone)]
        if problems:
            raise ValueError(
                "the network holds other parameters than at wrap(): wrap it again and pass the result to the optimizer, or"
                f" name arrays that forward() keeps in `ignored`{listing(problems)}"
            )
        # the same sources, with their current containers and names
        self._sources = [source for source in found if id(source) not in again]
        return self._sources

    def _is_late(self, source: Pair | Listed) -> bool:
        """True if a frozen source had no array yet at `wrap()`."""
        return source.frozen and source.path not in self._described

    def _again(self, new: list[Pair | Listed]) -> set[int]:
        """The new sources inside an object that has the same arrays, such as cells that it makes at each forward.

        Their gradients do not count, since the object's own gradients include them.
        """
        wanted = {id(source): {id(array) for _, array, _ in source.named()} for source in new}
        inside: dict[int, set[int]] = {}  # by array: everything inside the objects that have the array
        for source in self._sources if new else ():
            if ids := {id(array) for _, array, _ in source.named()} & set().union(*wanted.values()):
                held = held_by(source.owner)
                for each in ids:
                    inside.setdefault(each, set()).update(held)
        return {id(s) for s in new if all(id(s.owner) in inside.get(each, ()) for each in wanted[id(s)])}

    def _all(self) -> list[tuple[str, NDArray[Any], list[Any]]]:
        """The path, array and gradients of each array, once. The gradient of a frozen array is its path."""
        self._now()
        found: dict[int, tuple[str, Any, list[tuple[Pair | Listed, Any]]]] = {}
        problems = [
            f"{source.path} has no gradient: the gradients beside it are {', '.join(map(repr, _keys(others)))}"
            for source in self._sources
            if isinstance(source, Pair) and source.gradient and (others := source.gradient.missing()) is not None
        ]
        for source, (path, array, grad) in [(owner, entry) for owner in self._sources for entry in owner.named()]:
            if array is None and self._is_late(source):
                continue
            was, now = self._described.get(path, describe(array)), describe(array)
            if was != now:
                problems.append(f"{path} was {was}, and is {now} now")
            elif not is_floating(array):
                problems.append(f"{path} is {now}: parameters() must return a list of floating NumPy arrays")
            else:
                grads = found.setdefault(id(array), (path, array, []))[2]
                if not any(grad is other for _, other in grads):
                    grads.append((source, grad))
        for _, _, grads in found.values():
            problems += _counted_twice(grads)
        arrays = [(path, array, [grad for _, grad in grads]) for path, array, grads in found.values()]
        if [id(array) for _, array, _ in arrays] != [id(array) for array in self._apart]:
            problems += self._overlaps(arrays)
        if problems:
            raise ValueError(f"the arrays of this network cannot be trained as they are:{listing(problems)}")
        self._apart = [array for _, array, _ in arrays]
        return arrays

    def _overlaps(self, arrays: list[tuple[str, NDArray[Any], list[Any]]]) -> list[str]:
        frozen = self._frozen()
        return [
            f"{arrays[i][0]} shares memory with {arrays[j][0]}, but is another array: use one array in both, or freeze one"
            for i, j in overlapping([array for _, array, _ in arrays])
            if not {arrays[i][0], arrays[j][0]} & frozen
        ]

    def _frozen(self) -> set[str]:
        return {source.path for source in self._sources if source.frozen}

    def _trained(self) -> list[tuple[str, NDArray[Any], list[Any]]]:
        """The arrays with gradients. An array that is frozen in one place and trained in another is trained."""
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
    if name.isdigit():
        return "an item of a list: keep another list of gradients beside it"
    return f"none of {', '.join(gradient_names(name))}"


def _key(source: Pair | Listed) -> Any:
    """The identity of a source: an attribute of an object, or an object with its own lists."""
    return id(source.owner), source.place.keys[:1] if isinstance(source, Pair) else ()


def _counted_twice(grads: list[tuple[Pair | Listed, Any]]) -> list[str]:
    """Problems with the gradients of one array: a collection has one, and another place in its owner has one too."""
    given = [source for source, grad in grads if not is_zero(grad) and not source.frozen]
    return [
        f"{whole.path} and {part.path}, in the same object, are one array with two gradients, which would be added: name"
        " one of the two in `ignored`"
        for whole, part in permutations(given, 2)
        if whole.collects and id(part.owner) in held_by(whole.owner)
        if not (part.collects and part.owner is whole.owner)
    ]


def _sum(path: str, array: NDArray[Any], grads: list[Any]) -> NDArray[Any]:
    """The gradient of one array: the sum of those that are kept in several places."""
    given = [grad for grad in grads if not is_zero(grad)]
    for grad in given:
        if np.shape(grad) != array.shape:
            raise ValueError(
                f"{path} has shape {array.shape} and its gradient has {np.shape(grad)}: they must be the same. Another shape"
                " may come from a sum over the wrong axis."
            )
    if not given:
        return np.zeros_like(array)
    return np.asarray(given[0]) if len(given) == 1 else np.sum(given, axis=0)
