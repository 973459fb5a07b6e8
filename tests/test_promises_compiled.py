"""The promises of compiled loops: Ctrl-C at any instant, and failures at each stage of `mt.jit` and `mt.scan`."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from _thread import interrupt_main
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import (
    Boom,
    X,
    Y,
    assert_alive,
    assert_same,
    assert_unchanged,
    eagerly,
    everything,
    pair,
    step,
    stream_state,
)

import minitorch_jax as mt

# -- Ctrl-C ------------------------------------------------------------------------------------------------------------

INTERRUPTS = textwrap.dedent(
    """
    import itertools, random, signal, time
    import jax, jax.numpy as jnp, numpy as np
    import minitorch_jax as mt
    from minitorch_jax import optim
    from minitorch_jax.module.random import current

    class Mixed(mt.Module):
        '''Small parameters and a large one, of which each has the gradient 1e-3, and a count of forward passes.'''
        def __init__(self):
            for i in range({small}):
                setattr(self, f"p{{i}}", mt.Parameter(jnp.ones(8)))
            self.large = mt.Parameter(jnp.ones({large}))
            self.calls = mt.Buffer(0)
        def forward(self, x):
            self.calls = self.calls + 1
            return sum(p.sum() for p in self.parameters()) * x

    model = Mixed()
    opt = optim.SGD([model], lr=1e-3, momentum=0.9)
    x = jnp.asarray(1e-3)
    xs = jnp.full(4, 1e-3)
    start = np.asarray(current().cell.value)

    def train_step(x):
        opt.zero_grad()
        loss = mt.backward(model, x)
        opt.step()
        {draw}
        return loss

    lines = itertools.count(1000)

    def fresh():
        global train, scanned
        def inner(x):
            return train_step(x)
        inner.__code__ = inner.__code__.replace(co_firstlineno=next(lines))  # or it would share the program
        train, scanned = mt.jit(inner, keep_grads={keep}), inner
    fresh()

    def run():
        if "{form}" == "scan":
            mt.scan(scanned, xs, keep_grads={keep})
        else:
            train(x)

    trajectory = [(1.0, 0.0)]

    def expected(steps):
        while len(trajectory) <= steps:
            p, b = trajectory[-1]
            b = 0.9 * b + 1e-3
            trajectory.append((p - 1e-3 * b, b))
        return trajectory[steps]

    def check():
        '''Everything is alive and belongs to the same step.'''
        counts = np.asarray(opt._steps.value)
        steps = opt.num_steps
        assert set(counts[:-1].tolist()) == {{steps}}, "step counts are torn"
        assert int(model.calls) == steps, ("the count of forward passes", int(model.calls), steps)
        if "{form}" == "scan":
            assert steps % 4 == 0, "a scan has stopped in between"
        p, b = expected(steps)
        for name, cell in model._cells.items():
            value = np.asarray(cell.value)
            if name == "calls":
                continue
            buffer = np.asarray(opt._state[cell][1][0].value)
            assert abs(value - p).max() < 3e-6 + 1e-7 * steps, (name, value[0], p, steps)
            assert abs(buffer - b).max() < 1e-4 * b + 1e-9, (name, buffer[0], b, steps)
            grad = cell.grad.value
            if isinstance(grad, jax.Array):
                assert abs(np.asarray(grad) - 1e-3).max() < 1e-8, "a torn gradient"
        assert not isinstance(current().cell.value, jax.core.Tracer)
        if not "{draw}":
            assert np.array_equal(current().cell.value, start)
        assert mt.state.frame.local.frame is None

    rng = random.Random({seed})
    fired = [False]

    def fire(*_):
        fired[0] = True
        signal.raise_signal(signal.SIGINT)

    def repeat():  # by itself: Python 3.13 may handle a signal at the very end of a `try`, when nothing is caught any more
        signal.setitimer(signal.ITIMER_REAL, rng.uniform({low}, {high}))
        while not fired[0]:
            run()

    signal.signal(signal.SIGALRM, fire)
    run()
    check()
    hit = 0
    deadline = time.monotonic() + {seconds}
    while hit < {wanted} and time.monotonic() < deadline:
        fired[0] = False
        try:
            repeat()
        except KeyboardInterrupt:
            hit += 1
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        check()
        {after}
    run()
    check()
    print("interrupts", hit, "steps", opt.num_steps)
    """
)


def run_interrupts(**settings: Any) -> int:
    settings = {"small": 8, "large": 50_000, "seed": 0, "draw": "", "keep": False, "after": "", **settings}
    code = INTERRUPTS.format(**settings)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[1])


@pytest.mark.parametrize("form", ["jit", "scan"])
def test_interrupts_at_random_instants_lose_and_tear_nothing(form: str) -> None:
    assert run_interrupts(form=form, wanted=400, low=1e-4, high=2e-3, seconds=540) == 400


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jit", "scan"])
@pytest.mark.parametrize("keep", [False, True])
def test_many_interrupts(form: str, keep: bool) -> None:
    hit = run_interrupts(
        form=form, keep=keep, wanted=4000, low=1e-4, high=2e-3, seconds=540, seed=1, draw="mt.next_key()"
    )
    assert hit == 4000


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jit", "scan"])
def test_interrupts_while_tracing_and_compiling(form: str) -> None:
    hit = run_interrupts(form=form, wanted=60, low=1e-3, high=0.3, seconds=180, small=2, large=64, after="fresh()")
    assert hit == 60


def test_an_interrupt_while_tracing_is_raised_and_changes_nothing() -> None:
    model, opt = pair()
    interrupts = [True]

    @mt.jit
    def fn(x: Any, y: Any) -> Any:
        loss = step(model, opt, x, y)
        if interrupts.pop():
            interrupt_main()
        return loss

    before = everything(model, opt)
    with pytest.raises(KeyboardInterrupt):
        fn(X, Y)
    assert_unchanged(before, model, opt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    interrupts[:] = [False] * 3
    fn(X, Y)
    assert_same(everything(model, opt), eagerly(1)[1])


class Interrupting:
    """Static data during whose comparison, which C++ code of JAX's asks for, a Ctrl-C comes."""

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        raise KeyboardInterrupt

    def __call__(self) -> None: ...


