"""Runs of a whole network, which record the arguments of each layer and the incoming gradient of its backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .dispatch import unwrapped
from .imitation import traced_world
from .objects import attribute, is_floating, is_object, walk
from .reference import constant, exactly
from .report import kind_of
from .subject import Settings, backward_args, call
from .traced import Traced
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


class Chain:
    """A list of layers as one network. It runs them one after another, and their backward in reverse order."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers, self.methods = layers, [method_of(layer) for layer in layers]

    def forward(self, x: Any) -> Any:
        for layer, method in zip(self.layers, self.methods, strict=True):
            x = call(layer, method, (x,), {})
        return x

    def backward(self, dout: Any) -> Any:
        """The gradient by the input. None if any layer returns none."""
        for layer in reversed(self.layers):
            if dout is not None:
                given = list(dout) if isinstance(dout, tuple | list) else [dout]
                dout = layer.backward(*backward_args(layer, given))
        return dout


def method_of(layer: Any) -> str:
    """The method that calls a layer: `forward`, or a `__call__` that runs it and may keep what backward needs."""
    code = getattr(type(layer).__call__, "__code__", None)
    runs_forward = code is not None and "forward" in code.co_names
    return "forward" if callable(attribute(layer, "forward")) and not runs_forward else "__call__"


def layers_of(network: Any) -> dict[str, Any]:
    """The objects with a backward and a forward, by path."""
    found: dict[str, Any] = {}

    def enter(path: str, value: Any) -> bool:
        runs = is_object(value) and (callable(value) or callable(attribute(value, "forward")))
        if runs and callable(attribute(value, "backward")):
            found[path] = value
        return True

    walk(network, enter)
    return found


def hook(world: World, layers: dict[str, Any], around: Callable[..., Any]) -> None:
    """Route calls of the layers' copies through `around(path, method, call, args, kwargs)`."""
    paths: dict[int, str] = {}
    active: set[int] = set()
    for path, layer in layers.items():
        copied = world.of(layer)
        if copied is layer:
            raise TypeError(
                f"{path or 'the network'}: a {type(layer).__name__} cannot be copied, since its class has the metaclass"
                f" {type(type(layer)).__name__} or derives from a library's class; the check runs on copies only"
            )
        paths[id(copied)] = path
        for name in ("forward", "__call__"):
            if hasattr(type(copied), name) and not hasattr(vars(type(copied)).get(name), "hooked"):
                method = _hooked(getattr(type(copied), name), name, paths, active, around)
                type.__setattr__(type(copied), name, method)
        own = getattr(copied, "__dict__", {}).get("forward")
        if callable(own):  # an attribute of the object, not of its class
            method = _hooked(lambda self, *args, own=own, **kw: own(*args, **kw), "forward", paths, active, around)
            vars(copied)["forward"] = MethodType(method, copied)


def _hooked(original: Any, name: str, paths: dict[int, str], active: set[int], around: Callable[..., Any]) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self) not in paths or id(self) in active:
            return original(self, *args, **kwargs)
        active.add(id(self))
        try:
            return around(paths[id(self)], name, lambda: original(self, *args, **kwargs), args, kwargs)
        finally:
            active.discard(id(self))

    method.hooked = True  # type: ignore[attr-defined]
    return method


def record(
    network: Any, layers: dict[str, Any], inputs: Sequence[Any], settings: Settings
) -> tuple[list[Call], list[Any]]:
    """Run a copy of the network in float64. Returns the calls of its layers, inner ones first, and its outputs."""
    settings.draws.reset()
    world = wide_world()
    calls: list[Call] = []
    stack: list[str] = []

    def around(path: str, method: str, run: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        given, named = tuple([_copied(arg) for arg in args]), {name: _copied(value) for name, value in kwargs.items()}
        stack.append(path)
        output = run()
        stack.pop()
        calls.append(Call(path, method, given, named, _numbers(path, layers[path], output), tuple(stack)))
        return output

    hook(world, layers, around)
    args = [_copied(each) for each in inputs]
    output = call(world.of(network), method_of(network), args, {})
    return calls, _numbers("", network, output)


def _numbers(path: str, layer: Any, output: Any) -> list[Any]:
    """Copies of the arrays of an output."""
    found = list(output) if isinstance(output, tuple | list) else [output]
    if any(each is None or isinstance(each, tuple | dict) for each in found):
        raise TypeError(
            f"{path or kind_of(layer)}: forward() must return an array, or a tuple of arrays; got"
            f" {', '.join(map(kind_of, found))}. Keep what backward() needs in attributes."
        )
    return [np.array(each) for each in found]


def _copied(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return World(Copies()).of(value)  # the value may change after the call
    return np.array(value, np.float64) if is_floating(value) else np.array(value)


def incoming(
    network: Any,
    layers: dict[str, Any],
    inputs: Sequence[Any],
    calls: Sequence[Call],
    dout: Sequence[Any],
    settings: Settings,
) -> list[list[Any]] | None:
    """The gradient by the outputs of each call; None if JAX cannot trace the network.

    Zeros are added to the outputs of each call. The gradient by these zeros is the incoming gradient of its backward.
    """
    settings.draws.reset()

    def f(zeros: Any) -> list[Any]:
        world = traced_world(constant)
        count = iter(range(len(calls)))

        def around(path: str, method: str, run: Callable[[], Any], args: Any, kwargs: Any) -> Any:
            output = run()
            mine = zeros[next(count)]
            found = list(output) if type(output) in (list, tuple) else [output]
            added = [Traced(jnp.asarray(unwrapped(each)) + zero) for each, zero in zip(found, mine, strict=True)]
            return type(output)(added) if type(output) in (list, tuple) else added[0]

        hook(world, layers, around)
        args = [constant(each) if isinstance(each, np.ndarray) else world.of(each) for each in inputs]
        output = call(world.of(network), method_of(network), args, {})
        found = output if type(output) in (list, tuple) else [output]
        return [jnp.asarray(unwrapped(each), jnp.float64) for each in found]

    try:
        with exactly():
            zeros = [[jnp.zeros(each.shape) for each in made.outputs] for made in calls]
            found = jax.vjp(f, zeros)[1]([jnp.asarray(each, jnp.float64) for each in dout])[0]
            return [[np.asarray(each) for each in mine] for mine in found]
    except Exception:  # the user's code may raise anything for values that are not NumPy arrays
        return None
