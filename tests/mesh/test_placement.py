"""Placement belongs to the parameter: what is kept for a parameter, and what is assigned to it, lies where it lies."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from meshes import P, batch, check_all_follow, mesh, on, parameters, place, step
from numpy.testing import assert_allclose
from training import everything, mean_square

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.module import random

X = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
LAYOUTS = ["data", "fsdp", "tensor", "2d"]


def net() -> nn.Sequential:
    first, second = jax.random.split(jax.random.key(0))
    return nn.Sequential(nn.Linear(8, 16, key=first), nn.Tanh(), nn.Linear(16, 8, key=second))


def compiled() -> Any:
    return mt.jit(step, keep_grads=True)


def adam(model: Any, **settings: Any) -> optim.AdamW:
    return optim.AdamW([model], lr=0.01, **settings)


# -- state that was there first ----------------------------------------------------------------------------------------


@pytest.mark.one_in(3)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [lambda: step, compiled], ids=["eager", "jit"])
def test_state_follows_a_model_that_is_sharded_later(layout: str, make: Any) -> None:
    run = make()
    model, alone = net(), net()
    opt, other = adam(model), adam(alone)
    step(model, opt, X)
    step(alone, other, X)
    place(model, layout)
    for _ in range(2):
        run(model, opt, batch(X, layout))
        step(alone, other, X)
        check_all_follow(model, opt)
    for name, value in everything(alone, other).items():
        assert_allclose(everything(model, opt)[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("make", [lambda: step, compiled], ids=["eager", "jit"])
def test_state_follows_a_model_to_another_mesh(make: Any) -> None:
    run = make()
    model = net()
    opt = adam(model)
    for layout in ("2d", "fsdp", "2d"):
        place(model, layout)
        run(model, opt, batch(X, layout))
        check_all_follow(model, opt)
    small = NamedSharding(mesh(2), P("data"))
    model.to(small)
    opt.step()
    check_all_follow(model, opt)
    assert all(array.sharding.device_set == small.device_set for array in jax.tree.leaves(opt))


def test_state_that_is_loaded_follows() -> None:
    alone = net()
    other = adam(alone)
    step(alone, other, X)
    model = place(net(), "2d")
    opt = adam(model)
    model.load_state_dict(alone.state_dict())
    opt.load_state_dict(other.state_dict())
    check_all_follow(model, opt)
    elsewhere = jax.tree.map(_on_the_sixth_device, other.state_dict()["state"])
    opt.load_state_dict(other.state_dict() | {"state": elsewhere})
    check_all_follow(model, opt)


def _on_the_sixth_device(leaf: Any) -> Any:
    return jax.device_put(leaf, jax.devices()[5]) if isinstance(leaf, jax.Array) else leaf


@pytest.mark.parametrize("master_weights", [False, True])
def test_a_state_takes_the_memory_of_its_shard_only(master_weights: bool) -> None:
    model = net().astype(jnp.bfloat16) if master_weights else net()
    opt = adam(model, master_weights=master_weights)
    step(model, opt, X.astype(model[0].weight.dtype))
    place(model, "2d")
    opt.step()
    check_all_follow(model, opt)
    for cell in opt._state[dict(parameters(model))["0.weight"]][1]:
        assert cell.value.addressable_shards[0].data.size == 16 * 8 // 8


def test_a_gradient_follows_its_parameter() -> None:
    model = net()
    mt.backward(mean_square, model, X)
    place(model, "2d")
    check_all_follow(model)
    model.grads()[0] = jax.device_put(jnp.ones((16, 8)), jax.devices()[3])
    model.accumulate([jax.device_put(jnp.ones_like(p), jax.devices()[3]) for p in net().parameters()])
    check_all_follow(model)
    assert_allclose(model.grads()[0], np.full((16, 8), 2.0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_that_is_computed_lies_as_its_parameter(layout: str) -> None:
    model = place(net(), layout)
    for _ in range(2):  # the second one is added
        mt.backward(mean_square, model, batch(X, layout))
        check_all_follow(model)


# -- assigning ---------------------------------------------------------------------------------------------------------


def _assign(model: Any) -> None:
    model[0].weight = jnp.ones((16, 8))


def _from_numpy(model: Any) -> None:
    model[0].weight = np.ones((16, 8), np.float32)


def _by_the_list(model: Any) -> None:
    model.parameters()[0] = jnp.ones((16, 8))


def _load(model: Any) -> None:
    model.load_state_dict(net().state_dict())


def _load_numpy(model: Any) -> None:
    model.load_state_dict({name: np.asarray(value) for name, value in net().state_dict().items()})


def _initialise(model: Any) -> None:
    nn.init.xavier_uniform_(model, "0.weight")


def _ones(model: Any) -> None:
    nn.init.ones_(model[0], "weight")


def _cast(model: Any) -> None:
    model.astype(jnp.bfloat16).astype(jnp.float32)


def _compute(model: Any) -> None:
    model[0].weight = 0.5 * model[0].weight + 1.0


def _in_compiled_code(model: Any) -> None:
    @mt.jit
    def change(model: Any) -> None:
        model[0].weight = jnp.ones((16, 8))

    change(model)


@pytest.mark.parametrize(
    "change",
    [_assign, _from_numpy, _by_the_list, _load, _load_numpy, _initialise, _ones, _cast, _compute, _in_compiled_code],
    ids=lambda change: change.__name__,
)
def test_what_is_assigned_takes_the_sharding_of_the_parameter(change: Any) -> None:
    model = place(net(), "2d")
    opt = adam(model)
    before = [array.sharding for array in model.parameters()]
    change(model)
    for array, sharding in zip(model.parameters(), before, strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
    step(model, opt, batch(X, "2d"))
    check_all_follow(model, opt)


def test_buffers_of_whole_numbers_keep_their_mesh() -> None:
    layer = nn.BatchNorm1d(8)
    whole = on("2d")
    layer.to(whole)
    layer.num_batches_tracked = jnp.asarray(5)
    layer.load_state_dict({**layer.state_dict(), "running_mean": jnp.ones(8)})
    assert all(array.sharding == whole for array in layer.state_dict().values())


def test_an_array_that_is_put_elsewhere_moves_its_parameter() -> None:
    model = place(net(), "2d")
    opt = adam(model)
    step(model, opt, batch(X, "2d"))
    rows = on("2d", "data")
    model[0].weight = jax.device_put(model[0].weight, rows)
    assert model[0].weight.sharding == rows
    step(model, opt, batch(X, "2d"))
    assert model[0].weight.sharding.is_equivalent_to(rows, 2)
    check_all_follow(model, opt)


def test_an_array_of_another_shape_is_refused_and_nothing_moves() -> None:
    model = place(net(), "2d")
    before = model[0].weight
    with pytest.raises(ValueError, match=r"shape \(3, 5\) for \(16, 8\)"):
        model[0].weight = jnp.ones((3, 5))
    assert model[0].weight is before


# -- what is used beside arrays on a mesh ------------------------------------------------------------------------------


def test_a_model_that_is_bound_nowhere_joins_the_mesh_of_its_data() -> None:
    model = net()
    opt, run = adam(model), compiled()
    for _ in range(2):
        run(model, opt, batch(X, "data"))
    check_all_follow(model, opt)
    assert all(array.sharding.is_equivalent_to(on("data"), array.ndim) for array in model.parameters())


def test_a_new_learning_rate_stays_on_the_mesh() -> None:
    model = place(net(), "2d")
    opt = adam(model)
    for lr in (0.1, 0.2, 0.3):
        opt.lr = lr
        step(model, opt, batch(X, "2d"))
        assert opt.lr == lr
        check_all_follow(model, opt)


# -- random streams ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["mesh", "device"])
def test_a_stream_keeps_no_tracer(where: str) -> None:
    """It was bound to some devices, and a plain transform runs on others."""
    model = nn.Sequential(nn.Linear(8, 8, key=jax.random.key(0)), nn.Dropout(0.5))
    model.to(on("2d") if where == "mesh" else jax.devices()[3])
    mt.backward(mean_square, model, batch(X, "2d") if where == "mesh" else jax.device_put(X, jax.devices()[3]))
    assert random.current().is_committed()
    plain = nn.Linear(8, 8, key=jax.random.key(1))

    jax.jit(lambda opt, x: (step(opt.modules[0], opt, x), opt))(adam(plain), X)
    assert not isinstance(random.current().cell.value, jax.core.Tracer)
    assert nn.Dropout(0.5)(jnp.ones(8)).shape == (8,)
    mt.backward(mean_square, model, batch(X, "2d") if where == "mesh" else jax.device_put(X, jax.devices()[3]))


# -- averages ----------------------------------------------------------------------------------------------------------


def test_an_average_follows_a_model_that_is_sharded_later() -> None:
    model = net()
    averaged = mt.optim.AveragedModel(model)
    averaged.update(model)
    for layout in ("2d", "fsdp"):
        place(model, layout)
        averaged.update(model)
        for name, theirs in model.state_dict().items():
            assert averaged.module.state_dict()[name].sharding.is_equivalent_to(theirs.sharding, theirs.ndim)
        assert_allclose(averaged.module[0].weight, net()[0].weight, rtol=1e-6)


# -- several processes -------------------------------------------------------------------------------------------------

TWO_PROCESSES = Path(__file__).parent / "two_processes.py"


@pytest.mark.slow
def test_copies_are_made_where_other_processes_hold_a_part() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(TWO_PROCESSES), str(port)]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    processes = [
        subprocess.Popen([*command, str(i)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all("as on one device" in output for output in outputs), "\n".join(outputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_in_bfloat16_is_rounded_with_the_same_noise_in_every_layout(layout: str) -> None:
    found = []
    for places in (False, True):
        mt.seed(0)
        model = net()
        opt = adam(model, state_dtype=jnp.bfloat16)
        if places:
            place(model, layout)
        for _ in range(3):
            model.zero_grad()
            model.accumulate([0.3 * (1 + p) for p in model.parameters()])
            opt.step()
        found.append(opt.state_dict()["state"])
    for path, fields in found[0].items():
        for name, value in fields.items():
            assert np.asarray(value).tobytes() == np.asarray(found[1][path][name]).tobytes(), (path, name)
