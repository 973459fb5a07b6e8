"""Forward hooks: torch's semantics, in eager code and in traces; a change of structure; copies, files, errors."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import weakref
from collections import deque
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_contract import check_later_calls
from numpy.testing import assert_allclose
from oracle import actual as torch

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.module.hooks import HOOKS, hooks_of, watchers

X = jnp.linspace(-1, 1, 6).reshape(2, 3)


# -- torch's semantics: each scenario is run by both, on numbers --------------------------------------------------------


def order_and_prepend(net: Any, log: list[Any]) -> Any:
    for name in "abc":
        net.register_forward_pre_hook(lambda m, args, name=name: log.append((name, args)), prepend=name == "c")
    for name in "def":
        net.register_forward_hook(lambda m, args, out, name=name: log.append((name, args, out)), prepend=name == "f")
    return net(2.0)


def pre_hooks_that_return(net: Any, log: list[Any]) -> Any:
    net.register_forward_pre_hook(lambda m, args: (args[0] + 1, 10.0))
    net.register_forward_pre_hook(lambda m, args: log.append(args))
    net.register_forward_pre_hook(lambda m, args: args[0] * args[1])
    net.register_forward_hook(lambda m, args, out: log.append((args, out)))
    return net(2.0)


def keyword_arguments(net: Any, log: list[Any]) -> Any:
    def double(module: Any, args: Any, kwargs: Any) -> Any:
        log.append((args, dict(kwargs)))
        return (args[0] * 2,), {**kwargs, "scale": kwargs.get("scale", 1.0) + 1}

    def in_place(module: Any, args: Any, kwargs: Any) -> None:
        kwargs["scale"] += 100

    net.register_forward_pre_hook(double, with_kwargs=True)
    net.register_forward_pre_hook(lambda m, args: log.append(args))
    net.register_forward_pre_hook(in_place, with_kwargs=True, prepend=False)
    net.register_forward_hook(lambda m, args, kwargs, out: log.append((args, kwargs, out)), with_kwargs=True)
    net.register_forward_hook(lambda m, args, kwargs, out: out - kwargs["scale"], with_kwargs=True, prepend=True)
    return net(2.0, scale=3.0), net(1.0)


def replaced_outputs(net: Any, log: list[Any]) -> Any:
    net.register_forward_hook(lambda m, args, out: out + 1)
    net.register_forward_hook(lambda m, args, out: log.append(out))
    net.register_forward_hook(lambda m, args, out: (out, args))
    net.register_forward_hook(lambda m, args, out: log.append(out))
    return net(2.0)


def forward_raises(net: Any, log: list[Any]) -> Any:
    net.register_forward_hook(lambda m, args, out: log.append("never"))
    net.register_forward_hook(lambda m, args, out: log.append((args, out)), always_call=True)
    net.register_forward_hook(
        lambda m, args, kwargs, out: log.append((args, kwargs, out)), always_call=True, with_kwargs=True
    )
    with pytest.raises(ZeroDivisionError):
        net(2.0, raises=True)
    return net(3.0)


def hooks_raise(net: Any, log: list[Any]) -> Any:
    def broken(module: Any, args: Any, out: Any) -> None:
        log.append("broken")
        raise KeyError("broken")

    net.register_forward_hook(lambda m, args, out: log.append(("first", out)), always_call=True)
    net.register_forward_hook(lambda m, args, out: out * 2)
    net.register_forward_hook(broken, always_call=True)  # has begun, so it is not run again
    net.register_forward_hook(lambda m, args, out: log.append(("last", out)), always_call=True)
    with pytest.raises(KeyError):
        net(2.0)
    with pytest.warns(UserWarning, match="always_call=True.* raised an exception that was silenced"):
        with pytest.raises(ZeroDivisionError):
            net(2.0, raises=True)
    net.register_forward_pre_hook(lambda m, args: 1 / 0)
    with pytest.warns(UserWarning, match="silenced"), pytest.raises(ZeroDivisionError):
        net(2.0)
    return log


def handles(net: Any, log: list[Any]) -> Any:
    def hook(module: Any, args: Any, out: Any) -> Any:
        log.append(out)
        return out + 1

    one, two = net.register_forward_hook(hook), net.register_forward_hook(hook)
    results = [net(1.0)]
    one.remove()
    one.remove()
    results.append(net(1.0))
    with net.register_forward_hook(hook) as three:
        results.append(net(1.0))
    results.append(net(1.0))
    three.remove()
    two.remove()
    results.append(net(1.0))
    with pytest.raises(ValueError, match="in the block"), net.register_forward_hook(hook):
        raise ValueError("in the block")
    return [*results, net(1.0)]


def changes_during_a_call(net: Any, log: list[Any]) -> Any:
    def once(module: Any, args: Any, out: Any) -> None:
        log.append("once")
        handle.remove()

    def adds(module: Any, args: Any) -> None:
        module.register_forward_hook(lambda m, args, out: log.append("added"))

    net.register_forward_pre_hook(adds)
    handle = net.register_forward_hook(once)
    net.register_forward_hook(lambda m, args, out: log.append("last"))
    return net(1.0), net(1.0)


def methods_and_objects(net: Any, log: list[Any]) -> Any:
    class Counter:
        count = 0

        def __call__(self, module: Any, args: Any, out: Any) -> Any:
            self.count += 1
            return out + self.count

        def before(self, module: Any, args: Any) -> None:
            log.append(self.count)

    counter = Counter()
    net.register_forward_hook(counter)
    net.register_forward_pre_hook(counter.before)
    net.register_forward_hook(functools.partial(lambda n, m, args, out: out * n, 10))
    return net(1.0), net(1.0)


def copies(net: Any, log: list[Any]) -> Any:
    class Kept:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def note(self, module: Any, args: Any, out: Any) -> None:
            self.seen.append(out)

    kept = Kept()
    handle = net.register_forward_hook(lambda m, args, out: log.append(out))  # one function for both
    net.register_forward_hook(kept.note)  # a method becomes that of a copied object
    other, shallow = copy.deepcopy(net), copy.copy(net)
    results = [net(1.0), other(2.0), shallow(3.0), list(kept.seen)]
    handle.remove()
    return [*results, net(4.0), other(5.0), kept.seen[-1:]]


def the_handle_is_copied_too(net: Any, log: list[Any]) -> Any:
    net.handle = net.register_forward_hook(lambda m, args, out: log.append(out))
    other = copy.deepcopy(net)
    other.handle.remove()
    return net(1.0), other(2.0)


SCENARIOS = (
    *(order_and_prepend, pre_hooks_that_return, keyword_arguments, replaced_outputs, forward_raises, hooks_raise),
    *(handles, changes_during_a_call, methods_and_objects, copies, the_handle_is_copied_too),
)
EXPECTED = {
    "order_and_prepend": (
        2.0,
        [("c", (2.0,)), ("a", (2.0,)), ("b", (2.0,)), ("f", (2.0,), 2.0), ("d", (2.0,), 2.0), ("e", (2.0,), 2.0)],
    ),
    "pre_hooks_that_return": (30.0, [(3.0, 10.0), ((30.0,), 30.0)]),
    "replaced_outputs": ((3.0, (2.0,)), [3.0, (3.0, (2.0,))]),
    "forward_raises": (
        3.0,
        [((2.0,), None), ((2.0,), {"raises": True}, None), "never", ((3.0,), 3.0), ((3.0,), {}, 3.0)],
    ),
    "handles": ([3.0, 2.0, 3.0, 2.0, 1.0, 1.0], [1.0, 2.0, 1.0, 1.0, 2.0, 1.0]),
    "changes_during_a_call": ((1.0, 1.0), ["once", "last", "added", "last", "added", "added"]),
    "methods_and_objects": ((20.0, 30.0), [0, 1]),
    "the_handle_is_copied_too": ((1.0, 2.0), [1.0]),
}


def outcome(base: Any, scenario: Any) -> Any:
    class Net(base):
        def __init__(self) -> None:
            super().__init__()

        def forward(self, x: Any, scale: Any = 1.0, raises: bool = False) -> Any:
            return 1 / 0 if raises else x * scale

    log: list[Any] = []
    return scenario(Net(), log), log


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_semantics(scenario):
    result = outcome(mt.Module, scenario)
    if scenario.__name__ in EXPECTED:
        assert result == EXPECTED[scenario.__name__]
    assert repr(result)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_semantics_are_those_of_torch(scenario):
    assert outcome(mt.Module, scenario) == outcome(torch.nn.Module, scenario)


def test_the_handle_outlives_the_module():
    layer = nn.Linear(3, 2)
    gone, handle = weakref.ref(layer), layer.register_forward_hook(lambda m, args, out: None)
    del layer
    gc.collect()
    assert gone() is None  # the handle does not keep it
    handle.remove()
    handle.remove()


@pytest.mark.parametrize("what", [3, "hook", None, jnp.ones(2), nn.ReLU()], ids=repr)
def test_what_is_no_function_is_refused(what):
    layer = nn.Linear(3, 2)
    with pytest.raises(
        TypeError, match=r"Linear.register_forward_hook takes a function; got .*`def hook\(module, args, out"
    ):
        layer.register_forward_hook(what)
    with pytest.raises(
        TypeError, match=r"Linear.register_forward_pre_hook takes a function; got .*hook\(module, args\):"
    ):
        layer.register_forward_pre_hook(what)
    assert HOOKS not in vars(layer)


@pytest.mark.parametrize("wrong", [3, (1,), (X, {}), ((X,), {}, 1), ((X,), None)], ids=str)
def test_a_pre_hook_with_kwargs_returns_a_pair(wrong):
    layer = nn.Linear(3, 2)
    layer.register_forward_pre_hook(lambda m, args, kwargs: wrong, with_kwargs=True)
    with pytest.raises(
        RuntimeError, match=r"the forward pre-hook `<lambda>` of Linear.*must return None or a tuple \(new"
    ):
        layer(X)


def test_numpy_arrays_of_a_pre_hook_are_copied():
    mine, layer = np.ones((200, 300), np.float32), nn.Identity()
    layer.register_forward_pre_hook(lambda m, args: mine)
    out = layer(X)
    mine[:] = 0
    assert float(out.sum()) == mine.size


# -- wherever modules are called --------------------------------------------------------------------------------------


class Net(mt.Module):
    def __init__(self) -> None:
        self.body = nn.Sequential(nn.Linear(3, 4, key=jax.random.key(0)), nn.Tanh())
        self.head = nn.Linear(4, 2, key=jax.random.key(1))

    def forward(self, x: Any) -> Any:
        return self.head(self.body(x))


class Hooked(Net):
    """What the hooks of `hook_all` make of Net, written out."""

    def forward(self, x: Any) -> Any:
        x = self.body[0](x * 2)
        x = jnp.tanh(x) + 1
        return self.head(x) * x.mean()


def hook_all(net: Net) -> list[Any]:
    return [
        net.body.register_forward_pre_hook(lambda m, args: args[0] * 2),
        net.body[1].register_forward_hook(lambda m, args, out: out + 1),
        net.head.register_forward_hook(lambda m, args, out: out * args[0].mean()),
    ]


def loss_of(model: Any, x: Any) -> Any:
    return (model(x) ** 2).sum()


def trained(model: Any, way: str) -> Any:
    """Parameters, after some steps of training in one of the ways."""
    opt = optim.SGD([model], lr=0.01, momentum=0.9)

    def step(x: Any) -> Any:
        opt.zero_grad()
        loss = mt.backward(loss_of, model, x)
        opt.step()
        return loss

    if way == "scan":
        mt.scan(step, jnp.stack([X, X + 1, X]))
        return model.parameters()
    run = mt.jit(step) if way == "jit" else step
    for x in (X, X + 1, X):
        if way == "grad":
            opt.zero_grad()
            model.accumulate(jax.grad(loss_of)(model, x))
            opt.step()
        elif way == "mt.grad":
            opt.zero_grad()
            model.accumulate(mt.grad(loss_of)(model, x))
            opt.step()
        elif way == "disable_jit":
            with jax.disable_jit():
                step(x)
        else:
            run(x)
    return model.parameters()


@pytest.mark.one_in(8)
@pytest.mark.parametrize("way", ["backward", "jit", "scan", "grad", "mt.grad", "disable_jit"])
def test_training_with_hooks(way):
    net = Net()
    hook_all(net)
    for mine, theirs in zip(trained(net, way), trained(Hooked(), "backward"), strict=True):
        assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def compiled_in_place(net: Any) -> Any:
    net.compile()
    return net(X)


def packed(net: Any) -> Any:
    mt.pack(net)
    return net(X)


def under_anomaly(net: Any) -> Any:
    with mt.detect_anomaly():
        return net(X)


def under_autocast(net: Any) -> Any:
    with mt.autocast(jnp.float16):
        return net(X)


CALLS = {
    "eager": lambda net: net(X),
    "mt.jit": lambda net: mt.jit(lambda x: net(x))(X),
    "mt.jit(model)": lambda net: mt.jit(net)(X),
    "compile": compiled_in_place,
    "jax.jit": lambda net: jax.jit(lambda net, x: net(x))(net, X),
    "vmap": lambda net: jax.vmap(lambda net, x: net(x[None])[0], (None, 0))(net, X[:1]),
    "checkpoint": lambda net: jax.checkpoint(lambda net, x: net(x))(net, X),
    "packed": packed,
    "frozen": lambda net: net.freeze()(X),
    "eval": lambda net: net.eval()(X),
    "anomaly": under_anomaly,
    "deepcopy": lambda net: copy.deepcopy(net)(X),
    "copy": lambda net: copy.copy(net)(X),
    "flattened": lambda net: jax.tree.unflatten(*reversed(jax.tree.flatten(net)))(X),
    "tree.map": lambda net: jax.tree.map(lambda x: x, net)(X),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("way", CALLS)
def test_hooks_run_wherever_modules_are_called(way):
    net = Net()
    handles = hook_all(net)
    x = X[:1] if way == "vmap" else X
    assert_allclose(CALLS[way](net), Hooked()(x), rtol=1e-5, atol=1e-6)
    if way != "frozen":
        for handle in handles:
            handle.remove()
        assert_allclose(CALLS[way](net), Net()(x), rtol=1e-5, atol=1e-6)
    assert not watchers or way  # other tests may have left hooks alive


def test_under_autocast():
    net, plain = Net(), Hooked()
    hook_all(net)
    assert_allclose(under_autocast(net), under_autocast(plain), rtol=1e-2, atol=1e-3)
    assert under_autocast(net).dtype == under_autocast(plain).dtype


def test_anomaly_looks_at_what_a_hook_makes_of_an_output():
    net = Net()
    net.body[1].register_forward_hook(lambda m, args, out: out / 0)
    with (
        mt.detect_anomaly(),
        pytest.raises(FloatingPointError, match=r"The output of Net.body.1 \(Tanh\) is not finite"),
    ):
        net(X)


def test_what_a_hook_computes_is_in_the_scope_of_its_module():
    net = Net()
    net.body[1].register_forward_hook(lambda m, args, out: jnp.cos(out))
    assert "Net/body/1/cos" in mt.jit(lambda x: net(x)).lower(X).compile().as_text()


@pytest.mark.parametrize(
    "call", [lambda net: net(X), lambda net: mt.jit(lambda x: net(x))(X), lambda net: jax.jit(loss_of)(net, X)]
)
def test_an_error_in_a_hook_names_the_hook_and_the_module(call):
    def careless(module, args, out):
        return out + jnp.ones(17)

    net = Net()
    net.body[0].register_forward_hook(careless)
    with pytest.raises((TypeError, ValueError)) as error:
        call(net)
    notes = "\n".join(error.value.__notes__)
    assert "in the forward hook `careless` of Linear\nwhile calling body.0: Linear(3, 4), given float32[2, 3]" in notes
    assert notes.count("while calling") == 1


def test_a_type_error_in_a_hook_is_not_taken_for_a_wrong_input():
    layer = nn.Linear(3, 2)
    layer.register_forward_pre_hook(lambda m, args: jnp.asarray(args[0]))
    layer.register_forward_hook(lambda m, args, out: None)
    assert layer([[1.0, 2.0, 3.0]]).shape == (1, 2)
    layer.register_forward_hook(lambda m, args, out: len(3))
    with pytest.raises(TypeError, match="object of type 'int' has no len"):
        layer([[1.0, 2.0, 3.0]])


# -- a change of structure ----------------------------------------------------------------------------------------------


def test_a_compiled_function_sees_changes_and_compiles_each_set_of_hooks_once():
    net = Net()
    run = mt.jit(lambda x: net(x))

    def double(module, args, out):
        return out * 2

    def negative(module, args):
        return -args[0]

    plain = run(X)
    for _ in range(3):
        one = net.register_forward_hook(double)
        assert_allclose(run(X), plain * 2, rtol=1e-6)
        two = net.register_forward_hook(double)
        assert_allclose(run(X), plain * 4, rtol=1e-6)
        three = net.register_forward_pre_hook(negative)
        assert_allclose(run(X), 4 * Net()(-X), rtol=1e-5)
        one.remove()
        assert_allclose(run(X), 2 * Net()(-X), rtol=1e-5)
        two.remove()
        three.remove()
        assert_allclose(run(X), plain)
        assert run.num_compiles == 5


def test_steps_compile_nothing_when_hooks_come_and_go():
    net = Net()
    opt = optim.SGD([net], lr=0.1)

    def train() -> None:
        with net.register_forward_hook(lambda m, args, out: out * 2):
            mt.backward(loss_of, net, X)
            opt.step()
        mt.backward(loss_of, net, X)
        opt.step()

    check_later_calls("training", train)


def test_hooks_of_the_same_code_share_programs():
    net = Net()
    run = mt.jit(lambda x: net(x))
    run(X)

    def scaled_by(n):
        return lambda m, args, out: out * n

    shift = jnp.ones(2)
    for i in range(12):
        with net.register_forward_hook(lambda m, args, out: out * 2):
            assert_allclose(run(X), 2 * Net()(X), rtol=1e-5)
        with net.head.register_forward_hook(lambda m, args, out, shift=shift * i: out + shift[None]):  # an input
            assert_allclose(run(X), Net()(X) + i, rtol=1e-5, atol=1e-6)
        with net.register_forward_hook(scaled_by(i % 2)):  # a part of the program
            assert_allclose(run(X), (i % 2) * Net()(X), rtol=1e-5)
    assert run.num_compiles == 1 + 1 + 1 + 2


def test_functions_of_other_code_compile_and_the_warning_names_the_hook():
    net = Net()
    run = mt.jit(lambda x: net(x))
    with pytest.warns(mt.RecompileWarning, match="forward hook `hook` of Linear"):
        for i in range(8):
            scope: dict[str, Any] = {}
            exec(f"def hook(module, args, out): return out * {i}.0", scope)  # noqa: S102
            with net.head.register_forward_hook(scope["hook"]):
                assert_allclose(run(X), i * Net()(X), rtol=1e-5)


def test_a_copy_that_is_returned_has_the_hooks_of_the_call():
    run = mt.jit(lambda net, x: jax.tree.map(lambda leaf: leaf * 1, net))
    for n in (2, 3):
        net = Net()
        net.register_forward_hook(lambda m, args, out, n=n: out * n)
        assert_allclose(run(net, X)(X), n * Net()(X), rtol=1e-5)
    hook = hooks_of(net)[0].function
    assert hooks_of(run(net, X))[0].function is hook


@pytest.mark.filterwarnings("ignore::minitorch_jax.RecompileWarning")
def test_what_a_hook_reads_is_followed():
    net, other = Net(), nn.Linear(2, 2, key=jax.random.key(5))
    settings = SimpleNamespace(scale=2.0, unused=0)
    weights = {"shift": jnp.ones(2)}

    class Holder:
        def __init__(self) -> None:
            self.power = 1

        def hook(self, module, args, out):
            return out**self.power

    holder = Holder()
    net.head.register_forward_hook(lambda m, args, out: out * settings.scale + weights["shift"][None])
    net.head.register_forward_hook(lambda m, args, out: other(out))
    net.register_forward_hook(holder.hook)
    run = mt.jit(lambda x: net(x))

    def check() -> None:
        assert_allclose(
            run(X), other(Net()(X) * settings.scale + weights["shift"][None]) ** holder.power, rtol=1e-5, atol=1e-6
        )

    check()
    weights["shift"] = jnp.zeros(2)
    check()
    other.weight = other.weight * 2
    check()
    settings.unused = 3
    check()
    assert run.num_compiles == 1
    settings.scale = 3.0
    check()
    holder.power = 2
    check()
    other.freeze()
    check()
    holder.power = 1
    check()
    assert run.num_compiles <= 5
    runs = run.num_compiles
    for holder.power in (2, 1, 2):
        check()
    assert run.num_compiles == runs


@pytest.mark.parametrize("compiled", [False, True])
def test_modules_in_a_hook_are_trained(compiled):
    net, probe = Net(), nn.Linear(2, 1, key=jax.random.key(3))
    net.register_forward_hook(lambda m, args, out: probe(out))
    opt = optim.SGD([net, probe], lr=0.1)
    before = np.asarray(probe.weight)

    def step(x):
        opt.zero_grad()
        loss = mt.backward(loss_of, net, x)
        opt.step()
        return loss

    run = mt.jit(step) if compiled else step
    first = [float(run(X)) for _ in range(4)]
    assert first[-1] < first[0] and not np.array_equal(before, probe.weight)
    if compiled:
        assert run.num_compiles == 1


def test_the_hook_may_close_over_the_model_and_the_model_is_freed():
    class Extractor(mt.Module):
        def __init__(self, model):
            self.model = model
            self.calls = mt.Buffer(0)
            self.handle = model.head.register_forward_hook(self.note)

        def note(self, module, args, out):
            self.calls = self.calls + 1

        def forward(self, x):
            return self.model(x)

    extractor = Extractor(Net())
    run = mt.jit(extractor)
    extractor(X), run(X), run(X)
    assert int(extractor.calls) == 3
    other = copy.deepcopy(extractor)
    other(X)
    assert (int(extractor.calls), int(other.calls)) == (3, 4)
    extractor.handle.remove()
    other(X), run(X)
    assert (int(extractor.calls), int(other.calls)) == (3, 5)
    gone = weakref.ref(extractor)
    del extractor, run
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("compiled", [False, True])
def test_a_function_is_freed_when_its_hook_is_removed(compiled):
    net = Net()
    run = mt.jit(lambda x: net(x)) if compiled else net
    run(X)

    def register() -> tuple[Any, Any]:
        kept = Holder()
        handle = net.register_forward_hook(lambda m, args, out: out if kept.out is None else None)
        return weakref.ref(kept), handle

    gone, handle = register()
    run(X), run(X)
    handle.remove()
    run(X)
    gc.collect()
    assert gone() is None


def test_hooks_added_and_removed_within_compiled_code():
    net = Net()

    @mt.jit
    def run(x):
        with net.register_forward_hook(lambda m, args, out: out * 2):
            return net(x)

    for _ in range(3):
        assert_allclose(run(X), 2 * Net()(X), rtol=1e-5)
    assert run.num_compiles == 1 and HOOKS not in vars(net)

    def leaves_one(net, x):
        net.register_forward_hook(lambda m, args, out: out * 2)
        return loss_of(net, x)

    for n in (1, 2):  # as in eager code: once at each call
        mt.backward(leaves_one, net, X)
        assert len(hooks_of(net)) == n
    with pytest.raises(mt.TraceError, match="Net's set of hooks was changed inside a JAX transform"):
        jax.jit(lambda x: leaves_one(net, x))(X)


# -- values that a hook keeps -------------------------------------------------------------------------------------------


class Holder:
    def __init__(self) -> None:
        self.out: Any = None
        self.by_name: dict[str, Any] = {}


KEEPS = {
    "a list": lambda kept: lambda m, args, out: kept["list"].append(out),
    "an input": lambda kept: lambda m, args, out: kept["list"].append(args[0]),
    "all inputs": lambda kept: lambda m, args, out: kept["list"].append(args),
    "an attribute": lambda kept: lambda m, args, out: setattr(kept["holder"], "out", out),
    "a dict": lambda kept: lambda m, args, out: kept["holder"].by_name.update(out=out),
    "nested": lambda kept: lambda m, args, out: kept["list"].append({"layer": [(out, 1)]}),
    "a deque": lambda kept: lambda m, args, out: kept["deque"].append(out),
    "what it computed": lambda kept: lambda m, args, out: kept["list"].append(jnp.abs(out).mean()),
    "a weight": lambda kept: lambda m, args, out: kept["list"].append(m.weight.sum()),
    "a closure": lambda kept: lambda m, args, out: kept["list"].append(lambda: out),
    "and returns it": lambda kept: lambda m, args, out: kept["list"].append(out) or out,
}
TRACES = {
    "backward": lambda net: mt.backward(loss_of, net, X),
    "mt.grad": lambda net: mt.grad(loss_of)(net, X),
    "jit": lambda net: mt.jit(lambda x: net(x))(X),
    "jit of a step": lambda net: mt.jit(lambda x: mt.backward(loss_of, net, x))(X),
    "scan": lambda net: mt.scan(lambda x: net(x), jnp.stack([X, X])),
    "vmap in jit": lambda net: mt.jit(lambda x: jax.vmap(net)(x))(X),
    "checkpoint in jit": lambda net: mt.jit(lambda x: jax.checkpoint(lambda x: net(x))(x))(X),
    "compile": compiled_in_place,
    "summary": lambda net: mt.summary(net, X),
}


def kept_by(kind: str) -> tuple[dict[str, Any], Any]:
    kept = {"list": [], "holder": Holder(), "deque": deque()}
    return kept, KEEPS[kind](kept)


@pytest.mark.one_in(6)
@pytest.mark.parametrize(
    ("kind", "trace"), [*((kind, "jit") for kind in KEEPS), *(("a list", trace) for trace in TRACES if trace != "jit")]
)
def test_a_hook_that_keeps_a_traced_value_is_refused(kind, trace):
    net = Net()
    kept, hook = kept_by(kind)
    handle = net.body[0].register_forward_hook(hook)
    net(X)  # in eager code there are values to keep
    where = r"\(at (Net|Sequential)?\.?(body\.)?0?.*\) kept a traced value, float32\[.*Return it.*[Oo]r run eagerly, without"
    with pytest.raises(mt.TraceError, match=r"the forward hook `<lambda>` of Linear " + where):
        TRACES[trace](net)
    handle.remove()
    TRACES[trace](net)


def test_a_new_shape_is_looked_at_too():
    net, kept = Net(), []
    net.head.register_forward_hook(lambda m, args, out: kept.append(out) if len(out) > 2 else None)
    run = mt.jit(lambda x: net(x))
    run(X)
    with pytest.raises(mt.TraceError, match=r"at Net.head\) kept a traced value, float32\[4, 2\]"):
        run(jnp.ones((4, 3)))
    run(X)


KEEP_NOTHING = {
    "shapes": lambda kept: lambda m, args, out: kept["list"].append((out.shape, out.dtype)),
    "prints": lambda kept: lambda m, args, out: kept["list"].append(str(type(out))),
    "returns it": lambda kept: lambda m, args, out: out,
    "returns a tuple": lambda kept: (
        lambda m, args, out: out if m is None else jnp.stack([out, args[0] @ m.weight.T])[0]
    ),
    "computes": lambda kept: lambda m, args, out: jnp.abs(out).mean() and None if False else None,
    "drops": lambda kept: lambda m, args, out: (kept["list"].append(out), kept["list"].pop()) and None,
    "a local cycle": lambda kept: lambda m, args, out: cycle(out),
}


def cycle(out):
    around: list[Any] = [out]
    around.append(around)


@pytest.mark.one_in(8)
@pytest.mark.parametrize("kind", KEEP_NOTHING)
def test_no_false_alarm(kind):
    net = Net()
    hook = KEEP_NOTHING[kind]({"list": []})
    for layer in (net.body[0], net.head):
        layer.register_forward_hook(hook)
    for trace in TRACES.values():
        trace(copy.copy(net))


def test_a_value_that_forward_keeps_is_not_a_hooks():
    kept: list[Any] = []

    class Keeps(mt.Module):
        def forward(self, x):
            y = x * 2
            kept.append(y)
            return y

    net = Keeps()
    net.register_forward_hook(lambda m, args, out: None)
    net.register_forward_hook(lambda m, args, out: out)
    mt.jit(lambda x: net(x))(X)
    assert kept


def test_values_used_within_the_trace_are_no_leak():
    net = Net()
    net.body[0].register_forward_hook(lambda m, args, out: acts.append(out))
    acts: list[Any] = []

    @mt.jit
    def run(x):
        y = net(x)
        return y, acts.pop()

    out, act = run(X)
    assert_allclose(act, Net().body[0](X), rtol=1e-6)
    assert not acts
    step = jax.jit(lambda net, x: mt.grad(lambda net: loss_of(net, x))(net))  # x is of the trace around
    net = Net()
    net.body[0].register_forward_hook(lambda m, args, out: out + args[0].mean())
    step(net, X)


def test_plain_jit_says_what_jax_says():
    net, kept = Net(), []
    net.head.register_forward_hook(lambda m, args, out: kept.append(out))
    jax.jit(lambda net, x: net(x))(net, X)
    with pytest.raises(jax.errors.UnexpectedTracerError):
        kept[0] + 1
    kept.clear()
    with jax.checking_leaks(), pytest.raises(Exception, match="[Ll]eaked"):
        jax.jit(lambda net, x: net(x) + 0)(net, X)


def test_an_array_on_a_module_is_refused_as_ever():
    class Net(mt.Module):
        def __init__(self):
            self.layer = nn.Linear(3, 2)
            self.layer.register_forward_hook(self.note)

        def note(self, module, args, out):
            self.out = out

        def forward(self, x):
            return self.layer(x)

    with pytest.raises(mt.UndeclaredArrayError, match="Net.out was given a bare array") as error:
        Net()(X)
    assert "in the forward hook `Net.note` of Linear" in error.value.__notes__ or "note" in str(error.value.__notes__)


# -- copies and files -----------------------------------------------------------------------------------------------------


def add_one(module, args, out):
    return out + 1


def test_pickle_takes_functions_with_a_name():
    layer = nn.Linear(3, 2)
    handle = layer.register_forward_hook(add_one)
    again, handle_again = pickle.loads(pickle.dumps((layer, handle)))
    assert_allclose(again(X), layer(X))
    handle_again.remove()
    assert_allclose(again(X) + 1, layer(X))
    net = nn.Sequential(layer)
    layer.register_forward_pre_hook(lambda m, args: None)
    with pytest.raises(
        pickle.PicklingError, match=r"the forward pre-hook `<lambda>` of Linear cannot be pickled.*handle\.rem"
    ):
        pickle.dumps(net)
    copy.deepcopy(net)(X)


def test_files_and_texts_do_not_have_them(tmp_path):
    net, plain = Net(), Net()
    hook_all(net)
    for module in net.modules():
        module.register_forward_hook(lambda m, args, out: None)
    assert list(net.state_dict()) == list(plain.state_dict())
    assert repr(net) == repr(plain) and net._repr_html_() == plain._repr_html_()
    shown = str(mt.summary(plain))
    assert str(mt.summary(net)) == shown
    for one, other in ((net, plain), (plain, net)):
        mt.save(tmp_path / "file", model=one)
        other.head.weight = other.head.weight * 0
        mt.load(tmp_path / "file", model=other)
        assert_allclose(other.head.weight, one.head.weight)
    net.load_state_dict(plain.state_dict())
    buffer = io.BytesIO()
    pickle.dump(plain, buffer)
    assert hooks_of(net) and not hooks_of(plain)
    assert "_call_hooks" not in [name for name, _ in net.named_modules()]


def test_a_summary_shows_what_hooks_do():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    net[1].register_forward_pre_hook(lambda m, args: args[0][:, :2])
    assert [row.outputs for row in mt.summary(net, X).rows][-1] == ("float32[2, 2]",)
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].register_forward_hook(lambda m, args, out: out @ out.T)
    assert mt.summary(net, X).rows[2].flops > mt.summary(net, X).rows[1].flops


def test_torchs_private_names_and_backward_hooks_are_answered():
    layer = nn.Linear(3, 2)
    for name in ("register_full_backward_hook", "register_full_backward_pre_hook", "register_backward_hook"):
        with pytest.raises(AttributeError, match=r"Instead: `mt.grad\(loss_fn\)\(model, x\)` or `model.grads\(\)`"):
            getattr(layer, name)
    with pytest.raises(AttributeError, match=r"Instead: `handle.remove\(\)`"):
        layer._forward_hooks.clear()
    with pytest.raises(
        AttributeError, match=r"Instead: .*for module in model.modules\(\): module.register_forward_hook"
    ):
        nn.modules.module.register_module_forward_hook(add_one)


# -- without hooks ---------------------------------------------------------------------------------------------------------


def test_without_a_hook_alive_eager_calls_ask_for_nothing(monkeypatch):
    gc.collect()
    net = Net()
    before = len(watchers)
    handle = net.register_forward_hook(add_one)
    assert len(watchers) == before + 1
    handle.remove()
    del handle
    gc.collect()
    assert len(watchers) == before


THROUGH_A_JITTED_MODULE = {
    "mt.backward": lambda model: mt.backward(lambda x: model(x).sum(), X),
    "mt.value_and_grad": lambda model: mt.value_and_grad(lambda x: model(x).sum(), argnums=0)(X)[0],
    "mt.vjp": lambda model: mt.vjp(model, X)[0].sum(),
    "mt.vjp of a function": lambda model: mt.vjp(lambda x: model(x), X)[0].sum(),
    "mt.scan": lambda model: mt.scan(lambda x: model(x).sum(), X).sum(),
    "mt.jit": lambda model: mt.jit(lambda x: mt.backward(lambda x: model(x).sum(), x))(X),
    "mt.export": lambda model: mt.export(model, X).call(X).sum(),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("way", THROUGH_A_JITTED_MODULE)
def test_a_jitted_module_with_a_hook_is_called_in_compiled_code(way):
    """The first trace meets the module, and is given up: JAX keeps what is in it, which the hook has not kept."""
    net = nn.Sequential(nn.Linear(3, 4))
    model = mt.jit(net)
    plain = net(X).sum()
    model.register_forward_hook(lambda module, args, output: output * 2)
    assert_allclose(THROUGH_A_JITTED_MODULE[way](model), 2 * plain, rtol=1e-5)


def test_a_hook_of_a_jitted_module_that_keeps_a_value_is_refused_in_compiled_code():
    kept = []
    net = nn.Sequential(nn.Linear(3, 4))
    model = mt.jit(net)
    net[0].register_forward_hook(lambda module, args, output: kept.append(output))
    with pytest.raises(mt.TraceError, match=r"of Linear \(at Sequential.0\) kept a traced value, float32\[2, 4\]"):
        mt.backward(lambda x: model(x).sum(), X)


def test_a_summary_runs_no_pre_hook_on_what_it_has_returned():
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    net[0].register_forward_pre_hook(lambda module, args: jnp.concatenate([args[0], args[0]], -1))
    row = mt.summary(net, X).rows[1]
    assert row.inputs == ("float32[2, 6]",)
    assert row.flops == mt.summary(nn.Sequential(nn.Linear(6, 4)), jnp.ones((2, 6))).rows[1].flops
