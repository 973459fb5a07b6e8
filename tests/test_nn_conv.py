"""Convolutions and padding against torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_contract import Case, LayerContract, Refusal, compare_arguments, numbers

from minitorch_jax import nn

F = nn.functional

CASES = [
    Case("Conv1d", (3, 4, 3), inputs=(numbers(2, 3, 7),)),
    Case("Conv1d", (2, 4, 4, 3, 2, 1, 2, False), inputs=(numbers(2, 9),)),
    Case("Conv1d", (2, 2, 1, 4), inputs=(numbers(1, 2, 9),)),
    Case("Conv1d", (2, 3, 4), {"padding": "same", "padding_mode": "circular"}, inputs=(numbers(2, 2, 5),)),
    Case("Conv2d", (3, 4, 3), inputs=(numbers(2, 3, 6, 5),)),
    Case("Conv2d", (3, 4, (2, 3), (2, 1), (1, 2), (2, 1)), inputs=(numbers(3, 6, 5),)),
    Case("Conv2d", (4, 6, 3, 2, 1), {"groups": 2}, inputs=(numbers(2, 4, 6, 5),)),
    Case("Conv2d", (4, 8, 3), {"groups": 4, "bias": False}, inputs=(numbers(2, 4, 4, 4),)),
    Case("Conv2d", (2, 3, (2, 3), 1, "same"), {"dilation": (1, 2)}, inputs=(numbers(2, 2, 4, 5),)),
    Case("Conv2d", (2, 3, 2, 2, "valid"), inputs=(numbers(2, 2, 4, 5),)),
    Case("Conv2d", (2, 3, 3, 2, (1, 2)), {"padding_mode": "reflect"}, inputs=(numbers(2, 2, 4, 5),)),
    Case("Conv2d", (2, 3, (2, 3), 1, "same"), {"padding_mode": "replicate"}, inputs=(numbers(2, 2, 1, 5),)),
    Case("Conv2d", (2, 3, 3, 1, 2), {"padding_mode": "circular"}, inputs=(numbers(2, 3, 4),)),
    Case("Conv2d", (2, 3, 2, 3), {"padding_mode": "reflect", "padding": "valid"}, inputs=(numbers(2, 2, 4, 5),)),
    Case("Conv3d", (2, 3, 2), inputs=(numbers(2, 2, 3, 4, 3),)),
    Case("Conv3d", (2, 2, (1, 2, 3), (1, 2, 1), (0, 1, 2)), {"groups": 2}, inputs=(numbers(2, 2, 3, 3),)),
    Case("ConvTranspose1d", (3, 4, 3), inputs=(numbers(2, 3, 5),)),
    Case("ConvTranspose1d", (4, 2, 4, 3, 2, 1, 2, False, 2), inputs=(numbers(4, 5),)),
    Case("ConvTranspose2d", (3, 2, 3, 2), inputs=(numbers(2, 3, 3, 4),)),
    Case("ConvTranspose2d", (3, 2, (2, 3), (3, 1), (1, 2)), inputs=(numbers(3, 3, 4),)),
    Case("ConvTranspose2d", (4, 6, 3, 2, 1, (1, 0)), {"groups": 2}, inputs=(numbers(2, 4, 3, 2),)),
    Case(
        "ConvTranspose2d", (2, 2, 1, 2, 1), inputs=(numbers(2, 2, 4, 3),)
    ),  # removes more elements than the kernel adds
    Case("ConvTranspose2d", (3, 2, 3, 2, 1), inputs=(numbers(2, 3, 3, 4),), call={"output_size": (6, 7)}),
    Case("ConvTranspose2d", (3, 2, 3, 2, 1), inputs=(numbers(3, 3, 4),), call={"output_size": (2, 5, 8)}),
    Case("ConvTranspose2d", (3, 2, 3, 2), inputs=(numbers(2, 3, 3, 4),), call={"output_size": (2, 2, 8, 9)}),
    Case("ConvTranspose3d", (2, 3, 2, 2, 0, (0, 1, 0)), inputs=(numbers(2, 2, 2, 3, 2),)),
    Case("conv1d", (numbers(4, 3, 2, seed=1),), inputs=(numbers(2, 3, 5),)),
    Case("conv2d", (numbers(4, 1, 2, 2, seed=1), numbers(4), 1, "same", 1, 2), inputs=(numbers(2, 5, 4),)),
    Case("conv3d", (numbers(2, 2, 1, 2, 2, seed=1), None, (1, 2, 1), 1), inputs=(numbers(1, 2, 2, 3, 3),)),
    Case("conv_transpose1d", (numbers(3, 2, 2, seed=1), numbers(2), 2, 1, 1), inputs=(numbers(2, 3, 5),)),
    Case(
        "conv_transpose2d",
        (numbers(4, 1, 2, 3, seed=1),),
        {"groups": 2, "dilation": (1, 2), "stride": 2},
        inputs=(numbers(2, 4, 3, 3),),
    ),
    Case("conv_transpose3d", (numbers(2, 2, 1, 2, 2, seed=1),), inputs=(numbers(2, 2, 3, 3),)),
    Case("ConstantPad1d", (2, 3.5), inputs=(numbers(2, 3, 4),)),
    Case("ConstantPad1d", ((0, 1), -1.0), inputs=(numbers(3),)),
    Case("ConstantPad2d", ((1, -2, 0, 3), 7), inputs=(numbers(3, 4),)),
    Case("ConstantPad3d", ((1, 0, 2, 0, 0, 3), 0.5), inputs=(numbers(2, 1, 2, 3, 2),)),
    Case("ZeroPad1d", (2,), inputs=(numbers(2, 3),)),
    Case("ZeroPad2d", ((1, -1, 2, 0),), inputs=(numbers(1, 2, 3, 4),)),
    Case("ZeroPad3d", (1,), inputs=(numbers(2, 1, 2, 3),)),
    Case("ReflectionPad1d", (2,), inputs=(numbers(2, 3),)),
    Case("ReflectionPad1d", ((0, 3),), inputs=(numbers(2, 2, 4),)),
    Case("ReflectionPad2d", ((1, 3, 2, 0),), inputs=(numbers(1, 2, 3, 4),)),
    Case("ReflectionPad2d", ((1, -1, -2, 1),), inputs=(numbers(1, 2, 5, 4),)),
    Case("ReflectionPad3d", ((1, 0, 2, 1, 0, 1),), inputs=(numbers(1, 2, 3, 4, 2),)),
    Case("ReplicationPad1d", ((5, 1),), inputs=(numbers(2, 1, 3),)),
    Case("ReplicationPad2d", ((1, 3, 2, -1),), inputs=(numbers(2, 3, 4),)),
    Case("ReplicationPad3d", (2,), inputs=(numbers(1, 1, 2, 1, 3),)),
    Case("CircularPad1d", ((3, 1),), inputs=(numbers(2, 1, 3),)),
    Case("CircularPad1d", ((-1, 2),), inputs=(numbers(2, 1, 4),)),
    Case("CircularPad2d", ((1, 3, 2, 0),), inputs=(numbers(2, 3, 4),)),
    Case("CircularPad3d", (1,), inputs=(numbers(1, 1, 2, 1, 3),)),
    *(
        Case("pad", (pad, "replicate"), inputs=(numbers(1, 1, 4),))
        for pad in [(-4, 5), (5, -4), (-6, 7), (-5, 6), (-4, 4)]
    ),
    *(Case("pad", (pad, "reflect"), inputs=(numbers(1, 1, 4),)) for pad in [(2, -3), (-3, 2), (-5, 3), (3, -1)]),
    Case("pad", ((5, -4, -4, 3), "replicate"), inputs=(numbers(5, 6, 4, 4),)),
    Case("pad", ((-2, -2), "circular"), inputs=(numbers(1, 1, 4),)),
    Case("pad", ((-2, -2),), inputs=(numbers(1, 1, 4),)),
    Case("pad", ((1, 2),), inputs=(numbers(2, 3),)),
    Case("pad", ((1, 2, 0, 1, 1, 1, 2, 0), "constant", 2.5), inputs=(numbers(2, 1, 2, 3),)),
    Case("pad", ((),), inputs=(numbers(2, 3),)),
    Case("pad", ((1, 2), "reflect"), inputs=(numbers(2, 3),)),
]

INITIAL = [
    ("Conv1d", (20, 400, 3)),
    ("Conv2d", (8, 400, 3), {"groups": 4}),
    ("Conv3d", (4, 400, 2)),
    ("ConvTranspose1d", (20, 200, 3)),
    ("ConvTranspose2d", (8, 400, 3), {"groups": 4}),
    ("ConvTranspose3d", (4, 200, 2)),
]

IMAGE = (numbers(2, 3, 5, 5),)
WEIGHT = numbers(4, 3, 3, 3)

REFUSALS = [
    Refusal("Conv2d", (3, 4, 3), {"groups": 2}, match="divisible by groups"),
    Refusal("Conv2d", (3, 4, 3), {"groups": 0}, match="divisible by groups"),
    Refusal("Conv2d", (4, 3, 3), {"groups": 2}, match="divisible by groups"),
    Refusal("Conv2d", (3, 4, 3, 2, "same"), match="needs stride 1; got stride"),
    Refusal("Conv2d", (3, 4, 3, 1, "full"), match="integers, 'same' or 'valid'; got 'full'"),
    Refusal("Conv2d", (3, 4, 3), {"padding_mode": "mirror"}, match="padding_mode must be"),
    Refusal("Conv2d", (3, 4, (3, 3, 3)), inputs=IMAGE, match="integer or a tuple of 2"),
    Refusal("Conv2d", (3, 4, 3, 0), inputs=IMAGE, match="stride must be at least 1"),
    Refusal("Conv2d", (3, 4, 3, 1, -1), inputs=IMAGE, match="padding must be at least 0"),
    Refusal("Conv2d", (3, 4, 3, 1, 0, 0), inputs=IMAGE, match="dilation must be at least 1"),
    Refusal("Conv2d", (3, 4, 2.5), match="kernel_size must be an integer"),
    Refusal("Conv2d", (2, 4, 3), inputs=IMAGE, match=r"conv2d takes 2 channels here; got .*\(2, 3, 5, 5\)"),
    Refusal(
        "Conv2d",
        (3, 4, 3),
        inputs=(numbers(2, 6, 6, 3),),
        match=r"with 6 channels on axis 1. .*`jnp.moveaxis\(x, -1, 1\)`",
    ),
    Refusal("Conv2d", (3, 4, 6), inputs=IMAGE, match="kernel is larger than the padded input"),
    Refusal("Conv2d", (3, 4, 3), inputs=(numbers(5, 5),), match="input of 3 or 4 dimensions"),
    Refusal("Conv2d", (3, 4, 3, 1, 5), {"padding_mode": "reflect"}, inputs=IMAGE, match="at most"),
    Refusal("conv2d", (WEIGHT[0],), inputs=IMAGE, match="weight of 4 dimensions"),
    Refusal("conv2d", (WEIGHT, numbers(3)), inputs=IMAGE, match=r"bias of shape \(4,\) here"),
    Refusal("conv2d", (WEIGHT, None, 1, 0, 1, 3), inputs=IMAGE, match="groups must be positive and divide"),
    Refusal("conv2d", (WEIGHT.astype(np.float16),), inputs=IMAGE, match="one dtype; got float16, float32"),
    Refusal("ConvTranspose2d", (3, 4, 3), {"padding_mode": "reflect"}, match="padding_mode='zeros' only"),
    Refusal("ConvTranspose2d", (3, 4, 3, 1, "same"), inputs=IMAGE, match="padding as integers"),
    Refusal("ConvTranspose2d", (3, 4, 3, 2, 0, 2), inputs=IMAGE, match="smaller than stride or dilation"),
    Refusal("ConvTranspose2d", (3, 4, 1, 1, 3), inputs=IMAGE, match="kernel is larger"),
    Refusal("ConvTranspose2d", (4, 4, 3), inputs=IMAGE, match="conv_transpose2d takes 4 channels"),
    Refusal("ConvTranspose2d", (3, 4, 3, 2), inputs=IMAGE, call={"output_size": (10, 11)}, match=r"\(11, 11\) to \(12"),
    Refusal("ConvTranspose2d", (3, 4, 3, 2), inputs=IMAGE, call={"output_size": (11,)}, match="2 or 4 integers"),
    Refusal("ReflectionPad1d", (3,), inputs=(numbers(1, 2, 3),), match=r"at most \(2,\) elements"),
    Refusal("CircularPad1d", (4,), inputs=(numbers(1, 2, 3),), match=r"at most \(3,\) elements"),
    Refusal("ReplicationPad2d", (1,), inputs=(numbers(2, 3),), match="input of 3 or 4 dimensions"),
    Refusal("CircularPad2d", (1,), inputs=(numbers(2, 3, 4, 5, 2),), match="input of 3 or 4 dimensions"),
    Refusal("ReplicationPad1d", (1,), inputs=(numbers(1, 2, 0),), match="takes an input that is not empty"),
    Refusal("ZeroPad2d", ((1, 2, 3),), inputs=(numbers(2, 3),), match="integer or a tuple of 4"),
    Refusal("ZeroPad1d", (-2,), inputs=(numbers(2, 3),), match="removes more elements"),
    Refusal("pad", ((1, 2, 3),), inputs=(numbers(2, 3),), match="two integers for each"),
    Refusal("pad", ((1, 2) * 3,), inputs=(numbers(2, 3),), match="at most 2 axes"),
    Refusal("pad", ((1, 2), "mirror"), inputs=(numbers(2, 3),), match="mode must be 'constant'"),
    Refusal("pad", ((1, 1), "reflect", 1.0), inputs=(numbers(2, 3),), match="value is for mode='constant'"),
    Refusal("pad", ((1, 1) * 2, "reflect"), inputs=(numbers(2, 3),), match="one or two axes before them"),
]


class TestLayers(LayerContract):
    pass


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d"])
def test_convolutions_take_torchs_arguments(name):
    """torch's own are written in C, without a signature."""

    def theirs(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        pass

    def transposed(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
        pass

    compare_arguments(getattr(F, name), theirs)
    compare_arguments(getattr(F, name.replace("conv", "conv_transpose")), transposed)


@pytest.mark.slow
def test_dtype_is_that_of_the_parameters():
    layer = nn.Conv2d(2, 3, 2, dtype=jnp.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == jnp.bfloat16
    assert layer(jnp.ones((1, 2, 3, 3), jnp.bfloat16)).dtype == jnp.bfloat16


def test_an_empty_batch_gives_an_empty_batch():
    assert nn.Conv2d(2, 3, 2)(jnp.ones((0, 2, 3, 3))).shape == (0, 3, 2, 2)


def test_padding_keeps_integers_and_takes_traced_arrays():
    for mode in ("constant", "reflect", "replicate", "circular"):
        out = jax.jit(lambda x, mode=mode: F.pad(x, (1, 1), mode))(jnp.arange(6).reshape(2, 3))
        assert out.dtype == jnp.int32 and out.shape == (2, 5)


def test_a_transposed_convolution_is_a_gradient():
    x, w = jnp.asarray(numbers(2, 4, 3, 3)), jnp.asarray(numbers(4, 2, 3, 3, seed=1))
    image = jax.ShapeDtypeStruct((2, 4, 6, 5), jnp.float32)
    (expected,) = jax.linear_transpose(lambda y: F.conv2d(y, w, None, (2, 1), (1, 0), groups=2), image)(x[:, :4])
    got = F.conv_transpose2d(x[:, :4], w, None, (2, 1), (1, 0), (1, 0), groups=2)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
