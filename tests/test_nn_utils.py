"""nn.utils: clipping, parameters as a vector, padded sequences. The expectations are torch's, written by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.nn.utils import (
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    fuse_conv_bn_eval,
    fuse_linear_bn_eval,
    get_total_norm,
    parameters_to_vector,
    vector_to_parameters,
)
from minitorch_jax.nn.utils.rnn import pad_sequence


def layer() -> Any:
    made = nn.Linear(2, 1)
    made.accumulate([jnp.array([[3.0, 0.0]]), jnp.array([-4.0])])
    return made


# -- clipping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [lambda m: m, lambda m: [m], lambda m: optim.SGD([m]), lambda m: optim.SGD([m]).modules]
)
def test_gradients_are_clipped_under_torchs_names(given):
    model = layer()
    assert float(clip_grad_norm_(given(model), 1.0)) == 5.0
    assert_allclose(model.grads()[0], [[0.6, 0.0]], rtol=1e-6)
    assert_allclose(model.grads()[1], [-0.8], rtol=1e-6)
    model = layer()
    assert float(clip_grad_norm_(given(model), 1.0, float("inf"), False, None)) == 4.0
    assert_allclose(model.grads()[0], [[0.75, 0.0]], rtol=1e-6)
    model = layer()
    assert clip_grad_value_(given(model), clip_value=2.0, foreach=True) is None
    assert model.grads()[0].tolist() == [[2.0, 0.0]] and model.grads()[1].tolist() == [-2.0]


def test_clipping_in_compiled_code_and_what_it_refuses():
    model = layer()

    @mt.jit
    def step():
        clip_grad_value_(model, 3.5)
        return clip_grad_norm_(parameters=model, max_norm=10.0, norm_type=1)

    assert float(step()) == 6.5
    assert model.grads()[1].tolist() == [-3.5]
    with pytest.raises(TypeError, match=r"Write `clip_grad_norm\(model, ...\)`, not `clip_grad_norm\(model.parameters"):
        clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(TypeError, match="takes Modules"):
        clip_grad_value_(model.grads(), 1.0)
    model.accumulate([jnp.array([[jnp.nan, 0.0]]), jnp.zeros(1)])
    with pytest.raises(RuntimeError, match="norm of the gradients is nan"):
        clip_grad_norm_(model, 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize(("norm_type", "expected"), [(2.0, 5.0), (1, 7.0), (float("inf"), 4.0)])
def test_the_norm_of_arrays(norm_type, expected):
    model = layer()
    assert float(get_total_norm(model.grads(), norm_type)) == expected
    assert float(get_total_norm(jnp.array([3.0, -4.0]), norm_type, True, foreach=False)) == expected
    assert float(jax.jit(get_total_norm, static_argnums=1)(list(model.grads()), norm_type)) == expected
    assert float(get_total_norm([])) == 0.0
    clip_grads_with_norm_(model, 1.0, get_total_norm(model.grads(), norm_type))
    assert_allclose(model.grads()[1], [-4.0 / expected], rtol=1e-5)
    clip_grads_with_norm_([model], 10.0, 1.0)  # never enlarged
    assert_allclose(model.grads()[1], [-4.0 / expected], rtol=1e-5)


def test_a_norm_is_scaled_by_in_compiled_code_and_what_is_refused():
    model = layer()
    mt.jit(lambda: clip_grads_with_norm_(model, 1.0, get_total_norm(model.grads())))()
    assert_allclose(model.grads()[1], [-0.8], rtol=1e-5)
    with pytest.raises(TypeError, match="get_total_norm takes arrays, such as `model.grads"):
        get_total_norm(model)
    with pytest.raises(ValueError, match="norm_type must be > 0; got 0"):
        get_total_norm(model.grads(), 0)
    with pytest.raises(RuntimeError, match="the norm is nan"):
        get_total_norm(jnp.array([jnp.nan]), error_if_nonfinite=True)


# -- folding a BatchNorm ----------------------------------------------------------------------------------------------


def trained_norm(bn: Any) -> Any:
    for i, (name, array) in enumerate(bn.state_dict().items()):
        if array.ndim:
            setattr(bn, name, jax.random.uniform(jax.random.key(i), array.shape, minval=0.5, maxval=1.5))
    return bn.eval()


@pytest.mark.one_in(8)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["Linear", "Conv1d", "Conv2d", "ConvTranspose2d"])
def test_a_batch_norm_is_folded_into_the_layer_before_it(kind, affine, bias):
    sizes = (3, 4) if kind == "Linear" else (3, 4, 3)
    first = getattr(nn, kind)(*sizes, bias=bias).eval()
    bn = trained_norm((nn.BatchNorm2d if kind.endswith("2d") else nn.BatchNorm1d)(4, affine=affine))
    x = jax.random.normal(jax.random.key(5), {"Linear": (6, 3), "Conv1d": (6, 3, 5)}.get(kind, (6, 3, 5, 5)))
    before = first.state_dict()
    if kind == "Linear":
        fused = fuse_linear_bn_eval(first, bn)
    else:
        fused = fuse_conv_bn_eval(first, bn, transpose=kind.startswith("ConvTranspose"))
    assert_allclose(fused(x), bn(first(x)), rtol=1e-4, atol=1e-5)
    assert type(fused) is type(first) and list(fused.state_dict()) == ["weight", "bias"]
    assert [*before] == [*first.state_dict()] and all((first.state_dict()[n] == a).all() for n, a in before.items())


def test_what_folding_refuses():
    conv, bn, linear = nn.Conv2d(3, 4, 3).eval(), nn.BatchNorm2d(4).eval(), nn.Linear(3, 4).eval()
    for call, error, match in (
        (lambda: fuse_conv_bn_eval(linear, bn), TypeError, "takes a convolution and a BatchNorm; got"),
        (lambda: fuse_linear_bn_eval(linear, nn.LayerNorm(4).eval()), TypeError, "takes a Linear and a BatchNorm; got"),
        (lambda: fuse_conv_bn_eval(nn.Conv2d(3, 4, 3), bn), ValueError, r"call `eval\(\)` on both"),
        (lambda: fuse_conv_bn_eval(conv, bn, transpose=True), ValueError, "write transpose=False for a Conv2d"),
        (
            lambda: fuse_conv_bn_eval(conv, nn.BatchNorm2d(4, track_running_stats=False).eval()),
            ValueError,
            "keeps no running statistics",
        ),
        (lambda: fuse_conv_bn_eval(conv, nn.BatchNorm2d(3).eval()), ValueError, "has 4 channels on axis 0, and the"),
        (lambda: fuse_linear_bn_eval(linear, nn.BatchNorm1d(3).eval()), ValueError, "the Linear has 4 features"),
    ):
        with pytest.raises(error, match=match):
            call()


# -- a vector ---------------------------------------------------------------------------------------------------------


def net() -> Any:
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))


@pytest.mark.parametrize("given", [lambda m: m, lambda m: m.parameters()])
def test_parameters_go_to_a_vector_and_back(given):
    model = net()
    vector_to_parameters(jnp.arange(13.0), given(model))
    assert model[0].weight.tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    assert model[0].bias.tolist() == [6.0, 7.0, 8.0]
    assert model[2].weight.tolist() == [[9.0, 10.0, 11.0]] and model[2].bias.tolist() == [12.0]
    assert_array_equal(parameters_to_vector(given(model)), jnp.arange(13.0))
    vector_to_parameters(np.arange(13) * 2, given(model))  # converted to the parameters' dtype
    assert_array_equal(parameters_to_vector(list(model.parameters())), jnp.arange(13.0) * 2)
    vector_to_parameters(jnp.ones(13), model.grads())
    assert_array_equal(parameters_to_vector(model.grads()), jnp.ones(13))


def test_vectors_in_compiled_code():
    model = net()

    @mt.jit
    def halve():
        vector_to_parameters(parameters_to_vector(model) / 2, model)
        return parameters_to_vector(model.parameters())

    before = parameters_to_vector(model)
    assert_allclose(halve(), before / 2)
    assert_allclose(halve(), before / 4)
    assert_allclose(parameters_to_vector(model), before / 4)
    gradient = jax.grad(lambda model: (parameters_to_vector(model) ** 2).sum())(model)
    assert_allclose(parameters_to_vector(gradient), before / 2, rtol=1e-6)


def test_vectors_hold_tied_parameters_once_and_frozen_ones_not():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].tie("weight", model[0], "weight")
    assert parameters_to_vector(model).shape == (8,)
    model[0].freeze()
    assert parameters_to_vector(model).shape == (2,)


def test_vectors_that_do_not_fit():
    model = net()
    before = parameters_to_vector(model)
    for wrong, message in [
        (jnp.ones(12), "have 13 elements, and the vector has 12"),
        (jnp.ones(14), "have 13 elements, and the vector has 14"),
        (jnp.ones((13, 1)), r"one-dimensional array; got float32\[13, 1\]"),
        ([1.0] * 13, "one-dimensional array; got"),
    ]:
        with pytest.raises(ValueError, match=message):
            vector_to_parameters(wrong, model)
    assert_array_equal(parameters_to_vector(model), before)
    for wrong in ([jnp.ones(13)], jnp.ones(13), [model], 3):
        with pytest.raises(
            TypeError, match=r"takes a Module or its `parameters\(\)`.*vector_to_parameters\(vec, model\)"
        ):
            vector_to_parameters(jnp.ones(13), wrong)
    for wrong, error, message in [
        (jnp.ones(3), TypeError, "a Module or a list of arrays"),
        (3, TypeError, "a Module or a list of arrays"),
        ([model], TypeError, r"item 0 is .*\(Sequential\)"),
        ([], ValueError, "no parameters"),
        (net().freeze(), ValueError, "may all be frozen"),
    ]:
        with pytest.raises(error, match=message):
            parameters_to_vector(wrong)


# -- sequences --------------------------------------------------------------------------------------------------------

A, B = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[5.0, 6.0]])


@pytest.mark.parametrize("way", [lambda f: f, jax.jit, mt.jit])
def test_sequences_are_padded_to_the_longest(way):
    def pad(**given):
        return way(lambda a, b: pad_sequence([a, b], **given))(A, B)

    assert pad().tolist() == [[[1.0, 2.0], [5.0, 6.0]], [[3.0, 4.0], [0.0, 0.0]]]
    assert pad(batch_first=True, padding_value=-1).tolist() == [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [-1.0, -1.0]]]
    assert pad(padding_side="left", batch_first=True).tolist()[1] == [[0.0, 0.0], [5.0, 6.0]]


def test_padded_sequences_have_the_dtype_of_the_first():
    numbers = pad_sequence([np.array([1, 2]), np.array([3]), np.array([], int)], True)
    assert numbers.tolist() == [[1, 2], [3, 0], [0, 0]] and numbers.dtype == jnp.int32
    assert pad_sequence([B.astype(jnp.bfloat16), A]).dtype == jnp.bfloat16
    assert jax.jit(lambda a, b: pad_sequence([a, b]))(B.astype(jnp.bfloat16), A).dtype == jnp.bfloat16
    assert pad_sequence(jnp.ones((3, 2))).shape == (2, 3)  # the rows
    assert pad_sequence(iter([A]), True).shape == (1, 2, 2)
    assert isinstance(numbers, jax.Array)


def test_gradients_flow_through_the_elements_and_not_through_the_padding():
    weights = jnp.arange(8.0).reshape(2, 2, 2)
    gradients = jax.grad(lambda both: (pad_sequence(both, True) * weights).sum())([A, B])
    assert gradients[0].tolist() == [[0.0, 1.0], [2.0, 3.0]] and gradients[1].tolist() == [[4.0, 5.0]]


@pytest.mark.parametrize(
    ("sequences", "error", "message"),
    [
        ([], ValueError, "the list of sequences is empty"),
        (3, TypeError, r"takes a list of arrays; got 3 \(int\)"),
        ([A, [1.0]], TypeError, r"sequence 1 is .*\(list\)"),
        ([A, jnp.ones((1, 3))], ValueError, r"sequence 0 is float32\[2, 2\], sequence 1 is float32\[1, 3\]"),
        ([A, jnp.ones(1)], ValueError, "agree in all other axes"),
        ([jnp.ones(())], ValueError, "of shape"),
    ],
)
def test_sequences_that_cannot_be_padded(sequences, error, message):
    with pytest.raises(error, match=message):
        pad_sequence(sequences)
    with pytest.raises(ValueError, match="padding_side must be 'left' or 'right'; got 'up'"):
        pad_sequence([A], padding_side="up")
