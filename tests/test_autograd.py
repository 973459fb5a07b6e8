"""`backward`, `value_and_grad` and `grad`: which modules they find, what they compute, write back, compile and refuse."""

from __future__ import annotations

import functools
import gc
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from training import Batch, Scale, small_net, squared

import minitorch_jax as mt
from minitorch_jax import nn, optim

X = np.linspace(-1, 1, 15, dtype=np.float32).reshape(5, 3)
Y = np.linspace(1, 0, 10, dtype=np.float32).reshape(5, 2)


def tiny_net(seed: int = 0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2, key=jax.random.key(seed)))


class Net(mt.Module):
    """A network whose loss is one of its methods, and what it gives when it is called."""

    def __init__(self, seed: int = 0) -> None:
        self.body = small_net(seed)

    def loss(self, x: Any, y: Any) -> Any:
        return squared(self.body, x, y)

    def forward(self, x: Any, y: Any) -> Any:
        return squared(self.body, x, y)


class RunningMean(mt.Module):
    """What BatchNorm does with its statistics: in training it uses the batch's mean and follows it, and it counts."""

    def __init__(self) -> None:
        self.mean = mt.Buffer(jnp.zeros(()))
        self.count = mt.Buffer(0)
        self.shift = mt.Parameter(jnp.zeros(()))

    def forward(self, x: Any) -> Any:
        if not self.training:
            return x - self.mean + self.shift
        mean = x.mean()
        self.mean = 0.5 * self.mean + 0.5 * jax.lax.stop_gradient(mean)
        self.count = self.count + 1
        return x - mean + self.shift


def gradients_of(model: Any) -> dict[str, np.ndarray]:
    names = [name for name, _ in model.named_parameters()]
    return {name: np.asarray(grad) for name, grad in zip(names, model.grads(), strict=True)}


def from_jax(loss_fn: Any, model: Any, *args: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """What plain JAX gives for the same loss."""
    loss, grads = jax.value_and_grad(loss_fn)(model, *args)
    return loss, {name: np.asarray(array) for name, array in grads.named_parameters()}


@functools.cache
def of_tiny_net(seed: int = 0) -> tuple[Any, dict[str, np.ndarray]]:
    return from_jax(squared, tiny_net(seed), X, Y)


def assert_same(mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray], factor: float = 1.0) -> None:
    assert list(mine) == list(theirs)
    for name, grad in mine.items():
        assert_allclose(grad, factor * theirs[name], rtol=1e-5, atol=1e-7, err_msg=name)


def assert_no_tracers(*modules: Any) -> None:
    for module in modules:
        for array in [*module.state_dict().values(), *module.grads()]:
            assert not isinstance(array, jax.core.Tracer)
            np.asarray(array)


# ---------------------------------------------------------------------------------------------------------------------
# Every way in which a loss function may come to its model


MODEL: Any = None
HOLDER = types.SimpleNamespace(model=None)
REGISTRY: dict[str, Any] = {}
STACK: list[Any] = []


class Settings:
    """A namespace in the form of a class."""

    model: Any = None


def global_loss(x: Any, y: Any) -> Any:
    return squared(MODEL, x, y)


def global_loss_through_a_function(x: Any, y: Any) -> Any:
    def predict(x: Any) -> Any:
        return MODEL(x)

    return ((predict(x) - y) ** 2).mean()


def predict_globally(x: Any) -> Any:
    return MODEL(x)


def loss_that_calls(x: Any, y: Any) -> Any:
    return ((predict_globally(x) - y) ** 2).mean()


def holder_loss(x: Any, y: Any) -> Any:
    return squared(HOLDER.model, x, y)


def registry_loss(x: Any, y: Any) -> Any:
    return squared(REGISTRY["model"], x, y)


def stack_loss(x: Any, y: Any) -> Any:
    return squared(STACK[-1], x, y)


def class_loss(x: Any, y: Any) -> Any:
    return squared(Settings.model, x, y)


def default_loss_maker(model: Any) -> Any:
    def loss(x: Any, y: Any, model: Any = model) -> Any:
        return squared(model, x, y)

    return loss


class Trainer:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.parts = {"nets": [model]}

    def loss(self, x: Any, y: Any) -> Any:
        return squared(self.model, x, y)

    def deep_loss(self, x: Any, y: Any) -> Any:
        return squared(self.parts["nets"][0], x, y)

    def indirect_loss(self, x: Any, y: Any) -> Any:
        return self.loss(x, y) * 1.0

    @property
    def net(self) -> Any:
        return self.model

    def property_loss(self, x: Any, y: Any) -> Any:
        return squared(self.net, x, y)

    def __call__(self, x: Any, y: Any) -> Any:
        return squared(self.model, x, y)


class Slotted:
    __slots__ = ("model", "__weakref__")

    def __init__(self, model: Any) -> None:
        self.model = model

    def loss(self, x: Any, y: Any) -> Any:
        return squared(self.model, x, y)


class SlottedWithoutWeakReferences:
    __slots__ = ("model",)

    def __init__(self, model: Any) -> None:
        self.model = model

    def loss(self, x: Any, y: Any) -> Any:
        return squared(self.model, x, y)


def put(place: Any, key: Any, value: Any) -> None:
    if isinstance(place, dict | list):
        place[key] = value
    else:
        setattr(place, key, value)


def nonlocal_loss(model: Any) -> tuple[Any, Any]:
    def loss(x: Any, y: Any) -> Any:
        return squared(model, x, y)

    def rebind(other: Any) -> None:
        nonlocal model
        model = other

    return loss, rebind


def nested_nonlocal_loss(model: Any) -> tuple[Any, Any]:
    def loss(x: Any, y: Any) -> Any:
        def inner() -> Any:
            return squared(model, x, y)

        return inner()

    def rebind(other: Any) -> None:
        nonlocal model
        model = other

    return loss, rebind


class Way(NamedTuple):
    """A loss function, what it is called with, and how another model takes the first one's place (if it can)."""

    loss_fn: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = {}
    rebind: Callable[[Any], None] | None = None


def attribute_of(maker: Any, method: str = "loss") -> Callable[[Any], Way]:
    def way(model: Any) -> Way:
        owner = maker(model)
        return Way(
            getattr(owner, method) if method else owner, (X, Y), rebind=lambda other: setattr(owner, "model", other)
        )

    return way


def at_module_level(loss_fn: Any, place: Any, key: Any) -> Callable[[Any], Way]:
    def way(model: Any) -> Way:
        rebind = functools.partial(put, place, key)
        if isinstance(place, list) and not place:
            place.append(None)
        rebind(model)
        return Way(loss_fn, (X, Y), rebind=rebind)

    return way


def from_nonlocal(maker: Any) -> Callable[[Any], Way]:
    def way(model: Any) -> Way:
        loss_fn, rebind = maker(model)
        return Way(loss_fn, (X, Y), rebind=rebind)

    return way


def deep_attribute(model: Any) -> Way:
    trainer = Trainer(model)
    return Way(trainer.deep_loss, (X, Y), rebind=functools.partial(put, trainer.parts["nets"], 0))


def list_argument(models: Any, data: Any) -> Any:
    return squared(models[0]["net"], data[0], data[1][0])


jitted_loss = jax.jit(squared)


@jax.custom_jvp
def halved(x: Any) -> Any:
    return x * 0.5


halved.defjvp(lambda primals, tangents: (halved(*primals), tangents[0] * 0.5))

