"""The state of an optimizer, from torch's optimizer of the same name and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

import minitorch_jax as mt
from minitorch_jax import optim
from minitorch_jax.module.parameter import is_narrow
from minitorch_jax.runtime import interrupts

from . import lbfgs
from .arrays import dtype_of, tensor_of, to_numpy
from .matching import Param, matched
from .settings import WITHOUT_STEPS, copied_settings, loaded_settings
from .weights import raise_all

_NUMBERS = ("mu_product", "eta", "mu")  # scalar fields, whose dtype is their own


def load_optimizer_from_torch(
    opt: mt.Optimizer,
    torch_opt: torch.optim.Optimizer,
    torch_modules: torch.nn.Module | Sequence[torch.nn.Module],
    *,
    num_steps: int | None = None,
) -> None:
    """Load the state and the hyperparameters of a torch optimizer of the same name, in place.

    Load the weights too, and training continues here with torch's trajectory. Parameters are matched by their names in the
    modules. Parameters that torch has not stepped yet start here with their first step.

    A hyperparameter that follows a schedule here keeps the schedule. At the current step, it must return torch's current
    value: torch's LR schedulers are objects outside the optimizer. torch's `foreach`, `fused`, `capturable` and
    `differentiable` have no effect here. Torch lacks `skip_nonfinite`, `track_grad_norm`, `decay_matrices_only`,
    `master_weights` and `state_dtype`: they do not change. Master weights start from the current parameters; state is rounded
    to `state_dtype`.

    Args:
        opt: the optimizer to change, constructed with torch's flags (`amsgrad`, `centered`, momentum or none).
        torch_opt: torch's optimizer. Its groups may differ, if the parameters of each group here have equal settings in
            torch. For biases without weight decay, construct `opt` with `decay_matrices_only`.
        torch_modules: the torch module of each of `opt.modules`; for one module, the torch module itself.
        num_steps: the number of steps that torch has taken. Only SGD, Muon and LBFGS need it, for schedules: torch's state
            of the other rules holds it. None counts one step, or none if there is no state.

    Raises:
        TypeError: if the two optimizers do not have the same class, or torch has no optimizer of the class.
        ValueError: if something does not fit. One error lists all of it, and nothing has changed.

    Differs from PyTorch: from now on, a parameter without a gradient is stepped with zeros; torch skips it.

    Example:
        >>> from minitorch_jax import nn
        >>> from minitorch_jax.adapters.torch import load_from_torch
        >>> theirs = torch.nn.Linear(3, 2)
        >>> their_opt = torch.optim.AdamW(theirs.parameters(), lr=0.1)
        >>> theirs(torch.ones(4, 3)).sum().backward()
        >>> their_opt.step()
        >>> ours = nn.Linear(3, 2)
        >>> opt = optim.AdamW([ours])
        >>> _ = load_from_torch(ours, theirs)
        >>> load_optimizer_from_torch(opt, their_opt, theirs)
        >>> opt.lr, opt.num_steps, opt.state_dict()["state"]["0.bias"]["exp_avg"]
        (0.1, 1, Array([0.4, 0.4], dtype=float32))
    """
    if num_steps is not None and (not isinstance(num_steps, int) or isinstance(num_steps, bool) or num_steps < 0):
        raise ValueError(f"load_optimizer_from_torch: num_steps must be an integer >= 0; got {num_steps!r}")
    params, problems = matched("load_optimizer_from_torch", opt, torch_opt, torch_modules)
    known = opt.state_dict()
    steps = {p.path: _steps_taken(opt, p, torch_opt, num_steps) for p in params}
    total = max(steps.values(), default=0) if num_steps is None else num_steps
    if total < max(steps.values(), default=0):
        problems.append(f"num_steps={num_steps}, but torch has taken {max(steps.values())} steps or more")
    top, own = loaded_settings(opt, params, known, total, problems)
    if isinstance(opt, optim.LBFGS):
        state = lbfgs.loaded(lbfgs.Vector(params, torch_opt), known["state"], problems)
    else:
        state = {}
        for p in params:
            settings = {**top, **(own[p.group] if own else {})}
            state[p.path] = _loaded_fields(opt, p, _given(torch_opt, p), known["state"][p.path], settings, problems)
    raise_all(problems, f"load_optimizer_from_torch: torch's {type(opt).__name__} does not fit; nothing was loaded")
    new = {"num_steps": total, "skipped": 0, "hyperparameters": top, **({"groups": own} if own else {})}
    opt.load_state_dict({**new, "state": {path: {**fields, "step": steps[path]} for path, fields in state.items()}})


def copy_optimizer_to_torch(
    opt: mt.Optimizer,
    torch_opt: torch.optim.Optimizer,
    torch_modules: torch.nn.Module | Sequence[torch.nn.Module],
) -> None:
    """Copy the state and the hyperparameters of an optimizer into a torch optimizer of the same name, in place.

    This is the reverse of `load_optimizer_from_torch`. Copy the weights too, and training continues in torch with the same
    trajectory. A hyperparameter that follows a schedule becomes the schedule's number for the next step; make a torch LR
    scheduler that continues from there yourself. `track_grad_norm` is not copied: it changes no step. State of a lower
    `state_dtype` gets torch's dtype, the parameter's.

    Args:
        opt: the optimizer to read.
        torch_opt: torch's optimizer, which is changed. Its groups may differ, if the parameters of each of its groups have
            equal settings here.
        torch_modules: the torch module of each of `opt.modules`; for one module, the torch module itself.

    Raises:
        TypeError: if the two optimizers do not have the same class, or torch has no optimizer of the class.
        ValueError: if something does not fit, or torch cannot do it: `skip_nonfinite`, and `master_weights` of half
            precision parameters. One error lists all of it, and nothing has changed.

    Differs from PyTorch: torch skips a parameter without a gradient; here it is stepped with zeros.

    Example:
        >>> from minitorch_jax import nn
        >>> ours, theirs = nn.Linear(3, 2), torch.nn.Linear(3, 2)
        >>> opt = optim.SGD([ours], lr=0.1, momentum=0.9)
        >>> loss = mt.backward(lambda x: ours(x).sum(), jnp.ones((4, 3)))
        >>> opt.step()
        >>> their_opt = torch.optim.SGD(theirs.parameters(), lr=1.0, momentum=0.9)
        >>> copy_optimizer_to_torch(opt, their_opt, theirs)
        >>> their_opt.param_groups[0]["lr"], their_opt.state[theirs.bias]["momentum_buffer"]
        (0.1, tensor([4., 4.]))
    """
    params, problems = matched("copy_optimizer_to_torch", opt, torch_opt, torch_modules)
    problems += _beyond_torch(opt, params)
    changes = copied_settings(opt, params, torch_opt, problems)
    known = opt.state_dict()["state"]
    state: dict[torch.Tensor, dict[str, Any]] = {}
    if isinstance(opt, optim.LBFGS):
        vector = lbfgs.Vector(params, torch_opt)
        state[vector.tensors[0]] = lbfgs.copied(vector, known, problems)
    else:
        for p in params:
            if p.settings is not None:
                state[p.tensor] = _copied_fields(opt, p, p.settings, known[p.path], problems)
    raise_all(problems, f"copy_optimizer_to_torch: this {type(opt).__name__} does not fit torch's; nothing was copied")
    with interrupts.deferred:
        for group, name, value in changes:
            if isinstance(group[name], torch.Tensor):
                group[name].fill_(value)
            else:
                group[name] = value
        for tensor, fields in state.items():
            torch_opt.state[tensor] = fields


def _given(torch_opt: torch.optim.Optimizer, param: Param) -> dict[str, Any]:
    """Torch's state of a parameter, without the step count."""
    state = torch_opt.state.get(param.tensor, {})
    return {name: value for name, value in state.items() if name != "step" and value is not None}


