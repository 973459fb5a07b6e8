"""The Optimizer facade: `modules` and `lr`, `step()` and `zero_grad()`, over our modules and NumPy ones."""

from __future__ import annotations

import copy
import gc
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from training import small_net, squared

import minitorch_jax as mt
from minitorch_jax import nn, optim

# ---------------------------------------------------------------------------------------------------------------------
# What the tests are made of


class Point(mt.Module):
    """One parameter. Its gradient is what the loss multiplies it with, so that a step can be worked out by hand."""

    def __init__(self, *value: float, dtype: Any = jnp.float32) -> None:
        self.weight = mt.Parameter(jnp.asarray(value, dtype))

    def forward(self, x: Any) -> Any:
        return (self.weight * x).sum()


class Pair(mt.Module):
    """Two points; only the first is read."""

    def __init__(self) -> None:
        self.read = Point(1.0)
        self.unread = Point(1.0)

    def forward(self, x: Any) -> Any:
        return self.read(x)


class NumpyLayer:
    """A layer of a NumPy mini-torch: lists made afresh at each call, of arrays that stay the same objects."""

    def __init__(self, *values: Any, dtype: Any = np.float64) -> None:
        self.arrays = [np.array(value, dtype) for value in values]
        self.gradients: list[Any] = [np.ones_like(array) for array in self.arrays]

    def parameters(self) -> list[Any]:
        return list(self.arrays)

    def grads(self) -> list[Any]:
        return list(self.gradients)

    def zero_grad(self) -> None:
        for gradient in self.gradients:
            gradient[...] = 0


class Persistent:
    """An object that gives its own list each time."""

    def __init__(self, arrays: list[Any], gradients: list[Any]) -> None:
        self.arrays, self.gradients = arrays, gradients

    def parameters(self) -> list[Any]:
        return self.arrays

    def grads(self) -> list[Any]:
        return self.gradients


class Fresh(Persistent):
    """The same, with a new list each time."""

    def parameters(self) -> list[Any]:
        return list(self.arrays)


class Wrapper:
    """A user's object around one of our modules, whose live lists it passes on."""

    def __init__(self, inner: mt.Module) -> None:
        self.inner = inner

    def parameters(self) -> list[Any]:
        return self.inner.parameters()

    def grads(self) -> list[Any]:
        return self.inner.grads()


class Decayed(NamedTuple):
    """The state of `RMSProp` below."""

    mean_square: jax.Array


class RMSProp(mt.Optimizer):
    """A user's own optimizer: two functions of one array and its hyperparameters, nothing else."""

    def __init__(self, modules: Any, lr: Any = 0.01, *, decay: float = 0.9, eps: float = 1e-8, **more: Any) -> None:
        super().__init__(modules, lr, decay=decay, eps=eps, **more)

    @staticmethod
    def init_state(p: Any, h: Any) -> Any:
        return Decayed(jnp.zeros_like(p))

    @staticmethod
    def update(p: Any, g: Any, s: Any, h: Any) -> Any:
        v = h.decay * s.mean_square + (1 - h.decay) * g**2
        return p - h.lr * g / (jnp.sqrt(v / (1 - h.decay**h.t)) + h.eps), Decayed(v)


def give(module: mt.Module, *gradients: Any) -> None:
    """Make these the gradients of a module's parameters."""
    module.zero_grad()
    module.accumulate([jnp.full_like(p, g) for p, g in zip(module.parameters(), gradients, strict=True)])


