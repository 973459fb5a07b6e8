"""Equinox's modules in our loop, against equinox's own; the holder around them; and our modules in equinox's."""

import copy
import functools
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from training import as_jax_comes, mean_square

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.adapters.equinox import Equinox, to_equinox
from minitorch_jax.state.walk import walk_of

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
Y = np.linspace(1, 0, 4, dtype=np.float32)
SGD = optax.sgd(0.1, momentum=0.9)


def mlp(seed: int = 0) -> Any:
    return eqx.nn.MLP(3, "scalar", width_size=4, depth=1, key=jax.random.key(seed))


def squared(model: Any, x: Any, y: Any) -> Any:
    return ((jax.vmap(model)(x) - y) ** 2).mean()


def eager_step(model: Any, opt: Any, x: Any = X, y: Any = Y) -> Any:
    opt.zero_grad()
    loss = mt.backward(squared, model, x, y)
    opt.step()
    return loss


jitted_step = mt.jit(eager_step)


def arrays_of(tree: Any) -> list[Any]:
    return [np.array(leaf) for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]


def assert_same(mine: Any, theirs: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    for a, b in zip(arrays_of(mine), arrays_of(theirs), strict=True):
        assert_allclose(a, b, rtol=rtol, atol=atol)


def trained_by_equinox(module: Any, steps: int, tx: Any = SGD, spec: Any = eqx.is_inexact_array) -> Any:
    state = tx.init(eqx.filter(module, spec))
    step = _their_step(tx)
    for _ in range(steps):
        chosen, rest = eqx.partition(module, spec)
        chosen, state = step(chosen, rest, state)
        module = eqx.combine(chosen, rest)
    return module


@functools.cache
def _their_step(tx: Any) -> Any:
    @eqx.filter_jit
    def step(chosen: Any, rest: Any, state: Any) -> Any:
        def loss_fn(chosen: Any) -> Any:
            return squared(eqx.combine(chosen, rest), X, Y)

        with as_jax_comes():
            updates, state = tx.update(eqx.filter_grad(loss_fn)(chosen), state, chosen)
            return eqx.apply_updates(chosen, updates), state

    return step


# -- the same trajectory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "tx"),
    [
        (lambda m: optim.SGD([m], lr=0.1, momentum=0.9), SGD),
        pytest.param(lambda m: optim.Adam([m], lr=0.01), optax.adam(0.01), marks=pytest.mark.slow),
    ],
)
def test_the_trajectory_of_equinox(make: Any, tx: Any) -> None:
    model = Equinox(mlp())
    opt = make(model)
    for step in (eager_step, eager_step, jitted_step, jitted_step, eager_step):
        step(model, opt)
    assert_same(model.module, trained_by_equinox(mlp(), 5, tx), rtol=1e-4)
    assert list(model.state_dict()) == [f"layers.{i}.{name}" for i in range(2) for name in ("weight", "bias")]
    assert type(model.module) is eqx.nn.MLP and model.module.activation is mlp().activation


def test_scan_and_an_optimizer_as_carry() -> None:
    models = [Equinox(mlp()) for _ in range(3)]
    opts = [optim.SGD([model], lr=0.1) for model in models]
    xs, ys = np.stack([X, 2 * X, -X]), np.stack([Y, Y, 1 - Y])
    for x, y in zip(xs, ys, strict=True):
        eager_step(models[0], opts[0], x, y)
    mt.scan(lambda x, y: eager_step(models[1], opts[1], x, y), xs, ys)

    def body(opt: Any, xy: Any) -> Any:
        return opt, eager_step(opt.modules[0], opt, *xy)

    carried, _ = jax.jit(lambda opt, xs: jax.lax.scan(body, opt, xs))(opts[2], (xs, ys))
    assert_same(models[1].module, models[0].module)
    assert_same(carried.modules[0].module, models[0].module)
    assert_same(models[2].module, mlp(), 0, 0)


