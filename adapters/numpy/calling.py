"""How a layer is called: its methods, the arguments of its backward, and where both leave their results."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .names import is_gradient_of
from .objects import attribute, attributes_of, is_floating

FORWARD = ("forward", "__call__", "forward_pass", "forward_propagation", "forward_prop", "fprop")
BACKWARD = ("backward", "backward_pass", "backward_propagation", "backward_prop", "backprop", "bprop")
_LOSS = ("calculate", *FORWARD, "loss", "compute", "compute_loss", "cost")
_LOSS_GRADIENT = (*BACKWARD, "grad", "gradient", "derivative", "prime", "loss_gradient")
_OUTPUT = ("output", "outputs", "out", "y", "a", "A", "activation", "activations", "z", "Z", "loss")
_INPUT = ("input", "inputs", "x", "X", "inp")

_RATES = {"lr", "learning_rate", "learningrate", "eta", "alpha", "rate", "step_size", "optimizer", "opt", "update"}
_TARGETS = {"t", "y", "y_true", "ytrue", "true", "target", "targets", "label", "labels", "actual", "truth", "gt"}
_TARGETS |= {"ground_truth", "expected", "classes", "y_real", "desired"}
_PREDICTIONS = {"y_pred", "ypred", "y_hat", "yhat", "pred", "preds", "predicted", "prediction", "predictions", "output"}
_PREDICTIONS |= {"outputs", "out", "logits", "scores", "p", "probs", "probabilities"}
_CACHES = {"cache", "caches", "cached", "cached_values", "ctx", "context", "saved", "memory", "memo", "tape", "aux"}
_TRAINING = {"training", "train", "is_training", "is_train", "train_flg", "train_flag", "training_mode"}


class NotUnderstoodError(Exception):
    """The check does not know how this layer is called, so it cannot judge it."""


@dataclass(frozen=True)
class Calling:
    """A way to call a layer. `takes` are the arguments of backward.

    "dout" is the gradient of the next output, and "douts" is a tuple of all. An index stands for that argument of forward,
    "output" for its output, "cache" for what forward returns after it, "kept" for an output that a loss keeps in an
    attribute, "rate" for a learning rate. `lead` is the argument whose gradient backward returns first.
    """

    forward: str
    backward: str
    takes: tuple[Any, ...] = ("dout",)
    lead: int = 0

    @property
    def updates(self) -> bool:
        """True if backward takes a learning rate, since it updates the parameters itself."""
        return "rate" in self.takes


def call(layer: Any, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call forward, and return what it returns; see `output_of`."""
    return layer(*args, **kwargs) if method == "__call__" else getattr(layer, method)(*args, **kwargs)


def output_of(layer: Any, returned: Any) -> Any:
    """The output of forward. If it also returned a cache for backward, that is left out.

    A forward that returned nothing has left its output in an attribute.
    """
    if returned is not None:
        if returns_cache(layer, returned):
            return returned[0] if len(returned) == 2 else returned[:-1]
        return returned
    found = [attribute(layer, name) for name in _OUTPUT]
    return next((each for each in found if isinstance(each, np.ndarray | float)), None)


def returns_cache(layer: Any, returned: Any) -> bool:
    """True if forward returns `(output, cache)` and backward takes the cache."""
    taken = _required(attribute(layer, backward_of(layer))) if backward_of(layer) else []
    return isinstance(returned, tuple) and len(returned) == len(taken) and _takes_cache(taken)


def _takes_cache(taken: Sequence[str]) -> bool:
    """True if the last of the arguments of backward is what forward kept for it."""
    if len(taken) < 2 or taken[-1].lower() in _RATES:
        return False
    return taken[-1].lower() in _CACHES or (_is_dout(taken[0]) and not _is_dout(taken[-1]))


def method_of(layer: Any, names: Sequence[str] = FORWARD) -> str:
    """The method that calls a layer: `forward`, or a `__call__` that runs it and may keep what backward needs."""
    found = [name for name in names if callable(attribute(layer, name))]
    code = getattr(attribute(type(layer), "__call__"), "__code__", None)
    runs_forward = code is not None and any(name in code.co_names for name in found)
    return "__call__" if runs_forward or not found else found[0]


def backward_of(layer: Any) -> str:
    """The name of a layer's backward; "" if it has none."""
    return next((name for name in BACKWARD if callable(attribute(layer, name))), "")


def is_layer(value: Any) -> bool:
    """True if a value has a forward (or `__call__`) and a backward."""
    runs = callable(value) or any(callable(attribute(value, name)) for name in FORWARD)
    return runs and bool(backward_of(value))


def extra_arguments(layer: Any, method: str) -> tuple[Any, ...]:
    """The arguments of a layer's forward after its input: True for `training`."""
    names = argument_names(layer, method)[1:]
    return (True,) * len(names) if set(map(str.lower, names)) <= _TRAINING else ()