WAYS: dict[str, Callable[[Any], Way]] = {
    "positional": lambda m: Way(squared, (m, X, Y)),
    "keyword": lambda m: Way(squared, (), {"y": Y, "model": m, "x": X}),
    "mixed": lambda m: Way(squared, (m,), {"x": X, "y": Y}),
    "in a dict": lambda m: Way(lambda d, x: squared(d["net"], x, d["y"]), ({"net": m, "y": Y}, X)),
    "in a list of a dict": lambda m: Way(list_argument, ([{"net": m}], (X, [Y]))),
    "in a named tuple": lambda m: Way(lambda batch: squared(*batch), (Batch(m, X, Y),)),
    "last": lambda m: Way(lambda x, y, model: squared(model, x, y), (X, Y, m)),
    "twice": lambda m: Way(lambda a, b, x, y: 0.5 * (squared(a, x, y) + squared(b, x, y)), (m, m, X, Y)),
    "lambda": lambda m: Way(lambda x, y: squared(m, x, y), (X, Y)),
    "without arguments": lambda m: Way(lambda: squared(m, X, Y), ()),
    "nonlocal": from_nonlocal(nonlocal_loss),
    "nonlocal, nested": from_nonlocal(nested_nonlocal_loss),
    "default": lambda m: Way(default_loss_maker(m), (X, Y)),
    "global": at_module_level(global_loss, globals(), "MODEL"),
    "global, nested": at_module_level(global_loss_through_a_function, globals(), "MODEL"),
    "global of a callee": at_module_level(loss_that_calls, globals(), "MODEL"),
    "attribute of a global": at_module_level(holder_loss, HOLDER, "model"),
    "class attribute": at_module_level(class_loss, Settings, "model"),
    "item of a dict": at_module_level(registry_loss, REGISTRY, "model"),
    "item of a list": at_module_level(stack_loss, STACK, 0),
    "bound method": attribute_of(Trainer),
    "bound method, indirect": attribute_of(Trainer, "indirect_loss"),
    "bound method, property": attribute_of(Trainer, "property_loss"),
    "bound method, deep": deep_attribute,
    "callable object": attribute_of(Trainer, "__call__"),
    "object": attribute_of(Trainer, ""),
    "slots": attribute_of(Slotted),
    "slots, no weak references": attribute_of(SlottedWithoutWeakReferences),
    "partial": lambda m: Way(functools.partial(squared, m), (X, Y)),
    "partial, keyword": lambda m: Way(functools.partial(squared, y=Y), (m, X)),
    "partial, keyword model": lambda m: Way(
        functools.partial(lambda x, y, model: squared(model, x, y), model=m), (X, Y)
    ),
    "partial of a partial": lambda m: Way(functools.partial(functools.partial(squared, m), X), (Y,)),
    "partial of a method": lambda m: Way(functools.partial(Trainer(m).loss, X), (Y,)),
    "jitted": lambda m: Way(jitted_loss, (m, X, Y)),
    "checkpointed": lambda m: Way(jax.checkpoint(squared), (m, X, Y)),
    "checkpointed inside": lambda m: Way(lambda x, y: jax.checkpoint(lambda x: squared(m, x, y))(x), (X, Y)),
    "custom derivative": lambda m: Way(lambda x, y: 2 * halved(squared(m, x, y)), (X, Y)),
    "wrapped": lambda m: Way(functools.wraps(squared)(lambda *args: squared(*args)), (m, X, Y)),
}


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """What one test has put at module level is gone for the next."""
    yield
    globals()["MODEL"] = HOLDER.model = Settings.model = None
    REGISTRY.clear(), STACK.clear()


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", WAYS)
def test_backward_finds_the_model(name: str) -> None:
    model = tiny_net()
    expected_loss, expected = of_tiny_net()
    way = WAYS[name](model)
    for times in (1, 2):
        loss = mt.backward(way.loss_fn, *way.args, **way.kwargs)
        assert isinstance(loss, jax.Array) and loss.shape == () and loss.dtype == jnp.float32
        assert_allclose(loss, expected_loss, rtol=1e-6)
        assert_same(gradients_of(model), expected, factor=times)
    model.zero_grad()
    model.eval().load_state_dict(tiny_net(1).state_dict())  # other values, and another program
    expected_loss, expected = of_tiny_net(1)
    assert_allclose(mt.backward(way.loss_fn, *way.args, **way.kwargs), expected_loss, rtol=1e-6)
    assert_same(gradients_of(model), expected)
    assert_no_tracers(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_value_and_grad_finds_the_model(name: str) -> None:
    model = tiny_net()
    expected_loss, expected = of_tiny_net()
    way = WAYS[name](model)
    for _ in range(2):
        loss, grads = mt.value_and_grad(way.loss_fn)(*way.args, **way.kwargs)
        assert type(grads) is nn.Sequential
        assert_allclose(loss, expected_loss, rtol=1e-6)
        assert_same({k: np.asarray(v) for k, v in grads.named_parameters()}, expected)
    assert all(not np.any(grad) for grad in model.grads())


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", [name for name in WAYS if WAYS[name](None).rebind is not None])
@pytest.mark.parametrize("when", ["made before", "made after"])
def test_another_model_in_its_place_is_noticed(name: str, when: str) -> None:
    """Also when that model is older than the last call, so that nothing about any module's structure has changed."""
    first, second = tiny_net(0), tiny_net(1)
    second.zero_grad()
    way = WAYS[name](first)
    for _ in range(2):
        first.zero_grad()
        mt.backward(way.loss_fn, *way.args)
    first.zero_grad()
    if when == "made after":
        second = tiny_net(1)
    assert way.rebind is not None
    way.rebind(second)
    assert_allclose(mt.backward(way.loss_fn, *way.args), of_tiny_net(1)[0], rtol=1e-6)
    assert_same(gradients_of(second), of_tiny_net(1)[1])
    assert all(not np.any(grad) for grad in first.grads())
    way.rebind(first)
    assert_allclose(mt.backward(way.loss_fn, *way.args), of_tiny_net(0)[0], rtol=1e-6)
    assert_same(gradients_of(first), of_tiny_net(0)[1])
    assert_same(gradients_of(second), of_tiny_net(1)[1])


@pytest.mark.parametrize("by", ["argument", "closure", "class attribute", "live list"])
def test_a_penalty_on_all_parameters(by: str) -> None:
    """`parameters()` inside the loss, as a PyTorch user writes weight decay."""
    model = tiny_net()
    params = model.parameters()
    Settings.model = model

    def penalty(arrays: Any) -> Any:
        return 0.5 * sum((p**2).sum() for p in arrays)

    loss_fn, args = {
        "argument": (lambda model: penalty(model.parameters()), (model,)),
        "closure": (lambda: penalty(model.parameters()), ()),
        "class attribute": (lambda: penalty(Settings.model.parameters()), ()),
        "live list": (lambda: penalty(params), ()),
    }[by]
    for factor in (1, 2):
        mt.backward(loss_fn, *args)
        assert_same(gradients_of(model), {name: np.asarray(p) for name, p in model.named_parameters()}, factor)


def test_an_optimizers_numbers_read_in_the_loss_are_not_frozen_at_the_first_trace() -> None:
    scale = Scale(2.0)
    opt = mt.Optimizer([scale], lr=0.5)

    def loss_fn(x: Any) -> Any:
        return scale(x) * opt.lr

    assert float(mt.backward(loss_fn, 1.0)) == 1.0
    opt.lr = 0.25
    scale.zero_grad()
    assert float(mt.backward(loss_fn, 1.0)) == 0.5
    assert float(scale.grads()[0]) == 0.25


def test_a_method_of_a_module_and_a_module_as_loss_functions() -> None:
    net = Net()
    loss, expected = from_jax(lambda net, x, y: net.loss(x, y), net, X, Y)
    calls = [(net.loss, X, Y), (net, X, Y), (Net.loss, net, X, Y), (functools.partial(net.loss, X), Y)]
    for times, call in enumerate(calls, 1):
        assert_allclose(mt.backward(*call), loss, rtol=1e-6)
        assert_same(gradients_of(net), expected, factor=times)
    other = Net(1)
    assert_allclose(mt.backward(other, X, Y), squared(other.body, X, Y), rtol=1e-6)
    assert_allclose(mt.backward(other.loss, X, y=Y), squared(other.body, X, Y), rtol=1e-6)
    _, grads = mt.value_and_grad(net.loss)(X, Y)
    assert type(grads) is Net
    _, grads = mt.value_and_grad(net)(X, Y)
    assert type(grads) is Net
    assert_same({k: np.asarray(v) for k, v in grads.named_parameters()}, expected)


def test_several_modules() -> None:
    a, b, unused, by_closure = Scale(2.0), Scale(3.0), Scale(5.0), Scale(7.0)

    def loss_fn(models: Any, x: Any) -> Any:
        return models["a"](models["b"](by_closure(x)))

    models = {"a": a, "b": b, "unused": unused}
    assert float(mt.backward(loss_fn, models, 0.5)) == 21.0
    assert [float(m.grads()[0]) for m in (a, b, by_closure, unused)] == [10.5, 7.0, 3.0, 0.0]
    loss, grads = mt.value_and_grad(loss_fn)(models, 0.5)
    assert [float(g.weight) for g in grads] == [10.5, 7.0, 3.0]
    optimizer = mt.Optimizer([a, b, by_closure], lr=1.0)
    optimizer.step()
    assert [float(m.weight) for m in (a, b, by_closure)] == [2 - 10.5, 3 - 7.0, 7 - 3.0]


def test_modules_that_hold_modules_in_containers() -> None:
    class Many(mt.Module):
        def __init__(self) -> None:
            self.layers = [Scale(2.0), Scale(3.0)]
            self.named = {"a": Scale(5.0)}
            self.pair = (Scale(7.0), "static")

        def forward(self, x: Any) -> Any:
            for layer in [*self.layers, self.named["a"], self.pair[0]]:
                x = layer(x)
            return x

    many = Many()
    assert float(mt.backward(many, 1.0)) == 210.0
    assert [float(g) for g in many.grads()] == [105.0, 70.0, 42.0, 30.0]
    many.layers.append(Scale(11.0))
    assert float(mt.backward(many, 1.0)) == 2310.0
    assert [float(g) for g in many.grads()] == [105.0 * 12, 70.0 * 12, 210.0, 42.0 * 12, 30.0 * 12]


def test_a_submodule_as_argument_and_the_whole_by_closure() -> None:
    net = small_net()
    loss, expected = from_jax(squared, net, X, Y)

    def loss_fn(last: Any, x: Any, y: Any) -> Any:
        return ((last(net[1](net[0](x))) - y) ** 2).mean()

    for times in (1, 2):
        assert_allclose(mt.backward(loss_fn, net[2], X, Y), loss, rtol=1e-6)
        assert_same(gradients_of(net), expected, factor=times)


def test_tied_weights_have_one_gradient_the_sum() -> None:
    a, b = Scale(2.0), Scale(3.0)
    b.tie("weight", a, "weight")

    def loss_fn(a: Any, b: Any, x: Any) -> Any:
        return a(x) + 10.0 * b(x)

    assert float(mt.backward(loss_fn, a, b, 1.0)) == 22.0
    assert float(a.grads()[0]) == float(b.grads()[0]) == 11.0
    both = nn.ModuleList([a, b])
    assert len(both.parameters()) == 1
    assert float(mt.backward(lambda both, x: loss_fn(both[0], both[1], x), both, 1.0)) == 22.0
    assert float(a.grads()[0]) == 22.0


def test_frozen_parameters_get_none() -> None:
    net = small_net()
    _, expected = from_jax(squared, net, X, Y)
    net[0].freeze()
    assert_allclose(mt.backward(squared, net, X, Y), squared(net, X, Y), rtol=1e-6)
    assert_same(gradients_of(net), {name: g for name, g in expected.items() if name.startswith("2.")})
    _, grads = mt.value_and_grad(squared)(net, X, Y)
    assert all(not np.any(np.asarray(grads.state_dict()[name])) for name in ("0.weight", "0.bias"))
    assert_allclose(grads[2].weight, expected["2.weight"], rtol=1e-5)
    net[0].unfreeze()
    assert all(not np.any(grad) for grad in net[0].grads())
    net.zero_grad()
    mt.backward(squared, net, X, Y)
    assert_same(gradients_of(net), expected)


def test_frozen_parameters_cost_nothing() -> None:
    """No derivative is taken where nothing is trained: a rule that would raise is never asked."""

    @jax.custom_vjp
    def fragile(x: Any) -> Any:
        return x * 2.0

    def refuse(*args: Any) -> Any:
        raise AssertionError("the backward pass of a frozen part was built")

    fragile.defvjp(lambda x: (x * 2.0, None), refuse)
    frozen, head = Scale(3.0), Scale(1.0)

    def loss_fn(x: Any) -> Any:
        return head(fragile(frozen(x)))

    with pytest.raises(AssertionError, match="was built"):
        mt.backward(loss_fn, 1.0)
    frozen.freeze()
    assert float(mt.backward(loss_fn, 1.0)) == 6.0
    assert float(head.grads()[0]) == 6.0


def test_stop_gradient_and_unused_parameters_give_zeros() -> None:
    a, b = Scale(2.0), Scale(3.0)
    both = nn.ModuleList([a, b])
    assert float(mt.backward(lambda both: both[0](1.0) * jax.lax.stop_gradient(both[1](1.0)), both)) == 6.0
    assert [float(g) for g in both.grads()] == [3.0, 0.0]


# ---------------------------------------------------------------------------------------------------------------------
# Arguments and results


def test_auxiliary_results() -> None:
    scale = Scale(2.0)

    def loss_fn(scale: Any, x: Any) -> Any:
        out = scale(x)
        aux = {"out": out, "twice": (2 * out, None), "name": "mean", "flag": True, "module": scale, "size": x.shape[0]}
        return out.mean(), aux

    x = jnp.array([1.0, 3.0])
    for _ in range(2):
        loss, aux = mt.backward(loss_fn, scale, x, has_aux=True)
        assert float(loss) == 4.0
        assert_array_equal(aux["out"], [2.0, 6.0])
        assert_array_equal(aux["twice"][0], [4.0, 12.0])
        assert aux["twice"][1] is None
        assert (aux["name"], aux["flag"], aux["size"]) == ("mean", True, 2)
        assert aux["module"] is scale
    assert float(scale.grads()[0]) == 4.0
    (loss, aux), grads = mt.value_and_grad(loss_fn, has_aux=True)(scale, x)
    assert (float(loss), float(grads.weight), aux["name"]) == (4.0, 2.0, "mean")
    assert aux["module"] is scale
    grads, aux = mt.grad(loss_fn, has_aux=True)(scale, x)
    assert float(grads.weight) == 2.0
    assert_array_equal(aux["out"], [2.0, 6.0])
    assert mt.backward(loss_fn, scale, jnp.ones(3), has_aux=True)[1]["size"] == 3


def test_auxiliary_results_of_another_model_are_its_own() -> None:
    def loss_fn(scale: Any, x: Any) -> Any:
        return scale(x), (scale, scale.weight)

    for scale in (Scale(2.0), Scale(3.0), Scale(4.0)):
        loss, (module, weight) = mt.backward(loss_fn, scale, 1.0, has_aux=True)
        assert module is scale
        assert float(weight) == float(loss) == float(scale.weight)
        assert not isinstance(weight, jax.core.Tracer)


def test_a_module_made_in_the_loss_function_can_be_returned() -> None:
    scale = Scale(2.0)

    def loss_fn(x: Any) -> Any:
        made = nn.Linear(1, 1, key=jax.random.key(0))
        made.bias = scale(x)[None]
        return scale(x), made

    _, made = mt.backward(loss_fn, 3.0, has_aux=True)
    assert type(made) is nn.Linear
    assert_array_equal(made.bias, [6.0])
    assert_no_tracers(made, scale)


def test_an_array_that_is_returned_or_read_stays_valid() -> None:
    model = RunningMean()

    def loss_fn(model: Any, x: Any) -> Any:
        return model(x).sum(), (model.mean, x, model.shift)

    x = jnp.array([1.0, 3.0])
    _, (mean, same_x, shift) = mt.backward(loss_fn, model, x, has_aux=True)
    weight, grad = model.shift, model.grads()[0]
    opt = mt.Optimizer([model], lr=1.0)
    for _ in range(3):
        mt.backward(loss_fn, model, x, has_aux=True)
        opt.step()
    assert float(mean) == 1.0
    assert_array_equal(same_x, [1.0, 3.0])
    assert_array_equal(x, [1.0, 3.0])
    assert float(shift) == float(weight) == 0.0
    assert float(grad) == 2.0


def test_static_arguments() -> None:
    scale = Scale(2.0)
    seen = []

    def loss_fn(scale: Any, x: Any, mode: str, square: bool, shape: Any = None, activation: Any = None) -> Any:
        seen.append((mode, square))
        out = scale(x)
        if mode == "double":
            out = 2 * out
        if square:
            out = out**2
        if activation is not None:
            out = activation(out)
        return out

    def call(*args: Any, **kwargs: Any) -> float:
        scale.zero_grad()
        return float(mt.backward(loss_fn, scale, *args, **kwargs))

    assert call(1.5, "plain", False) == 3.0
    assert call(1.5, "double", False) == 6.0
    assert call(1.5, mode="double", square=True) == 36.0
    assert call(2.0, "plain", False) == 4.0
    assert seen == [("plain", False), ("double", False), ("double", True)]
    assert call(-1.5, "plain", False, activation=jnp.abs) == 3.0
    assert call(-1.5, "plain", False, activation=jax.nn.relu) == 0.0


def test_one_and_true_are_not_one_static_argument() -> None:
    scale = Scale(2.0)

    def loss_fn(scale: Any, flag: Any) -> Any:
        return scale(3.0) if flag is True else scale(5.0)

    assert float(mt.backward(loss_fn, scale, True)) == 6.0
    assert float(mt.backward(loss_fn, scale, 1)) == 10.0
    assert float(mt.backward(loss_fn, scale, False)) == 10.0
    assert float(mt.backward(loss_fn, scale, True)) == 6.0


NUMBERS = [3.0, 3, np.float32(3), np.float64(3), np.array(3.0), np.array(3.0, np.float32), jnp.asarray(3.0)]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: f"{type(n).__name__}-{getattr(n, 'dtype', '')}")
def test_numbers_are_data(number: Any) -> None:
    scale, seen = Scale(2.0), []

    def loss_fn(scale: Any, x: Any, by_name: Any = 0.0) -> Any:
        seen.append(x)
        return scale(jnp.asarray(x, jnp.float32) + jnp.asarray(by_name, jnp.float32))

    def call(*args: Any, **kwargs: Any) -> tuple[float, float]:
        scale.zero_grad()
        return float(mt.backward(loss_fn, scale, *args, **kwargs)), float(scale.grads()[0])

    assert call(number) == (6.0, 3.0)
    assert call(number * 2) == (12.0, 6.0)
    assert len(seen) == 1
    assert call(number, by_name=number) == (12.0, 6.0)
    assert call(number, by_name=number * 3) == (24.0, 12.0)
    assert len(seen) == 2


