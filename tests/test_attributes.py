"""What a class has by the name of an attribute, and Python's own ways of writing classes and of assigning."""

import abc
import copy
import dataclasses
import enum
import functools
import inspect
import pickle
import types
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minitorch_jax as mt
from minitorch_jax import Buffer, Module, Parameter, nn, optim

X = jnp.ones(3)


def scale():
    return Parameter(jnp.full(3, 2.0))


class Color(enum.Enum):
    RED = 1


class Scaled(Module):
    """The base of what is tried here: its output is its input times `weight`."""

    def forward(self, x):
        return x * self.weight


def check(make):
    """A module with one parameter (3,) of twos, by which its output is scaled, is right in everything."""
    module = make()
    names = [name for name, _ in module.named_parameters()]
    assert [p.shape for p in module.parameters()] == [(3,)]
    np.testing.assert_allclose(module(X), 2.0)
    np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(module, X), 2.0)
    np.testing.assert_allclose(jax.grad(lambda m: m(X).sum())(module).parameters()[0], 1.0)
    for other in (copy.deepcopy(module), jax.tree.map(lambda a: a, module), make()):
        other.load_state_dict({name: 3 * jnp.ones(3) for name in module.state_dict()})
        np.testing.assert_allclose(other(X), 3.0)
        np.testing.assert_allclose(module(X), 2.0)
    opt = optim.SGD([module], lr=1.0)
    mt.backward(lambda m, x: m(x).sum(), module, X)
    opt.step()
    np.testing.assert_allclose(module(X), 1.0)
    module.eval()
    assert not module.training and repr(module) and [*module.state_dict()][:1] == names
    module.apply(lambda m: None)
    return module


# -- what the class has by the same name ------------------------------------------------------------------------------

PLAIN = {
    "None": None,
    "number": 1.0,
    "text": "x",
    "tuple": (1, 2),
    "enum": Color.RED,
    "NumPy array": np.zeros(3),
    "JAX array": jnp.zeros(3),
    "class": int,
    "object": types.SimpleNamespace(a=1),
}


def way_setattr(module):
    module.weight = scale()


def way_buffer_first(module):
    module.weight = Buffer(jnp.zeros(3))
    module.weight = scale()


def way_none_first(module):
    module.weight = None
    module.weight = scale()


def way_loop(module):
    for name in ("weight",):
        setattr(module, name, scale())


def way_deleted(module):
    module.weight = scale()
    del module.weight
    module.weight = scale()


WAYS = [way_setattr, way_buffer_first, way_none_first, way_loop, way_deleted]


@pytest.mark.one_in(9)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["class", "base", "mixin before", "mixin after", "subclass"])
@pytest.mark.parametrize("default", [None, 0.5])
def test_a_declared_array_wins_over_a_plain_value_of_the_class(default, where, way):
    mixin = type("Mixin", (), {"weight": default})
    body = {"__init__": way}
    if where == "class":
        Net = type("Net", (Scaled,), body | {"weight": default})
    elif where == "base":
        Net = type("Net", (type("Base", (Scaled,), {"weight": default}),), body)
    elif where == "subclass":
        Net = type("Net", (type("Base", (Scaled,), body),), {"weight": default})
    else:
        Net = type("Net", (mixin, Scaled) if where == "mixin before" else (Scaled, mixin), body)
    module = check(Net)
    assert Net.weight is default  # of the class itself, as before
    del module.weight
    assert module.weight is default
    module.weight = None
    assert module.weight is None and not module.parameters()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", PLAIN)
def test_a_declared_array_wins_over_every_plain_value(name):
    class Net(Scaled):
        weight = PLAIN[name]
        count = PLAIN[name]

        def __init__(self):
            self.weight, self.count = scale(), Buffer(jnp.zeros(3))

    module = check(Net)
    module.count = jnp.ones(3)
    assert module.count.sum() == 3.0


def test_a_class_that_was_hidden_before_and_after():
    """Each class of a family has a value, and each object its own array."""

    class Base(Scaled):
        weight = None

        def __init__(self):
            self.weight = scale()

    class Child(Base):
        weight = 7.0

    class Without(Base):
        def __init__(self):
            pass

    check(Base)
    check(Child)
    assert Without().weight is None and Child.weight == 7.0 and Base.weight is None


