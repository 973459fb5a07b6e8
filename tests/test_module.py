"""Modules: declarations, containers, tied weights, live lists, state dicts, modes, and what may not be done to them."""

import collections
import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import HAS_TORCH, NEEDS_TORCH
from oracle import actual as torch

import minitorch_jax as mt
from minitorch_jax import Buffer, Module, Parameter, nn, optim

of_torch = pytest.mark.skipif(not HAS_TORCH, reason=NEEDS_TORCH)


class Box(Module):
    """Takes its attributes from outside."""

    def __init__(self, **attributes):
        for name, value in attributes.items():
            setattr(self, name, value)


class Leaf(Module):
    """One parameter of one number, by which it is recognised."""

    def __init__(self, value=0.0):
        self.w = Parameter([float(value)])

    def forward(self, x):
        return self.w * x


def linear(number=0, in_features=3, out_features=2):
    return nn.Linear(in_features, out_features, key=jax.random.key(number))


def names(module):
    return [name for name, _ in module.named_parameters()]


def numbers(module):
    """The numbers of a module's Leaves, each once, in order."""
    return [float(array[0]) for array in module.parameters()]


def square(model, x):
    return (model(x) ** 2).sum()


# -- parameters and buffers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [[1.0, 2.0], (1.0, 2.0), np.float32([1, 2]), np.array([1.0, 2.0]), jnp.array([1.0, 2.0])]
)
def test_a_declared_attribute_reads_as_a_plain_array(given):
    box = Box(weight=Parameter(given), running=Buffer(given))
    for array in (box.weight, box.running):
        assert isinstance(array, jax.Array)
        assert array.dtype == jnp.float32
        assert array.tolist() == [1.0, 2.0]


def test_scalars_become_arrays_without_weak_types():
    box = Box(scale=Parameter(2.0), asarray=Parameter(jnp.asarray(2.0)), count=Buffer(7))
    assert box.scale.shape == box.count.shape == ()
    assert not box.scale.weak_type and not box.asarray.weak_type and not box.count.weak_type
    assert (float(box.scale), int(box.count), box.count.dtype) == (2.0, 7, jnp.int32)


def test_numpy_arrays_are_copied_on_the_way_in():
    source = np.ones(1024, np.float32)
    box = Box(weight=Parameter(source), running=Buffer(source))
    source[:] = 5
    assert box.weight.max() == box.running.max() == 1
    box.weight = source
    source[:] = 7
    assert box.weight.min() == box.weight.max() == 5


@pytest.mark.parametrize("given", [3, True, np.arange(2), jnp.arange(2), jnp.ones(2, jnp.complex64), jax.random.key(0)])
def test_a_parameter_must_be_floating(given):
    with pytest.raises(TypeError, match=r"must be floating; got .*Buffer\(array\)"):
        Parameter(given)


def test_an_array_that_was_read_stays_as_it_was():
    leaf = Leaf(1)
    before = leaf.w
    leaf.w = jnp.array([2.0])
    assert before.tolist() == [1.0]
    assert leaf.w.tolist() == [2.0]


@pytest.mark.parametrize(
    "value",
    [jnp.array([[3.0, 4.0]]), np.float32([[3, 4]]), 2.0 * jnp.array([[1.5, 2.0]])],
    ids=["jax", "numpy", "computed"],
)
def test_assigning_an_array_replaces_the_value(value):
    box = Box(weight=Parameter([[1.0, 2.0]]), running=Buffer([[1.0, 2.0]]))
    box.weight = value
    box.running = value
    assert box.weight.tolist() == box.running.tolist() == [[3.0, 4.0]]
    assert names(box) == ["weight"]
    assert len(box.buffers()) == 1


def test_numbers_may_be_assigned_to_scalars():
    box = Box(scale=Parameter(1.0), count=Buffer(0))
    box.scale, box.count = 2.5, 2**31 - 1
    assert float(box.scale) == 2.5 and box.scale.dtype == jnp.float32
    assert int(box.count) == 2**31 - 1 and box.count.dtype == jnp.int32


@pytest.mark.parametrize(
    "value, shown",
    [
        (jnp.zeros(3), r"Box\.weight is float32\[2, 3\], and was given float32\[3\].*\(3,\) for \(2, 3\)"),
        (np.zeros((3, 2), np.float32), r"float32\[2, 3\], and was given float32\[3, 2\]"),
        (jnp.zeros((2, 3), jnp.bfloat16), r"float32\[2, 3\], and was given bfloat16\[2, 3\].*bfloat16 for float32"),
        (jnp.zeros((2, 3), jnp.int32), r"int32 for float32"),
        (1.0, r"float32\[2, 3\], and was given float32\[\]"),
    ],
)
def test_a_wrong_shape_or_dtype_is_refused(value, shown):
    box = Box(weight=Parameter(jnp.ones((2, 3))))
    with pytest.raises(ValueError, match=shown):
        box.weight = value
    assert box.weight.tolist() == [[1.0] * 3] * 2


def test_a_wrong_dtype_is_refused_for_an_integer_buffer():
    box = Box(count=Buffer([1, 2]))
    with pytest.raises(ValueError, match=r"Box\.count is int32\[2\], and was given float32\[2\]"):
        box.count = jnp.zeros(2)
    assert box.count.tolist() == [1, 2]


@pytest.mark.parametrize(
    "array", [jnp.ones, np.ones, pytest.param(lambda n: torch.ones(n), marks=of_torch)], ids=["jax", "numpy", "torch"]
)
@pytest.mark.parametrize("wrap", [lambda a: a, lambda a: [a], lambda a: (a,), lambda a: {"k": a}])
def test_a_bare_array_is_refused_with_both_fixes(array, wrap):
    box = Box()
    with pytest.raises(AttributeError, match=r"bare array \(.*2\].*\n.*Parameter\(array\).*\n.*Buffer\(array\)"):
        box.weight = wrap(array(2))
    assert not hasattr(box, "weight")
    assert len(jax.tree.leaves(box)) == 0


class Caching(Module):
    def __init__(self):
        self.w = Parameter(jnp.ones(2))

    def forward(self, x):
        self.x = x
        return (self.w * x).sum()


def test_a_cached_activation_is_met_with_the_reason_it_is_not_needed():
    model = Caching()
    for call in (lambda: model(jnp.ones(2)), lambda: mt.backward(model, jnp.ones(2))):
        with pytest.raises(AttributeError, match=r"Caching\.x was given a bare array(.|\n)*JAX computes the gradients"):
            call()
    assert not hasattr(model, "x")
    assert model.grads()[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "wrong, near",
    [("wieght", "weight"), ("parameter", "parameters"), ("in_feature", "in_features"), ("trainin", "training")],
)
def test_an_unknown_attribute_names_the_nearest(wrong, near):
    with pytest.raises(AttributeError, match=rf"Linear has no attribute `{wrong}`; did you mean `{near}`"):
        getattr(linear(), wrong)


def test_hasattr_and_defaults_work():
    layer = linear()
    assert hasattr(layer, "weight") and not hasattr(layer, "scale")
    assert getattr(layer, "scale", 3) == 3


def test_static_attributes_are_kept_as_they_are():
    given = {
        "n": 3,
        "p": 0.5,
        "mode": "same",
        "sizes": (1, 2),
        "none": None,
        "act": nn.functional.relu,
        "list": [1, [2]],
    }
    box = Box(**given, flags={"a": True})
    assert {name: getattr(box, name) for name in given} == given
    assert box.flags == {"a": True}
    assert len(box.parameters()) == 0


class Unhashable:
    __hash__ = None


@pytest.mark.parametrize(
    "value", [{1, 2}, bytearray(b"x"), Unhashable(), (1, {2})], ids=["set", "bytearray", "object", "in a tuple"]
)
def test_a_static_attribute_must_be_hashable(value):
    box = Box()
    with pytest.raises(TypeError, match=r"Box\.x.*must be hashable"):
        box.x = value
    assert not hasattr(box, "x")


class Holder:
    def __init__(self, held):
        self.held = held


class CallableHolder(Holder):
    def __call__(self, x):
        return x


