"""Donated data: used up if nobody else holds it, copied if anything of ours, or another argument, does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from training import Line, X, Y, assert_alive, assert_unchanged, everything, pair, squared, step

import minitorch_jax as mt
from minitorch_jax import optim

pytestmark = pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")


@mt.jit(donate_argnums=0)
def doubled(array: Any) -> Any:
    keys = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return (jax.random.key_data(array) if keys else array) * 2


def trained() -> tuple[Any, Any]:
    model, opt = pair()
    step(model, opt, X, Y)
    return model, opt


def given(kind: Callable[[Any], Any]) -> Any:
    """An array that a module was made of."""
    array = jnp.array([1.0, 2.0, 3.0])
    model = mt.Module()
    model.given = kind(array)
    return array, model


def assigned() -> Any:
    model, opt = trained()
    array = jnp.array([1.0, 2.0, 3.0])
    model.weight = array
    return array, model, opt


def accumulated() -> Any:
    model, opt = trained()
    array = jnp.array([1.0, 2.0, 3.0])
    model.zero_grad()
    model.accumulate([array, jnp.float32(1.0)])
    return array, model, opt


def of_model(read: Callable[[Any, Any], Any]) -> Callable[[], Any]:
    def make() -> Any:
        model, opt = trained()
        return read(model, opt), model, opt

    return make


def packed() -> Any:
    model, opt = trained()
    mt.pack(model)
    step(model, opt, X, Y)
    return model.weight, model, opt


def copied() -> Any:
    opt = jax.tree.map(lambda a: a, trained()[1])
    return opt.modules[0].weight, opt.modules[0], opt


def averaged() -> Any:
    model, opt = trained()
    mean = optim.AveragedModel(model)
    mean.update(model)
    return mean.module.weight, mean, model, opt


HELD: dict[str, Callable[[], Any]] = {
    "parameter": of_model(lambda model, opt: model.weight),
    "buffer": of_model(lambda model, opt: model.mean),
    "gradient": of_model(lambda model, opt: model.grads()[0]),
    "state": of_model(lambda model, opt: opt.state_dict()["state"]["0.weight"]["momentum_buffer"]),
    "leaf": of_model(lambda model, opt: jax.tree.leaves(opt)[0]),
    "copied leaf": copied,
    "the same buffer": of_model(lambda model, opt: jax.device_put(model.weight)),
    "shard": of_model(lambda model, opt: model.weight.addressable_data(0)),
    "made of": lambda: given(mt.Parameter),
    "buffer made of": lambda: given(mt.Buffer),
    "frozen": lambda: given(lambda array: mt.Parameter(array, trainable=False)),
    "assigned": assigned,
    "accumulated": accumulated,
    "packed": packed,
    "averaged": averaged,
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", HELD)
def test_a_donated_array_that_something_of_ours_holds_is_copied(name: str) -> None:
    array, *objects = HELD[name]()
    before, value = everything(*objects), np.array(array)
    for _ in range(3):
        assert_array_equal(doubled(array), value * 2)
    assert_array_equal(array, value)
    assert_unchanged(before, *objects)
    assert_alive(*objects)
    if len(objects) > 1:
        step(objects[-2], objects[-1], X, Y)


def test_a_key_that_a_stream_began_with_is_copied() -> None:
    key = jax.random.key(3)
    with mt.rng(key):
        doubled(key)
        drawn = mt.next_key()
    with mt.rng(3):
        assert_array_equal(jax.random.key_data(drawn), jax.random.key_data(mt.next_key()))


def test_an_array_that_nobody_else_holds_is_used_up() -> None:
    model, opt = trained()
    for array in (jnp.arange(3.0), model.weight + 1, jnp.asarray(model.weight * 1)):
        doubled(array)
        assert array.is_deleted()
    was = model.weight  # copied when the model trains on: then it is the caller's alone
    step(model, opt, X, Y)
    doubled(was)
    assert was.is_deleted()
    assert_alive(model, opt)


TWICE: dict[str, Callable[[Any], Any]] = {
    "two arguments": lambda x: mt.jit(lambda a, b: a + b, donate_argnums=(0, 1))(x, x),
    "one is kept": lambda x: mt.jit(lambda a, b: a + b, donate_argnums=0)(x, x),
    "the other is kept": lambda x: mt.jit(lambda a, b: a + b, donate_argnums=1)(x, x),
    "in one pytree": lambda x: mt.jit(lambda pair: pair[0] + pair[1], donate_argnums=0)([x, x]),
    "by name": lambda x: mt.jit(lambda a, b: a + b, donate_argnames=("a", "b"))(a=x, b=x),
    "the same buffer": lambda x: mt.jit(lambda a, b: a + b, donate_argnums=(0, 1))(x, jax.device_put(x)),
    "the same buffer is kept": lambda x: mt.jit(lambda a, b: a + b, donate_argnums=0)(jax.device_put(x), x),
    "read by name": lambda x: mt.jit(lambda a: a + x, donate_argnums=0)(x),
    "beside a model": lambda x: mt.jit(lambda model, a: model.weight * 0 + 2 * a, donate_argnums=1)(given_to(x), x),
}


def given_to(x: Any) -> Any:
    model = Line()
    model.weight = x
    return model


@pytest.mark.parametrize("name", TWICE)
def test_an_array_that_is_given_twice(name: str) -> None:
    for _ in range(2):
        assert_array_equal(TWICE[name](jnp.ones(3)), [2, 2, 2])


def test_on_many_devices() -> None:
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    model = mt.Module()
    model.rows = mt.Parameter(jax.device_put(jnp.arange(8.0), rows))
    whole, part = model.rows, model.rows.addressable_data(0)
    for array in (whole, part, jax.device_put(whole, rows)):
        doubled(array)
    assert_array_equal(model.rows, np.arange(8.0))
    assert not whole.is_deleted()
    assert not part.is_deleted()


def test_models_that_come_later_are_known_too() -> None:
    doubled(jnp.ones(3))  # from now on cells are noted when they are made
    model, opt = trained()
    mt.backward(squared, model, X, Y)
    for array in (model.weight, model.grads()[0]):
        doubled(array)
    assert_alive(model, opt)