def test_an_object_that_is_unpickled_where_no_other_was_made(tmp_path):
    source = f"""
class Kept(Module):
    weight = None
    def forward(self, x):
        return x * self.weight
Kept.__module__ = {__name__!r}
"""
    space = globals()
    exec(source, space)  # noqa: S102
    kept = space["Kept"]()
    kept.weight = scale()
    data = pickle.dumps(kept)
    exec(source, space)  # noqa: S102
    np.testing.assert_allclose(pickle.loads(data)(X), 2.0)  # noqa: S301


METHODS = {
    "method": lambda self: 1,
    "class method": classmethod(lambda cls: 1),
    "static method": staticmethod(lambda: 1),
    "property": property(lambda self: 1),
    "cached property": functools.cached_property(lambda self: 1),
    "partial method": functools.partialmethod(lambda self: 1),
    "mt.jit": mt.jit(lambda self: 1),
}
TRACKED = {
    "Parameter": scale,
    "Buffer": lambda: Buffer(jnp.zeros(3)),
    "module": lambda: nn.Linear(3, 2),
    "list": lambda: [nn.Linear(3, 2)],
    "dict": lambda: {"a": nn.Linear(3, 2)},
}


@pytest.mark.parametrize("inherited", [False, True])
@pytest.mark.parametrize("kind", METHODS)
def test_a_name_of_a_method_or_property_is_refused(kind, inherited):
    Net = type("Net", (Module,), {"scale": METHODS[kind]})
    Net = type("Net", (Net,), {}) if inherited else Net
    for make in TRACKED.values():
        module = Net()
        with pytest.raises(
            (TypeError, AttributeError), match=r"(Net\.scale: Net has a .*`scale`.*Choose|'scale'.*no setter)"
        ):
            module.scale = make()
        assert not module.state_dict()


OURS = sorted({name for cls in (Module, *Module.__mro__[1:-1]) for name in vars(cls) if not name.startswith("__")})


def test_no_name_that_every_module_has_is_taken_by_what_it_holds():
    for name in [*OURS, "__call__", "__repr__"]:
        for kind, make in TRACKED.items():
            module = nn.ReLU()
            with pytest.raises(TypeError, match=rf"ReLU\.{name}: "):
                setattr(module, name, make())
            assert not module.state_dict(), (name, kind)
    methods = [name for name in OURS if inspect.isfunction(vars(Module).get(name)) and not name.startswith("_")]
    assert len(methods) >= 25
    for name in methods:
        with pytest.raises(TypeError, match=rf"ReLU\.{name}: ReLU has a method"):
            setattr(nn.ReLU(), name, 3)


def test_a_property_with_a_setter_gets_what_is_assigned():
    class Net(Scaled):
        def __init__(self):
            self.weight = scale()

        @property
        def weight(self):
            return self._weight

        @weight.setter
        def weight(self, value):
            self._weight = value

    module = Net()
    assert [*module.state_dict()] == ["_weight"]
    module.weight = jnp.ones(3)
    np.testing.assert_allclose(module(X), 1.0)


@pytest.mark.parametrize(
    "value",
    [
        scale(),
        Buffer(jnp.zeros(2)),
        nn.Linear(3, 2),
        [nn.Linear(3, 2)],
        {"a": (nn.ReLU(),)},
        optim.SGD([nn.Linear(2, 2)]),
    ],
)
@pytest.mark.parametrize("where", ["class", "base", "mixin"])
def test_what_the_class_itself_holds_is_refused(value, where):
    body = {"layer": value}
    if where == "class":
        Net = type("Net", (Module,), body)
    else:
        Net = type(
            "Net",
            (type("Base", (Module,) if where == "base" else (), body), Module)[:: 1 if where == "mixin" else 1],
            {},
        )
    for _ in range(2):
        with pytest.raises(
            TypeError, match=r"(Net|Base)\.layer is or holds an? \w+, which belongs to the class: no optimizer"
        ):
            Net()


# -- ways of writing a class ------------------------------------------------------------------------------------------


def plain_dataclass():
    @dataclasses.dataclass
    class Net(Scaled):
        size: int
        weight: Any = None

        def __post_init__(self):
            self.weight = Parameter(jnp.full(self.size, 2.0))

    return lambda: Net(3)


