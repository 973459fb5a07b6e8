"""Functions that are made again and again from the same code (a lambda in a loop, a local function) share their programs."""

import functools
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from training import compilations, squared

import minitorch_jax as mt
from minitorch_jax import nn

X = jnp.ones((3, 2))


def line(weight: float = 1.0) -> Any:
    model = nn.Linear(2, 1, bias=False)
    model.weight = jnp.full((1, 2), weight)
    return model


def made(model: Any, y: Any) -> Callable[..., Any]:
    """A factory."""

    def loss(x: Any) -> Any:
        return ((model(x) - y) ** 2).mean()

    return loss


def with_default(model: Any, y: Any) -> Any:
    return mt.backward(lambda x, y=y, *, model=model: ((model(x) - y) ** 2).mean(), X)


def with_local(model: Any, y: Any) -> Any:
    def loss(x: Any) -> Any:
        return ((model(x) - y) ** 2).mean()

    return mt.backward(loss, X)


def with_helper(model: Any, y: Any) -> Any:
    return mt.backward(lambda x: squared(model, x, y), X)


def with_partial(model: Any, y: Any) -> Any:
    return mt.backward(functools.partial(lambda y, x: ((model(x) - y) ** 2).mean(), y), X)


def with_aux(model: Any, y: Any) -> Any:
    return mt.backward(lambda x: (((model(x) - y) ** 2).mean(), "aux"), X, has_aux=True)[0]


