"""One program for one structure: what compiles again and what does not, how it is explained, and threads."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from training import Line, Scale, X, Y, assert_same, compilations, eagerly, everything, mean_square, pair, squared, step

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.engine.compiled_function import Function
from minitorch_jax.engine.names import modules as named_modules
from minitorch_jax.engine.recompiles import RecompileWarning
from minitorch_jax.state.walk import walk_of


def fresh_step() -> Any:
    """A compiled step that has no programs yet."""

    def train_step(model: Any, opt: Any, x: Any, y: Any) -> Any:
        return step(model, opt, x, y)

    return mt.jit(train_step)


def warned(call: Callable[[], Any]) -> list[str]:
    """The RecompileWarnings that a call gives; anything else is an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(issubclass(w.category, RecompileWarning) for w in caught), caught
    return [str(w.message) for w in caught]


# -- what does not compile again ---------------------------------------------------------------------------------------


def test_a_hundred_trials_compile_once() -> None:
    trials = [pair(1.0 + i / 100, lr=0.1 / (i + 1), momentum=0.5 + i / 300) for i in range(100)]
    compiled = fresh_step()
    with compilations() as found:
        losses = [float(compiled(model, opt, X, Y)) for model, opt in trials]
        losses = [float(compiled(model, opt, X, Y)) for model, opt in trials]
    assert compiled.num_compiles == 1
    assert len(found) == 1, found
    assert len(set(losses)) == 100
    for i in (0, 57, 99):
        model, opt = pair(1.0 + i / 100, lr=0.1 / (i + 1), momentum=0.5 + i / 300)
        step(model, opt, X, Y)
        assert_allclose(losses[i], float(step(model, opt, X, Y)), rtol=1e-5)
        assert_same(everything(*trials[i]), everything(model, opt))


def test_a_hundred_trials_by_attribute_compile_once() -> None:
    """By closure, too, if the name stays."""
    now = types.SimpleNamespace(model=None, opt=None)
    compiled = mt.jit(lambda x, y: step(now.model, now.opt, x, y))
    with compilations() as found:
        for _ in range(100):
            now.model, now.opt = pair()
            compiled(X, Y)
    assert compiled.num_compiles == 1
    assert sum("lambda" in about for about in found) <= 1
    assert_same(everything(now.model, now.opt), eagerly(1)[1])


def test_backward_and_step_of_a_hundred_trials() -> None:
    def fresh_loss(model: Any, x: Any, y: Any) -> Any:
        return squared(model, x, y)

    trials = [pair(1.0 + i / 100) for i in range(100)]
    step(*trials[0], X, Y)
    with compilations() as found:
        for model, opt in trials:
            opt.zero_grad()
            mt.backward(fresh_loss, model, X, Y)
            opt.step()
    assert len(found) == 1, found  # the loss; the step was compiled above


def test_no_hyperparameter_and_no_value_compiles_again() -> None:
    model, opt = pair()
    compiled = fresh_step()
    for kind in (float, np.float32, np.float64, jnp.float32, lambda lr: jnp.asarray(lr), lambda lr: np.array(lr)):
        opt.lr = kind(0.1)
        compiled(model, opt, X, Y)
    opt.lr = 0
    compiled(model, opt, X, Y)
    with compilations() as found:
        for i in range(100):
            opt.lr = 0.1 / (i + 1)
            opt.momentum = 0.9 - i / 200
            opt.dampening = i / 1000
            opt.weight_decay = i / 1e5
            compiled(model, opt, X + np.float32(i), Y)
    assert compiled.num_compiles == 1
    assert not found


def test_values_that_come_from_anywhere() -> None:
    """Loaded, copied, read, replaced, gradients there or not: it is the structure that counts."""
    model, opt = pair()
    compiled = fresh_step()
    compiled(model, opt, X, Y)
    states = model.state_dict(), opt.state_dict()
    for change in (
        lambda: model.load_state_dict(states[0]),
        lambda: opt.load_state_dict(states[1]),
        lambda: [np.asarray(p) for p in model.parameters()],
        lambda: setattr(model, "weight", np.ones(3, np.float32)),
        lambda: opt.zero_grad(),
        lambda: opt.zero_grad() or mt.backward(squared, model, X, Y),
        lambda: step(model, opt, X, Y),
        lambda: model.freeze() and model.unfreeze(),
        lambda: model.eval() and model.train(),
        lambda: jax.tree.map(jnp.copy, opt),
    ):
        change()
        compiled(model, opt, X, Y)
    for copied in (copy.deepcopy(opt), jax.tree.map(jnp.copy, opt)):
        compiled(copied.modules[0], copied, X, Y)
    for x in (X, jnp.asarray(X), X.copy(order="F"), X[::-1]):
        compiled(model, opt, x, Y)
    assert compiled.num_compiles == 1


