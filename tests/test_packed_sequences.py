"""Packed sequences: recurrent layers stop at each sequence's length, with torch's values and gradients."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_contract import numbers
from numpy.testing import assert_allclose, assert_array_equal
from oracle import torch

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.nn import functional as F
from minitorch_jax.nn.functional.linear import product
from minitorch_jax.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    pad_sequence,
    unpack_sequence,
    unpad_sequence,
)

STEPS, SIZE, HIDDEN = 5, 3, 4
SORTED, UNSORTED = [5, 3, 3, 1], [2, 5, 1, 3, 2]
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn": ("RNN", {}),
    "relu": ("RNN", {"nonlinearity": "relu", "bidirectional": True, "bias": False}),
    "lstm": ("LSTM", {}),
    "lstm of two layers": ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "lstm with a projection": ("LSTM", {"proj_size": 2, "bidirectional": True}),
    "gru": ("GRU", {"batch_first": True}),
    "gru of two layers": ("GRU", {"num_layers": 2, "bidirectional": True, "dropout": 0.5}),
}


def pair(name: str) -> tuple[Any, Any]:
    """A layer of ours and one of torch's, with the same weights."""
    kind, settings = LAYERS[name]
    ours = getattr(nn, kind)(SIZE, HIDDEN, **settings).eval()
    theirs = getattr(torch.nn, kind)(SIZE, HIDDEN, **settings).eval()
    state = {}
    for i, (key, array) in enumerate(ours.state_dict().items()):
        state[key] = numbers(*array.shape, seed=50 + i) * 0.4
    ours.load_state_dict(state)
    theirs.load_state_dict({key: torch.tensor(value) for key, value in state.items()})
    return ours, theirs


def starts(layer: Any, batch: int) -> list[np.ndarray]:
    rows = layer.num_layers * (1 + layer.bidirectional)
    sizes = [layer.proj_size or HIDDEN, *([HIDDEN] if isinstance(layer, nn.LSTM) else [])]
    return [numbers(rows, batch, size, seed=20 + i) for i, size in enumerate(sizes)]


def results(layer: Any, x: Any, lengths: Any, states: Any, batch_first: bool, enforce_sorted: bool) -> list[Any]:
    """The padded output and the last states: what a user reads."""
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted)
    output, last = layer(packed, None if states is None else states[0] if len(states) == 1 else tuple(states))
    assert isinstance(output, PackedSequence)
    padded, given = pad_packed_sequence(output, batch_first)
    return [padded, *(last if isinstance(last, tuple) else [last])]


@pytest.mark.one_in(9)
@pytest.mark.parametrize(
    ("lengths", "started"), [(SORTED, False), (UNSORTED, True)], ids=["sorted, from zeros", "unsorted, from states"]
)
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_torchs(name: str, lengths: list[int], started: bool) -> None:
    ours, theirs = pair(name)
    batch_first, is_sorted, batch = ours.batch_first, lengths is SORTED, len(lengths)
    x = numbers(*((batch, STEPS) if batch_first else (STEPS, batch)), SIZE)
    states = starts(ours, batch) if started else None
    rnn = torch.nn.utils.rnn
    x_torch = torch.tensor(x, requires_grad=True)
    states_torch = [torch.tensor(state, requires_grad=True) for state in states or ()]
    packed = rnn.pack_padded_sequence(x_torch, lengths, batch_first, is_sorted)
    given = states_torch[0] if len(states_torch) == 1 else tuple(states_torch) or None
    output, last = theirs(packed, given)
    padded, got_lengths = rnn.pad_packed_sequence(output, batch_first)
    expected = [padded, *(last if isinstance(last, tuple) else [last])]
    assert np.asarray(got_lengths).tolist() == lengths
    weights = [numbers(*np.asarray(array).shape, seed=30 + i) for i, array in enumerate(expected)]
    loss: Any = sum((array * torch.tensor(weight)).sum() for array, weight in zip(expected, weights, strict=True))
    loss.backward()

    def loss_fn(layer: Any, x: Any, states: Any, lengths: Any) -> Any:
        arrays = results(layer, x, lengths, states, batch_first, is_sorted)
        return sum((array * weight).sum() for array, weight in zip(arrays, weights, strict=True)), arrays

    of_all = jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1, 2), has_aux=True))
    (_, found), gradients = of_all(ours, jnp.asarray(x), states, jnp.array(lengths))
    for mine, their in zip(found, expected, strict=True):
        assert_allclose(mine, np.asarray(their), rtol=2e-5, atol=2e-6)
    assert_allclose(gradients[1], np.asarray(x_torch.grad), rtol=2e-4, atol=2e-5)
    for mine, their in zip(gradients[2] or (), states_torch, strict=True):
        assert_allclose(mine, np.asarray(their.grad), rtol=2e-4, atol=2e-5)
    mine = gradients[0].state_dict()
    for key in mine:
        assert_allclose(mine[key], np.asarray(getattr(theirs, key).grad), rtol=2e-4, atol=2e-5, err_msg=key)


