"""`mt.pack`: a packed model is its unpacked twin in everything but the number of arrays that a step takes."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numpy.testing import assert_array_equal
from training import Boom, X, Y, assert_alive, assert_same, everything, squared, step

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.state.packed import padded, stored_cells
from minitorch_jax.state.walk import walk_of

# ---------------------------------------------------------------------------------------------------------------------
# Twins


class Layer(mt.Module):
    """A vector, a number and, between them, a buffer that counts."""

    def __init__(self, value: float = 1.0) -> None:
        self.weight = mt.Parameter(jnp.full((3,), value))
        self.count = mt.Buffer(0)
        self.bias = mt.Parameter(0.5 * value)

    def forward(self, x: Any) -> Any:
        self.count = self.count + 1
        return x @ self.weight + self.bias


class Two(mt.Module):
    """Two layers: "a.weight" (3,), "a.bias" (), "b.weight" (3,), "b.bias" ()."""

    def __init__(self) -> None:
        self.a, self.b = Layer(1.0), Layer(-0.5)

    def forward(self, x: Any) -> Any:
        return self.a(x) * self.b(x)


def trainee(make: Callable[[], Any] = Two, rule: Any = optim.SGD, **options: Any) -> tuple[Any, Any]:
    model = make()
    options = {"lr": 0.1} | ({"momentum": 0.9} if rule is optim.SGD else {}) | options
    return model, rule([model], **options)


def twins(make: Callable[[], Any] = Two, rule: Any = optim.SGD, **options: Any) -> tuple[Any, Any]:
    """`(model, optimizer)` of which the model is packed, and the same not packed."""
    packed, plain = trainee(make, rule, **options), trainee(make, rule, **options)
    mt.pack(packed[0])
    assert is_packed(packed[0]) and not is_packed(plain[0])
    return packed, plain


def is_packed(model: Any) -> bool:
    """Whether all parameters are in one pack."""
    return len(packs(model)) == 1 and None not in packs(model)


def packs(model: Any) -> set[Any]:
    return {cell.pack for cell in walk_of(model).params if cell.trainable}


def state(*objects: Any) -> dict[str, Any]:
    """All values of modules and optimizers, and the gradients."""
    found = everything(*objects)
    for i, obj in enumerate(objects):
        if isinstance(obj, mt.Module):
            for j, grads in enumerate([obj.grads()]):
                for k in range(len(grads)):
                    try:
                        found[f"{i}.{j}.grad{k}"] = np.array(grads[k])
                    except RuntimeError:  # used up in compiled code
                        found[f"{i}.{j}.grad{k}"] = np.nan
    return found


def assert_twins(packed: tuple[Any, ...], plain: tuple[Any, ...], rtol: float = 2e-5) -> None:
    """The same, but that gradients which were used up may still be there in a pack of which others were not."""
    mine, theirs = state(*packed), state(*plain)
    used_up = {name for name, value in theirs.items() if ".grad" in name and np.ndim(value) == 0 and np.isnan(value)}
    assert mine.keys() == theirs.keys()
    for name in used_up:
        del mine[name], theirs[name]
    assert_same(mine, theirs, rtol)
    assert_alive(*packed)


def num_held(opt: Any) -> int:
    """How many arrays the last step took: parameters, state, counts and gradients."""
    return len(stored_cells(opt._plan.outside(opt).cells[:-1]))


def steps(model: Any, opt: Any, number: int = 2) -> None:
    for _ in range(number):
        step(model, opt, X, Y)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A step without gradients is wanted in some of these tests."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no gradient accumulated")
        warnings.simplefilter("ignore", mt.RecompileWarning)  # one function serves many structures here
        yield


compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *args, **kwargs: compiled.append(event) if "backend_compile" in event else None
)


# ---------------------------------------------------------------------------------------------------------------------
# Ways of training


def eager(model: Any, opt: Any) -> None:
    steps(model, opt, 3)


def accumulating(model: Any, opt: Any) -> None:
    for _ in range(2):
        opt.zero_grad()
        mt.backward(squared, model, X, Y)
        mt.backward(squared, model, X[:2], Y[:2])
        opt.step()
    mt.backward(squared, model, X, Y)


_value_and_grad = mt.value_and_grad(squared)
_grad = mt.grad(squared)


def returned_gradients(model: Any, opt: Any) -> None:
    for _ in range(2):
        opt.zero_grad()
        loss, grads = _value_and_grad(model, X, Y)
        model.accumulate(grads)
        model.accumulate(_grad(model, X, Y).parameters())
        opt.step()
        assert grads.a.weight.shape == (3,) and loss.shape == ()


def jax_gradients(model: Any, opt: Any) -> None:
    for _ in range(2):
        opt.zero_grad()
        with pytest.warns(mt.DroppedUpdateWarning, match="Layer.count"):
            model.accumulate(jax.grad(squared)(model, X, Y))
            gc.collect()
        opt.step()


_jitted = mt.jit(step)
_keeping = mt.jit(step, keep_grads=True)


def jitted(model: Any, opt: Any) -> None:
    for _ in range(3):
        _jitted(model, opt, X, Y)


def jitted_keeping(model: Any, opt: Any) -> None:
    for _ in range(3):
        _keeping(model, opt, X, Y)


def eager_and_jitted(model: Any, opt: Any) -> None:
    step(model, opt, X, Y)
    _jitted(model, opt, X, Y)
    step(model, opt, X, Y)
    _keeping(model, opt, X, Y)


@mt.jit
def _micro_batches(model: Any, opt: Any) -> None:
    mt.backward(squared, model, X[:2], Y[:2])
    mt.backward(squared, model, X[2:], Y[2:])
    model.grads()[0] *= 0.5
    opt.step()
    model.a.bias = model.a.bias + 1.0


def jitted_micro_batches(model: Any, opt: Any) -> None:
    mt.backward(squared, model, X, Y)
    _micro_batches(model, opt)
    opt.zero_grad()
    _micro_batches(model, opt)


def scanned(model: Any, opt: Any) -> None:
    xs, ys = np.stack([X, X[::-1], 2 * X]), np.stack([Y, Y, Y])
    mt.scan(lambda x, y: step(model, opt, x, y), xs, ys)


def specification_loop(model: Any, opt: Any) -> None:
    for _ in range(2):
        model.zero_grad()
        mt.backward(squared, model, X, Y)
        params, grads = model.parameters(), model.grads()
        for i in range(len(params)):
            params[i] -= 0.1 * grads[i]
            grads[i] = 2 * grads[i]


WAYS = {
    f.__name__: f
    for f in (
        *(eager, accumulating, returned_gradients, jax_gradients, jitted, jitted_keeping, eager_and_jitted),
        *(jitted_micro_batches, scanned, specification_loop),
    )
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_training_ends_where_the_unpacked_twin_ends(way: str) -> None:
    packed, plain = twins()
    before = state(*packed)
    for model, opt in (packed, plain):
        WAYS[way](model, opt)
    assert_twins(packed, plain)
    assert is_packed(packed[0])
    assert not np.allclose(state(*packed)["0.a.weight"], before["0.a.weight"])  # something was trained


RULES: dict[str, dict[str, Any]] = {
    "plain": {"momentum": 0.0},
    "nesterov": {"nesterov": True, "weight_decay": 0.1},
    "schedule": {"lr": lambda t: 0.1 / (1.0 + jnp.asarray(t, jnp.float32))},
    "skip": {"skip_nonfinite": True},
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", RULES)
def test_options_of_sgd(name: str) -> None:
    packed, plain = twins(**RULES[name])
    for model, opt in (packed, plain):
        steps(model, opt, 2)
        model.grads()[1] = jnp.array(np.nan if name == "skip" else 2.0, jnp.float32)
        opt.step()
        steps(model, opt, 1)
        if name != "schedule":
            opt.lr = 0.05
        steps(model, opt, 1)
    assert_twins(packed, plain)
    assert packed[1].skipped == (name == "skip") and num_held(packed[1]) <= 4


class Scaled(mt.Optimizer):
    """A rule that uses the norm of its parameter: it must be applied to each by itself. (LARS, without momentum)"""

    @staticmethod
    def update(p: Any, g: Any, s: Any, h: Any) -> Any:
        return p - h.lr * g * jnp.sqrt((p**2).sum()), s


class Mean(NamedTuple):
    mean: jax.Array


class PerParameter(mt.Optimizer):
    """A rule with one number for each parameter as its state."""

    @staticmethod
    def init_state(p: Any, h: Any) -> Any:
        return Mean(jnp.abs(p).max())

    @staticmethod
    def update(p: Any, g: Any, s: Any, h: Any) -> Any:
        mean = 0.9 * s.mean + (g**2).mean()
        return p - h.lr * g / (jnp.sqrt(mean) + h.t), Mean(mean)


class MeanSquare(NamedTuple):
    v: jax.Array
    extra: dict[str, jax.Array]


class Declared(mt.Optimizer):
    """A user's rule that says that it works element by element."""

    elementwise = True

    @staticmethod
    def init_state(p: Any, h: Any) -> Any:
        return MeanSquare(jnp.zeros_like(p), {"first": p, "steps": jnp.zeros(p.shape, jnp.int32)})

    @staticmethod
    def update(p: Any, g: Any, s: Any, h: Any) -> Any:
        v = 0.9 * s.v + 0.1 * g**2
        new = p - h.lr * g / (jnp.sqrt(v / (1 - 0.9**h.t)) + 1e-8) + 0.01 * (s.extra["first"] - p)
        return new, MeanSquare(v, {"first": s.extra["first"], "steps": s.extra["steps"] + 1})


