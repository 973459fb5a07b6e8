"""Installs a wheel in empty environments, and runs there what a new user runs first.

    python tests/wheel_checks.py WHEEL PYTHON...     # for each interpreter: the README's first example, and what adapters say

Only the package and what it needs are installed. The programs run in an empty folder, so they find the package where a
user's program finds it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"

PLAIN = """
import importlib, sys
import minitorch_jax as mt, minitorch_jax.adapters.numpy as mini
from minitorch_jax.runtime.install import command

net = mini.Sequential(mini.Linear(2, 1))
mt.Optimizer([net], lr=0.1).step()
assert "site-packages" in mini.__file__ and "torch" not in sys.modules
for name in ("equinox", "flax", "hub", "optax", "orbax", "safetensors", "torch"):
    try:
        importlib.import_module(f"minitorch_jax.adapters.{name}")
    except ImportError as error:
        assert str(error).endswith(command(name)), error
    else:
        raise AssertionError(f"{name} is not installed here")
print("works:", mt.__file__)
"""


def first_example() -> str:
    """The first block of Python in the README."""
    found = re.search(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.S | re.M)
    if found is None:
        raise ValueError(f"{README} has no block of Python")
    return found[1]


def check(wheel: Path, interpreter: str) -> None:
    """Raises CalledProcessError if something fails."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder, "venv", "bin", "python")
        empty = Path(folder, "empty")
        empty.mkdir()
        subprocess.run([interpreter, "-m", "venv", Path(folder, "venv")], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", wheel.resolve()], check=True)
        for program in ("-m", "minitorch_jax"), ("-c", PLAIN), ("-c", first_example()):
            subprocess.run([python, "-W", "error", *program], check=True, cwd=empty)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    for interpreter in sys.argv[2:]:
        check(Path(sys.argv[1]), interpreter)
