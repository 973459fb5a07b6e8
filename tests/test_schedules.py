"""`optim.schedules` against torch, optax and closed forms; as values; in optimizers. `ReduceOnPlateau` against torch."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from oracle import says, torch
from training import X, Y, pair, step

import minitorch_jax as mt
from minitorch_jax import optim
from minitorch_jax.optim import schedules

MILLION = 1_000_000


def staircase(t: Any) -> Any:
    """Anyone's schedule: a function, of no class of ours."""
    return jnp.where(t >= 3, 0.25, 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Against torch


def torch_rates(make: Callable[[Any, Any], Any], lr: float, num_steps: int) -> list[float]:
    """The rates that a scheduler of torch sets at steps 0, 1, ..."""
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(opt, torch.optim.lr_scheduler)
    rates = [float(opt.param_groups[0]["lr"])]
    for _ in range(num_steps - 1):
        opt.step()
        scheduler.step()
        rates.append(float(opt.param_groups[0]["lr"]))
    return rates


def sequence(opt: Any, lib: Any, make: Callable[[Any], Any], num_steps: int, factor: float) -> Any:
    first = lib.LinearLR(opt, start_factor=factor, total_iters=num_steps)
    return lib.SequentialLR(opt, [first, make(opt)], [num_steps])


def one_cycle_pair(total_steps: int, **options: Any) -> tuple[Any, Callable[[Any, Any], Any], int]:
    ours = schedules.one_cycle(0.7, total_steps, **options)
    make = lambda opt, lib: lib.OneCycleLR(opt, 0.7, total_steps=total_steps, cycle_momentum=False, **options)
    return ours, make, total_steps


# ours, torch's, and for how many steps they are the same
TORCH: dict[str, tuple[Any, Callable[[Any, Any], Any], int]] = {
    "constant": (schedules.constant(0.7), lambda opt, lib: lib.ConstantLR(opt, 1.0), 5),
    "step": (schedules.step(0.7, 4), lambda opt, lib: lib.StepLR(opt, 4), 30),
    "step, gamma": (schedules.step(0.7, 7, 0.5), lambda opt, lib: lib.StepLR(opt, 7, 0.5), 30),
    "multistep": (schedules.multistep(0.7, [3, 4, 11]), lambda opt, lib: lib.MultiStepLR(opt, [3, 4, 11]), 20),
    "multistep, one": (schedules.multistep(0.7, [3], 0.5), lambda opt, lib: lib.MultiStepLR(opt, [3], 0.5), 8),
    "multistep, none": (schedules.multistep(0.7, []), lambda opt, lib: lib.MultiStepLR(opt, []), 5),
    "exponential": (schedules.exponential(0.7, 0.9), lambda opt, lib: lib.ExponentialLR(opt, 0.9), 50),
    "exponential, growing": (schedules.exponential(0.7, 1.1), lambda opt, lib: lib.ExponentialLR(opt, 1.1), 50),
    "cosine": (schedules.cosine(0.7, 30), lambda opt, lib: lib.CosineAnnealingLR(opt, 30), 31),
    "cosine, eta_min": (schedules.cosine(0.7, 9, 0.2), lambda opt, lib: lib.CosineAnnealingLR(opt, 9, 0.2), 10),
    "cosine, upwards": (schedules.cosine(0.7, 9, 0.9), lambda opt, lib: lib.CosineAnnealingLR(opt, 9, 0.9), 10),
    "cosine, one": (schedules.cosine(0.7, 1), lambda opt, lib: lib.CosineAnnealingLR(opt, 1), 2),
    "cosine_restarts": (
        schedules.cosine_restarts(0.7, 7),
        lambda opt, lib: lib.CosineAnnealingWarmRestarts(opt, 7),
        40,
    ),
    "cosine_restarts, t_mult": (
        schedules.cosine_restarts(0.7, 3, 2, 0.1),
        lambda opt, lib: lib.CosineAnnealingWarmRestarts(opt, 3, 2, 0.1),
        100,
    ),
    "cosine_restarts, t_mult=3": (
        schedules.cosine_restarts(0.7, 1, t_mult=3),
        lambda opt, lib: lib.CosineAnnealingWarmRestarts(opt, 1, 3),
        100,
    ),
    "polynomial": (schedules.polynomial(0.7, 20), lambda opt, lib: lib.PolynomialLR(opt, 20), 30),
    "polynomial, power": (schedules.polynomial(0.7, 20, 2.5), lambda opt, lib: lib.PolynomialLR(opt, 20, 2.5), 30),
    "linear": (schedules.linear(0.35, 0.14, 8), lambda opt, lib: lib.LinearLR(opt, 0.5, 0.2, 8), 20),
    "warmup": (schedules.warmup(0.7, 6, 1 / 3), lambda opt, lib: lib.LinearLR(opt, total_iters=6), 12),
    "warmup, cosine": (
        schedules.warmup(schedules.cosine(0.7, 20, 0.1), 6, start_factor=0.25),
        lambda opt, lib: sequence(opt, lib, lambda opt: lib.CosineAnnealingLR(opt, 20, 0.1), 6, 0.25),
        26,
    ),
    "join": (
        schedules.join([schedules.warmup(0.7, 6, 0.5), schedules.step(0.7, 4, 0.3)], [6]),
        lambda opt, lib: sequence(opt, lib, lambda opt: lib.StepLR(opt, 4, 0.3), 6, 0.5),
        26,
    ),
    "one_cycle": one_cycle_pair(50),
    "one_cycle, linear": one_cycle_pair(50, anneal_strategy="linear"),
    "one_cycle, three phases": one_cycle_pair(50, three_phase=True, div_factor=10.0, final_div_factor=100.0),
    "one_cycle, three linear": one_cycle_pair(37, three_phase=True, anneal_strategy="linear", pct_start=0.41),
    "one_cycle, late": one_cycle_pair(23, pct_start=0.9, three_phase=True),
    "one_cycle, only up": one_cycle_pair(10, pct_start=1.0),
    "one_cycle, only down": one_cycle_pair(10, pct_start=0.0),
    "one_cycle, early": one_cycle_pair(3, pct_start=0.2),
    "one_cycle, short": one_cycle_pair(1),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", TORCH)
def test_against_torch(name: str) -> None:
    ours, make, num_steps = TORCH[name]
    expected = torch_rates(make, 0.7, num_steps)
    assert_allclose([ours(t) for t in range(num_steps)], expected, rtol=1e-9, atol=1e-15)


def test_cosine_and_one_cycle_stay_where_they_end() -> None:
    assert schedules.cosine(0.7, 9, 0.2)(9) == schedules.cosine(0.7, 9, 0.2)(14) == 0.2
    cycle = schedules.one_cycle(0.5, 10, div_factor=5.0, final_div_factor=10.0)
    assert_allclose([cycle(9), cycle(10), cycle(1000)], 0.01, rtol=1e-12)


def test_one_cycle_whose_peak_is_its_first_step() -> None:
    assert schedules.one_cycle(0.5, 10, pct_start=0.1)(0) == 0.5  # where torch divides by zero


# ---------------------------------------------------------------------------------------------------------------------
# Against optax


def optax_pairs(optax: Any) -> dict[str, tuple[Any, Any]]:
    parts = [optax.constant_schedule(0.3), optax.linear_schedule(0.2, 0.1, 5), optax.cosine_decay_schedule(0.4, 10)]
    mine = [0.3, schedules.linear(0.2, 0.1, 5), schedules.cosine(0.4, 10)]
    return {
        "piecewise": (
            schedules.piecewise([1.0, 0.5, 0.1], [4, 9]),
            optax.piecewise_constant_schedule(1.0, {4: 0.5, 9: 0.2}),
        ),
        "linear": (schedules.linear(0.2, 0.9, 7), optax.linear_schedule(0.2, 0.9, 7)),
        "join": (schedules.join(mine, [3, 8]), optax.join_schedules(parts, [3, 8])),
        "warmup": (
            schedules.warmup(schedules.cosine(0.4, 12, 0.1), 5),
            optax.warmup_cosine_decay_schedule(0.0, 0.4, 5, 17, 0.1),
        ),
        "warmup of optax's": (
            schedules.warmup(optax.exponential_decay(0.5, 3, 0.9), 5, 0.2),
            optax.warmup_exponential_decay_schedule(0.1, 0.5, 5, 3, 0.9),
        ),
        "join of optax's": (schedules.join(parts, [3, 8]), optax.join_schedules(parts, [3, 8])),
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_against_optax() -> None:
    optax = pytest.importorskip("optax")
    steps = np.arange(20, dtype=np.int32)
    with jax.numpy_dtype_promotion("standard"):
        pairs = optax_pairs(optax)
        all_of_them = lambda t: {name: [schedule(t) for schedule in both] for name, both in pairs.items()}
        for name, (mine, expected) in jax.jit(jax.vmap(all_of_them))(jnp.asarray(steps)).items():
            assert_allclose(mine, expected, rtol=1e-5, atol=1e-7, err_msg=name)
            assert_allclose([pairs[name][0](int(t)) for t in steps], expected, rtol=1e-5, atol=1e-7, err_msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# In float32, against closed forms in float64


def cosine_form(t: int, n: int, lr: float, low: float) -> float:
    return low + (lr - low) * math.sin(0.5 * math.pi * (1 - t / n)) ** 2 if t < n else low


def restarts_form(t: int, length: int, mult: int) -> float:
    while t >= length:
        t, length = t - length, length * mult
    return 0.7 * math.cos(0.5 * math.pi * t / length) ** 2


LONG: dict[str, tuple[Any, Callable[[int], float]]] = {
    "constant": (schedules.constant(0.7), lambda t: 0.7),
    "step": (schedules.step(0.7, 70_001), lambda t: 0.7 * 0.1 ** (t // 70_001)),
    "step, often": (schedules.step(0.7, 3, 0.9999), lambda t: 0.7 * 0.9999 ** (t // 3)),
    "multistep": (
        schedules.multistep(0.7, [2, 500_000, 999_999]),
        lambda t: 0.7 * 0.1 ** sum(t >= m for m in (2, 500_000, 999_999)),
    ),
    "exponential": (schedules.exponential(0.7, 0.99999), lambda t: 0.7 * 0.99999**t),
    "exponential, growing": (schedules.exponential(1e-8, 1.00001), lambda t: 1e-8 * 1.00001**t),
    "cosine": (schedules.cosine(0.7, MILLION), lambda t: cosine_form(t, MILLION, 0.7, 0.0)),
    "cosine, eta_min": (schedules.cosine(0.7, MILLION, 1e-7), lambda t: cosine_form(t, MILLION, 0.7, 1e-7)),
    "cosine, upwards": (schedules.cosine(0.0, MILLION, 0.7), lambda t: 0.7 - cosine_form(t, MILLION, 0.7, 0.0)),
    "cosine_restarts": (schedules.cosine_restarts(0.7, 333_333), lambda t: restarts_form(t, 333_333, 1)),
    "cosine_restarts, t_mult": (schedules.cosine_restarts(0.7, 1000, 2), lambda t: restarts_form(t, 1000, 2)),
    "cosine_restarts, t_mult=1000": (schedules.cosine_restarts(0.7, 999, 1000), lambda t: restarts_form(t, 999, 1000)),
    "polynomial": (schedules.polynomial(0.7, MILLION, 2), lambda t: 0.7 * max(1 - t / MILLION, 0.0) ** 2),
    "polynomial, line": (schedules.polynomial(0.7, MILLION), lambda t: 0.7 * max(1 - t / MILLION, 0.0)),
    "linear": (schedules.linear(0.7, 1e-9, MILLION), lambda t: 0.7 + (1e-9 - 0.7) * min(t / MILLION, 1.0)),
    "warmup": (
        schedules.warmup(schedules.cosine(0.7, MILLION), 1000, 1e-3),
        lambda t: cosine_form(max(t - 1000, 0), MILLION, 0.7, 0.0) * min(1e-3 + (1 - 1e-3) * t / 1000, 1.0),
    ),
    "warmup, none": (schedules.warmup(staircase, 0), staircase),
    "warmup, long": (schedules.warmup(0.7, MILLION), lambda t: 0.7 * min(t / MILLION, 1.0)),
    "one_cycle": (
        schedules.one_cycle(0.7, MILLION),
        lambda t: cosine_form(t - 299_999, 700_000, 0.7, 0.7 / 25e4) if t >= 299_999 else None,
    ),
    "join": (
        schedules.join([0.2, schedules.cosine(0.7, 999_000)], [1000]),
        lambda t: 0.2 if t < 1000 else cosine_form(t - 1000, 999_000, 0.7, 0.0),
    ),
    "piecewise": (
        schedules.piecewise([0.7, 0.3, 0.1], [1, MILLION]),
        lambda t: 0.7 if t < 1 else 0.3 if t < MILLION else 0.1,
    ),
    "inverse_sqrt": (
        schedules.inverse_sqrt(0.7, 4000),
        lambda t: 0.7 * min(t / 4000, math.sqrt(4000 / max(t, 1))),
    ),
}


def test_every_schedule_is_here() -> None:
    classes = [value for value in vars(schedules).values() if getattr(value, "__module__", "") == schedules.__name__]
    names = {value.__name__ for value in classes if not value.__name__.startswith("_")}
    assert names == {name.partition(",")[0] for name in LONG}
    assert len(names) == 13


NEAR = [0, 1, 2, 3, 999, 1000, 1001, 299_999, 333_332, 333_333, 499_999, 500_000, 500_001, 999_900]
STEPS = np.array([*NEAR, *range(MILLION - 20, MILLION + 2)], np.int32)


def rates_of_all(t: Any) -> dict[str, Any]:
    return {name: ours(t) for name, (ours, _) in LONG.items()}


@functools.cache
def compiled_rates() -> dict[str, Any]:
    return jax.jit(jax.vmap(rates_of_all))(jnp.asarray(STEPS))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", LONG)
def test_float32_keeps_five_digits_for_a_million_steps(name: str) -> None:
    ours, form = LONG[name]
    known = [i for i, t in enumerate(STEPS) if form(int(t)) is not None]
    expected = np.array([form(int(t)) for t in STEPS[known]])
    tiny = 2e-16 * 0.7  # what the closed forms themselves lose to cancellation
    exact = [ours(int(t)) for t in STEPS]
    assert {type(rate) for rate in exact} == {float}
    assert_allclose(np.array(exact)[known], expected, rtol=1e-9, atol=tiny)
    for rates in (compiled_rates()[name], ours(jnp.asarray(STEPS))):
        assert rates.dtype == jnp.float32
        assert rates.shape == STEPS.shape
        assert_allclose(rates, exact, rtol=1e-5, atol=0)
    rates = ours(STEPS)
    assert isinstance(rates, np.ndarray)
    assert rates.dtype == np.float64
    assert_array_equal(rates, exact)


@pytest.mark.one_in(9)
@pytest.mark.parametrize("t", [0, 5, 100])
def test_one_step_at_a_time(t: int) -> None:
    compiled = jax.jit(rates_of_all)
    by_type = [rates_of_all(kind(t)) for kind in (np.int64, np.uint8, np.array)]
    traced = [compiled(kind(t)) for kind in (int, np.int32, jnp.int32, jnp.int16)]
    for name, (ours, _) in LONG.items():
        exact = ours(t)
        assert type(exact) is float, name
        for rates in by_type:
            assert type(rates[name]) is float
            assert rates[name] == exact
        for rates in traced:
            assert rates[name].dtype == jnp.float32
            assert rates[name].shape == ()
            assert_allclose(rates[name], exact, rtol=1e-5, atol=0, err_msg=name)


def test_each_may_be_compiled_by_itself() -> None:
    ours = schedules.warmup(schedules.cosine(0.5, 10), 4)
    assert_allclose(jax.jit(ours)(6), ours(6), rtol=1e-6)
    assert_allclose(jax.jit(jax.vmap(ours))(jnp.arange(16)), [ours(t) for t in range(16)], rtol=1e-6)
    assert ours(jnp.int32(2)).dtype == jnp.float32


@pytest.mark.slow
def test_float64_where_jax_has_it() -> None:
    with jax.enable_x64(True):
        for t in (jnp.int32(700), jnp.int64(999_999)):
            rates = jax.jit(rates_of_all)(t)
            for name, (ours, _) in LONG.items():
                assert rates[name].dtype == jnp.float64
                assert_allclose(rates[name], ours(int(t)), rtol=1e-9, err_msg=name)


def test_restarts_up_to_the_last_step_count() -> None:
    ours, last = schedules.cosine_restarts(0.7, 1000, 2), 2**31 - 1
    for t in (2**30, 2_097_151_999, 2_097_152_000, last):
        assert_allclose(ours(t), restarts_form(t, 1000, 2), rtol=1e-9, atol=1e-15)
        assert_allclose(jax.jit(ours)(jnp.int32(t)), ours(t), rtol=1e-5)


def test_a_rate_too_large_or_small_is_infinite_or_zero() -> None:
    assert schedules.exponential(1.0, 2.0)(10_000) == math.inf
    assert schedules.exponential(1.0, 0.5)(10_000) == 0.0
    assert float(jax.jit(schedules.exponential(1.0, 2.0))(10_000)) == math.inf


# ---------------------------------------------------------------------------------------------------------------------
# As values

MADE: dict[str, Callable[[], Any]] = {
    "constant": lambda: schedules.constant(0.1),
    "step": lambda: schedules.step(0.1, 30),
    "multistep": lambda: schedules.multistep(0.1, [3, 8], gamma=0.5),
    "exponential": lambda: schedules.exponential(0.1, 0.99),
    "cosine": lambda: schedules.cosine(0.1, 100, eta_min=0.01),
    "cosine_restarts": lambda: schedules.cosine_restarts(0.1, 10, t_mult=2),
    "polynomial": lambda: schedules.polynomial(0.1, 100, power=2),
    "linear": lambda: schedules.linear(0.1, 0.0, 100),
    "warmup": lambda: schedules.warmup(schedules.cosine(0.1, 100), 5, start_factor=0.2),
    "one_cycle": lambda: schedules.one_cycle(0.1, 100, anneal_strategy="linear", three_phase=True),
    "join": lambda: schedules.join([0.1, schedules.step(0.1, 30)], [5]),
    "piecewise": lambda: schedules.piecewise([0.1, 0.01], [5]),
    "inverse_sqrt": lambda: schedules.inverse_sqrt(0.1, 4000),
}


@pytest.mark.parametrize("name", MADE)
def test_schedules_are_values(name: str) -> None:
    one, other = MADE[name](), MADE[name]()
    assert one is not other
    copies = [other, pickle.loads(pickle.dumps(one)), copy.deepcopy(one), copy.copy(one)]
    copies.append(eval(repr(one), dict(vars(schedules))))
    assert repr(one).startswith(f"{name}(")
    for same in copies:
        assert same == one
        assert hash(same) == hash(one)
        assert repr(same) == repr(one)
        assert same(7) == one(7)
    different = [made() for made in MADE.values() if made is not MADE[name]]
    assert one not in different
    assert len({one, *different}) == len(MADE)
    with pytest.raises(AttributeError, match="cannot assign"):
        one.lr = 0.5


def test_reprs() -> None:
    assert repr(MADE["cosine"]()) == "cosine(lr=0.1, num_steps=100, eta_min=0.01)"
    assert repr(MADE["join"]()) == (
        "join(schedules=(constant(value=0.1), step(lr=0.1, step_size=30, gamma=0.1)), boundaries=(5,))"
    )
    model, opt = pair(lr=MADE["multistep"]())
    assert "lr=multistep(lr=0.1, milestones=(3, 8), gamma=0.5)" in repr(opt)


def test_the_type_of_a_number_makes_no_difference() -> None:
    for given in (np.float64(0.5), np.float32(0.5), jnp.float32(0.5)):
        ours = schedules.cosine(given, np.int32(10), 0)
        assert (ours, hash(ours)) == (schedules.cosine(0.5, 10), hash(schedules.cosine(0.5, 10)))
        assert repr(ours) == "cosine(lr=0.5, num_steps=10, eta_min=0.0)"
    assert schedules.multistep(1, np.array([3, 8])) == schedules.multistep(1.0, (3, 8))
    assert schedules.piecewise(jnp.array([1.0, 0.5]), [np.int64(3)]) == schedules.piecewise((1, 0.5), (3,))
    assert schedules.warmup(0.5, 3) == schedules.warmup(schedules.constant(0.5), 3)


# ---------------------------------------------------------------------------------------------------------------------
# In optimizers


@functools.cache
def by_hand(name: str, num_steps: int) -> list[np.ndarray]:
    """The weights after each step of a loop that assigns the rates itself."""
    model, opt = pair(lr=0.0)
    weights = []
    for t in range(num_steps):
        opt.lr = MADE[name]()(t)
        step(model, opt, X, Y)
        weights.append(np.array(model.weight))
    return weights


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", ["warmup", "one_cycle", "join", "multistep", "cosine_restarts"])
def test_training_is_as_with_the_numbers_assigned_by_hand(name: str) -> None:
    expected = by_hand(name, 8)
    eager, compiled = pair(lr=MADE[name]()), pair(lr=MADE[name]())
    train_step = mt.jit(step)
    for t, weight in enumerate(expected):
        assert eager[1].lr == compiled[1].lr == MADE[name]()(t)
        step(*eager, X, Y)
        train_step(*compiled, X, Y)
        assert_allclose(eager[0].weight, weight, rtol=1e-5, atol=1e-7)
        assert_allclose(compiled[0].weight, weight, rtol=1e-5, atol=1e-7)
    assert train_step.num_compiles == 1
    assert eager[1].num_steps == 8


def test_equal_schedules_share_one_program() -> None:
    train_step = mt.jit(step)
    for _ in range(3):
        train_step(*pair(lr=schedules.warmup(schedules.cosine(0.1, 50), 5)), X, Y)
    assert train_step.num_compiles == 1
    train_step(*pair(lr=schedules.warmup(schedules.cosine(0.1, 51), 5)), X, Y)
    assert train_step.num_compiles == 2


def test_equal_schedules_share_the_eager_update() -> None:
    pairs = [pair(lr=schedules.linear(0.123, 0.0, 50)) for _ in range(2)]
    for model, opt in pairs:
        step(model, opt, X, Y)
    assert len({program for _, opt in pairs for program in programs(opt)}) == 1


def programs(opt: Any) -> list[Any]:
    """Those that its steps have run outside of traces."""
    return [binding.program for binding in opt._plan.outside(opt)._walk.bindings.values()]


def test_an_assigned_equal_schedule_compiles_nothing_new() -> None:
    model, opt = pair(lr=MADE["cosine"]())
    train_step = mt.jit(step)
    train_step(model, opt, X, Y)
    opt.lr = MADE["cosine"]()
    train_step(model, opt, X, Y)
    assert train_step.num_compiles == 1
    assert opt.lr == MADE["cosine"]()(2)


def test_a_saved_optimizer_goes_on_with_its_schedule() -> None:
    model, opt = pair(lr=MADE["warmup"]())
    for _ in range(3):
        step(model, opt, X, Y)
    again_model, again = pickle.loads(pickle.dumps((model, opt)))
    other_model, other = pair(lr=0.3)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(opt.state_dict())
    for resumed_model, resumed in ((again_model, again), (other_model, other)):
        assert resumed.lr == MADE["warmup"]()(3)
        step(resumed_model, resumed, X, Y)
    assert_array_equal(again_model.weight, other_model.weight)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_optax_schedules_in_the_same_place() -> None:
    optax = pytest.importorskip("optax")
    with jax.numpy_dtype_promotion("standard"):
        theirs = optax.warmup_cosine_decay_schedule(0.0, 0.1, warmup_steps=3, decay_steps=8)
        pairs = [
            pair(lr=lr)
            for lr in (theirs, schedules.warmup(schedules.cosine(0.1, 5), 3), schedules.join([theirs, 0.1], [100]))
        ]
        for _ in range(6):
            assert_allclose([opt.lr for _, opt in pairs], pairs[0][1].lr, rtol=1e-6, atol=1e-8)
            for model, opt in pairs:
                step(model, opt, X, Y)
        for model, _ in pairs[1:]:
            assert_allclose(model.weight, pairs[0][0].weight, rtol=1e-5, atol=1e-7)


def test_scan() -> None:
    model, opt = pair(lr=MADE["one_cycle"]())
    mt.scan(functools.partial(step, model, opt), np.stack([X] * 8), np.stack([Y] * 8))
    assert_allclose(model.weight, by_hand("one_cycle", 8)[-1], rtol=1e-5, atol=1e-7)
    assert opt.lr == MADE["one_cycle"]()(8)


# ---------------------------------------------------------------------------------------------------------------------
# Bad arguments

S = schedules
COUNT = "must be an integer in [1, 2147483647]; got "
BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: S.constant(-0.1), "constant: value must be a finite number >= 0; got -0.1"),
    (lambda: S.constant(math.nan), "constant: value must be a finite number >= 0; got nan"),
    (lambda: S.constant(math.inf), "constant: value must be a finite number >= 0; got inf"),
    (lambda: S.constant("0.1"), "constant: value must be a finite number >= 0; got '0.1'"),
    (lambda: S.constant(True), "constant: value must be a finite number >= 0; got True"),
    (lambda: S.constant(None), "constant: value must be a finite number >= 0; got None"),
    (lambda: S.constant([0.1]), "constant: value must be a finite number >= 0; got [0.1]"),
    (lambda: S.constant(10**400), "constant: value must be a finite number >= 0; got 1000"),
    (lambda: S.constant(1e39), "constant: value must be a finite number >= 0; got 1e+39"),
    (lambda: S.step(-1, 10), "step: lr must be a finite number >= 0; got -1"),
    (lambda: S.step(0.1, 0), f"step: step_size {COUNT}0"),
    (lambda: S.step(0.1, 2.0), f"step: step_size {COUNT}2.0"),
    (lambda: S.step(0.1, True), f"step: step_size {COUNT}True"),
    (lambda: S.step(0.1, 10, 0), "step: gamma must be a finite number > 0; got 0"),
    (lambda: S.multistep(0.1, [5, 5]), "multistep: milestones must increase; got [5, 5]"),
    (lambda: S.multistep(0.1, [5, 2.5]), "multistep: milestones[1] must be an integer in [0, 2147483647]; got 2.5"),
    (lambda: S.multistep(0.1, 5), "multistep: milestones must be a list; got 5"),
    (lambda: S.multistep(0.1, "5"), "multistep: milestones must be a list; got '5'"),
    (lambda: S.exponential(0.1, -0.9), "exponential: gamma must be a finite number > 0; got -0.9"),
    (lambda: S.cosine(0.1, 0), f"cosine: num_steps {COUNT}0"),
    (lambda: S.cosine(0.1, 2**31), f"cosine: num_steps {COUNT}2147483648"),
    (lambda: S.cosine(0.1, 10, -1e-3), "cosine: eta_min must be a finite number >= 0; got -0.001"),
    (lambda: S.cosine_restarts(0.1, 0), f"cosine_restarts: t_0 {COUNT}0"),
    (lambda: S.cosine_restarts(0.1, 5, 1.5), f"cosine_restarts: t_mult {COUNT}1.5"),
    (lambda: S.polynomial(0.1, -3), f"polynomial: total_iters {COUNT}-3"),
    (lambda: S.polynomial(0.1, 3, 0), "polynomial: power must be a finite number > 0; got 0"),
    (lambda: S.linear(0.1, -0.1, 3), "linear: end must be a finite number >= 0; got -0.1"),
    (lambda: S.linear(0.1, 0.1, None), f"linear: num_steps {COUNT}None"),
    (lambda: S.warmup("cosine", 3), "warmup: schedule must be a finite number >= 0; got 'cosine'"),
    (lambda: S.warmup(0.1, -1), "warmup: num_steps must be an integer in [0, 2147483647]; got -1"),
    (lambda: S.warmup(0.1, 3, 1.5), "warmup: start_factor must be a finite number in [0, 1]; got 1.5"),
    (lambda: S.one_cycle(0.1, 0), f"one_cycle: total_steps {COUNT}0"),
    (lambda: S.one_cycle(0.1, 9, 1.1), "one_cycle: pct_start must be a finite number in [0, 1]; got 1.1"),
    (lambda: S.one_cycle(0.1, 9, anneal_strategy="sin"), "anneal_strategy must be 'cos' or 'linear'; got 'sin'"),
    (lambda: S.one_cycle(0.1, 9, div_factor=0), "one_cycle: div_factor must be a finite number > 0; got 0"),
    (lambda: S.one_cycle(0.1, 9, final_div_factor=0), "one_cycle: final_div_factor must be a finite number > 0"),
    (lambda: S.one_cycle(0.1, 9, three_phase=1), "one_cycle: three_phase must be a bool; got 1"),
    (lambda: S.join([], []), "join: boundaries must be one fewer than what they divide; got 0 for 0"),
    (lambda: S.join([0.1, 0.2], []), "join: boundaries must be one fewer than what they divide; got 0 for 2"),
    (lambda: S.join([0.1, -0.2], [3]), "join: schedules[1] must be a finite number >= 0; got -0.2"),
    (lambda: S.join([0.1, 0.2, 0.3], [3, 2]), "join: boundaries must increase; got [3, 2]"),
    (lambda: S.piecewise([0.1], [3]), "piecewise: boundaries must be one fewer than what they divide; got 1 for 1"),
    (lambda: S.piecewise([0.1, -1], [3]), "piecewise: values[1] must be a finite number >= 0; got -1"),
    (lambda: S.piecewise(0.1, [3]), "piecewise: values must be a list; got 0.1"),
    (lambda: S.inverse_sqrt(0.1, 0), f"inverse_sqrt: warmup_steps {COUNT}0"),
]


@pytest.mark.parametrize("make, message", BAD, ids=[message[:60] for _, message in BAD])
def test_bad_arguments(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_a_part_that_is_no_schedule() -> None:
    with pytest.raises(
        TypeError, match=r"schedule must be a rate or a schedule; got <class .*cosine'>, which is to be"
    ):
        schedules.warmup(schedules.cosine, 5)

    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, t: Any) -> Any:
            return 0.1

    with pytest.raises(TypeError, match=r"join: schedules\[0\] must be hashable, as programs are compiled for it"):
        schedules.join([Unhashable(), 0.1], [5])


def test_a_traced_number_is_no_argument() -> None:
    with pytest.raises(ValueError, match="cosine: lr must be a finite number >= 0; got JitTracer"):
        jax.jit(lambda lr: schedules.cosine(lr, 10)(3))(0.1)


# ---------------------------------------------------------------------------------------------------------------------
# ReduceOnPlateau

PLATEAUS: list[dict[str, Any]] = [
    {},
    {"factor": 0.5, "patience": 2},
    {"factor": 0.5, "patience": 0, "cooldown": 3},
    {"factor": 0.3, "patience": 1, "threshold": 0.05, "cooldown": 1, "min_lr": 0.01},
    {"factor": 0.5, "patience": 1, "threshold_mode": "abs", "threshold": 0.1},
    {"factor": 0.0, "patience": 3},
    {"factor": 0.9, "patience": 0, "eps": 0.05},
]


@pytest.mark.parametrize("kind", ["falling", "noisy", "negative", "with nan"])
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("options", PLATEAUS, ids=str)
def test_plateau_against_torch(options: dict[str, Any], mode: str, kind: str) -> None:
    rng = np.random.default_rng(3)
    metrics = {
        "falling": 1 / (1 + np.arange(60) / 8) + 0.02 * rng.normal(size=60),  # the same numbers on each machine
        "noisy": rng.normal(size=60),
        "negative": -5 - np.log1p(np.arange(60)).round(1),
        "with nan": np.where(np.arange(60) % 7 == 3, np.nan, rng.normal(size=60).cumsum()),
    }[kind]
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.7)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, mode, **options)
    ours = pair(lr=0.7)[1]
    plateau = optim.ReduceOnPlateau(ours, mode, **options)
    for metric in metrics:
        scheduler.step(metric)
        assert plateau.step(metric) is None
        assert ours.lr == theirs.param_groups[0]["lr"]
        for name in ("best", "num_bad_epochs", "cooldown_counter", "last_epoch"):
            assert getattr(plateau, name) == getattr(scheduler, name)


def test_plateau_in_a_training_loop() -> None:
    model, opt = pair(lr=0.5)
    plateau = optim.ReduceOnPlateau(opt, factor=0.5, patience=0)
    train_step = mt.jit(step)
    for metric in (jnp.float32(1.0), np.float32(1.0), np.array(1.0), 1):
        train_step(model, opt, X, Y)
        plateau.step(metric)
    assert opt.lr == 0.0625
    assert train_step.num_compiles == 1


def test_plateau_resumes() -> None:
    metrics = np.random.default_rng(0).normal(size=40)
    first, second = pair(lr=0.7)[1], pair(lr=0.2)[1]
    plateau = optim.ReduceOnPlateau(first, "max", 0.5, patience=2, cooldown=2)
    for metric in metrics[:17]:
        plateau.step(metric)
    resumed = optim.ReduceOnPlateau(second)
    state = pickle.loads(pickle.dumps(plateau.state_dict()))
    assert resumed.load_state_dict(state) is None
    second.load_state_dict(first.state_dict())
    assert resumed.state_dict() == plateau.state_dict()
    for metric in metrics[17:]:
        plateau.step(metric)
        resumed.step(metric)
        assert second.lr == first.lr
    assert resumed.state_dict() == plateau.state_dict() != state
    assert resumed.best == metrics.max()
    assert first.lr < 0.7


def test_plateau_and_its_repr() -> None:
    plateau = optim.ReduceOnPlateau(pair()[1], factor=0.5)
    assert repr(plateau) == (
        "ReduceOnPlateau(SGD, mode='min', factor=0.5, patience=10, threshold=0.0001, threshold_mode='rel', cooldown=0,"
        " min_lr=0.0, eps=1e-08)"
    )


def set_rates(opt: Any, rates: list[float]) -> None:
    for group, lr in zip(opt.param_groups, rates, strict=True):
        group["lr"] = lr


def test_plateau_with_groups() -> None:
    models = [pair()[0] for _ in range(3)]
    theirs = torch.optim.SGD(
        [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.5, 1e-3, 0.1)], lr=0.1
    )
    for own in ([{"lr": 0.5}, {"lr": 1e-3}, {}], [{"lr": 0.5}, {"lr": 1e-3}, {"lr": 0.1}]):
        opt = optim.SGD([{"modules": [m], **group} for m, group in zip(models, own, strict=True)], lr=0.1)
        plateau = optim.ReduceOnPlateau(opt, factor=0.5, patience=0, min_lr=4e-4)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, factor=0.5, patience=0, min_lr=4e-4)
        says(set_rates, theirs, [0.5, 1e-3, 0.1])
        for _ in range(5):
            plateau.step(1.0)
            scheduler.step(1.0)
            assert [group.lr for group in opt.groups] == [group["lr"] for group in theirs.param_groups]
    opt = optim.SGD([{"modules": [m]} for m in models], lr=0.1)
    plateau = optim.ReduceOnPlateau(opt, factor=0.1, patience=0, min_lr=[0.05, 0.01, 0.0])
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, factor=0.1, patience=0, min_lr=[0.05, 0.01, 0.0])
    says(set_rates, theirs, [0.1, 0.1, 0.1])
    for _ in range(4):
        plateau.step(1.0)
        scheduler.step(1.0)
        np.testing.assert_allclose([g.lr for g in opt.groups], [g["lr"] for g in theirs.param_groups], rtol=1e-12)
    with pytest.raises(ValueError, match=r"min_lr must be a number or a list of 3; got \(0.0, 0.1\)"):
        optim.ReduceOnPlateau(opt, min_lr=[0.0, 0.1])
    state = plateau.state_dict()
    with pytest.raises(ValueError, match=r"min_lr must be a number or a list of 3; got \(0.0, 0.1\)"):
        plateau.load_state_dict(state | {"min_lr": (0.0, 0.1)})
    assert plateau.state_dict() == state
    follower = optim.SGD([{"modules": [models[0]], "lr": 0.5}, {"modules": [models[1]]}], lr=0.1)
    plateau = optim.ReduceOnPlateau(follower, factor=0.5, patience=0)
    plateau.step(1.0)
    plateau.step(1.0)
    follower.lr = 0.3
    assert [group.lr for group in follower.groups] == [0.25, 0.3]


def test_plateau_of_one_group_with_a_rate_of_its_own() -> None:
    opt = optim.SGD([{"modules": [pair()[0]], "lr": 0.5}], lr=0.1)
    plateau = optim.ReduceOnPlateau(opt, factor=0.5, patience=0)
    plateau.step(1.0)
    plateau.step(1.0)
    assert opt.groups[0].lr == 0.25


def test_plateau_cannot_reduce_a_schedule() -> None:
    with pytest.raises(TypeError, match="cannot reduce a schedule, which sets the rate at every step; assign a number"):
        optim.ReduceOnPlateau(pair(lr=schedules.cosine(0.1, 10))[1])
    opt = pair(lr=0.1)[1]
    plateau = optim.ReduceOnPlateau(opt, patience=0)
    plateau.step(1.0)
    opt.lr = schedules.cosine(0.1, 10)
    before = plateau.state_dict()
    with pytest.raises(TypeError, match="cannot reduce a schedule"):
        plateau.step(2.0)
    assert plateau.state_dict() == before


NOT_NEGATIVE = "must be a finite number >= 0; got "


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "low"}, "ReduceOnPlateau: mode must be 'min' or 'max'; got 'low'"),
        ({"threshold_mode": "relative"}, "ReduceOnPlateau: threshold_mode must be 'rel' or 'abs'; got 'relative'"),
        ({"factor": 1.0}, "ReduceOnPlateau: factor must be a finite number in [0, 1); got 1.0"),
        ({"factor": -0.1}, "ReduceOnPlateau: factor must be a finite number in [0, 1); got -0.1"),
        ({"patience": -1}, "ReduceOnPlateau: patience must be an integer in [0, 2147483647]; got -1"),
        ({"patience": 1.5}, "ReduceOnPlateau: patience must be an integer in [0, 2147483647]; got 1.5"),
        ({"cooldown": True}, "ReduceOnPlateau: cooldown must be an integer in [0, 2147483647]; got True"),
        ({"threshold": math.nan}, f"ReduceOnPlateau: threshold {NOT_NEGATIVE}nan"),
        ({"min_lr": [-0.1]}, f"ReduceOnPlateau: min_lr {NOT_NEGATIVE}-0.1"),
        ({"min_lr": [0.1, 0.2]}, "ReduceOnPlateau: min_lr must be a number or a list of 1; got (0.1, 0.2)"),
        ({"eps": "small"}, f"ReduceOnPlateau: eps {NOT_NEGATIVE}'small'"),
    ],
    ids=str,
)
def test_plateau_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        optim.ReduceOnPlateau(pair()[1], **options)