def test_scalars_of_each_kind_are_one_program() -> None:
    compiled = mt.jit(lambda scale, x: scale(x))
    for value in (1.0, 2.0, -3.0, float("inf")):
        assert float(compiled(Scale(2.0), value)) == 2 * value
    assert compiled.num_compiles == 1
    for value in (np.float32(1), jnp.float32(2)):
        compiled(Scale(2.0), value)
    assert compiled.num_compiles == 2


# -- what does ---------------------------------------------------------------------------------------------------------


class Activated(mt.Module):
    def __init__(self, size: int = 2, act: str = "tanh", parts: int = 1) -> None:
        self.weight = mt.Parameter(jnp.ones(size))
        self.parts = [Scale() for _ in range(parts)]
        self.act = act

    def forward(self, x: Any) -> Any:
        y = getattr(jnp, self.act)(self.weight.sum() * x)
        for part in self.parts:
            y = part(y)
        return y


def test_each_structure_compiles_once() -> None:
    def fn(model: Any, x: Any) -> Any:
        return model(x)

    compiled, counts = mt.jit(fn), []
    model = Activated()
    variants: list[Callable[[], Any]] = [
        lambda: compiled(model, 1.0),
        lambda: compiled(model.eval(), 1.0),
        lambda: compiled(Activated(act="sin"), 1.0),
        lambda: compiled(Activated(3), 1.0),
        lambda: compiled(Activated(), np.ones(2, np.float32)),
    ]
    for _ in range(3):
        for variant in variants:
            variant()
            model.train()
            counts.append(compiled.num_compiles)
    assert counts == [1, 2, 3, 4, 5, *[5] * 10]


def test_dtypes_and_changed_attributes() -> None:
    compiled = mt.jit(lambda model, x: model(x))
    model = Activated()
    results = []
    for act in ("tanh", "sin", "tanh", "sin"):
        model.act = act
        results.append(float(compiled(model, 1.0)))
    assert_allclose(results, [2 * np.tanh(2), 2 * np.sin(2)] * 2, rtol=1e-5)
    assert compiled.num_compiles == 2
    assert compiled(Scale(2.0), 1.0).dtype == jnp.float32
    assert compiled(Scale(2.0).astype(jnp.bfloat16), jnp.bfloat16(1)).dtype == jnp.bfloat16
    assert compiled.num_compiles == 4


def test_sharing_is_structure() -> None:
    """One object given twice, and two objects: different programs, each with the right results."""

    def fn(a: Any, b: Any) -> Any:
        a.weight = a.weight + 1.0
        b.weight = b.weight * 2.0

    compiled = mt.jit(fn)
    for _ in range(2):
        one, two, three = Scale(1.0), Scale(1.0), Scale(5.0)
        compiled(one, one)
        compiled(two, three)
        assert [float(m.weight) for m in (one, two, three)] == [4.0, 2.0, 10.0]
    assert compiled.num_compiles == 2


def test_an_optimizer_of_another_model() -> None:
    (a, opt_a), (b, opt_b) = pair(), pair()
    before = everything(a)

    def fn(model: Any, opt: Any, x: Any, y: Any) -> Any:
        opt.zero_grad()
        mt.backward(squared, model, x, y)
        mt.backward(squared, opt.modules[0], x, y)
        opt.step()

    compiled = mt.jit(fn)
    compiled(a, opt_b, X, Y)
    assert_array_equal(a.weight, before["0.weight"])
    assert_same(everything(b, opt_b), eagerly(1)[1])
    assert np.any(a.grads()[0])
    compiled(a, opt_a, X, Y)
    assert compiled.num_compiles == 2
    assert int(a.count) == 3


# -- explanations ------------------------------------------------------------------------------------------------------


