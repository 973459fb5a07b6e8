"""One layer that is checked, and runs of its code on copies."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .objects import is_floating
from .pairs import Scan
from .world import Copies, World, wide_world

Key = int | str  # the key of a gradient: the index of an argument, or the name of a parameter


class Draws:
    """The states of Python's and NumPy's global random streams. Each run starts from them."""

    def __init__(self) -> None:
        self._states = np.random.get_state(), random.getstate()

    def reset(self) -> None:
        np.random.set_state(self._states[0])
        random.setstate(self._states[1])

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restore the streams after the block."""
        try:
            yield
        finally:
            self.reset()


@dataclass
class Settings:
    """The caller's settings for parameters, and the required accuracy of backward."""

    gradients: Mapping[str, str] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    rtol: float | None = None
    accumulates: bool = True
    seed: int = 0
    draws: Draws = field(default_factory=Draws)


@dataclass
class Subject:
    """A layer, and the call that checks it. `args` are its positional arguments, with floating arrays as float64."""

    path: str
    layer: Any
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    settings: Settings
    names: list[str] = field(default_factory=list)  # the names of its parameters
    constants: list[str] = field(default_factory=list)  # arrays without a gradient that are not caches

    def __post_init__(self) -> None:
        """Find the parameters: arrays with a gradient that `forward` does not replace. It replaces caches at each call."""
        run = self.run()
        before = {name: param for name, param, _ in run.entries()}
        run.forward()
        first = {name: param for name, param, _ in run.entries()}
        lonely = self.scan().look(run.layer).lonely
        run.forward()
        second = {name: param for name, param, _ in run.entries()}
        self.names = [name for name, param in second.items() if name in first and _same_place(param, first[name])]
        again = self.scan().look(run.layer).lonely
        params = {id(param) for param in second.values()}
        self.constants = [path for path, a in again.items() if lonely.get(path) is a and id(a) not in params]
        if any(name not in before for name in self.names):  # the first call makes them
            primed = self.run()
            primed.forward()
            self.layer = primed.layer

    def after(self, args: Sequence[Any], dout: Sequence[Any] | None = None) -> Subject:
        """The layer after a forward with these arguments, and a backward if `dout` is not None. Its call is the same."""
        run = self.run()
        run.forward(args)
        if dout is not None:
            run.backward(dout)
        later = object.__new__(Subject)
        vars(later).update(vars(self), layer=run.layer, settings=replace(self.settings, draws=Draws()))
        return later

    def on(self, args: tuple[Any, ...]) -> Subject:
        """The same layer with other arguments."""
        other = object.__new__(Subject)
        vars(other).update(vars(self), args=args)
        return other

    def scan(self) -> Scan:
        return Scan(self.settings.gradients, self.settings.frozen, self.settings.ignored)

    @property
    def floating(self) -> list[int]:
        """The indices of the arguments that have a gradient."""
        return [i for i, arg in enumerate(self.args) if is_floating(arg)]

    def other_args(self) -> tuple[Any, ...]:
        """Another batch of the same shapes and the same range of values: this batch, mixed with itself in reverse order."""
        return tuple([_another(arg) if isinstance(arg, np.ndarray) and arg.ndim else arg for arg in self.args])

    def run(self, dtype: Any = np.float64) -> Run:
        """A new copy of the layer. Its floating arrays have the dtype `dtype`; None keeps their dtypes."""
        self.settings.draws.reset()
        return Run(self, dtype)

    def entries(self, layer: Any) -> list[tuple[str, Any, Any]]:
        """The name, array and gradient of each parameter of a copy."""
        found: list[tuple[str, Any, Any]] = []
        for source in self.scan().look(layer).sources:
            if not source.frozen:
                found += source.named()
        once = {id(array): (name, array, grad) for name, array, grad in reversed(found) if is_floating(array)}
        return list(reversed(once.values()))

    def call(self, world: World, layer: Any, args: Sequence[Any]) -> Any:
        """Call a copy of the layer in `world`, and return its output."""
        return call(layer, self.method, args, {name: world.of(value) for name, value in self.kwargs.items()})