class DeclaredWithNumber(PerParameter):
    """One that says so, though its state is one number for each parameter."""

    elementwise = True


@pytest.mark.slow
@pytest.mark.parametrize("rule", [Scaled, PerParameter, Declared, DeclaredWithNumber])
def test_a_users_own_rule(rule: Any) -> None:
    packed, plain = twins(rule=rule)
    for model, opt in (packed, plain):
        eager(model, opt)
        if rule in (Scaled, Declared):
            jitted(model, opt)
    assert_twins(packed, plain)
    steps(*packed)
    if rule is Declared:
        assert num_held(packed[1]) == 6  # parameters, three states, counts, gradients
    if rule is Scaled:
        assert num_held(packed[1]) == 3  # one program over one array, though the rule is applied to each part


@pytest.mark.slow
def test_low_precision_and_other_dtypes_have_packs_of_their_own() -> None:
    def make() -> Any:
        model = Two()
        model.b.astype(jnp.bfloat16)
        return model

    def loss(model: Any, x: Any) -> Any:
        return model.a(x).sum() ** 2 + (model.b(x.astype(jnp.bfloat16)).astype(jnp.float32) ** 2).sum()

    packed, plain = trainee(make), trainee(make)
    mt.pack(packed[0])
    assert len(packs(packed[0])) == 2 and is_packed(packed[0].a) and is_packed(packed[0].b)
    for model, opt in (packed, plain):
        for _ in range(3):
            opt.zero_grad()
            mt.backward(loss, model, X)
            opt.step()
    assert [p.dtype for p in packed[0].parameters()] == [p.dtype for p in plain[0].parameters()]
    packed, plain = ({k: np.asarray(v, np.float32) for k, v in state(*pair).items()} for pair in (packed, plain))
    assert_same(packed, plain, rtol=1e-2)


@pytest.mark.slow
def test_one_structure_in_two_dtypes() -> None:
    """What is compiled for the first must not be used for the second: with a hole in the pack, its zeros have a dtype."""
    for dtype in (jnp.float32, jnp.float16):
        packed, plain = twins(lambda dtype=dtype: Two().astype(dtype))
        x, y = jnp.asarray(X, dtype), jnp.asarray(Y, dtype)
        for model, opt in (packed, plain):
            model.a.requires_grad_(False)
            for _ in range(2):
                step(model, opt, x, y)
            assert {p.dtype for p in [*model.parameters(), *model.grads()]} == {jnp.dtype(dtype)}
        assert_same(state(*packed), state(*plain), rtol=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# The point of it


def test_gradients_of_a_part_of_a_pack_are_set_to_zeros() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    mt.pack(model)
    mt.backward(lambda m, x: m(x).sum(), model, jnp.ones((1, 2)))
    before = [np.asarray(grad) for grad in model.grads()]
    assert all(np.any(grad) for grad in before)
    model[0].zero_grad()
    expected = [*map(np.zeros_like, before[:2]), *before[2:]]
    for grad, value in zip(model.grads(), expected, strict=True):
        assert_array_equal(grad, value)
    model.zero_grad()
    assert not any(np.any(grad) for grad in model.grads())


def test_a_step_takes_one_array_for_all_parameters() -> None:
    def make() -> Any:
        return nn.Sequential(*[Layer(0.1 * i) for i in range(6)])

    packed, plain = twins(make)
    for model, opt in (packed, plain):
        for _ in range(2):
            model.accumulate([0.1 * p for p in model.parameters()])
            opt.step()
    assert num_held(packed[1]) == 4  # parameters, momentum, counts; gradients
    assert num_held(plain[1]) == 12 + 12 + 1 + 12
    assert_twins(packed, plain)


def restructured(how: str, model: Any, opt: Any) -> tuple[Any, Any]:
    """After some change of structure."""
    if how == "frozen in part":
        model.a.freeze()
    elif how == "frozen and unfrozen":
        model.a.freeze()
        model.a.unfreeze()
        mt.pack(model)
    elif how == "stepped while frozen":
        model.a.freeze()
        steps(model, opt)
        model.a.unfreeze()
        mt.pack(model)
    elif how == "pickled":
        model, opt = pickle.loads(pickle.dumps((model, opt)))
        mt.pack(model)
    elif how == "deep copied":
        model, opt = copy.deepcopy((model, opt))
        mt.pack(model)
    elif how == "tied":
        model.b.tie("weight", model.a, "weight")
    elif how == "packed again":
        mt.pack(model.b)
        mt.pack(model)
    elif how == "replaced":
        model.a.weight = mt.Parameter(jnp.ones(3))
        mt.pack(model)
        mt.pack(model)
    elif how == "loaded":
        model.load_state_dict(model.state_dict())
        opt.load_state_dict(opt.state_dict())
    return model, opt


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "how",
    [
        *("frozen in part", "frozen and unfrozen", "stepped while frozen", "pickled", "deep copied", "tied"),
        *("packed again", "replaced", "loaded"),
    ],
)
def test_a_step_still_takes_few_arrays(how: str) -> None:
    """Some more, where parameters have taken different numbers of steps: then they are updated one by one."""
    packed, plain = twins()
    for i, pair in enumerate((packed, plain)):
        steps(*pair)
        model, opt = restructured(how, *pair)
        if i:
            mt.unpack(model)
        steps(model, opt, 3)
        packed, plain = (packed, (model, opt)) if i else ((model, opt), plain)
    one_by_one = how in ("stepped while frozen", "replaced")
    assert (4 < num_held(packed[1]) if one_by_one else 4 == num_held(packed[1])) and num_held(packed[1]) < num_held(
        plain[1]
    )
    assert_twins(packed, plain)


def test_compiled_code_takes_few_arrays_too() -> None:
    """Momentum is packed whether or not a step is ever taken eagerly."""
    model, opt = trainee()
    mt.pack(model)
    _jitted(model, opt, X, Y)
    _jitted(model, opt, X, Y)
    bindings = [b for b in walk_of(model).bindings.values() if b.program.name == "step"]
    assert len(bindings) == 1
    assert len([cell for cell in bindings[0].stored if cell.kind == "state"]) <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def everything_read(model: Any, opt: Any) -> list[Any]:
    leaves = jax.tree.leaves([model, opt])
    states = [list(model.state_dict().values()), jax.tree.leaves(opt.state_dict()["state"])]
    live = [*model.parameters(), *model.grads(), model.a.weight, *[p for _, p in model.named_parameters()]]
    return [a for a in [*leaves, *jax.tree.leaves(states), *live] if isinstance(a, jax.Array)]


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "step": lambda model, opt: steps(model, opt),
    "jit": lambda model, opt: [_jitted(model, opt, X, Y) for _ in range(2)],
    "unpack": lambda model, opt: (mt.unpack(model), steps(model, opt, 3)),
    "unpack one": lambda model, opt: (mt.unpack(model.a), steps(model, opt, 3)),
    "pack again": lambda model, opt: (mt.pack(model), steps(model, opt, 3)),
    "freeze": lambda model, opt: (model.a.freeze(), steps(model, opt), model.a.unfreeze(), steps(model, opt)),
    "assign": lambda model, opt: (model.a.__setattr__("weight", jnp.zeros(3)), steps(model, opt)),
    "spec loop": lambda model, opt: specification_loop(model, opt),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_array_you_read_is_yours(name: str) -> None:
    model, opt = trainee()
    mt.pack(model)
    steps(model, opt)
    read = everything_read(model, opt)
    then = [np.array(array) for array in read]
    OPERATIONS[name](model, opt)
    for array, value in zip(read, then, strict=True):
        assert not array.is_deleted()
        assert_array_equal(array, value)
    assert not np.array_equal(model.b.weight, then[0])
    assert_alive(model, opt)