def test_frozen_parameters_and_other_modules_in_one_optimizer() -> None:
    spec = jax.tree.map(lambda _: False, mlp())
    spec = eqx.tree_at(lambda m: m.layers[-1].weight, spec, True)
    model, ours = Equinox(mlp(), trainable=spec), nn.Linear(1, 1)
    assert [name for name, _ in model.named_parameters()] == ["layers.1.weight"]
    opt = optim.SGD([model, ours], lr=0.1, momentum=0.9)
    before, weight = arrays_of(model.module), np.array(ours.weight)
    mt.backward(lambda m, x, y: ((ours(jax.vmap(m)(x)[:, None])[:, 0] - y) ** 2).mean(), model, X, Y)
    opt.step()
    same = [np.array_equal(a, b) for a, b in zip(arrays_of(model.module), before, strict=True)]
    assert same == [True, True, False, True] and not np.array_equal(ours.weight, weight)
    model, opt = Equinox(mlp(), trainable=spec), None
    opt = optim.SGD([model], lr=0.1, momentum=0.9)
    for _ in range(3):
        eager_step(model, opt)
    assert_same(model.module, trained_by_equinox(mlp(), 3, spec=spec))
    assert len(model.unfreeze().parameters()) == 4


def test_checkpoints_and_packs(tmp_path: Any) -> None:
    made = []
    for _ in range(2):
        model = Equinox(mlp())
        mt.pack(model)
        made.append((model, optim.SGD([model], lr=0.1, momentum=0.9)))
    (model, opt), (other, other_opt) = made
    eager_step(model, opt)
    mt.save(tmp_path / "run.npz", model=model, opt=opt)
    mt.load(tmp_path / "run.npz", model=other, opt=other_opt)
    assert_same(other.module, model.module, 0, 0)
    eager_step(model, opt), eager_step(other, other_opt)
    assert_same(other.module, model.module, 0, 0)
    assert_same(model.module, trained_by_equinox(mlp(), 2))


class Normed(eqx.Module):
    """A layer with state, one with random numbers."""

    weight: jax.Array
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout

    def __init__(self) -> None:
        self.weight = jnp.array([[1.0, 2.0, 3.0]])
        self.norm = eqx.nn.BatchNorm(1, axis_name="batch", mode="batch")
        self.drop = eqx.nn.Dropout(0.25)

    def __call__(self, x: Any, state: Any, key: Any) -> Any:
        x, state = self.norm(self.weight @ x, state)
        return self.drop(x, key=key).sum(), state


def batched(module: Any, state: Any, key: Any) -> Any:
    keys = jax.random.split(key, len(X))
    with as_jax_comes():
        return jax.vmap(module, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))(X, state, keys)


def stateful_step(model: Any, opt: Any) -> None:
    def loss_fn(model: Any) -> Any:
        out, model.state = batched(model.module, model.state, mt.next_key())
        return ((out - Y) ** 2).mean()

    opt.zero_grad()
    mt.backward(loss_fn, model)
    opt.step()


def test_batch_norm_and_dropout() -> None:
    module, state = eqx.nn.make_with_state(Normed)()
    model = Equinox(module, state)
    assert [name for name, _ in model.named_buffers()] == ["state.0", "state.1.0", "state.1.1"]
    opt = optim.SGD([model], lr=0.1, momentum=0.9)
    train = mt.jit(stateful_step)
    mt.seed(4)
    for _ in range(4):
        train(model, opt)

    @eqx.filter_jit
    def step(module: Any, state: Any, opt_state: Any, key: Any) -> Any:
        def loss_fn(module: Any) -> Any:
            out, new = batched(module, state, key)
            return ((out - Y) ** 2).mean(), new

        grads, new = eqx.filter_grad(loss_fn, has_aux=True)(module)
        with as_jax_comes():
            updates, opt_state = SGD.update(grads, opt_state)
            return eqx.apply_updates(module, updates), new, opt_state

    mt.seed(4)
    opt_state = SGD.init(eqx.filter(module, eqx.is_inexact_array))
    for _ in range(4):
        module, state, opt_state = step(module, state, opt_state, mt.next_key())
    assert_same(model.module, module, rtol=1e-4)
    assert_same(model.state, state, rtol=1e-4)
    model.eval()
    assert model.module.drop.inference and model.module.norm.inference
    before = arrays_of(model.state)
    out, after = batched(model.module, model.state, jax.random.key(0))
    for a, b in zip(arrays_of(after), before, strict=True):
        assert_array_equal(a, b)
    model.train()
    assert not model.module.drop.inference and not model.module.norm.inference
    assert copy.deepcopy(model).state.tree_flatten()[1] == state.tree_flatten()[1]


# -- the layer zoo ----------------------------------------------------------------------------------------------------

