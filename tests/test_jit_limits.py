"""`mt.jit`: what it refuses and leaves as it was; JAX's transforms, devices and settings; lifetimes."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import pickle
import subprocess
import sys
import textwrap
import warnings
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
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
    eagerly,
    everything,
    pair,
    squared,
    step,
    stream_state,
)

import minitorch_jax as mt
from minitorch_jax import nn, optim

# -- static structure --------------------------------------------------------------------------------------------------


def test_modes_are_seen() -> None:
    model = Line()
    fn = mt.jit(lambda model, x: model(x))
    for training in (True, False, True, False):
        model.train(training)
        fn(model, X)
    assert int(model.count) == 2
    assert fn.num_compiles == 2


@pytest.mark.parametrize("by_closure", [False, True])
def test_a_static_attribute_changed_inside_is_refused(by_closure: bool) -> None:
    model, opt = pair()

    def fn(model: Any, x: Any, y: Any) -> Any:
        loss = step(model, opt, x, y)
        model.eval()
        return loss

    compiled = mt.jit(functools.partial(fn, model) if not by_closure else lambda x, y: fn(model, x, y))
    before, key = everything(model, opt), stream_state()
    for _ in range(2):
        with pytest.raises(mt.TraceError, match=r"Line.training was changed \(to False\) inside compiled code.*eval"):
            compiled(X, Y)
        assert model.training
        assert_unchanged(before, model, opt)
    assert_array_equal(stream_state(), key)
    assert_alive(model, opt)


class Initialised(mt.Module):
    """Scaled by its first batch, and so by a flag."""

    def __init__(self) -> None:
        self.scale = mt.Buffer(1.0)
        self.weight = mt.Parameter(1.0)
        self.ready = False

    def forward(self, x: Any) -> Any:
        if not self.ready:
            self.scale, self.ready = x, True
        return self.scale * self.weight * x


@pytest.mark.parametrize(
    "run",
    [
        lambda model: mt.jit(lambda: mt.backward(model, 2.0))(),
        lambda model: mt.jit(lambda: mt.value_and_grad(model)(2.0)[0])(),
        lambda model: mt.scan(lambda: mt.backward(model, 2.0), length=2),
    ],
)
def test_a_static_attribute_changed_in_a_loss_in_compiled_code_is_refused(run: Any) -> None:
    model = Initialised()
    for _ in range(2):
        with pytest.raises(mt.TraceError, match=r"Initialised\.ready was changed \(to True\) inside compiled code"):
            run(model)
        assert not model.ready and model.scale == 1.0
    model(3.0)
    assert model.ready and model.scale == 3.0
    run(model)


@pytest.mark.parametrize("how", ["backward", "value_and_grad", "scaler"])
def test_a_static_attribute_changed_in_a_loss_is_as_the_code_says(how: str) -> None:
    """For each model, and for each shape: what was compiled while Python set something runs once."""
    scaler = mt.LossScaler(init_scale=1.0)
    run = {
        "backward": mt.backward,
        "value_and_grad": lambda model, x: mt.value_and_grad(model)(x)[0],
        "scaler": scaler.backward,
    }[how]
    for _ in range(2):
        model, plain = Initialised(), Initialised()
        for x in (2.0, 3.0, 4.0):
            assert float(run(model, x)) == float(plain(x)) == 2 * x
            assert model.ready and model.scale == 2.0


class Remembering(mt.Module):
    def __init__(self) -> None:
        self.weight = mt.Parameter(1.0)
        self.calls, self.shape = 0, None

    def forward(self, x: Any) -> Any:
        self.calls += 1
        self.shape = jnp.shape(x)
        return self.weight * self.calls * jnp.sum(x)


def test_what_a_loss_counts_and_remembers() -> None:
    model, plain = Remembering(), Remembering()
    for shape in ((2,), (3,), (2,), (2,), (3,)):
        assert float(mt.backward(model, jnp.ones(shape))) == float(plain(jnp.ones(shape)))
        assert (model.calls, model.shape) == (plain.calls, shape)
    with pytest.raises(mt.TraceError, match=r"Remembering\.calls was changed \(to 6\)"):
        mt.jit(lambda x: mt.backward(model, x))(jnp.ones(2))
    assert (model.calls, model.shape) == (5, (3,))


def test_other_structure_changed_inside_is_refused() -> None:
    class Counting(mt.Module):
        def __init__(self) -> None:
            self.weight = mt.Parameter(1.0)
            self.calls = 0

        def forward(self, x: Any) -> Any:
            self.calls += 1
            return self.weight * x

    class Growing(mt.Module):
        def __init__(self) -> None:
            self.parts = [Scale()]

        def forward(self, x: Any) -> Any:
            self.parts.append(Scale())
            return x

    model, opt = pair()
    counting, growing = Counting(), Growing()
    for change, message in (
        (lambda: counting(1.0), r"Counting.calls was changed \(to 1\).*declare it as a Buffer"),
        (lambda: growing(1.0), r"inside compiled code"),
        (lambda: model.freeze(), r"inside compiled code"),
        (lambda: setattr(model, "extra", mt.Parameter(1.0)), r"inside compiled code"),
        (lambda: setattr(opt, "modules", [Line()]), r"inside compiled code"),
        (lambda: setattr(opt, "nesterov", True), r"inside compiled code"),
    ):
        with pytest.raises(mt.TraceError, match=message):
            mt.jit(change)()
    assert (counting.calls, len(growing.parts), len(model.parameters())) == (0, 1, 2)
    assert not opt.nesterov and opt.modules[0] is model
    step(model, opt, X, Y)


def test_changed_and_changed_back_is_fine() -> None:
    model = Line()

    @mt.jit
    def fn(x: Any) -> Any:
        model.eval()
        out = model(x)
        model.train()
        return out, model(x)

    for _ in range(2):
        fn(X)
        assert model.training
    assert int(model.count) == 2
    assert fn.num_compiles == 1


def test_freezing_between_calls() -> None:
    model, opt = pair()
    fn = mt.jit(step)
    fn(model, opt, X, Y)
    model.freeze()
    model.unfreeze()
    fn(model, opt, X, Y)
    assert_same(everything(model, opt), eagerly(2)[1])
    assert fn.num_compiles == 1
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"squared uses no trainable parameter.*2 parameters are frozen"):
        fn(model, opt, X, Y)
    assert_same(everything(model, opt), eagerly(2)[1])


# -- all or nothing ----------------------------------------------------------------------------------------------------


class Trainer:
    """A plain class that holds model and optimizer."""

    def __init__(self) -> None:
        self.model, self.opt = pair()

    @mt.jit
    def fit(self, x: Any, y: Any) -> Any:
        return step(self.model, self.opt, x, y)

    def everything(self) -> dict[str, Any]:
        return everything(self.model, self.opt)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("where", ["start", "after backward", "after step", "end", "interrupt"])
@pytest.mark.parametrize("warm", [False, True])
def test_an_exception_while_tracing_changes_nothing(where: str, warm: bool) -> None:
    model, opt = pair()
    fails = [not warm]

    def raising(here: str) -> None:
        if fails[0] and here == where:
            raise Boom(here)

    @mt.jit
    def fn(model: Any, opt: Any, x: Any, y: Any) -> Any:
        raising("start")
        mt.next_key()
        opt.zero_grad()
        model.eval()
        model.train()
        loss = mt.backward(squared, model, x, y)
        raising("after backward")
        opt.step()
        opt.lr = opt.lr * 1.0
        raising("after step")
        model.weight = model.weight * 1.0
        if where == "interrupt" and fails[0]:
            raise KeyboardInterrupt
        raising("end")
        return loss

    steps = 0
    if warm:
        fn(model, opt, X, Y)
        steps = 1
        fails[0] = True
        opt.zero_grad()
    before, key = everything(model, opt), stream_state()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt if where == "interrupt" else Boom):
            fn(model, opt, X[:2], Y[:2])
        assert_unchanged(before, model, opt)
        assert not any(np.any(grad) for grad in model.grads())
        assert_alive(model, opt)
        assert_array_equal(stream_state(), key)
        assert model.training
    fails[0] = False
    fn(model, opt, X, Y)
    assert_same(everything(model, opt), eagerly(steps + 1)[1])


def test_wrong_results_and_calls_change_nothing() -> None:
    model, opt = pair()
    fn = mt.jit(step)
    fn(model, opt, X, Y)
    before = everything(model, opt)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'y'"):
        fn(model, opt, X)
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        fn(model, opt, X, Y, z=1)
    with pytest.raises(TypeError, match="(?i)dot|matmul|contract|shape"):
        fn(model, opt, X[:, :2], Y)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        mt.jit(lambda m, o, x, y: step(m, o, x, y) if x.sum() > 0 else None)(model, opt, X, Y)
    with pytest.raises(jax.errors.ConcretizationTypeError):
        mt.jit(lambda m, o, x, y: float(step(m, o, x, y)))(model, opt, X, Y)
    assert_unchanged(before, model, opt)
    fn(model, opt, X, Y)
    assert_same(everything(model, opt), eagerly(2)[1])


# -- plain JAX transforms ----------------------------------------------------------------------------------------------


def test_inside_a_plain_jit_by_closure() -> None:
    """Told with both spellings, and nothing has changed."""
    model, opt = pair()
    before = everything(model, opt)
    for plain in (lambda x, y: step(model, opt, x, y), mt.jit(lambda x, y: step(model, opt, x, y))):
        with pytest.raises(mt.TraceError, match=r"(?s)inside a JAX transform.*jax\.jit\(step\)\(opt, x, y\).*mt\.jit"):
            jax.jit(plain)(X, Y)
        assert_unchanged(before, model, opt)
        assert_alive(model, opt)
    for change in (
        lambda x: setattr(model, "weight", x[0]) or x,
        lambda x: opt.step() or x,
        lambda x: setattr(opt, "lr", x[0, 0]) or x,
        lambda x: mt.jit(lambda: setattr(model, "mean", x[0, 0]))() or x,
    ):
        with pytest.raises(mt.TraceError, match=r"(?s)inside a JAX transform.*mt\.jit"):
            jax.jit(change)(X)
        assert_unchanged(before, model, opt)
    with pytest.raises(mt.TraceError, match=r"(?s)random number was drawn inside a JAX transform.*mt\.rng"):
        jax.jit(lambda x: x + mt.jit(lambda: jax.random.normal(mt.next_key()))())(1.0)


def test_inside_a_plain_jit_on_arguments_it_is_the_functional_form() -> None:
    model, opt = pair()
    fn = mt.jit(lambda opt, x, y: step(opt.modules[0], opt, x, y))
    functional = jax.jit(lambda opt, x, y: (opt, fn(opt, x, y)))
    losses, expected = eagerly(3)
    got, now = [], opt
    for _ in range(3):
        now, loss = functional(now, X, Y)
        got.append(float(loss))
    assert_allclose(got, losses, rtol=1e-5)
    assert_same(everything(now.modules[0], now), expected)
    assert opt.num_steps == int(model.count) == 0
    with pytest.warns(mt.DroppedUpdateWarning, match=r"(?s)changed inside a JAX transform.*return opt.*mt\.jit"):
        jax.jit(fn)(opt, X, Y)
        gc.collect()


def test_plain_transforms_inside() -> None:
    model, opt = pair()

    @mt.jit
    def fn(model: Any, opt: Any, x: Any, y: Any) -> Any:
        loss = step(model, opt, x, y)
        each = jax.vmap(lambda row: row @ model.weight)(x)
        total, _ = jax.lax.scan(lambda c, row: (c + row @ model.weight, None), 0.0, x)
        return loss, each.sum(), total, jax.jit(lambda a: (a @ model.weight).sum())(x)

    losses, expected = eagerly(2)
    for i in range(2):
        loss, *sums = fn(model, opt, X, Y)
        assert_allclose(float(loss), losses[i], rtol=1e-5)
        assert_allclose(sums, [(X @ np.array(model.weight)).sum()] * 3, rtol=1e-4, atol=1e-6)
    assert_same(everything(model, opt), expected)


# -- devices, dtypes, settings -----------------------------------------------------------------------------------------


def test_shardings_stay() -> None:
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    model = nn.Linear(3, 4, key=jax.random.key(0))
    plain = copy.deepcopy(model)
    model.to(whole)
    model.weight = jax.device_put(model.weight, split)
    fn = mt.jit(lambda opt, x, y: step(opt.modules[0], opt, x, y), keep_grads=True)
    target = np.ones((4, 4), np.float32)
    opts = [optim.SGD([m], lr=0.1, momentum=0.9) for m in (model, plain)]
    for _ in range(3):
        read = model.weight
        losses = [float(fn(opt, X, target)) for opt in opts]
        assert_allclose(losses[0], losses[1], rtol=1e-5)
        assert not read.is_deleted()
    momentum = opts[0].state_dict()["state"]["0.weight"]["momentum_buffer"]
    for array in (model.weight, momentum, model.grads()[0]):
        assert array.sharding.is_equivalent_to(split, 2)
    assert model.bias.sharding.is_equivalent_to(whole, 1)
    assert_same(everything(model), everything(plain))
    assert fn.num_compiles == 2


def test_bfloat16() -> None:
    models = [Line().astype(jnp.bfloat16) for _ in range(2)]
    opts = [optim.SGD([m], lr=0.1, momentum=0.9) for m in models]
    x, y = jnp.asarray(X, jnp.bfloat16), jnp.asarray(Y, jnp.bfloat16)
    models = [o.modules[0].eval() for o in opts]
    fn = mt.jit(step)
    for _ in range(3):
        fn(models[0], opts[0], x, y)
        step(models[1], opts[1], x, y)
    assert [p.dtype for p in models[0].parameters()] == [jnp.bfloat16] * 2
    mine, theirs = (np.asarray(m.weight.astype(jnp.float32)) for m in models)
    assert_allclose(mine, theirs, atol=2e-2)
    assert not np.array_equal(mine, np.ones(3))
    assert fn.num_compiles == 1


@pytest.mark.slow
def test_disable_jit() -> None:
    model, opt = pair()
    fn = mt.jit(step)
    losses, expected = eagerly(3)
    with jax.disable_jit():
        got = [float(fn(model, opt, X, Y)) for _ in range(3)]
        kept = model.weight
        got_again = everything(model, opt)
    assert_allclose(got, losses, rtol=1e-5)
    assert_same(got_again, expected)
    fn(model, opt, X, Y)
    assert not kept.is_deleted()
    assert_same(everything(model, opt), eagerly(4)[1])


def test_debug_nans() -> None:
    model, opt = pair()
    fn = mt.jit(step)
    with jax.debug_nans(True):
        fn(model, opt, X, Y)
        before = everything(model, opt)
        with pytest.raises(FloatingPointError):
            fn(model, opt, np.full_like(X, np.nan), Y)
        assert_unchanged(before, model, opt)
        fn(model, opt, X, Y)
    assert_alive(model, opt)
    fn(model, opt, X, Y)
    assert_same(everything(model, opt), eagerly(3)[1])


def test_flattening_an_optimizer_under_debug_nans() -> None:
    """The NaN that stands for a gradient that was used up is no mistake of the user's."""
    model, opt = pair()
    mt.jit(step)(model, opt, X, Y)
    with jax.debug_nans(True):
        assert len(jax.tree.leaves(opt)) > 4
        copy.deepcopy(opt)


