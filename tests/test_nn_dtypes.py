"""Dtypes against torch's: what is promoted, what must be the same, and what half precision must not lose."""

import functools
import importlib
import itertools
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_contract import is_float, ours_of, theirs_of
from oracle import torch

import minitorch_jax as mt
from minitorch_jax import nn

F, TF = nn.functional, torch.nn.functional

pytestmark = pytest.mark.filterwarnings("ignore:(kl_div|reduction). 'mean':UserWarning", "ignore:kl_div:UserWarning")

FILES = [path.stem for path in sorted(Path(__file__).parent.glob("test_nn_*.py")) if path.stem != Path(__file__).stem]
CASES = [case for file in FILES for case in getattr(importlib.import_module(file), "CASES", [])]
DTYPES = ("uint8", "int32", "bfloat16", "float16", "float32")
FLOATS = DTYPES[2:]
ROUGH = {"bfloat16": 2**-6, "float16": 2**-9, "float32": 1e-5, "float64": 1e-12}  # relative errors that are allowed

A = np.array([[1, 3, 0, 2], [4, 1, 2, 5]])
B = np.array([[2, 3, 1, 0], [1, 2, 6, 3]])
BITS = np.array([[1, 0, 1, 1], [0, 1, 1, 0]])
SIGNS = 2 * BITS - 1

# Two arrays whose dtypes are combined, and what else the call takes.
PAIRS = {
    "l1_loss": (A, B),
    "mse_loss": (A, B),
    "smooth_l1_loss": (A, B),
    "huber_loss": (A, B),
    "poisson_nll_loss": (A, B),
    "gaussian_nll_loss": (A, B, 1.0),
    "kl_div": (A, B + 1),
    "binary_cross_entropy": ((A + 1) / 8, BITS),
    "binary_cross_entropy_with_logits": (A, BITS),
    "hinge_embedding_loss": (A, SIGNS),
    "soft_margin_loss": (A, BITS),
    "multilabel_soft_margin_loss": (A, BITS),
    "cross_entropy": (A, BITS),
    "pairwise_distance": (A, B),
    "cosine_similarity": (A, B),
    "cosine_embedding_loss": (A, B, np.array([1, -1])),
    "margin_ranking_loss": (A, B, SIGNS),
    "triplet_margin_loss": (A, B, np.float32(B + 1)),
    "triplet_margin_with_distance_loss": (A, B, np.float32(B + 1)),
}
# torch gives the result the dtype of the target there, and so loses digits of the logits
TO_THE_TARGET = {("binary_cross_entropy_with_logits", one, two) for one, two in itertools.permutations(FLOATS, 2)}
WEIGHTED = ("l1_loss", "mse_loss", "huber_loss", "multilabel_soft_margin_loss", "cross_entropy")


def no_gradients(name, dtypes):
    """Where torch refuses to differentiate what it computes, or gives NaN."""
    return (name == "huber_loss" and dtypes[0] != dtypes[1]) or (name == "soft_margin_loss" and dtypes[1] == "uint8")


def in_torch(name, arrays, dtypes):
    """The value, and the gradients of floating arrays; or None if torch refuses these dtypes."""
    one, two = (torch.tensor(a).to(getattr(torch, dtype)) for a, dtype in zip(arrays, dtypes, strict=False))
    differentiable = [x.requires_grad_() for x in (one, two) if x.is_floating_point()]
    if name == "soft_margin_loss":
        two, differentiable = two.detach(), differentiable[:1]  # torch has no derivative of its target
    if no_gradients(name, dtypes):
        one, two, differentiable = one.detach(), two.detach(), ()
    rest = [torch.tensor(x) if isinstance(x, np.ndarray) else x for x in arrays[2:]]
    try:
        out = getattr(TF, name)(one, two, *rest)
        gradients = torch.autograd.grad(out.sum(), differentiable, allow_unused=True) if out.requires_grad else ()
    except (RuntimeError, NotImplementedError):
        return None
    return out, gradients