Pair = collections.namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    "hide",
    [
        pytest.param(lambda m: functools.partial(max, m), id="partial, argument"),
        pytest.param(lambda m: functools.partial(max, key=m), id="partial, keyword"),
        pytest.param(lambda m: functools.partial(m, 1), id="partial, function"),
        pytest.param(lambda m: functools.partial(max, [m]), id="partial, list"),
        pytest.param(lambda m: Holder(m), id="object"),
        pytest.param(lambda m: Holder([m]), id="object, list"),
        pytest.param(lambda m: Holder(Holder(m)), id="object in object"),
        pytest.param(lambda m: CallableHolder(m), id="callable object"),
        pytest.param(lambda m: m.forward, id="bound method"),
        pytest.param(lambda m: Pair(m, 1), id="named tuple"),
        pytest.param(lambda m: collections.OrderedDict(a=m), id="OrderedDict"),
        pytest.param(lambda m: collections.deque([m]), id="deque"),
    ],
)
def test_an_object_that_would_hide_a_module_is_refused(hide):
    box = Box()
    with pytest.raises(TypeError, match=r"Box\.x.*(Linear|Leaf).*would hide it from parameters"):
        box.x = hide(linear())
    assert not hasattr(box, "x")


@pytest.mark.parametrize(
    "hide", [Holder, lambda a: Holder([a]), lambda a: functools.partial(max, a), lambda a: Pair(a, 1)]
)
def test_an_object_that_would_hide_an_array_is_refused(hide):
    with pytest.raises(TypeError, match=r"Box\.x.*an array would hide it"):
        Box(x=hide(jnp.ones(2)))


def test_a_set_cannot_hold_a_module():
    with pytest.raises(TypeError, match="Linear objects change, so they have no hash"):
        Box(x={linear()})


@pytest.mark.parametrize("wrap", [lambda p: [p], lambda p: {"a": p}, lambda p: (p,)])
def test_a_parameter_in_a_container_has_no_name(wrap):
    with pytest.raises(TypeError, match="a Parameter inside a list, tuple or dict has no name of its own"):
        Box(weights=wrap(Parameter(1.0)))


def test_none_in_place_of_a_parameter_removes_it():
    layer = linear()
    layer.bias = None
    assert layer.bias is None
    assert list(layer.state_dict()) == ["weight"]
    x = jnp.ones((1, 3))
    assert jnp.allclose(layer(x), x @ layer.weight.T)


def test_a_parameter_does_not_become_something_else_by_accident():
    layer = linear()
    with pytest.raises(TypeError, match=r"Linear\.bias is a parameter: it takes an array.*not a str"):
        layer.bias = "none"
    with pytest.raises(TypeError, match=r"Linear\.bias is a parameter.*not a Linear"):
        layer.bias = linear()
    assert layer.bias.shape == (2,)


def test_a_new_declaration_may_have_another_shape_and_kind():
    box = Box(x=Parameter([1.0]))
    box.x = Parameter([[2.0, 3.0]])
    assert box.parameters()[0].tolist() == [[2.0, 3.0]]
    box.x = Buffer(4)
    assert names(box) == [] and int(box.x) == 4


def test_attributes_can_be_deleted():
    layer = linear()
    layer.note = "a"
    del layer.bias, layer.note
    assert names(layer) == ["weight"]
    for name in ("bias", "note"):
        with pytest.raises(AttributeError, match=f"no attribute `{name}`"):
            getattr(layer, name)
    with pytest.raises(AttributeError, match="nothing"):
        del layer.nothing


class WithProperty(Module):
    def __init__(self):
        self.w = Parameter(1.0)

    @property
    def doubled(self):
        return 2 * self.w

    @doubled.setter
    def doubled(self, value):
        self.w = jnp.asarray(value, jnp.float32) / 2


def test_properties_work():
    box = WithProperty()
    box.doubled = 10.0
    assert float(box.w) == 5.0 and float(box.doubled) == 10.0


def test_a_module_without_forward_says_so():
    with pytest.raises(NotImplementedError, match="Box has no `forward`"):
        Box()(1)


def test_calling_passes_everything_on():
    class Affine(Module):
        def forward(self, x, *more, shift=0.0):
            return x + sum(more) + shift

    assert Affine()(1.0, 2.0, 3.0, shift=4.0) == 10.0


def test_a_module_inside_an_optimizer_follows_a_new_parameter():
    box = Box(a=Leaf(1))
    opt = optim.SGD([box], lr=0.5)
    box.b = Leaf(2)
    box.accumulate([jnp.array([1.0]), jnp.array([2.0])])
    opt.step()
    assert numbers(box) == [0.5, 1.0]


# -- lists, tuples and dicts -------------------------------------------------------------------------------------------


def leaves(*values):
    return [Leaf(value) for value in values]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda layers: layers.append(Leaf(4)), id="append"),
        pytest.param(lambda layers: layers.insert(1, Leaf(4)), id="insert"),
        pytest.param(lambda layers: layers.extend(leaves(4, 5)), id="extend"),
        pytest.param(lambda layers: layers.__iadd__(leaves(4, 5)), id="+="),
        pytest.param(lambda layers: layers.__delitem__(0), id="del"),
        pytest.param(lambda layers: layers.__delitem__(slice(None, None, 2)), id="del slice"),
        pytest.param(lambda layers: layers.__setitem__(1, Leaf(4)), id="item"),
        pytest.param(lambda layers: layers.__setitem__(slice(0, 2), leaves(4, 5, 6)), id="slice"),
        pytest.param(lambda layers: layers.pop(), id="pop"),
        pytest.param(lambda layers: layers.pop(0), id="pop first"),
        pytest.param(lambda layers: layers.remove(layers[1]), id="remove"),
        pytest.param(lambda layers: layers.reverse(), id="reverse"),
        pytest.param(lambda layers: layers.sort(key=lambda leaf: -leaf.w[0]), id="sort"),
        pytest.param(lambda layers: layers.clear(), id="clear"),
    ],
)
def test_a_list_stays_tracked_when_it_is_changed(change):
    box = Box(layers=leaves(1, 2, 3))
    assert names(box) == ["layers.0.w", "layers.1.w", "layers.2.w"]
    plain = list(box.layers)
    change(box.layers)
    change(plain)
    assert numbers(box) == [float(leaf.w[0]) for leaf in plain]
    assert list(box.state_dict()) == [f"layers.{i}.w" for i in range(len(plain))]
    assert len(jax.tree.leaves(box)) == len(plain)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda heads: heads.__setitem__("c", Leaf(4)), id="new"),
        pytest.param(lambda heads: heads.__setitem__("a", Leaf(4)), id="replace"),
        pytest.param(lambda heads: heads.__delitem__("a"), id="del"),
        pytest.param(lambda heads: heads.update(b=Leaf(4), c=Leaf(5)), id="update"),
        pytest.param(lambda heads: heads.__ior__({"c": Leaf(4)}), id="|="),
        pytest.param(lambda heads: heads.setdefault("c", Leaf(4)), id="setdefault"),
        pytest.param(lambda heads: heads.pop("b"), id="pop"),
        pytest.param(lambda heads: heads.popitem(), id="popitem"),
        pytest.param(lambda heads: heads.clear(), id="clear"),
    ],
)
def test_a_dict_stays_tracked_when_it_is_changed(change):
    box = Box(heads={"a": Leaf(1), "b": Leaf(2)})
    assert names(box) == ["heads.a.w", "heads.b.w"]
    plain = dict(box.heads)
    change(box.heads)
    change(plain)
    assert list(box.state_dict()) == [f"heads.{key}.w" for key in plain]
    assert numbers(box) == [float(leaf.w[0]) for leaf in plain.values()]


def test_a_module_repeated_in_a_list_is_one():
    box = Box(layers=leaves(1, 2))
    box.layers *= 2
    assert numbers(box) == [1.0, 2.0]
    assert list(box.state_dict()) == [f"layers.{i}.w" for i in range(4)]


