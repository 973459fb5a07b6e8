"""Networks in many styles: our optimizers train each as its own loop does, and the check finds its mistakes."""

import numpy as np
import pytest
from numpy_styles import Dicts, NamedGradients, StoredOutputs
from numpy_styles_caches import (
    CollectedCalls,
    ConditionalCaches,
    DictsOfAnyNames,
    RecurrentLayers,
    ReturnedCaches,
    SlotsAndRecords,
)
from numpy_styles_methods import ParamPairs, Returned, YieldedPairs
from numpy_styles_objects import Tensors, ValueObjects

import minitorch_jax as mt
from minitorch_jax import optim
from minitorch_jax.adapters.numpy import check_gradients, wrap

STYLES = [NamedGradients, Dicts, StoredOutputs, YieldedPairs, ParamPairs, Returned, Tensors, ValueObjects]
STYLES += [RecurrentLayers, ConditionalCaches, ReturnedCaches, DictsOfAnyNames, SlotsAndRecords, CollectedCalls]
MISTAKES = [
    pytest.param(style, mistake, id=f"{style.__name__}-{mistake}") for style in STYLES for mistake in style.mistakes
]


class NumPySGD:
    def __init__(self, lr):
        self.lr = lr

    def step(self, pairs):
        for param, grad in pairs:
            param -= self.lr * grad


class NumPyAdam:
    def __init__(self, lr):
        self.lr, self.t, self.moments = lr, 0, None

    def step(self, pairs):
        self.t += 1
        self.moments = self.moments or [(np.zeros_like(param), np.zeros_like(param)) for param, _ in pairs]
        for (param, grad), (m, v) in zip(pairs, self.moments, strict=True):
            m += (1 - 0.9) * (grad - m)
            v += (1 - 0.999) * (grad**2 - v)
            param -= self.lr * (m / (1 - 0.9**self.t)) / (np.sqrt(v / (1 - 0.999**self.t)) + 1e-8)


@pytest.mark.parametrize(("theirs", "ours", "lr"), [(NumPySGD, mt.Optimizer, 0.1), (NumPyAdam, optim.Adam, 0.01)])
@pytest.mark.parametrize("make", STYLES)
def test_twenty_steps_equal_those_of_its_own_loop(make, theirs, ours, lr):
    own, wrapped = make(), make()
    theirs, ours = theirs(lr), ours([wrap(wrapped.network, **make.options)], lr=lr)
    rng, losses = np.random.default_rng(0), []
    start = None
    for _ in range(20):
        x, target = own.data(rng)
        own.zero()
        loss = own.gradients(x, target)
        start = start or [param.copy() for param, _ in own.pairs()]
        theirs.step(own.pairs())
        ours.zero_grad()
        losses.append((loss, wrapped.gradients(x, target)))
        ours.step()
    exact = own.pairs()[0][0].dtype == np.float64
    # (Adam makes steps of up to 1e-9 from the roundings in a gradient that is zero: of a bias before batch norm)
    rtol, atol = (1e-7, 1e-8) if exact else (1e-4, 1e-5)
    np.testing.assert_allclose(*zip(*losses, strict=True), rtol=rtol)
    assert len(start) == len(own.pairs()) == len(wrapped.pairs())
    for before, (expected, _), (param, _) in zip(start, own.pairs(), wrapped.pairs(), strict=True):
        assert param.dtype == before.dtype
        np.testing.assert_allclose(param, expected, rtol, atol)
    assert np.abs(wrapped.pairs()[0][0] - start[0]).max() > 1e-3  # it trained


def checked(style):
    """The report on a style, with its loss if it has one."""
    x, target = style.data(np.random.default_rng(0))
    judged = {} if style.loss is None else {"loss": style.loss, "target": target}
    return check_gradients(style.network, x, **judged, **style.options)


@pytest.mark.one_in(8)
@pytest.mark.parametrize("make", STYLES)
def test_right_gradients_are_right(make):
    style = make()
    report = checked(style)
    assert report, str(report)
    assert {layer.state for layer in report.layers} == {"right"}, str(report)
    style.gradients(*style.data(np.random.default_rng(0)))
    compared = [each for layer in report.layers for each in layer.gradients if each.name != "input"]
    assert len([each for each in compared if each.error is not None]) >= len(style.pairs()), str(report)


@pytest.mark.one_in(9)
@pytest.mark.parametrize(("make", "mistake"), MISTAKES)
def test_each_mistake_is_found_where_it_is(make, mistake):
    where, names = make.mistakes[mistake]
    report = checked(make(mistake))
    path = f"layers.{where}" if isinstance(where, int) else where  # a list runs as a chain of layers
    assert not report
    assert report.wrong == [path], str(report)
    layer = report[path]
    compared = {name for name in names for each in layer.gradients if not each.ok and fits(each.name, name)}
    told = {name for name in names for problem in layer.problems if name in problem}
    assert compared | told == names, str(report)
    assert len([each for each in layer.gradients if not each.ok]) in (0, len(names)), str(report)


def fits(found, name):
    """True if a dotted path of a gradient names this array: `weight.data` names `weight`."""
    return f".{name}." in f".{found}."
