"""Losses against torch's."""

import functools
import inspect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_contract import Case, LayerContract, Made, Refusal, integers, numbers
from oracle import actual, says, torch

import minitorch_jax as mt
from minitorch_jax import nn
from minitorch_jax.nn.functional.linear_cross_entropy import LEAST
from minitorch_jax.runtime.platforms import for_other_platforms

F, TF = nn.functional, torch.nn.functional

# that the "mean" of kl_div is none, and that shapes differ: tested below
pytestmark = pytest.mark.filterwarnings("ignore:kl_div:UserWarning", "ignore:.*are broadcast:UserWarning")


def uniform(*shape, seed=0, low=0.02, high=0.98):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def signs(*shape, seed=0):
    return (2 * integers(2, *shape, seed=seed) - 1).astype(np.float32)


def log_probabilities(*shape, seed=0):
    return np.asarray(jax.nn.log_softmax(jnp.asarray(numbers(*shape, seed=seed)), axis=-1))


X, Y, W = numbers(3, 4), numbers(3, 4, seed=1), uniform(3, 4, seed=2)
P, Q = uniform(3, 4), uniform(3, 4, seed=1)
NOT_MEAN = [{"reduction": "sum"}, {"reduction": "none"}]
# torch's first derivatives only of the inputs, so that targets are given by keyword: those are not differentiated
SIGNS, CLASSES = {"target": signs(3, 4)}, {"target": np.array([0, 3, 2], np.int32)}

# Layers take few cases: each runs through all of the contract. Their functions have every option.
NUMBERS = [
    *[Case(name, inputs=(X, Y)) for name in ("L1Loss", "MSELoss", "SmoothL1Loss")],
    Case("SmoothL1Loss", (), {"beta": 0.3, "reduction": "none"}, inputs=(X, Y)),
    Case("HuberLoss", ("none", 0.3), inputs=(X, Y)),
    *[Case(name, (), kw, inputs=(X, Y)) for name in ("l1_loss", "mse_loss", "huber_loss") for kw in NOT_MEAN],
    *[Case("smooth_l1_loss", (), {"beta": 0.0} | kw, inputs=(X, Y)) for kw in NOT_MEAN],
    Case("l1_loss", inputs=(X, X)),  # everywhere at the kink
    Case("huber_loss", inputs=(numbers(), numbers(seed=1))),
    *[Case(name, inputs=(X, numbers(1, 4))) for name in ("l1_loss", "smooth_l1_loss", "huber_loss")],
    Case("mse_loss", (), {"reduction": "none"}, inputs=(X, numbers(4))),
    *[
        Case(name, (), {"weight": W, "reduction": reduction}, inputs=(X, Y))
        for name in ("l1_loss", "mse_loss", "huber_loss")
        for reduction in ("mean", "sum", "none")
    ],
    Case("PoissonNLLLoss", (False, True), {"eps": 0.5}, inputs=(P, uniform(3, 4, high=5))),
    Case("poisson_nll_loss", inputs=(X, uniform(3, 4, high=3))),
    *[Case("poisson_nll_loss", (True, True), kw, inputs=(X, uniform(3, 4, high=5))) for kw in NOT_MEAN],
    Case("poisson_nll_loss", (False,), inputs=(np.zeros(3, np.float32), uniform(2, 3, high=5))),
    Case("GaussianNLLLoss", (), {"full": True, "eps": 0.5, "reduction": "sum"}, inputs=(X, Y, W)),
    Case("gaussian_nll_loss", inputs=(X, Y, W)),
    *[
        Case("gaussian_nll_loss", (), {"reduction": "none"}, inputs=(X, Y, var))
        for var in (W[:, 0], W[:, :1], W[:1], W - 0.019)  # the last goes below 1e-6 nowhere, but near
    ],
    Case("gaussian_nll_loss", (0.7,), inputs=(X, numbers(4))),
    Case("KLDivLoss", inputs=(log_probabilities(3, 4), P)),
    Case("KLDivLoss", (), {"reduction": "batchmean", "log_target": True}, inputs=(log_probabilities(3, 4), X)),
    *[Case("kl_div", (), {"log_target": True} | kw, inputs=(log_probabilities(3, 4), X)) for kw in NOT_MEAN],
    *[Case("kl_div", (), kw, inputs=(X,), call={"target": np.array([0, 0.5, 0.5, 1], np.float32)}) for kw in NOT_MEAN],
    Case("kl_div", (), {"reduction": "batchmean"}, inputs=(numbers(), uniform())),
    Case("BCELoss", (W[0],), {"reduction": "sum"}, inputs=(P, Q)),
    Case("binary_cross_entropy", inputs=(P, Q)),
    Case("binary_cross_entropy", (W,), {"reduction": "none"}, inputs=(P, Q)),
    Case(
        "binary_cross_entropy",
        (),
        {"reduction": "none"},
        inputs=(np.float32([0, 0, 1, 1]),),
        call={"target": np.float32([0, 1, 0, 1])},
    ),
    Case("BCEWithLogitsLoss", inputs=(X, Q)),
    Case("BCEWithLogitsLoss", (W[:, :1],), {"pos_weight": W[0], "reduction": "none"}, inputs=(X, Q)),
    Case("binary_cross_entropy_with_logits", (W[0],), {"reduction": "sum"}, inputs=(X, Q)),
    Case("binary_cross_entropy_with_logits", (), {"pos_weight": W}, inputs=(numbers(3, 4, scale=30), Q)),
]

