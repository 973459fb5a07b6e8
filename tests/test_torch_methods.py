"""The methods of torch's Module that ask for parts by path, register them, convert them, and save what is no array.

The expectations are torch's, written by hand.
"""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minitorch_jax as mt
from minitorch_jax import nn, optim


class Net(mt.Module):
    """Parameters at several depths, one of them tied, a buffer, a list of modules and a shared module."""

    def __init__(self) -> None:
        self.scale = mt.Parameter(jnp.ones(2))
        self.count = mt.Buffer(3)
        self.head = nn.Linear(2, 2)
        self.again = self.head
        self.layers = [nn.Linear(2, 2), nn.BatchNorm1d(2)]
        self.layers[0].tie("weight", self.head, "weight")

    def forward(self, x: Any) -> Any:
        return self.layers[0](self.head(x * self.scale[None]))


def names(pairs: Any) -> list[str]:
    return [name for name, _ in pairs]


# -- parts by path ----------------------------------------------------------------------------------------------------


def test_parts_are_found_by_path():
    net = Net()
    assert net.get_submodule("") is net
    assert net.get_submodule("layers.1") is net.layers[1]
    assert net.get_submodule("again") is net.head
    assert net.get_parameter("head.weight") is net.head.weight
    assert net.get_parameter("layers.0.weight") is net.head.weight
    assert net.get_buffer("layers.1.running_mean") is net.layers[1].running_mean
    assert int(net.get_buffer("count")) == 3
    net.freeze()
    assert net.get_parameter("scale").shape == (2,)


@pytest.mark.parametrize(
    ("method", "path", "message"),
    [
        ("get_submodule", "hed", "Net has no submodule `hed`; did you mean `head`"),
        ("get_submodule", "layers.01", "no submodule `layers.01`; did you mean `layers.[01]`"),
        ("get_submodule", "scale", "no submodule `scale`"),
        ("get_submodule", "qqqq", r"no submodule `qqqq`; it has head, again, layers.0, layers.1"),
        ("get_parameter", "head.wieght", "no parameter or buffer `head.wieght`; did you mean `head.weight`"),
        ("get_parameter", "head", "no parameter or buffer `head`"),
        ("get_parameter", "count", r"`count` of Net is a buffer: write `get_buffer\('count'\)`"),
        ("get_buffer", "head.bias", r"`head.bias` of Net is a parameter: write `get_parameter\('head.bias'\)`"),
        ("get_buffer", "", "no parameter or buffer ``"),
    ],
)
def test_a_path_that_leads_nowhere_is_an_attribute_error(method, path, message):
    with pytest.raises(AttributeError, match=message):
        getattr(Net(), method)(path)


def test_parts_by_path_are_read_and_differentiated_in_compiled_code():
    net = Net()

    @mt.jit
    def step(x):
        return mt.backward(lambda x: (net.get_submodule("head")(x) * net.get_parameter("scale")[None]).sum(), x)

    step(jnp.ones((3, 2)))
    net.scale = jnp.array([2.0, 0.0])
    x = jnp.ones((3, 2))
    assert step(x) == pytest.approx(float((net.head(x) * net.scale[None]).sum()), rel=1e-6)
    assert [bool(grad.any()) for grad in net.grads()] == [True, True, True, False, False, False]


# -- named_... --------------------------------------------------------------------------------------------------------


def test_named_parameters_and_buffers_take_torchs_arguments():
    net = Net()
    once = ["scale", "head.weight", "head.bias", "layers.0.bias", "layers.1.weight", "layers.1.bias"]
    assert names(net.named_parameters()) == names(net.named_parameters(recurse=True)) == once
    assert names(net.named_parameters("net")) == [f"net.{name}" for name in once]
    assert names(net.named_parameters(recurse=False)) == ["scale"]
    assert names(net.named_parameters("net", False)) == ["net.scale"]
    every = [
        *("scale", "head.weight", "head.bias", "again.weight", "again.bias", "layers.0.weight", "layers.0.bias"),
        *("layers.1.weight", "layers.1.bias"),
    ]
    assert names(net.named_parameters(remove_duplicate=False)) == every
    buffers = ["count", *(f"layers.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked"))]
    assert names(net.named_buffers()) == buffers
    assert names(net.named_buffers(prefix="a.b", recurse=False)) == ["a.b.count"]
    assert names(net.named_buffers(remove_duplicate=False)) == buffers
    net.head.freeze()
    assert names(net.named_parameters(recurse=True)) == ["scale", *once[3:]]
    both = mt.Module()
    both.a = mt.Parameter(jnp.ones(1))
    both.b = mt.Parameter(jnp.ones(1))
    both.tie("b", both, "a")
    assert names(both.named_parameters(recurse=False)) == ["a"]
    assert names(both.named_parameters(recurse=False, remove_duplicate=False)) == ["a", "b"]