def test_log_compiles_names_the_function(caplog: Any) -> None:
    model, opt = pair()

    def very_special_step(x: Any, y: Any) -> Any:
        return step(model, opt, x, y)

    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        fn = mt.jit(very_special_step)
        fn(X, Y)
    assert any("Finished XLA compilation" in r.message and "very_special_step" in r.message for r in caplog.records)
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        fn(X, Y)
    assert not caplog.records


CACHED = textwrap.dedent(
    """
    import logging, sys, jax, numpy as np
    jax.config.update("jax_compilation_cache_dir", sys.argv[1])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    import minitorch_jax as mt
    from minitorch_jax import nn, optim
    found = {"hits": 0, "misses": 0}
    def count(name, **_):
        for kind in found:
            found[kind] += name == f"/jax/compilation_cache/cache_{kind}"
    model = nn.Linear(3, 2, key=jax.random.key(0))
    opt = optim.SGD([model], lr=0.1, momentum=0.9)
    jax.monitoring.register_event_listener(count)
    @mt.jit
    def step(x):
        opt.zero_grad()
        loss = mt.backward(lambda x: (model(x) ** 2).mean(), x)
        opt.step()
        return loss
    step(np.ones((4, 3), np.float32))
    print(found["hits"], found["misses"], step.num_compiles)
    """
)