CLASS_LOSSES = [
    Case("NLLLoss", (W[0],), {"ignore_index": 3, "reduction": "sum"}, inputs=(X,), call=CLASSES),
    Case("nll_loss", inputs=(log_probabilities(3, 4),), call=CLASSES),
    Case("nll_loss", (), {"weight": W[0], "ignore_index": 3}, inputs=(X,), call=CLASSES),
    Case("nll_loss", inputs=(numbers(4),), call={"target": np.array(2, np.int32)}),
    Case("nll_loss", (), {"ignore_index": 1}, inputs=(numbers(2, 3, 2, 2),), call={"target": integers(3, 2, 2, 2)}),
    Case(
        "nll_loss",
        (),
        {"reduction": "none"},
        inputs=(numbers(2, 3, 1, 2, 2),),
        call={"target": integers(3, 2, 1, 2, 2)},
    ),
    Case("CrossEntropyLoss", inputs=(X,), call=CLASSES),
    Case("CrossEntropyLoss", (W[0],), {"label_smoothing": 0.2, "reduction": "sum"}, inputs=(X, P)),
    *[
        Case(
            "cross_entropy",
            (),
            {"weight": w, "label_smoothing": 0.2, "ignore_index": 3} | kw,
            inputs=(X,),
            call=CLASSES,
        )
        for w in (None, W[0])
        for kw in ({}, *NOT_MEAN)
    ],
    Case("cross_entropy", (W[0],), {"label_smoothing": 0.2}, inputs=(X, P)),
    Case("cross_entropy", (), {"reduction": "none"}, inputs=(numbers(2, 3, 2), uniform(2, 3, 2))),
    Case("cross_entropy", inputs=(numbers(4),), call={"target": np.array(2, np.int32)}),
    Case("cross_entropy", inputs=(numbers(4), uniform(4))),
    Case(  # without a repr, since torch's shows `options`
        "LinearCrossEntropyLoss",
        (5, 4),
        {"bias": True, "weight": W[0], "ignore_index": 3, "label_smoothing": 0.1, "reduction": "sum"},
        inputs=(numbers(3, 5),),
        call=CLASSES,
        repr=False,
    ),
    Case(
        "LinearCrossEntropyLoss",
        (5, 4),
        {"bias": True, "out_features": (2, 3), "reduction": "none"},
        inputs=(numbers(3, 5),),
        call={"target": integers(4, 3, 2, 3)},
        repr=False,
    ),
    Case("linear_cross_entropy", inputs=(numbers(3, 5), numbers(4, 5, seed=1)), call=CLASSES),
    Case("linear_cross_entropy", inputs=(numbers(5), numbers(4, 5, seed=1)), call={"target": uniform(4)}),
    Case(
        "AdaptiveLogSoftmaxWithLoss",
        (16, 20, [4, 9]),
        inputs=(numbers(6, 16),),
        call={"target_": np.int32([0, 4, 9, 19, 3, 8])},
    ),
    Case(
        "AdaptiveLogSoftmaxWithLoss",
        (8, 20, [4, 9], 2.0, True),
        inputs=(numbers(8),),
        call={"target_": np.array(11, np.int32)},
    ),
]

