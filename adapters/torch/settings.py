"""Hyperparameters, from torch's groups to ours and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from minitorch_jax.optim.hyperparameters import is_schedule

from .matching import Param, names

WITHOUT_STEPS = ("SGD", "Muon", "LBFGS")  # torch's state of these rules does not count steps


def loaded_settings(
    opt: Any, params: list[Param], known: Mapping[str, Any], num_steps: int, problems: list[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings of the optimizer and of its groups, with torch's values. `known` is the optimizer's state dict."""
    top, own = dict(known["hyperparameters"]), [dict(mine) for mine in known.get("groups", [])]
    for name in names(opt):
        found = []
        for g in range(len(opt.groups)):
            now = own[g].get(name, top[name]) if own else top[name]
            value = _value_in_torch(opt, name, g, params, problems)
            if is_schedule(now) and value is not None:
                problems += _off_schedule(opt, f"group {g}: {name}", value, now, num_steps)
                value = None
            found.append(now if value is None else value)
        _spread(name, found, top, own)
    return top, own


def copied_settings(
    opt: Any, params: list[Param], torch_opt: Any, problems: list[str]
) -> list[tuple[dict[str, Any], str, Any]]:
    """The changes to torch's groups: (group, name, value)."""
    changes = []
    for i, group in enumerate(torch_opt.param_groups):
        mine = _trained_ones([p for p in params if p.settings is group])
        for name in names(opt):
            values = [(p.path, _value_here(opt, name, p)) for p in mine]
            advice = "construct torch's optimizer with the same groups as here"
            value = _agreed(name, values, f"group {i} of torch", advice, problems)
            if mine and not _same(_as_here(name, group[name], mine[0].tensor), value):
                changes.append((group, name, value))
    return changes


def _trained_ones(params: list[Param]) -> list[Param]:
    """The parameters whose settings matter: the trainable ones, or all if none is."""
    return [p for p in params if p.cell.trainable] or params


def _value_here(opt: Any, name: str, param: Param) -> Any:
    """The value of a setting for one parameter, as torch has it. A schedule becomes a number."""
    if name == "weight_decay" and _undecayed(opt, param):
        return 0.0
    value = opt.groups[param.group][name]
    return tuple(value) if isinstance(value, tuple | list) else value


def _value_in_torch(opt: Any, name: str, g: int, params: list[Param], problems: list[str]) -> Any:
    """Torch's value of a setting for all parameters of a group here; None if torch has none of them."""
    mine = _trained_ones([p for p in params if p.group == g and p.settings is not None])
    values = {p.path: _as_here(name, (p.settings or {})[name], p.tensor) for p in mine}
    advice = "put them in groups of their own, by their modules or names"
    if name == "weight_decay":
        advice += ", or construct this optimizer with decay_matrices_only=True"
        for p in mine:
            if _undecayed(opt, p) and values.pop(p.path):
                problems.append(f"{p.path}: torch decays it, and decay_matrices_only=True excludes it here")
    return _agreed(name, list(values.items()), f"group {g} here", advice, problems)


def _undecayed(opt: Any, param: Param) -> bool:
    """True if `decay_matrices_only` excludes a parameter from weight decay."""
    return bool(opt.groups[param.group].decay_matrices_only) and len(param.tensor.shape) < 2


def _as_here(name: str, value: Any, tensor: torch.Tensor) -> Any:
    """A setting of torch, in the form that it has here."""
    if name == "eps" and isinstance(value, tuple | list) and value[0] is None:  # Adafactor's
        return torch.finfo(tensor.dtype).eps, value[1]
    if name == "adjust_lr_fn" and value is None:
        return "original"
    if isinstance(value, tuple | list):
        return tuple(item.item() if isinstance(item, torch.Tensor) else item for item in value)
    return value.item() if isinstance(value, torch.Tensor) else value


def _agreed(name: str, values: list[tuple[str, Any]], where: str, advice: str, problems: list[str]) -> Any:
    """The value that all parameters have, with a problem if they differ; None if there are no parameters."""
    if not values:
        return None
    path, first = values[0]
    for other, value in values:
        if not _same(first, value):
            problems.append(f"{where}: {name} is {first!r} for {path} and {value!r} for {other}; {advice}")
            break
    return first


def _off_schedule(opt: Any, label: str, value: Any, schedule: Any, num_steps: int) -> list[str]:
    """A problem if a schedule does not continue from torch's value."""
    scheduled = np.asarray(schedule(num_steps)).tolist()
    if _same(value, scheduled, 1e-5):
        return []
    hint = "; or pass the number of torch's steps, num_steps=..." if type(opt).__name__ in WITHOUT_STEPS else ""
    return [
        f"{label} is {value!r} in torch, and the schedule here returns {scheduled!r} after {num_steps} steps: assign a"
        f" number, or a schedule that continues from torch's value{hint}"
    ]


def _same(one: Any, other: Any, rtol: float = 0) -> bool:
    if one is other:
        return True
    if any(value is None or callable(value) or isinstance(value, str | bool) for value in (one, other)):
        return bool(one == other)
    return np.shape(one) == np.shape(other) and bool(np.allclose(one, other, rtol=rtol, atol=0))


def _spread(name: str, found: list[Any], top: dict[str, Any], own: list[dict[str, Any]]) -> None:
    """Set the values of a setting. Groups without their own value use the optimizer's, if they all agree."""
    followers = [g for g in range(len(found)) if not own or name not in own[g]]
    together = all(_same(found[g], found[followers[0]]) for g in followers)
    if followers and together:
        top[name] = found[followers[0]]
    for g, value in enumerate(found):
        if g not in followers or not together:
            own[g][name] = value
