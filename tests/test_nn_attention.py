"""Attention, against torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_contract import Case, LayerContract, Refusal, numbers
from oracle import torch

import minitorch_jax as mt
from minitorch_jax import nn
from minitorch_jax.nn.functional import attention as functional_attention

Q, K, V = numbers(3, 2, 4), numbers(5, 2, 4, seed=1), numbers(5, 2, 4, seed=2)  # (L, N, E), (S, N, E)
HIDDEN = np.array([[False, False, True, False, True], [True, False, False, False, False]])  # (N, S)
CAUSAL = np.triu(np.full((3, 3), -np.inf, np.float32), 1)
SOME = np.random.default_rng(0).random((3, 5)) < 0.4
SOME[:, 0] = False
ADDED = numbers(3, 5, seed=3)


def first_axis_last(*arrays):
    return tuple(np.ascontiguousarray(x.swapaxes(0, 1)) for x in arrays)


def mha(dropout=0.5, *args, inputs=(Q, K, V), call=None, **kwargs):
    """Compared in `eval` mode, and without dropout in training too; torch's output projection is a class of its own name."""
    args, call = (4, 2, dropout, *args), call or {}
    return Case("MultiheadAttention", args, kwargs, inputs=inputs, call=call, random=dropout > 0, repr=False)


