"""`jax.disable_jit()`: user code as plain Python, with every promise kept; and `jax_enable_checks`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.runtime import jax_private
from minitorch_jax.state.walk import walk_of

X = np.linspace(-1, 1, 15, dtype=np.float32).reshape(5, 3)


class Trainer:
    """A network with running statistics and random numbers, its optimizer, and what the code saw as it ran."""

    def __init__(self) -> None:
        mt.seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.1), nn.Linear(4, 2))
        self.opt = optim.SGD([self.model], lr=0.1, momentum=0.9)
        self.seen: list[float] = []
        self.look: Callable[[Any], Any] = lambda value: None

    def loss(self, x: Any) -> Any:
        loss = ((self.model(x) - 1) ** 2).mean()
        self.look(loss)
        return loss

    def step(self, x: Any) -> Any:
        self.opt.zero_grad()
        loss = mt.backward(self.loss, x)
        self.look(loss)
        self.opt.step()
        self.look(self.model[0].weight[0, 0])
        return loss

    def arrays(self) -> list[np.ndarray]:
        leaves = jax.tree.leaves((self.model, self.opt, self.model.grads()))
        assert not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        return [np.array(leaf) for leaf in leaves]


def accumulate(trainer: Trainer) -> Any:
    return mt.backward(trainer.loss, X)


def returned(trainer: Trainer) -> Any:
    loss, grads = mt.value_and_grad(trainer.loss)(X)
    return loss, grads.parameters()


def with_aux(trainer: Trainer) -> Any:
    def loss(x: Any) -> Any:
        return trainer.loss(x), {"model": trainer.model, "out": trainer.model(x), "name": "aux"}

    for differentiate in (mt.backward, lambda *args, **kwargs: mt.value_and_grad(loss, **kwargs)(*args[1:])[0]):
        loss_value, aux = differentiate(loss, X, has_aux=True)
        assert aux["model"] is trainer.model and aux["name"] == "aux"
    return loss_value, aux["out"]


def eagerly(trainer: Trainer) -> Any:
    return [trainer.step(X) for _ in range(2)]


def jitted(trainer: Trainer) -> Any:
    step = mt.jit(trainer.step)
    return [step(X) for _ in range(2)]


def scanned(trainer: Trainer) -> Any:
    return mt.scan(trainer.step, np.stack([X, 2 * X]))


def scanned_in_jit(trainer: Trainer) -> Any:
    return mt.jit(lambda xs: mt.scan(trainer.step, xs))(np.stack([X, 2 * X]))


FORMS = [accumulate, returned, with_aux, eagerly, jitted, scanned, scanned_in_jit]


@pytest.fixture
def uncompiled() -> Iterator[None]:
    with jax.disable_jit():
        yield


@pytest.mark.one_in(8)
@pytest.mark.parametrize("form", FORMS)
def test_plain_python_sees_values_and_trains_the_same(form: Callable[[Trainer], Any]) -> None:
    compiled, plain = Trainer(), Trainer()
    mt.seed(1)
    expected = form(compiled)
    plain.look = lambda value: plain.seen.append(float(value))
    mt.seed(1)
    with jax.disable_jit():
        got = form(plain)
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_allclose(mine, other, rtol=1e-5, atol=1e-6)
    if form in (accumulate, returned, with_aux, eagerly):  # the others use gradients up
        for mine, other in zip(plain.model.grads(), compiled.model.grads(), strict=True):
            assert_allclose(mine, other, rtol=1e-4, atol=1e-6)
    steps = {accumulate: 1, returned: 1, with_aux: 2}.get(form, 6)
    assert len(plain.seen) == steps and all(type(value) is float for value in plain.seen)
    for mine, other in zip(jax.tree.leaves(plain.model), jax.tree.leaves(compiled.model), strict=True):
        assert_allclose(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("uncompiled")
def test_every_way_of_looking_at_a_value() -> None:
    seen: list[Any] = []

    def loss(model: Any, x: Any) -> Any:
        out = model(x).sum()
        seen.extend([float(out), complex(out).real, out.item(), float(f"{out:.6f}"), bool(out > 0), type(x)])
        return out if out > -100 else -out

    layer = nn.Linear(3, 1)
    value = float(mt.backward(loss, layer, X))
    assert_allclose(seen[:4], [value] * 4, rtol=1e-5)
    assert seen[4] == (value > 0) and issubclass(seen[5], jax.Array) and not issubclass(seen[5], jax.core.Tracer)
    assert_allclose(layer.grads()[0], X.sum(0, keepdims=True), rtol=1e-6)


@pytest.mark.usefixtures("uncompiled")
def test_a_debugger_stops_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    stops: list[float] = []
    monkeypatch.setattr(sys, "breakpointhook", lambda: stops.append(float(sys._getframe(1).f_locals["value"])))
    trainer = Trainer()

    def look(value: Any) -> None:
        breakpoint()  # noqa: T100

    trainer.look = look
    step = mt.jit(trainer.step)
    for _ in range(2):
        step(X)
    assert len(stops) == 6 and stops[0] == stops[1] > stops[3]


def test_what_jax_does_not_tell_raises_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax_private, "value_of", lambda tracer: None)
    layer = nn.Linear(3, 1)
    with jax.disable_jit(), pytest.raises(jax.errors.ConcretizationTypeError):
        mt.backward(lambda x: float(layer(x).sum()), X)


def test_compiled_code_still_refuses_to_show_values() -> None:
    layer = nn.Linear(3, 1)
    with jax.disable_jit():
        mt.backward(lambda x: layer(x).sum(), X)
    with pytest.raises(jax.errors.ConcretizationTypeError):
        mt.backward(lambda x: float(layer(x).sum()), X)
    with pytest.raises(jax.errors.ConcretizationTypeError):
        jax.grad(lambda x: x * float(x))(1.0)


def eagerly_in_jit(trainer: Trainer) -> Any:
    return mt.jit(lambda x: eagerly(trainer))(X)


LOSSES, LOOPS = [accumulate, returned, with_aux], [scanned, scanned_in_jit, eagerly_in_jit]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("form", "at"), [*((f, 1) for f in [*LOSSES, *LOOPS]), *((f, at) for f in LOOPS for at in (2, 5))]
)
@pytest.mark.usefixtures("uncompiled")
def test_all_or_nothing(form: Callable[[Trainer], Any], error: type[BaseException], at: int) -> None:
    trainer = Trainer()
    before = trainer.arrays()
    mt.seed(1)
    key = np.array(jax.random.key_data(mt.next_key()))
    mt.seed(1)

    def look(value: Any) -> None:
        trainer.seen.append(float(value))
        if len(trainer.seen) == at:
            raise error("of the user's")

    trainer.look = look
    with pytest.raises(error):
        form(trainer)
    for mine, other in zip(trainer.arrays(), before, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert not any(module.training is False for module in trainer.model)
    np.testing.assert_array_equal(jax.random.key_data(mt.next_key()), key)


@pytest.mark.one_in(9)
@pytest.mark.parametrize("form", [jitted, scanned, accumulate])
def test_arrays_that_were_read_stay(form: Callable[[Trainer], Any]) -> None:
    trainer, kept = Trainer(), []
    trainer.look = lambda value: kept.append(trainer.model[0].weight)
    held = trainer.model[4].weight
    with jax.disable_jit():
        form(trainer)
        kept.append(trainer.model[0].weight)
    trainer.look = lambda value: None
    values = [np.array(array) for array in kept if not isinstance(array, jax.core.Tracer)]
    for _ in range(2):
        mt.jit(trainer.step)(X)
        trainer.step(X)
    assert not held.is_deleted()
    kept = [array for array in kept if not isinstance(array, jax.core.Tracer)]
    assert kept and not any(array.is_deleted() for array in kept)
    for array, value in zip(kept, values, strict=True):
        np.testing.assert_array_equal(array, value)


@pytest.mark.usefixtures("uncompiled")
def test_a_scaled_loss() -> None:
    trainer, scaler = Trainer(), mt.LossScaler(4.0)
    loss, aux = scaler.backward(lambda x: (trainer.loss(x), {"model": trainer.model}), X, has_aux=True)
    assert aux["model"] is trainer.model and float(loss) > 0
    before = np.array(trainer.model[0].weight)
    scaler.step(trainer.opt)
    assert scaler.skipped == 0 and not np.array_equal(before, trainer.model[0].weight)


@pytest.mark.usefixtures("uncompiled")
def test_static_attributes_must_change_back_as_in_compiled_code() -> None:
    trainer = Trainer()

    def evaluate(x: Any) -> Any:
        trainer.model.eval()
        return trainer.model(x)

    with pytest.raises(mt.TraceError, match="training was changed"):
        mt.jit(evaluate)(X)
    assert trainer.model.training


def test_bad_losses_get_the_same_errors() -> None:
    layer, frozen = nn.Linear(3, 2), nn.Linear(3, 2).freeze()
    for loss, match in (
        (lambda x: layer(x), "scalar loss"),
        (lambda x: (layer(x).sum(), 1), "has_aux"),
        (lambda x: frozen(x).sum(), r"uses no trainable parameter .*2 parameters are frozen"),
        (lambda x: jnp.sum(x), "uses no trainable parameter"),
    ):
        for disable in (False, True):
            with jax.disable_jit(disable), pytest.raises((TypeError, ValueError), match=match):
                mt.backward(loss, X)


@pytest.mark.usefixtures("uncompiled")
def test_what_no_name_leads_to_is_found_by_running_again() -> None:
    hidden = {id(X): nn.Linear(3, 1)}
    runs: list[float] = []

    def loss(x: Any) -> Any:
        out = next(iter(hidden.values()))(x).sum()
        runs.append(float(out))
        return out

    mt.backward(loss, X)
    (layer,) = hidden.values()
    assert_allclose(layer.grads()[0], X.sum(0, keepdims=True), rtol=1e-6)
    assert mt.jit(lambda x: mt.backward(loss, x))(X) == runs[-1]


@pytest.mark.usefixtures("uncompiled")
def test_a_parameter_that_the_loss_does_not_read_gets_no_gradient() -> None:
    used, unused = nn.Linear(3, 1), nn.Linear(3, 1)
    mt.backward(lambda models, x: models[0](x).sum(), [used, unused], X)
    assert all(cell.grad.value is None for cell in walk_of(unused).cells)
    assert all(cell.grad.value is not None for cell in walk_of(used).cells)


def test_scan_as_a_loop_stacks_what_it_returns() -> None:
    trainer = Trainer()

    def body(x: Any) -> Any:
        return {"x": x, "n": 2, "name": "of a step", "model": trainer.model, "none": None}

    with jax.disable_jit():
        plain = mt.scan(body, X)
        assert mt.scan(lambda x: trainer.model(x), jnp.ones((0, 2, 3))).shape == (0, 2, 2)
    compiled = mt.scan(body, X)
    assert plain["model"] is compiled["model"] is trainer.model and plain["name"] == compiled["name"]
    for name in ("x", "n"):
        np.testing.assert_array_equal(plain[name], compiled[name])
        assert plain[name].dtype == compiled[name].dtype


@pytest.mark.parametrize("form", [eagerly, scanned_in_jit, *(pytest.param(f, marks=pytest.mark.slow) for f in LOSSES)])
def test_jax_enable_checks(form: Callable[[Trainer], Any]) -> None:
    """Which looks at the inputs of every program, those that it does not use too."""
    checked = Trainer()
    jax.config.update("jax_enable_checks", True)
    try:
        got = form(checked)
    finally:
        jax.config.update("jax_enable_checks", False)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))
