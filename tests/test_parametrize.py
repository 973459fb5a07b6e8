"""Parametrized attributes: every layer reads them, in every form of code; registering, assigning, removing, copying."""

from __future__ import annotations

import copy
import importlib
import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_contract import Case, numpy_of, ours_of
from numpy.testing import assert_allclose, assert_array_equal
from oracle import actual

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.nn.utils import parametrizations
from minitorch_jax.nn.utils import parametrize as P  # noqa: N812

FILES = sorted(path.stem for path in Path(__file__).parent.glob("test_nn_*.py"))
LAYERS: dict[str, Case] = {}
for case in [case for file in FILES for case in getattr(importlib.import_module(file), "CASES", [])]:
    if not case.is_function and not case.composed and case.inputs:
        LAYERS.setdefault(case.name, case)
SCALE = 3.0  # what a test changes, and compiled code follows


class Doubled(mt.Module):
    """Exact in floating point, so that nothing but the way there may differ."""

    calls = 0

    def forward(self, x: jax.Array) -> jax.Array:
        Doubled.calls += 1
        return x * 2

    def right_inverse(self, x: jax.Array) -> jax.Array:
        return x / 2


class Symmetric(mt.Module):
    def forward(self, x: jax.Array) -> jax.Array:
        return jnp.triu(x) + jnp.triu(x, 1).T

    def right_inverse(self, x: jax.Array) -> jax.Array:
        return jnp.triu(x)


class Kept(mt.Module):
    def forward(self, x: jax.Array) -> jax.Array:
        return x * 1.5


