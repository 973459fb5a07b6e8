"""The record of what a function was compiled for, and warnings that say what changed."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from ..module.structure_differences import short, statics
from ..runtime.tracebacks import warn
from ..state.id_map import IdMap
from ..state.walk import join, walk_of
from .argument_names import named_leaves
from .arguments import DATA, OBJECT, Arguments
from .names.followed import Followed
from .names.roots import root_of

MANY = 6  # the number of programs of one function from which on each new one is explained
_REMEMBERED = 32


class RecompileWarning(UserWarning):
    """A function is compiled again and again."""


class TracedOnceWarning(UserWarning):
    """Something that compiled code reads or does happened while it was traced, and will not be seen to change again."""


class _Read(str):
    """The description of a value that is read by name."""

    __slots__ = ()


Description = dict[str, str]  # of one program: what each argument and each part of a module was


class _Compiled(NamedTuple):
    """One program that was compiled."""

    caller: Callable[[], Any]  # a reference to the function, or to what `mt.jit` made of it
    object: Callable[[], Any]  # and to the first object
    description: Description
    number: int  # how many programs there were then
    reasons: Counter[Any]  # how often each path, or set of paths, was what had changed, until then


def _is_due(count: int, first: int) -> bool:
    """True at `first`, twice that, four times that, …: a warning that is due for ever is read by nobody."""
    turns, rest = divmod(count, first)
    return not rest and turns & (turns - 1) == 0


def _weakly(fn: Any) -> Callable[[], Any]:
    fn = getattr(fn, "__self__", fn)
    try:
        return weakref.ref(fn)
    except TypeError:
        return _nothing


def _nothing() -> None:
    return None


class Compilations:
    """How many programs a function has, and what each was compiled for.

    One loss function may serve many models, each of which needs a program: with `per_object`, only those for the same
    model are counted for a warning.
    """

    def __init__(self, name: str, per_object: bool, latest: Any) -> None:
        self.name, self.per_object = name, per_object
        self._latest = latest  # of this thread: counts what it compiles
        self._known: list[_Compiled] = []
        self._message: str | None = None
        self._remarks: list[str] = []  # to be given as warnings when the results are stored
        self._said = IdMap()  # of each first object: what was said

    def remark(self, first: Any, about: str, text: str) -> None:
        """Have a TracedOnceWarning given, once for each subject and first object of a call."""
        said = self._said.get(first)
        if said is None:
            said = set()
            self._said.set(first, said)
        if about not in said:
            said.add(about)
            self._remarks.append(f"{self.name}: {text}")

    def note_draws(self, first: Any, before: dict[str, Any], after: dict[str, Any]) -> None:
        """Have a warning given if generators of random numbers outside of JAX moved while the function was traced."""
        moved = [name for name, state in before.items() if after.get(name) != state]
        if moved:
            self.remark(
                first,
                "draws",
                f"numbers were drawn from {', '.join(moved)} inside compiled code: that happens once, while it is traced, and"
                " later calls use the same numbers. Draw with `jax.random` (a key from `mt.next_key()`), or draw outside"
                " and pass the numbers as arguments.",
            )

    def _note_followed(self, first: Any, followed: Followed) -> None:
        """Have warnings given of what is read by name, and changes in which will not be seen."""
        for path, array in followed.large.items():
            self.remark(
                first,
                f"large {path}",
                f"`{path}` is a NumPy array, {_describe_array(array)}, that the code reads by name. It is part of the"
                " program, so changes within it are not seen. Pass it as an argument, or make it a JAX array.",
            )
        for path in followed.cut:
            self.remark(
                first,
                f"cut {path}",
                f"`{path}` holds more than is looked through, so not every change in it is seen. Pass what the code needs"
                " of it as arguments.",
            )

    def note(self, call: tuple[Any, ...], fixed: Collection[str] = ()) -> None:
        """Record that the function is being compiled for `call`, as `program.py` describes one.

        `fixed`: the paths of arrays that are no inputs.
        """
        fn, args, kwargs, reached, lifted, followed = call
        arguments = Arguments(fn, args, kwargs)
        objects = arguments.objects + reached
        new = _describe(named_leaves(fn, args, kwargs), arguments.template, objects, lifted)
        for path in followed.entries.keys() - new.keys():
            number = f" ({id(followed.arrays[path].was):x})" if path in fixed else ""
            new[path] = (_Read if followed.is_value(path) else str)(followed.describe(path) + number)
        self._note_followed(objects[0], followed)
        self._latest.compiled += 1
        caller = self._latest.caller or _weakly(root_of(fn))
        known = [old for old in self._known if self._counts(old, caller(), objects[0])]
        count = known[-1].number + 1 if known else 1
        reasons = known[-1].reasons.copy() if known else Counter()
        if count >= MANY:
            difference, paths = _difference([old.description for old in known], new)
            reasons[paths] += 1
            if reasons[paths] <= 2 or _is_due(count, MANY):
                self._message = f"{self.name} compiled again: {difference}. It has {count} programs."
        elif known:
            self._explain_names(known[-1].description, new, reasons)
        compiled = _Compiled(caller, weakref.ref(objects[0]), new, count, reasons)
        self._known = [*self._known[1 - _REMEMBERED :], compiled]

    def _counts(self, old: _Compiled, caller: Any, first: Any) -> bool:
        """True for an earlier program of the same function, or of one of its code that has gone, used on the same object."""
        was = old.caller()
        if was is not None and was is not caller:
            return False
        return old.object() is first or (was is not None and not self.per_object)

    def _explain_names(self, old: Description, new: Description, reasons: Counter[Any]) -> None:
        """Have a warning given if a value that is read by name is another one, and nothing else is, for the second time."""
        changed = [path for path in new if old.get(path) != new[path]]
        if not all(isinstance(new[path], _Read) for path in changed):
            return
        reasons.update(changed)
        again = [path for path in changed if reasons[path] > 1]
        if again:
            shown = ", ".join(f"{path} went from {old.get(path, 'nothing')} to {new[path]}" for path in again[:3])
            self._message = (
                f"{self.name} compiled again: {shown}. The code reads {'it' if len(again) == 1 else 'them'} by name, so"
                " each value needs a program of its own. Pass it as an argument, or make it a JAX array"
                " (`jnp.asarray(...)`)."
            )

    def explain(self) -> None:
        """Give the warnings that are due: now that the results are stored."""
        remarks, self._remarks = self._remarks, []
        for text in remarks:
            warn(text, TracedOnceWarning)
        if self._message is not None:
            message, self._message = self._message, None
            warn(message, RecompileWarning)


def _difference(known: list[Description], new: Description) -> tuple[str, frozenset[str]]:
    """What changed, against whichever earlier program is nearest (the latest of several), and what is named in that."""
    differing = [[k for k in {**old, **new} if old.get(k) != new.get(k)] for old in known]
    distance, i = min((len(keys), -i) for i, keys in enumerate(differing))
    old, keys = known[-i], differing[-i]
    if not distance:
        unknown = (
            "its arguments are as they were, so something else that it depends on changed (such as JAX's settings)"
        )
        return unknown, frozenset()
    changes = []
    for key in keys[:4]:
        if key not in old:
            changes.append(f"{key} is new ({new[key]})")
        elif key not in new:
            changes.append(f"{key} is not there any more (it was {old[key]})")
        else:
            changes.append(f"{key} went from {old[key]} to {new[key]}")
    more = f", and {len(keys) - 4} more differences" if len(keys) > 4 else ""
    return ", ".join(changes) + more, frozenset(keys)


# -- what a program is compiled for -----------------------------------------------------------------------------------


def _describe(
    arguments: Iterator[tuple[str, Any]], template: tuple[Any, ...], objects: list[Any], lifted: list[Any]
) -> Description:
    """Every argument and every part of the objects, by name."""
    found: Description = {}
    names: dict[int, str] = {}
    for (name, leaf), code in zip(arguments, template, strict=True):
        if code is OBJECT:
            names.setdefault(id(leaf), name)
        else:
            found[name] = _describe_leaf(leaf) if code is DATA else short(leaf)
    shown: set[int] = set()
    for obj in objects:
        if id(obj) not in shown:
            shown.add(id(obj))
            label = names.get(id(obj), type(obj).__name__)
            while f"{label} " in found:  # two of a class
                label += "'"
            found[f"{label} "] = type(obj).__name__
            found.update(_describe_object(obj, label, {id(cell) for cell in lifted}))
    return found


def _describe_leaf(leaf: Any) -> str:
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        weak = ", weakly typed" if isinstance(leaf, jax.Array) and leaf.aval.weak_type else ""
        return _describe_array(leaf) + weak
    return f"a Python {type(leaf).__name__}"


def _describe_array(array: Any) -> str:
    """`float32[32,784]`."""
    sharding = getattr(array, "sharding", None)
    spread = isinstance(array, jax.Array) and sharding is not None and len(sharding.device_set) > 1
    return f"{array.dtype}[{','.join(map(str, array.shape))}]" + (f" on {sharding}" if spread else "")


def _describe_object(obj: Any, label: str, lifted: set[int]) -> Description:
    walk = walk_of(obj)
    found = dict(statics(walk.spec.node, label))
    for path, cell in zip(walk.spec.paths, walk.cells, strict=True):
        if hasattr(cell.value, "shape"):
            frozen = ", frozen" if cell.kind == "parameter" and not cell.trainable else ""
            found[join(label, path)] = _describe_array(cell.value) + frozen
        if cell.grad is not None and id(cell.grad) in lifted:
            value = cell.grad.value
            found[f"the gradient of {join(label, path)}"] = (
                _describe_array(value) if hasattr(value, "shape") else "zeros that were never written"
            )
    return found
