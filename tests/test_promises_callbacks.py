"""Python that runs while a compiled program does, and raises: wherever it is called from, nothing is lost or changed."""

from __future__ import annotations

import io as streams
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.extend.core import Primitive
from jax.interpreters import mlir
from numpy.testing import assert_array_equal
from training import Boom, X, Y, assert_alive, assert_unchanged, everything, pair, squared, step, stream_state

import minitorch_jax as mt
from minitorch_jax import optim

fails = [False]


class Broken(streams.StringIO):
    """A stream that cannot be written to at times."""

    def write(self, text: str) -> int:
        check(0)
        return len(text)


def check(value: Any) -> Any:
    if fails[0]:
        raise Boom("injected")
    return np.asarray(value)


@pytest.fixture(autouse=True)
def working() -> Iterator[None]:
    fails[0] = False
    yield
    fails[0] = False


def pure(x: Any) -> Any:
    return jax.pure_callback(check, jax.ShapeDtypeStruct(x.shape, x.dtype), jax.lax.stop_gradient(x))


# -- each place --------------------------------------------------------------------------------------------------------


@jax.custom_vjp
def checked_backward(x: Any) -> Any:
    return x


checked_backward.defvjp(lambda x: (x, None), lambda _, g: (pure(g),))


def loss_with(touch: Callable[[Any], Any]) -> Callable[..., Any]:
    def loss(model: Any, x: Any, y: Any) -> Any:
        return squared(model, x, y) + touch(model.bias)

    return loss


class CheckedRule(mt.Optimizer):
    @staticmethod
    def init_state(p: Any, h: Any) -> Any:
        return (jnp.zeros_like(p),)

    @staticmethod
    def update(p: Any, g: Any, s: Any, h: Any) -> Any:
        return p - h.lr * pure(g), (s[0] + g,)


def schedule(t: Any) -> Any:
    return 0.1 * pure(jnp.float32(1.0))


def stepping(opt: Any, model: Any) -> Callable[[], Any]:
    mt.backward(squared, model, X, Y)
    return opt.step


def eager_with(loss: Callable[..., Any]) -> Callable[..., Any]:
    return lambda model, opt: lambda: mt.backward(loss, model, X, Y)


def whole(model: Any, opt: Any, loss: Callable[..., Any] = squared, limit: Any = None) -> Callable[[], Any]:
    def train() -> Any:
        mt.next_key()
        opt.zero_grad()
        value = mt.backward(loss, model, X, Y)
        if limit is not None:
            mt.clip_grad_norm(model, limit(value))
        opt.step()
        return value

    return train


def lbfgs(model: Any, _: Any) -> Callable[[], Any]:
    opt = optim.LBFGS([model], max_iter=2)

    def closure() -> Any:
        opt.zero_grad()
        return mt.backward(loss_with(checked_backward), model, X, Y)

    return lambda: opt.step(closure)


def scaler(model: Any, opt: Any) -> Callable[[], Any]:
    scaler = mt.LossScaler(init_scale=2.0)
    opt.lr = schedule
    scaler.backward(squared, model, X, Y)
    return lambda: scaler.step(opt)


def scaled_loss(model: Any, opt: Any) -> Callable[[], Any]:
    scaler = mt.LossScaler(init_scale=2.0)
    return lambda: scaler.backward(loss_with(checked_backward), model, X, Y)