def test_a_program_is_taken_from_the_persistent_cache(tmp_path: Any) -> None:
    """A second function that is the same, as in a second process, is not compiled."""
    found = []
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}

    def note(name: str, **_: Any) -> None:
        found.append(name.rpartition("/")[2])

    def make() -> Any:
        def cached_step(model: Any, opt: Any, x: Any, y: Any) -> Any:
            return step(model, opt, x, y)

        cached_step.__code__ = cached_step.__code__.replace()  # functions of one code object share their programs
        return mt.jit(cached_step)

    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        first, second = pair(), pair()
        jax.monitoring.register_event_listener(note)
        make()(*first, X, Y)
        assert any(path.name.startswith("jit_cached_step") for path in tmp_path.iterdir())
        found.clear()
        make()(*second, X, Y)
    finally:
        jax.monitoring.unregister_event_listener(note)
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert found.count("cache_hits") >= 1
    assert found.count("cache_misses") == 0
    assert_same(everything(*second), eagerly(1)[1])


@pytest.mark.slow
def test_the_persistent_compilation_cache_of_another_process(tmp_path: Any) -> None:
    """A second process takes the program from the first one's files."""
    counts = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", CACHED, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        counts.append([int(word) for word in done.stdout.split()])
    assert counts[0][1] >= 1
    assert counts[1][0] >= 1
    assert counts[1][1] == 0, "the second process compiled something anew"
    assert any(path.name.startswith("jit_step") for path in tmp_path.iterdir())


