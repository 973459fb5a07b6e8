"""JAX's persistent compilation cache: a program is the same in every process, so the second one compiles nothing."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

PROGRAM = """
    import jax, jax.numpy as jnp, minitorch_jax as mt
    from minitorch_jax import nn, optim

    def seen(): return jax.random.key(7)

    class Trainer:
        def __init__(self):
            make = lambda i: nn.Sequential(nn.Linear(3, 3, key=jax.random.key(i)), nn.BatchNorm1d(3), nn.Dropout(0.5))
            self.nets = {name: make(i) for i, name in enumerate("abcd")}
            self.opts = [optim.Adam([net], lr=lambda t: 0.1 * rate) for net in self.nets.values()]
            self.x, self.y, self.settings = jnp.ones((2, 3)), jnp.zeros((2, 3)), {"scale": 2.0, "shift": 1.0}

        def loss(self):
            outs = [net(self.x) for net in self.nets.values()]
            return ((sum(outs[1:], outs[0]) * self.settings["scale"] - self.y + bias + helper(self.x)) ** 2).mean()

        def step(self):
            for opt in self.opts: opt.zero_grad()
            loss = mt.backward(self.loss)
            for opt in self.opts: opt.step()
            return loss

    rate, bias, names = 1.0, jnp.ones(3)[None], {"p", "q", "r", "s"}
    def helper(x): return x * len(names)
    mt.seed(0)
    first, second, third, fourth = (nn.Linear(3, 3, key=jax.random.key(i)) for i in range(4))
    mt.backward(lambda x: (first(x) + second(x) * third(x) - fourth(x)).mean(), jnp.ones((2, 3)))
    trainer = Trainer()
    mt.jit(trainer.step)()
    trainer.step()
    jax.block_until_ready(trainer.nets["a"][0].weight)
"""


def test_another_process_with_another_hash_seed_adds_no_program(tmp_path: Path) -> None:
    counts = []
    for seed in ("1", "2"):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        subprocess.run([sys.executable, "-c", textwrap.dedent(PROGRAM)], env=environment, check=True, timeout=600)  # noqa: S603
        counts.append(len(list(tmp_path.glob("*-cache"))))
    assert counts[0] == counts[1] > 0
