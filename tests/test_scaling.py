"""Loss scaling: torch's scales, in every kind of loop, and gradients that float16 could not hold without it."""

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
from training import Scale, assert_unchanged, compilations, everything

import minitorch_jax as mt
from minitorch_jax import nn, optim

X = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
INF = np.full_like(X, np.inf)
PATTERN = [X, X, INF, X, X, X, X, INF, INF, X]  # of batches, in which two in a row make the scale grow


def loss_fn(model: Any, x: Any) -> Any:
    return (model(x).astype(jnp.float32) ** 2).mean()


def small() -> mt.LossScaler:
    return mt.LossScaler(1024.0, growth_factor=4.0, growth_interval=2)


def trio(pack: bool = False, dtype: Any = jnp.float32) -> Any:
    model = nn.Linear(3, 2, key=jax.random.key(0)).astype(dtype)
    if pack:
        mt.pack(model)
    return model, optim.SGD([model], lr=0.1, momentum=0.9), small()


# -- torch -------------------------------------------------------------------------------------------------------------


def test_torchs_scales_and_steps() -> None:
    model, opt, scaler = trio()
    theirs = torch.nn.Linear(3, 2)
    theirs.load_state_dict({name: torch.tensor(np.array(value)) for name, value in model.state_dict().items()})
    their_opt = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    expected = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_factor=4.0, growth_interval=2)
    for i, x in enumerate(PATTERN):
        opt.zero_grad()
        loss = scaler.backward(loss_fn, model, x)
        their_opt.zero_grad()
        their_loss = (theirs(torch.tensor(x)) ** 2).mean()
        expected.scale(their_loss).backward()
        if i % 2:
            scaler.unscale(opt)
            expected.unscale_(their_opt)
            norm = mt.clip_grad_norm(opt, 0.1)
            their_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
            assert_allclose(norm, their_norm, rtol=1e-5)
        scaler.step(opt)
        expected.step(their_opt)
        expected.update()
        assert_allclose(loss, their_loss.detach(), rtol=1e-5)
        state = scaler.state_dict()
        assert state.pop("skipped") == sum(seen is INF for seen in PATTERN[: i + 1])
        assert state == expected.state_dict()
        assert_allclose(model.weight, theirs.weight.detach(), rtol=1e-5)
    scaler.load_state_dict(expected.state_dict())  # which knows no `skipped`
    assert scaler.skipped == 0 and scaler.scale == expected.get_scale()


# -- every loop --------------------------------------------------------------------------------------------------------


def train_step(model: Any, opt: Any, scaler: Any, x: Any) -> Any:
    opt.zero_grad()
    for part in (x[:1], x[1:]):  # accumulated
        loss = scaler.backward(loss_fn, model, part)
    scaler.step(opt)
    return loss, scaler.scale, scaler.skipped


def with_sum(model: Any, x: Any) -> Any:
    return loss_fn(model, x), x.sum()


def clipped_step(model: Any, opt: Any, scaler: Any, x: Any) -> Any:
    opt.zero_grad()
    loss, _ = scaler.backward(with_sum, model, x, has_aux=True)
    scaler.unscale(opt)
    mt.clip_grad_value(opt, 0.1)  # an infinite gradient is finite then, and still found
    scaler.step(opt)
    return loss, scaler.scale, scaler.skipped


def eagerly(step: Any, model: Any, opt: Any, scaler: Any) -> Any:
    return [step(model, opt, scaler, x) for x in PATTERN], opt, scaler


def with_jit(step: Any, model: Any, opt: Any, scaler: Any) -> Any:
    step = mt.jit(step)
    out = [step(model, opt, scaler, x) for x in PATTERN]
    assert step.num_compiles == 1
    return out, opt, scaler


def with_closures(step: Any, model: Any, opt: Any, scaler: Any) -> Any:
    jitted = mt.jit(lambda x: step(model, opt, scaler, x))
    return [jitted(x) for x in PATTERN], opt, scaler