class Product(mt.Module):
    """Two originals for one attribute."""

    def forward(self, column: jax.Array, row: jax.Array) -> jax.Array:
        return column * row

    def right_inverse(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x[:, :1], jnp.ones((1, x.shape[1]))


class Scaled(mt.Module):
    def forward(self, x: jax.Array) -> jax.Array:
        return x * SCALE

    def right_inverse(self, x: jax.Array) -> jax.Array:
        return x / SCALE


def linear(*shape: int, **options: Any) -> Any:
    return nn.Linear(*(shape or (3, 3)), key=jax.random.key(0), **options)


def doubled(*shape: int) -> Any:
    return P.register_parametrization(linear(*shape), "weight", Doubled())


X = jax.random.normal(jax.random.key(1), (4, 3))


# -- every layer ------------------------------------------------------------------------------------------------------


def parameters_of(layer: Any) -> list[tuple[Any, str]]:
    every = [(module, name) for module in layer.modules() for name in module._cells]
    return [place for place in every if not place[1].startswith("running_")]  # which BatchNorm also asks whether it has


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", [name for name, case in LAYERS.items() if parameters_of(case.ours())])
def test_every_layer_reads_each_parametrized_attribute_once(name: str) -> None:
    """Parameters, and buffers such as the weight of a loss: all of a layer at the same time, in evaluation mode."""
    case = LAYERS[name]
    plain = case.ours().eval()
    layer = copy.deepcopy(plain)
    places = [place for place in parameters_of(layer) if jnp.issubdtype(getattr(*place).dtype, jnp.floating)]
    for module, attribute in places:
        P.register_parametrization(module, attribute, Doubled())
    assert [P.is_parametrized(*place) for place in places] == [True] * len(places)
    Doubled.calls = 0
    got = layer(*ours_of(case.inputs), **ours_of(case.call))
    assert Doubled.calls == len(places)
    for mine, other in zip(numpy_of(got), numpy_of(plain(*ours_of(case.inputs), **ours_of(case.call))), strict=True):
        assert_array_equal(mine, other)
    for place in places:
        P.remove_parametrizations(*place)
    assert jax.tree.structure(layer) == jax.tree.structure(plain)
    for mine, other in zip(jax.tree.leaves(layer), jax.tree.leaves(plain), strict=True):
        assert_array_equal(mine, other)


def test_the_contract_is_about_all_kinds_of_layers() -> None:
    kinds = {"Linear", "Bilinear", "Conv2d", "ConvTranspose1d", "Embedding", "EmbeddingBag", "BatchNorm2d", "LayerNorm"}
    kinds |= {"GroupNorm", "RMSNorm", "PReLU", "LSTM", "GRU", "RNN", "LSTMCell", "MultiheadAttention"}
    assert kinds <= set(LAYERS)


# -- every form of code -----------------------------------------------------------------------------------------------


def loss_fn(model: Any, x: Any) -> Any:
    return (model(x) ** 2).mean()


def eager(model: Any, opt: Any) -> None:
    for _ in range(3):
        opt.zero_grad()
        mt.backward(loss_fn, model, X)
        opt.step()


def jitted(model: Any, opt: Any) -> None:
    run = mt.jit(one_step)
    for _ in range(3):
        run(model, opt, X)


def one_step(model: Any, opt: Any, x: Any) -> Any:
    opt.zero_grad()
    loss = mt.backward(loss_fn, model, x)
    opt.step()
    return loss


def scanned(model: Any, opt: Any) -> None:
    mt.scan(lambda x: one_step(model, opt, x), jnp.stack([X] * 3))


def functional(model: Any, opt: Any) -> None:
    @jax.jit
    def step(opt: Any, x: Any) -> Any:
        opt.zero_grad()
        opt.modules[0].accumulate(jax.grad(loss_fn)(opt.modules[0], x))
        opt.step()
        return opt

    new = opt
    for _ in range(3):
        new = step(new, X)
    model.load_state_dict(new.modules[0].state_dict())


def packed(model: Any, opt: Any) -> None:
    mt.pack(model)
    jitted(model, opt)


def saved(model: Any, opt: Any) -> None:
    eager(model, opt)
    other = doubled()
    other.load_state_dict(pickle.loads(pickle.dumps(model)).state_dict())  # noqa: S301
    model.load_state_dict(copy.deepcopy(other).state_dict())


@pytest.mark.one_in(3)
@pytest.mark.parametrize("way", [eager, jitted, scanned, functional, packed, saved])
def test_it_trains_in_every_form(way: Any) -> None:
    """A weight 2 v learns four times as fast by v's gradient, as by hand."""
    model, plain = doubled(), linear()
    opt = optim.SGD([model], lr=0.1, momentum=0.5)
    way(model, opt)
    weight, bias, velocity = plain.weight, plain.bias, [0.0, 0.0]
    for _ in range(3):
        grads = jax.grad(lambda w, b: ((X @ w.T + b[None]) ** 2).mean(), argnums=(0, 1))(weight, bias)
        velocity = [0.5 * v + g for v, g in zip(velocity, grads, strict=True)]
        weight, bias = weight - 0.4 * velocity[0], bias - 0.1 * velocity[1]
    assert_allclose(model.weight, weight, rtol=1e-5, atol=1e-6)
    assert_allclose(model.bias, bias, rtol=1e-5, atol=1e-6)
    assert_allclose(model.parametrizations.weight.original * 2, weight, rtol=1e-5, atol=1e-6)


def test_transforms_and_copies() -> None:
    model = doubled()
    stacked = jax.tree.map(lambda *a: jnp.stack(a), model, model)
    assert jax.vmap(lambda m: m(X))(stacked).shape == (2, 4, 3)
    assert jax.jit(lambda m: m.weight)(model).shape == (3, 3)
    assert jax.eval_shape(lambda m: m(X), model).shape == (4, 3)
    again = jax.jit(jax.grad(jax.checkpoint(loss_fn)))(model, X)
    for mine, other in zip(again.parameters(), jax.grad(loss_fn)(model, X).parameters(), strict=True):
        assert_allclose(mine, other, rtol=1e-6)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), jax.tree.map(lambda a: a, model)):  # noqa: S301
        assert type(other) is nn.Linear and repr(other) == repr(model)
        assert_array_equal(other.weight, model.weight)
        other.weight = jnp.zeros((3, 3))
        assert model.weight.any() and not other.weight.any()


def test_a_checkpoint_of_a_parametrized_model(tmp_path: Path) -> None:
    model = doubled()
    mt.save(tmp_path / "model.npz", model=model)
    other = P.register_parametrization(nn.Linear(3, 3, key=jax.random.key(9)), "weight", Doubled())
    mt.load(tmp_path / "model.npz", model=other)
    assert_array_equal(other.weight, model.weight)
    with pytest.raises(ValueError, match="parametrizations.weight.original"):
        mt.load(tmp_path / "model.npz", model=linear())


