"""A table of a model: its modules, the shapes of their inputs and outputs, their parameters, bytes and FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from .engine.arguments import Arguments, abstract_data
from .engine.first_sizes import find_sizes
from .module import kept_values
from .module.hooks import hooks_of
from .module.module import Module
from .module.parameter import declared
from .module.random import rng
from .module.sizes import Search
from .module.tree import own_cells
from .runtime.platforms import in_plain_forms
from .runtime.tables import as_html, as_text, in_bytes, scaled
from .runtime.tracebacks import trimmed
from .state.cell import bound_to
from .state.frame import is_eager
from .state.static_values import describe, module_of
from .state.uninitialized import is_unsized


class Row(NamedTuple):
    """One module of a `Summary`."""

    path: str  # "" for the model itself
    kind: str  # its class
    inputs: tuple[str, ...]  # of its first call, as "float32[8, 3]"; empty if it was not called
    outputs: tuple[str, ...]
    num_calls: int
    num_parameters: (
        int  # its own, without those of its submodules; a tied parameter counts in the first row that has it
    )
    num_bytes: int  # of its own parameters and buffers
    flops: int | None = None  # of all its calls: of the model, and of each module without submodules
    shardings: tuple[
        str, ...
    ] = ()  # of its arrays, as "weight P('model', None)"; empty if nothing in the model is sharded
    bytes_per_device: int = 0  # of these; 0 if nothing in the model is sharded

    def texts(self) -> tuple[str, ...]:
        """Return the cells of the printed row."""
        times = f" × {self.num_calls}" if self.num_calls > 1 else ""
        indent = "  " * (self.path.count(".") + bool(self.path))
        return (
            indent + (self.path.rpartition(".")[2] or "(model)"),
            self.kind,
            ", ".join(self.inputs),
            ", ".join(self.outputs) + times,
            f"{self.num_parameters:,}" if self.num_parameters else "",
            in_bytes(self.num_bytes) if self.num_bytes else "",
            scaled(self.flops) if self.flops else "",
            in_bytes(self.bytes_per_device) if self.bytes_per_device else "",
            ", ".join(self.shardings),
        )


_HEADINGS = ("module", "type", "input", "output", "parameters", "bytes", "FLOPs", "per device", "sharding")
_NUMBERS = range(4, 8)  # the columns of numbers


@dataclass(frozen=True, repr=False)
class Summary:
    """The result of `summary`: a row for each module, and totals, in which tied parameters count once. Prints as a table."""

    rows: tuple[Row, ...]
    num_parameters: int
    num_trainable: int
    num_bytes: int  # of all parameters and buffers
    flops: int | None = None  # of one call of the model; None without inputs
    bytes_per_device: int = 0  # of all parameters and buffers; 0 if nothing is sharded

    def _totals(self) -> str:
        flops = "" if self.flops is None else f", {scaled(self.flops)} FLOPs"
        frozen = self.num_parameters - self.num_trainable
        note = f" ({frozen:,} frozen)" if frozen else ""
        each = f", {in_bytes(self.bytes_per_device)} of them on each device" if self.bytes_per_device else ""
        return f"{self.num_parameters:,} parameters{note}, {in_bytes(self.num_bytes)} with buffers{each}{flops}"

    def __repr__(self) -> str:
        return as_text(_HEADINGS, [row.texts() for row in self.rows], _NUMBERS, self._totals())

    def _repr_html_(self) -> str:
        """Return the table as HTML, for a notebook."""
        count = 9 if self.bytes_per_device else 7
        lines = [row.texts()[:count] for row in self.rows]
        return as_html(_HEADINGS[:count], lines, _NUMBERS, self._totals())


@trimmed
def summary(model: Module, *inputs: Any, **kwargs: Any) -> Summary:
    """Return a table of `model`: paths, classes, shapes of inputs and outputs, parameter counts, bytes, FLOPs.

    Nothing is computed. (Lazy layers get their sizes from these inputs, and with them their parameters.) The FLOPs are XLA's
    count for the operations of `forward`, before it fuses them: for one call of the model, and for all calls of each module
    without submodules. They are those of plain operations, also where the library computes a faster form on CPUs.

    If an array is sharded over several devices, the table also shows the sharding of each array and the bytes on each device.

    Args:
        model: a Module. It is traced in its present mode, training or evaluation.
        *inputs: the arguments of a call: arrays, or `jax.ShapeDtypeStruct`s in their place. Without inputs the table shows
            no shapes.
        **kwargs: the keyword arguments of the call.

    Returns:
        A `Summary`: print it, display it in a notebook, or read its `rows` and totals.

    Raises:
        TypeError: if `model` is not a Module.
        Exception: any error of `forward` for these inputs, with a note that names the module that raised it.

    Example:
        >>> import jax.numpy as jnp
        >>> from minitorch_jax import nn
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> summary(net, jax.ShapeDtypeStruct((8, 3), jnp.float32))
        module   type        input          output         parameters  bytes  FLOPs
        ───────────────────────────────────────────────────────────────────────────
        (model)  Sequential  float32[8, 3]  float32[8, 2]                       400
          0      Linear      float32[8, 3]  float32[8, 4]          16   64 B    224
          1      ReLU        float32[8, 4]  float32[8, 4]                        32
          2      Linear      float32[8, 4]  float32[8, 2]          10   40 B    144
        ───────────────────────────────────────────────────────────────────────────
        26 parameters, 104 B with buffers, 400 FLOPs
    """
    model = module_of(model)
    if not isinstance(model, Module):
        raise TypeError(f"summary() takes a Module; got a {type(model).__name__}")
    if (inputs or kwargs) and is_eager():
        with _sized(model, inputs, kwargs):
            return _summary(model, inputs, kwargs)
    return _summary(model, inputs, kwargs)


@contextmanager
def _sized(model: Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """A block in which the lazy layers that a call reaches have their sizes. If it raises, they are lazy again."""
    if not any(map(is_unsized, model.modules())):
        yield
        return
    treedef: Any
    leaves, treedef = jax.tree.flatten((inputs, kwargs))
    arrays = [i for i, leaf in enumerate(leaves) if _is_shaped(leaf)]

    def run(model: Module, values: list[Any]) -> None:
        args, named = treedef.unflatten(_filled(leaves, arrays, values))
        with rng(0):
            model(*args, **named)

    with Search() as search:
        find_sizes(Arguments(run, (model, *abstract_data([[leaves[i] for i in arrays]])), {}), search)
    with search.made():
        yield


def _summary(model: Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Summary:
    calls = _calls(model, inputs, kwargs) if inputs or kwargs else {}
    known: dict[Any, int | None] = {}
    seen: set[Any] = set()
    rows = []
    sharded = any(_is_sharded(cell) for *_, cell in model._entries())
    for path, module in model.named_modules():
        named = {name: cell for name, cell in own_cells(module) if cell not in seen}
        own = list(dict.fromkeys(named.values()))
        seen.update(own)
        of_calls = calls.get(path, [])
        shapes = of_calls[0][:2] if of_calls else ((), ())
        count = sum(_size(cell) for cell in own if cell.kind == "parameter")
        num_bytes = sum(_size(cell) * declared(cell).dtype.itemsize for cell in own)
        flops = None
        if not path or not any(module.children()):
            flops = _all_flops(module, [given for *_, given in of_calls], known)
        row = Row(path, type(module).__name__, *shapes, len(of_calls), count, num_bytes, flops)
        if sharded:
            shown = tuple([f"{name} {_spec(cell)}" for name, cell in named.items()])
            row = row._replace(shardings=shown, bytes_per_device=sum(map(_local_bytes, own)))
        rows.append(row)
    return Summary(
        tuple(rows),
        model.num_parameters(),
        model.num_parameters(trainable_only=True),
        sum(row.num_bytes for row in rows),
        rows[0].flops,
        sum(row.bytes_per_device for row in rows),
    )


def _is_sharded(cell: Any) -> bool:
    sharding = bound_to(cell.value)
    return sharding is not None and len(sharding.device_set) > 1


def _spec(cell: Any) -> str:
    """Return the sharding of an array as "P('model', None)"."""
    sharding = bound_to(cell.value)
    if sharding is None:
        return "on no device"
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return type(sharding).__name__
    return f"P({', '.join(map(repr, sharding.spec))})"


def _local_bytes(cell: Any) -> int:
    """Return how many bytes of an array lie on each of its devices."""
    like, sharding = declared(cell), bound_to(cell.value)
    shape = like.shape if sharding is None else sharding.shard_shape(like.shape)
    return int(np.prod(shape)) * like.dtype.itemsize


def _calls(
    model: Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, list[tuple[tuple[str, ...], tuple[str, ...], Any]]]:
    """Return the shapes of inputs and outputs of each call of each module, and its abstract arguments, by path."""
    calls: dict[str, list[Any]] = {}
    treedef: Any
    leaves, treedef = jax.tree.flatten((inputs, kwargs))
    arrays = [i for i, leaf in enumerate(leaves) if _is_shaped(leaf)]

    def run(copied: Module, values: list[Any]) -> Module:
        args, named = treedef.unflatten(_filled(leaves, arrays, values))
        watched = list(copied.named_modules())
        for path, module in watched:
            vars(module)["forward"] = _recording(calls.setdefault(path, []), module)
        try:
            with rng(0):
                copied(*args, **named)
        finally:
            for _, module in watched:
                vars(module).pop("forward", None)
        return copied  # a changed copy that is not returned would cause a warning

    with kept_values.refused():
        jax.eval_shape(run, model, [leaves[i] for i in arrays])
    return {path: found for path, found in calls.items() if found}


def _recording(found: list[Any], module: Module) -> Callable[..., Any]:
    """Return the module's `forward`, wrapped so that each call adds its shapes to `found`."""
    forward = module.forward

    def recorded(*args: Any, **kwargs: Any) -> Any:
        place = len(found)
        found.append(None)
        out = forward(*args, **kwargs)
        found[place] = _shapes((args, kwargs)), _shapes(out), jax.tree.map(_abstract, (args, kwargs))
        return out

    return recorded


