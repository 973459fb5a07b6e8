"""The contract of all optimizers, found by discovery: each way of running the same steps gives the same."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from training import everything, stream_state

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.optim.joint import JointOptimizer

STEPS = 50


def discovered() -> list[type[mt.Optimizer]]:
    """Every public optimizer that lives in `minitorch_jax.optim`."""
    for module in pkgutil.iter_modules(optim.__path__):
        importlib.import_module(f"{optim.__name__}.{module.name}")

    def below(cls: type) -> Iterator[type]:
        for inner in cls.__subclasses__():
            yield inner
            yield from below(inner)

    found = {cls for cls in below(mt.Optimizer) if cls.__module__.startswith("minitorch_jax.optim")}
    found -= {optim.LBFGS, JointOptimizer}  # no rules of one array: test_lbfgs.py, test_optax_adapter.py
    return [mt.Optimizer, *sorted((c for c in found if not c.__name__.startswith("_")), key=lambda c: c.__name__)]


def flags(cls: type) -> list[dict[str, bool]]:
    """Each boolean option of an optimizer turned from its default, one at a time."""
    options = inspect.signature(cls).parameters.values()
    return [{p.name: not p.default} for p in options if isinstance(p.default, bool)]


def settings_of(cls: type) -> list[dict[str, Any]]:
    """What each optimizer is tried with besides its defaults."""
    if cls is optim.SGD:
        return [
            {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
            {"momentum": 0.9, "maximize": True, "weight_decay": 0.01},
            {"momentum": 0.9, "dampening": 0.5, "skip_nonfinite": True},
        ]
    if cls is mt.Optimizer:
        return [{"skip_nonfinite": True, "lr": lambda t: 0.1 / (1.0 + jnp.float32(t))}]
    return [*flags(cls)]


def cases() -> Iterator[Any]:
    for cls in discovered():
        for settings in [{}, *settings_of(cls)]:
            label = ",".join(f"{k}={'schedule' if callable(v) else v}" for k, v in settings.items())
            quick = (cls, label) == (optim.SGD, "momentum=0.9,nesterov=True,weight_decay=0.01")
            marks = () if quick else pytest.mark.slow
            yield pytest.param(cls, settings, id=f"{cls.__name__}({label})", marks=marks)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class Layer(mt.Module):
    def __init__(self, seed: int, trainable: bool = True) -> None:
        self.weight = mt.Parameter(numbers(3, 3, seed=seed), trainable=trainable)
        self.bias = mt.Parameter(np.zeros(3, np.float32), trainable=trainable)

    def forward(self, x: Any) -> Any:
        return x @ self.weight + self.bias[None]


class Net(mt.Module):
    """Dropout, tied and frozen parameters, running statistics, and one parameter larger than the others."""

    def __init__(self, p: float = 0.3) -> None:
        self.encoder = Layer(0)
        self.decoder = self.encoder
        self.frozen = Layer(1, trainable=False)
        self.drop = nn.Dropout(p)
        self.large = mt.Parameter(numbers(3, 300, seed=2))
        self.shift = mt.Parameter(0.0)
        self.mean = mt.Buffer(np.zeros(3, np.float32))
        self.count = mt.Buffer(0)

    def forward(self, x: Any) -> Any:
        h = self.drop(jnp.tanh(self.encoder(x)))
        self.mean = 0.9 * self.mean + 0.1 * jax.lax.stop_gradient(h.mean(0))
        self.count = self.count + 1
        h = self.decoder(self.frozen(h)) + self.shift
        return (h @ self.large).mean(1)


class Matrices(Net):
    """The same, for a rule that takes nothing but matrices."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__(p)
        self.shift = mt.Parameter(0.0, trainable=False)
        self.encoder.bias = mt.Parameter(np.zeros(3, np.float32), trainable=False)


def loss_fn(net: Any, x: Any, y: Any) -> Any:
    return ((net(x) - y) ** 2).mean()


def train_step(opt: Any, x: Any, y: Any) -> Any:
    opt.zero_grad()
    loss = mt.backward(loss_fn, opt.modules[0], x, y)
    opt.step()
    return loss


