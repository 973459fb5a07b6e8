"""Linear maps, and layers that only reshape, against torch's."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_contract import Case, LayerContract, Refusal, numbers
from oracle import torch

from minitorch_jax.nn import functional as F  # noqa: N812

CASES = [
    Case("Linear", (3, 2), inputs=(numbers(5, 3),)),
    Case("Linear", (3, 2), inputs=(numbers(3),)),
    Case("Linear", (3, 2, False), inputs=(numbers(2, 4, 3),)),
    Case("Linear", (2, 8), inputs=(numbers(5, 2),)),
    Case("Linear", (2, 8, False), inputs=(numbers(3, 4, 2),)),
    Case("Bilinear", (3, 4, 2), inputs=(numbers(5, 3), numbers(5, 4, seed=1))),
    Case("Bilinear", (3, 4, 2), {"bias": False}, inputs=(numbers(2, 5, 3), numbers(2, 5, 4, seed=1))),
    Case("Identity", (54, "anything"), {"unused": 1}, inputs=(numbers(2, 3),)),
    Case("Flatten", inputs=(numbers(2, 3, 4),)),
    Case("Flatten", (0, 1), inputs=(numbers(2, 3, 4),)),
    Case("Flatten", (), {"start_dim": -2}, inputs=(numbers(2, 3, 4),)),
    Case("Unflatten", (1, (2, 3)), inputs=(numbers(4, 6),)),
    Case("Unflatten", (-2, (2, -1, 2)), inputs=(numbers(4, 3),)),
    Case("linear", inputs=(numbers(5, 3), numbers(2, 3, seed=1), numbers(2, seed=2))),
    Case("linear", inputs=(numbers(5, 3), numbers(3, seed=1))),
    Case("bilinear", inputs=(numbers(5, 3), numbers(5, 2), numbers(4, 3, 2, seed=1))),
]

INITIAL = [("Linear", (25, 400)), ("Linear", (400, 100)), ("Bilinear", (9, 5, 200))]

REFUSALS = [
    Refusal("Linear", (-1, 2), match="sizes >= 0"),
    Refusal("Linear", (3, 2), inputs=(numbers(5, 4),), match=r"\(\.\.\., 3\); got \(5, 4\)"),
    Refusal("Bilinear", (0, 2, 2), match="in1_features > 0"),
    Refusal("Bilinear", (3, 4, 2), inputs=(numbers(5, 3), numbers(6, 4)), match=r"\(5, 3\) and \(6, 4\)"),
    Refusal("Bilinear", (3, 4, 2), inputs=(numbers(5, 4), numbers(5, 4)), match=r"\(\*, 3\) and \(\*, 4\)"),
    Refusal("Flatten", (2, 1), inputs=(numbers(2, 3, 4),), match="cannot flatten"),
    Refusal("Unflatten", (1, "ab"), match="tuple of ints"),
    Refusal("Unflatten", ("x", (2, 3)), inputs=(numbers(4, 6),), match="takes an integer dim"),
    Refusal("Unflatten", (1, (4, 2)), inputs=(numbers(4, 6),), match="cannot split an axis of size 6"),
    Refusal("Unflatten", (1, (-1, -1)), inputs=(numbers(4, 6),), match="cannot split an axis of size 6"),
    Refusal("Unflatten", (3, (2, 3)), inputs=(numbers(4, 6),), match="it has no axis 3"),
]


class TestLayers(LayerContract):
    pass


def test_the_weight_gradient_of_few_features_is_computed_the_fast_way():
    def text(features):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, features), (8, features))]
        return jax.jit(jax.grad(lambda w, x: jnp.tanh(F.linear(x, w)).sum())).lower(*shapes[::-1]).compile().as_text()

    assert re.search(r"f32\[2,8\]\S* dot\(", text(2)) and not re.search(r"f32\[8,2\]\S* dot\(", text(2))
    assert not re.search(r"f32\[4,8\]\S* dot\(", text(4))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3,), (), (2, 0, 3)])
@pytest.mark.parametrize("dims", [(), (1,), (0, 1), (-2,), (1, 2), (2, 1), (0, 7), (-1, -3)])
def test_flatten_is_torchs(shape, dims):
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    try:
        expected = torch.flatten(torch.from_numpy(x.copy()), *dims).numpy()
    except (RuntimeError, IndexError):
        with pytest.raises(ValueError, match="must be axes from"):
            F.flatten(jnp.asarray(x), *dims)
    else:
        np.testing.assert_array_equal(F.flatten(jnp.asarray(x), *dims), expected)
