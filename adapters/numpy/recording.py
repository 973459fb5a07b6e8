"""Runs of a whole network, which record the arguments of each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import numpy as np

from .calling import (
    FORWARD,
    argument_names,
    call,
    extra_arguments,
    input_gradient,
    is_layer,
    method_of,
    output_of,
    returns_cache,
    run_backward,
    ways,
)
from .objects import is_floating, is_object, walk
from .report import kind_of
from .subject import Settings, outputs_of
from .world import Copies, World, wide_world


@dataclass
class Call:
    """A call of a layer: its arguments, its outputs, and the layers whose calls it is inside of."""

    path: str
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Any]
    inside: tuple[str, ...]
    cached: bool = False  # forward also returned a cache for backward

    @property
    def is_scalar(self) -> bool:
        return len(self.outputs) == 1 and self.outputs[0].size == 1


class Chain:
    """A list of layers as one network. It runs them one after another, and their backward in reverse order."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers, self.methods = layers, [method_of(layer) for layer in layers]
        self.extras = [extra_arguments(*each) for each in zip(layers, self.methods, strict=True)]
        self.calls: list[Any] = []

    def forward(self, x: Any) -> Any:
        self.calls = []
        for layer, method, extra in zip(self.layers, self.methods, self.extras, strict=True):
            args = (x, *extra)
            returned = call(layer, method, args, {})
            self.calls.append((layer, method, args, returned))
            x = output_of(layer, returned)
        return x

    def backward(self, dout: Any) -> Any:
        """The gradient by the input. None if any layer returns none."""
        for layer, method, args, returned in reversed(self.calls):
            if dout is not None:
                given = list(dout) if isinstance(dout, tuple | list) else [dout]
                output, cached = output_of(layer, returned), returns_cache(layer, returned)
                count = len(output) if isinstance(output, tuple | list) else 1
                calling = ways(layer, method, args, count, np.size(output) == 1, cached=cached)[0]
                names = argument_names(layer, method)
                dout = input_gradient(run_backward(layer, calling, args, returned, given), names)
        return dout


def layers_of(network: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The objects with a backward and a forward, by path; and those of them that count as a library's."""
    found: dict[str, Any] = {}
    closed: dict[str, Any] = {}

    def enter(path: str, value: Any) -> bool:
        if not isinstance(value, type | np.ndarray) and is_layer(value):
            (found if is_object(value) else closed)[path] = value
        return True

    walk(network, enter)
    return found, closed


def hook(world: World, layers: dict[str, Any], around: Callable[..., Any]) -> list[str]:
    """Route calls of the layers' copies through `around(path, method, call, args, kwargs)`.

    Returns the paths of the layers whose classes cannot be copied, so that their calls are not seen.
    """
    paths: dict[int, str] = {}
    active: set[int] = set()
    closed = []
    for path, layer in layers.items():
        copied = world.of(layer)
        cls = type(copied)
        if cls is type(layer):
            closed.append(path)
            continue
        paths[id(copied)] = path
        for name in FORWARD:
            if any(name in vars(base) for base in cls.__mro__) and not hasattr(vars(cls).get(name), "hooked"):
                type.__setattr__(cls, name, _hooked(getattr(cls, name), name, paths, active, around))
            own = getattr(copied, "__dict__", {}).get(name)
            if callable(own):  # an attribute of the object, not of its class
                method = _hooked(lambda self, *args, own=own, **kw: own(*args, **kw), name, paths, active, around)
                vars(copied)[name] = MethodType(method, copied)
    return closed


def _hooked(original: Any, name: str, paths: dict[int, str], active: set[int], around: Callable[..., Any]) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self) not in paths or id(self) in active:
            return original(self, *args, **kwargs)
        active.add(id(self))
        try:
            return around(paths[id(self)], name, lambda: original(self, *args, **kwargs), self, args, kwargs)
        finally:
            active.discard(id(self))

    method.hooked = True  # type: ignore[attr-defined]
    method.__wrapped__ = original  # type: ignore[attr-defined]  # for the names of its arguments
    return method


def record(
    network: Any, layers: dict[str, Any], inputs: Sequence[Any], settings: Settings
) -> tuple[list[Call], list[Any], list[str]]:
    """Run a copy of the network in float64.

    Returns the calls of its layers, inner ones first, its outputs, and the layers that cannot be copied.
    """
    settings.draws.reset()
    world = wide_world()
    calls: list[Call] = []
    stack: list[str] = []

    def around(path: str, method: str, run: Callable[[], Any], layer: Any, args: Any, kwargs: Any) -> Any:
        given, named = tuple([_copied(arg) for arg in args]), {name: _copied(value) for name, value in kwargs.items()}
        stack.append(path)
        output = run()
        stack.pop()
        found = arrays_of(path, layers[path], output_of(layer, output))
        calls.append(Call(path, method, given, named, found, tuple(stack), returns_cache(layer, output)))
        return output

    closed = hook(world, layers, around)
    args = [_copied(each) for each in inputs]
    method = method_of(network)
    output = call(world.of(network), method, [*args, *extra_arguments(network, method)[len(args) - 1 :]], {})
    return calls, arrays_of("", network, output_of(world.of(network), output)), closed


def arrays_of(path: str, layer: Any, output: Any) -> list[Any]:
    """Copies of the arrays of an output."""
    found = list(output) if isinstance(output, tuple | list) else [output]
    odd = [kind_of(each) for each in found if not _is_array(each)]
    if odd:
        own = "an object of its own class, " * (len(found) == 1 and is_object(found[0]))
        raise TypeError(
            f"{path or kind_of(layer)}: forward() must return an array, or a tuple of arrays; got"
            f" {own}{', '.join(map(kind_of, found))}. Keep what backward() needs in attributes."
        )
    return [np.array(each) for each in outputs_of(output)]


def _is_array(value: Any) -> bool:
    return value is not None and not isinstance(value, tuple | dict) and np.asarray(value).dtype.kind in "fiubc"


def _copied(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return World(Copies()).of(value)  # the value may change after the call
    return np.array(value, np.float64) if is_floating(value) else np.array(value)