@pytest.mark.slow
def test_a_sequence_ends_as_it_does_alone() -> None:
    ours, _ = pair("lstm of two layers")
    lengths = [2, 4, 1, 4]
    x = jnp.asarray(numbers(4, STEPS, SIZE))  # one step longer than the longest
    padded, *states = results(ours, x, lengths, None, True, False)
    for i, length in enumerate(lengths):
        output, last = ours(x[i, :length])
        assert_allclose(padded[i, :length], output, rtol=1e-5, atol=1e-6)
        assert padded.shape == (4, STEPS, 8) and not np.any(padded[i, length:])
        for mine, expected in zip(states, last, strict=True):
            assert_allclose(mine[:, i], expected, rtol=1e-5, atol=1e-6)


# -- the parts of torch's class ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("lengths", [SORTED, UNSORTED], ids=["sorted", "unsorted"])
def test_parts_are_torchs(lengths: list[int], batch_first: bool) -> None:
    x = numbers(*((len(lengths), STEPS) if batch_first else (STEPS, len(lengths))), 2)
    is_sorted, rnn = lengths is SORTED, torch.nn.utils.rnn
    mine = pack_padded_sequence(x, lengths, batch_first, is_sorted)
    theirs = rnn.pack_padded_sequence(torch.tensor(x), lengths, batch_first, is_sorted)
    for name in ("data", "batch_sizes", "sorted_indices", "unsorted_indices"):
        expected = getattr(theirs, name)
        found = getattr(mine, name)
        assert (expected is None) == (found is None)
        if found is not None:
            assert_array_equal(found, np.asarray(expected))
    # the idiom of torch for what works on elements
    doubled = PackedSequence(mine.data * 2, mine.batch_sizes, mine.sorted_indices, mine.unsorted_indices)
    other = rnn.PackedSequence(theirs.data * 2, theirs.batch_sizes, theirs.sorted_indices, theirs.unsorted_indices)
    for made in (
        doubled,
        mine._replace(data=mine.data * 2),
        PackedSequence((mine[0] * 2, mine[1]), None, mine[2], mine[3]),
    ):
        padded, found = pad_packed_sequence(made, batch_first, -1.0)
        expected, their_lengths = rnn.pad_packed_sequence(other, batch_first, -1.0)
        assert_array_equal(padded, np.asarray(expected))
        assert_array_equal(found, np.asarray(their_lengths))
    data, sizes, order, inverse = mine
    assert_array_equal(data, mine.data)
    assert (order is None) == (inverse is None) == is_sorted and sizes.tolist() == mine.batch_sizes.tolist()
    for one, two in zip(unpack_sequence(mine), rnn.unpack_sequence(theirs), strict=True):
        assert_array_equal(one, np.asarray(two))


def test_the_time_axis_keeps_the_length_of_the_padded_input() -> None:
    """In torch it is the longest sequence's. Here eager and compiled code agree."""
    x = jnp.asarray(numbers(STEPS, 2, 3))
    packed = pack_padded_sequence(x, [3, 2])
    assert packed.padded.shape == (STEPS, 2, 3) and packed.batch_sizes.tolist() == [2, 2, 1, 0, 0]
    assert packed.data.shape == (5, 3) and not np.any(packed.padded[3:])
    assert PackedSequence(packed.data, packed.batch_sizes).padded.shape == x.shape
    for total in (3, 4, 5, 7):
        expected = np.zeros((total, 2, 3), np.float32)
        expected[:5] = packed.padded[:total] if total < 5 else packed.padded
        assert_array_equal(pad_packed_sequence(packed, total_length=total)[0], expected)
    padded, lengths = jax.jit(lambda p: pad_packed_sequence(p, True, -1.0, total_length=6))(packed)
    assert padded.shape == (2, 6, 3) and lengths.tolist() == [3, 2]
    assert np.all(padded[1, 2:] == -1) and not np.any(padded[0, :3] == -1)
    with pytest.raises(ValueError, match="total_length must be at least 3, the longest length; got 2"):
        pad_packed_sequence(packed, total_length=2)
    with pytest.raises(
        ValueError, match="must be at least 5, the length of the padded input, since .*: slice the result"
    ):
        jax.jit(lambda p: pad_packed_sequence(p, total_length=4))(packed)


