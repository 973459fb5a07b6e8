"""One layer that is checked, and runs of its code on copies."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from minitorch_jax.state.walk import join

from .calling import Calling, argument_names, call, output_of, run_backward, sorted_gradients
from .objects import is_floating, is_object, walk
from .pairs import Scan
from .world import Copies, World, wide_world

Key = int | str  # the key of a gradient: the index of an argument, or the name of a parameter


class Draws:
    """The states of Python's and NumPy's global random streams. Each run starts from them."""

    def __init__(self) -> None:
        self._states = np.random.get_state(), random.getstate()

    def reset(self) -> None:
        np.random.set_state(self._states[0])
        random.setstate(self._states[1])

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restore the streams after the block."""
        try:
            yield
        finally:
            self.reset()


@dataclass
class Settings:
    """The caller's settings for parameters, and the required accuracy of backward."""

    gradients: Mapping[str, str] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    rtol: float | None = None
    accumulates: bool | None = None
    seed: int = 0
    draws: Draws = field(default_factory=Draws)


@dataclass
class Subject:
    """A layer, and the call that checks it. `args` are its positional arguments, with floating arrays as float64.

    Parameters are the arrays that forward does not replace and that have a gradient, after one backward. `kept` are the
    other floating arrays that forward neither replaces nor changes.
    """

    path: str
    layer: Any
    calling: Calling
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    settings: Settings
    dout: list[Any]
    names: list[str] = field(default_factory=list)  # the names of its parameters
    kept: list[str] = field(default_factory=list)
    arrays: dict[str, Any] = field(default_factory=dict)  # both, in `layer` itself
    returned: list[str] = field(default_factory=list)  # parameters whose gradients backward returns
    shifts: dict[str, Any] = field(default_factory=dict)  # what a run adds to arrays
    tiny: float = 1.0  # the factor of small constants in its code
    patterns: tuple[Any, ...] = ()
    replaced: list[str] = field(default_factory=list)  # those of `kept` that forward replaces by other values
    doubts: list[str] = field(default_factory=list)  # parameters with several possible gradients
    proposals: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # for `gradients`, of a kept array

    def __post_init__(self) -> None:
        """Find the parameters, and the other arrays that forward reads only."""
        self.patterns = self._patterns()
        late = self._find()
        if late:  # the first call makes them
            primed = self.run()
            primed.forward()
            other = replace_in(self, layer=primed.layer, names=[], kept=[], arrays={}, returned=[], replaced=[])
            other._find()
            if any(name in other.names or (name in other.kept and other.matters(name)) for name in late):
                vars(self).update(vars(other))

    def _find(self) -> list[str]:
        """Fill `names`, `kept`, `arrays` and `returned`. Returns the names of arrays that the layer does not have yet."""
        before = self.found(self.layer)
        same, changed = self._same_in_two_calls()
        run = self.run()
        originals = run.world.originals()
        run.forward()
        old = {name: (id(array), np.array(array)) for name, array in self.found(run.layer).items()}
        try:
            given = run.backward_as_returned(self.dout)
        except Exception:  # the check reports it when it runs backward itself
            given = None
        places = {id(before[name]) for name in same if name in before}
        self.doubts = self.scan().look(run.layer).doubts
        for name, param, _ in run.entries():
            original = originals.get(id(param), before.get(name))
            if original is not None and (name in same or id(original) in places):
                self.names.append(name)
                self.arrays[name] = original
            elif name in before:
                self._find_replaced(name, before[name], param)
        sources = self.scan().look(self.layer).sources
        known = [array for source in sources if source.frozen for _, array, _ in source.named() if is_floating(array)]
        known += self.arrays.values()
        for name in same:
            array = before.get(name)
            if name in changed or array is None or name in self.arrays or shared(array, known):
                continue
            self.kept.append(name)
            self.arrays[name] = array
            set_by_backward = {n: a for n, a in self.found(run.layer).items() if n not in old or not _is(a, *old[n])}
            like = (n for n, a in set_by_backward.items() if a.shape == array.shape and n != name)
            self.proposals[name] = [pair for pair in (_named(name, n) for n in like) if pair]
        if isinstance(given, dict | tuple | list) or (given is not None and not self.floating):
            self._find_returned(given)
        return [name for name in same if name not in before]

    def _same_in_two_calls(self) -> tuple[list[str], set[str]]:
        """The arrays that forward does not replace in calls on two batches, and those of them that it changes."""
        for args in (self.other_args(), self.args):
            run = self.run()
            run.forward()
            first = {name: (array, np.array(array)) for name, array in self.found(run.layer).items()}
            try:
                run.forward(args)
            except Exception:  # the layer may not accept another batch
                if args is self.args:
                    raise
                continue
            second = self.found(run.layer)
            same = [n for n, array in second.items() if n in first and _same_place(array, first[n][0])]
            return same, {n for n in same if not np.array_equal(second[n], first[n][1], equal_nan=True)}
        raise AssertionError

    def _find_returned(self, given: Any) -> None:
        """Take kept arrays as parameters if backward returns gradients for them."""
        wanted = {name: self.arrays[name] for name in self.kept if self.matters(name)}
        try:
            _, found = sorted_gradients(given, self.args, self.argument_names(), wanted, self.calling.lead)
        except Exception:
            return
        self.returned = list(wanted) if found else []
        self.names += list(found)
        self.kept = [name for name in self.kept if name not in found]

    def _find_replaced(self, name: str, original: Any, now: Any) -> None:
        """Take a parameter that forward replaces, as in `self.W = np.clip(self.W, -1, 1)`, if that changes no value."""
        self.arrays[name] = original
        if not self.matters(name):
            del self.arrays[name]  # a cache
        elif np.array_equal(original, now):
            self.names.append(name)
        else:
            self.kept.append(name)
            self.replaced.append(name)

    def matters(self, *names: str) -> bool:
        """True if the output depends on any of these arrays."""
        noise = {}
        for name in names:
            array = self.arrays[name]
            scale = float(np.sqrt(np.mean(np.square(array, dtype=np.float64)))) if array.any() else 1.0
            noise[name] = np.random.default_rng(0).normal(size=array.shape) * 1e-2 * scale
        try:
            plain, moved = (outputs_of(s.run().forward()) for s in (self, replace_in(self, shifts=noise)))
        except Exception:
            return True
        return not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(plain, moved, strict=True))

    def argument_names(self) -> list[str]:
        return argument_names(self.layer, self.calling.forward)

    def after(self, args: Sequence[Any], dout: Sequence[Any] | None = None) -> Subject:
        """The layer after a forward with these arguments, and a backward if `dout` is not None. Its call is the same."""
        run = self.run()
        run.forward(args)
        if dout is not None:
            run.backward(dout)
        arrays = {name: run.world.of(array) for name, array in self.arrays.items()}
        settings = replace(self.settings, draws=Draws())
        return replace_in(self, layer=run.layer, arrays=arrays, settings=settings)

    def near(self, rng: np.random.Generator, kind: int, moved: Iterable[int]) -> Subject:
        """The same layer at a random point nearby. `kind` selects the sort of noise, `moved` the arguments that move."""

        def noise(array: Any) -> Any:
            z = rng.normal(size=array.shape)
            scale = 1e-2 * (float(np.sqrt(np.mean(np.square(array)))) if array.any() else 1.0)
            return [z * scale, array * 1e-2 * z, np.abs(z) * scale, -np.abs(z) * scale][kind % 4]

        args = [arg + noise(arg) if i in moved else arg for i, arg in enumerate(self.args)]
        shifts = {name: noise(np.asarray(self.arrays[name], np.float64)) for name in self.names}
        return replace_in(self, args=tuple(args), shifts=shifts)

    def smaller(self, largest: float, moved: Iterable[int]) -> Subject:
        """The same layer with the arguments `moved` scaled down, so that no element is above `largest`."""
        args = [_scaled(arg, largest) if i in moved else arg for i, arg in enumerate(self.args)]
        return replace_in(self, args=tuple(args))

    def scan(self) -> Scan:
        return Scan(*self.patterns)

    def _patterns(self) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
        """The caller's gradients, frozen and ignored, as paths in this layer. They may start in the network, too."""
        paths: dict[str, str] = {}
        prefixes = dict.fromkeys((self.path, self.path.removeprefix("layers.")))

        def enter(path: str, value: Any) -> bool:
            if path and not is_object(value):
                paths.update({join(prefix, path): path for prefix in prefixes})
            return True

        walk(self.layer, enter)
        own = self.settings
        gradients = {paths.get(name, name): gradient for name, gradient in own.gradients.items()}
        frozen, ignored = (
            (*given, *[path for full, path in paths.items() if any(fnmatchcase(full, each) for each in given)])
            for given in (own.frozen, own.ignored)
        )
        return gradients, frozen, ignored

    @property
    def floating(self) -> list[int]:
        """The indices of the arguments that have a gradient."""
        return [i for i, arg in enumerate(self.args) if is_floating(arg)]

    def other_args(self) -> tuple[Any, ...]:
        """Another batch of the same shapes and the same range of values: this batch, mixed with itself in reverse order."""
        return tuple([_another(arg) if isinstance(arg, np.ndarray) and arg.ndim else arg for arg in self.args])

    def run(self, dtype: Any = np.float64) -> Run:
        """A new copy of the layer. Its floating arrays have the dtype `dtype`; None keeps their dtypes."""
        self.settings.draws.reset()
        return Run(self, dtype)

    def entries(self, layer: Any) -> list[tuple[str, Any, list[Any]]]:
        """The name, the array and the gradients of each parameter of a copy. One array may have gradients in two layers."""
        once: dict[int, tuple[str, Any, list[Any]]] = {}
        for source in self.scan().look(layer).sources:
            for name, array, grad in () if source.frozen else source.named():
                if is_floating(array):
                    known = once.setdefault(id(array), (name, array, []))[2]
                    if grad is not None and not any(grad is other for other in known):
                        known.append(grad)
        return list(once.values())

    def found(self, layer: Any) -> dict[str, Any]:
        """All floating arrays of a copy, by path, but gradients and those that the caller ignores."""
        named = [entry for source in self.scan().look(layer).sources for entry in source.named()]
        arrays = {name: array for name, array, _ in named if is_floating(array)}
        left_out = {id(each) for _, array, grad in named for each in (array, grad)}

        def enter(path: str, value: Any) -> bool:
            ignored = any(fnmatchcase(path, pattern) for pattern in self.patterns[2])
            if is_floating(value) and id(value) not in left_out and not ignored:
                arrays.setdefault(path, value)
            return not ignored

        walk(layer, enter)
        return arrays


