"""The live lists that `parameters()` and `grads()` return."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax

from ..state import access
from ..state.cell import Cell
from ..state.concurrent_reads import lendings
from ..state.walk import walk_of
from .parameter import assign, checked, read_gradient, write_gradient
from .torch_habits import look, note_read


class LiveList(list[Any]):
    """The arrays of `parameters()` or `grads()`. Reading an item reads the module; assigning one writes to it."""

    __slots__ = ("_paths", "_gradients", "_owner")

    def __init__(self, params: Iterable[Cell], paths: Iterable[str], gradients: bool, owner: Any) -> None:
        super().__init__(params)  # the items are the cells, so that the list keeps no array alive
        self._paths = list(paths)
        self._gradients = gradients
        self._owner = owner

    @classmethod
    def of(cls, module: Any, gradients: bool) -> LiveList:
        """The live list of a module's trainable parameters, or of their gradients."""
        walk = walk_of(module)
        if walk.looked is not lendings.last:
            look(walk, walk.named())
        found = [(path, cell) for path, cell in walk.named() if cell.trainable]
        return cls([cell for _, cell in found], [path for path, _ in found], gradients, module)

    def _read(self, cell: Cell) -> Any:
        return read_gradient(cell, self._owner) if self._gradients else access.read(cell, self._owner)

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if isinstance(index, slice):
            return [self._read(cell) for cell in found]
        array = self._read(found)
        note_read(found, array, type(self._owner), self._paths[index])
        return array

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, slice):
            values, places = list(value), range(*index.indices(len(self)))
            if len(values) != len(places):
                raise ValueError(
                    f"{len(values)} arrays were assigned to {len(places)} places, and the list has a fixed length"
                )
        else:
            values, places = [value], range(len(self))[index : index + 1 or None]
            super().__getitem__(index)  # raises IndexError, as for any list
        targets = [(super(LiveList, self).__getitem__(place), self._paths[place]) for place in places]
        labels = [f"the gradient of {path}" if self._gradients else path for _, path in targets]
        new = [checked(v, cell.value, label) for v, (cell, _), label in zip(values, targets, labels, strict=True)]
        write = write_gradient if self._gradients else assign
        for item, (cell, _), label in zip(new, targets, labels, strict=True):  # after all values have been checked
            write(cell, item, label, self._owner)

    def cells(self) -> list[Cell]:
        """Return the parameters' cells, for the optimizer."""
        return list(super().__iter__())

    def __iter__(self) -> Iterator[Any]:
        return map(self._read, super().__iter__())

    def __reversed__(self) -> Iterator[Any]:
        return map(self._read, super().__reversed__())

    def __add__(self, other: Any) -> list[Any]:
        return list(self) + list(other)

    def __radd__(self, other: Any) -> list[Any]:
        return list(other) + list(self)

    def __repr__(self) -> str:
        return repr(list(self))

    def __eq__(self, other: object) -> bool:
        return self is other

    def __contains__(self, item: object) -> bool:
        return any(item is mine for mine in self)

    def copy(self) -> list[Any]:
        return list(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return list, (list(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> list[Any]:
        return list(self)

    def _fixed(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            "parameters() and grads() are views of a module, so their length is fixed, and the module sets their order."
            " Assign items, or make a plain list with list(...)."
        )

    append = extend = insert = remove = pop = clear = sort = reverse = _fixed
    __delitem__ = __iadd__ = __imul__ = _fixed


def _flatten(live: LiveList) -> tuple[list[Any], None]:
    return list(live), None


def _unflatten(_: None, items: Iterable[Any]) -> Any:
    return list(items)


jax.tree_util.register_pytree_node(LiveList, _flatten, _unflatten)
