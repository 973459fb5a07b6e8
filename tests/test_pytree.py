"""Modules and optimizers are pytrees: they pass through every JAX transform, and no update is lost in silence."""

import copy
import gc
import pickle
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training import Counting, decaying, mean_error, mean_square

import minitorch_jax as mt
from minitorch_jax import Buffer, Module, Parameter, nn, optim

BOTH_SPELLINGS = r"opt, loss = jax\.jit\(step\)\(opt, x, y\)(.|\n)*mt\.(jit|backward)"


class Norm(Module):
    """Keeps a running mean and a count, as BatchNorm does."""

    def __init__(self, size=3):
        self.weight = Parameter(jnp.ones(size))
        self.mean = Buffer(jnp.zeros(size))
        self.count = Buffer(0)

    def forward(self, x):
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * x.mean(0)
            self.count = self.count + 1
        return (x - self.mean[None]) * self.weight[None]


def values(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_close(tree, expected, tolerance=1e-6):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for a, b in zip(values(tree), values(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def has_tracers(*trees):
    return any(isinstance(leaf, jax.core.Tracer) for tree in trees for leaf in jax.tree.leaves(tree))


# -- modules under transforms ------------------------------------------------------------------------------------------


def test_leaves_are_parameters_and_buffers_but_no_gradients(mlp, batch):
    mt.backward(mean_square, mlp, batch[0])
    assert [leaf.shape for leaf in jax.tree.leaves(mlp)] == [(4, 3), (4,), (2, 4), (2,)]
    assert jax.tree.leaves(mlp)[1] is mlp[0].bias
    norm = Norm()
    assert len(jax.tree.leaves(norm)) == 3
    assert jax.tree.leaves(norm.freeze())[0] is norm.weight


def test_key_paths_are_the_names_in_the_state_dict():
    net = nn.Sequential(nn.Linear(2, 3, key=jax.random.key(0)), Norm(3))
    net[1].inner = {"a": [Norm(1)]}
    paths, _ = jax.tree_util.tree_flatten_with_path(net)
    shown = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    assert shown == list(net.state_dict())
    assert shown[-1] == "1.inner.a.0.count"


def test_structure_is_equal_for_equal_modules_and_differs_for_what_is_static():
    def make():
        return nn.Sequential(nn.Linear(2, 3), Norm(3))

    one, two = make(), make()
    assert jax.tree.structure(one) == jax.tree.structure(two)
    assert hash(jax.tree.structure(one)) == hash(jax.tree.structure(two))
    for change in (
        lambda net: net.eval(),
        lambda net: net[0].freeze(),
        lambda net: setattr(net[1], "note", "text"),
        lambda net: net.append(nn.ReLU()),
        lambda net: net[0].tie("bias", net[1], "weight"),
    ):
        other = make()
        change(other)
        assert jax.tree.structure(other) != jax.tree.structure(one)


def test_models_of_one_structure_share_a_trace():
    counting = Counting(lambda model, x: model(x))
    call, x = jax.jit(counting), jnp.ones((1, 3))
    for key in range(3):
        model = nn.Linear(3, 2, key=jax.random.key(key))
        np.testing.assert_allclose(call(model, x), model(x), rtol=1e-6)
    model.weight = model.weight + 1
    np.testing.assert_allclose(call(model, x), model(x), rtol=1e-6)
    assert counting.calls == 1
    call(model.eval(), x)
    assert counting.calls == 2


def test_grad_gives_a_module_of_gradients(mlp, batch):
    x, y = batch
    grads = jax.grad(mean_error)(mlp, x, y)
    assert type(grads) is nn.Sequential and jax.tree.structure(grads) == jax.tree.structure(mlp)

    def by_hand(w0, b0, w2, b2):
        return ((jnp.tanh(x @ w0.T + b0[None]) @ w2.T + b2[None] - y) ** 2).mean()

    expected = jax.grad(by_hand, argnums=(0, 1, 2, 3))(*mlp.parameters())
    for grad, wanted in zip(grads.parameters(), expected, strict=True):
        np.testing.assert_allclose(grad, wanted, rtol=1e-5, atol=1e-7)
    assert grads[2].bias.shape == (2,) and np.asarray(grads[0].weight).any()


def test_input_gradients_leave_the_module_alone(mlp, batch):
    before = values(mlp)
    gradient = jax.grad(mean_square, argnums=1)(mlp, batch[0])
    assert gradient.shape == (5, 3) and np.asarray(gradient).any()
    assert all(np.array_equal(a, b) for a, b in zip(values(mlp), before, strict=True))


def test_jit_takes_and_gives_modules(mlp, batch):
    x, _ = batch
    np.testing.assert_allclose(jax.jit(lambda model, x: model(x))(mlp, x), mlp(x), rtol=1e-6)

    @jax.jit
    def double(model):
        model[0].weight = 2 * model[0].weight
        return {"model": model, "n": 1}

    before = np.asarray(mlp[0].weight)
    new = double(mlp)["model"]
    np.testing.assert_array_equal(new[0].weight, 2 * before)
    np.testing.assert_array_equal(mlp[0].weight, before)
    assert type(new) is nn.Sequential and new[2].in_features == 4


@pytest.mark.slow
def test_an_ensemble_is_a_module_of_stacked_arrays():
    keys = jax.random.split(jax.random.key(0), 4)
    ensemble = jax.vmap(lambda k: nn.Linear(3, 2, key=k))(keys)
    members = [nn.Linear(3, 2, key=key) for key in keys]
    assert ensemble.weight.shape == (4, 2, 3) and ensemble.bias.shape == (4, 2) and ensemble.in_features == 3
    np.testing.assert_array_equal(ensemble.weight, np.stack([member.weight for member in members]))
    x = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)
    out = jax.vmap(lambda model, x: model(x), in_axes=(0, None))(ensemble, x)
    np.testing.assert_allclose(out, np.stack([member(x) for member in members]), rtol=1e-5, atol=1e-6)
    grads = jax.vmap(jax.grad(mean_square), in_axes=(0, None))(ensemble, x)
    np.testing.assert_allclose(grads.weight[2], jax.grad(mean_square)(members[2], x).weight, rtol=1e-5, atol=1e-6)
    third = jax.tree.map(lambda leaf: leaf[2], ensemble)
    np.testing.assert_allclose(third(x), members[2](x), rtol=1e-6)


@pytest.mark.slow
def test_in_axes_may_be_a_module_of_numbers():
    ensemble = jax.vmap(lambda k: nn.Linear(3, 2, key=k))(jax.random.split(jax.random.key(0), 4))
    axes = jax.tree.map(lambda _: 0, ensemble)
    x = jnp.ones((2, 3))
    out = jax.vmap(lambda model, x: model(x), in_axes=(axes, None))(ensemble, x)
    np.testing.assert_allclose(out[1], x @ ensemble.weight[1].T + ensemble.bias[1][None], rtol=1e-6)


def test_scan_over_stacked_layers(batch):
    layers = [nn.Linear(3, 3, key=jax.random.key(i)) for i in range(4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    out, _ = jax.lax.scan(lambda x, layer: (jnp.tanh(layer(x)), None), batch[0], stacked)
    expected = batch[0]
    for layer in layers:
        expected = jnp.tanh(layer(expected))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_scan_carries_a_module_with_its_buffers(batch):
    norm = Norm()

    def body(model, x):
        out = model(x)
        return model, out.sum()

    new, sums = jax.lax.scan(body, norm, jnp.stack([batch[0], 2 * batch[0]]))
    eager = Norm()
    expected = [float(eager(batch[0]).sum()), float(eager(2 * batch[0]).sum())]
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(new.mean, eager.mean, rtol=1e-5)
    assert int(new.count) == 2 and new.count.dtype == jnp.int32 and int(norm.count) == 0


def test_checkpoint_recomputes_to_the_same_gradient(mlp, batch):
    plain = jax.grad(mean_error)(mlp, *batch)
    again = jax.grad(jax.checkpoint(mean_error))(mlp, *batch)
    assert_close(again, plain)


def test_eval_shape_makes_modules_of_shapes(mlp, batch):
    out = jax.eval_shape(lambda model, x: model(x), mlp, batch[0])
    assert (out.shape, out.dtype) == ((5, 2), jnp.float32)
    shapes = jax.eval_shape(lambda key: nn.Linear(3, 2, key=key), jax.random.key(0))
    assert type(shapes) is nn.Linear and shapes.weight == jax.ShapeDtypeStruct((2, 3), jnp.float32)
    assert {name: leaf.shape for name, leaf in shapes.state_dict().items()} == {"weight": (2, 3), "bias": (2,)}


def test_eval_shape_gives_integer_buffers_their_own_shape_and_dtype():
    shapes = jax.eval_shape(lambda norm: norm, Norm())
    assert (shapes.count.shape, shapes.count.dtype) == ((), jnp.int32)
    assert shapes.state_dict()["count"].dtype == jnp.int32


def test_tree_map_does_arithmetic(mlp):
    doubled = jax.tree.map(lambda leaf: 2 * leaf, mlp)
    mixed = jax.tree.map(lambda a, b: b - a, mlp, doubled)
    assert_close(mixed, mlp)
    np.testing.assert_array_equal(doubled[0].bias, 2 * np.asarray(mlp[0].bias))
    assert doubled is not mlp and doubled[0] is not mlp[0]


def test_device_put_moves_a_copy(mlp):
    first, second = jax.devices("cpu")[:2]
    moved = jax.device_put(mlp, second)
    assert all(leaf.devices() == {second} for leaf in jax.tree.leaves(moved))
    assert all(leaf.devices() == {first} for leaf in jax.tree.leaves(mlp))
    assert_close(moved, mlp, 0)


def test_device_put_shares_no_fate_with_its_source(mlp, batch):
    moved = jax.device_put(mlp, jax.devices("cpu")[0])
    before = values(mlp)
    mt.backward(mean_error, mlp, *batch)
    optim.SGD([mlp], lr=0.1).step()
    assert all(np.array_equal(a, b) for a, b in zip(values(moved), before, strict=True))


def test_make_jaxpr_shows_one_input_per_leaf(mlp, batch):
    jaxpr = jax.make_jaxpr(lambda model, x: model(x))(mlp, batch[0])
    assert [var.aval.shape for var in jaxpr.jaxpr.invars] == [(4, 3), (4,), (2, 4), (2,), (5, 3)]
    assert [eqn.primitive.name for eqn in jaxpr.jaxpr.eqns].count("dot_general") == 2


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda obj: pickle.loads(pickle.dumps(obj))}
copies = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


@copies
def test_copies_of_modules_are_whole_and_independent(copied, mlp, batch):
    net = nn.Sequential(mlp, Norm(2)).eval()
    net.note = "text"
    mt.backward(mean_error, net, *batch)
    new = copied(net)
    assert_close(new, net, 0)
    assert new.note == "text" and new.training is False and list(new.state_dict()) == list(net.state_dict())
    assert all(np.array_equal(a, b) for a, b in zip(new.grads(), net.grads(), strict=True))
    assert np.asarray(new.grads()[0]).any()
    before = values(net)
    for _ in range(2):
        mt.backward(mean_error, new, *batch)
        optim.SGD([new], lr=0.1).step()
    assert all(np.array_equal(a, b) for a, b in zip(values(net), before, strict=True))
    after = values(new)
    optim.SGD([net], lr=0.1).step()
    assert all(np.array_equal(a, b) for a, b in zip(values(new), after, strict=True))
    assert not np.array_equal(after[0], before[0])


# -- optimizers --------------------------------------------------------------------------------------------------------


def make_optimizer(lr=0.1, **kwargs):
    net = nn.Sequential(nn.Linear(3, 4, key=jax.random.key(1)), nn.Tanh(), nn.Linear(4, 2, key=jax.random.key(2)))
    return optim.SGD([net], lr=lr, momentum=0.9, weight_decay=0.01, **kwargs)


def train_step(opt, x, y):
    opt.zero_grad()
    loss = mt.backward(mean_error, opt.modules[0], x, y)
    opt.step()
    return opt, loss


def stacked_batches(batch, number=4):
    x, y = batch
    scales = (1 + jnp.arange(number, dtype=jnp.float32))[:, None, None]
    return x[None] * scales, y[None] / scales


def test_the_leaves_of_an_optimizer_are_everything_that_changes():
    paths, _ = jax.tree_util.tree_flatten_with_path(make_optimizer())
    shown = {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in paths}
    assert len(shown) == len(paths) == 4 * 3 + 2
    for name, shape in {"0.weight": (4, 3), "2.bias": (2,)}.items():
        assert shown[f"modules.0.{name}"] == shape
        assert shown[f"grads.0.{name}"] == shape
        assert shown[f"state.0.{name}.momentum_buffer"] == shape
    assert {"hyperparameters", "steps"} < shown.keys()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("loop", ["jit", "jit with donation", "scan", "tree.map"])
def test_a_functional_loop_does_what_the_eager_loop_does(loop, batch):
    xs, ys = stacked_batches(batch)
    eager = make_optimizer()
    expected = [float(train_step(eager, x, y)[1]) for x, y in zip(xs, ys, strict=True)]
    first = opt = make_optimizer()
    start = values(opt)
    if loop == "scan":
        opt, losses = jax.lax.scan(lambda opt, xy: train_step(opt, *xy), opt, (xs, ys))
    elif loop == "tree.map":
        losses = []
        for x, y in zip(xs, ys, strict=True):
            opt, loss = train_step(jax.tree.map(lambda leaf: leaf, opt), x, y)
            losses.append(loss)
    else:
        opt = copy.deepcopy(opt)
        counting = Counting(train_step)
        compiled = jax.jit(counting, donate_argnums=0 if "donation" in loop else None)
        losses = []
        for x, y in zip(xs, ys, strict=True):
            opt, loss = compiled(opt, x, y)
            losses.append(loss)
        assert counting.calls == 1
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert_close(opt.modules[0], eager.modules[0])
    ours, theirs = opt.state_dict(), eager.state_dict()
    assert (ours["num_steps"], ours["hyperparameters"]) == (4, theirs["hyperparameters"])
    assert list(ours["state"]) == list(theirs["state"])
    for name, state in theirs["state"].items():
        assert ours["state"][name]["step"] == state["step"] == 4
        np.testing.assert_allclose(
            ours["state"][name]["momentum_buffer"], state["momentum_buffer"], rtol=1e-5, atol=1e-6, err_msg=name
        )
    for grad, wanted in zip(opt.modules[0].grads(), eager.modules[0].grads(), strict=True):
        np.testing.assert_allclose(grad, wanted, rtol=1e-5, atol=1e-6)
    assert all(np.array_equal(a, b) for a, b in zip(values(first), start, strict=True))
    assert first.num_steps == 0


def test_an_optimizer_from_jit_goes_on_eagerly(batch):
    eager, (opt, _) = make_optimizer(), jax.jit(train_step)(make_optimizer(), *batch)
    for _ in range(2):
        train_step(eager, *batch)
    opt.lr = 0.1
    train_step(opt, *batch)
    assert_close(opt.modules[0], eager.modules[0])
    assert opt.num_steps == eager.num_steps == 2


def test_plain_sgd_and_schedules_in_functional_loops(batch):

    def run(step, rounds=3):
        opt = mt.Optimizer([nn.Linear(3, 2, key=jax.random.key(0))], lr=decaying)
        for _ in range(rounds):
            opt, _ = step(opt, *batch)
        return opt

    functional, eager = run(jax.jit(train_step)), run(train_step)
    assert_close(functional.modules[0], eager.modules[0])
    np.testing.assert_allclose(functional.lr, 0.2 / 4, rtol=1e-6)


def test_a_change_of_lr_is_no_new_program_for_jit(batch):
    counting = Counting(train_step)
    compiled = jax.jit(counting)
    opt, eager = make_optimizer(), make_optimizer()
    for lr in (0.1, 0.5, 1, np.float32(0.25)):
        opt.lr = eager.lr = lr
        opt, _ = compiled(opt, *batch)
        train_step(eager, *batch)
    assert counting.calls == 1
    assert_close(opt.modules[0], eager.modules[0])


def test_a_step_inside_jit_may_change_lr(batch):
    @jax.jit
    def step(opt, lr, x, y):
        opt.lr = lr
        return train_step(opt, x, y)

    eager = make_optimizer(lr=0.5)
    train_step(eager, *batch)
    opt, _ = step(make_optimizer(), 0.5, *batch)
    assert_close(opt.modules[0], eager.modules[0])
    assert opt.lr == 0.5


def assigned(key, lr):
    opt = optim.SGD([nn.Linear(3, 2, key=key)], momentum=0.9)
    opt.lr = lr
    return opt


def constructed(key, lr):
    return optim.SGD([nn.Linear(3, 2, key=key)], lr=lr, momentum=0.9)


@pytest.mark.slow
@pytest.mark.parametrize("make", [assigned, constructed])
def test_an_ensemble_of_optimizers_each_with_its_lr(make, batch):
    keys, lrs = jax.random.split(jax.random.key(0), 3), jnp.array([0.1, 0.2, 0.4])
    ensemble = jax.vmap(make)(keys, lrs)
    np.testing.assert_allclose(ensemble.lr, lrs)
    assert ensemble.modules[0].weight.shape == (3, 2, 3)
    step = jax.jit(jax.vmap(train_step, in_axes=(0, None, None)))
    for _ in range(3):
        ensemble, losses = step(ensemble, *batch)
    for i in range(3):
        alone = constructed(keys[i], float(lrs[i]))
        for _ in range(3):
            _, loss = train_step(alone, *batch)
        member = jax.tree.map(lambda leaf, i=i: leaf[i], ensemble)
        assert_close(member.modules[0], alone.modules[0])
        assert member.num_steps == 3
        np.testing.assert_allclose(losses[i], loss, rtol=1e-5)


@pytest.mark.slow
def test_optimizers_can_be_stacked(batch):
    opts = [constructed(jax.random.key(i), lr) for i, lr in enumerate((0.1, 0.3))]
    ensemble = jax.tree.map(lambda *leaves: jnp.stack(leaves), *opts)
    ensemble, _ = jax.vmap(train_step, in_axes=(0, None, None))(ensemble, *batch)
    for i, opt in enumerate(opts):
        train_step(opt, *batch)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], ensemble).modules[0], opt.modules[0])


