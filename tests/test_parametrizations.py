"""weight_norm, spectral_norm and orthogonal, against torch's: values, gradients, buffers, training."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_contract import Case, integers, numbers, ours_of, theirs_of
from numpy.testing import assert_allclose, assert_array_equal
from oracle import torch

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.nn.utils import parametrizations, parametrize

X = numbers(4, 3, 5)
LINEAR = Case("Linear", (5, 3), inputs=(X,))
WIDE, SQUARE = Case("Linear", (3, 5), inputs=(X.swapaxes(1, 2),)), Case("Linear", (5, 5), inputs=(X,))
CONV = Case("Conv2d", (2, 3, 2), inputs=(numbers(2, 2, 4, 4),))
TRANSPOSED = Case("ConvTranspose1d", (2, 3, 2), inputs=(numbers(2, 2, 4),))
EMBEDDING = Case("Embedding", (5, 3), inputs=(integers(5, 4, 2),))
LSTM = Case("LSTM", (5, 2), inputs=(X,))
ATTENTION = Case("MultiheadAttention", (4, 2), inputs=(numbers(3, 2, 4),) * 3)
NORM = Case("LayerNorm", (5,), inputs=(X,))

# layer, attribute, parametrization, its arguments
CASES: list[tuple[Case, str, str, dict[str, Any]]] = [
    *[(LINEAR, "weight", "weight_norm", {"dim": dim}) for dim in (0, 1, None, -1)],
    (CONV, "weight", "weight_norm", {}),
    (CONV, "weight", "weight_norm", {"dim": 2}),
    (EMBEDDING, "weight", "weight_norm", {}),
    (LSTM, "weight_ih_l0", "weight_norm", {}),
    (ATTENTION, "in_proj_weight", "weight_norm", {"dim": 1}),
    (LINEAR, "weight", "spectral_norm", {}),
    (LINEAR, "weight", "spectral_norm", {"n_power_iterations": 3, "dim": 1, "eps": 0.5}),
    (CONV, "weight", "spectral_norm", {"dim": -3}),
    (TRANSPOSED, "weight", "spectral_norm", {}),
    (EMBEDDING, "weight", "spectral_norm", {}),
    (LSTM, "weight_hh_l0", "spectral_norm", {}),
    (LSTM, "weight_ih_l0", "spectral_norm", {}),
    (NORM, "weight", "spectral_norm", {}),
    *[
        (case, "weight", "orthogonal", {"orthogonal_map": name, "use_trivialization": trivialized})
        for case in (LINEAR, WIDE, SQUARE)
        for name in ("matrix_exp", "cayley", "householder")
        for trivialized in (True, False)
    ],
    (LSTM, "weight_hh_l0", "orthogonal", {}),
    (ATTENTION, "in_proj_weight", "orthogonal", {}),
    (CONV, "weight", "orthogonal", {"orthogonal_map": "cayley"}),
]


def both(case: Case, name: str, how: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """The parametrized layers, ours with torch's originals and buffers."""
    theirs, ours = case.theirs(), case.ours()
    getattr(torch.nn.utils.parametrizations, how)(theirs, name, **options)
    assert getattr(parametrizations, how)(ours, name, **options) is ours
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def out_of(layer: Any, inputs: Any) -> Any:
    out = layer(*inputs)
    return out[0] if isinstance(out, tuple) else out


def is_slow(case: Case, name: str, how: str, options: dict[str, Any]) -> bool:
    """Most of the combinations of `orthogonal`, and layers that add little."""
    quick = [(LINEAR, "householder", True), (WIDE, "householder", False), (SQUARE, "matrix_exp", True)]
    quick += [(SQUARE, "cayley", False), (WIDE, "cayley", True)]
    if how == "orthogonal":
        given = (options.get("orthogonal_map"), options.get("use_trivialization"))
        return case in (CONV, ATTENTION) or (len(options) == 2 and (case, *given) not in quick)
    return (
        case is EMBEDDING
        or ((case, name) == (LSTM, "weight_ih_l0") and how == "spectral_norm")
        or -1 in options.values()
    )


def marked(cases: tuple[Case, ...]) -> list[Any]:
    """The positions in CASES of what is about these layers."""
    return [
        pytest.param(i, id=f"{row[0].name}-{row[1]}-{row[2]}-{i}", marks=pytest.mark.slow if is_slow(*row) else ())
        for i, row in enumerate(CASES)
        if row[0] in cases
    ]


