"""Our sides with parts of other libraries: their modules, their optimizers."""

from __future__ import annotations

from typing import Any

import jax
import optax

import minitorch_jax as mt
from minitorch_jax.adapters.equinox import Equinox
from minitorch_jax.adapters.flax import NNX
from minitorch_jax.adapters.optax import OptaxOptimizer

from . import ours
from .peers import equinox, nnx
from .peers.optax import make_optimizer
from .problems import LR, MLP, Arrays
from .timing import Side


class Batched(mt.Module):
    """An equinox module, which takes one sample, called on a batch."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def forward(self, x: jax.Array) -> Any:
        return jax.vmap(self.inner.module)(x)


def flax(problem: MLP) -> Side:
    """A module of flax nnx under `mt.jit`."""
    return ours.compiled(problem, NNX(nnx.make_model(problem)))


def equinox_module(problem: MLP) -> Side:
    """A module of equinox under `mt.jit`."""
    return ours.compiled(problem, Batched(Equinox(equinox.make_model(problem))))


def optax_rule(problem: MLP) -> Side:
    """Our module with a transformation of optax under `mt.jit`."""
    return ours.compiled(problem, optimizer=lambda modules: OptaxOptimizer(modules, optax.sgd(LR)))


def step(problem: Arrays, rule: str) -> Side:
    """`step()` of a transformation of optax, alone."""
    return ours.step(problem, optimizer=lambda modules: OptaxOptimizer(modules, make_optimizer(rule)))
