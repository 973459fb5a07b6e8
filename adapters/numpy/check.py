"""The gradient check: it compares each layer's hand-written backward with `jax.grad` of its own forward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .layer_check import LayerCheck
from .pairs import patterns
from .recording import Call, Chain, incoming, layers_of, method_of, record
from .reference import reference_for
from .report import GradientReport, LayerReport, kind_of
from .subject import Settings, Subject, outputs_of


def check_gradients(
    network: Any,
    *inputs: Any,
    dout: Any = None,
    loss: Any = None,
    target: Any = None,
    rtol: float | None = None,
    accumulates: bool = True,
    gradients: Mapping[str, str] | None = None,
    frozen: str | Iterable[str] = (),
    ignored: str | Iterable[str] = (),
    seed: int = 0,
) -> GradientReport:
    """Compare the hand-written `backward` of each layer of a NumPy network with `jax.grad` of the layer's `forward`.

    A layer is an object of any class with `forward(x)` (or `__call__`) and `backward(dout)`. Its `backward` returns the
    gradient by the input, or None if no layer before it needs one, and adds to the gradients of its parameters (found as
    `wrap` finds them). Each layer is checked by itself. It gets the input that it has when the network runs, and the right
    gradient of its output, not the one from a wrong layer after it. So the report names only the layers that are wrong. A
    layer that is made of other layers is checked after them, and is judged if they are right. The same holds for the list
    as a whole, if JAX can trace it.

    The right gradients are those of `forward` itself, which JAX runs on traced values in float64. If JAX cannot trace it
    (SciPy, compiled code), they come from finite differences, and the report says so. All runs use copies in float64: the
    network's arrays, caches and random generators do not change. The check also tests that nothing of an earlier batch is
    kept, that two calls of backward add up, that `zero_grad` resets, that backward changes nothing that forward uses, and
    that shapes and dtypes fit.

    At a kink of forward (ReLU at 0), the gradient from backward is not judged, and the report says so.

    Args:
        network: a layer, a loss, an object that holds layers in attributes, lists, tuples or dicts, or a list of layers that
            run one after another.
        *inputs: the arguments of its `forward`: the arrays of the batch to check it with.
        dout: the gradient of the network's output, of the output's shape. Without `dout` and `loss`, it is random.
        loss: an object with `forward(output, target)` and `backward()`. It is checked too.
        target: the second argument of the loss.
        rtol: the largest allowed difference of gradients, relative to their largest element. Default: 1e-6; larger if the
            code rounds to float32, and for finite differences.
        accumulates: False for a network whose `backward` overwrites gradients on purpose.
        gradients, frozen, ignored: see `wrap`.
        seed: the seed of the random `dout`.

    Returns:
        A report. It is true if all layers are right, and its text is a table. `report.raise_if_wrong()` raises
        GradientError.

    Raises:
        TypeError: if there is no layer, or none that runs; if a layer cannot be copied; if an output is not an array, or a
            loss is not a number.
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
    network = Chain(network) if type(network) in (list, tuple) else network
    layers = {path: layer for path, layer in layers_of(network).items() if not isinstance(layer, Chain)}
    if not layers:
        raise TypeError(
            f"check_gradients found no layer: a {kind_of(network)} holds no object with `backward` and `forward` (or"
            " `__call__`)"
        )
    if not callable(getattr(network, "forward", network)):
        raise TypeError(
            f"a {kind_of(network)} has layers, but no `forward` (or `__call__`) that runs them: write one, or pass the"
            " layers as a list"
        )
    inputs = tuple([np.asarray(each) if isinstance(each, list | float) else each for each in inputs])
    with settings.draws.kept(), np.errstate(all="ignore"):
        calls, outputs = record(network, layers, inputs, settings)
        if not calls:
            raise TypeError(
                f"check_gradients has nothing to check: the network's forward calls none of its layers ({', '.join(layers)})"
            )
        _check_finite("the network's output", outputs)
        rng = np.random.default_rng(seed)
        reports: dict[str, LayerReport] = {}
        if loss is not None:
            incoming_dout, reports["loss"] = _checked_loss(loss, outputs, target, settings)
        else:
            incoming_dout = _incoming_dout(dout, outputs, rng)
        found = incoming(network, layers, inputs, calls, incoming_dout, settings)
        last = {made.path: i for i, made in enumerate(calls)}
        for path, i in last.items():
            right = None if found is None else found[i]
            reports[path] = _checked(path, layers[path], calls[i], right, settings, rng)
        if isinstance(network, Chain) and len(network.layers) > 1:
            _check_chain(network, inputs, outputs, incoming_dout, found is not None, reports, settings)
    return _judged(layers, calls, reports)


def _check_finite(what: str, arrays: Sequence[Any]) -> None:
    if not all(np.isfinite(each).all() for each in arrays):
        raise ValueError(
            f"{what} is not finite for this input, so there is no gradient to check: pass another input, or change the"
            " weights"
        )


