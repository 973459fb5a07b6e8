"""What type checkers know of the package, as users install it: from a wheel, and by `pip install -e`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import jax
import pytest
from type_checks import CHECKERS, FILES, differences

ROOT = Path(__file__).parents[1]
PROJECT = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "minitorch_jax", "adapters")
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, tmp_path_factory):
    """A copy of the project, and an interpreter that has it installed in that way, beside the packages of this one."""
    pytest.importorskip("setuptools", minversion="77")
    project, site = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("installed")
    for name in PROJECT:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "adapters") if name == "minitorch_jax" else None
            shutil.copytree(ROOT / name, project / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, project)
    command = [sys.executable, "-c", BUILD, request.param, str(site)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    venv.create(site / "venv", symlinks=True)
    packages = next(site.glob("venv/lib/python*/site-packages"))
    with zipfile.ZipFile(site / done.stdout.splitlines()[-1]) as wheel:
        wheel.extractall(packages)
    (packages / "others.pth").write_text(str(Path(jax.__file__).parents[1]))
    return project, site / "venv" / "bin" / "python"


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there, so an import hook finds the adapters")
def test_each_install_is_found_by_path_and_has_the_adapters(installed, request):
    """A type checker runs no import hooks, so each package must lie in the folder of the one around it."""
    project, python = installed
    names = "minitorch_jax, minitorch_jax.adapters.numpy"
    code = f"import sys, {names}; print(*[sys.modules[n].__file__ for n in {names.split(', ')}], sys.meta_path)"
    command = [python, "-E", "-c", code]
    done = subprocess.run(command, cwd=project.parent, capture_output=True, text=True, timeout=300, check=False)
    package, adapter, hooks = done.stdout.split(maxsplit=2)
    assert Path(adapter) == Path(package).parent / "adapters" / "numpy" / "__init__.py"
    assert "editable" not in hooks
    assert Path(package).is_relative_to(project) is ("editable" in request.node.name)


@pytest.mark.slow
@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_type_checkers_accept_and_refuse_what_they_should(file, checker, installed):
    pytest.importorskip(checker)
    assert differences(checker, file, str(installed[1])) == []


def test_the_files_have_what_is_right_and_what_is_wrong():
    for file in FILES:
        text = file.read_text()
        assert text.count("# refused") > 12 and text.count("assert_type(") + text.count("optim.") > 12, file
