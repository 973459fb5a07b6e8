"""PyTorch, in a process of its own: its thread pool and XLA's disturb each other within one."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ..problems import MLP, Arrays, Layer
from ..timing import STEPS_CHECKED, Cost, Side

QUIET = 0.01  # seconds for which the threads of whoever ran last may still spin


class Worker:
    """The process, which sits idle unless it is asked for something."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._keys = itertools.count()

    def make(self, **work: Any) -> int:
        """Set up some work; gives its key."""
        key = next(self._keys)
        self.ask(do="make", key=key, **work)
        return key

    def ask(self, **message: Any) -> Any:
        process = self._process = self._process or self._start()
        to, answers = _pipes(process)
        time.sleep(QUIET)
        to.write(json.dumps(message) + "\n")
        to.flush()
        line = answers.readline()
        if not line:
            raise RuntimeError(f"torch's process ended, with status {process.wait()}; its own words are above")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"in torch's process:\n{answer['error']}")
        time.sleep(QUIET)
        return answer["result"]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()  # the end of its input
            self._process = None

    @staticmethod
    def _start() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "benchmarks.torch_worker"]
        root = Path(__file__).parents[2]
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            start_new_session=True,  # a Ctrl-C is for the main process, which then closes this one's input
        )


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("torch's process has no pipes")
    return process.stdin, process.stdout


worker = Worker()


class TorchSide(Side):
    """A side that the worker runs and times, with as many threads as suit it best."""

    def __init__(self, **work: Any) -> None:
        self.key = worker.make(**work)
        super().__init__(lambda calls: worker.ask(do="value", key=self.key, calls=calls))

    def cost(self, calls: int, warm: int = 0) -> Cost:
        answer = worker.ask(do="run", key=self.key, calls=calls, warm=warm)
        return Cost(answer["seconds"], answer["cpu"])

    def first(self) -> NDArray[Any]:
        values = np.array([self.run(1) for _ in range(STEPS_CHECKED)])
        worker.ask(do="tune", key=self.key)
        return values

    def close(self) -> None:
        worker.ask(do="drop", key=self.key)


def step(problem: Arrays, variant: str, rule: str = "sgd") -> Side:
    """The update alone; `variant` is "foreach" or "fused"."""
    return TorchSide(work="step", problem=problem, variant=variant, rule=rule)


def train(problem: MLP, variant: str) -> Side:
    """`zero_grad`, `backward` and `step`."""
    return TorchSide(work="train", problem=problem, variant=variant)


def layer(problem: Layer) -> Side:
    """Forward, backward and an SGD step of one layer."""
    return TorchSide(work="layer", problem=problem)


def program(name: str, tiny: bool) -> Side:
    """A training step of `programs.networks`."""
    return TorchSide(work="program", name=name, tiny=tiny)


def differentiated(name: str, size: Sequence[int]) -> Side:
    """Forward and backward of a layer or a loss of `layers.kinds`."""
    return TorchSide(work="differentiated", name=name, size=size)