def test_models_of_one_structure_share_their_programs_and_plain_ones_have_others() -> None:
    run = mt.jit(lambda model, x: model(x))
    for _ in range(3):
        run(doubled(), X)
    assert run.num_compiles == 1
    run(linear(), X)
    run(P.remove_parametrizations(doubled(), "weight"), X)
    assert run.num_compiles == 2


def test_registering_and_removing_is_a_change_of_structure() -> None:
    model = linear()
    run = mt.jit(lambda x: model(x))
    out = run(X)
    P.register_parametrization(model, "weight", Kept())
    assert_allclose(run(X), X @ model.weight.T + model.bias[None], rtol=1e-5)
    assert not np.allclose(run(X), out)
    P.remove_parametrizations(model, "weight", leave_parametrized=False)
    assert_array_equal(run(X), out)
    assert run.num_compiles == 2


def test_summary_repr_dir_and_paths() -> None:
    model = nn.Sequential(doubled())
    assert "weight" in dir(model[0]) and "(parametrizations)" in repr(model) and "(0): Doubled()" in repr(model)
    rows = {row.path: row for row in mt.summary(model, X).rows}
    assert rows["0.parametrizations.weight"].num_parameters == 9 and rows["0"].num_parameters == 3
    assert mt.summary(model).num_parameters == 12
    assert list(model.state_dict()) == ["0.bias", "0.parametrizations.weight.original"]
    with pytest.raises(
        AttributeError, match="has no parameter or buffer `0.weight`; it has 0.bias, 0.parametrizations.weight.original"
    ):
        model.get_parameter("0.weight")
    axis = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((1,), ("model",), axis_types=(axis,))
    mt.shard(model, mesh, {"*.parametrizations.weight.original": jax.sharding.PartitionSpec("model")})
    assert model[0].weight.sharding.device_set == model[0].bias.sharding.device_set
    assert model(X).shape == (4, 3)


def test_frozen_originals() -> None:
    model = linear().freeze()
    P.register_parametrization(model, "weight", Product(), unsafe=True)
    assert len(model.parameters()) == 0
    assert len(model.unfreeze().parameters()) == 3
    P.remove_parametrizations(model.freeze(), "weight")
    assert len(model.parameters()) == 0 and list(model.state_dict()) == ["weight", "bias"]


def test_code_that_is_followed_includes_a_parametrization() -> None:
    global SCALE
    model = P.register_parametrization(linear(), "weight", Scaled())

    @mt.jit
    def assign_and_read(w: Any) -> Any:
        model.weight = w
        return model.parametrizations.weight.original, model.weight

    original, weight = assign_and_read(jnp.ones((3, 3)))
    assert_allclose(original * 3, weight)
    try:
        SCALE = 4.0
        assert_allclose(assign_and_read(jnp.ones((3, 3)))[0], 0.25)
    finally:
        SCALE = 3.0


# -- chains, several originals, assignment ----------------------------------------------------------------------------


def test_a_chain_applies_in_order_and_inverts_in_reverse() -> None:
    model = P.register_parametrization(linear(), "weight", Symmetric())
    P.register_parametrization(model, "weight", Doubled())
    assert len(model.parametrizations.weight) == 2
    original = model.parametrizations.weight.original
    assert_allclose(model.weight, 2 * (jnp.triu(original) + jnp.triu(original, 1).T))
    value = jnp.arange(9.0).reshape(3, 3)
    value = value + value.T
    model.weight = value
    assert_array_equal(model.weight, value)
    assert_array_equal(model.parametrizations.weight.original, jnp.triu(value) / 2)
    model.weight = mt.Parameter(2 * value)  # as in torch, for which a Parameter is an array
    assert_array_equal(model.weight, 2 * value)
    assert "weight" not in model._cells
    model.weight = np.zeros((3, 3), np.float32)
    assert not model.weight.any()


def test_several_originals() -> None:
    model = P.register_parametrization(linear(), "weight", Product())
    held = model.parametrizations.weight
    assert isinstance(held, P.ParametrizationList) and not held.is_tensor and held.ntensors == 2
    assert held.original0.shape == (3, 1) and held.original1.shape == (1, 3)
    mt.backward(loss_fn, model, X)
    assert [grad.shape for grad in model.grads()] == [(3,), (3, 1), (1, 3)]
    model.weight = jnp.ones((3, 3))
    assert_array_equal(held.original0, jnp.ones((3, 1)))
    with pytest.raises(
        ValueError, match=r"right_inverse must return \(float32\[3, 1\], float32\[1, 3\]\), as before; got"
    ):
        model.weight = jnp.ones((3, 3), jnp.bfloat16)
    with pytest.raises(ValueError, match="weight is computed from 2 originals, so there is none to bring back"):
        P.remove_parametrizations(model, "weight", leave_parametrized=False)
    assert P.is_parametrized(model, "weight")


