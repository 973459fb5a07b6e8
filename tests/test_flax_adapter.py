"""Flax's modules in our loop, against flax's own loop; its objects, which stay theirs; and our modules in flax's."""

import copy
import gc
import inspect
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import flax.errors
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from training import as_jax_comes, mean_square, squared

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.adapters.flax import NNX, Linen, to_flax
from minitorch_jax.engine.compiled_function import Function
from minitorch_jax.state.walk import walk_of

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
Y = np.linspace(1, 0, 4, dtype=np.float32)


class Net(nnx.Module):
    """Something of everything: parameters, running statistics, random numbers, a static number."""

    def __init__(self, seed: int = 0, scale: float = 1.0) -> None:
        rngs = nnx.Rngs(seed)
        self.hidden = nnx.Linear(3, 4, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.25, rngs=rngs)
        self.out = nnx.Linear(4, 1, rngs=rngs)
        self.scale = scale

    def encode(self, x: Any) -> Any:
        return nnx.tanh(self.norm(self.hidden(x)))

    def __call__(self, x: Any) -> Any:
        return self.scale * self.out(self.drop(self.encode(x)))[:, 0]


class Light(nnx.Module):
    """The same with less to compile."""

    def __init__(self, seed: int = 0, scale: float = 1.0) -> None:
        self.weight = nnx.Param(jnp.full(3, 1.0 + seed))
        self.mean = nnx.BatchStat(jnp.zeros(()))
        self.drop = nnx.Dropout(0.0, rngs=nnx.Rngs(seed))
        self.scale = scale

    def __call__(self, x: Any) -> Any:
        y = self.drop(x) @ self.weight[...]
        self.mean[...] = 0.9 * self.mean[...] + 0.1 * jax.lax.stop_gradient(y.mean())
        return self.scale * (y - self.mean[...])


SGD, ADAM = optax.sgd(0.1), optax.adam(0.01, eps=1e-3)


def eager_step(model: Any, opt: Any, x: Any = X, y: Any = Y) -> Any:
    opt.zero_grad()
    loss = mt.backward(squared, model, x, y)
    opt.step()
    return loss


jitted_step = mt.jit(eager_step)


@nnx.jit
def flax_step(net: Any, opt: Any, x: Any, y: Any) -> Any:
    loss, grads = nnx.value_and_grad(squared)(net, x, y)
    with as_jax_comes():
        opt.update(net, grads)
    return loss


def values(net: Any) -> dict[str, np.ndarray]:
    """All Variables of an nnx module, by path."""
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(net)):
        value = variable.get_value() if isinstance(variable, nnx.Variable) else variable
        is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        found[".".join(map(str, path))] = np.array(jax.random.key_data(value) if is_key else value)
    return found


def assert_same(mine: Any, theirs: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    mine, theirs = values(mine), values(theirs)
    assert list(mine) == list(theirs)
    for path, value in theirs.items():
        assert_allclose(mine[path], value, rtol=rtol, atol=atol, err_msg=path)


def trained_by_flax(net: Any, steps: int, tx: Any = SGD) -> list[float]:
    opt = nnx.Optimizer(net, tx, wrt=nnx.Param)
    return [float(flax_step(net, opt, X, Y)) for _ in range(steps)]


# -- the same trajectory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "tx"),
    [
        (lambda m: optim.SGD([m], lr=0.1, momentum=0.9), optax.sgd(0.1, momentum=0.9)),
        pytest.param(lambda m: optim.Adam([m], lr=0.01, eps=1e-3), ADAM, marks=pytest.mark.slow),
    ],
)
def test_the_trajectory_of_flax(make: Any, tx: Any) -> None:
    net, other = Net(), Net()
    opt = make(model := NNX(net))
    losses = [float(step(model, opt)) for step in (eager_step, eager_step, jitted_step, jitted_step, eager_step)]
    assert_allclose(losses, trained_by_flax(other, 5, tx), rtol=1e-4)
    assert_same(net, other, rtol=1e-4, atol=2e-5)
    assert values(net)["drop.rngs.count"] == 5
    assert net is model.module and not np.array_equal(values(net)["norm.mean"], values(Net())["norm.mean"])


def test_scan_and_an_optimizer_as_carry() -> None:
    nets = [Light() for _ in range(3)]
    models = list(map(NNX, nets))
    opts = [optim.SGD([model], lr=0.1) for model in models]
    xs, ys = np.stack([X, 2 * X, -X]), np.stack([Y, Y, 1 - Y])
    for x, y in zip(xs, ys, strict=True):
        eager_step(models[0], opts[0], x, y)
    mt.scan(lambda x, y: eager_step(models[1], opts[1], x, y), xs, ys)

    def body(opt: Any, xy: Any) -> Any:
        loss = eager_step(opt.modules[0], opt, *xy)
        return opt, loss

    carried, _ = jax.jit(lambda opt, xs: jax.lax.scan(body, opt, xs))(opts[2], (xs, ys))
    assert_same(nets[1], nets[0])
    assert_same(carried.modules[0].module, nets[0])
    assert_same(nets[2], Light())


class Two(nnx.Module):
    def __init__(self) -> None:
        self.first, self.out = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 1, rngs=nnx.Rngs(1))
        self.seen = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x: Any) -> Any:
        y = self.out(nnx.tanh(self.first(x)))[:, 0]
        self.seen[...] = jax.lax.stop_gradient(y.mean())
        return y


def test_frozen_parameters_and_other_modules_in_one_optimizer() -> None:
    net, other = Two(), Two()
    model = NNX(net, trainable=nnx.PathContains("out"))
    ours = nn.Linear(1, 1)
    before, weight = values(net), np.array(ours.weight)
    opt = optim.SGD([model, ours], lr=0.1)
    mt.backward(lambda m, x, y: ((ours(m(x)[:, None])[:, 0] - y) ** 2).mean(), model, X, Y)
    opt.step()
    after = values(net)
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {"out.bias", "out.kernel", "seen"} and not np.array_equal(ours.weight, weight)
    assert [name for name, _ in model.named_parameters()] == ["out.bias", "out.kernel"]
    wrt = nnx.All(nnx.Param, nnx.PathContains("out"))

    @nnx.jit
    def theirs(other: Any, opt: Any) -> None:
        opt.update(other, nnx.grad(squared, argnums=nnx.DiffState(0, wrt))(other, X, Y))

    nnx.update(other, nnx.state(net))
    opt, other_opt = optim.SGD([model], lr=0.1), nnx.Optimizer(other, SGD, wrt=wrt)
    for _ in range(2):
        eager_step(model, opt)
        theirs(other, other_opt)
    assert_same(net, other)
    model.unfreeze()
    assert len(model.parameters()) == 4


