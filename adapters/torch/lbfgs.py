"""The state of LBFGS. Torch keeps lists of pairs over its parameters; we keep tables over ours, in our order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .arrays import dtype_of, tensor_of, to_numpy
from .matching import Param


class Vector:
    """The positions of the parameters in torch's vector, which also includes frozen parameters."""

    def __init__(self, params: Sequence[Param], torch_opt: torch.optim.Optimizer) -> None:
        self.params = [param for param in params if param.cell.trainable]
        self.tensors: list[torch.Tensor] = torch_opt.param_groups[0]["params"]
        ends = np.cumsum([0, *(tensor.numel() for tensor in self.tensors)])
        places = {id(tensor): slice(a, b) for tensor, a, b in zip(self.tensors, ends[:-1], ends[1:], strict=True)}
        self.slices = [places[id(p.tensor)] for p in self.params if id(p.tensor) in places]
        self.size = int(ends[-1])
        self.state: dict[str, Any] = torch_opt.state.get(self.tensors[0], {})

    def here(self, theirs: torch.Tensor, dtype: Any) -> NDArray[Any]:
        """Torch's vector, in our order."""
        values = to_numpy(theirs).astype(dtype)
        return np.concatenate([values[where] for where in self.slices])

    def there(self, ours: Any) -> torch.Tensor:
        """Our vector, in torch's order."""
        ours = np.asarray(ours)
        values, start = np.zeros(self.size, ours.dtype), 0
        for where in self.slices:
            length = where.stop - where.start
            values[where] = ours[start : start + length]
            start += length
        return tensor_of(values).to(self.tensors[0].device)


def loaded(vector: Vector, known: Mapping[str, Any], problems: list[str]) -> dict[str, dict[str, Any]]:
    """Our state by path, made from torch's. `known` is our current state."""
    fields: dict[str, dict[str, Any]] = {path: {} for path in known}
    if not vector.params or problems:
        return fields
    first, theirs = vector.params[0].path, vector.state
    zeros: dict[str, Any] = {
        name: np.zeros_like(np.asarray(value)) for name, value in known[first].items() if name != "step"
    }
    new: dict[str, Any] = zeros | {"H_diag": zeros["H_diag"] + 1, "func_evals": np.int32(theirs.get("func_evals", 0))}
    fields[first] = new
    if not theirs.get("n_iter"):
        return fields
    rows, pairs, dtype = len(zeros["ro"]), len(theirs.get("ro") or ()), zeros["d"].dtype
    if theirs.get("d") is None:
        problems.append(
            "torch's last step was interrupted, so its state has no direction: take another step in torch first"
        )
    elif pairs > rows or vector.tensors and dtype_of(theirs["d"]).itemsize > dtype.itemsize:
        problems.append(
            f"torch has {pairs} pairs of {dtype_of(theirs['d'])}, and this optimizer holds {rows} pairs of {dtype}: construct"
            " it with torch's history_size, and modules of torch's dtype"
        )
    else:
        for name in ("d", "prev_flat_grad"):
            new[name] = vector.here(theirs[name], dtype)
        for name in ("t", "H_diag"):
            new[name] = np.asarray(float(theirs[name]), dtype)
        for name in ("old_dirs", "old_stps"):
            new[name][:pairs] = [vector.here(row, dtype) for row in theirs[name]]
        new["ro"][:pairs] = [float(value) for value in theirs["ro"]]
        new["num_stored"], new["n_iter"] = np.int32(pairs), np.int32(theirs["n_iter"])
    return fields


def copied(vector: Vector, known: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Torch's state, made from ours."""
    if not vector.params or problems:
        return {}
    ours = {name: np.asarray(value) for name, value in known[vector.params[0].path].items()}
    counts = {"func_evals": int(ours["func_evals"]), "n_iter": int(ours["n_iter"])}
    if not counts["n_iter"]:
        return counts if counts["func_evals"] else {}
    if any(dtype_of(param.tensor) != ours["d"].dtype for param in vector.params):
        problems.append(
            f"the vector of all parameters is {ours['d'].dtype} here, and has the parameters' dtype in torch: train in"
            f" {ours['d'].dtype} on both sides"
        )
        return {}
    size, stored = len(ours["ro"]), int(ours["num_stored"])
    rows = [i % size for i in range(max(stored - size, 0), stored)]
    number = tensor_of(ours["H_diag"]).to(vector.tensors[0].device)
    return counts | {
        "d": vector.there(ours["d"]),
        "t": float(ours["t"]),
        "old_dirs": [vector.there(ours["old_dirs"][row]) for row in rows],
        "old_stps": [vector.there(ours["old_stps"][row]) for row in rows],
        "ro": [tensor_of(ours["ro"][row]).to(number.device) for row in rows],
        "H_diag": number,
        "prev_flat_grad": vector.there(ours["prev_flat_grad"]),
        "prev_loss": None,  # torch sets it before it reads it
    }