def with_scan(step: Any, model: Any, opt: Any, scaler: Any) -> Any:
    out = mt.scan(lambda x: step(model, opt, scaler, x), np.stack(PATTERN))
    return list(zip(*out, strict=True)), opt, scaler


def functionally(step: Any, model: Any, opt: Any, scaler: Any) -> Any:
    @jax.jit
    def pure(opt: Any, scaler: Any, x: Any) -> Any:
        out = step(opt.modules[0], opt, scaler, x)
        return opt, scaler, out

    outs = []
    for x in PATTERN:
        opt, scaler, out = pure(opt, scaler, x)
        outs.append(out)
    return outs, opt, scaler


@pytest.mark.slow
@pytest.mark.parametrize("step", [train_step, clipped_step])
def test_every_loop_gives_the_same(step: Any) -> None:
    ways = [
        (eagerly, False),
        (eagerly, True),
        (with_jit, step is train_step),
        (with_scan, False),
        (functionally, False),
    ]
    ways += [(with_closures, False)] if step is train_step else []
    expected: Any = None
    for loop, pack in ways:
        out, opt, scaler = loop(step, *trio(pack))
        found = np.array(out, float), everything(opt, *opt.modules), scaler.state_dict()
        expected = expected or found
        assert_allclose(found[0], expected[0], rtol=1e-4)
        for name, value in expected[1].items():
            assert_allclose(found[1][name], value, rtol=1e-4, atol=1e-6, err_msg=name)
        assert found[2] == expected[2]
    assert expected[2]["skipped"] == 3 and expected[1]["0.num_steps"] == 7


def test_unscaled_in_one_program_and_stepped_in_another() -> None:
    model, opt, scaler = trio()
    before = np.array(model.weight)
    unscale = mt.jit(lambda: scaler.unscale(opt))
    for _ in range(2):
        opt.zero_grad()
        scaler.backward(loss_fn, model, X)
        unscale()
        assert_allclose(model.grads()[0], mt.grad(loss_fn)(model, X).weight, rtol=1e-5)
        scaler.step(opt)
    opt.zero_grad()
    scaler.backward(loss_fn, model, X)
    scaler.unscale(opt)
    mt.jit(lambda: scaler.step(opt))()
    other, other_opt, _ = trio()
    assert_array_equal(other.weight, before)
    for _ in range(3):
        other_opt.zero_grad()
        mt.backward(loss_fn, other, X)
        other_opt.step()
    assert_allclose(model.weight, other.weight, rtol=1e-5)


# -- float16 -----------------------------------------------------------------------------------------------------------


@pytest.mark.one_in(9)
@pytest.mark.parametrize("pack", [False, True])
def test_gradients_that_would_underflow(pack: bool) -> None:
    def tiny(model: Any, x: Any) -> Any:
        return model(x).astype(jnp.float32).sum() * 1e-9

    model, opt, scaler = trio(pack, jnp.float16)
    opt.lr, opt.momentum = 1e7, 0.0
    x = jnp.ones((2, 3), jnp.float16)
    before = np.array(model.weight, np.float32)
    mt.backward(tiny, model, x)
    assert not np.any(model.grads()[0])
    scaler.scale = 2.0**16
    for _ in range(2):
        opt.zero_grad()
        scaler.backward(tiny, model, x)
        assert np.all(model.grads()[0]) and model.grads()[0].dtype == jnp.float16
        scaler.step(opt)
    assert_allclose(before - np.array(model.weight, np.float32), np.full((2, 3), 2 * 2e-2), rtol=5e-2)
    assert (scaler.skipped, scaler.scale) == (0, 2.0**18)


@pytest.mark.one_in(9)
@pytest.mark.parametrize("options", [{}, {"master_weights": True}, {"skip_nonfinite": True}])
def test_overflow_changes_nothing_and_backs_off(options: Any) -> None:
    model = nn.Linear(3, 2, key=jax.random.key(0)).astype(jnp.float16)
    opt, scaler = optim.AdamW([model], lr=0.1, **options), mt.LossScaler(2.0**10)
    for scale in (2.0**10, 2.0**30, 2.0**29):
        scaler.scale = scale
        before = everything(model, opt)
        opt.zero_grad()
        loss = scaler.backward(loss_fn, model, jnp.asarray(X, jnp.float16))
        assert np.isfinite(loss)
        scaler.step(opt)
        if scale > 2.0**10:
            assert_unchanged(before, model, opt)
            assert scaler.scale == scale / 2
    assert (scaler.skipped, opt.num_steps) == (2, 1)


