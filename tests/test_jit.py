"""`mt.jit`: how it comes to its modules and optimizers, what it returns, its options."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from training import (
    Batch,
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
)

import minitorch_jax as mt
from minitorch_jax import optim

# -- every way in which a function may come to its model and its optimizer ---------------------------------------------


MODEL: Any = None
OPT: Any = None
HOLDER = types.SimpleNamespace(model=None, opt=None)


def global_step(x: Any, y: Any) -> Any:
    return step(MODEL, OPT, x, y)


def holder_step(x: Any, y: Any) -> Any:
    return step(HOLDER.model, HOLDER.opt, x, y)


def calling_step(x: Any, y: Any) -> Any:
    return global_step(x, y) * 1.0


class Trainer:
    """What a user would write: a plain class that holds model and optimizer."""

    def __init__(self, model: Any, opt: Any) -> None:
        self.model, self.opt = model, opt

    @mt.jit
    def fit(self, x: Any, y: Any) -> Any:
        return step(self.model, self.opt, x, y)

    def plain(self, x: Any, y: Any) -> Any:
        return step(self.model, self.opt, x, y)

    def indirect(self, x: Any, y: Any) -> Any:
        return self.plain(x, y) * 1.0

    def __call__(self, x: Any, y: Any) -> Any:
        return step(self.model, self.opt, x, y)


class Slotted:
    __slots__ = ("model", "opt")

    def __init__(self, model: Any, opt: Any) -> None:
        self.model, self.opt = model, opt

    def fit(self, x: Any, y: Any) -> Any:
        return step(self.model, self.opt, x, y)


def by_global(fn: Any) -> Callable[..., Any]:
    def way(model: Any, opt: Any) -> Any:
        globals().update(MODEL=model, OPT=opt)
        HOLDER.model, HOLDER.opt = model, opt
        return mt.jit(fn)

    return way


def with_defaults(model: Any, opt: Any) -> Any:
    def fn(x: Any, y: Any, model: Any = model, opt: Any = opt) -> Any:
        return step(model, opt, x, y)

    return fn


def in_containers(model: Any, opt: Any) -> Any:
    state = {"models": [model], "opts": (opt,)}
    return lambda x, y: step(state["models"][0], state["opts"][0], x, y)


def bind(fn: Any, *args: Any) -> Any:
    """A call with model and optimizer filled in outside of `mt.jit`."""

    def call(x: Any, y: Any) -> Any:
        return fn(*args, x, y)

    call.num_compiles = lambda: fn.num_compiles
    return call


def nested(data: Any, batch: Any) -> Any:
    return step(batch.model, data["opts"][0], batch.x, batch.y)


def with_nested_arguments(model: Any, opt: Any) -> Any:
    fn = mt.jit(nested)
    return lambda x, y: fn({"opts": [opt], "name": "text"}, Batch(model, x, y))


def by_keyword(model: Any, opt: Any) -> Any:
    fn = mt.jit(step)
    return lambda x, y: fn(y=y, opt=opt, x=x, model=model)


def with_decorator_arguments(model: Any, opt: Any) -> Any:
    @mt.jit(keep_grads=False)
    def fn(x: Any, y: Any) -> Any:
        return step(model, opt, x, y)

    return fn


def with_nested_jit(model: Any, opt: Any) -> Any:
    inner = mt.jit(step)
    halves = mt.jit(lambda x, y: inner(model, opt, x, y))
    return mt.jit(lambda x, y: halves(x, y) * 1.0)


WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "arguments": lambda m, o: bind(mt.jit(step), m, o),
    "keywords": by_keyword,
    "nested in pytrees": with_nested_arguments,
    "the optimizer alone": lambda m, o: bind(mt.jit(lambda o, x, y: step(o.modules[0], o, x, y)), o),
    "a list of modules": lambda m, o: bind(mt.jit(lambda ms, o, x, y: step(ms[0], o, x, y)), [m], o),
    "closure": lambda m, o: mt.jit(lambda x, y: step(m, o, x, y)),
    "defaults": lambda m, o: mt.jit(with_defaults(m, o)),
    "containers": lambda m, o: mt.jit(in_containers(m, o)),
    "global": by_global(global_step),
    "global of a callee": by_global(calling_step),
    "attributes of a global": by_global(holder_step),
    "model an argument, optimizer by closure": lambda m, o: bind(mt.jit(lambda m, x, y: step(m, o, x, y)), m),
    "optimizer an argument, model by closure": lambda m, o: bind(mt.jit(lambda o, x, y: step(m, o, x, y)), o),
    "method of a module": lambda m, o: bind(m.train_step, o),
    "bound method of a module": lambda m, o: bind(mt.jit(Line.train_step.__wrapped__.__get__(m)), o),
    "method of a plain class": lambda m, o: Trainer(m, o).fit,
    "bound method": lambda m, o: mt.jit(Trainer(m, o).plain),
    "bound method, indirect": lambda m, o: mt.jit(Trainer(m, o).indirect),
    "callable object": lambda m, o: mt.jit(Trainer(m, o)),
    "slots": lambda m, o: mt.jit(Slotted(m, o).fit),
    "partial": lambda m, o: mt.jit(functools.partial(step, m, o)),
    "partial, keywords": lambda m, o: mt.jit(functools.partial(lambda x, y, m, o: step(m, o, x, y), m=m, o=o)),
    "partial of mt.jit": lambda m, o: functools.partial(mt.jit(step), m, o),
    "decorator with arguments": with_decorator_arguments,
    "mt.jit in mt.jit": with_nested_jit,
}


@pytest.mark.one_in(9)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_equals_the_eager_loop(way: str) -> None:
    model, opt = pair()
    fn = WAYS[way](model, opt)
    losses, expected = eagerly(4)
    assert_allclose([float(fn(X, Y)) for _ in range(4)], losses, rtol=1e-5)
    assert_same(everything(model, opt), expected)
    assert int(model.count) == opt.num_steps == 4
    assert_alive(model, opt)
    count = getattr(fn, "num_compiles", 1)
    assert (count() if callable(count) else count) == 1


def test_a_callable_module() -> None:
    model = Line()
    compiled = mt.jit(model)
    assert_allclose(compiled(X), X @ np.ones(3, np.float32), rtol=1e-6)
    assert_allclose(compiled(x=X), X @ np.ones(3, np.float32), rtol=1e-6)
    assert int(model.count) == 2


def test_names_that_are_rebound_are_followed() -> None:
    """A closure, a global, an attribute, an item: the compiled function uses what is there when it is called."""
    model, items, holder = Scale(1.0), [Scale(1.0)], types.SimpleNamespace(model=Scale(1.0))
    fns = [mt.jit(lambda x: model(x)), mt.jit(lambda x: items[0](x)), mt.jit(lambda x: holder.model(x))]
    for value in (1.0, 3.0, 5.0):
        model, items[0], holder.model = Scale(value), Scale(value), Scale(value)
        assert [float(fn(2.0)) for fn in fns] == [2 * value] * 3
    assert [fn.num_compiles for fn in fns] == [1, 1, 1]


@pytest.mark.parametrize("run", [mt.jit, lambda fn: lambda x: mt.backward(fn, x)], ids=["jit", "backward"])
def test_what_leads_to_a_model_is_followed(run: Any) -> None:
    """Holders and containers that are replaced, at any depth, and containers that grow and shrink."""

    class Trainer:
        def __init__(self) -> None:
            self.model, self.calls = Scale(next(values)), 0

    values = iter(np.arange(1.0, 100.0))
    trainer, outer, pair = Trainer(), types.SimpleNamespace(inner=Trainer()), (Scale(next(values)), 1)
    items, named = [Scale(next(values))], {"a": Scale(next(values)), "step": 0}
    alias = trainer

    def uses() -> list[Any]:
        return [
            lambda x: trainer.model(x),
            lambda x: alias.model(x) + trainer.model(x),
            lambda x: outer.inner.model(x),
            lambda x: pair[0](x),
            lambda x: sum(model(x) for model in items),
            lambda x: sum(model(x) for key, model in named.items() if key != "step"),
        ]

    plain, compiled = uses(), [run(fn) for fn in uses()]

    def check() -> None:
        for fn, want in zip(compiled, plain, strict=True):
            assert float(fn(2.0)) == float(want(2.0))

    check()
    trainer, outer, pair = Trainer(), types.SimpleNamespace(inner=Trainer()), (Scale(next(values)), 1)
    items, named = [Scale(next(values))], {"a": Scale(next(values)), "step": 0}
    check()
    alias, outer.inner = Trainer(), Trainer()
    items.append(Scale(next(values)))
    named["b"] = Scale(next(values))
    check()
    outer.inner.model = Scale(next(values))
    del items[0], named["a"]
    check()


def test_a_function_that_names_itself_is_let_go() -> None:
    def make() -> Any:
        model = Scale(2.0)

        def twice(x: Any, times: int = 2) -> Any:
            return twice(model(x), times - 1) if times else x

        return twice

    fn = make()
    assert float(mt.backward(fn, 1.0)) == 4.0
    gone = weakref.ref(fn)
    del fn
    gc.collect()
    assert gone() is None


def test_a_name_that_the_function_binds_itself_compiles_once() -> None:
    """Counting how often Python runs, as people do."""
    model, runs, seen = Scale(2.0), 0, []

    @mt.jit
    def fn(x: Any) -> Any:
        nonlocal runs
        runs += 1
        seen.append(runs)
        return model(x)

    for x in range(4):
        fn(float(x))
    assert runs == len(seen) == fn.num_compiles == 1


@pytest.mark.one_in(9)
@pytest.mark.parametrize("form", ["jit", "scan", "scaler"])
@pytest.mark.parametrize(
    "change",
    [
        lambda opt, a, b: setattr(opt, "modules", [b]),
        lambda opt, a, b: setattr(opt.groups[0], "modules", [b]),
        lambda opt, a, b: opt.modules.append(b),
        lambda opt, a, b: (opt.modules.append(b), opt.modules.remove(a)),
        lambda opt, a, b: (opt.modules.remove(a), opt.modules.append(b)),
        lambda opt, a, b: opt.modules.__setitem__(0, b),
    ],
)
@pytest.mark.parametrize("rule", [optim.SGD, optim.Adam])
def test_other_modules_in_an_optimizer_are_trained_from_the_next_step_on(form: str, change: Any, rule: Any) -> None:
    def trained(form: str) -> list[float]:
        a, b, scaler = Scale(1.0), Scale(2.0), mt.LossScaler(init_scale=1.0)
        opt = rule([a], lr=0.1)

        def loss() -> Any:
            return (a(1.0) * b(1.0)) ** 2

        def step() -> None:
            a.zero_grad()
            b.zero_grad()
            mt.backward(loss)
            opt.step()

        def scaled_step() -> None:
            a.zero_grad()
            b.zero_grad()
            scaler.backward(loss)
            scaler.step(opt)

        compiled = mt.jit(step)
        forms = {"eager": step, "jit": compiled, "scan": lambda: mt.scan(step, length=1), "scaler": scaled_step}
        run = forms[form]
        for _ in range(3):
            run()
        change(opt, a, b)
        before = float(a.weight), float(b.weight)
        for _ in range(3):
            run()
        for model, weight in zip((a, b), before, strict=True):
            assert (float(model.weight) != weight) == any(model is listed for listed in opt.modules)
        return [float(a.weight), float(b.weight), opt.num_steps]

    assert_allclose(trained(form), trained("eager"), rtol=1e-6)


@pytest.mark.one_in(9)
@pytest.mark.parametrize("make", [lambda m: optim.SGD([m], lr=0.1), lambda m: optim.RMSprop([m], lr=0.1)])
def test_momentum_switched_on_later_counts_from_the_next_step_on(make: Any) -> None:
    def trained(form: str) -> list[float]:
        model, scaler, found = Scale(1.0), mt.LossScaler(init_scale=1.0), []
        opt = make(model)

        def step() -> None:
            opt.zero_grad()
            scaler.backward(model, 1.0) if form == "scaler" else mt.backward(model, 1.0)
            scaler.step(opt) if form == "scaler" else opt.step()

        run = mt.jit(step) if form == "jit" else step
        for i in range(6):
            if i == 3:
                opt.momentum = 0.9
            run()
            found.append(float(model.weight))
        return found

    want = trained("eager")
    assert want[2] - want[3] < want[3] - want[4]
    for form in ("jit", "scaler"):
        assert_allclose(trained(form), want, rtol=1e-6)


def test_names_that_are_bound_after_the_function_is_made() -> None:
    """A function above the model that it uses, a compiled method in `__init__`: found by name like others."""

    class Later:
        def __init__(self) -> None:
            self.fit = mt.jit(self.plain)
            self.model = Scale(2.0)

        def plain(self, x: Any) -> Any:
            return self.model(x)

    @mt.jit
    def by_closure(x: Any) -> Any:
        return model(x)

    globals().pop("LATE", None)
    by_name = mt.jit(late)
    model = globals()["LATE"] = Scale(2.0)
    for fn in (by_closure, by_name, Later().fit):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert [float(fn(x)) for x in (1.0, 2.0)] == [2.0, 4.0]
        assert fn.num_compiles == 1


def late(x: Any) -> Any:
    return LATE(x)  # noqa: F821


def test_what_only_a_trace_can_find_is_found_and_told() -> None:
    model, other = Scale(1.0), Scale(3.0)
    hidden = [weakref.ref(model)]

    def fn(x: Any) -> Any:
        scale = hidden[0]()
        scale.weight = scale.weight + 1.0
        return scale(x)

    compiled = mt.jit(fn)
    with pytest.warns(UserWarning, match="fn reaches a Scale in a way that cannot be followed by name.*argument"):
        assert float(compiled(1.0)) == 2.0
    assert float(compiled(1.0)) == 3.0
    hidden[0] = weakref.ref(other)
    assert float(compiled(1.0)) == 4.0
    assert float(other.weight) == 4.0


def unfrozen(model: Line, opt: optim.Adam) -> None:
    model.unfreeze()


def longer_list(model: Line, opt: optim.Adam) -> None:
    opt.modules.append(Line(3.0))


def more_state(model: Line, opt: optim.Adam) -> None:
    opt.amsgrad = True


@pytest.mark.one_in(4)
@pytest.mark.filterwarnings("ignore:.*cannot be followed by name", "ignore:Adam holds parameters that no loss has read")
@pytest.mark.parametrize("change", [unfrozen, longer_list, more_state])
@pytest.mark.parametrize("form", ["jit", "scan"])
def test_an_optimizer_that_only_a_trace_finds_makes_its_states_outside(change: Any, form: str) -> None:
    """Before the first step after a change: what a step is about to make is to last, and be arrays."""

    def trainer() -> Any:
        model = Line()
        model.freeze()
        opt = optim.Adam([model], lr=0.1)
        if change is not unfrozen:
            model.unfreeze()
        change(model, opt)
        return model, opt

    (model, opt), (twin, twins_opt) = trainer(), trainer()
    hidden = weakref.ref(opt)

    def fn(x: Any, y: Any) -> Any:
        return step(model, hidden(), x, y)

    run = mt.jit(fn) if form == "jit" else lambda x, y: mt.scan(fn, x[None], y[None])[0]
    losses = [float(run(X, Y)) for _ in range(3)]
    assert_allclose(losses, [float(step(twin, twins_opt, X, Y)) for _ in range(3)], rtol=1e-5)
    assert_alive(model, opt)
    assert_same(everything(model, opt), everything(twin, twins_opt))
    step(model, opt, X, Y), step(twin, twins_opt, X, Y)
    assert_same(everything(model, opt), everything(twin, twins_opt))


@pytest.mark.filterwarnings("ignore:.*cannot be followed by name")
def test_an_optimizer_met_where_exceptions_are_caught() -> None:
    """What the library raises to have the trace repeated is not an error that code of the user's can take for its own."""
    model, opt = pair()
    model.freeze()
    opt.step()
    model.unfreeze()
    hidden = weakref.ref(opt)

    @mt.jit
    def fn(x: Any, y: Any) -> Any:
        opt_of_mine = hidden()
        model.zero_grad()
        loss = mt.backward(squared, model, x, y)
        with contextlib.suppress(Exception):
            opt_of_mine.step()
        return loss

    before = opt.num_steps
    losses = [float(fn(X, Y)) for _ in range(3)]
    assert opt.num_steps == before + 3
    assert_allclose(losses, eagerly(3)[0], rtol=1e-5)