def losses_of(loss: Any, output: Sequence[Any], target: Any) -> tuple[list[str], str, tuple[Any, ...], int]:
    """The methods that may compute a loss, that of its gradient, its arguments in order, and the output's index."""
    forward = [name for name in _LOSS if callable(attribute(loss, name))]
    backward = next((name for name in _LOSS_GRADIENT if callable(attribute(loss, name))), "")
    if not forward or not backward:
        raise TypeError(
            f"loss must be an object with forward(output, target) and backward(); got a {type(loss).__name__}"
            f" without {'a `forward`' if not forward else 'a `backward`'}"
        )
    if callable(loss) and method_of(loss) == "__call__" and forward[0] != "calculate":
        forward.insert(0, "__call__")
    if target is None:
        return forward, backward, tuple(output), 0
    names = [name.lower() for name in argument_names(loss, forward[0])]
    if len(names) > 1 and names[0] in _TARGETS and names[1] in _PREDICTIONS:
        return forward, backward, (target, *output), 1
    return forward, backward, (*output, target), 0


def ways(
    layer: Any, forward: str, args: Sequence[Any], count: int, scalar: bool, loss: Any = None, cached: bool = False
) -> list[Calling]:
    """The ways to call a layer with `count` outputs, the likely one first. `loss` is the name and lead of a loss.

    `cached` is True if forward also returns a cache.

    Raises:
        NotUnderstoodError: if there is none.
    """
    backward, lead = loss or (backward_of(layer), 0)
    taken = _required(getattr(layer, backward))
    if cached or (len(taken) > 1 and taken[-1].lower() in _CACHES):
        return [Calling(forward, backward, (*["dout"] * (len(taken) - 1), "cache"))]
    return [Calling(forward, backward, takes, lead) for takes in _takes(layer, forward, backward, args, count, scalar)]