def test_what_follows_a_sequence_reaches_nothing() -> None:
    x = np.full((3, 2, 1), np.nan, np.float32)
    x[:2, 0], x[:1, 1] = 1.0, 2.0
    packed = pack_padded_sequence(x, np.array([2, 1]))
    assert_array_equal(packed.padded[..., 0], [[1, 2], [1, 0], [0, 0]])
    gradient = jax.grad(lambda x: (pack_padded_sequence(x, [2, 1]).padded ** 2).sum())(jnp.asarray(x))
    assert_array_equal(gradient[..., 0], [[2, 4], [2, 0], [0, 0]])
    numbers_ = pack_padded_sequence(np.arange(6).reshape(3, 2), [3, 2])
    assert numbers_.padded.tolist() == [[0, 1], [2, 3], [4, 0]] and numbers_.padded.dtype == jnp.int32


def test_sequences_are_packed_and_unpacked() -> None:
    sequences = [jnp.arange(3.0), jnp.arange(5.0), jnp.arange(1.0)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    assert packed.lengths.tolist() == [3, 5, 1] and packed.sorted_indices.tolist() == [1, 0, 2]
    for back in (unpack_sequence(packed), unpad_sequence(pad_sequence(sequences), [3, 5, 1])):
        for one, two in zip(back, sequences, strict=True):
            assert isinstance(one, jax.Array)
            assert_array_equal(one, two)
    by_batch = unpad_sequence(pad_sequence(sequences, True), packed.lengths, batch_first=True)
    assert [array.tolist() for array in by_batch] == [array.tolist() for array in sequences]
    assert pack_sequence(iter(sequences[:1])).padded.shape == (3, 1)


# -- as a pytree, in compiled code ------------------------------------------------------------------------------------


def test_it_is_a_pytree_of_two_arrays() -> None:
    packed = pack_padded_sequence(numbers(STEPS, 4, SIZE), SORTED)
    leaves, treedef = jax.tree.flatten(packed)
    assert [leaf.shape for leaf in leaves] == [(5, 4, 3), (4,)]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(packed)]
    assert paths == [".padded", ".lengths"]
    for copied in (jax.tree.unflatten(treedef, leaves), copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert_array_equal(copied.data, packed.data)
    assert repr(packed) == "PackedSequence(float32[5, 4, 3], lengths=[5, 3, 3, 1])"
    assert packed.astype(jnp.bfloat16).data.dtype == jnp.bfloat16
    moved = jax.device_put(packed, jax.devices()[0])
    assert moved.lengths.tolist() == SORTED and moved.batch_sizes.tolist() == packed.batch_sizes.tolist()
    seen: list[str] = []
    jax.jit(lambda p: seen.append(repr(p)))(packed)
    assert seen == ["PackedSequence(float32[5, 4, 3], lengths=int32[4])"]
    assert packed.mask.astype(int).sum(0).tolist() == SORTED and packed.mask.shape == (5, 4)


class Tagger(nn.Module):
    """A word's class from its sequence, as in torch's tutorials."""

    def __init__(self) -> None:
        self.embed = nn.Embedding(7, 3)
        self.lstm = nn.LSTM(3, 4, bidirectional=True, batch_first=True)
        self.out = nn.Linear(8, 2)

    def forward(self, words: Any, lengths: Any) -> Any:
        packed = pack_padded_sequence(self.embed(words), lengths, batch_first=True, enforce_sorted=False)
        output, _ = self.lstm(packed)
        return self.out(pad_packed_sequence(output, batch_first=True)[0])


def batches(count: int) -> tuple[Any, Any, Any]:
    random = np.random.default_rng(0)
    words = random.integers(0, 7, (count, 4, 6)).astype(np.int32)
    lengths = random.integers(1, 7, (count, 4)).astype(np.int32)
    classes = np.where(np.arange(6) < lengths[..., None], words % 2, -100).astype(np.int32)
    return words, lengths, classes


def tag_loss(model: Any, words: Any, lengths: Any, classes: Any) -> Any:
    scores = model(words, lengths)
    return F.cross_entropy(scores.reshape(-1, 2), classes.reshape(-1), ignore_index=-100)


@pytest.mark.slow
def test_training_is_the_same_in_every_way_and_other_lengths_compile_nothing() -> None:
    data, trained = batches(6), []

    def train(way: str) -> Any:
        mt.seed(0)
        model = Tagger()
        opt = optim.Adam([model], lr=0.02)

        def step(words: Any, lengths: Any, classes: Any) -> Any:
            opt.zero_grad()
            loss = mt.backward(tag_loss, model, words, lengths, classes)
            opt.step()
            return loss

        if way == "scan":
            return mt.scan(step, *data), model
        run = mt.jit(step) if way == "jit" else step
        losses = [run(*batch) for batch in zip(*data, strict=True)]
        if way == "jit":
            assert run.num_compiles == 1
        return np.array(losses), model

    for way in ("eager", "jit", "scan"):  # in eager code, `mt.backward` compiles
        losses, model = train(way)
        trained.append((losses, model.state_dict()))
        assert np.isfinite(losses).all() and losses[-1] < losses[0]
    for losses, state in trained[1:]:
        assert_allclose(losses, trained[0][0], rtol=1e-5)
        for key, array in state.items():
            assert_allclose(array, trained[0][1][key], rtol=1e-4, atol=1e-6)


def test_it_goes_into_and_out_of_compiled_functions() -> None:
    gru = nn.GRU(SIZE, HIDDEN)
    first = pack_padded_sequence(numbers(STEPS, 4, SIZE), SORTED)
    second = pack_padded_sequence(numbers(STEPS, 4, SIZE, seed=1), [4, 4, 2, 1])
    run = mt.jit(lambda gru, packed: gru(packed))
    for packed in (first, second):
        output, last = run(gru, packed)
        expected, expected_last = gru(packed)
        assert isinstance(output, PackedSequence) and output.lengths.tolist() == packed.lengths.tolist()
        assert_allclose(output.data, expected.data, rtol=1e-5, atol=1e-6)
        assert_allclose(last, expected_last, rtol=1e-5, atol=1e-6)
    assert run.num_compiles == 1
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), first, second)
    states = mt.scan(lambda packed: gru(packed)[1], both)
    assert_allclose(states[1], last, rtol=1e-5, atol=1e-6)
    assert_allclose(jax.vmap(lambda packed: gru(packed)[1])(both)[1], last, rtol=1e-5, atol=1e-6)


