"""`mt.autocast`: what each function computes in, the way there, and what stays as it is."""

import importlib.util
import re
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minitorch_jax as mt
from minitorch_jax import nn, optim

F = nn.functional
HALF = jnp.bfloat16


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


A, B = normal(4, 6), normal(4, 6, seed=1)
IMAGE, TIMES = normal(2, 3, 5, 5), normal(2, 3, 5)
CLASSES, SIGNS = jnp.array([0, 1, 2, 3]), jnp.array([1.0, -1.0, 1.0, -1.0])

# One call of each function that autocast acts on: its floating arrays, and the rest.
LOWER = {
    "linear": (F.linear, (A, normal(5, 6), normal(5))),
    "conv1d": (F.conv1d, (TIMES, normal(4, 3, 2), normal(4))),
    "conv2d": (F.conv2d, (IMAGE, normal(4, 3, 2, 2), normal(4))),
    "conv3d": (F.conv3d, (normal(1, 2, 3, 3, 3), normal(4, 2, 2, 2, 2))),
    "conv_transpose1d": (F.conv_transpose1d, (TIMES, normal(3, 4, 2), normal(4))),
    "conv_transpose2d": (F.conv_transpose2d, (IMAGE, normal(3, 4, 2, 2))),
    "conv_transpose3d": (F.conv_transpose3d, (normal(1, 2, 3, 3, 3), normal(2, 4, 2, 2, 2))),
    "prelu": (F.prelu, (A, normal(1))),
    "scaled_dot_product_attention": (F.scaled_dot_product_attention, (TIMES, TIMES, TIMES, normal(3, 3))),
}
FLOAT32 = {
    "softmax": (lambda x: F.softmax(x, 1), (A,)),
    "softmin": (lambda x: F.softmin(x, 1), (A,)),
    "log_softmax": (lambda x: F.log_softmax(x, 1), (A,)),
    "gumbel_softmax": (lambda x: F.gumbel_softmax(x, key=jax.random.key(0)), (A,)),
    "softplus": (F.softplus, (A,)),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (6,), w, b), (A, normal(6), normal(6))),
    "rms_norm": (lambda x, w: F.rms_norm(x, (6,), w), (A, normal(6))),
    "group_norm": (lambda x: F.group_norm(x, 3), (IMAGE,)),
    "local_response_norm": (lambda x: F.local_response_norm(x, 2), (IMAGE,)),
    "normalize": (F.normalize, (A,)),
    "cosine_similarity": (F.cosine_similarity, (A, B)),
    "pairwise_distance": (F.pairwise_distance, (A, B)),
    "pdist": (F.pdist, (A,)),
    "lp_pool1d": (lambda x: F.lp_pool1d(x, 2.0, 2), (TIMES,)),
    "lp_pool2d": (lambda x: F.lp_pool2d(x, 2.0, 2), (IMAGE,)),
    "lp_pool3d": (lambda x: F.lp_pool3d(x, 2.0, 2), (normal(1, 2, 4, 4, 4),)),
    "interpolate": (lambda x: F.interpolate(x, 7, mode="bilinear"), (IMAGE,)),
    "cross_entropy": (lambda x: F.cross_entropy(x, CLASSES), (A,)),
    "linear_cross_entropy": (lambda x, w: F.linear_cross_entropy(x, w, CLASSES), (A, normal(5, 6))),
    "nll_loss": (lambda x: F.nll_loss(x, CLASSES), (A,)),
    "l1_loss": (F.l1_loss, (A, B)),
    "mse_loss": (F.mse_loss, (A, B)),
    "smooth_l1_loss": (F.smooth_l1_loss, (A, B)),
    "huber_loss": (F.huber_loss, (A, B)),
    "poisson_nll_loss": (F.poisson_nll_loss, (A, B)),
    "gaussian_nll_loss": (lambda x, y, v: F.gaussian_nll_loss(x, y, jnp.abs(v)), (A, B, A)),
    "kl_div": (lambda x, y: F.kl_div(x, jnp.abs(y), reduction="sum"), (A, B)),
    "binary_cross_entropy_with_logits": (lambda x, y: F.binary_cross_entropy_with_logits(x, jnp.abs(y)), (A, B)),
    "margin_ranking_loss": (lambda x, y: F.margin_ranking_loss(x, y, SIGNS[:, None]), (A, B)),
    "hinge_embedding_loss": (lambda x: F.hinge_embedding_loss(x, SIGNS[:, None]), (A,)),
    "soft_margin_loss": (lambda x: F.soft_margin_loss(x, jnp.sign(B)), (A,)),
    "multilabel_soft_margin_loss": (lambda x: F.multilabel_soft_margin_loss(x, jnp.abs(B)), (A,)),
    "multilabel_margin_loss": (lambda x: F.multilabel_margin_loss(x[:, :4], jnp.tile(CLASSES, (4, 1))), (A,)),
    "multi_margin_loss": (lambda x: F.multi_margin_loss(x, CLASSES), (A,)),
    "cosine_embedding_loss": (lambda x, y: F.cosine_embedding_loss(x, y, SIGNS), (A, B)),
    "triplet_margin_loss": (F.triplet_margin_loss, (A, B, A + B)),
    "ctc_loss": (
        lambda x: F.ctc_loss(x, jnp.array([[1, 2]]), jnp.array([4]), jnp.array([2])),
        (jax.nn.log_softmax(A)[:, None],),
    ),
}
WIDEST = {
    "bilinear": (F.bilinear, (A, B, normal(2, 6, 6))),
    "grid_sample": (lambda x, g: F.grid_sample(x, g, align_corners=False), (IMAGE, normal(2, 4, 4, 2))),
}
POLICIES = {"lower type": LOWER, "float32": FLOAT32, "widest type": WIDEST}
CALLS = {name: call for calls in POLICIES.values() for name, call in calls.items()}
INSIDE = {"lp_pool", "conv", "conv_transpose"}  # reached by the public functions of each dimension
COMPOSED = {"linear_cross_entropy", "interpolate"}  # functions that call such functions


