"""Groups with a rule of their own: two rules in one optimizer, Muon with AdamW above all."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from optimizers import GROUPED, OPTIMIZERS

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.adapters import numpy as mini

X = np.array([[1, 4, 2, 0], [3, 3, 1, 4]])
ADAMW = {"rule": optim.AdamW, "lr": 0.01, "betas": (0.8, 0.95)}
BY_ADAMW = {"names": ["embed*", "head*"], **ADAMW}


class Tiny(mt.Module):
    """A language model without its attention: embedding, hidden matrices, norm, head."""

    def __init__(self, seed: int = 0) -> None:
        keys = jax.random.split(jax.random.key(seed), 4)
        self.embed = nn.Embedding(5, 4, key=keys[0])
        self.blocks = [nn.Linear(4, 4, key=keys[1]), nn.Linear(4, 4, key=keys[2])]
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5, key=keys[3])

    def forward(self, x: Any) -> Any:
        x = self.embed(x)
        for block in self.blocks:
            x = x + jnp.tanh(block(x))
        return self.head(self.norm(x))


def loss_fn(model: Any, x: Any) -> Any:
    return nn.functional.cross_entropy(model(x).reshape(-1, 5), x.reshape(-1))


def step(model: Any, opt: Any, x: Any) -> Any:
    opt.zero_grad()
    loss = mt.backward(loss_fn, model, x)
    opt.step()
    return loss


def make(**more: Any) -> tuple[Any, Any]:
    model = Tiny()
    return model, optim.Muon([model, BY_ADAMW, ADAMW], lr=0.02, **more)


def train(model: Any, opt: Any, steps: int = 3) -> tuple[Any, Any]:
    for _ in range(steps):
        step(model, opt, X)
    return model, opt


def rules(opt: Any) -> dict[str, tuple[int | None, str]]:
    return {row.path: (row.group, row.rule) for row in opt.summary().rows}


# -- which rule --------------------------------------------------------------------------------------------------------

PAPERS = {
    "0.embed.weight": "AdamW",
    **{f"0.blocks.{i}.{name}": rule for i in (0, 1) for name, rule in (("weight", "Muon"), ("bias", "AdamW"))},
    **{"0.norm.weight": "AdamW", "0.norm.bias": "AdamW", "0.head.weight": "AdamW", "0.head.bias": "AdamW"},
}


def test_muon_for_the_matrices_and_adamw_for_the_rest() -> None:
    _, opt = make()
    assert {path: rule for path, (_, rule) in rules(opt).items()} == PAPERS
    assert [rules(opt)[f"0.{name}"][0] for name in ("head.bias", "norm.bias", "blocks.0.weight")] == [1, 2, 0]
    model = Tiny()  # the other way round: Muon for the matrices of the blocks
    around = optim.AdamW([model, {"names": "blocks.*", "rule": optim.Muon, "lr": 0.02}], lr=0.01)
    assert {path: rule for path, (_, rule) in rules(around).items()} == PAPERS
    matrices = optim.Muon([model, ADAMW], lr=0.02)  # as `optax.contrib.muon`
    assert {path for path, (_, rule) in rules(matrices).items() if rule == "Muon"} == {
        *("0.embed.weight", "0.blocks.0.weight", "0.blocks.1.weight", "0.head.weight")
    }
    assert matrices.groups[1].names == () and matrices.groups[1].modules == (model,)


def test_the_summary_and_the_repr_show_the_rules() -> None:
    _, opt = make()
    row = opt.summary().rows[0]
    assert (row.path, row.rule, row.settings) == ("0.embed.weight", "AdamW", ("lr=0.01", "betas=(0.8, 0.95)"))
    assert repr(opt.groups[1]) == "Group(['embed*', 'head*'], lr=0.01, betas=(0.8, 0.95), rule=AdamW)"
    assert repr(opt.groups[2]) == "Group(lr=0.01, betas=(0.8, 0.95), rule=AdamW)"
    assert opt.groups[1].rule is optim.AdamW and opt.groups[0].rule is optim.Muon


def test_convolution_kernels_are_no_matrices() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(4, 2))
    opt = optim.Muon([model, ADAMW])
    assert rules(opt)["0.0.weight"] == (1, "AdamW") and rules(opt)["0.1.weight"] == (0, "Muon")
    with pytest.raises(
        ValueError, match=r"Muon takes parameters of two axes only, and not 0\.0\.weight \(float32\[2, 1, 3"
    ):
        optim.Muon([model])
    model[0].freeze()
    model[1].bias = jnp.zeros(2)
    assert rules(optim.Muon([model, ADAMW]))["0.0.weight"] == (0, "frozen")


# -- values ------------------------------------------------------------------------------------------------------------


def test_it_is_two_optimizers_bit_by_bit() -> None:
    """Each parameter's trajectory is that of an optimizer that has no other parameter, on the same gradients."""
    model, opt = make()
    entries = [(path, cell) for path, _, _, cell in model._entries()]
    alone = {}
    for path, cell in entries:
        holder = Holder(np.asarray(cell.value))
        is_muons = PAPERS[f"0.{path}"] == "Muon"
        alone[path] = (
            holder,
            (optim.Muon([holder], lr=0.02) if is_muons else optim.AdamW([holder], lr=0.01, betas=(0.8, 0.95))),
        )
    for _ in range(4):
        opt.zero_grad()
        mt.backward(loss_fn, model, X)
        for (path, _), grad in zip(entries, model.grads(), strict=True):
            holder, optimizer = alone[path]
            optimizer.zero_grad()
            holder.accumulate([grad])
            optimizer.step()
        opt.step()
        for path, cell in entries:
            assert_array_equal(cell.value, alone[path][0].weight, err_msg=path)