def test_the_sixth_program_is_explained() -> None:
    """In these words."""

    def step(scale: Any, x: Any) -> Any:
        return scale(x.sum())

    compiled, scale = mt.jit(step), Scale()
    for rows in (2, 3, 4, 5, 32):
        assert warned(lambda rows=rows: compiled(scale, np.ones((rows, 7), np.float32))) == []
    with pytest.warns(
        RecompileWarning, match=r"^step compiled again: x went from float32\[32,7\] to float32\[17,7\]"
    ) as caught:
        compiled(scale, np.ones((17, 7), np.float32))
    assert [record.filename for record in caught] == [__file__]
    assert warned(lambda: compiled(scale, np.ones((17, 7), np.float32))) == []
    (message,) = warned(lambda: compiled(scale, np.ones((18, 7), np.float32)))
    assert message.startswith("step compiled again: x went from float32[17,7] to float32[18,7]")
    assert compiled.num_compiles == 7


def test_all_data_arguments_are_named() -> None:
    compiled = mt.jit(lambda *args, **data: jax.tree.map(lambda a: a + 1, (args, data)))
    for n in range(1, 6):
        compiled(np.ones(n), {"a": [np.ones(n)]}, deep={"b": (np.ones(n, np.int32),)})
    calls = {
        r"args\[0\] went from float\d+\[5\] to float\d+\[6\]": (
            (np.ones(6), {"a": [np.ones(5)]}),
            np.ones(5, np.int32),
        ),
        r"args\[1\]\['a'\]\[0\] went from float\d+\[5\] to float\d+\[7\]": (
            (np.ones(5), {"a": [np.ones(7)]}),
            np.ones(5, np.int32),
        ),
        r"deep\['b'\]\[0\] went from int32\[5\] to float32\[5\]": (
            (np.ones(5), {"a": [np.ones(5)]}),
            np.ones(5, np.float32),
        ),
    }
    for message, (args, inner) in calls.items():
        with pytest.warns(RecompileWarning, match=message):
            compiled(*args, deep={"b": (inner,)})


def explained(change: Callable[[Any], Any], *args: Any) -> str:
    """The message for a sixth program that differs from the fifth by `change`."""

    def train_step(model: Any, x: Any, name: str = "name") -> Any:
        return model(x.sum().astype(model.weight.dtype))

    compiled, model = mt.jit(train_step), Activated()
    for n in range(1, 6):
        compiled(model, np.ones(n, np.float32))
    again = change(model)
    (message,) = warned(
        lambda: compiled(again if isinstance(again, mt.Module) else model, np.ones(5, np.float32), *args)
    )
    assert message.startswith("train_step compiled again: ")
    return message.removeprefix("train_step compiled again: ")


STRUCTURE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "training": (lambda m: vars(m).update() or setattr(m, "training", False), "model.training went from True to False"),
    "attribute": (lambda m: setattr(m, "act", "sin"), "model.act went from 'tanh' to 'sin'"),
    "shape": (lambda m: Activated(3), "model.weight went from float32[2] to float32[3]"),
    "dtype": (lambda m: Activated().astype(jnp.float16), "model.weight went from float32[2] to float16[2]"),
    "frozen": (lambda m: m.parts[0].freeze() and None, "model.parts.0.weight went from float32[] to float32[], frozen"),
    "more": (lambda m: m.parts.append(Scale()), "len(model.parts) went from 1 to 2"),
    "class": (lambda m: Scale(), "went from Activated to Scale"),
}


@pytest.mark.one_in(6)
@pytest.mark.parametrize("name", STRUCTURE)
def test_changes_of_structure_are_explained(name: str) -> None:
    change, message = STRUCTURE[name]
    assert message in explained(change)


def test_a_static_argument_is_explained() -> None:
    assert explained(lambda m: None, "other").startswith("name ")


def test_an_optimizers_structure_is_explained() -> None:
    def fn(opt: Any, x: Any) -> Any:
        return opt.lr * x.sum().astype(jnp.float32)

    compiled = mt.jit(fn)
    for n in range(1, 6):
        compiled(pair()[1], np.ones(n))
    (message,) = warned(lambda: compiled(pair(nesterov=True)[1], np.ones(5)))
    assert message.startswith("fn compiled again: opt.nesterov went from False to True.")
    (message,) = warned(lambda: compiled(pair(skip_nonfinite=True)[1], np.ones(5)))
    assert message.startswith("fn compiled again: opt.skip_nonfinite went from False to True")


def test_a_model_by_closure_is_explained() -> None:
    model = Line()
    compiled = mt.jit(lambda x: model(x))
    for n in range(1, 6):
        compiled(X[:1].repeat(n, 0))
    model.eval()
    with pytest.warns(RecompileWarning, match=r"Line\.training went from True to False"):
        compiled(X[:1].repeat(5, 0))


