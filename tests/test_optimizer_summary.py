"""`opt.summary()`: what an optimizer trains, with which settings, what it keeps, and what it does not hold of a model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.adapters import numpy as mini
from minitorch_jax.adapters.optax import OptaxOptimizer

SCALAR_COUNTS = 4 * 2  # the bytes of `num_steps` and `skipped`


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))


def by_path(summary):
    return {row.path: row for row in summary.rows}


def test_each_parameter_has_its_group_settings_rule_and_bytes():
    model = net()
    opt = optim.AdamW(
        [{"modules": [model[0]]}, {"modules": [model[2]], "lr": 0.5, "weight_decay": 0.01, "betas": (0.5, 0.9)}], lr=0.1
    )
    rows = by_path(opt.summary())
    assert list(rows) == ["0.weight", "0.bias", "1.weight"]
    assert rows["0.weight"] == ("0.weight", "float32[4, 3]", 0, "AdamW", (), 2 * 4 * 12)
    assert rows["1.weight"][2:] == (
        1,
        "AdamW",
        ("lr=0.5", "betas=(0.5, 0.9)"),
        2 * 4 * 8,
    )  # its weight_decay is the default
    assert opt.summary().state_bytes == 2 * 4 * (12 + 4 + 8) + 3 * 4 + SCALAR_COUNTS
    opt.groups[1].lr = 0.1
    assert by_path(opt.summary())["1.weight"].settings == ("betas=(0.5, 0.9)",)
    opt.groups[0].lr = optim.schedules.cosine(0.2, 10)
    assert by_path(opt.summary())["0.bias"].settings[0].startswith("lr=")


def test_flags_and_what_is_kept_for_some_only():
    model = net().astype(jnp.bfloat16)
    opt = optim.AdamW([model], lr=0.1, master_weights=True, decay_matrices_only=True)
    rows = by_path(opt.summary())
    assert rows["0.0.weight"].settings == () and rows["0.0.bias"].settings == ("weight_decay=0",)
    assert rows["0.0.bias"].state_bytes == 3 * 4 * 4  # two moments and the master weight, all float32
    assert rows["0.1.weight"].parameter == "bfloat16[4]"
    opt.weight_decay = 0
    assert by_path(opt.summary())["0.0.bias"].settings == ()
    shared = optim.LBFGS([net()]).summary()
    assert shared.state_bytes > sum(row.state_bytes for row in shared.rows) > 0


def test_what_the_optimizer_does_not_hold():
    model = net()
    opt = optim.SGD([model[0]], lr=0.1)
    assert opt.summary(model).not_held == ("1.weight", "1.bias", "2.weight") and opt.summary().not_held == ()
    last = opt.summary(model).rows[-1]
    assert last == ("2.weight", "float32[2, 4]", None, "not held", (), 0)
    model[1].freeze()
    model[2].freeze()
    assert opt.summary(model).not_held == ()
    assert optim.SGD([model], lr=0.1).summary(model).not_held == ()
    model[0].freeze()
    assert by_path(opt.summary(model))["0.bias"].rule == "frozen"


def test_tied_parameters_are_held_under_either_name():
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.tie("weight", first, "weight")
    summary = optim.SGD([first], lr=0.1).summary(nn.Sequential(first, second))
    assert len(summary.rows) == 1 and not summary.not_held


def test_packed_parameters_models_of_shapes_and_ensembles():
    model = net()
    opt = optim.Adam([model], lr=0.1)
    rows = opt.summary().rows
    mt.pack(model)
    assert opt.summary().rows == rows
    mt.backward(lambda m, x: (m(x) ** 2).sum(), model, jnp.ones((2, 3)))
    opt.step()
    assert opt.summary().rows == rows
    shapes = jax.eval_shape(lambda model: jax.tree.map(lambda array: 2 * array, model), net())
    assert optim.Adam([shapes], lr=0.1).summary(shapes).rows == rows
    several = jax.vmap(lambda lr: optim.SGD([nn.Linear(2, 1, key=jax.random.key(0))], lr=lr))(jnp.array([0.1, 0.2]))
    assert by_path(several.summary())["0.weight"].parameter == "float32[2, 1, 2]"


def test_it_does_not_disturb_a_compiled_step():
    model = net()
    opt = optim.Adam([model], lr=0.1)

    @mt.jit
    def step(x):
        opt.zero_grad()
        loss = mt.backward(lambda m, x: (m(x) ** 2).sum(), model, x)
        opt.step()
        assert len(opt.summary(model).rows) == 5  # also while it is traced
        return loss

    for _ in range(3):
        step(jnp.ones((2, 3)))
        opt.summary(model)
    assert step.num_compiles == 1


def test_numpy_networks_and_rules_over_all_parameters():
    network = mini.Linear(3, 2)
    opt = optim.Adam([network], lr=0.1)
    assert {row.parameter.partition("[")[0] for row in opt.summary().rows} == {str(network.parameters()[0].dtype)}
    assert all(row.state_bytes > 0 and row.rule == "Adam" for row in opt.summary().rows)
    optax = pytest.importorskip("optax")
    model = nn.Linear(3, 2)
    rows = by_path(OptaxOptimizer([model], optax.adam(0.1)).summary(model))
    assert rows["0.weight"].state_bytes == 2 * 4 * 6


def test_it_prints_and_is_html_in_a_notebook():
    model = net()
    opt = optim.SGD([{"modules": [model[0]]}, {"modules": [model[2]], "lr": 0.01}], lr=0.1, momentum=0.9)
    text = repr(opt.summary(model))
    head, _, *rows, _, totals = text.splitlines()
    assert head.split() == ["parameter", "array", "group", "rule", "own", "settings", "state"]
    assert rows[2].split() == ["1.weight", "float32[2,", "4]", "1", "SGD", "lr=0.01", "32", "B"]
    assert totals.startswith("3 parameters, 2 not held, ") and "momentum=0.9" in totals
    html = opt.summary(model)._repr_html_()
    assert html.count("<tr>") == 6 and "lr=0.01" in html
    assert "<Linear" not in html


def test_a_model_is_a_module():
    model = net()
    with pytest.raises(
        TypeError, match=r"SGD.summary\(\) takes a Module.*\(list\). For the optimizer alone, leave it out"
    ):
        optim.SGD([model], lr=0.1).summary([model])