MARGINS = [
    Case("HingeEmbeddingLoss", (0.3,), inputs=(X,), call=SIGNS),
    *[Case("hinge_embedding_loss", (), kw, inputs=(X,), call=SIGNS) for kw in NOT_MEAN],
    Case("SoftMarginLoss", inputs=(X,), call=SIGNS),
    *[Case("soft_margin_loss", (), kw, inputs=(numbers(3, 4, scale=20),), call=SIGNS) for kw in NOT_MEAN],
    Case("MarginRankingLoss", (0.5,), inputs=(X, Y), call=SIGNS),
    *[Case("margin_ranking_loss", (), kw, inputs=(X, Y[:1]), call=SIGNS) for kw in NOT_MEAN],
    Case("margin_ranking_loss", inputs=(X, X), call=SIGNS),  # everywhere at the kink
    Case("MultiLabelSoftMarginLoss", (W[0],), inputs=(X, P)),
    *[Case("multilabel_soft_margin_loss", (), kw, inputs=(X, P)) for kw in NOT_MEAN],
    Case("multilabel_soft_margin_loss", (), {"reduction": "none"}, inputs=(numbers(4), uniform(4))),
    Case("MultiLabelMarginLoss", inputs=(X,), call={"target": np.int32([[1, 0, -1, 2], [-1, 0, 1, 2], [2, 1, 3, 0]])}),
    *[
        Case(
            "multilabel_margin_loss",
            (),
            kw,
            inputs=(X,),
            call={"target": np.int32([[3, -1, 0, 1], [1, 1, -1, 2], [0, 2, 3, -1]])},
        )
        for kw in NOT_MEAN
    ],
    Case("multilabel_margin_loss", inputs=(numbers(4),), call={"target": np.int32([3, 0, -1, 1])}),
    Case("MultiMarginLoss", (2, 0.7, W[0]), {"reduction": "sum"}, inputs=(X,), call=CLASSES),
    *[
        Case(
            "multi_margin_loss",
            (),
            {"p": 2, "reduction": reduction},
            inputs=(numbers(*shape),),
            call={"target": target},
        )
        for shape, target in (((), np.int32(0)), ((), np.int32([0])), ((5,), np.int32([1])), ((1, 5), np.int32(1)))
        for target in [np.asarray(target)]
        for reduction in ("mean", "none")
    ],
    *[
        Case("multilabel_margin_loss", (), {"reduction": "none"}, inputs=(numbers(),), call={"target": target})
        for target in (np.array(0, np.int32), np.int32([0]))
    ],
    Case("multi_margin_loss", inputs=(X,), call=CLASSES),
    Case("multi_margin_loss", (), {"p": 2, "reduction": "none"}, inputs=(X,), call=CLASSES),
    Case("multi_margin_loss", (), {"weight": W[0]}, inputs=(numbers(4),), call={"target": np.array(2, np.int32)}),
    Case("CosineEmbeddingLoss", (-0.4,), inputs=(X, Y), call={"target": np.float32([1, -1, 1])}),
    *[
        Case("cosine_embedding_loss", (), kw, inputs=(X, Y), call={"target": np.float32([1, -1, -1])})
        for kw in NOT_MEAN
    ],
    Case("cosine_embedding_loss", inputs=(numbers(4), numbers(4, seed=1)), call={"target": np.array(1, np.float32)}),
    Case("TripletMarginLoss", inputs=(X, Y, W)),
    Case("TripletMarginLoss", (0.5, 1.0), {"swap": True, "eps": 0.1, "reduction": "none"}, inputs=(X, Y, W)),
    Case("triplet_margin_loss", (2.0, 3.0), inputs=(numbers(4), numbers(4, seed=1), numbers(4, seed=2))),
    Case("TripletMarginWithDistanceLoss", inputs=(X, Y, W)),
    Case(
        "TripletMarginWithDistanceLoss",
        (),
        {
            "distance_function": Made(lambda nn: nn.PairwiseDistance(p=1.0)),
            "swap": True,
            "margin": 0.5,
            "reduction": "sum",
        },
        inputs=(X, Y, W),
    ),
    Case(
        "triplet_margin_with_distance_loss",
        (),
        {"distance_function": lambda x, y: ((x - y) ** 2).sum(-1), "reduction": "none"},
        inputs=(X, Y, W),
    ),
]

CASES = [*NUMBERS, *CLASS_LOSSES, *MARGINS]

INITIAL = [("AdaptiveLogSoftmaxWithLoss", (64, 200, [20, 100])), ("LinearCrossEntropyLoss", (30, 200), {"bias": True})]

