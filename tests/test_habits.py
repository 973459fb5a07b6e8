"""What torch's users write on arrays: attributes that do nothing there, and ties by assignment."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minitorch_jax as mt
from minitorch_jax import Buffer, Parameter, nn, optim

X = jnp.ones((4, 3))


def loss_fn(model, x):
    return model(x).sum()


def step(model, opt, x):
    opt.zero_grad()
    loss = mt.backward(loss_fn, model, x)
    opt.step()
    return loss


jitted = mt.jit(step)

HABITS = {
    "requires_grad": (lambda array: setattr(array, "requires_grad", False), r"freeze\(\)"),
    "data": (lambda array: setattr(array, "data", jnp.zeros(3)), r"assignment \(`module\.weight = array`\)"),
    "grad": (lambda array: setattr(array, "grad", None), r"zero_grad\(\), or assignment to `module\.grads\(\)\[i\]`"),
}
READS = {
    "parameters": lambda m: [*m.parameters()],
    "one of parameters": lambda m: [m.parameters()[0]],
    "slice": lambda m: m.parameters()[:1],
    "named_parameters": lambda m: [array for _, array in m.named_parameters()],
    "attribute": lambda m: [m[0].weight],
    "state_dict": lambda m: [m.state_dict()["0.weight"]],
    "pytree": lambda m: jax.tree.leaves(m),
}
LOOKS = {
    "opt.zero_grad": lambda m, opt: opt.zero_grad(),
    "zero_grad": lambda m, opt: m.zero_grad(),
    "backward": lambda m, opt: mt.backward(loss_fn, m, X),
    "value_and_grad": lambda m, opt: mt.value_and_grad(loss_fn)(m, X),
    "step": lambda m, opt: opt.step(),
    "parameters": lambda m, opt: m.parameters(),
    "grads": lambda m, opt: m.grads(),
    "mt.jit": lambda m, opt: [jitted(m, opt, X), m.zero_grad()],
}


def pair(packed):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    if packed:
        mt.pack(model)
    opt = optim.SGD([model], lr=0.1)
    step(model, opt, X)
    return model, opt


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("habit", HABITS)
def test_torchs_attributes_on_parameters_are_noticed(habit, look, packed):
    """Once: nothing has changed then, and what was set is taken off again."""
    model, opt = pair(packed)
    act, fix = HABITS[habit]
    for read in READS.values():
        for earlier in (False, True):  # whether that use came already after the array was read
            array = read(model)[0]
            if earlier:
                LOOKS["backward"](model, opt)
            if earlier and look in ("backward", "value_and_grad"):
                array = read(model)[0]
            before = [np.asarray(p) for p in model.parameters()] if earlier is False else None
            act(array)
            with pytest.raises(
                TypeError, match=rf"`{habit}` was set on the array of (modules\.)?(0\.)?0\.weight: use {fix}"
            ):
                LOOKS[look](model, opt)
            assert not vars(array)
            for old, now in zip(before or (), model.parameters(), strict=False):
                np.testing.assert_array_equal(old, now)
            LOOKS[look](model, opt)


def test_all_that_was_set_is_said_at_once():
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(3)])
    for param in model.parameters():
        param.requires_grad = False
        param.data = jnp.zeros(3)
    names = r"0\.weight, 0\.bias, 1\.weight, 1\.bias and 2 more"
    with pytest.raises(TypeError, match=rf"`requires_grad` was set on the array of {names}: .*; `data` was set on the"):
        model.zero_grad()


def test_gradients_and_buffers_too():
    model = nn.BatchNorm1d(3)
    mt.backward(loss_fn, model, X)
    model.running_mean.data = jnp.zeros(3)
    with pytest.raises(TypeError, match=r"`data` was set on the array of running_mean"):
        model.zero_grad()
    model.grads()[0].data = jnp.zeros(3)
    with pytest.raises(TypeError, match=r"`data` was set on the array of the gradient of weight"):
        model.zero_grad()


def test_what_changes_nothing_in_torch_either_is_no_error():
    model = nn.Linear(3, 2)
    model.bias.name = "mine"  # no attribute of torch's
    model.weight.requires_grad = True
    model.zero_grad()
    model.freeze()
    model.weight.requires_grad = False
    model.zero_grad()
    model.weight.requires_grad = True
    with pytest.raises(
        TypeError, match=r"`requires_grad` was set on the array of weight: use freeze\(\) or unfreeze\(\)"
    ):
        model.zero_grad()


def test_no_array_is_looked_at_while_none_was_lent(monkeypatch):
    model, opt = pair(False)
    for _ in range(2):
        step(model, opt, X)
        jitted(model, opt, X)
    monkeypatch.setattr(mt.module.torch_habits, "look", None)
    step(model, opt, X)
    jitted(model, opt, X)


@pytest.mark.parametrize("declare", [Parameter, Buffer])
@pytest.mark.parametrize("name", ["requires_grad", "data", "grad", "anything"])
def test_a_declaration_takes_no_attributes(declare, name):
    with pytest.raises(
        AttributeError, match=rf"a {declare.__name__} is a declaration, with no `{name}`.*trainable=False"
    ):
        setattr(declare(jnp.ones(3)), name, None)


def test_the_lists_of_arrays_take_no_attributes():
    with pytest.raises(AttributeError, match="requires_grad"):
        nn.Linear(3, 2).parameters().requires_grad = False


TIES = {
    "attribute": lambda a, b: setattr(a, "weight", b.weight),
    "variable": lambda a, b: [setattr(a, "weight", w) for w in [b.weight] if b.bias is not None],
    "both": lambda a, b: [setattr(a, n, w) for n, w in [("weight", b.weight), ("bias", b.bias)][:1]],
    "item": lambda a, b: setattr(a, "weight", b.parameters()[0]),
    "last item": lambda a, b: setattr(a, "weight", b.parameters()[-2]),
    "named": lambda a, b: setattr(a, "weight", dict(b.named_parameters())["weight"]),
    "__setattr__": lambda a, b: a.__setattr__("weight", b.weight),
}


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("way", TIES)
def test_assigning_the_array_of_another_parameter_names_tie(way, packed):
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    if packed:
        mt.pack(b)
    with pytest.warns(
        UserWarning, match=r"Linear\.weight was assigned the array that Linear\.weight holds.*`a\.tie\('weight', b"
    ):
        TIES[way](a, b)
    np.testing.assert_array_equal(a.weight, b.weight)


def test_copies_and_arrays_of_its_own_are_assigned_without_a_warning():
    a, b, norm, other = nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a.weight = jnp.copy(b.weight)
        a.weight = b.weight * 1
        a.weight = np.asarray(b.weight)
        kept = a.weight
        a.weight = a.weight
        a.weight = 2 * kept
        a.weight = kept
        was = b.weight
        b.weight = jnp.zeros((3, 3))
        a.weight = was  # not b's any more
        a.load_state_dict(b.state_dict())
        a.parameters()[0] = b.parameters()[0]
        norm.running_mean = other.running_mean
        b.tie("weight", a, "weight")
        b.weight = a.weight


def test_a_tied_parameter_belongs_to_one_group():
    def tied():
        a, b = nn.Linear(3, 3), nn.Linear(3, 3)
        b.tie("weight", a, "weight")
        return a, b

    a, b = tied()
    for make in (
        lambda: optim.SGD([{"modules": [a]}, {"modules": [b], "lr": 1.0}], lr=0.1),
        lambda: optim.AdamW([{"modules": [nn.ReLU(), a]}, {"modules": [b]}]),
    ):
        with pytest.raises(
            ValueError,
            match=r"one tied parameter is in two groups, as [01]\.weight in groups\[0\] and as [12]\.weight in groups\[1\]",
        ):
            make()
    opt = optim.SGD([{"modules": [a]}], lr=0.1)
    with pytest.raises(ValueError, match=r"in two groups, as 0\.weight in groups\[0\] and as 1\.weight in groups\[1\]"):
        opt.add_group({"modules": [b]})
    assert len(opt.groups) == 1
    assert optim.SGD([{"modules": [a, b]}, {"modules": [nn.Linear(2, 2)]}], lr=0.1).groups  # of one group


def test_a_tie_after_the_groups_were_made_is_refused_at_the_next_step():
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    opt = optim.SGD([{"modules": [a]}, {"modules": [b]}], lr=0.1)
    b.tie("weight", a, "weight")
    with pytest.raises(ValueError, match=r"in two groups, as 0\.weight .* 1\.weight"):
        opt.step()
