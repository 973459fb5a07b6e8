"""`mt.scan`: as the eager loop, as the compiled one, alone and within others; what it stacks, carries and refuses."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from training import (
    Boom,
    Line,
    Scale,
    X,
    Y,
    assert_alive,
    assert_same,
    assert_unchanged,
    everything,
    pair,
    squared,
    step,
    stream_state,
    within,
)

import minitorch_jax as mt
from minitorch_jax import nn, optim

XS = np.stack([X, X[::-1], 2 * X, -X, X + 1])
YS = np.stack([Y, Y, -Y, Y, 2 * Y])


@functools.cache
def eagerly(steps: int = 5) -> tuple[list[float], dict[str, Any]]:
    """Losses, and everything of model and optimizer, after the eager loop over the first batches."""
    model, opt = pair()
    losses = [float(step(model, opt, XS[i], YS[i])) for i in range(steps)]
    return losses, everything(model, opt)


def scanning(model: Any, opt: Any, **options: Any) -> Any:
    def train_step(x: Any, y: Any) -> Any:
        return step(model, opt, x, y)

    return lambda xs, ys: mt.scan(train_step, xs, ys, **options)


# -- the same as the loop ----------------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[Any, Any], Any]] = {
    "scan": scanning,
    "unroll": lambda m, o: scanning(m, o, unroll=2),
    "length": lambda m, o: scanning(m, o, length=5),
    "in jit": lambda m, o: mt.jit(scanning(m, o)),
    "in jit, as arguments": lambda m, o: functools.partial(mt.jit(lambda m, o, *data: scanning(m, o)(*data)), m, o),
    "of a jit": lambda m, o: functools.partial(mt.scan, mt.jit(lambda x, y: step(m, o, x, y))),
    "arguments": lambda m, o: functools.partial(mt.scan, step, m, o),
    "the optimizer alone": lambda m, o: functools.partial(mt.scan, lambda o, x, y: step(o.modules[0], o, x, y), o),
    "partial": lambda m, o: functools.partial(mt.scan, functools.partial(step, m, o)),
    "jit loop": lambda m, o: lambda xs, ys: jnp.stack(list(map(mt.jit(lambda x, y: step(m, o, x, y)), xs, ys))),
    "keep_grads": lambda m, o: scanning(m, o, keep_grads=True),
}


@pytest.mark.one_in(6)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_the_eager_loop(form: str) -> None:
    model, opt = pair()
    losses, expected = eagerly()
    assert_allclose(FORMS[form](model, opt)(XS, YS), losses, rtol=1e-5)
    assert_same(everything(model, opt), expected)
    assert int(model.count) == opt.num_steps == 5
    assert_alive(model, opt)


def test_scan_after_scan_and_among_other_forms() -> None:
    """Where one stops, the next goes on, whichever it is."""
    model, opt = pair()
    run, compiled = scanning(model, opt), mt.jit(step)
    losses = [*run(XS[:2], YS[:2]), step(model, opt, XS[2], YS[2]), *run(XS[3:4], YS[3:4])]
    losses.append(compiled(model, opt, XS[4], YS[4]))
    assert_allclose(losses, eagerly()[0], rtol=1e-5)
    assert_same(everything(model, opt), eagerly()[1])


def test_length_zero_and_one() -> None:
    model, opt = pair()
    step(model, opt, XS[0], YS[0])
    before, key, grads = everything(model, opt), stream_state(), [np.array(g) for g in model.grads()]
    run = scanning(model, opt)
    assert run(XS[:0], YS[:0]).shape == (0,)
    assert mt.jit(run)(XS[:0], YS[:0]).shape == (0,)
    assert_unchanged(before, model, opt)
    assert_array_equal(stream_state(), key)
    for mine, theirs in zip(model.grads(), grads, strict=True):
        assert_array_equal(mine, theirs)
    losses = run(XS[1:2], YS[1:2])
    assert losses.shape == (1,)
    assert_allclose(losses[0], eagerly(2)[0][1], rtol=1e-5)
    assert_same(everything(model, opt), eagerly(2)[1])


def test_one_program_for_equal_shapes() -> None:
    """A function that stays is compiled once, for any model of the structure."""
    traces = []

    def train_step(model: Any, opt: Any, x: Any, y: Any) -> Any:
        traces.append(1)
        return step(model, opt, x, y)

    mt.scan(train_step, *pair(), XS, YS)
    first = len(traces)
    for _ in range(3):
        model, opt = pair()
        mt.scan(train_step, model, opt, XS, YS)
    assert len(traces) == first
    assert_same(everything(model, opt), eagerly()[1])
    mt.scan(train_step, model, opt, XS[:3], YS[:3])
    assert len(traces) > first


# -- what goes in and comes out ----------------------------------------------------------------------------------------


class Batch(NamedTuple):
    x: Any
    y: Any


def test_pytrees_in_and_out() -> None:
    model, opt = pair()

    def train_step(batch: Any, scale: Any, name: str) -> Any:
        assert name == "name"
        loss = step(model, opt, batch["b"].x, batch["b"].y)
        return {"batch": Batch(loss, batch["i"] + 1), "sum": [(loss + 1, scale)], "none": None}

    out = mt.scan(train_step, {"b": Batch(XS, YS), "i": np.arange(5)}, jnp.ones((5, 2)), "name")
    losses = np.array(eagerly()[0])
    assert isinstance(out["batch"], Batch)
    assert_allclose(out["batch"].x, losses, rtol=1e-5)
    assert_array_equal(out["batch"].y, np.arange(1, 6))
    assert_allclose(out["sum"][0][0], losses + 1, rtol=1e-5)
    assert out["sum"][0][1].shape == (5, 2)
    assert out["none"] is None


def test_numbers_and_other_results_are_stacked() -> None:
    out = mt.scan(lambda x: (1, 2.5, True, np.int8(3), x.sum(), "text", None), np.ones((3, 2), np.float32))
    assert [np.asarray(part).tolist() for part in out[:4]] == [[1] * 3, [2.5] * 3, [True] * 3, [3] * 3]
    assert out[4].tolist() == [2.0] * 3
    assert out[5:] == ("text", None)
    assert mt.scan(lambda x: None, np.ones(3)) is None


def test_modules_as_results_are_themselves() -> None:
    model, opt = pair()
    same, other, weights = mt.scan(lambda m, x, y: (m, opt, (step(m, opt, x, y), m.weight)[1]), model, XS, YS)
    assert same is model
    assert other is opt
    assert weights.shape == (5, 3)
    assert_allclose(weights[-1], model.weight, rtol=1e-6)


def test_stacked_parameters_are_the_trajectory() -> None:
    """What is returned stays valid, and is no parameter's buffer."""
    model = Scale(0.0)
    opt = mt.Optimizer([model], lr=1.0)

    def train_step(x: Any) -> Any:
        before = model.weight
        opt.zero_grad()
        mt.backward(model, x)
        opt.step()
        return before, model.weight, model.grads()[0]

    x = jnp.arange(4.0)
    before, after, grads = mt.scan(train_step, x)
    assert_array_equal(before, [0.0, 0.0, -1.0, -3.0])
    assert_array_equal(after, [0.0, -1.0, -3.0, -6.0])
    assert_array_equal(grads, x)
    mt.scan(train_step, x)
    assert_array_equal(after, [0.0, -1.0, -3.0, -6.0])
    assert not x.is_deleted()