@pytest.mark.one_in(9)
@pytest.mark.filterwarnings("ignore:.*cannot be followed by name")
@pytest.mark.parametrize("form", ["jit", "backward"])
def test_what_only_some_shapes_reach_by_tracing_alone(form: str) -> None:
    model, (twin, opt) = Scale(2.0), pair()
    hidden = weakref.ref(twin), weakref.ref(opt)

    def fn(x: Any, y: Any) -> Any:
        if x.shape[0] < 4:
            return model(x.sum())
        return step(hidden[0](), hidden[1](), x, y) if form == "jit" else squared(hidden[0](), x, y)

    run = mt.jit(fn) if form == "jit" else functools.partial(mt.backward, fn)
    losses = []
    for _ in range(3):
        assert_allclose(run(X[:2], Y[:2]), 2.0 * X[:2].sum(), rtol=1e-6)
        losses.append(float(run(X, Y)))
    assert_allclose(losses, eagerly(3)[0] if form == "jit" else [eagerly(1)[0][0]] * 3, rtol=1e-5)
    if form == "jit":
        assert fn and mt.jit(fn).lower(X, Y).as_text()


@pytest.mark.parametrize("value", [0.9, lambda t: 0.9], ids=["number", "schedule"])
@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.filterwarnings("ignore:.*cannot be followed by name")
def test_a_setting_that_needs_a_state_cannot_be_switched_on_inside(value: Any, hides: bool) -> None:
    model, opt = pair(momentum=0.0)
    hidden = weakref.ref(opt)

    @mt.jit
    def fn(x: Any, y: Any) -> Any:
        (hidden() if hides else opt).momentum = value
        return step(model, opt, x, y)

    before = everything(model, opt)
    with pytest.raises(
        (mt.TraceError, TypeError), match="momentum was changed from 0 where the state|inside compiled code"
    ):
        fn(X, Y)
    assert_unchanged(before, model, opt)
    opt.momentum = 0.9
    if not callable(value):
        assert_allclose([float(fn(X, Y)) for _ in range(3)], eagerly(3)[0], rtol=1e-5)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("master_weights", [False, True])
