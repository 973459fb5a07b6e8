"""Large arrays that are updated block by block, against the update as it is written, over all optimizers."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizers import GROUPED, OPTIMIZERS

import minitorch_jax as mt
from minitorch_jax import optim
from minitorch_jax.optim import blocks, update
from minitorch_jax.runtime.bounded_cache import Kept

OVER_WHOLE_ARRAYS = ("Adafactor", "LAMB", "LARS", "Muon")  # norms and products
SHAPE = (2, 67)  # two blocks of 60, and a rest
VARIANTS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "maximize": True},
    {"state_dtype": jnp.bfloat16},
    {"skip_nonfinite": True},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "centered": True},
    {"amsgrad": True},
]
CASES = [
    pytest.param(name, options, id="-".join([name, *options]), marks=[pytest.mark.slow] if options else [])
    for name in GROUPED
    for options in VARIANTS
    if options.keys() <= OPTIMIZERS[name]._settings.keys() and not (name == "RMSprop" and "nesterov" in options)
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small arrays count as large ones, on a machine with one core; and no program is one of another test's."""
    monkeypatch.setattr(blocks, "_cores", lambda: 1)
    monkeypatch.setattr(blocks, "SMALLEST", {1: 100, 2: 100})
    monkeypatch.setattr(blocks, "BLOCK", 60)
    monkeypatch.setattr(update, "_steps", Kept())


@pytest.fixture
def made(monkeypatch):
    """The programs by blocks that are made; None for each rule that is not elementwise."""
    found: list[Any] = []
    make = blocks._elementwise
    monkeypatch.setattr(blocks, "_elementwise", lambda *args: found.append(make(*args)) or found[-1])
    return found


class Arrays(mt.Module):
    """A module with one parameter."""

    def __init__(self, dtype: Any = jnp.float32) -> None:
        self.p = mt.Parameter(jnp.linspace(-1, 1, 134).reshape(SHAPE).astype(dtype))


def grads_of(model: Any, seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(p.shape) * 10.0 ** -(3 * seed), p.dtype) for p in model.parameters()]


def trajectory(name: str, options: dict[str, Any], dtype: Any = jnp.float32) -> list[Any]:
    """What an optimizer owns after two steps."""
    model = Arrays(dtype)
    opt = OPTIMIZERS[name]([model], **options)
    plan = opt._plan_now()
    owned = [cell.value for cell in plan.owned]
    for i in range(2):
        grads = grads_of(model, i)
        if "skip_nonfinite" in options and i == 1:
            grads[0] = grads[0].at[(0,) * grads[0].ndim].set(jnp.inf)
        owned = plan.update(owned, grads, opt._hyper.cell.value)
    return owned


def both(monkeypatch: Any, *args: Any) -> tuple[list[Any], list[Any]]:
    found = []
    for overwrites in (False, True):
        monkeypatch.setattr(update.Update, "_overwrites", lambda self, overwrites=overwrites: overwrites)
        found.append(trajectory(*args))
    return found[0], found[1]


def assert_equal(plain: list[Any], by_blocks: list[Any]) -> None:
    for a, b in zip(plain, by_blocks, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name, options", CASES)
def test_every_elementwise_rule_is_done_by_blocks_with_equal_bits(name, options, made, monkeypatch):
    with jax.disable_jit():  # operation by operation, so no other fusion can round in another way
        assert_equal(*both(monkeypatch, name, options))
    if name in OVER_WHOLE_ARRAYS:
        assert not any(made)
    elif name == "Optimizer" or (name == "SGD" and "momentum" not in options):
        assert made == []  # one array is written, in one loop as it is
    else:
        assert len(made) == 2 and all(made)


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"momentum": 0.9, "master_weights": True}])
def test_parameters_of_few_bits(options, made, monkeypatch):
    with jax.disable_jit():
        assert_equal(*both(monkeypatch, "SGD", options, jnp.bfloat16))
    assert made and all(made)


def test_numbers_that_are_not_finite_stay_as_they_are(monkeypatch):
    def nan_first(model: Any, seed: int) -> list[Any]:
        return [g.at[(0,) * g.ndim].set(jnp.nan).at[(-1,) * g.ndim].set(jnp.inf) for g in grads(model, seed)]

    grads = grads_of
    monkeypatch.setitem(globals(), "grads_of", nan_first)
    with jax.disable_jit():
        for name in ("Lion", "Adadelta"):
            assert_equal(*both(monkeypatch, name, {}))


class Signed(optim.Optimizer):
    """A rule of a user's, who does not say that it is elementwise. The old state is needed for the parameter."""

    @staticmethod
    def init_state(p: Any, h: Any) -> Any:
        return {"m": jnp.zeros_like(p), "last": jnp.zeros_like(p)}

    @staticmethod
    def update(p: Any, g: Any, s: Any, h: Any) -> Any:
        d = jax.nn.relu(g - s["last"]) + jnp.where(s["m"] > 0, s["m"], p)
        return p - h.lr * d if p.ndim == 2 else d, {"m": s["last"] + p, "last": s["m"]}


def test_a_users_rule_is_looked_through(made, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "Signed", Signed)
    with jax.disable_jit():
        assert_equal(*both(monkeypatch, "Signed", {}))
    assert made and all(made)


