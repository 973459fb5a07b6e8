"""Lazy layers have no cells until an input has shown their sizes. `Unsized` stands where a module keeps its cells."""

from __future__ import annotations

import threading
from typing import Any, NoReturn

from .errors import UninitializedError


class _Local(threading.local):
    search: Any = None  # the `Search` for sizes that this thread runs; see `module/lazy.py`


class _Process:
    __slots__ = ("has_lazy_layers",)

    def __init__(self) -> None:
        self.has_lazy_layers = False  # True once one was made


local = _Local()
process = _Process()


def error_for(layer: Any, path: str = "") -> UninitializedError:
    """The error for the use of a lazy layer, at a path from the object that was used, where its parameters are needed."""
    text = repr(layer).partition("\n")[0]
    where = f"`{path}`, a {text}," if path else f"this {text}"
    return UninitializedError(
        f"{where} has no parameters yet: its first input tells their sizes. Before this, call the model once, `model(x)`,"
        " or write `mt.summary(model, x)`"
    )


class Unsized(dict[str, Any]):
    """The `_cells` of a lazy layer. It holds what a user has added; whatever looks for the layer's own cells raises.

    Within a search for sizes it answers with the cells of the layer's stand-in, if an input has reached the layer.
    """

    __slots__ = ("layer", "like", "settings", "smallest")

    def __init__(self, layer: Any, like: Any, settings: dict[str, Any], smallest: dict[str, int]) -> None:
        super().__init__()
        self.layer = layer
        self.like = like  # the plain layer of the smallest sizes, of shapes only
        self.settings = settings  # the arguments of its constructor, without the sizes
        self.smallest = smallest  # the sizes of `like`
        process.has_lazy_layers = True

    def _now(self) -> dict[str, Any]:
        """Return the cells of the stand-in. Raises UninitializedError where there is none."""
        stand_in = None if local.search is None else local.search.stand_in(self.layer)
        if stand_in is None:
            raise error_for(self.layer)
        return {**stand_in._cells, **self.added()}

    def added(self) -> dict[str, Any]:
        """Return the cells that a user has added."""
        return dict(zip(dict.keys(self), dict.values(self), strict=True))

    def get(self, name: str, default: Any = None) -> Any:
        return self._now().get(name, default) if name in self.like._cells else dict.get(self, name, default)

    def __getitem__(self, name: str) -> Any:
        return self._now()[name]

    def __contains__(self, name: object) -> bool:
        return bool(name in self.like._cells and self._now()) or dict.__contains__(self, name)

    def __iter__(self) -> Any:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())

    def keys(self) -> Any:
        return self._now().keys()

    def values(self) -> Any:
        return self._now().values()

    def items(self) -> Any:
        return self._now().items()

    def copy(self) -> Any:
        return self._now()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise error_for(self.layer)


def is_unsized(module: Any) -> bool:
    """True for a lazy layer that no input has reached."""
    return type(module._cells) is Unsized
