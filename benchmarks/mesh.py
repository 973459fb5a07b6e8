"""Training on a mesh of 4 CPU devices: `python -m benchmarks.mesh DEPTH ROUNDS BLOCK NAME...` prints times as JSON.

It runs in a process of its own, since JAX keeps the number of devices that it started with. The figures are the CPU time of
the main thread, which is what a call costs in Python: on virtual devices the computation says nothing about real ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import minitorch_jax as mt

from . import ours, timing
from .comparison import Effort
from .peers import hand
from .problems import LR, MLP
from .timing import Cost, Side, Times

DEVICES = 4
JIT, HAND_FUSED = "mt.jit", "fused jax.jit by hand"
STEP, HAND = "step()", "jax.jit by hand"


class OnMainThread(Side):
    """A side whose time is the CPU time of the calling thread.

    Each call is waited for, untimed: with many calls under way, XLA's few threads would wait for each other for ever.
    """

    def cost(self, calls: int, warm: int = 0) -> Cost:
        passed = 0.0
        for i in range(warm + calls):
            start = time.thread_time()
            result = self.run(1)
            passed += time.thread_time() - start if i >= warm else 0
            jax.block_until_ready(result)
        return Cost(passed, passed)


def on(*spec: Any) -> jax.sharding.NamedSharding:
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


def compiled(problem: MLP) -> Side:
    """Our training step, compiled."""
    training = ours.Training(problem)
    training.model.to(on())
    x, y = jax.device_put((training.x, training.y), on("data"))
    step = mt.jit(training.step)

    def run(calls: int) -> jax.Array:
        for _ in range(calls):
            loss = step(x, y)
        return loss

    return OnMainThread(run)


def fused(problem: MLP) -> Side:
    """The same by hand, with the same shardings."""
    params, x, y = hand.load(problem)
    params, lr = jax.device_put((params, jnp.float32(LR)), on())
    x, y = jax.device_put((x, y), on("data"))
    step = jax.jit(hand.train_step, donate_argnums=0, out_shardings=on())

    def run(calls: int) -> jax.Array:
        nonlocal params
        for _ in range(calls):
            params, loss = step(params, x, y, lr)
        return loss

    return OnMainThread(run)


def stepped(problem: MLP) -> Side:
    """Our `step()` alone, with gradients that stay."""
    training = ours.Training(problem)
    model, opt = training.model.to(on()), training.opt
    model.accumulate([jnp.full_like(array, 0.1) for array in model.parameters()])

    def run(calls: int) -> jax.Array:
        for _ in range(calls):
            opt.step()
        steps: jax.Array = opt._steps.stored  # a parameter would be lent by reading it, and copied at the next step
        return steps

    return OnMainThread(run, value=lambda _: model.parameters()[0][0])


def updated(problem: MLP) -> Side:
    """The same by hand, with the same shardings."""
    params, lr = jax.device_put((hand.load(problem)[0], jnp.float32(LR)), on())
    grads = [jnp.full_like(array, 0.1) for array in params]
    update = jax.jit(hand.make_update().__wrapped__, donate_argnums=0, out_shardings=on())

    def run(calls: int) -> jax.Array:
        nonlocal params
        for _ in range(calls):
            params = update(params, grads, lr)
        return params[0]

    return OnMainThread(run, value=lambda array: array[0])


MAKERS: dict[str, Callable[[MLP], Side]] = {JIT: compiled, HAND_FUSED: fused, STEP: stepped, HAND: updated}
PAIRS = (JIT, HAND_FUSED), (STEP, HAND)


def measure(names: Sequence[str], effort: Effort, depth: int) -> Times:
    """The times of the sides that are named, for a network of some depth."""
    command = [sys.executable, "-m", "benchmarks.mesh", str(depth), str(effort.rounds), str(effort.block), *names]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}".strip()
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    found: Times = json.loads(done.stdout.splitlines()[-1])
    return found


def main(depth: int, rounds: int, block: float, names: Sequence[str]) -> None:
    found: Times = {}
    for pair in PAIRS:
        sides = {name: MAKERS[name](MLP(depth, 16, 16)) for name in pair if name in names}
        found |= timing.steady(sides, rounds, block) if sides else {}
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
