"""Lookups in tables against torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_contract import Case, LayerContract, Refusal, integers, numbers
from oracle import torch

import minitorch_jax as mt
from minitorch_jax import nn, optim

F = nn.functional
WORDS = integers(5, 2, 3)
LINE = integers(5, 7, seed=1)
OFFSETS = np.array([0, 2, 2, 6], np.int32)
ENDS = np.array([0, 2, 2, 7], np.int32)  # with include_last_offset, three bags
TWICE = np.array([[0, 3], [3, 0]], np.int32)
SCALES = numbers(7, seed=2)
TABLE = numbers(5, 3, seed=3)

CASES = [
    Case("Embedding", (5, 3), inputs=(WORDS,)),
    Case("Embedding", (5, 3), inputs=(np.array(2, np.int32),)),
    Case("Embedding", (5, 3, 1), inputs=(WORDS,)),
    Case("Embedding", (5, 3, -1), inputs=(LINE,)),
    Case("Embedding", (5, 3), {"max_norm": 1.0}, inputs=(WORDS,)),
    Case("Embedding", (5, 3), {"max_norm": 1.0, "norm_type": 1.0}, inputs=(WORDS,)),
    Case("Embedding", (5, 3, 0, 1.5, float("inf"), True), inputs=(LINE,)),
    Case("Embedding", (5, 3), {"scale_grad_by_freq": True}, inputs=(LINE,)),
    Case("Embedding", (5, 3, 2), {"scale_grad_by_freq": True}, inputs=(LINE,)),
    Case("Embedding", (5, 1), inputs=(np.zeros((0, 2), np.int32),)),
    *(Case("EmbeddingBag", (5, 3), {"mode": mode}, inputs=(WORDS,)) for mode in ("mean", "sum", "max")),
    *(
        Case("EmbeddingBag", (5, 3), {"mode": mode, "padding_idx": 3, **options}, inputs=(LINE, offsets))
        for mode in ("mean", "sum", "max")
        for options, offsets in [({}, OFFSETS), ({"include_last_offset": True}, ENDS)]
    ),
    *(
        Case("EmbeddingBag", (5, 3), {"mode": mode, "padding_idx": -2}, inputs=(np.array([[3, 3], [3, 1]], np.int32),))
        for mode in ("mean", "sum", "max")
    ),
    # scale_grad_by_freq: where not all are as frequent, torch 2.13 divides by the frequency of another word
    Case("EmbeddingBag", (5, 3, 1.0, 1.0, True, "sum"), inputs=(TWICE[0].repeat(2), np.array([0, 1], np.int32))),
    Case("EmbeddingBag", (5, 3), {"max_norm": 1.0, "mode": "max"}, inputs=(WORDS,)),
    Case("EmbeddingBag", (5, 3), {"mode": "mean", "scale_grad_by_freq": True}, inputs=(TWICE,)),
    Case("EmbeddingBag", (5, 3), {"mode": "sum"}, inputs=(LINE, OFFSETS, SCALES)),
    Case("EmbeddingBag", (5, 3), {"mode": "sum", "padding_idx": 3}, inputs=(LINE, OFFSETS, SCALES)),
    Case("EmbeddingBag", (5, 3), {"mode": "sum"}, inputs=(WORDS,), call={"per_sample_weights": numbers(2, 3)}),
    Case("embedding", (TABLE,), inputs=(WORDS,)),
    Case("embedding", (TABLE, -2, 1.0, 3.0), inputs=(WORDS,)),
    Case("embedding_bag", (TABLE,), inputs=(WORDS,)),
    Case("embedding_bag", (TABLE, OFFSETS, 1.0), {"mode": "sum", "per_sample_weights": SCALES}, inputs=(LINE,)),
    Case("one_hot", (5,), inputs=(WORDS,), differentiable=False),
]
CASES += [  # as functions of the table
    Case("embedding_bag", inputs=(LINE, TABLE, OFFSETS)),
    Case("embedding_bag", (), {"mode": "max"}, inputs=(WORDS, TABLE)),
    Case("embedding", (), {"padding_idx": 2, "scale_grad_by_freq": True}, inputs=(WORDS, TABLE)),
]

INITIAL = [("Embedding", (60, 50)), ("Embedding", (60, 50, 7)), ("EmbeddingBag", (60, 50), {"padding_idx": -1})]

REFUSALS = [
    Refusal("Embedding", (-1, 3), match="sizes >= 0; got -1 and 3"),
    Refusal("Embedding", (5, 3, 5), match="within num_embeddings, 5; got 5"),
    Refusal("Embedding", (5, 3, -6), match="within num_embeddings, 5; got -6"),
    Refusal("Embedding", (5, 3), {"sparse": True}, match="gradients are dense", torch_too=False),
    Refusal("Embedding", (5, 3), inputs=(numbers(2),), match="indices, which are integers; got float32"),
    Refusal("Embedding", (5, 3), inputs=(np.ones(2, bool),), match="indices, which are integers; got bool"),
    Refusal("EmbeddingBag", (5, 3), {"padding_idx": 5}, match="within num_embeddings, 5; got 5"),
    Refusal("EmbeddingBag", (5, 3), {"sparse": True}, match="gradients are dense", torch_too=False),
    Refusal("EmbeddingBag", (5, 3), {"mode": "median"}, inputs=(WORDS,), match="'sum', 'mean' or 'max'; got 'median'"),
    Refusal(
        "EmbeddingBag", (5, 3), {"mode": "max", "scale_grad_by_freq": True}, inputs=(WORDS,), match="does not support"
    ),
    Refusal("EmbeddingBag", (5, 3), inputs=(WORDS, OFFSETS), match="takes no offsets with an input"),
    Refusal("EmbeddingBag", (5, 3), inputs=(LINE,), match=r"\(N,\) with offsets \(B,\); got \(7,\) and None"),
    Refusal("EmbeddingBag", (5, 3), inputs=(LINE, WORDS), match=r"got \(7,\) and \(2, 3\)"),
    Refusal("EmbeddingBag", (5, 3), inputs=(LINE, numbers(2)), match="offsets that are integers; got float32"),
    Refusal("EmbeddingBag", (5, 3), inputs=(integers(5, 2, 2, 2),), match=r"got \(2, 2, 2\) and None"),
    Refusal("EmbeddingBag", (5, 3), inputs=(LINE, OFFSETS, SCALES), match="need mode='sum'; got mode='mean'"),
    Refusal(
        "EmbeddingBag",
        (5, 3),
        {"mode": "sum"},
        inputs=(WORDS,),
        call={"per_sample_weights": SCALES},
        match=r"\(2, 3\); got \(7,\)",
    ),
    Refusal(
        "EmbeddingBag",
        (5, 3),
        {"include_last_offset": True},
        inputs=(LINE, np.zeros(0, np.int32)),
        match="at least one offset",
    ),
    Refusal("embedding", (numbers(3),), inputs=(LINE,), match=r"\(num_embeddings, embedding_dim\); got \(3,\)"),
    Refusal("embedding", (TABLE, 5), inputs=(LINE,), match="within num_embeddings, 5; got 5"),
    Refusal("embedding", (TABLE,), {"sparse": True}, inputs=(LINE,), match="dense", torch_too=False),
    Refusal("one_hot", (5,), inputs=(numbers(2),), match="integers; got float32"),
    Refusal("one_hot", (0,), inputs=(LINE,), match="num_classes > 0, or -1; got 0"),
    Refusal("one_hot", inputs=(np.zeros(0, np.int32),), match="cannot infer num_classes"),
]


class TestLayers(LayerContract):
    pass


@pytest.mark.one_in(2)
@pytest.mark.parametrize("wrong", [-1, 5, 2**31 - 1, -(2**31)])
def test_an_index_out_of_range_gives_nan_and_changes_nothing(wrong):
    index = jnp.array([1, wrong], jnp.int32)
    out = np.asarray(F.embedding(index, TABLE))
    np.testing.assert_array_equal(out[0], TABLE[1])
    assert np.isnan(out[1]).all()
    gradient = jax.grad(lambda table: F.embedding(index, table)[0].sum())(jnp.asarray(TABLE))
    np.testing.assert_array_equal(np.flatnonzero(gradient), [3, 4, 5])
    layer = nn.Embedding(5, 3, max_norm=0.1, key=jax.random.key(0))
    before = np.asarray(layer.weight)
    layer(index)
    changed = (np.asarray(layer.weight) != before).any(1)
    np.testing.assert_array_equal(changed, [False, True, False, False, False])
    for mode in ("sum", "mean", "max"):
        bags = np.asarray(F.embedding_bag(jnp.array([[1, 1], [2, wrong]], jnp.int32), TABLE, mode=mode))
        assert np.isfinite(bags[0]).all() and np.isnan(bags[1]).all()


@pytest.mark.parametrize("offsets", [[1, 2], [0, 8], [0, 3, 2], [-1, 0]])
def test_wrong_offsets_give_nan(offsets):
    """Torch raises, or (for those that go down) reads anything."""
    assert np.isnan(jax.jit(F.embedding_bag)(LINE, TABLE, jnp.array(offsets))).all()


def test_what_comes_after_the_last_offset_belongs_to_no_bag():
    out = F.embedding_bag(LINE, TABLE, np.array([0, 2, 4], np.int32), mode="sum", include_last_offset=True)
    np.testing.assert_allclose(out, [TABLE[LINE[:2]].sum(0), TABLE[LINE[2:4]].sum(0)], rtol=1e-6)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_scale_gradients_by_frequency_as_embedding_does(mode):
    def bags(table):
        return (F.embedding_bag(WORDS, table, scale_grad_by_freq=True, mode=mode) ** 2).sum()

    def looked_up(table):
        return (getattr(F.embedding(WORDS, table, scale_grad_by_freq=True), mode)(1) ** 2).sum()

    np.testing.assert_allclose(*(jax.grad(f)(jnp.asarray(TABLE)) for f in (bags, looked_up)), rtol=1e-5)


def test_bags_without_anything():
    assert F.embedding_bag(LINE, TABLE, np.zeros(0, np.int32)).shape == (0, 3)
    for mode in ("sum", "mean", "max"):
        np.testing.assert_array_equal(F.embedding_bag(np.zeros((2, 0), np.int32), TABLE, mode=mode), jnp.zeros((2, 3)))
        empty = F.embedding_bag(np.zeros(0, np.int32), TABLE, np.zeros(2, np.int32), mode=mode)
        np.testing.assert_array_equal(empty, jnp.zeros((2, 3)))


@pytest.mark.parametrize("wrap", [lambda f: f, mt.jit], ids=["eager", "jit"])
def test_max_norm_changes_the_weight_while_it_is_trained(wrap):
    """Lookups, gradients and steps in turn, against torch's; a layer tied to the table sees the new rows too."""
    theirs = torch.nn.Embedding(5, 3, max_norm=0.8)
    ours, decoder = nn.Embedding(5, 3, max_norm=0.8), nn.Linear(3, 5, bias=False)
    ours.load_state_dict(theirs.state_dict())
    decoder.tie("weight", ours, "weight")
    opt, torch_opt = optim.SGD([ours], lr=0.5), torch.optim.SGD(theirs.parameters(), lr=0.5)
    other = numbers(2, 3, seed=8)

    def loss(x, other):
        return (ours(x) ** 2).sum() + (decoder(other) ** 2).sum() + ours(x).sum()

    @wrap
    def step(x, other):
        opt.zero_grad()
        value = mt.backward(loss, x, other)
        opt.step()
        return value

    for seed in range(3):
        x = integers(5, 4, seed=seed)
        torch_opt.zero_grad()
        looked_up = theirs(torch.from_numpy(x).long())
        value = (looked_up**2).sum() + ((torch.from_numpy(other) @ theirs.weight.T) ** 2).sum() + looked_up.sum()
        value.backward()
        torch_opt.step()
        np.testing.assert_allclose(step(x, other), value.item(), rtol=1e-5)
        np.testing.assert_allclose(ours.weight, theirs.weight.detach().numpy(), rtol=1e-4, atol=1e-6)


