"""What a program waits for before it trains: imports, and making a network. In new processes, where nothing is compiled."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .timing import Times

OURS, JAX = "import minitorch_jax after jax", "import jax, jax.numpy"
MADE, MADE_NNX, MADE_EQUINOX = "minitorch_jax.nn", "flax.nnx", "equinox.nn"

_IMPORT = """
import time
start = time.perf_counter()
import jax, jax.numpy
between = time.perf_counter()
import minitorch_jax
print(time.perf_counter() - between, between - start)
"""

# (in, out, kernel) of a ResNet-18 for small images
CONVOLUTIONS = [(3, 64, 3), *4 * [(64, 64, 3)]]
for _width in (64, 128, 256):
    CONVOLUTIONS += [(_width, 2 * _width, 3), *3 * [(2 * _width, 2 * _width, 3)], (_width, 2 * _width, 1)]

_LIBRARIES = {
    MADE: "from minitorch_jax import nn; make = nn.Conv2d",
    MADE_NNX: "from flax import nnx; rngs = nnx.Rngs(0); make = lambda i, o, k: nnx.Conv(i, o, (k, k), rngs=rngs)",
    MADE_EQUINOX: """
import equinox as eqx
keys = iter(jax.random.split(jax.random.key(0), 100))
make = lambda i, o, k: eqx.nn.Conv2d(i, o, k, key=next(keys))
""",
}
_MAKE = """
import time
import jax
{library}
jax.block_until_ready(jax.numpy.ones(3) + 1)
start = time.perf_counter()
for sizes in {sizes}:
    layer = make(*sizes)
    jax.block_until_ready([layer.{weight}, layer.bias])
print(time.perf_counter() - start)
"""


def importing(names: Sequence[str], rounds: int) -> Times:
    """Seconds of both imports in each round, with bytecode cached, as of an installed package."""
    with tempfile.TemporaryDirectory() as cache:
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        env["PYTHONPYCACHEPREFIX"] = cache
        found: Times = {OURS: [], JAX: []}
        for _ in range(rounds + 1):
            for name, seconds in zip(found, _run(_IMPORT, env), strict=True):
                found[name].append(seconds)
    return {name: found[name][1:] for name in names}  # the first has written the bytecode


def making(names: Sequence[str], rounds: int, sizes: Sequence[tuple[int, int, int]]) -> Times:
    """Seconds that the first values of these convolutions take, one library after the other in each round."""
    found: Times = {name: [] for name in names}
    for _ in range(rounds):
        for name in found:
            weight = "kernel" if name == MADE_NNX else "weight"
            code = _MAKE.format(library=_LIBRARIES[name], sizes=list(sizes), weight=weight)
            found[name] += _run(code, os.environ)
    return found


def _run(code: str, env: os._Environ[str] | dict[str, str]) -> list[float]:
    command, root = [sys.executable, "-c", code], Path(__file__).parents[1]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env, cwd=root)
    return [float(seconds) for seconds in done.stdout.split()]