def test_groups_pack_and_checkpoints(tmp_path: Any) -> None:
    def made() -> Any:
        net = Light()
        model = NNX(net)
        mt.pack(model)
        return net, model, optim.Adam([{"modules": [model], "lr": 0.01}], eps=1e-3)

    net, model, opt = made()
    other, other_model, other_opt = made()
    for _ in range(2):
        eager_step(model, opt)
    mt.save(tmp_path / "run.npz", model=model, opt=opt)
    mt.load(tmp_path / "run.npz", model=other_model, opt=other_opt)
    assert_same(other, net, 0, 0)
    eager_step(model, opt), eager_step(other_model, other_opt)
    assert_same(other, net, 0, 0)
    trained_by_flax(plain := Light(), 3, ADAM)
    assert_same(net, plain, rtol=1e-4, atol=2e-5)


# -- the layer zoo ----------------------------------------------------------------------------------------------------

_x, _image, _tokens = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3), np.ones((2, 4, 4, 2), np.float32), None
_image = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 4, 4, 2)
_sequence = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 4, 3)


def _cell(make: Any) -> Any:
    """A recurrent cell, called once with a carry of ones."""

    class Once(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.cell = make(3, 2, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            carry = jnp.ones((2, 2))
            return self.cell((carry, carry) if "LSTM" in make.__name__ else carry, x)

    return Once


# class: (makes a module with it from Rngs, inputs)
ZOO: dict[Any, tuple[Callable[[Any], Any], tuple[Any, ...]]] = {
    nnx.Sequential: (lambda r: nnx.Sequential(nnx.Linear(3, 2, rngs=r), nnx.relu, nnx.Linear(2, 2, rngs=r)), (_x,)),
    nnx.List: (lambda r: _Listed(r), (_x,)),
    nnx.Dict: (lambda r: _Named(r), (_x,)),
    nnx.PReLU: (lambda r: nnx.PReLU(), (_x,)),
    nnx.MultiHeadAttention: (
        lambda r: nnx.MultiHeadAttention(2, 3, 4, decode=False, rngs=r, normalize_qk=True),
        (_sequence,),
    ),
    nnx.LSTMCell: (_cell(nnx.LSTMCell), (_x,)),
    nnx.GRUCell: (_cell(nnx.GRUCell), (_x,)),
    nnx.OptimizedLSTMCell: (_cell(nnx.OptimizedLSTMCell), (_x,)),
    nnx.SimpleCell: (_cell(nnx.SimpleCell), (_x,)),
    nnx.RNN: (lambda r: nnx.RNN(nnx.GRUCell(3, 2, rngs=r)), (_sequence,)),
    nnx.Bidirectional: (
        lambda r: nnx.Bidirectional(nnx.RNN(nnx.GRUCell(3, 2, rngs=r)), nnx.RNN(nnx.GRUCell(3, 2, rngs=r))),
        (_sequence,),
    ),
    nnx.Conv: (lambda r: nnx.Conv(2, 3, (3, 3), rngs=r), (_image,)),
    nnx.ConvTranspose: (lambda r: nnx.ConvTranspose(2, 3, (3, 3), strides=2, rngs=r), (_image,)),
    nnx.Embed: (lambda r: nnx.Embed(5, 3, rngs=r), (np.array([0, 3, 3]),)),
    nnx.Linear: (lambda r: nnx.Linear(3, 2, rngs=r), (_x,)),
    nnx.LinearGeneral: (lambda r: nnx.LinearGeneral((4, 3), (2, 2), axis=(1, 2), rngs=r), (_sequence,)),
    nnx.Einsum: (lambda r: nnx.Einsum("bi,io->bo", (3, 2), (2,), rngs=r), (_x,)),
    nnx.LoRA: (lambda r: nnx.LoRA(3, 2, 2, base_module=nnx.Linear(3, 2, rngs=r), rngs=r), (_x,)),
    nnx.LoRALinear: (lambda r: nnx.LoRALinear(3, 2, lora_rank=2, rngs=r), (_x,)),
    nnx.BatchNorm: (lambda r: nnx.BatchNorm(2, momentum=0.9, rngs=r), (_image,)),
    nnx.LayerNorm: (lambda r: nnx.LayerNorm(3, rngs=r), (_sequence,)),
    nnx.RMSNorm: (lambda r: nnx.RMSNorm(3, rngs=r), (_sequence,)),
    nnx.GroupNorm: (lambda r: nnx.GroupNorm(2, num_groups=1, rngs=r), (_image,)),
    nnx.InstanceNorm: (lambda r: nnx.InstanceNorm(2, rngs=r), (_image,)),
    nnx.SpectralNorm: (lambda r: nnx.SpectralNorm(nnx.Linear(3, 2, rngs=r), rngs=r), (_x,)),
    nnx.WeightNorm: (lambda r: nnx.WeightNorm(nnx.Linear(3, 2, rngs=r), rngs=r), (_x,)),
    nnx.Dropout: (lambda r: nnx.Sequential(nnx.Linear(3, 4, rngs=r), nnx.Dropout(0.5, rngs=r)), (_x,)),
}
if hasattr(nnx, "RoPE"):  # in newer versions of flax
    ZOO[nnx.RoPE] = (
        lambda r: nnx.Sequential(nnx.Linear(3, 4, rngs=r), nnx.RoPE()),
        (_sequence,),
    )
NO_LAYERS = {
    **dict.fromkeys([nnx.Pytree, nnx.Object, nnx.Module, nnx.RNNCellBase], "bases of layers"),
    **dict.fromkeys([nnx.Rngs, nnx.RngStream], "part of layers such as Dropout"),
    **dict.fromkeys([nnx.Metric, nnx.MultiMetric], "metrics have no parameters"),
    **dict.fromkeys([nnx.Optimizer, nnx.ModelAndOptimizer, nnx.EMA], "not layers: what trains them"),
}
QUICK = [nnx.Embed, nnx.BatchNorm, nnx.GroupNorm, nnx.WeightNorm, nnx.LoRA]


class _Listed(nnx.Module):
    def __init__(self, rngs: Any) -> None:
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(11)])

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


class _Named(nnx.Module):
    def __init__(self, rngs: Any) -> None:
        self.layers = nnx.Dict(a=nnx.Linear(3, 2, rngs=rngs), b=nnx.Linear(3, 2, rngs=rngs))

    def __call__(self, x: Any) -> Any:
        return self.layers["a"](x) * self.layers["b"](x)


def test_every_layer_of_flax_is_in_the_table() -> None:
    layers = {c for c in vars(nnx).values() if inspect.isclass(c) and issubclass(c, nnx.Pytree)}
    assert layers == ZOO.keys() | NO_LAYERS.keys()
    assert not ZOO.keys() & NO_LAYERS.keys()


def output_loss(model: Any, *args: Any) -> Any:
    with as_jax_comes():
        out = model(*args)
    return sum(((leaf - 0.5) ** 2).mean() for leaf in jax.tree.leaves(out))