def test_max_norm_of_a_frozen_table_and_in_eval_mode():
    table = 10 * numbers(5, 3)
    ours = nn.Embedding.from_pretrained(jnp.asarray(table), max_norm=1.0).eval()
    theirs = torch.nn.Embedding.from_pretrained(torch.from_numpy(table.copy()), max_norm=1.0).eval()
    np.testing.assert_allclose(ours(WORDS), theirs(torch.from_numpy(WORDS).long()).numpy(), rtol=1e-6)
    np.testing.assert_allclose(ours.weight, theirs.weight.numpy(), rtol=1e-6)
    assert len(ours.parameters()) == 0


@pytest.mark.parametrize("name", ["Embedding", "EmbeddingBag"])
def test_from_pretrained(name):
    kind, theirs = getattr(nn, name), getattr(torch.nn, name)
    table = jnp.asarray(TABLE)
    frozen = kind.from_pretrained(table)
    assert len(frozen.parameters()) == 0 and list(frozen.state_dict()) == ["weight"]
    np.testing.assert_array_equal(frozen.weight, TABLE)
    options = {"padding_idx": -1, "max_norm": 2.0, "norm_type": 1.0, "scale_grad_by_freq": True, "freeze": False}
    layer = kind.from_pretrained(table, **options)
    assert repr(layer) == repr(theirs.from_pretrained(torch.from_numpy(TABLE), **options))
    assert len(layer.parameters()) == 1
    np.testing.assert_array_equal(layer.weight, TABLE)  # the padding row too is what was given
    new = kind(5, 3, **{k: v for k, v in options.items() if k != "freeze"})
    assert jax.tree.structure(new) == jax.tree.structure(layer)
    layer(WORDS)
    np.testing.assert_array_equal(table, TABLE)  # the caller's array stays theirs
    with pytest.raises(ValueError, match=r"from_pretrained takes an array of shape .*; got \(3,\)"):
        kind.from_pretrained(jnp.ones(3))
    with pytest.raises(TypeError, match="must be floating"):
        kind.from_pretrained(jnp.ones((3, 2), jnp.int32))
    with pytest.raises(ValueError, match="padding_idx must be within"):
        kind.from_pretrained(table, padding_idx=5)