def test_length_without_arrays() -> None:
    scale = Scale(1.0)

    def grow() -> Any:
        scale.weight = scale.weight * 2.0
        return scale.weight

    assert_array_equal(mt.scan(grow, length=3), [2.0, 4.0, 8.0])
    assert float(scale.weight) == 8.0
    assert_array_equal(mt.scan(lambda s: s.weight, scale, length=2), [8.0, 8.0])


def test_a_scan_in_a_scan() -> None:
    scale = Scale(1.0)

    def inner(x: Any) -> Any:
        scale.weight = scale.weight + x
        return scale.weight

    out = mt.scan(lambda row: mt.scan(inner, row), jnp.ones((2, 3)))
    assert_array_equal(out, [[2.0, 3.0, 4.0], [5.0, 6.0, 7.0]])
    assert float(scale.weight) == 7.0


# -- gradients ---------------------------------------------------------------------------------------------------------


class Cell(mt.Module):
    """A recurrent network of one matrix."""

    def __init__(self) -> None:
        self.weight = mt.Parameter(jnp.linspace(-0.5, 0.5, 9).reshape(3, 3))
        self.calls = mt.Buffer(0)

    def forward(self, h: Any, x: Any) -> Any:
        self.calls = self.calls + 1
        return jnp.tanh(h @ self.weight + x)


class State(mt.Module):
    """What a scan over time carries."""

    def __init__(self) -> None:
        self.h = mt.Buffer(jnp.zeros(3))