def cast(arrays, dtype):
    return [array.astype(dtype) for array in arrays]


def test_each_function_of_a_policy_is_in_this_table():
    for policy, calls in POLICIES.items():
        marked = {name for name in dir(F) if getattr(getattr(F, name), "autocast_policy", None) == policy}
        dimensions = {name for name in calls if re.fullmatch(r"(lp_pool|conv|conv_transpose)\dd", name)}
        assert marked == calls.keys() - dimensions - COMPOSED


TORCHS = {  # what torch's list names instead of our function
    **{name: "softmax" for name in ("softmin", "gumbel_softmax")},
    **{name: "pow" for name in ("lp_pool1d", "lp_pool2d", "lp_pool3d", "local_response_norm")},
    **{name: "norm" for name in ("normalize", "pairwise_distance")},
    **{name: "nll_loss" for name in ("cross_entropy", "linear_cross_entropy")},
    **{
        "interpolate": "upsample_bilinear2d",
        "grid_sample": "grid_sampler",
        "gaussian_nll_loss": "log",
        "multilabel_soft_margin_loss": "sum",
    },
}
OURS = {"ctc_loss"}  # torch has no 16-bit form of it


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="reads a file of torch")
def test_the_lists_are_those_of_torch_for_cuda():
    folder = Path(importlib.util.find_spec("torch").origin).parent
    text = (folder / "include/ATen/autocast_mode.h").read_text()

    def listed(*names):
        bodies = [re.search(rf"#define AT_FORALL_{name}\(_\)(.*?)\n\n", text, re.S)[1] for name in names]
        return set(re.findall(r"_\((?:ADD_NS\()?(\w+)", "".join(bodies)))

    lists = {
        "lower type": listed("LOWER_PRECISION_FP"),
        "float32": listed("FP32", "FP32_SET_OPT_DTYPE", "DIFFERENT_REDISPATCH_SIGNATURE"),
        "widest type": listed("PROMOTE"),
    }
    for policy, calls in POLICIES.items():
        assert {TORCHS.get(name, name) for name in calls.keys() - OURS} <= lists[policy]
        ours = {name for name in dir(F) if not name.startswith("_")}
        assert lists[policy] & ours <= calls.keys()  # nothing that torch lists is left out