_key = jax.random.key(7)
_vector = np.array([0.5, -1.0, 2.0], np.float32)
_signal, _image, _volume = (np.linspace(-1, 1, 2 * 4**n, dtype=np.float32).reshape(2, *[4] * n) for n in (1, 2, 3))
_words = np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4)


def _then(layer: Any, *shape: int) -> Any:
    """A layer without parameters, behind something to train."""
    return eqx.nn.Sequential([_Scale(jnp.ones(shape)), eqx.nn.Lambda(layer)])


class _Scale(eqx.Module):
    weight: jax.Array

    def __call__(self, x: Any, *, key: Any = None) -> Any:
        return x * self.weight


class _Shared(eqx.Module):
    shared: eqx.nn.Shared

    def __init__(self) -> None:
        pair = (eqx.nn.Linear(3, 3, key=_key), eqx.nn.Linear(3, 3, key=_key))
        self.shared = eqx.nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight)

    def __call__(self, x: Any) -> Any:
        first, second = self.shared()
        return second(first(x))


def _pool(name: str, n: int) -> tuple[Callable[[], Any], tuple[Any, ...]]:
    x = (_signal, _image, _volume)[n - 1]
    layer = getattr(eqx.nn, name)
    return lambda: _then(layer(2), *x.shape), (x,)


def _conv(name: str, n: int) -> tuple[Callable[[], Any], tuple[Any, ...]]:
    return lambda: getattr(eqx.nn, name)(2, 2, 2, key=_key), ((_signal, _image, _volume)[n - 1],)


# class: (makes it, inputs)
ZOO: dict[Any, tuple[Callable[[], Any], tuple[Any, ...]]] = {
    eqx.nn.PReLU: (lambda: eqx.nn.PReLU(), (_vector,)),
    eqx.nn.MultiheadAttention: (lambda: eqx.nn.MultiheadAttention(2, 4, key=_key), (_words, _words, _words)),
    eqx.nn.Conv: (lambda: eqx.nn.Conv(1, 2, 2, 2, key=_key), (_signal,)),
    eqx.nn.ConvTranspose: (lambda: eqx.nn.ConvTranspose(1, 2, 2, 2, key=_key), (_signal,)),
    **{
        getattr(eqx.nn, f"{name}{n}d"): _conv(f"{name}{n}d", n) for name in ("Conv", "ConvTranspose") for n in (1, 2, 3)
    },
    eqx.nn.Dropout: (lambda: _then(lambda x: eqx.nn.Dropout(0.5)(x, key=_key), 3), (_vector,)),
    eqx.nn.Embedding: (lambda: eqx.nn.Embedding(5, 3, key=_key), (np.int32(2),)),
    eqx.nn.RotaryPositionalEmbedding: (lambda: _then(eqx.nn.RotaryPositionalEmbedding(4), 4, 4), (_words,)),
    eqx.nn.Identity: (lambda: _then(eqx.nn.Identity(), 3), (_vector,)),
    eqx.nn.Linear: (lambda: eqx.nn.Linear(3, 2, key=_key), (_vector,)),
    eqx.nn.MLP: (lambda: mlp(), (_vector,)),
    eqx.nn.GroupNorm: (lambda: eqx.nn.GroupNorm(1, 2), (_image,)),
    eqx.nn.LayerNorm: (lambda: eqx.nn.LayerNorm(3), (_vector,)),
    eqx.nn.RMSNorm: (lambda: eqx.nn.RMSNorm(3), (_vector,)),
    **{
        getattr(eqx.nn, f"{name}{n}d"): _pool(f"{name}{n}d", n)
        for name in ("AdaptiveAvgPool", "AdaptiveMaxPool", "AvgPool", "MaxPool")
        for n in (1, 2, 3)
    },
    eqx.nn.AdaptivePool: (lambda: _then(eqx.nn.AdaptivePool(2, 1, jnp.mean), 2, 4), (_signal,)),
    eqx.nn.Pool: (lambda: _then(eqx.nn.Pool(0.0, jax.lax.add, 1, 2), 2, 4), (_signal,)),
    eqx.nn.GRUCell: (lambda: eqx.nn.GRUCell(3, 2, key=_key), (_vector, np.ones(2, np.float32))),
    eqx.nn.LSTMCell: (lambda: eqx.nn.LSTMCell(3, 2, key=_key), (_vector, (np.ones(2, np.float32),) * 2)),
    eqx.nn.Lambda: (lambda: _then(jnp.tanh, 3), (_vector,)),
    eqx.nn.Sequential: (
        lambda: eqx.nn.Sequential([eqx.nn.Linear(3, 2, key=_key), eqx.nn.Lambda(jnp.tanh)]),
        (_vector,),
    ),
    eqx.nn.Shared: (_Shared, (_vector,)),
    eqx.nn.SpectralNorm: (
        lambda: eqx.nn.SpectralNorm(eqx.nn.Linear(3, 2, key=_key), "weight", key=_key),
        (_vector,),
    ),
    eqx.nn.WeightNorm: (lambda: eqx.nn.WeightNorm(eqx.nn.Linear(3, 2, key=_key)), (_vector,)),
    eqx.nn.BatchNorm: (lambda: eqx.nn.BatchNorm(3, "batch", mode="ema"), (X,)),
}
NO_LAYERS = {
    eqx.nn.StatefulLayer: "the base of layers with state",
    eqx.nn.StateIndex: "part of layers with state",
}
QUICK = [eqx.nn.Embedding, eqx.nn.Shared, eqx.nn.Linear, eqx.nn.SpectralNorm, eqx.nn.AvgPool1d]
STATEFUL = (eqx.nn.SpectralNorm, eqx.nn.BatchNorm)


