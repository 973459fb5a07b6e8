"""Two processes with 4 devices each: they train, save, and lose a process; others go on elsewhere."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from lazily import Lazily, needs
from numpy.testing import assert_allclose

import minitorch_jax as mt

needs("orbax.checkpoint")
training_in_processes, orbax = Lazily("training_in_processes"), Lazily("minitorch_jax.adapters.orbax")


def free_port() -> int:
    """A port that nobody has, below those which the system gives to whoever asks for any: these may be gone at once."""
    for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("none of 100 ports is free")


@contextmanager
def started(part: str, folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes that run a part. None is left when the block ends."""
    port = free_port()
    script = Path(__file__).with_name("training_in_processes.py")
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TF_CPP_MIN_LOG_LEVEL": "3"}
    running = []
    try:
        for number in range(2):
            with (folder / f"{part}-{number}.txt").open("w") as log:
                command = [sys.executable, str(script), part, str(number), str(port), str(folder)]
                running.append(
                    subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
                )
        yield running
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait(30)


def said(part: str, folder: Path) -> str:
    return "\n".join((folder / f"{part}-{number}.txt").read_text()[-3000:] for number in range(2))


def found(part: str, folder: Path) -> list[Any]:
    return [json.loads((folder / f"{part}-{number}.json").read_text()) for number in range(2)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any) -> tuple[Path, list[Any]]:
    """The folder in which two processes have saved, and what they found, until one of them was killed during a save."""
    folder = tmp_path_factory.mktemp("processes")
    with started("train", folder) as running:
        assert running[1].wait(training_in_processes.LONGEST) == -signal.SIGKILL, said("train", folder)
        assert (folder / "train-0.json").exists(), said("train", folder)
    return folder, found("train", folder)


@pytest.fixture(scope="module")
def went_on(trained: Any) -> list[Any]:
    folder = trained[0]
    with started("go_on", folder) as running:
        for process in running:
            assert process.wait(training_in_processes.LONGEST) == 0, said("go_on", folder)
    return found("go_on", folder)


@pytest.mark.slow
def test_processes_train_alike(trained: Any) -> None:
    _, (one, other) = trained
    assert one["begun"] == other["begun"] and one["after"] == other["after"]
    assert one["went_on"][-1] < one["begun"][0]
    assert "'model'" in one["specs"]["layers.0.weight"] and "'data'" in one["specs"]["layers.0.weight"]


def test_they_train_as_one_device(trained: Any) -> None:
    _, (one, _) = trained
    run = training_in_processes.Run()
    mt.seed(0)
    with mt.rng(mt.next_key()):  # as the maker
        run.net.load_state_dict(training_in_processes.Net().state_dict())
    assert_allclose(one["begun"], run.train(), rtol=1e-4)


def test_one_process_writes_the_file_and_errors_reach_both(trained: Any) -> None:
    folder, both = trained
    run = training_in_processes.Run()
    assert mt.load(folder / "run.npz", model=run.net, opt=run.opt) == {"step": 4}
    assert run.numbers() == both[0]["numbers"]
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp" or path.name == "other.npz"]
    first, second = (one["refused"]["no folder"] for one in both)
    assert first[0] == "FileNotFoundError" and "none/run.npz" in first[1]
    assert second[0] == "OSError" and "process 0 could not write" in second[1] and "none/run.npz" in second[1]
    for one in both:
        assert one["refused"]["a lost process"][1].startswith(
            "save(): model.first.weight could not be gathered from all"
        )
        assert one["refused"]["different objects"][0] == "ValueError"
        assert "the processes pass objects with different arrays" in one["refused"]["different objects"][1]


@pytest.mark.slow
def test_after_a_killed_save_the_same_mesh_goes_on_bit_by_bit(trained: Any, went_on: list[Any]) -> None:
    for before, after in zip(trained[1], went_on, strict=True):
        assert after["steps"] == [4] and after["values"] == {"step": 4}
        for key in ("specs", "numbers", "went_on", "after"):
            assert after[key] == before[key], key


def test_another_mesh_goes_on(trained: Any, went_on: list[Any]) -> None:
    for before, after in zip(trained[1], went_on, strict=True):
        for way in ("other", "file"):
            assert after[way]["numbers"] == before["numbers"]
            assert after[way]["specs"].keys() == before["specs"].keys()
        assert_allclose(after["other"]["went_on"], before["went_on"], rtol=1e-4)


def test_one_device_goes_on(trained: Any) -> None:
    folder, (before, _) = trained
    run = training_in_processes.Run()
    with orbax.Manager(folder / "run", keep=None) as checkpoints:
        assert checkpoints.restore(4, model=run.net, opt=run.opt) == {"step": 4}
    assert run.numbers() == before["numbers"]
    assert_allclose(run.train(), before["went_on"], rtol=1e-4)
