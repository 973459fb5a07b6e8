"""What is lowered says of each operation in which module it is."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import minitorch_jax as mt
from minitorch_jax import nn, optim

X = jnp.ones((3, 4))


class Attention(mt.Module):
    def __init__(self) -> None:
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return self.proj(jnp.tanh(x))


class Net(mt.Module):
    def __init__(self) -> None:
        self.blocks = [nn.Sequential(Attention()), nn.Sequential(Attention())]
        self.again = self.blocks[0]

    def forward(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return nn.Tanh()(x)


def scopes(lowered: Any) -> str:
    return "\n".join(sorted(set(re.findall(r'op_name="([^"]*)"', lowered.compile().as_text()))))


def test_a_compiled_step_carries_paths() -> None:
    model = Net()
    opt = optim.SGD([model], lr=0.1)

    def step(x: Any) -> Any:
        loss = mt.backward(lambda x: model(x).sum(), x)
        opt.step()
        return loss

    found = scopes(mt.jit(step).lower(X))
    for block in (0, 1):
        assert f"jvp(Net)/blocks/{block}/0/proj/dot_general" in found
        assert f"transpose(jvp(Net))/blocks/{block}/0/proj/dot_general" in found
        assert f"jvp(Net)/blocks/{block}/0/tanh" in found
    assert "jvp(Net)/Tanh/tanh" in found  # a module that the model does not hold goes by its class
    assert "again" not in found


def test_plain_jit_carries_paths_too() -> None:
    found = scopes(jax.jit(lambda model, x: model(x)).lower(Net(), X))
    assert "/Net/blocks/1/0/proj/dot_general" in found


def test_a_call_that_raises_leaves_no_scope() -> None:
    class Failing(mt.Module):
        def __init__(self) -> None:
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Any) -> Any:
            return self.inner(x)

    failing, linear = Failing(), nn.Linear(4, 2)

    def call(x: Any) -> Any:
        with pytest.raises((TypeError, ValueError)):
            failing(x)
        return linear(x)

    found = scopes(jax.jit(call).lower(X))
    assert "jit(call)/Linear/dot_general" in found and "Failing" not in found