def test_a_setting_whose_state_is_there_may_be_assigned_inside(grouped: bool, master_weights: bool) -> None:
    """In the functional form, too, whose copies do not know the numbers."""
    model = Line().astype(jnp.bfloat16) if master_weights else Line()
    modules: Any = [{"modules": [model], "momentum": 0.5}] if grouped else [model]
    opt = optim.SGD(modules, lr=0.1, momentum=0.5, master_weights=master_weights)

    def fn(opt: Any, x: Any, y: Any) -> Any:
        opt.zero_grad()
        (opt.groups[0] if grouped else opt).momentum = 0.9
        mt.backward(lambda model: model(x).astype(jnp.float32).sum(), opt.modules[0])
        opt.step()
        return opt

    x = X.astype(jnp.bfloat16) if master_weights else X

    def values(opt: Any) -> dict[str, Any]:
        state = opt.state_dict()["state"]
        return {f"{path}.{field}": np.array(v) for path in state for field, v in state[path].items()}

    expected = copy.deepcopy(opt)
    fn(expected, x, Y)
    assert any("momentum_buffer" in name for name in values(expected))
    functional = jax.jit(fn)(copy.deepcopy(opt), x, Y)
    mt.jit(fn)(opt, x, Y)
    for mine in (functional, opt):
        assert_same(values(mine), values(expected), rtol=1e-2 if master_weights else 1e-5)
        assert float((mine.groups[0] if grouped else mine).momentum) == pytest.approx(0.9)