def test_plateau_of_no_optimizer() -> None:
    with pytest.raises(TypeError, match="opt must be an optimizer; got a Line"):
        optim.ReduceOnPlateau(pair()[0])


def test_plateau_steps_with_a_number() -> None:
    plateau = optim.ReduceOnPlateau(pair()[1])
    for bad in ("low", None, np.ones(2)):
        with pytest.raises(TypeError, match=r"ReduceOnPlateau.step\(\) needs a number; got"):
            plateau.step(bad)
    with pytest.raises(
        TypeError, match=r"needs a measured value; got a traced one. Return it from the compiled function"
    ):
        jax.jit(plateau.step)(1.0)
    assert plateau.last_epoch == 0


def test_plateau_loads_all_or_nothing() -> None:
    plateau = optim.ReduceOnPlateau(pair()[1])
    before = plateau.state_dict()
    for change, message in [
        ({"beast": 1}, "nothing was loaded: unexpected: beast"),
        ({"factor": 2.0}, "factor must be a finite number in"),
        ({"best": None}, "best must be a number; got None"),
        ({"num_bad_epochs": -1}, "num_bad_epochs must be an integer in"),
    ]:
        with pytest.raises(ValueError, match=message):
            plateau.load_state_dict({**before, "patience": 77, **change})
    with pytest.raises(ValueError, match="missing: mode, .*missing: last_epoch"):
        plateau.load_state_dict({})
    assert plateau.state_dict() == before