REFUSALS = [
    Refusal("MSELoss", (), {"reduction": "avg"}, inputs=(X, Y), match="'mean', 'sum' or 'none'; got 'avg'"),
    Refusal("mse_loss", (), {"weight": W[0]}, inputs=(X, Y), match=r"the input's shape \(3, 4\); got \(4,\)"),
    Refusal("huber_loss", (), {"weight": W[0]}, inputs=(X, Y), match=r"the input's shape \(3, 4\); got \(4,\)"),
    Refusal("MSELoss", inputs=(X, numbers(3)), match="broadcast"),
    Refusal("SmoothL1Loss", (), {"beta": -1.0}, inputs=(X, Y), match="beta >= 0; got -1.0"),
    Refusal("HuberLoss", ("mean", 0.0), inputs=(X, Y), match="delta > 0; got 0.0"),
    Refusal("HuberLoss", ("mean", "1"), match="delta must be a number; got '1'"),
    Refusal("GaussianNLLLoss", inputs=(X, Y), call={"var": -1.0}, match="var must be at least 0; got -1.0"),
    Refusal(
        "GaussianNLLLoss",
        inputs=(X, Y, W[0]),
        match=r"var must be a number.*shape \(3, 4\).*got \(4,\)",
    ),
    Refusal("GaussianNLLLoss", inputs=(X, Y, W[:1, :1]), match=r"with one axis of size 1.*got \(1, 1\)"),
    Refusal("BCELoss", inputs=(P, Q[0]), match=r"the input's shape \(3, 4\); got \(4,\)"),
    Refusal(
        "BCELoss", (numbers(2, 3, 4),), inputs=(P, Q), match=r"broadcasts to the input's, \(3, 4\); got \(2, 3, 4\)"
    ),
    Refusal("BCEWithLogitsLoss", inputs=(X, Q[0]), match=r"the input's shape \(3, 4\); got \(4,\)"),
    Refusal("BCEWithLogitsLoss", (), {"pos_weight": W[:2]}, inputs=(X, Q), match=r"pos_weight .* got \(2, 4\)"),
    Refusal("NLLLoss", inputs=(X, integers(4, 2)), match=r"must have shape \(3,\); got \(2,\)"),
    Refusal("NLLLoss", inputs=(X, Y[:, 0]), match=r"must have shape \(3,\); got \(3,\) of float32"),
    Refusal("NLLLoss", (W[:, 0],), inputs=(X, integers(4, 3)), match=r"shape \(4,\), one per class; got \(3,\)"),
    Refusal("CrossEntropyLoss", (), {"label_smoothing": 2.0}, inputs=(X, integers(4, 3)), match="got 2.0"),
    Refusal("LinearCrossEntropyLoss", (5, 4), {"label_smoothing": 2.0}, match="got 2.0"),
    Refusal("LinearCrossEntropyLoss", (5, 4), {"weight": numbers(5)}, match=r"\(4,\), one per class; got \(5,\)"),
    Refusal("LinearCrossEntropyLoss", (5, 4), {"ignore_index": 1}, inputs=(numbers(3, 5), P), match="probabilities"),
    Refusal("linear_cross_entropy", inputs=(X, X[:, :2], integers(3, 3)), match=r"got \(3, 4\) and \(3, 2\)"),
    Refusal(
        "linear_cross_entropy",
        inputs=(X[0], numbers(2, 3, 4), integers(2, 3)),
        match=r"needs an input \(N, in",
    ),
    Refusal(
        "linear_cross_entropy", (), {"linear_bias": X[0]}, inputs=(X, Y, integers(3, 3)), match=r"\(3,\); got \(4,\)"
    ),
    Refusal("MarginRankingLoss", inputs=(X, Y[0], signs(3, 4)), match=r"the same number of dimensions.*\(4,\)"),
    Refusal("MultiLabelSoftMarginLoss", inputs=(numbers(), uniform()), match="got a scalar"),
    Refusal("MultiLabelMarginLoss", inputs=(X, integers(4, 3)), match=r"one shape.*\(3, 4\) and \(3,\)"),
    Refusal("MultiMarginLoss", (3,), match="p = 1 or 2; got 3"),
    Refusal("multi_margin_loss", (3,), inputs=(X, integers(4, 3)), match="p = 1 or 2; got 3"),
    Refusal("MultiMarginLoss", (1, 1.0, W), match=r"shape \(C,\); got \(3, 4\)"),
    Refusal(
        "MultiMarginLoss", (1, 1.0, W[0, :2]), inputs=(X, integers(4, 3)), match=r"\(4,\), one per class; got \(2,\)"
    ),
    Refusal("MultiMarginLoss", inputs=(X, integers(4, 2)), match=r"got \(3, 4\) and \(2,\)"),
    Refusal("CosineEmbeddingLoss", inputs=(X, Y, signs(1)[0]), match=r"\(3, 4\), \(3, 4\) and \(\)"),
    Refusal("CosineEmbeddingLoss", inputs=(X, Y[0], signs(3)), match=r"\(3, 4\), \(4,\) and \(3,\)"),
    Refusal("TripletMarginLoss", (0.0,), match="greater than 0; got 0.0"),
    Refusal("TripletMarginWithDistanceLoss", (), {"margin": -1}, match="greater than 0; got -1"),
    Refusal("triplet_margin_loss", (0.0,), inputs=(X, Y, W), match="greater than 0; got 0.0"),
    Refusal(
        "TripletMarginLoss", inputs=(X, Y[0], W), match=r"the same number of dimensions.*\(3, 4\), \(4,\) and \(3, 4\)"
    ),
    Refusal("AdaptiveLogSoftmaxWithLoss", (8, 20, []), match="increasing integers"),
    Refusal("AdaptiveLogSoftmaxWithLoss", (8, 20, [5, 5]), match=r"got \[5, 5\] for 20 classes"),
    Refusal("AdaptiveLogSoftmaxWithLoss", (8, 20, [5, 20]), match="increasing integers"),
    Refusal("AdaptiveLogSoftmaxWithLoss", (8, 20, [0, 5]), match="increasing integers"),
    Refusal("AdaptiveLogSoftmaxWithLoss", (8, 20, [2.5]), match="increasing integers"),
    Refusal(
        "AdaptiveLogSoftmaxWithLoss", (8, 20, [5]), inputs=(numbers(3, 8), integers(4, 2)), match=r"\(3, 8\) and \(2,\)"
    ),
]

FUNCTIONS = (
    "l1_loss mse_loss smooth_l1_loss huber_loss poisson_nll_loss gaussian_nll_loss kl_div binary_cross_entropy"
    " binary_cross_entropy_with_logits nll_loss cross_entropy linear_cross_entropy ctc_loss margin_ranking_loss"
    " hinge_embedding_loss soft_margin_loss multilabel_soft_margin_loss multilabel_margin_loss multi_margin_loss"
    " cosine_embedding_loss triplet_margin_loss triplet_margin_with_distance_loss"
).split()


