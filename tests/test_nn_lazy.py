"""Lazy layers: against torch's, and against plain layers that were made with known sizes, through every first call."""

import copy
import gc
import pickle
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_contract import compare_arguments, numbers
from oracle import torch

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.state.uninitialized import is_unsized

X = jnp.asarray(numbers(6, 5))

# A lazy layer, its arguments, and the shapes of inputs that it takes.
KINDS = [
    ("LazyLinear", (4,), {}, [(5, 3), (3,)]),
    ("LazyLinear", (4, False), {}, [(2, 5, 3)]),
    ("LazyConv1d", (4, 3), {"padding": 1}, [(2, 3, 8), (3, 8)]),
    ("LazyConv2d", (4, 3), {"padding": "same", "bias": False}, [(2, 3, 5, 6), (3, 5, 6)]),
    ("LazyConv2d", (4, (3, 1)), {"groups": 2, "dilation": 2, "padding_mode": "circular", "padding": 1}, [(2, 6, 5, 6)]),
    ("LazyConv3d", (2, 2), {"stride": 2}, [(1, 3, 4, 4, 4)]),
    ("LazyConvTranspose1d", (4, 3), {"stride": 2, "output_padding": 1}, [(2, 3, 8)]),
    ("LazyConvTranspose2d", (4, 3), {"groups": 2}, [(2, 6, 5, 5), (6, 5, 5)]),
    ("LazyConvTranspose3d", (2, 2), {"bias": False}, [(1, 3, 3, 3, 3)]),
    ("LazyBatchNorm1d", (), {}, [(4, 3), (4, 3, 5)]),
    ("LazyBatchNorm1d", (1e-3, None), {"bias": False}, [(4, 3)]),
    ("LazyBatchNorm2d", (), {"affine": False}, [(2, 3, 4, 4)]),
    ("LazyBatchNorm3d", (), {"track_running_stats": False}, [(2, 3, 2, 2, 2)]),
    ("LazyInstanceNorm1d", (), {}, [(2, 3, 5)]),
    ("LazyInstanceNorm2d", (), {"affine": False}, [(2, 3, 4, 4)]),
    ("LazyInstanceNorm3d", (), {"track_running_stats": False}, [(2, 3, 2, 2, 2)]),
]
CALLS = [(name, args, kwargs, shape) for name, args, kwargs, shapes in KINDS for shape in shapes]
NAMES = list(dict.fromkeys(name for name, *_ in KINDS))


def test_all_of_torchs_lazy_layers_are_here():
    assert sorted(NAMES) == [name for name in dir(nn) if name.startswith("Lazy")]


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_torchs(name):
    compare_arguments(getattr(nn, name), getattr(torch.nn, name))


