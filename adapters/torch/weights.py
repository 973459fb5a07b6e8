"""The weights of a module, from a torch module and back, matched by their names in `state_dict`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import combinations
from typing import Any

import numpy as np
import torch

import minitorch_jax as mt
from minitorch_jax.module.globs import kept
from minitorch_jax.module.parameter import X64, declared, fitting, same_values
from minitorch_jax.module.sizes import sized_by
from minitorch_jax.module.state_dict import IncompatibleKeys
from minitorch_jax.runtime import interrupts
from minitorch_jax.state.cell import Cell
from minitorch_jax.state.static_values import describe

from .._names import Keep, Names, Operations, Renamed, as_globs, renamed
from .arrays import described, dtype_of, kept_dtype, tensor_of, to_numpy, unreadable


def load_from_torch(
    module: mt.Module,
    source: torch.nn.Module | Mapping[str, torch.Tensor],
    strict: bool = True,
    *,
    tie: bool = False,
    names: Names | None = None,
    keep: Keep = (),
) -> IncompatibleKeys:
    """Copy the weights of a torch module, or of its `state_dict()`, into a module, in place.

    The weights are parameters and buffers, running statistics and counts included. Names, shapes, dtypes and ties must
    agree, once `names` has renamed, transposed, joined and divided torch's. The two sides share no memory. Arrays stay on
    the devices, or in the sharding, that they were bound to. As in torch's `load_state_dict`, gradients, `training` and
    frozen parameters (`requires_grad`) do not change.

    Args:
        module: the module to change. Its lazy layers take their sizes from the torch weights.
        source: a torch module, or a mapping of names to tensors.
        strict: True makes names that only one side has an error. All other differences are always errors.
        tie: True ties parameters that are tied in the source and not here, as `module.tie` does. False makes them an
            error. Tensors of a mapping are tied if they share their memory.
        names: where the two sides have other names, a dict of torch's names and ours. `*` in a key stands for any text, and
            in its value for the same text; None as a value leaves a tensor out; `transposed(name)` is for a tensor that
            torch stores the other way round; a tuple as a key is joined, and one as a value is divided, along the first
            axis. The first key that matches counts. A name without a key stays as it is.
        keep: a name of `module`, or several, with globs: these arrays stay as they are, whatever the source has.

    Returns:
        The names that only `module` has (missing; those of `keep` are among them) and those that only `source` has
        (unexpected), as they are called here.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if the two sides differ. One error lists all differences, and nothing has changed. Without x64,
            integers of 64 bits are loaded into 32 bits if their values fit; no other dtype is converted. Before that, one
            error lists what is wrong with `names`.

    Example:
        >>> from minitorch_jax import nn
        >>> theirs = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        >>> ours = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        >>> load_from_torch(ours, theirs)
        IncompatibleKeys(missing_keys=[], unexpected_keys=[])
        >>> bool((ours[0].weight == theirs[0].weight.detach().numpy()).all())
        True
        >>> backbone = {f"net.{name}": tensor for name, tensor in theirs.state_dict().items()}
        >>> head = nn.Linear(3, 2)
        >>> load_from_torch(head, backbone, names={"net.1.*": None, "net.0.*": "*"})
        IncompatibleKeys(missing_keys=[], unexpected_keys=[])
    """
    if not isinstance(module, mt.Module):
        raise TypeError(f"load_from_torch loads into a minitorch_jax Module; got {module!r} ({type(module).__name__})")
    if not isinstance(source, torch.nn.Module | Mapping):
        raise TypeError(
            f"load_from_torch loads from a torch module or its state_dict(); got {source!r} ({type(source).__name__})"
        )
    given = dict(source) if isinstance(source, Mapping) else source.state_dict(keep_vars=True)
    with torch.no_grad():
        found = renamed(names, given, Operations(torch.permute, torch.cat, described, _said))
    raise_all(found.problems, "load_from_torch: `names` does not fit the torch weights; nothing was loaded")
    found = found.without(keep)
    alike = isinstance(source, Mapping) or names is not None  # ties may be lost, so values are compared
    with sized_by([(module, {path: tensor for path, tensor in found.arrays.items() if unreadable(tensor) is None})]):
        return _load(module, found, alike, strict, tie, as_globs(keep))


def _said(tensor: Any) -> str | None:
    problem = unreadable(tensor)
    return None if problem is None else f"torch has {problem}"


def _load(
    module: mt.Module, found: Renamed, is_mapping: bool, strict: bool, tie: bool, keep: list[str]
) -> IncompatibleKeys:
    """Do what `load_from_torch` does, once lazy layers have their sizes."""
    theirs = found.arrays
    cells = {path: cell for path, _, _, cell in module._entries()}
    problems, missing, unexpected = _unmatched(cells, theirs, strict, "here", "in torch", kept(keep, cells))
    arrays: dict[str, Any] = {}
    for path in cells.keys() & theirs.keys():
        problem = mismatch(path, declared(cells[path]), theirs[path])
        if problem is None:
            try:
                arrays[path] = fitting(to_numpy(theirs[path]), declared(cells[path]).dtype)
                continue
            except ValueError as error:
                problem = f"{path}: {error}"
        problems.append(problem)
    ties = [(a, b) for a, b in _tied(theirs) if a in cells and b in cells and cells[a] is not cells[b]]
    for a, b in ties:
        if not tie:
            problems.append(
                f"{b} and {a} are one tensor in torch, and two here: tie them with `module.tie({b!r}, module, {a!r})`, or"
                " pass tie=True"
            )
        elif cells[a].kind != cells[b].kind:
            problems.append(f"{b} and {a} are one tensor in torch, but a {cells[b].kind} and a {cells[a].kind} here")
    problems += _tied_here_alone(cells, theirs, is_mapping, arrays)
    if problems:
        shapes = {path: tensor.shape for path, tensor in theirs.items() if unreadable(tensor) is None}
        problems += found.notes({path: declared(cell).shape for path, cell in cells.items()}, shapes)
    raise_all(
        problems, f"load_from_torch: the torch weights do not fit this {type(module).__name__}; nothing was loaded"
    )
    with interrupts.deferred:
        for a, b in ties:
            module.tie(b, module, a)
        module.load_state_dict(arrays, strict=False)
    return IncompatibleKeys(missing, unexpected)


def copy_to_torch(module: mt.Module, torch_module: torch.nn.Module, strict: bool = True) -> IncompatibleKeys:
    """Copy the weights of a module into a torch module of the same names, in place.

    This is the reverse of `load_from_torch`. Torch's Parameters and buffers stay the same objects, so torch's optimizers
    still train them. The two sides share no memory. Counts become int64 again. Gradients, `training` and `requires_grad`
    do not change.

    Args:
        module: the module to read.
        torch_module: the torch module to change.
        strict: True makes names that only one side has an error. All other differences are always errors.

    Returns:
        The names that only `torch_module` has (missing) and those that only `module` has (unexpected).

    Raises:
        TypeError: if an argument has another type.
        ValueError: if the two sides differ. One error lists all differences, and nothing has changed.

    Example:
        >>> from minitorch_jax import nn
        >>> ours, theirs = nn.Linear(3, 2), torch.nn.Linear(3, 2)
        >>> copy_to_torch(ours, theirs)
        IncompatibleKeys(missing_keys=[], unexpected_keys=[])
        >>> bool((ours.weight == theirs.weight.detach().numpy()).all())
        True
    """
    if not isinstance(module, mt.Module) or not isinstance(torch_module, torch.nn.Module):
        raise TypeError(
            "copy_to_torch copies from a minitorch_jax Module into a torch module; got a"
            f" {type(module).__name__} and a {type(torch_module).__name__}"
        )
    theirs = torch_module.state_dict(keep_vars=True)
    cells = {path: cell for path, _, _, cell in module._entries()}
    problems, missing, unexpected = _unmatched(theirs, cells, strict, "in torch", "here")
    both = [path for path in theirs if path in cells]
    for path in both:
        problem = mismatch(path, declared(cells[path]), theirs[path]) or _unwritable(path, theirs[path])
        problems += [] if problem is None else [problem]
    for a, b in _tied(theirs):
        if a in cells and b in cells and cells[a] is not cells[b]:
            problems.append(
                f"{b} and {a} are one tensor in torch, and two here: tie them with `module.tie({b!r}, module, {a!r})`, or"
                f" untie them in torch, `torch_module.{b} = torch.nn.Parameter(torch_module.{a}.clone())`"
            )
    problems += _tied_here_alone(cells, theirs, False, {})
    raise_all(
        problems, f"copy_to_torch: this {type(module).__name__} does not fit the torch module; nothing was copied"
    )
    arrays = module.state_dict()
    new = [tensor_of(np.asarray(arrays[path])) for path in both]
    with interrupts.deferred, torch.no_grad():
        for path, tensor in zip(both, new, strict=True):
            theirs[path].copy_(tensor)
    return IncompatibleKeys(missing, unexpected)


# -- differences -------------------------------------------------------------------------------------------------------


def mismatch(label: str, ours: Any, theirs: Any) -> str | None:
    """The problem if an array here and a tensor in torch differ in shape or dtype; None if values can be copied."""
    problem = unreadable(theirs)
    if problem is not None:
        return f"{label}: torch has {problem}"
    source = dtype_of(theirs)
    same = ours.dtype == source or (np.issubdtype(source, np.integer) and ours.dtype == kept_dtype(source))
    if same and tuple(ours.shape) == tuple(theirs.shape):
        return None
    hint = ""
    if not same:
        hint = ": convert one of them, `module.astype(...)` here or `.to(dtype)` in torch"
        if source != kept_dtype(source):
            hint = f": JAX's x64 mode is off. Call {X64} before the module is made, or use `.float()` in torch"
    return f"{label}: {described(theirs)} in torch, {describe(ours)} here{hint}"


def _unmatched(
    targets: Mapping[str, Any],
    sources: Mapping[str, Any],
    strict: bool,
    target_side: str,
    source_side: str,
    may_miss: Collection[str] = (),
) -> tuple[list[str], list[str], list[str]]:
    """Problems with names, the names that only the targets have, and the names that only the sources have."""
    missing = [path for path in targets if path not in sources]
    unexpected = [path for path in sources if path not in targets]
    problems = [
        f"missing: {path}, {_typed(targets[path])}, which exists {target_side} and not {source_side}"
        for path in missing
        if path not in may_miss
    ]
    problems += [
        f"unexpected: {path}, {_typed(sources[path])}, which exists {source_side} and not {target_side}"
        for path in unexpected
    ]
    return problems if strict else [], missing, unexpected


def _typed(value: Any) -> str:
    if torch.nn.parameter.is_lazy(value):
        return "uninitialised"
    return describe(declared(value)) if isinstance(value, Cell) else described(value)


def _unwritable(path: str, tensor: torch.Tensor) -> str | None:
    """The problem if a tensor cannot be written to; None if it can."""
    if tensor.is_inference():
        return f"{path}: made in torch's inference mode, so it cannot change: make the torch module outside that mode"
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return f"{path}: an expanded tensor, whose elements share memory in torch: `.clone()` it there"
    return None


def _memory(tensor: torch.Tensor) -> Any:
    """A key that is equal for tied tensors: the same object, or the same elements of the same memory."""
    if tensor.layout is not torch.strided or not tensor.numel() or tensor.is_meta:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _by_identity(values: Mapping[str, Any], identity: Any) -> Iterator[list[str]]:
    """The groups of names that stand for one value."""
    groups: dict[Any, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(identity(value), []).append(name)
    return (names for names in groups.values() if len(names) > 1)


def _tied(theirs: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The names of tied tensors, as pairs of the first name and another one."""
    tensors = {name: tensor for name, tensor in theirs.items() if unreadable(tensor) is None}
    return [(first, other) for first, *rest in _by_identity(tensors, _memory) for other in rest]


def _tied_here_alone(
    cells: Mapping[str, Cell], theirs: Mapping[str, Any], is_mapping: bool, arrays: Mapping[str, Any]
) -> Iterator[str]:
    """A problem for each parameter that is tied here and not in torch. A mapping may have lost its ties: compare values."""
    shared = {name: cell for name, cell in cells.items() if name in theirs and unreadable(theirs[name]) is None}
    for names in _by_identity(shared, id):
        for a, b in combinations(names, 2):
            if a != names[0] or _memory(theirs[a]) == _memory(theirs[b]):
                continue
            if not is_mapping:
                yield (
                    f"{b} and {a} are one parameter here, and two in torch: tie them there, `torch_module.{b} ="
                    f" torch_module.{a}`, or make a module here without the tie"
                )
            elif a in arrays and b in arrays and not same_values(arrays[a], arrays[b]):
                yield f"{b} and {a} are one parameter here, and two tensors with different values in torch"


def raise_all(problems: list[str], title: str) -> None:
    if problems:
        raise ValueError("\n  ".join([f"{title}:", *sorted(problems)]))
