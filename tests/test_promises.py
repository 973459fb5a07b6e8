"""The promises of a step: all or nothing, Ctrl-C, arrays that stay, threads. Faults are injected for real."""

import _thread
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import Boom

import minitorch_jax as mt
from minitorch_jax import nn, optim


def make_model(key=0):
    keys = jax.random.split(jax.random.key(key), 2)
    return nn.Sequential(nn.Linear(4, 8, key=keys[0]), nn.Tanh(), nn.Linear(8, 1, key=keys[1]))


def loss_fn(model, x):
    return (model(x) ** 2).mean()


X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


def snapshot(*objects):
    """Every bit of some modules and optimizers: values, gradients, states, counts."""
    bits = []
    for obj in objects:
        if isinstance(obj, mt.Module):
            bits += [np.asarray(a) for a in obj.state_dict().values()] + [np.asarray(g) for g in obj.grads()]
        else:
            state = obj.state_dict()
            bits += [np.asarray(a) for fields in state["state"].values() for a in fields.values()]
            bits += [np.asarray(state["num_steps"]), np.asarray(state["skipped"]), np.asarray(obj.lr)]
    return [b.tobytes() for b in bits]


def no_tracers(*objects):
    for obj in objects:
        for leaf in jax.tree.leaves(obj):
            assert not isinstance(leaf, jax.core.Tracer)
            assert not leaf.is_deleted()


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------

INTERRUPTS = textwrap.dedent(
    """
    import random, signal, sys, threading, time
    import jax, jax.numpy as jnp, numpy as np
    import minitorch_jax as mt
    from minitorch_jax import nn, optim

    class Mixed(mt.Module):
        '''Many small parameters, a large one, a tied one, and a buffer that counts the forward passes.'''
        def __init__(self):
            for i in range({small}):
                setattr(self, f"p{{i}}", mt.Parameter(jnp.ones(8)))
            self.large = mt.Parameter(jnp.ones({large}))
            self.inner = nn.Linear(8, 8, key=jax.random.key(0))
            self.also = self.inner
            self.calls = mt.Buffer(0)
        def forward(self, x):
            self.calls = self.calls + 1
            total = sum(getattr(self, f"p{{i}}").sum() for i in range({small}))
            return total + self.large.sum() + self.inner(self.also(x)).sum()

    model = Mixed()
    opt = optim.SGD([model], lr=1e-3, momentum=0.9)
    x = jnp.ones((2, 8))

    def loss_fn(model, x):
        return model(x) * 1e-3

    trajectory = [(1.0, 0.0)]  # of a parameter with d loss / dp = 1e-3, and of its momentum

    def expected(steps):
        while len(trajectory) <= steps:
            p, b = trajectory[-1]
            b = 0.9 * b + 1e-3
            trajectory.append((p - 1e-3 * b, b))
        return trajectory[steps]

    def check():
        '''Everything is alive, and parameters, momentum and counts belong to the same step.'''
        counts = np.asarray(opt._steps.value)
        steps = int(counts[-2])
        assert set(counts[:-1]) == {{steps}}, "step counts are torn"
        p, b = expected(steps)
        for name, cell in model._cells.items():
            if name == "calls":
                continue
            value, buffer = np.asarray(cell.value), np.asarray(opt._state[cell][1][0].value)
            assert abs(value - p).max() < 3e-6 + 1e-7 * steps, (name, value[0], p, steps)
            assert abs(buffer - b).max() < 1e-4 * b + 1e-9, (name, buffer[0], b, steps)
            if cell.grad.value is not None:
                assert abs(np.asarray(cell.grad.value) - 1e-3).max() < 1e-8, "a torn gradient"
        for cell in (*model.inner._cells.values(), model._cells["calls"]):
            assert not isinstance(cell.value, jax.core.Tracer) and not cell.value.is_deleted()
        assert int(model.calls) in (steps, steps + 1), (int(model.calls), steps)

    rng = random.Random({seed})
    fired = [False]

    def fire(*_):
        fired[0] = True
        signal.raise_signal(signal.SIGINT)

    def repeat():  # by itself: Python 3.13 may handle a signal at the very end of a `try`, when nothing is caught any more
        longest = max({high}, {steps} * busy / max(opt.num_steps, 1))  # on a busy machine, signals come later
        signal.setitimer(signal.ITIMER_REAL, rng.uniform({low}, longest))
        while not fired[0]:  # (one raised in a callback of the garbage collector is swallowed by Python)
            opt.zero_grad()
            mt.backward(loss_fn, model, x)
            opt.step()
            {each}

    signal.signal(signal.SIGALRM, fire)
    hit = tried = 0
    busy = 0.0  # seconds of all steps
    {warm}
    deadline = time.monotonic() + {seconds}
    while hit < {wanted} and time.monotonic() < deadline:
        tried += 1
        fired[0] = False
        begun = time.monotonic()
        try:
            repeat()
        except BaseException as error:  # NumPy and MLIR may make another of one raised while they call Python
            if not isinstance(error, (KeyboardInterrupt, SystemError)) and "KeyboardInterrupt" not in str(error):
                raise
            hit += 1
        busy += time.monotonic() - begun
        if opt.num_steps != int(model.calls):  # interrupted between backward and step: do that step again
            check()
            opt.step()
        check()
        {after}
    print("interrupts", hit, "steps", opt.num_steps)
    """
)