def compare_structures() -> None:
    one, other = (jax.tree.structure(jax.tree_util.Partial(Interrupting())) for _ in range(2))
    assert one != other


def compare_keys() -> None:
    class Key(Interrupting):
        def __hash__(self) -> int:
            return id(Key)  # not that of another call's keys, which JAX may still hold

    function = jax.jit(lambda static: jnp.zeros(()), static_argnums=0)
    function(Key())
    function(Key())


COMPARISONS = {compare_structures: "metadata", compare_keys: "The error was:\nTraceback(.|\n)*KeyboardInterrupt"}


@pytest.mark.parametrize("form", ["jit", "scan", "backward", "step", "scan in jit"])
@pytest.mark.parametrize("compare", COMPARISONS)
def test_an_interrupt_that_jax_makes_a_value_error_of_is_raised_as_one(compare: Callable[[], None], form: str) -> None:
    with pytest.raises(ValueError, match=COMPARISONS[compare]):  # else there is nothing to mend any more
        compare()

    class Comparing(mt.Optimizer):
        @staticmethod
        def update(*_: Any) -> Any:
            compare()

    model, opt = pair()
    comparing = Comparing([model])

    def step_and_compare(*_: Any) -> None:
        step(model, opt, X, Y)
        compare()

    def compared_loss() -> Any:
        compare()

    if form == "step":
        mt.backward(lambda: (model(X) ** 2).sum())
    before = everything(model, opt)
    with pytest.raises(KeyboardInterrupt):
        {
            "jit": mt.jit(step_and_compare),
            "scan": lambda: mt.scan(step_and_compare, length=2),
            "backward": lambda: mt.backward(compared_loss),
            "step": comparing.step,
            "scan in jit": mt.jit(lambda: mt.scan(step_and_compare, length=2)),
        }[form]()
    assert_unchanged(before, model, opt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("form", ["jit", "scan", "backward", "lower"])
@pytest.mark.parametrize("left", ["trace", "x64", "names", "precision"])
def test_an_interrupt_between_two_lines_of_jax_leaves_jax_as_it_was(
    form: str, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JAX sets which trace is the current one, 64-bit types and the like, and resets them later, all in Python."""
    from jax._src import core

    model, opt = pair()
    interrupts, reset = [True], core.SetCurrentTraceContextManager.__exit__

    def reset_or_not(self: Any, *raised: Any) -> None:
        if raised[0] is not KeyboardInterrupt:
            reset(self, *raised)

    monkeypatch.setattr(core.SetCurrentTraceContextManager, "__exit__", reset_or_not)

    def leave() -> None:
        interrupts.clear()
        raise KeyboardInterrupt

    def loss() -> Any:
        if interrupts and left == "trace":
            leave()
        elif interrupts:
            monkeypatch.undo()
            contexts = {
                "x64": jax.enable_x64(True),
                "names": jax.named_scope("left"),
                "precision": jax.default_matmul_precision("float32"),
            }
            contexts[left].__enter__()
            leave()
        return ((model(X) - Y) ** 2).mean()

    def train_step(*_: Any) -> Any:
        opt.zero_grad()
        value = mt.backward(loss)
        opt.step()
        return value

    before = everything(model, opt)
    with pytest.raises(KeyboardInterrupt):
        {
            "jit": mt.jit(train_step),
            "scan": lambda: mt.scan(train_step, length=2),
            "backward": lambda: mt.backward(loss),
            "lower": mt.jit(train_step).lower,
        }[form]()
    monkeypatch.undo()
    assert_unchanged(before, model, opt)
    assert mt.state.frame.local.frame is None
    assert not isinstance(jnp.ones(()) + 1, jax.core.Tracer)
    assert jnp.arange(2).dtype == "int32"
    assert jax.config.jax_default_matmul_precision is None
    assert "left" not in jax.jit(lambda x: x + 1).lower(1.0).as_text(debug_info=True)
    mt.jit(train_step)()
    assert_same(everything(model, opt), eagerly(1)[1])


def test_an_operation_interrupted_in_jax_does_not_stop_the_next_ones() -> None:
    """JAX 0.12 has no current trace while it dispatches an operation: a Ctrl-C there would end all later ones."""
    from jax._src import core

    model, opt = pair()
    core.trace_ctx.set_trace(None)
    try:
        step(model, opt, X, Y)
    finally:
        core.trace_ctx.reset()
    assert_same(everything(model, opt), eagerly(1)[1])


@dataclass
class Labelled:
    """Data beside a static label."""

    array: Any
    label: Any


jax.tree_util.register_dataclass(Labelled, data_fields=["array"], meta_fields=["label"])


class Label:
    """A label whose comparison can be told to raise."""

    interrupts = False

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        if Label.interrupts:
            raise KeyboardInterrupt
        return isinstance(other, Label)


@pytest.mark.parametrize("calls", [1, 2, 4])
@pytest.mark.parametrize("form", ["jit", "scan"])
def test_an_interrupt_while_a_later_call_is_compared_with_earlier_ones(
    form: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, opt = pair()

    def fn(x: Any) -> Any:
        return step(model, opt, x.array, Y)

    jitted = mt.jit(fn)

    def call() -> None:
        if form == "jit":
            jitted(Labelled(X, Label()))
        else:
            mt.scan(fn, Labelled(X[None], Label()))

    for _ in range(calls):
        call()
    before = everything(model, opt)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Label, "interrupts", True)
        call()
    assert_unchanged(before, model, opt)
    call()
    assert_same(everything(model, opt), eagerly(calls + 1)[1])


@pytest.mark.parametrize("form", ["jit", "scan"])
def test_an_interrupt_while_compiling_is_raised_afterwards(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA cannot be interrupted; afterwards the KeyboardInterrupt comes, before or after the whole step."""
    from jax._src import compiler

    model, opt = pair()
    interrupts = [True]
    compile_ = compiler.backend_compile_and_load

    def compiling(*args: Any, **kwargs: Any) -> Any:
        if interrupts and any("noticed" in str(arg) for arg in args):
            interrupts.pop()
            interrupt_main()
        return compile_(*args, **kwargs)

    def noticed(x: Any, y: Any) -> Any:
        return step(model, opt, x, y)

    monkeypatch.setattr(compiler, "backend_compile_and_load", compiling)
    with pytest.raises(KeyboardInterrupt):
        mt.scan(noticed, X[None], Y[None]) if form == "scan" else mt.jit(noticed)(X, Y)
    assert not interrupts
    assert_alive(model, opt)
    assert_same(everything(model, opt), eagerly(opt.num_steps)[1])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# -- failures at each stage --------------------------------------------------------------------------------------------


def forms(fn: Any, form: str) -> Any:
    """`fn(x, y)` compiled, or scanned over one batch."""
    return mt.jit(fn) if form == "jit" else lambda x, y: mt.scan(fn, x[None], y[None])


@pytest.mark.parametrize("form", ["jit", "scan"])
def test_a_failing_compilation_changes_nothing(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from jax._src import compiler

    model, opt = pair()
    run = forms(lambda x, y: (mt.next_key(), step(model, opt, x, y))[1], form)
    before, key = everything(model, opt), stream_state()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory (injected)")

    monkeypatch.setattr(compiler, "backend_compile_and_load", fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="injected"):
            run(X, Y)
    monkeypatch.undo()
    assert_unchanged(before, model, opt)
    np.testing.assert_array_equal(stream_state(), key)
    assert_alive(model, opt)
    run(X, Y)
    assert_same(everything(model, opt), eagerly(1)[1])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("form", ["jit", "scan"])
@pytest.mark.parametrize("where", ["start", "end"])
def test_a_failure_in_a_new_shape_of_a_warm_function(form: str, where: str) -> None:
    """Tracing again, with other arrays than those that were donated at the call before."""
    model, opt = pair()

    def fn(x: Any, y: Any) -> Any:
        if where == "start" and x.shape[0] == 2:
            raise Boom("injected")
        loss = step(model, opt, x, y)
        if where == "end" and x.shape[0] == 2:
            raise Boom("injected")
        return loss

    run = forms(fn, form)
    for steps in (1, 2, 3):
        run(X, Y)
        before = everything(model, opt)
        with pytest.raises(Boom, match="injected"):
            run(X[:2], Y[:2])
        assert_unchanged(before, model, opt)
        assert_alive(model, opt)
        assert_same(everything(model, opt), eagerly(steps)[1])


@pytest.mark.one_in(4)
@pytest.mark.parametrize("form", ["jit", "scan"])
@pytest.mark.parametrize("kind", ["debug", "pure", "io"])
def test_a_callback_that_raises_changes_nothing(form: str, kind: str) -> None:
    """A failure while the program runs, when what it was given would have been used up."""
    model, opt = pair()
    fails = [False]

    def check(value: Any) -> Any:
        if fails[0]:
            raise Boom("injected")
        return np.asarray(value)

    def fn(x: Any, y: Any) -> Any:
        mt.next_key()
        loss = step(model, opt, x, y)
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        if kind == "debug":
            jax.debug.callback(check, loss)
        elif kind == "pure":
            loss = jax.pure_callback(check, shape, loss)
        else:
            loss = jax.experimental.io_callback(check, shape, loss)
        return loss

    run = forms(fn, form)
    for steps in (1, 2):
        run(X, Y)
        before, key = everything(model, opt), stream_state()
        fails[0] = True
        for _ in range(2):
            with pytest.raises(Exception, match="injected"):
                run(X, Y)
            assert_unchanged(before, model, opt)
            np.testing.assert_array_equal(stream_state(), key)
            assert_alive(model, opt)
        fails[0] = False
        assert_same(everything(model, opt), eagerly(steps)[1])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("form", ["jit", "scan"])
@pytest.mark.parametrize("warm", [False, True])
def test_debug_nans_raises_and_changes_nothing(form: str, warm: bool) -> None:
    model, opt = pair()
    run = forms(lambda x, y: step(model, opt, x, y), form)
    if warm:
        run(X, Y)
    before = everything(model, opt)
    with jax.debug_nans(True):
        with pytest.raises(FloatingPointError):
            run(np.full_like(X, np.nan), Y)
        assert_unchanged(before, model, opt)
        run(X, Y)
    assert_alive(model, opt)
    assert_same(everything(model, opt), eagerly(2 if warm else 1)[1])


def test_an_allocation_that_fails_while_running_changes_nothing() -> None:
    model, opt = pair()

    @mt.jit
    def greedy(x: Any, y: Any) -> Any:
        loss = step(model, opt, x, y)
        column = jnp.arange(1 << 21, dtype=jnp.float32)
        big = jnp.sin(column[:, None] * column[None] * loss)
        return jnp.sort(big, axis=0)[1, 1]  # 16 TiB, which no fusion avoids

    before = everything(model, opt)
    with pytest.raises(Exception, match="(?i)memory|RESOURCE_EXHAUSTED|alloc"):
        greedy(X, Y)
    assert_unchanged(before, model, opt)
    assert_alive(model, opt)


@pytest.mark.parametrize("form", ["jit", "scan"])
def test_a_rule_that_raises_changes_nothing(form: str) -> None:
    class Rule(mt.Optimizer):
        fails = [True]

        @staticmethod
        def update(p: Any, g: Any, s: Any, h: Any) -> Any:
            if Rule.fails[0] and p.ndim == 0:
                raise Boom("injected")
            return p - h.lr * g, s

    model = pair()[0]
    opt = Rule([model], lr=0.1)
    run = forms(lambda x, y: step(model, opt, x, y), form)
    before = everything(model, opt)
    with pytest.raises(Boom, match="injected"):
        run(X, Y)
    assert_unchanged(before, model, opt)
    Rule.fails[0] = False
    run(X, Y)
    assert opt.num_steps == int(model.count) == 1
