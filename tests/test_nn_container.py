"""Containers of parameters, against torch's."""

import copy
import pickle
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import torch

import minitorch_jax as mt
from minitorch_jax import nn


def arrays(n):
    return [jnp.full((i + 1,), float(i)) for i in range(n)]


def values(container):
    return [np.asarray(value).tolist() for value in container]


# -- ParameterList -----------------------------------------------------------------------------------------------------


def test_a_list_holds_arrays_and_parameters_under_torchs_names():
    ours = nn.ParameterList([jnp.zeros(2), mt.Parameter(jnp.ones(3)), np.ones(1, np.float32)])
    theirs = torch.nn.ParameterList([torch.zeros(2), torch.nn.Parameter(torch.ones(3)), torch.ones(1)])
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["0", "1", "2"]
    assert len(ours) == 3 and len(ours.parameters()) == 3
    assert isinstance(ours[0], jax.Array)
    ours.load_state_dict({name: 5 * tensor + 1 for name, tensor in theirs.state_dict().items()})
    assert values(ours) == [[1, 1], [6, 6, 6], [6]]


def test_a_list_is_indexed_as_a_list():
    params = nn.ParameterList(arrays(4))
    assert params[-1].shape == (4,) and params[np.int64(1)].shape == (2,)
    for bad in (4, -5):
        with pytest.raises(IndexError):
            params[bad]
        with pytest.raises(IndexError):
            params[bad] = jnp.zeros(1)
    params[-1] = jnp.full(4, 9.0)
    assert values(params)[3] == [9, 9, 9, 9]
    with pytest.raises(ValueError, match=r"ParameterList.0 is float32\[1\], and was given float32\[2\]"):
        params[0] = jnp.zeros(2)
    params[0] = mt.Parameter(jnp.zeros(2))  # a new one in its place
    assert params[0].shape == (2,) and list(params.state_dict()) == ["0", "1", "2", "3"]


def test_a_slice_shares_its_parameters():
    params = nn.ParameterList(arrays(4))
    part = params[1::2]
    assert isinstance(part, nn.ParameterList) and values(part) == [[1, 1], [3, 3, 3, 3]]
    part[0] = jnp.full(2, 7.0)
    assert values(params)[1] == [7, 7]
    model = nn.ModuleList([params, part])
    assert len(model.parameters()) == 4


def test_a_list_grows():
    params = nn.ParameterList()
    assert params.append(jnp.zeros(1)) is params and params.extend(arrays(2)) is params
    params += [jnp.ones(1)]
    other = nn.ParameterList(params)
    assert len(params) == len(other) == 4
    other[3] = jnp.full(1, 8.0)
    assert values(params)[3] == [8]
    for bad in (3, jnp.ones(3)):
        with pytest.raises(TypeError, match="takes an iterable of parameters"):
            params.extend(bad)
    with pytest.raises(TypeError, match="holds Parameters and arrays; got a str"):
        params.append("x")
    with pytest.raises(TypeError, match="must be floating"):
        params.append(jnp.arange(3))
    assert len(params) == 4


class Polynomial(mt.Module):
    def __init__(self):
        self.powers = nn.ParameterList([jnp.float32(i + 1) for i in range(3)])
        self.named = nn.ParameterDict({"shift": jnp.float32(0.5)})

    def forward(self, x):
        return sum(p * x**i for i, p in enumerate(self.powers)) + self.named["shift"]


def test_containers_work_in_modules_under_all_transforms():
    model, x = Polynomial(), jnp.float32(2.0)
    assert [name for name, _ in model.named_parameters()] == ["powers.0", "powers.1", "powers.2", "named.shift"]
    assert float(model(x)) == 17.5 == float(jax.jit(lambda m, x: m(x))(model, x))
    loss = mt.backward(lambda m: m(x), model)
    assert float(loss) == 17.5 and values(model.grads()) == [1, 2, 4, 1]
    gradient = jax.grad(lambda m: m(x))(model)
    assert values(gradient.powers) == [1, 2, 4]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert float(other(x)) == 17.5
        other.powers[0] = jnp.float32(0.0)
        assert float(other(x)) == 16.5 and float(model(x)) == 17.5
    opt = mt.optim.SGD([model], lr=1.0)
    opt.step()
    assert values(model.powers) == [0, 0, -1]


