"""Matching an optimizer's parameters with those of a torch optimizer, and listing what does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

import minitorch_jax as mt
from minitorch_jax import optim
from minitorch_jax.optim.declaration import OPTIONS
from minitorch_jax.state.cell import Cell

from .weights import mismatch

_RULES = (
    *(optim.SGD, optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam, optim.Adagrad, optim.Adadelta),
    *(optim.RMSprop, optim.Rprop, optim.ASGD, optim.Adafactor, optim.Muon, optim.LBFGS),
)
RULES: dict[type, type[mt.Optimizer]] = {
    getattr(torch.optim, rule.__name__): rule for rule in _RULES if hasattr(torch.optim, rule.__name__)
}
_HOW_TORCH_RUNS_IT = {"foreach", "fused", "capturable", "differentiable"}


class Param(NamedTuple):
    """A parameter here and in torch."""

    path: str  # "0.weight": the index of its module, and its name there
    cell: Cell
    tensor: torch.Tensor
    group: int  # the index of its group here
    settings: dict[str, Any] | None  # its group in torch, if it is in one


def matched(caller: str, opt: Any, torch_opt: Any, torch_modules: Any) -> tuple[list[Param], list[str]]:
    """Each parameter of an optimizer with its tensor, and a list of problems."""
    _check_classes(caller, opt, torch_opt)
    plan = opt._plan_now()
    if plan.foreign:
        raise TypeError(
            f"{caller}: opt.modules holds a module of NumPy arrays; convert it with `minitorch_jax.adapters.numpy`"
        )
    others = sorted({rule.__name__ for rule in opt._hyper.rules if rule is not None})
    if others:
        raise TypeError(
            f"{caller}: groups of opt have other rules ({', '.join(others)}), and an optimizer of torch has one. Make an"
            " optimizer of its own for each rule, with the other parameters frozen while they are exchanged"
        )
    tensors = _named(caller, opt, torch_modules)
    group_of = {id(tensor): group for group in torch_opt.param_groups for tensor in group["params"]}
    params: list[Param] = []
    seen: dict[int, str] = {}
    unknown = sorted(set(torch_opt.defaults) - {*names(opt), *_HOW_TORCH_RUNS_IT})
    problems = [
        f"{name}: a setting of torch's {type(opt).__name__} that this optimizer does not have" for name in unknown
    ]
    for path, cell in plan.named.items():
        tensor = tensors.get(path)
        if tensor is None:
            problems.append(f"{path}: torch's modules do not have this parameter")
            continue
        if id(tensor) in seen:
            problems.append(f"{path} and {seen[id(tensor)]} are one tensor in torch, and two here: tie them here")
        seen.setdefault(id(tensor), path)
        param = Param(path, cell, tensor, plan.groups[cell], group_of.get(id(tensor)))
        params.append(param)
        problems += [problem for problem in (mismatch(path, cell.value, tensor), _trained_apart(param)) if problem]
    return params, [*problems, *_left_over(torch_opt, tensors, seen)]


def names(opt: Any) -> list[str]:
    """The settings of a rule that torch's rule has too."""
    return [name for name in (*opt._hyper.given, *opt._hyper.flags) if name not in OPTIONS]


def _check_classes(caller: str, opt: Any, torch_opt: Any) -> None:
    if RULES.get(type(torch_opt)) is not type(opt):
        known = ", ".join(rule.__name__ for rule in RULES.values())
        theirs = type(torch_opt)
        raise TypeError(
            f"{caller} takes an optimizer and torch's optimizer of the same name, one of {known}; got a"
            f" {type(opt).__name__} and a {theirs.__module__}.{theirs.__qualname__}"
        )


def _named(caller: str, opt: Any, torch_modules: Any) -> dict[str, torch.Tensor]:
    """The tensors of torch's modules, by their paths in the optimizer."""
    single = isinstance(torch_modules, torch.nn.Module)
    modules = [torch_modules] if single else list(torch_modules)
    if len(modules) != len(opt.modules) or not all(isinstance(module, torch.nn.Module) for module in modules):
        raise ValueError(
            f"{caller}: torch_modules must be the {len(opt.modules)} torch modules of opt.modules, in the same order;"
            f" got [{', '.join(type(module).__name__ for module in modules)}]"
        )
    found = ((i, module.named_parameters(remove_duplicate=False)) for i, module in enumerate(modules))
    return {f"{i}.{name}": tensor for i, named in found for name, tensor in named}


def _trained_apart(param: Param) -> str | None:
    """A problem if only one side trains a parameter, else None."""
    trained = param.tensor.requires_grad and param.settings is not None
    if param.cell.trainable == trained:
        return None
    there = "trained" if trained else "in no group of its optimizer" if param.settings is None else "frozen"
    return (
        f"{param.path}: {'trained' if param.cell.trainable else 'frozen'} here, and {there} in torch; call freeze() or"
        " unfreeze() here, or change `requires_grad` and the groups in torch"
    )


def _left_over(torch_opt: Any, tensors: dict[str, torch.Tensor], seen: dict[int, str]) -> Iterator[str]:
    """A problem for each parameter that only torch's optimizer has."""
    paths = {id(tensor): path for path, tensor in reversed(tensors.items())}
    for i, group in enumerate(torch_opt.param_groups):
        for j, tensor in enumerate(group["params"]):
            if id(tensor) not in seen and (tensor.requires_grad or torch_opt.state.get(tensor)):
                path = paths.get(id(tensor), f"parameter {j} of group {i}")
                yield f"{path}: torch's optimizer has it, and this one has no parameter of that name"
