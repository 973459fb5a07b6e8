"""The process that runs torch: `python -m benchmarks.torch_worker`. It is told what to do by lines of JSON, and answers so.

It imports no JAX. Its messages are `make` (set up some work), `tune` (find the number of threads that suits it), `run`
(do it n times, and say how long that took), `value` (do it n times, and say what came out), and `drop` (forget it).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import CORES
from .layers import torch as layers
from .problems import DECAY, LAYER_LR, LR, MLP, MOMENTUM, Arrays, Layer
from .programs import torch as programs

Run = Callable[[int], Any]


@dataclass
class Work:
    """Something to do, and the number of threads to do it with."""

    run: Run
    threads: int = CORES
    value: Callable[[Any], Any] = torch.Tensor.tolist  # of what was run, as numbers


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_optimizer(params: list[torch.Tensor], variant: str, rule: str = "sgd") -> torch.optim.Optimizer:
    flags: Any = {variant: True}  # foreach or fused
    if rule == "adam":
        return torch.optim.Adam(params, lr=LR, **flags)
    if rule == "adamw":
        return torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, **flags)
    return torch.optim.SGD(params, lr=LR, momentum=MOMENTUM if rule == "momentum" else 0, **flags)


def make_step(problem: Arrays, variant: str, rule: str) -> Run:
    """The update alone."""
    params = [torch.tensor(p, device=DEVICE) for p in problem.parameters()]
    for p, g in zip(params, problem.gradients(), strict=True):
        p.grad = torch.tensor(g, device=DEVICE)
    optimizer = make_optimizer(params, variant, rule)

    def run(calls: int) -> torch.Tensor:
        for _ in range(calls):
            optimizer.step()
        return params[0][:16]

    return run


def make_train(problem: MLP, variant: str) -> Run:
    """The usual loop."""
    layers: list[torch.nn.Module] = []
    for weight, bias in problem.weights():
        linear = torch.nn.Linear(problem.width, problem.width)
        linear.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
        layers += [linear, torch.nn.Tanh()]
    model = torch.nn.Sequential(*layers).to(DEVICE)
    optimizer = make_optimizer(list(model.parameters()), variant)
    x, y = (torch.tensor(array, device=DEVICE) for array in problem.data())
    loss_fn = torch.nn.functional.mse_loss

    def run(calls: int) -> torch.Tensor:
        for _ in range(calls):
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
        return loss.detach()

    return run


def make_layer(problem: Layer) -> Run:
    """The usual loop over one layer."""
    n, nn = problem.size, torch.nn
    match problem.kind:
        case "conv":
            layer: torch.nn.Module = nn.Conv2d(n, n, 3, padding=1)
        case "lstm":
            layer = nn.LSTM(n, n, bias=False, batch_first=True)
        case "attention":
            layer = nn.MultiheadAttention(n, problem.heads, batch_first=True)
        case _:
            layer = nn.TransformerEncoderLayer(n, problem.heads, 2 * n, dropout=0.0, batch_first=True)
    layer.load_state_dict({name: torch.tensor(weight) for name, weight in problem.weights().items()})
    layer.to(DEVICE)
    optimizer = torch.optim.SGD(layer.parameters(), lr=LAYER_LR, fused=True)
    x, y = (torch.tensor(array, device=DEVICE) for array in problem.data())

    def predict() -> torch.Tensor:
        if problem.kind == "attention":
            return layer(x, x, x, need_weights=False)[0]
        return layer(x)[0] if problem.kind == "lstm" else layer(x)

    def run(calls: int) -> torch.Tensor:
        for _ in range(calls):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(predict(), y)
            loss.backward()
            optimizer.step()
        return loss.detach()

    return run


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def tune(work: Work) -> int:
    """Choose between one thread and all: for small tensors, threads that wait for each other cost more than they give."""
    medians = {}
    calls = 3 if timed(work, 1, 1)["seconds"] < 0.02 else 1
    for threads in {1, CORES}:
        work.threads = threads
        medians[threads] = statistics.median(timed(work, calls, 1)["seconds"] for _ in range(3))
    work.threads = min(medians, key=lambda threads: medians[threads])
    return work.threads


def timed(work: Work, calls: int, warm: int) -> dict[str, float]:
    """The time of `calls` calls, after `warm` ones that are not counted, by the clock and of the processor."""
    run = work.run
    torch.set_num_threads(work.threads)
    if warm:
        run(warm)
        wait()
    start, cpu = time.perf_counter(), time.process_time()
    run(calls)
    wait()
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}


def answer(works: dict[int, Work], message: dict[str, Any]) -> Any:
    """What a message asks for."""
    match message:
        case {"do": "make", "key": key, "work": "step", "problem": problem, "variant": variant, "rule": rule}:
            works[key] = Work(make_step(Arrays(*problem), variant, rule))
        case {"do": "make", "key": key, "work": "train", "problem": problem, "variant": variant}:
            works[key] = Work(make_train(MLP(*problem), variant))
        case {"do": "make", "key": key, "work": "layer", "problem": problem}:
            works[key] = Work(make_layer(Layer(*problem)))
        case {"do": "make", "key": key, "work": "differentiated", "name": name, "size": size}:
            run, value = layers.make(name, size, DEVICE)
            works[key] = Work(run, value=value)
        case {"do": "make", "key": key, "work": "program", "name": name, "tiny": tiny}:
            works[key] = Work(programs.make(name, tiny, DEVICE))
        case {"do": "tune", "key": key}:
            return tune(works[key])
        case {"do": "run", "key": key, "calls": calls, "warm": warm}:
            return timed(works[key], calls, warm)
        case {"do": "value", "key": key, "calls": calls}:
            return works[key].value(works[key].run(calls))
        case {"do": "drop", "key": key}:
            del works[key]
        case _:
            raise ValueError(f"no such message: {message}")
    return None


def main() -> None:
    works: dict[int, Work] = {}
    for line in sys.stdin:
        try:
            reply: dict[str, Any] = {"result": answer(works, json.loads(line))}
        except Exception:
            reply = {"error": traceback.format_exc()}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
