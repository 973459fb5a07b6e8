"""The result of a gradient check, layer by layer, and its text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

State = Literal["right", "wrong", "unknown", "not run", "not judged", "not checked"]


class GradientError(ValueError):
    """A hand-written backward is wrong, or was not checked. The message is the report of the check."""


@dataclass(frozen=True)
class GradientComparison:
    """The comparison of one gradient of a layer with the right one.

    `error` is the difference of the derivatives along random directions, relative to the right one. If a gradient of at most
    400 elements is wrong, `error` is the largest difference, divided by the largest element of the right gradient. It occurs
    at `index`, where `backward` computed `got` and the right value is `expected`. `hint` says what the mistake looks like,
    and `factor` is the number of times that it is the right gradient, or None. `error` is None for a gradient that
    `backward` does not compute. `checked` is False for an array without a gradient on which the output depends.
    """

    name: str
    shape: tuple[int, ...]
    error: float | None
    ok: bool
    index: tuple[int, ...] = ()
    got: float = 0.0
    expected: float = 0.0
    hint: str = ""
    remark: str = ""
    factor: float | None = None
    checked: bool = True


@dataclass(frozen=True)
class LayerReport:
    """The report of one layer: the comparison of its gradients, other problems, and notes.

    `state` is "right", "wrong", "unknown" (a layer inside it is wrong or not judged), "not run", "not judged" (the check does
    not know how to call it, as a problem says) or "not checked" (its output depends on an array without a gradient).
    `accumulates` is True if backward adds to gradients, False if it overwrites them, and None if it keeps none.
    """

    path: str
    kind: str
    state: State
    gradients: tuple[GradientComparison, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    accumulates: bool | None = None

    @property
    def label(self) -> str:
        return f"{self.path} ({self.kind})" if self.path else self.kind


@dataclass(frozen=True)
class GradientReport:
    """The result of `check_gradients`. It is true if all layers that run are right; its text is a table of all layers.

    `report["0.1"]` is the report of the layer at a path. `report.wrong` holds the paths of the wrong layers.
    """

    layers: tuple[LayerReport, ...]

    @property
    def wrong(self) -> list[str]:
        """The paths of the layers that are wrong by themselves."""
        return [layer.path for layer in self.layers if layer.state == "wrong"]

    def __bool__(self) -> bool:
        return not self._other("wrong", "not judged", "not checked", "unknown")

    def _other(self, *states: State) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.state in states]

    def __getitem__(self, path: str) -> LayerReport:
        for layer in self.layers:
            if layer.path == path:
                return layer
        raise KeyError(f"no layer at {path!r}; the layers are {', '.join(repr(layer.path) for layer in self.layers)}")

    def raise_if_wrong(self) -> None:
        """Raise GradientError, with the text of this report, if a layer is wrong or was not checked."""
        if not self:
            raise GradientError(str(self))

    def __str__(self) -> str:
        checked = [layer for layer in self.layers if layer.state != "not run"]
        count = f"{len(checked)} {'layer is' if len(checked) == 1 else 'layers are'}"
        heads = []
        states: tuple[State, ...] = ("wrong", "not judged", "not checked")
        for state in states:
            if bad := self._other(state):
                named = ", ".join(layer.label for layer in bad)
                verb = "is" if len(bad) == 1 else "are"
                heads.append(f"{len(bad)} of {len(checked)} layers {verb} {state}: {named}")
        return "\n".join(
            [f"gradient check: {'; '.join(heads) or count + ' right'}", "", *self._table(), *self._details()]
        )

    def _table(self) -> list[str]:
        rows = [("layer", "gradient by", "shape", "error", "")]
        for layer in self.layers:
            plain = layer.state in ("right", "wrong") or layer.state == "not checked"
            state = "unknown: a layer inside is not right" if layer.state == "unknown" else "" if plain else layer.state
            first = (layer.label, "", "", "", state)
            given = [
                (
                    "",
                    each.name,
                    str(each.shape),
                    "-" if each.error is None else f"{each.error:.1e}",
                    ", ".join(filter(None, (_verdict(layer, each), each.remark))),
                )
                for each in layer.gradients
            ]
            if given and not first[-1]:
                rows += [(layer.label, *given[0][1:]), *given[1:]]
            elif layer.state == "wrong" and not given:
                rows.append((*first[:-1], "WRONG"))
            else:
                rows += [first, *given]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    def _details(self) -> list[str]:
        lines = []
        for layer in self.layers:
            found = [_sentence(each) for each in layer.gradients if not each.ok] if layer.state == "wrong" else []
            found += [each.hint for each in layer.gradients if not each.checked]
            found += layer.problems if layer.state in ("wrong", "not judged") else ()
            found += [f"note: {note}" for note in layer.notes]
            if found:
                lines += ["", f"{layer.label}:", *(f"  {line}" for line in found)]
        adds = [layer.label for layer in self.layers if layer.accumulates]
        assigns = [layer.label for layer in self.layers if layer.accumulates is False]
        if adds and assigns:
            lines += [
                "",
                f"backward() adds to gradients in {', '.join(adds)}, and overwrites them in {', '.join(assigns)}",
            ]
        elif adds or assigns:
            lines += ["", f"backward() {'adds to' if adds else 'overwrites'} gradients"]
        return lines


def _verdict(layer: LayerReport, each: GradientComparison) -> str:
    return "" if each.ok else "WRONG" if layer.state == "wrong" else "differs"


def _sentence(each: GradientComparison) -> str:
    where = f" at {each.index}" if each.index else ""
    numbers = f" is {each.got:.6g}{where} and should be {each.expected:.6g}" if each.got != each.expected else ""
    return f"the gradient by {each.name}{numbers or ' is wrong'}{': ' + each.hint if each.hint else ''}"


def kind_of(layer: Any) -> str:
    return type(layer).__name__