def run_interrupts(**settings):
    settings = {"small": 12, "large": 100_000, "seed": 0, "warm": "", "each": "", "after": "", "steps": 0, **settings}
    code = INTERRUPTS.format(**settings)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    _, hit, _, steps = done.stdout.split()
    return int(hit), int(steps)


# without it, each signal would fall into the first trace, and no step would ever be taken
WARM = "[(opt.zero_grad(), mt.backward(loss_fn, model, x), opt.step()) for _ in range(3)]"


def test_interrupts_at_random_instants_lose_and_tear_nothing():
    """Steady state: the signals fall on the three calls, with large and small parameters."""
    hit, steps = run_interrupts(wanted=2000, low=2e-4, high=4e-3, seconds=540, warm=WARM, steps=4)
    assert hit == 2000 and steps > hit


@pytest.mark.slow
def test_interrupts_while_tracing_and_compiling():
    """Every few microseconds to milliseconds of the first calls, where JAX runs Python after using up its inputs."""
    again = "jax.clear_caches(); mt.optim.update._steps.drop(bool); opt._plan = None; mt.state.structure.changed(opt)"
    again += "; loss_fn.__dict__.clear()"
    hit, steps = run_interrupts(small=2, large=64, wanted=60, low=1e-3, high=0.25, seconds=180, after=again, seed=1)
    assert hit == 60 and steps > 0


def test_interrupt_during_compilation_is_raised_afterwards():
    """A SIGINT that comes while XLA compiles is not lost: the call completes, then KeyboardInterrupt is raised."""
    model, started = make_model(), []

    def slow(model, x):
        started.append(True)
        _thread.interrupt_main()
        return loss_fn(model, x)

    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        mt.backward(slow, model, X)
    assert started
    assert snapshot(model) == before
    no_tracers(model)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.one_in(9)
