"""Clipping and scaling of accumulated gradients, against torch, in every kind of loop."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from oracle import torch

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.state.walk import walk_of

GRADS = [np.array([[3.0, -4.0], [0.5, 2.0]], np.float32), np.array([12.0, -1.0], np.float32)]
INF = float("inf")


def layer(grads: Any = GRADS) -> Any:
    made = nn.Linear(2, 2, key=jax.random.key(0))
    if grads is not None:
        made.accumulate(grads)
    return made


def clip_norm(model: Any, limit: float, p: float) -> Any:
    return mt.clip_grad_norm(model, limit, p)


def of_a_pack(model: Any, limit: float, p: float) -> Any:
    mt.pack(model)
    return mt.clip_grad_norm(model, limit, p)


def in_a_compiled_function(model: Any, limit: float, p: float) -> Any:
    return mt.jit(lambda model, limit: mt.clip_grad_norm(model, limit, p))(model, limit)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("way", [clip_norm, of_a_pack, in_a_compiled_function])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, INF])
def test_norms_are_torchs(way: Any, p: float) -> None:
    for limit in (0.5, 5.0, 1000.0, 0.0):
        theirs = [torch.zeros(g.shape) for g in GRADS]
        for tensor, g in zip(theirs, GRADS, strict=True):
            tensor.grad = torch.tensor(g)
        expected = torch.nn.utils.clip_grad_norm_(theirs, limit, p)
        model = layer()
        norm = way(model, limit, p)
        assert_allclose(norm, expected.numpy(), rtol=1e-6)
        for mine, tensor in zip(model.grads(), theirs, strict=True):
            assert_allclose(mine, tensor.grad.numpy(), rtol=1e-6)


def test_values_and_factors() -> None:
    model = layer()
    mt.clip_grad_value([model], 2.0)
    assert_array_equal(model.grads()[0], [[2.0, -2.0], [0.5, 2.0]])
    mt.scale_grads(optim.SGD([model]), -0.5)
    assert_array_equal(model.grads()[1], [-1.0, 0.5])


def test_new_numbers_compile_nothing() -> None:
    model, limits = layer(), (1, 2.0, np.float32(3), jnp.float32(4))
    mt.clip_grad_norm(model, 10.0)
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: events.append(event) if "backend_compile" in event else None
    )
    for limit in limits:
        mt.clip_grad_norm(model, limit)
    assert not events


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_few_bits_are_summed_in_float32(dtype: Any) -> None:
    model = nn.Linear(64, 64, key=jax.random.key(0)).astype(dtype)
    model.accumulate([jnp.full((64, 64), 16.0, dtype), jnp.zeros(64, dtype)])
    norm = mt.clip_grad_norm(model, 1.0)
    assert norm.dtype == jnp.float32 and float(norm) == 1024.0
    assert model.grads()[0].dtype == dtype
    assert_allclose(model.grads()[0].astype(jnp.float32), np.full((64, 64), 1 / 64), rtol=1e-2)


def test_frozen_tied_and_absent_gradients() -> None:
    model = nn.Sequential(layer(), layer(None), layer())
    model[2].tie("weight", model[0], "weight")
    assert float(mt.clip_grad_norm(nn.Sequential(layer(None)), 1.0)) == 0.0
    model[2].freeze()  # the weight too, as it is one
    model[0].unfreeze()
    norm = mt.clip_grad_norm([model, model[0]], 1000.0)
    assert_allclose(norm, np.sqrt(sum((g**2).sum() for g in GRADS)), rtol=1e-6)
    assert model[1].grads()[0].sum() == 0.0


def test_a_part_of_a_pack() -> None:
    model = nn.Sequential(layer(), layer())
    mt.pack(model)
    norm = mt.clip_grad_norm(model[0], 1.0)
    assert_allclose(norm, np.sqrt(sum((g**2).sum() for g in GRADS)), rtol=1e-6)
    assert_allclose(model[0].grads()[1], GRADS[1] / norm, rtol=1e-5)
    assert_array_equal(model[1].grads()[1], GRADS[1])


def test_an_array_that_was_read_stays() -> None:
    model = layer()
    before = model.grads()[0]
    mt.clip_grad_norm(model, 1.0)
    assert_array_equal(before, GRADS[0])


def test_a_norm_that_is_not_finite() -> None:
    model = layer([np.array([[np.nan, 1.0], [1.0, 1.0]], np.float32), GRADS[1]])
    with pytest.raises(RuntimeError, match="norm of the gradients is nan; nothing was changed"):
        mt.clip_grad_norm(model, 1.0, error_if_nonfinite=True)
    assert_array_equal(model.grads()[1], GRADS[1])
    assert np.isnan(mt.clip_grad_norm(model, 1.0))
    with pytest.raises(mt.TraceError, match="error_if_nonfinite"):
        mt.jit(lambda model: mt.clip_grad_norm(model, 1.0, error_if_nonfinite=True))(model)


def test_used_up_gradients_are_that_error() -> None:
    model = layer(None)
    opt = optim.SGD([model])

    @mt.jit
    def step(x: Any) -> None:
        opt.zero_grad()
        mt.backward(lambda x: model(x).sum(), x)
        norm = mt.clip_grad_norm(opt, 1.0)
        opt.step()
        return norm

    before = np.array(model.weight)
    assert_allclose(step(jnp.ones((1, 2))), np.sqrt(6), rtol=1e-6)
    assert_allclose(before - model.weight, np.full((2, 2), 0.01 / np.sqrt(6)), rtol=1e-4)
    with pytest.raises(RuntimeError, match="used up there"):
        mt.clip_grad_norm(model, 1.0)


def loops(model: Any, opt: Any, clip: Any) -> dict[str, Any]:
    def loss_fn(x: Any) -> Any:
        return (model(x) ** 2).sum()

    def step(x: Any) -> Any:
        opt.zero_grad()
        for part in (x[:2], x[2:]):
            mt.backward(loss_fn, part)
        mt.scale_grads(model, 0.5)
        norm = clip(model)
        opt.step()
        return norm

    return {"eager": step, "jit": mt.jit(step), "scan": lambda x: mt.scan(step, x[None])[0]}


@pytest.mark.one_in(9)
@pytest.mark.parametrize("pack", [False, True])
def test_every_loop_gives_the_same(pack: bool) -> None:
    found = []
    x = jnp.linspace(-1.0, 1.0, 8).reshape(4, 2)
    for name in ("eager", "jit", "scan"):
        model = layer(None)
        opt = optim.SGD([model], lr=0.1, momentum=0.9)
        if pack:
            mt.pack(model)
        step = loops(model, opt, lambda model: mt.clip_grad_norm(model, 0.1))[name]
        norms = [float(step(x)) for _ in range(3)]
        found.append((norms, [np.array(p) for p in model.parameters()]))
    for norms, params in found[1:]:
        assert_allclose(norms, found[0][0], rtol=1e-5)
        for mine, theirs in zip(params, found[0][1], strict=True):
            assert_allclose(mine, theirs, rtol=1e-5)


def test_the_functional_form() -> None:
    def step(opt: Any, x: Any) -> Any:
        opt.zero_grad()
        mt.backward(lambda model, x: model(x).sum(), opt.modules[0], x)
        norm = mt.clip_grad_norm(opt, 1.0)
        opt.step()
        return opt, norm

    model = layer(None)
    before = np.array(model.weight)
    opt, norm = jax.jit(step)(optim.SGD([model], lr=1.0), jnp.ones((1, 2)))
    assert_allclose(before - opt.modules[0].weight, np.full((2, 2), 1 / np.sqrt(6)), rtol=1e-5)
    with pytest.raises(mt.TraceError, match="was changed inside a JAX transform"):
        jax.jit(lambda: mt.clip_grad_norm(layer_outside, 1.0))()


layer_outside = layer()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m: mt.clip_grad_norm(m.parameters(), 1.0), TypeError, "clip_grad_norm takes Modules; the list holds"),
        (lambda m: mt.clip_grad_norm(3, 1.0), TypeError, "takes a Module, a list of them, or an optimizer; got 3"),
        (lambda m: mt.clip_grad_norm(m, -1.0), ValueError, "max_norm must be a finite number >= 0; got -1.0"),
        (lambda m: mt.clip_grad_norm(m, np.nan), ValueError, "max_norm must be a finite number"),
        (lambda m: mt.clip_grad_norm(m, "1"), TypeError, "max_norm must be a number; got '1'"),
        (lambda m: mt.clip_grad_norm(m, 1.0, 0), ValueError, "norm_type must be > 0; got 0"),
        (lambda m: mt.clip_grad_value(m, -1.0), ValueError, "clip_value must be a finite number >= 0"),
        (lambda m: mt.scale_grads(m, np.inf), ValueError, "factor must be a finite number; got inf"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], match: str) -> None:
    model = layer()
    with pytest.raises(error, match=match):
        call(model)
    assert_array_equal(model.grads()[0], GRADS[0])


def test_modes_and_other_models_compile_nothing() -> None:
    model, other = layer(), nn.Sequential(layer())
    mt.clip_grad_norm(model, 10.0)
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: events.append(event) if "backend_compile" in event else None
    )
    model.eval()
    for found in (model, other, model, optim.SGD([other])):
        mt.clip_grad_norm(found, 10.0)
    assert not events


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_go_with_their_models(packed: bool) -> None:
    kept, gone = layer(), layer()
    if packed:
        mt.pack(kept, gone)
    mt.clip_grad_norm([kept, gone], 1.0)
    mt.scale_grads([gone, kept], 1.0)
    cells = [weakref.ref(cell) for cell in walk_of(gone).grads]
    del gone
    gc.collect()
    assert not any(cell() for cell in cells)
    assert_allclose(mt.clip_grad_norm(kept, 1.0), 1 / np.sqrt(2), rtol=1e-4)
