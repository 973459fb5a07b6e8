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


# -- what is passed in the place of something else ------------------------------------------------------------------------


class Given(mt.Module):
    def __init__(self, value):
        self.ws = value


OF_PARAMETERS = {
    "parameters": lambda m: m.parameters(),
    "grads": lambda m: m.grads(),
    "a list": lambda m: list(m.parameters()),
    "named": lambda m: m.named_parameters(),
    "filtered": lambda m: filter(lambda p: p.ndim, m.parameters()),
    "a generator": lambda m: (p for p in m.parameters()),
    "a sum": lambda m: m.parameters() + nn.Linear(2, 2).parameters(),
    "one": lambda m: [m.weight],
    "lists": lambda m: [m.parameters()],
    "NumPy": lambda m: [np.ones((100, 100))],
    "in a group": lambda m: [{"modules": m.parameters()}],
}


@pytest.mark.parametrize("make", [mt.Optimizer, optim.Adam, optim.LBFGS])
@pytest.mark.parametrize("kind", OF_PARAMETERS)
def test_parameters_in_the_place_of_modules_name_the_list_of_modules(kind, make):
    model = nn.Linear(30, 30)
    name = make.__name__
    if kind == "in a group" and make is optim.LBFGS:
        return  # has no groups
    expected = rf"{name}: modules\[0\] is a.* write `{name}\(\[model\]\)`, not `{name}\(model\.parameters\(\)\)`"
    with pytest.raises(TypeError, match=expected) as error:
        make(OF_PARAMETERS[kind](model))
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)
    if kind != "in a group":
        opt = make([model])
        with pytest.raises(TypeError, match=expected):
            opt.modules = OF_PARAMETERS[kind](model)
        assert opt.modules == [model]


@pytest.mark.parametrize("given", [jnp.ones((40, 40)), np.ones((40, 40)), {"weight": jnp.ones((40, 40))}], ids=type)
def test_what_is_no_list_of_modules_is_shown_by_its_type(given):
    with pytest.raises(
        TypeError, match=r"modules; got (an array, float\d\d\[40, 40\]|a dict of 1): write `\[model\]`$"
    ):
        optim.SGD(given)