def products(function, arrays):
    """The operand types of each matrix product and convolution in the program lowered for a TPU.

    On CPUs, convolutions in the forms of conv_forms.py have their products in float32.
    """
    text = jax.jit(function).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
    lines = [line for line in text.splitlines() if re.search(r"stablehlo\.(dot_general|convolution)", line)]
    return [set(re.findall(r"x(f32|f64|bf16|f16)>", line.split(":")[-1].split("->")[0])) for line in lines]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", LOWER)
def test_products_take_and_return_the_lower_type(name):
    function, arrays = LOWER[name]
    mixed = [array.astype(HALF if i % 2 else array.dtype) for i, array in enumerate(arrays)]
    for given in (arrays, cast(arrays, jnp.float16), mixed):
        with mt.autocast(HALF):
            assert function(*given).dtype == HALF
            operands = products(function, given)
        assert all(types == {"bf16"} for types in operands)
        assert bool(operands) == (name != "prelu")
    close = dict(rtol=0.05, atol=0.05)
    with mt.autocast(HALF):
        lower = function(*arrays)
    np.testing.assert_allclose(lower.astype(jnp.float32), function(*arrays), **close)


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", FLOAT32)
def test_what_needs_float32_takes_and_returns_it(name):
    function, arrays = FLOAT32[name]
    for given in (arrays, cast(arrays, HALF)):
        with mt.autocast(HALF):
            out = function(*given)
        assert out.dtype == jnp.float32
        if name != "linear_cross_entropy":  # its product is in the lower type
            np.testing.assert_array_equal(out, function(*cast(given, jnp.float32)))


@pytest.mark.parametrize("name", WIDEST)
def test_the_widest_type(name):
    function, arrays = WIDEST[name]
    with mt.autocast(HALF):
        assert function(*arrays).dtype == jnp.float32
        assert function(*cast(arrays, HALF)).dtype == HALF
        assert function(arrays[0], *cast(arrays[1:], HALF)).dtype == jnp.float32


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", CALLS)
def test_float64_and_integers_are_never_converted(name):
    function, arrays = CALLS[name]
    with jax.enable_x64(True), mt.autocast(HALF):
        assert function(*cast(arrays, jnp.float64)).dtype == jnp.float64


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", CALLS)
def test_gradients_arrive_in_the_type_of_what_was_given(name):
    function, arrays = CALLS[name]
    with mt.autocast(HALF):
        grads = jax.grad(lambda *xs: function(*xs).sum().astype(jnp.float32), tuple(range(len(arrays))))(*arrays)
    assert [grad.dtype for grad in grads] == [jnp.float32] * len(arrays)


def test_other_functions_and_plain_code_compute_as_they_do():
    with mt.autocast(HALF):
        assert (A @ B.T).dtype == jnp.float32
        for function in (F.relu, F.gelu, F.sigmoid, F.tanh, lambda x: F.dropout(x, 0.0), lambda x: F.max_pool1d(x, 2)):
            assert function(A).dtype == jnp.float32
            assert function(A.astype(HALF)).dtype == HALF
        assert F.interpolate(IMAGE.astype(HALF), 3, mode="area").dtype == HALF
        assert F.batch_norm(IMAGE.astype(HALF), jnp.zeros(3), jnp.ones(3)).dtype == HALF


