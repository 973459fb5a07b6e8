"""What is published: metadata, the README of an index page, the sdist's files, and what `python -m minitorch_jax` prints."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
from email import message_from_bytes
from pathlib import Path
from typing import Any

import jax
import pytest
from lazily import Lazily

import minitorch_jax as mt
from minitorch_jax import __main__ as main
from minitorch_jax.runtime import xla_faults
from minitorch_jax.runtime.install import command

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
yaml = Lazily("yaml")

# -- what stands in several places -------------------------------------------------------------------------------------


def test_one_version() -> None:
    assert mt.__version__ == PROJECT["version"]
    cited = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", cited, flags=re.M) == [PROJECT["version"]]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_one_repository() -> None:
    files = [ROOT / "CITATION.cff", ROOT / "pyproject.toml", *(ROOT / ".github").rglob("*.yml")]
    found = {url for file in files for url in re.findall(r"https://github\.com/[\w-]+/[\w-]+", file.read_text())}
    assert found == {REPOSITORY}


def test_the_readme_says_how_to_install_an_extra_as_errors_do() -> None:
    section = (ROOT / "README.md").read_text().partition("\n## Install\n")[2].partition("\n## ")[0]
    assert command("flax").rpartition(": ")[2] in section


# -- the built files ---------------------------------------------------------------------------------------------------

BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The names of the sdist's files, and its metadata. It is built from links to the project's files."""
    pytest.importorskip("setuptools", minversion="77")
    project, out = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("dist")
    for path in ROOT.iterdir():
        if path.name not in (".git", "build", "dist") and not path.name.endswith((".egg-info", "_cache", ".venv")):
            (project / path.name).symlink_to(path)
    command = [sys.executable, "-c", BUILD, str(out)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
        info = archive.extractfile(f"minitorch_jax-{PROJECT['version']}/PKG-INFO")
        assert info is not None
        return names, message_from_bytes(info.read())


def test_the_links_of_the_index_page_lead_to_files(sdist: Any) -> None:
    _, metadata = sdist
    text = metadata.get_payload(decode=True).decode()
    assert metadata["Description-Content-Type"].startswith("text/markdown")
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    ours = [
        re.fullmatch(rf"{REPOSITORY}/(?:blob|raw)/v{PROJECT['version']}/([^#]+)(?:#.*)?", target) for target in targets
    ]
    assert sum(match is not None for match in ours) > 10
    for target, match in zip(targets, ours, strict=True):
        assert target.startswith(("https://", "#")), target
        assert match is None or (ROOT / match[1]).exists(), target
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert images and all("/raw/" in image for image in images)


def test_the_sdist_has_what_the_tests_read(sdist: Any) -> None:
    names, metadata = sdist
    for folder in ("tests", "docs", "examples", "benchmarks", "adapters", ".ci", ".github"):
        there = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}
        there = {name for name in there if "__pycache__" not in name and "_build" not in name}
        assert there <= set(names), sorted(there - set(names))[:5]
    assert {"CHANGELOG.md", "README.md", "pyproject.toml", "minitorch_jax/py.typed", ".pre-commit-config.yaml"} <= set(
        names
    )
    assert not [name for name in names if name.endswith(".pyc")]
    assert metadata["Author"] == "The minitorch_jax developers" and len(metadata.get_all("Project-URL")) == 4


# -- what services read ------------------------------------------------------------------------------------------------


def test_the_workflows_run_what_is_there() -> None:
    needs_yaml()
    for file in (ROOT / ".github").rglob("*.yml"):
        content = yaml.safe_load(file.read_text())
        assert content, file
        for job in content.get("jobs", {}).values():
            assert job["runs-on"] and all("uses" in step or "run" in step for step in job["steps"])
            for step in job["steps"]:
                for path in re.findall(r"(?:^|\s)((?:\.ci|tests)/[\w./]+)", step.get("run", "")):
                    assert (ROOT / path).exists(), path
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    run = (ROOT / ".ci" / "run").read_text()
    for hook in hooks:
        assert f'\n"$py" {hook["entry"].partition(" ")[2]}\n' in run


def needs_yaml() -> None:
    pytest.importorskip("yaml", reason="needs PyYAML")


# -- python -m minitorch_jax -------------------------------------------------------------------------------------------


def test_the_report_has_what_a_bug_report_needs() -> None:
    environment = os.environ | {"JAX_ENABLE_X64": "1", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "minitorch_jax"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=True)
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line and not line.startswith(" "))
    assert lines["minitorch_jax"].startswith(mt.__version__)
    assert f"jax {jax.__version__}, jaxlib " in lines["needed"] and "numpy " in lines["needed"]
    assert re.search(r"\d+ cpu", lines["devices"])
    assert "enable_x64=True" in lines["settings"] and "JAX_ENABLE_X64='1'" in lines["environment"]
    assert "lose NaN" in done.stdout.partition("known faults")[2]


def test_optional_libraries_are_those_of_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    users = PROJECT["optional-dependencies"]
    named = {re.split(r"[\[>=]", need)[0] for extra in ("adapters", "export") for need in of_extra(users, extra)}
    assert named == set(main.OPTIONAL)
    monkeypatch.setattr(main, "OPTIONAL", ("jax", "no-such-package"))
    (line,) = [line for line in main.report() if line.startswith("optional")]
    assert line == f"optional: jax {jax.__version__}, no no-such-package"


def of_extra(extras: dict[str, list[str]], name: str) -> list[str]:
    found = []
    for need in extras[name]:
        inner = re.fullmatch(r"minitorch_jax\[(.*)\]", need)
        found += [n for extra in inner[1].split(",") for n in of_extra(extras, extra)] if inner else [need]
    return found


def test_a_platform_that_does_not_start_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "devices", fails)
    assert "devices: none: Unable to initialize backend 'cuda'" in list(main.report())


def test_the_faults_of_a_version() -> None:
    assert len(xla_faults.known("0.10.2")) == len(xla_faults.known("0.11.0")) == 3
    assert [str(fault) for fault in xla_faults.known("0.12.0")] == ["max and min reductions of float32 lose NaN"]
    assert str(xla_faults.known("0.10.2")[1]).endswith("is wrong, jax issue 39103")