@pytest.mark.one_in(9)
@pytest.mark.parametrize("i", marked(tuple(row[0] for row in CASES)))
def test_it_trains_as_torchs(i: int) -> None:
    """The same names; and after each of some steps of SGD or Adam the same loss, parameters and buffers."""
    case, name, how, options = CASES[i]
    ours, theirs = both(case, name, how, options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    mine, its = ours_of(case.inputs), theirs_of(case.inputs)
    target = numbers(*jax.eval_shape(out_of, ours.eval(), mine).shape, seed=7)
    ours.train()
    cls, settings = (("SGD", {"lr": 0.1, "momentum": 0.9}), ("Adam", {"lr": 0.05, "eps": 1e-4}))[i % 2]
    opt = getattr(optim, cls)([ours], **settings)
    other = getattr(torch.optim, cls)(theirs.parameters(), **settings)

    @mt.jit
    def step() -> Any:
        opt.zero_grad()
        loss = mt.backward(lambda layer, *inputs: ((out_of(layer, inputs) - target) ** 2).mean(), ours, *mine)
        opt.step()
        return loss

    for _ in range(4):
        with parametrize.cached():  # torch's LSTM reads its weights several times
            loss = step()
        other.zero_grad()
        with torch.nn.utils.parametrize.cached():
            out = theirs(*its)
        expected = ((out[0] if case in (LSTM, ATTENTION) else out) - torch.from_numpy(target.copy())).pow(2).mean()
        expected.backward()
        other.step()
        assert_allclose(loss, float(expected.detach()), rtol=1e-4)
        for (path, array), value in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert_allclose(array, np.asarray(value), rtol=1e-3, atol=2e-5, err_msg=path)
    theirs.eval()
    assert_allclose(getattr(ours.eval(), name), np.asarray(getattr(theirs, name)), rtol=1e-3, atol=2e-5)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("i", marked((LINEAR, WIDE, SQUARE, CONV)))
def test_it_begins_as_torchs(i: int) -> None:
    """From the same weight, torch's originals; and the value that right_inverse promises."""
    case, name, how, options = CASES[i]
    theirs, ours = case.theirs(), case.ours()
    ours.load_state_dict(theirs.state_dict())
    before = getattr(ours, name)
    getattr(torch.nn.utils.parametrizations, how)(theirs, name, **options)
    getattr(parametrizations, how)(ours, name, **options)
    for path, value in theirs.state_dict().items():
        if not path.endswith(("_u", "_v", "base")):
            assert_allclose(ours.state_dict()[path], np.asarray(value), rtol=1e-4, atol=1e-6, err_msg=path)
    if how == "spectral_norm":
        return
    ours.eval()
    theirs.eval()
    assert_allclose(getattr(ours, name), np.asarray(getattr(theirs, name)), rtol=1e-4, atol=1e-5)
    if how == "weight_norm":
        assert_allclose(getattr(ours, name), before, rtol=1e-5)
    elif options.get("use_trivialization", True):  # what is orthogonal may be assigned
        matrix = getattr(ours, name)
        setattr(ours, name, matrix)
        assert_allclose(getattr(ours, name), matrix, atol=1e-6)
        setattr(ours, name, 3 * matrix)
        assert_allclose(getattr(ours, name), matrix, atol=1e-5)
        tall = matrix if matrix.shape[-2] > matrix.shape[-1] else jnp.swapaxes(matrix, -1, -2)
        eye = jnp.broadcast_to(jnp.eye(tall.shape[-1]), (*tall.shape[:-2], *tall.shape[-1:] * 2))
        assert_allclose(jnp.swapaxes(tall, -1, -2) @ tall, eye, atol=1e-5)


# -- power iteration --------------------------------------------------------------------------------------------------


def spectral(*shape: int) -> Any:
    return parametrizations.spectral_norm(nn.Linear(*shape, key=jax.random.key(0)), key=jax.random.key(1))


def vectors(layer: Any) -> list[Any]:
    return [layer.parametrizations.weight[0]._u, layer.parametrizations.weight[0]._v]


def by_hand(layer: Any, steps: int) -> list[Any]:
    """The vectors after some more steps, in float64."""
    weight = np.float64(layer.parametrizations.weight.original)
    u, v = map(np.float64, vectors(layer))
    for _ in range(steps):
        u = weight @ v / np.linalg.norm(weight @ v)
        v = weight.T @ u / np.linalg.norm(weight.T @ u)
    return [u, v]


def called(layer: Any, x: Any) -> None:
    for _ in range(3):
        layer(x)


def compiled(layer: Any, x: Any) -> None:
    step = mt.jit(lambda layer, x: layer(x).sum())
    for _ in range(3):
        step(layer, x)


def scanned(layer: Any, x: Any) -> None:
    mt.scan(lambda x: layer(x).sum(), jnp.stack([x] * 3))


def differentiated(layer: Any, x: Any) -> None:
    for _ in range(3):
        mt.backward(lambda layer, x: layer(x).sum(), layer, x)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("way", [called, compiled, scanned, differentiated])
def test_power_iteration_goes_on_in_training_and_not_in_evaluation(way: Any) -> None:
    layer = spectral(5, 4)
    expected = by_hand(layer, 3)
    way(layer, jnp.ones((2, 5)))
    for mine, other in zip(vectors(layer), expected, strict=True):
        assert_allclose(mine, other, rtol=1e-4, atol=1e-6)
    layer.eval()
    before = vectors(layer)
    way(layer, jnp.ones((2, 5)))
    for mine, other in zip(vectors(layer), before, strict=True):
        assert_array_equal(mine, other)


def test_the_first_vectors_are_random_and_iterated_fifteen_times() -> None:
    layer = nn.Linear(30, 20, key=jax.random.key(0))
    made = [parametrizations.spectral_norm(copy.deepcopy(layer), key=jax.random.key(i)) for i in (1, 1, 2)]
    assert_array_equal(vectors(made[0])[0], vectors(made[1])[0])
    assert not np.array_equal(vectors(made[0])[0], vectors(made[2])[0])
    mt.seed(3)
    one = parametrizations.spectral_norm(copy.deepcopy(layer))
    mt.seed(3)
    assert_array_equal(vectors(one)[0], vectors(parametrizations.spectral_norm(copy.deepcopy(layer)))[0])
    assert_allclose(jnp.linalg.norm(one.eval().weight, 2), 1, atol=0.1)  # the estimate is good from the start


def test_a_plain_transform_returns_the_changed_copy() -> None:
    layer = spectral(5, 4)
    expected = by_hand(layer, 1)
    changed, out = jax.jit(lambda layer, x: (layer, layer(x)))(layer, jnp.ones((2, 5)))
    assert out.shape == (2, 4)
    assert_allclose(vectors(changed)[0], expected[0], rtol=1e-4, atol=1e-6)
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), spectral(5, 4).eval(), spectral(5, 4).eval())
    assert jax.vmap(lambda layer: layer(jnp.ones((2, 5))))(stacked).shape == (2, 2, 4)