LAYERS = {
    "RNN": lambda: nn.RNN(6, 5),
    "LSTM": lambda: nn.LSTM(6, 5, 2, bidirectional=True, proj_size=2),
    "GRU": lambda: nn.GRU(6, 5, batch_first=True),
    "RNNCell": lambda: nn.RNNCell(6, 5),
    "LSTMCell": lambda: nn.LSTMCell(6, 5),
    "GRUCell": lambda: nn.GRUCell(6, 5),
    "MultiheadAttention": lambda: nn.MultiheadAttention(6, 2, add_bias_kv=True, add_zero_attn=True),
    "Linear": lambda: nn.Linear(6, 5),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_multiply_in_the_lower_type(name):
    mt.seed(0)
    layer = LAYERS[name]()
    call = (lambda x: layer(x, x, x)[0]) if name == "MultiheadAttention" else (lambda x: jax.tree.leaves(layer(x))[0])
    for dtype in (jnp.float32, HALF, jnp.float16):
        with mt.autocast(HALF):
            out = call(A.astype(dtype))
            assert all(types == {"bf16"} for types in products(call, [A.astype(dtype)]))
        assert out.dtype == HALF
        np.testing.assert_allclose(out.astype(jnp.float32), call(A), rtol=0.05, atol=0.05)
    assert {param.dtype for param in layer.parameters()} == {jnp.dtype(jnp.float32)}


@pytest.mark.slow
def test_layers_made_of_layers_mix_types_as_they_need():
    mt.seed(0)
    softmax = nn.AdaptiveLogSoftmaxWithLoss(6, 9, [3, 5])
    transformer = nn.Transformer(6, 2, 1, 1, 8, dropout=0.0, norm_first=True)
    for dtype in (jnp.float32, HALF):
        with mt.autocast(HALF):
            output, loss = softmax(A.astype(dtype), CLASSES)
            assert (output.dtype, loss.dtype, softmax.log_prob(A).dtype) == (jnp.float32,) * 3
            out = transformer(A.astype(dtype), B.astype(dtype))
        np.testing.assert_allclose(loss, softmax(A, CLASSES).loss, rtol=0.02)
        np.testing.assert_allclose(out.astype(jnp.float32), transformer(A, B), atol=0.05)


def test_a_recurrent_layer_takes_the_state_that_it_returned_and_one_in_float32():
    layer = nn.LSTM(6, 5)
    with mt.autocast(HALF):
        _, state = layer(A)
        assert layer(A, state)[0].dtype == HALF
        assert layer(A, (jnp.zeros((1, 5)), jnp.zeros((1, 5))))[0].dtype == HALF


# -- the ways to compute ----------------------------------------------------------------------------------------------


def network(seed=0):
    mt.seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 5))


def loss_fn(model, x, y):
    out = model(x)
    assert out.dtype == HALF
    return F.cross_entropy(out, y)


def trained(way, steps=3):
    model = network()
    opt = optim.Adam([model], lr=0.01)

    def step(x, y):
        opt.zero_grad()
        loss = mt.backward(way.get("loss", loss_fn), model, x, y)
        opt.step()
        return loss

    losses = way["run"](step, steps)
    kept = jax.tree.leaves((model, opt))  # parameters, gradients, and what the optimizer keeps
    assert {str(array.dtype) for array in kept} <= {"float32", "int32", "uint32"}
    return np.array(losses), [np.asarray(p) for p in model.parameters()]


def eager(step, steps):
    with mt.autocast(HALF):
        return [float(step(A, CLASSES)) for _ in range(steps)]


def compiled(step, steps):
    step = mt.jit(step)
    with mt.autocast(HALF):
        return [float(step(A, CLASSES)) for _ in range(steps)]


def inside(step, steps):
    @mt.jit
    def both(x, y):
        with mt.autocast(HALF):
            return step(x, y)

    return [float(both(A, CLASSES)) for _ in range(steps)]


def scanned(step, steps):
    with mt.autocast(HALF):
        return mt.scan(step, jnp.stack([A] * steps), jnp.stack([CLASSES] * steps))