class TestLayers(LayerContract):
    pass


def test_every_loss_of_torch_is_there():
    theirs = {name for name in torch.nn.modules.loss.__all__ if says(inspect.isclass, getattr(torch.nn, name, None))}
    assert theirs - {"NLLLoss2d"} == {case.name for case in CASES if not case.is_function} - {
        "AdaptiveLogSoftmaxWithLoss"
    } | {"CTCLoss"}


def test_functions_are_there_for_all_losses():
    theirs = {
        name for name in dir(TF) if name.endswith(("_loss", "kl_div", "entropy", "with_logits")) and name[0] != "_"
    }
    assert theirs <= set(FUNCTIONS)


# -- what the contract does not reach ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["l1_loss", "mse_loss", "smooth_l1_loss", "huber_loss"])
def test_other_shapes_are_broadcast_with_a_warning(name):
    with pytest.warns(UserWarning, match=rf"{name}: the target's shape \(4,\) differs from the input's shape \(3, 4\)"):
        loss = getattr(F, name)(jnp.zeros((3, 4)), jnp.zeros(4))
    assert loss == 0


def test_the_mean_of_kl_div_warns():
    with pytest.warns(UserWarning, match="Pass reduction='batchmean'"):
        F.kl_div(jnp.zeros(3), jnp.ones(3))


@pytest.mark.parametrize("target", [np.array([1, -1]), jnp.array([1, -1], jnp.int8), np.array([1.0, -1.0])])
def test_targets_may_be_of_other_types(target):
    """Of NumPy's too: JAX makes float32 of float64."""
    for name in ("mse_loss", "hinge_embedding_loss", "soft_margin_loss", "poisson_nll_loss"):
        x = jnp.array([0.5, 0.25], jnp.bfloat16)
        takes_part = target.dtype == np.float64 and name in ("mse_loss", "poisson_nll_loss")
        assert getattr(F, name)(x, target).dtype == (jnp.float32 if takes_part else jnp.bfloat16)


@pytest.mark.slow
def test_values_that_torch_refuses_and_compiled_code_cannot_make_the_loss_nan():
    def losses(function, *args, **kwargs):
        return np.isnan(jax.jit(lambda: function(*args, reduction="none", **kwargs))()).tolist()

    x, good_and_bad = jnp.zeros((2, 3)), jnp.array([2, 3])
    assert losses(F.nll_loss, x, good_and_bad) == [False, True]
    assert losses(F.nll_loss, x, jnp.array([-1, -100])) == [True, False]
    assert losses(F.multi_margin_loss, x, good_and_bad) == [False, True]
    assert losses(F.multilabel_margin_loss, x, jnp.array([[2, -1, 9], [3, -1, 0]])) == [False, True]
    assert losses(F.binary_cross_entropy, jnp.array([0.0, 1.0, -0.5, 1.5]), jnp.ones(4)) == [False, False, True, True]
    assert losses(F.gaussian_nll_loss, jnp.zeros(2), jnp.zeros(2), jnp.array([0.0, -1.0])) == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8])
def test_class_numbers_of_small_types_do_not_wrap_around(dtype):
    x = jnp.asarray(numbers(2, 300))
    target = jnp.array([100, 7])
    np.testing.assert_array_equal(F.cross_entropy(x, target.astype(dtype)), F.cross_entropy(x, target))
    np.testing.assert_array_equal(F.multi_margin_loss(x, target.astype(dtype)), F.multi_margin_loss(x, target))
    wrapped = jnp.array([156, 7], jnp.uint8)  # -100 in 8 bits, which is not ignore_index
    np.testing.assert_array_equal(F.cross_entropy(x, wrapped), F.cross_entropy(x, jnp.array([156, 7])))


def test_weights_are_buffers():
    loss = nn.BCEWithLogitsLoss(jnp.ones(4), pos_weight=jnp.full(4, 2.0))
    assert list(loss.state_dict()) == ["weight", "pos_weight"] and len(loss.parameters()) == 0
    loss.weight = jnp.zeros(4)
    assert loss(jnp.ones((3, 4)), jnp.ones((3, 4))) == 0
    assert nn.CrossEntropyLoss().weight is None


@pytest.mark.slow
def test_gradients_of_extreme_inputs_are_finite():
    zeros = jnp.zeros((2, 3))
    for function, args in {
        F.triplet_margin_loss: (zeros, zeros - 1e-6, zeros),  # a distance of 0
        F.cosine_embedding_loss: (zeros, zeros, jnp.ones(2)),
        F.binary_cross_entropy: (jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0])),
        F.kl_div: (zeros, zeros),
    }.items():
        gradients = jax.grad(lambda *args, f=function: f(*args), argnums=tuple(range(len(args))))(*args)
        assert all(np.isfinite(g).all() for g in gradients), function