def dataclass_with_factory():
    @dataclasses.dataclass(eq=False)
    class Net(Scaled):
        size: int = 3
        weight: Any = dataclasses.field(default_factory=scale)

    return Net


def keyword_dataclass():
    @dataclasses.dataclass(kw_only=True, order=True)
    class Net(Scaled):
        name: str = "x"
        weight: Any = dataclasses.field(default=None, repr=False)

        def __post_init__(self):
            self.weight = scale()

    return Net


def dataclass_with_slots():
    @dataclasses.dataclass(slots=True)
    class Net(Scaled):
        size: int
        inner: Any = None
        weight: Any = None

        def __post_init__(self):
            self.weight, self.inner = Parameter(jnp.full(self.size, 2.0)), nn.ReLU()

    return lambda: Net(3)


def slots():
    class Net(Scaled):
        __slots__ = ("weight", "inner", "size")

        def __init__(self):
            self.size, self.inner = 3, [nn.ReLU()]
            self.weight = Parameter(jnp.full(self.size, 2.0))
            assert self.inner[0].training
            del self.size
            with pytest.raises(AttributeError, match=r"Net has no attribute `size`$"):
                self.size  # noqa: B018

    return Net


def hook_without_super():
    class Base(Scaled):
        def __init_subclass__(cls, tag=False):
            cls.tag = tag

    class Net(Base, tag=True):
        def __init__(self):
            self.weight = scale()

    return Net


def annotations():
    class Net(Scaled):
        weight: jax.Array
        other: Any

        def __init__(self):
            self.weight = scale()

    return Net


def late_super():
    class Net(Scaled):
        def __init__(self):
            self.weight = scale()
            super().__init__()

    return Net


def mixin_with_init():
    class Mixin:
        def __init__(self, *args):
            super().__init__(*args)
            self.weight = scale()

    class Net(Mixin, Scaled):
        pass

    return Net


def generic():
    T = TypeVar("T")

    class Net(Scaled, Generic[T]):
        def __init__(self):
            self.weight = scale()

    return Net[int]


def abstract():
    class Base(Scaled, abc.ABC):
        @abc.abstractmethod
        def make(self): ...

        def __init__(self):
            self.weight = self.make()

    class Net(Base):
        def make(self):
            return scale()

    return Net


def metaclass():
    class Meta(type):
        pass

    class Net(Scaled, metaclass=Meta):
        def __init__(self):
            self.weight = scale()

    return Net


def own_new():
    class Net(Scaled):
        def __new__(cls, *args):
            self = super().__new__(cls)
            self.weight = scale()
            return self

    return Net


def own_getattr():
    class Net(Scaled):
        def __init__(self):
            self.inner, self.weight = nn.ReLU(), scale()

        def __getattr__(self, name):
            return getattr(self.inner, name)

    return Net


def own_getattr_with_super():
    class Net(Scaled):
        def __init__(self):
            self.weight = scale()

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name != "other":
                    raise
                return 5

    return Net


def own_setattr():
    class Net(Scaled):
        def __init__(self):
            self.weight = scale()

        def __setattr__(self, name, value):
            super().__setattr__(name, value)

    return Net


def attributes_from_locals():
    class Net(Scaled):
        def __init__(self, size=3, name="x"):
            self.__dict__.update(locals())
            self.weight = Parameter(jnp.full(self.size, 2.0))

    return Net


def cached_property_of_a_parameter():
    class Net(Module):
        def __init__(self):
            self.root = Parameter(jnp.full(3, np.sqrt(2.0, dtype=np.float32)))

        @functools.cached_property
        def weight(self):
            return self.root**2

        def forward(self, x):
            return x * self.weight

    return Net