def test_numpy_data_and_pytrees_of_it() -> None:
    model = small_net()
    _, expected = from_jax(squared, model, X, Y)

    def loss_fn(model: Any, batch: Any) -> Any:
        return squared(model, batch["x"], batch["y"][0])

    assert mt.backward(loss_fn, model, {"x": X, "y": [Y]}).dtype == jnp.float32
    mt.backward(loss_fn, model, {"x": X.astype(np.float64), "y": [Y.astype(np.float64)]})
    mt.backward(loss_fn, model, {"x": jnp.asarray(X), "y": [Y]})
    mt.backward(loss_fn, model, {"x": np.asfortranarray(X), "y": [Y[::-1][::-1]]})
    assert_same(gradients_of(model), expected, factor=4)


def test_integer_labels_and_none_and_empty_containers() -> None:
    model = small_net()
    labels = np.array([0, 1, 1, 0, 1])

    def loss_fn(model: Any, x: Any, labels: Any, mask: Any = None, extra: Any = ()) -> Any:
        assert mask is None and not extra
        return nn.functional.cross_entropy(model(x), labels)

    loss, expected = from_jax(loss_fn, model, jnp.asarray(X), jnp.asarray(labels))
    assert_allclose(mt.backward(loss_fn, model, X, labels), loss, rtol=1e-6)
    assert_allclose(mt.backward(loss_fn, model, X, labels, None, []), loss, rtol=1e-6)
    assert_allclose(mt.backward(loss_fn, model, X, labels, extra={}), loss, rtol=1e-6)
    assert_same(gradients_of(model), expected, factor=3)