def test_containers_nest_and_keep_what_is_no_module():
    box = Box(blocks=[{"a": Leaf(1), "b": (Leaf(2), [Leaf(3), 7, None])}, "text"], pair=(Leaf(4), 0.5))
    assert names(box) == ["blocks.0.a.w", "blocks.0.b.0.w", "blocks.0.b.1.0.w", "pair.0.w"]
    assert box.blocks[0]["b"][1][1:] == [7, None] and box.blocks[1] == "text" and box.pair[1] == 0.5
    box.blocks[0]["b"][1].append(Leaf(5))
    box.blocks[0]["c"] = [Leaf(6)]
    box.blocks[0]["c"].append(Leaf(7))
    assert numbers(box) == [1, 2, 3, 5, 6, 7, 4]
    assert isinstance(box.pair, tuple)


def test_what_comes_out_of_a_container_is_what_went_in():
    first, second = leaves(1, 2)
    box = Box(layers=[first], heads={"a": second})
    assert box.layers[0] is first and box.heads["a"] is second
    assert isinstance(box.layers, list) and isinstance(box.heads, dict)
    assert [leaf for leaf in box.layers] == [first] and box.layers == [first]


def test_a_refused_item_leaves_the_container_alone():
    box = Box(layers=leaves(1), heads={"a": Leaf(2)})
    with pytest.raises(AttributeError, match="bare array"):
        box.layers.extend([Leaf(3), jnp.ones(2)])
    with pytest.raises(TypeError, match="hashable"):
        box.layers[0] = {1}
    with pytest.raises(TypeError, match="string keys.*got 3"):
        box.heads[3] = Leaf(3)
    with pytest.raises(TypeError, match="string keys.*got 0"):
        box.more = {0: Leaf(3)}
    assert numbers(box) == [1.0, 2.0] and list(box.heads) == ["a"] and not hasattr(box, "more")


READERS = {
    "parameters": lambda box: box.parameters(),
    "grads": lambda box: box.grads(),
    "named_parameters": lambda box: list(box.named_parameters()),
    "state_dict": lambda box: box.state_dict(),
    "modules": lambda box: list(box.modules()),
    "zero_grad": lambda box: box.zero_grad(),
    "leaves": lambda box: jax.tree.leaves(box),
    "backward": lambda box: mt.backward(lambda box: box.layers[0].w.sum(), box),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("looked", [False, True], ids=["at first", "after a look"])
def test_changing_the_plain_list_that_was_assigned_is_an_error(read, looked):
    source, new = leaves(1), Leaf(2)
    box = Box(layers=source)
    if looked:
        read(box)
    source.append(new)
    with pytest.raises(RuntimeError, match=r"layers was assigned from a plain list.*`self\.layers`"):
        read(box)
    box.layers = source
    assert numbers(box) == [1.0, 2.0]


def test_changing_the_plain_dict_that_was_assigned_is_an_error():
    source, new = {"a": [Leaf(1)]}, Leaf(2)
    box = Box(heads=source)
    source["b"] = new
    with pytest.raises(RuntimeError, match="heads was assigned from a plain dict"):
        box.parameters()
    del source["b"]
    assert numbers(box) == [1.0]
    source["a"].append(new)
    with pytest.raises(RuntimeError, match=r"heads\.a was assigned from a plain list"):
        box.parameters()


# -- ModuleList, ModuleDict, Sequential --------------------------------------------------------------------------------

# Each operation is done to ours and to torch's container of Linear layers with 1, 2 and 3 outputs.
NUMBERED = {
    "nothing": lambda c, new: c,
    "head": lambda c, new: c[:2],
    "tail": lambda c, new: c[1:],
    "every other": lambda c, new: c[::2],
    "append": lambda c, new: c.append(new(9)),
    "extend": lambda c, new: c.extend([new(8), new(9)]),
    "insert": lambda c, new: c.insert(1, new(9)) or c,
    "insert first": lambda c, new: c.insert(0, new(9)) or c,
    "del": lambda c, new: c.__delitem__(1) or c,
    "del last": lambda c, new: c.__delitem__(-1) or c,
    "del slice": lambda c, new: c.__delitem__(slice(0, 2)) or c,
    "pop": lambda c, new: (c.pop(0), c)[1],
    "pop last": lambda c, new: (c.pop(-1), c)[1],
    "item": lambda c, new: c.__setitem__(1, new(9)) or c,
    "last item": lambda c, new: c.__setitem__(-1, new(9)) or c,
    "shrink and grow": lambda c, new: (c.pop(0), c.append(new(9)), c.insert(1, new(8)), c)[-1],
    "+": lambda c, new: c + type(c)(*([new(9)],) if "List" in type(c).__name__ else [new(9)]),
    "+=": lambda c, new: c.__iadd__(type(c)(*([new(9)],) if "List" in type(c).__name__ else [new(9)])),
}


def shapes(module):
    return [(name, tuple(array.shape)) for name, array in module.state_dict().items()]


def both(make):
    ours = make(nn, lambda n: linear(n, 1, n))
    theirs = make(torch.nn, lambda n: torch.nn.Linear(1, n))
    return ours, theirs


@pytest.mark.parametrize("operation", NUMBERED.values(), ids=NUMBERED)
@pytest.mark.parametrize("kind", ["Sequential", "ModuleList"])
def test_numbered_containers_have_torchs_names_after(operation, kind):
    def make(library, new):
        modules = [new(1), new(2), new(3)]
        container = library.Sequential(*modules) if kind == "Sequential" else library.ModuleList(modules)
        return operation(container, new)

    ours, theirs = both(make)
    assert shapes(ours) == shapes(theirs)
    assert names(ours) == [name for name, _ in theirs.named_parameters()]
    assert len(ours) == len(theirs)
    assert [layer.out_features for layer in ours] == [layer.out_features for layer in theirs]


NAMED = {
    "nothing": lambda c, new: c,
    "new": lambda c, new: c.__setitem__("z", new(9)) or c,
    "replace": lambda c, new: c.__setitem__("a", new(9)) or c,
    "del": lambda c, new: c.__delitem__("a") or c,
    "pop": lambda c, new: (c.pop("b"), c)[1],
    "update": lambda c, new: c.update({"b": new(8), "d": new(9)}) or c,
    "update by pairs": lambda c, new: c.update([("d", new(8)), ("a", new(9))]) or c,
    "clear": lambda c, new: c.clear() or c,
}


@pytest.mark.parametrize("operation", NAMED.values(), ids=NAMED)
def test_module_dicts_have_torchs_names_after(operation):
    ours, theirs = both(lambda library, new: operation(library.ModuleDict({"b": new(1), "a": new(2)}), new))
    assert shapes(ours) == shapes(theirs)
    assert list(ours) == list(theirs) == list(ours.keys())
    assert [layer.out_features for layer in ours.values()] == [layer.out_features for layer in theirs.values()]


@pytest.mark.parametrize("part", [slice(None), slice(1, None), slice(0, 1)])
def test_a_sequential_with_names_keeps_them(part):
    ours, theirs = both(lambda lib, new: lib.Sequential(collections.OrderedDict(a=new(1), b=new(2)))[part])
    assert shapes(ours) == shapes(theirs)


def test_nested_containers_have_torchs_names():
    def make(library, new):
        inner = library.ModuleDict({"x": new(1), "y": library.Sequential(new(2), new(3))})
        return library.Sequential(new(4), library.ModuleList([inner, new(5)]))

    ours, theirs = both(make)
    assert shapes(ours) == shapes(theirs)
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]


def test_a_module_list_names_its_layers_as_a_list_does():
    layers = leaves(1, 2)
    assert list(Box(layers=nn.ModuleList(layers)).state_dict()) == list(Box(layers=list(layers)).state_dict())


def test_slices_hold_the_same_modules(mlp):
    head = mlp[:2]
    assert head[0] is mlp[0] and head[1] is mlp[1] and isinstance(head, nn.Sequential)
    head[0].bias = jnp.full(4, 3.0)
    assert mlp[0].bias.tolist() == [3.0] * 4