def test_an_array_you_give_is_yours() -> None:
    model, opt = trainee()
    mt.pack(model)
    given_weight, given_grad = jnp.full((3,), 2.0), jnp.full((3,), 3.0)
    mt.backward(squared, model, X, Y)
    model.a.weight = given_weight
    model.grads()[0] = given_grad
    mt.unpack(model)
    opt.step()
    mt.pack(model)
    steps(model, opt)
    assert_array_equal(given_weight, 2.0)
    assert_array_equal(given_grad, 3.0)


def test_a_donated_array_that_is_a_packed_parameter_is_not_destroyed() -> None:
    model, _ = trainee()
    mt.pack(model)
    value = np.array(model.a.weight)
    mt.jit(lambda model, w: model.a.weight.sum() + w, donate_argnums=1)(model, model.a.weight)
    assert_array_equal(model.a.weight, value)


def test_copies_of_a_model_outlive_it() -> None:
    model, opt = trainee()
    mt.pack(model)
    steps(model, opt)
    copies = copy.deepcopy((model, opt)), jax.tree.map(lambda a: a, (model, opt))
    before = [state(*pair) for pair in copies]
    mt.unpack(model)
    steps(model, opt, 3)
    del model, opt
    for pair, then in zip(copies, before, strict=True):
        assert_alive(*pair)
        assert_same(state(*pair), then, rtol=0)
        steps(*pair)


def test_repr_counts_and_names() -> None:
    packed, plain = twins()
    (a, _), (b, _) = packed, plain
    assert repr(a) == repr(b) and "float32[3]" in repr(a)
    assert a.num_parameters() == b.num_parameters() == 8
    assert [name for name, _ in a.named_parameters()] == [name for name, _ in b.named_parameters()]
    assert list(a.state_dict()) == list(b.state_dict())
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert [p.shape for p in a.parameters()] == [(3,), (), (3,), ()]


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a pack


def give_b(model: Any) -> None:
    """A gradient for `b` alone."""
    mt.backward(only_b, model.b, X, Y)


def only_b(layer: Any, x: Any, y: Any) -> Any:
    return ((layer(x) - y) ** 2).mean()


def only_a(model: Any, x: Any, y: Any) -> Any:
    return ((model.a(x) - y) ** 2).mean()


def opt_of_a(model: Any) -> Any:
    return optim.SGD([model.a], lr=0.1, momentum=0.9)


@mt.jit
def train_a(layer: Any, opt: Any) -> None:
    opt.zero_grad()
    mt.backward(only_b, layer, X, Y)
    opt.step()


@mt.jit
def overwrite(layer: Any, weight: Any, bias: Any) -> None:
    layer.weight, layer.bias = weight, bias


@mt.jit
def clear(layer: Any) -> None:
    layer.zero_grad()


@mt.jit
def set_gradients(layer: Any, weight: Any, bias: Any) -> None:
    layer.grads()[0], layer.grads()[1] = weight, bias


def _jit_a_then_b(model: Any) -> None:
    train_a(model.a, opt_of_a(model))
    give_b(model)


PARTS: dict[str, Callable[[Any], Any]] = {
    "zero_grad": lambda model: model.a.zero_grad(),
    "zero_grad of its optimizer": lambda model: opt_of_a(model).zero_grad(),
    "step": lambda model: opt_of_a(model).step(),
    "accumulate": lambda model: model.a.accumulate([jnp.ones(3), jnp.array(1.0)]),
    "backward": lambda model: mt.backward(only_b, model.a, X, Y),
    "jit": lambda model: train_a(model.a, opt_of_a(model)),
    "jit, then backward of the other": _jit_a_then_b,
    "jit overwrites": lambda model: overwrite(model.a, jnp.zeros(3), jnp.array(0.0)),
    "jit clears": lambda model: clear(model.a),
    "jit sets gradients": lambda model: set_gradients(model.a, jnp.ones(3), jnp.array(1.0)),
    "load": lambda model: model.a.load_state_dict({"weight": np.ones(3, "f"), "bias": np.float32(2), "count": 5}),
    "freeze": lambda model: model.a.freeze(),
    "unpack": lambda model: mt.unpack(model.a),
    "pack": lambda model: mt.pack(model.a),
    "astype": lambda model: model.a.astype(jnp.float32),
    "drop": lambda model: setattr(model, "a", Layer(3.0)),
}


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", PARTS)
def test_what_happens_to_one_part_leaves_the_others_alone(name: str) -> None:
    """A pack is an arrangement in memory: its other views keep value, gradient and momentum."""
    packed, plain = twins()
    for model, opt in (packed, plain):
        steps(model, opt)
        opt.zero_grad()
        give_b(model)
    before = state(packed[0].b)
    PARTS[name](packed[0])
    PARTS[name](plain[0])
    if "then" not in name:
        assert_same(state(packed[0].b), before, rtol=0)
    assert_twins(packed, plain)
    for model, opt in (packed, plain):  # and it goes on
        opt.zero_grad()
        mt.backward(squared, model, X, Y)
        opt.step()
        model.b.weight = model.b.weight + 1.0
        mt.backward(squared, model, X, Y)
    assert_twins(packed, plain)


@pytest.mark.slow
def test_a_part_that_left_is_what_everyone_computes_with() -> None:
    """A program bound before must not go on with what the pack has in its place."""
    for leave in (
        lambda layer: mt.unpack(layer),
        lambda layer: setattr(layer, "weight", jax.device_put(layer.weight, on_mesh(1))),
        lambda layer: layer.to(jax.devices()[0]),
    ):
        packed, plain = twins()
        for model, opt in (packed, plain):
            steps(model, opt)
            jitted(model, opt)
            leave(model.a)
            model.a.weight = model.a.weight * 0 + 3.0
            model.zero_grad()
            mt.backward(squared, model, X, Y)
            opt.step()
            model.zero_grad()
            assert all(float(jnp.abs(g).max()) == 0 for g in model.grads())
            jitted(model, opt)
            model.zero_grad()
        assert_twins(packed, plain)


def test_a_loss_that_uses_only_some_of_the_packed_parameters() -> None:
    packed, plain = twins()
    for model, opt in (packed, plain):
        steps(model, opt)
        opt.zero_grad()
        mt.backward(only_a, model, X, Y)
        assert all(float(jnp.abs(g).max()) == 0 for g in model.b.grads())
        before = np.array(model.b.weight)
        opt.step()
        assert not np.array_equal(model.b.weight, before)  # its momentum goes on
    assert_twins(packed, plain)


def test_returned_gradients_have_the_structure_of_what_the_loss_uses() -> None:
    def loss(a: Any, b: Any, x: Any, y: Any) -> Any:
        return only_b(a, x, y)

    (model, _), (plain, _) = twins()
    mine, theirs = mt.grad(loss)(model.a, model.b, X, Y), mt.grad(loss)(plain.a, plain.b, X, Y)
    assert type(theirs) is Layer
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)


def test_a_parameter_that_no_loss_reads_is_named() -> None:
    (model, _), (plain, _) = twins()
    for each in (plain, model):
        opt = optim.SGD([each], lr=0.1)
        mt.backward(only_a, each, X, Y)
        with pytest.warns(UserWarning, match=r"no loss has read so far.*0\.b\.weight"):
            opt.step()


