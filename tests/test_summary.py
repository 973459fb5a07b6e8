"""`mt.summary`: what it shows, that it computes and changes nothing, and what it says of a model that fails."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minitorch_jax as mt
from minitorch_jax import nn
from minitorch_jax.summary import Row


class Counted(mt.Module):
    """Parameters and buffers of several dtypes, a module used twice, one never used, and random draws."""

    def __init__(self):
        self.shared = nn.Linear(3, 3, key=jax.random.key(0))
        self.unused = nn.Linear(3, 1, bias=False, key=jax.random.key(1))
        self.blocks = [nn.Sequential(nn.Linear(3, 2, key=jax.random.key(2)), nn.Dropout(0.5))]
        self.scale = mt.Parameter(jnp.ones(3, jnp.bfloat16), trainable=False)
        self.count = mt.Buffer(0)

    def forward(self, x, *, shift=None):
        self.count = self.count + 1
        x = self.shared(self.shared(x))
        return {"out": self.blocks[0](x if shift is None else x + shift), "x": x}


def test_rows_and_totals():
    model = Counted()
    table = mt.summary(model, jnp.ones((5, 3)), shift=jnp.ones((5, 3)))
    x, y = "float32[5, 3]", "float32[5, 2]"
    assert tuple(row._replace(flops=None) for row in table.rows) == (
        Row("", "Counted", (x, x), (y, x), 1, 3, 10),
        Row("shared", "Linear", (x,), (x,), 2, 12, 48),
        Row("unused", "Linear", (), (), 0, 3, 12),
        Row("blocks.0", "Sequential", (x,), (y,), 1, 0, 0),
        Row("blocks.0.0", "Linear", (x,), (y,), 1, 8, 32),
        Row("blocks.0.1", "Dropout", (y,), (y,), 1, 0, 0),
    )
    assert (table.num_parameters, table.num_trainable, table.num_bytes) == (26, 23, 102)


def test_flops_of_the_model_and_of_modules_without_submodules():
    net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 2), nn.Identity()))
    table = mt.summary(net, jax.ShapeDtypeStruct((8, 3), jnp.float32))
    first, second = 2 * 8 * 3 * 4 + 8 * 4, 2 * 8 * 4 * 2 + 8 * 2  # products and sums; the biases
    flops = {row.path: row.flops for row in table.rows}
    assert flops == {"": first + second, "0": first, "1": None, "1.0": second, "1.1": 0}
    assert table.flops == first + second and str(table).endswith(", 368 FLOPs")
    lines = str(table).splitlines()
    assert lines[3].split()[-1] == "224" and lines[2].split()[-1] == "368"
    model = Counted()
    twice = mt.summary(model, jnp.ones((5, 3)))
    assert {row.path: row.flops for row in twice.rows}["shared"] == 2 * (2 * 5 * 3 * 3 + 5 * 3)
    assert int(model.count) == 0 and mt.summary(model).flops is None and "FLOPs" not in str(mt.summary(model))


def flops_of(function, *args):
    return int(jax.jit(function).lower(*args).cost_analysis()["flops"])


def convolved(x, w, b, stride, groups=1):
    y = jax.lax.conv_general_dilated(x, w, (stride, stride), [(1, 1), (1, 1)], feature_group_count=groups)
    return y + b.reshape(1, -1, 1, 1)


IMAGES = jax.ShapeDtypeStruct((2, 4, 8, 8), jnp.float32)
WINDOWS = (1, 1, 3, 3), (1, 1, 2, 2), ((0, 0), (0, 0), (1, 1), (1, 1))


@pytest.mark.parametrize(
    "layer, plain",
    [
        pytest.param(nn.Conv2d(4, 8, 3, 2, 1), lambda x, w, b: convolved(x, w, b, 2), id="columns"),
        pytest.param(nn.Conv2d(4, 8, 3, 1, 1), lambda x, w, b: convolved(x, w, b, 1), id="shifted"),
        pytest.param(nn.Conv2d(4, 4, 3, 1, 1, groups=4), lambda x, w, b: convolved(x, w, b, 1, 4), id="depthwise"),
        pytest.param(
            nn.MaxPool2d(3, 2, 1), lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, *WINDOWS), id="pool"
        ),
        pytest.param(nn.Softmax(-1), lambda x: jax.nn.softmax(x, -1), id="softmax"),
    ],
)
def test_flops_are_those_of_plain_operations(layer, plain):
    layer(jnp.ones(IMAGES.shape))  # eager programs, in the forms for this platform
    ours, with_forms = mt.summary(layer, IMAGES).flops, str(jax.make_jaxpr(layer)(IMAGES))
    assert ours == flops_of(plain, IMAGES, *layer.parameters())
    assert str(jax.make_jaxpr(layer)(IMAGES)) == with_forms  # none of them stays plain


def test_it_is_printed_as_a_table():
    text = str(mt.summary(Counted(), jnp.ones((5, 3))))
    assert text == repr(mt.summary(Counted(), jnp.ones((5, 3))))
    lines = text.splitlines()
    assert lines[0].split() == ["module", "type", "input", "output", "parameters", "bytes", "FLOPs"]
    assert re.fullmatch(r"  shared +Linear +float32\[5, 3\] +float32\[5, 3\] × 2 +12 +48 B +210", lines[3])
    assert re.fullmatch(r"    0 +Sequential.*", lines[5]) and re.fullmatch(r"      0 +Linear.*", lines[6])
    assert re.fullmatch(r"26 parameters \(3 frozen\), 102 B with buffers, \d+ FLOPs", lines[-1])
    assert len({len(line) for line in (lines[1], lines[-2])}) == 1 and max(map(len, lines[2:-2])) == len(lines[1])


def test_without_inputs_there_are_no_shapes():
    text = str(mt.summary(Counted()))
    assert "input" not in text and "output" not in text and "26 parameters" in text


def test_it_is_html_in_a_notebook():
    class Odd(nn.Sequential):
        pass

    Odd.__name__ = "<Odd>"
    page = mt.summary(Odd(nn.Linear(2, 2, key=jax.random.key(0))), jnp.ones((1, 2)))._repr_html_()
    assert page.startswith("<table><caption>6 parameters") and page.count("<tr>") == 3
    assert "&lt;Odd&gt;" in page and "<Odd>" not in page
    assert page.count("<td") == 14 and page.count("</td>") == 14 and "&emsp;0" in page


def test_nothing_is_computed_and_nothing_changes():
    model = Counted()
    before = {name: np.array(value) for name, value in model.state_dict().items()}
    key = np.array(jax.random.key_data(mt.module.random.current().next()))
    mt.seed(0)
    mt.summary(model, jax.ShapeDtypeStruct((5, 3), jnp.float32))
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    assert model.training and "forward" not in vars(model.shared)
    np.testing.assert_array_equal(jax.random.key_data(mt.module.random.current().next()), key)
    leaves = jax.tree.leaves(model)
    assert not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    large = jax.ShapeDtypeStruct((10**9, 3), jnp.float32)  # 12 GB, if it were there
    assert "1000000000" in str(mt.summary(nn.Linear(3, 4, key=jax.random.key(0)), large))


def test_tied_parameters_count_once():
    model = nn.Sequential(nn.Linear(3, 3, key=jax.random.key(0)), nn.Linear(3, 3, key=jax.random.key(1)))
    model[1].tie("weight", model[0], "weight")
    table = mt.summary(model)
    assert [row.num_parameters for row in table.rows] == [0, 12, 3] and table.num_parameters == 15


def test_numbers_of_bytes():
    from minitorch_jax.runtime.tables import in_bytes

    given = [0, 999, 1000, 12345, 999_999, 4 * 10**7, 10**13, 10**16]
    shown = ["0 B", "999 B", "1 kB", "12.35 kB", "1000 kB", "40 MB", "10 TB", "1e+04 TB"]
    assert list(map(in_bytes, given)) == shown


def test_errors_name_the_module():
    model = nn.Sequential(nn.Linear(3, 4, key=jax.random.key(0)), nn.Linear(3, 2, key=jax.random.key(1)))
    with pytest.raises(ValueError, match=r"takes inputs of shape \(\.\.\., 3\)") as raised:
        mt.summary(model, jnp.ones((5, 3)))
    assert raised.value.__notes__[0] == "while calling 1: Linear(3, 2), given float32[5, 4]"
    assert "forward" not in vars(model[1])
    with pytest.raises(TypeError, match=r"summary\(\) takes a Module; got a function"):
        mt.summary(lambda x: x)


def test_it_works_within_a_trace():
    shown = []

    @jax.jit
    def run(x):
        shown.append(str(mt.summary(nn.Linear(3, 2, key=jax.random.key(0)), x)))
        return x

    run(jnp.ones((4, 3)))
    assert "float32[4, 3]" in shown[0]