def zoo_step(model: Any, opt: Any, *args: Any) -> Any:
    opt.zero_grad()
    loss = mt.backward(output_loss, model, *args)
    opt.step()
    return loss


@nnx.jit
def flax_zoo_step(net: Any, opt: Any, *args: Any) -> Any:
    loss, grads = nnx.value_and_grad(output_loss)(net, *args)
    opt.update(net, grads)
    return loss


@pytest.mark.one_in(9)
@pytest.mark.parametrize("compiled", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "layer", [pytest.param(c, id=c.__name__, marks=() if c in QUICK else pytest.mark.slow) for c in ZOO]
)
def test_every_layer_trains_as_in_flax(layer: Any, compiled: bool) -> None:
    make, args = ZOO[layer]
    theirs = make(nnx.Rngs(0))
    tx = nnx.Optimizer(theirs, optax.sgd(0.05, momentum=0.9), wrt=nnx.Param)
    losses = [float(flax_zoo_step(theirs, tx, *args)) for _ in range(5)]
    assert losses[-1] != losses[0]
    net = make(nnx.Rngs(0))
    model = NNX(net)
    opt = optim.SGD([model], lr=0.05, momentum=0.9)
    step = mt.jit(zoo_step) if compiled else zoo_step
    assert_allclose([float(step(model, opt, *args)) for _ in range(5)], losses, rtol=1e-5)
    assert_same(net, theirs)


# -- their objects stay theirs ----------------------------------------------------------------------------------------


def test_variables_are_what_they_were_and_show_what_is_trained() -> None:
    net = Net()
    kernel = net.hidden.kernel
    model = NNX(net)
    opt = optim.SGD([model], lr=0.1)
    assert net.hidden.kernel is kernel and type(kernel) is nnx.Param and isinstance(net.norm.mean, nnx.BatchStat)
    read = kernel[...]
    kept = np.array(read)
    for step in (eager_step, jitted_step, jitted_step):
        before = np.array(kernel[...])
        step(model, opt)
        assert not np.array_equal(kernel[...], before)
        assert_array_equal(kernel[...], model.state_dict()["hidden.kernel"])
    assert not read.is_deleted()
    assert_array_equal(read, kept)
    assert "kernel=Param" in str(net) and "hidden.kernel=float32[3, 4]" in repr(model)
    assert set(model.state_dict()) == values(net).keys()


def test_flax_goes_on_working_on_the_module() -> None:
    net, plain = Net(), Net()
    model = NNX(net)
    opt, theirs = optim.SGD([model], lr=0.1), nnx.Optimizer(net, SGD, wrt=nnx.Param)
    eager_step(model, opt)
    flax_step(net, theirs, X, Y)
    eager_step(model, opt)
    trained_by_flax(plain, 3)
    assert_same(net, plain)
    graphdef, params, rest = nnx.split(net, nnx.Param, ...)
    assert graphdef == nnx.split(plain)[0]
    assert jax.tree.structure(params) == jax.tree.structure(nnx.state(plain, nnx.Param))
    doubled = jax.tree.map(lambda p, q: p + q, nnx.state(plain, nnx.Param), params)
    nnx.update(net, doubled)
    assert_array_equal(model.state_dict()["out.kernel"], doubled["out"]["kernel"][...])
    merged = nnx.merge(graphdef, jax.tree.map(jnp.copy, params), jax.tree.map(lambda a: a, rest))
    merged.out.bias[...] += 1
    assert not np.array_equal(merged.out.bias[...], net.out.bias[...])
    clone = nnx.clone(net)
    clone.out.bias[...] += 1
    assert not np.array_equal(clone.out.bias[...], net.out.bias[...])
    final, _ = jax.lax.scan(
        lambda c, _: (jax.tree.map(lambda a: a * 1.0, c), None), nnx.state(net, nnx.Param), length=2
    )
    assert type(final["out"]["bias"]) is nnx.Param
    assert pickle.loads(pickle.dumps(net.out.bias))[...] == net.out.bias[...]
    net.out.bias[...] = jnp.array([3.0])
    assert model.state_dict()["out.bias"] == 3
    net.out.bias.set_value(jnp.array([4.0]))
    assert model.state_dict()["out.bias"] == 4
    cached = nnx.cached_partial(flax_step, net, theirs)
    before = values(net)
    cached(X, Y)
    assert not np.array_equal(before["out.kernel"], model.state_dict()["out.kernel"])
    eager_step(model, opt)


def test_a_tied_variable_is_one_parameter() -> None:
    class Tied(nnx.Module):
        def __init__(self) -> None:
            self.a, self.b = nnx.Linear(3, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 3, rngs=nnx.Rngs(1))
            self.b.kernel = self.a.kernel

        def __call__(self, x: Any) -> Any:
            return self.b(self.a(x))[:, 0]

    net, other = Tied(), Tied()
    model = NNX(net)
    assert [name for name, _ in model.named_parameters()] == ["a.bias", "a.kernel", "b.bias"]
    opt = optim.SGD([model], lr=0.1)
    for _ in range(3):
        eager_step(model, opt)
    trained_by_flax(other, 3)
    assert_same(net, other)
    assert net.a.kernel is net.b.kernel
    assert copy.deepcopy(model).module.a.kernel[...].shape == (3, 3)


def test_two_wrappers_share_the_variables() -> None:
    net = Net()
    whole, part = NNX(net), NNX(net.out)
    opt = optim.SGD([whole], lr=0.1)
    eager_step(whole, opt)
    assert_array_equal(part.state_dict()["kernel"], whole.state_dict()["out.kernel"])
    part.freeze()
    before = values(net)
    eager_step(whole, opt)
    assert_array_equal(net.out.kernel[...], before["out.kernel"])
    assert not np.array_equal(net.hidden.kernel[...], before["hidden.kernel"])
    del whole, opt
    gc.unfreeze(), gc.collect()
    assert_array_equal(net.hidden.kernel[...], part and values(net)["hidden.kernel"])
    part.unfreeze()
    part_opt = optim.SGD([part], lr=0.1)
    eager = mt.backward(lambda m, x: m(x).mean(), part, np.ones((2, 4), np.float32))
    part_opt.step()
    assert np.isfinite(eager)
    with pytest.raises(ValueError, match=r"out\.kernel is part of another NNX, where it is (frozen|trained)"):
        NNX(Holding(net.out), trainable=nnx.PathContains("bias"))


class Holding(nnx.Module):
    def __init__(self, out: Any) -> None:
        self.out = out


def test_the_variables_have_their_values_back_when_the_wrapper_is_gone() -> None:
    net = Net()
    model = NNX(net)
    eager_step(model, optim.SGD([model], lr=0.1))
    want = values(net)
    del model
    gc.unfreeze(), gc.collect()
    for path, value in values(net).items():
        assert_array_equal(value, want[path])
    net.out.bias[...] = jnp.array([5.0])
    assert net.out.bias[...] == 5 and net.out.bias._can_update
    again = NNX(net)
    assert again.state_dict()["out.bias"] == 5


