"""The arrays that a wrapped network has now, found again without a search as long as it is made of the same objects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import permutations, repeat
from operator import getitem, is_
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitorch_jax.optim.numpy_modules import is_zero, overlapping, same_memory

from .objects import all_in, describe, is_floating, listing
from .pairs import Scan
from .places import Listed, Pair
from .snapshot import Snapshot, lookup
from .unclear import refuse_unclear, unset

_NOWHERE = {None: None}, None  # the place of a gradient that does not exist yet


@dataclass
class Entry:
    """One array of a network, with the places that it is in."""

    path: str
    array: NDArray[Any]
    sources: list[Pair | Listed]
    slots: list[int]  # where its gradients are among all gradients; a frozen place has none

    @property
    def shown(self) -> str:
        """What `repr` says of its gradients."""
        if not self.slots:
            return ", frozen"
        beside = [s.gradient for s in self.sources if isinstance(s, Pair) and s.gradient is not None]
        names = [".".join(map(str, gradient.keys)) for gradient in beside]
        names += [f"{s.grads or s.params}()" for s in self.sources if isinstance(s, Listed)]
        return f" <- {' + '.join(dict.fromkeys(names)) or 'not known before the first backward'}"


class Current:
    """The parameters of a network, and where their gradients are."""

    def __init__(
        self, network: Any, gradients: Mapping[str, str], frozen: tuple[str, ...], ignored: tuple[str, ...]
    ) -> None:
        self.network = network
        self._settings = gradients, frozen, ignored
        self._asked: dict[int, Any] = {}
        self._described: dict[str, str] = {}  # the dtype and shape of each parameter, by path; they must not change
        self._apart: list[NDArray[Any]] = []  # arrays that are known to share no memory
        self._came: set[str] = set()  # the paths of parameters that have had a gradient other than zeros
        found = self._search()
        known = {id(array) for source in found.sources for _, array, _ in source.named()}
        lonely = [path for path, array in found.lonely.items() if id(array) not in known]
        pending = [Pair(path, found.places[path], None) for path in lonely]
        self._sources = sorted([*found.sources, *pending], key=lambda source: found.order[source.path])
        refuse_unclear(found, self._sources)
        named = [(path, array) for source in self._sources for path, array, _ in source.named()]
        self._described = {path: describe(array) for path, array in named if array is not None}
        if not self._described:
            raise ValueError(
                "wrap() found no parameters: no object has an array `x` beside `dx`, `grad_x` or `x_grad`, nor `parameters()`"
                " and `grads()`. If the first forward() makes the parameters, run forward() once before wrap()"
            )
        self._keep(found)
        twice = zip(self._entries, self.entries(), strict=True)
        lost = [a.path for a, b in twice if a.array.size and not same_memory(a.array, b.array)]
        if lost:
            raise ValueError(
                "parameters() returns copies, so an update would have no effect: let it return the arrays themselves, or"
                f" views of them{listing(lost)}"
            )

    # -- what a step asks for -----------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """All arrays, each once."""
        self._refresh()
        self._collect()
        return self._entries

    def _refresh(self) -> None:
        """Look again if something has changed. Raises if the network holds other parameters than before."""
        if not self._snapshot.holds():
            new = self._snapshot.adopt()
            if new is None:
                self._search_again()
                return
            for holders in (self._array_places[0], self._gradient_places[0]):
                holders[:] = [new.get(id(holder), holder) for holder in holders]
        if not (self._is_checked and self._arrays_hold() and self._lists_hold()):
            self._collect()

    def trained(self) -> list[Entry]:
        """The arrays with gradients. An array that is frozen in one place and trained in another is trained."""
        self._refresh()
        fixed = [f"{each.path} is read-only" for each in self._trained if not each.array.flags.writeable]
        if fixed:
            raise ValueError(f"parameters are updated in place, so they must be writable arrays:{listing(fixed)}")
        return self._trained

    def gradients(self) -> list[NDArray[Any]]:
        """The gradient of each trained array; zeros while there are none."""
        trained = self.trained()
        values: list[Any] = list(map(getitem, *self._gradient_places))
        for source in self.listed:
            values += source.arrays()[1]
        if not self._came.issuperset(self._paths) or self._lacks_gradients:
            self._look_for_missing(values)
        return [
            grad
            if type(grad) is np.ndarray and grad.shape == each.array.shape and each.slots == slots
            else _sum(each.path, each.array, [values[i] for i in each.slots])
            for each, slots, grad in [(each, each.slots[:1], values[each.slots[0]]) for each in trained]
        ]

    def all_gradients(self) -> list[tuple[Any, Pair]]:
        """The gradients that are kept beside their parameters, with their pairs."""
        self._refresh()
        return list(zip(map(getitem, *self._gradient_places), self._pairs, strict=True))

    def late(self) -> dict[str, Any]:
        """The places of frozen arrays that forward() makes, by path."""
        self._refresh()
        return {s.path: s.place for s in self._sources if isinstance(s, Pair) and self._is_late(s)}

    # -- searches -----------------------------------------------------------------------------------------------------

    def _search(self) -> Scan:
        found = Scan(*self._settings, asked=self._asked).look(self.network)
        present = {id(value) for value in found.entered} | {id(s.owner) for s in found.sources}
        self._asked = {key: asked for key, asked in found.asked.items() if key in present}
        return found

    def _search_again(self) -> None:
        found = self._search()
        before = {self._found.key(source): i for i, source in enumerate(self._sources)}
        waiting = [Pair(path, found.places[path], None) for path in found.lonely]
        now: dict[int, Pair | Listed] = {}
        new: list[Pair | Listed] = []
        for source in [*found.sources, *waiting]:
            rank = before.get(found.key(source))
            if rank is not None:
                now.setdefault(rank, source)
            elif source.frozen:
                now[len(before) + len(now)] = source
            elif not any(source is each for each in waiting):
                new.append(source)
        if found.doubts:
            raise ValueError(f"it is not clear any more what the gradients are:{listing(found.doubts)}")
        again = self._again(new)
        problems = [f"{source.path} is new" for source in new if id(source) not in again]
        gone = [s.path for i, s in enumerate(self._sources) if i not in now and not self._is_late(s)]
        problems += [f"{path} has gone" for path in dict.fromkeys(gone)]
        if problems:
            raise ValueError(
                "the network holds other parameters than at wrap(): wrap it again and pass the result to the optimizer (run"
                " forward() and backward() once before, if they make parameters), or name arrays that forward() keeps in"
                f" `ignored`{listing(problems)}"
            )
        self._sources = [now[i] for i in sorted(now)]
        self._keep(found)

    def _keep(self, found: Scan) -> None:
        self._found = found
        self._snapshot = Snapshot(found)
        self._collect()

    def _is_late(self, source: Pair | Listed) -> bool:
        """True if a frozen source had no array yet at `wrap()`."""
        return source.frozen and source.path not in self._described

    def _again(self, new: list[Pair | Listed]) -> set[int]:
        """The new sources inside an object that has the same arrays, such as cells that it makes at each forward.

        Their gradients do not count, since the object's own gradients include them.
        """
        wanted = {id(source): {id(array) for _, array, _ in source.named()} for source in new}
        inside: dict[int, set[int]] = {}  # by array: everything inside the objects that have the array
        for source in self._sources if new else ():
            if ids := {id(array) for _, array, _ in source.named()} & set().union(*wanted.values()):
                held = set(map(id, all_in(source.owner)))
                for each in ids:
                    inside.setdefault(each, set()).update(held)
        return {id(s) for s in new if all(id(s.owner) in inside.get(each, ()) for each in wanted[id(s)])}

    # -- the arrays of the sources ------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Look at each source's arrays, and check them."""
        self._is_checked = False
        found: dict[int, Entry] = {}
        problems = [
            f"{source.path} has no gradient: the gradients beside it are {', '.join(map(repr, _keys(others)))}"
            for source in self._sources
            if isinstance(source, Pair) and source.gradient and (others := source.gradient.missing()) is not None
        ]
        self._pairs = [s for s in self._sources if isinstance(s, Pair) and not s.frozen]
        self.listed = [s for s in self._sources if isinstance(s, Listed)]
        slot = {id(source): i for i, source in enumerate(self._pairs)}
        count = len(self._pairs)
        for source in self._sources:
            for path, array, _ in source.named():
                if array is None and self._is_late(source):
                    continue
                was, now = self._described.get(path, describe(array)), describe(array)
                if was != now:
                    problems.append(f"{path} was {was}, and is {now} now")
                elif not is_floating(array):
                    problems.append(f"{path} is {now}: parameters() must return a list of floating NumPy arrays")
                entry = found.setdefault(id(array), Entry(path, array, [], []))
                entry.sources.append(source)
                if isinstance(source, Listed):
                    entry.slots.append(count)
                    count += 1
                elif not source.frozen:
                    entry.slots.append(slot[id(source)])
        entries = list(found.values())
        for each in entries:
            problems += _counted_twice(each)
        if [id(each.array) for each in entries] != [id(array) for array in self._apart] and not problems:
            problems += _overlaps(entries)
        if problems:
            raise ValueError(f"the arrays of this network cannot be trained as they are:{listing(problems)}")
        self._entries, self._apart = entries, [each.array for each in entries]
        self._trained = [each for each in entries if each.slots]
        self._paths = [each.path for each in self._trained]
        self._array_places = _columns([lookup(s.place.holder(), s.place.keys[-1]) for s in self._pairs])
        self._arrays = [s.place.get() for s in self._pairs]
        self._entry_of = [found[id(array)] for array in self._arrays]
        self._listed_arrays = [array for source in self.listed for array in source.parameters()]
        beside = [s.gradient if s.gradient is not None and s.gradient.exists() else None for s in self._pairs]
        self._gradient_places = _columns([lookup(g.holder(), g.keys[-1]) if g else _NOWHERE for g in beside])
        self._lacks_gradients = None in beside
        # a place on whose way something is not watched is looked up anew each time
        places = [*(s.place for s in self._pairs), *filter(None, beside)]
        steps = [lookup(*step) for place in places for step in place.steps()]
        self._is_checked = self._snapshot.watched().issuperset((id(holder), key) for holder, key in steps)

    def _arrays_hold(self) -> bool:
        """True if the arrays are the same, or replaced by like ones that share no memory with others."""
        now: list[Any] = list(map(getitem, *self._array_places))
        if all(map(is_, now, self._arrays)):
            return True
        for i, (old, new) in enumerate(zip(self._arrays, now, strict=True)):
            if old is not new:
                entry = self._entry_of[i]
                like = type(new) is np.ndarray and new.shape == old.shape and new.dtype == old.dtype
                others = now[:i] + now[i + 1 :] + self._listed_arrays
                if not like or len(entry.sources) > 1 or any(map(np.may_share_memory, repeat(new), others)):
                    return False
                entry.array = new
        self._arrays = now
        self._apart = [each.array for each in self._entries]
        return True

    def _lists_hold(self) -> bool:
        now = [array for source in self.listed for array in source.parameters()]
        return len(now) == len(self._listed_arrays) and all(map(is_, now, self._listed_arrays))

    def _look_for_missing(self, values: list[Any]) -> None:
        """Raise if parameters have no gradient, and others have come."""
        for each in self._trained:
            if each.path not in self._came and any(not is_zero(values[i]) and np.any(values[i]) for i in each.slots):
                self._came.add(each.path)
        problems = unset(self._trained, self._came, self._found, self._apart, values)
        if problems:
            raise ValueError(
                "backward() has set no gradient of these parameters, so a step would not train them:"
                f"{listing(problems)}"
            )