def test_random_keys_are_data() -> None:
    scale, seen = Scale(2.0), []

    def loss_fn(scale: Any, key: Any) -> Any:
        seen.append(1)
        return scale(jax.random.uniform(key))

    for seed in (0, 1):
        key = jax.random.key(seed)
        scale.zero_grad()
        assert_allclose(mt.backward(loss_fn, scale, key), 2 * float(jax.random.uniform(key)), rtol=1e-6)
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["f32", "bf16", "f16"])
def test_gradients_have_the_parameters_dtype(dtype: Any) -> None:
    model = small_net().astype(dtype)
    loss = mt.backward(squared, model, jnp.asarray(X, dtype), jnp.asarray(Y, dtype))
    assert loss.dtype == dtype
    assert [(g.dtype, g.shape) for g in model.grads()] == [(p.dtype, p.shape) for p in model.parameters()]
    assert all(g.dtype == dtype and np.any(np.asarray(g, np.float32)) for g in model.grads())


def test_mt_grad() -> None:
    model = small_net()
    _, expected = from_jax(squared, model, X, Y)
    grads = mt.grad(squared)(model, X, y=Y)
    assert_same({k: np.asarray(v) for k, v in grads.named_parameters()}, expected)
    assert all(not np.any(grad) for grad in model.grads())
    assert mt.grad(squared).__name__ == mt.value_and_grad(squared).__name__ == "squared"


