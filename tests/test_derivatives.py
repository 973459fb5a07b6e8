"""Equations that become jitted functions for differentiation: the same results, derived once, and nothing kept alive."""

from __future__ import annotations

import gc
import traceback
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, mlir
from numpy.testing import assert_allclose, assert_array_equal
from training import Scale

import minitorch_jax as mt
from minitorch_jax import nn
from minitorch_jax.engine import derivatives
from minitorch_jax.engine.derivatives import with_cached_derivatives

X = jnp.linspace(-1.0, 1.5, 12).reshape(4, 3)
KEY = jax.random.key(0)


def layers(x: Any) -> Any:
    for _ in range(4):
        x = jnp.tanh(x @ jnp.eye(3) + 0.5) ** 2 / 3
    return x.sum()


def of_many_kinds(x: Any) -> Any:
    for i in range(4):
        x = x + jax.random.normal(KEY, (3,)) * (x > 0).astype(x.dtype)
        x = jax.nn.softmax(jnp.sort(x, axis=-1)) * jnp.where(x > i, x, 0.5 * x)
        x = jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x)
        x = jax.lax.scan(lambda c, v: (c + v, c * v), jnp.zeros(3), x)[1].reshape(4, 3)
        x = jax.checkpoint(jnp.exp)(x).astype(jnp.bfloat16).astype(jnp.float32)
        x = jax.nn.relu(x[:, ::-1].at[0].add(1.0).T.reshape(4, 3))
        x = jnp.stack(jnp.split(x, 2)).reshape(4, 3) + jax.lax.stop_gradient(x)
    return jnp.linalg.norm(x)


def zeros_of_either_sign(x: Any) -> Any:
    """1 / (±0): equal literals, different results."""
    total = 0.0
    for _ in range(4):
        total += jnp.where(x > 9.0, 0.0 * x, jnp.arctan2(x * 0.0, -1.0 + 0 * x)).sum()
        total += jnp.arctan2(x * -0.0, -1.0 + 0 * x).sum()
    return total + (x**2).sum()


def by_axis(x: Any) -> Any:
    """Equations that differ in a parameter alone."""
    for axis in (0, 1) * 4:
        x = jnp.cumsum(x, axis=axis) / 4
        x = x - jnp.max(x, axis=axis, keepdims=True)
        x = jnp.flip(x, axis)
    return (x**3).sum()


FUNCTIONS = [layers, of_many_kinds, zeros_of_either_sign, by_axis]
TRANSFORMS: list[Any] = [jax.value_and_grad, jax.hessian, jax.jit, jax.linearize]
SLOW = [(jax.hessian, of_many_kinds)]  # 10 seconds


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("transform", "function"),
    [
        pytest.param(t, f, id=f"{t.__name__}-{f.__name__}", marks=[pytest.mark.slow] if (t, f) in SLOW else [])
        for f in FUNCTIONS
        for t in TRANSFORMS
    ],
)
def test_it_is_the_same_function(transform: Any, function: Callable[..., Any]) -> None:
    with jax.numpy_rank_promotion("allow"):
        closed = jax.make_jaxpr(function)(X)
    new = with_cached_derivatives(closed)
    assert any(eqn.params.get("inline") for eqn in new.jaxpr.eqns)
    apply = (lambda f: transform(f, X)[0]) if transform is jax.linearize else (lambda f: transform(f)(X))
    expected = apply(lambda x: jaxpr_as_fun(closed)(x)[0])
    for mine, theirs in zip(
        jax.tree.leaves(apply(lambda x: jaxpr_as_fun(new)(x)[0])), jax.tree.leaves(expected), strict=True
    ):
        assert mine.dtype == theirs.dtype and mine.weak_type == theirs.weak_type
        assert_allclose(mine, theirs, rtol=1e-6, atol=1e-7)


def make_primitive(name: str, count: list[int]) -> Primitive:
    """Three times its argument; counts how often its derivative is asked for."""
    triple = Primitive(name)
    triple.def_impl(lambda x, **_: 3 * x)
    triple.def_abstract_eval(lambda x, **_: x)
    mlir.register_lowering(triple, mlir.lower_fun(lambda x, **_: 3 * x, multiple_results=False))

    def jvp(primals: Any, tangents: Any, **params: Any) -> Any:
        count.append(1)
        return triple.bind(*primals, **params), 3.0 * tangents[0]

    ad.primitive_jvps[triple] = jvp
    return triple


@pytest.mark.parametrize("form", ["backward", "jit", "scan"])
def test_like_equations_are_derived_once(form: str) -> None:
    count: list[int] = []
    triple = make_primitive(f"triple_{form}", count)
    model = Scale(1.0)

    def loss_fn(x: Any) -> Any:
        x = model(x)
        for _ in range(10):
            x = triple.bind(x)
        return x

    work: dict[str, Callable[[], Any]] = {
        "backward": lambda: mt.backward(loss_fn, 1.0),
        "jit": lambda: mt.jit(lambda: mt.backward(loss_fn, 1.0))(),
        "scan": lambda: mt.scan(lambda: mt.backward(loss_fn, 1.0), length=1),
    }
    assert_array_equal(np.ravel(work[form]()), [3.0**10])
    assert_array_equal(model.grads()[0], 3.0**10)
    assert len(count) == (2 if form == "scan" else 1)  # which is traced again when it is known what it carries


