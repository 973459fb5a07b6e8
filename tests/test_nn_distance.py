"""Distances against torch's."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_contract import Case, LayerContract, Refusal, numbers
from oracle import torch

from minitorch_jax import nn

F = nn.functional

X, Y = numbers(3, 4), numbers(3, 4, seed=1)
SOME_ZERO = X * (np.arange(12).reshape(3, 4) % 3 > 0)  # whole numbers are 0, as are their differences

CASES = [
    Case("PairwiseDistance", inputs=(X, Y)),
    Case("PairwiseDistance", (1.0, 0.1, True), inputs=(X, numbers(4))),
    Case("CosineSimilarity", inputs=(X, Y)),
    Case("CosineSimilarity", (), {"dim": -1, "eps": 3.0}, inputs=(numbers(2, 3, 4), X)),
    *[Case("pairwise_distance", (p, 0.0), inputs=(SOME_ZERO, 0 * X)) for p in (0.0, 1.0, 2.0, 3.5, math.inf)],
    *[Case("pairwise_distance", (p, 0.0), inputs=(SOME_ZERO, 0 * X)) for p in (-0.5, -1.0, -2.0, -math.inf)],
    *[Case("pairwise_distance", (p,), inputs=(X, Y)) for p in (-1.0, -math.inf)],
    Case("pairwise_distance", inputs=(numbers(), numbers(seed=1))),
    Case("pairwise_distance", (), {"keepdim": True}, inputs=(numbers(), numbers(seed=1))),
    *[Case("cosine_similarity", (dim,), inputs=(np.ones((), np.float32),) * 2) for dim in (0, -1)],
    Case("pairwise_distance", inputs=(numbers(4), numbers(4, seed=1))),
    Case("pairwise_distance", (), {"keepdim": True}, inputs=(numbers(2, 1, 4), Y)),
    Case("cosine_similarity", (0,), inputs=(numbers(4), numbers(4, seed=1))),
    Case("cosine_similarity", inputs=(SOME_ZERO * np.float32([[1], [0], [1e-9]]), Y)),
    *[Case("pdist", (p,), inputs=(np.concatenate([X, X[:1]]),)) for p in (0.0, 1.0, 2.0, 3.5, math.inf)],
    Case("pdist", inputs=(X[:2],)),
]

REFUSALS = [
    Refusal("PairwiseDistance", inputs=(X, Y[:2]), match="broadcast"),
    *(
        Refusal("PairwiseDistance", (p,), inputs=(X[:, :0], Y[:, :0]), match="needs at least one element")
        for p in (-1.0, float("inf"))
    ),
    Refusal("CosineSimilarity", inputs=(numbers(4), numbers(4)), match=r"no axis 1 .* \(4,\)"),
    Refusal("cosine_similarity", (1,), inputs=(numbers(), numbers()), match=r"no axis 1 .* \(\)"),
    Refusal("pdist", inputs=(numbers(4),), match=r"shape \(N, M\); got \(4,\)"),
    Refusal("pdist", (-1.0,), inputs=(X,), match="p >= 0; got p=-1.0"),
]


class TestLayers(LayerContract):
    pass


def test_pdist_of_one_row_is_empty():
    assert F.pdist(jnp.ones((1, 3))).shape == torch.pdist(torch.ones(1, 3)).shape == (0,)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_gradients_of_no_distance_are_zero(p):
    x = jnp.ones((2, 3))
    assert (jax.grad(lambda x: F.pairwise_distance(x, x, p, 0.0).sum())(x) == 0).all()
    assert (jax.grad(lambda y: F.pairwise_distance(x, y, p, 0.0).sum())(x) == 0).all()