def as_numpy(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict as it may come back from a file."""
    return {**state, "state": jax.tree.map(np.asarray, state["state"])}


def buffer_of(opt: mt.Optimizer, path: str) -> np.ndarray:
    return np.asarray(opt.state_dict()["state"][path]["momentum_buffer"])


X = np.linspace(-1, 1, 15, dtype=np.float32).reshape(5, 3)
Y = np.linspace(1, 0, 10, dtype=np.float32).reshape(5, 2)

compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *args, **kwargs: compiled.append(event) if "backend_compile" in event else None
)


@pytest.fixture
def compilations() -> Iterator[Callable[[], int]]:
    """How many programs XLA has compiled since the last time that this was asked."""
    seen = len(compiled)
    jax.jit(lambda x: x + 1)(1.0)
    assert len(compiled) == seen + 1, "JAX does not report its compilations under this name any more"
    seen = len(compiled)

    def since() -> int:
        nonlocal seen
        before, seen = seen, len(compiled)
        return seen - before

    yield since


# ---------------------------------------------------------------------------------------------------------------------
# The constructor, modules and lr


def test_it_stores_the_callers_own_list_and_lr() -> None:
    modules = [Point(1.0), Point(2.0)]
    opt = mt.Optimizer(modules, lr=0.1)
    assert opt.modules is modules
    assert opt.lr == 0.1
    assert mt.Optimizer(modules).lr == 0.01
    assert optim.SGD(modules).lr == 0.01
    assert mt.Optimizer(modules, 0.3).lr == 0.3
    give(modules[0], 1.0), give(modules[1], 1.0)
    opt.step()
    assert opt.modules is modules
    assert opt.lr == 0.1


def test_any_iterable_of_modules_will_do() -> None:
    a, b = Point(1.0), Point(2.0)
    for modules in ((a, b), iter([a, b]), (module for module in (a, b))):
        opt = mt.Optimizer(modules)
        assert isinstance(opt.modules, list)
        assert opt.modules[0] is a and opt.modules[1] is b and len(opt.modules) == 2


def test_plain_sgd_by_hand() -> None:
    point = Point(1.0, -2.0)
    opt = mt.Optimizer([point], lr=0.5)
    assert mt.backward(point, jnp.array([3.0, 4.0])) == 1.0 * 3.0 + -2.0 * 4.0
    assert opt.step() is None
    assert_array_equal(point.weight, [1.0 - 0.5 * 3.0, -2.0 - 0.5 * 4.0])


def test_every_module_of_the_list_is_updated() -> None:
    points = [Point(float(i)) for i in range(4)]
    opt = mt.Optimizer(points, lr=1.0)
    for i, point in enumerate(points):
        give(point, 10.0 * i)
    opt.step()
    assert [float(point.weight[0]) for point in points] == [0.0, -9.0, -18.0, -27.0]


NUMBERS = [
    0.25,
    1,
    np.float32(0.25),
    np.float64(0.25),
    np.float16(0.25),
    np.int64(2),
    np.array(0.25),
    jnp.float32(0.25),
    jnp.asarray(0.25, jnp.bfloat16),
    jnp.asarray(3),
]


@pytest.mark.parametrize("lr", NUMBERS, ids=lambda lr: f"{type(lr).__name__}-{getattr(lr, 'dtype', '')}")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["f32", "bf16", "f16"])
def test_a_new_lr_counts_at_the_next_step_and_never_compiles(lr: Any, dtype: Any, compilations: Any) -> None:
    point = Point(8.0, dtype=dtype)
    opt = mt.Optimizer([point], lr=0.5)
    give(point, 1.0)
    opt.step()
    assert float(point.weight[0]) == 7.5
    gradient = point.grads()[0]
    compilations()
    opt.lr = lr
    opt.step()
    assert compilations() == 0
    assert opt.lr == lr
    assert point.weight.dtype == dtype and point.weight.shape == (1,)
    assert float(point.weight[0]) == 7.5 - float(lr)
    assert point.grads()[0].dtype == gradient.dtype == dtype


def test_the_type_of_lr_makes_no_other_program(compilations: Any) -> None:
    def steps(lr: Any) -> float:
        point = Point(8.0)
        opt = optim.SGD([point], lr=lr, momentum=0.5)
        give(point, 1.0)
        opt.step()
        opt.step()
        return float(point.weight[0])

    assert steps(0.5) == 8 - 0.5 - 0.75
    compilations()
    for lr in NUMBERS:
        assert steps(lr) == 8 - 2.5 * float(lr)
    assert compilations() == 0


def test_lr_can_be_changed_in_place() -> None:
    point = Point(0.0)
    opt = mt.Optimizer([point], lr=0.5)
    give(point, -1.0)
    opt.lr *= 0.5
    assert opt.lr == 0.25
    opt.step()
    assert float(point.weight[0]) == 0.25
    opt.lr = 0
    opt.step()
    assert float(point.weight[0]) == 0.25


def test_every_number_is_dynamic(compilations: Any) -> None:
    point = Point(1.0)
    opt = optim.SGD([point], lr=0.5, momentum=0.5)
    give(point, 1.0)
    opt.step()  # p = 0.5, b = 1
    compilations()
    opt.momentum, opt.dampening, opt.weight_decay = 0.25, 0.5, 2.0
    assert (opt.momentum, opt.dampening, opt.weight_decay) == (0.25, 0.5, 2.0)
    opt.step()  # g = 1 + 2 * 0.5 = 2, b = 0.25 + 0.5 * 2 = 1.25
    assert compilations() == 0
    assert float(point.weight[0]) == 0.5 - 0.5 * 1.25


# -- the list ---------------------------------------------------------------------------------------------------------


def trained_pair() -> tuple[Point, Point, optim.SGD]:
    """Two points, after one step with gradients 1 and 2."""
    a, b = Point(0.0), Point(0.0)
    opt = optim.SGD([a, b], lr=1.0, momentum=0.5)
    give(a, 1.0), give(b, 2.0)
    opt.step()
    assert (buffer_of(opt, "0.weight"), buffer_of(opt, "1.weight")) == (1.0, 2.0)
    return a, b, opt


def test_append_keeps_momentum_and_gives_new_state() -> None:
    a, b, opt = trained_pair()
    c = Point(0.0)
    opt.modules.append(c)
    for point in (a, b, c):
        give(point, 4.0)
    opt.step()
    assert buffer_of(opt, "0.weight") == 0.5 * 1 + 4
    assert buffer_of(opt, "1.weight") == 0.5 * 2 + 4
    assert buffer_of(opt, "2.weight") == 4
    assert [float(p.weight[0]) for p in (a, b, c)] == [-1 - 4.5, -2 - 5.0, -4.0]
    assert [s["step"] for s in opt.state_dict()["state"].values()] == [2, 2, 1]


def test_a_new_parameters_first_step_is_its_own() -> None:
    """Dampening does not count at the first step of a parameter, however old the optimizer is."""
    a, c = Point(0.0), Point(0.0)
    opt = optim.SGD([a], lr=1.0, momentum=0.5, dampening=0.5)
    give(a, 1.0)
    opt.step()
    opt.modules.append(c)
    give(a, 1.0), give(c, 1.0)
    opt.step()
    assert float(c.weight[0]) == -1.0
    assert buffer_of(opt, "0.weight") == 0.5 * 1 + 0.5 * 1


def test_remove_keeps_the_momentum_of_what_stays() -> None:
    a, b, opt = trained_pair()
    opt.modules.remove(a)
    give(a, 4.0), give(b, 4.0)
    opt.step()
    assert float(a.weight[0]) == -1.0
    assert float(b.weight[0]) == -2 - (0.5 * 2 + 4)
    assert list(opt.state_dict()["state"]) == ["0.weight"]


def test_del_and_reverse_and_slices_are_noticed() -> None:
    a, b, opt = trained_pair()
    opt.modules.reverse()
    assert buffer_of(opt, "0.weight") == 2.0
    opt.modules[:] = [a]
    assert buffer_of(opt, "0.weight") == 1.0
    opt.modules[0] = c = Point(3.0)
    give(a, 4.0), give(c, 1.0)
    opt.step()
    assert float(a.weight[0]) == -1.0
    assert float(c.weight[0]) == 2.0


def test_a_new_list_keeps_the_momentum_of_what_stays() -> None:
    a, b, opt = trained_pair()
    c = Point(0.0)
    modules = [c, b]
    opt.modules = modules
    assert opt.modules is modules
    for point in (a, b, c):
        give(point, 4.0)
    opt.step()
    assert float(a.weight[0]) == -1.0
    assert float(b.weight[0]) == -2 - (0.5 * 2 + 4)
    assert float(c.weight[0]) == -4.0
    opt.modules = (a,)
    assert opt.modules == [a]
    assert buffer_of(opt, "0.weight") == 0.0  # it had gone, and came back as new


def test_a_new_layer_inside_a_listed_module_is_noticed() -> None:
    net = nn.Sequential(nn.Linear(1, 1, bias=False, key=jax.random.key(0)))
    opt = optim.SGD([net], lr=1.0, momentum=0.5)
    give(net, 1.0)
    opt.step()
    net.append(nn.Linear(1, 1, bias=False, key=jax.random.key(1)))
    before = np.asarray(net[1].weight)
    give(net, 1.0, 2.0)
    opt.step()
    assert_array_equal(net[1].weight, before - 2.0)
    assert buffer_of(opt, "0.0.weight") == 1.5
    assert buffer_of(opt, "0.1.weight") == 2.0


def test_a_replaced_item_is_noticed_though_it_compares_equal() -> None:
    class Equal(NumpyLayer):
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Equal)

    old, new = Equal([1.0]), Equal([1.0])
    opt = mt.Optimizer([old], lr=0.5)
    opt.step()
    opt.modules[0] = new
    opt.step()
    assert (old.arrays[0][0], new.arrays[0][0]) == (0.5, 0.5)


def test_a_refused_list_changes_nothing() -> None:
    a, b, opt = trained_pair()
    modules = opt.modules
    for bad in (a, [], [a, 3], [a, a], None):
        with pytest.raises((TypeError, ValueError)):
            opt.modules = bad
        assert opt.modules is modules
    assert buffer_of(opt, "1.weight") == 2.0
    opt.modules.append(3)
    with pytest.raises(TypeError, match=r"modules\[2\] is 3"):
        opt.step()
    assert float(a.weight[0]) == -1.0
    opt.modules.pop()
    opt.step()
    assert float(a.weight[0]) == -1 - 1.5
    opt.modules.clear()
    with pytest.raises(ValueError, match="modules is empty"):
        opt.step()


# ---------------------------------------------------------------------------------------------------------------------
# The specification's own loop


def specification_loop(modules: list[Any], lr: Any) -> None:
    for module in modules:
        params, grads = module.parameters(), module.grads()
        for i in range(len(params)):
            params[i] -= lr * grads[i]


class Tied(mt.Module):
    """An autoencoder whose two layers share one weight, with a submodule held in two places."""

    def __init__(self) -> None:
        keys = jax.random.split(jax.random.key(3), 3)
        self.encoder = nn.Linear(3, 3, key=keys[0])
        self.decoder = nn.Linear(3, 3, key=keys[1])
        self.decoder.tie("weight", self.encoder, "weight")
        self.middle = nn.Linear(3, 3, key=keys[2])
        self.again = self.middle
        self.out = nn.Linear(3, 2, key=keys[0])

    def forward(self, x: Any) -> Any:
        return self.out(self.again(self.decoder(jnp.tanh(self.middle(self.encoder(x))))))


def half_frozen() -> nn.Sequential:
    net = small_net(5)
    net[0].freeze()
    return net


class Chain:
    """A loss of several modules in a row."""

    def __call__(self, modules: list[Any], x: Any, y: Any) -> Any:
        for module in modules:
            x = module(x)
        return ((x - y) ** 2).mean()


NETWORKS: dict[str, Callable[[], list[Any]]] = {
    "one linear": lambda: [nn.Linear(3, 2, key=jax.random.key(1))],
    "mlp": lambda: [small_net()],
    "three modules": lambda: [
        nn.Linear(3, 4, key=jax.random.key(1)),
        nn.GELU(),
        nn.Linear(4, 2, key=jax.random.key(2)),
    ],
    "tied": lambda: [Tied()],
    "half frozen": lambda: [half_frozen()],
    "scalars and wrapper": lambda: [nn.Linear(3, 2, bias=False, key=jax.random.key(1)), Scale()],
}


class Scale(mt.Module):
    def __init__(self) -> None:
        self.scale = mt.Parameter(jnp.asarray(1.5))

    def forward(self, x: Any) -> Any:
        return self.scale * x


def arrays_of(modules: list[Any]) -> list[np.ndarray]:
    return [np.asarray(array) for module in modules for array in module.state_dict().values()]


@pytest.mark.one_in(8)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_is_the_specifications_loop_to_one_rounding(name: str) -> None:
    """100 steps, each from the same parameters and gradients on both sides."""
    ours, theirs, chain = NETWORKS[name](), NETWORKS[name](), Chain()
    opt = mt.Optimizer(ours)
    start = arrays_of(ours)
    for step in range(100):
        opt.lr = lr = 0.2 / (1 + 0.1 * step)
        x = np.roll(X, step, axis=0) * (1 + 0.01 * step)
        for module, copied in zip(ours, theirs, strict=True):
            copied.load_state_dict(module.state_dict())
        for modules in (ours, theirs):
            for module in modules:
                module.zero_grad()
            mt.backward(chain, modules, x, Y)
        gradients = [np.asarray(g) for module in ours for g in module.grads()]
        largest = max(float(np.abs(lr * g).max()) for g in gradients)
        opt.step()
        specification_loop(theirs, lr)
        for mine, his in zip(arrays_of(ours), arrays_of(theirs), strict=True):
            assert_allclose(mine, his, rtol=1.2e-7, atol=1.2e-7 * largest)
    moved = [not np.array_equal(a, b) for a, b in zip(start, arrays_of(ours), strict=True)]
    frozen = 2 if name == "half frozen" else 0
    assert moved == [False] * frozen + [True] * (len(moved) - frozen)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_hundred_steps_end_where_the_specifications_loop_ends(name: str) -> None:
    ours, theirs, chain = NETWORKS[name](), NETWORKS[name](), Chain()
    opt = mt.Optimizer(ours, lr=0.1)
    for step in range(100):
        x = np.roll(X, step, axis=0)
        for modules in (ours, theirs):
            for module in modules:
                module.zero_grad()
            mt.backward(chain, modules, x, Y)
        opt.step()
        specification_loop(theirs, 0.1)
    for mine, his in zip(arrays_of(ours), arrays_of(theirs), strict=True):
        assert_allclose(mine, his, rtol=1e-5, atol=1e-6)


def test_the_loop_and_the_optimizer_can_take_turns() -> None:
    point = Point(1.0)
    opt = mt.Optimizer([point], lr=0.5)
    give(point, 2.0)
    specification_loop([point], 0.5)
    assert float(point.weight[0]) == 0.0
    opt.step()
    assert float(point.weight[0]) == -1.0
    specification_loop([point], 0.25)
    assert float(point.weight[0]) == -1.5


def test_tied_parameters_stay_tied_and_are_stepped_once() -> None:
    model = Tied()
    opt = optim.SGD([model], lr=0.1, momentum=0.9)
    weight = np.asarray(model.encoder.weight)
    mt.backward(squared, model, X, Y)
    gradient = np.asarray(model.grads()[0])
    opt.step()
    assert_allclose(model.encoder.weight, weight - 0.1 * gradient, rtol=1e-6)
    assert_array_equal(model.encoder.weight, model.decoder.weight)
    assert len(opt.state_dict()["state"]) == len(model.parameters()) == 7


def test_a_weight_shared_by_two_listed_modules_is_stepped_once() -> None:
    a, b = nn.Linear(2, 2, key=jax.random.key(0)), nn.Linear(2, 2, key=jax.random.key(1))
    b.tie("weight", a, "weight")
    opt = mt.Optimizer([a, b], lr=1.0)
    weight = np.asarray(a.weight)
    give(a, 0.5, 0.5)
    b.accumulate([jnp.full((2, 2), 0.25), jnp.zeros(2)])
    opt.step()
    assert_allclose(a.weight, weight - 0.75, rtol=1e-6)
    assert_array_equal(a.weight, b.weight)


def test_frozen_parameters_do_not_move_and_keep_their_momentum() -> None:
    net = nn.Sequential(nn.Linear(1, 1, bias=False, key=jax.random.key(0)), Scale())
    opt = optim.SGD([net], lr=1.0, momentum=0.5)
    give(net, 1.0, 1.0)
    opt.step()
    net[0].freeze()
    weight = np.asarray(net[0].weight)
    give(net, 1.0)
    opt.step()
    assert_array_equal(net[0].weight, weight)
    assert buffer_of(opt, "0.0.weight") == 1.0
    assert buffer_of(opt, "0.1.scale") == 1.5
    net[0].unfreeze()
    give(net, 1.0, 1.0)
    opt.step()
    assert_array_equal(net[0].weight, weight - 1.5)
    assert buffer_of(opt, "0.1.scale") == 1.75
    assert [s["step"] for s in opt.state_dict()["state"].values()] == [2, 3]


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


def test_gradients_add_up_until_zero_grad() -> None:
    point = Point(0.0)
    opt = mt.Optimizer([point], lr=1.0)
    for x in (1.0, 2.0, 4.0):
        mt.backward(point, x)
    assert_array_equal(point.grads()[0], [7.0])
    opt.step()
    assert_array_equal(point.weight, [-7.0])
    opt.step()
    assert_array_equal(point.weight, [-14.0])
    opt.zero_grad()
    assert_array_equal(point.grads()[0], [0.0])
    mt.backward(point, 8.0)
    assert_array_equal(point.grads()[0], [8.0])


def test_gradients_can_be_read_before_and_after_a_step() -> None:
    point = Point(0.0)
    opt = optim.SGD([point], lr=1.0, momentum=0.5)
    mt.backward(point, 3.0)
    kept, weight = point.grads()[0], point.weight
    opt.step()
    state = opt.state_dict()["state"]["0.weight"]["momentum_buffer"]
    for _ in range(3):
        assert_array_equal(point.grads()[0], [3.0])
        opt.step()
    opt.zero_grad()
    mt.backward(point, 5.0)
    assert_array_equal(kept, [3.0])
    assert_array_equal(weight, [0.0])
    assert_array_equal(state, [3.0])


def test_zero_grad_skips_what_has_no_zero_grad() -> None:
    class WithoutZeroGrad:
        def __init__(self) -> None:
            self.array = np.ones(2)

        def parameters(self) -> list[np.ndarray]:
            return [self.array]

        def grads(self) -> list[np.ndarray]:
            return [np.ones(2)]

    foreign, point, layer = WithoutZeroGrad(), Point(1.0), NumpyLayer([1.0])
    opt = mt.Optimizer([foreign, point, layer], lr=0.5)
    give(point, 1.0)
    assert opt.zero_grad() is None
    assert_array_equal(point.grads()[0], [0.0])
    assert_array_equal(layer.gradients[0], [0.0])
    opt.step()
    assert_array_equal(foreign.array, [0.5, 0.5])
    assert_array_equal(point.weight, [1.0])
    assert_array_equal(layer.arrays[0], [1.0])


def test_a_step_without_gradients_takes_zeros_and_warns_once() -> None:
    point = Point(0.0)
    opt = optim.SGD([point], lr=1.0, momentum=0.5)
    give(point, 4.0)
    opt.step()
    opt.zero_grad()
    with pytest.warns(UserWarning, match=r"SGD\.step\(\).*no gradient.*backward") as caught:
        opt.step()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert_array_equal(point.weight, [-4.0 - 0.5 * 4.0])  # zeros as specified: momentum goes on
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
    assert_array_equal(point.weight, [-6.0 - 0.25 * 4.0])


def test_a_parameter_that_no_loss_reads_is_named_once() -> None:
    pair = Pair()
    opt = mt.Optimizer([pair], lr=1.0)
    mt.backward(pair, 1.0)
    with pytest.warns(UserWarning, match=r"no loss has read.*0\.unread\.weight") as caught:
        opt.step()
    assert len(caught) == 1
    assert "0.read.weight" not in str(caught[0].message)
    assert_array_equal(pair.read.weight, [0.0])
    assert_array_equal(pair.unread.weight, [1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            opt.zero_grad()
            mt.backward(pair, 1.0)
            opt.step()


def test_an_unread_parameter_is_named_though_the_first_step_had_no_gradient_at_all() -> None:
    pair = Pair()
    opt = mt.Optimizer([pair], lr=1.0)
    with pytest.warns(UserWarning, match="backward"):
        opt.step()
    mt.backward(pair, 1.0)
    with pytest.warns(UserWarning, match=r"0\.unread\.weight"):
        opt.step()


def test_an_unread_parameter_is_named_beside_numpy_modules() -> None:
    pair = Pair()
    opt = mt.Optimizer([pair, NumpyLayer([1.0])], lr=1.0)
    mt.backward(pair, 1.0)
    with pytest.warns(UserWarning, match=r"0\.unread\.weight"):
        opt.step()


# -- gradients that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_gradients_are_applied_by_default(bad: float) -> None:
    point, other = Point(1.0), Point(1.0)
    opt = mt.Optimizer([point, other], lr=0.5)
    give(point, bad), give(other, 1.0)
    opt.step()
    assert_array_equal(point.weight, [np.float32(1.0 - 0.5 * bad)])
    assert_array_equal(other.weight, [0.5])
    assert opt.skipped == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("make", [optim.SGD, RMSProp], ids=["SGD", "RMSProp"])
def test_skip_nonfinite_changes_nothing(bad: float, make: Any) -> None:
    point, other = Point(1.0), Point(1.0)
    more = {"momentum": 0.5} if make is optim.SGD else {}
    opt = make([point, other], lr=0.5, skip_nonfinite=True, **more)
    give(point, 1.0), give(other, 1.0)
    opt.step()
    assert float(other.weight[0]) != 1.0
    before, weights = opt.state_dict(), (np.asarray(point.weight), np.asarray(other.weight))
    give(point, bad)
    opt.step()
    opt.step()
    after = opt.state_dict()
    assert opt.skipped == 2 and after["skipped"] == 2
    assert opt.num_steps == 1 and after["num_steps"] == 1
    jax.tree.map(assert_array_equal, before["state"], after["state"])
    assert_array_equal(point.weight, weights[0])
    assert_array_equal(other.weight, weights[1])
    give(point, 1.0)
    opt.step()
    assert (opt.skipped, opt.num_steps) == (2, 2)
    assert float(point.weight[0]) < float(weights[0][0])


def test_skip_nonfinite_can_be_turned_on_later_and_holds_for_numpy_modules() -> None:
    layer = NumpyLayer([1.0], [1.0])
    opt = mt.Optimizer([layer], lr=0.5)
    opt.skip_nonfinite = True
    layer.gradients[1][0] = np.nan
    opt.step()
    assert_array_equal(layer.arrays, [[1.0], [1.0]])
    assert opt.skipped == 1
    opt.skip_nonfinite = False
    opt.step()
    assert_array_equal(layer.arrays, [[0.5], [np.nan]])


# ---------------------------------------------------------------------------------------------------------------------
# Objects that are not our Modules


def test_numpy_arrays_are_updated_truly_in_place() -> None:
    layer = NumpyLayer([[1.0, 2.0]], 3.0, dtype=np.float32)
    layer.gradients = [np.array([[1.0, -1.0]], np.float32), np.array(2.0, np.float32)]
    objects, memory = list(layer.arrays), [array.ctypes.data for array in layer.arrays]
    view = layer.arrays[0][0, 1:]
    opt = mt.Optimizer([layer], lr=0.5)
    for _ in range(2):
        assert opt.step() is None
    assert all(a is b for a, b in zip(layer.arrays, objects, strict=True))
    assert [array.ctypes.data for array in layer.arrays] == memory
    assert_array_equal(layer.arrays[0], [[0.0, 3.0]])
    assert_array_equal(layer.arrays[1], 1.0)
    assert_array_equal(view, [3.0])
    assert layer.arrays[0].dtype == layer.arrays[1].dtype == np.float32


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_any_layout_are_updated(order: Any) -> None:
    base = np.arange(12.0).reshape(3, 4)
    layer = NumpyLayer()
    layer.arrays = [base[::2, 1::2], np.array(base, order=order).T]
    layer.gradients = [np.ones((2, 2)), np.arange(12.0).reshape(4, 3)]
    expected = [array - 0.5 * g for array, g in zip(layer.arrays, layer.gradients, strict=True)]
    mt.Optimizer([layer], lr=0.5).step()
    assert_array_equal(layer.arrays[0], expected[0])
    assert_array_equal(layer.arrays[1], expected[1])
    assert_array_equal(base[::2, 1::2], expected[0])
    assert base[1, 1] == 5.0


def test_float64_arrays_keep_float64_precision() -> None:
    rng = np.random.default_rng(0)
    layer = NumpyLayer(rng.normal(size=(3, 2)), rng.normal(size=2))
    p = [array.copy() for array in layer.arrays]
    b = [np.zeros_like(array) for array in layer.arrays]
    opt = optim.SGD([layer], lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(20):
        layer.gradients = [rng.normal(size=array.shape) for array in p]
        opt.lr = lr = 0.1 / (step + 3)
        opt.step()
        for i, g in enumerate(layer.gradients):
            b[i] = 0.9 * b[i] + g + 0.01 * p[i]
            p[i] = p[i] - lr * b[i]
    for array, expected in zip(layer.arrays, p, strict=True):
        assert array.dtype == np.float64
        assert_allclose(array, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("save", [lambda state: state, as_numpy], ids=["jax", "numpy"])
def test_float64_state_survives_a_state_dict(save: Any) -> None:
    def run(interrupted: bool) -> np.ndarray:
        layer = NumpyLayer([1.0, 2.0])
        layer.gradients = [np.array([1 / 3, 1 / 7])]
        opt = optim.SGD([layer], lr=0.1, momentum=0.9)
        opt.step()
        if interrupted:
            state = save(opt.state_dict())
            opt = optim.SGD([layer], lr=0.1, momentum=0.9)
            opt.load_state_dict(state)
        opt.step()
        return layer.arrays[0]

    assert_allclose(run(interrupted=True), run(interrupted=False), rtol=1e-14)


def test_ours_and_numpy_objects_may_be_mixed() -> None:
    point, wide = Point(1.0), NumpyLayer([1.0, 1.0])
    narrow = NumpyLayer([1.0], dtype=np.float32)
    wide.gradients = [np.array([1 / 3, 1e-9])]
    opt = optim.SGD([point, wide, narrow], lr=0.5, momentum=0.5)
    give(point, 1.0)
    opt.step()
    opt.step()
    assert_array_equal(point.weight, [1.0 - 0.5 - 0.75])
    assert point.weight.dtype == jnp.float32
    assert_allclose(wide.arrays[0], 1.0 - np.array([1 / 3, 1e-9]) * 1.25, rtol=1e-14)
    assert_array_equal(narrow.arrays[0], np.float32([-0.25]))
    assert narrow.arrays[0].dtype == np.float32
    opt.modules.remove(wide)
    opt.step()
    assert_array_equal(point.weight, [-0.25 - 0.5 * 1.75])
    assert_array_equal(narrow.arrays[0], np.float32([-0.25 - 0.5 * 1.75]))


def test_gradients_of_none_are_zeros() -> None:
    layer = NumpyLayer([1.0], [2.0])
    layer.gradients = [None, np.array([1.0])]
    opt = optim.SGD([layer], lr=0.5, momentum=0.5)
    opt.step()
    assert_array_equal(layer.arrays, [[1.0], [1.5]])
    layer.gradients = [None, None]
    opt.step()
    assert_array_equal(layer.arrays, [[1.0], [1.25]])


def test_gradients_of_another_dtype_do_not_change_the_parameters_dtype() -> None:
    layer = NumpyLayer([1.0], dtype=np.float32)
    layer.gradients = [np.array([0.5], np.float64)]
    mt.Optimizer([layer], lr=1.0).step()
    assert layer.arrays[0].dtype == np.float32
    assert_array_equal(layer.arrays[0], np.float32([0.5]))


def test_half_precision_arrays_of_numpy() -> None:
    layer = NumpyLayer([1.0], dtype=np.float16)
    mt.Optimizer([layer], lr=0.25).step()
    assert layer.arrays[0].dtype == np.float16
    assert_array_equal(layer.arrays[0], np.float16([0.75]))


def test_bfloat16_arrays_of_numpy() -> None:
    layer = NumpyLayer([1.0], dtype=ml_dtypes.bfloat16)
    mt.Optimizer([layer], lr=0.25).step()
    assert layer.arrays[0].dtype == ml_dtypes.bfloat16
    assert float(layer.arrays[0][0]) == 0.75


def test_misaligned_lists_are_an_error_and_nothing_changes() -> None:
    point, layer = Point(1.0), NumpyLayer([1.0], [2.0])
    opt = optim.SGD([point, layer], lr=0.5, momentum=0.5)
    give(point, 1.0)
    layer.gradients.pop()
    with pytest.raises(ValueError, match="1 gave 2 parameters and 1 gradients|1 gives 2 parameters and 1 gradients"):
        opt.step()
    assert_array_equal(point.weight, [1.0])
    assert_array_equal(layer.arrays, [[1.0], [2.0]])
    assert opt.num_steps == 0
    layer.gradients.append(np.ones(1))
    opt.step()
    assert_array_equal(point.weight, [0.5])
    assert_array_equal(layer.arrays, [[0.5], [1.5]])


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (), (3,)])
def test_a_gradient_of_another_shape_is_an_error(shape: tuple[int, ...]) -> None:
    layer = NumpyLayer([1.0, 2.0])
    opt = mt.Optimizer([layer], lr=0.5)
    layer.gradients = [np.ones(shape)]
    with pytest.raises(ValueError, match=r"0\.grads\(\)\[0\] has shape .*\(2,\)"):
        opt.step()
    assert_array_equal(layer.arrays[0], [1.0, 2.0])


def test_a_numpy_object_that_grows_is_an_error_until_the_list_is_assigned_anew() -> None:
    layer = NumpyLayer([1.0])
    opt = mt.Optimizer([layer], lr=0.5)
    opt.step()
    layer.arrays.append(np.array([2.0]))
    layer.gradients.append(np.ones(1))
    with pytest.raises(ValueError, match="2 arrays, and 1 before.*optimizer.modules"):
        opt.step()
    opt.modules = [layer]
    opt.step()
    assert_array_equal(layer.arrays, [[0.0], [1.5]])


@pytest.mark.parametrize("immutable", ["jax", "read-only"])
def test_immutable_arrays_in_a_fresh_list_are_an_error_that_names_the_fix(immutable: str) -> None:
    array: Any = jnp.ones(2) if immutable == "jax" else np.ones(2, np.float32)
    if immutable == "read-only":
        array.flags.writeable = False
    with pytest.raises(TypeError, match=r"0\.parameters\(\)\[0\].*immutable.*writable NumPy arrays.*Module"):
        mt.Optimizer([Fresh([array], [np.ones(2, np.float32)])])
    assert_array_equal(array, [1.0, 1.0])


def test_an_array_that_becomes_read_only_is_an_error_and_nothing_changes() -> None:
    point, layer = Point(1.0), NumpyLayer([1.0], [1.0])
    opt = mt.Optimizer([point, layer], lr=0.5)
    give(point, 1.0)
    layer.arrays[1].flags.writeable = False
    with pytest.raises(TypeError, match=r"1\.parameters\(\)\[1\]"):
        opt.step()
    assert_array_equal(point.weight, [1.0])
    assert_array_equal(layer.arrays, [[1.0], [1.0]])


def test_read_only_arrays_in_a_persistent_list_are_an_error() -> None:
    array = np.ones(2, np.float32)
    array.flags.writeable = False
    layer = Persistent([array], [np.ones(2, np.float32)])
    with pytest.raises(TypeError, match=r"0\.parameters\(\)\[0\].*(read-only|immutable|writeable)"):
        mt.Optimizer([layer], lr=0.5).step()
    assert layer.arrays[0] is array
    assert_array_equal(array, [1.0, 1.0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_persistent_list_of_jax_arrays_is_written_to(dtype: Any) -> None:
    first = jnp.asarray([1.0, 2.0], dtype)
    layer = Persistent([first, jnp.asarray(3.0, dtype)], [jnp.ones(2, dtype), jnp.asarray(2.0, dtype)])
    items = layer.arrays
    opt = optim.SGD([layer], lr=0.5, momentum=0.5)
    opt.step()
    opt.step()
    assert layer.arrays is items
    assert all(isinstance(array, jax.Array) and array.dtype == dtype for array in items)
    assert_array_equal(np.asarray(items[0], np.float32), [1 - 1.25, 2 - 1.25])
    assert float(items[1]) == 3 - 2.5
    assert_array_equal(np.asarray(first, np.float32), [1.0, 2.0])


@pytest.mark.parametrize("item", [1.0, np.array([1]), [1.0], None, "w"], ids=repr)
def test_arrays_that_cannot_be_trained_are_an_error(item: Any) -> None:
    with pytest.raises(TypeError, match=r"0\.parameters\(\)\[0\]"):
        mt.Optimizer([Persistent([item], [item])])


def test_an_object_around_a_module_that_gives_its_live_lists() -> None:
    inner = small_net()
    wrapper, twin = Wrapper(inner), small_net()
    opt, other = optim.SGD([wrapper], lr=0.1, momentum=0.9), optim.SGD([twin], lr=0.1, momentum=0.9)
    for _ in range(3):
        for model, optimizer in ((inner, opt), (twin, other)):
            model.zero_grad()
            mt.backward(squared, model, X, Y)
            optimizer.step()
    assert_array_equal(inner[0].weight, twin[0].weight)
    assert_array_equal(inner[2].bias, twin[2].bias)


def test_another_module_in_the_object_around_it_is_noticed() -> None:
    old, new = Point(1.0), Point(1.0)
    wrapper = Wrapper(old)
    opt = mt.Optimizer([wrapper], lr=0.5)
    give(old, 1.0), give(new, 1.0)
    opt.step()
    wrapper.inner = new
    opt.step()
    assert (float(old.weight[0]), float(new.weight[0])) == (0.5, 0.5)


def test_an_object_that_fails_can_be_replaced_and_a_failing_list_changes_nothing() -> None:
    class Fails:
        broken = False

        def __init__(self) -> None:
            self.w = np.ones(2)

        def parameters(self) -> list[np.ndarray]:
            if self.broken:
                raise RuntimeError("its arrays have changed")
            return [self.w]

        def grads(self) -> list[np.ndarray]:
            return [np.ones(2)]

    old, new = Fails(), Fails()
    modules = [old]
    opt = mt.Optimizer(modules, lr=0.5)
    new.broken = True
    with pytest.raises(RuntimeError, match="its arrays have changed"):
        opt.modules = [new]
    assert opt.modules is modules
    opt.step()
    np.testing.assert_array_equal(old.w, [0.5, 0.5])
    old.broken, new.broken = True, False
    opt.modules = [new]
    opt.step()
    np.testing.assert_array_equal(new.w, [0.5, 0.5])


def test_numpy_modules_keep_their_momentum_when_the_list_changes() -> None:
    a, b = NumpyLayer([0.0]), NumpyLayer([0.0])
    opt = optim.SGD([a], lr=1.0, momentum=0.5)
    opt.step()
    opt.modules.insert(0, b)
    opt.step()
    assert_array_equal(a.arrays, [[-2.5]])
    assert_array_equal(b.arrays, [[-1.0]])


def test_an_optimizer_of_numpy_modules_cannot_be_traced() -> None:
    opt = mt.Optimizer([NumpyLayer([1.0])])
    with pytest.raises(TypeError, match="NumPy.*in place"):
        jax.jit(lambda opt: opt)(opt)
    with pytest.raises(TypeError, match="NumPy.*cannot be traced"):
        jax.jit(lambda x: opt.step() or x)(1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("make", [mt.Optimizer, optim.SGD, RMSProp], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    ("modules", "error", "message"),
    [
        ([], ValueError, r"modules is empty; give it a list with at least one module: `\[model\]`"),
        ((), ValueError, "modules is empty"),
        (3, TypeError, "modules must be a list of modules; got 3"),
        (None, TypeError, "modules must be a list of modules; got None"),
        ("model", TypeError, "modules must be a list of modules; got 'model'"),
        ({"a": 1}, TypeError, "modules must be a list of modules; got {'a': 1}"),
        ([3], TypeError, r"modules\[0\] is 3 \(int\).*`parameters\(\)` and `grads\(\)`"),
        ([None], TypeError, r"modules\[0\] is None"),
        ([nn.Linear], TypeError, r"modules\[0\] is .*Linear"),
        ([nn.ReLU()], ValueError, "no parameters.*nothing to train"),
    ],
    ids=lambda value: repr(value)[:20] if not isinstance(value, type) else value.__name__,
)
def test_bad_modules(make: Any, modules: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(modules)


def test_a_module_instead_of_a_list() -> None:
    for module in (Point(1.0), small_net()):
        with pytest.raises(TypeError, match=rf"got a {type(module).__name__} itself: write `\[model\]`"):
            mt.Optimizer(module)


def test_an_item_without_the_parameters_api_is_named_with_its_place() -> None:
    class OnlyParameters:
        def parameters(self) -> list[Any]:
            return []

        def __repr__(self) -> str:
            return "<half a module>"

    with pytest.raises(TypeError, match=r"SGD: modules\[1\] is <half a module> \(OnlyParameters\)"):
        optim.SGD([Point(1.0), OnlyParameters()])


def test_the_same_parameter_reached_twice() -> None:
    net = small_net()
    for modules, first, second in (
        ([net, net[0]], "0.0.weight", "1.weight"),
        ([net[2], net], "0.weight", "1.2.weight"),
        ([net, net], "0.0.weight", "1.0.weight"),
    ):
        with pytest.raises(ValueError, match="reached twice") as caught:
            mt.Optimizer(modules)
        assert f" {first}" in str(caught.value) and f" {second}" in str(caught.value)
    opt = mt.Optimizer([net])
    opt.modules.append(net[0])
    with pytest.raises(ValueError, match="reached twice"):
        opt.step()


def test_the_same_parameter_reached_twice_by_objects_of_others() -> None:
    layer = NumpyLayer([1.0])
    with pytest.raises(ValueError, match="reached twice.* 0 .* 1"):
        mt.Optimizer([layer, layer])
    around = Persistent([*layer.arrays, np.ones(1)], [*layer.gradients, np.ones(1)])
    with pytest.raises(ValueError, match=r"reached twice.*0.*1"):
        mt.Optimizer([layer, around])


def test_the_same_parameter_reached_twice_by_a_module_and_an_object_around_it() -> None:
    point = Point(1.0)
    with pytest.raises(ValueError, match=r"reached twice.*0\.weight.*1\.weight"):
        mt.Optimizer([point, Wrapper(point)])


BAD_NUMBERS = [-1e-9, -1, np.nan, np.inf, -np.inf, "0.1", None, True, False, 1j, [0.1], np.array([0.1]), object]


@pytest.mark.parametrize("lr", BAD_NUMBERS[:-1], ids=repr)
def test_bad_lr(lr: Any) -> None:
    with pytest.raises(ValueError, match="Optimizer: lr must be a finite number.* >= 0; got"):
        mt.Optimizer([Point(1.0)], lr=lr)
    point = Point(1.0)
    opt = mt.Optimizer([point], lr=0.5)
    with pytest.raises(ValueError, match="Optimizer: lr must be a finite number.* >= 0; got"):
        opt.lr = lr
    assert opt.lr == 0.5
    give(point, 1.0)
    opt.step()
    assert_array_equal(point.weight, [0.5])


@pytest.mark.parametrize("name", ["momentum", "weight_decay"])
@pytest.mark.parametrize("value", BAD_NUMBERS, ids=repr)
def test_bad_hyperparameters(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"SGD: {name} must be a finite number >= 0; got"):
        optim.SGD([Point(1.0)], **{name: value})
    opt = optim.SGD([Point(1.0)], lr=0.5, **{name: 0.25})
    with pytest.raises(ValueError, match=f"SGD: {name} must be a finite number >= 0; got"):
        setattr(opt, name, value)
    assert getattr(opt, name) == 0.25


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, "0.1", None, True], ids=repr)
def test_bad_dampening(value: Any) -> None:
    with pytest.raises(ValueError, match="SGD: dampening must be a finite number"):
        optim.SGD([Point(1.0)], momentum=0.5, dampening=value)


@pytest.mark.parametrize("name", ["nesterov", "maximize", "skip_nonfinite"])
@pytest.mark.parametrize("value", [1, "yes", None], ids=repr)
def test_flags_are_booleans(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"SGD: {name} must be a bool"):
        optim.SGD([Point(1.0)], momentum=0.5, **{name: value})
    opt = optim.SGD([Point(1.0)], momentum=0.5)
    with pytest.raises((TypeError, ValueError), match=f"SGD: {name} must be a bool"):
        setattr(opt, name, value)
    assert getattr(opt, name) is False


def test_unknown_attributes() -> None:
    opt = optim.SGD([Point(1.0)], lr=0.5)
    for name, nearest in (("momentun", "momentum"), ("wieght_decay", "weight_decay"), ("zerograd", "zero_grad")):
        with pytest.raises(AttributeError, match=f"SGD has no .*`{name}`.*did you mean `{nearest}`"):
            getattr(opt, name)
        with pytest.raises(AttributeError, match=f"SGD has no `{name}` to set.*did you mean `{nearest}`"):
            setattr(opt, name, 1)
    with pytest.raises(AttributeError, match=r"SGD has no `learning_rate` to set.*\blr\b"):
        opt.learning_rate = 1
    with pytest.raises(AttributeError, match=r"SGD has no attribute `learning_rate`.*\blr\b"):
        _ = opt.learning_rate
    with pytest.raises(AttributeError):
        opt.skipped = 3
    assert opt.lr == 0.5
    assert not hasattr(opt, "learning_rate")


def test_unknown_arguments() -> None:
    with pytest.raises(TypeError, match="learning_rate"):
        optim.SGD([Point(1.0)], learning_rate=0.1)


@pytest.mark.parametrize("name", ["init_state", "update"])
def test_rules_must_be_static_methods(name: str) -> None:
    with pytest.raises(TypeError, match=rf"Wrong\.{name} must be a @staticmethod"):
        type("Wrong", (mt.Optimizer,), {name: lambda self, *args: args})


def test_a_rule_that_raises_leaves_everything_as_it_was() -> None:
    class Fussy(mt.Optimizer):
        def __init__(self, modules: Any, lr: Any = 0.01, *, fail: bool = False) -> None:
            super().__init__(modules, lr, fail=fail)

        @staticmethod
        def update(p: Any, g: Any, s: Any, h: Any) -> Any:
            if h.fail:
                raise ArithmeticError("on purpose")
            return p - h.lr * g, s

    point, layer = Point(1.0), NumpyLayer([1.0])
    opt = Fussy([point], lr=0.5, fail=True)
    give(point, 1.0)
    for modules in ([point], [point, layer]):
        opt.modules = modules
        with pytest.raises(ArithmeticError, match="on purpose"):
            opt.step()
        assert_array_equal(point.weight, [1.0])
        assert_array_equal(layer.arrays, [[1.0]])
        assert opt.num_steps == 0
    opt.fail = False
    opt.step()
    assert_array_equal(point.weight, [0.5])
    assert_array_equal(layer.arrays, [[0.5]])


# -- updates that JAX would forget ------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["step", "zero_grad", "lr"])
def test_an_optimizer_changed_inside_a_jax_transform_by_closure(what: str) -> None:
    point = Point(1.0)
    opt = optim.SGD([point], lr=0.5, momentum=0.5)
    give(point, 1.0)

    def change(x: Any) -> Any:
        if what == "lr":
            opt.lr = 0.25
        else:
            getattr(opt, what)()
        return x

    for transform in (jax.jit, jax.grad, lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, 2)):
        with pytest.raises(mt.TraceError, match=r"(?s)inside a JAX transform.*return it.*(mt\.jit|mt\.backward)"):
            transform(change)(1.0)
    assert opt.lr == 0.5 and opt.num_steps == 0
    assert_array_equal(point.grads()[0], [1.0])
    opt.step()
    assert_array_equal(point.weight, [0.5])


def test_the_error_of_a_change_by_closure_names_the_optimizer() -> None:
    opt = optim.SGD([Point(1.0)], lr=0.5)
    give(opt.modules[0], 1.0)
    with pytest.raises(mt.TraceError, match="SGD"):
        jax.jit(lambda x: opt.step() or x)(1.0)
    with pytest.raises(mt.TraceError, match=r"SGD\.lr"):
        jax.jit(lambda x: setattr(opt, "lr", 0.1) or x)(1.0)


def test_an_update_of_a_copy_that_is_dropped_is_told() -> None:
    point = Point(1.0)
    opt = optim.SGD([point], lr=0.5)
    give(point, 1.0)

    def train(opt: Any, x: Any) -> Any:
        loss = mt.backward(opt.modules[0], x)
        opt.step()
        return loss

    with pytest.warns(mt.DroppedUpdateWarning, match="(?s)SGD.*return"):
        jax.jit(train)(opt, 1.0)
        gc.collect()
    assert_array_equal(point.weight, [1.0])


# ---------------------------------------------------------------------------------------------------------------------
# Schedules


def halving(step: Any) -> Any:
    return 0.5 ** jnp.asarray(step, jnp.float32)


def test_a_schedule_as_lr(compilations: Any) -> None:
    point = Point(0.0)
    opt = mt.Optimizer([point], lr=halving)
    give(point, 1.0)
    position = 0.0
    for step in range(4):
        assert opt.lr == 0.5**step
        assert opt.num_steps == step
        if step == 1:
            compilations()
        opt.step()
        position -= 0.5**step
        assert float(point.weight[0]) == position
    assert opt.lr == 0.0625
    opt.lr = 1.0
    assert opt.lr == 1.0
    opt.step()
    assert float(point.weight[0]) == position - 1.0
    opt.lr = halving
    assert opt.lr == 0.5**5
    opt.step()
    assert float(point.weight[0]) == position - 1.0 - 0.5**5


def test_a_schedule_with_momentum_and_numpy_modules() -> None:
    layer = NumpyLayer([0.0])
    opt = optim.SGD([layer], lr=halving, momentum=0.5)
    opt.step()
    opt.step()
    assert_allclose(layer.arrays[0], [-1.0 - 0.5 * 1.5], rtol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_optax_schedules_work_as_they_are() -> None:
    optax = pytest.importorskip("optax")
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=3, decay_steps=10)
    point = Point(0.0)
    with jax.numpy_dtype_promotion("standard"):
        opt = mt.Optimizer([point], lr=schedule)
        give(point, -1.0)
        total = np.float32(0)
        for step in range(10):
            assert_allclose(opt.lr, float(schedule(step)), rtol=1e-6, atol=1e-7)
            opt.step()
            total += np.float32(schedule(step))
            assert_allclose(point.weight, [total], rtol=1e-5, atol=1e-6)


def test_a_skipped_step_does_not_advance_the_schedule() -> None:
    point = Point(0.0)
    opt = mt.Optimizer([point], lr=halving, skip_nonfinite=True)
    give(point, np.nan)
    opt.step()
    assert opt.lr == 1.0
    give(point, 1.0)
    opt.step()
    assert float(point.weight[0]) == -1.0
    assert opt.lr == 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def train(model: Any, opt: Any, steps: int, start: int = 0) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        opt.zero_grad()
        losses.append(float(mt.backward(squared, model, np.roll(X, step, axis=0), Y)))
        opt.step()
    return losses


MAKERS: dict[str, Callable[[list[Any]], Any]] = {
    "Optimizer": lambda modules: mt.Optimizer(modules, lr=0.1),
    "SGD": lambda modules: optim.SGD(modules, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "SGD, scheduled": lambda modules: optim.SGD(modules, lr=halving, momentum=0.9, nesterov=True),
    "RMSProp": lambda modules: RMSProp(modules, lr=0.01, decay=0.8, skip_nonfinite=True),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", MAKERS)
def test_a_state_dict_resumes_exactly(name: str) -> None:
    model = small_net()
    opt = MAKERS[name]([model])
    train(model, opt, 4)
    weights, state = model.state_dict(), opt.state_dict()
    expected = train(model, opt, 4, start=4)
    fresh = small_net(seed=9)
    resumed = MAKERS[name]([fresh])
    if name == "SGD":
        resumed.lr, resumed.momentum = 0.7, 0.1
    fresh.load_state_dict(weights)
    assert resumed.load_state_dict(state) is None
    assert resumed.num_steps == 4
    assert train(fresh, resumed, 4, start=4) == expected
    assert_array_equal(fresh[0].weight, model[0].weight)
    assert resumed.num_steps == 8
    assert resumed.lr == opt.lr


def test_what_a_state_dict_holds() -> None:
    point = Point(1.0, 2.0)
    opt = optim.SGD([point], lr=0.25, momentum=0.5, nesterov=True)
    give(point, 3.0)
    opt.step()
    state = opt.state_dict()
    buffer = state["state"]["0.weight"].pop("momentum_buffer")
    assert_array_equal(buffer, [3.0, 3.0])
    assert state == {
        "num_steps": 1,
        "skipped": 0,
        "hyperparameters": {
            "lr": 0.25,
            "momentum": 0.5,
            "dampening": 0,
            "weight_decay": 0,
            "nesterov": True,
            "maximize": False,
            "skip_nonfinite": False,
            "track_grad_norm": False,
            "decay_matrices_only": False,
            "master_weights": False,
        },
        "fingerprints": {"0.weight": (1.0, 0.9375)},
        "state": {"0.weight": {"step": 1}},
    }


def test_a_state_dict_is_a_copy_in_time() -> None:
    point = Point(0.0)
    opt = optim.SGD([point], lr=1.0, momentum=0.5)
    give(point, 1.0)
    opt.step()
    state = opt.state_dict()
    opt.step()
    opt.lr = 0.1
    assert_array_equal(state["state"]["0.weight"]["momentum_buffer"], [1.0])
    opt.load_state_dict(state)
    opt.step()
    assert_array_equal(state["state"]["0.weight"]["momentum_buffer"], [1.0])
    assert opt.lr == 1.0
    assert buffer_of(opt, "0.weight") == 1.5


def spoiled(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict in which many things are wrong at once."""
    state = {**state, "extra": 1, "hyperparameters": {**state["hyperparameters"]}, "state": {**state["state"]}}
    del state["skipped"]
    state["hyperparameters"]["lr"] = -1.0
    state["hyperparameters"]["beta"] = 0.5
    del state["hyperparameters"]["momentum"]
    del state["state"]["0.0.weight"]
    state["state"]["0.9.weight"] = {}
    state["state"]["0.0.bias"] = {"step": 1, "momentum_buffer": jnp.zeros(7)}
    state["state"]["0.2.bias"] = {"step": 1, "velocity": jnp.zeros(2)}
    state["state"]["0.2.weight"] = {**state["state"]["0.2.weight"], "momentum_buffer": jnp.zeros((2, 4), jnp.bfloat16)}
    return state


def test_an_unfit_state_dict_is_one_error_that_lists_everything() -> None:
    model = small_net()
    opt = optim.SGD([model], lr=0.1, momentum=0.9)
    train(model, opt, 2)
    before = opt.state_dict()
    with pytest.raises(ValueError, match="nothing was loaded") as caught:
        opt.load_state_dict(spoiled(before))
    message = str(caught.value)
    for expected in (
        "missing: skipped",
        "unexpected: extra",
        "missing: hyperparameter momentum",
        "unexpected: hyperparameter beta",
        "lr must be",
        "missing: state of 0.0.weight",
        "unexpected: state of 0.9.weight",
        "0.0.bias.momentum_buffer",
        "(7,)",
        "velocity",
        "bfloat16",
    ):
        assert expected in message
    after = opt.state_dict()
    assert before["hyperparameters"] == after["hyperparameters"]
    jax.tree.map(assert_array_equal, before["state"], after["state"])


def test_an_unfit_flag_in_a_state_dict_changes_nothing() -> None:
    point = Point(0.0)
    opt = optim.SGD([point], lr=0.5, momentum=0.5)
    for name, value in (("nesterov", 3), ("maximize", None), ("dampening", "x")):
        state = opt.state_dict()
        state["hyperparameters"] |= {"lr": 0.125, name: value}
        with pytest.raises(ValueError, match=f"{name} must be"):
            opt.load_state_dict(state)
        assert (opt.lr, opt.nesterov, opt.maximize, opt.dampening) == (0.5, False, False, 0)


def test_hyperparameters_that_do_not_go_together_in_a_state_dict_change_nothing() -> None:
    opt = optim.SGD([Point(0.0)], lr=0.5, momentum=0.5)
    state = opt.state_dict()
    state["hyperparameters"] |= {"lr": 0.125, "dampening": 0.5, "nesterov": True}
    with pytest.raises(ValueError, match="nesterov needs"):
        opt.load_state_dict(state)
    assert (opt.lr, opt.dampening, opt.nesterov) == (0.5, 0, False)


def test_a_state_dict_may_change_hyperparameters_that_go_together_only_at_the_end() -> None:
    damped = optim.SGD([Point(0.0)], lr=0.5, momentum=0.5, dampening=0.25)
    nesterov = optim.SGD([Point(0.0)], lr=0.5, momentum=0.5, nesterov=True)
    state = nesterov.state_dict()
    nesterov.load_state_dict(damped.state_dict())
    assert (nesterov.dampening, nesterov.nesterov) == (0.25, False)
    damped.load_state_dict(state)
    assert (damped.dampening, damped.nesterov) == (0, True)


def test_a_missing_step_count_is_an_error() -> None:
    opt = optim.SGD([Point(0.0)], lr=0.5, momentum=0.5)
    state = opt.state_dict()
    del state["state"]["0.weight"]["step"]
    with pytest.raises(ValueError, match=r"0\.weight.*step"):
        opt.load_state_dict(state)


def test_a_user_state_may_have_a_field_called_step() -> None:
    class Counted(NamedTuple):
        step: jax.Array

    class Counting(mt.Optimizer):
        @staticmethod
        def init_state(p: Any, h: Any) -> Any:
            return Counted(jnp.zeros_like(p))

        @staticmethod
        def update(p: Any, g: Any, s: Any, h: Any) -> Any:
            return p - h.lr * (s.step + g), Counted(s.step + 10)

    def run(interrupted: bool) -> float:
        point = Point(0.0)
        opt = Counting([point], lr=1.0)
        give(point, 1.0)
        opt.step()
        if interrupted:
            state, opt = opt.state_dict(), Counting([point], lr=1.0)
            opt.load_state_dict(state)
        opt.step()
        return float(point.weight[0])

    assert run(interrupted=False) == -1 - 11
    assert run(interrupted=True) == -1 - 11


def by_deepcopy(objects: Any) -> Any:
    return copy.deepcopy(objects)


def by_pickle(objects: Any) -> Any:
    return pickle.loads(pickle.dumps(objects))


@pytest.mark.parametrize("duplicate", [by_deepcopy, by_pickle])
@pytest.mark.parametrize("name", MAKERS)
def test_copies_share_what_was_shared_and_resume_identically(name: str, duplicate: Any) -> None:
    model = small_net()
    opt = MAKERS[name]([model])
    train(model, opt, 3)
    weights = model.state_dict()
    new_model, new_opt = duplicate((model, opt))
    assert type(new_opt) is type(opt)
    assert new_opt.modules[0] is new_model and new_model is not model
    assert new_opt.lr == opt.lr and new_opt.num_steps == 3
    expected = train(model, opt, 3, start=3)
    assert_array_equal(new_model[0].weight, weights["0.weight"])
    assert train(new_model, new_opt, 3, start=3) == expected
    assert_array_equal(new_model[2].weight, model[2].weight)


@pytest.mark.parametrize("duplicate", [by_deepcopy, by_pickle])
def test_copies_keep_gradients_and_exact_numbers(duplicate: Any) -> None:
    model = small_net()
    opt = optim.SGD([model], lr=0.1, momentum=0.9)
    mt.backward(squared, model, X, Y)
    new = duplicate(opt)
    assert (new.lr, new.momentum) == (0.1, 0.9)
    assert_array_equal(new.modules[0].grads()[0], model.grads()[0])
    new.step()
    opt.step()
    assert_array_equal(new.modules[0][0].weight, model[0].weight)


@pytest.mark.parametrize("duplicate", [by_deepcopy, by_pickle])
def test_copies_with_numpy_modules_resume_identically(duplicate: Any) -> None:
    layer = NumpyLayer([0.0])
    opt = optim.SGD([layer], lr=1.0, momentum=0.5)
    opt.step()
    new_layer, new = duplicate((layer, opt))
    assert new.modules[0] is new_layer
    opt.step()
    new.step()
    assert_array_equal(layer.arrays, [[-2.5]])
    assert_array_equal(new_layer.arrays, [[-2.5]])


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers are pytrees, and a user's own is no different


def reference_rmsprop(gradients: list[float], lr: float, decay: float) -> float:
    p, v = 1.0, 0.0
    for t, g in enumerate(gradients, 1):
        v = decay * v + (1 - decay) * g**2
        p -= lr * g / (np.sqrt(v / (1 - decay**t)) + 1e-8)
    return p


def test_a_users_own_optimizer_by_hand() -> None:
    point, gradients = Point(1.0), [1.0, -2.0, 0.5, 3.0]
    opt = RMSProp([point], lr=0.1, decay=0.8)
    for g in gradients:
        give(point, g)
        opt.step()
    assert_allclose(point.weight, [reference_rmsprop(gradients, 0.1, 0.8)], rtol=1e-5)
    assert list(opt.state_dict()["state"]["0.weight"]) == ["step", "mean_square"]
    assert (opt.decay, opt.eps) == (0.8, 1e-8)


def functional_step(opt: Any, xy: Any) -> Any:
    opt.zero_grad()
    loss = mt.backward(squared, opt.modules[0], *xy)
    opt.step()
    return opt, loss


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_eager_and_jitted_and_scanned_steps_agree(name: str) -> None:
    xs = jnp.stack([jnp.roll(X, i, axis=0) for i in range(5)])
    ys = jnp.stack([jnp.asarray(Y)] * 5)

    eager = MAKERS[name]([small_net()])
    expected = train(eager.modules[0], eager, 5)

    jitted, losses = MAKERS[name]([small_net()]), []
    step = jax.jit(functional_step)
    for x, y in zip(xs, ys, strict=True):
        jitted, loss = step(jitted, (x, y))
        losses.append(float(loss))
    assert_allclose(losses, expected, rtol=1e-5)

    start = MAKERS[name]([small_net()])
    scanned, losses = jax.lax.scan(functional_step, start, (xs, ys))
    assert_allclose(losses, expected, rtol=1e-5)

    for opt in (jitted, scanned):
        assert type(opt) is type(eager)
        assert opt.num_steps == 5
        assert_allclose(opt.lr, eager.lr, rtol=1e-6)
        mine, theirs = opt.state_dict()["state"], eager.state_dict()["state"]
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-6), mine, theirs)
        assert_allclose(opt.modules[0][0].weight, eager.modules[0][0].weight, rtol=1e-5, atol=1e-6)
    assert start.num_steps == 0
    assert_array_equal(start.modules[0][0].weight, small_net()[0].weight)


