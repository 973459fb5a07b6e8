"""`model.compile()`: calls in eager code run as one program, and the module stays what it was."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import warnings
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.nn.utils import parametrizations as P  # noqa: N812
from minitorch_jax.nn.utils import parametrize

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)


class Net(mt.Module):
    """A network whose state changes when it is called. It counts how often its Python code runs."""

    runs = 0

    def __init__(self) -> None:
        self.first = nn.Linear(3, 4, key=jax.random.key(0))
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        type(self).runs += 1
        return self.drop(self.norm(self.first(x))) * scale


class OwnCall(mt.Module):
    """A class that has a `__call__` of its own."""

    def __init__(self) -> None:
        self.weight = mt.Parameter(2.0)

    def __call__(self, x):
        return super().__call__(x) + 1

    def forward(self, x):
        return self.weight * x


class Sub(OwnCall):
    """A class that inherits one."""


@pytest.fixture
def pair(monkeypatch):
    """A compiled network, and one that is not."""
    monkeypatch.setattr(Net, "runs", 0)
    one, two = Net(), Net()
    one.compile()
    return one, two


def same(one, two):
    for (name, mine), theirs in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert_allclose(mine, theirs, rtol=1e-6, err_msg=name)


def test_results_and_state_are_those_of_eager_calls_and_python_runs_once(pair):
    results = []
    for net in pair:
        mt.seed(3)
        results.append([net(X), net(X, scale=2.0), net(X[:2])])
    for mine, theirs in zip(*results, strict=True):
        assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    same(*pair)
    assert int(pair[0].norm.num_batches_tracked) == 3
    before = Net.runs
    pair[0](X), pair[0](X, scale=3.0)
    assert Net.runs == before
    pair[1](X)
    assert Net.runs == before + 1


def test_modes_and_assignments_are_followed(pair):
    for net in pair:
        net(X)
        net.eval()
    assert_allclose(pair[0](X), pair[1](X), rtol=1e-5, atol=1e-6)
    for net in pair:
        net.first.weight = 2 * net.first.weight
        net.drop = nn.Identity()
        net.train()
    assert_allclose(pair[0](X), pair[1](X), rtol=1e-5, atol=1e-6)
    same(*pair)


def test_it_stays_a_module_and_copies_are_not_compiled(pair):
    net, other = pair
    assert type(net) is Net and jax.tree.structure(net) == jax.tree.structure(other)
    assert list(net.state_dict()) == list(other.state_dict()) and repr(net) == repr(other) and dir(net) == dir(other)
    net.eval()
    expected = net(X)
    copies = [copy.deepcopy(net), copy.copy(net), pickle.loads(pickle.dumps(net)), jax.tree.map(lambda x: x, net)]  # noqa: S301
    for copied in copies:
        runs = Net.runs
        for _ in range(2):
            assert_allclose(copied(X), expected, rtol=1e-5, atol=1e-6)
        assert Net.runs == runs + 2
        copied.compile()
        assert_allclose(copied(X), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_within_other_programs_it_is_a_plain_call(pair):
    losses = []
    for net in pair:
        opt = mt.Optimizer([net], lr=0.1)

        @mt.jit
        def step(x, net=net, opt=opt):
            opt.zero_grad()
            loss = mt.backward(lambda net, x: (net(x) ** 2).mean(), net, x)
            opt.step()
            return loss

        mt.seed(1)
        losses.append([float(step(X)) for _ in range(3)])
        losses[-1] += mt.scan(step, jnp.stack([X, X])).tolist()
        net.eval()
        losses[-1].append(float(jax.jit(lambda net, x: net(x).sum())(net, X)))
        losses[-1] += jax.vmap(lambda x, net=net: net(x[None]).sum())(X).tolist()
        losses[-1].append(float(mt.jit(net)(X).sum()))
        net.train().zero_grad()
        losses[-1].append(float(mt.backward(lambda x, net=net: net(x).sum() ** 2, X)))
        with jax.disable_jit():
            losses[-1].append(float(net(X).sum()))
    assert_allclose(losses[0], losses[1], rtol=1e-4, atol=1e-6)
    same(*pair)


def test_an_inner_module_alone_may_be_compiled(pair):
    net, other = Net(), pair[1]
    net.first.compile()
    net.eval(), other.eval()
    assert_allclose(net(X), other(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", [OwnCall, Sub])
def test_a_call_of_the_users_own_is_what_is_compiled(cls):
    first, compiled, plain = cls(), cls(), cls()
    for net in (first, compiled):
        net.compile()
        net.compile()  # again: nothing changes
    compiled.weight = 3.0
    for _ in range(2):
        assert [float(net(2.0)) for net in (first, compiled, plain)] == [5, 7, 5]


def test_a_wrapper_around_a_compiled_call_is_compiled_too():
    net = OwnCall()
    net.compile()

    class Later(OwnCall):
        runs = 0

        @functools.wraps(OwnCall.__call__)
        def __call__(self, x):
            Later.runs += 1
            return OwnCall.__call__(self, x)

    later = Later()
    later.compile()
    assert float(later(2.0)) == 5
    before = Later.runs
    assert float(later(3.0)) == 7 and Later.runs == before


def test_an_error_changes_nothing(pair):
    net = pair[0]
    before = net.state_dict()
    with pytest.raises(TypeError):
        net(X, scale=None)
    for name, array in before.items():
        assert_array_equal(net.state_dict()[name], array)


def test_many_compiled_modules_of_a_class_are_no_recompiles():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for width in range(1, 9):
            net = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1))
            net.compile()
            assert net(X).shape == (4, 1)


def test_a_compiled_module_is_freed():
    net = Net()
    net.compile()
    net(X)
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None


def test_a_class_without_compiled_modules_is_left_alone():
    class Other(mt.Module):
        pass

    nn.Sequential(nn.Linear(3, 1)).compile()
    assert "__call__" not in vars(Other) and Other.__call__ is mt.Module.__call__


def test_the_function_of_a_jitted_module_has_the_modules_attributes(pair):
    net, other = pair
    model = mt.jit(net)
    assert model.eval() is model and not net.training and not net.first.training
    assert_allclose(model(X), other.eval()(X), rtol=1e-6)
    assert model.train() is model and net.training
    assert [a.shape for a in model.parameters()] == [a.shape for a in net.parameters()]
    assert model.first is net.first and list(model.state_dict()) == list(net.state_dict())
    model.scale = 3
    assert net.scale == 3 and "first" in dir(model) and "num_compiles" in dir(model)
    with pytest.raises(AttributeError, match="Net has no attribute `frist`; did you mean `first`?"):
        model.frist  # noqa: B018
    with pytest.raises(mt.UndeclaredArrayError):
        model.scale = jnp.ones(3)
    with pytest.raises(AttributeError, match=r"which has no attribute `nothing`$"):
        mt.jit(lambda x: x).nothing  # noqa: B018


def test_a_jitted_module_is_trained_saved_and_loaded_as_the_module(pair, tmp_path):
    net, other = pair
    model, x = mt.jit(net.eval()), jnp.asarray(X)
    opt = optim.SGD([model], lr=0.1, momentum=0.9)
    for _ in range(2):
        for module, step in ((model, opt.step), (other, None)):
            module.train()
            module.zero_grad()
            mt.backward(lambda module, x: (module(x, 0.0) + module.first(x)).sum(), module, x)
            if step is not None:
                step()
    assert_allclose(net.first.bias, other.first.bias - 0.1 * (4.0 + 4.0 + 0.9 * 4.0), rtol=1e-5)
    mt.save(tmp_path / "run.npz", model=model, opt=opt)
    before, net.first.bias = net.first.bias, 0 * net.first.bias
    mt.load(tmp_path / "run.npz", model=model, opt=opt)
    assert_array_equal(model.first.bias, before)


def test_functions_that_take_modules_take_a_jitted_one(pair):
    net, _ = pair
    model = mt.jit(net.eval())
    assert str(mt.summary(model, X)) == str(mt.summary(net, X))
    mt.backward(lambda model, x: model(x).sum(), model, jnp.asarray(X))
    norm = mt.clip_grad_norm(model, 1e9)
    assert_allclose(norm, mt.clip_grad_norm([model], 1e9))
    assert norm > 0
    average = optim.AveragedModel(model, decay=0.5)
    average.update(model)
    assert type(average.module) is Net
    mt.pack(model)
    mt.unpack(model)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mt.shard(model, mesh)
    assert net.first.weight.sharding.mesh == mesh


@pytest.mark.one_in(4)
@pytest.mark.parametrize("make", ["list", "group", "names", "rule", "appended"])
def test_an_optimizer_of_a_jitted_module_steps_in_compiled_code(make, pair):
    nets, losses = pair, []
    for net, model in zip(nets, (mt.jit(nets[0]), nets[1]), strict=True):
        net.drop.p = 0.0
        other = nn.Linear(4, 1, key=jax.random.key(5))
        opt = {
            "list": lambda model=model: optim.SGD([model], lr=0.1),
            "group": lambda model=model: optim.SGD([{"modules": [model], "lr": 0.1}]),
            "names": lambda model=model: optim.SGD([model, {"names": "*bias", "lr": 0.01}], lr=0.1),
            "rule": lambda model=model: optim.Muon([model, {"rule": optim.AdamW}], lr=0.1),
            "appended": lambda other=other: optim.SGD([other], lr=0.1),
        }[make]()
        if make == "appended":
            opt.modules.append(model)
        else:
            other.freeze()

        @mt.jit
        def step(x, model=model, other=other, opt=opt):
            opt.zero_grad()
            loss = mt.backward(lambda x: (other(model(x)) ** 2).sum(), x)
            opt.step()
            return loss

        losses.append([float(step(jnp.asarray(X))) for _ in range(3)])
        assert step.num_compiles == 1 and "Net" in repr(opt) and "Jitted" not in repr(opt)
    assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert losses[0][0] != losses[0][2]


def test_a_copy_of_a_jitted_module_is_compiled_and_has_arrays_of_its_own(pair):
    net, _ = pair
    model = mt.jit(net.eval())
    expected = model(X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) and other.first is not net.first
        assert_allclose(other(X), expected, rtol=1e-6)
        assert other.num_compiles == 1
        other.first.bias = other.first.bias + 1
    assert_array_equal(model(X), expected)
    assert repr(model) == f"mt.jit({net!r})" and model.__name__ == "Net"
    assert mt.jit(model).first is net.first


@mt.jit
def _added(x):
    return x + 1


def test_a_jitted_function_is_copied_as_functions_are():
    assert copy.deepcopy(_added) is _added and pickle.loads(pickle.dumps(_added)) is _added
    local = mt.jit(lambda x: x)
    assert copy.deepcopy([local])[0] is local
    with pytest.raises((AttributeError, pickle.PicklingError), match="<lambda>"):
        pickle.dumps(local)


PARAMETRIZATIONS = {
    "weight_norm": P.weight_norm,
    "spectral_norm": P.spectral_norm,
    "orthogonal": P.orthogonal,
    "lora": P.lora,
    "register": lambda model: parametrize.register_parametrization(model, "weight", nn.Identity()),
    "transfer": lambda model: parametrize.transfer_parametrizations_and_params(
        mt.jit(P.weight_norm(nn.Linear(3, 4))), model
    ),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("change", PARAMETRIZATIONS)
def test_a_jitted_module_is_parametrized_as_the_module(change):
    layer = nn.Linear(3, 4)
    model = mt.jit(layer)
    before = model(X)
    assert PARAMETRIZATIONS[change](model) is model
    assert parametrize.is_parametrized(model, "weight") and parametrize.is_parametrized(layer)
    assert_allclose(model(X), layer.eval()(X), rtol=1e-4)
    assert (change == "transfer") != np.allclose(model(X), before, rtol=1e-3) or change in (
        "spectral_norm",
        "orthogonal",
    )
    assert parametrize.remove_parametrizations(model, "weight") is model
    assert not parametrize.is_parametrized(model)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("call", ["by closure", "a method", "of a global", "in backward"])
def test_a_jitted_module_is_found_by_name_so_that_nothing_is_traced_twice(call, monkeypatch):
    monkeypatch.setattr(Net, "runs", 0)
    monkeypatch.setitem(globals(), "_global_model", mt.jit(Net().eval()))
    net, x = Net().eval(), jnp.asarray(X)
    model, method = mt.jit(net), mt.jit(net.forward)
    function = {
        "by closure": lambda x: model(x),
        "a method": lambda x: method(x),
        "of a global": lambda x: _global_model(x),  # noqa: F821
        "in backward": lambda x: mt.backward(lambda x: model(x).sum(), x),
    }[call]
    step = mt.jit(function)
    for _ in range(3):
        step(x)
    assert Net.runs == 1
    mt.backward(lambda x: model(x).sum(), x)
    mt.backward(lambda x: model(x).sum(), x)
    assert Net.runs == 3  # each lambda is another function


def test_utilities_of_modules_take_a_jitted_one():
    layer = nn.Linear(3, 4, key=jax.random.key(0))
    model = mt.jit(layer)
    assert parametrize.type_before_parametrizations(model) is nn.Linear
    with pytest.raises(ValueError, match="Linear has no parameter or buffer 'wight'"):
        P.weight_norm(model, "wight")
    vector = nn.utils.parameters_to_vector(model)
    nn.utils.vector_to_parameters(0 * vector, model)
    assert vector.shape == (16,) and not layer.weight.any()
    nn.init.ones_(model, "bias")
    assert layer.bias.all()
    norm = mt.jit(nn.BatchNorm1d(4).eval())
    assert type(nn.utils.fusion.fuse_linear_bn_eval(mt.jit(layer.eval()), norm)) is nn.Linear
    optim.SGD([model], lr=0.1).summary(model)


@pytest.mark.parametrize("hold", [nn.Sequential, lambda model: nn.ModuleList([model]), lambda model: Holder(model)])
def test_a_module_that_is_to_hold_a_jitted_one_says_what_to_write(hold):
    with pytest.raises(TypeError, match=r"the function that `mt.jit` made of a Linear.* write `module.compile\(\)`"):
        hold(mt.jit(nn.Linear(3, 1)))


class Holder(mt.Module):
    def __init__(self, part) -> None:
        self.part = part


@pytest.mark.slow
def test_a_jitted_module_is_an_argument_as_the_module_is(pair, monkeypatch):
    net, _ = pair
    net.eval()
    model, x = mt.jit(net), jnp.asarray(X)
    expected = net(x)
    monkeypatch.setattr(Net, "runs", 0)
    step = mt.jit(lambda model, x: model(x))
    for _ in range(3):
        assert_allclose(step(model, x), expected, rtol=1e-6)
        assert_allclose(jax.jit(lambda model, x: model(x))(model, x), expected, rtol=1e-6)
        mt.backward(total, model, x)
    assert Net.runs == 1 + 3 + 1
    grads = mt.grad(total)(model, x)
    assert type(grads) is Net
    assert_allclose(grads.first.bias, model.grads()[1] / 3, rtol=1e-5)
    assert mt.jit(lambda model: model)(model).first is net.first
    assert len(jax.tree.leaves(model)) == len(jax.tree.leaves(net))


def total(model, x):
    return model(x).sum()