def test_torchs_groups_name_modules():
    model = nn.Linear(2, 2)
    group = {"params": model.parameters(), "lr": 0.1}
    expected = (
        r"SGD: a group needs 'modules', and has 'params'.*`\{\"modules\": \[layer\], \.\.\.\}`, not `\{\"params\""
    )
    with pytest.raises(ValueError, match=expected):
        optim.SGD([group])
    opt = optim.SGD([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=expected):
        opt.add_group(group)
    assert len(opt.groups) == 1


@pytest.mark.parametrize("clip", [lambda m: mt.clip_grad_norm(m, 1.0), lambda m: mt.clip_grad_value(m, 1.0)])
def test_parameters_are_not_what_is_clipped(clip):
    with pytest.raises(TypeError, match=r"the list holds an array, float32\[30, 30\].*Write `clip_grad_\w+\(model, "):
        clip(nn.Linear(30, 30).parameters())


def test_settings_and_averages_print_no_weights():
    model = nn.Linear(30, 30)
    with pytest.raises(ValueError, match=r"lr must be .*; got an array, float32\[30, 30\]$"):
        optim.SGD([model], model.weight)
    with pytest.raises(TypeError, match=r"AveragedModel takes a Module; got a LiveList of 2"):
        optim.AveragedModel(model.parameters())


NOT_FUNCTIONS = {
    "loss": lambda: jnp.ones(()),
    "output": lambda: jnp.ones((40, 40)),
    "NumPy": lambda: np.ones((40, 40)),
    "number": lambda: 1.5,
    "nothing": lambda: None,
    "pair": lambda: (jnp.ones(()), jnp.ones((40, 40))),
}
TAKE_FUNCTIONS = {
    "mt.backward": (lambda f: mt.backward(f, nn.Linear(2, 1)), "loss_fn, model, x"),
    "mt.scan": (lambda f: mt.scan(f, X), "loss_fn, model, x"),
    "mt.grad": (mt.grad, r"fn\)\(model, x"),
    "mt.value_and_grad": (mt.value_and_grad, r"fn\)\(model, x"),
    "mt.jit": (mt.jit, r"fn\)\(model, x"),
    "LossScaler.backward": (lambda f: mt.LossScaler().backward(f), "loss_fn, model, x"),
}


@pytest.mark.parametrize("name", TAKE_FUNCTIONS)
@pytest.mark.parametrize("kind", NOT_FUNCTIONS)
def test_a_result_in_the_place_of_a_function_names_both(kind, name):
    call, fix = TAKE_FUNCTIONS[name]
    if (name, kind) == ("mt.jit", "nothing"):
        return  # then it returns a decorator
    with pytest.raises(
        TypeError, match=rf"{name} takes a function, not .*: pass the function.*`{name}\({fix}\)`, not"
    ) as e:
        call(NOT_FUNCTIONS[kind]())
    assert len(str(e.value)) < 300


@pytest.mark.parametrize("array", [jnp.ones(3), np.ones(3)], ids=["jax", "numpy"])
@pytest.mark.parametrize("declare", [lambda array: array, Parameter, Buffer], ids=["bare", "Parameter", "Buffer"])
@pytest.mark.parametrize("wrap", [lambda a: [a, a], lambda a: (a,), lambda a: {"a": a}, lambda a: [{"b": [a]}]])
def test_the_lines_for_arrays_in_a_container_are_code_that_does_it(wrap, declare, array):
    """The message is run, as its reader would."""
    with pytest.raises((AttributeError, TypeError), match=r"(?s)Given\.ws.*nn\.Parameter(List|Dict)") as error:
        Given(wrap(declare(array)))
    trained_line, kept_line = [line.strip() for line in str(error.value).splitlines() if line.startswith("    ")]
    given = {"a": jnp.ones(3)} if "ParameterDict" in trained_line else [jnp.ones(3), jnp.zeros(2)]
    names = {"nn": nn, "Buffer": Buffer, "arrays": given}
    trained, kept = Given(()), Given(())
    exec(trained_line, names | {"self": trained})
    exec(kept_line, names | {"self": kept})
    assert len(trained.parameters()) == len(kept.buffers()) == len(given)


def test_what_does_not_fit_a_parameter_is_said_with_the_line_that_makes_it_fit():
    """Only what differs is named, and the code in the message works."""
    layer = nn.Linear(2, 3)
    for name, array in {
        "bias": [
            jnp.ones((1, 3)),
            np.ones((3, 1)),
            jnp.ones((1, 3, 1)),
            jnp.ones(3, int),
            jnp.ones((1, 3), jnp.bfloat16),
        ],
        "weight": [jnp.ones((2, 3)), np.ones(6), jnp.ones((2, 3), jnp.float16), jnp.ones((1, 3, 2))],
    }.items():
        for given in array:
            with pytest.raises(
                ValueError, match=rf"Linear\.{name} is float32\[3.*and was given .*: .*Write `array.+`"
            ) as e:
                setattr(layer, name, given)
            said = str(e.value)
            shown = jnp.asarray(given)
            assert ("dtype" in said) == (shown.dtype != jnp.float32) and ("shape" in said) == (
                shown.shape != getattr(layer, name).shape
            )
            setattr(layer, name, eval(said.partition("Write `")[2].partition("`")[0], {"array": shown}))
    with pytest.raises(
        ValueError, match=r"shape \(4,\) for \(3,\)\. Give an array of that shape, or assign `Parameter"
    ):
        layer.bias = jnp.ones(4)
    with pytest.raises(ValueError, match=r"shape \(\) for \(3,\)\. Give `jnp\.full\(\(3,\), value\)`"):
        layer.bias = 1.0
    scalar = Given(Parameter(1.0))
    with pytest.raises(ValueError, match=r"shape \(1,\) for \(\)\. Write `array\.reshape\(\(\)\)`"):
        scalar.ws = jnp.ones(1)
    with pytest.raises(ValueError, match=r"  bias is .*: shape \(1, 3\) for \(3,\)\. Write `array\.reshape\(3\)`"):
        layer.load_state_dict({"weight": layer.weight, "bias": jnp.ones((1, 3))})
    for given in (layer, "model.pt", [layer.weight]):
        with pytest.raises(TypeError, match=r"takes a dict of arrays by path.*; got .*`mt\.load\(path, model"):
            layer.load_state_dict(given)
