"""Which group of an optimizer each parameter belongs to: by its module, by its name, and by what a group's rule takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import jax

from ..module.globs import Globs
from ..state.cell import Cell
from ..state.static_values import describe
from ..state.walk import join


class Names(NamedTuple):
    """Which parameters a group has: those of its modules whose names its globs match."""

    globs: tuple[str, ...]  # over names of `state_dict`; without any, the group has what no other group takes
    everywhere: bool  # of all modules of the optimizer: the group lists none itself


class Found(NamedTuple):
    """A parameter under one of its names."""

    module: int  # its module's place in `modules`
    name: str  # in the module's `state_dict`
    cell: Cell
    value: Any  # its array, or whatever `jax.tree.map` has put there
    trainable: bool

    @property
    def path(self) -> str:
        return join(str(self.module), self.name)


def takes_any(p: jax.ShapeDtypeStruct) -> bool:
    """Return True if the rule can step a parameter of this shape and dtype. Here: any parameter.

    Where groups have rules of their own, a group has no parameter that its rule does not take. The first line of the
    docstring of another `takes` ends the sentence "Muon takes ..." in errors.
    """
    return True


def listed_modules(lists: Sequence[list[Any]]) -> list[Any]:
    """The modules of all groups, each once."""
    return list({id(module): module for module in chain(*lists)}.values())


class Selection:
    """The groups of an optimizer, and which parameters each of them has."""

    def __init__(self, opt: Any) -> None:
        self._opt, self._owner = opt, type(opt).__name__
        self._rules = [opt._rule_of(g) for g in range(len(opt._lists))]
        modules = {id(module): i for i, module in enumerate(listed_modules(opt._lists))}
        self._home: dict[int, int] = {}  # of a module, the group that lists it without names
        self._allowed: dict[int, set[int]] = {i: set() for i in modules.values()}  # those that have some of it by name
        for g, (listed, names) in enumerate(zip(opt._lists, opt._names, strict=True)):
            everywhere = names is not None and names.everywhere
            for i in modules.values() if everywhere else [modules[id(module)] for module in listed]:
                if names is None:
                    self._home[i] = g
                else:
                    self._allowed[i].add(g)
        pairs = [(g, glob) for g, names in enumerate(opt._names) for glob in (names.globs if names else ())]
        self._group_of, self._written = [g for g, _ in pairs], [glob for _, glob in pairs]
        self._globs = Globs(self._written)
        self._rest = [g for g, names in enumerate(opt._names) if names is not None and not names.globs]

    def groups(self, found: Sequence[Found]) -> dict[Cell, int]:
        """The group of each parameter; a frozen one may have none.

        Raises:
            ValueError: if something does not fit. One error lists everything.
        """
        chosen: dict[Cell, tuple[int, str]] = {}
        matched: list[dict[str, str]] = [
            {} for _ in self._written
        ]  # of each glob: paths, and why it has not chosen them
        clashes: list[str] = []
        left: list[Found] = []
        named: dict[Cell, list[Found]] = {}
        for one in found:
            named.setdefault(one.cell, []).append(one)
        for cell, names in named.items():
            claims = [(self._by_name(one, matched), one.path) for one in names]
            if all([g is None for g, _ in claims]):
                claims = [(self._by_module(one), one.path) for one in names]
            for g, path in claims:
                first, its_path = chosen.setdefault(cell, (g, path)) if g is not None else (None, "")
                if first != g:
                    clashes.append(in_two_groups(its_path, first, path, g))
            if cell not in chosen and names[0].trainable:
                left.append(names[0])
        problems = [*self._idle(matched, found), *clashes, *self._left_over(left)]
        if problems:
            more = f" the groups do not fit the modules:\n  {problems[0]}" if len(problems) > 1 else f" {problems[0]}"
            raise ValueError("\n  ".join([f"{self._owner}:{more}", *problems[1:]]))
        return {cell: g for cell, (g, _) in chosen.items()}

    def _by_name(self, one: Found, matched: list[dict[str, str]]) -> int | None:
        """The first group whose names match and whose rule takes the parameter."""
        first = None
        for i in self._globs.matching(one.name):
            g = self._group_of[i]
            if g not in self._allowed[one.module]:
                continue
            if not self._takes(g, one):
                matched[i][one.path] = "rule"
            elif first is None or first == g:
                first, matched[i][one.path] = g, ""
            else:
                matched[i][one.path] = f"groups[{first}]"
        return first

    def _by_module(self, one: Found) -> int | None:
        """The group that lists the module; if its rule does not take the parameter, the first one of the rest that does."""
        home = self._home.get(one.module)
        if home is not None and self._takes(home, one):
            return home
        rest = (g for g in self._rest if g in self._allowed[one.module])
        return next((g for g in rest if self._takes(g, one)), home if not one.trainable else None)

    def _takes(self, g: int, one: Found) -> bool:
        """True if a group's rule can step a parameter. A frozen one takes no step."""
        rule = self._rules[g]
        if not one.trainable or rule.takes is takes_any:
            return True
        shape, dtype = getattr(one.value, "shape", None), getattr(one.value, "dtype", None)
        if shape is None or dtype is None:
            return bool(self._opt._homes.get(one.cell, g) == g)
        stacked = len(self._opt._hyper.members)
        return bool(rule.takes(jax.ShapeDtypeStruct(tuple(shape)[stacked:], dtype)))

    # -- errors -------------------------------------------------------------------------------------------------------

    def _left_over(self, left: list[Found]) -> Iterator[str]:
        """What is wrong with trainable parameters that no group has."""
        unlisted = [one for one in left if one.module not in self._home]
        if unlisted:
            yield (
                f"no group has {_shown(unlisted)}. Give them the optimizer's settings by listing their module beside the"
                f' groups, `{self._owner}([model, {{"names": "*bias", ...}}])`, or freeze() them'
            )
        for rule in dict.fromkeys(self._rules):
            mine = [one for one in left if one not in unlisted and self._rules[self._home[one.module]] is rule]
            if mine:
                yield (
                    f"{_limits(rule)}, and not {_shown(mine)}. Give what it does not take to another rule,"
                    f' `{self._owner}([model, {{"rule": optim.AdamW, "lr": 1e-3}}])`, or freeze() it'
                )

    def _idle(self, matched: list[dict[str, str]], found: Sequence[Found]) -> Iterator[str]:
        """What is wrong with globs that have chosen nothing."""
        for glob, g, mine in zip(self._written, self._group_of, matched, strict=True):
            what = f"groups[{g}]: {glob!r} matches"
            if not mine:
                there = [one.name for one in found if g in self._allowed[one.module]]
                yield f"{what} no parameter; there are {', '.join(there[:20]) or 'none'}{', …' if there[20:] else ''}"
            elif "" not in mine.values():
                why = next(iter(mine.values()))
                what += f" {', '.join(list(mine)[:8])}{', …' if len(mine) > 8 else ''}"
                if why == "rule":
                    yield f"{what}, and {_limits(self._rules[g])}"
                else:
                    yield f"{what}, which {why} has already: the first group that matches counts. List this one before it"


def _limits(rule: Any) -> str:
    """What a rule takes, in words."""
    doc: str = (rule.takes.__doc__ or "").strip().partition("\n")[0].rstrip(".")
    return f"{rule.__name__} takes {doc[:1].lower()}{doc[1:] or 'some parameters'} only"


def _shown(found: list[Found]) -> str:
    listed = [f"{one.path} ({describe(one.value)})" for one in found[:8]]
    return ", ".join(listed) + (f" and {len(found) - 8} more" if len(found) > 8 else "")


def in_two_groups(first: str, its_group: int | None, second: str, group: int | None) -> str:
    """What is wrong with a tied parameter that two groups claim."""
    return (
        f"one tied parameter is in two groups, as {first} in groups[{its_group}] and as {second} in groups[{group}], and it"
        " can have the settings of one only. Put the modules that share it into one group."
    )
