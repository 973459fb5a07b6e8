"""What `wrap` does not understand of a network, said in messages that can be pasted."""

from __future__ import annotations

from typing import Any

import numpy as np

from minitorch_jax.optim.numpy_modules import is_zero

from . import names as naming
from .assigned import assigned_by_backward, has_run, replaced_by_forward, stores, updated_by_backward
from .objects import all_in, attribute, describe, is_floating, is_object, listing, parts_of
from .pairs import Scan
from .places import Pair, Place


def refuse_unclear(found: Scan, sources: list[Any]) -> None:
    """Raise one error at `wrap()` with everything that is unclear."""
    problems = [*found.doubts, *found.problems]
    statistics = [path for path in found.lonely if naming.is_statistic(path.rpartition(".")[2])]
    if statistics:
        named = dict.fromkeys(f"*.{path.rpartition('.')[2]}" if "." in path else path for path in statistics)
        problems.append(
            f"{' and '.join(statistics)} have no gradient, and are statistics by their names. They are not trained, but"
            f" saved, with frozen={_pasted(list(named))}"
        )
    for source in sources:
        if (
            isinstance(source, Pair)
            and source.gradient is not None
            and naming.is_of_a_call(name := str(source.place.keys[-1]))
        ):
            if callable(attribute(source.owner, "forward")) and {name, source.path}.isdisjoint(found.gradients):
                problems.append(
                    f"{source.path} beside {source.gradient.keys[-1]} looks like what forward() keeps of a call, ignored="
                    f"{source.path!r}. If it is a parameter: gradients={{{name!r}: {source.gradient.keys[-1]!r}}}"
                )
    for owner in found.entered:
        mine = [(s.path, s.place.keys[0]) for s in sources if isinstance(s, Pair) and s.owner is owner and not s.frozen]
        if is_object(owner) and mine and (updated := updated_by_backward(owner, [key for _, key in mine])):
            call, names = updated
            where = mine[0][0].removesuffix(mine[0][1]).rstrip(".") or type(owner).__name__
            problems.append(
                f"{where}: {call} updates {' and '.join(dict.fromkeys(names))} itself. Take the update out of it and keep the"
                f" gradients, self.d{names[0]} = ..., which the optimizer uses"
            )
    problems += [f"{name!r} matches nothing" for name in found.unused()]
    if problems:
        raise ValueError(f"wrap() does not understand all of this network:{listing(problems)}")


def unset(entries: list[Any], came: set[str], found: Scan, arrays: list[Any], gradients: list[Any]) -> list[str]:
    """Lines on parameters without a gradient, if those of others came, or if another array may be the gradient.

    An array whose gradient is there, but None or zeros, has a line only if another array may be its gradient.
    """
    ids = set(map(id, [*arrays, *gradients]))
    others_came = any(not is_zero(gradient) and np.any(gradient) for gradient in gradients)
    lines = []
    for entry in entries:
        pairs = [source for source in entry.sources if isinstance(source, Pair)]
        given = [source.gradient for source in pairs if source.gradient is not None]
        absent = len(pairs) == len(entry.sources) and not any(gradient.is_foreseen() for gradient in given)
        if absent or (
            entry.path not in came and not {source.place.keys[-1] for source in pairs} & set(found.gradients)
        ):
            rivals = [rival for source in pairs if not source.frozen for rival in _rivals(source, found, ids, absent)]
            if rivals or (absent and others_came):
                lines.append(_line(entry, rivals))
    if lines or came or others_came:
        return lines
    return _nothing_stored(entries) or _not_understood(entries, found, ids)


def _not_understood(entries: list[Any], found: Scan, known: set[int]) -> list[str]:
    """A line on each parameter, if backward has stored arrays, and none is known as a gradient."""
    for owner in filter(is_object, found.entered):
        by_backward = assigned_by_backward(owner)
        for name, value in parts_of(owner).items():
            if not (name in by_backward or naming.is_like_a_gradient(name)) or replaced_by_forward(owner, name):
                continue
            arrays = [
                array
                for array in filter(is_floating, all_in(value))
                if id(array) not in known and not naming.holds_state(name)
            ]
            if any(map(np.any, arrays)):
                text = (
                    f"{type(owner).__name__} keeps arrays in {name!r}, and no name says whose gradients they are: keep"
                )
                lines = [_line(entry, []) for entry in entries]
                return [f"{text} them beside the parameters, or in a dict with their names", *lines]
    return []


def _nothing_stored(entries: list[Any]) -> list[str]:
    """A line on each layer that has run, and whose backward stores nothing at all."""
    names: dict[int, tuple[Any, list[Any]]] = {}
    for entry in entries:
        for source in entry.sources:
            if not isinstance(source, Pair) or (source.gradient is not None and source.gradient.is_foreseen()):
                return []
            names.setdefault(id(source.owner), (source.owner, []))[1].append(source.place.keys[-1])
    return [
        f"{type(owner).__name__}: its backward() stores no gradient, it can only return them. Keep each beside its parameter:"
        f" {', '.join(f'self.d{name} = ...' for name in mine)}"
        for owner, mine in names.values()
        if has_run(owner) and not stores(owner)
    ]


def _line(entry: Any, rivals: list[tuple[str, str]]) -> str:
    given = [s.gradient.keys[-1] for s in entry.sources if isinstance(s, Pair) and s.gradient is not None]
    text = f"{entry.path} is {describe(entry.array)}"
    if given:
        text += f", and its gradient is {given[0]!r}, which backward() does not set"
    if rivals:
        key = rivals[0][0]
        names = [name for _, name in rivals]
        text += f"; {' and '.join(names)}, of its shape, may be its gradient: gradients={{{key!r}: {names[0]!r}}}"
        return text
    above, _, name = entry.path.rpartition(".")
    if name.isdigit():
        wanted, name, path = "list of gradients beside its list", above.rpartition(".")[2], f"{above}.*"
    else:
        wanted, path = naming.examples(name), entry.path
    return (
        f"{text}; there is no {wanted}. Name its gradient, gradients={{{name!r}: ...}}; or frozen={path!r} if it is not"
        f" trained, ignored={path!r} if forward() keeps it"
    )


def _rivals(source: Pair, found: Scan, known: set[int], absent: bool) -> list[tuple[str, str]]:
    """The arrays that may be the gradient of a parameter by their shape: the name for `gradients`, and theirs."""
    holder, key = source.place.holder(), source.place.keys[-1]
    shape = source.place.get().shape
    inside: tuple[Any, ...] = ()
    owner, name = holder, key  # in a collection, the gradients may be in another one
    seen: set[int] = set()
    rivals = []
    while True:
        by_backward = assigned_by_backward(owner)
        for other, value in parts_of(owner).items():
            array = Place(value, inside).get()
            if (
                other != name
                and is_floating(array)
                and array.shape == shape
                and id(array) not in known
                and np.any(array)
            ):
                if not found.leaves_out(owner, other) and not naming.is_state(other, [str(name)]):
                    sure = naming.is_like_a_gradient(other) or other in by_backward
                    rivals.append((sure, str(name), other))
        if id(owner) not in found.parents or id(owner) in seen:
            break
        seen.add(id(owner))
        inside = (name, *inside)
        owner, name = found.parents[id(owner)]
    certain = [(name, other) for sure, name, other in rivals if sure]
    return certain or [(name, other) for _, name, other in rivals if absent]


def _pasted(names: list[str]) -> str:
    return repr(names[0]) if len(names) == 1 else repr(names)
