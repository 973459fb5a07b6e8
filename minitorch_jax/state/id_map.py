"""A map from objects that have no hash, or must not be kept alive."""

from __future__ import annotations

from typing import Any
from weakref import ref


class IdMap:
    """A map from objects, by identity, that does not keep them alive (and does not need their hash)."""

    def __init__(self) -> None:
        self.items: dict[int, tuple[Any, Any]] = {}

    def get(self, key: Any) -> Any:
        item = self.items.get(id(key))
        return item[1] if item is not None and item[0]() is key else None

    def set(self, key: Any, value: Any) -> None:
        number, items = id(key), self.items
        items[number] = (ref(key, lambda _: items.pop(number, None)), value)