def test_no_gradient_goes_through_the_vectors() -> None:
    """The derivative of W / (u' W v) with fixed u and v, as torch has it."""
    layer = spectral(3, 2).eval()
    u, v = vectors(layer)
    grads = jax.grad(lambda layer: (layer.weight * jnp.arange(6.0).reshape(2, 3)).sum())(layer)
    expected = jax.grad(lambda w: (w / (u @ w @ v) * jnp.arange(6.0).reshape(2, 3)).sum())
    assert_allclose(
        grads.parametrizations.weight.original, expected(layer.parametrizations.weight.original), rtol=1e-5, atol=1e-6
    )


# -- composition, dtypes, refusals ------------------------------------------------------------------------------------


def test_orthogonal_after_another_parametrization() -> None:
    """Where torch's `base` stays None, and its forward fails, the map begins as it is."""
    layer = parametrizations.weight_norm(nn.Linear(4, 4))
    parametrizations.orthogonal(layer)
    assert_allclose(layer.weight @ layer.weight.T, jnp.eye(4), atol=1e-5)
    assert list(layer.parametrizations.weight.state_dict())[:2] == ["original0", "original1"]
    for value in jax.grad(lambda layer: layer.weight[0].sum())(layer).parameters():
        assert np.isfinite(value).all()