def in_ours(name, arrays, dtypes):
    one, two, *rest = (jnp.asarray(a) if isinstance(a, np.ndarray) else a for a in arrays)
    one, two = one.astype(dtypes[0]), two.astype(dtypes[1])
    places = [i for i, x in enumerate((one, two)) if is_float(x)]
    places = places[:1] if name == "soft_margin_loss" else places

    def total(*pair):
        out = getattr(F, name)(*pair, *rest)
        return out.sum(), out

    if not places:
        return total(one, two)[1], ()
    gradients, out = jax.grad(total, places, has_aux=True)(one, two)
    return out, gradients


@functools.cache
def _compiled(dtypes):
    """Of every function: its results, by one program for all, and which functions refuse these dtypes."""
    refused = {}
    for name, arrays in PAIRS.items():
        try:
            jax.eval_shape(lambda name=name, arrays=arrays: in_ours(name, arrays, dtypes))
        except (TypeError, ValueError) as error:
            refused[name] = str(error)
    names = [name for name in PAIRS if name not in refused]
    return jax.jit(lambda: {name: in_ours(name, PAIRS[name], dtypes) for name in names})(), refused


@pytest.mark.one_in(9)
@pytest.mark.parametrize(
    "dtypes",
    [
        pytest.param(pair, marks=pytest.mark.slow if "int32" in pair else ())
        for pair in itertools.product(DTYPES, DTYPES)
    ],
    ids=str,
)
def test_two_dtypes_are_promoted_or_refused_as_in_torch(dtypes):
    """Result dtype, value and gradients of every loss and distance, for every pair of dtypes."""
    results, refused = _compiled(dtypes)
    rough = max(ROUGH.get(dtype, 0) for dtype in (*dtypes, "float32"))
    for name, arrays in PAIRS.items():
        expected = in_torch(name, arrays, dtypes)
        if name == "margin_ranking_loss" and dtypes == ("uint8", "uint8"):
            continue  # its differences wrap around in torch
        if expected is None:
            how = "class numbers" if name == "cross_entropy" and dtypes[0] in FLOATS else "astype"
            assert how in refused.get(name, ""), f"{name} of {dtypes}: torch refuses it"
            continue
        assert name not in refused, refused.get(name)
        (out, gradients), (theirs, their_gradients) = results[name], expected
        if (name, *dtypes) not in TO_THE_TARGET:
            assert str(theirs.dtype) == f"torch.{out.dtype}", f"{name} of {dtypes}"
        else:
            assert out.dtype == jnp.float32
        pairs = [(out, theirs), *zip(gradients, their_gradients, strict=not no_gradients(name, dtypes))]
        for mine, other in pairs:
            other = np.zeros(mine.shape) if other is None else other.detach().double().numpy()
            scale = np.abs(other).max(initial=1e-3)
            np.testing.assert_allclose(
                np.float64(mine), other, rtol=rough, atol=rough * scale, err_msg=f"{name} of {dtypes}"
            )


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_are_promoted_as_in_torch(name):
    target = np.float32(BITS)
    weight = np.array([1.0, 2.0, 3.0, 1.0]) if name in WEIGHTED[3:] else np.float64(B)
    for dtype, other in itertools.product(FLOATS, DTYPES):
        theirs = getattr(TF, name)(
            torch.tensor(A).to(getattr(torch, dtype)),
            torch.tensor(target).to(getattr(torch, dtype)),
            weight=torch.tensor(weight).to(getattr(torch, other)),
        )
        out = jax.eval_shape(
            lambda dtype=dtype, other=other: getattr(F, name)(
                jnp.asarray(A).astype(dtype),
                jnp.asarray(target).astype(dtype),
                weight=jnp.asarray(weight).astype(other),
            )
        )
        assert str(theirs.dtype) == f"torch.{out.dtype}", (dtype, other)


