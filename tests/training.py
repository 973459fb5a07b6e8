"""What tests of training share: small models, losses, one step of training, and comparisons."""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.module import random

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
Y = np.linspace(1, 0, 4, dtype=np.float32)


class Line(mt.Module):
    """A linear model, with what BatchNorm has: a running mean, and a count that is an integer."""

    def __init__(self, value: float = 1.0) -> None:
        self.weight = mt.Parameter(jnp.full((3,), value))
        self.bias = mt.Parameter(0.0)
        self.mean = mt.Buffer(0.0)
        self.count = mt.Buffer(0)

    def forward(self, x: Any) -> Any:
        y = x @ self.weight + self.bias
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * jax.lax.stop_gradient(y.mean())
            self.count = self.count + 1
        return y

    @mt.jit
    def train_step(self, opt: Any, x: Any, y: Any) -> Any:
        return step(self, opt, x, y)


class Scale(mt.Module):
    """One number, so that results can be worked out by hand."""

    def __init__(self, value: float = 2.0) -> None:
        self.weight = mt.Parameter(value)

    def forward(self, x: Any) -> Any:
        return self.weight * x


class Arrays(mt.Module):
    """Some arrays as parameters: p0, p1, ..."""

    def __init__(self, arrays: list[np.ndarray]) -> None:
        for i, array in enumerate(arrays):
            setattr(self, f"p{i}", mt.Parameter(array))


def small_net(seed: int = 0) -> nn.Sequential:
    first, second = jax.random.split(jax.random.key(seed))
    return nn.Sequential(nn.Linear(3, 4, key=first), nn.Tanh(), nn.Linear(4, 2, key=second))


def line(value: float = 0.0) -> nn.Linear:
    """A layer from 3 numbers to 2, with a bias of `value`."""
    layer = nn.Linear(3, 2, key=jax.random.key(0))
    layer.bias = jnp.full(2, value)
    return layer


class Batch(NamedTuple):
    """A model among data, as an argument."""

    model: Any
    x: Any
    y: Any


class Boom(Exception):
    """What tests raise, so that no other exception passes for it."""


class Counting:
    """A function, and how often it was called: inside `jax.jit`, how often it was traced."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.function(*args)


def squared(model: Any, x: Any, y: Any) -> Any:
    return ((model(x) - y) ** 2).mean()


def mean_square(model: Any, x: Any) -> Any:
    return (model(x) ** 2).mean()


def mean_error(model: Any, x: Any, y: Any) -> Any:
    return nn.functional.mse_loss(model(x), y)


def decaying(step: Any) -> Any:
    """A learning rate of the step's number."""
    return 0.2 / (1 + jnp.asarray(step, jnp.float32))


def step(model: Any, opt: Any, x: Any, y: Any) -> Any:
    opt.zero_grad()
    loss = mt.backward(squared, model, x, y)
    opt.step()
    return loss


def pair(value: float = 1.0, **settings: Any) -> tuple[Line, optim.SGD]:
    model = Line(value)
    return model, optim.SGD([model], **{"lr": 0.1, "momentum": 0.9, **settings})


def everything(*objects: Any) -> dict[str, Any]:
    """All values of some modules and optimizers, by name (gradients apart)."""
    found: dict[str, Any] = {}
    for i, obj in enumerate(objects):
        if isinstance(obj, mt.Optimizer):
            state = obj.state_dict()
            for path, fields in state.pop("state").items():
                found.update({f"{i}.{path}.{field}": np.array(value) for field, value in fields.items()})
            hyper = state.pop("hyperparameters")
            del state["fingerprints"]  # of the parameters, whose values are compared themselves
            found.update({f"{i}.{name}": value for name, value in {**state, **hyper}.items() if not callable(value)})
        else:
            found.update({f"{i}.{name}": np.array(value) for name, value in obj.state_dict().items()})
    return found


def assert_same(mine: dict[str, Any], theirs: dict[str, Any], rtol: float = 1e-5) -> None:
    assert list(mine) == list(theirs)
    for name, value in theirs.items():
        assert_allclose(mine[name], value, rtol=rtol, atol=1e-7, err_msg=name)


def assert_unchanged(before: dict[str, Any], *objects: Any) -> None:
    now = everything(*objects)
    assert list(now) == list(before)
    for name, value in before.items():
        assert_array_equal(now[name], value, err_msg=name)


def assert_alive(*objects: Any) -> None:
    for leaf in jax.tree.leaves(objects):
        assert not isinstance(leaf, jax.core.Tracer)
        assert not leaf.is_deleted()


def stream_state() -> np.ndarray:
    """Where the random stream stands."""
    return np.array(random.current().cell.value)


@functools.cache
def eagerly(steps: int) -> tuple[list[float], dict[str, Any]]:
    """Losses, and everything of model and optimizer, after some steps of the eager loop."""
    model, opt = pair()
    losses = [float(step(model, opt, X, Y)) for _ in range(steps)]
    return losses, everything(model, opt)


@contextmanager
def as_jax_comes() -> Iterator[None]:
    """JAX as a user has it, for other libraries, which mix dtypes and ranks: tests have it strict."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if the block takes longer."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"it took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    # again and again, since Python swallows what is raised in callbacks of its garbage collector
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Collect a description of each compilation by XLA."""
    found: list[str] = []

    def note(name: str, _: float, **about: Any) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            found.append(str(about))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