def call(layer: Any, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return layer(*args, **kwargs) if method == "__call__" else getattr(layer, method)(*args, **kwargs)


class Run:
    """A copy of a layer, in its own world."""

    def __init__(self, subject: Subject, dtype: Any) -> None:
        self.subject, self.dtype = subject, dtype
        self.world = wide_world() if dtype is np.float64 else World(Copies(dtype))
        self.layer = self.world.of(subject.layer)

    def entries(self) -> list[tuple[str, Any, Any]]:
        return self.subject.entries(self.layer)

    def params(self) -> dict[str, Any]:
        return {name: param for name, param, _ in self.entries() if name in self.subject.names}

    def grads(self) -> dict[Key, Any]:
        """Copies of the gradients, by the names of their parameters."""
        found = {name: grad for name, _, grad in self.entries() if name in self.subject.names}
        return {name: None if grad is None else np.array(grad) for name, grad in found.items()}

    def clear(self) -> None:
        """Fill the gradients with zeros."""
        for _, _, grad in self.entries():
            if isinstance(grad, np.ndarray) and grad.flags.writeable:
                grad.fill(0)

    def forward(self, args: Sequence[Any] | None = None) -> Any:
        """Run forward on copies of the arguments, and return its output."""
        return self.subject.call(self.world, self.layer, self.prepared(self.subject.args if args is None else args))

    def prepared(self, args: Sequence[Any]) -> list[Any]:
        """Copies of arguments. Floating arrays get the dtype of this run."""
        return [_as(arg, self.dtype) if isinstance(arg, np.ndarray) else self.world.of(arg) for arg in args]

    def backward(self, dout: Sequence[Any]) -> dict[Key, Any]:
        """Run backward, and return the gradients by the floating arguments, by their indices."""
        given = self.layer.backward(*backward_args(self.layer, [_as(each, self.dtype) for each in dout]))
        found = () if given is None else tuple(given) if isinstance(given, tuple | list) else (given,)
        places = self.subject.floating
        if len(found) == len(self.subject.args):
            return {i: each for i, each in enumerate(found) if each is not None and i in places}
        if any(isinstance(arg, list | tuple | dict) for arg in self.subject.args):
            return {}  # they may be gradients by arrays inside an argument, which are not checked
        if len(found) > len(places):
            raise ValueError(
                f"backward() returned {len(found)} gradients for {len(places)} floating arguments of forward()"
            )
        return {i: each for i, each in zip(places, found, strict=False) if each is not None}


def backward_args(layer: Any, dout: list[Any]) -> list[Any]:
    """The arguments of `backward`: none for a loss, otherwise one for each output, or one tuple of all."""
    try:
        taken = inspect.signature(layer.backward).parameters.values()
    except (TypeError, ValueError):
        return dout
    positional = [p for p in taken if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p.name for p in positional if p.default is p.empty]
    required += [p.name for p in taken if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if not required and len(dout) == 1 and np.ndim(dout[0]) == 0:
        return []
    if len(required) > max(len(dout), 1):
        raise TypeError(
            f"backward() takes {', '.join(required)}, and the check passes only the gradient of the output: write it as"
            " backward(dout). Let forward() keep everything else that it needs, and leave updates to an optimizer"
        )
    if len(dout) > 1 and len(positional) == 1:
        return [tuple(dout)]
    return dout


def outputs_of(output: Any) -> list[Any]:
    """The arrays of an output, which is an array, or a tuple or list of arrays."""
    found = list(output) if isinstance(output, tuple | list) else [output]
    return [each if isinstance(each, np.ndarray) else np.asarray(each) for each in found]


def _same_place(one: Any, other: Any) -> bool:
    """True if two arrays are views of the same elements."""
    return bool(one.shape == other.shape and one.__array_interface__["data"] == other.__array_interface__["data"])


def _as(array: Any, dtype: Any) -> Any:
    new = np.array(array)
    return new.astype(dtype) if dtype is not None and is_floating(new) else new


def _another(array: Any) -> Any:
    turned = np.flip(array, 0)
    return 0.9 * (0.7 * turned + 0.3 * array) if is_floating(array) else turned.copy()