def unrolled(cell: Any, xs: Any) -> Any:
    h, total = jnp.zeros(3), 0.0
    for x in xs:
        h = cell(h, x)
        total += (h**2).sum()
    return total


def scanned(cell: Any, xs: Any) -> Any:
    state = State()

    def tick(x: Any) -> Any:
        state.h = cell(state.h, x)
        return (state.h**2).sum()

    return mt.scan(tick, xs).sum()


@pytest.mark.parametrize("form", ["backward", "value_and_grad", "jit"])
def test_a_recurrent_network(form: str) -> None:
    """The gradient through a scan over time is that of the loop laid out."""
    results = []
    for loss_fn in (unrolled, scanned):
        cell = Cell()
        if form == "value_and_grad":
            loss, grads = mt.value_and_grad(loss_fn)(cell, X)
            grad = grads.weight
        else:
            backward = functools.partial(mt.backward, loss_fn)
            loss = (mt.jit(lambda cell, x, f=backward: f(cell, x)) if form == "jit" else backward)(cell, X)
            grad = cell.grads()[0]
        results.append((float(loss), np.array(grad)))
        assert int(cell.calls) == len(X)
    assert_allclose(results[1][0], results[0][0], rtol=1e-5)
    assert_allclose(results[1][1], results[0][1], rtol=1e-4, atol=1e-6)
    assert np.abs(results[0][1]).max() > 0.1


def gathering(loss_fn: Any, model: Any) -> Any:
    return lambda x, y: mt.backward(loss_fn, model, x, y)


def test_micro_batches() -> None:
    """Gradients add up over a scan, a step takes them; before and after it is eager code."""
    model, opt = pair()
    expected, opt2 = pair()
    gather = gathering(squared, model)
    for _ in range(3):
        opt.zero_grad()
        losses = mt.scan(gather, XS, YS)
        opt2.zero_grad()
        for i in range(5):
            assert_allclose(losses[i], mt.backward(squared, expected, XS[i], YS[i]), rtol=1e-5)
        for mine, theirs in zip(model.grads(), expected.grads(), strict=True):
            assert_allclose(mine, theirs, rtol=1e-5)
        opt.step()
        opt2.step()
    assert_same(everything(model, opt), everything(expected, opt2))


def test_micro_batches_within_a_jit() -> None:
    model, opt = pair()
    expected, opt2 = pair()

    @mt.jit
    def train_step(xs: Any, ys: Any) -> Any:
        opt.zero_grad()
        losses = mt.scan(gathering(squared, model), xs, ys)
        opt.step()
        return losses.mean()

    for _ in range(2):
        loss = train_step(XS, YS)
        opt2.zero_grad()
        assert_allclose(
            loss, np.mean([mt.backward(squared, expected, x, y) for x, y in zip(XS, YS, strict=True)]), rtol=1e-5
        )
        opt2.step()
    assert_same(everything(model, opt), everything(expected, opt2))


def test_gradients_that_were_there_before() -> None:
    """From eager code, from a scan before, and none: they add up, over lengths 0, 1 and more."""
    model = Scale(1.0)
    gather = lambda x: mt.backward(model, x)
    mt.backward(model, 10.0)
    for xs, total in (([1.0, 2.0], 13.0), ([], 13.0), ([4.0], 17.0)):
        mt.scan(gather, np.array(xs, np.float32))
        assert float(model.grads()[0]) == total
    model.zero_grad()
    mt.scan(gather, np.array([], np.float32))
    assert float(model.grads()[0]) == 0.0
    mt.scan(gather, np.array([1.0, 2.0], np.float32))
    assert float(model.grads()[0]) == 3.0


BEFORE = ["none", "array", "consumed"]
WITHIN = {
    "zeroed": lambda m: m.zero_grad(),
    "renewed": lambda m: (m.zero_grad(), mt.backward(lambda m: m(3.0), m)),
    "added": lambda m: mt.backward(lambda m: m(5.0), m),
    "read, zeroed": lambda m: (mt.next_key(), m.grads()[0] + 0, m.zero_grad()),
    "zeroed, added, zeroed": lambda m: (m.zero_grad(), mt.backward(lambda m: m(3.0), m), m.zero_grad()),
    "untouched": lambda m: m(1.0),
}