@pytest.mark.parametrize("form", ["step", "jit", "scan"])
def test_an_interrupt_while_a_first_run_has_used_up_its_inputs_is_put_off(form):
    """JAX runs Python code between using up the inputs of a first call and returning its results."""
    model = make_model(3)
    opt = optim.SGD([model], lr=0.125, momentum=0.5)
    x = jnp.asarray(X)

    def train(x):
        opt.zero_grad()
        loss = mt.backward(loss_fn, model, x)
        opt.step()
        return loss

    run = {"step": opt.step, "jit": lambda: mt.jit(train)(x), "scan": lambda: mt.scan(train, x[None])}[form]
    if form == "step":
        mt.backward(loss_fn, model, x)
    old, hits = model[0]._cells["weight"].stored, []

    def interrupt(frame, event, arg):
        if not hits and old.is_deleted():
            hits.append(event)
            signal.raise_signal(signal.SIGINT)

    sys.setprofile(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            run()
    finally:
        sys.setprofile(None)
    assert len(hits) == 1, "the first run was to be in place"
    assert opt.num_steps == 1 and all(np.isfinite(np.asarray(leaf)).all() for leaf in model.state_dict().values())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run()
    assert opt.num_steps == 2


# -- all or nothing ----------------------------------------------------------------------------------------------------


class Fragile(mt.Module):
    """Raises at a chosen place of its forward pass, after it has changed what it could."""

    def __init__(self, at):
        self.first, self.second = nn.Linear(4, 4, key=jax.random.key(0)), nn.Linear(4, 1, key=jax.random.key(1))
        self.mean = mt.Buffer(jnp.zeros(4))
        self.calls = 0
        self.at = at

    def forward(self, x):
        self.calls = self.calls + 1
        if self.at == "start":
            raise Boom
        x = self.first(x)
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        if self.at == "middle":
            raise Boom
        x = self.second(x)
        if self.at == "interrupt":
            raise KeyboardInterrupt
        return x


@pytest.mark.parametrize("at", ["start", "middle", "interrupt"])
def test_an_exception_in_the_loss_changes_nothing(at):
    model = Fragile("nowhere")
    opt = optim.SGD([model], lr=0.1, momentum=0.9)
    mt.backward(lambda m, x: (m(x) ** 2).mean(), model, X)
    opt.step()
    model.at = at
    before, calls = snapshot(model, opt), model.calls
    with pytest.raises(KeyboardInterrupt if at == "interrupt" else Boom):
        mt.backward(lambda m, x: (m(x) ** 2).mean(), model, X)
    assert snapshot(model, opt) == before
    assert model.calls == calls
    no_tracers(model, opt)


def test_an_exception_in_a_closure_run_changes_nothing():
    model = Fragile("middle")
    holder = {"get": lambda: model}  # found by the first trace only
    before = snapshot(model)
    with pytest.raises(Boom):
        mt.backward(lambda x: (holder["get"]()(x) ** 2).mean(), X)
    assert snapshot(model) == before
    assert model.calls == 0


@pytest.mark.parametrize("returned", ["vector", "text", "integer"])
def test_a_wrong_loss_changes_nothing(returned):
    model = Fragile("nowhere")
    before = snapshot(model)
    out = {"vector": lambda y: y, "text": lambda y: "loss", "integer": lambda y: (y > 0).sum()}[returned]
    with pytest.raises(TypeError, match="loss"):
        mt.backward(lambda m, x: out(m(x)), model, X)
    assert snapshot(model) == before
    assert model.calls == 0


def test_a_failing_compilation_changes_nothing(monkeypatch):
    model = make_model()
    opt = optim.SGD([model], lr=0.1, momentum=0.9)
    mt.backward(loss_fn, model, X)
    before = snapshot(model, opt)
    from jax._src import compiler

    def fail(*args, **kwargs):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory (injected)")

    jax.clear_caches()
    monkeypatch.setattr(compiler, "backend_compile_and_load", fail)
    with pytest.raises(RuntimeError, match="injected"):
        mt.backward(lambda m, x: (m(x) ** 4).mean(), model, X)
    with pytest.raises(RuntimeError, match="injected"):
        opt.step()
    monkeypatch.undo()
    assert snapshot(model, opt) == before
    opt.step()
    no_tracers(model, opt)
    assert snapshot(model, opt) != before


def test_an_allocation_that_fails_while_running_changes_nothing():
    model = make_model()
    opt = optim.SGD([model], lr=0.1, momentum=0.9)
    mt.backward(loss_fn, model, X)
    before = snapshot(model, opt)

    def greedy(model, x):
        column = jnp.arange(1 << 21, dtype=jnp.float32)
        out = model(x).sum()
        big = jnp.sin(column[:, None] * column[None] * jax.lax.stop_gradient(out))  # 16 TiB, which no fusion avoids:
        return jnp.sort(big, axis=0)[1, 1] * out

    with pytest.raises(Exception, match="(?i)memory|RESOURCE_EXHAUSTED|alloc"):
        mt.backward(greedy, model, X)
    assert snapshot(model, opt) == before
    no_tracers(model, opt)


@pytest.mark.filterwarnings("ignore::minitorch_jax.RecompileWarning")  # `fail` is read by name, and changed twice
def test_a_callback_that_raises_while_running_changes_nothing():
    """Such a failure comes after the inputs would have been donated, so programs with callbacks donate nothing."""
    model = make_model()
    model.zero_grad()
    fail = [False]

    def check(value):
        if fail[0]:
            raise Boom("injected")
        return value

    def checked_loss(model, x):
        y = model(x)
        y = y + jax.pure_callback(check, jax.ShapeDtypeStruct(y.shape, y.dtype), jax.lax.stop_gradient(y))
        return (y**2).mean()

    mt.backward(checked_loss, model, X)
    before = snapshot(model)
    fail[0] = True
    with pytest.raises(Exception, match="injected"):
        mt.backward(checked_loss, model, X)
    assert snapshot(model) == before
    fail[0] = False
    mt.backward(checked_loss, model, X)
    assert snapshot(model) != before


@pytest.mark.parametrize("stage", ["init_state", "update", "wrong shape"])
def test_an_exception_in_a_rule_changes_nothing(stage):
    class Rule(mt.Optimizer):
        fails = [stage == "init_state"]

        @staticmethod
        def init_state(p, h):
            if Rule.fails[0]:
                raise Boom
            return (jnp.zeros_like(p),)

        @staticmethod
        def update(p, g, s, h):
            if stage == "update":
                raise Boom
            return p - h.lr * g, (s[0] + 1 if stage != "wrong shape" else s[0].at[0, 0, 0, 0].add(1),)

    model = make_model()
    before = snapshot(model)
    if stage == "init_state":
        with pytest.raises(Boom):
            Rule([model])
        assert snapshot(model) == before
        return
    opt = Rule([model])
    mt.backward(loss_fn, model, X)
    before = snapshot(model, opt)
    with pytest.raises((Boom, IndexError)):
        opt.step()
    assert snapshot(model, opt) == before
    no_tracers(model, opt)


def test_debug_nans_raises_and_changes_nothing():
    model = make_model()
    opt = optim.SGD([model], lr=0.1, momentum=0.9)
    mt.backward(loss_fn, model, X)
    opt.step()
    before = snapshot(model, opt)
    with jax.debug_nans(True):
        with pytest.raises(FloatingPointError):
            mt.backward(lambda m, x: jnp.log(-jnp.abs(m(x)).mean()), model, X)
        assert snapshot(model, opt) == before
        mt.backward(loss_fn, model, X)
        opt.step()
    no_tracers(model, opt)


def test_disable_jit_trains_the_same():
    plain, disabled = make_model(), make_model()
    for model, context in ((plain, jax.disable_jit(False)), (disabled, jax.disable_jit(True))):
        opt = optim.SGD([model], lr=0.1, momentum=0.9)
        with context:
            for _ in range(3):
                opt.zero_grad()
                mt.backward(loss_fn, model, X)
                opt.step()
    for a, b in zip(plain.parameters(), disabled.parameters(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


# -- an array you read is yours ----------------------------------------------------------------------------------------


def held_arrays(model):
    """Arrays that share, or may share, buffers with the model's, by every way we know."""
    w = model[0].weight
    yield "read", w
    yield "device_put", jax.device_put(w)
    yield "shard", w.addressable_data(0)
    yield "to_device", w.to_device(jax.devices()[0])
    yield "parameters()", model.parameters()[0]
    yield "state_dict", model.state_dict()["0.weight"]
    yield "leaf", jax.tree.leaves(model)[0]
    yield "numpy", np.asarray(model[0].weight)
    yield "identity", jax.jit(lambda a: a)(model[0].weight)
    yield "gradient", model.grads()[0]


def train(model, opt, steps=3):
    for _ in range(steps):
        opt.zero_grad()
        mt.backward(loss_fn, model, X)
        opt.step()


def test_arrays_read_stay_readable_and_unchanged():
    model = make_model()
    opt = optim.SGD([model], lr=0.1, momentum=0.9)
    train(model, opt)
    for name, array in held_arrays(model):
        value = np.array(array)
        gc.collect()
        train(model, opt)
        np.testing.assert_array_equal(np.asarray(array), value, err_msg=name)
    momentum = opt.state_dict()["state"]["0.0.weight"]["momentum_buffer"]
    value = np.array(momentum)
    train(model, opt)
    np.testing.assert_array_equal(momentum, value)


def test_copies_of_a_model_do_not_die_with_it():
    model = make_model()
    opt = optim.SGD([model], lr=0.1, momentum=0.9)
    train(model, opt)
    for copied in (jax.device_put(model), jax.tree.map(lambda a: a, model), jax.device_put(opt).modules[0]):
        before = snapshot(copied)
        train(model, opt)
        assert snapshot(copied)[:4] == before[:4]
        other = optim.SGD([copied], lr=0.1)
        mine = snapshot(model)
        train(copied, other)
        assert snapshot(model) == mine


def test_arrays_given_stay_the_givers():
    array = jnp.ones((8, 4))
    model, other = make_model(), make_model()
    model[0].weight = array
    other[0].weight = array
    both = nn.Sequential(model, other)  # one array in two parameters of one optimizer
    opt = optim.SGD([both], lr=0.1)
    for _ in range(2):
        opt.zero_grad()
        mt.backward(lambda m, x: (m[0](x) ** 2).mean() + (m[1](x) ** 4).mean(), both, X)
        opt.step()
    np.testing.assert_array_equal(array, np.ones((8, 4)))
    assert not np.array_equal(model[0].weight, other[0].weight)


def test_numpy_memory_is_copied_in():
    storage = np.zeros(32 + 16, np.float32)
    offset = (-storage.ctypes.data // 4) % 16  # 64-byte aligned, which JAX may alias
    source = storage[offset : offset + 32].reshape(8, 4)
    model = make_model()
    model[0].weight = source
    source[:] = 7.0
    np.testing.assert_array_equal(model[0].weight, np.zeros((8, 4)))
    layer = mt.Parameter(source)
    source[:] = 9.0
    assert float(layer._cell.value[0, 0]) == 7.0


def test_a_loss_that_is_a_parameter_is_not_donated_with_it():
    class One(mt.Module):
        def __init__(self):
            self.scale = mt.Parameter(3.0)

    model = One()
    opt = mt.Optimizer([model], lr=0.5)
    losses = []
    for _ in range(3):
        opt.zero_grad()
        losses.append(mt.backward(lambda m: m.scale, model))
        opt.step()
    assert [float(loss) for loss in losses] == [3.0, 2.5, 2.0]


def test_what_nobody_holds_is_updated_in_place():
    model = make_model()
    opt = mt.Optimizer([model], lr=0.1)
    train(model, opt)
    cells = opt._plan.params
    pointers = [cell.value.unsafe_buffer_pointer() for cell in cells]
    old = [cell.value for cell in cells]
    opt.step()
    assert [cell.value.unsafe_buffer_pointer() for cell in cells] == pointers
    assert all(array.is_deleted() for array in old)


def test_shardings_stay():
    """Of parameters, momentum and gradients, over steps and over copies for readers."""
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    sharded, plain = make_model(), make_model()
    sharded.to(whole)
    sharded[0].weight = jax.device_put(sharded[0].weight, split)
    for model in (sharded, plain):
        opt = optim.SGD([model], lr=0.1, momentum=0.9)
        for _ in range(3):
            read = model[0].weight
            train(model, opt, 1)
            assert not read.is_deleted()
        momentum = opt.state_dict()["state"]["0.0.weight"]["momentum_buffer"]
        if model is sharded:
            for array in (model[0].weight, momentum, model[0].grads()[0]):
                assert array.sharding.is_equivalent_to(split, 2)
            assert model[2].weight.sharding.is_equivalent_to(whole, 2)
    for a, b in zip(sharded.parameters(), plain.parameters(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


# -- threads -----------------------------------------------------------------------------------------------------------


def test_independent_threads_train_independent_models():
    def trained(key):
        model = make_model(key)
        opt = optim.SGD([model], lr=0.1, momentum=0.9)
        train(model, opt, 40)
        return [np.array(p) for p in model.parameters()]

    alone = [trained(key) for key in range(4)]
    together, errors = [None] * 4, []

    def work(key):
        try:
            together[key] = trained(key)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(key,)) for key in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors
    for a, b in zip(alone, together, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def test_memory_of_a_dropped_model_is_freed_without_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        opt = optim.SGD([model], lr=0.1, momentum=0.9)
        x = jnp.ones((2, 64))
        for _ in range(2):
            opt.zero_grad()
            mt.backward(loss_fn, model, x)
            opt.step()
        pointers = {a.unsafe_buffer_pointer() for a in model.parameters()}
        del model, opt
        assert not pointers & {a.unsafe_buffer_pointer() for a in jax.live_arrays() if a.shape == (64, 64)}
    finally:
        gc.enable()


assert os.name == "posix", "the interrupts are POSIX signals"