@pytest.mark.parametrize("undo", [mt.unpack, lambda m: m.freeze().unfreeze(), mt.pack])
def test_a_parameter_that_was_read_while_packed_is_not_named(undo: Any) -> None:
    model, opt = trainee()
    mt.pack(model)
    steps(model, opt)
    undo(model)
    opt.zero_grad()
    mt.backward(only_a, model, X, Y)
    opt.step()  # warnings are errors


def test_two_optimizers_over_parts_of_one_pack() -> None:
    pairs = []
    for pack in (True, False):
        model = Two()
        opts = optim.SGD([model.a], lr=0.1, momentum=0.9), optim.SGD([model.b], lr=0.05, momentum=0.5, nesterov=True)
        if pack:
            mt.pack(model)
        for i in range(4):
            model.zero_grad()
            mt.backward(squared, model, X, Y)
            opts[0].step()
            if i % 2:
                opts[1].step()
        pairs.append((model, *opts))
    assert is_packed(pairs[0][0])
    assert_twins(*pairs)


def product(a: Any, b: Any) -> Any:
    return ((a(X) * b(X) - Y) ** 2).mean()


@pytest.mark.slow
def test_one_optimizer_over_several_packed_modules() -> None:
    results = []
    for pack in ("together", "apart", "none"):
        a, b = Layer(1.0), Layer(2.0)
        opt = optim.SGD([a, b], lr=0.1, momentum=0.9)
        if pack == "together":
            mt.pack(a, b)
        elif pack == "apart":
            mt.pack(a)
            mt.pack(b)
        for _ in range(3):
            opt.zero_grad()
            mt.backward(product, a, b)
            opt.step()
        results.append((a, b, opt))
        assert num_held(opt) == {"together": 4, "apart": 7, "none": 13}[pack]
    for packed in results[:-1]:
        assert_twins(packed, results[-1])


def test_modules_come_and_go() -> None:
    pairs = []
    for pack in (True, False):
        model = Two()
        opt = optim.SGD([model.a, model.b], lr=0.1, momentum=0.9)
        if pack:
            mt.pack(model)
        steps(model, opt)
        opt.modules.remove(model.a)
        steps(model, opt)
        opt.modules.append(model.a)
        steps(model, opt)
        new = Layer(2.0)
        opt.modules = [new, model.b, model.a]
        if pack:
            mt.pack(new, model)
        new.accumulate([jnp.ones(3), jnp.array(1.0)])
        steps(model, opt)
        pairs.append((model, new, opt))
    assert_twins(*pairs)


def test_packing_after_some_steps_of_momentum() -> None:
    packed, plain = trainee(), trainee()
    for pair in (packed, plain):
        steps(*pair)
    gradients = [np.array(g) for g in packed[0].grads()]
    mt.pack(packed[0])
    assert_twins(packed, plain)
    for mine, g in zip(packed[0].grads(), gradients, strict=True):
        assert_array_equal(mine, g)
    for pair in (packed, plain):
        pair[1].step()  # with the gradients from before
        steps(*pair)
    assert num_held(packed[1]) == 4
    assert_twins(packed, plain)


def test_step_counts_that_differ() -> None:
    """Momentum begins with the gradient itself, so that a count of steps shared by all would show."""
    packed, plain = trainee(dampening=0.5), trainee(dampening=0.5)
    for pair in (packed, plain):
        pair[0].a.freeze()
        steps(*pair)
        pair[0].a.unfreeze()
    mt.pack(packed[0])
    for pair in (packed, plain):
        steps(*pair)
        pair[1].load_state_dict(pair[1].state_dict() | {"num_steps": 7})
        steps(*pair)
    assert_twins(packed, plain)
    counts = [s["step"] for s in packed[1].state_dict()["state"].values()]
    assert counts == [4, 4, 6, 6]


def test_step_counts_made_different_by_a_loaded_state() -> None:
    packed, plain = twins(dampening=0.5)
    for model, opt in (packed, plain):
        steps(model, opt)
        saved = opt.state_dict()
        saved["state"]["0.a.weight"]["step"] = 0
        opt.load_state_dict(saved)
        steps(model, opt)
    assert_twins(packed, plain)


def test_momentum_switched_on_later() -> None:
    packed, plain = twins(momentum=0.0)
    for model, opt in (packed, plain):
        steps(model, opt)
        opt.momentum = 0.9
        steps(model, opt)
    assert num_held(packed[1]) == 4
    assert_twins(packed, plain)


@pytest.mark.parametrize("again", ["a", "b", "model"])
def test_repacking_and_unpacking_between_steps(again: str) -> None:
    packed, plain = twins()
    for pair in (packed, plain):
        steps(*pair)
    model = packed[0]
    mt.pack({"a": model.a, "b": model.b, "model": model}[again])
    for pair in (packed, plain):
        steps(*pair)
    assert_twins(packed, plain)
    mt.unpack(model)
    assert packs(model) == {None}
    for pair in (packed, plain):
        steps(*pair)
    assert num_held(packed[1]) == num_held(plain[1])
    assert_twins(packed, plain)


def test_frozen_parameters_keep_value_and_momentum_exactly() -> None:
    packed, plain = twins()
    for model, opt in (packed, plain):
        steps(model, opt)
        model.a.freeze()
        before = state(model, opt)
        for way in (eager, jitted):
            way(model, opt)
            now = state(model, opt)
            for name in ("0.a.weight", "0.a.bias", "1.0.a.weight.momentum_buffer", "1.0.a.bias.momentum_buffer"):
                assert_array_equal(now[name], before[name], err_msg=name)
            assert not np.array_equal(now["0.b.weight"], before["0.b.weight"])
        model.requires_grad_(True)
        steps(model, opt)
        model.freeze()
        model.b.unfreeze()
        steps(model, opt)
        model.unfreeze()
    assert_twins(packed, plain)


def test_frozen_parameters_are_left_out() -> None:
    model, opt = trainee()
    model.a.freeze()
    mt.pack(model)
    assert is_packed(model.b) and all(cell.pack is None for cell in model.a._cells.values())
    before = np.array(model.a.weight)
    steps(model, opt)
    assert_array_equal(model.a.weight, before)


# ---------------------------------------------------------------------------------------------------------------------
# Tying and replacing


def test_tied_before_packing() -> None:
    def make() -> Any:
        model = Two()
        model.b.tie("weight", model.a, "weight")
        return model

    packed, plain = twins(make)
    for model, opt in (packed, plain):
        eager(model, opt)
        jitted(model, opt)
        assert_array_equal(model.a.weight, model.b.weight)
    assert packed[0].num_parameters() == 5 and num_held(packed[1]) >= 0
    assert_twins(packed, plain)


@pytest.mark.slow
def test_tied_after_packing() -> None:
    packed, plain = twins(skip_nonfinite=True, lr=0.01)
    for model, opt in (packed, plain):
        steps(model, opt)
        model.b.tie("weight", model.a, "weight")
        steps(model, opt)
        jitted(model, opt)
        model.b.weight = jnp.arange(3.0)
        assert_array_equal(model.a.weight, [0.0, 1.0, 2.0])
        steps(model, opt)
    assert len(packed[0].parameters()) == 3
    assert_twins(packed, plain)


def test_a_hole_in_a_pack_is_no_gradient() -> None:
    """What a dropped parameter had must not count as a gradient that is not finite."""
    packed, plain = twins(skip_nonfinite=True)
    for model, opt in (packed, plain):
        mt.backward(squared, model, X, Y)
        model.a.grads()[0] = jnp.full(3, jnp.nan)
        model.a.weight = mt.Parameter(jnp.ones(3))
        model.a.grads()[0] = jnp.ones(3)
        opt.step()
    assert plain[1].num_steps == packed[1].num_steps == 1
    assert_twins(packed, plain)


@pytest.mark.slow
@pytest.mark.parametrize("hold", [False, True])
def test_a_parameter_replaced_by_a_new_one(hold: bool) -> None:
    """Also while someone still holds the lists of before."""
    packed, plain = twins()
    held = []
    for model, opt in (packed, plain):
        steps(model, opt)
        held += [(model.parameters(), model.grads())] if hold else []
        model.a.weight = mt.Parameter(jnp.arange(3.0))
        steps(model, opt)
        jitted(model, opt)
    assert_twins(packed, plain)
    if hold:
        assert_array_equal(held[0][0][0], held[1][0][0])  # the old one is as it was when it was replaced
        assert_array_equal(held[0][1][0], held[1][1][0])
    mt.pack(packed[0])
    for pair in (packed, plain):
        steps(*pair)
    assert_twins(packed, plain)