def test_what_comes_back_from_a_jit_goes_on_eagerly_as_it_was() -> None:
    opt = optim.SGD([Point(1.0)], lr=0.1, momentum=0.5)
    give(opt.modules[0], 1.0)
    new = jax.jit(lambda opt: opt.step() or opt)(opt)
    assert (new.lr, new.momentum, new.nesterov) == (0.1, 0.5, False)
    assert float(opt.modules[0].weight[0]) == 1.0
    new.step()
    assert_allclose(new.modules[0].weight, [1.0 - 0.1 - 0.15], rtol=1e-6)
    assert repr(new) == repr(opt).replace("dampening=0,", "dampening=0.0,").replace(
        "weight_decay=0)", "weight_decay=0.0)"
    )


@pytest.mark.one_in(2)
@pytest.mark.parametrize("lr", NUMBERS, ids=lambda lr: f"{type(lr).__name__}-{getattr(lr, 'dtype', '')}")
def test_lr_can_be_set_on_what_comes_back_from_a_jit(lr: Any, compilations: Any) -> None:
    opt = jax.jit(lambda opt: opt)(optim.SGD([Point(8.0)], lr=0.5))
    give(opt.modules[0], 1.0)
    opt.lr = lr
    assert opt.lr == lr
    opt.step()
    assert float(opt.modules[0].weight[0]) == 8.0 - float(lr)
    twice = lr * 2
    compilations()
    opt.lr = twice
    opt.step()
    assert compilations() == 0
    assert float(opt.modules[0].weight[0]) == 8.0 - float(lr) - float(twice)