def test_settings_are_explained() -> None:
    model = Scale()
    compiled = mt.jit(lambda model, x: model(x.sum()))
    for n in range(1, 6):
        compiled(model, np.ones(n, np.float32))
    with (
        jax.default_matmul_precision("highest"),
        pytest.warns(RecompileWarning, match="arguments are as they were.*settings"),
    ):
        compiled(model, np.ones(5, np.float32))


def test_backward_is_explained_per_model() -> None:
    def my_loss(model: Any, x: Any) -> Any:
        return model(x.sum())

    model = Scale()
    for n in range(1, 6):
        assert warned(lambda n=n: mt.backward(my_loss, model, np.ones(n, np.float32))) == []
    with pytest.warns(
        RecompileWarning, match=r"my_loss compiled again: x went from float32\[5\] to float32\[6\]"
    ) as got:
        mt.backward(my_loss, model, np.ones(6, np.float32))
    assert [record.filename for record in got] == [__file__]


def test_one_loss_for_many_models_is_no_cause_for_a_warning() -> None:
    def my_loss(model: Any, x: Any) -> Any:
        return model(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error", RecompileWarning)
        for size in range(1, 9):
            mt.backward(my_loss, Activated(size), 1.0)
        model = Activated()
        for _ in range(3):
            for training in (True, False):
                model.train(training)
                mt.backward(my_loss, model, 1.0)


def test_a_loss_made_anew_at_each_call_compiles_once() -> None:
    model, scale = Scale(), jnp.float32(2.0)

    def call() -> Any:
        model.zero_grad()
        return mt.backward(lambda x: model(x) * scale, 1.0)

    with compilations() as found:
        assert [warned(call) for _ in range(8)] == [[]] * 8
    assert len(found) == 1


def test_a_number_in_a_loss_made_anew_at_each_call_is_explained() -> None:
    """From the second time on, and then less and less often."""
    model = Scale()

    def call(scale: float) -> Any:
        model.zero_grad()
        return mt.backward(lambda x: model(x) * scale, 1.0)

    messages = [warned(lambda i=i: call(float(i))) for i in range(26)]
    assert [i + 1 for i, found in enumerate(messages) if found] == [3, 4, 5, 6, 7, 12, 24]
    assert "scale went from 1.0 to 2.0. The code reads it by name" in messages[2][0]
    assert "scale went from 4.0 to 5.0. It has 6 programs" in messages[5][0]


def test_a_compiled_function_made_anew_at_each_call_compiles_once() -> None:
    model = Scale()

    def call() -> Any:
        compiled = mt.jit(lambda model, x: model(x))
        compiled(model, 1.0)
        assert compiled.num_compiles == 1

    with compilations() as found:
        assert [warned(call) for _ in range(7)] == [[]] * 7
    assert len(found) == 1


def test_functions_of_different_models_are_no_cause_for_a_warning() -> None:
    """A factory that makes a loss for each model, all of which stay or none of which is used again."""
    kept = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", RecompileWarning)
        for _ in range(8):
            model = Scale()
            loss_fn = lambda x, model=model: model(x)  # noqa: E731
            mt.backward(loss_fn, 1.0)
            kept.append((model, loss_fn))
        for i in range(8):
            model = Scale(float(i))
            mt.backward(lambda x, model=model: model(x), 1.0)


# -- threads -----------------------------------------------------------------------------------------------------------


def at_once(works: list[Callable[[], Any]]) -> list[Any]:
    """The results of some functions run in threads that switch as often as Python can."""
    results: list[Any] = [None] * len(works)
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(works))

    def run(i: int) -> None:
        try:
            barrier.wait()
            results[i] = works[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not errors, errors
    return results


def assert_equal(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, value in theirs.items():
        assert_array_equal(mine[name], value, err_msg=name)


@pytest.mark.parametrize("form", ["jit", "backward"])
def test_threads_that_share_one_function(form: str) -> None:
    """Bit for bit as one after the other, from the first compilation on, in several rounds."""

    def round_(fn: Any, seed: int) -> Any:
        def work() -> Any:
            model, opt = pair(1.0 + seed)
            losses = [fn(model, opt, X * np.float32(seed % 3), Y) for _ in range(40)]
            return {**everything(model, opt), "losses": np.stack(losses)}

        return work

    def make() -> Any:
        def my_loss(model: Any, x: Any, y: Any) -> Any:
            return squared(model, x, y)

        def train_step(model: Any, opt: Any, x: Any, y: Any) -> Any:
            opt.zero_grad()
            loss = mt.backward(my_loss, model, x, y)
            opt.step()
            return loss

        return mt.jit(train_step) if form == "jit" else train_step

    shared = make()
    alone = [round_(shared, seed)() for seed in range(3)]
    for i in range(5):
        fn = make() if i < 2 else shared
        for mine, theirs in zip(at_once([round_(fn, seed) for seed in range(3)]), alone, strict=True):
            assert_equal(mine, theirs)
        if form == "jit":
            assert fn.num_compiles <= 3  # threads that meet it at the same instant may each compile it


def test_threads_with_different_structures() -> None:
    """Each thread goes from one program of the shared function to another at every call."""

    def fn(model: Any, opt: Any, x: Any) -> Any:
        opt.zero_grad()
        loss = mt.backward(mean_square, model, x)
        opt.step()
        return loss

    compiled = mt.jit(fn)

    def work(size: int) -> Callable[[], Any]:
        def run() -> Any:
            model = nn.Linear(size, 1, key=jax.random.key(size))
            opt = optim.SGD([model], lr=0.1, momentum=0.9)
            for i in range(30):
                model.train(i % 2 == 0)
                compiled(model, opt, np.ones((2, size), np.float32))
            return everything(model, opt)

        return run

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecompileWarning)
        alone = [work(2)(), work(3)()]
        for _ in range(3):
            for mine, theirs in zip(at_once([work(2), work(3)]), alone, strict=True):
                assert_equal(mine, theirs)
    assert compiled.num_compiles == 4


def test_threads_have_random_streams_of_their_own() -> None:
    class Noise(mt.Module):
        def __init__(self) -> None:
            self.weight = mt.Parameter(jnp.ones(3))

        def forward(self, x: Any) -> Any:
            return x @ self.weight + jax.random.normal(mt.next_key(), (4,))

    compiled = fresh_step()

    def work(seed: int) -> Callable[[], Any]:
        def run() -> Any:
            mt.seed(seed)
            model = Noise()
            opt = optim.SGD([model], lr=0.1)
            for _ in range(30):
                compiled(model, opt, X, Y)
            return everything(model, opt)

        return run

    alone = [work(1)(), work(2)()]
    assert not np.array_equal(alone[0]["0.weight"], alone[1]["0.weight"])
    for _ in range(3):
        for mine, theirs in zip(at_once([work(1), work(2)]), alone, strict=True):
            assert_equal(mine, theirs)
    assert compiled.num_compiles == 1


class Stopping(Line):
    """A Line that calls a function in the middle of `forward`."""

    def __init__(self, stop: Callable[[Any], None]) -> None:
        super().__init__()
        self.stop = stop

    def forward(self, x: Any) -> Any:
        y = super().forward(x)
        self.stop(self.weight)
        return y + 0 * self.bias


class Stop:
    """What stops the first thread besides the main one that calls it, with a tracer."""

    def __init__(self) -> None:
        self.inside, self.go_on = threading.Event(), threading.Event()

    def __call__(self, value: Any) -> None:
        other = threading.current_thread() is not threading.main_thread()
        if other and isinstance(value, jax.core.Tracer) and not self.inside.is_set():
            self.inside.set()
            assert self.go_on.wait(60)

    def __deepcopy__(self, memo: Any) -> Stop:
        return self


def while_stopped(stop: Stop, work: Callable[[], Any], meanwhile: Callable[[], Any]) -> Any:
    """What `work` gives in a thread that is stopped while it traces, and goes on after `meanwhile` in this one."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    try:
        assert stop.inside.wait(60)
        meanwhile()
    finally:
        stop.go_on.set()
        thread.join(60)
    return results[0]  # IndexError, beside the thread's own traceback, if that has raised


FORMS_OF_A_LOSS: dict[str, Callable[[Any], Any]] = {
    "backward": lambda model: mt.backward(squared, model, X, Y),
    "value_and_grad": lambda model: mt.value_and_grad(squared)(model, X, Y)[0],
    "jit": lambda model: mt.jit(lambda x: squared(model, x, Y))(X),
    "scan": lambda model: mt.scan(lambda: squared(model, X, Y), length=1)[0],
    "backward in jit": lambda model: mt.jit(lambda x: mt.backward(squared, model, x, Y))(X),
    "jax.jit": lambda model: mt.jit(jax.jit(lambda x: squared(model, x, Y)))(X),
}


@pytest.mark.one_in(8)
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("form", FORMS_OF_A_LOSS)
def test_nothing_is_seen_of_a_trace_in_another_thread(form: str, packed: bool) -> None:
    stop = Stop()
    model, twin = Stopping(stop), Line()
    if packed:
        mt.pack(model)
    predict = mt.jit(lambda x: model(x))
    expected = np.asarray(twin.eval()(X))
    model.eval()
    predict(X)
    first = everything(model)

    def meanwhile() -> None:
        assert_same(everything(model), first)
        assert_array_equal(model(X), expected)
        assert_array_equal(predict(X), expected)
        assert_array_equal(mt.jit(lambda x: model(x))(X), expected)
        assert copy.deepcopy(model).weight.tolist() == [1.0, 1.0, 1.0]
        assert jax.tree.leaves(model)[0].tolist() == [1.0, 1.0, 1.0]
        assert not any(isinstance(grad, jax.core.Tracer) for grad in model.grads())

    loss = while_stopped(stop, lambda: FORMS_OF_A_LOSS[form](model), meanwhile)
    assert_allclose(loss, squared(twin, X, Y), rtol=1e-6)
    assert_array_equal(predict(X), expected)


@pytest.mark.one_in(4)
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("trained", ["eager", "jit"])
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
def test_a_trace_in_another_thread_takes_nothing_back(trained: str, packed: bool, fails: bool) -> None:
    """What this thread stores while another one traces the model stays, and no constant of it comes into the program."""
    stop = Stop()
    model = Stopping(stop)
    opt = optim.SGD([model], lr=0.1, momentum=0.9)
    if packed:
        mt.pack(model)
    train = mt.jit(step) if trained == "jit" else step

    def predicted(x: Any) -> Any:
        y = model(x)
        if fails:
            raise ValueError("mine")
        return y

    predict = mt.jit(predicted)

    def work() -> Any:
        if not fails:
            return predict(X)
        with pytest.raises(ValueError, match="mine"):
            predict(X)

    train(model, opt, X, Y)
    model.eval()
    out = while_stopped(stop, work, lambda: [train(model, opt, X, Y) for _ in range(3)])
    twin, twins_opt = pair()
    step(twin, twins_opt, X, Y)
    twin.eval()
    for _ in range(3):
        step(twin, twins_opt, X, Y)
    assert_same(everything(model, opt), everything(twin, twins_opt))
    if not fails:
        assert_allclose(out, twin(X), rtol=1e-5)
        model.weight = jnp.zeros(3)
        assert_allclose(predict(X), np.full(4, model.bias), rtol=1e-6)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("form", [form for form in FORMS_OF_A_LOSS if "backward" not in form])
def test_threads_that_trace_one_model_at_once(form: str) -> None:
    """As long as none of them changes it: gradients are changes, too."""
    model = Line().eval()
    expected = squared(model, X, Y)
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RecompileWarning)  # new functions each time
            losses = at_once([lambda: FORMS_OF_A_LOSS[form](model)] * 4)
        assert_allclose(losses, [expected] * 4, rtol=1e-6)
    assert not any(isinstance(cell.stored, jax.core.Tracer) for cell in walk_of(model).with_gradients())


def test_a_name_that_is_rebound_while_another_thread_looks_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Scale(1.0)
    kept = model
    call = mt.jit(lambda x: model(x))
    looking, go_on = threading.Event(), threading.Event()
    look = named_modules.holds_state

    def slow(value: Any) -> bool:
        if threading.current_thread() is not threading.main_thread() and not looking.is_set():
            looking.set()
            assert go_on.wait(60)
        return look(value)

    assert [float(call(1.0)) for _ in range(3)] == [1.0] * 3
    model = Scale(2.0)
    monkeypatch.setattr(named_modules, "holds_state", slow)
    results: list[float] = []
    thread = threading.Thread(target=lambda: results.append(float(call(1.0))))
    thread.start()
    assert looking.wait(60)
    mine = [float(call(1.0)) for _ in range(3)]
    go_on.set()
    thread.join(60)
    assert mine == [2.0] * 3 and results == [2.0] and float(kept.weight) == 1.0
    assert [float(call(1.0)) for _ in range(3)] == [2.0] * 3


@pytest.mark.filterwarnings("ignore:.*cannot be followed by name")
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_threads_call_a_function_that_reaches_a_model_by_tracing_alone() -> None:
    stop = Stop()
    model = Stopping(stop).eval()
    reference = weakref.ref(model)
    call = mt.jit(lambda x: reference()(x))
    expected = np.asarray(call(X))
    call(X)

    def meanwhile() -> None:
        for _ in range(3):
            assert_array_equal(call(X), expected)

    assert_array_equal(while_stopped(stop, lambda: call(X), meanwhile), expected)
    model.weight = 2 * model.weight
    assert_allclose(call(X), 2 * expected, rtol=1e-6)


# -- what is kept alive ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["jit", "scan", "backward"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_while_tracing_keeps_no_array_alive(form: str, error: type[BaseException]) -> None:
    """Not even until the collector of cycles runs."""

    def failing(model: Any, x: Any) -> Any:
        model(x)
        raise error

    def train() -> Any:
        model = Line()
        with pytest.raises(error):
            if form == "scan":
                mt.scan(failing, model, X)
            else:
                (mt.jit(failing) if form == "jit" else partial(mt.backward, failing))(model, X)
        return weakref.ref(walk_of(model).cells[0])

    gc.collect()
    gc.disable()
    try:
        assert train()() is None
    finally:
        gc.enable()


def test_models_that_are_gone_are_not_kept_by_those_that_were_used_with_them() -> None:
    teacher, gone = Scale(), []

    def loss_fn(teacher: Any, student: Any, x: Any) -> Any:
        return (teacher(x) - student(x)) ** 2

    for i in range(8):
        student = Scale(float(i))
        with mt.rng(i):
            mt.backward(loss_fn, teacher, student, 1.0)
        gone.append(weakref.ref(walk_of(student).cells[0]))
    del student
    gc.collect()
    assert sum(reference() is not None for reference in gone) <= 1
    assert len(walk_of(teacher).bindings) == 1


class PlainTrainer:
    """What a user would write: an object that holds all it needs, functions that lead back to it among it."""

    def __init__(self) -> None:
        self.model, self.opt = pair()
        self.function = lambda x: self.loss(x)

    def loss(self, x: Any) -> Any:
        return squared(self.model, x, Y)

    @mt.jit
    def train_step(self, x: Any) -> Any:
        return self.function(x)


WAYS: dict[str, Callable[[PlainTrainer], Any]] = {
    "backward of a method": lambda trainer: mt.backward(trainer.loss, X),
    "backward of an attribute": lambda trainer: mt.backward(trainer.function, X),
    "backward of a new function": lambda trainer: mt.backward(lambda x: trainer.loss(x), X),
    "value_and_grad of a method": lambda trainer: mt.value_and_grad(trainer.loss)(X)[0],
    "scan of a method": lambda trainer: mt.scan(trainer.loss, X[None])[0],
    "a jitted method": lambda trainer: trainer.train_step(X),
    "jit of a method": lambda trainer: vars(trainer).setdefault("kept", mt.jit(trainer.loss))(X),
    "a scaled loss": lambda trainer: mt.LossScaler().backward(trainer.loss, X),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("way", WAYS)
def test_an_object_goes_with_all_that_was_compiled_for_it(way: str) -> None:
    def train() -> list[Any]:
        trainer = PlainTrainer()
        for _ in range(2):
            assert_allclose(WAYS[way](trainer), squared(Line(), X, Y), rtol=1e-6)
        return [weakref.ref(trainer), weakref.ref(trainer.model), weakref.ref(trainer.opt)]

    gone = train()
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3


@pytest.mark.one_in(9)
@pytest.mark.parametrize("way", WAYS)
def test_copies_of_an_object_do_not_use_what_was_compiled_for_it(way: str) -> None:
    trainer = PlainTrainer()
    WAYS[way](trainer)
    vars(trainer).pop("kept", None)  # what this test itself had the object keep
    for other in (copy.copy(trainer), copy.deepcopy(trainer)):
        other.model = Line(2.0)
        other.function = lambda x, other=other: other.loss(x)
        for _ in range(2):
            assert_allclose(WAYS[way](other), squared(Line(2.0), X, Y), rtol=1e-6)
    assert_allclose(WAYS[way](trainer), squared(Line(), X, Y), rtol=1e-6)


def test_a_wrapper_does_not_use_what_was_compiled_for_the_function_that_it_wraps() -> None:
    """`functools.wraps` copies the `__dict__`, where that is kept."""
    model = Scale(2.0)

    def inner(x: Any) -> Any:
        return model(x)

    assert float(mt.backward(inner, 1.0)) == 2.0

    @wraps(inner)
    def outer(x: Any) -> Any:
        return 3.0 * inner(x)

    assert [float(mt.backward(outer, 1.0)) for _ in range(2)] == [6.0] * 2
    assert float(mt.backward(inner, 1.0)) == 2.0


def test_objects_that_cannot_keep_anything() -> None:
    class Slots:
        __slots__ = ("model",)

        def __init__(self) -> None:
            self.model = Scale(2.0)

        def loss(self, x: Any) -> Any:
            return self.model(x)

    class OfAClass:
        model = Scale(3.0)

        @classmethod
        def loss(cls, x: Any) -> Any:
            return cls.model(x)

    trainer = Slots()
    for _ in range(2):
        assert float(mt.backward(trainer.loss, 1.0)) == 2.0
        assert float(mt.backward(OfAClass.loss, 1.0)) == 3.0
    assert float(trainer.model.grads()[0]) == 2.0


class Parts(mt.Module):
    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    def forward(self, x: Any) -> Any:
        return self.parts[0](x).sum()


def test_a_list_that_somebody_still_holds_is_looked_at_in_the_quickest_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    source, new = [Scale(1.0)], Scale(2.0)  # to make one later would change the structure, which ends the short way
    holder = Parts(source)
    step = mt.jit(lambda holder, x: holder(x))
    x = jnp.asarray(X)
    for _ in range(2):
        first = step(holder, x)
    with monkeypatch.context() as patched:
        patched.setattr(Function, "run_slowly", None)
        assert step(holder, x) == first
    source.append(new)
    with pytest.raises(RuntimeError, match="parts was assigned from a plain list, and that list has been changed"):
        step(holder, x)
    source.pop()
    assert step(holder, x) == first
    reference = weakref.ref(holder)
    del holder
    assert reference() is None


def test_every_shape_takes_the_fast_path_of_jax() -> None:
    """A call that is stopped where JAX is to trace must not leave its inputs to JAX's slow path for ever."""
    from jax._src import config

    class Vector(mt.Module):
        def __init__(self, size: int) -> None:
            self.weight = mt.Parameter(jnp.ones(size))

    def loss(model: Any, x: Any) -> Any:
        return (model.weight.sum() * x).sum()

    models = [Vector(size) for size in (2, 3)]
    opts = [optim.SGD([model], lr=0.1, momentum=0.9) for model in models]
    compiled = mt.jit(lambda model, opt, x: (opt.zero_grad(), mt.backward(loss, model, x), opt.step())[1])
    xs = [jnp.ones(size) for size in (1, 4)]

    def train() -> None:
        for model, opt in zip(models, opts, strict=True):
            for x in xs:
                compiled(model, opt, x)
            opt.zero_grad()
            for x in xs:
                mt.backward(loss, model, x)
            opt.step()

    for _ in range(4):
        train()
    with config.no_tracing(True):  # then JAX raises wherever it leaves its fast path
        train()


LOOKS = {
    "shape": lambda module: jnp.zeros(module.weight.shape, module.weight.dtype),
    "a buffer's shape": lambda module: jnp.ones(module.count.shape),
    "ndim": lambda module: jnp.asarray(module.weight.ndim),
    "size": lambda module: jnp.asarray(module.num_parameters()),
    "assignment": lambda module: setattr(module, "weight", jnp.zeros_like(module.weight)),
}


class Shaped(mt.Module):
    def __init__(self, array: Any) -> None:
        self.weight, self.count = mt.Parameter(array), mt.Buffer(array)


@pytest.mark.one_in(9)
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("array", [jnp.ones((2, 3)), jnp.ones(4), jnp.ones((2, 3), jnp.float16)], ids=str)
def test_code_that_looks_at_shapes_alone_has_a_program_for_each(look: str, array: Any) -> None:
    """Arrays of which only shape and dtype are asked are no inputs of a program, and yet it depends on them."""
    f = mt.jit(LOOKS[look])
    for other in (jnp.ones((5, 1)), array):
        module, twin = Shaped(other), Shaped(other)
        got, expected = f(module), LOOKS[look](twin)
        assert (module.weight.shape, module.weight.dtype) == (other.shape, other.dtype)
        assert jnp.array_equal(module.weight, twin.weight)
        if expected is not None:
            assert (got.shape, got.dtype) == (expected.shape, expected.dtype) and jnp.array_equal(got, expected)