def _incoming_dout(dout: Any, outputs: Sequence[Any], rng: np.random.Generator) -> list[Any]:
    if dout is None:
        return [np.ones(()) if each.ndim == 0 else rng.normal(size=each.shape) for each in outputs]
    given = [np.asarray(each, np.float64) for each in (dout if isinstance(dout, tuple) else (dout,))]
    shapes, wanted = [each.shape for each in given], [each.shape for each in outputs]
    if shapes != wanted:
        raise ValueError(f"dout must have the shape of the network's output, {_shown(wanted)}; got {_shown(shapes)}")
    return given


def _shown(shapes: list[tuple[int, ...]]) -> str:
    return str(shapes[0]) if len(shapes) == 1 else str(shapes)


def _checked_loss(loss: Any, outputs: Sequence[Any], target: Any, settings: Settings) -> tuple[list[Any], LayerReport]:
    """The right gradient of the loss by the network's output, and the report of the loss."""
    args = (*outputs, target) if target is not None else tuple(outputs)
    made = Call("loss", method_of(loss), args, {}, [np.ones(())], ())
    subject = Subject("loss", loss, made.method, args, {}, settings)
    values = outputs_of(subject.run().forward())
    if [each.shape for each in values] != [()]:
        raise TypeError(
            f"loss.forward(output, target) must return one number, and keep what backward() needs in attributes; got shape"
            f" {_shown([each.shape for each in values])}"
        )
    _check_finite("the loss", values)
    report = _checked("loss", loss, made, [np.ones(())], settings, np.random.default_rng(0))
    right = reference_for(subject, [np.ones(())], values).grads
    return [right[i] for i in range(len(outputs))], report


def _checked(
    path: str, layer: Any, made: Call, right: list[Any] | None, settings: Settings, rng: np.random.Generator
) -> LayerReport:
    """The report of one layer."""
    scalar = len(made.outputs) == 1 and made.outputs[0].ndim == 0
    is_random = False
    if scalar:  # a loss: the gradient of its output is 1
        dout = [np.ones(())]
    elif right is not None and any(each.any() for each in right) and all(np.isfinite(each).all() for each in right):
        dout = right
    else:
        dout, is_random = [rng.normal(size=each.shape) for each in made.outputs], True
    try:
        subject = Subject(path, layer, made.method, made.args, made.kwargs, settings)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        return LayerReport(path, kind_of(layer), "wrong", problems=(problem,))
    first, second = (outputs_of(subject.run().forward()) for _ in range(2))
    if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(first, second, strict=True)):
        raise ValueError(
            f"{path or kind_of(layer)}: two runs of forward on the same input differ. It draws random numbers from a"
            " generator that the check cannot reset: keep a np.random.Generator in an attribute, and draw from it"
        )
    return LayerCheck(subject, dout, is_random).report()


def _check_chain(
    chain: Chain,
    inputs: tuple[Any, ...],
    outputs: list[Any],
    dout: list[Any],
    traced: bool,
    reports: dict[str, LayerReport],
    settings: Settings,
) -> None:
    """Add to `reports` the mistakes that show only when right layers run one after another."""
    trained = ""  # the last layer with parameters, which needs a gradient from the layers after it
    for path in (f"layers.{i}" for i in range(len(chain.layers))):
        report = reports.get(path)
        if report is None:
            continue
        if trained and any(each.remark == "not computed" and each.name == "input" for each in report.gradients):
            problem = f"backward() returns no gradient by the input, which {trained} needs: is a `return` missing?"
            reports[path] = replace(report, state="wrong", problems=(*report.problems, problem))
        if any(not each.name.startswith("input") for each in report.gradients):
            trained = path
    if traced and all(report.state == "right" for report in reports.values()):
        made = Call("", "forward", inputs, {}, outputs, ())
        report = _checked("", chain, made, dout, settings, np.random.default_rng(settings.seed))
        if report.state == "wrong":
            note = (
                "each layer is right by itself. Does a layer change an array that another layer keeps? Or is a layer used"
                " twice, and keeps only its last call?"
            )
            reports[""] = replace(report, kind="the list as a whole", notes=(note, *report.notes))


def _judged(layers: Mapping[str, Any], calls: Sequence[Call], reports: dict[str, LayerReport]) -> GradientReport:
    """All reports in the order of the network. A layer that is made of wrong layers is not judged."""
    parts: dict[str, set[str]] = {}
    for made in calls:
        for outer in made.inside:
            parts.setdefault(outer, set()).add(made.path)
    found = []
    for path, layer in layers.items():
        report = reports.get(path)
        if report is None:
            report = LayerReport(path, kind_of(layer), "not run")
        elif report.state == "wrong" and path in parts:
            inner = [reports[part] for part in parts[path]]
            if any(part.state == "wrong" for part in inner):
                report = replace(report, state="unknown")
            elif not all(each.ok for each in report.gradients):
                note = "the layers inside it are right: the mistake is in its own backward, which combines them"
                report = replace(report, notes=(note, *report.notes))
        found.append(report)
    found += [reports[path] for path in ("", "loss") if path in reports and path not in layers]
    return GradientReport(tuple(found))