@functools.cache
def gradients_after(form: str, packed: bool = False) -> dict[tuple[str, str], float]:
    """Of one model for each gradient that it may have at first and each thing to do with it: the gradient after 3 steps."""
    fits = [(b, w) for b in BEFORE for w in WITHIN if b != "consumed" or w not in ("added", "read, zeroed")]
    models = {case: Scale() for case in fits}
    if packed:
        for before in BEFORE:
            mt.pack(*(m for case, m in models.items() if case[0] == before))
    used_up = [m for case, m in models.items() if case[0] == "consumed"]
    opt = mt.Optimizer(used_up, lr=0.0)

    @mt.jit
    def use_up() -> None:
        opt.zero_grad()
        mt.backward(lambda *models: sum(m(2.0) for m in models), *used_up)
        opt.step()

    use_up()
    for case, model in models.items():
        if case[0] == "array":
            mt.backward(lambda m: m(7.0), model)

    def body() -> None:
        for case, model in models.items():
            WITHIN[case[1]](model)

    {
        "loop": lambda: [body() for _ in range(3)],
        "scan": lambda: mt.scan(body, length=3),
        "scan in jit": mt.jit(lambda: mt.scan(body, length=3)),
        "scan in scan": lambda: mt.scan(lambda: mt.scan(body, length=1), length=3),
        "no steps": lambda: mt.scan(body, length=0),
    }[form]()
    lost = {("consumed", "untouched")} if form != "no steps" else {case for case in fits if case[0] == "consumed"}
    for case in lost:
        with pytest.raises(RuntimeError, match="used up"):
            models[case].grads()[0].item()
    return {case: models[case].grads()[0].item() for case in fits if case not in lost}


@pytest.mark.one_in(8)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", ["scan", "scan in jit", "scan in scan"])
def test_whatever_becomes_of_gradients_left_from_before_is_what_the_loop_does(form: str, packed: bool) -> None:
    assert gradients_after(form, packed) == gradients_after("loop")


def test_a_scan_of_no_steps_leaves_every_gradient_as_it_was() -> None:
    assert gradients_after("no steps") == {case: 7.0 * (case[0] == "array") for case in gradients_after("no steps")}


@pytest.mark.parametrize("form", ["scan", "scan in jit"])
def test_two_models_trained_in_turns(form: str) -> None:
    """As in a GAN: each step zeroes the gradients of both, and gives one of them new ones."""

    def both(run: Any) -> list[Any]:
        a, b = Scale(2.0), Scale(3.0)
        opts = optim.SGD([a], lr=0.1, momentum=0.9), optim.SGD([b], lr=0.2)
        opt = optim.SGD([a, b], lr=0.1)

        def body(x: Any) -> Any:
            losses = []
            for one in opts:
                opt.zero_grad()
                losses.append(mt.backward(lambda m, x: (m(x) - 1) ** 2, one.modules[0], x))
                one.step()
            return losses

        for model in (a, b):
            mt.backward(lambda m: m(1.0), model)
        run(body, jnp.array([1.0, 0.5, 2.0]))
        return [np.array(a.weight), np.array(b.weight), np.array(a.grads()[0]), opts[0].num_steps]

    def scan(body: Any, xs: Any) -> Any:
        return mt.jit(lambda xs: mt.scan(body, xs))(xs) if form == "scan in jit" else mt.scan(body, xs)

    scanned = both(scan)
    for mine, theirs in zip(scanned, both(lambda body, xs: [body(x) for x in xs]), strict=True):
        assert_allclose(mine, theirs, rtol=1e-5)


def test_steps_without_zero_grad() -> None:
    """Within the scan gradients go on adding up from step to step."""

    def run(form: Any) -> Any:
        model = Scale(0.0)
        opt = mt.Optimizer([model], lr=1.0)
        mt.backward(model, 1.0)

        def train_step(x: Any) -> Any:
            mt.backward(model, x)
            opt.step()
            return model.weight

        return form(train_step), model.grads()[0]

    xs = np.array([1.0, 2.0, 3.0], np.float32)
    weights, grad = run(lambda fn: mt.scan(fn, xs, keep_grads=True))
    assert (weights.tolist(), float(grad)) == ([-2.0, -6.0, -13.0], 7.0)
    weights, grad = run(lambda fn: jnp.stack([fn(x) for x in xs]))
    assert (weights.tolist(), float(grad)) == ([-2.0, -6.0, -13.0], 7.0)


def test_reading_gradients_within() -> None:
    """Of the step before, too: zeros at the first."""
    model = Scale(0.0)
    opt = mt.Optimizer([model], lr=1.0)

    def train_step(x: Any) -> Any:
        last = model.grads()[0]
        opt.zero_grad()
        mt.backward(model, x)
        opt.step()
        return last

    assert mt.scan(train_step, np.array([1.0, 2.0, 3.0], np.float32)).tolist() == [0.0, 1.0, 2.0]
    assert float(model.grads()[0]) == 3.0