@pytest.mark.slow
def test_the_gradient_of_a_loss_after_a_step_with_respect_to_lr(batch):
    def after(opt, lr, x, y):
        opt.lr = lr
        opt, _ = train_step(opt, x, y)
        return mean_error(opt.modules[0], x, y), opt

    opt = mt.Optimizer([nn.Linear(3, 2, key=jax.random.key(0))])
    gradient, new = jax.grad(jax.jit(after), argnums=1, has_aux=True)(opt, 0.1, *batch)
    first = jax.grad(mean_error)(opt.modules[0], *batch)
    second = jax.grad(mean_error)(new.modules[0], *batch)
    expected = -sum(float((a * b).sum()) for a, b in zip(values(first), values(second), strict=True))
    np.testing.assert_allclose(gradient, expected, rtol=1e-4)


@pytest.mark.slow
def test_optimizers_under_the_other_transforms(batch):
    opt = make_optimizer()
    shapes, loss = jax.eval_shape(train_step, opt, *batch)
    assert shapes.modules[0][0].weight.shape == (4, 3) and loss.shape == ()
    made = jax.eval_shape(lambda key: optim.SGD([nn.Linear(3, 2, key=key)], momentum=0.9), jax.random.key(0))
    assert made.modules[0].weight == jax.ShapeDtypeStruct((2, 3), jnp.float32)
    jaxpr = jax.make_jaxpr(train_step)(opt, *batch)
    assert len(jaxpr.jaxpr.invars) == len(jax.tree.leaves(opt)) + 2
    second = jax.devices("cpu")[1]
    moved = jax.device_put(opt, second)
    train_step(moved, *jax.device_put(batch, second))
    train_step(opt, *batch)
    assert moved.modules[0][0].weight.devices() == {second}
    assert_close(jax.device_put(moved.modules[0], jax.devices("cpu")[0]), opt.modules[0])
    checkpointed, _ = jax.jit(jax.checkpoint(train_step))(opt, *batch)
    train_step(opt, *batch)
    assert_close(checkpointed.modules[0], opt.modules[0])


