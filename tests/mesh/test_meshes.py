"""Kinds of meshes, packs on them, and arrays on different devices."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from meshes import P, batch, check_all_follow, mesh, on, parameters, place, step
from numpy.testing import assert_allclose
from training import assert_unchanged, compilations, everything, mean_square

import minitorch_jax as mt
from minitorch_jax import nn, optim

X = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)


def net() -> nn.Sequential:
    first, second = jax.random.split(jax.random.key(0))
    return nn.Sequential(nn.Linear(8, 8, key=first), nn.Tanh(), nn.Linear(8, 8, key=second))


# -- explicit axes -----------------------------------------------------------------------------------------------------

USES = {
    "backward": lambda model, opt, x: mt.backward(mean_square, model, x),
    "grad": lambda model, opt, x: mt.grad(mean_square)(model, x),
    "jit": lambda model, opt, x: mt.jit(step)(model, opt, x),
    "scan": lambda model, opt, x: mt.scan(lambda x: step(model, opt, x), x[None]),
    "functional": lambda model, opt, x: jax.jit(mt.grad(mean_square))(model, x),
}
OF_ARRAYS = {
    "step": lambda model, opt: opt.step(),
    "clip_grad_norm": lambda model, opt: mt.clip_grad_norm(model, 1.0),
    "clip_grad_value": lambda model, opt: mt.clip_grad_value(model, 1.0),
}


def explicit(*spec: Any) -> NamedSharding:
    return NamedSharding(jax.make_mesh((8,), ("data",)), P(*spec))


@pytest.mark.parametrize("use", USES)
def test_data_on_explicit_axes_are_refused(use: str) -> None:
    model = net()
    opt = optim.AdamW([model])
    before = everything(model, opt)
    with pytest.raises(TypeError, match=r"an argument lies on a mesh with Explicit axes.*AxisType\.Auto,\) \* 1\)"):
        USES[use](model, opt, jax.device_put(X, explicit("data")))
    assert_unchanged(before, model, opt)


@pytest.mark.parametrize("use", OF_ARRAYS)
def test_parameters_on_explicit_axes_are_refused(use: str) -> None:
    model = net().to(explicit())
    opt = optim.AdamW([model])
    model.accumulate([jnp.ones_like(array) for array in model.parameters()])
    before = everything(model, opt)
    with pytest.raises(
        TypeError, match=r"lies on a mesh with Explicit axes.*jax\.make_mesh\(\(8,\), \('data',\), axis_t"
    ):
        OF_ARRAYS[use](model, opt)
    assert_unchanged(before, model, opt)
    with pytest.raises(TypeError, match=r"Sequential\.0\.weight lies on a mesh with Explicit axes"):
        mt.backward(mean_square, model, X)


# -- a mesh of one device ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 8])
def test_a_model_that_joins_a_mesh_compiles_once(count: int) -> None:
    model = net()
    opt, run = optim.AdamW([model]), mt.jit(step)
    x = jax.device_put(X, NamedSharding(mesh(count), P("data")))
    run(model, opt, x)
    with compilations() as found:
        run(model, opt, x)
    assert not found


# -- packs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [step, mt.jit(step)], ids=["eager", "jit"])
def test_a_replicated_model_is_packed(run: Any) -> None:
    model, alone = net().to(on("data")), net()
    opt, other = optim.AdamW([model]), optim.AdamW([alone])
    mt.pack(model)
    assert all(cell.pack is not None for _, cell in parameters(model))
    for _ in range(3):
        run(model, opt, batch(X, "data"))
        step(alone, other, X)
    for name, value in everything(alone, other).items():
        assert_allclose(everything(model, opt)[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    check_all_follow(model, opt)
    assert all(array.sharding.is_equivalent_to(on("data"), array.ndim) for array in model.parameters())


def test_a_packed_model_on_a_mesh_keeps_its_pack_when_it_is_assigned() -> None:
    model = net().to(on("data"))
    mt.pack(model)
    model[0].bias = jnp.ones(8)
    model[0].weight = jax.device_put(jnp.ones((8, 8)), on("data"))
    assert all(cell.pack is not None for _, cell in parameters(model))
    model[0].weight = jax.device_put(jnp.ones((8, 8)), on("2d", "data"))
    assert model[0].weight.sharding == on("2d", "data")
    assert_allclose(model[0].bias, np.ones(8))


def test_a_model_that_cannot_be_packed_says_why() -> None:
    model = nn.Linear(8, 8, bias=False).to(on("2d", "data"))
    with pytest.warns(
        UserWarning, match=r"mt.pack packs nothing here: all 1 small parameters are divided over devices"
    ):
        mt.pack(model)


# -- arrays on different devices ---------------------------------------------------------------------------------------


def test_parameters_on_different_devices_are_named() -> None:
    model = net()
    model[0].weight = jax.device_put(model[0].weight, NamedSharding(mesh(4), P("data")))
    model[2].weight = jax.device_put(model[2].weight, jax.devices()[6])
    for call in (mt.backward, mt.jit(mean_square)):
        args = (mean_square, model, X) if call is mt.backward else (model, X)
        with pytest.raises(
            ValueError, match=r"Sequential\.0\.weight is on devices \[0, 1, 2, 3\].*2\.weight is on device 6"
        ):
            call(*args)


def test_an_argument_on_another_device_is_named() -> None:
    model = place(net(), "2d")
    opt = optim.AdamW([model])
    step(model, opt, batch(X, "2d"))
    before = everything(model, opt)
    with pytest.raises(ValueError, match=r"Sequential\.0\.weight is on devices.*an argument, float32\[8, 8\], is"):
        mt.backward(mean_square, model, jax.device_put(X, jax.devices()[0]))
    assert_unchanged(before, model, opt)


# -- what a call costs in Python ---------------------------------------------------------------------------------------


def python_calls(run: Any) -> int:
    """How many Python functions a repeated call runs. (Some calls also take note of their shapes, so the least counts.)"""
    counts = []

    def note(frame: Any, event: str, argument: Any) -> None:
        counts[-1] += event == "call"

    for _ in range(6):
        counts.append(0)
        sys.setprofile(note)
        try:
            run()
        finally:
            sys.setprofile(None)
    return min(counts)


@pytest.mark.parametrize("layout", ["data", "fsdp"])
def test_a_call_on_a_mesh_runs_as_much_python_as_on_one_device(layout: str) -> None:
    """No array is sent to the mesh at a call: JAX would do that in Python."""
    counts, run = {}, mt.jit(step)
    for where in ("one", layout):
        model = net() if where == "one" else place(net(), layout)
        opt = optim.AdamW([model])
        x = jnp.asarray(X) if where == "one" else batch(X, layout)
        counts[where] = [python_calls(lambda model=model, opt=opt, x=x: run(model, opt, x))]
        model.zero_grad()
        mt.backward(mean_square, model, x)
        counts[where].append(python_calls(opt.step))
        counts[where].append(python_calls(lambda model=model, x=x: mt.backward(mean_square, model, x)))
    assert counts[layout] == counts["one"]
    assert max(counts["one"]) < 40
