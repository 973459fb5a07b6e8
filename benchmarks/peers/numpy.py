"""NumPy: the specification's own loop."""

from __future__ import annotations

from typing import Any

import numpy as np

from minitorch_jax.adapters import numpy as mini

from ..problems import LR, MLP, Array, Arrays
from ..timing import Side


class Flat:
    """An object with the parameters API, and nothing else."""

    def __init__(self, problem: Arrays) -> None:
        self.params, self.gradients = problem.parameters(), problem.gradients()

    def parameters(self) -> list[Array]:
        return self.params

    def grads(self) -> list[Array]:
        return self.gradients


def step(problem: Arrays) -> Side:
    """The update alone."""
    model = Flat(problem)
    modules = [model]

    def run(calls: int) -> Array:
        for _ in range(calls):
            for module in modules:
                params, grads = module.parameters(), module.grads()
                for i in range(len(params)):
                    params[i] -= LR * grads[i]
        return model.params[0]

    return Side(run)


def adam_step(problem: Arrays) -> Side:
    """The update of Adam alone, as it is written by hand: with torch's defaults."""
    model = Flat(problem)
    params, grads = model.parameters(), model.grads()
    first, second = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params]
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    t = 0

    def run(calls: int) -> Array:
        nonlocal t
        for _ in range(calls):
            t += 1
            for i in range(len(params)):
                first[i] = beta1 * first[i] + (1 - beta1) * grads[i]
                second[i] = beta2 * second[i] + (1 - beta2) * grads[i] ** 2
                m, v = first[i] / (1 - beta1**t), second[i] / (1 - beta2**t)
                params[i] -= LR * m / (np.sqrt(v) + eps)
        return params[0]

    return Side(run)


def train(problem: MLP) -> Side:
    """The mini-torch that `minitorch_jax.adapters.numpy` holds."""
    layers: list[mini.Module] = []
    for weight, bias in problem.weights():
        linear = mini.Linear(problem.width, problem.width, rng=0)
        for array, value in zip(linear.parameters(), (weight, bias), strict=True):
            array[...] = value
        layers += [linear, mini.Tanh()]
    model, criterion = mini.Sequential(*layers), mini.MeanSquaredError()
    opt = mini.Optimizer([model], lr=LR)
    x, y = problem.data()

    def run(calls: int) -> Any:
        for _ in range(calls):
            opt.zero_grad()
            loss = criterion(model(x), y)
            model.backward(criterion.backward())
            opt.step()
        return np.float32(loss)

    return Side(run)
