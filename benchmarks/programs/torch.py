# mypy: disallow-subclassing-any=False
"""The programs by torch, as eager code. Runs in the worker's process, which imports no JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .named_as_torch import make_class
from .networks import PROGRAMS, draw

F = torch.nn.functional
Base: Any = make_class(torch.nn)


class Network(Base):
    def concatenate(self, *images: Any) -> Any:
        return torch.cat(images, 1)


class Library:
    cross_entropy = staticmethod(F.cross_entropy)
    detach = staticmethod(torch.Tensor.detach)
    grad = staticmethod(torch.func.grad)
    vmap = staticmethod(torch.func.vmap)

    @staticmethod
    def bce_with_logits(logits: Any, label: float) -> Any:
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))

    @staticmethod
    def by_input(function: Callable[[Any], Any], x: Any) -> Any:
        x = x.detach().requires_grad_() if not x.requires_grad else x
        return torch.autograd.grad(function(x).sum(), x, create_graph=True)[0]

    @staticmethod
    def functional(net: Any) -> tuple[Any, Callable[[Any, Any], Any]]:
        return dict(net.named_parameters()), lambda params, x: torch.func.functional_call(net, params, (x,))

    @staticmethod
    def map(function: Callable[..., Any], *trees: Any) -> Any:
        return {name: function(*(tree[name] for tree in trees)) for name in trees[0]}


def make(name: str, tiny: bool, device: str) -> Callable[[int], torch.Tensor]:
    """The usual loop."""
    program, lib = PROGRAMS[name], Library()
    batch = [torch.tensor(array, device=device) for array in program.data(*(program.tiny if tiny else program.size))]
    nets = {key: Network(define).to(device) for key, define in program.nets.items()}
    for key, inputs in program.inputs(batch).items():
        nets[key](*inputs)
    for net in nets.values():
        with torch.no_grad():
            for key, parameter in net.named_parameters():
                parameter.copy_(torch.tensor(draw(key, parameter.shape)))
        for buffer in net.buffers():
            if buffer.dtype.is_floating_point:
                buffer.zero_()
    params = {key: list(net.parameters()) for key, net in nets.items()}
    optimizers = {key: make_optimizer(params[key], program.rule, program.lr) for key, _ in program.phases}

    def run(calls: int) -> torch.Tensor:
        for _ in range(calls):
            for key, loss in program.phases:
                optimizers[key].zero_grad()
                value = loss(lib, nets, batch)
                value.backward(inputs=params[key])
                optimizers[key].step()
        return value.detach()

    return run


def make_optimizer(params: list[torch.nn.Parameter], rule: str, lr: float) -> torch.optim.Optimizer:
    if rule == "adam":
        return torch.optim.Adam(params, lr=lr, fused=True)
    return torch.optim.SGD(params, lr=lr, momentum=0.9, fused=True)