def test_sixty_four_bits_are_promoted_as_in_torch():
    """float64 beside anything else gives float64, with all its digits."""
    with jax.enable_x64(True):
        for dtypes in (("float32", "float64"), ("float64", "float32"), ("float64", "float64")):
            expected = {name: in_torch(name, arrays, dtypes) for name, arrays in PAIRS.items()}
            allowed = [name for name in PAIRS if expected[name] is not None]
            for name in PAIRS.keys() - set(allowed):
                with pytest.raises(TypeError, match="astype"):
                    in_ours(name, PAIRS[name], dtypes)
            results = jax.jit(
                lambda dtypes=dtypes, names=allowed: {n: in_ours(n, PAIRS[n], dtypes)[0] for n in names}
            )()
            for name, out in results.items():
                theirs = expected[name][0].detach()
                if name == "binary_cross_entropy_with_logits":
                    theirs = theirs.double()  # torch gives the target's dtype
                assert str(theirs.dtype) == f"torch.{out.dtype}", (name, dtypes)
                rough = 1e-12 if "float32" not in dtypes else 1e-5
                np.testing.assert_allclose(out, theirs, rtol=rough, err_msg=f"{name} of {dtypes}")


def first_cases(functions):
    """The first case of each function that has a floating input and draws nothing; or of each layer."""
    found = {}
    for case in CASES:
        draws_or_has_none = case.random or not any(map(is_float, jax.tree.leaves(case.inputs)))
        is_empty = any(0 in np.shape(leaf) for leaf in jax.tree.leaves((case.inputs, case.args)))
        if case.is_function is functions and not is_empty and not (functions and draws_or_has_none):
            found.setdefault(case.name, case)
    return list(found.values())


def cast(tree, dtype, as_type):
    """Floating arrays or tensors in another dtype."""
    return jax.tree.map(lambda a: as_type(a, dtype) if floating(a) else a, tree)


def floating(a):
    return a.is_floating_point() if isinstance(a, torch.Tensor) else is_float(a)


def shapes_of(made, inputs, call):
    """Of what a function gives, or a layer, which may change itself."""
    if isinstance(made, mt.Module):
        made.train("Norm" in type(made).__name__)  # nothing may be drawn
        return jax.eval_shape(lambda made, inputs: (made(*inputs, **call), made), made, inputs)[0]
    return jax.eval_shape(lambda: made(*inputs, **call))


def outcome_in_torch(case, dtype, layer_dtype=None):
    """The dtypes of the results, or None if torch refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = case.theirs()
    if not case.is_function:
        made.to(getattr(torch, layer_dtype or dtype))
    inputs, call = cast((theirs_of(case.inputs), theirs_of(case.call)), dtype, lambda a, d: a.to(getattr(torch, d)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = made(*inputs, **call)
    except (RuntimeError, NotImplementedError, ValueError):
        return None
    return [str(x.dtype).removeprefix("torch.") for x in jax.tree.leaves(out) if isinstance(x, torch.Tensor)]


def outcome(case, dtype, layer_dtype=None):
    """The dtypes of the results, or the text of a refusal."""
    made = case.ours()
    if not case.is_function:
        made.astype(jnp.dtype(layer_dtype or dtype))
    inputs, call = cast((ours_of(case.inputs), ours_of(case.call)), dtype, lambda a, d: a.astype(d))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = shapes_of(made, inputs, call)
    except (TypeError, ValueError) as error:
        return str(error)
    return [str(x.dtype) for x in jax.tree.leaves(out)]


@pytest.mark.slow
@pytest.mark.one_in(2)
@pytest.mark.parametrize("functions", [True, False])
def test_no_constant_is_of_sixty_four_bits(functions):
    """With JAX's 64 bits on, float32 stays float32, and float64 float64, in everything."""
    with jax.enable_x64(True):
        for case in first_cases(functions):
            for dtype in ("float32", "float64"):
                expected = outcome_in_torch(case, dtype)
                if expected is None or not any(map(floating, jax.tree.leaves(theirs_of(case.inputs)))):
                    continue
                got = outcome(case, dtype)
                floats = [name for name in expected if name.startswith("float")]
                assert not isinstance(got, str), f"{case.name} of {dtype}: {got}"
                assert [name for name in got if name.startswith("float")] == floats, f"{case.name} of {dtype}"


