"""`examples/sharded_lm.py` runs in a process of its own, with 8 devices, and its loss falls."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "sharded_lm.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, str(EXAMPLE), *options]
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=500)


@pytest.mark.slow
def test_it_trains_over_eight_devices() -> None:
    done = run("--steps", "25", "--width", "32")
    assert done.returncode == 0, done.stderr
    assert re.search(r"embedding +Embedding .* weight P\('model', 'data'\)", done.stdout)
    assert re.search(r"linear2 +Linear .* weight P\('data', 'model'\), bias P\(\)", done.stdout)
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d+) ", done.stdout)]
    assert len(losses) == 6 and losses[0] > 4 > 3.6 > losses[-1], done.stdout


@pytest.mark.parametrize(
    "options, message",
    [
        (("--steps", "0"), "argument --steps: must be at least 1; got 0"),
        (("--width", "20"), "must be a multiple of 8; got 20"),
    ],
)
def test_wrong_options(options: tuple[str, ...], message: str) -> None:
    done = run(*options)
    assert done.returncode == 2 and message in done.stderr
