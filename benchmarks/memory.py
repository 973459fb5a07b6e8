"""The most memory that three steps hold at a time, by the operating system's account: `python -m benchmarks.memory`.

Each side runs in a process of its own, which is told the side and the number of floats and prints bytes. It counts from
the moment when JAX has started, before any array exists.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from . import ours
from .peers import hand
from .problems import Arrays
from .timing import Side, Times

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
OURS, HAND, LEAST = "step()", "jax.jit by hand", "parameters + gradients"
MAKERS: dict[str, Callable[[Arrays], Side]] = {OURS: ours.step, HAND: hand.step}


def unavailable() -> str | None:
    """Why it cannot be measured here; None if it can."""
    if not CLEAR.exists():
        return "this system keeps no high-water mark of a process in /proc"
    if jax.default_backend() != "cpu":
        return "the operating system's account leaves out the memory of devices"
    return None


def measure(names: Sequence[str], size: int) -> Times:
    """Bytes of each side, and of the parameters and gradients themselves."""
    found: Times = {}
    for name in names:
        if name == LEAST:
            found[name] = [float(2 * 4 * size)]
            continue
        command = [sys.executable, "-m", "benchmarks.memory", name, str(size)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
        found[name] = [float(done.stdout)]
    return found


def resident(field: str) -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def main(name: str, size: int) -> None:
    MAKERS[name](Arrays(1, 16)).seconds(1)  # JAX has started
    before = resident("VmRSS")
    side = MAKERS[name](Arrays(1, size))
    side.seconds(2)  # the first step copies what came from NumPy
    gc.collect()
    CLEAR.write_text("5")  # the high-water mark starts anew
    side.seconds(3)
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