def test_dropout_falls_between_layers_and_not_past_the_ends() -> None:
    layer = nn.LSTM(SIZE, 50, num_layers=2, dropout=0.5)
    run = mt.jit(lambda layer, packed: layer(packed))
    packed = pack_padded_sequence(numbers(STEPS, 2, SIZE), [5, 2])
    mt.seed(1)
    (first, states), (second, _) = run(layer, packed), run(layer, packed)
    assert not np.allclose(first.padded, second.padded) and not np.any(first.padded[2:, 1])
    layer.eval()
    full, full_states = run(layer, packed)
    assert not np.allclose(first.padded, full.padded)
    assert_allclose(states[0][0], full_states[0][0], rtol=1e-5)  # nothing drops what the first layer reads


def test_lower_precision() -> None:
    layer = nn.LSTM(SIZE, HIDDEN)
    packed = pack_padded_sequence(numbers(STEPS, 2, SIZE), [5, 2])
    full = layer(packed)[0]
    with mt.autocast(jnp.bfloat16):
        under, _ = layer(packed)
    half, _ = layer.astype(jnp.bfloat16)(packed.astype(jnp.bfloat16))
    assert under.padded.dtype == half.padded.dtype == jnp.bfloat16
    for output in (under, half):
        assert_allclose(output.padded.astype(jnp.float32), full.padded, atol=0.03)
        assert not np.any(output.padded[2:, 1])