class Holder(mt.Module):
    def __init__(self, array: Any) -> None:
        self.weight = mt.Parameter(array)


def test_it_is_optaxs_muon() -> None:
    """On a square matrix: optax takes the other axis for that of the outputs. It, too, has Adam for what has not two axes."""
    optax = pytest.importorskip("optax")
    model = nn.Linear(3, 3, key=jax.random.key(0))
    opt = optim.Muon(
        [model, {"rule": optim.AdamW, "lr": 0.05, "weight_decay": 0.0}], lr=0.05, weight_decay=0.0, nesterov=False
    )
    params = {"weight": model.weight, "bias": model.bias}
    tx = optax.contrib.muon(0.05, beta=0.95, nesterov=False)  # with True, its AdamW has Nesterov momentum, too
    state = tx.init(params)
    rng = np.random.default_rng(0)
    for _ in range(3):
        grads = {
            "weight": jnp.asarray(rng.normal(size=(3, 3)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=3), jnp.float32),
        }
        opt.zero_grad()
        model.accumulate([grads["weight"], grads["bias"]])
        opt.step()
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
    assert_allclose(model.bias, params["bias"], rtol=1e-4)
    assert_allclose(model.weight, params["weight"], atol=4e-3)  # the iteration is in bfloat16 here


class Two(mt.Module):
    def __init__(self) -> None:
        self.first = mt.Parameter(np.array([[0.5, -1.0], [0.25, 2.0]], np.float32))
        self.second = mt.Parameter(np.array([[-0.5, 1.5], [1.0, -0.25]], np.float32))


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", GROUPED)
def test_any_two_rules(name: str) -> None:
    """`second` by SGD with momentum, `first` by each rule there is, and the other way round; eager, and compiled."""
    kind = OPTIMIZERS[name]
    sgd = {"rule": optim.SGD, "lr": 0.05, "momentum": 0.9}
    grads = np.random.default_rng(1).normal(size=(3, 2, 2, 2)).astype(np.float32)
    one, two = Two(), Two()
    apart = kind([one]), optim.SGD([two], lr=0.05, momentum=0.9)
    models = Two(), Two()
    mixed = (
        kind([models[0], {"names": "second", **sgd}]),
        optim.SGD([models[1], {"names": "first", "rule": kind}], lr=0.05, momentum=0.9),
    )
    compiled = mt.jit(lambda opt: opt.step())
    for g in grads:
        for module in (one, two, *models):
            module.zero_grad()
            module.accumulate(list(map(jnp.asarray, g)))
        apart[0].step()
        apart[1].step()
        mixed[0].step()
        compiled(mixed[1])
    for module in models:
        assert_allclose(module.first, one.first, rtol=2e-6, atol=1e-7)
        assert_allclose(module.second, two.second, rtol=2e-6, atol=1e-7)
    assert compiled.num_compiles == 1
    fields = apart[0].state_dict()["state"]["0.first"].keys()
    assert (
        mixed[0].state_dict()["state"]["0.first"].keys() == mixed[1].state_dict()["state"]["0.first"].keys() == fields
    )


# -- on every side -----------------------------------------------------------------------------------------------------


def jitted(model: Any, opt: Any) -> tuple[Any, Any]:
    compiled = mt.jit(step)
    for _ in range(3):
        compiled(model, opt, X)
    assert compiled.num_compiles == 1
    return model, opt


def scanned(model: Any, opt: Any) -> tuple[Any, Any]:
    mt.scan(lambda x: step(model, opt, x), np.stack([X] * 3))
    return model, opt