def test_buffers_and_several_attributes_in_any_order_of_removal() -> None:
    model, plain = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    for name in ("running_mean", "weight", "bias"):
        P.register_parametrization(model, name, Doubled())
    assert model.parametrizations.running_mean._cells["original"].kind == "buffer"
    model(X)  # the running mean is assigned, in training mode
    plain(X)
    assert_allclose(model.running_mean, plain.running_mean, rtol=1e-6)
    for name in ("weight", "running_mean", "bias"):
        P.remove_parametrizations(model, name)
    assert jax.tree.structure(model) == jax.tree.structure(plain)
    assert not P.is_parametrized(model) and not hasattr(model, "parametrizations")


def test_a_class_with_a_default_and_one_with_its_own_getattr() -> None:
    class WithDefault(mt.Module):
        weight: Any = None

        def __init__(self) -> None:
            self.weight = mt.Parameter(jnp.ones(2))

        def __getattr__(self, name: str) -> Any:
            if name == "other":
                return 7
            return super().__getattr__(name)

    model = P.register_parametrization(WithDefault(), "weight", Doubled())
    assert model.weight.tolist() == [1.0, 1.0] and model.other == 7 and WithDefault().weight.tolist() == [1.0, 1.0]
    assert WithDefault.weight is None
    model.weight = jnp.zeros(2)
    assert not model.weight.any()


def test_tied_parameters_keep_their_value_on_the_other_side() -> None:
    one, two = linear(), linear()
    two.tie("weight", one, "weight")
    before = one.weight
    P.register_parametrization(two, "weight", Kept())  # without a right_inverse: still tied
    assert_array_equal(one.weight, before)
    assert_array_equal(two.weight, before * 1.5)
    both = nn.Sequential(one, two)
    assert len(both.parameters()) == 3
    P.remove_parametrizations(two, "weight")
    assert_array_equal(one.weight, before)
    assert_array_equal(two.weight, before * 1.5)
    two.tie("weight", one, "weight")
    P.register_parametrization(two, "weight", Doubled())  # its original is half of the value: a parameter of its own
    assert_array_equal(one.weight, before)
    assert_array_equal(two.weight, before)


def test_an_optimizer_made_before_keeps_its_state_and_trains_the_originals() -> None:
    model = linear()
    opt = optim.SGD([model], lr=0.1, momentum=0.9)
    eager(model, opt)
    cell = model._cells["weight"]
    P.register_parametrization(model, "weight", Kept())
    assert model.parametrizations.weight._cells["original"] is cell
    before = model.parametrizations.weight.original
    opt.zero_grad()
    mt.backward(loss_fn, model, X)
    grad = next(grad for grad, a in zip(model.grads(), model.parameters(), strict=True) if a.shape == (3, 3))
    opt.step()
    step = before - model.parametrizations.weight.original
    assert not np.allclose(step, 0.1 * grad, rtol=1e-3)  # the momentum of the steps before is there


def test_parametrizations_are_put_in_the_modules_mode() -> None:
    model = P.register_parametrization(linear().eval(), "weight", Doubled())
    assert [module.training for module in model.modules()] == [False] * 4
    assert all(module.training for module in model.train().modules())


def test_transfer() -> None:
    one, two = doubled(), nn.Linear(3, 3, key=jax.random.key(5))
    P.transfer_parametrizations_and_params(one, two)
    assert_array_equal(two.weight, one.weight)
    one.weight = jnp.ones((3, 3))
    assert_array_equal(two.weight, jnp.ones((3, 3)))  # they share the original
    assert nn.Sequential(one, two).num_parameters() == 9 + 6
    assert P.type_before_parametrizations(one) is nn.Linear
    with pytest.raises(ValueError, match="'bias' of this Linear is not parametrized"):
        P.transfer_parametrizations_and_params(one, two, "bias")


