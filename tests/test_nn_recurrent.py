"""Recurrent layers and cells, against torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_contract import Case, LayerContract, Refusal, numbers
from oracle import actual

import minitorch_jax as mt
from minitorch_jax import nn
from minitorch_jax.nn import recurrent_scan

X = numbers(3, 2, 3)  # (L, N, H_in)
LONG = numbers(4, 3, seed=1)  # (L, H_in)


def h(*shape, seed=2):
    return numbers(*shape, seed=seed)


CASES = [
    Case("RNN", (3, 4), inputs=(X, h(1, 2, 4))),
    Case("RNN", (3, 4), {"nonlinearity": "relu", "bidirectional": True}, inputs=(X,)),
    Case("RNN", (3, 4, 1, "relu", False, True), inputs=(X, h(1, 3, 4))),
    Case("RNN", (3, 4), {"batch_first": True}, inputs=(LONG,)),
    Case("LSTM", (3, 4), inputs=(X, (h(1, 2, 4), h(1, 2, 4, seed=3)))),
    Case("LSTM", (3, 4, 2), {"dropout": 0.5, "bidirectional": True}, inputs=(X, (h(4, 2, 4), h(4, 2, 4))), random=True),
    Case(
        "LSTM",
        (3, 4, 2, True, True, 0.5, True, 2),  # num_layers, bias, batch_first, dropout, bidirectional, proj_size
        inputs=(X,),
        random=True,
    ),
    Case("LSTM", (3, 4), {"proj_size": 1, "bias": False}, inputs=(numbers(1, 3), (h(1, 1), h(1, 4)))),
    Case("GRU", (3, 4), inputs=(X, h(1, 2, 4))),
    Case("GRU", (3, 4, 2), {"bidirectional": True, "dropout": 0.5}, inputs=(X, h(4, 2, 4)), random=True),
    Case("GRU", (3, 4, 1, False, True), inputs=(X,)),
    Case("GRU", (3, 4), inputs=(LONG, h(1, 4))),
    Case("RNNCell", (3, 4), inputs=(numbers(2, 3), h(2, 4))),
    Case("RNNCell", (3, 4, False, "relu"), inputs=(numbers(3),)),
    Case("LSTMCell", (3, 4), inputs=(numbers(2, 3), (h(2, 4), h(2, 4, seed=3)))),
    Case("LSTMCell", (3, 4, False), inputs=(numbers(3),)),
    Case("GRUCell", (3, 4), inputs=(numbers(2, 3), h(2, 4))),
    Case("GRUCell", (3, 4, False), inputs=(numbers(3), h(4))),
]

INITIAL = [
    ("LSTM", (25, 50), {"bidirectional": True, "proj_size": 10}),
    ("RNN", (25, 120)),
    ("GRU", (25, 50)),
    ("LSTMCell", (25, 49)),
    ("RNNCell", (25, 120)),
    ("GRUCell", (25, 50)),
]

REFUSALS = [
    Refusal("RNN", (3, 4), {"nonlinearity": "gelu"}, match="'tanh' or 'relu'; got 'gelu'"),
    Refusal("RNN", (3, 4), inputs=(numbers(3),), match=r"\(L, N, H_in\) or \(L, H_in\) with H_in = 3; got \(3,\)"),
    Refusal("RNN", (3, 4), {"batch_first": True}, inputs=(numbers(2, 5, 4),), match=r"\(N, L, H_in\).*\(2, 5, 4\)"),
    Refusal("RNN", (3, 4), inputs=(X, h(1, 4)), match=r"takes a state h of float32\[1, 2, 4\]; got float32\[1, 4\]"),
    Refusal("LSTM", (0, 4), match="input_size > 0; got 0"),
    Refusal("LSTM", (3, 4.0), match="integer hidden_size > 0; got 4.0"),
    Refusal("LSTM", (3, 4, 0), match="num_layers > 0"),
    Refusal("LSTM", (3, 4), {"bias": 1}, match="True or False for bias"),
    Refusal("LSTM", (3, 4, 2), {"dropout": 1.5}, match="between 0 and 1"),
    Refusal("LSTM", (3, 4), {"proj_size": 4}, match="less than hidden_size=4; got 4"),
    Refusal("LSTM", (3, 4), {"proj_size": -1}, match=r"0 \(no projection\)"),
    Refusal("LSTM", (3, 4), inputs=(numbers(0, 2, 3),), match="at least one step"),
    Refusal("LSTM", (3, 4), inputs=(X, h(1, 2, 4)), match=r"\(h, c\) of float32\[1, 2, 4\], float32\[1, 2, 4\]"),
    Refusal("LSTM", (3, 4), {"proj_size": 2}, inputs=(X, (h(1, 2, 4), h(1, 2, 4))), match=r"float32\[1, 2, 2\], "),
    Refusal(
        "GRU", (3, 4), inputs=(X.astype(np.float16),), match="a weight_ih_l0 of float32, and got an input of float16"
    ),
    Refusal("GRU", (3, 4), {"proj_size": 2}, match="proj_size"),
    Refusal("RNNCell", (-1, 4), match="sizes >= 0"),
    # torch finds out at the first call
    Refusal("RNNCell", (3, 4), {"nonlinearity": "gelu"}, match="'tanh' or 'relu'", torch_too=False),
    Refusal("GRUCell", (3, 4), inputs=(numbers(2, 4),), match=r"\(N, H_in\) or \(H_in,\) with H_in = 3; got \(2, 4\)"),
    Refusal("GRUCell", (3, 4), inputs=(numbers(2, 2, 3),), match=r"got \(2, 2, 3\)"),
    Refusal(
        "LSTMCell", (3, 4), inputs=(numbers(2, 3), (h(2, 4), h(2, 5))), match=r"got float32\[2, 4\], float32\[2, 5\]"
    ),
]


class TestLayers(LayerContract):
    pass


@pytest.mark.parametrize("call", [lambda gru, x: gru(x), mt.jit(lambda gru, x: gru(x))], ids=["eager", "jit"])
def test_torchs_packed_sequence_is_refused_with_a_way_out(call):
    packed = actual.nn.utils.rnn.pack_sequence([actual.zeros(3, 2), actual.zeros(1, 2)])
    with pytest.raises(TypeError, match=r"a torch PackedSequence: pass the padded array.*pad_packed_sequence\(x\)"):
        call(nn.GRU(2, 3), packed)


@pytest.mark.slow
def test_dropout_falls_between_layers_in_training_only():
    layer = nn.GRU(3, 50, num_layers=2, dropout=0.5)
    run = mt.jit(lambda layer, x: layer(x))
    x = jnp.asarray(X)
    mt.seed(1)
    (first, states), (second, _) = run(layer, x), run(layer, x)
    assert not np.allclose(first, second)
    mt.seed(1)
    np.testing.assert_array_equal(run(layer, x)[0], first)
    layer.eval()
    full, full_states = run(layer, x)
    np.testing.assert_array_equal(run(layer, x)[0], full)
    assert not np.allclose(first, full)
    np.testing.assert_allclose(states[0], full_states[0], rtol=1e-5)  # nothing drops what the first layer reads


def test_dropout_on_a_single_layer_warns():
    with pytest.warns(UserWarning, match="dropout=0.5 drops nothing with num_layers=1"):
        nn.LSTM(3, 4, dropout=0.5)


def scans(program):
    """The scans of a program, those in inner programs too."""
    for e in program.eqns:
        if e.primitive.name == "scan":
            yield e.params["jaxpr"]
        for inner in jax.tree.leaves(e.params, is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(inner, "eqns"):
                yield from scans(inner)


def test_the_inputs_of_all_steps_are_projected_at_once():
    """In the scan there is one matrix product, of the state."""
    (scan,) = scans(jax.make_jaxpr(nn.LSTM(3, 4))(jnp.asarray(X)))
    inside = [e.primitive.name for e in scan.eqns]
    assert inside.count("dot_general") == 1 and "scan" not in inside


RUNS = {
    "RNN": ("RNN", {}, False, False),
    "LSTM": ("LSTM", {"bias": False}, False, True),
    "LSTM, projected and packed": ("LSTM", {"proj_size": 2}, True, True),
    "GRU": ("GRU", {}, False, True),
    "GRU, packed": ("GRU", {"bias": False}, True, False),
}


def run_of(name):
    """A run of one direction of a layer in float64, its form without a rule of its own, and arguments for both."""
    kind, kwargs, packed, reverse = RUNS[name]
    layer = getattr(nn, kind)(3, 4, **kwargs)
    weights = recurrent_scan.Weights(*(getattr(layer, f"{w}_l0", None) for w in recurrent_scan.Weights._fields))
    weights = weights if layer._gates_apart else weights._replace(bias_hh=None)
    state = [h(5, kwargs.get("proj_size", 4))] + [h(5, 4, seed=3)] * layer._has_cell
    x = h(3, 5, weights.weight_hh.shape[0], seed=4)
    given = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), float), (tuple(state), x, weights))
    mask = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], bool)[..., None] if packed else None
    static = recurrent_scan.Kind(layer._step, reverse, layer._gates_apart)
    return (
        lambda start, x, weights: recurrent_scan._recurrence(static, start, x, weights, mask),
        lambda start, x, weights: recurrent_scan._steps(static, start, x, weights, mask)[0],
        given,
    )


def derivatives(run, given):
    """Forward mode, reverse mode, reverse mode of some weights alone, and the second derivative, under vmap."""

    def loss(*given):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(run(*given)))

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    direction = jax.tree.map(jnp.cos, given)
    several = jax.tree.map(lambda a: jnp.stack([a, -a]), given)
    only_one = {
        name: jax.grad(lambda w, name=name: loss(given[0], given[1], given[2]._replace(**{name: w})))(weight)
        for name, weight in given[2]._asdict().items()
        if weight is not None
    }
    second = jax.vmap(lambda given: jax.jvp(gradient, given, direction))(several)
    return jax.jvp(run, given, direction), only_one, second


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if "projected" in name else [pytest.mark.slow]) for name in RUNS]
)
def test_derivatives_are_those_of_the_plain_scan(name):
    with jax.enable_x64(True):
        run, plain, given = run_of(name)
        found, expected = (jax.jit(derivatives, static_argnums=0)(f, given) for f in (run, plain))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, expected)


@pytest.mark.parametrize("name", RUNS)
def test_no_scan_adds_up_the_gradient_of_a_weight(name):
    """Each step of the plain form's backward scan adds to it. Ours is one product after the scan, and none before."""
    run, plain, given = run_of(name)

    def sums(run):
        gradient = jax.grad(lambda *given: sum(map(jnp.sum, jax.tree.leaves(run(*given)))), argnums=(1, 2))
        shapes = {jnp.shape(w) for w in jax.tree.leaves(given[2])}
        inner = list(scans(jax.make_jaxpr(gradient)(*given)))
        assert len(inner) == 2
        return sum(v.aval.shape in shapes for scan in inner for e in scan.eqns for v in e.outvars)

    assert sums(plain) > 0 and sums(run) == 0