# -- changes are noticed ----------------------------------------------------------------------------------------------


def test_static_changes_make_another_program() -> None:
    net = Light()
    model = NNX(net)
    opt = optim.SGD([model], lr=0.1)
    step = mt.jit(eager_step)
    predict = mt.jit(lambda m, x: (x @ m.module.weight[...]) * m.module.scale)
    for _ in range(2):
        step(model, opt)
    assert step.num_compiles == 1
    net.eval()
    assert_allclose(predict(model, X), X @ net.weight[...], rtol=1e-5)
    net.scale = 3.0
    assert_allclose(predict(model, X), 3 * (X @ net.weight[...]), rtol=1e-5)
    assert predict.num_compiles == 2
    net.scale = 1.0
    step(model, opt)
    assert step.num_compiles == 2
    model.train()
    step(model, opt)
    assert step.num_compiles == 2 and not net.drop.deterministic
    net.drop.rate = 0.5
    step(model, opt)
    assert step.num_compiles == 3
    model.eval()
    assert net.drop.deterministic and not model.training
    outer = nn.Sequential(model)
    outer.train()
    assert not net.drop.deterministic and model.training


def test_a_replaced_variable_or_layer_is_taken_over() -> None:
    net = Light()
    model = NNX(net)
    opt = optim.SGD([model], lr=0.1, momentum=0.9)
    step = mt.jit(eager_step)
    step(model, opt)
    old, net.weight = net.weight, nnx.Param(jnp.array([1.0, 2.0, 3.0]))
    before = np.array(old[...])
    for use in (eager_step, step):
        last = np.array(net.weight[...])
        use(model, opt)
        assert not np.array_equal(net.weight[...], last)
        assert_array_equal(model.state_dict()["weight"], net.weight[...])
    assert_array_equal(old[...], before)
    assert step.num_compiles == 1  # the structure is as it was
    net.drop = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    for _ in range(2):
        last = np.array(net.drop.kernel[...])
        step(model, opt)
        assert not np.array_equal(net.drop.kernel[...], last)
    assert step.num_compiles == 2
    assert set(opt.state_dict()["state"]) == {f"0.{name}" for name in ("weight", "drop.kernel", "drop.bias")}
    net.extra = nnx.BatchStat(jnp.zeros(2))
    assert "extra" in model.state_dict()
    net.mean.set_metadata(note="other")
    step(model, opt)
    assert step.num_compiles == 3


def test_a_plan_is_made_once() -> None:
    model = NNX(Light())
    opt = optim.SGD([model], lr=0.1)
    eager_step(model, opt)
    eager_step(model, opt)
    plan = opt._plan
    eager_step(model, opt)
    assert opt._plan is plan
    model.module.eval()
    eager_step(model, opt)
    assert opt._plan is plan  # a mode says nothing about which parameters there are


def test_two_wrappers_of_one_structure_share_programs() -> None:
    step = mt.jit(eager_step)
    for seed in range(3):
        model = NNX(Light(seed))
        step(model, optim.SGD([model], lr=0.1))
    assert step.num_compiles == 1
    model = NNX(Light(0, scale=1))  # not 1.0: another type
    step(model, optim.SGD([model], lr=0.1))
    assert step.num_compiles == 2


class Masked(nnx.Module):
    """A plain array as an attribute, in a plain list of parts."""

    def __init__(self) -> None:
        self.parts = nnx.data([nnx.Linear(3, 3, rngs=nnx.Rngs(0))])
        self.mask = jnp.array([1.0, 0.0, 1.0])

    def __call__(self, x: Any) -> Any:
        for part in self.parts:
            x = part(x)
        return (x * self.mask[None]).sum(-1)


def test_plain_arrays_are_constants_and_plain_lists_are_watched() -> None:
    net = Masked()
    model = NNX(net)
    predict = mt.jit(lambda m, x: m(x))
    assert_allclose(predict(model, X), net(X), rtol=1e-5)
    net.mask = jnp.array([0.0, 1.0, 0.0])
    assert_allclose(predict(model, X), net(X), rtol=1e-5)
    net.parts.append(nnx.Linear(3, 3, rngs=nnx.Rngs(1)))
    assert_allclose(predict(model, X), net(X), rtol=1e-5)
    assert "parts.1.kernel" in model.state_dict()
    assert list(NNX(Masked()).state_dict()) == ["parts.0.bias", "parts.0.kernel"]

    def masks_anew(self: Any, x: Any) -> Any:
        self.mask = x[0]
        return x

    Masked.masks_anew = masks_anew
    with pytest.raises(mt.TraceError, match=r"Masked\.masks_anew changed mask inside compiled code"):
        mt.jit(lambda m, x: m.call("masks_anew", x))(model, X)
    assert_array_equal(net.mask, [0, 1, 0])


class Nested(nnx.Module):
    """A Variable that holds a pytree, one that holds a number, and streams that are split for a while."""

    def __init__(self) -> None:
        self.weights = nnx.Param({"a": jnp.ones(3), "b": jnp.zeros(())})
        self.seen = nnx.Variable((jnp.zeros(()), 0))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        weights, (total, count) = self.weights.get_value(), self.seen.get_value()
        self.seen.set_value((total + jax.lax.stop_gradient(x).mean(), count + 1))

        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=(0, None), out_axes=0)
        def twice(drop: Any, x: Any) -> Any:
            return drop(x)

        return twice(self.drop, x).mean(0) @ weights["a"] + weights["b"]


@pytest.mark.slow
def test_pytrees_in_variables_and_streams_split_for_a_while() -> None:
    net, other = Nested(), Nested()
    model = NNX(net)
    paths = ["weights.a", "weights.b", "drop.rngs.count", "drop.rngs.key", "seen.0", "seen.1"]
    assert list(model.state_dict()) == paths
    opt = optim.SGD([model], lr=0.1)
    grad = nnx.jit(nnx.grad(squared))
    for _ in range(2):
        eager_step(model, opt)
        grads = grad(other, X, Y)
        nnx.update(
            other, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(other, nnx.Param), nnx.state(grads, nnx.Param))
        )
    assert int(net.seen.get_value()[1]) == 2
    for mine, theirs in zip(
        jax.tree.leaves(nnx.state(net, nnx.Param)), jax.tree.leaves(nnx.state(other, nnx.Param)), strict=True
    ):
        assert_allclose(mine, theirs, rtol=1e-5)
    net(X)  # outside of compiled code, on the module itself
    eager_step(model, opt)
    assert model.state_dict()["seen.1"] == 4


# -- promises ---------------------------------------------------------------------------------------------------------