# -- cached -----------------------------------------------------------------------------------------------------------


def test_cached_computes_once_until_something_changes() -> None:
    model = doubled()
    Doubled.calls = 0
    with P.cached():
        with P.cached():
            first = model.weight
        assert model.weight is first and Doubled.calls == 1
        model.weight = jnp.ones((3, 3))
        assert_array_equal(model.weight, jnp.ones((3, 3)))
        model(X)
        assert Doubled.calls == 2
        outside = jax.jit(lambda x: (model.weight @ x, jax.checkpoint(lambda x: model.weight @ x)(x), model.weight @ x))
        outside(X.T)
        assert Doubled.calls <= 4  # once in each trace
        model(X)
        assert Doubled.calls <= 4
    model(X)
    before = Doubled.calls
    model(X)
    assert Doubled.calls == before + 1


@pytest.mark.one_in(9)
@pytest.mark.parametrize("way", [lambda f: f, mt.jit])
def test_cached_does_one_power_iteration_for_a_loop_over_time(way: Any) -> None:
    def cell() -> Any:
        made = nn.RNNCell(3, 3, key=jax.random.key(0))
        return parametrizations.spectral_norm(made, "weight_hh", key=jax.random.key(1))

    def run(cell: Any, xs: Any) -> Any:
        h = jnp.zeros((1, 3))
        for x in xs:
            h = cell(x, h)
        return h

    once, often, xs = cell(), cell(), [jnp.ones((1, 3))] * 3
    vector = often.parametrizations.weight_hh[0]
    with P.cached():
        way(run)(once, xs)
    _ = often.weight_hh
    assert_allclose(once.parametrizations.weight_hh[0]._u, vector._u, rtol=1e-5)
    run(often, xs)
    assert not np.allclose(once.parametrizations.weight_hh[0]._u, vector._u, rtol=1e-6)


# -- errors -----------------------------------------------------------------------------------------------------------


class Narrow(mt.Module):
    def forward(self, x: jax.Array) -> jax.Array:
        return x[:1]


class Half(mt.Module):
    def forward(self, x: jax.Array) -> jax.Array:
        return x.astype(jnp.bfloat16)


class Nothing(mt.Module):
    def forward(self, x: jax.Array) -> None:
        return None


class Words(Kept):
    def right_inverse(self, x: jax.Array) -> str:
        return "x"


class HalfBack(Kept):
    def right_inverse(self, x: jax.Array) -> jax.Array:
        return x.astype(jnp.bfloat16)


REFUSED = [
    (
        lambda: (linear(), "wieght", Kept()),
        ValueError,
        "Linear has no parameter or buffer 'wieght'; it has weight, bias",
    ),
    (lambda: (linear(), "in_features", Kept()), ValueError, "no parameter or buffer 'in_features'"),
    (lambda: (linear(), "weight", jnp.tanh), TypeError, "a parametrization is a Module, whose `forward`"),
    (lambda: ([], "weight", Kept()), TypeError, "is registered on a Module; got"),
    (lambda: (linear(), "weight", Narrow()), ValueError, r"like the one that is parametrized, float32\[3, 3\]; it has"),
    (lambda: (linear(), "weight", Half()), ValueError, r"has returned bfloat16\[3, 3\]. `unsafe=True` leaves"),
    (lambda: (linear(), "weight", Nothing()), ValueError, "it has returned None"),
    (lambda: (linear(), "weight", Words()), ValueError, "an array, or a list or tuple of arrays; got 'x'"),
    (
        lambda: (linear(), "weight", HalfBack()),
        ValueError,
        r"must keep the dtype, float32; it has returned bfloat16\[3, 3\]",
    ),
    (lambda: (doubled(), "weight", Narrow()), ValueError, "the parametrization must return an array like"),
    (lambda: (doubled(), "weight", HalfBack()), ValueError, "right_inverse, of a further parametrization, must return"),
    (lambda: (nn.ParameterList([X]), "0", Kept()), TypeError, "ParameterList cannot have a parametrization of '0'"),
]


@pytest.mark.parametrize(("make", "error", "message"), REFUSED)
def test_what_cannot_be_registered_changes_nothing(make: Any, error: Any, message: str) -> None:
    model, name, parametrization = make()
    before = jax.tree.structure(model), jax.tree.leaves(model)
    with pytest.raises(error, match=message):
        P.register_parametrization(model, name, parametrization)
    assert jax.tree.structure(model) == before[0]
    for mine, other in zip(jax.tree.leaves(model), before[1], strict=True):
        assert_array_equal(mine, other)