def test_a_layer_without_lengths_is_the_program_it_was() -> None:
    """The scan of a layer that gets an array is the plain one: no mask, no choice."""
    for kind, layer in [("LSTM", nn.LSTM(SIZE, HIDDEN)), ("GRU", nn.GRU(SIZE, HIDDEN)), ("RNN", nn.RNN(SIZE, HIDDEN))]:
        x = jnp.asarray(numbers(STEPS, 2, SIZE))
        text = jax.jit(lambda layer, x: layer(x)).lower(layer, x).as_text()
        masked = jax.jit(lambda layer, x: layer(x)).lower(layer, pack_padded_sequence(x, [5, 2])).as_text()
        assert "stablehlo.while" in text and "stablehlo.select" not in text, kind
        assert masked.count("stablehlo.select") >= 2 and masked.count("stablehlo.while") == text.count(
            "stablehlo.while"
        )
        program = jax.make_jaxpr(layer)(x)
        (inner,) = [e for e in program.eqns if e.params.get("name") == "scan"]
        (run,) = inner.params["jaxpr"].eqns
        (scan,) = [e for e in run.params["call_jaxpr"].eqns if e.primitive.name == "scan"]
        state = [jnp.zeros((2, HIDDEN))] * (1 + (kind == "LSTM"))
        rows = jnp.zeros((2, layer._gates * HIDDEN))
        weights = [layer.weight_hh_l0] + ([layer.bias_hh_l0] if layer._gates_apart else [])

        def plain(*given: Any, layer: Any = layer, count: int = len(weights), size: int = len(state)) -> Any:
            state = given[count : count + size]
            return layer._step(given[-1], product(state[0], *given[:count]), state)

        expected = [e.primitive.name for e in jax.make_jaxpr(plain)(*weights, *state, rows).eqns]
        found = [e.primitive.name for e in scan.params["jaxpr"].eqns]
        assert found == expected, kind


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "settings", "error", "message"),
    [
        ([3, 2], {}, ValueError, r"a length for each of 3 sequences, of shape \(3,\); got int64\[2\]"),
        ([4, 2, 0], {}, ValueError, r"lengths between 1 and 5, .*; got \[4, 2, 0\]"),
        ([6, 2, 1], {}, ValueError, r"lengths between 1 and 5, .*; got \[6, 2, 1\]"),
        ([2, 3, 1], {}, ValueError, r"never increase; got \[2, 3, 1\]: pass enforce_sorted=False"),
        (np.array([2, 3, 1]), {"batch_first": False}, ValueError, "pass enforce_sorted=False"),
        (jnp.array([2, 3, 1]), {}, ValueError, "pass enforce_sorted=False"),
        ([3.0, 2.0, 1.0], {}, TypeError, "takes lengths as a list or a one-dimensional array of integers"),
        ([[3, 2, 1]], {}, TypeError, "one-dimensional array of integers"),
        (3, {}, TypeError, r"of integers; got 3"),
        ([1] * 5, {"batch_first": True}, ValueError, "between 1 and 3|for each of"),
    ],
)
def test_lengths_that_do_not_fit(lengths: Any, settings: dict[str, Any], error: Any, message: str) -> None:
    x = jnp.ones((5, 3, 2))
    if settings.get("batch_first"):
        lengths = [4] * 5
    with pytest.raises(error, match=message):
        pack_padded_sequence(x, lengths, **settings)


