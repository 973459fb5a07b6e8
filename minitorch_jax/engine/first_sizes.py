"""The first call of a compiled function with lazy layers: their sizes are found before anything is traced for good."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, TypeVar

import jax

from ..module.sizes import Search
from ..state.errors import UninitializedError
from ..state.gradient import starting_value
from ..state.walk import walk_of
from .arguments import Arguments
from .tracing import Purpose, Traced, unique_cells

R = TypeVar("R")


class _Done(Exception):  # noqa: N818
    """Ends an abstract run, so that whatever it did is undone."""


def _end(out: Any, objects: list[Any]) -> Any:
    raise _Done


def find_sizes(call: Arguments, search: Search) -> None:
    """Run a call abstractly, within a search. It changes no cell, no static attribute and no random stream.

    A run may fail because a layer was called later than its parameters were needed, as in the gradients by a model. The next
    run begins with the stand-ins that this one has made.
    """
    while True:
        known = len(search.found)
        lifted, _ = unique_cells([walk_of(obj) for obj in call.objects], True)
        try:
            with suppress(_Done), jax.disable_jit(False):
                Traced(call, lifted, list(map(starting_value, lifted)), call.data, Purpose(_end, gradients=True))
            return
        except Exception:
            if len(search.found) == known:
                raise


def finds_sizes(method: Callable[..., R]) -> Callable[..., R]:
    """Wrap a method `(fn, args, kwargs)` of a `Function` that walks over the objects of a call, and so meets lazy layers."""

    @wraps(method)
    def call(function: Any, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
        try:
            return method(function, fn, args, kwargs)
        except UninitializedError as error:
            unsized = error
        arguments = Arguments(fn, args, kwargs)
        with Search() as search:
            function.add_reached(arguments)
            find_sizes(arguments, search)
        if not search.found:
            raise unsized
        with search.made():
            return method(function, fn, args, kwargs)

    return call
