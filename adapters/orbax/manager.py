"""Checkpoints with orbax: written in the background, spread over devices and processes, the best or the latest kept.

`Manager` saves what `mt.save` saves, to a folder with one checkpoint per step, and `restore` is as strict as `mt.load`:
names, structure, shapes and dtypes are compared, all that differs is said at once, and nothing has changed then.

In each step's folder orbax writes two items that it can also read by itself: `arrays`, all arrays by their path
(`model.0.weight`), and `description`, what they belong to, and all else, in JSON.
"""

from __future__ import annotations

import atexit
import math
import operator
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from minitorch_jax.saving.checkpoint import bring_back, matched, snapshot, validated
from minitorch_jax.saving.description import value_of

from ._extra import missing

try:
    import orbax.checkpoint as ocp
    import tensorstore
except ImportError as error:
    raise missing("orbax", error) from error


_open: set[Manager] = set()


def _close_all() -> None:
    for manager in list(_open):
        manager.close()


# At the end of the program, before Python stops the threads that orbax writes with: `atexit` would come too late.
getattr(threading, "_register_atexit", atexit.register)(_close_all)


class Manager:
    """Checkpoints of one training run in one folder.

    Close it at the end, best by `with`; the end of the program closes it too.

    Args:
        folder: of the checkpoints; made if it is not there. One process, or one group of them, may write to it at a time.
        keep: how many checkpoints to keep; None keeps all.
        best: a metric's name, and "min" or "max": keeps the `keep` best ones by it, and the latest one besides, to resume
            from. A checkpoint whose metric is NaN is the worst. Without it the `keep` latest ones are kept.
        every: `save` writes only steps that are multiples of it.

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
            raise ValueError(f"Manager keeps at least one checkpoint: keep must be >= 1, or None for all; got {keep}")
        if _count(every, "every") < 1:
            raise ValueError(f"Manager saves every so many steps: every must be >= 1; got {every}")
        if best is not None and not (isinstance(best, tuple) and len(best) == 2 and best[1] in ("min", "max")):
            raise ValueError(f'best must be a metric\'s name and "min" or "max", such as ("loss", "min"); got {best!r}')
        self.folder = os.fspath(folder) if "://" in str(folder) else os.path.abspath(folder)
        if os.path.isfile(self.folder):
            raise NotADirectoryError(f"Manager keeps checkpoints in a folder, and {self.folder} is a file")
        self.keep, self.best, self.every = keep, best, every
        rule = _Rule(keep, best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=rule,
            best_fn=rule.score,
            save_decision_policy=_Always(),
        )
        handlers = {"description": ocp.JsonCheckpointHandler(), "arrays": ocp.PyTreeCheckpointHandler()}
        self._orbax: Any = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
        self._writing: int | None = None
        _open.add(self)

    # -- saving -------------------------------------------------------------------------------------------------------

    def save(
        self, step: int, /, metrics: Mapping[str, Any] | None = None, *, force: bool = False, **objects: Any
    ) -> bool:
        """Save objects as a step's checkpoint, in the background: returns as soon as it has what is to be written.

        Training may go on at once: the next step copies the arrays that are still being written, and changes the copies.
        A save waits for the one before it.

        Args:
            step: a number greater than that of all checkpoints in the folder.
            metrics: numbers by name; among them that of `best`.
            force: whether to save a step that `every` leaves out.
            **objects: as for `mt.save`: modules, optimizers, numbers, strings, arrays, random keys, and lists, tuples and
                dicts of these. The random stream goes with them.

        Returns:
            Whether it is saved; False for a step that `every` leaves out.

        Raises:
            TypeError: if something cannot be saved, naming it.
            ValueError: if the step is not after all others, or metrics are wrong.
            RuntimeError: if the save before it has failed (said at the next step that is saved), or the manager is closed.
        """
        number, measured = _count(step, "step"), self._measured(metrics)
        self._check_open()
        if number % self.every and not force:
            return False
        self.wait()
        latest = self.latest_step
        if number < 0 or (latest is not None and number <= latest):
            raise ValueError(
                f"step {number} was not saved: it must be >= 0, and greater than {latest}, the latest one in {self.folder}."
                " Go on from there, delete the steps that are not wanted any more (`delete(step)`), or use another folder"
            )
        whole, arrays = snapshot(objects)
        stored = {place: _stored(array, place) for place, array in arrays.items() if array.size}
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
                f"this Manager keeps the best checkpoints by {self.best[0]!r}, which is not among the metrics: pass"
                f" metrics={{{self.best[0]!r}: ...}}; got {measured}"
            )
        return measured

    def _clean(self) -> None:
        """Remove what processes that were killed, or saves that failed, have left unfinished."""
        if jax.process_index() == 0:
            for path in self._orbax.directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                path.rmtree()

    def wait(self) -> None:
        """Wait until what was saved is on the disk.

        Raises:
            RuntimeError: if it could not be written, or the manager is closed.
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
        """Bring objects to the state that was saved, in place, all of them or none; what was saved as it is, is returned.

        Arrays that are bound to a device, or spread over several, stay so: each process reads the parts that it needs,
        however they were spread when they were saved.

        Args:
            step: of the checkpoint: its number, "latest" or "best".
            **objects: under the names that they were saved by, for all that have a state; None leaves one as it is.

        Returns:
            The values without a state of their own (numbers, strings, arrays, …), by name; arrays as NumPy's.

        Raises:
            ValueError: if there is no such checkpoint, it is damaged (as far as orbax can tell: it has no digest of the
                numbers), or it does not fit the objects: one error that says all that differs. Nothing has changed then.
            RuntimeError: if a save before it has failed, or the manager is closed.
        """
        number = self._number(step)
        source = f"step {number} of {self.folder}"
        try:
            read = self._orbax.restore(number, args=ocp.args.Composite(description=ocp.args.JsonRestore()))
            saved = validated(read["description"])
            places = {name: dict(_arrays_of(entry["value"])) for name, entry in saved.objects.items()}
            there = dict(self._orbax.item_metadata(number).items()).get("arrays")
        except Exception as error:
            raise ValueError(f"{source} cannot be read, or is not of Manager.save: {error!r}") from error
        targets, problems = matched(saved, objects)
        wanted = {name: held for name, held in places.items() if name in targets or not saved.objects[name]["stateful"]}
        mine = snapshot(targets)[1]
        try:
            arrays = self._read(number, {k: v for held in wanted.values() for k, v in held.items()}, there, mine)
            values = {name: value_of(saved.objects[name]["value"], arrays) for name in wanted}
        except Exception as error:
            raise ValueError(f"{source} cannot be read; nothing was loaded: {error}") from error
        bring_back(source, saved, targets, problems, values)
        return {name: value for name, value in values.items() if name not in targets}

    def _read(self, number: int, wanted: Mapping[str, Any], there: Any, mine: Mapping[str, Any]) -> dict[str, Any]:
        """Arrays by place, those that the objects have on devices in their place there, the others as NumPy's."""
        written = {place: array for place, array in wanted.items() if math.prod(array.shape)}
        tree = there.tree if there is not None else {}
        for place, array in written.items():  # orbax by itself would give what there is
            if place not in tree or (tuple(tree[place].shape), tree[place].dtype) != (
                array.shape,
                _stored_dtype(array),
            ):
                raise ValueError(f"the array {place}, {array.dtype}{list(array.shape)}, is not what is there")
        arrays: dict[str, Any] = {k: np.zeros(a.shape, a.dtype) for k, a in wanted.items() if k not in written}
        if written:
            how = {place: _how(array, mine.get(place)) for place, array in written.items()}
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
                f"no step in {self.folder} is the best: {self.best and self.best[0]} is not a number in any of {steps}"
            )
        if number not in steps:
            raise ValueError(f"there is no step {step} in {self.folder}, which has {steps or 'none'}")
        return number

    # -- what there is ------------------------------------------------------------------------------------------------

    def all_steps(self) -> list[int]:
        """The steps of all checkpoints, ascending, once those being saved are on the disk."""
        self.wait()
        self._orbax.reload()
        return sorted(self._orbax.all_steps())

    @property
    def latest_step(self) -> int | None:
        """The greatest step of all checkpoints, once they are on the disk; None if there is none."""
        return max(self.all_steps(), default=None)

    @property
    def best_step(self) -> int | None:
        """The step whose metric is the best, of equal ones the latest; None if none has a number there.

        Raises:
            ValueError: if the Manager was not told what is best.
        """
        if self.best is None:
            raise ValueError('this Manager does not know what is best: make it with best=("loss", "min")')
        rule = _Rule(self.keep, self.best)
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

    # -- the end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for what is being saved, and end; once is enough, more is no error.

        Raises:
            RuntimeError: if the last save could not be written.
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