def test_every_layer_of_equinox_is_in_the_table() -> None:
    layers = {c for c in vars(eqx.nn).values() if inspect.isclass(c) and issubclass(c, eqx.Module)}
    assert layers == ZOO.keys() | NO_LAYERS.keys()
    assert not ZOO.keys() & NO_LAYERS.keys()


def zoo_output(module: Any, state: Any, args: Any) -> Any:
    with as_jax_comes():
        if state is None:
            return module(*args), None
        if isinstance(module, eqx.nn.BatchNorm):
            return jax.vmap(module, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(*args, state)
        return module(*args, state)


def zoo_loss(out: Any) -> Any:
    return sum(((leaf - 0.5) ** 2).mean() for leaf in jax.tree.leaves(out))


def zoo_step(model: Any, opt: Any, *args: Any) -> Any:
    def loss_fn(model: Any) -> Any:
        out, state = zoo_output(model.module, model.state, args)
        if state is not None:
            model.state = state
        return zoo_loss(out)

    opt.zero_grad()
    loss = mt.backward(loss_fn, model)
    opt.step()
    return loss


@pytest.mark.parametrize("compiled", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "layer", [pytest.param(c, id=c.__name__, marks=() if c in QUICK else pytest.mark.slow) for c in ZOO]
)
def test_every_layer_trains_as_in_equinox(layer: Any, compiled: bool) -> None:
    make, args = ZOO[layer]
    first, first_state = eqx.nn.make_with_state(make)() if layer in STATEFUL else (make(), None)
    module, state = first, first_state

    @eqx.filter_jit
    def step(module: Any, state: Any, opt_state: Any) -> Any:
        def loss_fn(module: Any) -> Any:
            out, new = zoo_output(module, state, args)
            return zoo_loss(out), new

        (loss, new), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(module)
        with as_jax_comes():
            updates, opt_state = SGD.update(grads, opt_state)
            return eqx.apply_updates(module, updates), new, opt_state, loss

    opt_state = SGD.init(eqx.filter(module, eqx.is_inexact_array))
    losses = []
    for _ in range(5):
        module, state, opt_state, loss = step(module, state, opt_state)
        losses.append(float(loss))
    assert losses[-1] != losses[0]
    model = Equinox(first, first_state)
    opt = optim.SGD([model], lr=0.1, momentum=0.9)
    ours = mt.jit(zoo_step) if compiled else zoo_step
    assert_allclose([float(ours(model, opt, *args)) for _ in range(5)], losses, rtol=1e-5)
    assert_same(model.module, module)
    assert_same(model.state, state)


# -- the holder -------------------------------------------------------------------------------------------------------


def test_assigning_a_module_writes_it() -> None:
    model = Equinox(mlp())
    opt = optim.SGD([model], lr=0.1, momentum=0.9)
    eager_step(model, opt)
    state = {path: np.array(s["momentum_buffer"]) for path, s in opt.state_dict()["state"].items()}
    old = model.module
    model.module = eqx.tree_at(lambda m: m.layers[0].bias, old, jnp.full(4, 7.0))
    assert_array_equal(model.state_dict()["layers.0.bias"], jnp.full(4, 7.0))
    assert_array_equal(model.module.layers[1].weight, old.layers[1].weight)
    for path, s in opt.state_dict()["state"].items():
        assert_array_equal(s["momentum_buffer"], state[path])

    @mt.jit
    def clipped(model: Any) -> None:
        model.module = jax.tree.map(lambda a: jnp.clip(a, -1, 1) if eqx.is_array(a) else a, model.module)

    clipped(model)
    assert_array_equal(model.module.layers[0].bias, jnp.ones(4))
    with pytest.raises(
        ValueError, match=r"Equinox\.module got arrays that do not fit; nothing has changed\. .*:\n.*\n  lay"
    ):
        model.module = jax.tree.map(lambda a: a[:1] if eqx.is_array(a) and a.ndim else a, model.module)
    assert model.module.layers[0].weight.shape == (4, 3)


def test_another_structure_is_taken_over_and_keeps_what_stays() -> None:
    model = Equinox(mlp())
    opt = optim.SGD([model], lr=0.1, momentum=0.9)
    step = mt.jit(eager_step)
    step(model, opt)
    before = opt.state_dict()["state"]["0.layers.0.weight"]["momentum_buffer"]
    model.freeze()
    model.unfreeze()
    model.module = eqx.tree_at(lambda m: m.activation, model.module, jnp.tanh)
    assert_array_equal(opt.state_dict()["state"]["0.layers.0.weight"]["momentum_buffer"], before)
    step(model, opt)
    assert step.num_compiles == 2
    head = eqx.nn.Linear(4, "scalar", use_bias=False, key=jax.random.key(5))
    model.module = eqx.tree_at(lambda m: m.layers[1], model.module, head)
    assert list(model.state_dict()) == ["layers.0.weight", "layers.0.bias", "layers.1.weight"]
    step(model, opt)
    assert set(opt.state_dict()["state"]) == {f"0.{path}" for path in model.state_dict()}
    with pytest.raises(mt.TraceError, match=r"Equinox\.module was given another structure inside compiled code"):
        mt.jit(lambda m: setattr(m, "module", eqx.tree_at(lambda m: m.activation, m.module, jnp.sin)))(model)


def test_programs_are_shared() -> None:
    step = mt.jit(eager_step)
    for seed in range(3):
        model = Equinox(mlp(seed))
        step(model, optim.SGD([model], lr=0.1))
    assert step.num_compiles == 1


def test_one_array_in_two_places_is_two_parameters() -> None:
    layer = eqx.nn.Linear(3, 3, key=_key)
    model = Equinox((layer, layer))
    opt = optim.SGD([model], lr=0.1)
    mt.backward(lambda m, x: (m.module[0](x) * 2 + m.module[1](x)).sum(), model, _vector)
    opt.step()
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert_allclose(model.module[0].bias - layer.bias, -0.2 * np.ones(3), rtol=1e-5)
    assert_allclose(model.module[1].bias - layer.bias, -0.1 * np.ones(3), rtol=1e-5)


def test_arrays_that_were_read_stay() -> None:
    module = mlp()
    kept = arrays_of(module)
    model = Equinox(module)
    opt = optim.SGD([model], lr=0.1)
    read = model.module
    for step in (eager_step, jitted_step, jitted_step):
        step(model, opt)
    assert_same(module, read, 0, 0)
    for leaf, value in zip(arrays_of(read), kept, strict=True):
        assert_array_equal(leaf, value)

    def fails(model: Any) -> Any:
        model.module = jax.tree.map(lambda a: a * 2 if eqx.is_array(a) else a, model.module)
        raise KeyError("no")

    before = arrays_of(model.module)
    for run in (mt.backward, lambda fn, model: mt.jit(fn)(model)):
        with pytest.raises(KeyError, match="no"):
            run(fails, model)
        assert_same(before, arrays_of(model.module), 0, 0)
    with pytest.raises(mt.TraceError, match=r"Equinox\.layers\.0\.weight was changed inside a JAX transform"):
        jax.jit(
            lambda: setattr(model, "module", jax.tree.map(lambda a: a * 2 if eqx.is_array(a) else a, model.module))
        )()


def test_a_holder_is_a_pytree_and_copies() -> None:
    model = Equinox(mlp())
    want = eqx.filter_grad(squared)(mlp(), X, Y)
    assert_same(jax.grad(squared)(model, X, Y).module, want)
    double = jax.tree.map(lambda a: 2 * a, model)
    assert_array_equal(double.module.layers[0].bias, 2 * model.module.layers[0].bias)
    double.module = mlp(1)
    assert_same(double.module, mlp(1), 0, 0)
    other = copy.deepcopy(model)
    eager_step(other, optim.SGD([other], lr=0.1))
    assert_same(model.module, mlp(), 0, 0)
    plain = Equinox(eqx.nn.Linear(3, 2, key=_key))
    assert_array_equal(pickle.loads(pickle.dumps(plain)).module.weight, plain.module.weight)
    assert repr(plain) == "Equinox(weight=float32[2, 3], bias=float32[2])"
    batch = jax.vmap(lambda a: jax.tree.map(lambda b: b * a, plain))(jnp.arange(2.0))
    assert jax.vmap(lambda m: m(_vector))(batch).shape == (2, 2)


# -- what is wrong is said --------------------------------------------------------------------------------------------


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"state must be an eqx\.nn\.State, .*got a function"):
        Equinox(mlp(), eqx.is_array)
    with pytest.raises(ValueError, match="trainable=.* selects none of the module's arrays"):
        Equinox(mlp(), trainable=lambda leaf: False)
    unhashable = type("Unhashable", (), {"__eq__": lambda *_: True})()
    module = {"a": unhashable, "b": jnp.ones(2, jnp.complex64), "c": jnp.ones(2)}
    message = r"Equinox\.module has parts that Equinox cannot hold; nothing has changed:\n  a is a Unhashable, which is"
    with pytest.raises(ValueError, match=message):
        Equinox(module)
    with pytest.raises(
        ValueError, match=r"  b is complex64\[2\], which cannot be trained: parameters must be floating"
    ):
        Equinox(module | {"a": 1})
    with pytest.raises(ValueError, match=r"  state\.0 is the name of two arrays"):
        bn, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="ema")
        Equinox({"state": [jnp.ones(2)], "bn": bn}, state)
    hidden = r"  layers\.1\.fn is a Module of minitorch_jax \(BatchNorm1d\): write a Module that holds both, or conv"
    with pytest.raises(ValueError, match=hidden):
        Equinox(eqx.nn.Sequential([eqx.nn.Identity(), eqx.nn.Lambda(nn.BatchNorm1d(2))]))
    with pytest.raises(ValueError, match=r"  value is a Module of minitorch_jax \(Linear\)"):
        Equinox(nn.Linear(1, 1))
    model = Equinox(mlp())
    with pytest.raises(
        AttributeError, match=r"Equinox\.other: Equinox holds an equinox module and takes no attributes"
    ):
        model.other = mt.Parameter(1.0)
    with pytest.raises(AttributeError, match=r"Equinox\.module cannot be deleted"):
        del model.module
    with pytest.raises(TypeError, match=r"Equinox\.layers\.0\.bias cannot be tied: it belongs to an equinox module"):
        model.tie("layers.0.bias", model, "layers.1.bias")