def eager(opt: Any, xs: Any, ys: Any) -> Any:
    return opt, [train_step(opt, x, y) for x, y in zip(xs, ys, strict=True)]


def jitted(opt: Any, xs: Any, ys: Any) -> Any:
    compiled = mt.jit(train_step)
    losses = [compiled(opt, x, y) for x, y in zip(xs, ys, strict=True)]
    assert compiled.num_compiles == 1
    return opt, losses


def scanned(opt: Any, xs: Any, ys: Any) -> Any:
    return opt, mt.scan(lambda x, y: train_step(opt, x, y), xs, ys)


@functools.cache
def keys() -> Any:
    """Of the stream after `mt.seed(7)` and at each later draw: one more than there are steps."""
    following = jax.jit(lambda key: jax.random.split(key)[0])
    found = [jax.random.key(7)]
    for _ in range(STEPS):
        found.append(following(found[-1]))
    return jnp.stack(found)


def end_of_stream(steps: int) -> None:
    """Bring the stream to where explicit keys have been used up to."""
    mt.seed(7)
    for _ in range(steps):
        mt.next_key()


def with_key(opt: Any, key: Any, x: Any, y: Any) -> Any:
    with mt.rng(key):
        loss = train_step(opt, x, y)
    return opt, loss


def functional(opt: Any, xs: Any, ys: Any) -> Any:
    """The optimizer goes through plain `jax.jit` and comes back."""
    step, losses = jax.jit(with_key), []
    for key, x, y in zip(keys(), xs, ys, strict=False):
        opt, loss = step(opt, key, x, y)
        losses.append(loss)
    end_of_stream(len(xs) if opt.modules[0].drop.p else 0)
    return opt, losses


def carried(opt: Any, xs: Any, ys: Any) -> Any:
    """The optimizer is the carry of `lax.scan`."""
    opt, losses = jax.lax.scan(lambda opt, data: with_key(opt, *data), opt, (keys()[: len(xs)], xs, ys))
    end_of_stream(len(xs) if opt.modules[0].drop.p else 0)
    return opt, losses


SIDES: dict[str, Callable[..., Any]] = {
    "eager": eager,
    "jit": jitted,
    "scan": scanned,
    "functional": functional,
    "carry": carried,
}


def data() -> tuple[np.ndarray, np.ndarray]:
    return numbers(STEPS, 4, 3, seed=3), numbers(STEPS, 4, seed=4)


