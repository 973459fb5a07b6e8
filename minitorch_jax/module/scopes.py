"""Names of modules in what is traced: profiles and lowered programs say `Net/blocks/3/attn` of each operation."""

from __future__ import annotations

import threading
from typing import Any

import jax

from ..runtime.jax_private import at_top_level
from . import hooks, tree


class _Local(threading.local):
    paths: dict[int, list[str]] | None = None  # within a call of a module: the paths of all modules below it, by id
    path = ""  # of the module that is called now


_local = _Local()


def scoped_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module's `forward` in a scope: the class name of the outermost module, the path of the others from there."""
    if at_top_level():  # another thread is in `detect_anomaly`
        return hooks.run(module, args, kwargs)
    above, path = _local.paths, _local.path
    if above is None:
        _local.paths = {}
        for inner, found in tree.named_modules(module, "", set(), False):
            _local.paths.setdefault(id(found), []).append(inner)
        name = type(module).__name__
        now = ""
    else:
        known = above.get(id(module), [])
        start = f"{path}." if path else ""
        now = next((other for other in known if other.startswith(start)), known[0] if known else path)
        name = now.removeprefix(start).replace(".", "/") if known else type(module).__name__
    _local.path = now
    try:
        with jax.named_scope(name):
            return hooks.run(module, args, kwargs)
    finally:
        _local.paths, _local.path = above, path