@pytest.mark.one_in(9)
@pytest.mark.parametrize(("name", "args", "kwargs", "shape"), CALLS)
def test_text_sizes_and_outputs_are_torchs(name, args, kwargs, shape):
    ours, theirs = getattr(nn, name)(*args, **kwargs), getattr(torch.nn, name)(*args, **kwargs)
    plain = getattr(nn, name.removeprefix("Lazy"))
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, plain) and type(ours) is getattr(nn, name) and ours.has_uninitialized_params()
    x = numbers(*shape)
    theirs(torch.from_numpy(x.copy()))
    ours(jnp.asarray(x))
    assert type(ours) is plain and repr(ours) == repr(theirs)
    state = theirs.state_dict()
    assert [(n, a.shape) for n, a in ours.state_dict().items()] == [(n, tuple(t.shape)) for n, t in state.items()]
    ours.load_state_dict(state)
    expected = theirs(torch.from_numpy(x.copy())).detach().numpy()
    np.testing.assert_allclose(ours(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)
    for (path, mine), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        np.testing.assert_allclose(mine, other.numpy(), rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(("name", "args", "kwargs", "shape"), CALLS)
def test_it_becomes_the_layer_that_its_sizes_would_have_made(name, args, kwargs, shape):
    """The same values, the same structure (so it shares compiled programs), the same place of the random stream."""
    x = jnp.asarray(numbers(*shape))
    mt.seed(4)
    lazy = getattr(nn, name)(*args, **kwargs)
    lazy.initialize_parameters(jax.ShapeDtypeStruct(x.shape, x.dtype))
    after = mt.next_key()
    kind = type(lazy)
    size = next(vars(lazy)[name] for name in ("in_features", "in_channels", "num_features") if name in vars(lazy))
    if name.startswith("LazyInstanceNorm"):  # whose defaults are others
        kwargs = {"affine": True, "track_running_stats": True} | kwargs
    mt.seed(4)
    same(lazy, kind(size, *args, **kwargs))
    assert (after == mt.next_key()).all() and repr(lazy) == repr(kind(size, *args, **kwargs))


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, mine), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        np.testing.assert_array_equal(mine, theirs, err_msg=path)


# -- the first call ----------------------------------------------------------------------------------------------------


class Net(mt.Module):
    """Lazy layers in lists and in a module of the user's, one of them called twice, with dropout between them."""

    def __init__(self, lazy):
        self.shared = nn.LazyLinear(5) if lazy else nn.Linear(5, 5)
        norm = nn.LazyBatchNorm1d() if lazy else nn.BatchNorm1d(5)
        self.blocks = nn.ModuleList([nn.Sequential(self.shared, norm, nn.Dropout(0.5)), self.shared])
        self.out = [nn.LazyLinear(2) if lazy else nn.Linear(5, 2)]

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.out[0](x)


def loss_fn(model, x):
    return (model(x) ** 2).mean()


def with_gradients(model, loss):
    return loss, list(model.grads())


def compiled(model):
    model.compile()
    return model(X), model(X)


FIRST = {
    "backward": lambda m: with_gradients(m, mt.backward(loss_fn, m, X)),
    "backward by closure": lambda m: with_gradients(m, mt.backward(lambda x: loss_fn(m, x), X)),
    "grad": lambda m: mt.grad(loss_fn)(m, X).parameters()[:],
    "grad by the input": lambda m: mt.grad(lambda x: loss_fn(m, x), argnums=0)(X),
    "value_and_grad": lambda m: mt.value_and_grad(loss_fn)(m, X)[0],
    "jit": lambda m: mt.jit(loss_fn)(m, X),
    "jit of the module": lambda m: mt.jit(m)(X),
    "jit of backward": lambda m: with_gradients(m, mt.jit(lambda x: mt.backward(loss_fn, m, x))(X)),
    "jit of grad": lambda m: mt.jit(lambda x: mt.grad(loss_fn)(m, x).parameters()[:])(X),
    "jit of jax.vmap": lambda m: mt.jit(lambda x: jax.vmap(m.out[0])(jnp.tile(m(x)[:, :1], 5)))(X),
    "scan": lambda m: with_gradients(m, mt.scan(lambda x: mt.backward(loss_fn, m, x), jnp.stack([X, 2 * X]))),
    "jit of scan": lambda m: mt.jit(lambda x: mt.scan(lambda x: mt.backward(loss_fn, m, x), x))(jnp.stack([X, X])),
    "compile": compiled,
    "summary": lambda m: (str(mt.summary(m, jax.ShapeDtypeStruct(X.shape, X.dtype))), mt.backward(loss_fn, m, X)),
    "lower": lambda m: mt.jit(loss_fn).lower(m, jax.ShapeDtypeStruct(X.shape, X.dtype)).as_text(),
    "backward of a NumPy array": lambda m: mt.backward(loss_fn, m, numbers(6, 5)),
    "backward under autocast": lambda m: mt.autocast(jnp.bfloat16)(lambda: mt.backward(loss_fn, m, X))(),
    "backward under rng": lambda m: mt.backward(drawing_elsewhere, m, X),
}


def drawing_elsewhere(model, x):
    with mt.rng(7):
        return loss_fn(model, x)


@pytest.mark.one_in(9)
@pytest.mark.parametrize("call", FIRST)
def test_a_first_call_is_that_of_layers_of_known_sizes(call):
    """Results, parameters, gradients, batch counts and the random stream: the abstract run has moved none of them."""
    found = []
    for lazy in (True, False):
        mt.seed(1)
        net = Net(lazy)
        found.append((FIRST[call](net), net, jax.random.key_data(mt.next_key())))
    (one, mine, after), (other, theirs, expected) = found
    same(mine, theirs)
    np.testing.assert_array_equal(after, expected)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if isinstance(a, str):
            assert a == b
        else:
            np.testing.assert_array_equal(a, b)
    assert type(mine.out[0]) is nn.Linear and mine.blocks[1] is mine.shared


def test_a_first_eager_call_makes_each_layer_in_its_turn():
    mt.seed(2)
    net = nn.Sequential(nn.LazyLinear(4), nn.Dropout(0.5), nn.LazyLinear(3))
    net(X)
    mt.seed(2)
    first = nn.Linear(5, 4)
    mt.next_key()  # the dropout's
    same(net, nn.Sequential(first, nn.Dropout(0.5), nn.Linear(4, 3)))


def test_a_gradient_by_a_copy_of_the_model_within_a_compiled_function_finds_the_sizes():
    """The first abstract run fails, as the copies of lazy layers have no gradients; the next begins with what it found."""
    net = nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(1))
    grads = mt.jit(lambda net, x: list(jax.grad(loss_fn)(net, x).parameters()))(net, X)
    assert [g.shape for g in grads] == [(4, 5), (4,), (1, 4), (1,)] and type(net[1]) is nn.Linear