def scan(run: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: mt.scan(run, length=2)


PLACES: dict[str, Callable[[Any, Any], Callable[[], Any]]] = {
    "loss": eager_with(loss_with(pure)),
    "backward pass": eager_with(loss_with(checked_backward)),
    "value_and_grad": lambda model, opt: lambda: mt.value_and_grad(loss_with(checked_backward))(model, X, Y),
    "rule": lambda model, opt: stepping(CheckedRule([model], lr=0.1), model),
    "schedule": lambda model, opt: stepping(optim.Adam([model], lr=schedule), model),
    "packed": lambda model, opt: (mt.pack(model), stepping(optim.Adam([model], lr=schedule), model))[1],
    "jit: backward pass": lambda model, opt: mt.jit(whole(model, opt, loss_with(checked_backward))),
    "jit: rule": lambda model, opt: mt.jit(whole(model, CheckedRule([model], lr=0.1))),
    "jit: schedule": lambda model, opt: mt.jit(whole(model, optim.SGD([model], lr=schedule))),
    "jit: clipping": lambda model, opt: mt.jit(whole(model, opt, limit=pure)),
    "scan": lambda model, opt: scan(whole(model, opt, loss_with(checked_backward))),
    "LBFGS closure": lbfgs,
    "LossScaler": scaler,
    "scaled loss": scaled_loss,
}


def raises_and_changes_nothing(run: Callable[[], Any], *objects: Any) -> None:
    before, key = everything(*objects), stream_state()
    grads = [None if cell.grad is None else np.array(cell.grad.value) for cell in objects[0]._cells.values()]
    fails[0] = True
    for _ in range(2):
        with pytest.raises(Exception, match="injected"):
            run()
    fails[0] = False
    jax.effects_barrier()  # what has failed does not come again
    assert_unchanged(before, *objects)
    for cell, grad in zip(objects[0]._cells.values(), grads, strict=True):
        assert cell.grad is None or (np.array(cell.grad.value) == grad).all()
    assert_array_equal(stream_state(), key)
    assert_alive(*objects)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("place", PLACES)
def test_a_callback_that_raises_changes_nothing(place: str) -> None:
    model, opt = pair()
    mt.backward(squared, model, X, Y)
    run = PLACES[place](model, opt)
    raises_and_changes_nothing(run, model, opt)  # at the first call
    run()
    raises_and_changes_nothing(run, model, opt)  # at a later one
    run()
    assert_alive(model, opt)


@pytest.mark.parametrize("first", [False, True])
def test_a_callback_for_some_shapes_only(first: bool) -> None:
    """A program that calls Python back for one shape of what it is given."""

    class Rule(mt.Optimizer):
        @staticmethod
        def update(p: Any, g: Any, s: Any, h: Any) -> Any:
            return p - h.lr * (pure(g) if p.size == 3 else g), s

    class One(mt.Module):
        def __init__(self, n: int) -> None:
            self.weight = mt.Parameter(jnp.ones(n))

    opts = [Rule([One(n)], lr=0.1) for n in (2, 3)]
    for opt in opts if first else ():
        mt.backward(lambda m: m.weight.sum(), opt.modules[0])
        opt.step()
    mt.backward(lambda m: m.weight.sum(), opts[0].modules[0])
    opts[0].step()
    mt.backward(lambda m: m.weight.sum(), opts[1].modules[0])
    raises_and_changes_nothing(opts[1].step, opts[1].modules[0], opts[1])


# -- each kind ---------------------------------------------------------------------------------------------------------

touch_p = Primitive("touch")
touch_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(touch_p, mlir.lower_fun(lambda x: pure(x), multiple_results=False))


def io(x: Any) -> Any:
    return jax.experimental.io_callback(check, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def ordered(x: Any) -> Any:
    return jax.experimental.io_callback(check, jax.ShapeDtypeStruct(x.shape, x.dtype), x, ordered=True)


def debug(x: Any) -> Any:
    jax.debug.callback(check, x)
    return x


def printing(x: Any) -> Any:
    jax.debug.print("{}", x)
    return x


def checking(x: Any) -> Any:
    checkify.check(~failing(x), "injected")
    return x


def failing(x: Any) -> Any:
    return jax.pure_callback(lambda _: np.array(fails[0]), jax.ShapeDtypeStruct((), bool), x)


def nested(x: Any) -> Any:
    """In a branch in a loop in a jitted function."""
    branch = lambda x: jax.lax.cond(x.sum() < jnp.inf, pure, lambda x: x, x)
    return jax.jit(lambda x: jax.lax.fori_loop(0, 2, lambda _, x: branch(x), x))(x)


KINDS: dict[str, Callable[[Any], Any]] = {
    "pure_callback": pure,
    "io_callback": io,
    "io_callback, ordered": ordered,
    "debug.callback": debug,
    "debug.print": printing,
    "custom primitive": touch_p.bind,
    "checkify": checking,
    "nested": nested,
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_callback_in_a_rule(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rule(mt.Optimizer):
        @staticmethod
        def update(p: Any, g: Any, s: Any, h: Any) -> Any:
            return p - h.lr * KINDS[kind](g), s

    monkeypatch.setattr(sys, "stdout", Broken())
    model, _ = pair()
    opt = Rule([model], lr=0.1)
    run = stepping(opt, model)
    jax.config.update("jax_experimental_unsafe_xla_runtime_errors", kind == "checkify")
    try:
        raises_and_changes_nothing(run, model, opt)
        run()
        raises_and_changes_nothing(run, model, opt)
    finally:
        jax.config.update("jax_experimental_unsafe_xla_runtime_errors", False)


def test_what_calls_no_python_is_updated_in_place() -> None:
    """A custom_vjp without a callback is as quick as any loss: its arrays are donated."""

    @jax.custom_vjp
    def plain(x: Any) -> Any:
        return x

    plain.defvjp(lambda x: (x, None), lambda _, g: (2 * g,))
    model, opt = pair()
    train = mt.jit(whole(model, opt, loss_with(plain)))
    train()
    train()
    held = [cell.stored for cell in (*model._cells.values(), opt._steps) if cell.kind != "buffer"]
    train()
    assert all(array.is_deleted() for array in held)
    step(model, opt, X, Y)
    step(model, opt, X, Y)
    held = [cell.stored for cell in (*model._cells.values(), opt._steps) if cell.kind != "buffer"]
    step(model, opt, X, Y)
    assert all(array.is_deleted() for array in held)