def test_indexing_numbered_containers(mlp):
    layers = nn.ModuleList(mlp)
    assert layers[-1] is mlp[2] and list(layers) == list(mlp) and len(layers) == 3
    assert mlp[0] in layers and Leaf() not in layers
    for container in (layers, mlp):
        with pytest.raises(IndexError):
            container[3]
        with pytest.raises(IndexError):
            container[3] = Leaf()
        with pytest.raises(IndexError):
            del container[-4]
        assert len(container) == 3
    assert layers.pop() is mlp[2] and len(layers) == 2


def test_a_sequential_calls_one_after_the_other():
    net = nn.Sequential(Leaf(3), nn.ReLU(), Leaf(-2))
    assert net(jnp.array([2.0, -2.0])).tolist() == [-12.0, 0.0]
    del net[1]
    assert net(jnp.array([2.0, -2.0])).tolist() == [-12.0, 12.0]
    assert float(nn.Sequential()(5.0)) == 5.0


def test_module_dict_is_a_dict_of_modules():
    first, second = leaves(1, 2)
    heads = nn.ModuleDict({"a": first})
    heads["b"] = second
    assert heads["b"] is second and "b" in heads and "c" not in heads and len(heads) == 2
    assert [(name, module) for name, module in heads.items()] == [("a", first), ("b", second)]
    assert heads.pop("a") is first and list(heads) == ["b"]
    with pytest.raises(KeyError):
        heads["a"]
    with pytest.raises(KeyError):
        heads.pop("a")
    with pytest.raises(KeyError):
        del heads["a"]


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training", "forward", 3])
def test_names_that_a_module_dict_refuses(name):
    heads = nn.ModuleDict()
    with pytest.raises((KeyError, TypeError), match=repr(name)):
        heads[name] = Leaf()
    assert len(heads) == 0 and heads.training is True


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: nn.Sequential(jnp.tanh), "the function tanh: list its layer, such as"),
        (lambda: nn.Sequential([Leaf()]), r"a list: write `Sequential\(\*modules\)`"),
        (lambda: nn.Sequential(Leaf() for _ in range(2)), r"a generator: write `Sequential\(\*modules\)`"),
        (lambda: nn.Sequential(nn.ReLU), r"the class ReLU: write `ReLU\(...\)`, which makes a module of it"),
        (lambda: nn.Sequential(jnp.ones(2)), "a ArrayImpl$"),
        (lambda: nn.ModuleList([3]), "a int$"),
        (lambda: nn.ModuleList([[Leaf()]]), "a list$"),
        (lambda: nn.ModuleList().append(jnp.tanh), "the function tanh"),
        (lambda: nn.ModuleDict({"a": 3}), "a int$"),
        (lambda: nn.ModuleDict({"a": nn.ReLU}), "the class ReLU"),
    ],
)
def test_containers_refuse_what_is_no_module(make, said):
    with pytest.raises(TypeError, match=rf"holds modules; got {said}"):
        make()


@pytest.mark.parametrize("layers, call", [(nn.ModuleList([nn.ReLU()]), "i"), (nn.ModuleDict({"a": nn.ReLU()}), "name")])
def test_a_list_of_modules_is_not_called(layers, call):
    with pytest.raises(
        NotImplementedError, match=rf"call them yourself, `layers\[{call}\]\(x\)`, or use `nn.Sequential`"
    ):
        layers(jnp.ones(2))


# -- tied weights ------------------------------------------------------------------------------------------------------


class TwoNames(Module):
    """One Parameter object on two attributes."""

    def __init__(self, value):
        self.a = self.b = Parameter([float(value)])


def one_module(value):
    leaf = Leaf(value)
    return Box(a=leaf, b=leaf)


def tied_by_name(value):
    box = Box(a=Leaf(value), b=Leaf(99))
    box.b.tie("w", box.a, "w")
    return box


def tied_by_path(value):
    box = Box(a=Leaf(value), inner=[Leaf(98)], b=Leaf(99))
    box.tie("inner.0.w", box, "a.w")
    box.tie("b.w", box, "inner.0.w")
    return box


def in_a_list(value):
    leaf = Leaf(value)
    return Box(a=leaf, b=leaf, layers=[leaf, leaf])


TIES = [TwoNames, one_module, tied_by_name, tied_by_path, in_a_list]
tied = pytest.mark.parametrize("make", TIES, ids=lambda make: make.__name__)


def ends(box):
    return [end.w if isinstance(end, Module) else end for end in (box.a, box.b)]


def set_end(box, name, value):
    end = getattr(box, name)
    if isinstance(end, Module):
        end.w = jnp.array([value])
    else:
        setattr(box, name, jnp.array([value]))


def weigh(box):
    a, b = ends(box)
    return (3 * a + 5 * b).sum()


def assert_tied(box):
    assert len(box.parameters()) == len(box.grads()) == len(jax.tree.leaves(box)) == 1
    set_end(box, "a", 10.0)
    assert [end.item() for end in ends(box)] == [10.0, 10.0]
    set_end(box, "b", 11.0)
    assert [end.item() for end in ends(box)] == [11.0, 11.0]
    box.zero_grad()
    mt.backward(weigh, box)
    assert box.grads()[0].tolist() == [8.0]


@tied
def test_tied_weights_are_counted_once(make):
    box = make(2)
    assert numbers(box) == [2.0]
    assert box.num_parameters() == 1
    assert len(names(box)) == len(jax.tree.leaves(box)) == 1
    assert len(box.state_dict()) >= 2 and {float(v[0]) for v in box.state_dict().values()} == {2.0}
    assert_tied(box)


@tied
def test_tied_weights_have_one_gradient_the_sum(make):
    box = make(2)
    assert float(mt.backward(weigh, box)) == 16.0
    assert box.grads()[0].tolist() == [8.0]
    (plain,) = jax.tree.leaves(jax.grad(weigh)(box))
    (ours,) = mt.grad(weigh)(box).parameters()
    assert plain.tolist() == ours.tolist() == [8.0]


@tied
def test_tied_weights_stay_tied_over_steps(make):
    box = make(2)
    opt = optim.SGD([box], lr=0.125, momentum=0.5)
    for _ in range(3):
        opt.zero_grad()
        mt.backward(weigh, box)
        opt.step()
    assert [end.item() for end in ends(box)] == [2 - (1 + 1.5 + 1.75)] * 2
    assert_tied(box)


def through_steps_in_jit(box):
    def step(opt):
        opt.zero_grad()
        mt.backward(weigh, opt.modules[0])
        opt.step()
        return opt

    opt = optim.SGD([box], lr=0.125, momentum=0.5)
    new = jax.jit(step)(jax.jit(step)(opt)).modules[0]
    assert [end.item() for end in ends(new)] == [2 - (1 + 1.5)] * 2
    set_end(new, "a", 2.0)
    return new


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda box: pickle.loads(pickle.dumps(box)),
    "jit": jax.jit(lambda box: box),
    "tree.map": lambda box: jax.tree.map(lambda leaf: leaf + 0, box),
    "device_put": jax.device_put,
    "scan": lambda box: jax.lax.scan(lambda box, _: (box, None), box, None, length=2)[0],
    "optimizer steps in jit": through_steps_in_jit,
    "deepcopied optimizer": lambda box: copy.deepcopy(optim.SGD([box])).modules[0],
}


@tied
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_tied_weights_stay_tied_in_copies(make, copied):
    box = make(2)
    new = copied(box)
    assert [end.item() for end in ends(new)] == [2.0, 2.0]
    assert list(new.state_dict()) == list(box.state_dict())
    assert_tied(new)
    assert [end.item() for end in ends(box)] == [2.0, 2.0]
    assert_tied(box)


@tied
def test_tied_weights_are_saved_and_loaded(make, tmp_path):
    np.savez(tmp_path / "saved.npz", **make(2).state_dict())
    new = make(7)
    with np.load(tmp_path / "saved.npz") as saved:
        new.load_state_dict(dict(saved))
    assert [end.item() for end in ends(new)] == [2.0, 2.0]
    assert_tied(new)


@tied
def test_tied_weights_refuse_two_different_arrays(make):
    state = {name: np.float32([i]) for i, name in enumerate(make(2).state_dict())}
    box = make(7)
    with pytest.raises(ValueError, match="are one tied parameter, but their arrays differ"):
        box.load_state_dict(state)
    assert [end.item() for end in ends(box)] == [7.0, 7.0]