def test_named_modules_and_children_take_torchs_arguments():
    net = Net()
    assert names(net.named_children()) == ["head", "layers.0", "layers.1"]
    assert names(net.named_modules()) == ["", "head", "layers.0", "layers.1"]
    assert names(net.named_modules(prefix="net")) == ["net", "net.head", "net.layers.0", "net.layers.1"]
    assert names(net.named_modules(None, "", False)) == ["", "head", "again", "layers.0", "layers.1"]
    assert names(net.named_modules([net.head])) == ["", "layers.0", "layers.1"]
    assert names(net.named_modules([net])) == []
    assert names(net.named_modules([net.layers[1]], remove_duplicate=False)) == ["", "head", "again", "layers.0"]
    with pytest.raises(TypeError, match=r"memo is a list of modules; got 'net': write `named_modules\(prefix='net'\)`"):
        net.named_modules("net")
    shared = nn.Linear(2, 2)
    assert repr(nn.Sequential(shared, shared)).count("Linear") == 2


def test_state_dict_takes_a_prefix():
    net = Net()
    plain = net.state_dict()
    assert {f"net.{name}": array for name, array in plain.items()}.keys() == net.state_dict(prefix="net.").keys()
    assert list(net.head.state_dict(prefix="x")) == ["xweight", "xbias"]
    assert all((net.state_dict(prefix="net.")[f"net.{name}"] == array).all() for name, array in plain.items())


# -- registration -----------------------------------------------------------------------------------------------------


def test_parts_are_registered_by_name():
    net = mt.Module()
    net.add_module("body", nn.Linear(2, 2))
    net.register_module("act", nn.ReLU())
    net.register_buffer("mask", np.array([True, False]))
    net.register_buffer("noted", mt.Buffer(jnp.ones(2)))
    net.register_parameter("scale", mt.Parameter(jnp.ones(2)))
    for kind in ("module", "buffer", "parameter"):
        register = {"module": net.add_module, "buffer": net.register_buffer, "parameter": net.register_parameter}[kind]
        register(f"no_{kind}", None)
        assert getattr(net, f"no_{kind}") is None
    assert list(net.state_dict()) == ["scale", "mask", "noted", "body.weight", "body.bias"]
    assert names(net.named_parameters()) == ["scale", "body.weight", "body.bias"]
    assert names(net.named_children()) == ["body", "act"]
    net.register_buffer("mask", [1.0])  # again, of another shape
    net.add_module("body", nn.Linear(3, 3))
    net.add_module("no_module", nn.ReLU())
    net.register_parameter("no_parameter", mt.Parameter(jnp.ones(1)))
    assert net.mask.shape == (1,) and net.body.weight.shape == (3, 3) and net.no_parameter.shape == (1,)


def test_modules_are_added_to_containers():
    chain = nn.Sequential()
    chain.add_module("first", nn.Linear(2, 3))
    chain.add_module("second", nn.ReLU())
    assert len(chain) == 2 and chain(jnp.ones((1, 2))).shape == (1, 3)
    layers = nn.ModuleList([nn.ReLU()])
    layers.add_module("1", nn.Tanh())
    assert [type(layer).__name__ for layer in layers] == ["ReLU", "Tanh"]
    heads = nn.ModuleDict()
    heads.add_module("a", nn.ReLU())
    assert list(heads) == ["a"]