def test_reprs():
    assert repr(nn.ParameterList(arrays(2))) == "ParameterList(0=float32[1], 1=float32[2])"
    assert repr(nn.ParameterDict({"a": jnp.ones(2)})) == "ParameterDict(a=float32[2])"


# -- ParameterDict -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [{"b": 1, "a": 2}, OrderedDict([("b", 1), ("a", 2)]), [("b", 1), ("a", 2)], (["b", 1], ["a", 2]), {}]
)
def test_a_dict_keeps_torchs_order(given):
    def filled(make):
        if isinstance(given, dict):
            return type(given)((key, make(n)) for key, n in given.items())
        return [(key, make(n)) for key, n in given]

    ours, theirs = nn.ParameterDict(filled(jnp.ones)), torch.nn.ParameterDict(filled(torch.ones))
    assert list(ours.state_dict()) == list(theirs.state_dict()) and list(ours) == list(theirs)
    assert list(reversed(ours)) == list(reversed(theirs))


def test_a_dict_is_used_as_a_dict():
    params = nn.ParameterDict({"a": jnp.zeros(1), "b": mt.Parameter(jnp.ones(2))})
    assert len(params) == 2 and "a" in params and "c" not in params
    assert list(params.keys()) == ["a", "b"] and values(params.values()) == [[0], [1, 1]]
    assert [(key, array.shape) for key, array in params.items()] == [("a", (1,)), ("b", (2,))]
    params["a"] = jnp.full(1, 3.0)
    assert values(params.values()) == [[3], [1, 1]]
    with pytest.raises(ValueError, match="shape"):
        params["a"] = jnp.zeros(5)
    assert params.get("c") is None and params.get("c", 5) == 5 and params.get("a").tolist() == [3]
    assert params.setdefault("a", jnp.zeros(9)).shape == (1,)
    assert params.setdefault("c", jnp.zeros(9)).shape == (9,)
    assert params.pop("c").shape == (9,) and list(params) == ["a", "b"]
    key, array = params.popitem()
    assert key == "b" and array.tolist() == [1, 1]
    params["z"] = jnp.ones(2)
    del params["a"]
    assert list(params) == ["z"]
    params.clear()
    assert len(params) == 0 and len(params.parameters()) == 0


def test_dicts_are_joined_and_copied_with_their_parameters():
    one, two = nn.ParameterDict({"a": jnp.zeros(1)}), nn.ParameterDict({"b": jnp.ones(1)})
    both = one | two
    assert list(both) == ["a", "b"] and list(one) == ["a"]
    both["b"] = jnp.full(1, 5.0)
    assert values(two.values()) == [[5]]
    one |= two
    assert list(one) == ["a", "b"] and len(nn.ModuleList([one, both, one.copy()]).parameters()) == 2


def test_fromkeys():
    apart = nn.ParameterDict().fromkeys(["a", "b"], jnp.zeros(2))
    assert len(apart.parameters()) == 2
    tied = nn.ParameterDict().fromkeys(["a", "b"], mt.Parameter(jnp.zeros(2)))
    assert len(tied.parameters()) == 1 and list(tied.state_dict()) == ["a", "b"]


def test_what_a_dict_refuses():
    params = nn.ParameterDict({"a": jnp.zeros(1)})
    for bad in ("", "x.y", "keys", "training", 3):
        with pytest.raises(KeyError, match="cannot be a parameter's name"):
            params[bad] = jnp.zeros(1)
    for missing in (lambda: params["b"], lambda: params.pop("b"), lambda: params["keys"]):
        with pytest.raises(KeyError):
            missing()
    with pytest.raises(TypeError, match="holds Parameters and arrays; got a NoneType"):
        params.setdefault("b")
    with pytest.raises(TypeError, match="takes a mapping, or pairs; got a int"):
        params.update(3)
    assert list(params) == ["a"]
