"""What `import minitorch_jax` adds to `import jax`: in new processes, with bytecode cached, as of an installed package."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .timing import Times

OURS, JAX = "import minitorch_jax after jax", "import jax, jax.numpy"
_CODE = """
import time
start = time.perf_counter()
import jax, jax.numpy
between = time.perf_counter()
import minitorch_jax
print(time.perf_counter() - between, between - start)
"""


def measure(names: Sequence[str], rounds: int) -> Times:
    """Seconds of both imports in each round."""
    with tempfile.TemporaryDirectory() as cache:
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        env["PYTHONPYCACHEPREFIX"] = cache
        found: Times = {OURS: [], JAX: []}
        for _ in range(rounds + 1):
            done = subprocess.run(
                [sys.executable, "-c", _CODE],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env=env,
                cwd=Path(__file__).parents[1],
            )
            for name, seconds in zip(found, done.stdout.split(), strict=True):
                found[name].append(float(seconds))
    return {name: found[name][1:] for name in names}  # the first has written the bytecode
