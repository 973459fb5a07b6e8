"""Integers, booleans and random keys in a module's pytree: kept exactly, through every cast, or refused by name."""

import contextlib
import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import mean_square

import minitorch_jax as mt
from minitorch_jax import nn, optim

DTYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


def values_of(dtype):
    """The ends of the range, and what is in between."""
    if dtype == "bool":
        return np.array([True, False, True])
    info = np.iinfo(dtype)
    rng = np.random.default_rng(0)
    drawn = rng.integers(info.min, info.max, 200, dtype, endpoint=True)
    return np.concatenate([drawn, np.array([info.min, info.max, 0, 1, 100], dtype)]).reshape(5, -1)


class Net(mt.Module):
    """A weight beside an integer and a key."""

    def __init__(self, index):
        self.weight = mt.Parameter(jnp.ones(3))
        self.index = mt.Buffer(index)
        self.rng = mt.Buffer(jax.random.split(jax.random.key(7), 20))

    def forward(self, x):
        return (x * self.weight)[self.index % 3]


def is_unchanged(net, index):
    keys = jax.random.key_data(net.rng) == jax.random.key_data(jax.random.split(jax.random.key(7), 20))
    return net.index.dtype == index.dtype and (np.asarray(net.index) == index).all() and bool(keys.all())


def cast(model, dtype):
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, model)


@pytest.mark.one_in(8)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cast_of_every_leaf_keeps_what_is_not_floating(dtype):
    index = values_of(dtype)
    with jax.enable_x64(True) if "64" in dtype else contextlib.nullcontext():
        net = Net(index)
        for floating in (jnp.bfloat16, jnp.float16, jnp.float32, *([jnp.float64] if "64" in dtype else [])):
            half = cast(net, floating)
            assert half.weight.dtype == floating and is_unchanged(half, index)
            assert is_unchanged(jax.jit(lambda m, to=floating: cast(m, to))(net), index)
            assert is_unchanged(cast(half, jnp.float32), index)
            assert is_unchanged(copy.deepcopy(half), index) and is_unchanged(pickle.loads(pickle.dumps(half)), index)  # noqa: S301
            fresh = Net(np.zeros_like(index))
            fresh.load_state_dict({**half.state_dict(), "weight": fresh.weight})
            assert is_unchanged(fresh, index)


INDEX = np.arange(1000, dtype=np.int32)
SAME = {
    "copied": lambda a: jnp.array(a),
    "plus zero": lambda a: a + 0,
    "average of equal ones": lambda a: 0.9 * a + 0.1 * a,
    "halved and doubled": lambda a: a / 2 * 2,
    "put on a device": lambda a: jax.device_put(a, jax.devices()[0]),
    "in NumPy": np.asarray,
}
OTHER = {
    "times a half": lambda a: a * 0.5,
    "plus one": lambda a: a + 1,
    "minus one": lambda a: a - 1,
    "plus noise": lambda a: a + 0.3 * jax.random.normal(jax.random.key(0), a.shape),
    "sine": jnp.sin,
    "negative": lambda a: -a,
    "NaN": lambda a: jnp.full_like(a, jnp.nan),
    "of 8 bits": lambda a: a.astype(jnp.float8_e4m3fn),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("how", SAME)
def test_a_map_that_keeps_values_keeps_integers_and_keys(how):
    assert is_unchanged(jax.tree.map(SAME[how], Net(INDEX)), INDEX)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("how", OTHER)
@pytest.mark.parametrize("jitted", [False, True])
def test_a_map_that_computes_is_refused_where_the_integers_are_read(how, jitted):
    def change(model):
        return jax.tree.map(OTHER[how], model)

    changed = (jax.jit(change) if jitted else change)(Net(INDEX))
    assert changed.weight.shape == (3,)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Net\.index is int32, which .* as floats.*may cast them"):
            _ = changed.index
    with pytest.raises(ValueError, match=r"Net\.(index|rng) is "):
        changed.state_dict()
    outer = nn.Sequential(nn.Identity(), changed)
    with pytest.raises(ValueError, match=r"(Sequential\.1|Net)\.(index|rng) is "):
        mt.jit(lambda m: m[1].index + 0)(outer)
    for other in (copy.deepcopy(changed), pickle.loads(pickle.dumps(changed))):  # noqa: S301
        with pytest.raises(ValueError, match=r"Net\.index is int32"):
            _ = other.index


def test_a_leaf_of_8_bits_is_refused_in_a_trace_too():
    with pytest.raises(ValueError, match=r"index is int32.*float8_e4m3fn"):
        jax.jit(lambda m: cast(m, jnp.float8_e4m3fn).index)(Net(INDEX))


def test_zeros_and_sums_are_what_they_are_of_numbers():
    net = Net(INDEX)
    assert (jax.tree.map(jnp.zeros_like, net).index == 0).all()
    small = Net(np.array([3, 90, 0]))
    assert jax.tree.map(jnp.add, small, small).index.tolist() == [6, 180, 0]
    assert jax.tree.map(lambda a, b: (a + b) / 2, small, Net(np.array([5, 10, 2]))).index.tolist() == [4, 50, 1]


def test_gradients_of_a_module_in_half_precision():
    net = cast(Net(INDEX), jnp.bfloat16)
    grads = jax.grad(lambda m, x: m(x).astype(jnp.float32).sum())(net, jnp.ones(3, jnp.bfloat16))
    assert grads.weight.dtype == jnp.bfloat16
    assert (grads.index == 0).all()
    stepped = jax.tree.map(lambda p, g: p - 0.5 * g, net, grads)
    assert is_unchanged(stepped, INDEX)


def test_batch_norm_counts_on_in_half_precision():
    def step(model, x):
        mt.backward(mean_square, model, x)
        return model

    half = cast(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), jnp.bfloat16)
    half[1].num_batches_tracked = 255
    x = jnp.linspace(-1, 1, 20, dtype=jnp.bfloat16).reshape(5, 4)
    step(half, x)
    compiled = mt.jit(step)
    for _ in range(3):
        compiled(half, x)
    assert compiled.num_compiles == 1
    mt.scan(lambda x: mt.backward(mean_square, half, x), jnp.stack([x, x]))

    def forward(model, x):
        model(x)
        return model, None

    half, _ = jax.lax.scan(forward, half, jnp.stack([x, x]))
    half, _ = jax.jit(forward)(half, x)
    assert half[1].num_batches_tracked == 255 + 1 + 3 + 2 + 2 + 1
    opt = optim.SGD([half], lr=0.1)
    step(half, x)
    opt.step()
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.slow
def test_a_pickle_of_halves_is_read():
    """Before bytes, each float stood for 16 bits."""
    from minitorch_jax.state.cell import _unpickle_cell
    from minitorch_jax.state.encoding import Encoding

    for dtype in DTYPES:
        with jax.enable_x64(True) if "64" in dtype else contextlib.nullcontext():
            values = values_of(dtype)
            old = values.view(np.uint16).reshape(*values.shape, -1) if values.dtype.itemsize > 2 else values
            encoding = Encoding(jnp.dtype(dtype))
            cell = _unpickle_cell(old.astype(np.float32), "buffer", False, encoding)
            np.testing.assert_array_equal(encoding.decode(cell.value), values)
    key = jax.random.key(5)
    old = np.asarray(jax.random.key_data(key)).view(np.uint16).reshape(2, 2).astype(np.float32)
    encoding = Encoding(key.dtype)
    cell = _unpickle_cell(old, "buffer", False, encoding)
    assert (jax.random.key_data(encoding.decode(cell.value)) == jax.random.key_data(key)).all()
