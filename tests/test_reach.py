"""What a module may not keep: functions and objects that lead to a module, since copies would go on using that one."""

import functools
import logging
import math
import operator
import types
import weakref
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minitorch_jax as mt
from minitorch_jax import Parameter, nn, optim
from minitorch_jax.state.static_values import find_hidden

LAYER = nn.Linear(3, 3)  # a global


class Holder:
    def __init__(self, held):
        self.held = held

    def __call__(self, x):
        return self.held(x)

    def use(self, x):
        return self.held(x)


class SlotHolder:
    __slots__ = ("held",)

    def __init__(self, held):
        self.held = held


class Pair(NamedTuple):
    first: object
    second: object


def closing_over(held):
    return lambda x: held(x)


def with_default(array):
    return lambda x, scale=array: x * scale


def wrapped(fn):
    @functools.wraps(fn)
    def call(*args):
        return fn(*args)

    return call


def with_attribute(held):
    def fn(x):
        return x

    fn.held = held
    return fn


FORMS = {  # of keeping a module `m`
    "closure": closing_over,
    "nested closure": lambda m: closing_over(closing_over(m)),
    "function made inside": lambda m: lambda x: (lambda y: m(y))(x),
    "list in a closure": lambda m: closing_over([m]),
    "dict in a closure": lambda m: closing_over({"a": (m,)}),
    "object in a closure": lambda m: closing_over(Holder(m)),
    "parameters in a closure": lambda m: closing_over(m.parameters()),
    "optimizer in a closure": lambda m: closing_over(optim.SGD([nn.Linear(2, 2)])),
    "default": lambda m: lambda x, m=m: m(x),
    "keyword default": lambda m: lambda x, *, m=m: m(x),
    "function attribute": with_attribute,
    "bound method": lambda m: m.forward,
    "bound __call__": lambda m: m.__call__,
    "MethodType": lambda m: types.MethodType(lambda self, x: x, m),
    "method of an object": lambda m: Holder(m).use,
    "method of a list": lambda m: [m].append,
    "partial argument": lambda m: functools.partial(lambda m, x: x, m),
    "partial keyword": lambda m: functools.partial(lambda m, x: x, m=m),
    "partial of a closure": lambda m: functools.partial(closing_over(m), 1),
    "partial of a method": lambda m: functools.partial(m.forward, 1),
    "functools.wraps": lambda m: wrapped(closing_over(m)),
    "functools.lru_cache": lambda m: functools.lru_cache(closing_over(m)),
    "functools.singledispatch": lambda m: functools.singledispatch(closing_over(m)),
    "np.vectorize": lambda m: np.vectorize(closing_over(m)),
    "jax.jit": lambda m: jax.jit(closing_over(m)),
    "jax.jit of a method": lambda m: jax.jit(m.forward),
    "jax.vmap": lambda m: jax.vmap(closing_over(m)),
    "jax.grad": lambda m: jax.grad(closing_over(m)),
    "jax.checkpoint": lambda m: jax.checkpoint(closing_over(m)),
    "jax.custom_vjp": lambda m: jax.custom_vjp(closing_over(m)),
    "mt.jit": lambda m: mt.jit(closing_over(m)),
    "mt.jit of a method": lambda m: mt.jit(m.forward),
    "mt.grad": lambda m: mt.grad(closing_over(m)),
    "callable object": Holder,
    "object with slots": SlotHolder,
    "NamedTuple": lambda m: Pair(m, 1),
    "frozenset of functions": lambda m: frozenset([closing_over(m)]),
    "mapping proxy": lambda m: types.MappingProxyType({"a": m}),
    "iterator": lambda m: iter([m]),
    "map": lambda m: map(str, [m]),
    "generator": lambda m: (x for x in [m]),
    "parameters()": lambda m: m.parameters(),
    "weak reference": weakref.ref,
    "weak method": lambda m: weakref.WeakMethod(m.forward),
}

PLACES = {  # in which it is kept, and what the message calls them
    "attribute": (lambda m, value: setattr(m, "fn", value), r"Net\.fn: "),
    "list": (lambda m, value: setattr(m, "fn", [value]), r"Net\.fn\[0\]: "),
    "tuple": (lambda m, value: setattr(m, "fn", (1, value)), r"Net\.fn\[1\]: "),
    "dict": (lambda m, value: setattr(m, "fn", {"a": value}), r"Net\.fn\['a'\]: "),
    "append": (lambda m, value: m.functions.append(value), r"Net\.functions\[0\]: "),
    "list item": (lambda m, value: m.functions.extend([value]), r"Net\.functions\[0\]: "),
    "dict item": (lambda m, value: m.named.update(a=value), r"Net\.named\['a'\]: "),
}


