"""Our steps right after something else in the process moved: only the step is timed, never what moved.

A step uses one model and one optimizer. What happens to others must not slow it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax

import minitorch_jax as mt
from minitorch_jax import nn

from .ours import Training
from .problems import LR, MLP
from .timing import Side

OTHER = MLP(2, 16)  # the other model, small: disturbing takes time too

Disturbance = Callable[[Training], Any]


def _nothing(training: Training) -> None:
    pass


def _make_module(training: Training) -> None:
    nn.ReLU()


def _switch_mode(training: Training) -> None:
    training.model.eval()
    training.model.train()


def _flatten(training: Training) -> None:
    jax.tree.map(lambda leaf: leaf, training.opt)


def _copy(training: Training) -> None:
    copy.deepcopy(training.opt)


def _set_lr(training: Training) -> None:
    training.opt.lr = LR


def _read_parameter(training: Training) -> None:
    _ = training.model[0].weight


def _freeze(training: Training) -> None:
    training.model.freeze()
    training.model.unfreeze()


def _step(training: Training) -> None:
    training.step(training.x, training.y)


NOTHING = "nothing"
OWN_MODE = "its own eval(); train()"
OTHERS: dict[str, Disturbance] = {
    "a module made": _make_module,
    "another's eval(); train()": _switch_mode,
    "another optimizer flattened": _flatten,
    "another optimizer copied": _copy,
    "another's lr = x": _set_lr,
    "another's parameter read": _read_parameter,
    "another's freeze(); unfreeze()": _freeze,
    "another's eager step": _step,
}


def _before(what: str, training: Training) -> Callable[[], Any]:
    """What is done, untimed, before each step of `training`."""
    if what == OWN_MODE:
        return lambda: _switch_mode(training)
    disturb, other = OTHERS.get(what, _nothing), Training(OTHER)
    return lambda: disturb(other)


def compiled(problem: MLP, what: str) -> Side:
    """A step under `mt.jit`."""
    training = Training(problem)
    train_step = mt.jit(training.step)
    return Side(lambda calls: train_step(training.x, training.y), before=_before(what, training))


def three_calls(problem: MLP, what: str) -> Side:
    """The eager loop."""
    training = Training(problem)

    def run(calls: int) -> tuple[jax.Array, int]:
        loss = training.step(training.x, training.y)
        return loss, training.opt.num_steps  # which waits for the last update

    return Side(run, value=lambda result: result[0], before=_before(what, training))