def uncompiled(step, steps):
    with jax.disable_jit():
        return eager(step, steps)


WAYS = {
    "eager": {"run": eager},
    "mt.jit": {"run": compiled},
    "inside mt.jit": {"run": inside},
    "mt.scan": {"run": scanned},
    "disable_jit": {"run": uncompiled},
    "decorated loss": {
        "loss": mt.autocast(HALF)(loss_fn),
        "run": lambda step, n: [float(step(A, CLASSES)) for _ in range(n)],
    },
    "decorated step": {
        "run": lambda step, n: [float(mt.jit(mt.autocast(HALF)(step))(A, CLASSES)) for _ in range(n)],
    },
}


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", [name for name in WAYS if name != "eager"])
def test_every_way_to_train_gives_the_same(name):
    (losses, weights), (expected, others) = trained(WAYS[name]), trained(WAYS["eager"])
    np.testing.assert_allclose(losses, expected, rtol=1e-2)
    for one, other in zip(weights, others, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-3)


def test_the_functional_form():
    def step(opt, x, y):
        with mt.autocast(HALF):
            (model,) = opt.modules
            opt.zero_grad()
            loss = mt.backward(loss_fn, model, x, y)
            opt.step()
        return opt, loss

    model = network()
    opt, loss = jax.jit(step)(optim.Adam([model], lr=0.01), A, CLASSES)
    np.testing.assert_allclose(loss, trained(WAYS["eager"], 1)[0][0], rtol=1e-2)
    assert opt.modules[0][0].weight.dtype == jnp.float32


def test_a_setting_is_part_of_a_compiled_functions_key():
    model = network()
    seen = []

    @mt.jit
    def forward(x):
        seen.append(model(x).dtype)
        return model(x)

    for _ in range(2):
        assert forward(A).dtype == jnp.float32
        for dtype in (HALF, jnp.float16):
            with mt.autocast(dtype):
                assert forward(A).dtype == dtype
        with mt.autocast(enabled=False):
            assert forward(A).dtype == jnp.float32
    assert forward.num_compiles == 3
    plain = jax.jit(lambda model, x: model(x))
    with mt.autocast(HALF):
        assert plain(model, A).dtype == HALF
    assert plain(model, A).dtype == jnp.float32


def test_decorated_functions_of_different_types_are_different_programs():
    model = network()

    def output(x):
        return model(x)

    ways = [mt.autocast(HALF)(output), mt.autocast(jnp.float16)(output), output]
    for _ in range(2):
        assert [mt.jit(way)(A).dtype for way in ways] == [HALF, jnp.float16, jnp.float32]


def test_a_decorated_function_counts_its_own_programs():
    model = network()

    def decorated(scale):
        def output(x):
            return scale * model(x)

        return mt.jit(mt.autocast(HALF)(output))

    def other(x):
        return model(x) + 1

    first, second = decorated(2.0), mt.jit(mt.autocast(HALF)(other))
    first(A), second(A), second(A[:2])
    assert (first.num_compiles, second.num_compiles) == (1, 2)


def test_it_nests_and_ends_with_its_block():
    layer = nn.Linear(6, 5)
    once = mt.autocast(HALF)
    with once:
        with mt.autocast(jnp.float16), mt.autocast(enabled=False):
            assert layer(A).dtype == jnp.float32
        with once:
            assert layer(A).dtype == HALF
        assert layer(A).dtype == HALF
        other = []
        thread = threading.Thread(target=lambda: other.append(layer(A).dtype))
        thread.start()
        thread.join()
        assert other == [jnp.float32]
    with pytest.raises(ZeroDivisionError), once:
        raise ZeroDivisionError
    assert layer(A).dtype == jnp.float32


def test_a_decorated_function_keeps_its_name_and_may_call_itself():
    @mt.autocast(HALF)
    def twice(layer, x, n):
        """Docs."""
        return layer(x) if n == 0 else twice(layer, x, n - 1)

    assert twice(nn.Linear(6, 5), A, 2).dtype == HALF
    assert (twice.__name__, twice.__doc__) == ("twice", "Docs.")
    assert repr(mt.autocast(HALF, enabled=False)) == "autocast(bfloat16, enabled=False)"


