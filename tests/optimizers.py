"""Every optimizer there is, for contracts over all of them."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp

import minitorch_jax as mt
from minitorch_jax import nn, optim

OPTIMIZERS = {
    name: kind for name, kind in sorted(vars(optim).items()) if inspect.isclass(kind) and issubclass(kind, mt.Optimizer)
}
GROUPED = [name for name, kind in OPTIMIZERS.items() if kind is not optim.LBFGS]  # one vector of all parameters


def numbers_of(kind: Any) -> dict[str, Any]:
    """The hyperparameters of a class that are numbers, or tuples of them, with their defaults."""
    found = {name: p.default for each in kind.__mro__ for name, p in _parameters(each).items()}
    return {name: v for name, v in found.items() if not isinstance(v, bool) and _is_number(v)}


def _is_number(value: Any) -> bool:
    return all(map(_is_number, value)) if isinstance(value, tuple) else isinstance(value, int | float)


def _parameters(kind: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(kind.__init__).parameters) if "__init__" in vars(kind) and kind is not object else {}


def matrix(value: float = 1.0, dtype: Any = jnp.float32) -> nn.Linear:
    """A module with one parameter of two axes, which every optimizer takes."""
    layer = nn.Linear(2, 2, bias=False, key=jax.random.key(0), dtype=dtype)
    layer.weight = value * jnp.asarray([[1.0, -2.0], [3.0, 0.5]], dtype)
    return layer


def loss_of(layer: Any, x: Any) -> Any:
    return ((layer(x) - 1) ** 2).mean()


def total(*args: Any) -> Any:
    *layers, x = args
    return sum(loss_of(layer, x) for layer in layers)


def stepped(opt: Any, x: Any = None) -> Any:
    """One step of an optimizer on the sum of its modules' losses."""
    x = jnp.ones((3, 2)) if x is None else x

    def closure() -> Any:
        opt.zero_grad()
        return mt.backward(total, *opt.modules, x)

    if isinstance(opt, optim.LBFGS):
        return opt.step(closure)
    loss = closure()
    opt.step()
    return loss
