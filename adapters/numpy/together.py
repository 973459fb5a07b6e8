"""Layers and a loss whose gradients are right only together: a fused softmax, or factors that cancel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .calling import Calling, argument_names, call, input_gradient, output_of, run_backward
from .recording import Call
from .report import LayerReport, State


class WithLoss:
    """A network and its loss as one loss of the network's input."""

    def __init__(
        self,
        network: Any,
        forward: str,
        calling: Calling | None,
        loss: Any,
        loss_calling: Calling,
        extra: tuple[Any, ...] = (),
    ) -> None:
        self.extra = extra  # the arguments of forward after the input
        self.network, self.method, self.calling = network, forward, calling
        self.loss, self.loss_calling = loss, loss_calling

    def forward(self, x: Any, *others: Any) -> Any:
        self.input = (x, *self.extra)
        self.output = call(self.network, self.method, self.input, {})
        self.args = list(others)
        self.args.insert(self.loss_calling.lead, output_of(self.network, self.output))
        self.value = call(self.loss, self.loss_calling.forward, self.args, {})
        return np.mean(output_of(self.loss, self.value))  # of many losses, as most authors mean it

    def backward(self) -> Any:
        one = [np.ones(np.shape(output_of(self.loss, self.value)))]
        given = run_backward(self.loss, self.loss_calling, self.args, self.value, one)
        dout = input_gradient(given, argument_names(self.loss, self.loss_calling.forward))
        if self.calling is None:  # a Chain
            return self.network.backward(dout)
        return run_backward(self.network, self.calling, self.input, self.output, [dout])


def in_order(calls: Sequence[Call]) -> list[Call]:
    """The calls of the innermost layers, if each gets the output of the one before, and none runs twice; else none."""
    outer = {path for made in calls for path in made.inside}
    inner = [made for made in calls if made.path not in outer]
    linked = all(
        after.args and np.array_equal(after.args[0], before.outputs[0])
        for before, after in zip(inner, inner[1:], strict=False)
    )
    return inner if linked and len({made.path for made in inner}) == len(inner) else []


def cancelled(calls: Sequence[Call], reports: Mapping[str, LayerReport]) -> dict[str, LayerReport]:
    """The reports of layers and a loss that are wrong by factors which cancel in most parameters; none if they do not."""
    carry = _of_input(reports["loss"])
    if carry is None or not all(made.path in reports for made in in_order(calls)):
        return {}
    fits: dict[str, dict[str, bool]] = {}
    for made in reversed(in_order(calls)):
        report = reports[made.path]
        factors = {each.name: _of(each) for each in report.gradients if not each.name.startswith("input")}
        fits[made.path] = {n: f is not None and bool(np.isclose(f * carry, 1, rtol=1e-4)) for n, f in factors.items()}
        carry *= _of_input(report) or 1.0
    flat = [fit for each in fits.values() for fit in each.values()]
    if 2 * sum(flat) <= len(flat):
        return {}
    note = "the loss and the layers are wrong by factors that cancel over the whole chain: the gradients that train are right"
    found = {"loss": settled(reports["loss"], note)}
    for path in fits:
        if reports[path].state == "wrong":
            found[path] = settled(reports[path], fits=[name for name, fit in fits[path].items() if fit])
    for path in {path for made in calls for path in made.inside}:  # what is made of them is wrong by the same factors
        if path in reports and reports[path].state == "wrong" and all(found[p].state == "right" for p in found):
            found[path] = settled(reports[path], fits=[g.name for g in reports[path].gradients if g.factor is not None])
    return found


def settled(report: LayerReport, *notes: str, fits: Sequence[str] | None = None) -> LayerReport:
    """The report of a layer whose gradients `fits` are right together with others; by default all are."""
    gradients = tuple(
        each
        if each.ok or (fits is not None and each.name not in fits)
        else replace(each, ok=True, remark=each.hint.partition(":")[0] or "right with the loss")
        for each in report.gradients
    )
    right = all(each.ok for each in gradients) and not report.problems
    state: State = "right" if right else report.state
    return replace(report, state=state, gradients=gradients, notes=(*report.notes, *notes))


def only_input_is_wrong(report: LayerReport) -> bool:
    wrong = [each.name for each in report.gradients if not each.ok]
    return bool(wrong) and not report.problems and all(name.startswith("input") for name in wrong)


def _of(gradient: Any) -> float | None:
    return 1.0 if gradient.ok else gradient.factor


def _of_input(report: LayerReport) -> float | None:
    """The factor of the gradient by the input. None if there is none."""
    found = [_of(each) for each in report.gradients if each.name.startswith("input") and each.error is not None]
    return found[0] if len(found) == 1 else None