# -- learning ---------------------------------------------------------------------------------------------------------


def learned(model, loss, data, steps=30, lr=0.02):
    """The losses of a training in float32, and of one under autocast, from the same weights."""
    found = []
    start = model.state_dict()
    for enabled in (False, True):
        model.load_state_dict(start)
        opt = optim.Adam([model], lr=lr)

        @mt.jit
        @mt.autocast(HALF, enabled=enabled)
        def step(*batch, opt=opt):
            opt.zero_grad()
            value = mt.backward(loss, model, *batch)
            opt.step()
            return value

        found.append([float(step(*data)) for _ in range(steps)])
    return np.array(found)


class TinyGPT(mt.Module):
    def __init__(self):
        self.token, self.place = nn.Embedding(11, 16), nn.Embedding(8, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(16)

    def forward(self, tokens):
        x = self.token(tokens) + self.place(jnp.arange(tokens.shape[1]))[None]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return F.linear(self.norm(self.block(x, src_mask=mask)), self.token.weight)


@pytest.mark.slow
def test_a_small_gpt_learns_as_in_float32():
    mt.seed(0)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (4, 9)))

    def loss(model, x, y):
        return F.cross_entropy(model(x).reshape(-1, 11), y.reshape(-1))

    full, half = learned(TinyGPT(), loss, (tokens[:, :-1], tokens[:, 1:]))
    assert full[-1] < 0.3 * full[0]
    np.testing.assert_allclose(half, full, atol=0.1)
    assert not np.array_equal(half, full)


def test_a_small_conv_net_learns_as_in_float32():
    mt.seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 4)
    )

    def loss(model, x, y):
        return F.cross_entropy(model(x), y)

    full, half = learned(model, loss, (normal(4, 1, 8, 8), CLASSES))
    assert full[-1] < 0.1 * full[0]
    np.testing.assert_allclose(half, full, atol=0.05)


def test_float16_with_a_loss_scaler():
    model = network()
    opt, scaler = optim.SGD([model], lr=0.1), mt.LossScaler(init_scale=2.0**10)

    def scaled_loss(model, x, y):
        return F.cross_entropy(model(x), y)

    losses = []
    for _ in range(5):
        opt.zero_grad()
        with mt.autocast(jnp.float16):
            losses.append(float(scaler.backward(scaled_loss, model, A, CLASSES)))
        scaler.step(opt)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "cpu", "cuda:0"])
def test_a_device_is_refused(device):
    with pytest.raises(
        TypeError, match=rf"takes a dtype, and no device; got '{device}'.*mt\.autocast\(jnp\.bfloat16\)"
    ):
        mt.autocast(device)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8, "half-size", 16, None])
def test_a_type_that_is_not_lower_is_refused(dtype):
    with pytest.raises(TypeError, match=r"takes jnp\.bfloat16 or jnp\.float16; got "):
        mt.autocast(dtype)


def test_binary_cross_entropy_is_refused_as_in_torch():
    with mt.autocast(HALF):
        for loss in (F.binary_cross_entropy, nn.BCELoss()):
            with pytest.raises(TypeError, match="not safe under autocast.*use binary_cross_entropy_with_logits"):
                loss(jax.nn.sigmoid(A), jnp.ones_like(A))
        with mt.autocast(enabled=False):
            F.binary_cross_entropy(jax.nn.sigmoid(A), jnp.ones_like(A))


@pytest.mark.one_in(9)
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 2), lambda: nn.LSTM(6, 2), lambda: nn.GRUCell(6, 2)])
def test_mixed_types_name_autocast(make):
    with pytest.raises(TypeError, match=r"astype.*mt\.autocast\(jnp\.bfloat16\)"):
        make()(A.astype(HALF))
