"""`Manager`: the checkpoints of one training run."""

from __future__ import annotations

import atexit
import math
import operator
import os
import threading
from collections.abc import Mapping
from typing import Any, Literal, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from minitorch_jax.saving.as_json import value_of
from minitorch_jax.saving.checkpoint import bring_back, matched, snapshot, validated

from .arrays import arrays_of, read_arguments, stored_dtype, stored_form
from .retention import Always, Retention

_open: set[Manager] = set()


def _close_all() -> None:
    for manager in list(_open):
        manager.close()


# Close managers at the end of the program, before Python stops orbax's threads. `atexit` alone would run too late.
getattr(threading, "_register_atexit", atexit.register)(_close_all)


class Manager:
    """The checkpoints of one training run in one folder.

    Close it at the end, best by a `with` block. The end of the program closes it too.

    Args:
        folder: the folder of the checkpoints. It is made if it does not exist. Only one process, or one group of
            processes, may write to it at a time.
        keep: the number of checkpoints to keep; None keeps all.
        best: the name of a metric, and "min" or "max". The manager then keeps the `keep` best checkpoints by this
            metric, and the latest one to resume from. NaN is the worst value. Without `best`, it keeps the `keep` latest.
        every: `save` writes only steps that are multiples of this number.

    Raises:
        ValueError: if an argument is out of its range.
        NotADirectoryError: if `folder` is a file.

    Example:
        >>> import tempfile
        >>> from minitorch_jax import nn, optim
        >>> from minitorch_jax.adapters import orbax
        >>> model = nn.Linear(2, 1)
        >>> opt = optim.SGD([model], lr=0.1)
        >>> with orbax.Manager(tempfile.mkdtemp(), keep=2, best=("loss", "min")) as checkpoints:
        ...     for step, loss in enumerate([0.5, 0.2, 0.3, 0.4]):
        ...         _ = checkpoints.save(step, {"loss": loss}, model=model, opt=opt, epoch=step // 2)
        ...     checkpoints.all_steps(), checkpoints.restore("best", model=model, opt=opt)
        ([1, 2, 3], {'epoch': 0})
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int | None = 3,
        best: tuple[str, Literal["min", "max"]] | None = None,
        every: int = 1,
    ) -> None:
        if keep is not None and _count(keep, "keep") < 1:
            raise ValueError(f"Manager needs keep >= 1, or keep=None to keep all checkpoints; got {keep}")
        if _count(every, "every") < 1:
            raise ValueError(f"Manager needs every >= 1; got {every}")
        if best is not None and not (isinstance(best, tuple) and len(best) == 2 and best[1] in ("min", "max")):
            raise ValueError(
                f'best must be the name of a metric and "min" or "max", such as ("loss", "min"); got {best!r}'
            )
        self.folder = os.fspath(folder) if "://" in str(folder) else os.path.abspath(folder)
        if os.path.isfile(self.folder):
            raise NotADirectoryError(f"Manager needs a folder for checkpoints; {self.folder} is a file")
        self.keep, self.best, self.every = keep, best, every
        rule = Retention(keep, best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=rule,
            best_fn=rule.score,
            save_decision_policy=Always(),
        )
        handlers = {"description": ocp.JsonCheckpointHandler(), "arrays": ocp.PyTreeCheckpointHandler()}
        self._orbax: Any = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
        self._writing: int | None = None
        _open.add(self)

    # -- saving -------------------------------------------------------------------------------------------------------

    def save(
        self, step: int, /, metrics: Mapping[str, Any] | None = None, *, force: bool = False, **objects: Any
    ) -> bool:
        """Save objects as a step's checkpoint, in the background.

        Training can continue at once: the next update of an array that is still being written makes a copy. A save waits
        for the save before it.

        Args:
            step: an integer greater than the steps of all checkpoints in the folder.
            metrics: numbers by name, which include the metric of `best`.
            force: True saves a step that `every` leaves out.
            **objects: as for `mt.save`: modules, optimizers, numbers, strings, arrays, random keys, and lists, tuples and
                dicts of these. The random stream is saved with them.

        Returns:
            True if the step is saved, False if `every` leaves it out.

        Raises:
            TypeError: if an object cannot be saved; the message names it.
            ValueError: if the step is not greater than all others, or metrics are wrong.
            RuntimeError: if the save before this one has failed, or the manager is closed.
        """
        number, measured = _count(step, "step"), self._measured(metrics)
        self._check_open()
        if number % self.every and not force:
            return False
        self.wait()
        latest = self.latest_step
        if number < 0 or (latest is not None and number <= latest):
            raise ValueError(
                f"step {number} was not saved: it must be >= 0, and greater than {latest}, the latest step in"
                f" {self.folder}. Pass a greater step, delete steps (`delete(step)`), or use another folder"
            )
        whole, arrays = snapshot(objects)
        stored = {place: stored_form(array, place) for place, array in arrays.items() if array.size}
        items = {"description": ocp.args.JsonSave(whole)}
        if stored:
            items["arrays"] = ocp.args.PyTreeSave(stored)
        self._clean()
        self._writing = number
        try:
            self._orbax.save(number, metrics=measured, args=ocp.args.Composite(**items))
        except Exception as error:
            raise RuntimeError(f"step {number} could not be saved in {self.folder}: {error}") from error
        return True

    def _measured(self, metrics: Mapping[str, Any] | None) -> dict[str, float]:
        if metrics is not None and not isinstance(metrics, Mapping):
            raise TypeError(f"save() takes metrics as a dict of numbers by name; got {metrics!r}")
        try:
            measured = {str(name): float(value) for name, value in (metrics or {}).items()}
        except (TypeError, ValueError) as error:
            raise TypeError(f"save() takes metrics as a dict of numbers by name; got {metrics!r}: {error}") from error
        if self.best is not None and self.best[0] not in measured:
            raise ValueError(
                f"this Manager keeps the best checkpoints by {self.best[0]!r}, and needs this metric: pass"
                f" metrics={{{self.best[0]!r}: ...}}; got {measured}"
            )
        return measured

    def _clean(self) -> None:
        """Remove unfinished folders that failed saves and killed processes have left."""
        if jax.process_index() == 0:
            for path in self._orbax.directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                path.rmtree()

    def wait(self) -> None:
        """Wait until the last save is on the disk.

        Raises:
            RuntimeError: if the save failed, or the manager is closed.
        """
        self._check_open()
        number, self._writing = self._writing, None
        try:
            self._orbax.wait_until_finished()
            self._orbax.check_for_errors()
        except Exception as error:
            raise RuntimeError(f"step {number} could not be saved in {self.folder}: {error}") from error

    def _check_open(self) -> None:
        if self._orbax is None:
            raise RuntimeError(f"this Manager of {self.folder} is closed: make a new one")

    # -- restoring ----------------------------------------------------------------------------------------------------

    def restore(self, step: int | Literal["latest", "best"] = "latest", /, **objects: Any) -> dict[str, Any]:
        """Restore the saved state of objects, in place: of all of them, or of none.

        Arrays that are bound to a device, or sharded over several, stay there. Each process reads the parts that it needs,
        whatever the sharding was when they were saved.

        Args:
            step: the step of the checkpoint, "latest" or "best".
            **objects: all objects with a state, under the names that they were saved by. None leaves one out.

        Returns:
            The saved values that have no state of their own (numbers, strings, arrays, …), by name. Arrays are NumPy's.

        Raises:
            ValueError: if the checkpoint does not exist, is damaged, or does not fit the objects. One error lists all
                differences, and nothing has changed. Orbax writes no digest of the values, so not all damage is found.
            RuntimeError: if a save before it has failed, or the manager is closed.
        """
        number = self._number(step)
        source = f"step {number} of {self.folder}"
        try:
            read = self._orbax.restore(number, args=ocp.args.Composite(description=ocp.args.JsonRestore()))
            saved = validated(read["description"])
            places = {name: dict(arrays_of(entry["value"])) for name, entry in saved.objects.items()}
            there = dict(self._orbax.item_metadata(number).items()).get("arrays")
        except Exception as error:
            raise ValueError(f"{source} cannot be read, or Manager.save did not write it: {error!r}") from error
        targets, problems = matched(saved, objects)
        wanted = {name: held for name, held in places.items() if name in targets or not saved.objects[name]["stateful"]}
        mine = snapshot(targets, abstract=True)[1]
        try:
            arrays = self._read(number, {k: v for held in wanted.values() for k, v in held.items()}, there, mine)
            values = {name: value_of(saved.objects[name]["value"], arrays) for name in wanted}
        except Exception as error:
            raise ValueError(f"{source} cannot be read; nothing was loaded: {error}") from error
        bring_back(source, saved, targets, problems, values)
        return {name: value for name, value in values.items() if name not in targets}

    def _read(self, number: int, wanted: Mapping[str, Any], there: Any, mine: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays by path. Those that the objects have on devices are read to these devices, the others to NumPy."""
        written = {place: array for place, array in wanted.items() if math.prod(array.shape)}
        tree = there.tree if there is not None else {}
        for place, array in written.items():  # orbax does not compare, and would return any array
            if place not in tree or (tuple(tree[place].shape), tree[place].dtype) != (
                array.shape,
                stored_dtype(array),
            ):
                raise ValueError(f"the array {place} should be {array.dtype}{list(array.shape)}, and orbax has another")
        arrays: dict[str, Any] = {k: np.zeros(a.shape, a.dtype) for k, a in wanted.items() if k not in written}
        if written:
            how = {place: read_arguments(array, mine.get(place)) for place, array in written.items()}
            args = ocp.args.PyTreeRestore(item=dict.fromkeys(written, 0), restore_args=how, partial_restore=True)
            read = self._orbax.restore(number, args=ocp.args.Composite(arrays=args))["arrays"]
            arrays |= {k: a if isinstance(a, jax.Array) else np.asarray(a) for k, a in read.items()}
        return arrays

    def _number(self, step: Any) -> int:
        self.wait()
        if step == "latest":
            number = self.latest_step
        elif step == "best":
            number = self.best_step
        else:
            number = _count(step, 'step, "latest" or "best",')
        steps = self.all_steps()
        if step == "best" and number is None and steps:
            raise ValueError(
                f"no step in {self.folder} is the best: {self.best and self.best[0]} is NaN or missing in all of {steps}"
            )
        if number not in steps:
            raise ValueError(f"{self.folder} has no step {step}; it has {steps or 'none'}")
        return number

    # -- the checkpoints ----------------------------------------------------------------------------------------------

    def all_steps(self) -> list[int]:
        """The steps of all checkpoints, ascending. Waits for running saves."""
        self.wait()
        self._orbax.reload()
        return sorted(self._orbax.all_steps())

    @property
    def latest_step(self) -> int | None:
        """The greatest step of all checkpoints; None if there is none. Waits for running saves."""
        return max(self.all_steps(), default=None)

    @property
    def best_step(self) -> int | None:
        """The step with the best metric; of equal ones, the latest. None if the metric of every step is NaN or missing.

        Raises:
            ValueError: if the Manager was made without `best`.
        """
        if self.best is None:
            raise ValueError('this Manager was made without `best`: pass a metric, such as best=("loss", "min")')
        rule = Retention(self.keep, self.best)
        measured = {step: self.metrics(step) for step in self.all_steps()}
        ranked = [
            (rule.score(m), step) for step, m in measured.items() if not math.isnan(m.get(self.best[0], math.nan))
        ]
        return max(ranked, default=(None, None))[1]

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics that were saved with a step."""
        number = self._number(step)
        return dict(self._orbax.metrics(number) or {})

    def delete(self, step: int) -> None:
        """Remove a step's checkpoint."""
        number = self._number(step)
        self._orbax.delete(number)

    # -- closing ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for running saves, and close the manager. Further calls have no effect.

        Raises:
            RuntimeError: if the last save failed.
        """
        if self._orbax is not None:
            try:
                self.wait()
            finally:
                manager, self._orbax = self._orbax, None
                _open.discard(self)
                manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            self.close()
        except RuntimeError as failure:
            if error is None:
                raise
            error.add_note(str(failure))

    def __repr__(self) -> str:
        return f"Manager({self.folder!r}, keep={self.keep}, best={self.best}, every={self.every})"


def _count(value: Any, name: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    return operator.index(value)