def test_growth_after_the_interval_and_not_beyond_float32() -> None:
    model = Scale()
    opt, scaler = optim.SGD([model], lr=0.0), mt.LossScaler(2.0**126, growth_interval=3)
    scales = []
    for _ in range(7):
        opt.zero_grad()
        scaler.backward(model, 1e-3)
        scaler.step(opt)
        scales.append(scaler.scale)
    assert scales == [2.0**126] * 2 + [2.0**127] * 5
    assert scaler.state_dict()["_growth_tracker"] == 1


def test_clipping_without_unscaling() -> None:
    model, opt, scaler = trio(dtype=jnp.float16)
    x = jnp.asarray(X, jnp.float16)
    before = np.array(model.weight, np.float32)
    scaler.backward(loss_fn, model, x)
    with pytest.raises(ValueError, match=r"the gradient of 0\.weight is float16.*clip_grad_norm\(opt, max_norm \* sca"):
        scaler.unscale(opt)
    mt.clip_grad_norm(opt, 0.5 * scaler.scale)
    scaler.step(opt)
    moved = [before - np.array(model.weight, np.float32), np.array(model.bias, np.float32)]
    assert 0.0 < np.linalg.norm(moved[0]) <= 0.0505


# -- what else it must do ----------------------------------------------------------------------------------------------


def test_two_optimizers_of_one_loss() -> None:
    one, two = Scale(2.0), Scale(3.0)
    opts, scaler = (optim.SGD([one], lr=0.1), optim.SGD([two], lr=0.1)), mt.LossScaler(8.0, growth_interval=1)
    scaler.backward(lambda x: one(two(x)), 1.0)
    scaler.step(*opts)
    assert_allclose([one.weight, two.weight], [1.7, 2.8], rtol=1e-6)
    for opt in opts:
        opt.zero_grad()
    scaler.backward(lambda x: one(1.0) + two(x), np.inf)
    scaler.unscale(*opts)
    scaler.step(*reversed(opts))
    assert_allclose([one.weight, two.weight], [1.7, 2.8], rtol=1e-6)
    assert (scaler.scale, scaler.skipped) == (8.0, 1)


@pytest.mark.slow
def test_losses_of_all_kinds_of_functions() -> None:
    model, opt, scaler = trio()

    class Trainer:
        def loss(self, x: Any, weight: Any = 1.0) -> Any:
            return loss_fn(model, x) * weight

    class Loss(mt.Module):
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def forward(self, x: Any) -> Any:
            return loss_fn(self.inner, x)

    expected = mt.grad(loss_fn)(model, X)
    for fn in (lambda x: loss_fn(model, x), Trainer().loss, Loss(model), Loss(model).forward, mt.jit(Trainer().loss)):
        model.zero_grad()
        loss = scaler.backward(fn, X)
        assert_allclose(loss, loss_fn(model, X), rtol=1e-6)
        assert_allclose(model.grads()[0], expected.weight * scaler.scale, rtol=1e-5)
    assert_allclose(scaler.backward(Trainer().loss, X, weight=2.0), 2 * loss, rtol=1e-6)
    loss, aux = scaler.backward(
        lambda x: (loss_fn(model, x), {"model": model, "name": "a", "sum": x.sum()}), X, has_aux=True
    )
    assert aux["model"] is model and aux["name"] == "a" and loss.shape == ()


def test_other_numbers_and_objects_compile_nothing() -> None:
    def step(model: Any, opt: Any, scaler: Any) -> None:
        opt.zero_grad()
        scaler.backward(loss_fn, model, X)
        scaler.step(opt)

    trios = [trio() for _ in range(8)]
    for _ in range(2):
        step(*trios[0])
    other = mt.LossScaler(8.0, growth_factor=4.0, growth_interval=2)
    with compilations() as programs:
        for model, opt, _ in trios:
            step(model, opt, other)
    assert not programs