@pytest.mark.slow
@copies
def test_copies_of_optimizers_are_whole_and_independent(copied, batch):
    opt = make_optimizer(nesterov=True)
    for _ in range(2):
        train_step(opt, *batch)
    new = copied(opt)
    assert (new.lr, new.momentum, new.nesterov, new.num_steps) == (0.1, 0.9, True, 2)
    assert new.modules[0] is not opt.modules[0] and repr(new) == repr(opt)
    assert_close(new, opt, 0)
    before = values(opt)
    train_step(new, *batch)
    assert all(np.array_equal(a, b) for a, b in zip(values(opt), before, strict=True))
    train_step(opt, *batch)
    assert_close(new, opt)
    assert not np.array_equal(values(opt)[0], before[0])


@copies
def test_a_model_and_its_optimizer_stay_together_in_a_copy(copied, batch):
    opt = make_optimizer()
    train_step(opt, *batch)
    model, new = copied((opt.modules[0], opt))
    assert new.modules[0] is model
    weight = np.asarray(model[0].weight)
    train_step(new, *batch)
    assert not np.array_equal(model[0].weight, weight)


# -- buffers that are not floating -------------------------------------------------------------------------------------

NOT_FLOATING = {
    "int32": jnp.array([2**31 - 1, -(2**31), -1, 0, 16777217], jnp.int32),
    "int32_scalar": jnp.int32(-(2**31) + 1),
    "uint32": jnp.array([2**32 - 1, 0, 2**24 + 1], jnp.uint32),
    "int16": jnp.array([-(2**15), 2**15 - 1, -1], jnp.int16),
    "uint16": jnp.array([[2**16 - 1, 1]], jnp.uint16),
    "int8": jnp.array([-128, 127, -1, 0], jnp.int8),
    "uint8": jnp.array([255, 0], jnp.uint8),
    "bool": jnp.array([True, False]),
    "bool_scalar": jnp.array(True),
    "empty": jnp.zeros((0, 3), jnp.int32),
    "key": jax.random.key(2**31 - 1),
    "keys": jax.random.split(jax.random.key(5), 3),
    "rbg_key": jax.random.key(7, impl="rbg"),
    "raw_key": jax.random.PRNGKey(2**31 - 1),
}