def test_gradients_are_modules_for_tree_map() -> None:
    model = small_net()
    model[0].freeze()
    model.append(RunningMean())
    before = {name: np.asarray(array) for name, array in model.state_dict().items()}
    _, grads = mt.value_and_grad(squared)(model, X, Y)
    assert jax.tree.structure(grads) == jax.tree.structure(model)
    new = jax.tree.map(lambda p, g: p - 0.5 * g, model, grads)
    assert type(new) is nn.Sequential
    assert_array_equal(new[0].weight, before["0.weight"])
    assert_allclose(new[2].weight, before["2.weight"] - 0.5 * np.asarray(grads[2].weight), rtol=1e-6)
    assert np.any(np.asarray(grads[2].weight))
    assert int(new[3].count) == int(model[3].count) == 1
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
    assert_allclose(norm, np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(grads))), rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Accumulating


def test_gradients_of_jax_feed_the_same_step() -> None:
    ours, theirs = small_net(), small_net()
    opt, other = optim.SGD([ours], lr=0.1, momentum=0.9), optim.SGD([theirs], lr=0.1, momentum=0.9)
    for source in (jax.grad(squared), mt.grad(squared), jax.jit(jax.grad(squared))):
        ours.zero_grad(), theirs.zero_grad()
        mt.backward(squared, ours, X, Y)
        assert theirs.accumulate(source(theirs, X, Y)) is None
        opt.step(), other.step()
        assert_allclose(ours[0].weight, theirs[0].weight, rtol=1e-5)
        assert_allclose(ours[2].bias, theirs[2].bias, rtol=1e-5)


def test_accumulate_adds() -> None:
    model = small_net()
    _, expected = from_jax(squared, model, X, Y)
    grads = mt.grad(squared)(model, X, Y)
    mt.backward(squared, model, X, Y)
    model.accumulate(grads)
    model.accumulate(jax.tree.map(lambda g: 2 * g, grads))
    model.accumulate([np.asarray(g) for g in grads.parameters()])
    assert_same(gradients_of(model), expected, factor=5)
    assert_same({k: np.asarray(v) for k, v in grads.named_parameters()}, expected)


def test_accumulate_leaves_frozen_parameters_out() -> None:
    model = small_net()
    model[0].freeze()
    grads = jax.grad(squared)(model, X, Y)
    model.accumulate(grads)
    assert list(gradients_of(model)) == ["2.weight", "2.bias"]
    assert_allclose(model.grads()[0], grads[2].weight, rtol=1e-6)
    model[0].unfreeze()
    assert not np.any(model.grads()[0])