def test_keep_grads() -> None:
    model, opt = pair()
    scanning(model, opt)(XS, YS)
    with pytest.raises(RuntimeError, match=r"(?s)compiled by mt\.jit \(or mt\.scan\).*keep_grads=True.*zero_grad\(\)"):
        model.grads()[0]
    with pytest.raises(RuntimeError, match="keep_grads=True"):
        mt.backward(squared, model, X, Y)
    opt.zero_grad()
    assert not np.any(model.grads()[0])
    model, opt = pair()
    expected, opt2 = pair()
    scanning(model, opt, keep_grads=True)(XS, YS)
    for x, y in zip(XS, YS, strict=True):
        step(expected, opt2, x, y)
    for mine, theirs in zip(model.grads(), expected.grads(), strict=True):
        assert_allclose(mine, theirs, rtol=1e-5)


# -- what is carried ---------------------------------------------------------------------------------------------------


def test_the_random_stream_advances_as_in_the_loop() -> None:
    draw = lambda x: x + jax.random.normal(mt.next_key(), x.shape)
    mt.seed(4)
    expected = [np.array(draw(x)) for x in XS]
    end = stream_state()
    mt.seed(4)
    assert_allclose(mt.scan(draw, XS), expected, rtol=1e-6)
    assert_array_equal(stream_state(), end)
    with mt.rng(1):
        first = mt.scan(draw, XS)
    with mt.rng(jax.random.key(1)):
        assert_array_equal(mt.scan(draw, XS), first)
    assert_array_equal(stream_state(), end)


def test_a_schedule_and_lr_set_within() -> None:
    model = Scale(0.0)
    opt = mt.Optimizer([model], lr=lambda t: 0.5 ** jnp.float32(t))

    def train_step(x: Any) -> Any:
        opt.zero_grad()
        mt.backward(model, x)
        opt.step()

    mt.scan(train_step, np.ones(4, np.float32))
    assert_allclose(float(model.weight), -1.875, rtol=1e-6)
    opt = mt.Optimizer([model], lr=1.0)

    def halve(x: Any) -> Any:
        opt.lr = opt.lr * x
        return opt.lr

    assert mt.scan(halve, np.full(3, 0.5, np.float32)).tolist() == [0.5, 0.25, 0.125]
    assert float(opt.lr) == 0.125


def test_skip_nonfinite() -> None:
    model, opt = pair(skip_nonfinite=True)
    expected, opt2 = pair(skip_nonfinite=True)
    xs = XS.copy()
    xs[2] = np.nan
    scanning(model, opt)(xs, YS)
    for x, y in zip(xs, YS, strict=True):
        step(expected, opt2, x, y)
    assert (opt.num_steps, opt.skipped) == (4, 1)
    assert_same(everything(model, opt), everything(expected, opt2))


def test_frozen_parameters_and_parameters_that_are_only_read() -> None:
    model = nn.Sequential(nn.Linear(3, 2, key=jax.random.key(0)), nn.Linear(2, 1, key=jax.random.key(1)))
    model[0].freeze()
    opt = optim.SGD([model], lr=0.1, momentum=0.9)
    before = np.array(model[0].weight)
    reference = nn.Linear(3, 1, key=jax.random.key(2))
    reference_before = everything(reference)

    def train_step(x: Any) -> Any:
        opt.zero_grad()
        loss = mt.backward(lambda x: ((model(x) - reference(x)) ** 2).mean(), x)
        opt.step()
        return loss

    def eagerly() -> Any:
        return [float(train_step(x)) for x in XS]

    reference.freeze()
    losses = mt.scan(train_step, XS)
    assert_array_equal(model[0].weight, before)
    assert_unchanged(reference_before, reference)
    scanned_weight = np.array(model[1].weight)
    model[1] = nn.Linear(2, 1, key=jax.random.key(1))
    opt = optim.SGD([model], lr=0.1, momentum=0.9)
    loss_fn = lambda x: ((model(x) - reference(x)) ** 2).mean()
    expected = []
    for x in XS:
        opt.zero_grad()
        expected.append(float(mt.backward(loss_fn, x)))
        opt.step()
    assert_allclose(losses, expected, rtol=1e-5)
    assert_allclose(scanned_weight, model[1].weight, rtol=1e-5)


# -- plain JAX transforms ----------------------------------------------------------------------------------------------