@pytest.mark.slow
@pytest.mark.one_in(9)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_both_ways_to_find_the_own_class_have_the_same_derivatives(smoothing):
    """On a CPU by index, elsewhere by a mask. Scores of -inf and large ones are there, and a class that does not count."""
    x, dx = jnp.asarray(numbers(4, 5, scale=3)) + 1e4, jnp.asarray(numbers(4, 5, seed=1))
    x = x if smoothing else x.at[0, 1].set(-jnp.inf)
    target, weight = jnp.array([0, 4, 2, 3]), jnp.asarray(uniform(5))

    def derivatives():
        def loss(x, weight):
            return F.cross_entropy(x, target, weight, ignore_index=2, label_smoothing=smoothing)

        first = jax.value_and_grad(loss, (0, 1))
        return first(x, weight), jax.jvp(jax.grad(loss), (x, weight), (dx, weight))[1]

    got = derivatives()
    with for_other_platforms():
        expected = derivatives()
    log_p = jax.nn.log_softmax(x)
    own, rest = -log_p[jnp.arange(4), target] * weight[target], -(log_p * weight[None]).mean(1)
    own = (1 - smoothing) * own + (smoothing * rest if smoothing else 0)
    kept = jnp.array([0, 1, 3])
    np.testing.assert_allclose(got[0][0], own[kept].sum() / weight[target[kept]].sum(), rtol=1e-4)
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.isfinite(mine).all()
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)


BLOCKS = [{"batch_chunk_size": 3}, {"chunking_method": "aspect_ratio"}, {"chunking_method": "aspect_ratio:2"}]


@pytest.mark.one_in(9)
@pytest.mark.parametrize("kind, reduction", [("numbers", "mean"), ("probabilities", "none"), ("images", "mean")])
def test_a_linear_cross_entropy_by_blocks_is_the_one_of_all_rows(kind, reduction):
    """With rows that do not divide, forward, backward and forward over backward."""
    shape = (4, 2) if kind == "images" else (4,)
    x, w, b = (jnp.asarray(numbers(*s, seed=i)) for i, s in enumerate([(7, 2), (*shape, 2), shape]))
    target = jnp.asarray(uniform(7, 4) if kind == "probabilities" else integers(4, 7, *shape[1:]))
    given = {"weight": jnp.asarray(uniform(4)), "label_smoothing": 0.1, "reduction": reduction}
    given |= {} if kind == "probabilities" else {"ignore_index": 2}

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(options, *args):
        def loss(x, w, b):
            return F.linear_cross_entropy(x, w, target, linear_bias=b, options=options, **given)

        gradients = jax.grad(lambda *args: jnp.sin(loss(*args)).sum(), (0, 1, 2))
        return loss(*args), *jax.jvp(gradients, args, jax.tree.map(jnp.cos, args))

    expected = derivatives(None, x, w, b)
    got = derivatives(nn.LinearCrossEntropyOptions(batch_chunk_size=3), x, w, b)
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


def test_the_scores_of_all_rows_are_never_there_at_once():
    x, w, target = jnp.ones((64, 8)), jnp.ones((512, 8)), jnp.zeros(64, jnp.int32)

    def memory(options):
        loss = lambda x, w: F.linear_cross_entropy(x, w, target, options=options)
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, w).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few = nn.LinearCrossEntropyOptions(batch_chunk_size=8)
    assert memory(few) < 64 * 512 * 4 <= memory(None)
    assert nn.LinearCrossEntropyOptions().rows(1000, 64, 50_000) == LEAST
    assert nn.LinearCrossEntropyOptions().rows(10_000, 64, 640) == 512
    x = x.astype(jnp.bfloat16)
    loss = lambda options: F.linear_cross_entropy(x, w.astype(x.dtype), target, options=options)
    assert loss(few).dtype == loss(None).dtype == jnp.bfloat16


@pytest.mark.parametrize("options", BLOCKS)
@pytest.mark.parametrize("sizes", [(7, 2, 4), (1000, 64, 50_000), (4, 8, 2), (1, 1, 1)])
def test_blocks_have_torchs_size(options, sizes):
    theirs = actual.nn.LinearCrossEntropyOptions(**options)._adjust(*sizes, actual.float32)
    assert nn.LinearCrossEntropyOptions(**options).rows(*sizes) == theirs.batch_chunk_size


@pytest.mark.parametrize(
    "options, match",
    [
        ({"batch_chunk_size": 0}, "positive integer or None; got 0"),
        ({"chunking_method": "ratio"}, "got 'ratio'"),
        ({"chunking_method": "aspect_ratio:0"}, "got 'aspect_ratio:0'"),
        ({"batch_chunk_size": 3, "chunking_method": "aspect_ratio"}, "not both"),
        ({"acc_policy": "compact"}, "'auto' or 'accurate'.*got 'compact'"),
        ({"acc_dtype": jnp.bfloat16}, "None or float32"),
    ],
)
def test_options_of_blocks_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        nn.LinearCrossEntropyOptions(**options)


