"""The first run of a program: in place where memory suffices, on copies where that is not known."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from training import X, Y, assert_alive, assert_unchanged, everything, pair, step

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.engine import call_and_store


def make() -> tuple[nn.Linear, optim.SGD]:
    """A model with values of its own making, so that nobody else holds them."""
    model = nn.Linear(3, 1, key=jax.random.key(0))
    return model, optim.SGD([model], lr=0.1, momentum=0.9)


def loss_of(model: Any, x: Any, y: Any) -> Any:
    return ((model(x)[:, 0] - y) ** 2).mean()


def train(model: Any, opt: Any, x: Any, y: Any) -> Any:
    opt.zero_grad()
    loss = mt.backward(loss_of, model, x, y)
    opt.step()
    return loss


FORMS = {
    "jit": lambda model, opt: mt.jit(train)(model, opt, X, Y),
    "jit, by closure": lambda model, opt: mt.jit(lambda x, y: train(model, opt, x, y))(X, Y),
    "scan": lambda model, opt: mt.scan(lambda x, y: train(model, opt, x, y), X[None], Y[None])[0],
    "three calls": lambda model, opt: train(model, opt, X, Y),
}


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shapes of all arrays that calls copied."""
    shapes: list[Any] = []

    def copies(values: list[Any]) -> Any:
        shapes.extend(np.shape(value) for value in values)
        return jax.device_put(values, may_alias=False)

    monkeypatch.setattr(call_and_store, "fresh_copies", copies)
    return shapes


@pytest.mark.parametrize("form", FORMS)
def test_the_first_runs_make_no_copy(form: str, copied: list[Any]) -> None:
    model, opt = make()
    first = FORMS[form](model, opt)
    second = FORMS[form](model, opt)
    assert copied == []
    twin, its_opt = make()
    with jax.disable_jit():
        assert_allclose([first, second], [train(twin, its_opt, X, Y) for _ in range(2)], rtol=1e-5)
    assert_allclose(model.weight, twin.weight, rtol=1e-5)
    assert_alive(model, opt)


@pytest.mark.parametrize("form", FORMS)
def test_what_was_read_before_a_first_run_stays(form: str) -> None:
    model, opt = make()
    read = model.weight
    before = np.array(read)
    FORMS[form](model, opt)
    np.testing.assert_array_equal(read, before)
    assert not np.array_equal(model.weight, before)


def greedy(model: Any, opt: Any) -> Any:
    def run(x: Any, y: Any) -> Any:
        loss = step(model, opt, x, y)
        column = jnp.arange(1 << 21, dtype=jnp.float32)
        return jnp.sort(jnp.sin(column[:, None] * column[None] * loss), axis=0)[1, 1]  # 16 TiB

    return mt.jit(run)


def test_where_memory_does_not_suffice_nothing_has_changed(copied: list[Any]) -> None:
    """It is asked for before anything is used up."""
    model, opt = pair()
    before = everything(model, opt)
    with pytest.raises(Exception, match="(?i)memory|RESOURCE_EXHAUSTED|alloc"):
        greedy(model, opt)(X, Y)
    assert copied
    assert_unchanged(before, model, opt)
    assert_alive(model, opt)


def test_memory_that_is_taken_in_the_meantime_is_an_error_of_that_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is not promised: the model is lost then, but never silently."""
    model, opt = pair()
    monkeypatch.setattr(call_and_store, "has_room", lambda *_: True)
    with pytest.raises(Exception, match="(?i)memory|RESOURCE_EXHAUSTED|alloc"):
        greedy(model, opt)(X, Y)
    with pytest.raises(Exception, match="(?i)memory|RESOURCE_EXHAUSTED|alloc|deleted"):
        np.asarray(model.weight)


def test_a_backend_that_does_not_tell_gets_copies(copied: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda self: None)
    model, opt = make()
    mt.jit(train)(model, opt, X, Y)
    assert (1, 3) in copied


def test_a_program_that_calls_a_library_gets_copies(copied: list[Any]) -> None:
    """Such a kernel may fail by itself."""
    model, opt = make()

    @mt.jit
    def with_kernel(x: Any, y: Any) -> Any:
        return train(model, opt, x, y) + jnp.linalg.qr(x)[1].sum()

    with_kernel(X, Y)
    assert (1, 3) in copied
    copied.clear()
    with_kernel(X, Y)
    assert_alive(model, opt)


def test_a_program_is_compiled_once(copied: list[Any]) -> None:
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *args, **kwargs: compiled.append(event) if "backend_compile" in event else None
    )
    model, opt = make()
    run = mt.jit(lambda x, y: train(model, opt, x, y))
    x, y = jnp.asarray(X), jnp.asarray(Y)
    jax.block_until_ready((x, y))
    seen = len(compiled)
    for _ in range(3):
        run(x, y)
    assert len(compiled) == seen + 1