def functional(model: Any, opt: Any) -> tuple[Any, Any]:
    @jax.jit
    def pure(opt: Any, x: Any) -> Any:
        step(opt.modules[0], opt, x)
        return opt

    for _ in range(3):
        opt = pure(opt, X)
    return opt.modules[0], opt


def copied(model: Any, opt: Any) -> tuple[Any, Any]:
    return train(*copy.deepcopy(train(model, opt, 1)), 2)


def pickled(model: Any, opt: Any) -> tuple[Any, Any]:
    return train(*pickle.loads(pickle.dumps(train(model, opt, 1))), 2)


def packed(model: Any, opt: Any) -> tuple[Any, Any]:
    mt.pack(model)
    return train(model, opt)


SIDES: list[Callable[[Any, Any], tuple[Any, Any]]] = [jitted, scanned, functional, copied, pickled, packed]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("side", SIDES)
def test_every_side_gives_the_same(side: Any) -> None:
    model, opt = side(*make())
    other, wanted = train(*make())
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert_allclose(mine, theirs, rtol=1e-4, atol=2e-4)
    assert rules(opt) == rules(wanted) and [group.rule for group in opt.groups] == [
        optim.Muon,
        optim.AdamW,
        optim.AdamW,
    ]
    assert opt.groups[1].betas == (0.8, 0.95) and opt.num_steps == 3


def test_its_state_is_saved_and_loaded(tmp_path: Any) -> None:
    model, opt = train(*make())
    state = opt.state_dict()
    assert [group.get("rule") for group in state["groups"]] == [None, "AdamW", "AdamW"]
    assert set(state["state"]["0.head.weight"]) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(state["state"]["0.blocks.0.weight"]) == {"step", "momentum_buffer"}
    mt.save(tmp_path / "run.npz", model=model, opt=opt)
    other = Tiny(1)
    again = optim.Muon([other, {**BY_ADAMW, "lr": 0.5}, ADAMW], lr=0.3)
    mt.load(tmp_path / "run.npz", model=other, opt=again)
    assert (again.lr, again.groups[1].lr, again.groups[2].lr) == (0.02, 0.01, 0.01)
    train(model, opt, 1)
    train(other, again, 1)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert_array_equal(mine, theirs)
    different = optim.Muon([other, {"names": ["embed*", "head*"], "rule": optim.SGD}, ADAMW])
    with pytest.raises(ValueError, match=r"groups\[1\]: its rule is AdamW there, and SGD here"):
        different.load_state_dict(state)
    del state["groups"][1]["betas"]
    with pytest.raises(ValueError, match=r"missing: betas of groups\[1\]"):
        again.load_state_dict(state)


def test_settings_are_the_rules_own() -> None:
    model, opt = make()
    muon, adamw, _ = opt.groups
    opt.lr = 0.5
    assert [group.lr for group in opt.groups] == [0.5, 0.01, 0.01]  # those of another rule have all of their own
    adamw.betas = [0.5, 0.6]
    adamw["amsgrad"] = True
    assert adamw.betas == (0.5, 0.6) and adamw.weight_decay == 0.01 and muon.weight_decay == 0.1
    assert "betas" in adamw.keys() and "momentum" not in adamw.keys() and "betas" not in muon.keys()
    step(model, opt, X)
    assert "max_exp_avg_sq" in opt.state_dict()["state"]["0.head.bias"]
    with pytest.raises(AttributeError, match="AdamW has no attribute `momentum`"):
        _ = adamw.momentum
    with pytest.raises(ValueError, match=r"AdamW: betas must be a tuple of 2 numbers"):
        adamw.betas = 3
    with pytest.raises(ValueError, match=r"AdamW: betas must be a finite number in \[0, 0"):
        adamw.betas = (0.9, 1.0)
    with pytest.raises(AttributeError, match="Muon has no attribute `betas`"):
        _ = opt.betas
    opt.skip_nonfinite = True
    assert [group.skip_nonfinite for group in opt.groups] == [True] * 3
    adamw.lr = lambda t: 0.1 / (1.0 + jnp.float32(t))
    step(model, opt, X)
    assert adamw.lr == pytest.approx(0.1 / 3)
    plateau = optim.ReduceOnPlateau(optim.Muon([Tiny(), ADAMW], lr=0.02), patience=0, factor=0.5)
    plateau.step(1.0)
    plateau.step(2.0)
    assert [group.lr for group in plateau.opt.groups] == [0.01, 0.005]


