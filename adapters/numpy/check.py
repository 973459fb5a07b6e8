"""The gradient check: it compares each layer's hand-written backward with the slopes of its own forward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .calling import Calling, NotUnderstoodError, extra_arguments, is_layer, losses_of, method_of, ways
from .layer_check import Inside, LayerCheck
from .objects import is_floating
from .pairs import patterns
from .recording import Call, Chain, layers_of, record
from .report import GradientReport, LayerReport, kind_of
from .subject import Settings, Subject, outputs_of, replace_in
from .together import WithLoss, cancelled, in_order, only_input_is_wrong, settled


def check_gradients(
    network: Any,
    *inputs: Any,
    dout: Any = None,
    loss: Any = None,
    target: Any = None,
    rtol: float | None = None,
    accumulates: bool | None = None,
    gradients: Mapping[str, str] | None = None,
    frozen: str | Iterable[str] = (),
    ignored: str | Iterable[str] = (),
    seed: int = 0,
) -> GradientReport:
    """Compare the hand-written `backward` of each layer of a NumPy network with the slopes of the layer's `forward`.

    A layer is an object of any class with `forward(x)` (or `__call__`) and `backward(dout)`. Its `backward` returns the
    gradient by the input, or None if no layer before it needs one, and keeps or returns the gradients of its parameters
    (found as `wrap` finds them, after one backward). Other forms are understood by the names of the arguments, such as
    `backward(input, grad_output)`. Each layer is checked by itself, with the input that it has when the network runs and a
    random gradient of its output. So the report names only the layers that are wrong. A layer that is made of other layers
    is checked after them, and is judged if they are right. The same holds for the list as a whole.

    The right derivatives are finite differences of `forward` along random directions, in float64. If a gradient does not fit
    them, the check searches the element, and tries the usual mistakes. All runs use copies in float64: the network's arrays,
    caches and random generators do not change. The check also tests that nothing of an earlier batch is kept, that backward
    either adds to all gradients of an object or overwrites all, that `zero_grad` resets, that backward changes nothing that
    forward uses, and that shapes and dtypes fit.

    At a kink of forward (ReLU at 0), backward is judged at a random point nearby, and the report says so. An array on which
    the output depends, and for which no gradient is found, makes the report false, unless it is `frozen` or `ignored`.

    Args:
        network: a layer, a loss, an object that holds layers in attributes, lists, tuples or dicts, or a list of layers that
            run one after another.
        *inputs: the arguments of its `forward`: the arrays of the batch to check it with.
        dout: the gradient of the network's output, of the output's shape, with which the network as a whole is checked. By
            default it is random, as for each layer inside.
        loss: an object with `forward(output, target)` and `backward()`, or with `loss(output, target)` and `grad(output,
            target)`. It is checked too.
        target: the second argument of the loss.
        rtol: the largest allowed difference of derivatives, relative to their size. Default: 1e-6; larger if the code rounds
            to float32.
        accumulates: True if `backward` must add to the gradients, False if it must overwrite them. By default both are right.
        gradients, frozen, ignored: see `wrap`.
        seed: the seed of the random `dout`.

    Returns:
        A report. It is true if all layers are right, and all were checked. Its text is a table. `report.raise_if_wrong()`
        raises GradientError.

    Raises:
        TypeError: if there is no layer, or none that runs; if the network cannot be copied; if an output is not an array, or
            a loss is not a number.
        ValueError: if the network's output or the loss is not finite; if `dout` does not have the output's shape; if
            `target` is passed without `loss`, or `dout` with `loss`; if two runs of a layer on the same input differ.

    Example:
        >>> from minitorch_jax.adapters.numpy import Linear, Sequential, Tanh
        >>> class Wrong(Linear):
        ...     def backward(self, dout):
        ...         dx = super().backward(dout)
        ...         self.db -= 2 * dout.sum(0)
        ...         return dx
        >>> net = Sequential(Linear(4, 3, rng=0), Tanh(), Wrong(3, 2, rng=1))
        >>> report = check_gradients(net, np.random.default_rng(0).normal(size=(5, 4)))
        >>> report.wrong
        ['modules.2']
        >>> print(report["modules.2"].gradients[2].hint)
        its sign is wrong
    """
    settings = Settings(gradients or {}, patterns(frozen), patterns(ignored), rtol, accumulates, seed)
    if target is not None and loss is None:
        raise ValueError(
            "check_gradients got a target without a loss: pass loss=, an object with forward(output, target)"
        )
    if dout is not None and loss is not None:
        raise ValueError(
            "check_gradients got both dout and loss: pass one of them, which sets the gradient of the output"
        )
    if type(network) in (list, tuple):
        for i, each in enumerate(network):
            if not is_layer(each):
                raise TypeError(
                    f"layers.{i} of the list is a {kind_of(each)}, which has no `backward` and `forward` (or `__call__`)"
                )
        network = Chain(network)
    layers, closed = layers_of(network)
    layers = {path: layer for path, layer in layers.items() if not isinstance(layer, Chain)}
    if not layers and not closed:
        raise TypeError(
            f"check_gradients found no layer: a {kind_of(network)} holds no object with `backward` and `forward` (or"
            " `__call__`)"
        )
    if not callable(getattr(network, method_of(network), None)):
        raise TypeError(
            f"a {kind_of(network)} has layers, but no `forward` (or `__call__`) that runs them: write one, or pass the"
            " layers as a list"
        )
    inputs = tuple([np.asarray(each) if isinstance(each, list | float) else each for each in inputs])
    with settings.draws.kept(), np.errstate(all="ignore"):
        calls, outputs, uncopied = record(network, layers, inputs, settings)
        closed |= {path: layers.pop(path) for path in uncopied}
        if not calls and not closed:
            raise TypeError(
                f"check_gradients has nothing to check: the network's forward calls none of its layers ({', '.join(layers)})"
            )
        _check_finite("the network's output", outputs)
        check = _Check(settings, network, calls)
        wanted = _incoming_dout(dout, outputs)
        for path, layer in closed.items():
            check.reports[path] = LayerReport(path, kind_of(layer), "not judged", problems=(_not_entered(layer),))
        if loss is not None:
            check.loss(loss, outputs, target)
        for made in {made.path: made for made in calls}.values():
            check.layer(made, layers[made.path], wanted if made.path == "" else None)
        if "" not in layers | closed and not isinstance(network, Chain):
            check.own_arrays(network, inputs)
        if loss is not None:
            check.with_loss(loss, target, layers)
        if isinstance(network, Chain) and len(network.layers) > 1:
            check.chain(network, Call("", "forward", inputs, {}, outputs, ()), wanted)
    return check.judged(layers | closed)


def _not_entered(layer: Any) -> str:
    cls = type(layer)
    return (
        f"it was not looked into: its class is {cls.__module__}.{cls.__qualname__} of the type {kind_of(cls)}, which the"
        " check cannot copy. Define the class with a class statement, in a module of your own"
    )


def _check_finite(what: str, arrays: Sequence[Any]) -> None:
    if not all(np.isfinite(each).all() for each in arrays):
        raise ValueError(
            f"{what} is not finite for this input, so there is no gradient to check: pass another input, or change the"
            " weights"
        )


def _incoming_dout(dout: Any, outputs: Sequence[Any]) -> list[Any] | None:
    """The caller's gradient of the output. None if it is to be random, as there is none, or only zeros."""
    if dout is None:
        return None
    given = [np.asarray(each, np.float64) for each in (dout if isinstance(dout, tuple) else (dout,))]
    shapes, wanted = [each.shape for each in given], [each.shape for each in outputs]
    if shapes != wanted:
        raise ValueError(f"dout must have the shape of the network's output, {_shown(wanted)}; got {_shown(shapes)}")
    return given if any(each.any() for each in given) else None