class Net(mt.Module):
    def __init__(self):
        self.weight = Parameter(jnp.ones(3))
        self.functions, self.named = [], {}

    def twice(self, x):
        return 2 * x

    def forward(self, x):
        return x * self.weight


@pytest.mark.parametrize("other", [False, True], ids=["its own module", "another module"])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_that_leads_to_a_module_is_kept(form, other):
    net = Net()
    held = nn.Linear(3, 3) if other else net
    before = dict(vars(net)) | {"functions": [], "named": {}}
    for keep, where in PLACES.values():
        with pytest.raises(TypeError, match=where + r"an? .* holds a .*would hide it from parameters\(\)"):
            keep(net, FORMS[form](held))
    assert vars(net) == before


KEPT = {
    "a lambda that names a global": lambda x: LAYER(x),
    "an array in a closure": closing_over(jnp.ones(3)),
    "an array as a default": with_default(jnp.ones(3)),
    "a key in a closure": closing_over(jax.random.key(0)),
    "a function of JAX": jax.nn.relu,
    "jnp": jnp.tanh,
    "a partial": functools.partial(jax.nn.gelu, approximate=False),
    "a loss": nn.functional.mse_loss,
    "a function of a class": Net.twice,
    "a class": nn.Linear,
    "a method caller": operator.methodcaller("sum"),
    "jax.jit": jax.jit(lambda x: x),
    "mt.jit": mt.jit(lambda x: x),
    "a library": math,
    "a logger": logging.getLogger("minitorch_jax.test"),
    "a dtype": jnp.float32,
    "a generator of NumPy": np.random.default_rng(0),
    "an open file": open(__file__),  # noqa: SIM115
    "an iterator": iter(range(3)),
    "a weak reference": weakref.ref(Net),
}


@pytest.mark.parametrize("name", KEPT)
def test_functions_that_lead_to_no_module_are_kept(name):
    net = Net()
    for keep, _ in PLACES.values():
        keep(net, KEPT[name])
    assert net.fn == {"a": KEPT[name]}
    net.fn = KEPT[name]
    assert net.fn is KEPT[name]
    assert [*net.state_dict()] == ["weight"]


def test_the_message_says_what_holds_it_and_names_a_method():
    class First(mt.Module):
        def __init__(self):
            self.scale = lambda x: x * self.weight  # before there is a weight
            self.weight = Parameter(jnp.ones(3))

    class Second(mt.Module):
        def __init__(self):
            net = nn.Linear(3, 2)
            self.scale = lambda x: net(x)

    class Third(Net):
        def __init__(self):
            super().__init__()
            self.activation = self.twice

    with pytest.raises(TypeError, match=r"First\.scale: a function .* First \(its closure's variable `self`\)"):
        First()
    with pytest.raises(
        TypeError, match=r"Linear \(its closure's variable `net`\).*`def scale\(self, ...\)`.*`self.net = "
    ):
        Second()
    with pytest.raises(
        TypeError, match=r"Third\.activation: a method that holds a Third \(the object that it is bound to"
    ):
        Third()
    with pytest.raises(TypeError, match=r"Net\.forward: a method .*`def forward\(self, ...\)`"):
        net = Net()
        net.forward = types.MethodType(lambda self, x: x, net)


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.jit, wrapped, lambda fn: [fn], lambda fn: {"a": (fn,)}])
def test_a_closure_that_is_bound_later_is_refused_at_the_next_use(wrap):
    class Late(mt.Module):
        def __init__(self):
            self.fn = wrap(lambda x: net(x))
            net = nn.Linear(3, 2)

        def forward(self, x):
            return x

    with pytest.raises(TypeError, match=r"fn.*holds a Linear \(its closure's variable `net`\)"):
        jax.tree.leaves(Late())


def test_a_search_ends():
    """In circles, in large tables, and where nothing is found."""
    around = Holder(None)
    around.held = [around, {"a": around}]
    assert find_hidden(around) is None
    assert find_hidden(Holder({i: i for i in range(100_000)})) is None
    assert find_hidden(Holder([(i,) for i in range(100_000)])) is None
    assert find_hidden(Holder([Holder([Holder([Holder([Holder(LAYER)])])])])).value is LAYER


def test_a_function_for_forward_may_be_assigned():
    relu = nn.ReLU()
    relu.forward = jnp.negative
    assert float(relu(jnp.array(2.0))) == float(jax.jit(lambda m: m(jnp.array(2.0)))(relu)) == -2.0