@pytest.mark.slow
def test_many_models_are_no_reason_for_a_warning() -> None:
    scaler = small()
    for size in range(1, 8):
        model = Scale(np.ones(size, np.float32))
        model.accumulate([jnp.ones(size)])
        scaler.step(mt.Optimizer([model]))


def test_nothing_is_kept_alive() -> None:
    scaler = small()

    def run() -> Any:
        model, opt, _ = trio()

        def closed(x: Any) -> Any:
            return loss_fn(model, x)

        for _ in range(2):
            opt.zero_grad()
            scaler.backward(closed, X)
            scaler.unscale(opt)
            scaler.step(opt)
        return [weakref.ref(obj) for obj in (model, opt, closed, model._cells["weight"])]

    dead = run()
    gc.collect()
    assert [ref() for ref in dead] == [None] * 4


def test_gradients_stay_scaled_and_what_was_read_stays() -> None:
    model, opt, scaler = trio()
    scaler.backward(loss_fn, model, X)
    weight, grad = model.weight, model.grads()[0]
    before = np.array(weight), np.array(grad)
    scaler.step(opt)
    scaler.unscale(opt)
    assert_array_equal(weight, before[0])
    assert_array_equal(grad, before[1])
    assert_allclose(model.grads()[0] * 1024, grad, rtol=1e-6)


def test_used_up_gradients_are_that_error() -> None:
    model, opt, scaler = trio()
    mt.jit(train_step)(model, opt, scaler, X)
    before = everything(model, opt), scaler.state_dict()
    with pytest.raises(RuntimeError, match="used up there"):
        scaler.step(opt)
    assert_unchanged(before[0], model, opt)
    assert scaler.state_dict() == before[1]


def test_a_failing_loss_changes_nothing() -> None:
    model, opt, scaler = trio()

    def broken(x: Any) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        scaler.backward(broken, X)
    with pytest.raises(mt.TraceError, match="the scale of a LossScaler was changed inside a JAX transform"):
        jax.jit(lambda opt: scaler.step(opt))(opt)
    with pytest.warns(mt.DroppedUpdateWarning, match="LossScaler was changed inside a JAX transform"):
        jax.jit(lambda opt, scaler: (scaler.backward(loss_fn, opt.modules[0], X), scaler.step(opt), opt)[2])(
            opt, scaler
        )
        gc.collect()
    assert scaler.state_dict() == small().state_dict()


@pytest.mark.slow
def test_an_ensemble() -> None:
    def made(value: Any) -> Any:
        model = Scale(value)
        return optim.SGD([model], lr=0.1), mt.LossScaler(8.0)

    def one(opt: Any, scaler: Any, x: Any) -> Any:
        scaler.backward(lambda model, x: model(x), opt.modules[0], x)
        scaler.step(opt)
        return opt, scaler

    opts, scalers = jax.vmap(one)(*jax.vmap(made)(jnp.ones(2)), jnp.array([1.0, np.inf]))
    assert_allclose(opts.modules[0].weight, [0.9, 1.0])
    assert_array_equal(scalers.scale, [8.0, 4.0])
    assert_array_equal(scalers.skipped, [0, 1])


def test_state_and_copies() -> None:
    model, opt, scaler = trio()
    for x in PATTERN[:4]:
        train_step(model, opt, scaler, x)
    loaded = mt.LossScaler()
    loaded.load_state_dict(scaler.state_dict())
    leaves, tree = jax.tree.flatten(scaler)
    twins = [loaded, copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler)), jax.tree.unflatten(tree, leaves)]
    twins[0].scale = scaler.scale
    expected: Any = None
    for twin in [*twins, scaler]:
        other = copy.deepcopy(opt)
        train_step(other.modules[0], other, twin, X)
        expected = expected or twin.state_dict()
        assert twin.state_dict() == expected
    assert expected == {
        "scale": 8192.0,
        "growth_factor": 4.0,
        "backoff_factor": 0.5,
        "growth_interval": 2,
        "_growth_tracker": 0,
        "skipped": 1,
    }
    assert repr(scaler) == "LossScaler(scale=8192.0, growth_factor=4.0, backoff_factor=0.5, growth_interval=2)"
    assert (scaler.growth_factor, scaler.backoff_factor, scaler.growth_interval) == (4.0, 0.5, 2)