def _shown(shapes: list[tuple[int, ...]]) -> str:
    return str(shapes[0]) if len(shapes) == 1 else str(shapes)


class _Check:
    """The reports of the layers of one network, as they are made."""

    def __init__(self, settings: Settings, network: Any, calls: Sequence[Call]) -> None:
        self.settings, self.network, self.calls = settings, network, calls
        self.rng = np.random.default_rng(settings.seed)
        self.reports: dict[str, LayerReport] = {}
        self.inside = Inside()
        self.loss_calling: Calling | None = None
        # a loss that is right only together with layers, and its target
        self.fused: tuple[Any, tuple[Any, ...]] | None = None

    def layer(self, made: Call, layer: Any, dout: list[Any] | None) -> None:
        """Add the report of one layer."""
        try:
            callings = ways(layer, made.method, made.args, len(made.outputs), made.is_scalar, cached=made.cached)
        except NotUnderstoodError as error:
            self.reports[made.path] = LayerReport(made.path, kind_of(layer), "not judged", problems=(str(error),))
            return
        found = []
        for calling in callings:
            found.append(self._report(made, layer, calling, dout or self._dout(made, calling.takes)))
            if found[-1].state == "right":
                break
        self.reports[made.path] = found[-1] if found[-1].state == "right" else found[0]

    def _dout(self, made: Call, takes: Sequence[Any]) -> list[Any]:
        """A random gradient of a layer's output; 1 for a loss."""
        if made.is_scalar and (made.outputs[0].ndim == 0 or not {"dout", "douts"} & set(takes)):
            return [np.ones(made.outputs[0].shape)]
        return [self.rng.normal(size=each.shape) for each in made.outputs]

    def _report(self, made: Call, layer: Any, calling: Any, dout: list[Any]) -> LayerReport:
        path = made.path
        try:
            subject = Subject(path, layer, calling, made.args, made.kwargs, self.settings, dout)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            return LayerReport(path, kind_of(layer), "wrong", problems=(problem,))
        first, second = (outputs_of(subject.run().forward()) for _ in range(2))
        if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(first, second, strict=True)):
            raise ValueError(
                f"{path or kind_of(layer)}: two runs of forward on the same input differ. It draws random numbers from a"
                " generator that the check cannot reset: keep a np.random.Generator in an attribute, and draw from it"
            )
        report = LayerCheck(subject, dout, self.inside).report()
        self.inside.covered += subject.arrays.values()
        return report

    def own_arrays(self, network: Any, inputs: tuple[Any, ...]) -> None:
        """Add a report of arrays of a network without a backward, on which its output depends."""
        args = [np.asarray(arg, np.float64) if is_floating(arg) else arg for arg in inputs]
        method = method_of(network)
        args += extra_arguments(network, method)[len(args) - 1 :]
        subject = Subject("", network, Calling(method, ""), tuple(args), {}, self.settings, [])
        found = LayerCheck(replace_in(subject, kept=[*subject.kept, *subject.names]), [], self.inside).unchecked()
        why = "and the network has no backward that computes its gradient: write one, or name the array in `frozen`"
        found = [replace(each, hint=f"not checked: the output depends on {each.name}, {why}") for each in found]
        if found:
            self.reports[""] = LayerReport("", kind_of(network), "not checked", tuple(found))

    # -- the loss -----------------------------------------------------------------------------------------------------

    def loss(self, loss: Any, outputs: Sequence[Any], target: Any) -> None:
        """Add the report of the loss."""
        methods, backward, args, lead = losses_of(loss, outputs, target)
        made, value = self._loss_call(loss, methods, args)
        _check_finite("the loss", [value])
        found = []
        for calling in ways(loss, made.method, args, 1, True, (backward, lead)):
            self.loss_calling = self.loss_calling or calling
            for note, dout in _douts_of_loss(value, len(outputs[0]) if outputs[0].ndim else 1):
                report = self._report(made, loss, calling, [dout])
                found.append(replace(report, notes=(*note, *report.notes)))
                if report.state == "right":
                    self.loss_calling, self.reports["loss"] = calling, found[-1]
                    return
        self.reports["loss"] = next((each for each in found if each.gradients), found[0])

    def _loss_call(self, loss: Any, methods: Sequence[str], args: tuple[Any, ...]) -> tuple[Call, Any]:
        """The call of the first method that returns one number; of the first that runs, if there is none."""
        ran: list[tuple[Call, Any]] = []
        errors: list[Exception] = []
        for method in methods:
            made = Call("loss", method, args, {}, [np.ones(())], ())
            try:
                calling = ways(loss, method, args, 1, True, ("__class__", 0))[0]
                subject = Subject("loss", loss, calling, args, {}, self.settings, [np.ones(())])
                values = outputs_of(subject.run().forward())
            except Exception as error:
                errors.append(error)
                continue
            made.outputs = values
            ran.append((made, values[0]))
            if [each.size for each in values] == [1]:
                return ran[-1]
        if not ran:
            raise errors[0]
        made, value = ran[0]
        if len(made.outputs) != 1 or value.dtype.kind != "f":
            raise TypeError(
                "loss.forward(output, target) must return one number, and keep what backward() needs in attributes; got shape"
                f" {_shown([each.shape for each in made.outputs])}"
            )
        return made, value

    def with_loss(self, loss: Any, target: Any, layers: Mapping[str, Any]) -> None:
        """Find layers that are right only together with the loss."""
        report, chain = self.reports["loss"], in_order(self.calls)
        if report.state != "wrong" or report.problems or self.loss_calling is None or not chain:
            return
        others = () if target is None else (target,)
        if found := cancelled(self.calls, self.reports):
            self.reports |= found
            self.fused = loss, others
            return
        last = self.reports[chain[-1].path]
        if not (only_input_is_wrong(last) and only_input_is_wrong(report)):
            return
        note = (
            f"it is wrong by itself, and right together with {{}}: the gradients of {last.label} and the loss are fused"
        )
        outer = [path for path in chain[-1].inside if self.reports[path].state == "wrong"]
        for made in [chain[-1], *[made for made in self.calls if made.path in outer]]:
            layer, mine = layers[made.path], self.reports[made.path]
            calling = ways(layer, made.method, made.args, len(made.outputs), made.is_scalar, cached=made.cached)[0]
            whole = WithLoss(layer, made.method, calling, loss, self.loss_calling, made.args[1:])
            value = Call(made.path, "forward", (made.args[0], *others), {}, [np.ones(())], ())
            whole_report = self._report(value, whole, Calling("forward", "backward", ()), [np.ones(())])
            if whole_report.state == "right":
                self.reports[made.path] = settled(mine, note.format("the loss"))
            elif made is chain[-1]:
                return
            else:
                self.reports[made.path] = replace(whole_report, kind=mine.kind)
        self.reports["loss"] = settled(report, note.format(last.label))
        self.fused = loss, others

    # -- the list as a whole ------------------------------------------------------------------------------------------

    def chain(self, chain: Chain, made: Call, dout: list[Any] | None) -> None:
        """Add the mistakes that show only when right layers run one after another."""
        trained = ""  # the last layer with parameters, which needs a gradient from the layers after it
        for path in (f"layers.{i}" for i in range(len(chain.layers))):
            report = self.reports.get(path)
            if report is None:
                continue
            if trained and any(each.remark == "not computed" and each.name == "input" for each in report.gradients):
                problem = f"backward() returns no gradient by the input, which {trained} needs: is a `return` missing?"
                self.reports[path] = replace(report, state="wrong", problems=(*report.problems, problem))
            if any(not each.name.startswith("input") for each in report.gradients):
                trained = path
        if all(report.state == "right" for report in self.reports.values()):
            report = self._whole(chain, made, dout)
            if report.state == "wrong":
                note = (
                    "each layer is right by itself. Does a layer change an array that another layer keeps? Or is a layer used"
                    " twice, and keeps only its last call?"
                )
                self.reports[""] = replace(report, kind="the list as a whole", notes=(note, *report.notes))

    def _whole(self, chain: Chain, made: Call, dout: list[Any] | None) -> LayerReport:
        if self.fused is None or self.loss_calling is None:
            return self._report(made, chain, Calling("forward", "backward"), dout or self._dout(made, "dout"))
        loss, others = self.fused
        whole = WithLoss(chain, "forward", None, loss, self.loss_calling)
        value = replace(made, args=(made.args[0], *others), outputs=[np.ones(())])
        report = self._report(value, whole, Calling("forward", "backward", ()), [np.ones(())])
        # where factors cancel, the gradient by the network's own input may be wrong: nothing uses it
        return replace(report, state="right") if only_input_is_wrong(report) else report

    def judged(self, layers: Mapping[str, Any]) -> GradientReport:
        """All reports in the order of the network. A layer that is made of wrong layers is not judged."""
        parts: dict[str, set[str]] = {}
        for made in self.calls:
            for outer in made.inside:
                parts.setdefault(outer, set()).add(made.path)
        for path, text in self.inside.widening.items():
            if text:
                self.reports[path] = replace(self.reports[path], notes=(*self.reports[path].notes, text))
        self._parts()
        found = []
        for path, layer in layers.items():
            report = self.reports.get(path)
            if report is None:
                report = LayerReport(path, kind_of(layer), "not run")
            elif report.state in ("wrong", "not judged") and path in parts:
                inner = [self.reports[part] for part in parts[path]]
                if any(part.state in ("wrong", "not judged") for part in inner):
                    report = replace(report, state="unknown")
                elif not all(each.ok for each in report.gradients):
                    note = "the layers inside it are right: the mistake is in its own backward, which combines them"
                    report = replace(report, notes=(note, *report.notes))
            found.append(report)
        found += [self.reports[path] for path in ("", "loss") if path in self.reports and path not in layers]
        return GradientReport(tuple(found))

    def _parts(self) -> None:
        """A layer that does not run alone, such as one that calls the next layer, is checked in what it is a part of."""
        for made in self.calls:
            report = self.reports[made.path]
            whole = next((self.reports[path] for path in made.inside if self.reports[path].gradients), None)
            if report.state == "wrong" and not report.gradients and whole is not None:
                note = f"checked as a part of {whole.label} only. By itself, {report.problems[0]}"
                self.reports[made.path] = replace(report, state="not run", problems=(), notes=(note,))


def _douts_of_loss(value: Any, rows: int) -> list[tuple[tuple[str, ...], Any]]:
    """The gradients of a loss's output that its backward may mean, with notes: 1, or the mean or sum of many losses."""
    if value.size == 1:
        return [((), np.ones(value.shape))]
    text = "forward() returns many losses: backward() was compared with the gradient of their {}"
    return [
        ((text.format("mean"),), np.full(value.shape, 1 / value.size)),
        ((text.format("sum"),), np.ones(value.shape)),
        ((text.format("sum, divided by the batch size"),), np.full(value.shape, 1 / rows)),
    ]