def test_ctc_has_all_digits_of_float64():
    log_p = np.log(np.random.default_rng(0).dirichlet(np.ones(4), (6, 2)))
    labels, lengths = np.array([[1, 2], [3, 1]]), ((6, 6), (2, 2))
    expected = TF.ctc_loss(torch.tensor(log_p), torch.tensor(labels), *lengths)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # of integers
        got = jax.jit(lambda log_p: F.ctc_loss(log_p, jnp.asarray(labels), *lengths))(jnp.asarray(log_p))
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, expected, rtol=1e-12)


# They move numbers about or compare them, whatever these are; torch has not written that for all integers.
MOVED = {"max_pool1d", "max_pool2d", "max_unpool2d", "adaptive_max_pool1d", "unfold", "interpolate"}
# What says so itself, where torch gives its integers back or makes floats of them.
REFUSED_HERE = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "l1_loss"}
REFUSED_HERE |= {"lp_pool1d", "lp_pool2d", "smooth_l1_loss", "hinge_embedding_loss"}  # of sums, in torch


@pytest.mark.parametrize("case", first_cases(functions=True), ids=lambda case: case.name)
def test_functions_of_integers_give_what_torch_gives_or_refuse_them(case):
    for dtype in ("uint8", "int32"):
        expected, got = outcome_in_torch(case, dtype), outcome(case, dtype)
        if case.name in MOVED:
            continue
        if expected is None or case.name in REFUSED_HERE:
            assert isinstance(got, str) and ("astype" in got or "min_val" in got), f"{dtype}: {got}"
        else:
            assert got == expected, dtype


@functools.cache
def layers_with_arrays():
    return [case for case in first_cases(functions=False) if has_arrays(case)]


def has_arrays(case):
    """Without making them: every worker that collects these tests would compile what does."""

    def make():
        with mt.rng(jax.random.key(0)):
            return case.ours()

    return bool(jax.tree.leaves(jax.eval_shape(make)))


def test_layers_with_arrays_are_all_there():
    assert len(layers_with_arrays()) > 35


@pytest.mark.one_in(8)
@pytest.mark.parametrize("case", layers_with_arrays(), ids=lambda case: case.name)
def test_parameters_and_inputs_of_two_dtypes_are_refused_where_torch_refuses_them(case):
    """All that torch allows has torch's dtype: a normalisation in float32 of bfloat16, an index into any table."""
    for layer_dtype, dtype in (("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")):
        expected, got = outcome_in_torch(case, dtype, layer_dtype), outcome(case, dtype, layer_dtype)
        if expected is None:
            assert isinstance(got, str), f"{layer_dtype} on {dtype} gives {got}"
            assert all(word in got for word in ("astype", layer_dtype, dtype))
            assert any(name in got for name in ("weight", "running_mean", "_random_samples")), got
        else:
            assert got == expected, f"{layer_dtype} on {dtype}"


@pytest.mark.parametrize("case", layers_with_arrays(), ids=lambda case: case.name)
def test_numpys_float64_and_weak_types_fit_any_layer(case):
    """JAX makes float32 of the first while its 64 bits are off, and lets the second follow."""
    made = case.ours()
    inputs, call = ours_of((case.inputs, case.call))
    expected = shapes_of(made, inputs, call)
    inputs, call = cast((case.inputs, case.call), np.float64, lambda a, d: a.astype(d))
    inputs, call = jax.tree.map(lambda a: a if is_float(a) else jnp.asarray(a), (inputs, call))
    got, _ = jax.eval_shape(lambda made: (made(*inputs, **call), made), made)  # NumPy's arrays themselves
    assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(lambda a: a.dtype, expected)
    if case.name.startswith(("Linear", "Conv", "LSTM", "GRU", "RNN", "Bilinear", "PReLU")):
        made.astype(jnp.bfloat16)
        inputs = jax.tree.map(lambda a: jnp.full(a.shape, 0.5) if is_float(a) else a, inputs)
        got = shapes_of(made, inputs, call)
        assert all(a.dtype == jnp.bfloat16 for a in jax.tree.leaves(got) if is_float(a))