def _shapes(tree: Any) -> tuple[str, ...]:
    return tuple([describe(leaf) for leaf in jax.tree.leaves(tree) if _is_shaped(leaf)])


def _abstract(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if _is_shaped(leaf) else leaf


def _all_flops(module: Module, calls: list[Any], known: dict[Any, int | None]) -> int | None:
    """Return the FLOPs of a module's calls, or None if XLA does not know. `known` holds those of modules of the same repr."""
    counts = []
    for args, kwargs in calls:
        leaves, treedef = jax.tree.flatten((args, kwargs))
        key = repr(module), module.training, hooks_of(module), treedef, tuple(map(repr, leaves))
        if key not in known:
            known[key] = _flops(module, leaves, treedef)
        counts.append(known[key])
    found = [count for count in counts if count is not None]
    return sum(found) if counts and len(found) == len(counts) else None


def _filled(leaves: list[Any], places: list[int], values: list[Any]) -> list[Any]:
    """Return the leaves of a call's arguments with these values in these places."""
    given = list(leaves)
    for i, value in zip(places, values, strict=True):
        given[i] = value
    return given


def _flops(module: Module, leaves: list[Any], treedef: Any) -> int | None:
    """Return the FLOPs of one call: XLA's analysis of the lowered program, which is not compiled."""
    places = [i for i, leaf in enumerate(leaves) if _is_shaped(leaf)]

    def run(copied: Module, values: list[Any]) -> Any:
        args, kwargs = treedef.unflatten(_filled(leaves, places, values))
        with rng(0):
            if any(hook.is_pre for hook in hooks_of(copied)):  # these are the arguments that it has made
                return copied.forward(*args, **kwargs), copied
            return copied(*args, **kwargs), copied

    with in_plain_forms():
        program = jax.jit(run).lower(jax.tree.map(_abstract, module), [leaves[i] for i in places])
    costs = program.cost_analysis()
    count = costs.get("flops", 0) if isinstance(costs, dict) else None
    return None if count is None or count < 0 else int(count)


def _is_shaped(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _size(cell: Any) -> int:
    return int(np.prod(declared(cell).shape))