def test_equations_with_other_parameters_are_apart() -> None:
    """1 and True are equal, 0.0 and -0.0 too."""
    triple = make_primitive("triple_of", [])

    def function(x: Any) -> Any:
        for value in [1, True, 0.0, -0.0, (1,), (True,), (0.0,), (-0.0,)] * 4:
            x = triple.bind(x, value=value)
        return x

    def given(jaxpr: Any) -> list[Any]:
        inner = [eqn.params["jaxpr"].eqns[0] if "jaxpr" in eqn.params else eqn for eqn in jaxpr.eqns]
        return [repr(eqn.params["value"]) for eqn in inner]

    assert (
        given(with_cached_derivatives(jax.make_jaxpr(function)(1.0)).jaxpr)
        == ["1", "True", "0.0", "-0.0", "(1,)", "(True,)", "(0.0,)", "(-0.0,)"] * 4
    )


def test_settings_of_an_equation_are_kept() -> None:
    def function(x: Any) -> Any:
        for precision in (None, "float32", "bfloat16") * 4:
            with jax.default_matmul_precision(precision):
                x = x @ x
        return x.sum()

    closed = jax.make_jaxpr(function)(jnp.eye(3))
    products = [eqn for eqn in closed.jaxpr.eqns if eqn.primitive.name == "dot_general"]
    new = [eqn for eqn in with_cached_derivatives(closed).jaxpr.eqns if eqn.params.get("name") == "function"]
    assert [eqn.params["jaxpr"].eqns[0].params["precision"] for eqn in new] == [
        eqn.params["precision"] for eqn in products
    ]


def test_what_has_effects_or_is_pythons_stays() -> None:
    def function(x: Any) -> Any:
        for _ in range(5):
            jax.debug.print("{}", x)
            x = jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((), jnp.float32), x)
        return x

    closed = jax.make_jaxpr(function)(jnp.float32(1))
    assert with_cached_derivatives(closed) is closed


def test_nothing_is_kept_alive() -> None:
    def train() -> list[Any]:
        model = nn.Sequential(*[nn.Linear(3, 3, key=KEY) for _ in range(5)])
        data = np.array(X)

        def loss_fn(x: Any) -> Any:
            return (model(x) ** 2).mean() + (x * jnp.asarray(data)).sum()

        mt.backward(loss_fn, X)
        return [weakref.ref(model), weakref.ref(loss_fn), weakref.ref(model[0])]

    derivatives._call.cache_clear()
    gone = train()
    assert derivatives._call.cache_info().currsize
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


def test_on_a_mesh_with_explicit_axes() -> None:
    """Whose shardings are in the types: left as they are, unless JAX makes the same types of the function's inputs."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(X, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
        closed = jax.make_jaxpr(lambda x: jnp.sin(jnp.sin(jnp.sin(jnp.sin(x)))).sum())(x)
        value, grad = jax.value_and_grad(lambda x: jaxpr_as_fun(with_cached_derivatives(closed))(x)[0])(x)
        expected = jax.value_and_grad(lambda x: jnp.sin(jnp.sin(jnp.sin(jnp.sin(x)))).sum())(x)
    assert_allclose(value, expected[0], rtol=1e-6)
    assert_allclose(grad, expected[1], rtol=1e-6)


def sines(model: Any, x: Any) -> Any:
    x = model(x)
    for _ in range(5):
        x = jnp.sin(x)
    return x


@pytest.mark.parametrize("form", ["backward", "jit", "vmap"])
def test_without_jit(form: str) -> None:
    """Whose absence is not remembered."""
    derivatives._call.cache_clear()
    model = Scale(1.0)
    forms: dict[str, Callable[[], Any]] = {
        "backward": lambda: mt.backward(sines, model, 1.0),
        "jit": lambda: mt.jit(lambda: mt.backward(sines, model, 1.0))(),
        "vmap": lambda: jax.vmap(lambda x: mt.value_and_grad(sines)(model, x)[0])(jnp.ones(2))[0],
    }
    with jax.disable_jit():
        first = float(forms[form]())
    assert_allclose([first, float(forms[form]())], sines(Scale(1.0), 1.0), rtol=1e-6)


def test_an_error_of_a_derivative_names_the_line_that_asked_for_it() -> None:
    hopeless = make_primitive("hopeless", [])
    del ad.primitive_jvps[hopeless]

    def asked(model: Any, x: Any) -> Any:
        for _ in range(5):
            x = hopeless.bind(model(x))
        return x

    with pytest.raises(NotImplementedError, match="hopeless") as caught:
        mt.backward(asked, Scale(1.0), 1.0)
    assert caught.value.__context__ is None
    frames = [entry.name for entry in caught.traceback]
    cause = caught.value.__cause__
    while cause is not None:
        frames += [entry.name for entry in traceback.extract_tb(cause.__traceback__)]
        cause = cause.__cause__
    assert "asked" in frames


def test_objects_of_the_users_in_equations_are_not_kept() -> None:
    class Big:
        pass

    triple = make_primitive("triple_with", [])

    def train() -> Any:
        big = Big()

        def loss_fn(model: Any, x: Any) -> Any:
            for _ in range(5):
                x = triple.bind(model(x), big=big)
            return x

        mt.backward(loss_fn, Scale(1.0), 1.0)
        return weakref.ref(big)

    reference = train()
    jax.clear_caches()
    gc.collect()
    assert reference() is None