def test_a_second_lazy_model_compiles_nothing():
    step = mt.jit(loss_fn)
    for _ in range(3):
        step(nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(1)), X)
    assert step.num_compiles == 1


def test_a_step_runs_as_soon_as_there_are_parameters():
    net = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.LazyLinear(1))
    mt.summary(net, X)
    opt = optim.SGD([net], lr=0.1)

    @mt.jit
    def step(x):
        opt.zero_grad()
        loss = mt.backward(loss_fn, net, x)
        opt.step()
        return loss

    losses = [float(step(X)) for _ in range(5)]
    assert losses[-1] < losses[0] and int(net[1].num_batches_tracked) == 5


def test_a_layer_that_an_optimizer_trains_may_be_added_lazily_if_the_step_finds_its_sizes():
    net = nn.Sequential(nn.Linear(5, 5))
    opt = optim.SGD([net], lr=0.1)
    net.append(nn.LazyLinear(2))

    def step(x):
        opt.zero_grad()
        loss = mt.backward(loss_fn, net, x)
        opt.step()
        return loss

    with pytest.raises(mt.UninitializedError, match="`1`, a LazyLinear"):
        opt.step()
    first, compiled_step = None, mt.jit(step)
    for _ in range(3):
        loss = float(compiled_step(X))
        first = loss if first is None else first
    assert loss < first and net[1].weight.shape == (2, 5)


# -- until then --------------------------------------------------------------------------------------------------------

