"""Transformers, against torch's."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_contract import Case, LayerContract, Made, Refusal, numbers
from oracle import HAS_TORCH, real_torch, torch

import minitorch_jax as mt
from minitorch_jax import nn

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")


@pytest.fixture(autouse=True, scope="module")
def one_path():
    """torch's other path, for `eval` mode, gives zeros at padded places. (A setting, not an operation of the first test.)"""
    if not HAS_TORCH:
        yield
        return
    settings = real_torch().backends.mha
    before = settings.get_fastpath_enabled()
    settings.set_fastpath_enabled(False)
    yield
    settings.set_fastpath_enabled(before)


SRC, TGT = numbers(4, 2, 4), numbers(3, 2, 4, seed=1)  # (S, N, E), (T, N, E)
PADDED = np.array([[False, False, False, True], [False, False, True, True]])  # (N, S)
CAUSAL = np.triu(np.full((3, 3), -np.inf, np.float32), 1)
SOME = np.array([[False, True, False, False]] * 3)  # (T, S)
SIZES = (4, 2, 5)  # d_model, nhead, dim_feedforward


def case(kind, *args, inputs, call=None, random=True, **kwargs):
    """Compared in `eval` mode, since the default dropout is 0.1; torch's repr of attention has a class of its own name."""
    composed = kind != "EncoderLayer"
    name = f"Transformer{kind}"
    return Case(name, args, kwargs, inputs, call or {}, random=random, repr=False, composed=composed)


ENCODER = Made(lambda nn: nn.TransformerEncoderLayer(*SIZES))
DECODER = Made(lambda nn: nn.TransformerDecoderLayer(*SIZES))
NORM = Made(lambda nn: nn.LayerNorm(4))

CASES = [
    case("EncoderLayer", *SIZES, 0.0, inputs=(SRC,), call={"src_key_padding_mask": PADDED}, random=False),
    case("EncoderLayer", *SIZES, 0.1, Made(lambda nn: nn.functional.gelu), 0.1, True, inputs=(SRC,)),
    case("EncoderLayer", *SIZES, inputs=(SRC[:, 0],), activation=Made(lambda nn: nn.Tanh()), bias=False),
    case(
        "EncoderLayer",
        *SIZES,
        inputs=(TGT,),
        call={"src_mask": CAUSAL, "is_causal": True},
        activation="gelu",
        norm_first=True,
    ),
    case("DecoderLayer", *SIZES, 0.0, inputs=(TGT, SRC), call={"memory_mask": SOME}, random=False),
    case(
        "DecoderLayer",
        *SIZES,
        inputs=(TGT, SRC),
        call={"tgt_mask": CAUSAL, "tgt_is_causal": True, "memory_key_padding_mask": PADDED},
        norm_first=True,
        bias=False,
    ),
    case(
        "DecoderLayer",
        *SIZES,
        inputs=(TGT.swapaxes(0, 1), SRC.swapaxes(0, 1)),
        call={"tgt_key_padding_mask": PADDED[:, 1:]},
        activation="gelu",
        layer_norm_eps=0.1,
        batch_first=True,
    ),
    case("Encoder", ENCODER, 2, NORM, inputs=(SRC,), call={"src_key_padding_mask": PADDED}),
    case("Encoder", ENCODER, 1, None, False, False, inputs=(TGT,), call={"mask": CAUSAL, "is_causal": True}),
    case(
        "Decoder",
        DECODER,
        1,
        NORM,
        inputs=(TGT, SRC),
        call={"tgt_mask": CAUSAL, "tgt_is_causal": True, "memory_mask": SOME, "memory_key_padding_mask": PADDED},
    ),
    case(
        "",
        4,
        2,
        1,
        1,
        5,
        inputs=(SRC.swapaxes(0, 1), TGT.swapaxes(0, 1)),
        call={
            "src_key_padding_mask": PADDED,
            "memory_key_padding_mask": PADDED,
            "tgt_key_padding_mask": PADDED[:, 1:],
            "src_mask": np.eye(4, k=1, dtype=bool),
            "memory_mask": SOME,
        },
        activation="gelu",
        batch_first=True,
        norm_first=True,
        bias=False,
    ),
    case(
        "",
        4,
        2,
        inputs=(SRC[:, 0], TGT[:, 0]),
        call={"tgt_mask": CAUSAL, "tgt_is_causal": True},
        custom_encoder=Made(lambda nn: nn.TransformerEncoder(nn.TransformerEncoderLayer(*SIZES), 1)),
        custom_decoder=Made(lambda nn: nn.TransformerDecoder(nn.TransformerDecoderLayer(*SIZES), 2)),
    ),
]