def test_a_raising_loss_leaves_everything_as_it_was() -> None:
    net = Light()
    model = NNX(net)
    opt = optim.SGD([model], lr=0.1)
    eager_step(model, opt)
    before = values(net)

    def fails(model: Any, x: Any) -> Any:
        model(x)
        net.mean[...] = net.mean[...] + 1
        raise KeyError("no")

    for run in (mt.backward, lambda fn, *args: mt.jit(fn)(*args)):
        with pytest.raises(KeyError, match="no"):
            run(fails, model, X)
        for path, value in values(net).items():
            assert_array_equal(value, before[path])
    for variable in jax.tree.leaves(nnx.state(net)):
        assert not isinstance(variable, jax.core.Tracer)


def test_the_module_itself_in_compiled_code() -> None:
    net, other = Light(), Light()
    model = NNX(net)
    opt = optim.SGD([model], lr=0.1)

    def loss_fn(model: Any, x: Any, y: Any) -> Any:  # reads and writes Variables of the module that was wrapped
        decay = sum((p**2).sum() for p in jax.tree.leaves(nnx.state(model.module, nnx.Param)))
        return ((model.module(x) - y) ** 2).mean() + 0.1 * decay

    @mt.jit
    def step(x: Any, y: Any) -> Any:
        opt.zero_grad()
        loss = mt.backward(loss_fn, model, x, y)
        opt.step()
        net.mean[...] = net.mean[...] * 2
        return loss

    def their_loss(net: Any, x: Any, y: Any) -> Any:
        decay = sum((p**2).sum() for p in jax.tree.leaves(nnx.state(net, nnx.Param)))
        return ((net(x) - y) ** 2).mean() + 0.1 * decay

    @nnx.jit
    def theirs(net: Any, optimizer: Any) -> None:
        optimizer.update(net, nnx.grad(their_loss)(net, X, Y))
        net.mean[...] = net.mean[...] * 2

    optimizer = nnx.Optimizer(other, SGD, wrt=nnx.Param)
    for _ in range(2):
        step(X, Y)
        theirs(other, optimizer)
    assert_same(net, other)


def test_dtypes_and_explanations() -> None:
    net = Light()
    model = NNX(net)
    assert model.astype(jnp.bfloat16) is model and net.weight[...].dtype == jnp.bfloat16
    assert net.drop.rngs.count[...].dtype == jnp.uint32
    predict = mt.jit(lambda m: m.module.weight[...].sum())
    for i in range(5):
        net.scale = float(i)
        predict(model)
    net.scale = 7.0
    with pytest.warns(mt.RecompileWarning, match=r"m\.scale went from 4\.0 to 7\.0"):
        predict(model)


def test_the_module_reached_by_closure() -> None:
    net = Light()
    model = NNX(net)
    with pytest.warns(UserWarning, match="reaches a NNX in a way that cannot be followed by name"):
        mt.jit(lambda x: net(x))(X)
    mt.backward(lambda x, y: ((net(x) - y) ** 2).mean(), X, Y)
    assert model.grads()[0].any()
    assert net.mean[...] != 0


def test_other_methods() -> None:
    net = Net()
    model = NNX(net)
    net.eval()
    want = net.encode(X)
    assert_allclose(model.call("encode", X), want, rtol=1e-5)
    assert_allclose(mt.jit(lambda m, x: m.call("encode", x))(model, X), want, rtol=1e-5)


def test_changes_that_jax_would_forget_are_errors() -> None:
    net = Light()
    model = NNX(net)
    before = values(net)
    with pytest.raises(
        mt.TraceError, match=r"NNX\.\S+ was changed inside a JAX transform, which reaches it by closure"
    ):
        jax.jit(lambda x: model(x))(X)
    with pytest.raises(mt.TraceError, match=r"NNX\.\S+ was changed inside a JAX transform"):
        jax.jit(lambda x: net(x))(X)
    with pytest.raises(mt.TraceError, match=r"NNX\.\S+ was changed inside a JAX transform"):
        mt.backward(lambda x: jax.vmap(model)(x[:, None]).mean(), X)
    with pytest.warns(mt.DroppedUpdateWarning, match="A copy of NNX was changed"):
        jax.grad(squared)(model, X, Y)
        gc.unfreeze(), gc.collect()
    for path, value in values(net).items():
        assert_array_equal(value, before[path])
        assert not isinstance(value, jax.core.Tracer)


class Counting(nnx.Module):
    def __init__(self) -> None:
        self.weight, self.calls = nnx.Param(jnp.ones(3)), 0

    def __call__(self, x: Any) -> Any:
        self.calls += 1
        return x @ self.weight[...]


class Keeping(Counting):
    def __call__(self, x: Any) -> Any:
        self.activation = nnx.Intermediate(x)
        return x @ self.weight[...]


def test_structure_cannot_change_in_compiled_code() -> None:
    for net, path in ((Counting(), "calls"), (Keeping(), "activation")):
        model = NNX(net)
        attribute = r"(__call__) changed .*" + path
        with pytest.raises(mt.TraceError, match=attribute + r".* inside compiled code"):
            mt.backward(squared, model, X, Y)
        model(X)  # outside, it can
        assert hasattr(net, path)
        mt.backward(lambda m, x: (x @ m.module.weight[...]).mean(), model, X)
    with pytest.raises(mt.TraceError, match=r"NNX\.training was changed inside compiled code"):
        mt.jit(lambda m: m.eval())(NNX(Net()))


def test_a_shape_that_does_not_fit() -> None:
    net = Net()
    model = NNX(net)
    with pytest.raises(ValueError, match=r"NNX\.hidden\.kernel is float32\[3, 4\], and was given float32\[3, 5\]"):
        net.hidden.kernel.set_value(jnp.ones((3, 5)))
    with pytest.raises(ValueError, match=r"NNX\.hidden\.kernel holds one array, and got PyTreeDef"):
        net.hidden.kernel.set_value({"a": jnp.ones((3, 4))})
    assert net.hidden.kernel.shape == (3, 4)
    net.norm.mean.set_value(jnp.ones(7))  # a buffer takes another one
    assert model.state_dict()["norm.mean"].shape == (7,)


# -- pytrees and copies -----------------------------------------------------------------------------------------------


def test_a_wrapper_is_a_pytree() -> None:
    net = Light()
    model = NNX(net)
    leaves, treedef = jax.tree.flatten(model)
    assert len(leaves) == len(values(net))
    other = jax.tree.unflatten(treedef, leaves)
    assert other.module is not net and other.module.weight is not net.weight
    other.eval()
    assert other.module.drop.deterministic and not net.drop.deterministic
    want = nnx.grad(squared)(nnx.clone(net), X, Y)
    grads, other = jax.grad(lambda m: (squared(m, X, Y), m), has_aux=True)(other)
    assert_allclose(grads.module.weight[...], want["weight"][...], rtol=1e-5)
    assert other.module.mean[...] != 0 == net.mean[...]
    model.accumulate(mt.grad(squared)(model, X, Y))
    assert_allclose(model.grads()[0], want["weight"][...], rtol=1e-5)
    ensemble = jax.vmap(lambda seed: NNX(Line(seed)))(jnp.arange(3.0))
    assert_array_equal(jax.vmap(lambda m: m(1.0))(ensemble), [0.0, 1.0, 2.0])
    assert ensemble.module.weight[...].shape == (3,)


