"""Inputs without numbers, and scalars, against torch's: what the contract's emptied cases do not reach."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_contract import (
    Case,
    LayerContract,
    Refusal,
    attempt,
    integers,
    numbers,
    ours_of,
    theirs_of,
)
from oracle import torch

from minitorch_jax import nn

F = nn.functional
IMAGES, GRID = numbers(0, 2, 3, 3), numbers(0, 4, 4, 2)
NO_CLASS, ONE = integers(3, 0), np.ones((), np.float32)

CASES = [
    Case("grid_sample", (GRID, "bicubic", "reflection", True), inputs=(IMAGES,)),
    Case("grid_sample", (numbers(2, 0, 4, 2), "nearest"), {"align_corners": False}, inputs=(numbers(2, 2, 3, 3),)),
    *(Case("interpolate", ((2, 5), None, mode), inputs=(IMAGES,)) for mode in ("area", "bicubic", "nearest")),
    Case("Unflatten", (1, (-1, 1)), inputs=(numbers(0, 3),)),
    Case("Unflatten", (1, (2, -1)), inputs=(numbers(2, 4, 0),)),
    Case("pixel_shuffle", (1,), inputs=(numbers(1, 0, 1, 1),)),
    Case("pixel_unshuffle", (1,), inputs=(numbers(1, 0, 1, 1),)),
    Case("AdaptiveMaxPool2d", (2, True), inputs=(numbers(0, 2, 5, 5),)),
    Case("AdaptiveMaxPool2d", (2, True), inputs=(numbers(0, 2, 4, 4),)),
    Case("Linear", (0, 3), inputs=(numbers(2, 0),)),
    Case("Linear", (3, 0), inputs=(numbers(2, 3),)),
    Case("Embedding", (5, 3), inputs=(integers(5, 0, 4),)),
    Case("EmbeddingBag", (5, 3), inputs=(integers(5, 3), integers(5, 0)), differentiable=False),  # torch's would crash
    Case("LSTM", (3, 4, 2), {"bidirectional": True}, inputs=(numbers(5, 0, 3),)),
    Case("MultiheadAttention", (4, 2), inputs=(numbers(3, 0, 4),) * 3),
    Case("MultiheadAttention", (4, 2), inputs=(numbers(0, 2, 4),) * 3),
    Case("scaled_dot_product_attention", inputs=(numbers(2, 3, 0), numbers(2, 4, 0), numbers(2, 4, 5))),
    Case("scaled_dot_product_attention", inputs=(numbers(2, 3, 4), numbers(2, 0, 4), numbers(2, 0, 5))),
    Case("cross_entropy", (NO_CLASS,), inputs=(numbers(0, 3),)),
    Case("cross_entropy", (numbers(0, 3),), {"label_smoothing": 0.1}, inputs=(numbers(0, 3),)),
    Case("cross_entropy", (numbers(0, 3),), {"reduction": "sum"}, inputs=(numbers(0, 3),)),
    Case("TripletMarginLoss", inputs=(numbers(0, 3),) * 3),
    Case("CosineEmbeddingLoss", inputs=(numbers(0, 3), numbers(0, 3)), call={"target": numbers(0)}),
    *(Case(name, (0,), inputs=(ONE,)) for name in ("softmax", "softmin", "log_softmax")),
    Case("Softmax", (-1,), inputs=(ONE,)),
    Case("normalize", (2.0, 0), inputs=(ONE,)),
    Case("cosine_similarity", (0,), inputs=(ONE, ONE)),
    Case("pairwise_distance", inputs=(ONE, numbers())),
    Case("multilabel_margin_loss", inputs=(ONE,), call={"target": np.array(0, np.int32)}),
    Case("multi_margin_loss", inputs=(ONE,), call={"target": np.array(0, np.int32)}),
    Case("multi_margin_loss", (), {"p": 2, "reduction": "none"}, inputs=(numbers(5),), call={"target": np.int32([1])}),
    *(Case("pairwise_distance", (p, 0.0), inputs=(numbers(2, 3), numbers(3))) for p in (-1.0, -2.5, -math.inf)),
    Case("pairwise_distance", (-1.0, 0.0), inputs=(np.float32([[3, -4], [0, 2]]), np.zeros((2, 2), np.float32))),
    Case("normalize", (-1.0,), inputs=(numbers(2, 3),)),
    Case("TripletMarginLoss", (1.0, -1.0), inputs=(numbers(2, 3), numbers(2, 3, seed=1), numbers(2, 3, seed=2))),
    Case("pad", ((5, -4, -4, 3), "replicate"), inputs=(numbers(2, 2, 4, 4),)),
    Case("pad", ((2, -3), "reflect"), inputs=(numbers(1, 1, 4),)),
    *(Case(f"{kind}Pool2d", (2, ()), inputs=(numbers(1, 2, 4, 4),)) for kind in ("Max", "Avg")),
    Case("LPPool2d", (2, 2, ()), inputs=(numbers(1, 2, 4, 4),)),
]
NO_CHANNELS, NO_IMAGE = numbers(2, 0, 6, 6), numbers(2, 3, 0, 6)
REFUSALS = [
    *(
        Refusal(name, args, inputs=(x,), match=r"not empty \(only the batch may have size 0\); got shape")
        for name, args, x in [
            *(
                (name, (2,), NO_CHANNELS)
                for name in ("MaxPool2d", "AvgPool2d", "AdaptiveMaxPool2d", "Upsample", "Unfold")
            ),
            ("FractionalMaxPool2d", (2, 3), NO_CHANNELS),
            ("ReflectionPad2d", (1,), NO_CHANNELS),
            ("ReplicationPad2d", (1,), NO_IMAGE),
            ("Fold", ((4, 4), 2), numbers(2, 0, 9)),
        ]
    ),
    Refusal("Conv2d", (3, 2, 1, 1, 1), inputs=(NO_IMAGE,), match="takes no empty image; got an input of shape"),
    Refusal("pad", ((-2, -2), "replicate"), inputs=(numbers(1, 1, 4),), match="leaves nothing of an input of shape"),
    Refusal("pad", ((-6, 7),), inputs=(numbers(1, 1, 4),), match="removes more elements than an input"),
    Refusal("MaxUnpool2d", (2, ()), match="stride must be an integer or a tuple", torch_too=False),  # at its first call
    Refusal("multi_margin_loss", inputs=(numbers(3, 0),), call={"target": integers(1, 3)}, match="at least one class"),
    Refusal(
        "multilabel_margin_loss", inputs=(numbers(0),), call={"target": integers(1, 0)}, match="at least one class"
    ),
]


@pytest.mark.one_in(9)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_computes_what_torchs_does(case):
    LayerContract().check(case, training=False)


@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
def test_it_refuses_what_torch_refuses(refusal):
    LayerContract().test_it_refuses_what_torch_refuses(refusal)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("shape", [(0, 3), (0,)])
def test_random_layers_take_no_numbers_in_training(ndim, shape):
    images = numbers(*shape, *[6] * ndim)
    pool = nn.FractionalMaxPool2d if ndim == 2 else nn.FractionalMaxPool3d
    layers = [pool(2, 3, return_indices=True), pool(2, output_ratio=0.5), nn.RReLU(), nn.AlphaDropout(), nn.Dropout()]
    for layer in [*layers, getattr(nn, f"Dropout{ndim}d")()] if len(shape) == 2 else layers:
        theirs = getattr(torch.nn, type(layer).__name__)
        theirs = (
            theirs(2, 3, return_indices=True)
            if layer is layers[0]
            else theirs()
            if layer is not layers[1]
            else theirs(2, output_ratio=0.5)
        )
        expected = [tuple(x.shape) for x in jax.tree.leaves(theirs(torch.from_numpy(images)))]
        assert [x.shape for x in jax.tree.leaves(layer(jnp.asarray(images)))] == expected


def test_pixels_of_none_are_unshuffled():
    """torch gives the input's shape, though its own shape inference knows better."""
    for shape in [(0, 2, 4, 6), (1, 0, 4, 6), (2, 2, 0, 6)]:
        expected = tuple(torch.pixel_unshuffle(torch.zeros(shape, device="meta"), 2).shape)
        assert F.pixel_unshuffle(jnp.zeros(shape), 2).shape == nn.PixelUnshuffle(2)(jnp.zeros(shape)).shape == expected