def replace_in(subject: Subject, **changes: Any) -> Subject:
    """A copy of a subject with other attributes, whose parameters are not searched again."""
    other = object.__new__(Subject)
    vars(other).update(vars(subject), **changes)
    return other


class Run:
    """A copy of a layer, in its own world."""

    def __init__(self, subject: Subject, dtype: Any) -> None:
        self.subject, self.dtype = subject, dtype
        self.world = wide_world(subject.tiny) if dtype is np.float64 else World(Copies(dtype))
        self.layer = self.world.of(subject.layer)
        self._args: list[Any] = []
        self._output: Any = None  # what forward returned
        self._returned: dict[str, Any] = {}
        for name, shift in subject.shifts.items():
            self.world.of(subject.arrays[name])[...] += shift

    def entries(self) -> list[tuple[str, Any, list[Any]]]:
        return self.subject.entries(self.layer)

    def params(self) -> dict[str, Any]:
        return {name: self.world.of(self.subject.arrays[name]) for name in self.subject.names}

    def grads(self) -> dict[Key, Any]:
        """Copies of the gradients, by the names of their parameters."""
        found = {name: _sum(grads) for name, _, grads in self.entries()} | self._returned
        return {n: None if found.get(n) is None else np.array(found[n]) for n in self.subject.names}

    def fill(self, values: Mapping[Key, Any] | None = None) -> list[str]:
        """Fill the gradients with values, zeros by default. Returns the names of those that exist."""
        filled = []
        for name, _, grads in self.entries():
            value = (values or {}).get(name)
            for grad in grads:
                if isinstance(grad, np.ndarray) and grad.flags.writeable:
                    grad[...] = value if value is not None and np.shape(value) == grad.shape else 0
                    filled.append(name)
                    value = None  # the others of this array are zero
        return filled

    def forward(self, args: Sequence[Any] | None = None) -> Any:
        """Run forward on copies of the arguments, and return its output."""
        self._args = [self._prepared(arg) for arg in (self.subject.args if args is None else args)]
        self._output = call(self.layer, self.subject.calling.forward, self._args, self.subject.kwargs)
        return output_of(self.layer, self._output)

    def _prepared(self, arg: Any) -> Any:
        """A copy of an argument. Floating arrays get the dtype of this run."""
        return _as(arg, self.dtype) if isinstance(arg, np.ndarray) else self.world.of(arg)

    def backward_as_returned(self, dout: Sequence[Any]) -> Any:
        """Run backward, and return what it returned, or the gradient that it left in an attribute."""
        douts = [_as(each, self.dtype) for each in dout]
        return run_backward(self.layer, self.subject.calling, self._args, self._output, douts)

    def backward(self, dout: Sequence[Any]) -> dict[Key, Any]:
        """Run backward, and return the gradients by the floating arguments, by their indices."""
        subject = self.subject
        wanted = {name: subject.arrays[name] for name in subject.returned}
        given = self.backward_as_returned(dout)
        dx, self._returned = sorted_gradients(
            given, subject.args, subject.argument_names(), wanted, subject.calling.lead
        )
        return dx