CASES = [
    mha(0.0, call={"key_padding_mask": HIDDEN}),
    mha(0.0, call={"need_weights": False}),
    mha(call={"need_weights": False, "attn_mask": SOME, "key_padding_mask": HIDDEN}),
    mha(call={"average_attn_weights": False, "attn_mask": ADDED, "key_padding_mask": numbers(2, 5, seed=4)}),
    mha(
        call={"attn_mask": np.stack([SOME] * 3 + [np.roll(SOME, 1, 0)])},
        batch_first=True,
        inputs=first_axis_last(Q, K, V),
    ),
    mha(0.5, False, call={"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}, inputs=(Q, Q, Q)),
    mha(call={"attn_mask": CAUSAL, "is_causal": True}, inputs=(Q, Q, Q)),
    mha(call={"key_padding_mask": HIDDEN[0], "need_weights": False}, inputs=(Q[:, 0], K[:, 0], V[:, 0])),
    mha(call={"attn_mask": np.stack([SOME, SOME[::-1]])}, inputs=(Q[:, 0], K[:, 0], V[:, 0])),
    mha(add_bias_kv=True, call={"attn_mask": SOME, "key_padding_mask": HIDDEN}),
    mha(add_zero_attn=True, add_bias_kv=True, call={"attn_mask": ADDED, "need_weights": False}),
    mha(add_zero_attn=True, inputs=(Q[:, 0], K[:, 0], V[:, 0])),
    mha(kdim=3, vdim=5, inputs=(Q, numbers(5, 2, 3), numbers(5, 2, 5))),
    mha(kdim=3, bias=False, batch_first=True, inputs=first_axis_last(Q, numbers(5, 2, 3), V)),
]


def sdpa(*shapes, **kwargs):
    inputs = tuple(numbers(*shape, seed=i) for i, shape in enumerate(shapes))
    return Case("scaled_dot_product_attention", (), kwargs, inputs=inputs)


NONE = SOME.copy()
NONE[1] = False  # the second query sees nothing
CASES += [
    sdpa((2, 3, 4), (2, 5, 4), (2, 5, 6)),
    sdpa((3, 4), (5, 4), (5, 4), scale=0.3, attn_mask=ADDED),
    sdpa((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4), attn_mask=NONE),
    sdpa((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4), attn_mask=np.where(NONE, 0, -np.inf).astype(np.float32)),
    sdpa((2, 3, 4), (2, 3, 4), (2, 3, 4), is_causal=True),
    sdpa((1, 2, 5, 4), (1, 2, 3, 4), (1, 2, 3, 4), is_causal=True),
    sdpa((2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4), enable_gqa=True, attn_mask=np.stack([SOME, NONE])[:, None]),
    sdpa((2, 4, 3, 4), (2, 1, 5, 4), (2, 1, 5, 4), enable_gqa=True, is_causal=True),
    sdpa((2, 1, 3, 4), (1, 2, 5, 4), (2, 1, 5, 4)),
    sdpa((1, 2, 1, 4), (1, 2, 1, 4), (1, 2, 1, 4)),
]

INITIAL = [
    ("MultiheadAttention", (40, 2)),
    ("MultiheadAttention", (100, 2), {"kdim": 30, "vdim": 20, "add_bias_kv": True}),
]

REFUSALS = [
    Refusal("MultiheadAttention", (4, 3), match="multiple of num_heads; got embed_dim=4, num_heads=3"),
    Refusal("MultiheadAttention", (0, 1), match="sizes > 0"),
    Refusal("MultiheadAttention", (4, 2, 1.5), match="between 0 and 1", torch_too=False),  # torch's fails when training
    Refusal("MultiheadAttention", (4, 2), inputs=(Q, K, V[:3]), match=r"\(S, N, 4\), or without N; got \(3, 2, 4\), "),
    Refusal("MultiheadAttention", (4, 2), inputs=(Q, K[:, :1], V[:, :1]), match=r"\(5, 1, 4\), \(5, 1, 4\)"),
    Refusal("MultiheadAttention", (4, 2), inputs=(Q[:, 0], K, V), match=r"got \(3, 4\), \(5, 2, 4\)"),
    Refusal("MultiheadAttention", (4, 2), {"kdim": 3}, inputs=(Q, K, V), match=r"\(S, N, 3\)"),
    Refusal(
        "MultiheadAttention", (4, 2), inputs=(Q, K, V), call={"is_causal": True}, match="needs an attn_mask; got None"
    ),
    Refusal(
        "MultiheadAttention",
        (4, 2),
        inputs=(Q, K, V),
        call={"attn_mask": SOME.T},
        match=r"attn_mask must have shape \(3, 5\) or \(4, 3, 5\) here; got bool\[5, 3\]",
    ),
    Refusal(
        "MultiheadAttention",
        (4, 2),
        inputs=(Q, K, V),
        call={"key_padding_mask": HIDDEN[0]},
        match=r"key_padding_mask must have shape \(2, 5\) here; got bool\[5\]",
    ),
    Refusal(
        "MultiheadAttention",
        (4, 2),
        inputs=(Q, K, V),
        call={"attn_mask": SOME.astype(np.int8)},
        match=r"boolean or floating; got int8\[3, 5\]",
    ),
]


class TestLayers(LayerContract):
    pass


@pytest.mark.parametrize("bias", [True, False])
def test_one_product_projects_what_comes_from_one_array(bias):
    """Self-attention, and attention to one memory: the same numbers as with three arrays."""
    layer = nn.MultiheadAttention(4, 2, bias=bias)
    x, memory = jnp.asarray(Q), jnp.asarray(K)
    for mine, other in (((x, x, x), (x, x + 0, x + 0)), ((x, memory, memory), (x, memory, memory + 0))):
        np.testing.assert_allclose(layer(*mine)[0], layer(*other)[0], rtol=1e-5, atol=1e-6)
    products = [
        str(jax.make_jaxpr(f)(x)).count("dot_general") for f in (lambda x: layer(x, x, x), lambda x: x @ x[0].T)
    ]
    assert products == [4, 1]  # in, logits, values, out


@pytest.mark.slow
def test_a_query_that_sees_nothing_gives_nan_with_weights_and_nothing_without():
    """As torch does."""
    theirs = torch.nn.MultiheadAttention(4, 2)
    ours = nn.MultiheadAttention(4, 2)
    ours.load_state_dict(theirs.state_dict())
    x = jnp.asarray(Q)
    mask = np.zeros((3, 3), bool)
    mask[1] = True
    for need_weights in (True, False):
        t = torch.from_numpy(Q)
        expected = theirs(t, t, t, attn_mask=torch.from_numpy(mask), need_weights=need_weights)[0].detach().numpy()
        got = ours(x, x, x, attn_mask=jnp.asarray(mask), need_weights=need_weights)[0]
        assert np.isnan(expected).any() == need_weights
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    grads = jax.grad(lambda m: m(x, x, x, attn_mask=jnp.asarray(mask), need_weights=False)[0].sum())(ours)
    assert all(np.isfinite(g).all() for g in grads.parameters())


def test_the_causal_hint_reads_the_mask_where_keys_are_added():
    layer = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    x, mask = jnp.asarray(Q), jnp.asarray(CAUSAL)
    hinted, read = (layer(x, x, x, attn_mask=mask, is_causal=hint, need_weights=False)[0] for hint in (True, False))
    np.testing.assert_array_equal(hinted, read)


def test_nan_in_the_inputs_stays_visible():
    x = jnp.asarray(Q).at[0, 0, 0].set(jnp.nan)
    out = nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=jnp.ones((2, 2), bool))
    assert np.isnan(out[0]).all()


@pytest.mark.slow
def test_dropout_drops_weights_in_training_only():
    layer = nn.MultiheadAttention(4, 2, dropout=0.5)
    x = jnp.asarray(numbers(8, 1, 4))
    mt.seed(0)
    out, weights = layer(x, x, x, average_attn_weights=False)
    full = layer.eval()(x, x, x, average_attn_weights=False)[1]
    kept = weights != 0
    assert 0.3 < kept.mean() < 0.7
    np.testing.assert_allclose(weights[kept], 2 * full[kept], rtol=1e-5)
    assert not np.allclose(out, layer(x, x, x)[0])


def test_dropout_of_the_function_takes_a_key():
    q = jnp.asarray(Q)
    one, two = (
        nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5, dropout_key=jax.random.key(0)) for _ in "ab"
    )
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=1.0), 0 * q)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_numbers_stay_narrow_and_are_computed_in_float32(dtype):
    q, k, v = (jnp.asarray(numbers(2, 4, 8, seed=i, scale=4.0)).astype(dtype) for i in range(3))

    def f(q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=jnp.zeros((4, 4), dtype))

    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    out = f(q, k, v)
    assert out.dtype == dtype
    exact = nn.functional.scaled_dot_product_attention(*wide)
    np.testing.assert_allclose(np.float32(out), exact, rtol=0.02, atol=0.02)
    grads = jax.grad(lambda *x: f(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))(q, k, v)
    assert all(g.dtype == dtype and np.isfinite(np.float32(g)).all() for g in grads)


