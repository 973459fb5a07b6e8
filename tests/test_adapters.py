"""Adapters without their libraries: which need one, what they say without it, and that the core loads none of them."""

import ast
import functools
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from minitorch_jax.runtime.install import command

ROOT = Path(__file__).parents[1]
FOUND = {path.stem: path for path in (ROOT / "adapters").glob("*.py")}
FOUND |= {path.name: path for path in (ROOT / "adapters").iterdir() if (path / "__init__.py").exists()}
ADAPTERS = {name: path for name, path in sorted(FOUND.items()) if not name.startswith("_")}
OURS = {*sys.stdlib_module_names, "jax", "numpy", "minitorch_jax"}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@functools.cache
def libraries(name):
    """What an adapter, a file or a folder, imports besides JAX and NumPy."""
    path = ADAPTERS[name]
    names = set()
    for file in [path] if path.is_file() else path.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.partition(".")[0])
    return names - OURS


BLOCKED = """
import importlib, json, sys
names, blocked = json.load(sys.stdin)
for library in blocked:
    assert library not in sys.modules
    sys.modules[library] = None  # importing it is an ImportError
import minitorch_jax
loaded = [name for name in sys.modules if name.startswith("minitorch_jax.adapters")]
said = {}
for name in names:
    try:
        importlib.import_module(f"minitorch_jax.adapters.{name}")
    except ImportError as error:
        said[name] = str(error)
print(json.dumps([loaded, said]))
"""


@pytest.fixture(scope="module")
def blocked():
    """What importing the package loads of the adapters, and what each adapter raises, where no library is installed."""
    given = json.dumps([list(ADAPTERS), sorted(set().union(*map(libraries, ADAPTERS)))])
    run = [sys.executable, "-W", "error", "-c", BLOCKED]
    done = subprocess.run(run, input=given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_core_imports_no_adapter(blocked):
    assert len(ADAPTERS) > 2 and {"safetensors", "orbax"} <= ADAPTERS.keys()
    assert blocked[0] == []


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_without_its_library_says_how_to_install_it(blocked, name):
    said = blocked[1].get(name)
    if not libraries(name):
        assert said is None  # NumPy's, for which there is nothing to install
        return
    assert said.startswith(f"minitorch_jax.adapters.{name} needs a library that cannot be imported here (")
    assert said.endswith(f"). Install it {command(name)}")
    assert EXTRAS[name] and any(f"{name}," in extra or f"{name}]" in extra for extra in EXTRAS["adapters"])
