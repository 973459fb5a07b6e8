"""Imports go one way, nothing imports the package root, and the core knows neither its adapters nor other libraries."""

import ast
import functools
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minitorch_jax"
FILES = {
    ".".join(("minitorch_jax", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(module, path):
    """The modules that a file imports, as absolute names."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base


@functools.cache
def graph():
    """What each module imports."""
    return {module: set(imports(module, path)) for module, path in FILES.items()}


def test_the_import_graph_has_no_cycle():
    inner = {module: {name for name in names if name in FILES and name != module} for module, names in graph().items()}
    order = list(TopologicalSorter(inner).static_order())  # raises CycleError
    ways = (("runtime.numpy_memory", "state.cell"), ("state.pytree", "module.module"), ("state.walk", "engine.tracing"))
    for below, above in ways:
        assert order.index(f"minitorch_jax.{below}") < order.index(f"minitorch_jax.{above}")
    assert len(order) == len(FILES) > 15


ROOMS = ("runtime", "state", "module", "engine")  # from the lowest up: each knows those below it, and the top knows all


def test_arrows_between_rooms_go_one_way():
    for module, names in graph().items():
        room = module.split(".")[1] if module.count(".") > 1 else None
        for name in names & FILES.keys():
            other = name.split(".")[1] if name.count(".") > 1 else None
            if room in ROOMS and other != room:
                assert other in ROOMS[: ROOMS.index(room)], (module, name)


def test_nothing_imports_the_package_root():
    roots = {module: names & {"minitorch_jax", "minitorch_jax.adapters"} for module, names in graph().items()}
    assert roots.pop("minitorch_jax.__main__") == {"minitorch_jax"}  # which nothing imports
    assert not any(roots.values()), roots


def test_nn_and_optim_do_not_know_each_other():
    for module, names in graph().items():
        for mine, other in (("nn", "optim"), ("optim", "nn")):
            if module.startswith(f"minitorch_jax.{mine}"):
                assert not any(name.startswith(f"minitorch_jax.{other}") for name in names), module


def test_only_jax_and_numpy_are_imported():
    outside = {name.partition(".")[0] for names in graph().values() for name in names}
    assert outside - set(sys.stdlib_module_names) <= {"jax", "numpy", "minitorch_jax"}


def test_importing_starts_no_device_and_loads_no_extra():
    code = """
import sys, minitorch_jax, minitorch_jax.nn, minitorch_jax.optim
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
assert not {"torch", "optax", "flax", "sklearn", "matplotlib", "pytest"} & set(sys.modules)
assert not any(name.startswith("minitorch_jax.adapters") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_the_design_page_says_where_each_feature_lives():
    """Each file of the core is in the page's table, and each file that it names is there."""
    page = (ROOT / "docs" / "design.md").read_text()
    core = {path.relative_to(PACKAGE).as_posix() for path in FILES.values()}
    core = {
        name
        for name in core
        if not name.startswith(("nn/", "optim/rules/", "optim/schedules/")) and "__init__" not in name
    }
    table = "\n".join(line for line in page.splitlines() if line.startswith("| "))
    assert core - set(re.findall(r"`([\w/]+\.py)`", table)) == set()
    named = set(re.findall(r"`([\w/]+\.py)`", page))
    assert {name for name in named if not (PACKAGE / name).exists() and not (ROOT / name).exists()} == set()
