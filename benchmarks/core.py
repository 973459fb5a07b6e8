"""What `opt.step()` and the three-call loop cost beside hand-written, donated `jax.jit`: `python -m benchmarks.core`.

Each row runs both sides in one process, in turn, round by round; a ratio is the median of the rounds' ratios. Nothing is
asserted. The peer passes its learning rate as a number, as such loops are written; a second row keeps it on the device,
which saves the peer a transfer at each call. Times are microseconds per call; a round waits once, for its last call.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import jax
import jax.numpy as jnp
import numpy as np

import minitorch_jax as mt
from minitorch_jax import nn

Side = Callable[[int], None]  # runs n steps and waits for the last


def paired(ours: Side, theirs: Side, calls: int, rounds: int) -> dict[str, float]:
    """Medians of both sides and of the ratio of each round."""
    ours(3)
    theirs(3)
    times: list[tuple[float, float]] = []
    for i in range(rounds):
        took = {}
        for side in (ours, theirs) if i % 2 else (theirs, ours):
            start = time.perf_counter()
            side(calls)
            took[side] = (time.perf_counter() - start) / calls * 1e6
        times.append((took[ours], took[theirs]))
    ratios = sorted(a / b for a, b in times)
    return {
        "ours_us": statistics.median(a for a, _ in times),
        "peer_us": statistics.median(b for _, b in times),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[len(ratios) // 4],
        "ratio_high": ratios[-1 - len(ratios) // 4],
    }


class Arrays(mt.Module):
    """A module of n parameters of one shape."""

    def __init__(self, n: int, size: int) -> None:
        for i in range(n):
            setattr(self, f"p{i}", mt.Parameter(np.full(size, 0.5, np.float32)))


def our_step(n: int, size: int) -> Side:
    """`Optimizer.step()` on n arrays."""
    model = Arrays(n, size)
    opt = mt.Optimizer([model], lr=0.01)
    for i in range(n):
        model.grads()[i] = np.full(size, 1e-3, np.float32)

    def ours(calls: int) -> None:
        for _ in range(calls):
            opt.step()
        jax.block_until_ready([cell.value for cell in opt._plan.params])

    return ours


def step_sides(n: int, size: int, lr: Any = 0.01) -> tuple[Side, Side]:
    """`Optimizer.step()` against a donated jit over flat lists."""
    params = [jnp.full((size,), 0.5) for _ in range(n)]
    grads = [jnp.full((size,), 1e-3) for _ in range(n)]
    update = jax.jit(lambda ps, gs, lr: [p - lr * g for p, g in zip(ps, gs, strict=True)], donate_argnums=0)

    def theirs(calls: int) -> None:
        nonlocal params
        for _ in range(calls):
            params = update(params, grads, lr)
        jax.block_until_ready(params)

    return our_step(n, size), theirs


def loop_sides(depth: int, width: int, batch: int = 8, lr: Any = 0.01) -> tuple[Side, Side]:
    """zero_grad, backward, step against a jitted value_and_grad and a donated update, on an MLP."""
    keys = jax.random.split(jax.random.key(0), depth)
    layers: list[mt.Module] = []
    for key in keys:
        layers += [nn.Linear(width, width, key=key), nn.Tanh()]
    model = nn.Sequential(*layers)
    opt = mt.Optimizer([model], lr=0.01)
    x, y = jnp.ones((batch, width)), jnp.zeros((batch, width))

    def loss_fn(model: nn.Sequential, x: jax.Array, y: jax.Array) -> jax.Array:
        return nn.functional.mse_loss(model(x), y)

    def ours(calls: int) -> None:
        for _ in range(calls):
            opt.zero_grad()
            loss = mt.backward(loss_fn, model, x, y)
            opt.step()
        jax.block_until_ready(loss)

    params = [jnp.array(p, copy=True) for p in model.parameters()]

    def hand_loss(params: list[jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
        for w, b in zip(params[::2], params[1::2], strict=True):
            x = jnp.tanh(x @ w.T + b)
        return ((x - y) ** 2).mean()

    gradients = jax.jit(jax.value_and_grad(hand_loss))
    update = jax.jit(lambda ps, gs, lr: [p - lr * g for p, g in zip(ps, gs, strict=True)], donate_argnums=0)

    def theirs(calls: int) -> None:
        nonlocal params
        for _ in range(calls):
            loss, grads = gradients(params, x, y)
            params = update(params, grads, lr)
        jax.block_until_ready(loss)

    return ours, theirs


def numpy_sides(size: int) -> tuple[Side, Side]:
    """`Optimizer.step()` against the specification's NumPy loop, one array."""
    ours = our_step(1, size)
    params, grads = [np.full(size, 0.5, np.float32)], [np.full(size, 1e-3, np.float32)]

    def theirs(calls: int) -> None:
        for _ in range(calls):
            for i in range(len(params)):
                params[i] -= np.float32(0.01) * grads[i]

    return ours, theirs