def test_torch_has_the_same_names_for_tied_weights():
    ours, theirs = both(lambda library, new: library.Sequential(new(1), new(1)))
    ours[1].tie("weight", ours[0], "weight")
    theirs[1].weight = theirs[0].weight
    assert shapes(ours) == shapes(theirs)
    assert names(ours) == [name for name, _ in theirs.named_parameters()]


def test_an_encoder_and_decoder_of_two_layers_tied():
    encoder, decoder = linear(0, 3, 3), linear(1, 3, 3)
    own = decoder.weight
    decoder.tie("weight", encoder, "weight")
    net = nn.Sequential(encoder, decoder)
    x = jnp.array([[1.0, -2.0, 0.5]])
    mt.backward(square, net, x)

    def untied(first, second):
        return (((x @ first.T + encoder.bias[None]) @ second.T + decoder.bias[None]) ** 2).sum()

    expected = sum(jax.grad(untied, argnums=(0, 1))(encoder.weight, encoder.weight))
    np.testing.assert_allclose(net.grads()[0], expected, rtol=1e-5)
    assert not np.array_equal(own, decoder.weight)


def test_what_cannot_be_tied():
    a, b = linear(0, 3, 2), linear(1, 2, 3)
    with pytest.raises(ValueError, match=r"Linear\.weight \(tied to Linear\.weight\).*\(3, 2\) for \(2, 3\)"):
        a.tie("weight", b, "weight")
    with pytest.raises(AttributeError, match="Linear has no parameter or buffer `wieght`; did you mean `weight`"):
        a.tie("wieght", b, "weight")
    with pytest.raises(AttributeError, match="no parameter or buffer `0.bias`"):
        a.tie("bias", nn.Sequential(nn.ReLU()), "0.bias")
    with pytest.raises(ValueError, match="is a parameter and .* a buffer"):
        Box(w=Parameter([1.0])).tie("w", Box(c=Buffer([1.0])), "c")
    assert a.weight.shape == (2, 3)


def test_a_new_declaration_unties():
    box = tied_by_name(2)
    box.b.w = Parameter([5.0])
    assert numbers(box) == [2.0, 5.0]


def test_tied_buffers_are_one():
    box = Box(a=Box(count=Buffer(1)), b=Box(count=Buffer(2)))
    box.b.tie("count", box.a, "count")
    box.a.count = 7
    assert int(box.b.count) == 7 and len(box.buffers()) == 1


# -- freezing ----------------------------------------------------------------------------------------------------------


def test_frozen_parameters_are_kept_but_not_trained(mlp, batch):
    x, _ = batch
    assert mlp[0].freeze() is mlp[0]
    before = mlp.state_dict()
    assert names(mlp) == ["2.weight", "2.bias"]
    assert len(mlp.parameters()) == len(mlp.grads()) == 2
    assert list(before) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert (mlp.num_parameters(), mlp.num_parameters(trainable_only=True)) == (26, 10)
    opt = optim.SGD([mlp], lr=0.1)
    mt.backward(square, mlp, x)
    opt.step()
    changed = [name for name, array in mlp.state_dict().items() if not np.array_equal(array, before[name])]
    assert changed == ["2.weight", "2.bias"]
    mlp[0].unfreeze()
    assert names(mlp) == list(before)
    assert mlp[0].grads()[0].tolist() == np.zeros((4, 3)).tolist()


def test_requires_grad_and_frozen_declarations():
    box = Box(a=Parameter(1.0), b=Parameter(2.0, trainable=False), c=Leaf(3))
    assert names(box) == ["a", "c.w"]
    assert box.requires_grad_(False) is box and names(box) == []
    assert box.requires_grad_() is box and names(box) == ["a", "b", "c.w"]
    assert box.freeze().num_parameters() == 3 and box.num_parameters(trainable_only=True) == 0


def test_a_loss_of_frozen_parameters_only_is_an_error(mlp, batch):
    mlp.freeze()
    with pytest.raises(ValueError, match=r"no trainable parameter.*4 parameters are frozen.*unfreeze\(\)"):
        mt.backward(square, mlp, batch[0])


def test_frozen_parameters_stay_frozen_in_copies(mlp):
    mlp[2].freeze()
    for new in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp)), jax.jit(lambda model: model)(mlp)):
        assert names(new) == ["0.weight", "0.bias"]


def test_accumulate_takes_plain_gradients_of_a_partly_frozen_model(mlp, batch):
    x, _ = batch
    mlp[0].freeze()
    mlp.accumulate(jax.grad(square)(mlp, x))
    first = [np.asarray(g) for g in mlp.grads()]
    mt.backward(square, mlp, x)
    for once, twice in zip(first, mlp.grads(), strict=True):
        np.testing.assert_allclose(twice, 2 * once, rtol=1e-5)
        assert once.any()


# -- modes -------------------------------------------------------------------------------------------------------------


def test_train_and_eval_reach_every_module():
    box = Box(a=Leaf(), layers=[Leaf(), (Leaf(),)], heads={"x": nn.Sequential(Leaf())})
    assert all(module.training is True for module in box.modules())
    assert box.eval() is box
    assert len(list(box.modules())) == 6 and not any(module.training for module in box.modules())
    assert box.train() is box and all(module.training for module in box.modules())
    box.layers[0].eval()
    assert [module.training for module in box.modules()].count(False) == 1
    box.train(False)
    assert not any(module.training for module in box.modules())


class Modal(Module):
    def forward(self, x):
        return x * (1.0 if self.training else 10.0)


def test_the_mode_is_static_in_compiled_code():
    call = jax.jit(lambda model, x: model(x))
    model = Modal()
    assert float(call(model, 2.0)) == 2.0
    assert float(call(model.eval(), 2.0)) == 20.0
    assert float(call(model.train(), 2.0)) == 2.0


# -- parameters() and grads() are live ---------------------------------------------------------------------------------


def test_the_specified_loop_runs_on_live_lists(mlp, batch):
    mt.backward(square, mlp, batch[0])
    before = [np.asarray(p) for p in mlp.parameters()]
    params, grads = mlp.parameters(), mlp.grads()
    for i in range(len(params)):
        params[i] -= 0.1 * grads[i]
    for old, grad, (name, new) in zip(before, mlp.grads(), mlp.named_parameters(), strict=True):
        assert np.asarray(grad).any(), name
        np.testing.assert_allclose(new, old - 0.1 * np.asarray(grad), rtol=1e-6)


def test_live_lists_are_aligned_lists_of_arrays(mlp):
    params, grads = mlp.parameters(), mlp.grads()
    assert isinstance(params, list) and isinstance(grads, list)
    assert [p.shape for p in params] == [g.shape for g in grads] == [(4, 3), (4,), (2, 4), (2,)]
    assert all(isinstance(a, jax.Array) for a in [*params, *grads])
    assert all(not np.asarray(g).any() for g in grads)
    assert [p.dtype for p in params] == [g.dtype for g in grads]


def test_assigning_items_writes_to_the_module():
    box = Box(layers=leaves(1, 2, 3))
    params = box.parameters()
    params[0] = jnp.array([10.0])
    params[-1] = np.float32([30.0])
    params[np.int64(1)] += 0.5
    assert [leaf.w.item() for leaf in box.layers] == [10.0, 2.5, 30.0]
    params[:] = [jnp.array([float(i)]) for i in range(3)]
    assert numbers(box) == [0.0, 1.0, 2.0]
    params[::2] = [jnp.array([7.0]), jnp.array([8.0])]
    params[1:1] = []
    assert numbers(box) == [7.0, 1.0, 8.0] == [p.item() for p in params]
    box.layers[1].w = jnp.array([5.0])
    assert params[1].item() == 5.0


def test_assigning_gradients_feeds_the_optimizer():
    box = Box(layers=leaves(1, 2))
    box.grads()[0] = jnp.array([4.0])
    box.grads()[1] += jnp.array([2.0])
    box.grads()[1] += jnp.array([2.0])
    optim.SGD([box], lr=0.5).step()
    assert numbers(box) == [-1.0, 0.0]
    assert [g.item() for g in box.grads()] == [4.0, 4.0]
    box.zero_grad()
    assert [g.item() for g in box.grads()] == [0.0, 0.0]