# -- half precision, and large numbers --------------------------------------------------------------------------------

LARGE = np.full((2, 768), 10.0)  # whose squares add up to more than float16 has
OTHER = np.linspace(-10, 10, 2 * 768).reshape(2, 768)
OVERFLOWING = {
    "cosine_similarity": (LARGE, OTHER),
    "pairwise_distance": (LARGE, OTHER),
    "cosine_embedding_loss": (LARGE, OTHER, np.array([1, -1])),
    "triplet_margin_loss": (LARGE, OTHER, -OTHER),
    "normalize": (LARGE,),
    "smooth_l1_loss": (1000 * np.ones((2, 4)), np.zeros((2, 4))),
    "huber_loss": (1000 * np.ones((2, 4)), np.zeros((2, 4))),
    "mse_loss": (200 * np.ones((2, 4)), np.zeros((2, 4))),
    "gaussian_nll_loss": (1000 * np.ones((2, 4)), np.zeros((2, 4)), 1000 * np.ones((2, 4))),
    "layer_norm": (2000 * OTHER, (768,)),
    "gelu": (np.array([100.0, -100.0]),),
    "hardswish": (np.array([6e4, 2.0]),),
    "log_softmax": (np.zeros((1, 70_000)), 1),
    "softmax": (np.zeros((1, 70_000)), 1),
    "cross_entropy": (np.zeros((70_000, 2)), np.zeros(70_000, np.int64)),
    "binary_cross_entropy": (np.array([1.0, 0.0]), np.array([1.0, 0.0])),
}


@pytest.mark.one_in(6)
@pytest.mark.parametrize("name", OVERFLOWING)
def test_float16_overflows_nowhere_on_the_way(name):
    """Values and gradients are those of float64, which is torch's here, rounded."""
    arrays = OVERFLOWING[name]
    exact = [torch.tensor(a) if isinstance(a, np.ndarray) else a for a in arrays]
    exact[0].requires_grad_()
    expected = getattr(TF, name)(*exact)
    (gradient,) = torch.autograd.grad(expected.sum(), exact[0])
    kwargs = {"approximate": "tanh"} if name == "gelu" else {}

    def total(x):
        rest = [
            jnp.asarray(a, jnp.float16 if a.dtype == float else int) if isinstance(a, np.ndarray) else a for a in arrays
        ]
        out = getattr(F, name)(x, *rest[1:], **kwargs)
        return out.astype(jnp.float32).sum(), out

    mine, out = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(arrays[0], jnp.float16))
    assert out.dtype == mine.dtype == jnp.float16
    np.testing.assert_allclose(np.float64(out), expected.detach(), rtol=4e-3, atol=1e-3)
    scale = float(gradient.abs().max())
    np.testing.assert_allclose(np.float64(mine), gradient, rtol=4e-3, atol=max(4e-3 * scale, 1e-7))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_of_large_and_of_small_numbers(dtype):
    """These dtypes have the numbers, but not their squares."""
    powers, rough = (1.5, 2.0, 3.0), 1e-5 if dtype == "float32" else 2e-2

    @jax.jit
    def work(a):
        def distance(a, p):
            return F.pairwise_distance(a, jnp.zeros_like(a), p, 0.0)

        def similarity(a):
            return F.cosine_similarity(a, jnp.ones_like(a)).sum()

        norms = [distance(a, p) for p in powers]
        gradients = [jax.grad(lambda a, p=p: distance(a, p).sum())(a) for p in powers]
        loss = F.cosine_embedding_loss(a, -a, jnp.array([1]))
        return norms, gradients, F.normalize(a, eps=0.0), F.cosine_similarity(a, a), jax.grad(similarity)(a), loss

    for size in (1e20, 1e37, 1e-30):
        norms, gradients, unit, similarity, slope, loss = work(jnp.array([[3.0, 0.0, -4.0]], dtype) * size)
        for p, norm, gradient in zip(powers, norms, gradients, strict=True):
            expected = (3**p + 4**p) ** (1 / p)
            np.testing.assert_allclose(np.float64(norm), [expected * size], rtol=rough)
            by_hand = np.array([[3, 0, -4]]) * np.array([[3, 1, 4.0]]) ** (p - 2) / expected ** (p - 1)
            np.testing.assert_allclose(np.float64(gradient), by_hand, rtol=rough)
        np.testing.assert_allclose(np.float64(unit), [[0.6, 0, -0.8]], rtol=rough)
        if size > 1:
            np.testing.assert_allclose(np.float64(similarity), [1.0], rtol=rough)
            np.testing.assert_allclose(np.float64(loss), 2.0, rtol=rough)
            assert np.abs(np.float64(slope)).max() < 1e-15


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", ["smooth_l1_loss", "huber_loss"])
def test_gradients_beyond_the_parabola_are_one(name, dtype):
    d = jnp.array([500.0, -1400.0, 6e4 if dtype == "float16" else 3e38], dtype)
    width = {"beta" if name == "smooth_l1_loss" else "delta": 0.01}
    gradient = jax.jit(jax.grad(lambda d: getattr(F, name)(d, jnp.zeros_like(d), reduction="sum", **width)))(d)
    np.testing.assert_allclose(
        np.float32(gradient), np.float32([1, -1, 1]) * (1 if "beta" in width else 0.01), rtol=1e-3
    )