DOORS = {
    "optimizer": lambda net, path: optim.Adam([net]),
    "optimizer of groups": lambda net, path: optim.SGD([{"modules": [net], "lr": 0.1}]),
    "state_dict": lambda net, path: net.state_dict(),
    "parameters": lambda net, path: net.parameters(),
    "grads": lambda net, path: net.grads(),
    "named_parameters": lambda net, path: list(net.named_parameters()),
    "named_parameters, with duplicates": lambda net, path: list(net.named_parameters(remove_duplicate=False)),
    "named_buffers": lambda net, path: list(net.named_buffers()),
    "buffers": lambda net, path: net.buffers(),
    "num_parameters": lambda net, path: net.num_parameters(),
    "zero_grad": lambda net, path: net.zero_grad(),
    "accumulate": lambda net, path: net.accumulate([]),
    "deepcopy": lambda net, path: copy.deepcopy(net),
    "copy": lambda net, path: copy.copy(net),
    "pickle": lambda net, path: pickle.dumps(net),
    "pickle in a dict": lambda net, path: pickle.dumps({"net": net}),
    "save": lambda net, path: mt.save(path, net=net),
    "shard": lambda net, path: mt.shard(net, jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)), {}),
    "pack": lambda net, path: mt.pack(net),
    "average": lambda net, path: optim.AveragedModel(net),
    "clip_grad_norm": lambda net, path: mt.clip_grad_norm(net, 1.0),
    "freeze": lambda net, path: net.freeze(),
    "astype": lambda net, path: net.astype(jnp.bfloat16),
    "to": lambda net, path: net.to(jax.devices()[0]),
    "summary without inputs": lambda net, path: mt.summary(net),
    "flatten": lambda net, path: jax.tree.flatten(net),
    "flatten with paths": lambda net, path: jax.tree_util.tree_flatten_with_path({"net": net}),
    "tree.map": lambda net, path: jax.tree.map(jnp.copy, net),
    "device_put": lambda net, path: jax.device_put(net),
    "jax.jit": lambda net, path: jax.jit(loss_fn)(net, X),
    "jax.grad": lambda net, path: jax.grad(loss_fn)(net, X),
    "jax.eval_shape": lambda net, path: jax.eval_shape(loss_fn, net, X),
    "parameters_to_vector": lambda net, path: nn.utils.parameters_to_vector(net),
    "get_parameter": lambda net, path: net.get_parameter("there.weight"),
    "tie": lambda net, path: net.tie("there.weight", nn.Linear(5, 5), "weight"),
    "nn.init": lambda net, path: nn.init.zeros_(net, "there.weight"),
}


class Holder(mt.Module):
    def __init__(self, layer):
        self.there = layer


