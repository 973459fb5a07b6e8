"""All or nothing for calls within calls: what raises within a trace, and is caught there, has changed nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import pytest
from training import Boom, X, Y, assert_alive, assert_same, eagerly, everything, pair, squared, step

import minitorch_jax as mt
from minitorch_jax.module import random


def change_everything(model: Any, opt: Any, x: Any, y: Any) -> None:
    """Parameters, buffers, gradients, momentum, counts, a setting, a mode, a static attribute; then it raises."""
    opt.lr = 0.5
    opt.zero_grad()
    mt.backward(squared, model, x, y)
    opt.step()
    mt.backward(squared, model, x, y)
    model.eval()
    model.note = "changed"
    raise Boom


class Unlucky(mt.Optimizer):
    """A rule that raises at the second parameter."""

    @staticmethod
    def update(p: Any, g: Any, s: Any, h: Any) -> Any:
        if p.ndim == 0:
            raise Boom
        return p - h.lr * g, s


def late(model: Any, opt: Any, x: Any, y: Any) -> Any:
    """A loss that changes what a loss may change, then raises."""
    squared(model, x, y)
    model.note = "changed"
    model.eval()
    raise Boom


def scanned(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda model, opt, x, y: mt.scan(lambda x, y: fn(model, opt, x, y), x[None], y[None])


def methods(model: Any, opt: Any, x: Any, y: Any) -> None:
    class Trainer:
        @mt.jit
        def train(self, x: Any, y: Any) -> None:
            change_everything(model, opt, x, y)

    Trainer().train(x, y)


def second_of_two(model: Any, opt: Any, x: Any, y: Any) -> None:
    """A call that has succeeded is taken back with the one around it."""

    def both() -> None:
        mt.jit(step)(model, opt, x, y)
        mt.jit(change_everything)(model, opt, x, y)

    mt.jit(both)()


def scaled(model: Any, opt: Any, x: Any, y: Any) -> None:
    def train() -> None:
        scaler = mt.LossScaler()
        scaler.backward(squared, model, x, y)
        scaler.unscale(opt)
        scaler.step(opt)
        raise Boom

    mt.jit(train)()


RAISING: dict[str, Callable[..., Any]] = {
    "jit": mt.jit(change_everything),
    "jit of a method": methods,
    "jit in jit": mt.jit(lambda *args: mt.jit(change_everything)(*args)),
    "two in one": second_of_two,
    "scan": scanned(change_everything),
    "scan in scan": scanned(scanned(change_everything)),
    "scan in jit": mt.jit(scanned(change_everything)),
    "backward": lambda *args: mt.backward(late, *args),
    "value_and_grad": lambda *args: mt.value_and_grad(late)(*args),
    "jit in a loss": lambda *args: mt.backward(mt.jit(late), *args),
    "wrong loss": lambda model, opt, x, y: mt.backward(lambda m: (m(x), setattr(m, "note", "changed"))[0], model),
    "rule": mt.jit(lambda model, opt, x, y: step(model, Unlucky([model]), x, y)),
    "loss scaler": scaled,
}


def train_on(model: Any, opt: Any, x: Any, y: Any) -> Any:
    """A step of training, before which one call after another raises."""

    def now() -> list[Any]:
        grads = [cell.grad.value for cell in model._cells.values() if cell.grad is not None]
        state = [cell.value for _, held in opt._state.values() for cell in held]
        values = [cell.value for cell in (*model._cells.values(), opt._steps, opt._hyper.cell, random.current().cell)]
        return [*grads, *state, *values, model.training, model.note]

    for name, raising in RAISING.items():
        before = now()
        with pytest.raises((Boom, TypeError)):
            raising(model, opt, x, y)
        assert all(new is old for new, old in zip(now(), before, strict=True)), name
    return step(model, opt, x, y)


@jax.jit
def jax_jit(_: Any, opt: Any, x: Any, y: Any) -> Any:
    return train_on(opt.modules[0], opt, x, y), opt


def scanning(model: Any, opt: Any, x: Any, y: Any) -> Any:
    return mt.scan(lambda x, y: train_on(model, opt, x, y), x[None], y[None])


@pytest.mark.parametrize("around", [mt.jit(train_on), scanning, jax_jit])
def test_a_nested_call_that_raises_and_is_caught_has_changed_nothing(around: Callable[..., Any]) -> None:
    model, opt = pair()
    model.note = "as it was"
    for steps in (1, 2):
        out = around(model, opt, X, Y)
        if around is jax_jit:
            opt = out[1]
            model = opt.modules[0]
        assert_same(everything(model, opt), eagerly(steps)[1])
        assert_alive(model, opt)
    assert (model.training, model.note) == (True, "as it was")
