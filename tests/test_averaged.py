"""Averages of parameters: torch's numbers, in every kind of loop."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from oracle import torch
from training import Line, Scale, everything, mean_square

import minitorch_jax as mt
from minitorch_jax import nn, optim

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
DECAYS = [None, 0.9, 0.3]


def mlp(key: int = 0) -> Any:
    return nn.Sequential(*[nn.Linear(3, 3, key=jax.random.key(2 * key + i)) for i in range(2)])


def values(step: int, model: Any) -> list[Any]:
    rng = np.random.default_rng(step)
    return [rng.normal(size=p.shape).astype(p.dtype) for p in model.parameters()]


def assign(model: Any, new: list[Any]) -> None:
    model.parameters()[:] = [jnp.asarray(value) for value in new]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("pack", [False, True])
def test_torchs_numbers(decay: float | None, pack: bool) -> None:
    swa_utils = torch.optim.swa_utils

    model = mlp()
    theirs = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    how = {} if decay is None else {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(decay)}
    averaged, expected = optim.AveragedModel(model, decay), swa_utils.AveragedModel(theirs, **how)
    if pack:
        mt.pack(model)
    for i in range(6):
        new = values(i, model)
        assign(model, new)
        with torch.no_grad():
            for p, value in zip(theirs.parameters(), new, strict=True):
                p.copy_(torch.tensor(value))
        averaged.update(model)
        expected.update_parameters(theirs)
        for name, value in expected.module.state_dict().items():
            assert_allclose(averaged.module.state_dict()[name], value, rtol=1e-6, atol=1e-7)
        assert int(averaged.num_averaged) == i + 1 == int(expected.n_averaged)
    assert_allclose(averaged(X), expected(torch.tensor(X)).detach(), rtol=1e-5)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("use_buffers", [False, True])
def test_buffers(decay: float | None, use_buffers: bool) -> None:
    swa_utils = torch.optim.swa_utils

    theirs = torch.nn.BatchNorm1d(1, affine=True)
    how = {} if decay is None else {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(decay)}
    expected = swa_utils.AveragedModel(theirs, use_buffers=use_buffers, **how)
    model = Line()
    averaged = optim.AveragedModel(model, decay, use_buffers)
    for i in range(4):
        model.mean, model.count = jnp.float32(i * i), jnp.int32(i)
        theirs.running_mean.fill_(i * i)
        averaged.update(model)
        expected.update_parameters(theirs)
    assert_allclose(averaged.module.mean, expected.module.running_mean[0], rtol=1e-6)
    assert int(averaged.module.count) == 3 and averaged.module.count.dtype == jnp.int32


def test_keys_and_frozen_parameters() -> None:
    class Net(mt.Module):
        def __init__(self) -> None:
            self.key = mt.Buffer(jax.random.key(0))
            self.flag = mt.Buffer(jnp.array(False))
            self.weight = mt.Parameter(jnp.zeros(2), trainable=False)

    model = Net()
    averaged = optim.AveragedModel(model, use_buffers=True)
    for i in (1, 3):
        model.key, model.flag, model.weight = jax.random.key(i), jnp.array(True), jnp.full(2, float(i))
        averaged.update(model)
    assert_array_equal(jax.random.key_data(averaged.module.key), jax.random.key_data(jax.random.key(3)))
    assert bool(averaged.module.flag) and averaged.module.flag.dtype == bool
    assert_array_equal(averaged.module.weight, [2.0, 2.0])


# -- every loop --------------------------------------------------------------------------------------------------------


def train_step(model: Any, opt: Any, averaged: Any, x: Any) -> Any:
    opt.zero_grad()
    loss = mt.backward(mean_square, model, x)
    opt.step()
    averaged.update(model)
    return loss


def eagerly(model: Any, opt: Any, averaged: Any, xs: Any) -> Any:
    for x in xs:
        train_step(model, opt, averaged, x)
    return averaged


def with_jit(model: Any, opt: Any, averaged: Any, xs: Any) -> Any:
    step = mt.jit(train_step)
    for x in xs:
        step(model, opt, averaged, x)
    assert step.num_compiles == 1
    return averaged


def with_closures(model: Any, opt: Any, averaged: Any, xs: Any) -> Any:
    step = mt.jit(lambda x: train_step(model, opt, averaged, x))
    for x in xs:
        step(x)
    return averaged


def with_jit_of_the_update(model: Any, opt: Any, averaged: Any, xs: Any) -> Any:
    update = mt.jit(lambda model: averaged.update(model))
    for x in xs:
        opt.zero_grad()
        mt.backward(mean_square, model, x)
        opt.step()
        update(model)
    return averaged


def with_scan(model: Any, opt: Any, averaged: Any, xs: Any) -> Any:
    mt.scan(lambda x: train_step(model, opt, averaged, x), xs)
    return averaged


def functionally(model: Any, opt: Any, averaged: Any, xs: Any) -> Any:
    @jax.jit
    def step(opt: Any, averaged: Any, x: Any) -> Any:
        train_step(opt.modules[0], opt, averaged, x)
        return opt, averaged

    for x in xs:
        opt, averaged = step(opt, averaged, x)
    return averaged


LOOPS = [eagerly, with_jit, with_closures, with_jit_of_the_update, with_scan, functionally]


@pytest.mark.slow
@pytest.mark.parametrize(("decay", "pack"), [(None, False), (0.75, True)])
def test_every_loop_gives_the_same(decay: float | None, pack: bool) -> None:
    xs = jnp.stack([X + 0.1 * i for i in range(5)])
    found = []
    for loop in LOOPS:
        model = mlp()
        if pack:
            mt.pack(model)
        opt = optim.SGD([model], lr=0.3, momentum=0.9)
        found.append(everything(loop(model, opt, optim.AveragedModel(model, decay), xs)))
    assert found[0]["0.num_averaged"] == 5
    for other in found[1:]:
        for name, value in found[0].items():
            assert_allclose(other[name], value, rtol=1e-4, atol=1e-6)


def test_an_ensemble() -> None:
    def twice(value: Any) -> Any:
        model = Scale(value)
        averaged = optim.AveragedModel(model)
        averaged.update(model)
        model.weight = model.weight + 2
        averaged.update(model)
        return averaged

    averaged = jax.vmap(twice)(jnp.arange(3.0))
    assert_allclose(averaged.module.weight, [1.0, 2.0, 3.0], rtol=1e-5)
    assert_array_equal(averaged.num_averaged, [2, 2, 2])


def test_made_inside_a_compiled_function() -> None:
    model = nn.Linear(3, 2, key=jax.random.key(0))

    @mt.jit
    def run(model: Any) -> Any:
        averaged = optim.AveragedModel(model)
        averaged.update(model)
        return averaged(X)

    assert_allclose(run(model), model(X), rtol=1e-6)


def test_a_dropped_update_is_told() -> None:
    model = nn.Linear(3, 2, key=jax.random.key(0))
    averaged = optim.AveragedModel(model)
    with pytest.raises(mt.TraceError, match="an average of an AveragedModel was changed inside a JAX transform"):
        jax.jit(lambda model: averaged.update(model))(model)
    with pytest.warns(mt.DroppedUpdateWarning, match="AveragedModel was changed"):
        jax.jit(lambda averaged, model: averaged.update(model))(averaged, model)
        gc.collect()
    assert int(averaged.num_averaged) == 0


# -- few bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("decay", [None, 0.999])
def test_few_bits_are_averaged_in_float32(dtype: Any, decay: float | None) -> None:
    model, wide = Line().astype(dtype), Line()
    averaged, expected = optim.AveragedModel(model, decay), optim.AveragedModel(wide, decay)
    for i in range(20):
        model.weight = jnp.full(3, 1 + i / 8, dtype)
        wide.weight = model.weight.astype(jnp.float32)
        averaged.update(model)
        expected.update(wide)
    state = averaged.state_dict()
    assert averaged.module.weight.dtype == dtype and state["averages.weight"].dtype == jnp.float32
    assert_allclose(state["averages.weight"], expected.module.weight, rtol=1e-6)
    assert_array_equal(averaged.module.weight, expected.module.weight.astype(dtype))
    averaged.module.weight = jnp.full(3, 8.0, dtype)  # what is assigned counts
    averaged.update(model)
    if decay:
        assert_allclose(averaged.averages.weight, np.full(3, 8 * 0.999 + 0.001 * float(model.weight[0])), rtol=1e-6)


def test_a_float32_average_of_a_bfloat16_model() -> None:
    model = mlp()
    averaged = optim.AveragedModel(model, 0.5)
    model.astype(jnp.bfloat16)
    averaged.update(model)
    assert averaged.module[0].weight.dtype == jnp.float32
    assert_array_equal(averaged.module[0].weight, model[0].weight.astype(jnp.float32))


# -- ties, copies, life ------------------------------------------------------------------------------------------------


def test_tied_parameters() -> None:
    model = mlp()
    model[1].tie("weight", model[0], "weight")
    averaged = optim.AveragedModel(model)
    for i in (1.0, 3.0):
        model[0].weight = jnp.full((3, 3), i)
        averaged.update(model)
    averaged.module[0].weight = averaged.module[0].weight + 1
    assert_array_equal(averaged.module[1].weight, np.full((3, 3), 3.0))
    assert averaged.module.num_parameters() == model.num_parameters()


def test_what_was_read_stays_and_the_model_is_left_alone() -> None:
    model = mlp()
    averaged = optim.AveragedModel(model)
    first, mine = averaged.module[0].weight, np.array(model[0].weight)
    averaged.update(model)
    second = averaged.module[0].weight
    assign(model, values(3, model))
    averaged.update(model)
    assert_array_equal(first, mine)
    assert_array_equal(second, mine)
    opt = optim.SGD([model], lr=0.1)
    for _ in range(3):
        opt.zero_grad()
        mt.backward(mean_square, model, X)
        opt.step()
        averaged.update(model)
    for leaf in jax.tree.leaves((model, averaged)):
        assert not leaf.is_deleted()


def test_the_model_is_not_kept_alive() -> None:
    averaged = optim.AveragedModel(mlp())
    for pack in (False, True):
        model = mlp(1)
        if pack:
            mt.pack(model)
        averaged.update(model)
        dead = [weakref.ref(model), weakref.ref(model[0]._cells["weight"]), weakref.ref(model[0].weight)]
        del model
        gc.collect()
        assert [ref() for ref in dead] == [None] * 3
    averaged.update(mlp(2))
    assert int(averaged.num_averaged) == 3


def test_a_new_model_or_decay_compiles_nothing() -> None:
    averaged = optim.AveragedModel(mlp(), 0.5)
    averaged.update(mlp(1))
    events: list[str] = []
    models = [mlp(i) for i in range(2, 5)]
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: events.append(event) if "backend_compile" in event else None
    )
    for model in models:
        averaged.update(model)
        averaged.decay = 0.25
        averaged.eval()
        model.eval()
        model[0].freeze()
        averaged.update(model)
    assert not events


class Shifted(mt.Module):
    def __init__(self, dtype: Any) -> None:
        self.weight = mt.Parameter(jnp.ones(2))
        self.shift = mt.Buffer(jnp.ones(2, dtype))


def test_a_buffer_that_is_taken_over_keeps_the_dtype_of_the_average() -> None:
    for dtype in (jnp.float32, jnp.float16):  # its old value is no input of the program
        averaged = optim.AveragedModel(Shifted(dtype))
        averaged.update(Shifted(jnp.float32))
        assert averaged.module.shift.dtype == dtype


def test_modes_and_copies() -> None:
    model = mlp()
    averaged = optim.AveragedModel(model, 0.5).eval()
    averaged.update(model)
    assert model.training and not averaged.module.training
    assert averaged.parameters()[:] == [] and len(model.parameters()) == 4
    for twin in (copy.deepcopy(averaged), pickle.loads(pickle.dumps(averaged)), jax.tree.map(lambda x: x, averaged)):
        assign(model, values(4, model))
        twin.update(model)
        assert (twin.decay, int(twin.num_averaged), int(averaged.num_averaged)) == (0.5, 2, 1)
        with np.testing.assert_raises(AssertionError):
            assert_allclose(twin.module[0].weight, averaged.module[0].weight)
    twin = optim.AveragedModel(mlp(5), 0.5)
    twin.load_state_dict(averaged.state_dict())
    assert everything(twin).keys() == everything(averaged).keys()
    averaged.update(model)
    twin.update(model)
    assert_array_equal(twin(X), averaged(X))


def test_devices() -> None:
    model, other = mlp(), jax.devices()[1]
    averaged = optim.AveragedModel(model).to(other)
    averaged.update(model)
    model[0].weight = model[0].weight + 2
    mt.pack(model)
    averaged.update(model)
    assert averaged.module[0].weight.devices() == {other} and model[0].weight.devices() == {jax.devices()[0]}
    assert_allclose(averaged.module[0].weight, model[0].weight - 1, rtol=1e-5)


def test_shardings_stay() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    model = nn.Linear(3, 2, key=jax.random.key(0)).to(split)
    averaged = optim.AveragedModel(model, 0.5)
    for _ in range(2):
        averaged.update(model)
        assert averaged.module.weight.sharding == split and averaged.module.bias.sharding == split


# -- bad input ---------------------------------------------------------------------------------------------------------


def tied(model: Any) -> Any:
    model[1].tie("weight", model[0], "weight")
    return model


class Parted(mt.Module):
    def __init__(self, kind: Any, value: Any) -> None:
        self.weight = mt.Parameter(jnp.zeros(2))
        self.other = kind(value)


FLOAT, INT = jnp.zeros(2), jnp.zeros(2, jnp.int32)


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        (mlp(), nn.Sequential(mlp()[0]), r"the Sequential has another structure .*: it has no 1\.weight"),
        (nn.Sequential(mlp()[0]), mlp(), r"its 1\.weight is new"),
        (nn.Linear(3, 2), nn.Linear(3, 4), r"its weight is float32\[4, 3\], and the average's float32\[2, 3\]"),
        (mlp(), tied(mlp()), r"its 1\.weight is tied to 0\.weight, and the average's not tied"),
        (tied(mlp()), mlp(), r"its 1\.weight is not tied, and the average's tied to 0\.weight"),
        (Parted(mt.Parameter, FLOAT), Parted(mt.Buffer, FLOAT), r"its other is a buffer .* average's a parameter"),
        (Parted(mt.Buffer, FLOAT), Parted(mt.Buffer, INT), r"its other is a buffer"),
    ],
)
def test_another_structure(first: Any, second: Any, match: str) -> None:
    averaged = optim.AveragedModel(first)
    before = everything(averaged)
    with pytest.raises(ValueError, match=match):
        averaged.update(second)
    with pytest.raises(ValueError, match=match):
        mt.jit(lambda model: averaged.update(model))(second)
    for name, value in everything(averaged).items():
        assert_array_equal(value, before[name])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: optim.AveragedModel(3), TypeError, "AveragedModel takes a Module; got 3"),
        (lambda: optim.AveragedModel(nn.Tanh()), ValueError, "the Tanh holds no parameters"),
        (lambda: optim.AveragedModel(mlp(), 1.5), ValueError, r"decay must be None or a number in \[0, 1\]; got 1.5"),
        (lambda: optim.AveragedModel(mlp(), "0.5"), ValueError, "decay must be"),
        (lambda: optim.AveragedModel(mlp(), np.nan), ValueError, "decay must be"),
        (lambda: optim.AveragedModel(mlp()).update([mlp()]), TypeError, "AveragedModel.update takes a Module; got"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
