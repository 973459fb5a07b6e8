"""A map whose keys are objects without a hash, or objects that the map must not keep alive."""

from __future__ import annotations

from typing import Any
from weakref import ref


class IdMap:
    """A map that compares its keys by identity. It does not keep them alive, and they need no hash."""

    def __init__(self) -> None:
        self.items: dict[int, tuple[Any, Any]] = {}

    def get(self, key: Any) -> Any:
        item = self.items.get(id(key))
        return item[1] if item is not None and item[0]() is key else None

    def set(self, key: Any, value: Any) -> None:
        number, items = id(key), self.items
        items[number] = (ref(key, lambda _: items.pop(number, None)), value)
