"""A table of a model: its modules, the shapes of their inputs and outputs, their parameters and bytes."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from .module.module import Module
from .module.parameter import declared
from .module.random import rng
from .module.tree import own_cells
from .state.static_values import describe


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
            _bytes(self.num_bytes) if self.num_bytes else "",
        )


_HEADINGS = ("module", "type", "input", "output", "parameters", "bytes")


@dataclass(frozen=True, repr=False)
class Summary:
    """The result of `summary`: a row for each module, and totals, in which tied parameters count once. Prints as a table."""

    rows: tuple[Row, ...]
    num_parameters: int
    num_trainable: int
    num_bytes: int  # of all parameters and buffers

    def _totals(self) -> str:
        frozen = self.num_parameters - self.num_trainable
        note = f" ({frozen:,} frozen)" if frozen else ""
        return f"{self.num_parameters:,} parameters{note}, {_bytes(self.num_bytes)} with buffers"

    def __repr__(self) -> str:
        lines = [_HEADINGS, *(row.texts() for row in self.rows)]
        shown = [i for i in range(len(_HEADINGS)) if any(line[i] for line in lines[1:])]
        widths = {i: max(len(line[i]) for line in lines) for i in shown}

        def text(line: tuple[str, ...]) -> str:
            return "  ".join(line[i].rjust(widths[i]) if i >= 4 else line[i].ljust(widths[i]) for i in shown).rstrip()

        rule = "─" * (sum(widths.values()) + 2 * (len(shown) - 1))
        return "\n".join([text(lines[0]), rule, *map(text, lines[1:]), rule, self._totals()])

    def _repr_html_(self) -> str:
        """Return the table as HTML, for a notebook."""

        def cells(tag: str, line: tuple[str, ...]) -> str:
            first, *rest = (html.escape(text).replace("  ", "&emsp;") for text in line)
            aligned = [
                f'<{tag} style="text-align: {"right" if i >= 3 else "left"}">{t}</{tag}>' for i, t in enumerate(rest)
            ]
            return f'<tr><{tag} style="text-align: left">{first}</{tag}>{"".join(aligned)}</tr>'

        body = "".join(cells("td", row.texts()) for row in self.rows)
        head, caption = cells("th", _HEADINGS), html.escape(self._totals())
        return f"<table><caption>{caption}</caption><thead>{head}</thead><tbody>{body}</tbody></table>"


def summary(model: Module, *inputs: Any, **kwargs: Any) -> Summary:
    """Return a table of `model`: paths, classes, shapes of inputs and outputs, parameter counts, bytes. Nothing is computed.

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
        module   type        input          output         parameters  bytes
        ────────────────────────────────────────────────────────────────────
        (model)  Sequential  float32[8, 3]  float32[8, 2]
          0      Linear      float32[8, 3]  float32[8, 4]          16   64 B
          1      ReLU        float32[8, 4]  float32[8, 4]
          2      Linear      float32[8, 4]  float32[8, 2]          10   40 B
        ────────────────────────────────────────────────────────────────────
        26 parameters, 104 B with buffers
    """
    if not isinstance(model, Module):
        raise TypeError(f"summary() takes a Module; got a {type(model).__name__}")
    calls = _calls(model, inputs, kwargs) if inputs or kwargs else {}
    seen: set[Any] = set()
    rows = []
    for path, module in model.named_modules():
        own = [cell for _, cell in own_cells(module) if cell not in seen]
        seen.update(own)
        first = calls.get(path, [((), ())])[0]
        count = sum(_size(cell) for cell in own if cell.kind == "parameter")
        num_bytes = sum(_size(cell) * declared(cell).dtype.itemsize for cell in own)
        rows.append(Row(path, type(module).__name__, *first, len(calls.get(path, ())), count, num_bytes))
    return Summary(
        tuple(rows),
        model.num_parameters(),
        model.num_parameters(trainable_only=True),
        sum(row.num_bytes for row in rows),
    )


def _calls(
    model: Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, list[tuple[tuple[str, ...], tuple[str, ...]]]]:
    """Return the shapes of inputs and outputs of each call of each module, by path."""
    calls: dict[str, list[Any]] = {}
    treedef: Any
    leaves, treedef = jax.tree.flatten((inputs, kwargs))
    arrays = [i for i, leaf in enumerate(leaves) if _is_shaped(leaf)]

    def run(copied: Module, values: list[Any]) -> Module:
        given = list(leaves)
        for i, value in zip(arrays, values, strict=True):
            given[i] = value
        args, named = treedef.unflatten(given)
        watched = list(copied.named_modules())
        for path, module in watched:
            vars(module)["forward"] = _recording(calls.setdefault(path, []), path, module)
        try:
            with rng(0):
                copied(*args, **named)
        finally:
            for _, module in watched:
                vars(module).pop("forward", None)
        return copied  # a changed copy that is not returned would cause a warning

    jax.eval_shape(run, model, [leaves[i] for i in arrays])
    return {path: found for path, found in calls.items() if found}


def _recording(found: list[Any], path: str, module: Module) -> Callable[..., Any]:
    """Return the module's `forward`, wrapped so that each call adds its shapes to `found`."""
    forward = module.forward

    def recorded(*args: Any, **kwargs: Any) -> Any:
        place = len(found)
        found.append(None)
        try:
            out = forward(*args, **kwargs)
        except Exception as error:
            if not getattr(error, "__notes__", None):
                shapes = ", ".join(_shapes((args, kwargs)))
                error.add_note(f"in {path or 'the model'}, a {type(module).__name__}, given {shapes}")
            raise
        found[place] = _shapes((args, kwargs)), _shapes(out)
        return out

    return recorded


def _shapes(tree: Any) -> tuple[str, ...]:
    return tuple([describe(leaf) for leaf in jax.tree.leaves(tree) if _is_shaped(leaf)])


def _is_shaped(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _size(cell: Any) -> int:
    return int(np.prod(declared(cell).shape))


def _bytes(count: int) -> str:
    """Return 12345 as "12.35 kB"."""
    power = min((len(str(count)) - 1) // 3, 4)
    return f"{count / 1000**power:.4g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