def test_lr_can_be_set_inside_a_jit() -> None:
    opt = optim.SGD([Point(1.0)], lr=0.1, momentum=0.5)

    @jax.jit
    def step(opt: Any, lr: Any) -> Any:
        opt.lr = lr
        mt.backward(opt.modules[0], 1.0)
        opt.step()
        return opt

    new = step(opt, 0.25)
    assert (new.lr, opt.lr) == (0.25, 0.1)
    assert_array_equal(new.modules[0].weight, [0.75])
    assert_array_equal(opt.modules[0].weight, [1.0])


def test_a_sweep_of_learning_rates_by_vmap() -> None:
    """An ensemble of optimizers is one optimizer with a leading axis on every array."""
    opts = [optim.SGD([Point(1.0)], lr=lr, momentum=0.5) for lr in (0.5, 0.25)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *opts)

    def step(opt: Any) -> Any:
        mt.backward(opt.modules[0], 1.0)
        opt.step()
        return opt

    stacked = jax.vmap(step)(stacked)
    assert_array_equal(stacked.modules[0].weight, [[0.5], [0.75]])


def test_optimizers_of_one_structure_share_one_program(compilations: Any) -> None:
    def trained(lr: float, momentum: float, seed: int) -> Any:
        net = small_net(seed)
        opt = optim.SGD([net], lr=lr, momentum=momentum)
        give(net, 1.0, 1.0, 1.0, 1.0)
        opt.step()
        opt.step()
        return opt

    first = np.asarray(trained(0.1, 0.9, 0).modules[0][0].bias)
    compilations()
    for seed in range(1, 4):
        other = np.asarray(trained(0.1 * seed, 0.5, seed).modules[0][0].bias)
        assert_allclose(other, np.asarray(small_net(seed)[0].bias) - 0.1 * seed * 2.5, rtol=1e-5, atol=1e-6)
    assert compilations() == 0
    assert_allclose(first, np.asarray(small_net(0)[0].bias) - 0.1 * 2.9, rtol=1e-5, atol=1e-6)