class Line(nnx.Module):
    def __init__(self, weight: Any) -> None:
        self.weight = nnx.Param(jnp.asarray(weight))

    def __call__(self, x: Any) -> Any:
        return x * self.weight[...]


def test_a_functional_loop_gives_the_eager_one() -> None:
    net = Light()
    model = NNX(net)
    opt = optim.SGD([model], lr=0.1, momentum=0.9)

    @jax.jit
    def step(opt: Any) -> Any:
        eager_step(opt.modules[0], opt)
        return opt

    other = step(step(opt))
    eager_step(model, opt), eager_step(model, opt)
    assert_same(other.modules[0].module, net)


@pytest.mark.parametrize("layer", [nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0))])
def test_a_wrapper_of_flaxs_layers_is_pickled(layer: Any) -> None:
    model = NNX(layer)
    opt = optim.SGD([model], lr=0.1)
    other, other_opt = pickle.loads(pickle.dumps((model, opt)))
    assert other_opt.modules[0] is other and other.module is not layer
    for m, o in ((model, opt), (other, other_opt)):
        mt.backward(lambda m: (m(X) ** 2).sum(), m)
        o.step()
    for name, value in model.state_dict().items():
        assert_array_equal(other.state_dict()[name], value)


def test_copies_have_their_own_module() -> None:
    net = Net()
    model = NNX(net, trainable=nnx.PathContains("out"))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(NNX(Line(2.0))))):
        opt = optim.SGD([other], lr=0.1)
        before = values(other.module)
        eager_step(other, opt, *((X, Y) if other.module.__class__ is Net else (1.0, 5.0)))
        assert not all(np.array_equal(value, before[path]) for path, value in values(other.module).items())
    assert_same(net, Net(), 0, 0)
    assert [p for p, _ in copy.deepcopy(model).named_parameters()] == ["out.bias", "out.kernel"]


# -- what is wrong is said --------------------------------------------------------------------------------------------


def test_what_cannot_be_held_is_listed() -> None:
    class Wrong(nnx.Module):
        def __init__(self) -> None:
            self.integers = nnx.Param(jnp.arange(3))
            self.text = nnx.Variable("text")
            self.abstract = nnx.Param(jax.ShapeDtypeStruct((2,), jnp.float32))
            self.reference = nnx.Param(jnp.ones(2), ref=True)
            self.hijax = nnx.Param(jnp.ones(2), hijax=True)
            self.wide = nnx.BatchStat(np.ones(2, np.float64))
            self.config = nnx.static({"a": 1})
            self.fine = nnx.Param(jnp.ones(2))

    net = Wrong()
    message = (
        r"NNX cannot hold parts of this Wrong; nothing has changed:\n"
        r"  config is a dict, a static attribute without a hash\n"
        r"  abstract is ShapeDtypeStruct\(.*\), which is not an array\n"
        r"  hijax is a hijax Variable or a reference: pass plain Variables\n"
        r"  integers is int32\[3\], which cannot be trained: parameters must be floating\n"
        r"  reference is a hijax Variable or a reference: pass plain Variables\n"
        r"  text is 'text', which is not an array\n"
        r"  wide is float64, which JAX would convert to float32: convert it, or set jax_enable_x64$"
    )
    with pytest.raises(ValueError, match=message):
        NNX(net)
    net.fine.set_value(jnp.ones(5))
    assert net.fine.shape == (5,)


class Mixed(nnx.Module):
    def __init__(self) -> None:
        self.layers = nnx.List([nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.data(nn.Linear(2, 1))])

    def __call__(self, x: Any) -> Any:
        return self.layers[1](self.layers[0](x))


def test_a_module_of_ours_would_be_hidden() -> None:
    net = Mixed()
    with pytest.raises(
        ValueError, match=r"  layers\.1 is a Module of minitorch_jax \(Linear\): write a Module that hold"
    ):
        NNX(net)
    inner = net.layers[1]
    net.layers[1] = to_flax(inner)
    model = NNX(net)
    assert len(list(model.named_parameters())) == 4
    net.layers[1] = inner
    with pytest.raises(ValueError, match=r"  layers\.1 is a Module of minitorch_jax \(Linear\)"):
        model.state_dict()


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="NNX takes an nnx module; got a Linear"):
        NNX(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"NNX: trainable=.* selects none of the module's Params"):
        NNX(net := Net(), trainable=nnx.LoRAParam)
    assert type(net.out.kernel._trace_state) is type(Net().out.kernel._trace_state)
    with pytest.raises(
        mt.TraceError, match=r"an nnx module that was wrapped \(Net\) was changed inside a JAX transform"
    ):
        jax.jit(lambda x: NNX(net)(x))(X)
    model = NNX(net)
    with pytest.raises(AttributeError, match=r"NNX\.other: NNX holds an nnx module and takes no attributes of its own"):
        model.other = 1
    with pytest.raises(AttributeError, match=r"NNX\.module: NNX holds an nnx module"):
        model.module = net
    with pytest.raises(AttributeError, match=r"cannot be deleted: NNX only holds an nnx module"):
        del model.training
    with pytest.raises(TypeError, match=r"NNX\.out\.kernel cannot be tied: it belongs to an nnx module"):
        model.tie("out.kernel", model, "hidden.kernel")
    with pytest.raises(AttributeError, match="NNX has no attribute `scale`"):
        model.scale


# -- linen ------------------------------------------------------------------------------------------------------------