class Odd(Module):
    """A parameter, and a buffer of each kind that is not floating."""

    def __init__(self, values=NOT_FLOATING):
        self.w = Parameter([2.0])
        for name, value in values.items():
            setattr(self, name, Buffer(value))

    def forward(self, x):
        return (self.w * x).sum()

    def rewrite(self):
        for name in NOT_FLOATING:
            setattr(self, name, getattr(self, name))
        return self


def assert_same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a, b)


ROUND_TRIPS = {
    "nothing": lambda model: model,
    "jit": jax.jit(Odd.rewrite),
    "tree.map": lambda model: jax.tree.map(lambda leaf: leaf * 1.0, model),
    "scan": lambda model: jax.lax.scan(lambda model, _: (model, None), model, None, length=2)[0],
    "stack and vmap": lambda model: jax.tree.map(
        lambda leaf: leaf[1], jax.vmap(Odd.rewrite)(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), model))
    ),
    "a step of jax.grad": lambda model: jax.tree.map(
        lambda p, g: p - 0.1 * g, model, jax.grad(Odd.forward)(model, 1.0)
    ),
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "device_put": jax.device_put,
}


@pytest.mark.slow
@pytest.mark.parametrize("trip", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_buffers_that_are_not_floating_are_kept_exactly(trip):
    model = trip(Odd())
    for name, value in NOT_FLOATING.items():
        assert_same(getattr(model, name), value)
    assert list(model.state_dict()) == ["w", *NOT_FLOATING]
    for array, value in zip(list(model.state_dict().values())[1:], NOT_FLOATING.values(), strict=True):
        assert_same(array, value)
    for array, value in zip(model.buffers(), NOT_FLOATING.values(), strict=True):
        assert_same(array, value)


@pytest.mark.slow
def test_plain_grad_works_beside_buffers_that_are_not_floating():
    model = Odd()
    grads = jax.grad(Odd.forward)(model, 3.0)
    assert grads.w.tolist() == [3.0]
    model.accumulate(grads)
    mt.backward(model, 3.0)
    optim.SGD([model], lr=0.5).step()
    assert model.w.tolist() == [-1.0]
    for name, value in NOT_FLOATING.items():
        assert_same(getattr(model, name), value)


@pytest.mark.slow
def test_buffers_that_are_not_floating_are_assigned_and_loaded():
    other = {name: value[::-1] if value.ndim else value for name, value in NOT_FLOATING.items()}
    other |= {"int32_scalar": jnp.int32(7), "bool_scalar": jnp.array(False), "key": jax.random.key(3)}
    assigned, loaded = Odd(other), Odd(other)
    loaded.load_state_dict(Odd().state_dict())
    for name, value in NOT_FLOATING.items():
        setattr(assigned, name, value)
        assert_same(getattr(assigned, name), value)
        assert_same(getattr(loaded, name), value)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("name", NOT_FLOATING)
def test_buffers_that_are_not_floating_refuse_floats(name):
    model = Odd()
    with pytest.raises(ValueError, match=rf"Odd\.{name} is .* and was given float32"):
        setattr(model, name, jnp.zeros(NOT_FLOATING[name].shape))
    assert_same(getattr(model, name), NOT_FLOATING[name])


@pytest.mark.parametrize("count", [1, 3, 7, 2**31 - 1, -5])
def test_the_average_of_two_equal_models_keeps_integer_buffers(count):
    model = Odd({"state": jnp.int32(count)})
    average = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, model, copy.deepcopy(model))
    assert average.state.dtype == jnp.int32 and int(average.state) == count