def test_other_arguments_that_do_not_fit() -> None:
    packed = pack_sequence([jnp.ones(3), jnp.ones(2)])
    for call, error, message in [
        (lambda: pack_padded_sequence(jnp.ones(3), [1]), ValueError, r"shape \(T, N, \*\); got float32\[3\]"),
        (lambda: pack_padded_sequence(jnp.ones(3), [1], True), ValueError, r"shape \(N, T, \*\); got float32\[3\]"),
        (lambda: pack_padded_sequence([[1.0]], [1]), TypeError, r"pack_padded_sequence takes an array; got .*\(list\)"),
        (lambda: pack_sequence([jnp.ones(1), jnp.ones(2)]), ValueError, "pass enforce_sorted=False"),
        (lambda: pack_sequence([]), ValueError, "the list of sequences is empty"),
        (lambda: pack_sequence(3), TypeError, "takes a list of arrays"),
        (lambda: pad_packed_sequence(jnp.ones(3)), TypeError, r"takes a PackedSequence; .*`pack_padded_sequence\(x, l"),
        (lambda: unpack_sequence([1]), TypeError, r"unpack_sequence takes a PackedSequence; got \[1\] \(list\)"),
        (lambda: unpad_sequence(jnp.ones((2, 3)), [1, 2]), ValueError, "between 0 and 2 for each of 3 sequences"),
        (lambda: unpad_sequence(jnp.ones((2, 1)), [3]), ValueError, "between 0 and 2 for each of 1"),
        (lambda: unpad_sequence(jnp.ones(2), [3]), ValueError, r"two or more axes; got float32\[2\]"),
        (lambda: PackedSequence(jnp.ones(3)), TypeError, "PackedSequence takes batch_sizes as a list"),
        (lambda: PackedSequence(jnp.ones(3), [1, 2]), ValueError, r"never\s+increase; got float32\[3\] and \[1, 2\]"),
        (lambda: PackedSequence(jnp.ones(3), [2, 2]), ValueError, r"sum of batch_sizes"),
        (lambda: PackedSequence(jnp.ones(3), [2, 1], [0, 0]), ValueError, r"a permutation of 0 to 1; got \[0, 0\]"),
        (lambda: nn.GRU(3, 4)(packed), ValueError, r"\(T, N, H_in\), in a PackedSequence, with H_in = 3; got \(3, 2\)"),
        (lambda: nn.GRU(3, 4)(pack_sequence([jnp.ones((2, 4))])), ValueError, r"got \(2, 1, 4\)"),
        (
            lambda: nn.GRU(1, 4)(pack_sequence([jnp.ones((2, 1))]), jnp.ones((1, 4))),
            ValueError,
            r"a state h of float32\[1, 1, 4\]; got float32\[1, 4\]",
        ),
    ]:
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(AttributeError):
        packed.data = jnp.ones(3)  # type: ignore[misc]


def test_what_compiled_code_does_not_know() -> None:
    packed = pack_sequence([jnp.ones((3, 2)), jnp.ones((2, 2))])
    for name, fix in [
        ("data", "pad_packed_sequence(packed)[0]"),
        ("batch_sizes", "packed.mask.sum(1)"),
        ("sorted_indices", None),
    ]:
        if fix is not None:
            with pytest.raises(TypeError, match=f"PackedSequence.{name} depends on the lengths.*{re.escape(fix)}"):
                jax.jit(lambda packed, name=name: getattr(packed, name))(packed)
    with pytest.raises(TypeError, match="sorted_indices depends on the lengths.*in the order of the batch"):
        jax.jit(lambda x, n: pack_padded_sequence(x, n, enforce_sorted=False).sorted_indices)(jnp.ones((3, 2)), [1, 2])
    with pytest.raises(TypeError, match="keep the batch padded, with a mask"):
        jax.jit(unpack_sequence)(packed)
    with pytest.raises(TypeError, match="batch_sizes must be known"):
        jax.jit(PackedSequence)(jnp.ones(3), jnp.array([2, 1]))
    # what is known there
    known = jax.jit(lambda a, b: pack_sequence([a, b]).data)(jnp.ones((3, 2)), jnp.zeros((2, 2)))
    assert known[:, 0].tolist() == [1, 0, 1, 0, 1]
    assert jax.jit(lambda x: PackedSequence(x, [2, 1]).padded)(jnp.arange(3)).tolist() == [[0, 1], [2, 0]]
    # its masks hold in compiled code
    assert jax.jit(lambda p: p.mask.sum(1))(packed).tolist() == packed.batch_sizes.tolist() == [2, 2, 1]


@pytest.mark.slow
def test_lengths_out_of_range_in_compiled_code() -> None:
    gru = nn.GRU(1, 2)
    x, start = jnp.ones((3, 4, 1)), jnp.full((1, 4, 2), 0.5)
    output, last = jax.jit(lambda x, n: gru(pack_padded_sequence(x, n), start))(x, jnp.array([3, 4, 0, -1]))
    assert not np.isnan(output.padded[:, 0]).any() and np.isnan(output.padded[:, 1]).all()
    assert np.isnan(last[:, 1]).all() and not np.any(output.padded[:, 2]) and np.all(last[:, 2] == 0.5)
    with pytest.raises(ValueError, match="pass enforce_sorted=False"):  # which compiled code could not say
        jax.jit(pack_padded_sequence)(x, jnp.array([1, 2, 3, 3])).data
