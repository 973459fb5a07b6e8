"""What `test_processes.py` runs in two processes with 4 devices: `training_in_processes.py PART NUMBER PORT FOLDER`.

Each process writes what it has found to `FOLDER/PART-NUMBER.json`.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.adapters import orbax

LONGEST = 300  # seconds that a process may take; shortly before, it says where it is, and ends
RULES = {"layers.*.weight": P(None, "model")}
SHAPES = {"same": (4, 2), "other": (2, 4)}
X = np.linspace(-1, 1, 16 * 8, dtype=np.float32).reshape(16, 8)


class Net(mt.Module):
    def __init__(self) -> None:
        self.first = nn.Linear(8, 16)
        self.layers = [nn.Linear(16, 16), nn.Linear(16, 16)]
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.25)
        self.last = nn.Linear(16, 8)

    def forward(self, x: Any) -> Any:
        x = self.first(x)
        for layer in self.layers:
            x = self.drop(nn.functional.relu(layer(x)))
        return self.last(self.norm(x))


def loss_fn(net: Net, x: Any) -> Any:
    return ((net(x) - x) ** 2).mean()


class Run:
    """A model, its optimizer, and three ways to take a step."""

    def __init__(self, mesh: Any = None, maker: Any = Net) -> None:
        self.net: Net = Net() if mesh is None else mt.shard(maker, mesh, RULES, fsdp="data")
        self.opt = optim.AdamW([self.net], lr=0.01)
        self.x: Any = X
        if mesh is not None:
            sharding = NamedSharding(mesh, P("data"))
            rows = [X[index] for index in sharding.addressable_devices_indices_map(X.shape).values()]
            mine = np.concatenate([row for i, row in enumerate(rows) if not any((row == r).all() for r in rows[:i])])
            self.x = jax.make_array_from_process_local_data(sharding, mine, X.shape)

    def train(self) -> list[float]:
        """One step in eager code, one compiled, and two in a scan."""
        net, opt = self.net, self.opt

        def step(x: Any) -> Any:
            opt.zero_grad()
            loss = mt.backward(loss_fn, net, x)
            mt.clip_grad_norm(net, 1.0)
            opt.step()
            return loss

        first = step(self.x)
        second = mt.jit(step)(self.x)
        rest = mt.scan(lambda _: step(self.x), np.arange(2))
        return [*map(float, (first, second)), *map(float, np.asarray(rest))]

    def numbers(self) -> dict[str, list[float]]:
        """What all arrays hold, exact: their bytes as integers."""
        state = self.opt.state_dict()["state"]
        arrays = {
            **self.net.state_dict(),
            **{f"{p}.{k}": v for p, s in state.items() for k, v in s.items() if k != "step"},
        }
        return {path: whole(array).tolist() for path, array in arrays.items()}

    def specs(self) -> dict[str, str]:
        return {path: str(array.sharding.spec) for path, array in self.net.state_dict().items()}


def whole(array: Any) -> np.ndarray:
    gathered = multihost_utils.process_allgather(array, tiled=True) if jax.process_count() > 1 else array
    return np.asarray(gathered)


def fails_for_jax_arrays(gather: Any) -> Any:
    def failing(array: Any, **options: Any) -> Any:
        if isinstance(array, jax.Array):
            raise RuntimeError("connection closed by peer")
        return gather(array, **options)

    return failing


def mesh_of(shape: tuple[int, int]) -> Any:
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def train(folder: Path) -> dict[str, Any]:
    """Train, save in both ways, go on, and lose process 1 in the midst of the next save."""
    run = Run(mesh_of(SHAPES["same"]))
    begun = run.train()
    mt.save(folder / "run.npz", model=run.net, opt=run.opt, step=4)
    refused = {}
    for name, path, objects in (
        ("no folder", folder / "none" / "run.npz", {}),
        ("different objects", folder / "other.npz", {f"more{jax.process_index()}": run.net}),
    ):
        try:
            mt.save(path, model=run.net, **objects)
        except Exception as error:
            refused[name] = type(error).__name__, str(error)
    gather = multihost_utils.process_allgather
    multihost_utils.process_allgather = fails_for_jax_arrays(gather)
    try:
        mt.save(folder / "other.npz", model=run.net)
    except Exception as error:
        refused["a lost process"] = type(error).__name__, str(error)
    multihost_utils.process_allgather = gather
    checkpoints = orbax.Manager(folder / "run", keep=None)
    checkpoints.save(4, model=run.net, opt=run.opt, step=4)
    checkpoints.wait()
    found = {"specs": run.specs(), "begun": begun, "numbers": run.numbers(), "refused": refused}
    found |= {"went_on": run.train(), "after": run.numbers()}
    write(folder, "train", found)
    if jax.process_index() == 1:  # it ends when orbax begins to write
        import orbax.checkpoint as ocp

        ocp.PyTreeCheckpointHandler.async_save = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    checkpoints.save(8, model=run.net, opt=run.opt, step=8)
    checkpoints.wait()  # process 0 waits for the other one, in vain
    raise AssertionError("step 8 was saved by one process")


def go_on(folder: Path) -> dict[str, Any]:
    """Restore onto the same mesh and go on; then restore onto another mesh."""
    found: dict[str, Any] = {}
    with orbax.Manager(folder / "run", keep=None) as checkpoints:
        found["steps"] = checkpoints.all_steps()
        run = Run(mesh_of(SHAPES["same"]))
        found["values"] = checkpoints.restore(4, model=run.net, opt=run.opt)
        found |= {"numbers": run.numbers(), "went_on": run.train(), "after": run.numbers(), "specs": run.specs()}
        run = Run(mesh_of(SHAPES["other"]))
        checkpoints.restore(4, model=run.net, opt=run.opt)
        found["other"] = {"numbers": run.numbers(), "specs": run.specs(), "went_on": run.train()}
        run = Run(mesh_of(SHAPES["other"]), Net())  # laid out in place, from whole arrays in each process
        mt.load(folder / "run.npz", model=run.net, opt=run.opt)
        found["file"] = {"numbers": run.numbers(), "specs": run.specs()}
        checkpoints.save(9, model=run.net, opt=run.opt)
    return found


def write(folder: Path, part: str, found: Any) -> None:
    (folder / f"{part}-{jax.process_index()}.json").write_text(json.dumps(found))


def main(part: str, number: int, port: int, folder: Path) -> None:
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # With several programs under way, XLA's few threads may wait for each other for ever (those of plain JAX, too).
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, number, initialization_timeout=120)
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 8, 4)
    write(folder, part, {"train": train, "go_on": go_on}[part](folder))
    jax.distributed.shutdown()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(LONGEST - 20, exit=True)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