HOLDERS = {
    "in Sequential": (lambda layer: nn.Sequential(nn.Linear(5, 5), layer), "1"),
    "in a list of a user's module": (lambda layer: Holder([nn.Linear(5, 5), nn.ModuleList([layer])]), "there.1.0"),
    "shared": (lambda layer: nn.ModuleDict({"a": nn.Sequential(layer, nn.ReLU(), layer)}), "a.0"),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("door", DOORS)
def test_until_then_whatever_needs_the_parameters_raises_one_line_that_names_the_layer(door, holder, tmp_path):
    make, path = HOLDERS[holder]
    layer = nn.LazyLinear(5)
    net = make(layer)
    if door in ("get_parameter", "tie", "nn.init"):
        net, path = Holder(layer), "there"
    wanted = (
        rf"`{path}`, a LazyLinear\(in_features=0, out_features=5, bias=True\), has no parameters yet: .*`model\(x\)`"
    )
    mt.seed(0)
    with pytest.raises(mt.UninitializedError, match=wanted) as error:
        DOORS[door](net, tmp_path / "net")
    assert "\n" not in str(error.value) and "mt.summary(model, x)" in str(error.value)
    assert is_unsized(layer) and not (tmp_path / "net").exists()
    mt.seed(0)
    layer(X)
    again = nn.LazyLinear(5)
    mt.seed(0)
    again(X)
    same(layer, again)


READS = {
    "read": lambda layer: layer.weight,
    "assign": lambda layer: setattr(layer, "weight", jnp.ones((2, 5))),
    "declare": lambda layer: setattr(layer, "bias", mt.Parameter(jnp.ones(2))),
    "own parameters": lambda layer: list(layer.named_parameters(recurse=False)),
    "optimizer": lambda layer: optim.SGD([layer]),
    "pickle": pickle.dumps,
    "its dict of cells": lambda layer: dict(layer._cells),
    "its dict of cells, copied": lambda layer: copy.deepcopy(layer._cells),
}


@pytest.mark.parametrize("read", READS)
def test_so_does_reading_its_own_parameters(read):
    layer = nn.LazyLinear(2)
    with pytest.raises(
        mt.UninitializedError, match=r"this LazyLinear\(in_features=0, out_features=2, bias=True\) has no"
    ):
        READS[read](layer)
    assert is_unsized(layer)


def test_a_plain_transform_that_reaches_it_by_closure_says_where_it_is():
    net = nn.Sequential(nn.ReLU(), nn.LazyLinear(2))
    with pytest.raises(mt.UninitializedError, match="this LazyLinear") as error:
        jax.jit(lambda x: net(x))(X)
    assert any(note.startswith("while calling 1: LazyLinear(2)") for note in error.value.__notes__)
    assert is_unsized(net[1])


def test_a_maker_of_a_sharded_or_abstract_model_is_refused():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    for make in (lambda: jax.eval_shape(lambda: Net(True)), lambda: mt.shard(lambda: Net(True), mesh, {})):
        with pytest.raises(mt.UninitializedError, match="`shared`, a LazyLinear"):
            make()


def test_what_needs_no_parameters_works():
    net = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d(momentum=0.3), nn.Dropout(0.2))
    visited = []
    net.eval().apply(visited.append)
    assert [path for path, _ in net.named_modules()] == ["", "0", "1", "2"] and len(visited) == 4
    assert not any(module.training for module in net.modules())
    assert {"weight", "running_mean"} <= set(dir(net[1])) and not hasattr(net[1], "nothing")
    with pytest.raises(AttributeError, match="did you mean `momentum`"):
        net[1].momentun
    assert "LazyLinear" in net._repr_html_() and "sizes come from the first input" in net._repr_html_()
    net[1].momentum = 0.5  # an attribute that was assigned, and the mode, are kept
    net[0].note = "mine"
    net(X)
    assert net[1].momentum == 0.5 and net[0].note == "mine" and not net[0].training
    assert "2 parameters" not in repr(net) and "LazyLinear" not in repr(net)


def test_a_layer_that_the_call_does_not_reach_is_named_and_nothing_is_made():
    net = nn.ModuleDict({"a": nn.LazyLinear(2), "b": nn.LazyLinear(3)})
    key = jax.random.key_data(after_seed())
    for call in (mt.jit(lambda net, x: net["a"](x)), lambda net, x: mt.backward(lambda n, x: n["a"](x).sum(), net, x)):
        mt.seed(9)
        with pytest.raises(mt.UninitializedError, match="`b`, a LazyLinear"):
            call(net, X)
        assert is_unsized(net["a"]) and (jax.random.key_data(mt.next_key()) == key).all()


def after_seed():
    mt.seed(9)
    return mt.next_key()


# -- all or nothing ----------------------------------------------------------------------------------------------------

WRONG = [
    ("LazyLinear", (2,), (), r"LazyLinear\(.*\) takes inputs of shape \(\.\.\., in_features\); got \(\)"),
    ("LazyConv1d", (2, 3), (4,), r"LazyConv1d\(.*\) takes inputs of shape \(N, in_channels, L\) or .*; got \(4,\)"),
    ("LazyConv2d", (2, 3), (4, 4), r"\(N, in_channels, H, W\) or \(in_channels, H, W\); got \(4, 4\)"),
    ("LazyConv2d", (4, 3, 1, 0, 1, 2), (1, 3, 5, 5), r"both divisible by groups; got in_channels=3"),
    ("LazyConv3d", (2, 3), (4, 4, 4), r"\(N, in_channels, D, H, W\) or"),
    ("LazyConvTranspose2d", (2, 3), (4, 4), r"LazyConvTranspose2d\(.*\) takes inputs of shape"),
    ("LazyBatchNorm1d", (), (3,), r"LazyBatchNorm1d: expected 2D or 3D input \(got 1D"),
    ("LazyBatchNorm2d", (), (2, 3, 4), r"expected 4D input \(got 3D input, of shape \(2, 3, 4\)"),
    ("LazyInstanceNorm2d", (), (3, 4), r"expected 3D or 4D input \(got 2D"),
]


