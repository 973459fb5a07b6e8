"""What schedules and a user's rule read by name: a step follows it, as `mt.jit` does what its function reads."""

from __future__ import annotations

from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

from ..engine.follow import follow
from ..engine.followed import Followed
from ..engine.libraries import is_users_code
from ..engine.watch import Same, Watch


class Reading:
    """What the rule and the schedules of an optimizer read by name: a key of it, and whether it has changed since."""

    def __init__(self, opt: Any) -> None:
        self._functions = _functions(opt)
        self._without = _changed_by(self._functions)  # what they change themselves, while they are traced
        self._followed: Followed | None = None
        self.key: Any = ()
        self._watch: Watch | None = None
        self.is_new = False
        if self._functions:
            self._look()

    def _look(self) -> None:
        followed = follow(self._functions[0], self._functions[1:], without=self._without)
        arrays = followed.arrays
        self._followed = followed
        self.key = followed.key, tuple((path, Same(place.was)) for path, place in arrays.items())
        places = [*followed.places, *arrays.values()]
        self._watch = Watch(places) if places else None
        self.is_new = self._watch is not None

    def changed(self) -> bool:
        """True if any of it is another by now."""
        return self._watch is not None and self._watch.rebound()

    def finds_own_changes(self) -> bool:
        """After the first step: leave out what the rule and the schedules have changed themselves. True if there is any."""
        before, after = self._followed, follow(self._functions[0], self._functions[1:], without=self._without)
        self.is_new = False
        changes = before.changed_by(after) if before is not None else set()
        if changes:
            for function in self._functions:
                function = getattr(function, "__func__", function)
                if isinstance(function, FunctionType):
                    _own_changes[function] = _own_changes.get(function, frozenset()) | changes
            self._without |= changes
            self._look()
            self.is_new = False
        return bool(changes)


_own_changes: WeakKeyDictionary[Any, frozenset[str]] = WeakKeyDictionary()


def _changed_by(functions: list[Any]) -> frozenset[str]:
    plain = [getattr(function, "__func__", function) for function in functions]
    known = [_own_changes.get(function, frozenset()) for function in plain if isinstance(function, FunctionType)]
    return frozenset().union(*known)


def _functions(opt: Any) -> list[Any]:
    hyper = opt._hyper
    found = [schedule for g in range(len(opt._lists)) for schedule in hyper.schedules_of(g).values()]
    return [*found, type(opt).update] if is_users_code(type(opt)) else found