# -- bad input ---------------------------------------------------------------------------------------------------------


class Own(optim.SGD):
    def step(self) -> None:
        """Something else."""


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda s, o: mt.LossScaler(0.0), ValueError, "init_scale must be a finite number > 0; got 0.0"),
        (lambda s, o: mt.LossScaler(1e39), ValueError, "init_scale must be a finite number > 0"),
        (lambda s, o: mt.LossScaler("1"), ValueError, "init_scale must be .* got '1'"),
        (
            lambda s, o: mt.LossScaler(growth_factor=1.0),
            ValueError,
            "growth_factor must be a finite number > 1; got 1.0",
        ),
        (lambda s, o: mt.LossScaler(backoff_factor=1.0), ValueError, r"backoff_factor must be .* in \(0, 1\); got 1.0"),
        (
            lambda s, o: mt.LossScaler(growth_interval=0),
            ValueError,
            r"growth_interval must be an integer in \[1, 2147483647\]; got 0",
        ),
        (lambda s, o: mt.LossScaler(growth_interval=1.5), ValueError, "growth_interval must be an integer"),
        (lambda s, o: setattr(s, "scale", -1.0), ValueError, "scale must be a finite number > 0; got -1.0"),
        (lambda s, o: s.step(), ValueError, "LossScaler.step takes one or more optimizers; it was given none"),
        (lambda s, o: s.step(o.modules[0]), TypeError, r"LossScaler.step takes optimizers; got Linear"),
        (lambda s, o: s.unscale(o, o), ValueError, "LossScaler.unscale was given an optimizer twice"),
        (lambda s, o: s.step(Own([nn.Linear(1, 1)])), TypeError, r"Own has a step\(\) of its own"),
        (lambda s, o: (s.unscale(o), s.unscale(o)), RuntimeError, r"unscale\(\) was called twice before step\(\)"),
        (
            lambda s, o: (s.unscale(o), s.step(o, optim.SGD([nn.Linear(1, 1)]))),
            RuntimeError,
            r"step\(\) was called with other optimizers than unscale\(\)",
        ),
        (lambda s, o: s.backward(lambda: o.modules[0](X)), TypeError, r"<lambda> must return a scalar loss"),
        (
            lambda s, o: s.backward(lambda: 1, has_aux=True),
            TypeError,
            r"with has_aux=True, <lambda> must return \(loss",
        ),
        (lambda s, o: s.backward(lambda: jnp.float32(1)), ValueError, "<lambda> uses no trainable parameter"),
        (
            lambda s, o: s.load_state_dict({"scale": 1.0, "growth": 2.0}),
            ValueError,
            "nothing was loaded: missing: growth_factor, missing: backoff_factor, .* unexpected: growth",
        ),
        (lambda s, o: s.load_state_dict(s.state_dict() | {"scale": -1.0}), ValueError, "scale must be"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], match: str) -> None:
    model, opt, scaler = trio()
    model.accumulate(model.parameters()[:])
    before = everything(model, opt)
    with pytest.raises(error, match=match):
        call(scaler, opt)
    assert_unchanged(before, model, opt)
    assert scaler.state_dict() == small().state_dict()
    with pytest.raises(TypeError, match="holds modules of NumPy arrays"):
        scaler.step(optim.SGD([Foreign()]))


class Foreign:
    def __init__(self) -> None:
        self.array = np.ones(2, np.float32)

    def parameters(self) -> list[Any]:
        return [self.array]

    def grads(self) -> list[Any]:
        return [self.array]
