"""Train a small language model over 8 devices, made where it lies: no device ever holds all of it.

The mesh is 4 x 2. Along "data" the batch is divided, and the parameters too (FSDP). Along "model" the matrices of the
feed-forward networks and the tied embedding are divided (tensor parallelism). The model predicts the next character of the
text that Python's own `help()` shows. Without 8 accelerators it runs on 8 virtual devices of the CPU:

    python examples/sharded_lm.py
    python examples/sharded_lm.py --steps 500 --width 128
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

import minitorch_jax as mt
from minitorch_jax import nn, optim

SHAPE = (4, 2)
LENGTH, BATCH, WIDTH, LAYERS = 32, 32, 64, 2
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # 96, so that the embedding divides
RULES = {"embedding.weight": P("model"), "*.linear1.*": P("model"), "*.linear2.weight": P(None, "model")}


class LM(mt.Module):
    """A decoder of characters, whose last layer has the weights of its first one."""

    def __init__(self, width: int) -> None:
        self.embedding = nn.Embedding(len(CHARACTERS), width)
        self.positions = nn.Embedding(LENGTH, width)
        nn.init.normal_(self.embedding, "weight", std=0.02)
        nn.init.normal_(self.positions, "weight", std=0.02)
        self.blocks = [
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        ]
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(CHARACTERS), bias=False)
        self.head.tie("weight", self.embedding, "weight")

    def forward(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding(tokens) + self.positions.weight
        earlier = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        for block in self.blocks:
            x = block(x, earlier)
        logits: jax.Array = self.head(self.norm(x))
        return logits


def text() -> NDArray[np.int32]:
    """The pages of Python's `help()` as numbers of characters."""
    numbers = {character: i for i, character in enumerate(CHARACTERS)}
    return np.array([numbers.get(character, 1) for page in topics.values() for character in page], np.int32)


def loss_fn(model: LM, batch: jax.Array) -> jax.Array:
    logits = model(batch[:, :-1]).reshape(-1, len(CHARACTERS))
    return nn.functional.cross_entropy(logits, batch[:, 1:].reshape(-1))


def train(steps: int, width: int) -> list[float]:
    """Train, print what lies where and how the loss falls, and return the losses."""
    mesh = jax.make_mesh(SHAPE, ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:8])
    mt.seed(0)
    model: LM = mt.shard(lambda: LM(width), mesh, RULES, fsdp="data")
    opt = optim.AdamW([model], lr=3e-3)
    print(mt.summary(model))

    @mt.jit
    def step(batch: jax.Array) -> jax.Array:
        opt.zero_grad()
        loss = mt.backward(loss_fn, model, batch)
        mt.clip_grad_norm(model, 1.0)
        opt.step()
        return loss

    rng, characters, losses = np.random.default_rng(0), text(), list[Any]()
    rows = NamedSharding(mesh, P("data"))
    for i in range(steps):
        starts = rng.integers(0, len(characters) - LENGTH - 1, BATCH)
        batch = characters[starts[:, None] + np.arange(LENGTH + 1)]
        losses.append(step(jax.device_put(batch, rows)))
        if i % max(steps // 5, 1) == 0 or i == steps - 1:
            print(f"step {i + 1:4}: loss {float(losses[-1]):.3f} (guessing: {math.log(len(CHARACTERS)):.3f})")
    return [float(loss) for loss in losses]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=_positive, default=60, help="how many steps (default: %(default)s)")
    parser.add_argument(
        "--width", type=_width, default=WIDTH, help="of the model, a multiple of 8 (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if jax.device_count() < math.prod(SHAPE):
        parser.error(f"this needs {math.prod(SHAPE)} devices, and JAX has {jax.device_count()}")
    train(options.steps, options.width)
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {number}")
    return number


def _width(text: str) -> int:
    number = _positive(text)
    if number % 8:
        raise argparse.ArgumentTypeError(f"must be a multiple of 8; got {number}")
    return number


if __name__ == "__main__":
    jax.config.update(
        "jax_num_cpu_devices", math.prod(SHAPE)
    )  # the default would be one; of no concern to accelerators
    raise SystemExit(main())