def test_settings_that_need_no_state_go_from_zero_inside() -> None:
    model, opt = pair(lr=0.0, weight_decay=0.0)

    @mt.jit
    def fn(x: Any, y: Any) -> Any:
        opt.lr, opt.weight_decay, opt.momentum = 0.1, 0.0, 0.9
        return step(model, opt, x, y)

    assert_allclose([float(fn(X, Y)) for _ in range(3)], eagerly(3)[0], rtol=1e-5)


def test_plain_functions_and_names() -> None:
    """Without modules it is an ordinary compiled function, which keeps its name and its docstring."""

    @mt.jit
    def add(a: Any, *, b: Any = 1) -> Any:
        """Adds."""
        return a + b

    assert (add.__name__, add.__doc__, add.__wrapped__(1)) == ("add", "Adds.", 2)
    assert [int(add(1)), int(add(1, b=2)), int(add(5, b=3))] == [2, 3, 8]
    assert add.num_compiles == 2


def test_nested_jit_counts_for_the_outer_one_only() -> None:
    inner = mt.jit(lambda scale, x: scale(x))
    outer = mt.jit(lambda scale, x: inner(scale, x) + inner(scale, 2 * x))
    assert float(outer(Scale(2.0), 1.0)) == 6.0
    assert (outer.num_compiles, inner.num_compiles) == (1, 0)
    assert float(inner(Scale(2.0), 1.0)) == 2.0
    assert inner.num_compiles == 1


