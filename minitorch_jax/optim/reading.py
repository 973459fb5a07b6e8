"""What schedules and a user's rule read by name: a step follows it, as `mt.jit` does what its function reads."""

from __future__ import annotations

from typing import Any

from ..followed import Followed, follow
from ..libraries import is_users_code
from ..watch import Same, Watch


class Reading:
    """What the rule and the schedules of an optimizer read by name: a key of it, and whether it has changed since."""

    def __init__(self, opt: Any) -> None:
        self._without: frozenset[str] = opt._own_changes  # what the rule itself changes, while it is traced
        self._functions = _functions(opt)
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

    def own_changes(self) -> frozenset[str]:
        """After the first step: the paths at which the rule and the schedules have changed something; no longer followed."""
        before, after = self._followed, follow(self._functions[0], self._functions[1:], without=self._without)
        self.is_new = False
        if before is not None and (changes := before.changed_by(after)):
            self._without |= changes
            key = self.key
            self._look()
            self.key, self.is_new = key, False  # that of the program that runs
        return self._without


def _functions(opt: Any) -> list[Any]:
    hyper = opt._hyper
    found = [schedule for g in range(len(opt._lists)) for schedule in hyper.schedules_of(g).values()]
    return [*found, type(opt).update] if is_users_code(type(opt)) else found