@pytest.mark.slow
def test_64_bit_buffers_are_kept_exactly():
    with jax.enable_x64(True):
        value = jnp.array([2**63 - 1, -(2**63), -1, 2**53 + 1])
        model = jax.jit(lambda model: model)(Odd({"state": value}))
        assert value.dtype == jnp.int64
        assert_same(model.state, value)
        assert jax.grad(Odd.forward)(model, jnp.float64(3.0)).w.tolist() == [3.0]


@pytest.mark.slow
def test_a_key_buffer_serves_as_a_key_in_compiled_code():
    class Noise(Module):
        def __init__(self):
            self.key = Buffer(jax.random.key(1))
            self.w = Parameter(1.0)

        def forward(self):
            self.key, key = jax.random.split(self.key)
            return self.w * jax.random.normal(key)

    eager, traced = Noise(), Noise()
    expected = [float(eager()), float(eager())]
    call = jax.jit(lambda model: (model, model()))
    first, out = call(traced)
    second, again = call(first)
    np.testing.assert_allclose([out, again], expected, rtol=1e-6)
    np.testing.assert_allclose(mt.backward(traced), expected[0], rtol=1e-6)
    np.testing.assert_allclose(mt.backward(traced), expected[1], rtol=1e-6)
    assert_same(second.key, eager.key)
    assert_same(traced.key, eager.key)


# -- leaves that are not arrays ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda _: object(),
        lambda leaf: "text",
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        lambda leaf: True,
    ],
    ids=["object", "text", "ShapeDtypeStruct", "bool"],
)
@pytest.mark.parametrize("tree", [lambda: Norm(), lambda: make_optimizer()], ids=["module", "optimizer"])
def test_any_leaves_may_be_put_in_and_come_out_again(make, tree):
    tree = tree()
    leaves, structure = jax.tree.flatten(tree)
    put = [make(leaf) for leaf in leaves]
    new = jax.tree.unflatten(structure, put)
    assert type(new) is type(tree)
    again, same = jax.tree.flatten(new)
    assert same == structure
    assert all(a is b for a, b in zip(again, put, strict=True))
    assert len(jax.tree.leaves(jax.tree.map(lambda _: None, tree))) == 0


def test_reading_what_was_put_in_gives_it_back():
    marker = object()
    new = jax.tree.map(lambda _: marker, Norm())
    assert new.weight is marker and new.count is marker
    none = jax.tree.map(lambda _: None, nn.Linear(3, 2))
    assert none.weight is None and none.bias is None and none.in_features == 3


def test_modules_of_flags_choose_leaves(mlp):
    flags = jax.tree.map(lambda leaf: leaf.ndim > 1, mlp)
    chosen = jax.tree.map(lambda leaf, flag: leaf if flag else jnp.zeros_like(leaf), mlp, flags)
    assert not np.asarray(chosen[0].bias).any() and np.array_equal(chosen[0].weight, mlp[0].weight)


def test_modules_inside_other_pytrees(mlp):
    tree = {"a": [mlp, 1.0], "b": (Norm(), None)}
    leaves, structure = jax.tree.flatten(tree)
    assert len(leaves) == 4 + 1 + 3
    new = jax.tree.unflatten(structure, leaves)
    assert type(new["a"][0]) is nn.Sequential and type(new["b"][0]) is Norm


# -- updates that would be lost ----------------------------------------------------------------------------------------