# -- what is returned --------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    loss: Any
    note: str


def test_any_pytree_comes_back() -> None:
    model, opt = pair()

    @mt.jit
    def fn(model: Any, opt: Any, x: Any, y: Any) -> Any:
        loss = step(model, opt, x, y)
        return {"r": Result(loss, "note"), "none": None, "list": [1, 2.5, True, ("a", model)], "opt": opt, "fn": len}

    for _ in range(3):
        out = fn(model, opt, X, Y)
        assert isinstance(out["r"], Result)
        assert isinstance(out["r"].loss, jax.Array)
        assert (out["r"].note, out["none"], out["list"][:3], out["fn"]) == ("note", None, [1, 2.5, True], len)
        assert out["list"][3] == ("a", out["list"][3][1])
        assert out["list"][3][1] is model
        assert out["opt"] is opt
    assert fn.num_compiles == 1
    assert mt.jit(lambda x: None)(1.0) is None
    assert mt.jit(lambda x: "text")(1.0) == "text"
    other, opt = pair()
    assert fn(other, opt, X, Y)["list"][3][1] is other


def test_what_closures_return_is_the_object_of_this_call() -> None:
    holder = types.SimpleNamespace(model=Scale(1.0))
    fn = mt.jit(lambda x: (holder.model, holder.model(x)))
    assert fn(1.0)[0] is holder.model
    holder.model = Scale(2.0)
    assert fn(1.0)[0] is holder.model


