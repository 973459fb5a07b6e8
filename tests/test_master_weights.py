"""`master_weights=True`: parameters of few bits that are trained in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import minitorch_jax as mt
from minitorch_jax import nn, optim

DTYPES = [jnp.bfloat16, jnp.float16]


class Pair(mt.Module):
    def __init__(self, dtype: Any) -> None:
        self.weight = mt.Parameter(jnp.ones((2, 3), dtype))
        self.bias = mt.Parameter(jnp.zeros(3, dtype))
        self.wide = mt.Parameter(jnp.ones(2, jnp.float32))


def steps(model: Any, opt: Any, number: int, size: float = 1.0) -> None:
    for i in range(number):
        opt.zero_grad()
        model.accumulate([jnp.full(p.shape, size * (1 + i % 3), p.dtype) for p in model.parameters()])
        opt.step()


MAKE: dict[str, Any] = {
    "plain": lambda model, **options: mt.Optimizer([model], lr=1e-4, **options),
    "momentum": lambda model, **options: optim.SGD([model], lr=1e-4, momentum=0.9, **options),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("pack", [False, True])
def test_small_steps_add_up_as_in_float32(dtype: Any, make: Any, pack: bool) -> None:
    low, full, lost = Pair(dtype), Pair(jnp.float32), Pair(dtype)
    opts = make(low, master_weights=True), make(full), make(lost)
    if pack:
        mt.pack(low)
    for model, opt in zip((low, full, lost), opts, strict=True):
        steps(model, opt, 30)
    state = opts[0].state_dict()["state"]
    assert state["0.weight"]["master_weight"].dtype == jnp.float32 and low.weight.dtype == dtype
    assert "master_weight" not in state["0.wide"]
    assert_allclose(state["0.weight"]["master_weight"], full.weight, rtol=1e-6)
    assert_array_equal(low.weight, full.weight.astype(dtype))
    assert_array_equal(low.wide, full.wide)
    assert float(lost.weight[0, 0]) != float(
        low.weight[0, 0]
    )  # each of the steps was less than half a unit in the last place


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rules_state_is_float32_too(dtype: Any) -> None:
    opt = optim.SGD([Pair(dtype)], momentum=0.9, master_weights=True)
    assert sorted(opt.state_dict()["state"]["0.bias"]) == ["master_weight", "momentum_buffer", "step"]
    for fields in opt.state_dict()["state"].values():
        assert fields["momentum_buffer"].dtype == jnp.float32


def test_an_assigned_value_counts() -> None:
    model = Pair(jnp.bfloat16)
    opt = mt.Optimizer([model], lr=1e-4, master_weights=True)
    steps(model, opt, 5)
    model.weight = model.weight.at[0].set(4.0)
    before = np.array(opt.state_dict()["state"]["0.weight"]["master_weight"])
    steps(model, opt, 1)
    after = np.array(opt.state_dict()["state"]["0.weight"]["master_weight"])
    assert_allclose(after[0], np.full(3, 4.0 - 1e-4), rtol=1e-6)
    assert_allclose(after[1], before[1] - 1e-4, rtol=1e-6)


def test_every_loop_gives_the_same() -> None:
    def loss_fn(model: Any, x: Any) -> Any:
        return ((x @ model.weight + model.bias[None]).astype(jnp.float32) ** 2).mean() + (model.wide**2).sum()

    def step(opt: Any, x: Any) -> Any:
        opt.zero_grad()
        loss = mt.backward(loss_fn, opt.modules[0], x)
        opt.step()
        return loss

    x = jnp.linspace(-1.0, 1.0, 8).reshape(4, 2).astype(jnp.bfloat16)
    found = []
    for way in ("eager", "jit", "scan", "functional"):
        opt = optim.SGD([Pair(jnp.bfloat16)], lr=1e-3, momentum=0.9, master_weights=True)
        if way == "scan":
            mt.scan(lambda x, opt=opt: step(opt, x), jnp.stack([x] * 5))
        elif way == "functional":
            pure = jax.jit(lambda opt, x: (opt, step(opt, x)))
            for _ in range(5):
                opt, _ = pure(opt, x)
        else:
            call = mt.jit(step) if way == "jit" else step
            for _ in range(5):
                call(opt, x)
        found.append(opt.state_dict()["state"])
    for other in found[1:]:
        for path, fields in found[0].items():
            for name, value in fields.items():
                assert_allclose(other[path][name], value, rtol=2e-3, atol=1e-6, err_msg=f"{path}.{name}")


def test_switched_on_and_off() -> None:
    model = Pair(jnp.bfloat16)
    opt = optim.SGD([model], lr=1e-4, momentum=0.9)
    steps(model, opt, 2)
    buffer = opt.state_dict()["state"]["0.weight"]["momentum_buffer"]
    opt.master_weights = True
    state = opt.state_dict()["state"]["0.weight"]
    assert_array_equal(state["momentum_buffer"], buffer)
    assert_array_equal(state["master_weight"], model.weight.astype(jnp.float32))
    assert state["step"] == 2
    steps(model, opt, 2)
    opt.master_weights = False
    assert "master_weight" not in opt.state_dict()["state"]["0.weight"]
    steps(model, opt, 1)
    assert model.weight.dtype == jnp.bfloat16


def test_a_group_may_have_them() -> None:
    models = [nn.Linear(2, 2, key=jax.random.key(i)).astype(jnp.bfloat16) for i in range(2)]
    opt = optim.SGD([{"modules": models[:1], "master_weights": True}, {"modules": models[1:]}])
    state = opt.state_dict()["state"]
    assert ["master_weight" in fields for fields in state.values()] == [True, True, False, False]