def accumulated(model: Any) -> list[np.ndarray]:
    return [np.asarray(grad) for grad in model.grads()]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda g: g[:-1], "3 gradients were given for 4 trainable parameters"),
        (lambda g: [*g, g[0]], "5 gradients were given for 4"),
        (lambda g: [g[0], g[1], g[2], g[3][:1]], r"gradient of 2\.bias.*\(1,\).*\(2,\)"),
        (lambda g: [g[0].T, *g[1:]], r"gradient of 0\.weight.*\(3, 4\).*\(4, 3\)"),
        (lambda g: [g[0], g[1].astype(jnp.bfloat16), *g[2:]], r"gradient of 0\.bias.*bfloat16.*float32"),
        (lambda g: [g[0], g[1].astype(jnp.int32), *g[2:]], r"gradient of 0\.bias.*int32.*float32"),
        (lambda g: small_net()[0], "Linear of another structure than this Sequential"),
        (lambda g: Scale(), "Scale of another structure than this Sequential"),
        (lambda g: nn.Sequential(*small_net(), nn.ReLU()), "another structure"),
    ],
    ids=["few", "many", "shape", "transposed", "bfloat16", "int32", "part", "other", "more"],
)
def test_accumulate_refuses_what_does_not_fit_and_changes_nothing(make: Any, message: str) -> None:
    model = small_net()
    mt.backward(squared, model, X, Y)
    before = accumulated(model)
    with pytest.raises(ValueError, match=message):
        model.accumulate(make([jnp.ones_like(p) for p in model.parameters()]))
    assert all(np.array_equal(a, b) for a, b in zip(before, accumulated(model), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# State that the loss changes


def test_buffers_are_written_back() -> None:
    model = RunningMean()
    x = jnp.array([1.0, 3.0])
    means = []
    for _ in range(3):
        mt.backward(lambda model, x: model(x).sum(), model, x)
        means.append(float(model.mean))
    assert means == [1.0, 1.5, 1.75]
    assert int(model.count) == 3
    assert model.count.dtype == jnp.int32
    assert float(model.grads()[0]) == 6.0
    assert_no_tracers(model)


@pytest.mark.parametrize("reach", ["beside the model", "alone", "alone, with groups"])
@pytest.mark.parametrize("stepped", [False, True])
def test_gradients_of_a_loss_that_reaches_an_optimizer(reach: str, stepped: bool) -> None:
    """They have the structure of the model, not that of the optimizer, which holds the same parameters."""
    model = Scale(2.0)
    opt = mt.Optimizer([{"modules": [model], "lr": 0.0}] if reach.endswith("groups") else [model], lr=0.0)
    trainer = SimpleNamespace(model=model, opt=opt) if reach.startswith("beside") else None

    def loss_fn(x: Any) -> Any:
        return 3.0 * (trainer.model if trainer else opt.modules[0])(x)

    if stepped:
        mt.backward(loss_fn, 1.0)
        opt.step()
    loss, grads = mt.value_and_grad(loss_fn)(1.0)
    assert type(grads) is Scale
    assert (float(loss), float(grads.weight)) == (6.0, 3.0)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("reach", ["argument", "closure", "value_and_grad", "grad", "method"])
def test_buffers_are_written_back_however_the_model_is_reached(reach: str) -> None:
    model, x = RunningMean(), jnp.array([1.0, 3.0])
    calls: dict[str, Any] = {
        "argument": lambda: mt.backward(lambda m, x: m(x).sum(), model, x),
        "closure": lambda: mt.backward(lambda x: model(x).sum(), x),
        "value_and_grad": lambda: mt.value_and_grad(lambda m, x: m(x).sum())(model, x),
        "grad": lambda: mt.grad(lambda m, x: m(x).sum())(model, x),
        "method": lambda: mt.backward(lambda x: types.SimpleNamespace(m=model).m(x).sum(), x),
    }
    calls[reach]()
    assert (float(model.mean), int(model.count)) == (1.0, 1)
    calls[reach]()
    assert (float(model.mean), int(model.count)) == (1.5, 2)
    model.eval()
    calls[reach]()
    assert (float(model.mean), int(model.count)) == (1.5, 2)


def test_buffers_of_a_frozen_module_and_of_one_without_parameters_are_written_back() -> None:
    class Counter(mt.Module):
        def __init__(self) -> None:
            self.calls = mt.Buffer(jnp.zeros((), jnp.int32))

        def forward(self, x: Any) -> Any:
            self.calls = self.calls + 1
            return x

    frozen, counter, head = RunningMean().freeze(), Counter(), Scale(2.0)
    for i in (1, 2, 3):
        mt.backward(lambda x: head(counter(counter(frozen(x)))).sum(), jnp.array([1.0, 3.0]))
        assert int(counter.calls) == 2 * i
        assert int(frozen.count) == i
    assert float(head.grads()[0]) == 0.0


def test_a_parameter_that_the_loss_replaces_is_written_back() -> None:
    """Weight normalisation in `forward`, say."""

    class Clamped(Scale):
        def forward(self, x: Any) -> Any:
            self.weight = jnp.clip(self.weight, -1.0, 1.0)
            return self.weight * x

    scale = Clamped(0.5)
    assert float(mt.backward(scale, 3.0)) == 1.5
    assert (float(scale.weight), float(scale.grads()[0])) == (0.5, 3.0)
    scale.weight = 4.0
    assert float(mt.backward(scale, 3.0)) == 3.0
    assert (float(scale.weight), float(scale.grads()[0])) == (1.0, 3.0)


@pytest.mark.parametrize("what", ["zero_grad", "accumulate", "grads"])
def test_gradients_handled_inside_the_loss_are_not_forgotten(what: str) -> None:
    """Taking part in the call or being refused are both answers; being ignored, or no end of tracing, is not."""
    scale = Scale(2.0)
    mt.backward(scale, 3.0)
    traces = []

    def loss_fn(scale: Any, x: Any) -> Any:
        traces.append(1)
        if len(traces) > 10:
            raise RecursionError("traced for ever")
        if what == "zero_grad":
            scale.zero_grad()
        if what == "accumulate":
            scale.accumulate([jnp.ones(())])
        return scale(x) + (scale.grads()[0] if what == "grads" else 0.0)

    try:
        loss = float(mt.backward(loss_fn, scale, 5.0))
    except mt.TraceError:
        assert float(scale.grads()[0]) == 3.0
    else:
        assert loss == (13.0 if what == "grads" else 10.0)
        assert float(scale.grads()[0]) == {"zero_grad": 5.0, "accumulate": 9.0, "grads": 8.0}[what]


# ---------------------------------------------------------------------------------------------------------------------
# How often a loss is traced


class Traces:
    """A loss function that notes each time that Python runs it."""

    def __init__(self) -> None:
        self.count = 0

    def loss(self, model: Any, x: Any, y: Any) -> Any:
        self.count += 1
        return squared(model, x, y)


def traced_loss() -> tuple[Any, list[Any]]:
    seen: list[Any] = []

    def loss_fn(model: Any, x: Any, y: Any) -> Any:
        seen.append(x.shape)
        return squared(model, x, y)

    return loss_fn, seen


def forms_of(loss_fn: Any) -> dict[str, Any]:
    return {
        "backward": lambda *args: mt.backward(loss_fn, *args),
        "value_and_grad": lambda *args: mt.value_and_grad(loss_fn)(*args),
        "grad": lambda *args: mt.grad(loss_fn)(*args),
    }


@pytest.mark.parametrize("form", ["backward", "value_and_grad", "grad"])
def test_one_trace_for_new_values_and_new_models(form: str) -> None:
    loss_fn, seen = traced_loss()
    call = forms_of(loss_fn)[form]
    model = small_net()
    opt = optim.SGD([model], lr=0.1, momentum=0.9)
    for step in range(4):
        call(model, X * step, Y)
        opt.lr = 0.1 / (step + 1)
        opt.zero_grad()
        model.load_state_dict(small_net(step).state_dict())
    for seed in range(4):
        call(small_net(seed), X, Y)
    assert seen == [(5, 3)]


def test_one_trace_for_new_models_by_closure() -> None:
    seen = []
    trainer = Trainer(small_net())

    def loss_fn(x: Any, y: Any) -> Any:
        seen.append(1)
        return squared(trainer.model, x, y)

    for seed in range(4):
        trainer.model = small_net(seed)
        loss = mt.backward(loss_fn, X, Y)
        assert_allclose(loss, squared(trainer.model, X, Y), rtol=1e-6)
    assert len(seen) == 1


def test_one_trace_for_a_method_of_one_object() -> None:
    traces, model = Traces(), small_net()
    for _ in range(3):
        model.zero_grad()
        mt.backward(traces.loss, model, X, Y)
    assert traces.count == 1


def test_one_trace_for_all_modules_of_a_class_as_loss_functions() -> None:
    seen = []

    class Noted(Net):
        def forward(self, x: Any, y: Any) -> Any:
            seen.append(1)
            return super().forward(x, y)

    for seed in range(3):
        net = Noted(seed)
        assert_allclose(mt.backward(net, X, Y), squared(net.body, X, Y), rtol=1e-6)
    assert len(seen) == 1


def test_one_trace_whether_there_are_gradients_already_or_not() -> None:
    """Zeros to begin with, and zeros that have been added to, are values like others."""
    loss_fn, seen = traced_loss()
    model = small_net()
    for _ in range(3):
        mt.backward(loss_fn, model, X, Y)
    model.zero_grad()
    mt.backward(loss_fn, model, X, Y)
    assert seen == [(5, 3)]


def test_a_new_shape_or_dtype_is_traced_once() -> None:
    loss_fn, seen = traced_loss()
    model = small_net()
    for _ in range(3):
        for rows in (5, 3, 1):
            model.zero_grad()
            mt.backward(loss_fn, model, X[:rows], Y[:rows])
    assert seen == [(5, 3), (3, 3), (1, 3)]
    other = small_net(1)
    for rows in (5, 3, 1):
        other.zero_grad()
        assert_allclose(mt.backward(loss_fn, other, X[:rows], Y[:rows]), squared(other, X[:rows], Y[:rows]), rtol=1e-6)
    assert len(seen) == 3
    half = small_net().astype(jnp.bfloat16)
    for _ in range(2):
        half.zero_grad()
        mt.backward(loss_fn, half, jnp.asarray(X, jnp.bfloat16), jnp.asarray(Y, jnp.bfloat16))
    assert len(seen) == 4
    wide = nn.Sequential(nn.Linear(3, 8, key=jax.random.key(0)), nn.Tanh(), nn.Linear(8, 2, key=jax.random.key(1)))
    for _ in range(2):
        wide.zero_grad()
        mt.backward(loss_fn, wide, X, Y)
    assert len(seen) == 5


def test_training_and_evaluation_are_two_traces_in_all() -> None:
    loss_fn, seen = traced_loss()
    model = small_net()
    for mode in (True, False, True, False, True, True, False):
        model.train(mode)
        model.zero_grad()
        mt.backward(loss_fn, model, X, Y)
    mt.backward(loss_fn, small_net(1).eval(), X, Y)
    assert len(seen) == 2


def test_a_static_attribute_and_freezing_are_one_trace_each() -> None:
    class Powers(Scale):
        def __init__(self, power: int) -> None:
            super().__init__(2.0)
            self.power = power

        def forward(self, x: Any) -> Any:
            seen.append(self.power)
            return self.weight**self.power * x

    seen: list[int] = []
    model = Powers(1)
    for power, expected in ((1, 3.0), (2, 6.0), (1, 3.0), (2, 6.0)):
        model.power = power
        model.zero_grad()
        assert float(mt.backward(model, 1.5)) == expected
    assert float(mt.backward(Powers(2), 1.5)) == 6.0
    assert seen == [1, 2]
    pair = nn.Sequential(Powers(1), Powers(2))
    for i in range(4):
        pair[0].requires_grad_(i % 2 == 0)
        assert float(mt.backward(lambda pair, x: pair(x), pair, 1.0)) == 8.0
        assert len(pair.grads()) == 2 - i % 2


def test_the_matmul_precision_in_force_is_honoured() -> None:
    seen: list[Any] = []

    def loss_fn(model: Any, x: Any, y: Any) -> Any:
        seen.append(jax.config.jax_default_matmul_precision)
        return squared(model, x, y)

    model = small_net()
    for _ in range(2):
        model.zero_grad()
        mt.backward(loss_fn, model, X, Y)
        model.zero_grad()
        with jax.default_matmul_precision("highest"):
            mt.backward(loss_fn, model, X, Y)
            mt.backward(loss_fn, small_net(1), X, Y)
        with jax.default_matmul_precision("bfloat16"):
            mt.grad(loss_fn)(model, X, Y)
    assert seen == [None, "highest", "bfloat16"]


def test_the_matmul_precision_reaches_the_compiled_program() -> None:
    """Read off the program: on a CPU all precisions give the same numbers."""
    model = nn.Linear(3, 2, key=jax.random.key(0))

    def loss_fn(model: Any, x: Any) -> Any:
        return model(x).sum()

    def precisions() -> str:
        return str(jax.make_jaxpr(lambda model, x: mt.value_and_grad(loss_fn)(model, x)[0])(model, X))

    assert "HIGHEST" not in precisions()
    with jax.default_matmul_precision("highest"):
        assert "HIGHEST" in precisions()
    assert "HIGHEST" not in precisions()


def test_functions_are_not_kept_alive() -> None:
    model = small_net()

    def loss_fn(model: Any, x: Any, y: Any) -> Any:
        return squared(model, x, y)

    mt.backward(loss_fn, model, X, Y)
    mt.value_and_grad(loss_fn)(model, X, Y)
    reference, net = weakref.ref(loss_fn), weakref.ref(model)
    del loss_fn, model
    gc.collect()
    assert reference() is None
    assert net() is None


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def returning(value: Any) -> Any:
    def my_loss(model: Any, x: Any) -> Any:
        return value(model(x)) if callable(value) else value

    return my_loss


BAD_LOSSES: dict[str, tuple[Any, str]] = {
    "vector": (lambda out: out, r"my_loss must return a scalar loss; it returned float32\[5, ?2\].*mean"),
    "one element": (lambda out: out.sum()[None], r"my_loss must return a scalar loss; it returned float32\[1\]"),
    "int array": (lambda out: out.sum().astype(jnp.int32), "my_loss must return a floating loss; it returned int32"),
    "bool array": (lambda out: out.sum() > 0, "my_loss must return a floating loss; it returned bool"),
    "complex": (lambda out: out.sum().astype(jnp.complex64), "my_loss must return a floating loss.*complex64"),
    "int": (3, "my_loss must return a scalar floating loss; it returned a int"),
    "bool": (True, "my_loss must return a scalar floating loss; it returned a bool"),
    "None": (None, "my_loss must return a scalar floating loss; it returned a NoneType"),
    "tuple": (lambda out: (out.sum(), out), r"my_loss must return .* it returned a tuple.*has_aux=True.*\(loss, aux\)"),
    "list": (lambda out: [out.sum()], "my_loss must return .* it returned a list"),
    "dict": (lambda out: {"loss": out.sum()}, "my_loss must return .* it returned a dict"),
    "string": ("3.0", "my_loss must return a scalar floating loss; it returned a str"),
    "module": (lambda out: Scale(), "my_loss must return a scalar floating loss; it returned a Scale"),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", BAD_LOSSES)
def test_what_is_no_loss_is_an_error_that_says_what_it_is(name: str) -> None:
    value, message = BAD_LOSSES[name]
    model = small_net()
    mt.backward(squared, model, X, Y)
    before = accumulated(model)
    loss_fn = returning(value)
    for _ in range(2):
        for call in (lambda: mt.backward(loss_fn, model, X), lambda: mt.value_and_grad(loss_fn)(model, X)):
            with pytest.raises(TypeError, match=message):
                call()
    assert all(np.array_equal(a, b) for a, b in zip(before, accumulated(model), strict=True))
    assert_no_tracers(model)


@pytest.mark.parametrize(
    "value", [lambda out: out.sum(), lambda out: (out.sum(),), lambda out: (out.sum(), 1, 2), None], ids=range(4)
)
def test_has_aux_needs_a_pair(value: Any) -> None:
    with pytest.raises(TypeError, match=r"with has_aux=True, my_loss must return \(loss, aux\); it returned a"):
        mt.backward(returning(value), small_net(), X, has_aux=True)


def test_the_loss_of_a_pair_is_checked_too() -> None:
    with pytest.raises(TypeError, match=r"my_loss must return a scalar loss; it returned float32\[5, ?2\]"):
        mt.backward(returning(lambda out: (out, out)), small_net(), X, has_aux=True)


def test_a_loss_without_a_trainable_parameter() -> None:
    model = small_net()
    for call in (mt.backward, lambda fn, *args: mt.value_and_grad(fn)(*args)):
        with pytest.raises(ValueError, match="my_loss uses no trainable parameter"):
            call(returning(1.5), model, X)
        with pytest.raises(ValueError, match="uses no trainable parameter.*Pass the model as an argument"):
            call(lambda x: x.sum(), X)
        with pytest.raises(ValueError, match="uses no trainable parameter"):
            call(lambda: jnp.zeros(()))
    model.freeze()
    with pytest.raises(ValueError, match=r"uses no trainable parameter.*4 parameters are frozen.*unfreeze\(\)"):
        mt.backward(squared, model, X, Y)
    model.unfreeze()
    assert float(mt.backward(squared, model, X, Y)) > 0


def test_a_loss_that_uses_only_buffers() -> None:
    mean = RunningMean()
    with pytest.raises(ValueError, match="uses no trainable parameter"):
        mt.backward(lambda m: m.mean * 1.0, mean)


class Unusable:
    """Neither an array, nor a pytree, nor hashable."""

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("value", [{1, 2}, bytearray(b"a"), Unusable()], ids=["set", "bytearray", "object"])
@pytest.mark.parametrize("place", ["positional", "keyword", "nested"])
def test_arguments_of_unusable_types_are_named(value: Any, place: str) -> None:
    model = Scale()

    def loss_fn(model: Any, x: Any) -> Any:
        return model(1.0)

    args, kwargs = {
        "positional": ((model, value), {}),
        "keyword": ((model,), {"x": value}),
        "nested": ((model, {"x": [value]}), {}),
    }[place]
    for _ in range(2):
        with pytest.raises(TypeError, match=f"an argument is a {type(value).__name__}.*neither an array"):
            mt.backward(loss_fn, *args, **kwargs)
    assert float(model.grads()[0]) == 0.0


def test_tensors_of_other_libraries_are_named() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"an argument is a torch\.Tensor.*jnp\.asarray"):
        mt.backward(lambda model, x: model(x), Scale(), torch.ones(()))


@pytest.mark.parametrize("array", [np.array(["a", "b"]), np.array([None, 1])], ids=["strings", "objects"])
def test_arrays_that_jax_has_no_dtype_for(array: Any) -> None:
    model = Scale()
    with pytest.raises(TypeError):
        mt.backward(lambda model, x: model(1.0), model, array)
    assert float(model.grads()[0]) == 0.0


def test_what_is_not_callable() -> None:
    for bad in (3, None, "loss"):
        with pytest.raises(TypeError):
            mt.backward(bad, small_net(), X)  # type: ignore[arg-type]


def test_an_error_in_the_loss_leaves_everything_as_it_was() -> None:
    model = nn.Sequential(small_net(), RunningMean())
    fail = True

    def loss_fn(model: Any, x: Any, y: Any) -> Any:
        out = squared(model, x, y)
        model[0][0].weight = model[0][0].weight * 2
        if fail:
            raise ArithmeticError("on purpose")
        return out

    before = {name: np.asarray(array) for name, array in model.state_dict().items()}
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="on purpose"):
            mt.backward(loss_fn, model, X, Y)
        assert_no_tracers(model)
        for name, array in model.state_dict().items():
            assert_array_equal(array, before[name])
        assert all(not np.any(grad) for grad in model.grads())
    fail = False
    mt.backward(loss_fn, model, X, Y)
    assert_allclose(model[0][0].weight, 2 * before["0.0.weight"], rtol=1e-6)
    assert int(model[1].count) == 1


def test_a_wrong_call_raises_what_the_function_raises() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'y'"):
        mt.backward(squared, small_net(), X)
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        mt.backward(squared, small_net(), X, Y, z=1)
    with pytest.raises(ValueError, match=r"takes inputs of shape \(\.\.\., 3\)"):
        mt.backward(squared, small_net(), X[:, :2], Y)


# ---------------------------------------------------------------------------------------------------------------------
# Inside plain JAX transforms


def test_inside_a_jit_in_functional_form() -> None:
    model = small_net()
    loss, expected = from_jax(squared, model, X, Y)

    @jax.jit
    def with_value_and_grad(model: Any, x: Any, y: Any) -> Any:
        return mt.value_and_grad(squared)(model, x, y)

    @jax.jit
    def with_backward(model: Any, x: Any, y: Any) -> Any:
        loss = mt.backward(squared, model, x, y)
        mt.backward(squared, model, x, y)
        return loss, list(model.grads())

    got, grads = with_value_and_grad(model, X, Y)
    assert_allclose(got, loss, rtol=1e-6)
    assert_same({k: np.asarray(v) for k, v in grads.named_parameters()}, expected)
    got, listed = with_backward(model, X, Y)
    assert_allclose(got, loss, rtol=1e-6)
    assert_same(dict(zip(expected, map(np.asarray, listed), strict=True)), expected, factor=2)
    assert all(not np.any(grad) for grad in model.grads())
    assert_no_tracers(model)


def test_training_inside_a_jit_and_a_scan() -> None:
    def step(opt: Any, batch: Any) -> Any:
        opt.zero_grad()
        loss, aux = mt.backward(lambda model: (squared(model, *batch), "text"), opt.modules[0], has_aux=True)
        assert aux == "text"
        opt.step()
        return opt, loss

    eager = mt.Optimizer([small_net()], lr=0.1)
    expected = []
    for _ in range(3):
        eager.zero_grad()
        expected.append(float(mt.backward(squared, eager.modules[0], X, Y)))
        eager.step()
    opt, losses = mt.Optimizer([small_net()], lr=0.1), []
    for _ in range(3):
        opt, loss = jax.jit(step)(opt, (X, Y))
        losses.append(float(loss))
    assert_allclose(losses, expected, rtol=1e-5)
    batches = (jnp.stack([X] * 3), jnp.stack([Y] * 3))
    opt, scanned = jax.lax.scan(step, mt.Optimizer([small_net()], lr=0.1), batches)
    assert_allclose(scanned, expected, rtol=1e-5)
    assert_allclose(opt.modules[0][0].weight, eager.modules[0][0].weight, rtol=1e-5)


def test_buffers_are_written_back_inside_a_jit() -> None:
    @jax.jit
    def twice(model: Any, x: Any) -> Any:
        for _ in range(2):
            grads = mt.grad(lambda model, x: model(x).sum())(model, x)
        return model, grads

    model = RunningMean()
    new, grads = twice(model, jnp.array([1.0, 3.0]))
    assert (float(new.mean), int(new.count), float(grads.shift)) == (1.5, 2, 2.0)
    assert (float(model.mean), int(model.count)) == (0.0, 0)


def test_by_closure_inside_a_jit() -> None:
    """Reading is right, changing is an error."""
    scale, mean = Scale(2.0), RunningMean()
    assert float(jax.jit(lambda x: mt.grad(lambda x: scale(x))(x).weight)(3.0)) == 3.0
    for change in (
        lambda x: mt.backward(scale, x),
        lambda x: mt.grad(lambda x: mean(x).sum())(x).shift,
        lambda x: scale.accumulate([x]) or x,
    ):
        with pytest.raises(mt.TraceError, match="inside a JAX transform"):
            jax.jit(change)(jnp.asarray(3.0))
    assert_no_tracers(scale, mean)
    assert (float(scale.grads()[0]), float(mean.mean)) == (0.0, 0.0)


def test_gradients_of_a_copy_that_are_dropped_are_told() -> None:
    with pytest.warns(mt.DroppedUpdateWarning, match="(?s)Scale was changed inside a JAX transform.*gradient"):
        jax.jit(lambda scale, x: mt.backward(scale, x))(Scale(), 3.0)
        gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(lambda scale, x: (mt.backward(scale, x), list(scale.grads())))(Scale(), 3.0)
        gc.collect()


def test_gradients_for_each_example_by_vmap() -> None:
    model = small_net()
    grads = jax.vmap(lambda x, y: mt.grad(squared)(model, x, y))(X, Y)
    for i in range(len(X)):
        single = jax.grad(squared)(model, X[i], Y[i])
        assert_allclose(grads[0].weight[i], single[0].weight, rtol=1e-5, atol=1e-7)
        assert_allclose(grads[2].bias[i], single[2].bias, rtol=1e-5, atol=1e-7)


def test_an_ensemble_by_vmap() -> None:
    models = [small_net(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    losses, grads = jax.vmap(lambda model: mt.value_and_grad(squared)(model, X, Y))(stacked)
    for i, model in enumerate(models):
        loss, expected = from_jax(squared, model, X, Y)
        assert_allclose(losses[i], loss, rtol=1e-5)
        assert_allclose(grads[0].weight[i], expected["0.weight"], rtol=1e-5, atol=1e-7)


def test_a_gradient_of_a_gradient() -> None:
    scale = Scale(3.0)

    def cubed(scale: Any, x: Any) -> Any:
        return scale(x) ** 3

    def penalty(scale: Any, x: Any) -> Any:
        return mt.grad(cubed)(scale, x).weight ** 2  # (3 w^2 x^3)^2 = 9 w^4 x^6, derivative 36 w^3 x^6

    assert float(mt.backward(penalty, scale, 1.0)) == 9 * 81
    assert float(scale.grads()[0]) == 36 * 27
    assert float(jax.grad(penalty)(scale, 1.0).weight) == 36 * 27


@pytest.mark.slow
def test_an_inner_jit_that_closes_over_the_model_sees_every_caller() -> None:
    """The inner function's own cache must not hold on to the tracers of the first trace around it."""
    scale = Scale(2.0)
    inner = jax.jit(lambda x: scale(x) ** 2)

    def loss_fn(x: Any) -> Any:
        return inner(x)

    for weight in (2.0, 3.0):
        scale.weight = weight
        scale.zero_grad()
        assert float(mt.backward(loss_fn, 1.0)) == weight**2
        assert float(scale.grads()[0]) == 2 * weight
        assert float(mt.grad(loss_fn)(1.0).weight) == 2 * weight
        scale.eval()
        assert float(mt.backward(loss_fn, 1.0)) == weight**2
        scale.train()