def test_a_rule_is_traced_once_for_all() -> None:
    traced = []

    class Noted(mt.Optimizer):
        def __init__(self, modules: Any, lr: Any = 0.01, *, betas: Any = (0.5, 0.25), twice: bool = False) -> None:
            super().__init__(modules, lr, betas=betas, twice=twice)

        @staticmethod
        def update(p: Any, g: Any, s: Any, h: Any) -> Any:
            traced.append(p.shape)
            return p - (2 if h.twice else 1) * h.lr * h.betas[0] * g, s

    def step(opt: Any) -> float:
        give(opt.modules[0], 1.0)
        before = float(opt.modules[0].weight[0])
        opt.step()
        return float(opt.modules[0].weight[0]) - before

    opt = Noted([Point(1.0)], lr=0.5)
    assert step(opt) == -0.25
    opt.betas = (0.25, 0.75)
    assert opt.betas == (0.25, 0.75)
    assert step(opt) == -0.125
    assert step(Noted([Point(2.0)], lr=1.0)) == -0.5
    assert traced == [(1,)]
    opt.twice = True
    assert step(opt) == -0.25
    opt.twice = False
    assert step(opt) == -0.125
    assert step(Noted([Point(2.0)], lr=1.0, twice=True)) == -1.0
    assert traced == [(1,)] * 2
    assert step(Noted([Point(2.0, 3.0)], lr=1.0)) == -0.5
    assert traced == [(1,), (1,), (2,)]
    opt.betas = [0.5, 0.5]  # as torch takes it
    assert opt.betas == (0.5, 0.5)
    for bad in ((0.5,), 0.5, [0.5], (0.5, -1.0), (0.5, np.nan)):
        with pytest.raises(ValueError, match="betas must be"):
            opt.betas = bad
    assert opt.betas == (0.5, 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Dtypes, and text


@pytest.mark.one_in(6)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=["bf16", "f16", "f32"])
@pytest.mark.parametrize("name", MAKERS)
def test_dtypes_never_change(name: str, dtype: Any) -> None:
    model = small_net().astype(dtype)
    opt = MAKERS[name]([model])
    before = np.asarray(model[0].weight, np.float32)
    for _ in range(3):
        opt.zero_grad()
        mt.backward(squared, model, jnp.asarray(X, dtype), jnp.asarray(Y, dtype))
        opt.step()
    assert all(array.dtype == dtype for array in [*model.parameters(), *model.grads()])
    states = [value for state in opt.state_dict()["state"].values() for key, value in state.items() if key != "step"]
    assert all(value.dtype == dtype for value in states)
    assert bool(states) is (name != "Optimizer")
    assert not np.array_equal(before, np.asarray(model[0].weight, np.float32))