@pytest.mark.parametrize(
    ("group", "error", "match"),
    [
        ({"rule": optim.LBFGS}, TypeError, "the rule of a group must be a class of optimizers that updates each array"),
        ({"rule": "AdamW"}, TypeError, "such as `optim.AdamW`; got 'AdamW'"),
        (
            {"rule": optim.AdamW, "betaz": 1},
            TypeError,
            r"AdamW\(\) got an unexpected keyword argument 'betaz'; did you mean",
        ),
        ({"rule": optim.AdamW, "lr": -1.0}, ValueError, "AdamW: lr must be a finite number"),
        ({"rule": optim.SGD, "nesterov": True}, ValueError, "SGD: nesterov needs a momentum > 0"),
        (
            {"names": "*bias", "rule": optim.Muon},
            ValueError,
            r"'\*bias' matches 0\.0\.bias, and Muon takes parameters of two axes only",
        ),
    ],
)
def test_bad_rules(group: dict[str, Any], error: type[Exception], match: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(error, match=match):
        optim.SGD([model, {"names": "*", **group}])
    opt = optim.SGD([model])
    with pytest.raises(error, match=match):
        opt.add_param_group({"names": "*", **group})
    assert opt.modules == [model]


def test_a_parameter_that_moves_to_another_rule_begins_anew() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    opt = optim.SGD([model], lr=0.1, momentum=0.9)

    def one() -> None:
        opt.zero_grad()
        mt.backward(lambda m, x: (m(x) ** 2).sum(), model, jnp.ones((1, 2)))
        opt.step()

    one()
    kept = opt.state_dict()["state"]["0.0.weight"]
    opt.add_param_group({"names": "1.*", "rule": optim.Adam})
    state = opt.state_dict()["state"]
    assert_array_equal(state["0.0.weight"]["momentum_buffer"], kept["momentum_buffer"])
    assert set(state["0.1.weight"]) == {"step", "exp_avg", "exp_avg_sq"}
    assert (state["0.0.weight"]["step"], state["0.1.weight"]["step"]) == (1, 0)
    model[1].freeze()
    one()
    opt.groups[1].modules = [model]
    model[1].unfreeze()
    one()
    assert opt.state_dict()["state"]["0.1.weight"]["step"] == 1


class MyState(NamedTuple):
    count: Any


class Mine(optim.Optimizer):
    """A rule of the user's, for vectors."""

    push: float = 1.0

    @staticmethod
    def takes(p: Any) -> bool:
        return p.ndim == 1

    @staticmethod
    def init_state(p: Any, h: Any) -> Any:
        return MyState(jnp.zeros_like(p))

    @staticmethod
    def update(p: Any, g: Any, s: Any, h: Any) -> tuple[Any, Any]:
        return p + h.push, MyState(s.count + 1)


class ByHand(optim.SGD):
    def __init__(self, modules: Any, speed: float = 1.0, **options: Any) -> None:
        super().__init__(modules, speed / 4, momentum=speed / 2, **options)


def test_rules_of_ones_own() -> None:
    model = nn.Linear(2, 2)
    opt = optim.SGD([model, {"names": "*", "rule": Mine, "push": 0.5}], lr=0.1)
    assert rules(opt) == {"0.weight": (0, "SGD"), "0.bias": (1, "Mine")}
    before = np.asarray(model.bias)
    model.accumulate([jnp.ones((2, 2)), jnp.ones(2)])
    opt.step()
    assert_allclose(model.bias, before + 0.5, rtol=1e-6)
    with pytest.raises(ValueError, match=r"Mine takes some parameters only, and not 0\.weight"):
        Mine([model])
    opt = optim.AdamW([model, {"names": "bias", "rule": ByHand, "speed": 2.0}])
    assert (opt.groups[1].lr, opt.groups[1].momentum) == (0.5, 1.0)


def test_networks_in_numpy() -> None:
    network, other = mini.Linear(3, 2), mini.Linear(3, 2)
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        np.copyto(b, a)
    opt = optim.Adam([network, {"names": "1", "rule": optim.SGD, "lr": 0.5}], lr=0.1)
    whole = optim.Adam([other], lr=0.1)
    bias = network.parameters()[1].copy()
    for each, optimizer in ((network, opt), (other, whole)):
        for grad in each.grads():
            grad[...] = 1.0
        optimizer.step()
    assert_allclose(network.parameters()[0], other.parameters()[0], rtol=1e-6)
    assert_allclose(network.parameters()[1], bias - 0.5, rtol=1e-6)


@pytest.mark.slow
def test_one_program_steps_all_rules() -> None:
    model, opt = make(track_grad_norm=True)
    step(model, opt, X)
    programs = opt._plan.step
    for _ in range(2):
        step(model, opt, X)
    assert opt._plan.step is programs and opt.grad_norm > 0
    _, again = make(track_grad_norm=True)
    assert again._plan_now().step is programs  # another optimizer of the same groups has no program of its own