def test_unsafe_leaves_the_checks_out() -> None:
    model = P.register_parametrization(linear(), "weight", Half(), unsafe=True)
    assert model.weight.dtype == jnp.bfloat16 and model.parametrizations.weight.unsafe
    model = P.register_parametrization(linear(), "weight", Narrow(), unsafe=True)
    assert model.weight.shape == (1, 3)


def test_other_mistakes() -> None:
    model = P.register_parametrization(linear(), "weight", Kept())
    with pytest.raises(
        RuntimeError, match="parametrization Kept has no `right_inverse`, so its attribute cannot be assigned"
    ):
        model.weight = jnp.ones((3, 3))
    with pytest.raises(TypeError, match="Linear.weight is computed by a parametrization: it takes an array"):
        model.weight = "x"
    with pytest.raises(
        AttributeError, match="Linear.weight is computed by a parametrization: `nn.utils.parametrize.remove_"
    ):
        del model.weight
    with pytest.raises(ValueError, match="nothing in this Linear that 'bias' names is parametrized; there are weight"):
        P.remove_parametrizations(model, "bias")
    with pytest.raises(TypeError, match="remove_parametrizations takes a Module; got"):
        P.remove_parametrizations([], "bias")
    with pytest.raises(ValueError, match="needs at least one parametrization; got none"):
        P.ParametrizationList([], mt.Parameter(X))
    assert repr(P.ParametrizationList([Kept()], mt.Parameter(X))).startswith(
        "ParametrizationList(original=float32[4, 3]"
    )

    class Taken(mt.Module):
        def __init__(self) -> None:
            self.weight = mt.Parameter(X)
            self.parametrizations = 3

    with pytest.raises(ValueError, match="Taken has an attribute `parametrizations` of its own"):
        P.register_parametrization(Taken(), "weight", Kept())

    @mt.jit
    def register(x: Any) -> Any:
        P.register_parametrization(model, "bias", Kept())
        return x

    with pytest.raises(mt.TraceError, match=r"Linear\.bias was given a new Parameter, Buffer or module"):
        register(X)
    assert not P.is_parametrized(model, "bias")


# -- torch ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_chain_of_ones_own_trains_as_in_torch_and_its_state_dict_loads() -> None:
    """In torch a parametrization is a subclass, so this is not recorded."""

    class TheirSymmetric(actual.nn.Module):
        def forward(self, x: Any) -> Any:
            return x.triu() + x.triu(1).T

        def right_inverse(self, x: Any) -> Any:
            return x.triu()

    class TheirDoubled(actual.nn.Module):
        def forward(self, x: Any) -> Any:
            return x * 2

        def right_inverse(self, x: Any) -> Any:
            return x / 2

    load_from_torch = importlib.import_module("minitorch_jax.adapters.torch").load_from_torch
    theirs, ours = actual.nn.Linear(3, 3), linear()
    for one in (TheirSymmetric(), TheirDoubled()):
        actual.nn.utils.parametrize.register_parametrization(theirs, "weight", one)
    for two in (Symmetric(), Doubled()):
        P.register_parametrization(ours, "weight", two)
    load_from_torch(ours, theirs)
    other, opt = actual.optim.Adam(theirs.parameters(), lr=0.05), optim.Adam([ours], lr=0.05)
    for _ in range(3):
        opt.zero_grad()
        loss = mt.backward(loss_fn, ours, X)
        opt.step()
        other.zero_grad()
        expected = (theirs(actual.tensor(np.array(X))) ** 2).mean()
        expected.backward()
        other.step()
        assert_allclose(loss, expected.item(), rtol=1e-5)
    for (path, mine), (name, tensor) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert path == name
        assert_allclose(mine, tensor.numpy(), rtol=1e-4, atol=1e-6)
    value = np.eye(3, dtype=np.float32)
    ours.weight, theirs.weight = jnp.array(value), actual.tensor(value)
    assert_allclose(
        ours.parametrizations.weight.original, theirs.parametrizations.weight.original.detach().numpy(), atol=1e-6
    )