def test_blocks_need_a_target_for_each_row():
    with pytest.raises(ValueError, match=r"one batch size; got \(3, 4\) and \(2,\)"):
        F.linear_cross_entropy(X, Y, jnp.zeros(2, jnp.int32), options=nn.LinearCrossEntropyOptions())


# -- the adaptive softmax ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_adaptive_softmax_knows_all_probabilities():
    case = Case("AdaptiveLogSoftmaxWithLoss", (8, 20, [4, 9], 2.0, True))
    ours, theirs = case.pair()
    x = numbers(30, 8, scale=4.0)
    with torch.no_grad():
        expected, predicted = theirs.log_prob(torch.from_numpy(x)), theirs.predict(torch.from_numpy(x))
    got = jax.jit(lambda m, x: m.log_prob(x))(ours, jnp.asarray(x))
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jnp.exp(got).sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(jax.jit(lambda m, x: m.predict(x))(ours, jnp.asarray(x)), predicted.numpy())
    target = jnp.asarray(integers(20, 30))
    call = jax.jit(lambda m, x, target: m(x, target))
    np.testing.assert_allclose(call(ours, jnp.asarray(x), target).output, got[jnp.arange(30), target], rtol=1e-5)
    assert ours.cutoffs == (4, 9, 20)
    output, loss = call(ours, jnp.asarray(x), target.at[:3].set(jnp.array([0, 20, -1])))
    assert np.isnan(output[:4]).tolist() == [False, True, True, False] and np.isnan(loss)


# -- CTC ---------------------------------------------------------------------------------------------------------------


ctc_loss = jax.jit(F.ctc_loss, static_argnames=("blank", "reduction", "zero_infinity"))


def ctc(scores, targets, input_lengths, target_lengths, **kwargs):
    """Losses and gradients with respect to scores, ours and torch's."""
    theirs = torch.from_numpy(scores).requires_grad_()
    lengths = [torch.tensor(n) for n in (input_lengths, target_lengths)]
    expected = TF.ctc_loss(theirs.log_softmax(-1), torch.from_numpy(targets).long(), *lengths, **kwargs)
    weight = numbers(*expected.shape, seed=5)
    (expected * torch.from_numpy(np.asarray(weight))).sum().backward()

    def run(scores, *rest):
        loss = F.ctc_loss(jax.nn.log_softmax(scores), *rest, **kwargs)
        return (loss * weight).sum(), loss

    arrays = [jnp.asarray(a) for a in (targets, input_lengths, target_lengths)]
    gradient, loss = jax.jit(jax.grad(run, has_aux=True))(jnp.asarray(scores), *arrays)
    static = jax.jit(lambda scores: run(scores, targets, input_lengths, target_lengths)[1])(jnp.asarray(scores))
    np.testing.assert_allclose(loss, expected.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(static, loss, rtol=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-4, atol=1e-6)
    return loss, gradient


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ctc_of_padded_targets(reduction):
    targets = np.array([[1, 2, 2, 0], [3, 1, 9, 9], [4, 4, 4, 0], [-1, -1, -1, -1]])
    lengths = (7, 5, 7, 3), (3, 2, 3, 0)
    ctc(numbers(7, 4, 5), targets, *lengths, reduction=reduction)


@pytest.mark.slow
@pytest.mark.parametrize("blank", [0, 2, 4])
def test_ctc_of_targets_one_after_another_with_any_blank(blank):
    labels = np.array([i for i in range(5) if i != blank])
    ctc(numbers(6, 3, 5), labels[[0, 1, 1, 3, 2, 0]], (6, 6, 4), (3, 1, 2), blank=blank, reduction="none")


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(6, 2), ((6,), (2,))])
def test_ctc_of_one_sequence(lengths):
    loss, _ = ctc(numbers(6, 4), np.array([1, 3]), *lengths, reduction="none")
    assert loss.shape == ()
    ctc(numbers(1, 1, 4), np.array([[2]]), (1,), (1,))


@pytest.mark.slow
def test_ctc_where_labels_do_not_fit():
    scores, targets = numbers(3, 3, 4), np.array([[1, 1, 2], [1, 2, 3], [1, 2, 0]])
    lengths = (3, 3, 0), (3, 3, 2)  # two equal labels need a blank between them
    ctc(scores, targets, *lengths, reduction="sum", zero_infinity=True)
    log_probs = jax.nn.log_softmax(jnp.asarray(scores))
    losses = ctc_loss(log_probs, targets, *lengths, reduction="none")
    assert np.isinf(losses).tolist() == [True, False, True]
    gradient = jax.grad(lambda x: ctc_loss(x, targets, *lengths, reduction="sum"))(log_probs)
    assert np.isfinite(gradient).all()