@pytest.mark.parametrize(("dtype", "lr"), [(jnp.bfloat16, 1.003), (jnp.float16, 1.0003)], ids=["bf16", "f16"])
def test_a_low_precision_step_is_computed_in_float32_and_rounded_once(dtype: Any, lr: float) -> None:
    """In the parameter's own precision `lr` would be 1, and the result 0."""
    point = Point(1.0, 3.0, dtype=dtype)
    for opt in (mt.Optimizer([point], lr=lr), optim.SGD([point], lr=lr, weight_decay=1e-9)):
        point.weight = jnp.asarray([1.0, 3.0], dtype)
        give(point, 1.0)
        opt.step()
        expected = np.asarray(np.float32([1.0, 3.0]) - np.float32(lr), dtype)
        assert_array_equal(np.asarray(point.weight), expected)
        assert float(point.weight[0]) < 0


def test_repr() -> None:
    point = Point(1.0)
    assert repr(mt.Optimizer([point], lr=0.1)) == "Optimizer([Point], lr=0.1)"
    opt = optim.SGD([point, NumpyLayer([1.0])], lr=0.1, momentum=0.9, nesterov=True)
    assert repr(opt) == "SGD([Point, NumpyLayer], lr=0.1, momentum=0.9, dampening=0, weight_decay=0, nesterov=True)"
    opt.lr = 0.5
    assert repr(opt).startswith("SGD([Point, NumpyLayer], lr=0.5, ")
    assert "halving" in repr(mt.Optimizer([point], lr=halving))