@pytest.mark.parametrize(
    ("method", "name", "value", "error", "message"),
    [
        ("add_module", "x", 3, TypeError, r"Net.x: add_module takes a Module or None; got 3 \(int\)"),
        ("add_module", 3, nn.ReLU(), TypeError, "name of a submodule must be a string; got 3"),
        ("add_module", "", nn.ReLU(), KeyError, "non-empty string without dots; got ''"),
        ("add_module", "a.b", nn.ReLU(), KeyError, "non-empty string without dots; got 'a.b'"),
        ("add_module", "scale", nn.ReLU(), KeyError, "Net has an attribute `scale` already, and it is no submodule"),
        ("register_module", "forward", nn.ReLU(), KeyError, "attribute `forward` already"),
        ("register_buffer", "head", jnp.ones(2), KeyError, "attribute `head` already, and it is no buffer"),
        ("register_buffer", "scale", jnp.ones(2), KeyError, "attribute `scale` already, and it is no buffer"),
        ("register_buffer", "x", mt.Parameter(jnp.ones(2)), TypeError, "a Parameter is assigned: `module.x = ...`"),
        ("register_parameter", "count", mt.Parameter(1.0), KeyError, "attribute `count` already"),
        ("register_parameter", "training", mt.Parameter(1.0), KeyError, "attribute `training` already"),
        (
            "register_parameter",
            "x",
            jnp.ones(2),
            TypeError,
            r"write `register_parameter\('x', mt.Parameter\(array\)\)`",
        ),
    ],
)
def test_what_cannot_be_registered(method, name, value, error, message):
    net = Net()
    before = list(net.state_dict())
    with pytest.raises(error, match=message):
        getattr(net, method)(name, value)
    assert list(net.state_dict()) == before and not hasattr(net, "x")


def test_a_buffer_is_always_saved():
    with pytest.raises(
        ValueError, match="Net.mask: persistent=False is not there, since every buffer is part of state"
    ):
        Net().register_buffer("mask", jnp.ones(2), persistent=False)


def test_names_of_torch_in_nn():
    assert nn.Module is mt.Module and nn.Parameter is mt.Parameter and nn.Buffer is mt.Buffer


# -- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "dtype"), [("half", "float16"), ("bfloat16", "bfloat16"), ("float", "float32")])
def test_floating_arrays_are_converted_in_place(method, dtype):
    net = Net().astype("float16" if method == "float" else "float32")
    mt.backward(lambda net: net(jnp.ones((1, 2), net.scale.dtype)).sum(), net)
    assert getattr(net, method)() is net
    assert {array.dtype.name for array in net.parameters()} == {dtype} == {grad.dtype.name for grad in net.grads()}
    assert net.layers[1].running_mean.dtype == dtype
    assert net.count.dtype == net.layers[1].num_batches_tracked.dtype == jnp.int32


def test_numbers_and_functions_may_have_the_names_of_these_methods():
    """In torch, too, an attribute of the object hides them; a Parameter or module would be hidden by them."""
    net = Net()
    net.half, net.double, net.float = 4, True, abs
    assert (net.half, net.double, net.float) == (4, True, abs)
    assert net.get_submodule("head") is net.head and copy.deepcopy(net).half == 4
    for value in (mt.Parameter(jnp.ones(1)), nn.ReLU(), [nn.ReLU()]):
        with pytest.raises(TypeError, match="Net has a method `bfloat16`.*would hide each other"):
            net.bfloat16 = value


def test_float64_needs_jaxs_64_bits():
    net = Net()
    for convert in (net.double, lambda: net.astype(jnp.float64)):
        with pytest.raises(ValueError, match=r"64-bit types are off; call jax.config.update\(.jax_enable_x64., True\)"):
            convert()
    assert net.scale.dtype == jnp.float32
    with jax.enable_x64(True):
        assert net.double() is net and net.scale.dtype == net.head.weight.dtype == jnp.float64
        assert net.float().scale.dtype == jnp.float32


# -- state that is no array -------------------------------------------------------------------------------------------


class Vocabulary(mt.Module):
    def __init__(self, *words: str) -> None:
        self.words = words
        self.table = mt.Parameter(jnp.arange(2.0))

    def get_extra_state(self) -> Any:
        return {"words": list(self.words), "size": jnp.array(len(self.words))}

    def set_extra_state(self, state: Any) -> None:
        if len(state["words"]) != int(state["size"]):
            raise ValueError("the words are damaged")
        self.words = tuple(state["words"])


