"""`pack` and `unpack`: small parameters as views of one flat array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from .runtime import interrupts
from .runtime.copies import everywhere
from .runtime.jax_private import at_top_level
from .runtime.tracebacks import warn
from .state import access
from .state.cell import Cell
from .state.errors import TraceError
from .state.gradient import CONSUMED
from .state.packed import _pack_together, release
from .state.static_values import module_of
from .state.walk import walk_of


def pack(*modules: Any, max_size: int = 1024) -> None:
    """Store the small parameters of modules end to end in one flat array, and their gradients in another, in place.

    Reading, assigning, tying, freezing, `state_dict`, pytrees and copies work as before (copies are not packed). If the rule
    of an optimizer is elementwise, its state for packed parameters is packed, too. Any other rule is applied to the
    parameters one by one, inside the same program. With packing, `step()` takes the same time for any number of parameters,
    and an eager loop over many small ones takes about half the time. The price is compile time: every program that uses a
    packed array cuts it out of the flat array with a kernel of its own (docs/performance.md).

    Only trainable parameters are packed that are on one device, or whole on each device of a mesh; a warning says if there
    are others only. A parameter that is frozen, divided, moved or converted later leaves its pack. Pack modules that
    different optimizers train in separate calls.

    Args:
        *modules: Modules. Those that are packed already are packed again, together with the others.
        max_size: the most elements of an array that is packed; for a larger array the copy costs more than it saves.

    Raises:
        TypeError: if an argument is not a Module.
        ValueError: if there is no argument.
        TraceError: inside a JAX transform or a compiled function.

    Example:
        >>> import jax, jax.numpy as jnp, minitorch_jax as mt
        >>> from minitorch_jax import nn
        >>> model = nn.Sequential(*[nn.Linear(4, 4, key=jax.random.key(i)) for i in range(10)])
        >>> opt = mt.Optimizer([model], lr=0.1)
        >>> mt.pack(model)
        >>> loss = mt.backward(lambda x: model(x).sum(), jnp.ones((2, 4)))
        >>> opt.step()
        >>> model[0].weight.shape, model.num_parameters()
        ((4, 4), 200)
    """
    params = _parameters("pack", modules)
    with interrupts.deferred:
        for cell in params:
            release(cell)
        groups: dict[Any, list[Cell]] = {}
        divided: list[Cell] = []
        for cell in params:
            value = cell.value
            if cell.trainable and isinstance(value, jax.Array) and 0 < value.size <= max_size:
                if not value.is_fully_replicated:
                    divided.append(cell)
                    continue
                consumed = cell.grad.value is CONSUMED
                where = everywhere(value.sharding)
                groups.setdefault((value.dtype, where, value.committed, consumed), []).append(cell)
        if divided and not groups:
            warn(
                f"mt.pack packs nothing here: all {len(divided)} small parameters are divided over devices, as"
                f" {divided[0].value.sharding}, and a packed array cannot be. Leave small parameters whole on each device",
            )
        for members in groups.values():
            if len(members) > 1:
                _pack_together(members)


def unpack(*modules: Any) -> None:
    """Undo `pack`: every parameter gets an array of its own again. It raises the same errors as `pack`."""
    params = _parameters("unpack", modules)
    with interrupts.deferred:
        for cell in params:
            release(cell)


def _parameters(name: str, modules: Sequence[Any]) -> list[Cell]:
    """Return the cells of the modules' parameters, each once."""
    if not modules:
        raise ValueError(f"mt.{name} takes one or more modules; it was given none")
    modules = list(map(module_of, modules))
    for module in modules:
        if isinstance(module, type) or not hasattr(module, "_cells"):
            raise TypeError(f"mt.{name} takes Modules, not {type(module).__name__}: `mt.{name}(model)`")
        access.check_restructurable(module._birth, type(module).__name__, f"was given to mt.{name}")
        if not at_top_level():
            raise TraceError(f"mt.{name} was called inside a JAX transform; call it before the transform")
    return list(dict.fromkeys(cell for module in modules for cell in walk_of(module).params))