def _steps_taken(opt: Any, param: Param, torch_opt: torch.optim.Optimizer, num_steps: int | None) -> int:
    """The number of steps that torch has taken for a parameter, as far as its state and `num_steps` say."""
    state = torch_opt.state.get(param.tensor, {})
    if type(opt).__name__ not in WITHOUT_STEPS:
        return int(state.get("step", 0))
    if isinstance(opt, optim.LBFGS):  # one state for all
        begun = bool(torch_opt.state.get(torch_opt.param_groups[0]["params"][0]))
    else:
        begun = bool(_given(torch_opt, param))
        if not begun and param.settings is not None and not param.settings["momentum"]:
            return num_steps or 0 if param.cell.trainable else 0
    return max(num_steps or 1, 1) if begun else 0


def _loaded_fields(
    opt: Any,
    param: Param,
    given: dict[str, Any],
    known: Mapping[str, Any],
    settings: dict[str, Any],
    problems: list[str],
) -> dict[str, Any]:
    """A parameter's state here, made from torch's; the initial state if torch has none."""
    here = known.keys() - {"step"}
    if not here and not given and not param.cell.trainable:
        return {}
    value = param.cell.value
    lower = opt.groups[param.group].state_dtype is not None
    wide = value.astype(jnp.float32) if "master_weight" in here or lower else value
    fresh = opt.init_state(wide, SimpleNamespace(**settings)) or None
    fields = {} if fresh is None else {name: item for name, item in fresh._asdict().items() if item is not None}
    expected, extra = set(fields), ({"master_weight": wide} if "master_weight" in here else {})
    if expected | extra.keys() != here or (given and set(given) != expected):
        problems.append(
            f"{param.path}: the state has {sorted(given) or 'nothing'} in torch and {sorted(here) or 'nothing'} here. With"
            f" torch's settings it should have {sorted(expected) or 'nothing'}: construct this optimizer"
            " with the same settings, and with the parameter unfrozen"
        )
        return {}
    for name, tensor in given.items():
        old = known[name]
        if name not in _NUMBERS and (
            tuple(tensor.shape) != old.shape
            or (dtype_of(tensor) != old.dtype and not lower and not (is_narrow(value) and old.dtype == np.float32))
        ):
            problems.append(
                f"{param.path}.{name}: {dtype_of(tensor)}{list(tensor.shape)} in torch, {old.dtype}{list(old.shape)} here"
            )
        else:
            fields[name] = to_numpy(torch.as_tensor(tensor)).astype(old.dtype)
    return {**fields, **extra}