class Small(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = flax.linen.Dense(4)(x)
        x = flax.linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = flax.linen.Dropout(0.25, deterministic=not train)(flax.linen.tanh(x))
        return flax.linen.Dense(1)(x)[:, 0]


def linen_loss(model: Any, x: Any, y: Any) -> Any:
    return ((model(x, train=model.training) - y) ** 2).mean()


def linen_step(model: Any, opt: Any) -> Any:
    opt.zero_grad()
    loss = mt.backward(linen_loss, model, X, Y)
    opt.step()
    return loss


def test_linen_trains_as_by_hand() -> None:
    module = Small()
    variables = module.init(jax.random.key(0), X, train=False)
    tx = optax.sgd(0.1, momentum=0.9)
    params, stats = variables["params"], variables["batch_stats"]
    state = tx.init(params)

    def loss_fn(params: Any, stats: Any, key: Any) -> Any:
        held = {"params": params, "batch_stats": stats}
        out, new = module.apply(held, X, train=True, mutable=["batch_stats"], rngs={"dropout": key})
        return ((out - Y) ** 2).mean(), new["batch_stats"]

    grad = jax.jit(jax.grad(loss_fn, has_aux=True))
    mt.seed(3)
    for _ in range(4):
        grads, stats = grad(params, stats, mt.next_key())
        updates, state = tx.update(grads, state)
        params = optax.apply_updates(params, updates)
    model = Linen(module, variables, rngs="dropout")
    opt = optim.SGD([model], lr=0.1, momentum=0.9)
    step = mt.jit(linen_step)
    mt.seed(3)
    for _ in range(4):
        step(model, opt)
    assert jax.tree.structure(model.variables) == jax.tree.structure(variables)
    want = {"params": params, "batch_stats": stats}
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5), dict(model.variables), want)
    model.eval()
    before = jax.tree.map(np.array, model.variables)
    model(X, train=model.training)
    jax.tree.map(assert_array_equal, model.variables, before)
    assert model.module is module
    norm = flax.linen.BatchNorm(use_running_average=False)
    frozen = Linen(norm, flax.core.freeze(norm.init(jax.random.key(0), X)))
    mt.backward(lambda model, x: (model(x) ** 2).mean(), frozen, X)
    assert isinstance(frozen.variables, flax.core.FrozenDict)
    assert_allclose(frozen.variables["batch_stats"]["mean"], 0.01 * X.mean(0), rtol=1e-3)


def test_linen_is_a_module_like_others(tmp_path: Any) -> None:
    dense = flax.linen.Dense(1, kernel_init=jax.nn.initializers.ones)  # which can be pickled
    variables = dense.init(jax.random.key(0), X)
    model, other = Linen(dense, variables), Linen(dense, dense.init(jax.random.key(1), X))
    other.variables = jax.tree.map(lambda a: a + 1, variables)
    assert list(model.state_dict()) == ["params.bias", "params.kernel"]
    mt.save(tmp_path / "m.npz", model=model)
    mt.load(tmp_path / "m.npz", model=other)
    assert_array_equal(other(X), model(X))
    assert_array_equal(copy.deepcopy(model)(X), model(X))
    assert_array_equal(pickle.loads(pickle.dumps(model))(X), model(X))
    step = mt.jit(eager_step)
    for m in (model, other):
        m.freeze()
        m.unfreeze()
        step(m, optim.SGD([m], lr=0.1), X, Y[:, None])
    assert step.num_compiles == 1
    assert not np.array_equal(model.variables["params"]["kernel"], variables["params"]["kernel"])
    model.variables = variables
    assert_array_equal(model.variables["params"]["kernel"], variables["params"]["kernel"])
    assert model(X, mutable=["batch_stats"])[1] == {}
    with pytest.raises(ValueError, match=r"Linen\.variables got arrays that do not fit|given another structure"):
        wrong = {"params": {"kernel": jnp.ones((3, 1), jnp.int32), "bias": jnp.ones(1)}}
        model.variables = wrong


class Counted(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x: Any) -> Any:
        calls = self.variable("count", "calls", lambda: 0)
        calls.value += 1
        self.sow("intermediates", "hidden", x)
        return flax.linen.Dense(1)(x)[:, 0]


def test_linen_intermediates_and_a_count_that_is_a_number() -> None:
    counted = Counted()
    model = Linen(counted, {**counted.init(jax.random.key(0), X), "count": {"calls": 0}}, mutable="count")
    out, changed = model(X, mutable=["count", "intermediates"])
    assert_array_equal(out, model(X))
    assert_array_equal(changed["intermediates"]["hidden"][0], X)
    assert int(model.variables["count"]["calls"]) == 2 and "hidden" not in str(model.variables)
    eager_step(model, optim.SGD([model], lr=0.1))
    mt.jit(lambda model: model(X))(model)
    assert int(model.state_dict()["count.calls"]) == 4
    for mutable in (["intermediates"], False):
        with pytest.raises(flax.errors.ModifyScopeVariableError):
            model(X, mutable=mutable)
    assert int(model.variables["count"]["calls"]) == 4


def test_linen_wrong_arguments() -> None:
    dense = flax.linen.Dense(1)
    variables = dense.init(jax.random.key(0), X)
    with pytest.raises(TypeError, match="Linen takes a linen module; got a Net"):
        Linen(Net(), variables)
    with pytest.raises(
        TypeError, match="variables must be a dict of collections, as `module.init` returns it; got a list"
    ):
        Linen(dense, [1])
    with pytest.raises(
        ValueError,
        match=r"mutable must name collections out of \['params'\]; got \['batch_stats'\]",
    ):
        Linen(dense, variables, mutable=["batch_stats"])


# -- the other way ----------------------------------------------------------------------------------------------------


def our_net() -> Any:
    key = iter(jax.random.split(jax.random.key(0), 4))
    net = nn.Sequential(
        nn.Linear(3, 4, key=next(key)),
        nn.BatchNorm1d(4),
        nn.Dropout(0.25),
        nn.Linear(4, 4, key=next(key)),
        nn.Flatten(0),
    )
    net[3].tie("weight", nn.Linear(4, 4, key=next(key)), "weight")
    return net


def test_ours_trains_in_flax_as_here() -> None:
    ours = our_net()
    net = to_flax(ours, rngs=nnx.Rngs(0))
    without_dropout = [nn.Sequential(*[m for m in our_net() if not isinstance(m, nn.Dropout)]) for _ in range(2)]
    theirs = to_flax(without_dropout[0])
    assert {type(v) for _, v in nnx.to_flat_state(nnx.state(theirs))} == {nnx.Param, nnx.BatchStat}
    tx = nnx.Optimizer(theirs, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    model = without_dropout[1]
    opt = optim.SGD([model], lr=0.1, momentum=0.9)

    @nnx.jit
    def step(net: Any, tx: Any) -> Any:
        loss, grads = nnx.value_and_grad(mean_square)(net, X)
        tx.update(net, grads)
        return loss

    for _ in range(4):
        loss = step(theirs, tx)
        opt.zero_grad()
        assert_allclose(loss, mt.backward(mean_square, model, X), rtol=1e-5)
        opt.step()
    for path, value in model.state_dict().items():
        assert_allclose(theirs._variable(path)[...], value, rtol=1e-4, atol=1e-6)
    assert int(theirs._variable("1.num_batches_tracked")[...]) == 4
    first, second = net(X), net(X)
    assert not np.array_equal(first, second)  # other random numbers
    net.eval()
    assert_array_equal(net(X), net(X))
    before = int(net._variable("1.num_batches_tracked")[...])
    nnx.jit(lambda net, x: net(x))(net, X)
    assert int(net._variable("1.num_batches_tracked")[...]) == before == 2
    assert np.array_equal(ours[0].weight, our_net()[0].weight)


def test_ours_in_flax_frozen_tied_and_random() -> None:
    tied = nn.Sequential(nn.Linear(3, 3, key=jax.random.key(0)), nn.Linear(3, 3, key=jax.random.key(1)).freeze())
    tied[1].tie("bias", tied[0], "bias")
    net = to_flax(tied)
    assert {".".join(p): type(v).__name__ for p, v in nnx.to_flat_state(nnx.state(net))} == {
        "0.bias": "Param",
        "0.weight": "Param",
        "1.weight": "Frozen",
    }
    assert_allclose(net(X), tied(X), rtol=1e-6)
    dropout = to_flax(nn.Sequential(nn.Linear(3, 3, key=jax.random.key(0)), nn.Dropout()))
    with pytest.raises(mt.TraceError, match="a random number was drawn inside a JAX transform"):
        nnx.jit(lambda net, x: net(x))(dropout, X)
    round_trip = NNX(to_flax(tied))
    assert_allclose(round_trip(X), tied(X), rtol=1e-6)


def test_to_flax_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="to_flax takes a Module of minitorch_jax; got a Net"):
        to_flax(Net())
    with pytest.raises(TypeError, match=r"to_flax: rngs must be an nnx\.Rngs; got a int"):
        to_flax(nn.Linear(1, 1), rngs=0)

    class Sow(mt.Module):
        def __init__(self) -> None:
            self.sow = mt.Parameter(1.0)

    with pytest.raises(ValueError, match="an nnx module has an attribute of the name sow already"):
        to_flax(Sow())


