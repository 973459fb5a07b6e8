"""A layer by torch. Runs in the worker's process, which imports no JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .kinds import KINDS, cotangent, fingerprint

Value = Callable[[Any], list[float]]


def make(name: str, size: Sequence[int], device: str) -> tuple[Callable[[int], Any], Value]:
    """What runs a layer forward and backward that often, and what is compared of its result."""
    kind = KINDS[name]
    arrays = {key: torch.tensor(array, device=device) for key, array in kind.arrays(size).items()}
    fixed = {key: torch.tensor(array, device=device) for key, array in kind.fixed(size).items()}
    if kind.module is None:
        leaves = [array.requires_grad_() for array in arrays.values()]

        def forward() -> torch.Tensor:
            return kind.call(torch.nn, **arrays, **fixed)

    else:
        module = kind.module(torch.nn, *size).to(device)
        x = arrays.pop("x").requires_grad_()
        module.load_state_dict(arrays)
        leaves = [x, *module.parameters()]

        def forward() -> torch.Tensor:
            return kind.call(torch.nn, module, x)

    g = torch.tensor(cotangent(tuple(forward().shape)), device=device)

    def run(calls: int) -> Any:
        for _ in range(calls):
            out = forward()
            gradients = torch.autograd.grad(out, leaves, g)
        return out, gradients

    def value(result: Any) -> list[float]:
        out, gradients = result
        host = [tensor.detach().cpu().numpy() for tensor in (out, g, leaves[0], *gradients)]
        return fingerprint(host[0], host[1], host[2], host[3:])

    return run, value