def cached_property_of_numbers():
    class Net(Scaled):
        def __init__(self):
            self.size, self.weight = 6, scale()

        @functools.cached_property
        def half(self):
            return {"size": self.size // 2, "all": [1, 2]}

        def forward(self, x):
            return x.reshape(self.half["size"]) * self.weight

    return Net


def cached_property_of_a_mixin():
    class Mixin:
        @functools.cached_property
        def twice(self):
            return (2 * self.weight,)

    class Net(Mixin, Scaled):
        def __init__(self):
            self.weight = scale()

        def forward(self, x):
            return x * self.twice[0] / 2

    return Net


def holds_itself():
    class Net(Scaled):
        def __init__(self):
            self.me, self.weight = self, scale()

        def forward(self, x):
            return x * self.me.weight

    return Net


def child_that_knows_its_parent():
    class Child(Module):
        def __init__(self, parent):
            self.parents = [parent]

        def forward(self, x):
            return x * self.parents[0].weight

    class Net(Module):
        def __init__(self):
            self.weight = scale()
            self.child = Child(self)

        def forward(self, x):
            return self.child(x)

    return Net


CLASSES = [
    value
    for value in list(globals().values())
    if isinstance(value, types.FunctionType) and value.__code__.co_argcount == 0
]
CLASSES = CLASSES[[c.__name__ for c in CLASSES].index("plain_dataclass") :]


@pytest.mark.one_in(6)
@pytest.mark.parametrize(
    "write", [c for c in CLASSES if c is not cached_property_of_a_parameter], ids=lambda c: c.__name__
)
def test_every_way_of_writing_a_class(write):
    check(write())


def test_a_cached_property_keeps_neither_tracers_nor_old_values():
    module = cached_property_of_a_parameter()()
    for _ in range(2):
        mt.backward(lambda m, x: m(x).sum(), module, X)
        np.testing.assert_allclose(module(X), 2.0, rtol=1e-6)
        np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(module, X), 2.0, rtol=1e-6)
    np.testing.assert_allclose(module.grads()[0], 2 * 2 * np.sqrt(2.0), rtol=1e-6)
    assert [*vars(module)] == ["training"] and [*module.state_dict()] == ["root"]
    module.root = jnp.ones(3)
    np.testing.assert_allclose(module(X), 1.0)
    assert isinstance(vars(type(module))["weight"], functools.cached_property)


def test_a_cached_property_of_numbers_is_computed_once_and_again_when_deleted():
    calls = []

    class Net(Module):
        @functools.cached_property
        def table(self):
            calls.append(1)
            return [self.size]

    net = Net()
    net.size = 1
    assert net.table is net.table and len(calls) == 1
    net.size = 2
    del net.table
    assert net.table == [2] and len(calls) == 2
    assert jax.jit(lambda m: m.table[0] + jnp.zeros(()))(net) == 2


def test_a_cached_property_of_what_no_module_may_keep_is_computed_at_each_use():
    class Net(Module):
        @functools.cached_property
        def names(self):
            return {0: {"a"}}

    net = Net()
    assert net.names == {0: {"a"}} and net.names is not net.names
    assert jax.tree.leaves(net) == []


def test_a_cached_property_that_makes_a_module():
    class Net(Module):
        def __init__(self):
            self.layers = [nn.Linear(3, 3)]

        @functools.cached_property
        def head(self):
            return nn.Linear(3, 2)

        @functools.cached_property
        def first(self):
            return self.layers[:1]

        def forward(self, x):
            return self.head(self.first[0](x))

    with pytest.raises(
        TypeError, match=r"Net\.head is a cached_property that made a Linear while code was traced.*__init__"
    ):
        mt.backward(lambda m, x: m(x).sum(), Net(), X)
    net = Net()
    assert net.head is net.head and net.first == [net.layers[0]]
    assert [*net.state_dict()] == ["layers.0.weight", "layers.0.bias", "head.weight", "head.bias"]
    mt.backward(lambda m, x: m(x).sum(), net, X)
    assert all(np.any(grad) for grad in net.grads())


class Frozen(NamedTuple):
    held: Any