INITIAL = [
    ("Transformer", (100, 2, 1, 1, 110)),
    ("TransformerEncoderLayer", (100, 2, 110)),
    ("TransformerDecoderLayer", (100, 2, 110)),
]

REFUSALS = [
    Refusal("TransformerEncoderLayer", (4, 3), match="multiple of num_heads"),
    Refusal("TransformerEncoderLayer", (4, 2), {"activation": "tanh"}, match="'relu', 'gelu' or a function"),
    Refusal("TransformerEncoderLayer", SIZES, inputs=(numbers(3, 2, 5),), match=r"got \(3, 2, 5\)"),
    Refusal(
        "TransformerEncoderLayer",
        SIZES,
        inputs=(SRC,),
        call={"is_causal": True},
        match="generate_square_subsequent_mask",
    ),
    Refusal("TransformerDecoderLayer", SIZES, inputs=(TGT, SRC[:, :1]), match=r"got \(3, 2, 4\), \(4, 1, 4\)"),
    Refusal(
        "Transformer", (4, 2, 1, 1, 5), inputs=(SRC, TGT[:, :1]), match=r"\(T, N, 4\), or both without N; got \(4, 2"
    ),
    Refusal("Transformer", (4, 2, 1, 1, 5), inputs=(SRC, numbers(3, 2, 5)), match=r"and \(3, 2, 5\)"),
]


class TestLayers(LayerContract):
    pass


def test_a_stack_holds_copies_that_start_equal_and_are_apart():
    made = nn.TransformerEncoderLayer(*SIZES)
    encoder = nn.TransformerEncoder(made, 2)
    first, second = encoder.layers
    np.testing.assert_array_equal(first.linear1.weight, second.linear1.weight)
    first.linear1.weight = 0 * first.linear1.weight
    assert np.any(second.linear1.weight != 0) and np.any(made.linear1.weight != 0)
    assert encoder.num_parameters() == 2 * made.num_parameters()


def test_the_causal_mask_is_torchs():
    for n in (1, 4):
        theirs = torch.nn.Transformer.generate_square_subsequent_mask(n)
        np.testing.assert_array_equal(nn.Transformer.generate_square_subsequent_mask(n), theirs.numpy())
    assert nn.Transformer.generate_square_subsequent_mask(2, dtype=jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.slow
def test_dropout_acts_in_training_only():
    made = nn.TransformerDecoderLayer(*SIZES, dropout=0.5)
    src, tgt = jnp.asarray(SRC), jnp.asarray(TGT)
    mt.seed(0)
    first = made(tgt, src)
    assert not np.allclose(first, made(tgt, src))
    mt.seed(0)
    np.testing.assert_array_equal(made(tgt, src), first)
    made.eval()
    np.testing.assert_array_equal(made(tgt, src), made(tgt, src))


def test_a_frozen_custom_encoder_keeps_its_parameters():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(*SIZES), 1).freeze()
    before = np.array(encoder.layers[0].linear1.weight)
    nn.Transformer(4, 2, num_decoder_layers=1, dim_feedforward=5, custom_encoder=encoder, key=jax.random.key(0))
    np.testing.assert_array_equal(encoder.layers[0].linear1.weight, before)


@pytest.mark.slow
def test_a_transformer_is_a_pytree_copied_and_pickled():
    net = nn.Transformer(4, 2, 2, 1, 5)
    leaves, treedef = jax.tree.flatten(net)
    for other in (treedef.unflatten(leaves), copy.deepcopy(net), pickle.loads(pickle.dumps(net))):  # noqa: S301
        assert repr(other) == repr(net) and jax.tree.structure(other) == treedef
        for name, value in net.state_dict().items():
            np.testing.assert_array_equal(other.state_dict()[name], value)
