"""A user's own NumPy network for `compare_numpy.py --network FILE:FUNCTION`: trained by its own loop, and through `wrap`."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from comparison import CLASSES, Side
from numpy.typing import NDArray

import minitorch_jax as mt
from minitorch_jax.adapters import numpy as mini

FEATURES = 64  # of an image


class Runner:
    """Runs forward and backward of a network, which is an object or a list of layers.

    A layer may return its output, or keep it as `output`; return its input's gradient, or keep it as `dinputs`; and take the
    input again, `backward(input, grad)`.
    """

    def __init__(self, network: Any) -> None:
        self.layers = network if isinstance(network, list | tuple) else [network]
        self.takes_input = [_required(layer.backward) == 2 for layer in self.layers]
        self.inputs: list[Any] = []

    def forward(self, x: Any) -> Any:
        self.inputs = []
        for layer in self.layers:
            self.inputs.append(x)
            found = layer.forward(x) if hasattr(layer, "forward") else layer(x)
            x = layer.output if found is None else found
        return x

    def backward(self, grad: Any) -> None:
        for layer, x, takes_input in zip(self.layers[::-1], self.inputs[::-1], self.takes_input[::-1], strict=True):
            found = layer.backward(x, grad) if takes_input else layer.backward(grad)
            grad = getattr(layer, "dinputs", None) if found is None else found


class OwnSide(Side):
    """The network with the loop that it has: its `update(lr)`, else the specification's loop over what `wrap` finds."""

    name = "NumPy"

    def __init__(self, wrapped: mini.WrappedNetwork, lr: float) -> None:
        self.wrapped, self.runner, self.loss_fn = wrapped, Runner(wrapped.network), mini.SoftmaxCrossEntropy()
        self.zero_grad, self.update = self.loop(lr)

    def loop(self, lr: float) -> tuple[Callable[[], None], Callable[[], None]]:
        """What comes before forward, and after backward."""
        network, loop = self.wrapped.network, mini.Optimizer([self.wrapped], lr)
        return loop.zero_grad, (lambda: network.update(lr)) if has_update(network) else loop.step

    def step(self, x: NDArray[np.float32], y: NDArray[np.int32]) -> float:
        self.zero_grad()
        loss = self.loss_fn(self.runner.forward(x), y)
        self.runner.backward(self.loss_fn.backward())
        self.update()
        return loss

    def weights(self) -> list[NDArray[Any]]:
        return [array.copy() for array in self.wrapped.parameters()]

    def scores(self, x: NDArray[np.float32]) -> NDArray[Any]:
        return np.asarray(self.runner.forward(x))


class WrapSide(OwnSide):
    """The same network, which `mt.Optimizer` trains in place."""

    name = "wrap"

    def loop(self, lr: float) -> tuple[Callable[[], None], Callable[[], None]]:
        opt = mt.Optimizer([self.wrapped], lr)
        return opt.zero_grad, opt.step


@dataclass
class OwnNetwork:
    """A network that works on digits."""

    name: str
    wrapped: mini.WrappedNetwork
    caption = (
        "Both sides run the network's own forward and backward. Only the update differs: by the rounding of its multiply and"
        " subtract, if at all."
    )

    def sides(self, lr: float) -> list[Side]:
        """Both sides. They begin from copies of one network, since a function may make another one at each call."""
        return [OwnSide(copy.deepcopy(self.wrapped), lr), WrapSide(copy.deepcopy(self.wrapped), lr)]

    @property
    def notes(self) -> Sequence[str]:
        loop = (
            "calls the network's own update(lr)"
            if has_update(self.wrapped.network)
            else "runs params[i] -= lr * grads[i] over the arrays that wrap finds at each step: the network has no update(lr)"
        )
        return (f"NumPy {loop}; wrap is mt.Optimizer([wrap(network)], lr).",)


def load_network(text: str) -> OwnNetwork:
    """Parse `FILE:FUNCTION`, call the function, and try what it returns on two images."""
    file, _, name = text.rpartition(":")
    if not (file and name):
        raise argparse.ArgumentTypeError(f"must be a file and a function in it, as in my_net.py:make_net; got {text!r}")
    found = _run(f"{name}()", _function(Path(file), name))
    network = found.network if isinstance(found, mini.WrappedNetwork) else found
    layers = network if isinstance(network, list | tuple) else [network]
    if not layers or not all(_is_layer(each) for each in layers):
        raise argparse.ArgumentTypeError(
            f"{name}() must return an object with forward and backward, or a list of such layers; it returned"
            f" {_described(network)}"
        )
    try:
        wrapped = found if found is not network else mini.wrap(network)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"wrap refuses what {name}() returned (if it needs options, return wrap(network, ...) instead): {error}"
        ) from None
    _try_out(_run(f"copying what {name}() returned", copy.deepcopy, wrapped))
    return OwnNetwork(name, wrapped)


def _try_out(wrapped: mini.WrappedNetwork) -> None:
    """Run a copy of the network on two images. Raises if it cannot be trained."""
    network = wrapped.network
    runner, loss_fn = Runner(network), mini.SoftmaxCrossEntropy()
    images = np.random.default_rng(0).random((2, FEATURES), np.float32)
    scores = _run(f"forward of images of shape {images.shape}", runner.forward, images)
    if np.shape(scores) != (2, CLASSES):
        raise argparse.ArgumentTypeError(
            f"forward must return scores of shape (N, {CLASSES}) for images of shape (N, {FEATURES}); for N = 2 it returned"
            f" {_described(scores)}"
        )
    _run("the loss of the scores", loss_fn, scores, np.zeros(2, np.int32))
    _run("backward", runner.backward, loss_fn.backward())
    if not any(np.any(grad) for grad in _run("the search for gradients", wrapped.grads)):
        raise argparse.ArgumentTypeError("backward must set the gradients of the parameters; after it, all are zero")
    if has_update(network):
        _run("update(lr)", network.update, 0.0)


def has_update(network: Any) -> bool:
    """True if a network has a method `update(lr)`."""
    return _required(getattr(network, "update", None)) == 1


def _function(path: Path, name: str) -> Callable[[], Any]:
    """A function of a Python file. The file may import others in its folder."""
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {str(path)!r}")
    spec = importlib.util.spec_from_file_location(f"network_of_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise argparse.ArgumentTypeError(f"{str(path)!r} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses and copies look there for the module of a class
    sys.path.insert(0, str(path.resolve().parent))
    _run(str(path), spec.loader.exec_module, module)
    found = getattr(module, name, None)
    if not callable(found):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        there = f"it has {', '.join(own)}" if own else "it defines nothing"
        raise argparse.ArgumentTypeError(f"{str(path)!r} has no function {name!r}; {there}")
    return found


def _run(what: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call the user's code. An error says what was run, and the line that raised."""
    try:
        return function(*args)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise argparse.ArgumentTypeError(
            f"{what} raised {type(error).__name__}: {error} (line {last.lineno} of {last.filename})"
        ) from error


def _is_layer(value: Any) -> bool:
    runs = callable(value) or hasattr(value, "forward")
    return runs and hasattr(value, "backward") and not isinstance(value, type)


def _required(method: Any) -> int:
    """The number of arguments that a method must get; -1 if there is none."""
    if not callable(method):
        return -1
    return sum(
        each.default is each.empty and each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
        for each in inspect.signature(method).parameters.values()
    )


def _described(value: Any) -> str:
    """`float32[3, 4]` for an array, otherwise the type."""
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {', '.join(map(_described, value)) or 'nothing'}"
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
