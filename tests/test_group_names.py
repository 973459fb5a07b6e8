"""Groups of an optimizer that have parameters by name, or by their arrays."""

from __future__ import annotations

import copy
import importlib
import pickle
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from optimizers import GROUPED, OPTIMIZERS
from oracle import torch
from training import everything

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.adapters import numpy as mini
from minitorch_jax.module.globs import Globs

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
GRADS = np.random.default_rng(3).normal(size=(20, 2, 2, 2)).astype(np.float32)
NO_DECAY = {"names": ["*bias", "1.*"], "weight_decay": 0.0}


def net() -> Any:
    keys = jax.random.split(jax.random.key(0))
    return nn.Sequential(nn.Linear(3, 4, key=keys[0]), nn.LayerNorm(4), nn.Linear(4, 2, key=keys[1]))


def loss_fn(model: Any, x: Any) -> Any:
    return (model(x) ** 2).sum()


def step(model: Any, opt: Any, x: Any) -> Any:
    opt.zero_grad()
    loss = mt.backward(loss_fn, model, x)
    opt.step()
    return loss


def group_of(opt: Any) -> dict[str, int | None]:
    return {row.path: row.group for row in opt.summary().rows}


# -- which parameters --------------------------------------------------------------------------------------------------

SPELLINGS: dict[str, Callable[[Any], list[Any]]] = {
    "beside the model": lambda model: [model, NO_DECAY],
    "before the model": lambda model: [NO_DECAY, model],
    "both with modules": lambda model: [{"modules": [model], **NO_DECAY}, {"modules": [model]}],
    "exact names": lambda model: [
        model,
        {"names": ["0.bias", "1.weight", "1.bias", "2.bias"], "weight_decay": 0.0},
    ],
    "torch's arrays": lambda model: [
        model,
        {"params": [p for _, p in model.named_parameters() if p.ndim < 2], "weight_decay": 0.0},
    ],
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_decay_of_biases_and_norms_in_one_line(spelling: str) -> None:
    found = []
    for how in (SPELLINGS[spelling], None):
        model = net()
        opt = optim.AdamW(how(model), lr=0.1, weight_decay=0.5) if how else None
        opt = opt or optim.AdamW([model], lr=0.1, weight_decay=0.5, decay_matrices_only=True)
        for _ in range(3):
            step(model, opt, X)
        found.append([*model.parameters()])
    for mine, theirs in zip(*found, strict=True):
        assert_allclose(mine, theirs, rtol=1e-6, atol=1e-7)


def test_the_first_group_that_matches_counts() -> None:
    model = net()
    opt = optim.SGD([model, {"names": "*.bias", "lr": 0.2}, {"names": ["2.*", "0.weight"], "lr": 0.3}], lr=0.1)
    assert group_of(opt) == {
        **{"0.0.weight": 2, "0.0.bias": 1, "0.1.weight": 0, "0.1.bias": 1, "0.2.weight": 2, "0.2.bias": 1}
    }
    assert opt.modules == (model,) and opt.groups[1].modules == (model,) and opt.groups[0].modules == [model]
    assert [group.names for group in opt.groups] == [None, ("*.bias",), ("2.*", "0.weight")]
    assert repr(opt.groups[1]) == "Group('*.bias', lr=0.2)"
    assert repr(opt.groups[2]) == "Group(['2.*', '0.weight'], lr=0.3)"
    assert opt.summary().rows[1].settings == ("lr=0.2",)


def test_globs_are_of_the_groups_own_modules() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    opt = optim.SGD([first, second, {"modules": [second], "names": "bias", "lr": 0.5}])
    assert group_of(opt) == {"0.weight": 0, "0.bias": 0, "1.weight": 0, "1.bias": 1}
    opt = optim.SGD([first, second, {"names": "bias", "lr": 0.5}])
    assert group_of(opt) == {"0.weight": 0, "0.bias": 1, "1.weight": 0, "1.bias": 1}
    opt.groups[1].modules = [first]
    assert group_of(opt) == {"0.weight": 0, "0.bias": 1, "1.weight": 0, "1.bias": 0}
    opt.groups[0].modules.append(nn.Linear(2, 1))
    assert group_of(opt)["2.bias"] == 0


def test_modules_beside_groups_are_one_group() -> None:
    model, other = net(), nn.Linear(2, 2)
    opt = optim.SGD([other, {"modules": [model], "lr": 0.5}, nn.Linear(1, 1)], lr=0.1)
    assert [len(group.modules) for group in opt.groups] == [2, 1] and opt.groups[1].lr == 0.5


def test_new_modules_are_matched_and_what_is_frozen_needs_no_group() -> None:
    model = net()
    model[0].freeze()
    opt = optim.SGD([{"modules": [model], "names": ["1.*", "2.*"]}], lr=0.1, momentum=0.5)
    assert list(group_of(opt)) == ["0.1.weight", "0.1.bias", "0.2.weight", "0.2.bias"]
    before = np.asarray(model[0].weight)
    step(model, opt, X)
    assert_array_equal(model[0].weight, before)
    model[0].unfreeze()
    with pytest.raises(
        ValueError, match=r"SGD: no group has 0\.0\.weight \(float32\[4, 3\]\), 0\.0\.bias .*freeze\(\)"
    ):
        opt.step()
    model[0].freeze()
    model[2].freeze()  # what matches frozen parameters only is no mistake
    assert optim.SGD([model, {"names": "2.*", "lr": 0.5}]).summary().rows[-1].rule == "frozen"


def test_tied_parameters_have_one_group_under_any_name() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.tie("weight", first, "weight")
    model = nn.Sequential(first, second)
    assert group_of(optim.SGD([model, {"names": "1.weight", "lr": 0.5}]))["0.0.weight"] == 1
    with pytest.raises(
        ValueError, match=r"in two groups, as 0\.0\.weight in groups\[1\] and as 0\.1\.weight in groups\[2"
    ):
        optim.SGD([model, {"names": "0.*"}, {"names": "1.*"}])


BAD: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "matches nothing": (
        lambda m: [m, {"names": ["*.bias", "*.bais"]}],
        ValueError,
        r"SGD: groups\[1\]: '\*\.bais' matches no parameter; there are 0\.weight, 0\.bias, 1\.weight",
    ),
    "taken before": (
        lambda m: [m, {"names": "0.*"}, {"names": "0.bias"}],
        ValueError,
        r"groups\[2\]: '0\.bias' matches 0\.0\.bias, which groups\[1\] has already: the first group that matches counts",
    ),
    "all at once": (
        lambda m: [m, {"names": ["a", "b"]}],
        ValueError,
        r"(?s)fit the modules:\n  groups.*'a'.*\n  .*'b'",
    ),
    "in no group": (
        lambda m: [{"modules": [m], "names": "*bias"}],
        ValueError,
        r"no group has 0\.0\.weight .*, 0\.1\.weight .*, 0\.2\.weight .*`SGD\(\[model, \{\"names\"",
    ),
    "no modules": (lambda m: [{"names": "*bias"}], ValueError, "modules is empty"),
    "twice": (lambda m: [m, {"modules": [m]}], ValueError, "reached twice"),
    "no glob": (lambda m: [m, {"names": []}], TypeError, "a glob or a list of globs over the names in `state_dict"),
    "no string": (lambda m: [m, {"names": lambda name: True}], TypeError, "must be a glob or a list of globs"),
    "two ways": (lambda m: [m, {"names": "0", "params": []}], ValueError, "has 'names' and 'params'"),
    "neither": (lambda m: [m, {"lr": 0.1}], ValueError, "needs 'modules', a list of modules, or 'names'"),
    "live list": (
        lambda m: [m, {"params": m.parameters()}],
        ValueError,
        r"write `\{\"modules\": \[layer\], \.\.\.\}`, not .*`\[model, \{\"names\"",
    ),
    "a copy": (
        lambda m: [m, {"params": [jnp.copy(m[0].bias)]}],
        ValueError,
        r"params\[0\] of a group, an array, float32\[4\], is not the array of a parameter .*: a copy, or one that",
    ),
    "unclear": (
        lambda m: [m, copy.deepcopy(m), {"params": [m[0].bias]}],
        ValueError,
        r"not clear which parameters the arrays in `params` of a group are: 0\.bias\. Name",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_said(case: str) -> None:
    modules, error, match = BAD[case]
    model = net()
    with pytest.raises(error, match=match):
        optim.SGD(modules(model))
    opt = optim.SGD([model], lr=0.1, momentum=0.5)
    for group in [
        group for group in modules(model) if isinstance(group, dict) and case not in ("in no group", "no modules")
    ]:
        if case in ("taken before", "unclear"):
            continue
        before = repr(opt)
        with pytest.raises(error):
            opt.add_param_group(group)
        assert repr(opt) == before and opt.modules == [model]
        step(model, opt, X)


def test_names_and_rules_of_a_group_are_not_assigned() -> None:
    opt = optim.SGD([net(), NO_DECAY])
    with pytest.raises(AttributeError, match="the names of a group cannot be assigned: make the optimizer anew"):
        opt.groups[1].names = ["*"]
    with pytest.raises(AttributeError, match="the rule of a group"):
        opt.param_groups[1]["rule"] = optim.AdamW
    with pytest.raises(TypeError, match="names: a rule has a `names` already"):

        class Named(optim.Optimizer):
            names: float = 0.5


# -- as torch shows them -----------------------------------------------------------------------------------------------


def test_param_groups_are_as_torchs() -> None:
    model = net()
    opt = optim.AdamW([model, NO_DECAY], lr=0.1)
    theirs = torch.optim.AdamW([{"params": [torch.ones(2)]}], lr=0.1).param_groups[0]
    how_torch_runs_it = {"foreach", "fused", "capturable", "differentiable"}
    assert set(theirs.keys()) - how_torch_runs_it <= set(opt.param_groups[0].keys())
    params = opt.param_groups[1]["params"]
    assert [p.shape for p in params] == [(4,), (4,), (4,), (2,)] and params[0] is model[0].bias
    assert sum(p.size for group in opt.param_groups for p in group["params"]) == model.num_parameters()
    params[0] = jnp.full(4, 7.0)  # live, as `model.parameters()`
    assert_array_equal(model[0].bias, np.full(4, 7))
    for group in opt.param_groups:
        group["lr"] *= 0.5
    assert [group["lr"] for group in opt.param_groups] == [0.05, 0.05]
    alone = optim.SGD([model], lr=0.1).param_groups
    assert len(alone) == 1 and len(alone[0]["params"]) == 6 and alone[0]["lr"] == 0.1
    with pytest.raises(KeyError):
        alone[0]["lrs"]


def test_a_group_of_a_groups_names_that_is_added_later_keeps_all_states() -> None:
    model = net()
    opt = optim.Adam([model], lr=0.1)
    for _ in range(2):
        step(model, opt, X)
    before = opt.state_dict()
    opt.add_param_group({"names": "2.*", "lr": 0.0})
    after = opt.state_dict()
    assert after["groups"] == [{}, {"lr": 0.0}]
    for path, fields in before["state"].items():
        for name, value in fields.items():
            assert_array_equal(value, after["state"][path][name])
    head, body = np.asarray(model[2].weight), np.asarray(model[0].weight)
    step(model, opt, X)
    assert_array_equal(model[2].weight, head)
    assert np.abs(np.asarray(model[0].weight) - body).max() > 1e-3
    with pytest.raises(ValueError, match=r"groups\[2\]: '2\.bias' matches 0\.2\.bias, which groups\[1\] has already"):
        opt.add_param_group({"names": "2.bias"})
    assert len(opt.groups) == 2
    opt.add_param_group({"modules": [nn.Linear(1, 1)], "lr": 0.3})
    assert group_of(opt)["1.bias"] == 2


# -- values ------------------------------------------------------------------------------------------------------------


class Pair(mt.Module):
    def __init__(self) -> None:
        self.first = mt.Parameter(np.array([[0.5, -1.0], [0.25, 2.0]], np.float32))
        self.second = mt.Parameter(np.array([[-0.5, 1.5], [1.0, -0.25]], np.float32))


def options(name: str) -> dict[str, Any]:
    return {"momentum": 0.9} if name == "SGD" else {}


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", GROUPED)
def test_groups_by_name_are_two_optimizers_and_torchs(name: str) -> None:
    """20 steps; `first` has a rate of its own, by name."""
    kind, settings = OPTIMIZERS[name], options(name)
    model, other = Pair(), Pair()
    opt = kind([model, {"names": "fir*", "lr": 0.03}], lr=0.01, **settings)
    one, two = Pair(), Pair()
    apart = kind([one], lr=0.03, **settings), kind([two], lr=0.01, **settings)
    peer = (
        getattr(torch.optim, name, None) if name not in ("Optimizer", "Muon") else None
    )  # Muon's sums are in bfloat16
    if name in ("Lion", "LAMB", "LARS", "AdaBelief", "Yogi", "Adan", "ScheduleFreeAdamW"):
        peer = None
    if peer is not None:
        theirs = [torch.nn.Parameter(torch.tensor(np.asarray(p))) for p in other.parameters()]
        peer = peer([{"params": theirs[:1], "lr": 0.03}, {"params": theirs[1:]}], lr=0.01, **settings)
    for g in GRADS:
        for module, optimizer in ((model, opt), (one, apart[0]), (two, apart[1])):
            optimizer.zero_grad()
            module.accumulate(list(map(jnp.asarray, g)))
            optimizer.step()
        if peer is not None:
            for p, grad in zip(theirs, g, strict=True):
                p.grad = torch.tensor(grad)
            peer.step()
    assert_allclose(model.first, one.first, rtol=2e-6, atol=1e-7)
    assert_allclose(model.second, two.second, rtol=2e-6, atol=1e-7)
    if peer is not None:
        for p, mine, start in zip(theirs, model.parameters(), Pair().parameters(), strict=True):
            assert_allclose(mine - start, p.detach().numpy() - np.asarray(start), rtol=2e-4, atol=2e-6)


# -- everything else that groups do ------------------------------------------------------------------------------------


def make(**more: Any) -> tuple[Any, Any]:
    model = net()
    group = {**NO_DECAY, "lr": lambda t: 0.1 / (1.0 + jnp.float32(t)), "betas": (0.8, 0.99)}
    return model, optim.AdamW([model, group], lr=0.05, **more)


def train(model: Any, opt: Any) -> tuple[Any, Any]:
    for _ in range(2):
        step(model, opt, X)
    return model, opt


def jitted(model: Any, opt: Any) -> tuple[Any, Any]:
    compiled = mt.jit(step)
    for _ in range(2):
        compiled(model, opt, X)
    assert compiled.num_compiles == 1
    return model, opt


def scanned(model: Any, opt: Any) -> tuple[Any, Any]:
    mt.scan(lambda x: step(model, opt, x), np.stack([X] * 2))
    return model, opt


def functional(model: Any, opt: Any) -> tuple[Any, Any]:
    def pure(opt: Any, x: Any) -> Any:
        step(opt.modules[0], opt, x)
        return opt

    compiled = jax.jit(pure)
    for _ in range(2):
        opt = compiled(opt, X)
    return opt.modules[0], opt


def copied(model: Any, opt: Any) -> tuple[Any, Any]:
    model, opt = copy.deepcopy((model, opt))
    return train(model, opt)


def packed(model: Any, opt: Any) -> tuple[Any, Any]:
    mt.pack(model)
    return train(model, opt)


SIDES: list[Callable[[Any, Any], tuple[Any, Any]]] = [jitted, scanned, functional, copied, packed]


@pytest.mark.one_in(9)
@pytest.mark.parametrize("side", SIDES)
def test_every_side_gives_the_same(side: Any) -> None:
    wanted, found = everything(*train(*make())), everything(*side(*make()))
    for name in wanted:
        if name != "1.groups" and not callable(wanted[name]):
            assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-7, err_msg=name)
    assert [group.keys() for group in found["1.groups"]] == [group.keys() for group in wanted["1.groups"]]


def test_copies_pickles_and_checkpoints_know_their_groups(tmp_path: Any) -> None:
    model = net()
    opt = optim.AdamW([model, NO_DECAY], lr=0.1)
    train(model, opt)
    mt.save(tmp_path / "run.npz", model=model, opt=opt)
    other = net()
    again = optim.AdamW([other, {**NO_DECAY, "weight_decay": 0.3}], lr=0.2)
    mt.load(tmp_path / "run.npz", model=other, opt=again)
    pairs = [(other, again), pickle.loads(pickle.dumps((model, opt)))]
    for _, again in pairs:
        assert group_of(again) == group_of(opt) and again.groups[1].weight_decay == 0.0 and again.lr == 0.1
    train(model, opt)
    for other, again in pairs:
        train(other, again)
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert_array_equal(mine, theirs)


def test_master_weights_clipping_and_freezing() -> None:
    model = net().astype(jnp.bfloat16)
    opt = optim.AdamW([model, {**NO_DECAY, "master_weights": True}], lr=0.01)
    rows = {row.path: row.state_bytes for row in opt.summary().rows}
    assert rows["0.0.bias"] == 3 * 4 * 4 and rows["0.0.weight"] == 2 * 2 * 12
    opt.zero_grad()
    mt.backward(loss_fn, model, X.astype(jnp.bfloat16))
    mt.clip_grad_norm(opt, 1e-3)
    opt.step()
    assert model[0].bias.dtype == jnp.bfloat16
    model[1].freeze()
    before = np.asarray(model[1].weight)
    opt.step()
    assert_array_equal(model[1].weight, before)


def test_networks_in_numpy() -> None:
    networks = [mini.Linear(3, 2), mini.Linear(3, 2)]
    for a, b in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        np.copyto(b, a)
    opt = optim.SGD([networks[0], {"names": "1", "lr": 0.0}], lr=0.1)
    whole = optim.SGD([networks[1]], lr=0.1)
    assert opt.groups[1]["params"][0] is networks[0].parameters()[1]
    before = networks[0].parameters()[1].copy()
    for network, optimizer in zip(networks, (opt, whole), strict=True):
        for grad in network.grads():
            grad[...] = 1.0
        optimizer.step()
    assert_array_equal(networks[0].parameters()[0], networks[1].parameters()[0])
    assert_array_equal(networks[0].parameters()[1], before)
    with pytest.raises(ValueError, match="'bias' matches no parameter; there are 0, 1"):
        optim.SGD([networks[0], {"names": "bias"}])


def test_numbers_of_a_group_are_assigned_within_compiled_code() -> None:
    model = net()
    opt = optim.SGD([model, {"names": "0.*", "lr": 1.0}], lr=0.1)

    @mt.jit
    def run(lr: Any) -> None:
        opt.groups[1].lr = lr
        step(model, opt, X)

    run(jnp.float32(0.0))
    before = np.asarray(model[0].weight)
    run(jnp.float32(0.0))
    assert opt.groups[1].lr == 0.0 and run.num_compiles == 1
    assert_array_equal(model[0].weight, before)


def test_an_ensemble_keeps_its_groups() -> None:
    def make_one(lr: Any) -> Any:
        return optim.SGD([net(), {"names": "0.*", "lr": 0.5}], lr=lr)

    several = jax.vmap(make_one)(jnp.array([0.1, 0.2]))
    assert group_of(several)["0.0.weight"] == 1 and several.groups[1].lr.tolist() == [0.5, 0.5]


def test_optimizers_of_all_parameters_at_once_have_no_groups() -> None:
    with pytest.raises(ValueError, match="LBFGS doesn't support per-parameter options"):
        optim.LBFGS([net(), NO_DECAY])


# -- globs, and what they cost -----------------------------------------------------------------------------------------


def test_globs() -> None:
    globs = Globs(["*.bias", "a.b", "a.*", "a.[bc]", "A.b", "a.b"])
    assert globs.matching("a.b") == [1, 2, 3, 5] and globs.matching("a.bias") == [0, 2] and globs.matching("A.b") == [4]
    assert globs.matching("") == [] and Globs([]).matching("a") == []


def test_many_groups_are_planned_in_time() -> None:
    """300 groups of 300 parameters: an O(n³) plan took minutes, and a cache of compiled globs that is too small seconds."""

    class Wide(mt.Module):
        def __init__(self) -> None:
            self.layers = [nn.Linear(1, 1, bias=False) for _ in range(300)]

    model = Wide()
    start = time.process_time()
    opt = optim.SGD([{"modules": [model], "names": f"layers.{i}.w*", "lr": 0.001 * i} for i in range(300)])
    assert time.process_time() - start < 20
    assert opt.groups[299].lr == pytest.approx(0.299) and group_of(opt)["0.layers.7.weight"] == 7


def test_torchs_state_of_the_same_groups_by_name() -> None:
    """torch lists its groups' parameters in their order; here they are found by name."""
    real = pytest.importorskip("torch")
    adapter = importlib.import_module("minitorch_jax.adapters.torch")
    ours, theirs = nn.Linear(3, 2, key=jax.random.key(0)), real.nn.Linear(3, 2)
    their_opt = real.optim.AdamW(
        [{"params": [theirs.bias], "weight_decay": 0.0, "lr": 0.5}, {"params": [theirs.weight]}]
    )
    theirs(real.ones(4, 3)).sum().backward()
    their_opt.step()
    opt = optim.AdamW([ours, {"names": "bias", "weight_decay": 0.3}])
    adapter.load_optimizer_from_torch(opt, their_opt, theirs)
    assert (opt.groups[1].weight_decay, opt.groups[1].lr, opt.groups[0].weight_decay) == (0.0, 0.5, 0.01)
    assert_allclose(opt.state_dict()["state"]["0.bias"]["exp_avg"], [0.4, 0.4], rtol=1e-6)
    mixed = optim.AdamW([ours, {"names": "bias", "rule": optim.SGD}])
    with pytest.raises(TypeError, match=r"groups of opt have other rules \(SGD\), and an optimizer of torch has one"):
        adapter.load_optimizer_from_torch(mixed, their_opt, theirs)