@pytest.mark.parametrize(("name", "args", "shape", "match"), WRONG)
def test_a_first_input_of_a_wrong_rank_leaves_it_lazy(name, args, shape, match):
    layer = getattr(nn, name)(*args)
    before = repr(layer)
    for call in (layer, mt.jit(layer), layer.initialize_parameters, lambda x: mt.summary(layer, x)):
        with pytest.raises(ValueError, match=match):
            call(jnp.ones(shape))
        assert is_unsized(layer) and repr(layer) == before


def test_wrong_arguments_are_refused_when_it_is_made():
    for make, match in (
        (lambda: nn.LazyLinear(-1), "sizes >= 0"),
        (lambda: nn.LazyConv2d(3, 3, groups=2), "both divisible by groups"),
        (lambda: nn.LazyConv2d(4, 3, padding_mode="nothing"), "padding_mode must be"),
        (lambda: nn.LazyConvTranspose1d(4, 3, padding_mode="reflect"), "padding_mode='zeros' only"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


def failing(wrong):
    """A function that fails in eager code, or once its lazy layers have their sizes."""

    def fail(net, x):
        out = net(x).sum()
        if not any(isinstance(layer, nn.LazyLinear) for layer in net):
            raise wrong
        return out

    return fail


@pytest.mark.one_in(9)
@pytest.mark.parametrize("wrong", [ValueError("later"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("call", ["backward", "jit", "scan", "grad"])
def test_a_first_call_that_fails_after_the_sizes_were_found_changes_nothing(call, wrong):
    calls = {
        "backward": lambda f, net: mt.backward(f, net, X),
        "jit": lambda f, net: mt.jit(f)(net, X),
        "scan": lambda f, net: mt.scan(lambda x: f(net, x), X[None]),
        "grad": lambda f, net: mt.grad(f)(net, X),
    }
    net = nn.Sequential(nn.LazyLinear(4), nn.BatchNorm1d(4), nn.LazyLinear(1))
    key = after_seed()
    mt.seed(9)
    with pytest.raises(type(wrong)):
        calls[call](failing(wrong), net)
    assert [is_unsized(net[i]) for i in (0, 2)] == [True, True] and int(net[1].num_batches_tracked) == 0
    assert (jax.random.key_data(mt.next_key()) == jax.random.key_data(key)).all()
    mt.backward(loss_fn, net, X)
    assert int(net[1].num_batches_tracked) == 1


class Interrupting(nn.Linear):
    """A plain layer whose `forward` is interrupted."""

    def forward(self, input):
        raise KeyboardInterrupt


@pytest.mark.parametrize("wrong", [jnp.ones((2, 5), jnp.bfloat16), jnp.ones((2, 5), int), [[1.0, 2.0]], None])
def test_an_eager_call_that_fails_leaves_it_lazy_and_the_stream_where_it_was(wrong, monkeypatch):
    layer = nn.LazyLinear(3)
    if wrong is None:
        monkeypatch.setattr(nn.LazyLinear, "_plain", Interrupting)
    key = after_seed()
    mt.seed(9)
    with pytest.raises(KeyboardInterrupt if wrong is None else TypeError):
        layer(X if wrong is None else wrong)
    assert type(layer) is nn.LazyLinear and is_unsized(layer) and layer.in_features == 0
    assert (jax.random.key_data(mt.next_key()) == jax.random.key_data(key)).all()


def test_an_interrupt_while_parameters_are_made_leaves_all_layers_lazy(monkeypatch):
    net = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.LazyLinear(1))
    count = []

    def interrupted(*args, **kwargs):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return nn.init.zeros((4,), jnp.float32)

    mt.seed(9)
    with monkeypatch.context() as patch:
        patch.setattr(nn.batchnorm.init, "ones", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mt.backward(loss_fn, net, X)
    assert len(count) == 2 and [is_unsized(net[i]) for i in range(3)] == [True] * 3
    assert (jax.random.key_data(mt.next_key()) == jax.random.key_data(after_seed())).all()


def test_other_threads_see_nothing_of_a_search_for_sizes():
    net, seen = nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(1)), []

    def look():
        try:
            net.state_dict()
        except mt.UninitializedError:
            seen.append([is_unsized(layer) for layer in net])

    def loss(net, x):
        out = net(x)
        if isinstance(net[1], nn.LazyLinear):  # in the search, where both have stand-ins by now
            assert net[1].weight.shape == (1, 4) and len(list(net.named_parameters())) == 4
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
        return (out**2).mean()

    mt.backward(loss, net, X)
    assert seen and all(found == [True, True] for found in seen)


# -- states ------------------------------------------------------------------------------------------------------------


@pytest.mark.one_in(6)
@pytest.mark.parametrize(("name", "args", "kwargs", "shape"), CALLS)
def test_a_state_dict_tells_the_sizes_and_no_random_number_is_drawn(name, args, kwargs, shape):
    full, lazy = (nn.Sequential(getattr(nn, name)(*args, **kwargs)) for _ in range(2))
    full(jnp.asarray(numbers(*shape)))
    state = full.state_dict()
    key = after_seed()
    mt.seed(9)
    lazy.load_state_dict(state)
    assert (jax.random.key_data(mt.next_key()) == jax.random.key_data(key)).all()
    if state:
        same(lazy, full)


def test_a_state_dict_of_a_part_leaves_the_other_layers_lazy():
    full, lazy = (nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(2)) for _ in range(2))
    full(X)
    part = {name: array for name, array in full.state_dict().items() if name.startswith("0.")}
    with pytest.raises(ValueError, match=r"missing: 1\.weight\n  missing: 1\.bias"):
        lazy.load_state_dict(part)
    assert is_unsized(lazy[0]) and is_unsized(lazy[1])
    assert lazy.load_state_dict(part, strict=False).missing_keys == ["1.weight", "1.bias"]
    assert type(lazy[0]) is nn.Linear and is_unsized(lazy[1])
    del part["0.bias"]  # a bias that is not loaded has its initial value
    mt.seed(3)
    other = nn.LazyLinear(4)
    other.load_state_dict({"weight": part["0.weight"]}, strict=False)
    mt.seed(3)
    np.testing.assert_array_equal(other.bias, nn.Linear(5, 4).bias)


@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 2, 2)])
def test_a_state_dict_that_does_not_fit_leaves_it_lazy(shape):
    lazy = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ValueError, match="nothing was loaded"):
        lazy.load_state_dict({"0.weight": jnp.ones(shape), "0.bias": jnp.ones(4)})
    assert is_unsized(lazy[0])