def test_a_replaced_parameter_that_is_used_elsewhere() -> None:
    packed, plain = twins()
    for model, opt in (packed, plain):
        other = Layer(0.0)
        other.tie("weight", model.a, "weight")
        model.a.weight = mt.Parameter(jnp.ones(3))
        steps(model, opt)
        mt.backward(only_b, other, X, Y)
        optim.SGD([other], lr=0.1).step()
        steps(model, opt)
        model.parameters()[0] = model.parameters()[0] + other.weight
    assert_twins(packed, plain)


# ---------------------------------------------------------------------------------------------------------------------
# Saving, copies, the functional form


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_as_the_original(duplicate: Any) -> None:
    packed, plain = twins()
    for pair in (packed, plain):
        steps(*pair)
    copied = duplicate(packed)
    assert packs(copied[0]) == {None}
    assert_same(state(*copied), state(*plain))
    for pair in (packed, plain, copied):
        pair[1].step()  # with the gradients that there are
        steps(*pair)
    assert_twins(packed, plain)
    assert_twins(copied, plain)


def test_state_dicts_move_between_packed_and_unpacked() -> None:
    packed, plain = twins()
    steps(*plain, 3)
    numpy_state = jax.tree.map(np.asarray, plain[1].state_dict()["state"])
    packed[0].load_state_dict({name: np.asarray(value) for name, value in plain[0].state_dict().items()})
    packed[1].load_state_dict(plain[1].state_dict() | {"state": numpy_state})
    for pair in (packed, plain):
        steps(*pair)
    assert is_packed(packed[0])
    assert_twins(packed, plain)
    other = trainee()
    other[0].load_state_dict(packed[0].state_dict())
    other[1].load_state_dict(packed[1].state_dict())
    for pair in (packed, other):
        steps(*pair)
    assert_twins(packed, other)


def test_an_unfit_state_dict_changes_nothing() -> None:
    model, opt = trainee()
    mt.pack(model)
    steps(model, opt)
    before = state(model, opt)
    good, saved = model.state_dict(), opt.state_dict()
    for bad in ({**good, "b.weight": np.ones(4, "f")}, {**good, "c": 1}, {k: good[k] for k in list(good)[1:]}):
        changed = {k: v + 1 if k == "a.weight" else v for k, v in bad.items()}
        with pytest.raises(ValueError, match="nothing was loaded"):
            model.load_state_dict(changed)
    saved["state"]["0.a.weight"]["momentum_buffer"] = jnp.ones(3)
    saved["state"]["0.b.weight"]["momentum_buffer"] = jnp.ones(4)
    with pytest.raises(ValueError, match=r"0\.b\.weight\.momentum_buffer"):
        opt.load_state_dict(saved)
    with pytest.raises(ValueError, match="given for"):
        model.accumulate([jnp.ones(3)])
    with pytest.raises(ValueError, match=r"Layer\.weight"):
        model.a.weight = jnp.ones((3, 1))
    with pytest.raises(ValueError, match=r"b\.weight"):
        model.parameters()[:] = [jnp.ones(3), jnp.array(1.0), jnp.ones(4), jnp.array(1.0)]
    assert_same(state(model, opt), before, rtol=0)


def functional(opt: Any, xy: Any) -> Any:
    (model,) = opt.modules
    loss = step(model, opt, *xy)
    return opt, loss


def test_the_functional_form_sees_unpacked_copies() -> None:
    packed, plain = twins()
    for pair in (packed, plain):
        steps(*pair)
    opt, _ = jax.jit(functional)(packed[1], (X, Y))
    opt, losses = jax.lax.scan(functional, opt, (np.stack([X] * 2), np.stack([Y] * 2)))
    assert losses.shape == (2,) and packs(opt.modules[0]) == {None}
    assert_twins(packed, plain)  # the original has not changed
    steps(*plain, 3)
    assert_twins((opt.modules[0], opt), plain)


def test_tree_map_vmap_and_closures() -> None:
    (packed, _), (plain, _) = twins()
    doubled = jax.tree.map(lambda a: 2 * a, packed)
    assert packs(doubled) == {None}
    assert_array_equal(doubled.b.weight, 2 * plain.b.weight)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), packed, doubled)
    both = jax.vmap(lambda model: model.a.weight.sum() + model.b.bias)(stacked)
    assert_array_equal(both, [2.75, 5.5])
    assert float(jax.jit(lambda x: (x * packed.a.weight).sum())(2.0)) == 6.0  # read by closure
    assert float(jax.grad(lambda x: (x * packed.a.weight).sum())(2.0)) == 3.0
    assert_array_equal(jax.vmap(lambda x: x + packed.a.bias)(jnp.arange(2.0)), [0.5, 1.5])
    assert_array_equal(packed.a.weight, plain.a.weight)


