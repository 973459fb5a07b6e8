"""Every optimizer, on every layout, in every way of running, does what it does on one device, and keeps its places.

One case for each pair of an optimizer and a layout runs in CI. The ways of running take turns in them, so that each pair of
an optimizer and a way, and of a layout and a way, is there, too. The whole product is marked slow.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import SPECS, batch, check_all_follow, parameters, place
from numpy.testing import assert_allclose
from optimizers import OPTIMIZERS
from training import everything, mean_square

import minitorch_jax as mt
from minitorch_jax import nn, optim

STEPS = 3
BATCHES = np.random.default_rng(0).normal(size=(STEPS, 8, 8)).astype(np.float32)
# Their steps depend on signs, or are rounded on the way, so that in float32 a last digit may become a whole step.
IN_FLOAT64 = ("LBFGS", "Lion", "Muon", "Rprop")


def precision(name: str) -> AbstractContextManager[Any]:
    return jax.enable_x64(True) if name in IN_FLOAT64 else nullcontext()


def net(name: str, bias: bool = True) -> nn.Sequential:
    dtype = jnp.float64 if name in IN_FLOAT64 else jnp.float32
    keys = jax.random.split(jax.random.key(0))
    first, second = (nn.Linear(*sizes, bias=bias, key=key) for sizes, key in zip([(8, 16), (16, 8)], keys, strict=True))
    return nn.Sequential(first, nn.Tanh(), second).astype(dtype)


def made(name: str) -> tuple[Any, Any]:
    """A model with biases, unless the optimizer takes matrices only, and its optimizer."""
    try:
        model = net(name)
        opt = OPTIMIZERS[name]([model], lr=0.01)
        opt.state_dict()
        return model, opt
    except ValueError:
        model = net(name, bias=False)
        return model, OPTIMIZERS[name]([model], lr=0.01)


def step(model: Any, opt: Any, x: Any) -> Any:
    def closure() -> Any:
        opt.zero_grad()
        return mt.backward(mean_square, model, x)

    if isinstance(opt, optim.LBFGS):
        return opt.step(closure)
    loss = closure()
    mt.clip_grad_norm(model, 0.1)
    opt.step()
    return loss


def functional(opt: Any, x: Any) -> Any:
    return step(opt.modules[0], opt, x), opt


def eager(model: Any, opt: Any, xs: Any) -> tuple[Any, Any]:
    for x in xs:
        step(model, opt, x)
    return model, opt


def jitted(model: Any, opt: Any, xs: Any) -> tuple[Any, Any]:
    return eager_with(mt.jit(step, keep_grads=True), model, opt, xs)


def eager_with(run: Any, model: Any, opt: Any, xs: Any) -> tuple[Any, Any]:
    for x in xs:
        run(model, opt, x)
    return model, opt


def scanned(model: Any, opt: Any, xs: Any) -> tuple[Any, Any]:
    mt.scan(lambda x: step(model, opt, x), jnp.stack(xs), keep_grads=True)
    return model, opt


def pure(model: Any, opt: Any, xs: Any) -> tuple[Any, Any]:
    # XLA knows of no parameter that a result belongs to, so a plain jax.jit is told where results are to lie
    run = jax.jit(functional, out_shardings=(None, jax.tree.map(lambda leaf: leaf.sharding, opt)))
    for x in xs:
        _, opt = run(opt, x)
    return opt.modules[0], opt


WAYS = {"eager": eager, "jit": jitted, "scan": scanned, "functional": pure}
LAYOUTS = list(SPECS)


def ways_of(name: str) -> list[str]:
    return (
        ["eager"] if name == "LBFGS" else list(WAYS)
    )  # the closure of LBFGS is called as often as its numbers ask for


def sampled() -> list[tuple[str, str, str]]:
    """A Latin square for each optimizer: layouts in order, ways of running shifted by one from optimizer to optimizer."""
    return [
        (name, layout, ways_of(name)[(i + j) % len(ways_of(name))])
        for i, name in enumerate(OPTIMIZERS)
        for j, layout in enumerate(LAYOUTS)
    ]


def product() -> list[tuple[str, str, str]]:
    return [(name, layout, way) for name in OPTIMIZERS for layout in LAYOUTS for way in ways_of(name)]


def left_out() -> list[tuple[str, str, str]]:
    return sorted({*product()} - {*sampled()})


@functools.cache
def on_one_device(name: str) -> dict[str, Any]:
    with precision(name):
        model, opt = made(name)
        return everything(*eager(model, opt, [jnp.asarray(x, model[0].weight.dtype) for x in BATCHES]))


def check(name: str, layout: str, way: str) -> None:
    expected = on_one_device(name)
    with precision(name):
        model, opt = made(name)
        place(model, layout)
        before = {path: cell.value.sharding for path, cell in parameters(model)}
        xs = [batch(jnp.asarray(x, model[0].weight.dtype), layout) for x in BATCHES]
        model, opt = WAYS[way](model, opt, xs)
        check_all_follow(model, opt)
        for path, cell in parameters(model):
            assert cell.value.sharding.is_equivalent_to(before[path], cell.value.ndim), path
        found = everything(model, opt)
    assert found.keys() == expected.keys()
    exact = {"rtol": 1e-9, "atol": 1e-12} if name in IN_FLOAT64 else {"rtol": 2e-5, "atol": 2e-6}
    for key, value in expected.items():
        if value is None or isinstance(value, str):
            assert found[key] == value
            continue
        assert_allclose(found[key], value, err_msg=key, **exact)


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("name", "layout", "way"), [pytest.param(*case, id="-".join(case)) for case in sampled()])
def test_as_on_one_device(name: str, layout: str, way: str) -> None:
    check(name, layout, way)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout", "way"), [pytest.param(*case, id="-".join(case)) for case in sorted({*product()} - {*sampled()})]
)
def test_every_combination(name: str, layout: str, way: str) -> None:
    check(name, layout, way)


def test_the_sample_has_each_pair() -> None:
    cases = [case for case in sampled() if case[0] != "LBFGS"]
    names = [name for name in OPTIMIZERS if name != "LBFGS"]
    for first, second, all_of in ((0, 1, (names, LAYOUTS)), (0, 2, (names, WAYS)), (1, 2, (LAYOUTS, WAYS))):
        assert {(case[first], case[second]) for case in cases} == {(a, b) for a in all_of[0] for b in all_of[1]}
