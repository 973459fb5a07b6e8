"""`wrap`: networks of any classes that keep `W`, `b` and `dW`, `db`, as one object that our optimizers train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitorch_jax.optim.numpy_modules import is_zero, same_memory
from minitorch_jax.runtime import interrupts

from .current import Current
from .objects import describe, listing
from .pairs import patterns
from .places import Listed


def wrap(
    network: Any,
    *,
    gradients: Mapping[str, str] | None = None,
    frozen: str | Iterable[str] = (),
    ignored: str | Iterable[str] = (),
) -> WrappedNetwork:
    """Wrap a NumPy network of any classes, so that the optimizers of this library train it in place.

    A parameter is a floating array kept beside its gradient, to any depth in objects, lists, tuples, deques and dicts:

    - attributes, or items of a dict: `W` beside `dW`, `gradW`, `W_grad`, `dL_dW`, `gW`, `weights_gradient` and their kind;
      `weight` also beside `dw`;
    - two lists or dicts: `params` beside `grads`, `weights` beside `dweights`, with the same keys, or `W1` and `dW1`;
    - an object that holds one parameter: `data`, `value` or `w` beside `grad` or `g`;
    - methods: `parameters()` and `grads()`, `params()` and `gradients()`, or one that returns pairs, `params_and_grads()`.

    A gradient is an array, or None for zeros. If the first backward makes it, it is found at the first step. `repr` shows
    which gradient belongs to which parameter. What forward() assigns anew at each call is no parameter, nor is what an
    optimizer keeps (`vW`, `dW_prev`). If nobody can know, there is an error with names to choose from.

    `backward` may assign `self.dW = ...` or add to it, and an array may be replaced by one of the same shape and dtype. An
    array in two places is one parameter. Its gradient is the sum of the gradients beside it, without those in objects that
    forward() makes at each call.

    Args:
        network: an object, or a list, tuple or dict of objects.
        gradients: the names of gradients that have other names: `{"W": "gW"}`, or by path, `{"0.W": "gW"}`.
        frozen: the dotted paths of arrays that are not trained, but are part of `state_dict()`. `*` matches anything, as in
            `"*.running_mean"`. An attribute may be None until forward() makes it.
        ignored: the dotted paths of arrays that are neither, such as cached inputs.

    Returns:
        An object for an optimizer's list `modules`, and for `mt.save` and `mt.load`.

    Raises:
        ValueError: if anything is unclear, such as two possible gradients, a gradient of another shape, a running mean, or a
            `backward` that updates parameters: one error lists all of it. Also if there are no parameters, if they are
            copies, or if a name in `gradients` or `frozen` matches nothing. A step raises it if a parameter has no gradient
            while others have one.

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
          0.w: float64[2] <- dw
          1.w: float64[2] <- dw
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
        self._current = Current(network, gradients, frozen, ignored)

    def __reduce__(self) -> Any:
        """A copy finds its own arrays."""
        return WrappedNetwork, (self.network, *self._settings)

    def named_parameters(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """The trained arrays themselves, with their dotted paths."""
        return ((each.path, each.array) for each in self._current.trained())

    def parameters(self) -> list[NDArray[Any]]:
        """The trained arrays themselves, not copies. Each occurs once."""
        return [each.array for each in self._current.trained()]

    def grads(self) -> list[NDArray[Any]]:
        """The gradients, aligned with `parameters()`: the network's own arrays, or zeros for None.

        Raises:
            ValueError: if a parameter has no gradient while others have one, or while another array seems to be it; if a
                gradient has another shape than its parameter.
        """
        return self._current.gradients()

    def zero_grad(self) -> None:
        """Reset all gradients to zeros, in place. None stays None.

        Raises:
            ValueError: if an object has no `zero_grad()`, and its `grads()` returns new arrays at each call.
        """
        for grad, pair in self._current.all_gradients():
            if isinstance(grad, np.ndarray) and grad.flags.writeable:
                grad.fill(0)
            elif grad is not None and pair.gradient is not None:
                pair.gradient.set(0 if np.isscalar(grad) else np.zeros(np.shape(grad), getattr(grad, "dtype", None)))
        for source in self._current.listed:
            if hasattr(source.owner, "zero_grad"):
                source.owner.zero_grad()
            else:
                _reset(source)

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Copies of all arrays by their dotted paths, existing frozen ones included."""
        return {each.path: np.array(each.array) for each in self._current.entries()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy arrays into those of the network, in place.

        Args:
            state_dict: a result of `state_dict()`, of this network or of one with the same paths, shapes and dtypes.

        Raises:
            ValueError: if entries are missing, unexpected, or have another shape or dtype. One error lists all of them, and
                nothing has changed.
        """
        late = self._current.late()
        mine = {each.path: each.array for each in self._current.entries() if each.path not in late}
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
        lines = [f"  {each.path}: {describe(each.array)}{each.shown}\n" for each in self._current.entries()]
        return f"WrappedNetwork(\n{''.join(lines)})"


def _reset(source: Listed) -> None:
    """Reset the gradients of an object without a `zero_grad()`."""
    for grad, again in zip(source.so_far()[1], source.so_far()[1], strict=True):
        if is_zero(grad):
            continue
        if not (isinstance(grad, np.ndarray) and same_memory(grad, again)):
            raise ValueError(
                f"{source.path or type(source.owner).__name__}: {source.grads or source.params}() returns new arrays at each"
                " call, which cannot be reset in place: write a zero_grad() for the object"
            )
        grad.fill(0)