def test_stacked_modules_can_be_packed() -> None:
    def ensemble(model: Any, x: Any) -> Any:
        return (jax.vmap(lambda m: m.a.weight @ x.T + m.b.bias)(model) ** 2).mean()

    results = []
    for pack in (True, False):
        model = jax.tree.map(lambda *a: jnp.stack(a), Two(), Two())
        opt = optim.SGD([model], lr=0.1, momentum=0.9)
        if pack:
            mt.pack(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(2):
                opt.zero_grad()
                mt.backward(ensemble, model, X)
                opt.step()
        results.append((model, opt))
    assert_twins(*results)


# ---------------------------------------------------------------------------------------------------------------------
# What stays out, and what leaves


def on_mesh(number: int, *spec: Any) -> NamedSharding:
    mesh = jax.make_mesh((number,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:number])
    return NamedSharding(mesh, PartitionSpec(*spec))


class Wide(mt.Module):
    """A large matrix that may be sharded, and small parameters."""

    def __init__(self) -> None:
        self.inner = Layer(1.0)
        self.large = mt.Parameter(jnp.ones((4, 2)))
        self.last = mt.Parameter(jnp.ones(2))

    def forward(self, x: Any) -> Any:
        return self.inner(x) * (self.large.sum() + self.last.sum())


@pytest.mark.slow
def test_max_size() -> None:
    (model, opt), plain = trainee(Wide, lr=0.01), trainee(Wide, lr=0.01)
    mt.pack(model, max_size=7)
    assert model._cells["large"].pack is None
    assert model._cells["last"].pack is model.inner._cells["weight"].pack is not None
    steps(model, opt)
    steps(*plain)
    assert num_held(opt) == 7
    assert_twins((model, opt), plain)
    mt.pack(model, max_size=8)
    assert is_packed(model)
    mt.pack(model, max_size=1)
    assert packs(model) == {None}  # what is alone is not packed
    wide = nn.Linear(1025, 1, key=jax.random.key(0))
    mt.pack(wide, Layer())
    assert wide._cells["weight"].pack is None and wide._cells["bias"].pack is not None  # 1024 without it


def test_parameters_without_elements() -> None:
    class Empty(mt.Module):
        def __init__(self) -> None:
            self.none = mt.Parameter(jnp.zeros((0, 3)))
            self.a, self.b = Layer(1.0), Layer(2.0)

        def forward(self, x: Any) -> Any:
            return self.a(x) * self.b(x) + self.none.sum()

    packed, plain = trainee(Empty), trainee(Empty)
    mt.pack(packed[0])
    for pair in (packed, plain):
        steps(*pair)
    assert_twins(packed, plain)


@pytest.mark.slow
def test_sharded_parameters_stay_out() -> None:
    """The others, which an optimizer has made join them on their mesh, are packed there."""

    def make() -> Any:
        model = Wide()
        model.large = jax.device_put(model.large, on_mesh(2, "d"))
        return model

    packed, plain = trainee(make, lr=0.01), trainee(make, lr=0.01)
    mt.pack(packed[0])
    assert packed[0]._cells["large"].pack is None and packed[0]._cells["last"].pack is not None
    for model, opt in (packed, plain):
        for _ in range(2):
            opt.zero_grad()
            model.accumulate([p * 0.1 for p in model.parameters()])
            opt.step()
        assert model.large.sharding == on_mesh(2, "d")
        assert model.last.sharding.is_equivalent_to(on_mesh(2), 1)
    assert_twins(packed, plain)


@pytest.mark.slow
def test_assigning_a_sharded_array_to_a_packed_parameter() -> None:
    packed, plain = twins(Wide, lr=0.01)
    for model, opt in (packed, plain):
        for _ in range(2):
            opt.zero_grad()
            model.accumulate([p * 0.1 for p in model.parameters()])
            opt.step()
            model.large = jax.device_put(model.large, on_mesh(2, "d"))
        assert model.large.sharding == on_mesh(2, "d")
    assert packed[0]._cells["large"].pack is None and packed[0]._cells["last"].pack is not None
    assert_twins(packed, plain)


@pytest.mark.parametrize("spec", [(), ("d",)])
def test_a_mesh_of_one_device(spec: Any) -> None:
    """Code written for many devices, run on one."""
    packed, plain = trainee(Wide, lr=0.01), trainee(Wide, lr=0.01)
    for model, _ in (packed, plain):
        model.large = jax.device_put(model.large, on_mesh(1, *spec, None) if spec else on_mesh(1))
        model.last = jax.device_put(model.last, on_mesh(1, *spec))
    mt.pack(packed[0])
    for model, opt in (packed, plain):
        step(model, opt, X, Y)
        model.grads()[0] = 2 * model.grads()[0]
        model.last = 2 * model.last
        opt.step()
    assert_twins(packed, plain)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_gradient_that_lies_elsewhere_counts(devices: int) -> None:
    """Assigned in another sharding than the pack's."""
    model, opt = trainee(momentum=0.0, lr=1.0)
    mt.pack(model)
    mt.backward(squared, model, X, Y)
    before = np.array(model.a.weight)
    model.grads()[0] = jax.device_put(jnp.ones(3), on_mesh(devices))
    assert_array_equal(model.grads()[0], np.ones(3))
    opt.step()
    np.testing.assert_allclose(np.asarray(model.a.weight), before - 1, rtol=1e-6)


def test_data_on_other_devices() -> None:
    """Parameters that were bound to no device are bound to none by packing."""
    packed, plain = twins()
    x, y = jax.device_put((X, Y), on_mesh(2, "d"))
    for model, opt in (plain, packed):
        step(model, opt, x, y)
    assert_twins(packed, plain)


def test_to_another_device() -> None:
    packed, plain = twins()
    for model, _ in (packed, plain):
        mt.backward(squared, model, X, Y)
        model.to(jax.devices()[1])
    for pair in (packed, plain):
        assert packs(pair[0]) == {None}
    assert_same(state(packed[0]), state(plain[0]))
    mt.pack(packed[0])
    x, y = jax.device_put((X, Y), jax.devices()[1])
    for i, (model, _) in enumerate((packed, plain)):
        opt = optim.SGD([model], lr=0.1, momentum=0.9)
        for _ in range(2):
            step(model, opt, x, y)
        model.grads()[0] = 2 * model.grads()[0]
        model.a.weight = 2 * model.a.weight
        opt.step()
        assert {d for p in model.parameters() for d in p.devices()} == {jax.devices()[1]}
        assert i or is_packed(model)
    assert_same(state(packed[0]), state(plain[0]))


@pytest.mark.parametrize("form", ["jit", "scan", "backward"])
@pytest.mark.parametrize(
    "change", [lambda m: m.astype(jnp.float32), lambda m: m.to(jax.devices()[0])], ids=["astype", "to"]
)
def test_leaving_a_pack_in_compiled_code_is_an_error(form: str, change: Any) -> None:
    model, _ = trainee()
    mt.pack(model)

    def loss_fn(x: Any) -> Any:
        change(model)
        return model(x).sum()

    forms: dict[str, Any] = {"jit": mt.jit(loss_fn), "scan": lambda x: mt.scan(loss_fn, x[None])}
    before = state(model)
    with pytest.raises(mt.TraceError, match="was moved or converted out of its pack inside compiled code"):
        forms.get(form, partial(mt.backward, loss_fn))(X)
    assert is_packed(model)
    assert_same(state(model), before)


def test_astype() -> None:
    packed, plain = twins()
    for model, opt in (packed, plain):
        steps(model, opt)
        model.astype(jnp.float16)
        assert {a.dtype for a in [*model.parameters(), *model.grads()]} == {jnp.dtype(jnp.float16)}
    assert packs(packed[0]) == {None}
    assert_same(state(packed[0]), state(plain[0]), rtol=1e-3)
    mt.pack(packed[0])
    for model, _ in (packed, plain):
        opt = optim.SGD([model], lr=0.1)
        mt.backward(squared, model, jnp.asarray(X, jnp.float16), jnp.asarray(Y, jnp.float16))
        opt.step()
    assert {p.dtype for p in packed[0].parameters()} == {jnp.dtype(jnp.float16)}
    assert_same(state(packed[0]), state(plain[0]), rtol=2e-3)


class NumpyLayer:
    """A layer of a NumPy mini-torch."""

    def __init__(self, value: float) -> None:
        self.weight, self.gradient = np.full(3, value), np.ones(3)

    def parameters(self) -> list[Any]:
        return [self.weight]

    def grads(self) -> list[Any]:
        return [self.gradient]


@pytest.mark.parametrize("rule", [optim.SGD, Scaled])
def test_numpy_modules_in_the_same_optimizer(rule: Any) -> None:
    results = []
    for pack in (True, False):
        model, layer = Two(), NumpyLayer(2.0)
        opt = rule([layer, model], lr=0.1, **({"momentum": 0.9} if rule is optim.SGD else {}))
        if pack:
            mt.pack(model)
        weight = layer.weight
        steps(model, opt, 3)
        assert layer.weight is weight and weight.dtype == np.float64
        results.append((model, opt, weight))
    np.testing.assert_allclose(results[0][2], results[1][2], rtol=1e-6)
    assert not np.allclose(results[0][2], 2.0)
    assert_same(state(*results[0][:2]), state(*results[1][:2]))


# ---------------------------------------------------------------------------------------------------------------------
# Gradients that stayed inside


def test_gradients_that_were_used_up_say_so() -> None:
    packed, plain = twins()
    for model, opt in (packed, plain):
        jitted(model, opt)
        for grads in (model.grads(), model.b.grads()):
            with pytest.raises(RuntimeError, match="used up there"):
                grads[0]
        with pytest.raises(RuntimeError, match="used up there"):
            mt.backward(squared, model, X, Y)
        with pytest.raises(RuntimeError, match="used up there"):
            opt.step()
        model.grads()[0] = jnp.ones(3)
        assert_array_equal(model.grads()[0], np.ones(3))
        with pytest.raises(RuntimeError, match="used up there"):
            model.grads()[1]  # nobody has given this one
        model.zero_grad()
        steps(model, opt)
    assert_twins(packed, plain)


@pytest.mark.parametrize("other", ["none", "some"])
def test_packing_where_some_gradients_were_used_up(other: str) -> None:
    packed, plain = trainee(), trainee()
    for model, _ in (packed, plain):
        train_a(model.a, opt_of_a(model))
        if other == "some":
            give_b(model)
    mt.pack(packed[0])
    for model, opt in (packed, plain):
        with pytest.raises(RuntimeError, match="used up there"):
            model.a.grads()[0]
        assert (float(jnp.abs(model.b.grads()[0]).max()) > 0) == (other == "some")
        steps(model, opt)
    assert_twins(packed, plain)


def test_gradients_that_nobody_used_are_given_out() -> None:
    """An optimizer of a part uses some of the pack's gradients up; the others are still there."""

    @mt.jit
    def train(model: Any, opt: Any) -> None:
        model.zero_grad()
        mt.backward(squared, model, X, Y)
        opt.step()

    packed, plain = trainee(), trainee()
    mt.pack(packed[0])
    for model, _ in (packed, plain):
        opt = opt_of_a(model)
        for _ in range(2):
            train(model, opt)
        assert float(jnp.abs(model.b.grads()[0]).max()) > 0
    for mine, theirs in zip(packed[0].b.grads(), plain[0].b.grads(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)
    assert_same(everything(packed[0]), everything(plain[0]))


# ---------------------------------------------------------------------------------------------------------------------
# All or nothing


def test_exceptions_in_the_loss_and_in_compiled_code_change_nothing() -> None:
    def bad(model: Any, x: Any) -> Any:
        model.a.weight = model.a.weight + 1.0
        model(x)
        raise Boom

    def bad_step(model: Any, opt: Any) -> None:
        step(model, opt, X, Y)
        model.b.weight = model.b.weight * 2
        raise Boom

    model, opt = trainee()
    mt.pack(model)
    steps(model, opt)
    before = state(model, opt)
    for run in (
        lambda: mt.backward(bad, model, X),
        lambda: mt.backward(lambda x: bad(model, x), X),
        lambda: mt.jit(bad_step)(model, opt),
        lambda: mt.jit(lambda: bad_step(model, opt))(),
        lambda: mt.scan(lambda x: bad_step(model, opt), X),
    ):
        with pytest.raises(Boom):
            run()
        assert_same(state(model, opt), before, rtol=0)
        assert_alive(model, opt)
    assert is_packed(model)
    steps(model, opt)


class Fragile(mt.Optimizer):
    """A rule that raises for gradients of one shape, or when it makes a state."""

    broken = SimpleNamespace(update=False, state=False)
    elementwise = True

    @staticmethod
    def init_state(p: Any, h: Any) -> Any:
        if Fragile.broken.state:
            raise Boom
        return jnp.zeros_like(p)

    @staticmethod
    def update(p: Any, g: Any, s: Any, h: Any) -> Any:
        if Fragile.broken.update:
            raise Boom
        return p - h.lr * g, s + g


def test_an_exception_in_the_rule_changes_nothing() -> None:
    packed, plain = twins(rule=Fragile)
    for model, opt in (packed, plain):
        mt.backward(squared, model, X, Y)
        for broken in ("update", "state"):
            before = state(model, opt)
            setattr(Fragile.broken, broken, True)
            try:
                if broken == "state":
                    opt.modules.append(Layer(3.0))
                with pytest.raises(Boom):
                    opt.step()
            finally:
                setattr(Fragile.broken, broken, False)
                del opt.modules[1:]
            assert_same(state(model, opt), before, rtol=0)
            assert_alive(model, opt)
        opt.step()
        steps(model, opt)
    assert_twins(packed, plain)


@pytest.mark.slow
def test_with_jax_disable_jit_and_debug_nans() -> None:
    packed, plain = twins()
    with jax.disable_jit():
        steps(*packed, 1)
    with jax.debug_nans(True):
        steps(*packed, 1)
    steps(*plain, 2)
    assert_twins(packed, plain)


def lines_of(run: Callable[[], Any], stop: int | None = None) -> int:
    """How many lines of the packing code `run` executes; with `stop`, a Ctrl-C comes at that one."""
    count = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.endswith(("state/packed.py", "optim/packed_parameters.py")):
            return None
        if event == "line":
            count += 1
            if count == stop:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # which may be ignored, in the background
    sys.settrace(trace)
    try:
        with pytest.raises(KeyboardInterrupt) if stop else contextlib.nullcontext():
            run()
    finally:
        sys.settrace(before)
        signal.signal(signal.SIGINT, handler)
    return count


@pytest.mark.parametrize("what", ["pack", "unpack", "first step"])
def test_an_interrupt_while_packing(what: str) -> None:
    """Whatever line it comes at, the model and its optimizer work on as if they had been packed or not."""

    def prepared() -> tuple[Any, Any]:
        model, opt = trainee(Layer)
        steps(model, opt)
        if what != "pack":
            mt.pack(model)
        return model, opt

    def act(model: Any, opt: Any) -> Callable[[], Any]:
        return {"pack": lambda: mt.pack(model), "unpack": lambda: mt.unpack(model), "first step": opt.step}[what]

    plain = [trainee(Layer), trainee(Layer)]
    steps(*plain[0], 2)
    steps(*plain[0], 2)
    steps(*plain[1], 2)
    plain[1][1].step()
    steps(*plain[1], 2)
    total = lines_of(act(*prepared()))
    assert total > 10
    for stop in range(1, total + 1, max(total // 8, 1)):
        model, opt = prepared()
        assert lines_of(act(model, opt), stop) >= stop  # at once, or put off
        done = opt.num_steps - 2
        weight = model.weight + 0.0
        model.weight = weight + 1.0
        assert_array_equal(model.weight, weight + 1.0, err_msg=f"line {stop}")
        model.weight = weight
        steps(model, opt, 2)
        assert_same(state(model, opt), state(*plain[done]))


INTERRUPTS = textwrap.dedent(
    """
    import random, signal, time
    import jax, jax.numpy as jnp, numpy as np
    import minitorch_jax as mt
    from minitorch_jax import optim

    class Small(mt.Module):
        def __init__(self):
            for i in range(3):
                setattr(self, f"p{i}", mt.Parameter(jnp.ones(i + 1)))
        def forward(self):
            return sum(getattr(self, f"p{i}").sum() for i in range(3)) * 1e-3

    model = Small()
    opt = optim.SGD([model], lr=1e-3, momentum=0.9)
    mt.pack(model)

    def loss_fn(model):
        return model()

    trajectory = [(1.0, 0.0)]

    def check():
        counts = np.asarray(opt._steps.value)
        k = int(counts[-2])
        assert set(counts[:-1]) == {k}, "step counts are torn"
        while len(trajectory) <= k:
            p, b = trajectory[-1]
            b = 0.9 * b + 1e-3
            trajectory.append((p - 1e-3 * b, b))
        p, b = trajectory[k]
        for name, cell in model._cells.items():
            value, buffer = np.asarray(getattr(model, name)), np.asarray(opt._state[cell][1][0].value)
            assert abs(value - p).max() < 3e-6 + 1e-7 * k, (name, value[0], p, k)
            assert abs(buffer - b).max() < 1e-4 * b + 1e-9, (name, buffer[0], b, k)
            gradient = np.asarray(model.grads()[int(name[1:])])
            assert abs(gradient - 1e-3).max() < 1e-8 or abs(gradient).max() == 0, (name, gradient)
        return k

    rng = random.Random(0)
    fired = [False]

    def fire(*_):
        fired[0] = True
        signal.raise_signal(signal.SIGINT)

    def repeat():  # by itself: Python 3.13 may handle a signal at the very end of a `try`, when nothing is caught any more
        global stage, before
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, 2e-3))
        while not fired[0]:
            stage = "zero"; opt.zero_grad()
            stage = "backward"; mt.backward(loss_fn, model)
            before = opt.num_steps
            stage = "step"; opt.step()
            stage = "read"; model.p1
            stage = "assign"; model.p2 = model.p2

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, fire)
    for _ in range(3):
        opt.zero_grad(); mt.backward(loss_fn, model); opt.step(); check()
    hit, stages, start = 0, set(), opt.num_steps
    deadline = time.monotonic() + 100
    while hit < 150 and time.monotonic() < deadline:
        fired[0] = False
        stage, before = "", opt.num_steps
        try:
            repeat()
        except (KeyboardInterrupt, SystemError):
            hit += 1
            stages.add(stage)
        assert check() in (before, before + 1)
        if len({float(g[0]) for g in model.grads()}) != 1:
            raise AssertionError("a torn gradient")
    assert len({cell.pack for cell in model._cells.values()}) == 1 and opt.num_steps > start
    print(hit, len(stages))
    """
)


@pytest.mark.slow
def test_interrupts_at_random_instants_lose_and_tear_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    hit, stages = map(int, done.stdout.split())
    assert hit >= 60 and stages >= 4


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("function", [mt.pack, mt.unpack])
def test_bad_arguments(function: Any) -> None:
    name = f"mt.{function.__name__}"
    model, opt = trainee()
    with pytest.raises(ValueError, match=f"{name} takes one or more modules"):
        function()
    for bad in (opt, [model], "model", 3, None, model.a.weight, Two):
        with pytest.raises(TypeError, match=rf"{name} takes Modules, not \w+.*`{name}\(model\)`"):
            function(bad)
    with pytest.raises(TypeError, match="not dict"):
        function(model, {"a": model})
    assert packs(model) == {None}


@pytest.mark.parametrize("function", [mt.pack, mt.unpack])
def test_it_cannot_be_called_in_compiled_code(function: Any) -> None:
    model, opt = trainee()
    mt.pack(model)

    def change(x: Any) -> Any:
        function(model)
        return model(x).sum()

    for run in (
        lambda: mt.jit(change)(X),
        lambda: mt.backward(change, X),
        lambda: mt.grad(change)(X),
        lambda: mt.scan(change, X),
        lambda: jax.jit(change)(X),
        lambda: jax.grad(change)(jnp.asarray(X)),
        lambda: jax.vmap(change)(X),
    ):
        before = packs(model)
        with pytest.raises(mt.TraceError, match="Two"):
            run()
        assert packs(model) == before
    with pytest.raises(mt.TraceError, match=rf"mt\.{function.__name__}"):
        jax.jit(lambda model, x: (function(model), model(x))[1])(model, X)
    with jax.disable_jit(), pytest.raises(mt.TraceError, match="Two"):
        mt.jit(change)(X)
    steps(model, opt)
    assert_alive(model, opt)


# ---------------------------------------------------------------------------------------------------------------------
# Programs and memory


def test_packed_models_of_one_structure_share_one_program() -> None:
    train = mt.jit(lambda model, opt, x, y: step(model, opt, x, y))
    made = []
    for i in range(3):
        model, opt = trainee(lr=0.1 / (i + 1))
        mt.pack(model)
        made.append((model, opt))
        for _ in range(2):
            train(model, opt, X, Y)
        assert train.num_compiles == 1
    unpacked = trainee()
    train(*unpacked, X, Y)
    assert train.num_compiles == 2
    mt.pack(unpacked[0])
    train(*unpacked, X, Y)
    mt.pack(made[0][0])
    train(*made[0], X, Y)
    assert train.num_compiles == 2  # packed and packed anew: the one that there is
    steps(*made[1])
    train(*made[1], X, Y)
    assert train.num_compiles == 2  # eager steps in between change nothing
    assert not np.array_equal(made[1][0].a.weight, made[2][0].a.weight)


def test_a_second_packed_model_compiles_nothing() -> None:
    for _ in range(2):
        model, opt = trainee()
        mt.pack(model)
        seen = len(compiled)
        steps(model, opt, 3)
        model.a.weight = model.a.weight + 1
        state(model, opt)
        opt.lr = 0.2
        steps(model, opt, 1)
        new = len(compiled) - seen
    assert new == 0


def test_nothing_is_compiled_or_packed_anew_in_a_loop() -> None:
    model, opt = trainee()
    mt.pack(model)
    steps(model, opt, 3)
    (pack,), plan, seen = packs(model), opt._plan_now(), len(compiled)
    for i in range(5):
        step(model, opt, X + i, Y)
        opt.lr = 0.1 / (i + 1)
        model.a.weight, model.b.weight = model.b.weight, model.a.weight
    assert len(compiled) == seen and packs(model) == {pack} and opt._plan_now() is plan


def flat_arrays(length: int) -> int:
    return sum(a.shape == (length,) for a in jax.live_arrays())


@pytest.mark.slow
def test_memory_of_a_packed_model_is_freed_without_the_garbage_collector() -> None:
    def make() -> tuple[Any, Any]:
        model = nn.Sequential(nn.Linear(7, 11, key=jax.random.key(0)), nn.Linear(11, 1, key=jax.random.key(1)))
        return model, optim.SGD([model], lr=0.1, momentum=0.9)

    x, y, length = jnp.ones((2, 7)), jnp.ones((2, 1)), padded(7 * 11 + 11 + 11 + 1)
    gc.collect()
    gc.disable()
    try:
        for end in ("drop", "pack"):
            model, opt = make()
            mt.pack(model)
            for _ in range(3):
                step(model, opt, x, y)
            state(model, opt)
            assert flat_arrays(length) >= 3
            cell = model[0]._cells["weight"].pack.cell
            pointer = cell.value.unsafe_buffer_pointer()
            if end == "pack":
                mt.pack(model)
                step(model, opt, x, y)
                assert pointer not in {p.unsafe_buffer_pointer() for p in [model[0]._cells["weight"].pack.cell.value]}
                assert flat_arrays(length) <= 6
                mt.unpack(model)
                step(model, opt, x, y)
                step(model, opt, x, y)
            else:
                del model, opt
            del cell
            assert flat_arrays(length) == 0, end
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_layer_of_a_pack_that_is_dropped_is_forgotten() -> None:
    model, opt = trainee()
    mt.pack(model)
    steps(model, opt)
    (pack,) = packs(model)
    gc.collect()
    gc.disable()
    try:
        model.a = Layer(2.0)
        steps(model, opt)
        steps(model, opt)
        assert {len(pack.places), len(model.b._cells["weight"].pack.places)} == {0, 2}  # what is left was packed anew
        mt.pack(model)
        steps(model, opt)
        assert packs(model) != {pack} and num_held(opt) > 0
    finally:
        gc.enable()


# ---------------------------------------------------------------------------------------------------------------------
# Anything at all


class Node(mt.Module):
    """A tree of modules with parameters of several shapes here and there."""

    def __init__(self, shape: tuple[int, ...] | None, children: tuple[Any, ...], seed: int = 0) -> None:
        if shape is not None:
            self.weight = mt.Parameter(jnp.full(shape, 1.0 + 0.1 * len(children)))
        self.below = [Node(*child) for child in children]

    def forward(self) -> Any:
        total = sum((child() for child in self.below), start=jnp.zeros(()))
        return total if "weight" not in self._cells else total * 0.5 + (self.weight**2).mean()


shapes = st.sampled_from([None, (), (2,), (2, 3)])
trees = st.recursive(
    st.tuples(shapes, st.just(())),
    lambda below: st.tuples(shapes, st.lists(below, max_size=3).map(tuple)),
    max_leaves=3,
)
FEW = settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # no shrinking: it takes minutes
    suppress_health_check=list(HealthCheck),
)


def tree_loss(tree: Any) -> Any:
    return tree()


@pytest.mark.slow
@given(trees, st.sampled_from([2, 1024]))
@FEW
def test_random_trees(tree: Any, max_size: int) -> None:
    def make() -> Any:
        return Node((2,), (tree,))

    packed, plain = trainee(make), trainee(make)
    mt.pack(packed[0], max_size=max_size)
    for model, opt in (packed, plain):
        for _ in range(2):
            opt.zero_grad()
            mt.backward(tree_loss, model)
            opt.step()
    assert_twins(packed, plain)


STEPS: dict[str, Callable[[Any, Any], Any]] = {
    "pack": lambda model, opt: None,
    "pack a": lambda model, opt: None,
    "unpack": lambda model, opt: None,
    "unpack a": lambda model, opt: None,
    "backward": lambda model, opt: mt.backward(squared, model, X, Y),
    "backward b": lambda model, opt: mt.backward(only_b, model.b, X, Y),
    "step": lambda model, opt: opt.step(),
    "zero_grad": lambda model, opt: opt.zero_grad(),
    "zero_grad a": lambda model, opt: model.a.zero_grad(),
    "freeze a": lambda model, opt: model.a.freeze(),
    "unfreeze a": lambda model, opt: model.a.unfreeze(),
    "assign": lambda model, opt: setattr(model.a, "weight", model.a.weight + 0.5),
    "assign grad": lambda model, opt: model.grads().__setitem__(-1, jnp.array(0.25)),
    "replace": lambda model, opt: setattr(model.b, "bias", mt.Parameter(0.25)),
}
PACKING = {
    "pack": lambda model: mt.pack(model),
    "pack a": lambda model: mt.pack(model.a),
    "unpack": lambda model: mt.unpack(model),
    "unpack a": lambda model: mt.unpack(model.a),
}


@pytest.mark.slow
@given(st.lists(st.sampled_from(list(STEPS)), min_size=4, max_size=12))
@settings(FEW, max_examples=10)
def test_random_sequences_of_operations(names: list[str]) -> None:
    packed, plain = twins()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what no loss has read
        for name in names:
            if name in PACKING:
                PACKING[name](packed[0])
            for model, opt in (packed, plain):
                STEPS[name](model, opt)
            assert_twins(packed, plain)
        for pair in (packed, plain):
            steps(*pair)
        assert_twins(packed, plain)