# -- the other way ----------------------------------------------------------------------------------------------------


def our_net() -> Any:
    return nn.Sequential(
        nn.Linear(3, 4, key=jax.random.key(0)), nn.BatchNorm1d(4), nn.Linear(4, 1, key=jax.random.key(1))
    )


def test_ours_trains_in_equinox_as_here() -> None:
    ours = our_net()
    ours[0].requires_grad_(False)
    model, state = to_equinox(ours, with_state=True)
    assert list(model.parameters) == ["1.weight", "1.bias", "2.weight", "2.bias"]
    assert list(state)[:2] == ["0.weight", "0.bias"] and state["1.num_batches_tracked"].dtype == jnp.int32
    opt_state = SGD.init(eqx.filter(model, eqx.is_inexact_array))
    opt = optim.SGD([ours], lr=0.1, momentum=0.9)

    @eqx.filter_jit
    def step(model: Any, state: Any, opt_state: Any) -> Any:
        def loss_fn(model: Any) -> Any:
            out, new = model(X, state)
            return (out**2).mean(), new

        grads, new = eqx.filter_grad(loss_fn, has_aux=True)(model)
        updates, opt_state = SGD.update(grads, opt_state)
        return eqx.apply_updates(model, updates), new, opt_state

    for _ in range(3):
        model, state, opt_state = step(model, state, opt_state)
        opt.zero_grad()
        mt.backward(mean_square, ours, X)
        opt.step()
    for path, value in ours.state_dict().items():
        assert_allclose((model.parameters | state)[path], value, rtol=1e-4, atol=1e-6)
    out, after = eqx.nn.inference_mode(model)(X, state)
    assert_allclose(out, ours.eval()(X), rtol=1e-4)
    assert int(after["1.num_batches_tracked"]) == int(state["1.num_batches_tracked"]) == 3