@pytest.mark.slow
def test_ctc_of_impossible_classes():
    log_probs = jax.nn.log_softmax(jnp.asarray(numbers(5, 2, 4)).at[:, :, 3].set(-jnp.inf))
    targets = jnp.array([[1, 2], [3, 1]])
    losses = ctc_loss(log_probs, targets, (5, 5), (2, 2), reduction="none")
    assert np.isfinite(losses[0]) and np.isinf(losses[1])
    gradient = jax.grad(lambda x: ctc_loss(x, targets, (5, 5), (2, 2), zero_infinity=True))(log_probs)
    assert np.isfinite(gradient).all()


def test_ctc_is_minus_the_logarithm_of_the_sum_over_alignments():
    log_probs = np.asarray(jax.nn.log_softmax(jnp.asarray(numbers(4, 1, 3))))
    total = 0.0
    for path in itertools.product(range(3), repeat=4):
        if [label for label, _ in itertools.groupby(path) if label] == [1, 2]:
            total += math.exp(sum(log_probs[t, 0, label] for t, label in enumerate(path)))
    loss = ctc_loss(jnp.asarray(log_probs), jnp.array([[1, 2]]), (4,), (2,), reduction="sum")
    assert float(loss) == pytest.approx(-math.log(total), rel=1e-5)


def test_ctc_of_lengths_and_labels_out_of_range_is_nan():
    log_probs = jax.nn.log_softmax(jnp.asarray(numbers(4, 5, 3)))
    targets = jnp.array([[1, 2], [1, 2], [1, 2], [1, 3], [1, 3]])
    lengths = jnp.array([4, 5, 4, 4, 4]), jnp.array([2, 2, 3, 2, 1])
    losses = ctc_loss(log_probs, targets, *lengths, reduction="none")
    assert np.isnan(losses).tolist() == [False, True, True, True, False]
    flat = jnp.array([1, 2, 1, 1, 2, 2])
    losses = ctc_loss(log_probs[:, :3], flat, jnp.array([4, 4, 4]), jnp.array([2, 1, 4]), reduction="none")
    assert np.isnan(losses).tolist() == [False, False, True]


@pytest.mark.slow
def test_ctc_keeps_the_dtype_and_the_layer_is_the_function():
    scores = jnp.asarray(numbers(5, 2, 4))
    args = jnp.array([[1, 2], [3, 3]]), (5, 5), (2, 2)
    expected = ctc_loss(jax.nn.log_softmax(scores), *args, blank=0, reduction="sum", zero_infinity=True)
    layer = nn.CTCLoss(0, "sum", zero_infinity=True)
    assert layer(jax.nn.log_softmax(scores), *args) == expected
    assert layer(jax.nn.log_softmax(scores), target_lengths=(2, 2), targets=args[0], input_lengths=(5, 5)) == expected
    half = layer(jax.nn.log_softmax(scores.astype(jnp.bfloat16)), *args)
    assert half.dtype == jnp.bfloat16 and float(half) == pytest.approx(float(expected), rel=0.02)
    assert repr(layer) == repr(torch.nn.CTCLoss(0, "sum", zero_infinity=True)) == "CTCLoss()"
    other = mt.Module.__call__(nn.CTCLoss(), jax.nn.log_softmax(scores), *args)
    assert float(other) == pytest.approx(float(expected) / 4, rel=1e-6)
    mapped = jax.vmap(lambda x: ctc_loss(x, *args))(jnp.stack([scores, 2 * scores]))
    np.testing.assert_allclose(mapped[0], ctc_loss(scores, *args), rtol=1e-5)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "shape, targets, lengths, kwargs, shown",
    [
        ((4,), (1, 2), ((4,), (2,)), {}, r"\(T, N, C\) or \(T, C\); got \(4,\)"),
        ((4, 2, 3), (2, 2), ((4, 4), (2, 2)), {"blank": 3}, "one of the 3 classes; got 3"),
        (
            (4, 2, 3),
            (2, 2),
            ((4,), (2, 2)),
            {},
            r"input_lengths must hold one length for each of the 2 .*got shape \(1,\)",
        ),
        ((4, 2, 3), (2, 2), ((4, 4), 2), {}, r"target_lengths must hold one length .*got shape \(\)"),
        ((4, 2, 3), (3, 2), ((4, 4), (2, 2)), {}, r"shape \(2, S\) or \(sum\(target_lengths\),\); got \(3, 2\)"),
        ((4, 2, 3), (3,), ((4, 4), (2, 2)), {}, r"must hold sum\(target_lengths\) = 4 labels; got 3"),
        ((4, 2, 3), (2, 2), ((4, 4), (2, 2)), {"reduction": "avg"}, "got 'avg'"),
    ],
)
def test_ctc_refuses_what_does_not_fit(shape, targets, lengths, kwargs, shown):
    with pytest.raises(ValueError, match=shown):
        F.ctc_loss(jnp.zeros(shape), jnp.ones(targets, jnp.int32), *lengths, **kwargs)


def test_class_numbers_of_a_floating_dtype_are_told_from_probabilities():
    with pytest.raises(ValueError, match=r"Class numbers must be integers: `y.astype\(int\)`"):
        nn.functional.cross_entropy(jnp.ones((5, 3)), jnp.zeros(5))