# -- which are kept ----------------------------------------------------------------------------------------------------


class _Rule(NamedTuple):
    """Orbax's policy: which checkpoints stay."""

    keep: int | None
    best: tuple[str, str] | None

    def score(self, metrics: Any) -> float:
        """The greater, the better."""
        if self.best is None:
            return 0.0
        value = float((metrics or {}).get(self.best[0], math.nan))
        return -math.inf if math.isnan(value) else value if self.best[1] == "max" else -value

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = sorted(checkpoints, key=lambda c: (self.score(c.metrics), c.step), reverse=True)
        kept = {c.step for c in steps[: self.keep]} | {max((c.step for c in checkpoints), default=0)}
        return [c.step in kept for c in checkpoints]


class _Always:
    """Orbax's policy: which steps are saved. `Manager.save` has decided."""

    def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
        return True


# -- arrays as orbax takes them ----------------------------------------------------------------------------------------


class _Array(NamedTuple):
    dtype: Any
    shape: tuple[int, ...]


def _arrays_of(what: Any) -> Iterator[tuple[str, _Array]]:
    """The places, dtypes and shapes of the arrays in a description."""
    if isinstance(what, list):
        for item in what:
            yield from _arrays_of(item)
    elif isinstance(what, dict):
        if "array" in what:
            yield what["array"], _Array(jnp.dtype(what["dtype"]), tuple(what["shape"]))
        else:
            children = what["dict"].values() if "dict" in what else what.values()
            for item in children:
                yield from _arrays_of(item)


def _stored_dtype(array: Any) -> Any:
    """The dtype in which orbax can write an array: its own, or its bits'."""
    dtype = jnp.dtype(array.dtype)
    try:
        tensorstore.dtype(dtype.name)
    except ValueError:
        return np.dtype(np.uint8)
    return dtype


def _stored(array: Any, place: str) -> Any:
    """An array as orbax can write it."""
    if _stored_dtype(array) == array.dtype:
        return array
    if not (jnp.issubdtype(array.dtype, jnp.floating) and jnp.finfo(array.dtype).bits == 8):
        raise TypeError(
            f"save(): {place} is of dtype {array.dtype.name}, which orbax cannot write; convert it to another"
        )
    return array.view(np.uint8)


def _how(array: _Array, mine: Any) -> Any:
    """How to read an array: to where the object has one that it can take the place of, or as NumPy's."""
    stored = _stored_dtype(array)
    if isinstance(mine, jax.Array) and mine.committed and (mine.shape, mine.dtype) == (array.shape, array.dtype):
        return ocp.ArrayRestoreArgs(sharding=mine.sharding, global_shape=array.shape, dtype=stored)
    return ocp.RestoreArgs(restore_type=np.ndarray, dtype=stored)