def _takes(
    layer: Any, forward: str, backward: str, args: Sequence[Any], count: int, scalar: bool
) -> list[tuple[Any, ...]]:
    try:
        params = list(inspect.signature(getattr(layer, backward)).parameters.values())
    except (TypeError, ValueError):
        return [("dout",) * count]
    positional = [p.name for p in params if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = _required(getattr(layer, backward))
    if scalar and not required:
        return [()]
    if len(required) == 1 and required[0].lower() in _RATES:
        return [("rate",)]
    if len(required) <= 1 and count > 1:
        return [("douts",)] if len(positional) == 1 else [("dout",) * count]
    names = argument_names(layer, forward)
    if len(required) <= 1:
        if scalar and len(args) > 1 and (required[0] in names or required[0].lower() in _TARGETS | _PREDICTIONS):
            return [(_by_name(required[0], names, args),), ("dout",)]
        return [("dout",)]
    if len(required) == count:
        return [("dout",) * count]
    taken = [_by_name(name, names, args) for name in required]
    unknown = [i for i, each in enumerate(taken) if each is None]
    doutless = "dout" not in taken
    if scalar and len(required) == len(args):  # a loss: backward takes what forward takes, or the output that it kept
        plain = tuple([i if each is None or each == "dout" else each for i, each in enumerate(taken)])
        kept = tuple(["kept" if i == 0 else each for i, each in enumerate(plain)])
        given = tuple(["dout" if i == 0 else each for i, each in enumerate(plain)])
        return [plain, kept, given]
    if doutless and len(unknown) == 1 and len(required) == 2 and "target" not in taken:
        taken[unknown[0]] = "dout"
    elif not doutless and len(unknown) == 1 and len(args) == 1:
        taken[unknown[0]] = 0
    if "rate" not in taken and (None in taken or "target" in taken or ("dout" not in taken and not scalar)):
        raise NotUnderstoodError(
            f"{backward}() takes {', '.join(required)}, and the check passes only the gradient of the output, and the"
            f" arguments of forward by their names: write it as {backward}(dout), and let forward() keep what it needs"
        )
    return [tuple(taken)]


def _by_name(name: str, names: Sequence[str], args: Sequence[Any]) -> Any:
    """What an argument of backward stands for, by its name; None if that is unknown."""
    low = name.lower()
    if name in names and names.index(name) < len(args):
        return names.index(name)
    if low in _RATES:
        return "rate"
    if _is_dout(name):
        return "dout"
    if len(args) > 1 and low in _TARGETS:
        return 0 if names and names[0].lower() in _TARGETS and names[0].lower() not in ("y", "t") else 1
    if low in _TARGETS - {"y", "t"}:
        return "target"  # a network that computes its loss in backward
    if name in _INPUT and args:
        return 0
    if low in _PREDICTIONS or name in _OUTPUT:
        return "output" if len(args) == 1 else 0
    return None


def _is_dout(name: str) -> bool:
    """True for a name of the gradient of the output."""
    low = name.lower()
    return "grad" in low or low.startswith(("d", "err", "delta", "upstream")) or low == "g"


def _required(function: Any) -> list[str]:
    """The names of the arguments of a function without a default."""
    try:
        params = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return [p.name for p in params if p.default is p.empty and p.kind not in kinds]


def run_backward(layer: Any, calling: Calling, args: Sequence[Any], returned: Any, douts: Sequence[Any]) -> Any:
    """Run backward, and return what it returned, or the gradient by the input that it left in an attribute.

    `returned` is what forward returned.
    """
    waiting = iter(douts)
    named = {"douts": tuple(douts), "output": output_of(layer, returned), "rate": 0.1}
    if "cache" in calling.takes:
        if not returns_cache(layer, returned):
            raise NotUnderstoodError(
                f"{calling.backward}() takes a cache, which forward() does not return after its output"
            )
        named["cache"] = returned[-1]
    if "kept" in calling.takes:
        shape = np.shape(args[calling.lead])
        outputs = [attribute(layer, name) for name in _OUTPUT]
        named["kept"] = next((each for each in outputs if isinstance(each, np.ndarray) and each.shape == shape), None)
    given = [next(waiting) if t == "dout" else args[t] if isinstance(t, int) else named[t] for t in calling.takes]
    before = {name: value for name, value in attributes_of(layer).items() if _is_of_input(name)}
    found = getattr(layer, calling.backward)(*given)
    if found is None and args:
        for name in filter(_is_of_input, attributes_of(layer)):
            value = attribute(layer, name)
            if isinstance(value, np.ndarray) and value is not before.get(name) and value.shape == np.shape(args[0]):
                return value
    return found


def input_gradient(given: Any, names: Sequence[str]) -> Any:
    """The gradient by the first input, of all that backward returned."""
    if isinstance(given, dict):
        return _from_dict(given, names, [0], {})[0].get(0)
    return given[0] if isinstance(given, tuple | list) and given else given


def argument_names(layer: Any, method: str) -> list[str]:
    """The names of the arguments of forward. A `__call__(*args)` has those of the method that it runs."""
    named = (_required(attribute(layer, name)) for name in (method, *FORWARD) if callable(attribute(layer, name)))
    return next(filter(None, named), [])


def sorted_gradients(
    given: Any, args: Sequence[Any], names: Sequence[str], wanted: Mapping[str, Any], lead: int
) -> tuple[dict[Any, Any], dict[str, Any]]:
    """The gradients that backward returned: by argument, and by parameter.

    Args:
        given: what backward returned.
        args: the arguments of forward.
        names: the names of these arguments.
        wanted: the parameters without a gradient beside them, by name.
        lead: the argument whose gradient comes first.

    Raises:
        NotUnderstoodError: if they cannot be assigned.
    """
    floating = sorted([i for i, arg in enumerate(args) if is_floating(arg)], key=lambda i: i != lead)
    if isinstance(given, dict):
        return _from_dict(given, names, floating, wanted)
    found = [] if given is None else list(given) if isinstance(given, tuple | list) else [given]
    dicts = [i for i, each in enumerate(found) if isinstance(each, dict)]
    if len(dicts) == 1 and wanted:
        dx, by_name = _from_dict(found.pop(dicts[0]), names, floating, wanted)
        return dict(zip(floating, found, strict=False)) | dx, by_name
    if len(found) == 2 and isinstance(found[1], list | tuple) and len(found[1]) == len(wanted):
        found = [found[0], *found[1]]
    if wanted and len(found) == len(floating) + len(wanted):
        return dict(zip(floating, found, strict=False)), dict(zip(wanted, found[len(floating) :], strict=True))
    if len(found) == len(wanted) and not floating:
        return {}, dict(zip(wanted, found, strict=True))
    if len(found) == len(args):
        places = range(len(args)) if lead == 0 else [lead, *[i for i in range(len(args)) if i != lead]]
        return {i: each for i, each in zip(places, found, strict=True) if each is not None and i in floating}, {}
    if any(isinstance(arg, list | tuple | dict) for arg in args):
        return {}, {}  # they may be gradients by arrays inside an argument, which are not checked
    if len(found) > max(len(floating), 1):
        raise NotUnderstoodError(
            f"backward() returned {len(found)} gradients for {len(floating)} floating arguments of forward()"
        )
    return {i: each for i, each in zip(floating, found, strict=False) if each is not None}, {}


def _from_dict(
    given: Mapping[Any, Any], names: Sequence[str], floating: Sequence[int], wanted: Mapping[str, Any]
) -> tuple[dict[int, Any], dict[str, Any]]:
    by_name, dx = {}, {}
    for key, value in given.items():
        match = [name for name in wanted if _belongs(key, name)]
        place = [i for i in floating if i < len(names) and _belongs(key, names[i])]
        if match:
            by_name[match[0]] = value
        elif place or (floating and _is_of_input(key)):
            dx[place[0] if place else floating[0]] = value
    if not by_name and not dx:
        raise NotUnderstoodError(
            f"backward() returned a dict with the keys {', '.join(map(repr, given))}: none is the name of a parameter or"
            " argument, or such a name with a leading d"
        )
    return dx, by_name


def _belongs(key: Any, name: str) -> bool:
    last = name.rpartition(".")[2]
    return key == last or (isinstance(key, str) and is_gradient_of(key, last))


def _is_of_input(name: Any) -> bool:
    """True for a name of the gradient by the input."""
    return isinstance(name, str) and any(is_gradient_of(name, of) for of in _INPUT)