class Reader(mt.Module):
    def __init__(self, *words: str) -> None:
        self.vocabulary, self.second = Vocabulary(*words), Vocabulary("second", *words)
        self.out = nn.Linear(2, 1)


def test_extra_state_is_part_of_the_state_dict():
    old, new = Reader("a", "b"), Reader()
    state = old.state_dict(prefix="r.")
    assert list(state) == [
        *("r.vocabulary.table", "r.vocabulary._extra_state", "r.second.table", "r.second._extra_state"),
        *("r.out.weight", "r.out.bias"),
    ]
    assert state["r.vocabulary._extra_state"]["words"] == ["a", "b"]
    state = {name.removeprefix("r."): value for name, value in state.items()}
    assert new.load_state_dict(state) == ([], [])
    assert new.vocabulary.words == ("a", "b") and new.second.words == ("second", "a", "b")
    assert (new.out.weight == old.out.weight).all()
    assert copy.deepcopy(new).vocabulary.words == ("a", "b")
    assert list(nn.Linear(1, 1).state_dict()) == ["weight", "bias"]


def test_a_missing_or_unexpected_extra_state_is_an_error_unless_it_is_not_strict():
    reader = Reader("a")
    state = reader.state_dict()
    del state["second._extra_state"]
    state["out._extra_state"] = 5
    with pytest.raises(ValueError, match=r"missing: second._extra_state\n  unexpected: out._extra_state"):
        reader.load_state_dict(state)
    state["vocabulary._extra_state"] = {"words": ["z"], "size": 1}
    assert reader.load_state_dict(state, strict=False) == (["second._extra_state"], ["out._extra_state"])
    assert reader.vocabulary.words == ("z",) and reader.second.words == ("second", "a")


def test_nothing_is_loaded_if_an_extra_state_is_refused():
    reader, other = Reader("a"), Reader("b")
    state = other.state_dict()
    state["vocabulary.table"] = jnp.full(2, 7.0)
    state["second._extra_state"] = {"words": [], "size": 1}
    with pytest.raises(ValueError, match="the words are damaged"):
        reader.load_state_dict(state)
    assert reader.vocabulary.words == ("a",) and reader.vocabulary.table.tolist() == [0.0, 1.0]
    assert (reader.out.weight != other.out.weight).any()


def test_extra_state_is_saved_in_files(tmp_path):
    old, new = Reader("a", "b"), Reader()
    mt.save(tmp_path / "reader.npz", reader=old, epoch=3)
    assert mt.load(tmp_path / "reader.npz", reader=new) == {"epoch": 3}
    assert new.vocabulary.words == ("a", "b") and (new.out.weight == old.out.weight).all()

    class Odd(Vocabulary):
        def get_extra_state(self) -> Any:
            return object()

    with pytest.raises(TypeError, match=r"odd\._extra_state"):
        mt.save(tmp_path / "odd.npz", odd=Odd())


def test_a_module_without_extra_state_says_so():
    with pytest.raises(NotImplementedError, match="Linear has no extra state: write `get_extra_state`"):
        nn.Linear(1, 1).get_extra_state()
    with pytest.raises(NotImplementedError, match="Linear has no extra state: write `set_extra_state`"):
        nn.Linear(1, 1).set_extra_state(1)


# -- optimizers -------------------------------------------------------------------------------------------------------


def test_groups_of_an_optimizer_have_torchs_names():
    body, head = nn.Linear(2, 2), nn.Linear(2, 1)
    opt = optim.SGD([body], lr=0.1, momentum=0.9)
    opt.add_param_group({"modules": [head], "lr": 0.01})
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.01]
    for group in opt.param_groups:
        group["lr"] *= 2
    assert [group["lr"] for group in opt.param_groups] == [0.2, 0.02]
    assert dict(opt.param_groups[1])["momentum"] == 0.9 and opt.param_groups[1]["modules"] == [head]
    assert [p.shape for p in opt.param_groups[1]["params"]] == [(1, 2), (1,)]
    with pytest.raises(ValueError, match="has 'params'. It finds the parameters itself"):
        opt.add_param_group({"params": head.parameters()})
    with pytest.raises(ValueError, match="no groups|per-parameter options"):
        optim.LBFGS([body]).add_param_group({"modules": [head]})