def outputs_of(output: Any) -> list[Any]:
    """The arrays of an output, which is an array, or a tuple or list of arrays."""
    found = list(output) if isinstance(output, tuple | list) else [output]
    return [each if isinstance(each, np.ndarray) else np.asarray(each) for each in found]


def shared(array: Any, others: Iterable[Any]) -> bool:
    """True if an array is one of the others, or may be a view of the same memory."""
    return any(array is other or np.may_share_memory(array, other) for other in others)


def _sum(grads: list[Any]) -> Any:
    """The gradient of an array that has some. Equal ones are copies of one."""
    if len(grads) < 2 or len({np.shape(grad) for grad in grads}) > 1:
        return grads[0] if grads else None
    same = all(np.allclose(grad, grads[0], rtol=1e-12, atol=0) for grad in grads[1:])
    return grads[0] if same else np.sum(grads, axis=0)


def _is(array: Any, known: int, values: Any) -> bool:
    return id(array) == known and np.array_equal(array, values, equal_nan=True)


def _same_place(one: Any, other: Any) -> bool:
    """True if two arrays are views of the same elements."""
    return bool(one.shape == other.shape and one.__array_interface__["data"] == other.__array_interface__["data"])


def _as(array: Any, dtype: Any) -> Any:
    new = np.array(array)
    return new.astype(dtype) if dtype is not None and is_floating(new) else new


def _named(name: str, gradient: str) -> tuple[str, str] | None:
    """What `gradients` must say if one path is the gradient of another: `p.W` and `q.W` are in `p` and `q`."""
    mine, theirs = name.split("."), gradient.split(".")
    while len(mine) > 1 and len(theirs) > 1 and mine[-1] == theirs[-1]:
        del mine[-1], theirs[-1]
    same = mine[:-1] == theirs[:-1] and not theirs[-1].isdigit()
    return (".".join(mine), theirs[-1]) if same else None


def _scaled(array: Any, largest: float) -> Any:
    most = float(np.abs(array).max(initial=0.0))
    return array * (largest / most) if most > largest else array


def _another(array: Any) -> Any:
    turned = np.flip(array, 0)
    return 0.9 * (0.7 * turned + 0.3 * array) if is_floating(array) else turned.copy()