def test_sums_of_many_losses_are_not_rounded_on_the_way():
    """bfloat16 counts no further than 256."""
    classes = jnp.arange(1000, dtype=jnp.int32) % 3
    scores = jnp.zeros((1000, 3), jnp.bfloat16)
    weight = jnp.array([0.1, 0.2, 0.7], jnp.bfloat16)
    for kwargs in ({}, {"weight": weight}):
        loss = jax.jit(lambda kwargs: F.cross_entropy(scores, classes, **kwargs))(kwargs)
        np.testing.assert_allclose(float(loss), np.log(3), rtol=4e-3)


@pytest.mark.slow
def test_unsigned_integers_in_softmax_are_converted_first():
    x = np.array([[1, 200, 3]], np.uint8)
    for name in ("softmax", "log_softmax"):
        expected = getattr(TF, name)(torch.tensor(x), 1, dtype=torch.float32)
        np.testing.assert_allclose(getattr(F, name)(jnp.asarray(x), 1, dtype=jnp.float32), expected, rtol=1e-6)
        with pytest.raises(TypeError, match=f"{name} takes a floating input; got uint8.*astype"):
            getattr(F, name)(jnp.asarray(x), 1)
    with pytest.raises(TypeError, match="logsigmoid takes a floating input; got uint8"):
        F.logsigmoid(jnp.asarray(x))
    with pytest.raises(ValueError, match="hardtanh of uint8 needs min_val >= 0"):
        F.hardtanh(jnp.asarray(x))


@pytest.mark.slow
def test_a_refusal_names_the_parameter_and_both_ways_out():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).astype(jnp.bfloat16)
    match = r"bfloat16, float32 \(input float32\[5, 3\], weight bfloat16\[4, 3\].*`input.astype\(bfloat16\)`"
    with pytest.raises(TypeError, match=match + r".*`layer.astype\(float32\)`"):
        model(jnp.ones((5, 3)))
    with pytest.raises(TypeError, match=match):
        mt.backward(lambda model, x: model(x).sum(), model, jnp.ones((5, 3)))
    with pytest.raises(TypeError, match=r"BatchNorm1d takes parameters of the input's dtype; got float32 and bfloat16"):
        nn.BatchNorm1d(3, affine=False).astype(jnp.bfloat16)(jnp.ones((5, 3)))