def test_ours_in_equinox_tied_and_random() -> None:
    tied = nn.Sequential(nn.Linear(3, 3, key=jax.random.key(0)), nn.Linear(3, 3, key=jax.random.key(1)))
    tied[1].tie("weight", tied[0], "weight")
    model = to_equinox(tied)
    assert list(model.parameters) == ["0.weight", "0.bias", "1.bias"]
    assert_allclose(eqx.filter_jit(model)(X), tied(X), rtol=1e-5)
    assert_same(Equinox(model).module, model, 0, 0)
    drop = to_equinox(nn.Dropout())
    with mt.rng(5):
        want = nn.Dropout()(jnp.asarray(X))
    assert_array_equal(eqx.filter_jit(drop)(jnp.asarray(X), key=jax.random.key(5)), want)
    with pytest.raises(mt.TraceError, match="a random number was drawn inside a JAX transform"):
        eqx.filter_jit(drop)(jnp.asarray(X))


def test_to_equinox_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="to_equinox takes a Module of minitorch_jax; got a MLP"):
        to_equinox(mlp())
    with pytest.raises(ValueError, match=r"has buffers or frozen parameters \(1\.running_mean, .*with_state=True"):
        to_equinox(our_net())
    model, _ = to_equinox(our_net(), with_state=True)
    with pytest.raises(TypeError, match=r"this module has a state: call it as `out, state = model\(x, state\)`"):
        model(X)

    class Growing(mt.Module):
        def __init__(self) -> None:
            self.weight = mt.Parameter(1.0)

        def forward(self, x: Any) -> Any:
            self.weight = self.weight + 1
            return x * self.weight

    with pytest.raises(RuntimeError, match=r"Growing\.forward changed the parameters weight, and a call cannot change"):
        to_equinox(Growing())(1.0)