def dropped(call):
    """The texts of the DroppedUpdateWarnings during a call and the death of what it gave."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()  # what earlier tests have left
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
        gc.collect()
    assert all(issubclass(warning.category, mt.DroppedUpdateWarning) for warning in caught)
    return [str(warning.message) for warning in caught]


NORM_DROPPED = {
    "jit": lambda norm, x: jax.jit(lambda model, x: model(x))(norm, x),
    "grad": lambda norm, x: jax.grad(lambda model, x: mean_square(model, x))(norm, x),
    "value_and_grad": lambda norm, x: jax.value_and_grad(lambda model, x: mean_square(model, x))(norm, x),
    "vmap": lambda norm, x: jax.vmap(lambda model, x: model(x), in_axes=(None, 0))(norm, x[None]),
    "scan": lambda norm, x: jax.lax.scan(
        lambda total, model: (total + model(x).sum(), None), 0.0, jax.tree.map(lambda leaf: leaf[None], norm)
    ),
    "checkpoint": lambda norm, x: jax.checkpoint(lambda model, x: mean_square(model, x))(norm, x),
    "jit of grad": lambda norm, x: jax.jit(lambda model, x: jax.grad(mean_square)(model, x))(norm, x),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("call", NORM_DROPPED.values(), ids=NORM_DROPPED)
def test_running_statistics_that_are_dropped_are_told(call, batch):
    norm = Norm()
    (text,) = dropped(lambda: call(norm, batch[0]))
    assert re.search(r"copy of Norm was changed .*Norm\.mean, Norm\.count.* temporary copy", text)
    assert re.search(BOTH_SPELLINGS, text)
    assert int(norm.count) == 0 and not np.asarray(norm.mean).any()


def test_the_warning_is_a_warning(batch):
    with pytest.warns(mt.DroppedUpdateWarning, match=BOTH_SPELLINGS):
        jax.jit(lambda model, x: model(x))(Norm(), batch[0])
        gc.collect()
    assert issubclass(mt.DroppedUpdateWarning, UserWarning)


def test_running_statistics_that_do_not_change_are_not_told(batch):
    assert dropped(lambda: jax.jit(lambda model, x: model(x))(Norm().eval(), batch[0])) == []


OPTIMIZER_DROPPED = {
    "only the loss": lambda opt, x, y: train_step(opt, x, y)[1],
    "only step": lambda opt, x, y: (
        opt.modules[0].accumulate([2 * p for p in opt.modules[0].parameters()]) or opt.step()
    ),
    "zero_grad": lambda opt, x, y: opt.zero_grad(),
    "lr": lambda opt, x, y: setattr(opt, "lr", 0.5),
    "parameter": lambda opt, x, y: setattr(opt.modules[0][0], "bias", jnp.ones(4)),
    "backward": lambda opt, x, y: mt.backward(mean_error, opt.modules[0], x, y),
    "load_state_dict": lambda opt, x, y: opt.modules[0].load_state_dict(opt.modules[0].state_dict()) and None,
}


@pytest.mark.parametrize("change", OPTIMIZER_DROPPED.values(), ids=OPTIMIZER_DROPPED)
def test_an_optimizer_that_is_changed_and_dropped_is_told(change, batch):
    opt = make_optimizer()
    before = values(opt)
    (text,) = dropped(lambda: jax.eval_shape(lambda opt, x, y: change(opt, x, y), opt, *batch))
    assert re.search(rf"copy of SGD was changed inside a JAX transform(.|\n)*{BOTH_SPELLINGS}", text)
    assert all(np.array_equal(a, b) for a, b in zip(values(opt), before, strict=True))
    assert dropped(lambda: jax.eval_shape(lambda opt, x, y: (change(opt, x, y), opt), opt, *batch)) == []


def test_a_jitted_step_that_returns_only_the_loss_is_told(batch):
    opt = make_optimizer()
    before = values(opt)
    with pytest.warns(mt.DroppedUpdateWarning, match=rf"SGD was changed(.|\n)*{BOTH_SPELLINGS}"):
        jax.jit(lambda opt, x, y: train_step(opt, x, y)[1])(opt, *batch)
        gc.collect()
    assert all(np.array_equal(a, b) for a, b in zip(values(opt), before, strict=True))


def test_an_update_dropped_inside_scan_is_told(batch):
    def body(opt, xy):
        used = jax.tree.map(lambda leaf: leaf, opt)
        return opt, train_step(used, *xy)[1]

    (text,) = dropped(lambda: jax.lax.scan(body, make_optimizer(), stacked_batches(batch)))
    assert "SGD" in text


def test_a_model_returned_without_its_gradients_is_told(mlp, batch):
    def step(model, x, y):
        return mt.backward(mean_error, model, x, y), model

    (text,) = dropped(lambda: jax.jit(step)(mlp, *batch))
    assert "Sequential" in text and "gradient" in text


RETURNED = {
    "jit": lambda norm, x: jax.jit(lambda model, x: (model(x), model))(norm, x),
    "has_aux": lambda norm, x: jax.grad(lambda model, x: (mean_square(model, x), model), has_aux=True)(norm, x),
    "scan": lambda norm, x: jax.lax.scan(lambda model, x: (model(x), model)[::-1], norm, x[None]),
    "used again": lambda norm, x: jax.jit(lambda model, x: (model(x), jax.tree.map(lambda leaf: leaf, model)))(norm, x),
    "inner jit": lambda norm, x: jax.jit(lambda model, x: jax.jit(lambda m, x: (m(x), m))(model, x))(norm, x),
    "mt.grad": lambda norm, x: jax.jit(lambda model, x: (mt.grad(mean_square)(model, x), model))(norm, x),
    "leaves": lambda norm, x: jax.jit(lambda model, x: (model(x), jax.tree.leaves(model)))(norm, x),
}


@pytest.mark.parametrize("call", RETURNED.values(), ids=RETURNED)
def test_running_statistics_that_are_returned_are_not_told(call, batch):
    assert dropped(lambda: call(Norm(), batch[0])) == []


def test_loops_that_return_the_optimizer_are_not_told(batch):
    opt = make_optimizer()
    assert dropped(lambda: jax.jit(train_step)(opt, *batch)) == []
    scanned = lambda: jax.lax.scan(lambda opt, xy: train_step(opt, *xy), opt, stacked_batches(batch))
    assert dropped(scanned) == []
    assert dropped(lambda: jax.eval_shape(train_step, opt, *batch)) == []
    assert dropped(lambda: jax.make_jaxpr(train_step)(opt, *batch)) == []


def test_what_only_lives_inside_is_not_told(mlp, batch):
    def inside(x, key):
        norm = Norm()
        norm.weight = 2 * norm.weight
        layer = nn.Linear(3, 2, key=key)
        mt.backward(mean_square, layer, norm(x))
        opt = mt.Optimizer([layer], lr=0.1)
        opt.step()
        return layer(x)

    def gradients(model, x):
        mt.backward(mean_square, model, x)
        return list(model.grads())

    assert dropped(lambda: jax.jit(inside)(batch[0], jax.random.key(0))) == []
    assert dropped(lambda: jax.jit(gradients)(mlp, batch[0])) == []
    assert dropped(lambda: jax.jit(lambda model, x: model(x))(mlp, batch[0])) == []


def test_copies_made_outside_of_transforms_are_never_told(batch):
    def outside():
        norm = jax.tree.map(lambda leaf: leaf, Norm())
        norm(batch[0])
        train_step(jax.tree.map(lambda leaf: leaf, make_optimizer()), *batch)

    assert dropped(outside) == []


# -- changes by closure ------------------------------------------------------------------------------------------------

TRANSFORMS = {
    "jit": lambda f: jax.jit(f)(1.0),
    "grad": lambda f: jax.grad(f)(1.0),
    "vmap": lambda f: jax.vmap(f)(jnp.ones(2)),
    "scan": lambda f: jax.lax.scan(lambda carry, a: (carry, f(a)), 0.0, jnp.ones(2)),
    "checkpoint": lambda f: jax.checkpoint(f)(1.0),
}


class World:
    """A model with statistics and an optimizer that have been trained a little."""

    def __init__(self, batch):
        self.x, self.y = batch
        self.layer, self.norm = nn.Linear(3, 2, key=jax.random.key(0)), Norm()
        self.model = nn.Sequential(self.norm, self.layer)
        self.opt = optim.SGD([self.model], lr=0.1, momentum=0.9)
        self.train()

    def train(self):
        mt.backward(mean_error, self.model, self.x, self.y)
        self.opt.step()

    def facts(self):
        arrays = [*values(self.opt), *(np.asarray(g) for g in self.model.grads())]
        return (
            repr(self.model),
            repr(self.opt),
            [m.training for m in self.model.modules()],
            [a.tobytes() for a in arrays],
        )


VALUES = {
    "weight": (r"Linear\.weight", lambda w, a: setattr(w.layer, "weight", w.layer.weight * a)),
    "weight, constant": (r"Linear\.weight", lambda w, a: setattr(w.layer, "weight", jnp.zeros((2, 3)))),
    "buffer in forward": (r"Norm\.mean", lambda w, a: w.norm(w.x)),
    "integer buffer": (r"Norm\.count", lambda w, a: setattr(w.norm, "count", w.norm.count + 1)),
    "parameters()": (r"weight", lambda w, a: w.layer.parameters().__setitem__(0, jnp.ones((2, 3)) * a)),
    "grads()": (r"gradient of .*weight", lambda w, a: w.layer.grads().__setitem__(0, jnp.ones((2, 3)) * a)),
    "accumulate": (r"gradient of .*weight", lambda w, a: w.layer.accumulate([jnp.ones((2, 3)) * a, jnp.ones(2)])),
    "load_state_dict": (r"weight", lambda w, a: w.layer.load_state_dict(w.layer.state_dict())),
    "module.zero_grad": (r"gradient of a Linear", lambda w, a: w.layer.zero_grad()),
    "to": (r"Linear", lambda w, a: w.layer.to(jax.devices()[0])),
    "astype": (r"Linear", lambda w, a: w.layer.astype(jnp.float16)),
    "opt.step": (r"SGD\.step\(\)", lambda w, a: w.opt.step()),
    "opt.zero_grad": (r"gradient of a Sequential", lambda w, a: w.opt.zero_grad()),
    "opt.lr": (r"SGD\.lr", lambda w, a: setattr(w.opt, "lr", 0.5)),
    "opt.lr, traced": (r"SGD\.lr", lambda w, a: setattr(w.opt, "lr", a)),
    "opt.load_state_dict": (r"SGD", lambda w, a: w.opt.load_state_dict(w.opt.state_dict())),
    "backward": (r"(Linear|Norm|weight|bias|mean)", lambda w, a: mt.backward(mean_error, w.model, w.x, w.y)),
    "backward, gradients": (r"(Linear|weight|bias)", lambda w, a: mt.backward(mean_square, w.layer, w.x)),
}

STRUCTURE = {
    "new parameter": ("Linear", lambda w, a: setattr(w.layer, "extra", Parameter(jnp.ones(2) * a))),
    "parameter replaced": ("Linear", lambda w, a: setattr(w.layer, "bias", Parameter(jnp.ones(2) * a))),
    "parameter removed": ("Linear", lambda w, a: setattr(w.layer, "bias", None)),
    "parameter deleted": ("Linear", lambda w, a: delattr(w.layer, "bias")),
    "new module": ("Sequential", lambda w, a: setattr(w.model, "extra", Norm())),
    "append": ("Sequential", lambda w, a: w.model.append(Norm())),
    "freeze": ("Linear", lambda w, a: w.layer.freeze()),
    "eval": ("Sequential", lambda w, a: w.model.eval()),
    "static attribute": ("Linear", lambda w, a: setattr(w.layer, "note", "text")),
    "tie": ("Linear", lambda w, a: w.layer.tie("bias", nn.Linear(1, 2, key=jax.random.key(1)), "bias")),
    "opt.modules": ("SGD", lambda w, a: setattr(w.opt, "modules", [w.layer])),
    "opt.skip_nonfinite": ("SGD", lambda w, a: setattr(w.opt, "skip_nonfinite", True)),
}


def check_closure(world, transform, name, change):
    before = world.facts()

    def f(a):
        change(world, a)
        return a * 2.0

    with pytest.raises(mt.TraceError, match=rf"{name}(.|\n)*{BOTH_SPELLINGS}"):
        transform(f)
    assert not has_tracers(world.opt, list(world.model.grads()))
    assert world.facts() == before
    world.train()
    assert not has_tracers(world.opt, list(world.model.grads()))


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("name, change", VALUES.values(), ids=VALUES)
def test_a_value_changed_by_closure_is_an_error(transform, name, change, batch):
    check_closure(World(batch), transform, name, change)


@pytest.mark.parametrize("transform", [TRANSFORMS["jit"], TRANSFORMS["vmap"]], ids=["jit", "vmap"])
@pytest.mark.parametrize("name, change", STRUCTURE.values(), ids=STRUCTURE)
def test_a_structure_changed_by_closure_is_an_error(transform, name, change, batch):
    check_closure(World(batch), transform, name, change)


def test_a_step_by_closure_without_gradients_is_that_error_too():
    opt = make_optimizer()
    with pytest.raises(mt.TraceError, match=r"SGD\.step\(\)"):
        jax.jit(lambda a: (opt.step(), a))(1.0)
    with pytest.warns(UserWarning, match="no gradient accumulated since zero_grad"):
        opt.step()
    assert opt.num_steps == 1


def test_a_copy_of_an_outer_transform_is_a_closure_to_the_inner_one(mlp, batch):
    def outer(model, x):
        def inner(a):
            model[0].bias = model[0].bias * a
            return a

        return jax.grad(inner)(1.0), model

    before = values(mlp)
    with pytest.raises(mt.TraceError, match=r"Linear\.bias.*outer transform"):
        jax.jit(outer)(mlp, batch[0])
    assert all(np.array_equal(a, b) for a, b in zip(values(mlp), before, strict=True))


def test_reading_by_closure_is_no_change(mlp, batch):
    x, _ = batch
    np.testing.assert_allclose(jax.jit(lambda x: mlp(x))(x), mlp(x), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(lambda x: mlp(x))(x), mlp(x), rtol=1e-5, atol=1e-6)
    norm = Norm().eval()
    np.testing.assert_allclose(jax.jit(lambda x: norm(x))(x), x, rtol=1e-6)


def test_a_tracer_that_got_out_cannot_be_assigned():
    leaked = []
    jax.jit(lambda a: leaked.append(a) or a)(jnp.ones(2))
    layer = nn.Linear(3, 2, key=jax.random.key(0))
    with pytest.raises(mt.TraceError, match=r"Linear\.bias was given a tracer of a JAX transform that has ended"):
        layer.bias = leaked[0]
    with pytest.raises(mt.TraceError, match="gradient of bias was given a tracer"):
        layer.grads()[1] = leaked[0]
    assert not has_tracers(layer, list(layer.grads()))


# -- any module tree ---------------------------------------------------------------------------------------------------

SHAPES = [(), (2,), (1, 3)]
NAMES = st.sampled_from(["a", "b", "layers", "x1", "weight"])

leaf_specs = st.fixed_dictionaries(
    {
        "kind": st.just("leaf"),
        "params": st.lists(st.sampled_from(SHAPES), min_size=1, max_size=2),
        "count": st.booleans(),
        "trainable": st.booleans(),
        "borrow": st.none() | st.integers(0, 5),
    }
)
shared_specs = st.fixed_dictionaries({"kind": st.just("shared"), "number": st.integers(0, 9)})


def container_specs(children):
    several = st.lists(children, max_size=3)
    named = st.dictionaries(NAMES, children, max_size=3)
    return st.one_of(
        st.fixed_dictionaries({"kind": st.sampled_from(["list", "tuple", "ModuleList"]), "items": several}),
        st.fixed_dictionaries({"kind": st.sampled_from(["dict", "module"]), "items": named}),
    )


specs = st.recursive(leaf_specs | shared_specs, container_specs, max_leaves=8)
roots = st.dictionaries(NAMES, specs, min_size=1, max_size=4)


class Tree(Module):
    pass


class Growing:
    """Builds a module from a specification, and keeps its own account of which paths are one parameter."""

    def __init__(self, offset):
        self.offset = offset
        self.modules = []  # (module, its entries), to be shared
        self.declared = []  # (number, Parameter), to be borrowed
        self.count = 0

    def fresh(self, shape):
        self.count += 1
        return self.count, np.full(shape, self.count + self.offset, np.float32)

    def module(self, items):
        tree, entries = Tree(), {}
        for name, spec in items.items():
            value, inner = self.value(spec)
            setattr(tree, name, value)
            entries |= {f"{name}.{path}": number for path, number in inner.items()}
        self.modules.append((tree, entries))
        return tree, entries

    def value(self, spec):
        kind = spec["kind"]
        if kind == "shared" and self.modules:
            return self.modules[spec["number"] % len(self.modules)]
        if kind in ("leaf", "shared"):
            return self.leaf(spec)
        if kind in ("dict", "module"):
            if kind == "module":
                return self.module(spec["items"])
            made = {name: self.value(item) for name, item in spec["items"].items()}
            value = {name: value for name, (value, _) in made.items()}
        else:
            items = [self.value(item) for item in spec["items"]]
            if kind == "ModuleList":
                items = [(value, entries) for value, entries in items if isinstance(value, Module)]
            made = {str(i): pair for i, pair in enumerate(items)}
            value = {"list": list, "tuple": tuple, "ModuleList": nn.ModuleList}[kind](value for value, _ in items)
        return value, {f"{name}.{path}": n for name, (_, entries) in made.items() for path, n in entries.items()}

    def leaf(self, spec):
        tree, entries = Tree(), {}
        for i, shape in enumerate(spec.get("params", [()])):
            number, array = self.fresh(shape)
            parameter = Parameter(array, trainable=spec.get("trainable", True))
            self.declared.append((number, parameter))
            setattr(tree, f"p{i}", parameter)
            entries[f"p{i}"] = number
        if spec.get("borrow") is not None and self.declared:
            number, parameter = self.declared[spec["borrow"] % len(self.declared)]
            tree.borrowed, entries["borrowed"] = parameter, number
        if spec.get("count"):
            number, _ = self.fresh(())
            tree.count, entries["count"] = Buffer(-number - self.offset), number
        self.modules.append((tree, entries))
        return tree, entries


def grow(items, offset=0):
    return Growing(offset).module(items)


def groups(by_path):
    """Sets of paths that lead to the same thing."""
    found = {}
    for path, thing in by_path.items():
        found.setdefault(thing, set()).add(path)
    return sorted(map(sorted, found.values()))


def one_number_per_leaf(module):
    """What each path of the state dict reads when every leaf of the tree holds its own number."""
    leaves, structure = jax.tree.flatten(module)
    numbered = jax.tree.unflatten(structure, [np.full(leaf.shape, i, np.float32) for i, leaf in enumerate(leaves)])
    return {path: np.asarray(array).ravel()[0].item() for path, array in numbered.state_dict().items()}


property_test = settings(max_examples=60, deadline=None, derandomize=True)


@property_test
@given(roots)
def test_any_tree_flattens_and_unflattens_to_itself(items):
    module, entries = grow(items)
    leaves, structure = jax.tree.flatten(module)
    assert len(leaves) == len(set(entries.values()))
    new = jax.tree.unflatten(structure, leaves)
    again, same = jax.tree.flatten(new)
    assert same == structure and all(a is b for a, b in zip(again, leaves, strict=True))
    assert repr(new) == repr(module)
    assert [name for name, _ in new.named_modules()] == [name for name, _ in module.named_modules()]
    assert [name for name, _ in new.named_parameters()] == [name for name, _ in module.named_parameters()]
    assert list(new.state_dict()) == list(module.state_dict())


@property_test
@given(roots)
def test_paths_in_any_tree_are_unique_and_complete(items):
    module, entries = grow(items)
    state = module.state_dict()
    assert set(state) == set(entries)
    for path, array in state.items():
        expected = entries[path] if array.dtype == jnp.float32 else -entries[path]
        assert np.asarray(array).ravel()[0] == expected
    paths = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree_util.tree_flatten_with_path(module)[0]
    ]
    assert len(set(paths)) == len(paths) and set(paths) <= set(state)
    assert groups(entries) == groups(one_number_per_leaf(module))
    names = [name for name, _ in module.named_parameters()]
    assert len(names) == len(module.parameters()) == len({entries[name] for name in names})
    sizes = [leaf.size for path, leaf in zip(paths, jax.tree.leaves(module), strict=True) if not path.endswith("count")]
    assert module.num_parameters() == sum(sizes)


@property_test
@given(roots)
def test_the_state_of_any_tree_is_saved_and_loaded(items):
    module, entries = grow(items)
    other, _ = grow(items, offset=1000)
    saved = {path: np.asarray(array) for path, array in module.state_dict().items()}
    assert other.load_state_dict(saved) == ([], [])
    for path, array in other.state_dict().items():
        assert array.dtype == saved[path].dtype
        np.testing.assert_array_equal(array, saved[path])
    assert groups(one_number_per_leaf(other)) == groups(entries)


@property_test
@given(roots)
def test_copies_of_any_tree_are_tied_alike(items):
    module, entries = grow(items)
    expected = {path: np.asarray(array) for path, array in module.state_dict().items()}
    for copied in (*COPIES.values(), lambda tree: jax.tree.map(lambda leaf: leaf + 0, tree), jax.device_put):
        new = copied(module)
        assert jax.tree.structure(new) == jax.tree.structure(module)
        assert groups(one_number_per_leaf(new)) == groups(entries)
        assert len(list(new.modules())) == len(list(module.modules()))
        for path, array in new.state_dict().items():
            np.testing.assert_array_equal(array, expected[path])
        for i in range(len(new.parameters())):
            new.parameters()[i] = new.parameters()[i] + 1
    for path, array in module.state_dict().items():
        np.testing.assert_array_equal(array, expected[path])