def test_arrays_that_are_parameters_stay_valid() -> None:
    """Read before the step and after it, returned twice, returned as they came in: no result shares a buffer."""
    model, opt = pair()
    x, y = jnp.asarray(X), jnp.asarray(Y)

    @mt.jit
    def fn(x: Any, y: Any) -> Any:
        before, momentum = model.weight, opt.num_steps
        loss = step(model, opt, x, y)
        return before, model.weight, model.weight, model.mean, x, x, {"loss": loss}, loss, model.state_dict(), momentum

    kept, copies = [], []
    for _ in range(4):
        kept.append((fn(x, y), model.weight, model.state_dict()))
        copies.append(jax.tree.map(np.array, kept[-1]))
    gc.collect()
    jax.tree.map(assert_array_equal, kept, copies)
    for (earlier, *_), (later, *_) in zip(kept, kept[1:], strict=False):
        assert_array_equal(earlier[1], later[0])
        assert not np.array_equal(later[0], later[1])
    assert_array_equal(x, X)
    assert [int(out[0][-1]) for out in kept] == [0, 1, 2, 3]
    before, after = kept[0][0][:2]
    assert before.unsafe_buffer_pointer() != after.unsafe_buffer_pointer()


def test_a_parameter_returned_unchanged() -> None:
    model = Scale(3.0)
    opt = mt.Optimizer([model], lr=1.0)
    read, train = mt.jit(lambda m: (m.weight, m)), mt.jit(lambda m, o: (mt.backward(m, 1.0), o.step())[0])
    weight, same = read(model)
    assert same is model
    train(model, opt)
    train(model, opt)
    assert (float(weight), float(model.weight)) == (3.0, 0.0)  # gradients added up: 1, then 2