def peak_memory(size: int) -> float:
    """The most memory resident during three steps over one array of `size` floats, in arrays, by the kernel's account."""
    code = """
import sys, jax, jax.numpy as jnp, minitorch_jax as mt
from benchmarks.core import Arrays, our_step

def resident(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

size = int(sys.argv[1])
our_step(1, 16)(1)  # JAX has started
before = resident("VmRSS")
model = Arrays(1, size)
opt = mt.Optimizer([model])
model.accumulate([jnp.full((size,), 1e-3)])
opt.step()
jax.block_until_ready([cell.value for cell in opt._plan.params])
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
for _ in range(3):
    opt.step()
jax.block_until_ready([cell.value for cell in opt._plan.params])
print((resident("VmHWM") - before) / (4 * size))
"""
    done = subprocess.run([sys.executable, "-c", code, str(size)], check=True, capture_output=True, text=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds and small sizes, to see that it runs")
    parser.add_argument("--output", type=Path, help="also write the rows as JSON")
    quick = (args := parser.parse_args()).quick
    rounds = 5 if quick else 31
    rows = []
    limits = {4: 1.3, 40: 1.2, 400: 1.15, 2000: 1.15}
    for n in (4, 40) if quick else limits:
        sides = step_sides(n, 16)
        rows.append((f"step(), {n} arrays of 16", limits[n], paired(*sides, max(8, 4000 // n), rounds)))
        sides = step_sides(n, 16, lr=jnp.float32(0.01))
        rows.append(("  against an lr on the device", limits[n], paired(*sides, max(8, 4000 // n), rounds)))
    limits = {2: 1.3, 20: 1.15, 100: 1.1}
    for depth in (2,) if quick else limits:
        calls = max(8, 1000 // depth)
        name = f"three-call loop, depth {depth}, width 16"
        rows.append((name, limits[depth], paired(*loop_sides(depth, 16), calls, rounds)))
        sides = loop_sides(depth, 16, lr=jnp.float32(0.01))
        rows.append(("  against an lr on the device", limits[depth], paired(*sides, calls, rounds)))
    size = 1_000_000 if quick else 50_000_000
    rows.append((f"step(), one array of {size:,}", 1.05, paired(*step_sides(1, size), 5, max(5, rounds // 2))))
    rows.append(
        (f"step(), one array of {size:,}, NumPy loop", 1 / 3, paired(*numpy_sides(size), 5, max(5, rounds // 3)))
    )
    print(
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {os.cpu_count()} cores; peer: donated jax.jit, by hand"
    )
    print(f"{'work':42} {'ours µs':>10} {'peer µs':>10} {'ratio':>6} {'quartiles':>13} {'aim':>6}")
    for name, limit, row in rows:
        spread = f"{row['ratio_low']:.2f}..{row['ratio_high']:.2f}"
        print(
            f"{name:42} {row['ours_us']:10.1f} {row['peer_us']:10.1f} {row['ratio']:6.2f} {spread:>13} {'≤':>2}{limit:4.2f}"
        )
    if sys.platform == "linux":
        print(
            f"peak memory of step(), one array of {size:,}: {peak_memory(size):.2f} arrays (parameters + gradients = 2)"
        )
    if args.output:
        args.output.write_text(json.dumps([{"work": name, "aim": limit, **row} for name, limit, row in rows], indent=1))


if __name__ == "__main__":
    main()