@pytest.mark.parametrize("hard", [False, True])
def test_a_scalar_is_sampled_from_its_one_category(hard):
    assert F.gumbel_softmax(jnp.float32(2.0), hard=hard, dim=0).shape == ()
    assert float(F.gumbel_softmax(jnp.float32(2.0), hard=hard)) == 1.0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ctc_of_nothing(reduction):
    """Of no labels, padded or one after another, as torch; log-probabilities that are empty, it refuses."""
    scores = np.log(np.full((3, 2, 4), 0.25, np.float32))
    for targets in (integers(4, 0), integers(4, 2, 0)):
        args = scores, targets, np.int32([3, 3]), np.int32([0, 0])
        expected = torch.nn.functional.ctc_loss(*theirs_of(args), reduction=reduction)
        np.testing.assert_allclose(F.ctc_loss(*ours_of(args), reduction=reduction), expected.numpy(), rtol=1e-5)
    for empty in (scores[:, :0], scores[:0]):
        n = empty.shape[1]
        args = empty, integers(4, n, 2), np.full(n, len(empty), np.int32), np.full(n, 2, np.int32)
        assert attempt(lambda args=args: torch.nn.functional.ctc_loss(*theirs_of(args), reduction=reduction))[1]
        with pytest.raises(ValueError, match="log_probs that are not empty"):
            F.ctc_loss(*ours_of(args), reduction=reduction)