def test_a_module_made_inside_comes_back_alive() -> None:
    model = Line()

    @mt.jit
    def fn(model: Any, x: Any, y: Any) -> Any:
        grads = mt.grad(squared)(model, x, y)
        return grads, copy.deepcopy(model), jax.tree.map(lambda a: a * 2, model)

    for _ in range(2):
        before = np.array(model.weight)
        grads, copied, doubled = fn(model, X, Y)
        assert isinstance(grads, Line) and isinstance(copied, Line) and isinstance(doubled, Line)
        assert_allclose(grads.weight, mt.grad(squared)(Line(), X, Y).weight, rtol=1e-5)
        assert_allclose(doubled.weight, 2 * before)
        copied.weight = copied.weight + 1.0
        assert_array_equal(model.weight, before)
        assert_alive(grads, copied, doubled, model)


# -- options -----------------------------------------------------------------------------------------------------------


def powers(x: Any, n: Any, *, mode: Any = "up") -> Any:
    if type(n) is not int:
        raise TypeError("n is traced")
    return x**n if mode == "up" else x * n


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "options",
    [
        {"static_argnums": 1},
        {"static_argnums": (1,)},
        {"static_argnums": -1},
        {"static_argnames": "n"},
        {"static_argnames": ["n", "mode"]},
    ],
    ids=str,
)
def test_static_arguments(options: Any) -> None:
    fn = mt.jit(powers, **options)
    assert [float(fn(2.0, 3)), float(fn(2.0, n=3)), float(fn(x=2.0, n=3)), float(fn(3.0, 2))] == [8.0, 8.0, 8.0, 9.0]
    assert float(fn(2.0, 3, mode="down")) == 6.0
    assert 3 <= fn.num_compiles <= 5
    before = fn.num_compiles
    fn(7.0, 3), fn(7.0, 2)
    assert fn.num_compiles == before


def test_numbers_are_traced_unless_static() -> None:
    with pytest.raises(TypeError, match="n is traced"):
        mt.jit(powers)(2.0, 3)


def test_static_arguments_with_modules_and_methods() -> None:
    class Powers(mt.Module):
        def __init__(self) -> None:
            self.weight = mt.Parameter(2.0)

        @mt.jit(static_argnums=2)
        def power(self, x: Any, n: int) -> Any:
            return powers(self.weight * x, n)

    class Plain:
        def __init__(self) -> None:
            self.scale = Scale(2.0)

        @functools.partial(mt.jit, static_argnames="n")
        def power(self, x: Any, n: int) -> Any:
            return powers(self.scale(x), n)

    assert [float(Powers().power(1.0, 3)), float(Plain().power(1.0, 3))] == [8.0, 8.0]
    assert [float(Powers().power(1.0, n=3)), float(Plain().power(1.0, n=3))] == [8.0, 8.0]
    fn = mt.jit(functools.partial(powers, 2.0), static_argnums=0)
    assert float(fn(3)) == 8.0


def test_strings_booleans_and_functions_are_static_anyway() -> None:
    @mt.jit
    def fn(model: Any, act: Any, name: str, flag: bool, x: Any) -> Any:
        assert isinstance(name, str) and isinstance(flag, bool)
        return act(model(x)) if flag else model(x)

    assert float(fn(Scale(-2.0), jnp.abs, "n", True, 1.0)) == 2.0
    assert float(fn(Scale(-2.0), jnp.abs, "n", False, 1.0)) == -2.0
    assert float(fn(Scale(-2.0), jnp.negative, "n", True, 3.0)) == 6.0
    assert fn.num_compiles == 3