def test_assigning_items_is_checked():
    box = Box(layers=leaves(1, 2))
    params, grads = box.parameters(), box.grads()
    with pytest.raises(ValueError, match=r"layers\.1\.w is float32\[1\], and was given float32\[2\]"):
        params[1] = jnp.zeros(2)
    with pytest.raises(ValueError, match=r"the gradient of layers\.0\.w is float32\[1\], and was given bfloat16\[1\]"):
        grads[0] = jnp.zeros(1, jnp.bfloat16)
    with pytest.raises(ValueError, match="3 arrays were assigned to 2 places"):
        params[:] = [jnp.zeros(1)] * 3
    with pytest.raises(ValueError, match="1 arrays were assigned to 0 places"):
        params[2:] = [jnp.zeros(1)]
    for index in (2, -3):
        with pytest.raises(IndexError):
            params[index] = jnp.zeros(1)
        with pytest.raises(IndexError):
            params[index]
    assert numbers(box) == [1.0, 2.0] and not any(g.item() for g in grads)


def test_a_slice_with_one_wrong_array_changes_nothing():
    box = Box(layers=leaves(1, 2))
    with pytest.raises(ValueError, match=r"layers\.1\.w"):
        box.parameters()[:] = [jnp.zeros(1), jnp.zeros(2)]
    assert numbers(box) == [1.0, 2.0]


@pytest.mark.parametrize(
    "change",
    [
        lambda live: live.append(jnp.zeros(1)),
        lambda live: live.extend([]),
        lambda live: live.insert(0, jnp.zeros(1)),
        lambda live: live.pop(),
        lambda live: live.clear(),
        lambda live: live.remove(live[0]),
        lambda live: live.sort(),
        lambda live: live.reverse(),
        lambda live: live.__delitem__(0),
        lambda live: live.__iadd__([]),
        lambda live: live.__imul__(2),
    ],
)
def test_live_lists_have_a_fixed_length_and_order(change):
    box = Box(layers=leaves(1, 2))
    for live in (box.parameters(), box.grads()):
        with pytest.raises(TypeError, match="length is fixed"):
            change(live)
        assert len(live) == 2
    assert numbers(box) == [1.0, 2.0]


def test_live_lists_can_be_used_as_lists():
    box = Box(layers=leaves(1, 2, 3))
    params = box.parameters()
    expected = [1.0, 2.0, 3.0]
    assert [p.item() for p in params] == [p.item() for p in [*params]] == [p.item() for p in list(params)] == expected
    assert [p.item() for p in reversed(params)] == expected[::-1]
    assert [p.item() for p in params[1:]] == [2.0, 3.0] and type(params[1:]) is list
    assert [p.item() for p in params + box.grads()] == [*expected, 0.0, 0.0, 0.0]
    assert [p.item() for p in [jnp.array([0.0])] + params] == [0.0, *expected]
    assert [p.item() for p in jax.tree.map(lambda p: 2 * p, params)] == [2.0, 4.0, 6.0]
    assert np.array(params).ravel().tolist() == jnp.concatenate(params).tolist() == expected
    assert box.layers[1].w in params and jnp.zeros(1) not in params
    assert repr(params) == repr(list(params))
    first, *rest = params
    assert first.item() == 1.0 and len(rest) == 2


@pytest.mark.parametrize(
    "copied", [list, lambda live: live.copy(), copy.copy, copy.deepcopy, lambda live: pickle.loads(pickle.dumps(live))]
)
def test_copies_of_live_lists_are_plain(copied):
    box = Box(layers=leaves(1, 2))
    plain = copied(box.parameters())
    assert type(plain) is list
    box.parameters()[0] = jnp.array([9.0])
    assert [p.item() for p in plain] == [1.0, 2.0]


def test_live_lists_survive_changes_of_the_structure():
    box = Box(layers=leaves(1, 2))
    params, grads = box.parameters(), box.grads()
    kept = box.layers[1]
    del box.layers[0]
    box.layers.append(Leaf(3))
    params[1] = jnp.array([20.0])
    grads[1] = jnp.array([4.0])
    assert len(params) == len(grads) == 2
    assert kept.w.item() == 20.0 and kept.grads()[0].item() == 4.0
    assert numbers(box) == [20.0, 3.0]
    box.freeze()
    params[1] = jnp.array([30.0])
    assert kept.w.item() == 30.0 and len(box.parameters()) == 0


# -- state dicts -------------------------------------------------------------------------------------------------------


class Everything(Module):
    """Parameters and buffers declared between submodules, trainable and not."""

    def __init__(self, offset=0.0):
        self.first = Leaf(1 + offset)
        self.count = Buffer(2**31 - 1 - int(offset))
        self.scale = Parameter([2.0 + offset], trainable=False)
        self.layers = [Leaf(3 + offset)]
        self.shift = Parameter([4.0 + offset])


def everything_in_torch():
    module = torch.nn.Module()
    module.first = torch.nn.ParameterDict({"w": torch.zeros(1)})
    module.register_buffer("count", torch.tensor(5, dtype=torch.int32))
    module.scale = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    module.layers = torch.nn.ModuleList([torch.nn.ParameterDict({"w": torch.ones(1)})])
    module.shift = torch.nn.Parameter(torch.zeros(1))
    return module


def test_state_dict_holds_everything_in_torchs_order():
    state = Everything().state_dict()
    assert list(state) == list(everything_in_torch().state_dict())
    assert {name: array.item() for name, array in state.items()} == {
        "scale": 2.0,
        "shift": 4.0,
        "count": 2**31 - 1,
        "first.w": 1.0,
        "layers.0.w": 3.0,
    }
    assert state["count"].dtype == jnp.int32
    assert names(Everything()) == ["shift", "first.w", "layers.0.w"]


def test_a_state_dict_is_a_snapshot_that_loads():
    model = Everything()
    state = model.state_dict()
    model.shift = jnp.array([0.0])
    model.count = 0
    assert state["shift"].item() == 4.0
    other = Everything(offset=100.0)
    result = other.load_state_dict(state)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    for name, array in other.state_dict().items():
        assert np.array_equal(array, state[name]) and array.dtype == state[name].dtype, name
    assert model.shift.item() == 0.0 and int(model.count) == 0


@pytest.mark.parametrize("strict", [True, False])
def test_a_torch_state_dict_loads_by_name(strict):
    theirs = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    ours = nn.Sequential(linear(0, 3, 4), nn.Tanh(), linear(1, 4, 2))
    ours.load_state_dict(theirs.state_dict(), strict=strict)
    x = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_allclose(ours(x), theirs(torch.from_numpy(x)).detach(), rtol=1e-5, atol=1e-6)
    everything = Everything()
    everything.load_state_dict(everything_in_torch().state_dict(), strict=strict)
    assert int(everything.count) == 5 and everything.layers[0].w.item() == 1.0


def test_loading_copies_numpy_arrays():
    leaf, source = Leaf(1), np.float32([2])
    leaf.load_state_dict({"w": source})
    source[0] = 3
    assert leaf.w.item() == 2.0


def test_a_loaded_array_survives_the_steps_that_follow():
    source, leaf = jnp.array([2.0]), Leaf(1)
    leaf.load_state_dict({"w": source})
    leaf.accumulate([jnp.array([1.0])])
    optim.SGD([leaf], lr=0.5).step()
    assert (source.item(), leaf.w.item()) == (2.0, 1.5)


def test_one_error_lists_everything_that_does_not_fit():
    model = Everything()
    state = model.state_dict()
    state["shift"] = np.zeros(2, np.float32)
    state["count"] = np.float32(3)
    state["first.w"] = np.float32([50])
    del state["scale"], state["layers.0.w"]
    state["extra"] = state["layers.9.w"] = np.float32([1])
    with pytest.raises(ValueError, match="does not fit this Everything; nothing was loaded") as caught:
        model.load_state_dict(state)
    message = str(caught.value)
    for part in (
        "missing: scale",
        "missing: layers.0.w",
        "unexpected: extra",
        "unexpected: layers.9.w",
        "shift is float32[1], and was given float32[2]",
        "count is int32[], and was given float32[]",
    ):
        assert part in message
    assert {name: array.item() for name, array in model.state_dict().items()} == {
        "scale": 2.0,
        "shift": 4.0,
        "count": 2**31 - 1,
        "first.w": 1.0,
        "layers.0.w": 3.0,
    }