REFUSED = {
    "frozen dataclass": (
        lambda: dataclasses.make_dataclass("Net", [("a", int)], bases=(Module,), frozen=True)(1),
        "frozen dataclass",
    ),
    "module as default": (
        lambda: dataclasses.make_dataclass("Net", [("layer", Any, nn.Linear(2, 2))], bases=(Module,))(),
        r"Net\.layer is or holds a Linear.*default_factory",
    ),
    "NamedTuple of arrays": (
        lambda: setattr(nn.ReLU(), "pair", Frozen(jnp.ones(2))),
        r"ReLU\.pair: a Frozen that holds an array",
    ),
    "NamedTuple of modules": (
        lambda: setattr(nn.ReLU(), "pair", Frozen(nn.ReLU())),
        r"ReLU\.pair: a Frozen that holds a ReLU",
    ),
    "Parameter in vars": (lambda: vars_and_leaves(scale()), r"w holds a Parameter.*without `Module.__setattr__`"),
    "array in vars": (lambda: vars_and_leaves(jnp.ones(3)), r"w holds a ArrayImpl.*without `Module.__setattr__`"),
    "NumPy array in vars": (lambda: vars_and_leaves(np.ones(3)), r"w holds a ndarray.*without `Module.__setattr__`"),
    "list in vars": (lambda: vars_and_leaves([nn.ReLU()]), r"w holds a list.*without `Module.__setattr__`"),
    "dict in vars": (lambda: vars_and_leaves({}), r"w holds a dict.*without `Module.__setattr__`"),
    "set in vars": (lambda: vars_and_leaves({1}), r"w holds a set.*without `Module.__setattr__`"),
    "object.__setattr__": (
        lambda: leaves_with(lambda m: object.__setattr__(m, "w", scale())),
        r"w holds a Parameter.*without",
    ),
    "own __setattr__": (lambda: jax.tree.leaves(Past()), r"weight holds a Parameter.*without `Module.__setattr__`"),
    "own __new__": (lambda: NewWithout(), r"`NewWithout.__new__` must create the object with `super\(\).__new__"),
    "cache of a method": (lambda: Cached().size(1), r"Cached objects change, so they have no hash.*functools.cache"),
}


class Past(Module):
    def __init__(self):
        self.weight = scale()

    def __setattr__(self, name, value):
        object.__setattr__(self, name, value)


class NewWithout(Module):
    def __new__(cls):
        return object.__new__(cls)

    def __init__(self):
        self.weight = scale()


class Cached(Module):
    @functools.lru_cache  # noqa: B019
    def size(self, n):
        return n


def leaves_with(change):
    module = nn.ReLU()
    change(module)
    mt.Module.__setattr__(module, "other", nn.ReLU())  # some structure changes
    return jax.tree.leaves(module)


def vars_and_leaves(value):
    return leaves_with(lambda module: vars(module).update(w=value))


@pytest.mark.parametrize("case", REFUSED)
def test_one_clear_line_for_what_cannot_work(case):
    act, message = REFUSED[case]
    with pytest.raises((TypeError, AttributeError), match=message):
        act()


def test_optimizers_whose_hook_forgets_super_are_pytrees_with_their_own_rule():
    class Base(optim.SGD):
        def __init_subclass__(cls, tag=False):
            cls.tag = tag

    class Own(Base, tag=True):
        @staticmethod
        def update(p, g, s, h):
            return p - h.lr * g / jnp.sqrt(jnp.sum(g**2)), s

    layer = nn.Linear(3, 2)
    opt = Own([layer], lr=0.1)
    assert not Own.elementwise and len(jax.tree.leaves(opt)) > 3
    assert isinstance(jax.tree.map(lambda a: a, opt), Own)


def test_the_class_of_a_module_may_be_assigned():
    class One(Scaled):
        def __init__(self):
            self.weight = scale()

    class Other(One):
        def forward(self, x):
            return -super().forward(x)

    module = One()
    np.testing.assert_allclose(jax.jit(lambda m: m(X))(module), 2.0)
    module.__class__ = Other
    np.testing.assert_allclose(jax.jit(lambda m: m(X))(module), -2.0)
    assert type(jax.tree.map(lambda a: a, module)) is Other


# -- modules and optimizers that hold each other ----------------------------------------------------------------------


class Trainer(Module):
    def __init__(self):
        self.net, self.opts = nn.Linear(3, 2), []


@pytest.mark.parametrize(
    "hold",
    [
        lambda t: setattr(t, "opt", optim.Adam([t])),
        lambda t: setattr(t, "opt", optim.SGD([{"modules": [nn.ReLU()]}, {"modules": [t]}], lr=0.1)),
        lambda t: setattr(t, "opt", [optim.Adam([t])]),
        lambda t: setattr(t, "opt", {"opt": (1, optim.Adam([t]))}),
        lambda t: setattr(t.net, "opt", optim.Adam([t])),
        lambda t: setattr(t.net, "opt", optim.Adam([t.net])),
    ],
)
def test_a_module_that_holds_its_own_optimizer_is_refused(hold):
    trainer = Trainer()
    with pytest.raises(
        TypeError, match=r"(Trainer|Linear)\.opt: this (Adam|SGD) trains the (Trainer|Linear) itself.*\(\[self\.net\]\)"
    ):
        hold(trainer)
    assert [*trainer.state_dict()] == ["net.weight", "net.bias"]


