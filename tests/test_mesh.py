"""The tests of `tests/mesh`, which need 8 devices: one process runs them all, so that JAX starts once.

By hand: `XLA_FLAGS=--xla_force_host_platform_device_count=8 pytest -n 0 tests/mesh`.
"""

from __future__ import annotations

import fcntl
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).parent
FILES = sorted(path.stem for path in (HERE / "mesh").glob("test_*.py"))
FLAG = "--xla_force_host_platform_device_count=8"
LONGEST = 3600  # seconds


class Run:
    """What one run of `tests/mesh` has said, and the outcome of each test by file."""

    def __init__(self, config: pytest.Config, chosen: str, folder: Path) -> None:
        report, output = folder / f"{chosen}.xml", folder / f"{chosen}.txt"
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("w") as lock:  # pytest's other workers wait for this run, and read what it has said
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not output.exists():
                output.write_text(_run(config, chosen, report))
        self.output = output.read_text()
        cases = ElementTree.parse(report).iter("testcase") if report.exists() else ()
        self.passed: dict[str, list[bool]] = {}
        for case in cases:
            failed = any(case.find(tag) is not None for tag in ("failure", "error"))
            self.passed.setdefault(Path(case.attrib.get("file", "?")).stem, []).append(not failed)


def _run(config: pytest.Config, chosen: str, report: Path) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", chosen, "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}", "-o", "junit_family=xunit1", str(HERE / "mesh")]
    if cache := config.getoption("--compilation-cache"):
        command += ["--compilation-cache", cache]
    flags = f"{FLAG} {os.environ.get('XLA_FLAGS', '')}".strip()
    env = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True, timeout=LONGEST)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def run_of(request: Any, tmp_path_factory: Any) -> Callable[[str], Run]:
    """Runs the tests with some marks, once for all workers of pytest."""
    base, together = tmp_path_factory.getbasetemp(), os.environ.get("PYTEST_XDIST_TESTRUNUID")
    folder = base.parent / f"mesh-{together}" if together else tmp_path_factory.mktemp("mesh")
    return functools.cache(lambda chosen: Run(request.config, chosen, folder))


@pytest.mark.parametrize("file", FILES)
def test_on_eight_devices(file: str, run_of: Any) -> None:
    run = run_of("not slow")
    assert file in run.passed, run.output
    assert all(run.passed[file]), run.output


@pytest.mark.slow
def test_slow_ones_on_eight_devices(run_of: Any) -> None:
    run = run_of("slow")
    assert run.passed and all(map(all, run.passed.values())), run.output