# -- what a review found ------------------------------------------------------------------------------------------------


def test_a_wrapper_goes_without_the_garbage_collector():
    model = NNX(nnx.Linear(2, 1, rngs=nnx.Rngs(0)))
    model.state_dict()
    gone = weakref.ref(model)
    del model
    assert gone() is None


def test_nnx_transforms_in_between_do_not_make_it_look_again():
    net = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    model = NNX(net)
    walk = walk_of(model)
    nnx.jit(lambda net, x: net(x))(net, jnp.ones((3, 2)))
    assert walk_of(model) is walk
    net.extra = 1
    assert walk_of(model) is not walk


def test_what_changes_in_an_nnx_module_is_seen_in_the_quickest_calls(monkeypatch):
    net = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    model = NNX(net)
    predict = mt.jit(lambda m, x: m(x))
    x = jnp.ones((3, 2))
    for _ in range(2):
        first = predict(model, x)
    with monkeypatch.context() as patched:
        patched.setattr(Function, "run_slowly", None)
        assert_array_equal(predict(model, x), first)
    net.kernel[...] = net.kernel[...] * 2
    net.bias = nnx.Param(jnp.ones(1))
    assert_allclose(predict(model, x), 2 * first + 1, rtol=1e-6)
    net.dot_general = lambda *args, **kwargs: 3 * jax.lax.dot_general(*args, **kwargs)
    assert_allclose(predict(model, x), 6 * first + 1, rtol=1e-6)


def test_no_tracer_is_left_in_a_variable_whose_wrapper_is_gone():
    net = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    model = NNX(net)
    model.state_dict()
    del model
    with pytest.raises(flax.errors.TraceContextError, match="trace level"):
        jax.jit(lambda x: (net.bias.set_raw_value(x), x)[1])(jnp.ones(1))
    assert not isinstance(net.bias[...], jax.core.Tracer)


def test_names_that_an_nnx_module_has_are_refused():
    class Net(mt.Module):
        def __init__(self):
            self.sow = nn.Linear(2, 1)

    with pytest.raises(ValueError, match=r"to_flax: an nnx module has an attribute of the name sow\.weight"):
        to_flax(Net())


def test_collections_of_linen_are_named_in_errors():
    dense = flax.linen.Dense(1)
    variables = dense.init(jax.random.key(0), jnp.ones((1, 2)))
    with pytest.raises(
        TypeError, match="got a dict whose entries '(kernel', 'bias|bias', 'kernel)' are not collections"
    ):
        Linen(dense, variables["params"])
    with pytest.raises(TypeError, match="mutable must be a list of collection names; got True"):
        Linen(dense, variables, mutable=True)
    with pytest.raises(ValueError, match=r"mutable must name collections out of \['params'\]; got \['batch_stats'\]"):
        Linen(dense, variables, mutable="batch_stats")


@pytest.mark.slow
def test_flax_is_patched_only_while_a_variable_keeps_its_value_in_a_wrapper():
    script = """
import gc, threading
from flax import nnx
plain = vars(nnx.Variable)["_raw_value"]
is_patched = lambda: vars(nnx.Variable)["_raw_value"] is not plain

import jax, jax.numpy as jnp
import minitorch_jax as mt
from minitorch_jax import optim
from minitorch_jax.adapters.flax import NNX
assert not is_patched()

def train(net, steps=3):  # flax's own loop
    grad = nnx.jit(nnx.grad(lambda net, x: (net(x) ** 2).mean()))
    for _ in range(steps):
        nnx.update(net, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(net, nnx.Param), grad(net, jnp.ones((4, 3)))))
    return nnx.state(net)

def flax_net(seed=0):
    return nnx.Linear(3, 2, rngs=nnx.Rngs(seed))

def same(one, other):
    return all((a == b).all() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))

expected = train(flax_net())
net, other, made_before = flax_net(1), flax_net(2), flax_net()
first, second = NNX(net), NNX(other)
assert is_patched()
assert same(train(flax_net()), expected) and same(train(made_before), expected)  # modules without a wrapper

opt = optim.SGD([first], lr=0.1)
mt.backward(lambda m, x: (m(x) ** 2).mean(), first, jnp.ones((4, 3)))
opt.step()
kernel = net.kernel[...]
del opt, first
gc.collect()
assert is_patched()  # `net` still has its values in the cells of the wrapper
net.bias[...], net.kernel[...]
assert is_patched()  # `other` is wrapped
del second, other
gc.collect()
assert not is_patched()
assert (net.kernel[...] == kernel).all() and not isinstance(net.kernel[...], jax.core.Tracer)
train(net)

again = NNX(net)  # and once more
assert is_patched()
before = net.kernel[...]
opt = optim.SGD([again], lr=0.1)
mt.backward(lambda m, x: (m(x) ** 2).mean(), again, jnp.ones((4, 3)))
opt.step()
assert (net.kernel[...] != before).any()
del opt, again, net
gc.collect()
assert not is_patched()

def wrap_and_drop():
    for seed in range(20):
        net = flax_net(seed)
        value = net.kernel[...]
        model = NNX(net)
        assert (net.kernel[...] == value).all()
        del model
        assert (net.kernel[...] == value).all() and isinstance(net.bias[...], jax.Array)
    done.append(None)

done = []
threads = [threading.Thread(target=wrap_and_drop) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
gc.collect()
assert len(done) == 4 and not is_patched()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
