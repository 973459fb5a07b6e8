"""A static value that is equal to nothing but itself."""

from __future__ import annotations

from typing import Any

from minitorch_jax.state.containers import describe


class Same:
    """An object as part of what is compiled for: only the very same one is equal, whatever it says of itself."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)

    def weakened(self, weaken: Any) -> Any:
        """What stands for it in a key that does not keep the object alive."""
        return Same, weaken.identity(self.value)

    def __repr__(self) -> str:
        return describe(self.value)
