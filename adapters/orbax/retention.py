"""Orbax's policies: which steps are saved, and which checkpoints are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple


class Retention(NamedTuple):
    """The policy by which orbax keeps checkpoints: the `keep` best or latest ones, and the latest one."""

    keep: int | None
    best: tuple[str, str] | None

    def score(self, metrics: Any) -> float:
        """The score of a checkpoint: greater is better."""
        if self.best is None:
            return 0.0
        value = float((metrics or {}).get(self.best[0], math.nan))
        return -math.inf if math.isnan(value) else value if self.best[1] == "max" else -value

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = sorted(checkpoints, key=lambda c: (self.score(c.metrics), c.step), reverse=True)
        kept = {c.step for c in steps[: self.keep]} | {max((c.step for c in checkpoints), default=0)}
        return [c.step in kept for c in checkpoints]


class Always:
    """The policy by which orbax saves steps: all of them, since `Manager.save` has selected them."""

    def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
        return True