def test_loading_what_fits():
    model = Everything()
    result = model.load_state_dict({"shift": np.float32([40]), "other": np.float32([1])}, strict=False)
    assert result.missing_keys == ["scale", "count", "first.w", "layers.0.w"]
    assert result.unexpected_keys == ["other"]
    assert (model.shift.item(), model.first.w.item()) == (40.0, 1.0)
    with pytest.raises(ValueError, match=r"shift is float32\[1\], and was given float32\[3\]"):
        model.load_state_dict({"first.w": np.float32([5]), "shift": np.zeros(3, np.float32)}, strict=False)
    assert (model.shift.item(), model.first.w.item()) == (40.0, 1.0)


# -- devices, shardings, dtypes ----------------------------------------------------------------------------------------


def full_model(batch):
    model = nn.Sequential(linear(0, 3, 4), Box(count=Buffer(5), running=Buffer(jnp.ones(4))))
    mt.backward(lambda layer, x: (layer(x) ** 2).sum(), model[0], batch[0])
    return model


def test_to_a_device_moves_every_array(batch):
    model = full_model(batch)
    grads = [np.asarray(g) for g in model.grads()]
    state = model.state_dict()
    device = jax.devices("cpu")[1]
    assert model.to(device) is model
    for name, array in model.state_dict().items():
        assert array.devices() == {device}, name
        assert np.array_equal(array, state[name]) and array.dtype == state[name].dtype
    for grad, old in zip(model.grads(), grads, strict=True):
        assert grad.devices() == {device} and np.array_equal(grad, old)
    mt.backward(lambda layer, x: (layer(x) ** 2).sum(), model[0], jax.device_put(batch[0], device))
    optim.SGD([model], lr=0.1).step()
    assert model[0].weight.devices() == {device}


def test_to_a_sharding_spreads_every_array(batch):
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:2]), ("d",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    model = full_model(batch).to(everywhere)
    assert all(array.sharding == everywhere for array in [*model.state_dict().values(), *model.grads()])
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    layer = linear(0, 3, 4).to(rows)
    assert layer.weight.sharding == rows and layer.weight.addressable_shards[0].data.shape == (2, 3)
    layer.accumulate([jnp.ones_like(layer.weight), jnp.ones_like(layer.bias)])
    optim.SGD([layer], lr=0.1, momentum=0.9).step()
    assert layer.weight.sharding.is_equivalent_to(rows, 2)


@pytest.mark.parametrize("target", [jnp.bfloat16, "cuda", pytest.param("torch", marks=of_torch)])
def test_to_takes_devices_and_shardings_only(target):
    with pytest.raises(TypeError, match=r"Device or Sharding.*astype\(dtype\)"):
        linear().to(torch.float32 if target == "torch" else target)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "float16", np.dtype("float16")])
def test_astype_converts_what_is_floating(batch, dtype):
    model = full_model(batch)
    state = model.state_dict()
    grads = [np.asarray(g) for g in model.grads()]
    assert model.astype(dtype) is model
    dtype = jnp.dtype(dtype)
    expected = {"0.weight": dtype, "0.bias": dtype, "1.count": jnp.int32, "1.running": dtype}
    assert {name: array.dtype for name, array in model.state_dict().items()} == expected
    assert int(model[1].count) == 5
    np.testing.assert_array_equal(model[0].weight, state["0.weight"].astype(dtype))
    for grad, old in zip(model.grads(), grads, strict=True):
        np.testing.assert_array_equal(grad, old.astype(dtype))
    assert model[0](jnp.ones((1, 3), dtype)).dtype == dtype
    with pytest.raises(ValueError, match="was given float32"):
        model[0].bias = jnp.zeros(4)


def test_astype_refuses_integers():
    with pytest.raises(TypeError, match="must be floating"):
        linear().astype(jnp.int32)


# -- walking over modules ----------------------------------------------------------------------------------------------


def test_apply_visits_children_first():
    box = Box(a=Leaf(1), layers=[nn.Sequential(Leaf(2))])
    seen = []
    assert box.apply(seen.append) is box
    assert seen == [box.a, box.layers[0][0], box.layers[0], box]


def test_apply_can_change_parameters():
    def halve(module):
        if isinstance(module, Leaf):
            module.w = module.w / 2

    assert numbers(Box(layers=leaves(2, 4)).apply(halve)) == [1.0, 2.0]


def test_modules_and_children_as_in_torch():
    def make(library, new):
        shared = new(1)
        return library.Sequential(shared, library.ModuleDict({"x": shared, "y": new(2)}), library.Identity())

    ours, theirs = both(make)
    for method in ("named_modules", "named_children"):
        assert [(name, type(module).__name__) for name, module in getattr(ours, method)()] == [
            (name, type(module).__name__) for name, module in getattr(theirs, method)()
        ]
    assert [name for name, _ in ours.named_modules(prefix="net")] == [
        name for name, _ in theirs.named_modules(prefix="net")
    ]
    assert [name for name, _ in ours.named_modules(remove_duplicate=False)] == [
        name for name, _ in theirs.named_modules(remove_duplicate=False)
    ]
    assert list(ours.children()) == [ours[0], ours[1], ours[2]]
    assert len(list(ours.modules())) == len(list(theirs.modules())) == 5


def test_named_buffers():
    box = Box(a=Box(count=Buffer(3)), running=Buffer([1.0, 2.0]), w=Parameter(1.0))
    assert {name: array.tolist() for name, array in box.named_buffers()} == {"running": [1.0, 2.0], "a.count": 3}
    assert [array.tolist() for array in box.buffers()] == [[1.0, 2.0], 3]


def test_num_parameters(mlp):
    assert mlp.num_parameters() == 3 * 4 + 4 + 4 * 2 + 2
    assert Box(count=Buffer(jnp.ones(100)), w=Parameter(1.0)).num_parameters() == 1
    assert Box().num_parameters() == 0


def test_repr_is_torchs():
    def make(library, new):
        activations = [library.ReLU(), library.Tanh(), library.GELU(), library.Softmax(dim=1)]
        head = library.ModuleDict({"a": new(1), "b": library.Identity()})
        return library.Sequential(new(2), *activations, library.Flatten(), library.Sequential(head), library.ReLU(True))

    ours, theirs = both(make)
    assert repr(ours) == repr(theirs)


def test_repr_shows_what_a_module_holds():
    shown = repr(Box(w=Parameter(jnp.ones((2, 3))), count=Buffer(1), layers=[linear()]))
    for part in ("Box(", "w=float32[2, 3]", "count=", "(layers.0): Linear(in_features=3, out_features=2, bias=True)"):
        assert part in shown
    assert repr(Parameter([1.0])) == "Parameter(float32[1])"


def test_repr_names_a_buffers_own_dtype_and_shape():
    assert repr(Box(count=Buffer(1), flags=Buffer([True, False]))) == "Box(count=int32[], flags=bool[2])"


def test_modules_have_no_hash():
    model = linear()
    for use in (
        lambda: hash(model),
        lambda: {model: 1},
        lambda: jax.jit(model)(jnp.ones(3)),
        lambda: jax.jit(lambda m, x: m(x), static_argnums=0)(model, jnp.ones(3)),
    ):
        with pytest.raises((TypeError, ValueError), match=r"Linear objects change, so they have no hash"):
            use()
    assert model == model and model != linear()


# -- accumulate --------------------------------------------------------------------------------------------------------