BLOCKS = {  # name: what `attention` holds at once, and the fewest rows of a block
    "causal, in 4 blocks": {"_CAUSAL_LENGTH": 1},
    "by blocks of 2 rows": {"_WEIGHTS": 0, "_BLOCK": 1, "_FEWEST_ROWS": 2, "_CAUSAL_LENGTH": 1},
}
SDPA = [case for case in CASES if case.name == "scaled_dot_product_attention"]


def with_blocks(monkeypatch, how):
    for name, value in BLOCKS[how].items():
        monkeypatch.setattr(functional_attention, name, value)


def agree(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.one_in(9)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(case), marks=[] if "enable_gqa" in case.kwargs else [pytest.mark.slow])
        for case in SDPA
        if "dropout_p" not in case.kwargs
    ],
)
def test_blocks_of_queries_compute_the_same(monkeypatch, case):
    """Of values and gradients, for lengths that the blocks do not divide, groups, masks and queries that see nothing."""
    inputs = [jnp.asarray(x) for x in case.inputs]
    kwargs = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in case.kwargs.items()}

    def run(*inputs):
        out = nn.functional.scaled_dot_product_attention(*inputs, **kwargs)
        return jnp.sum(jnp.sin(out)), out

    gradient = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)
    expected = jax.jit(gradient)(*inputs)
    gradient = jax.value_and_grad(lambda *inputs: run(*inputs), argnums=(0, 1, 2), has_aux=True)  # traced anew
    with_blocks(monkeypatch, "by blocks of 2 rows")
    assert "_in_blocks" in str(jax.make_jaxpr(gradient)(*inputs))
    agree(jax.jit(gradient)(*inputs), expected)


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=[] if "rows" in how else [pytest.mark.slow]) for how in BLOCKS]
)
def test_blocks_of_queries_have_every_derivative(monkeypatch, how):
    q, k, v = (jnp.asarray(numbers(2, 2, n, 4, seed=n)) for n in (7, 5, 5))
    mask = jnp.asarray(numbers(1, 7, 5))

    def loss(q, k, v, mask, scale):
        return jnp.sum(jnp.sin(nn.functional.scaled_dot_product_attention(q, k, v, mask, 0.0, True, scale)))

    def derivatives(*given):
        gradient = jax.grad(loss, argnums=(0, 1, 2, 3, 4))
        return gradient(*given), jax.jvp(gradient, given, jax.tree.map(jnp.cos, given))

    def over_batches():
        return jax.vmap(derivatives, in_axes=(0, 0, 0, None, None))(q, k, v, mask, jnp.float32(0.7))

    expected = jax.jit(lambda: over_batches())()
    with_blocks(monkeypatch, how)
    program = jax.make_jaxpr(lambda: over_batches())()
    assert "_in_blocks" in str(program)
    agree(jax.jit(lambda: over_batches())(), expected)


