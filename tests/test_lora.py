"""LoRA: what is frozen, trained, saved and merged; what an optimizer keeps; whole models by names and globs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.nn.utils import parametrizations, parametrize


def linear() -> Any:
    return nn.Linear(6, 4, key=jax.random.key(0))


def mlp() -> Any:
    keys = jax.random.split(jax.random.key(0), 2)
    return nn.Sequential(nn.Linear(6, 8, key=keys[0]), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 4, key=keys[1]))


X, Y = jax.random.normal(jax.random.key(1), (5, 6)), jax.random.normal(jax.random.key(2), (5, 4))


def loss_fn(model: Any, x: Any, y: Any) -> Any:
    return ((model(x) - y) ** 2).mean()


def trained(model: Any, opt: Any, steps: int = 3) -> list[float]:
    @mt.jit
    def step(x: Any, y: Any) -> Any:
        opt.zero_grad()
        loss = mt.backward(loss_fn, model, x, y)
        opt.step()
        return loss

    return [float(step(X, Y)) for _ in range(steps)]


def test_the_base_is_frozen_and_nothing_changes_at_first() -> None:
    layer = linear()
    before, out = layer.state_dict(), layer(X)
    assert parametrizations.lora(layer, rank=2, alpha=6, key=jax.random.key(3)) is layer
    assert_array_equal(layer(X), out)
    assert [name for name, _ in layer.named_parameters()] == [
        "parametrizations.weight.0.lora_A",
        "parametrizations.weight.0.lora_B",
    ]
    adapter = layer.parametrizations.weight[0]
    assert adapter.lora_A.shape == (2, 6) and not adapter.lora_B.any()
    assert 0.1 < abs(adapter.lora_A).max() <= 1 / 6**0.5
    losses = trained(layer, optim.Adam([layer], lr=0.05))
    assert losses[-1] < losses[0]
    after = layer.state_dict()
    assert_array_equal(after["parametrizations.weight.original"], before["weight"])
    assert_array_equal(after["bias"], before["bias"])
    a, b = np.float64(adapter.lora_A), np.float64(adapter.lora_B)
    assert b.any()
    assert_allclose(layer.weight, np.float64(before["weight"]) + 3 * b @ a, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_formula() -> None:
    layer = parametrizations.lora(linear(), rank=2, alpha=6)
    adapter = layer.parametrizations.weight[0]
    adapter.lora_B = jax.random.normal(jax.random.key(5), (4, 2))
    w, b, a_, b_ = layer.parametrizations.weight.original, layer.bias, adapter.lora_A, adapter.lora_B
    expected = jax.grad(lambda a, c: ((X @ (w + 3.0 * c @ a).T + b[None] - Y) ** 2).mean(), argnums=(0, 1))(a_, b_)
    mt.backward(loss_fn, layer, X, Y)
    for mine, other in zip(layer.grads(), expected, strict=True):
        assert_allclose(mine, other, rtol=1e-4, atol=1e-6)


def test_the_optimizer_keeps_state_for_the_adapters_only() -> None:
    model = parametrizations.lora(mlp(), rank=2, name="*.weight")
    adapters = sum(array.size for array in model.parameters())
    assert adapters == 2 * (6 + 8) + 2 * (8 + 4)
    opt = optim.Adam([model], lr=0.1)
    trained(model, opt, 1)
    kept = [array for array in jax.tree.leaves(opt.state_dict()) if getattr(array, "ndim", 0) == 2]
    assert sum(array.size for array in kept) == 2 * adapters


def test_adapters_are_saved_alone_and_loaded_into_a_fresh_model(tmp_path: Path) -> None:
    model = parametrizations.lora(mlp(), rank=2, name="*.weight")
    trained(model, optim.Adam([model], lr=0.05))
    adapters = dict(model.named_parameters())
    assert all("lora_" in name for name in adapters) and len(adapters) == 4
    mt.save(tmp_path / "adapters.npz", adapters=adapters)
    fresh = parametrizations.lora(mlp(), rank=2, name="*.weight")
    loaded = fresh.load_state_dict(mt.load(tmp_path / "adapters.npz")["adapters"], strict=False)
    assert loaded.unexpected_keys == [] and not any("lora_" in name for name in loaded.missing_keys)
    assert_array_equal(fresh(X), model(X))
    wrong = parametrizations.lora(mlp(), rank=3, name="*.weight")
    with pytest.raises(ValueError, match=r"lora_A is float32\[3, 6\], and was given float32\[2, 6\]"):
        wrong.load_state_dict(adapters, strict=False)


def test_merging_gives_the_exact_sum_and_the_structure_of_the_base() -> None:
    model = parametrizations.lora(mlp(), rank=2, name="*.weight")
    trained(model, optim.SGD([model], lr=0.1))
    weights, out = [model[0].weight, model[3].weight], model(X)
    assert parametrize.remove_parametrizations(model, "*") is model
    assert_array_equal(model[0].weight, weights[0])
    assert_array_equal(model[3].weight, weights[1])
    assert_array_equal(model(X), out)
    assert list(model.state_dict()) == list(mlp().state_dict())
    assert model.parameters() == [] or len(model.parameters()) == 0  # frozen, as before
    assert jax.tree.structure(model.unfreeze()) == jax.tree.structure(mlp())


def test_the_adapters_can_be_dropped() -> None:
    model, base = parametrizations.lora(mlp(), rank=2, name="*.weight"), mlp()
    trained(model, optim.SGD([model], lr=0.1))
    parametrize.remove_parametrizations(model, "*.weight", leave_parametrized=False)
    for mine, other in zip(jax.tree.leaves(model), jax.tree.leaves(base), strict=True):
        assert_array_equal(mine, other)


def test_several_calls_a_head_and_what_is_frozen() -> None:
    model = mlp()
    parametrizations.lora(model, rank=2, name="0.weight")
    parametrizations.lora(model, rank=3, name=["3.weight"])
    model[3].requires_grad_()
    model[3].parametrizations.weight.original  # the base of the head is trained with it
    names = [name for name, _ in model.named_parameters()]
    assert names == [
        "0.parametrizations.weight.0.lora_A",
        "0.parametrizations.weight.0.lora_B",
        "3.bias",
        "3.parametrizations.weight.original",
        "3.parametrizations.weight.0.lora_A",
        "3.parametrizations.weight.0.lora_B",
    ]
    model.freeze()
    parametrizations.lora(model, rank=1, name="0.weight")  # a second adapter on top; those that are frozen stay so
    assert [name for name, _ in model.named_parameters()] == [
        "0.parametrizations.weight.1.lora_A",
        "0.parametrizations.weight.1.lora_B",
    ]


@pytest.mark.slow
def test_a_transformer_by_globs() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    before = model(x)
    parametrizations.lora(model, rank=2, name=("*.self_attn.*weight", "*.linear1.weight"))
    attributes = {
        name.split(".parametrizations.")[0] + "." + name.split(".")[-3] for name, _ in model.named_parameters()
    }
    assert sorted(attributes) == sorted(
        f"layers.{i}.{name}"
        for i in (0, 1)
        for name in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight")
    )
    assert_allclose(model(x), before, atol=1e-6)
    mt.backward(lambda model, x: model(x).sum(), model, x)
    assert all(grad.shape == array.shape for grad, array in zip(model.grads(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda: nn.Conv2d(2, 4, 3, groups=2), jnp.ones((1, 2, 5, 5))),
        (lambda: nn.ConvTranspose1d(2, 3, 2), jnp.ones((1, 2, 4))),
        (lambda: nn.Embedding(7, 3), jnp.arange(4)),
        (lambda: nn.Embedding(7, 3, max_norm=0.5), jnp.arange(4)),
        (lambda: nn.Bilinear(2, 3, 4), None),
    ],
)
def test_other_layers(layer: Any, x: Any) -> None:
    made = layer()
    inputs = (x,) if x is not None else (jnp.ones((1, 2)), jnp.ones((1, 3)))
    out = copy.deepcopy(made)(*inputs)
    parametrizations.lora(made, rank=2)
    assert_allclose(made(*inputs), out, rtol=1e-6)
    original = made.parametrizations.weight.original
    made.parametrizations.weight[0].lora_B = jnp.ones_like(made.parametrizations.weight[0].lora_B)
    assert not np.allclose(made(*inputs), out)
    assert_array_equal(made.parametrizations.weight.original, original)
    weight = made.weight
    assert_array_equal(parametrize.remove_parametrizations(made, "weight").weight, weight)


class Tied(mt.Module):
    def __init__(self) -> None:
        self.embedding = nn.Embedding(5, 3, key=jax.random.key(0))
        self.head = nn.Linear(3, 5, bias=False, key=jax.random.key(1))
        self.head.tie("weight", self.embedding, "weight")

    def forward(self, x: jax.Array) -> jax.Array:
        return self.head(self.embedding(x))


def test_a_tied_weight_gets_one_adapter() -> None:
    model = parametrizations.lora(Tied(), rank=2, name="*.weight")
    assert len(model.parameters()) == 2
    model.head.parametrizations.weight[0].lora_B = jnp.ones((5, 2))
    assert_array_equal(model.head.weight, model.embedding.weight)
    weight = model.head.weight
    parametrize.remove_parametrizations(model, "*")
    assert_array_equal(model.embedding.weight, weight)
    assert model.num_parameters() == 15  # still one


def test_an_adapter_of_one_side_of_a_tie_leaves_the_other_side() -> None:
    model = parametrizations.lora(Tied(), rank=2, name="head.weight")
    base = model.embedding.weight
    model.head.parametrizations.weight[0].lora_B = jnp.ones((5, 2))
    merged = model.head.weight
    parametrize.remove_parametrizations(model, "head.weight")
    assert_array_equal(model.head.weight, merged)
    assert_array_equal(model.embedding.weight, base)


def test_a_weight_may_be_assigned() -> None:
    layer = parametrizations.lora(linear(), rank=2)
    layer.parametrizations.weight[0].lora_B = jnp.ones((4, 2))
    layer.weight = jnp.ones((4, 6))
    assert_allclose(layer.weight, jnp.ones((4, 6)), atol=1e-6)
    with pytest.raises(ValueError, match=r"Linear.weight has the shape \(4, 6\), and was given float32\[1, 6\]"):
        layer.weight = jnp.ones((1, 6))


def test_models_with_adapters_share_their_programs() -> None:
    run = mt.jit(lambda model, x: model(x))
    for seed in range(3):
        model = parametrizations.lora(mlp(), rank=2, name="*.weight", key=jax.random.key(seed))
        run(model, X)
    assert run.num_compiles == 1


def test_a_maker_makes_adapters_in_their_places() -> None:
    axis = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((1,), ("model",), axis_types=(axis,))
    spec = jax.sharding.PartitionSpec
    rules = {"*.original": spec("model"), "*.lora_B": spec("model")}
    model = mt.shard(lambda: parametrizations.lora(mlp(), rank=2, name="*.weight"), mesh, rules)
    assert model[0].parametrizations.weight.original.sharding.spec == spec("model")
    assert model(X).shape == (5, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, r"'weight' names no parameter of two or more axes .*; there are 0.weight, 3.weight. Write"),
        ({}, ValueError, r'Write `name="\*.weight"` for those of all submodules'),
        ({"name": "2.weight"}, ValueError, "'2.weight' names no parameter of two or more axes"),
        ({"name": ["*.weight", "*.wieght"]}, ValueError, r"'\*.wieght' names no parameter"),
        ({"rank": 0}, ValueError, "rank must be a positive integer; got 0"),
        ({"rank": 1.5}, ValueError, "rank must be a positive integer; got 1.5"),
        ({"alpha": -1}, ValueError, "alpha must be a positive number; got -1"),
    ],
)
def test_what_is_refused_changes_nothing(options: Any, error: Any, message: str) -> None:
    model = mlp()
    with pytest.raises(error, match=message):
        parametrizations.lora(model, **options)
    assert jax.tree.structure(model) == jax.tree.structure(mlp())


def test_something_else_than_a_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"lora takes a Module; got \[\] \(list\)"):
        parametrizations.lora([])
