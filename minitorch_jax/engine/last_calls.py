"""The bindings of the last calls of a function, by thread: models and function objects may take turns."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from .program import Binding


class Latest(threading.local):
    """The last calls of a function in this thread."""

    def __init__(self) -> None:
        self.number = 0  # stands for the function object, or the object, that was called last
        self.bindings: list[weakref.ref[Binding]] = []  # of the last calls, the very last first: models may take turns
        self.others: dict[int, list[weakref.ref[Binding]]] = {}  # those of other numbers
        self.caller: Callable[[], Any] | None = None  # a reference to what `mt.jit` made of the function
        self.compiled = 0  # how many programs were compiled since this was set to 0

    def turn(self, number: int) -> None:
        """Take the bindings of another number; a new one tries the last. (A binding knows whether it is right.)"""
        if len(self.others) >= _MOST_OTHERS:
            self.others.clear()
        self.others[self.number] = self.bindings
        self.number, self.bindings = number, self.others.get(number, self.bindings)

    def note(self, binding: Binding) -> None:
        reference = weakref.ref(binding)
        others = [other for other in self.bindings if other is not reference]
        self.bindings = [reference, *others[: _MOST_LATEST - 1]]

    def clear(self) -> None:
        self.others.clear()
        self.bindings = []


_MOST_LATEST, _MOST_OTHERS = 4, 32
