"""Statements of NumPy as lines of Python."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

Key = int | str  # the number of a variable, or the name of a constant or an argument


class Statement(NamedTuple):
    """`out = template.format(*args)`."""

    out: int
    template: str
    args: tuple[Key, ...]
    ufunc: str = ""  # what computes the same, given an array for the result as `out`
    is_choice: bool = False  # `args` are a condition, and the values for False and for True
    is_own: bool = True  # the result shares no memory with the arguments
    size: tuple[Any, ...] = ()  # shape and dtype of a result that is no single number


_DEEPEST = 20  # blocks in blocks; Python takes no more than 100


def in_tuple(names: Iterable[str]) -> str:
    return f"({''.join([f'{name}, ' for name in names])})"


class Layout:
    """Statements as lines of source. What only one value of a choice needs is computed where that is chosen.

    A variable's name is used again when the variable is not needed any more, so that few arrays are alive at a time.
    """

    def __init__(
        self,
        statements: list[Statement],
        kept: Iterable[Key],
        known: dict[int, str],
        into: dict[Key, str],
    ) -> None:
        self._made: dict[Key, Statement] = {statement.out: statement for statement in statements}
        self._kept, self._into = set(kept), into
        self._names: dict[Any, str] = {**known}  # of variables; all other names stand for themselves
        self._users: dict[Any, set[tuple[int, int]]] = {key: {(-1, 0)} for key in kept}
        for s in statements:
            for place, key in enumerate(s.args):
                self._users.setdefault(key, set()).add((s.out, place if s.is_choice else 0))
        # what others may be views of, or another name for
        self._shared = {key for s in statements if not s.is_own for key in s.args}
        self._items = list(self._arranged(statements, 1))

    def _arranged(self, block: list[Statement], depth: int) -> Iterator[tuple[int, str, tuple[Any, ...]]]:
        """What the lines do, in order: (depth, what, of which variables)."""
        moved: set[int] = set()
        branches: dict[int, list[list[Statement]]] = {}
        for s in reversed(block):
            if s.is_choice and s.out not in moved and depth < _DEEPEST:
                taken = [self._needed_by(s, place) for place in (1, 2)]
                if any(taken):
                    branches[s.out] = [[self._made[out] for out in sorted(chosen)] for chosen in taken]
                    moved.update(*taken)
        for s in block:
            if s.out in moved:
                continue
            if s.out not in branches:
                yield depth, "do", (s,)
                continue
            for word, place in (("if", 2), ("else", 1)):
                yield depth, word, s.args[:1]
                yield from self._arranged(branches[s.out][place - 1], depth + 1)
                yield depth + 1, "give", (s.out, s.args[place])

    def _needed_by(self, choice: Statement, place: int) -> set[int]:
        """The statements that nothing but one value of a choice needs."""
        chosen: set[int] = set()
        waiting = [choice.args[place]]
        while waiting:
            s = self._made.get(key := waiting.pop())
            if s is not None and s.out not in chosen:
                if all(user == (choice.out, place) or user[0] in chosen for user in self._users[key]):
                    chosen.add(s.out)
                    waiting += s.args
        return chosen

    def written(self) -> tuple[list[str], dict[Any, str]]:
        """The lines, and the names of the variables that are kept."""
        last: dict[Any, int] = {}
        for i, (_, what, about) in enumerate(self._items):
            for key in about[0].args if what == "do" else about[1:] if what == "give" else about:
                last[key] = i
        lines, free, names = [], list[str](), self._names
        for i, (depth, what, about) in enumerate(self._items):
            used = about[0].args if what == "do" else about[1:] if what == "give" else about
            texts = [names.get(key, str(key)) for key in used]
            ended = [key for key in dict.fromkeys(used) if last[key] == i and self._is_temporary(key)]
            text = ""
            if what == "do":
                s = about[0]
                text = s.template.format(*texts)
                target = self._target(s, ended)
                if target:
                    text = f"{s.ufunc}({', '.join(texts)}, out={target})"
                    names[s.out] = target
            free += [names[key] for key in ended if what != "do" or names[key] != names.get(about[0].out)]
            if what in ("do", "give"):
                out = about[0].out if what == "do" else about[0]
                if out not in names:
                    names[out] = free.pop() if free else f"v{len(names)}"
                lines.append(f"{'    ' * depth}{names[out]} = {text or texts[0]}")
            else:
                lines.append(f"{'    ' * depth}{f'if {texts[0]}' if what == 'if' else 'else'}:")
        return lines, {key: names.get(key, str(key)) for key in self._kept}

    def _is_temporary(self, key: Key) -> bool:
        return key in self._made and key not in self._kept

    def _target(self, s: Statement, ended: list[Key]) -> str | None:
        """The array that a statement may write its result to: the parameter's next one, or one that is needed no more."""
        if not s.ufunc or not s.size:
            return None
        if s.out in self._into:
            return self._into[s.out]
        for key in ended:
            made = self._made[key]
            if made.is_own and made.size == s.size and key not in self._shared:
                return self._names[key]
        return None