@pytest.mark.parametrize(
    "act", [jax.tree.leaves, lambda t: t.opts[0].step(), lambda t: t.eval().parameters(), copy.deepcopy]
)
@pytest.mark.parametrize("how", ["append", "modules", "child"])
def test_a_circle_of_module_and_optimizer_is_named_when_it_is_closed_in_another_way(how, act):
    trainer, other = Trainer(), nn.Linear(3, 3)
    opt = optim.Adam([trainer if how == "append" else other])

    def close():
        trainer.opts.append(opt)
        if how == "modules":
            opt.modules.append(trainer)
        elif how == "child":
            other.trainer = trainer
        act(trainer)

    with pytest.raises(
        RuntimeError, match=r"this Adam trains a module that holds the Adam itself.*`Adam\(\[self.net\]\)`"
    ):
        close()


def test_a_trainer_that_holds_the_optimizer_of_its_parts():
    trainer = Trainer()
    trainer.opt = optim.Adam([trainer.net], lr=0.1)
    before = trainer.net.weight
    mt.backward(lambda t, x: t.net(x).sum(), trainer, X)
    trainer.opt.step()
    assert not np.allclose(trainer.net.weight, before)
    assert [*trainer.eval().state_dict()] == ["net.weight", "net.bias"]
    other = copy.deepcopy(trainer)
    assert other.opt.modules[0] is other.net


# -- what differs -----------------------------------------------------------------------------------------------------


class Inner(Module):
    def __init__(self, rate=0.5):
        self.layer, self.rate, self.table = nn.Linear(3, 2), rate, [1, 2]


def define_again():
    space = dict(globals())
    code = "class Again(Module):\n    def __init__(self):\n        self.layer = nn.Linear(3, 2)\n"
    made = []
    for _ in range(2):
        exec(code, space)  # noqa: S102
        made.append(space["Again"]())
    return made


def changed(change):
    one, other = Inner(), Inner()
    change(one)
    return one, other


DIFFERENCES = {
    "class defined again": (define_again, r"it is of a class Again that was defined again"),
    "training": (lambda: changed(lambda m: m.layer.eval()), r"layer\.training is False, not True"),
    "static": (lambda: changed(lambda m: setattr(m, "rate", 0.1)), r"rate is 0\.1, not 0\.5"),
    "list": (lambda: changed(lambda m: m.table.append(3)), r"len\(table\) is 3, not 2, table\.2 is 3, not there"),
    "attribute": (lambda: changed(lambda m: setattr(m, "extra", 1)), r"extra is 1, not there"),
    "frozen": (lambda: changed(lambda m: m.layer.freeze()), r"layer\.weight is frozen, not parameter"),
    "other module": (
        lambda: changed(lambda m: setattr(m, "layer", nn.Bilinear(1, 3, 2))),
        r"layer is a Bilinear, not a Linear",
    ),
    "missing": (lambda: changed(lambda m: setattr(m.layer, "bias", None)), r"missing \['layer\.bias'\]"),
    "unexpected": (lambda: changed(lambda m: setattr(m, "scale", scale())), r"unexpected \['scale'\]"),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_accumulate_says_what_differs(case):
    given, mine = DIFFERENCES[case][0]()
    with pytest.raises(ValueError, match=r"of another structure than this \w+: .*" + DIFFERENCES[case][1]):
        mine.accumulate(jax.tree.map(jnp.ones_like, given))
    assert not np.any(mine.grads()[0])


def test_accumulate_says_that_ties_differ():
    one, other = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))
    one[2].tie("weight", one[0], "weight")
    other[2].tie("weight", other[1], "weight")
    with pytest.raises(ValueError, match=r"the same names, but other parameters are tied"):
        other.accumulate(jax.tree.map(jnp.ones_like, one))