def test_inside_a_plain_jit() -> None:
    model, opt = pair()
    run = lambda opt, xs, ys: (opt, scanning(opt.modules[0], opt)(xs, ys))
    new, losses = jax.jit(run)(opt, XS, YS)
    assert_allclose(losses, eagerly()[0], rtol=1e-5)
    assert_same(everything(new.modules[0], new), eagerly()[1])
    assert opt.num_steps == 0
    with pytest.raises(mt.TraceError, match=r"(?s)inside a JAX transform.*jax\.jit\(step\)\(opt, x, y\).*mt\.jit"):
        jax.jit(scanning(model, opt))(XS, YS)
    assert opt.num_steps == 0
    assert_alive(model, opt)


class Loader:
    """Gives batches, as torch's DataLoader does."""

    def __iter__(self):
        return iter([np.ones(3)])


# -- errors ------------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "no axis": (lambda: 1, (), {}, ValueError, "one leading axis common to all its arrays, or a length; got no arrays"),
    "differing": (
        lambda x, y: x,
        (np.ones((3, 2)), np.ones(4)),
        {},
        ValueError,
        r"one leading axis common to all its arrays.*got \(3, 2\), \(4,\)",
    ),
    "length": (lambda x: x, (np.ones(3),), {"length": 4}, ValueError, r"got \(3,\) and length=4"),
    "scalar": (lambda x, y: x, (np.ones(3), 2.0), {}, ValueError, "leading axis, and a scalar has none: capture it"),
    "loader": (lambda x: 1, (Loader(),), {"length": 2}, TypeError, "given a Loader. Stack what it gives"),
    "array scalar": (lambda x: x, (jnp.ones(()),), {}, ValueError, "leading axis, and a scalar has none"),
    "no function": (3, (np.ones(3),), {}, TypeError, "mt.scan takes a function, not 3"),
    "too few arguments": (lambda x, y: x, (np.ones(3),), {}, TypeError, "missing 1 required positional argument"),
    "negative length": (lambda: 1, (), {"length": -1}, ValueError, "(?i)length"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name: str) -> None:
    fn, args, options, error, message = WRONG[name]
    for scan in (mt.scan, mt.jit(lambda *args: mt.scan(fn, *args, **options)) if callable(fn) else mt.scan):
        with pytest.raises(error, match=message):
            scan(fn, *args, **options) if scan is mt.scan else scan(*args)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("within", [False, True], ids=["alone", "in jit"])
@pytest.mark.parametrize("where", ["start", "end", "shape", "static"])
def test_an_exception_changes_nothing(where: str, within: bool) -> None:
    model, opt = pair()
    fails = [True]

    def train_step(x: Any, y: Any) -> Any:
        if fails[0] and where == "start":
            raise Boom("on purpose")
        mt.next_key()
        loss = step(model, opt, x, y)
        if fails[0] and where == "end":
            raise Boom("on purpose")
        if fails[0] and where == "shape":
            model.weight = jnp.zeros(4)
        if fails[0] and where == "static":
            model.eval()
        return loss

    run = lambda xs, ys: mt.scan(train_step, xs, ys)
    run = mt.jit(run) if within else run
    before, key = everything(model, opt), stream_state()
    error, message = {
        "shape": (ValueError, r"weight is float32\[3\]"),
        "static": (mt.TraceError, "Line.training was changed"),
    }.get(where, (Boom, "on purpose"))
    for _ in range(2):
        with pytest.raises(error, match=message):
            run(XS, YS)
        assert_unchanged(before, model, opt)
        assert_array_equal(stream_state(), key)
        assert_alive(model, opt)
        assert model.training
        assert not any(np.any(g) for g in model.grads())
    fails[0] = False
    run(XS, YS)
    assert_same(everything(model, opt), eagerly()[1])


def test_modules_made_inside_are_stacked() -> None:
    """Gradients of each step, say: a module whose arrays have one more axis."""
    model = Line()
    with within(60):
        out = mt.scan(lambda m, x, y: mt.grad(squared)(m, x, y), model, XS, YS)
    assert out.weight.shape == (5, 3)
    assert_allclose(out.weight[1], mt.grad(squared)(Line(), XS[1], YS[1]).weight, rtol=1e-5)
    assert_alive(out, model)


def test_what_a_function_closed_over_is_freed_with_it() -> None:
    def train() -> Any:
        model, opt = pair()
        mt.scan(lambda x: step(model, opt, x, Y), np.stack([X] * 2))
        return weakref.ref(model)

    reference = train()
    gc.collect()
    assert reference() is None