# -- lifetimes ---------------------------------------------------------------------------------------------------------


def test_models_that_are_dropped_are_freed_at_once() -> None:
    fn = mt.jit(step)
    gc.collect()
    gc.disable()
    try:
        for keep in (False, True):
            model, opt = pair()
            for _ in range(3):
                fn(model, opt, X, Y)
            references = weakref.ref(model), weakref.ref(opt)
            array = model.weight if keep else None
            del model, opt
            assert [reference() for reference in references] == [None, None]
            assert array is None or not array.is_deleted()
    finally:
        gc.enable()


def test_a_trainer_is_freed() -> None:
    trainer = Trainer()
    for _ in range(2):
        trainer.fit(X, Y)
    assert trainer.fit.num_compiles == 1
    references = [weakref.ref(obj) for obj in (trainer, trainer.model, trainer.opt)]
    del trainer
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


@pytest.mark.one_in(9)
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda obj: pickle.loads(pickle.dumps(obj)), copy.copy], ids=["deepcopy", "pickle", "copy"]
)
def test_a_trainer_is_copied(how: Any) -> None:
    """The copy's compiled method trains what the copy holds."""
    trainer = Trainer()
    for _ in range(2):
        trainer.fit(X, Y)
    again, steps = how(trainer), 2
    if how is copy.copy:
        again.model, again.opt = pair()
        steps = 0
    again.fit(X, Y)
    assert_same(again.everything(), eagerly(steps + 1)[1])
    assert_same(trainer.everything(), eagerly(2)[1])
    trainer.fit(X, Y)
    assert_same(trainer.everything(), eagerly(3)[1])
    assert_same(again.everything(), eagerly(steps + 1)[1])


def test_two_trainers_are_independent() -> None:
    a, b = Trainer(), Trainer()
    for _ in range(3):
        a.fit(X, Y)
    b.fit(X, Y)
    assert_same(a.everything(), eagerly(3)[1])
    assert_same(b.everything(), eagerly(1)[1])


def test_a_function_that_is_dropped_frees_what_it_closed_over() -> None:
    def made() -> Any:
        model, opt = pair()
        fn = mt.jit(lambda x, y: step(model, opt, x, y))
        fn(X, Y)
        return weakref.ref(model), weakref.ref(opt), weakref.ref(fn)

    references = made()
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_no_warnings_in_an_ordinary_loop() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, opt = pair()
        fn = mt.jit(step)
        for i in range(20):
            opt.lr = 0.1 / (i + 1)
            fn(model, opt, X + np.float32(i), Y)
    assert fn.num_compiles == 1
