"""Reading and loading the dict of all arrays of a module: `state_dict` and `load_state_dict`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ..state import access
from ..state import frame as frames
from ..state.cell import Cell
from ..state.concurrent_reads import lend, steadily
from ..state.structure import cell_changed
from .parameter import encode_checked, same_values
from .tree import entries


class IncompatibleKeys(NamedTuple):
    """The names that `load_state_dict(strict=False)` skipped."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def read_state_dict(module: Any) -> dict[str, jax.Array]:
    """See `Module.state_dict`."""
    found = list(entries(module))

    def read_all() -> dict[str, jax.Array]:
        return {path: access.read(cell, holder) for path, holder, _, cell in found}

    return steadily([cell for *_, cell in found], read_all) if frames.is_eager() else read_all()


def load_state_dict(module: Any, state_dict: Mapping[str, Any], strict: bool) -> IncompatibleKeys:
    """See `Module.load_state_dict`."""
    found = list(entries(module))
    paths = {path for path, _, _, _ in found}
    missing = [path for path, _, _, _ in found if path not in state_dict]
    unexpected = [path for path in state_dict if path not in paths]
    problems = [f"  missing: {path}" for path in missing] + [f"  unexpected: {path}" for path in unexpected]
    problems = problems if strict else []
    new: dict[Cell, tuple[str, Any]] = {}
    for path, holder, _, cell in found:
        if path in state_dict:
            given = state_dict[path]
            try:
                value = encode_checked(cell, given if isinstance(given, jax.Array) else np.asarray(given), path)
            except (ValueError, TypeError) as error:
                problems.append(f"  {error}")
                continue
            access.check_writable(cell, path, holder)
            if cell in new and not same_values(new[cell][1], value):
                problems.append(f"  {path} and {new[cell][0]} are one tied parameter, but their arrays differ")
            new.setdefault(cell, (path, value))
    if problems:
        listed = "\n".join(problems)
        raise ValueError(f"state_dict does not fit this {type(module).__name__}; nothing was loaded:\n{listed}")
    for cell in new:
        lend(cell)
    access.store_all(list(new), [value for _, value in new.values()])
    for cell in new:
        cell_changed(cell)  # the new array may be on another device
    return IncompatibleKeys(missing, unexpected)