def test_accumulate_adds_to_what_backward_gave(mlp, batch):
    x, _ = batch
    mt.backward(square, mlp, x)
    once = [np.asarray(g) for g in mlp.grads()]
    mlp.accumulate(jax.grad(square)(mlp, x))
    mlp.accumulate([jnp.asarray(g) for g in once])
    for grad, first in zip(mlp.grads(), once, strict=True):
        np.testing.assert_allclose(grad, 3 * first, rtol=1e-5)
        assert first.any()


def test_accumulate_refuses_what_does_not_fit(mlp):
    good = jax.tree.map(jnp.ones_like, mlp)
    mlp.accumulate(good)
    with pytest.raises(ValueError, match=r"of another structure.*missing \['0.weight', '0.bias'"):
        mlp.accumulate(jax.tree.map(jnp.ones_like, linear()))
    with pytest.raises(ValueError, match="3 gradients were given for 4 trainable parameters"):
        mlp.accumulate(list(good.parameters())[:3])
    wrong = [*list(good.parameters())[:3], jnp.ones(7)]
    with pytest.raises(ValueError, match=r"the gradient of 2\.bias is float32\[2\], and was given float32\[7\]"):
        mlp.accumulate(wrong)
    wrong[3] = jnp.ones(2, jnp.float16)
    with pytest.raises(ValueError, match="float16 for float32"):
        mlp.accumulate(wrong)
    assert all(np.asarray(g).min() == np.asarray(g).max() == 1 for g in mlp.grads())


# -- structure is fixed while a compiled loss runs ---------------------------------------------------------------------

RESTRUCTURE = {
    "new parameter": lambda net: setattr(net, "extra", Parameter(jnp.ones(2))),
    "new buffer": lambda net: setattr(net, "extra", Buffer(jnp.ones(2))),
    "new module": lambda net: setattr(net, "extra", Leaf(1)),
    "new list": lambda net: setattr(net, "extra", [Leaf(1)]),
    "parameter replaced": lambda net: setattr(net.inner, "w", Parameter([5.0])),
    "parameter removed": lambda net: setattr(net.inner, "w", None),
    "module replaced": lambda net: setattr(net, "inner", Leaf(1)),
    "module removed": lambda net: setattr(net, "inner", None),
    "module deleted": lambda net: delattr(net, "inner"),
    "list appended": lambda net: net.layers.append(Leaf(1)),
    "list item deleted": lambda net: net.layers.pop(),
    "dict item added": lambda net: net.heads.update(b=Leaf(1)),
    "ModuleList appended": lambda net: net.mods.append(Leaf(1)),
    "ModuleDict added": lambda net: net.named.update({"b": Leaf(1)}),
    "tied": lambda net: net.inner.tie("w", net.layers[0], "w"),
    "frozen": lambda net: net.freeze(),
}


def sum_of_parameters(model, change=None):
    if change is not None:
        change(model)
    return sum(p.sum() for p in model.parameters())


def facts(net):
    return repr(net), list(net.state_dict()), numbers(net), names(net)


@pytest.fixture
def net():
    """A module that has one of everything."""
    heads = {"a": Leaf(4)}
    named = nn.ModuleDict({"a": Leaf(6)})
    return Box(inner=Leaf(1), layers=leaves(2, 3), heads=heads, mods=nn.ModuleList(leaves(5)), named=named)


@pytest.mark.parametrize("change", RESTRUCTURE.values(), ids=RESTRUCTURE)
def test_restructuring_inside_a_compiled_loss_is_an_error(net, change):
    before = facts(net)
    with pytest.raises(mt.TraceError, match="inside compiled code: the structure of a module"):
        mt.backward(sum_of_parameters, net, change)
    assert facts(net) == before
    assert not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(net))
    assert float(mt.backward(sum_of_parameters, net)) == 21.0
    assert facts(net) == before and [g.item() for g in net.grads()] == [1.0] * 6


@pytest.mark.parametrize("take", [mt.backward, lambda f, *args: mt.grad(f)(*args)], ids=["backward", "grad"])
def test_restructuring_by_closure_inside_a_compiled_loss_is_an_error(net, take):
    before = facts(net)
    with pytest.raises(mt.TraceError, match=r"Box\.inner was given .* inside compiled code"):
        take(lambda x: sum_of_parameters(net, RESTRUCTURE["module replaced"]) * x, 2.0)
    assert facts(net) == before


def test_a_layer_built_without_a_key_inside_a_compiled_loss_is_another_at_each_call(mlp, batch):
    def loss_fn(model, x):
        return nn.Linear(2, 1)(model(x)).sum()

    losses = [float(mt.backward(loss_fn, mlp, batch[0])) for _ in range(3)]
    mt.seed(0)
    again = [float(nn.Linear(2, 1)(mlp(batch[0])).sum()) for _ in range(3)]
    assert len(set(losses)) == 3
    np.testing.assert_allclose(losses, again, rtol=1e-5)


def test_a_layer_may_be_built_from_a_key_for_the_time_of_a_loss(mlp, batch):
    def loss_fn(model, x, key):
        return nn.Linear(2, 1, key=key)(model(x)).sum()

    head = nn.Linear(2, 1, key=jax.random.key(9))
    loss = mt.backward(loss_fn, mlp, batch[0], jax.random.key(9))
    np.testing.assert_allclose(loss, head(mlp(batch[0])).sum(), rtol=1e-5)


def test_a_static_attribute_set_by_a_failing_loss_is_taken_back():
    leaf = Leaf(1)
    leaf.mode = "before"

    def loss_fn(model):
        model.mode, model.more = "after", 3
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        mt.backward(loss_fn, leaf)
    assert leaf.mode == "before" and not hasattr(leaf, "more")


# -- values of NumPy's ------------------------------------------------------------------------------------------------


def test_what_is_loaded_from_numpy_lies_where_the_old_arrays_were_bound():
    device = jax.devices()[1]
    layer = nn.BatchNorm1d(3).to(device)
    loaded = {name: np.array(value) for name, value in layer.state_dict().items()}
    layer.load_state_dict(loaded)
    layer.weight = np.full(3, 2.0, np.float32)
    layer.num_batches_tracked = np.array(5, np.int32)
    for name, value in layer.state_dict().items():
        assert value.devices() == {device}, name
    loaded["weight"][:] = 7.0
    assert layer.weight[0] == 2.0 and int(layer.num_batches_tracked) == 5
    layer.weight = jnp.ones(3)  # an array of JAX's that is bound to no device, too
    assert layer.weight.devices() == {device}
    layer.weight = jax.device_put(jnp.ones(3), jax.devices()[0])  # one that is bound moves the parameter
    assert layer.weight.devices() == {jax.devices()[0]}


def test_an_integer_that_jax_would_cut_is_refused():
    layer = nn.BatchNorm1d(3)
    state = {name: np.asarray(value) for name, value in layer.state_dict().items()}
    state["num_batches_tracked"] = np.array(2**32 + 5)
    with pytest.raises(ValueError, match=r"(?s)nothing was loaded.*int64 from 4294967301 to .* does not fit int32"):
        layer.load_state_dict(state)
    with pytest.raises(ValueError, match="does not fit int32"):
        mt.Buffer(np.array([-(2**40)]))
    state["num_batches_tracked"] = np.array(5)
    layer.load_state_dict(state)
    assert int(layer.num_batches_tracked) == 5


def test_equal_static_values_of_other_types_are_others():
    module = mt.Module()
    module.shape = (1, (2, 3))
    for value in ((1.0, (2, 3)), (True, (2, 3)), (1, (2, 3.0))):
        module.shape = value
        assert repr(module.shape) == repr(value)
    before = module.shape
    module.shape = (1, (2, 3.0))
    assert module.shape is before


def test_an_error_in_a_property_is_its_own():
    class Broken(mt.Module):
        @property
        def size(self):
            return self.nothing

    with pytest.raises(AttributeError, match=r"Broken\.size is a property, whose code raised an AttributeError"):
        Broken().size
    with pytest.raises(AttributeError, match="Broken has no attribute `nothing`"):
        Broken.size.fget(Broken())


def test_the_repr_of_a_module_that_holds_itself():
    one, two = mt.Module(), mt.Module()
    one.other, two.other = two, one
    assert repr(one) == "Module(\n  (other): Module(\n    (other): ...\n  )\n)"