FORMS: dict[str, Callable[[Any, Any], Any]] = {
    "lambda": lambda model, y: mt.backward(lambda x: ((model(x) - y) ** 2).mean(), X),
    "local": with_local,
    "factory": lambda model, y: mt.backward(made(model, y), X),
    "default": with_default,
    "helper": with_helper,
    "partial": with_partial,
    "aux": with_aux,
    "scaler": lambda model, y: mt.LossScaler(init_scale=1.0).backward(lambda x: ((model(x) - y) ** 2).mean(), X),
    "value_and_grad": lambda model, y: mt.value_and_grad(lambda x: ((model(x) - y) ** 2).mean())(X)[0],
    "grad": lambda model, y: (mt.grad(lambda x: ((model(x) - y) ** 2).mean())(X), squared(model, X, y))[1],
    "jit": lambda model, y: mt.jit(lambda x: ((model(x) - y) ** 2).mean())(X),
    "jit of a factory": lambda model, y: mt.jit(made(model, y), keep_grads=True)(X),
    "jit, static": lambda model, y: mt.jit(lambda x, p: ((model(x) - y) ** p).mean(), static_argnums=1)(X, 2),
    "scan": lambda model, y: mt.scan(lambda x: ((model(x) - y) ** 2).mean(), X[None])[0],
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_made_anew_compiles_once(form: str) -> None:
    """An array that it closes over may be another each time, and so may a model of the same structure."""
    run = FORMS[form]
    models, arrays = [line(), line(2.0)], [jnp.full((3, 1), float(i)) for i in range(6)]
    expected = [[(2 * w - i) ** 2 for i in range(6)] for w in (1.0, 2.0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = [[float(run(models[0], y)) for y in arrays[:2]]]
        with compilations() as found:
            losses = [[float(run(model, y)) for y in arrays] for model in models]
    assert losses == expected
    assert found == []


def test_gradients_go_to_the_model_that_is_closed_over() -> None:
    models = [line(), line(2.0)]
    for model in [*models, models[0]]:
        mt.backward(lambda x, model=model: model(x).sum(), X)
    assert [model.grads()[0].tolist() for model in models] == [[[6.0, 6.0]], [[3.0, 3.0]]]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("form", FORMS)
def test_nothing_that_was_closed_over_is_kept_alive(form: str) -> None:
    """Not even until the collector of cycles runs."""

    def run() -> list[Any]:
        model, y = line(), jnp.full((3, 1), 2.0)
        for _ in range(3):
            FORMS[form](model, y)
        return [weakref.ref(model), weakref.ref(y)]

    run()
    gc.collect()
    gc.disable()
    try:
        assert [reference() for reference in run()] == [None, None]
    finally:
        gc.enable()


class Settings:
    def __init__(self, scale: float) -> None:
        self.scale = scale


_LIBRARY: dict[str, Any] = {"__name__": "optax.made_here", "functools": functools}
exec(
    compile(
        """
def scaled(fn, value):
    @functools.wraps(fn)
    def call(*args):
        return fn(*args) * value
    return call

def scaled_without_a_name(fn, value):
    return lambda *args: fn(*args) * value
""",
        "optax/made_here.py",
        "exec",
    ),
    _LIBRARY,
)

VALUES: dict[str, Callable[[float], Callable[[Any], Any]]] = {
    "a number": lambda value: lambda model: model(X).sum() * value,
    "a default": lambda value: lambda model, value=value: model(X).sum() * value,
    "a keyword": lambda value: lambda model, *, value=value: model(X).sum() * value,
    "a list": lambda value: (lambda values: lambda model: model(X).sum() * values[0])([value]),
    "a dict": lambda value: (lambda values: lambda model: model(X).sum() * values["value"])({"value": value}),
    "an object": lambda value: (lambda settings: lambda model: model(X).sum() * settings.scale)(Settings(value)),
    "a NumPy array": lambda value: (lambda array: lambda model: model(X).sum() * array)(np.float32([value])[0]),
    "a function": lambda value: (lambda helper: lambda model: helper(model(X).sum()))(lambda x: x * value),
    "a library's decorator": lambda value: _LIBRARY["scaled"](lambda model: model(X).sum(), value),
    "a library's wrapper": lambda value: _LIBRARY["scaled_without_a_name"](lambda model: model(X).sum(), value),
    "what a library's wrapper wraps": lambda value: _LIBRARY["scaled"](lambda model: model(X).sum() * value, 1.0),
    "an array": lambda value: (lambda array: lambda model: model(X).sum() * array)(jnp.float32(value)),
    "an array in a partial": lambda value: (lambda helper: lambda model: helper(model(X).sum()))(
        functools.partial(jnp.multiply, jnp.float32(value))
    ),
    "an array in a list": lambda value: (lambda a: lambda model: model(X).sum() * a[0])([jnp.float32(value)]),
    "an array in a function": lambda value: (lambda helper: lambda model: helper(model(X).sum()))(
        (lambda array: lambda x: x * array)(jnp.float32(value))
    ),
}


@pytest.mark.one_in(9)
@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("mutable", [False, True])
@pytest.mark.filterwarnings("ignore::minitorch_jax.RecompileWarning")
def test_what_is_closed_over_is_followed(kind: str, mutable: bool) -> None:
    """Whether each function is used once, or all are kept and take turns."""
    make, model = VALUES[kind], line()
    kept = [make(float(value)) for value in (1, 2, 3)] if mutable else None
    for _ in range(3):
        for value in (1, 2, 2, 3):
            loss = make(float(value)) if kept is None else kept[value - 1]
            assert float(mt.backward(loss, model)) == 6.0 * value
    with compilations() as found:
        for value in (1, 2, 3):
            loss = make(float(value)) if kept is None else kept[value - 1]
            assert float(mt.backward(loss, model)) == 6.0 * value
    assert found == []


@pytest.mark.filterwarnings("ignore::minitorch_jax.RecompileWarning")
def test_what_an_object_in_a_closure_holds_may_change() -> None:
    settings, model = Settings(1.0), line()
    seen = []
    for scale in (1.0, 2.0, 2.0, 1.0):
        settings.scale = scale
        seen.append(float(mt.backward(lambda: model(X).sum() * settings.scale)))
    assert seen == [6.0, 12.0, 12.0, 6.0]


def test_an_object_that_has_gone_is_no_none() -> None:
    """A weak reference to what was there gives None, and so may be taken for it."""
    model = line()

    def run(scale: Any) -> float:
        return float(mt.backward(lambda: model(X).sum() * (1.0 if scale is None else scale.scale)))

    assert [run(Settings(2.0)), run(Settings(2.0)), run(None), run(None)] == [12.0, 12.0, 6.0, 6.0]


def test_each_compiled_function_counts_its_own_programs() -> None:
    def make() -> Any:
        return mt.jit(lambda model, x: model(x).sum())

    first, second = make(), make()
    first(line(), X)
    first(line(), X[:2])
    assert (first.num_compiles, second.num_compiles) == (2, 0)
    with compilations() as found:
        second(line(), X)
        second(line(), X)
        assert (first.num_compiles, second.num_compiles) == (2, 1)
        second(line(), X[:2])
    assert found == [] and (first.num_compiles, second.num_compiles) == (2, 2)
    second(line(), X[:1])
    first(line(), X[:1])
    assert (first.num_compiles, second.num_compiles) == (3, 3)


def test_programs_that_another_function_has_compiled_are_counted_in_the_quickest_calls() -> None:
    def make() -> Any:
        return mt.jit(lambda model, x: (model.weight.sum(), sum(x).sum()))

    first, second, model = make(), make(), line()
    for x in (X, X[:2], X.astype(np.float16), (X, X), (X[:2], X[:2])):
        first(model, x)
    counts = []
    for x in (X, X, X[:2], X, X[:2], X.astype(np.float16), (X, X), (X, X), (X[:2], X[:2]), X):
        second(model, x)
        counts.append(second.num_compiles)
    assert counts == [1, 1, 2, 2, 2, 3, 4, 4, 5, 5] and first.num_compiles == 5


def test_code_that_is_replaced_in_a_function_that_shares_its_programs() -> None:
    model = line()
    one, other = made(model, jnp.zeros((3, 1))), made(model, jnp.zeros((3, 1)))
    assert [float(mt.backward(f, X)) for f in (one, other)] == [4.0, 4.0]

    def replaced(model: Any, y: Any) -> Any:
        def loss(x: Any) -> Any:
            return ((model(x) - y) ** 2).mean() + 1.0

        return loss

    other.__code__ = replaced(model, X).__code__
    assert [float(mt.backward(f, X)) for f in (one, other, one)] == [4.0, 5.0, 4.0]
    step = mt.jit(one)
    assert float(step(X)) == 4.0
    one.__code__ = other.__code__
    assert float(step(X)) == 5.0