class Interrupting:
    """Raises a SIGINT at one of the lines of plan.py and states.py that are run: `sys.settrace(Interrupting(at))`."""

    def __init__(self, at: int) -> None:
        self.at, self.lines = at, 0

    def __call__(self, frame: Any, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.endswith(("plan.py", "states.py")):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                signal.raise_signal(signal.SIGINT)
        return self


def test_an_interrupt_while_modules_change_loses_no_state() -> None:
    a, b = nn.Linear(2, 2, key=jax.random.key(0)), nn.Linear(2, 1, key=jax.random.key(1))
    for layer in (a, b):
        layer.accumulate([jnp.ones_like(p) for p in layer.parameters()])
    interrupted = 0
    for at in range(10, 400, 9):
        opt = mt.optim.Adam([a, b], lr=0.1)
        opt.step()
        opt.step()
        try:
            sys.settrace(Interrupting(at))
            try:
                opt.modules = [b]
            finally:
                sys.settrace(None)
        except KeyboardInterrupt:
            interrupted += 1
            opt.modules = [b]
        opt.step()
        state = opt.state_dict()
        assert state["num_steps"] == 3, at
        assert {path: fields["step"] for path, fields in state["state"].items()} == {"0.weight": 3, "0.bias": 3}, at
        np.testing.assert_allclose(state["state"]["0.bias"]["exp_avg"], [1 - 0.9**3], rtol=1e-6)
    assert interrupted > 5


def test_a_learning_rate_spelt_out_is_answered_with_lr():
    with pytest.raises(
        TypeError, match=r"Adam\(\) got an unexpected keyword argument 'learning_rate'; did you mean `lr`"
    ):
        optim.Adam([nn.Linear(2, 1)], learning_rate=0.1)