def test_weight_decay_leaves_a_matrix_orthogonal() -> None:
    layer = parametrizations.orthogonal(nn.Linear(3, 5, bias=False), orthogonal_map="householder")
    opt = optim.SGD([layer], lr=0.5, weight_decay=0.5)
    for _ in range(3):
        opt.zero_grad()
        mt.backward(lambda layer: layer.weight[0].sum(), layer)
        opt.step()
    assert_allclose(layer.weight.T @ layer.weight, jnp.eye(3), atol=1e-5)


def test_a_batch_of_matrices_is_orthogonal() -> None:
    layer = nn.Bilinear(3, 4, 2)
    parametrizations.orthogonal(layer)
    assert_allclose(layer.weight @ jnp.swapaxes(layer.weight, 1, 2), jnp.stack([jnp.eye(3)] * 2), atol=1e-5)


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm"])
def test_it_follows_astype_and_autocast(how: str) -> None:
    layer = getattr(parametrizations, how)(nn.Linear(4, 4)).eval()
    with mt.autocast(jnp.bfloat16):
        assert layer(jnp.ones((2, 4))).dtype == jnp.bfloat16 and layer.weight.dtype == jnp.float32
    layer.astype(jnp.bfloat16)
    assert layer.weight.dtype == jnp.bfloat16 and layer(jnp.ones((2, 4), jnp.bfloat16)).dtype == jnp.bfloat16


REFUSED = [
    ("weight_norm", (nn.ReLU,), {}, ValueError, "ReLU has no parameter or buffer 'weight'"),
    ("spectral_norm", (nn.Linear, 2, 2), {"name": "wieght"}, ValueError, "no parameter or buffer 'wieght'"),
    ("orthogonal", (nn.Linear, 2, 2), {"name": "in_features"}, ValueError, "no parameter or buffer 'in_features'"),
    ("weight_norm", (nn.Linear, 2, 2), {"dim": 2}, ValueError, "None or an axis of 'weight', 0 to 1; got 2"),
    ("spectral_norm", (nn.Linear, 2, 2), {"dim": 2}, IndexError, "an axis of 'weight', which has 2; got 2"),
    ("spectral_norm", (nn.Linear, 2, 2), {"n_power_iterations": 0}, ValueError, "must be positive; got 0"),
    ("orthogonal", (nn.Linear, 2, 2), {"name": "bias"}, ValueError, r"'bias' has the shape \(2,\)"),
    (
        "orthogonal",
        (nn.Linear, 2, 2),
        {"orthogonal_map": "qr"},
        ValueError,
        "'matrix_exp', 'cayley', 'householder'; got",
    ),
]


@pytest.mark.parametrize(("how", "made", "options", "error", "message"), REFUSED)
def test_what_is_refused_changes_nothing(how: str, made: Any, options: Any, error: Any, message: str) -> None:
    layer = made[0](*made[1:])
    before = jax.tree.structure(layer)
    with pytest.raises(error, match=message):
        getattr(parametrizations, how)(layer, **options)
    assert jax.tree.structure(layer) == before


@pytest.mark.parametrize("orthogonal_map", ["matrix_exp", "cayley"])
def test_what_cannot_be_assigned_says_so(orthogonal_map: str) -> None:
    layer = parametrizations.orthogonal(nn.Linear(2, 2), orthogonal_map=orthogonal_map, use_trivialization=False)
    with pytest.raises(NotImplementedError, match="use_trivialization=False: leave that out"):
        layer.weight = jnp.eye(2)
    layer = parametrizations.orthogonal(nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"of shape \(3, 2\); got \(2, 3\)"):
        layer.weight = jnp.ones((2, 3))
    assert parametrize.is_parametrized(layer)


@pytest.mark.one_in(9)
@pytest.mark.parametrize(
    "change", [parametrizations.spectral_norm, parametrizations.weight_norm, parametrizations.lora]
)
def test_a_batchnorm_is_folded_into_what_a_parametrized_layer_computes(change):
    """In torch, as of 2.13, spectral_norm divides the folded weight by its norm again."""
    layer, norm, x = change(nn.Linear(3, 4)).eval(), nn.BatchNorm1d(4).eval(), jnp.ones((2, 3))
    norm.running_var = norm.running_var * 5
    fused = nn.utils.fusion.fuse_linear_bn_eval(layer, norm)
    assert_allclose(fused(x), norm(layer(x)), rtol=1e-5, atol=1e-6)
    assert "weight" in fused.state_dict() and "weight" not in layer.state_dict()
