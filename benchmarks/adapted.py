"""Our sides with parts of other libraries: their modules, their optimizers."""

from __future__ import annotations

from typing import Any

import jax
import optax

from minitorch_jax.adapters.equinox import Equinox
from minitorch_jax.adapters.flax import NNX
from minitorch_jax.adapters.optax import OptaxOptimizer

from . import ours
from .peers import equinox, nnx
from .peers.optax import make_optimizer
from .problems import LR, MLP, Arrays
from .timing import Side


class Vmapped(Equinox):
    """An equinox module of one sample, called on a batch."""

    def forward(self, x: Any) -> Any:
        return jax.vmap(self.module)(x)


def flax(problem: MLP) -> Side:
    """A module of flax nnx under `mt.jit`."""
    return ours.compiled(problem, NNX(nnx.make_model(problem)))


def equinox_module(problem: MLP) -> Side:
    """A module of equinox under `mt.jit`."""
    return ours.compiled(problem, Vmapped(equinox.make_model(problem)))


def optax_rule(problem: MLP) -> Side:
    """Our module with a transformation of optax under `mt.jit`."""
    return ours.compiled(problem, optimizer=lambda modules: OptaxOptimizer(modules, optax.sgd(LR)))


def step(problem: Arrays, rule: str) -> Side:
    """`step()` of a transformation of optax, alone."""
    return ours.step(problem, optimizer=lambda modules: OptaxOptimizer(modules, make_optimizer(rule)))