@pytest.mark.parametrize("options", [{"donate_argnums": 1}, {"donate_argnums": -1}, {"donate_argnames": "x"}], ids=str)
def test_donated_arguments_are_used_up(options: Any) -> None:
    scale = Scale(2.0)
    fn = mt.jit(lambda model, x: model(x), **options)
    for value in (1.0, 3.0):
        x = jnp.full((64,), value)
        assert_array_equal(fn(scale, x), np.full(64, 2 * value))
        assert x.is_deleted()
        kept = np.full(64, value, np.float32)
        assert_array_equal(fn(scale, kept), 2 * kept)
    y = jnp.ones(64)
    assert_array_equal(fn(scale, x=y), np.full(64, 2.0))
    assert_alive(scale)


def test_only_what_is_donated_is_used_up() -> None:
    a, b, c = ({"a": jnp.full((64,), float(i)), "n": [jnp.full((64,), 2.0 * i)]} for i in range(3))
    fn = mt.jit(lambda a, b, c: jax.tree.map(lambda x, y, z: x - y * z, a, b, c), donate_argnums=1)
    out = fn(a, b, c)
    assert_array_equal(out["a"], np.full(64, -2.0))
    assert_array_equal(out["n"][0], np.full(64, -8.0))
    assert [leaf.is_deleted() for leaf in jax.tree.leaves((a, b, c))] == [False] * 2 + [True] * 2 + [False] * 2


def test_a_donated_array_that_is_a_parameter_is_not_destroyed() -> None:
    model, opt = pair()
    fn = mt.jit(lambda model, opt, w, y: (step(model, opt, X, y), w + 1.0)[1], donate_argnames=("w",))
    for _ in range(3):
        weight = np.array(model.weight)
        assert_array_equal(fn(model, opt, model.weight, Y), weight + 1.0)
        assert_alive(model, opt)
    assert_same(everything(model, opt), eagerly(3)[1])


WRONG: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "not a function": (3, {}, TypeError, "mt.jit takes a function, not 3"),
    "static position": (powers, {"static_argnums": 2}, ValueError, "static_argnums has 2, but .* takes 2 arguments"),
    "negative position": (powers, {"static_argnums": -3}, ValueError, "static_argnums has -3"),
    "static name": (
        powers,
        {"static_argnames": "z"},
        ValueError,
        "static_argnames has 'z', but the function has no such argument",
    ),
    "donated position": (powers, {"donate_argnums": (0, 5)}, ValueError, "donate_argnums has 5, but"),
    "donated name": (powers, {"donate_argnames": ["x", "q"]}, ValueError, "donate_argnames has 'q'"),
    "both": (powers, {"static_argnums": 0, "donate_argnames": "x"}, ValueError, "both static and donated"),
    "unknown": (powers, {"static_args": 0}, TypeError, "static_args"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options(name: str) -> None:
    fn, options, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        mt.jit(fn, **options)


def test_a_static_argument_that_has_no_hash() -> None:
    with pytest.raises(TypeError, match="an argument is a (list|ndarray).*hashable"):
        mt.jit(powers, static_argnums=1)(2.0, [1])
    with pytest.raises(TypeError, match="an argument is a set.*neither an array"):
        mt.jit(lambda x: 1.0)({1})


def test_a_module_cannot_be_static() -> None:
    with pytest.raises(TypeError, match="(?i)Scale|module"):
        mt.jit(lambda model, x: model(x), static_argnums=0)(Scale(), 1.0)


def test_lower_and_compile() -> None:
    model, opt = pair()
    fn = mt.jit(step)
    before = everything(model, opt)
    lowered = fn.lower(model, opt, X, Y)
    assert "step" in lowered.as_text()
    assert "dot" in lowered.as_text()
    assert lowered.compile().cost_analysis()
    assert_unchanged(before, model, opt)
    assert_alive(model, opt)
    losses, expected = eagerly(2)
    assert_allclose([float(fn(model, opt, X, Y)) for _ in range(2)], losses, rtol=1e-5)
    assert_same(everything(model, opt), expected)
    assert "donor" in lowered.as_text() or "alias" in lowered.as_text()  # updated in place
    assert fn.num_compiles == 1