def _columns(places: list[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    return [holder for holder, _ in places], [key for _, key in places]


def _keys(container: Any) -> Iterable[Any]:
    return container if isinstance(container, dict) else range(len(container))


def _overlaps(entries: list[Entry]) -> list[str]:
    return [
        f"{entries[i].path} shares memory with {entries[j].path}, but is another array: use one array in both, or freeze one"
        for i, j in overlapping([each.array for each in entries])
        if not any(source.frozen for each in (entries[i], entries[j]) for source in each.sources)
    ]


def _counted_twice(entry: Entry) -> list[str]:
    """Problems with the gradients of one array: a collection has one, and another place in its owner has one too."""
    if len(entry.sources) == 1:
        return []
    given: list[tuple[Any, str, Any]] = []
    for source in entry.sources:
        for path, array, grad in source.named():
            if (
                array is entry.array
                and not is_zero(grad)
                and not source.frozen
                and not any(grad is g for _, _, g in given)
            ):
                given.append((source, path, grad))
    return [
        f"{whole.path} and {part.path}, in the same object, are one array with two gradients, which would be added: name"
        " one of the two in `ignored`"
        for (whole, _, _), (part, _, _) in permutations(given, 2)
        if whole.collects and any(part.owner is each for each in all_in(whole.owner))
        if not (part.collects and part.owner is whole.owner)
    ]


def _sum(path: str, array: NDArray[Any], grads: list[Any]) -> NDArray[Any]:
    """The gradient of one array: the sum of those that are kept in several places, each array once."""
    given = list({id(grad): grad for grad in grads if not is_zero(grad)}.values())
    for grad in given:
        if np.shape(grad) != array.shape:
            raise ValueError(
                f"{path} has shape {array.shape} and its gradient has {np.shape(grad)}: they must be the same. Another shape"
                " may come from a sum over the wrong axis."
            )
    if not given:
        return np.zeros_like(array)
    return np.asarray(given[0]) if len(given) == 1 else np.sum(given, axis=0)