def test_a_saved_file_tells_the_sizes(tmp_path):
    full, lazy = (nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d()) for _ in range(2))
    full(X)
    mt.save(tmp_path / "net.npz", net=full)
    mt.load(tmp_path / "net.npz", net=lazy)
    same(lazy, full)
    other = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match="does not fit"):
        mt.load(tmp_path / "net.npz", net=other)
    assert is_unsized(other[0]) and is_unsized(other[1])


def test_a_plain_copy_has_nothing_of_the_lazy_layer():
    layer = nn.LazyLinear(2)
    layer(X)
    other = nn.Linear(5, 2)
    assert vars(layer).keys() == vars(other).keys() and type(layer._cells) is dict
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301
        same(copied, layer)
    count = sum(type(found) is nn.LazyLinear for found in gc.get_objects())
    nn.LazyLinear(2)(X)
    gc.collect()
    assert sum(type(found) is nn.LazyLinear for found in gc.get_objects()) <= count


# -- settings ----------------------------------------------------------------------------------------------------------


def test_dtype_and_key_are_those_of_the_parameters():
    key = jax.random.key(5)
    layer = nn.LazyLinear(3, dtype=jnp.bfloat16, key=key)
    mt.seed(9)
    assert layer(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert (jax.random.key_data(mt.next_key()) == jax.random.key_data(after_seed())).all()
    same(layer, nn.Linear(5, 3, dtype=jnp.bfloat16, key=key))
    norm = nn.LazyBatchNorm1d(dtype=jnp.float16)
    norm(X.astype(jnp.float16))
    assert norm.running_mean.dtype == jnp.float16


def test_autocast_leaves_the_parameters_float32():
    layer = nn.LazyLinear(3)
    with mt.autocast(jnp.bfloat16):
        assert layer(X).dtype == jnp.bfloat16
    assert layer.weight.dtype == jnp.float32


def test_rng_gives_the_initial_values_of_an_eager_call():
    layer = nn.LazyLinear(3)
    with mt.rng(3):
        layer(X)
    with mt.rng(3):
        same(layer, nn.Linear(5, 3))


def test_an_input_on_another_device_is_met_as_by_a_plain_layer():
    device = jax.devices()[-1]
    layer = nn.LazyLinear(3)
    assert layer(jax.device_put(X, device)).devices() == {device}
    with jax.default_device(device):
        other = nn.LazyLinear(3)
        other(X)
    assert other.weight.devices() == {device}


def test_compile_of_a_lazy_layer_holds_for_what_it_becomes():
    layer = nn.LazyLinear(3)
    layer.compile()
    expected = layer(X)
    assert type(layer) is nn.Linear and hasattr(type(layer).__call__, "chooses")
    np.testing.assert_array_equal(layer(X), expected)


def test_a_lazy_layer_that_compiled_code_makes_works_in_it():
    def net(key, x):
        return nn.LazyLinear(3, key=key)(x)

    key = jax.random.key(2)
    expected = nn.Linear(5, 3, key=key)(X)
    for wrap in (jax.jit, mt.jit):
        np.testing.assert_allclose(wrap(net)(key, X), expected, rtol=1e-6)


def test_a_bound_forward_that_was_taken_before_still_works():
    layer = nn.LazyLinear(3)
    forward = layer.forward
    np.testing.assert_array_equal(forward(X), forward(X))


def test_disable_jit_finds_the_sizes_too():
    net = nn.Sequential(nn.LazyLinear(3), nn.LazyLinear(1))
    with jax.disable_jit():
        mt.backward(loss_fn, net, X)
    assert net[1].weight.shape == (1, 3) and float(jnp.abs(net.grads()[0]).max()) > 0


@pytest.mark.one_in(4)
@pytest.mark.parametrize("way", ["eager", "jit", "backward", "vjp", "scan", "summary"])
def test_a_pre_hook_sees_the_lazy_layer_and_what_it_returns_tells_the_sizes(way):
    x, seen = X[:, :3], []

    def twice(module, args):
        seen.append(module.in_features)
        return jnp.concatenate([args[0], args[0]], -1)

    net = nn.Sequential(nn.LazyLinear(4, key=jax.random.key(0)), nn.ReLU())
    net[0].register_forward_pre_hook(twice)
    calls = {
        "eager": lambda: net(x),
        "jit": lambda: mt.jit(net)(x),
        "backward": lambda: mt.backward(lambda x: net(x).sum(), x),
        "vjp": lambda: mt.vjp(net, x)[0],
        "scan": lambda: mt.scan(lambda x: net(x), x[None])[0],
        "summary": lambda: mt.summary(net, x),
    }
    out = calls[way]()
    assert net[0].in_features == 6 and seen[0] == 0
    expected = jax.nn.relu(nn.Linear(6, 4, key=jax.random.key(0))(jnp.concatenate([x, x], -1)))
    if way != "summary":
        np.testing.assert_allclose(out, expected.sum() if way == "backward" else expected, rtol=1e-5)