def test_from_pretrained_takes_torchs_arguments():
    from layer_contract import compare_arguments

    for name in ("Embedding", "EmbeddingBag"):
        compare_arguments(getattr(nn, name).from_pretrained, getattr(torch.nn, name).from_pretrained)


@pytest.mark.parametrize("padding_idx", [2, -3])
def test_the_padding_row_starts_at_zero_and_gets_no_gradient(padding_idx):
    layer = nn.Embedding(5, 3, padding_idx)
    assert layer.padding_idx == 2
    np.testing.assert_array_equal(layer.weight[2], jnp.zeros(3))
    mt.backward(lambda x: layer(x).sum(), jnp.arange(5))
    np.testing.assert_array_equal(layer.grads()[0].sum(1), [3, 3, 0, 3, 3])


def test_one_hot_infers_the_number_of_classes_outside_of_compiled_code():
    out = F.one_hot(jnp.asarray(WORDS))
    np.testing.assert_array_equal(out, torch.nn.functional.one_hot(torch.from_numpy(WORDS).long()).numpy())
    assert out.dtype == jnp.int32
    with pytest.raises(ValueError, match="cannot infer num_classes in compiled code"):
        jax.jit(F.one_hot)(jnp.asarray(WORDS))
    np.testing.assert_array_equal(F.one_hot(jnp.array([3, -1]), 3), jnp.zeros((2, 3), jnp.int32))


@pytest.mark.slow
def test_bags_in_bfloat16_are_summed_in_float32():
    ones = jnp.ones((1, 2), jnp.bfloat16)
    words = jnp.zeros(1000, jnp.int32)
    for arguments in ((words, ones, jnp.zeros(1, jnp.int32)), (words.reshape(1, -1), ones)):
        out = F.embedding_bag(*arguments, mode="sum")
        assert out.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.float32(out), 1000.0)