def run(side: str, cls: Any, settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """All there is after some steps: weights, buffers, state; losses, and the random stream.

    Random numbers take long to compile: with settings other than the defaults nothing is drawn.
    """
    mt.seed(7)
    net = Matrices() if cls is optim.Muon else Net(0.0 if settings else 0.3)
    opt, losses = SIDES[side](cls([net], **{"lr": 0.01, **settings}), *data())
    found = {**everything(opt.modules[0], opt), "stream": stream_state(), "losses": np.stack(losses)}
    assert opt.modules[0].encoder is opt.modules[0].decoder, "tied parameters have come apart"
    return {name: np.asarray(value) for name, value in found.items()}


def assert_sides_agree(cls: Any, settings: dict[str, Any], rtol: float = 1e-5) -> None:
    expected = run("eager", cls, settings)
    fresh = everything(Matrices() if cls is optim.Muon else Net())
    for name in ("0.frozen.weight", "0.frozen.bias"):
        assert_array_equal(expected[name], fresh[name])
    for name in ("0.encoder.weight", "0.large", *(() if cls is optim.Muon else ("0.shift",)), "0.mean"):
        assert not np.array_equal(expected[name], fresh[name]), name
    assert int(expected["0.count"]) == int(expected["1.num_steps"]) == STEPS
    assert np.isfinite(expected["losses"]).all()
    for side in list(SIDES)[1:]:
        got = run(side, cls, settings)
        assert list(got) == list(expected)
        for name, value in expected.items():
            if name.count(".") > 1 or name.startswith("0."):  # (hyperparameters are numbers)
                assert got[name].dtype == value.dtype, f"{side}: {name}"
            if value.dtype.kind == "U":
                assert got[name] == value
                continue
            scale = np.abs(value).max(initial=0.0) if value.dtype.kind == "f" else 0.0
            assert_allclose(got[name], value, rtol=rtol, atol=rtol * scale, err_msg=f"{side}: {name}")


@pytest.mark.parametrize(("cls", "settings"), list(cases()))
def test_every_side_gives_the_same(cls: Any, settings: dict[str, Any]) -> None:
    assert_sides_agree(cls, settings)


def test_discovery() -> None:
    found = discovered()
    assert {mt.Optimizer, optim.SGD} <= set(found)
    named = {value for value in vars(optim).values() if isinstance(value, type) and issubclass(value, mt.Optimizer)}
    assert named - {optim.LBFGS} <= set(found)
    assert {"nesterov": True} in flags(optim.SGD)
    assert len(list(cases())) >= 6


def test_a_rule_that_counts_wrongly_is_caught() -> None:
    """The comparison can fail: a rule with another result inside compiled code."""

    class Wrong(mt.Optimizer):
        @staticmethod
        def update(p: Any, g: Any, s: Any, h: Any) -> Any:
            return p - h.lr * g * next(factors), s

    factors = iter([1.0] * 4 + [1.001] * 100)
    with pytest.raises(AssertionError, match="jit: "):
        assert_sides_agree(Wrong, {"lr": 0.01})


def test_the_stream_of_each_side_is_the_eager_one() -> None:
    """Dropout drew once a step on each side, so that masks were the same ones."""
    mt.seed(7)
    start = stream_state()
    with_dropout = run("eager", mt.Optimizer, {})
    assert not np.array_equal(with_dropout["stream"], start)
    net = Net()
    masks = [np.asarray(net.drop(jnp.ones((4, 3)))) for _ in range(3)]
    assert all(np.any(mask == 0.0) for mask in masks)
    assert not np.array_equal(masks[0], masks[1])


def test_the_functional_form_leaves_the_original_alone() -> None:
    opt = optim.SGD([Net()], lr=0.01, momentum=0.9)
    before = everything(opt.modules[0], opt)
    functional(opt, *(part[:2] for part in data()))
    now = everything(opt.modules[0], opt)
    for name, value in before.items():
        assert_array_equal(now[name], value, err_msg=name)


SHORT = 10


def short(cls: Any, way: str, side: str = "eager", **settings: Any) -> dict[str, Any]:
    """All there is after a few steps of a network without dropout, in groups, packed, or in bfloat16."""
    net = Matrices() if cls is optim.Muon else Net(0.0)
    if way == "bfloat16":
        net.astype(jnp.bfloat16)
        settings["master_weights"] = True
    opt = cls([{"modules": [net], "lr": 0.01}] if way == "groups" else [net], **{"lr": 0.01, **settings})
    if way == "packed":
        mt.pack(net)
    xs, ys = (part[:SHORT].astype(jnp.bfloat16 if way == "bfloat16" else jnp.float32) for part in data())
    opt, _ = SIDES[side](opt, xs, ys)
    found = everything(opt.modules[0], opt)
    return {name: value for name, value in found.items() if name.startswith("0.") or name.count(".") > 1}


def assert_close(mine: dict[str, Any], theirs: dict[str, Any], rtol: float) -> None:
    assert list(mine) == list(theirs)
    for name, value in theirs.items():
        value = np.asarray(value).astype(np.float64)
        scale = np.abs(value).max(initial=0.0)
        assert_allclose(np.asarray(mine[name]).astype(np.float64), value, rtol=rtol, atol=rtol * scale, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("cls", discovered(), ids=lambda cls: cls.__name__)
def test_groups_and_packing_change_nothing(cls: Any) -> None:
    expected = short(cls, "plain")
    for way in ("groups", "packed"):
        for side in ("eager", "jit"):
            assert_close(short(cls, way, side), expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cls", discovered(), ids=lambda cls: cls.__name__)
def test_master_weights_are_the_same_on_every_side(cls: Any) -> None:
    expected = short(cls, "bfloat16")
    assert expected["1.0.large.master_weight"].dtype == np.float32
    for side in ("jit", "scan"):
        assert_close(short(cls, "bfloat16", side), expected, 2e-2)  # XLA keeps more bits between fused operations