def _copied_fields(
    opt: Any, param: Param, settings: dict[str, Any], known: Mapping[str, Any], problems: list[str]
) -> dict[str, Any]:
    """A parameter's state in torch, made from ours. It is empty before the first step: torch makes it then."""
    rule, device = type(opt).__name__, param.tensor.device
    if not known["step"] and rule != "Adagrad":  # Adagrad makes its state when it is constructed
        return {}
    fused = bool(settings.get("fused"))
    wide = torch.get_default_dtype() == torch.float64 and not fused
    where = device if fused or settings.get("capturable") or rule == "ASGD" else "cpu"

    def number(value: Any) -> torch.Tensor:
        return torch.tensor(float(value), dtype=torch.float64 if wide else torch.float32, device=where)

    lower = opt.groups[param.group].state_dtype is not None
    fields = {} if rule in WITHOUT_STEPS else {"step": number(known["step"])}
    for name, value in known.items():
        if name in _NUMBERS:
            fields[name] = number(value)
        elif name not in ("step", "master_weight"):
            if lower:
                value = value.astype(dtype_of(param.tensor))
            if value.dtype != dtype_of(param.tensor):
                problems.append(
                    f"{param.path}.{name}: {value.dtype} here, and in torch it has the parameter's dtype,"
                    f" {dtype_of(param.tensor)}"
                )
            fields[name] = tensor_of(np.asarray(value)).to(device)
    return fields


def _beyond_torch(opt: Any, params: list[Param]) -> list[str]:
    """A problem for each setting that changes steps here and that torch lacks."""
    problems = []
    for g, group in enumerate(opt.groups):
        if group.skip_nonfinite:
            problems.append(f"group {g}: skip_nonfinite, which torch lacks: assign `opt.skip_nonfinite = False` first")
        if group.master_weights and any(is_narrow(p.cell.value) for p in params if p.group == g):
            problems.append(
                f"group {g}: master_weights, which torch lacks: train in float32 on both sides, or start with a new state"
            )
    return problems