# -- what a review found ------------------------------------------------------------------------------------------------


def test_what_was_frozen_stays_so_in_another_structure():
    mlp = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    spec = eqx.tree_at(lambda m: m.layers[-1].weight, jax.tree.map(lambda _: False, mlp), True)  # callable, as mlp is
    holder = Equinox(mlp, trainable=spec)
    first = eqx.nn.Linear(2, 5, key=jax.random.key(1))
    holder.module = eqx.tree_at(lambda m: m.layers[0], holder.module, first)
    assert [name for name, _ in holder.named_parameters()] == ["layers.1.weight"]
    holder = Equinox(mlp).freeze()
    holder.module = eqx.tree_at(lambda m: m.layers[-1], holder.module, eqx.nn.Linear(4, 3, key=jax.random.key(1)))
    assert not list(holder.named_parameters())


def test_a_copy_knows_what_is_trained():
    def matrices(leaf):
        return eqx.is_inexact_array(leaf) and leaf.ndim == 2

    holder = Equinox(eqx.nn.Linear(2, 3, key=jax.random.key(0)), trainable=matrices)
    copied = jax.jit(lambda holder: holder)(holder)
    for each in (holder, copied):
        each.module = (each.module, eqx.nn.Linear(2, 5, key=jax.random.key(1)))
        assert [name for name, _ in each.named_parameters()] == ["0.weight", "1.weight"]


def test_static_leaves_that_are_equal_and_not_the_same():
    holder = Equinox((jnp.ones(2), 1.0, float("nan")))
    holder.module = (holder.module[0], -0.0, holder.module[2])
    holder.module = (holder.module[0], 0.0, holder.module[2])
    assert str(holder.module[1]) == "0.0"
    walk = walk_of(holder)
    holder.module = holder.module
    assert walk_of(holder) is walk
    with pytest.raises(ValueError, match="To change only shapes or dtypes, make a new Equinox"):
        holder.module = (jnp.ones(3), *holder.module[1:])
