# mypy: disallow-subclassing-any=False
"""The programs by minitorch_jax: the eager three lines of each phase, under `mt.jit`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import minitorch_jax as mt
from minitorch_jax import nn, optim

from ..timing import Side
from .jax_library import JaxLibrary
from .named_as_torch import make_class
from .networks import PROGRAMS, Net, draw

F = nn.functional
Base: Any = make_class(nn)


class Network(Base):
    def concatenate(self, *images: Any) -> Any:
        return jnp.concatenate(images, 1)


def make(define: Net, inputs: Any) -> Any:
    """A network, whose layers an abstract call finds."""
    makers: dict[str, Callable[[], Any]] = {}

    class Abstract(Network):
        def layer(self, name: str, make: Callable[..., Any], *args: Any, **options: Any) -> Any:
            makers[name] = partial(make, *args, **options)
            with mt.rng(jax.random.key(0)):
                return makers[name]()

    jax.eval_shape(lambda *inputs: Abstract(define)(*inputs), *inputs)
    net = Network(define)
    net.layers.update({name: make() for name, make in makers.items()})
    drawn = {name: draw(name, parameter.shape) for name, parameter in net.named_parameters()}
    net.load_state_dict(drawn, strict=False)
    return net


class Library(JaxLibrary):
    @staticmethod
    def cross_entropy(logits: Any, target: Any) -> Any:
        return F.cross_entropy(logits, target)

    @staticmethod
    def bce_with_logits(logits: Any, label: float) -> Any:
        return F.binary_cross_entropy_with_logits(logits, jnp.full_like(logits, label))

    @staticmethod
    def functional(net: Any) -> tuple[Any, Callable[[Any, Any], Any]]:
        return net, lambda net, x: net(x)


def side(name: str, tiny: bool = False) -> Side:
    program = PROGRAMS[name]
    lib: Any = Library()
    batch = [jnp.asarray(array) for array in program.data(*(program.tiny if tiny else program.size))]
    inputs = program.inputs(batch)
    nets = {key: make(define, inputs[key]) for key, define in program.nets.items()}
    rule = partial(optim.SGD, momentum=0.9) if program.rule == "momentum" else optim.Adam
    optimizers = {key: rule([nets[key]], lr=program.lr) for key, _ in program.phases}
    phases = program.phases

    @mt.jit
    def train_step(*batch: jax.Array) -> jax.Array:
        for key, loss in phases:
            optimizers[key].zero_grad()
            bound: Any = partial(loss, lib, nets, batch)
            value = mt.backward(bound)
            optimizers[key].step()
        for net in nets.values():
            net.zero_grad()
        return value

    def run(calls: int) -> jax.Array:
        for _ in range(calls):
            loss = train_step(*batch)
        return loss

    return Side(run)