def test_blocks_draw_their_own_dropout(monkeypatch):
    """Each weight is dropped with the probability p, alone, in the backward pass too."""
    with_blocks(monkeypatch, "by blocks of 2 rows")
    q, k, value = jnp.zeros((64, 1)), jnp.zeros((64, 1)), jnp.eye(64)
    key = jax.random.key(0)

    def weights(value):
        return nn.functional.scaled_dot_product_attention(q, k, value, None, 0.25, dropout_key=key)

    drawn, pull = jax.vjp(weights, value)
    kept = np.asarray(drawn) != 0
    np.testing.assert_allclose(drawn[kept], 1 / 64 / 0.75, rtol=1e-6)
    assert 0.7 < kept.mean() < 0.8 and len({row.tobytes() for row in kept}) == 64
    np.testing.assert_allclose(pull(jnp.eye(64))[0], drawn.T, rtol=1e-6)


@pytest.mark.parametrize("is_causal", [True, False])
def test_no_array_of_all_weights_is_held(is_causal):
    q = jax.ShapeDtypeStruct((1, 2, 4096 + 3, 8), jnp.float32)
    loss = jax.grad(
        lambda *qkv: nn.functional.scaled_dot_product_attention(*qkv, is_causal=is_causal).sum(), argnums=(0, 1, 2)
    )
    memory = jax.jit(loss).lower(q, q, q).compile().memory_analysis().temp_size_in_bytes
    assert memory < 6 * 4 * functional_attention._BLOCK < 4 * 2 * 4096**2


@pytest.mark.parametrize(
    ("shapes", "kwargs", "match"),
    [
        (((4,), (5, 4), (5, 4)), {}, r"need the shapes \(\.\.\., L, E\)"),
        (((3, 4), (5, 3), (5, 3)), {}, "equal in the last axis"),
        (((3, 4), (5, 4), (6, 4)), {}, "key and value in the one before"),
        (((4, 3, 4), (2, 3, 4), (2, 3, 4)), {}, "pass enable_gqa=True"),
        (((3, 3, 4), (2, 3, 4), (2, 3, 4)), {"enable_gqa": True}, "multiple of key's and value's"),
        (((3, 4), (5, 4), (5, 4)), {"attn_mask": jnp.ones((5, 3), bool)}, r"broadcastable to .* = \(3, 5\)"),
        (((3, 4), (5, 4), (5, 4)), {"attn_mask": jnp.ones((2, 3, 5), bool)}, r"got bool\[2, 3, 5\]"),
        (((3, 4), (5, 4), (5, 4)), {"dropout_p": 1.5}, "between 0 and 1"),
    ],
)
def test_the_function_refuses_what_does_not_fit(shapes, kwargs, match):
    with pytest.raises(ValueError, match=match):
        nn.functional.scaled_dot_product_attention(*(jnp.ones(shape) for shape in shapes), **kwargs)


@pytest.mark.slow
def test_the_function_refuses_dtypes_that_differ():
    q = jnp.ones((3, 4))
    with pytest.raises(ValueError, match="one dtype"):
        nn.functional.scaled_dot_product_attention(q, q.astype(jnp.bfloat16), q)
    with pytest.raises(TypeError, match="boolean or floating"):
        nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=jnp.ones((3, 3), jnp.int32))
