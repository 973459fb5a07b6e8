"""Every layer, loss and function is held against torch by some test file, and the page that lists them is up to date."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import minitorch_jax as mt
from minitorch_jax import nn

TESTS = Path(__file__).parent
FILES = [importlib.import_module(path.stem) for path in sorted(TESTS.glob("test_nn_*.py")) if path.stem != __name__]
CASES = [case for file in FILES for case in getattr(file, "CASES", [])]
LAYERS = {name for name, kind in vars(nn).items() if inspect.isclass(kind) and issubclass(kind, mt.Module)} - {"Module"}
FUNCTIONS = {name for name in dir(nn.functional) if inspect.isfunction(getattr(nn.functional, name))}

# Their calls are those of what they hold: test_nn_container.py and test_nn.py.
CONTAINERS = {"Sequential", "ModuleList", "ModuleDict", "ParameterList", "ParameterDict"}
# They become the layers that have cases: test_nn_lazy.py.
LAZY = {name for name in LAYERS if name.startswith("Lazy")}
# Its targets and lengths are no cases of one form: test_nn_loss.py compares it with torch.
BY_HAND = {"CTCLoss"}


def test_every_layer_has_cases():
    assert len(LAYERS) > 100 and LAYERS - {case.name for case in CASES} == {*CONTAINERS, *LAZY, *BY_HAND}


def test_every_function_is_tested_by_name_or_through_its_layer():
    called = {layer.lower() for layer in LAYERS}  # AvgPool1d calls avg_pool1d
    tested = {case.name for case in CASES} | {name for name in FUNCTIONS if name.replace("_", "") in called}
    sources = "".join(path.read_text() for path in (TESTS / "..").resolve().glob("tests/test_nn*.py"))
    assert {name for name in FUNCTIONS - tested if f"F.{name}" not in sources} == set()


def test_every_layer_that_draws_its_parameters_is_held_against_torchs_distributions():
    drawn = {name for name in LAYERS - LAZY if "key" in inspect.signature(getattr(nn, name)).parameters}
    assert drawn <= {made[0] for file in FILES for made in getattr(file, "INITIAL", [])}


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_every_layer_says_what_it_is(name):
    doc = inspect.getdoc(getattr(nn, name))
    assert doc and doc != inspect.getdoc(mt.Module)


@pytest.mark.slow
def test_the_page_of_what_torch_has_is_up_to_date():
    subprocess.run([sys.executable, TESTS.parent / "docs" / "coverage.py", "--check"], check=True, timeout=300)


def test_what_is_left_out_has_a_reason():
    assert "not built yet" not in (TESTS.parent / "docs" / "coverage.md").read_text(encoding="utf-8")