@pytest.mark.parametrize(
    "operation",
    [jnp.cumsum, jnp.sort, jnp.flip, jnp.transpose, lambda x: x / jnp.linalg.norm(x), lambda x: x + x[0], jnp.fft.fft],
)
def test_what_mixes_elements_is_not_elementwise(operation):
    def rule(p: Any, g: Any, s: Any) -> Any:
        return p - jnp.real(operation(g)), s + g

    x = jnp.ones(200 if operation is not jnp.transpose else (200, 200))
    closed = jax.make_jaxpr(rule)(x, x, x)
    assert blocks._elementwise(closed, x.shape, [0, 2]) is None


# -- compiled ----------------------------------------------------------------------------------------------------------


def stepped(name: str, how: str, overwrites: bool, monkeypatch: Any) -> dict[str, Any]:
    monkeypatch.setattr(update, "_steps", Kept())
    monkeypatch.setattr(jax, "device_count", lambda: 1 if overwrites else 2)
    model = type("Fresh", (Arrays,), {})()  # so that no program of the other form fits
    if how == "packed":
        mt.pack(model)
    opt = OPTIMIZERS[name]([model], lr=0.1)
    x = jnp.linspace(0.5, 1.5, 3)

    def step(scale: Any) -> Any:
        opt.zero_grad()
        loss = mt.backward(lambda model: sum((scale * p**2).sum() for p in model.parameters()), model)
        opt.step()
        return loss

    if how == "scan":
        mt.scan(step, x)
    else:
        compiled = mt.jit(step) if how == "jit" else step
        for scale in x:
            compiled(scale)
    state = {f"{path}.{key}": v for path, held in opt.state_dict()["state"].items() for key, v in held.items()}
    return {**state, **model.state_dict()}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name, how", [("Adam", "scan"), ("Adam", "packed"), ("Lion", "jit"), ("Adadelta", "eager")])
def test_compiled_steps_agree(name, how, made, monkeypatch):
    plain, by_blocks = (stepped(name, how, overwrites, monkeypatch) for overwrites in (False, True))
    assert all(made) and bool(made) is (how not in ("jit", "scan"))  # these read the parameters in the same program
    for key, value in plain.items():
        np.testing.assert_allclose(value, by_blocks[key], rtol=3e-7, atol=1e-7, err_msg=key)


ORDERS = {
    "momentum, then the parameter": lambda p, g, s: (p - 0.1 * (0.9 * s[0] + g), [0.9 * s[0] + g]),
    "the parameter, then momentum": lambda p, g, s: (p - jnp.sign(0.9 * s[0] + g), [0.99 * s[0] + 0.01 * g]),
    "both from both": lambda p, g, s: (p - 0.1 * s[0] * g, [0.9 * s[0] + p * g]),
    "three in a circle": lambda p, g, s: (p * s[0], [s[0] + s[1], jnp.where(g > 0, s[1], p)]),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("shape", [(997,), (2, 499), (16, 60)], ids=str)  # the last has no rest
@pytest.mark.parametrize("order", ORDERS)
def test_arrays_are_written_in_place(order, shape):
    rule, num_state = ORDERS[order], 2 if "three" in order else 1
    size = math.prod(shape)
    p, g = jnp.linspace(-1, 1, size).reshape(shape), jnp.cos(jnp.arange(size)).reshape(shape)
    compiled = jax.jit(blocks.in_blocks(rule, True), donate_argnums=(0, 2)).lower(p, g, [p] * num_state).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < p.nbytes and "while" in compiled.as_text()
    expected = jax.jit(rule)(p, g, [p / 2] * num_state)
    got = compiled(jnp.copy(p), g, [p / 2 for _ in range(num_state)])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7, atol=1e-7), got, expected)


@pytest.mark.parametrize(
    "cores, shape, expected",
    [
        (1, (200,), True),
        (1, (10, 20), True),
        (1, (99,), False),
        (2, (201,), True),
        (2, (200,), False),
        (2, (11, 19), False),
        (2, (99,), False),
        (3, (201,), False),
    ],
)
def test_blocks_are_used_where_one_core_is_faster_than_all(cores, shape, expected, made, monkeypatch):
    monkeypatch.setattr(blocks, "_cores", lambda: cores)
    x = jnp.ones(shape)
    jax.make_jaxpr(blocks.in_blocks(ORDERS["both from both"], True))(x, x, [x])
    assert bool(made) is expected


def test_derivatives_and_vmap_are_those_of_the_rule():
    rule = ORDERS["both from both"]
    by_blocks = blocks.in_blocks(rule, True)
    p, g = jnp.linspace(-1, 1, 130), jnp.cos(jnp.arange(130.0))

    def loss(of: Any) -> Any:
        return lambda p, g: sum((x**2).sum() for x in jax.tree.leaves(of(p, g, [p + 1])))

    np.testing.assert_allclose(*(jax.jit(jax.grad(loss(of)))(p, g) for of in (rule, by_blocks)), rtol=1e-6)
    stacked = jnp.stack([p, 2 * p]), jnp.stack([g, -g]), [jnp.stack([g, p])]
    expected, got = (jax.jit(jax.vmap(of))(*stacked) for of in (rule, by_blocks))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7, atol=1e-7), got, expected)


def test_a_plain_program_of_jax_is_left_alone(made, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    model = Arrays()
    opt = optim.Adam([model])
    model.accumulate(grads_of(model, 0))

    def step(opt: Any) -> Any:
        opt.step()
        return opt

    jax.jit(step)(opt)  # nothing tells whether its arrays are donated, nor on how many devices they are
    assert made == []
