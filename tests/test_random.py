"""Random streams: one draw is one step of the stream, wherever it is made; and Dropout, which draws from them."""

import asyncio
import contextlib
import copy
import gc
import pickle
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import torch
from training import mean_square

import minitorch_jax as mt
from minitorch_jax import Module, Parameter, nn, optim
from minitorch_jax.module import random

F = nn.functional
SEED = 7
OUTSIDE = r"a random number was drawn inside a JAX transform(.|\n)*Pass a key(.|\n)*mt\.rng\(key\)(.|\n)*mt\.jit"
WRONG_KEY = r"rng\(\) takes a `jax\.random\.key` or an integer, not "
ONES = jnp.ones((3, 4))


def bits(key):
    """What a key is, as something to compare."""
    return tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())


def taken(n):
    """The next `n` keys of the current stream."""
    return [bits(mt.next_key()) for _ in range(n)]


@pytest.fixture(scope="module")
def keys():
    """The first keys of the stream that `mt.seed(SEED)` starts."""
    mt.seed(SEED)
    return taken(50)


@pytest.fixture
def drawn(keys):
    """How many keys the stream has given since `mt.seed(SEED)`, which the test starts with. (To ask takes one more.)"""
    mt.seed(SEED)
    return lambda: keys.index(bits(mt.next_key()))


class Noisy(Module):
    """Adds noise `draws` times."""

    def __init__(self, draws=1):
        self.draws = draws
        self.weight = Parameter(jnp.ones(2))

    def forward(self, x):
        out = self.weight * x
        for _ in range(self.draws):
            out = out + jax.random.normal(mt.next_key(), x.shape)
        return out


def as_aux(model, x):
    out = model(x)
    return (out**2).mean(), out


X = jnp.array([0.5, -2.0])


def close(actual, expected, tolerance=1e-6):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=tolerance, atol=tolerance)


# -- seed --------------------------------------------------------------------------------------------------------------


def test_seed_starts_the_same_keys_again():
    mt.seed(11)
    first = taken(20)
    further = taken(20)
    mt.seed(11)
    assert taken(20) == first
    mt.seed(12)
    other = taken(20)
    assert len({*first, *further, *other}) == 60


def test_next_key_gives_a_key_and_a_given_key_back(drawn):
    key = mt.next_key()
    assert key.shape == () and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    for given in (key, jax.random.PRNGKey(3)):
        assert mt.next_key(given) is given
        assert mt.next_key(key=given) is given
    assert drawn() == 1


def test_a_layer_of_ones_own_draws_by_next_key(drawn):
    class Initialised(Module):
        def __init__(self, *, key=None):
            self.weight = Parameter(jax.random.normal(mt.next_key(key), (2,)))

        def forward(self, x):
            return self.weight * x + jax.random.uniform(mt.next_key(), x.shape)

    layer = Initialised()
    first, second = layer(X), layer(X)
    assert drawn() == 3
    mt.seed(SEED)
    again = Initialised()
    np.testing.assert_array_equal(again.weight, layer.weight)
    np.testing.assert_array_equal(again(X), first)
    assert np.abs(first - second).min() > 0
    key = jax.random.key(1)
    np.testing.assert_array_equal(Initialised(key=key).weight, jax.random.normal(key, (2,)))


# -- compiled code advances the stream as eager code does --------------------------------------------------------------


def eager(model, n):
    return [model(X) for _ in range(n)]


def jitted(model, n):
    call = mt.jit(lambda model, x: model(x))
    return [call(model, X) for _ in range(n)]


def jitted_by_closure(model, n):
    call = mt.jit(lambda x: model(x))
    return [call(X) for _ in range(n)]


def jitted_module(model, n):
    call = mt.jit(model)
    return [call(X) for _ in range(n)]


def one_program(model, n):
    return mt.jit(lambda: eager(model, n))()


def nested(model, n):
    inner = mt.jit(lambda x: model(x))
    return mt.jit(lambda: [inner(X) for _ in range(n)])()


def scanned(model, n):
    return list(mt.scan(lambda x: model(x), jnp.stack([X] * n)))


def unrolled(model, n):
    return list(mt.scan(lambda: model(X), length=n, unroll=n))


def scan_in_jit(model, n):
    return list(mt.jit(lambda: mt.scan(lambda: model(X), length=n))())


def backward(model, n):
    return [mt.backward(as_aux, model, X, has_aux=True)[1] for _ in range(n)]


def backward_by_closure(model, n):
    loss = lambda x: as_aux(model, x)
    return [mt.backward(loss, X, has_aux=True)[1] for _ in range(n)]


def returned_gradients(model, n):
    call = mt.grad(as_aux, has_aux=True)
    return [call(model, X)[1] for _ in range(n)]


def backward_in_jit(model, n):
    call = mt.jit(lambda: mt.backward(as_aux, model, X, has_aux=True)[1])
    return [call() for _ in range(n)]


def backward_in_scan(model, n):
    return list(mt.scan(lambda: mt.backward(as_aux, model, X, has_aux=True)[1], length=n))


WAYS = {
    way.__name__: way
    for way in (
        eager,
        jitted,
        jitted_by_closure,
        jitted_module,
        one_program,
        nested,
        scanned,
        unrolled,
        scan_in_jit,
        backward,
        backward_by_closure,
        returned_gradients,
        backward_in_jit,
        backward_in_scan,
    )
}


def by_hand(keys, draws, n):
    """What `n` calls of a Noisy(draws) give, from the keys themselves."""
    wrapped = iter([jax.random.wrap_key_data(jnp.array(key, jnp.uint32)) for key in keys])
    return [X + sum(jax.random.normal(next(wrapped), (2,)) for _ in range(draws)) for _ in range(n)]


@pytest.mark.slow
@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_draw_is_one_step_of_the_stream(way, draws, drawn, keys):
    out = way(Noisy(draws), 3)
    assert drawn() == 3 * draws
    close(out, by_hand(keys, draws, 3))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_without_a_draw_the_stream_stays_where_it_is(way, drawn):
    close(way(Noisy(0), 2), [X, X])
    assert drawn() == 0


@pytest.mark.slow
def test_eager_and_compiled_calls_share_one_stream_in_any_order(drawn, keys):
    model = Noisy(2)
    call, scan_over = mt.jit(lambda x: model(x)), jnp.stack([X, X])
    body = lambda x: model(x)
    out = [
        model(X),
        call(X),
        mt.backward(as_aux, model, X, has_aux=True)[1],
        *mt.scan(body, scan_over),
        call(X),
        model(X),
        call(X),
        mt.backward(as_aux, model, X, has_aux=True)[1],
        *mt.scan(body, scan_over),
        model(X),
    ]
    assert drawn() == 2 * len(out)
    close(out, by_hand(keys, 2, len(out)))
    assert call.num_compiles == 1


def test_neither_draws_nor_a_new_seed_compile_again(keys):
    model = Noisy(2)
    call = mt.jit(lambda x: model(x))
    mt.seed(1)
    first = [call(X) for _ in range(3)]
    mt.seed(2)
    other = call(X)
    mt.seed(1)
    np.testing.assert_array_equal([call(X) for _ in range(3)], first)
    assert call.num_compiles == 1
    distinct = np.asarray([*first, other])[:, 0]
    assert len(set(distinct.tolist())) == 4


class Regularised(Module):
    """A network with two dropouts."""

    def __init__(self):
        self.first = nn.Linear(3, 8, key=jax.random.key(1))
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(8, 2, key=jax.random.key(2))
        self.out_drop = nn.Dropout(0.2)

    def forward(self, x):
        return self.out_drop(self.second(self.drop(jnp.tanh(self.first(x)))))


def trainer(mse, batch):
    model = Regularised()
    opt = optim.SGD([model], lr=0.1, momentum=0.9)

    def step():
        opt.zero_grad()
        loss = mt.backward(mse, model, *batch)
        opt.step()
        return loss

    return model, step


@pytest.mark.slow
@pytest.mark.parametrize("way", ["jit", "scan", "scan in jit"])
def test_training_with_dropout_is_the_same_eager_and_compiled(way, mse, batch, drawn):
    model, step = trainer(mse, batch)
    expected = [float(step()) for _ in range(4)]
    assert drawn() == 8
    assert len(set(expected)) == 4

    other, step = trainer(mse, batch)
    mt.seed(SEED)
    if way == "jit":
        call = mt.jit(step)
        losses = [call() for _ in range(4)]
    elif way == "scan":
        losses = mt.scan(step, length=4)
    else:
        losses = mt.jit(lambda: mt.scan(step, length=4))()
    assert drawn() == 8
    close(losses, expected, 1e-5)
    for name, array in model.state_dict().items():
        close(other.state_dict()[name], array, 1e-5)


@pytest.mark.slow
def test_constructing_layers_without_a_key_in_compiled_code(drawn):
    def build(x):
        layer = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        return layer[0].weight, layer[1].weight, layer(x)

    x = jnp.ones((1, 2))
    expected = [build(x), build(x)]
    assert drawn() == 4
    mt.seed(SEED)
    call = mt.jit(build)
    found = [call(x), call(x)]
    assert drawn() == 4
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        close(mine, theirs)
    assert not np.array_equal(found[0][0], found[1][0])


def test_seed_in_compiled_code(drawn):
    def reseeded():
        before = jax.random.normal(mt.next_key(), (2,))
        mt.seed(3)
        return before, jax.random.normal(mt.next_key(), (2,))

    mt.seed(3)
    of_three = taken(2)
    mt.seed(SEED)
    before, after = reseeded()
    mt.seed(SEED)
    call = mt.jit(reseeded)
    found = call()
    close(found[0], before)
    close(found[1], after)
    assert bits(mt.next_key()) == of_three[1]
    np.testing.assert_array_equal(call()[1], found[1])
    mt.seed(SEED)
    np.testing.assert_array_equal(call()[0], found[0])
    assert call.num_compiles == 1


def test_a_draw_under_eval_shape_within_compiled_code_is_an_error(drawn):
    """`jax.eval_shape` and others run a function with tracers of their own: a draw there is not one of the outer run."""

    def shape(x):
        return jax.eval_shape(lambda x: Noisy(1)(x), x)

    with pytest.raises(mt.TraceError, match=OUTSIDE):
        mt.jit(shape)(X)
    assert drawn() == 0


def test_a_scan_of_no_steps_draws_nothing(drawn):
    model = Noisy(2)
    assert mt.scan(lambda: model(X), length=0).shape == (0, 2)
    assert mt.scan(lambda x: model(x), jnp.ones((0, 2))).shape == (0, 2)
    assert drawn() == 0


@pytest.mark.slow
@pytest.mark.parametrize("way", [eager, jitted, backward, backward_in_jit], ids=lambda way: way.__name__)
def test_without_compilation_the_numbers_are_the_same(way, drawn, keys):
    with jax.disable_jit():
        out = way(Noisy(2), 2)
    assert drawn() == 4
    close(out, by_hand(keys, 2, 2))


# -- devices -----------------------------------------------------------------------------------------------------------

ON = ["eager", "backward", "jit", "scan"]


def runs(way, model, x):
    if way == "eager":
        return model(x)
    if way == "backward":
        return mt.backward(as_aux, model, x, has_aux=True)[1]
    if way == "jit":
        return mt.jit(lambda model, x: model(x))(model, x)
    return mt.scan(lambda x: model(x), x[None])[0]


def places():
    """Devices, and a sharding over both of them."""
    both = jax.sharding.Mesh(np.array(jax.devices("cpu")[:2]), ("x",))
    return {
        "first": jax.devices("cpu")[0],
        "second": jax.devices("cpu")[1],
        "both": jax.sharding.NamedSharding(both, jax.sharding.PartitionSpec()),
    }


@pytest.mark.slow
@pytest.mark.parametrize("way", ON)
@pytest.mark.parametrize("first, then", [("first", "second"), ("second", "first"), ("both", "first")])
def test_models_on_different_devices_draw_from_one_stream(way, first, then, drawn, keys):
    """A stream is nowhere in particular: it must not stay on the devices of the model that drew from it last."""
    models = [Noisy(1).to(places()[name]) for name in (first, then, first)]
    out = [runs(way, model, X) for model in models]
    assert drawn() == 3
    close(out, by_hand(keys, 1, 3))
    for array, model in zip(out, models, strict=True):
        assert array.devices() == model.weight.devices()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("way", ON)
def test_a_layer_made_after_training_on_another_device_is_where_layers_are_made(way, drawn):
    here = nn.Linear(2, 2).weight.devices()
    runs(way, Noisy(1).to(places()["second"]), X)
    layer = nn.Linear(2, 2)
    assert layer.weight.devices() == here
    other = jax.device_put(jnp.ones((1, 2)), places()["first"])
    assert layer(other).devices() == {places()["first"]}  # the weight is not committed elsewhere
    assert drawn() == 3


@pytest.mark.slow
def test_data_on_different_devices(drawn):
    drop = nn.Dropout(0.5)
    call = mt.jit(lambda x: drop(x))
    for name in ("first", "second", "first"):
        x = jax.device_put(X, places()[name])
        assert call(x).devices() == drop(x).devices() == {places()[name]}
    assert drawn() == 6


# -- rng ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "start",
    [
        lambda: SEED,
        lambda: np.int64(SEED),
        lambda: np.uint8(SEED),
        lambda: jax.random.key(SEED),
        lambda: jax.random.PRNGKey(SEED),
    ],
    ids=["int", "np.int64", "np.uint8", "key", "PRNGKey"],
)
def test_rng_starts_a_stream_of_its_own_as_seed_does(start, drawn, keys):
    mt.seed(1)
    outer = taken(3)
    mt.seed(1)
    assert taken(1) == outer[:1]
    for _ in range(2):
        with mt.rng(start()):
            assert taken(5) == keys[:5]
    assert taken(2) == outer[1:]


def test_rng_nests(drawn, keys):
    with mt.rng(SEED):
        assert taken(1) == keys[:1]
        with mt.rng(1):
            other = taken(2)
            with mt.rng(SEED):
                assert taken(3) == keys[:3]
            assert taken(1) not in [other[:1], other[1:]]
        assert taken(1) == keys[1:2]
    assert not set(other) & set(keys)
    assert drawn() == 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_rng_ends_with_an_exception(error, drawn):
    with pytest.raises(error), mt.rng(1):
        taken(2)
        with mt.rng(2):
            taken(1)
            raise error
    assert drawn() == 0


# -- rng in asyncio tasks, generators and threads ----------------------------------------------------------------------


def alone(number, count):
    """What a block draws that nothing else runs beside."""
    with mt.rng(number):
        return taken(count)


@pytest.mark.parametrize("fails", [False, True])
def test_tasks_that_take_turns_draw_from_streams_of_their_own(drawn, fails):
    async def task(number):
        found = []
        with mt.rng(number):
            for _ in range(3):
                found += taken(1)
                await asyncio.sleep(0)
            if fails and number == 1:
                raise ZeroDivisionError
            with mt.rng(number + 10):
                await asyncio.sleep(0)
                inner = taken(1)
                await asyncio.sleep(0)
            return [*found, *taken(1)], inner

    async def both():
        return await asyncio.gather(*map(task, (1, 2, 3)), return_exceptions=True)

    results = asyncio.run(both())
    for number, result in zip((1, 2, 3), results, strict=True):
        if fails and number == 1:
            assert isinstance(result, ZeroDivisionError)
        else:
            assert result == (alone(number, 4), alone(number + 10, 1))
    assert drawn() == 0


def test_compiled_calls_of_tasks_draw_from_streams_of_their_own(drawn):
    drop = nn.Dropout(0.5)
    compiled = mt.jit(lambda drop, x: drop(x))

    async def task(number, pause):
        masks = []
        with mt.rng(number):
            for _ in range(3):
                masks.append(np.asarray(compiled(drop, ONES)))
                await pause()
        return masks

    async def both():
        return await asyncio.gather(*[task(number, lambda: asyncio.sleep(0)) for number in (1, 2)])

    async def one(number):
        return await task(number, lambda: asyncio.sleep(0))

    np.testing.assert_array_equal(asyncio.run(both()), [asyncio.run(one(1)), asyncio.run(one(2))])
    assert compiled.num_compiles == 1
    assert drawn() == 0


def test_tasks_and_threads_of_a_block_draw_from_its_stream(drawn, keys):
    async def late():
        await asyncio.sleep(0)
        return taken(1)

    async def main():
        with mt.rng(SEED):
            first = taken(1)
            second = await asyncio.to_thread(taken, 1)
            task = asyncio.create_task(late())
        assert drawn() == 0  # the block has been left here, and goes on in the task
        return [*first, *second, *await task]

    assert asyncio.run(main()) == keys[:3]
    with mt.rng(SEED), ThreadPoolExecutor(1) as pool:
        assert pool.submit(taken, 1).result() not in [keys[:1], keys[1:2]]  # a thread by itself has a stream of its own
        assert taken(1) == keys[:1]
    assert drawn() == 1


def block_of(number):
    with mt.rng(number):
        yield
        yield


@pytest.mark.parametrize("how", ["close", "exhaust", "del", "throw"])
def test_a_generator_that_leaves_its_block_late_leaves_the_others_in_force(how, drawn, keys):
    def end(generator):
        if how == "close":
            generator.close()
        elif how == "exhaust":
            list(generator)
        elif how == "throw":
            with contextlib.suppress(ZeroDivisionError):
                generator.throw(ZeroDivisionError)

    one, two = block_of(1), block_of(2)
    next(one)
    with mt.rng(SEED):
        next(two)
        end(one)
        if how == "del":
            del one
        assert taken(1) == alone(2, 1)
        end(two)
        if how == "del":
            del two
        assert taken(2) == keys[:2]
    assert drawn() == 0


def test_generators_that_take_turns_leave_no_block_behind(drawn):
    one, two = block_of(1), block_of(2)
    next(one), next(two)
    one.close()
    two.close()
    assert drawn() == 0


@pytest.mark.parametrize("where", ["thread", "task"])
def test_a_generator_that_is_finalized_elsewhere_leaves_no_block_behind(where, drawn, keys):
    one = block_of(1)
    next(one)

    async def close():
        one.close()

    if where == "thread":
        with ThreadPoolExecutor(1) as pool:
            pool.submit(one.close).result()
    else:
        asyncio.run(close())
    with mt.rng(SEED):
        assert taken(1) == keys[:1]
    assert drawn() == 0


def test_seed_in_a_block_restarts_its_stream_alone(drawn):
    with mt.rng(1):
        taken(1)
        mt.seed(2)
        assert taken(2) == alone(2, 2)
    assert drawn() == 0


def test_a_key_of_another_generator(drawn, keys):
    with mt.rng(jax.random.key(0, impl="rbg")):
        one, two = mt.next_key(), mt.next_key()
        masks = mt.jit(lambda drop, x: (drop(x), drop(x)))(nn.Dropout(), ONES)
    assert str(jax.random.key_impl(one)) == str(jax.random.key_impl(two)) == "rbg"
    assert bits(one) != bits(two)
    assert not np.array_equal(*masks)
    assert drawn() == 0


def test_rng_within_compiled_code(drawn, keys):
    def mixed(key, x):
        first = jax.random.normal(mt.next_key(), x.shape)
        with mt.rng(key):
            inner = Noisy(2)(x)
        return first, inner, jax.random.normal(mt.next_key(), x.shape)

    expected = [mixed(jax.random.key(i), X) for i in (5, 6)]
    assert drawn() == 4
    mt.seed(SEED)
    call = mt.jit(mixed)
    found = [call(jax.random.key(i), X) for i in (5, 6)]
    assert drawn() == 4
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        close(mine, theirs)
    assert call.num_compiles == 1
    old = call(jax.random.PRNGKey(5), X)
    close(old[1], expected[0][1])


def test_rng_of_a_constant_within_compiled_code_gives_the_same_numbers_at_each_call(drawn):
    def fixed(x):
        with mt.rng(5):
            return Noisy(1)(x)

    call = mt.jit(fixed)
    found = [call(X), call(X), mt.scan(lambda: fixed(X), length=2)[1]]
    assert drawn() == 0
    close(found, [fixed(X)] * 3)


def test_rng_of_a_drawn_key_within_compiled_code_gives_others_at_each_call(drawn):
    def split(x):
        with mt.rng(mt.next_key()):
            return Noisy(2)(x)

    expected = [split(X) for _ in range(4)]
    mt.seed(SEED)
    call = mt.jit(split)
    found = [call(X), call(X), *mt.scan(lambda: split(X), length=2)]
    assert drawn() == 4
    close(found, expected)
    assert len({float(out[0]) for out in found}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_rng_around_compiled_calls(way, drawn, keys):
    model = Noisy(2)
    for _ in range(2):
        with mt.rng(SEED):
            out = way(model, 2)
            assert taken(1) == keys[4:5]
        close(out, by_hand(keys, 2, 2))
    assert drawn() == 0


def test_many_rngs_around_one_compiled_function_compile_it_once(drawn, keys):
    model = Noisy(1)
    call = mt.jit(lambda x: model(x))
    outside = call(X)
    found = []
    for number in range(4):
        with mt.rng(number):
            found.append(call(X))
    assert call.num_compiles == 1
    again = call(X)
    assert drawn() == 2
    close([outside, again], by_hand(keys, 1, 2))
    assert len({float(out[0]) for out in [outside, again, *found]}) == 6


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        "0",
        1.5,
        True,
        np.float32(1),
        [1, 2],
        np.zeros(2),
        jnp.ones(()),
        jnp.ones(2),
        jnp.zeros(2, jnp.int32),
        jax.random.split(jax.random.key(0), 2),
        jax.random.split(jax.random.PRNGKey(0), 2),
        jnp.zeros(3, jnp.uint32),
        np.zeros(2, np.int32),
    ],
    ids=lambda wrong: f"{type(wrong).__name__}-{getattr(wrong, 'dtype', '')}{np.shape(wrong)}",
)
def test_what_rng_does_not_take(wrong, drawn):
    with pytest.raises(TypeError, match=WRONG_KEY), mt.rng(wrong):
        pytest.fail("the block was entered")
    with pytest.raises(TypeError, match=WRONG_KEY), mt.rng(1), mt.rng(wrong):
        pytest.fail("the block was entered")
    assert drawn() == 0


def test_a_wrong_key_in_a_transform(drawn):
    def f(key, x):
        with mt.rng(key):
            return Noisy(1)(x)

    for wrong in (1.5, jax.random.split(jax.random.key(0), 2)):
        with pytest.raises(TypeError, match=WRONG_KEY):
            jax.jit(f)(wrong, X)
        with pytest.raises(TypeError, match=WRONG_KEY):
            mt.jit(f)(wrong, X)
    assert drawn() == 0


# -- plain JAX transforms ----------------------------------------------------------------------------------------------

PLAIN = {
    "jit": lambda f: jax.jit(f),
    "grad": lambda f: jax.grad(lambda x: f(x).sum()),
    "value_and_grad": lambda f: jax.value_and_grad(lambda x: f(x).sum()),
    "vmap": lambda f: lambda x: jax.vmap(f)(x[None]),
    "scan": lambda f: lambda x: jax.lax.scan(lambda carry, x: (carry, f(x)), 0.0, x[None])[1],
    "map": lambda f: lambda x: jax.lax.map(f, x[None]),
    "cond": lambda f: lambda x: jax.lax.cond(x[0] > 0, f, lambda x: x, x),
    "while": lambda f: lambda x: jax.lax.fori_loop(0, 2, lambda _, x: f(x), x),
    "checkpoint": lambda f: jax.checkpoint(f),
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x,)),
    "eval_shape": lambda f: lambda x: jax.eval_shape(f, x),
    "jit of grad of vmap": lambda f: jax.jit(jax.grad(lambda x: jax.vmap(f)(x[None]).sum())),
}
plain = pytest.mark.parametrize("transform", PLAIN.values(), ids=PLAIN)

DRAWS = {
    "next_key": lambda x: x + jax.random.normal(mt.next_key(), x.shape),
    "layer": nn.Dropout(),
    "network": nn.Sequential(nn.Dropout(0.2), nn.Dropout(0.3)),
    "functional": lambda x: F.dropout(x),
    "compiled": mt.jit(lambda x: F.dropout(x)),
}


@plain
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_draw_in_a_plain_transform_is_an_error_that_says_what_to_do(transform, draw, drawn):
    with pytest.raises(mt.TraceError, match=OUTSIDE):
        transform(lambda x: draw(x))(X)
    draws = 2 if type(draw) is nn.Sequential else 1
    assert np.isfinite(draw(X)).all()  # works: no tracer was left behind
    assert drawn() == draws


@plain
def test_the_stream_is_untouched_by_that_error(transform, drawn, keys):
    with pytest.raises(mt.TraceError, match=OUTSIDE):
        transform(lambda x: x + jax.random.normal(mt.next_key(), x.shape))(X)
    assert taken(3) == keys[:3]


@pytest.mark.one_in(2)
@plain
def test_a_model_with_dropout_in_a_plain_transform(transform, drawn):
    layer = nn.Linear(3, 3, key=jax.random.key(0))
    model = nn.Sequential(layer, nn.Dropout())
    before = {name: np.asarray(array) for name, array in model.state_dict().items()}
    with pytest.raises(mt.TraceError, match=OUTSIDE):
        transform(lambda x: model(x))(jnp.ones(3))
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
    expected = jax.tree.leaves(transform(lambda x: layer(x))(jnp.ones(3)))
    model.eval()
    for mine, theirs in zip(jax.tree.leaves(transform(lambda x: model(x))(jnp.ones(3))), expected, strict=True):
        assert mine.shape == theirs.shape
        if isinstance(mine, jax.Array):
            close(mine, theirs)
    assert drawn() == 0


@pytest.mark.parametrize(
    "around",
    [
        lambda f: mt.jit(f)(X),
        lambda f: mt.jit(lambda x: (mt.next_key(), f(x))[1])(X),
        lambda f: mt.scan(f, X[None]),
        lambda f: mt.backward(lambda model, x: (f(model.weight * x)).sum(), Noisy(0), X),
        lambda f: mt.jit(lambda x: mt.backward(lambda m, x: f(m.weight * x).sum(), Noisy(0), x))(X),
    ],
    ids=["jit", "jit that has drawn", "scan", "backward", "backward in jit"],
)
@pytest.mark.parametrize("name", ["jit", "vmap", "scan", "checkpoint", "cond"])
def test_a_plain_transform_within_compiled_code_is_plain_too(name, around, drawn):
    with pytest.raises(mt.TraceError, match=OUTSIDE):
        around(PLAIN[name](lambda x: F.dropout(x)))
    assert drawn() == 0


def test_an_rng_outside_of_the_transform_is_not_enough(drawn, keys):
    with mt.rng(SEED):
        with pytest.raises(mt.TraceError, match=OUTSIDE):
            jax.jit(lambda x: F.dropout(x))(X)
        assert taken(1) == keys[:1]

    def outer(key, x):
        with mt.rng(key):
            return jax.vmap(lambda x: F.dropout(x))(x[None])

    with pytest.raises(mt.TraceError, match=OUTSIDE):
        jax.jit(outer)(jax.random.key(0), X)
    assert drawn() == 0


def test_seed_within_a_plain_transform_is_an_error(drawn):
    def f(x):
        mt.seed(3)
        return x

    for transform in (jax.jit, jax.grad):
        with pytest.raises(mt.TraceError, match="random"):
            transform(f)(1.0)
    assert drawn() == 0


def noise(x):
    """Draws twice."""
    return x + jax.random.normal(mt.next_key(), x.shape) * jax.random.uniform(mt.next_key(), x.shape)


@pytest.mark.one_in(9)
@plain
def test_with_rng_a_plain_transform_draws_from_the_key(transform, drawn):
    def f(key, x):
        def inner(x):
            with mt.rng(key):
                return noise(x)

        return transform(lambda x: inner(x) * x)(x)

    outs = [f(jax.random.key(i), X) for i in (1, 2, 1)]
    assert drawn() == 0
    one, two, again = (jax.tree.leaves(out) for out in outs)
    assert all(not isinstance(leaf, jax.core.Tracer) for leaf in one)
    if not isinstance(one[0], jax.ShapeDtypeStruct):
        for a, b, c in zip(one, two, again, strict=True):
            assert np.array_equal(a, c)
            assert not np.array_equal(a, b)


@pytest.mark.slow
def test_with_rng_the_numbers_are_the_eager_ones(drawn):
    def f(key, x):
        with mt.rng(key):
            return noise(x)

    made = jax.random.split(jax.random.key(4), 3)
    expected = np.stack([f(key, X) for key in made])
    compiled = jax.jit(f)
    close([compiled(key, X) for key in made], expected)
    assert compiled._cache_size() == 1
    close(jax.vmap(f, in_axes=(0, None))(made, X), expected)
    close(jax.jit(jax.vmap(f, in_axes=(0, None)))(made, X), expected)
    close(jax.lax.scan(lambda x, key: (x, f(key, x)), X, made)[1], expected)
    close(jax.lax.map(lambda key: f(key, X), made), expected)
    close([jax.checkpoint(f)(key, X) for key in made], expected)
    assert drawn() == 0


def test_old_style_keys_are_traced_too(drawn):
    def f(key, x):
        with mt.rng(key):
            return noise(x)

    expected = f(jax.random.PRNGKey(3), X)
    close(jax.jit(f)(jax.random.PRNGKey(3), X), expected)
    both = jnp.stack([jax.random.PRNGKey(3), jax.random.PRNGKey(4)])
    close(jax.vmap(f, in_axes=(0, None))(both, X)[0], expected)
    assert drawn() == 0


def test_an_error_within_rng_in_a_transform_leaves_nothing_behind(drawn):
    def f(key, x):
        with mt.rng(key):
            noise(x)
            raise ValueError("mine")

    for transform in (jax.jit, jax.checkpoint, lambda f: jax.vmap(f, in_axes=(None, 0))):
        with pytest.raises(ValueError, match="mine"):
            transform(f)(jax.random.key(0), X)
    noise(X)
    assert drawn() == 2


def functional(opt, key, x, y):
    """A step of training in the functional form."""
    with mt.rng(key):
        opt.zero_grad()
        loss = mt.backward(lambda model, x, y: F.mse_loss(model(x), y), opt.modules[0], x, y)
        opt.step()
    return opt, loss


@pytest.mark.slow
@pytest.mark.parametrize("way", ["jit", "scan"])
def test_functional_training_with_a_key_for_each_step(way, batch, drawn):
    made = jax.random.split(jax.random.key(1), 4)
    eager, opt = (optim.SGD([Regularised()], lr=0.1, momentum=0.9) for _ in range(2))
    expected = [float(functional(eager, key, *batch)[1]) for key in made]
    if way == "scan":
        opt, losses = jax.lax.scan(lambda opt, key: functional(opt, key, *batch), opt, made)
    else:
        step, losses = jax.jit(functional), []
        for key in made:
            opt, loss = step(opt, key, *batch)
            losses.append(loss)
        assert step._cache_size() == 1
    close(losses, expected, 1e-5)
    for name, array in eager.modules[0].state_dict().items():
        close(opt.modules[0].state_dict()[name], array, 1e-5)
    assert drawn() == 0


@pytest.mark.slow
def test_our_transforms_within_a_plain_one_draw_from_its_key(batch, drawn):
    def run(opt, key, x, y):
        loss = lambda model, x, y: F.mse_loss(model(x), y)
        with mt.rng(key):
            first, grads = mt.value_and_grad(loss)(opt.modules[0], x, y)
            opt.zero_grad()
            inner = mt.jit(lambda: mt.backward(loss, opt.modules[0], x, y))
            second = inner()
            opt.step()

            def one():
                opt.zero_grad()
                loss_of_step = mt.backward(loss, opt.modules[0], x, y)
                opt.step()
                return loss_of_step

            return opt, jax.tree.leaves(grads), first, second, mt.scan(one, length=3), noise(X)

    eager = run(optim.SGD([Regularised()], lr=0.1), jax.random.key(2), *batch)
    compiled = jax.jit(run)(optim.SGD([Regularised()], lr=0.1), jax.random.key(2), *batch)
    for mine, theirs in zip(jax.tree.leaves(compiled), jax.tree.leaves(eager), strict=True):
        close(mine, theirs, 1e-5)
    other = jax.jit(run)(optim.SGD([Regularised()], lr=0.1), jax.random.key(3), *batch)
    assert len({float(loss) for loss in [*compiled[2:4], *compiled[4], *other[2:4], *other[4]]}) == 10
    assert drawn() == 0


@pytest.mark.slow
@pytest.mark.parametrize("way", ["jax.jit", "mt.backward", "mt.jit"])
def test_a_checkpoint_with_a_key_recomputes_the_same_masks(way, mlp, batch, mse, drawn):
    class Block(Module):
        def __init__(self, inner, checkpoint):
            self.inner, self.drop, self.checkpoint = inner, nn.Dropout(0.5), checkpoint

        def forward(self, x):
            def run(inner, key, x):
                with mt.rng(key):
                    return self.drop(inner(self.drop(x)))

            run = jax.checkpoint(run) if self.checkpoint else run
            return run(self.inner, mt.next_key(), x)

    def gradients(checkpoint):
        mt.seed(SEED)
        model = Block(copy.deepcopy(mlp), checkpoint)
        if way == "jax.jit":

            def loss(model, key):
                with mt.rng(key):
                    return mse(model, *batch)

            grads = jax.jit(jax.grad(loss))(model, jax.random.key(0))
            return list(grads.parameters())
        run = lambda: mt.backward(mse, model, *batch)
        loss = mt.jit(run)() if way == "mt.jit" else run()
        assert drawn() == 1
        return [loss, *model.grads()]

    plain, again = gradients(False), gradients(True)
    assert any(np.asarray(array).any() for array in plain)
    for mine, theirs in zip(again, plain, strict=True):
        close(mine, theirs)


# -- all or nothing ----------------------------------------------------------------------------------------------------


class Raising:
    """A function that raises, while it is traced, when told to."""

    def __init__(self):
        self.now = True

    def __call__(self, model, x):
        out = model(x)
        if self.now:
            raise ValueError("mine")
        return (out**2).mean()


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "call",
    [
        lambda fn, model: mt.jit(lambda: fn(model, X))(),
        lambda fn, model: mt.scan(lambda: fn(model, X), length=2),
        lambda fn, model: mt.backward(lambda: fn(model, X)),
        lambda fn, model: mt.value_and_grad(lambda: fn(model, X))()[0],
        lambda fn, model: mt.jit(lambda: mt.backward(lambda: fn(model, X)))(),
        lambda fn, model: mt.jit(lambda: mt.scan(lambda: fn(model, X), length=2))(),
    ],
    ids=["jit", "scan", "backward", "value_and_grad", "backward in jit", "scan in jit"],
)
def test_a_call_that_raises_draws_nothing(call, drawn, keys):
    fn, model = Raising(), Noisy(2)
    for _ in range(2):
        with pytest.raises(ValueError, match="mine"):
            call(fn, model)
    assert drawn() == 0
    mt.seed(SEED)
    fn.now = False
    close(np.ravel(call(fn, model))[0], np.mean(np.asarray(by_hand(keys, 2, 1)) ** 2))


def test_a_compiled_function_that_raises_for_another_shape_draws_nothing(drawn, keys):
    model = Noisy(1)

    @mt.jit
    def call(x):
        out = model(x)
        if x.shape != (2,):
            raise ValueError("mine")
        return out

    found = [call(X)]
    with pytest.raises(ValueError, match="mine"):
        call(X[:1])
    found.append(call(X))
    with pytest.raises((TypeError, ValueError)):
        call(jnp.ones(5))
    found.append(call(X))
    close(found, by_hand(keys, 1, 3))
    assert drawn() == 3


def test_a_loss_of_the_wrong_kind_draws_nothing(drawn):
    with pytest.raises(TypeError, match="scalar"):
        mt.backward(lambda model: model(X), Noisy(1))
    with pytest.raises(ValueError, match="uses no trainable parameter"):
        mt.backward(lambda x: F.dropout(x).sum(), X)
    assert drawn() == 0


def test_a_call_that_fails_while_it_runs_draws_nothing(drawn, keys):
    model, fail = Noisy(1), [False]

    def check(x):
        if fail[0]:
            raise ValueError("mine, at run time")
        return x

    @mt.jit
    def call(x):
        return jax.pure_callback(check, jax.ShapeDtypeStruct((2,), jnp.float32), model(x))

    found = [call(X)]
    fail[0] = True
    for _ in range(2):
        with pytest.raises(Exception, match="mine, at run time"):
            call(X)
    fail[0] = False
    found.append(call(X))
    assert drawn() == 2
    close(found, by_hand(keys, 1, 2))


def test_a_call_that_debug_nans_stops_draws_nothing(drawn, keys):
    model = Noisy(1)
    call = mt.jit(lambda x: jnp.log(-jnp.abs(model(x))) * 0 + model(x))
    with jax.debug_nans(True):
        with pytest.raises(FloatingPointError):
            call(X)
        assert drawn() == 0
    mt.seed(SEED)
    call(X)
    assert drawn() == 2


# -- whose key it is ---------------------------------------------------------------------------------------------------


@pytest.mark.one_in(3)
@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
@pytest.mark.parametrize(
    "call",
    [
        lambda fn, model: mt.jit(lambda x: fn(model, x)),
        lambda fn, model: lambda x, body=lambda: fn(model, X): mt.scan(body, length=2),
        lambda fn, model: lambda x: mt.backward(fn, model, x),
        lambda fn, model: lambda x: mt.value_and_grad(fn)(model, x)[0],
        lambda fn, model: lambda x: fn(model, x),
    ],
    ids=["jit", "scan", "backward", "value_and_grad", "eager"],
)
def test_a_key_given_to_rng_stays_its_givers(make, call):
    key = make(3)
    before = np.array(jax.random.key_data(key) if make is jax.random.key else key)
    run = call(lambda model, x: (model(x) ** 2).mean(), Noisy(1))
    results = []
    for _ in range(4):
        with mt.rng(key):
            results += [np.ravel(run(X))[0], np.ravel(run(X))[0]]
    assert results[:2] * 4 == results
    np.testing.assert_array_equal(jax.random.key_data(key) if make is jax.random.key else key, before)


# -- threads -----------------------------------------------------------------------------------------------------------


def in_threads(*functions):
    """What functions give that run in threads of their own, at the same time."""
    results, errors = {}, []
    ready = threading.Barrier(len(functions))

    def run(i, function):
        try:
            ready.wait(timeout=60)
            results[i] = function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=item) for item in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not errors, errors
    return [results[i] for i in range(len(functions))]


def test_threads_draw_from_streams_of_their_own(drawn, keys):
    taken(3)
    one, two = in_threads(lambda: taken(5), lambda: taken(5))
    (three,) = in_threads(lambda: taken(5))
    assert drawn() == 3
    assert len({*one, *two, *three, *keys}) == 15 + len(keys)


def test_seed_restarts_the_stream_of_its_thread(drawn, keys):
    def other():
        first = taken(2)
        mt.seed(SEED)
        return first, taken(5)

    taken(2)
    for first, after in in_threads(other, other):
        assert after == keys[:5]
        assert not set(first) & set(keys)
    assert drawn() == 2


def test_a_seed_in_the_main_thread_does_not_restart_others(drawn):
    seeded, drawn_first = threading.Event(), threading.Event()

    def other():
        mt.seed(4)
        first = taken(2)
        drawn_first.set()
        assert seeded.wait(60)
        return first + taken(2)

    def main():
        assert drawn_first.wait(60)
        mt.seed(5)
        seeded.set()

    results = []
    thread = threading.Thread(target=lambda: results.append(other()))
    thread.start()
    main()
    thread.join(60)
    mt.seed(4)
    assert results == [taken(4)]


def test_compiled_functions_draw_from_the_thread_that_calls(drawn, keys):
    model = Noisy(1)
    call = mt.jit(lambda x: model(x))
    body = lambda: model(X)
    first = call(X)

    def other():
        mt.seed(SEED)
        out = [call(X), model(X), *mt.scan(body, length=2), mt.backward(as_aux, model, X, has_aux=True)[1]]
        return out, taken(1)

    (one,) = in_threads(other)
    second = call(X)
    assert drawn() == 2
    close([first, second], by_hand(keys, 1, 2))
    close(one[0], by_hand(keys, 1, 5))
    assert one[1] == keys[5:6]


def test_a_thread_that_first_draws_within_a_transform_has_a_stream_afterwards(drawn):
    def other():
        with pytest.raises(mt.TraceError, match=OUTSIDE):
            jax.jit(lambda x: x + jax.random.normal(mt.next_key()))(1.0)
        return taken(2)

    def another():
        first = mt.jit(lambda: jax.random.key_data(mt.next_key()))()
        return [tuple(np.asarray(first).tolist()), *taken(1)]

    one, two = in_threads(other, another)
    assert len({*one, *two}) == 4
    assert drawn() == 0


def test_threads_share_a_compiled_function_from_its_first_call_on(drawn):
    model = Noisy(2)
    call = mt.jit(lambda x: model(x))

    def other(number):
        mt.seed(number)
        return [np.asarray(call(X)) for _ in range(10)]

    together = in_threads(*[lambda i=i: other(i) for i in range(4)])
    for number, found in enumerate(together):
        mt.seed(number)
        close(found, eager(model, 10))
    mt.seed(SEED)
    assert drawn() == 0


def test_rng_is_the_threads_own(drawn, keys):
    inside, ended = threading.Event(), threading.Event()

    def other():
        with mt.rng(SEED):
            first = taken(2)
            inside.set()
            assert ended.wait(60)
            return first + taken(1)

    def meanwhile():
        assert inside.wait(60)
        mt.seed(1)
        mine = taken(2)
        ended.set()
        return mine

    mt.seed(1)
    expected = taken(2)
    theirs, mine = in_threads(other, meanwhile)
    assert theirs == keys[:3] and mine == expected
    mt.seed(SEED)
    assert drawn() == 0


@pytest.mark.slow
def test_threads_train_with_dropout_at_the_same_time(mse, batch, drawn):
    def train(number):
        mt.seed(number)
        model, step = trainer(mse, batch)
        losses = []
        call = mt.jit(step)
        for _ in range(8):
            losses.append(float(call()))
            losses.append(float(step()))
            time.sleep(0)
        return losses

    alone = in_threads(lambda: train(1)) + in_threads(lambda: train(2))
    together = in_threads(lambda: train(1), lambda: train(2))
    close(together, alone, 1e-5)
    assert len(set(together[0] + together[1])) == 32
    assert drawn() == 0


# -- other generators --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_default_generator():
    code = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_default_prng_impl", "rbg")
import minitorch_jax as mt
from minitorch_jax import nn

first = mt.next_key()
assert str(jax.random.key_impl(first)) == "rbg", first
mt.seed(0)
again = mt.next_key()
assert (jax.random.key_data(first) == jax.random.key_data(again)).all()  # the stream starts as seed(0)

drop, x = nn.Dropout(0.5), jnp.ones((4, 64))
layer = nn.Linear(64, 2)
call = mt.jit(lambda x: drop(x))
mt.seed(3)
eager = [drop(x) for _ in range(4)]
mt.seed(3)
found = [call(x), *mt.scan(lambda x: drop(x), jnp.stack([x, x])), call(x)]
for a, b in zip(eager, found, strict=True):
    np.testing.assert_array_equal(a, b)
assert len({np.asarray(a).tobytes() for a in eager}) == 4
mt.seed(3)
mt.backward(lambda x: layer(drop(x)).sum(), x)
np.testing.assert_allclose(layer.grads()[0][0], eager[0].sum(0), rtol=1e-5)

def f(key, x):
    with mt.rng(key):
        return drop(x)

one, two = jax.jit(f)(jax.random.key(1), x), jax.jit(f)(jax.random.key(2), x)
assert not (one == two).all()
np.testing.assert_array_equal(one, f(jax.random.PRNGKey(1), x))
with mt.rng(1):
    np.testing.assert_array_equal(one, drop(x))
try:
    jax.jit(lambda x: drop(x))(x)
except mt.TraceError:
    pass
else:
    raise SystemExit("no TraceError")
print("done")
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr


def test_seed_in_another_default_generator_is_an_error(drawn):
    with (
        jax.default_prng_impl("rbg"),
        pytest.raises(ValueError, match=r"a stream of threefry2x32 keys, as JAX now makes rbg keys"),
    ):
        mt.seed(3)
    assert drawn() == 0


# -- Dropout -----------------------------------------------------------------------------------------------------------


def kept(array):
    return np.asarray(array, np.float32) != 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["f32", "bf16", "f16"])
def test_dropout_keeps_a_share_and_scales_it(p, dtype):
    mt.seed(0)
    x = jnp.full((100, 200), 3.0, dtype)
    out = nn.Dropout(p)(x)
    assert out.dtype == dtype and out.shape == x.shape
    share = kept(out).mean()
    assert abs(share - (1 - p)) < 5 * np.sqrt(p * (1 - p) / x.size)
    tolerance = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[jnp.dtype(dtype).name]
    np.testing.assert_allclose(np.asarray(out, np.float32)[kept(out)], 3 / (1 - p), rtol=tolerance)
    rows, columns = kept(out).mean(1), kept(out).mean(0)
    assert abs(rows - (1 - p)).max() < 6 * np.sqrt(p * (1 - p) / 200)
    assert abs(columns - (1 - p)).max() < 6 * np.sqrt(p * (1 - p) / 100)


def test_dropout_drops_single_elements():
    """Not rows, columns, or pairs of neighbours."""
    out = kept(nn.Dropout(0.5)(jnp.ones((200, 200)))) - 0.5
    for other in (out[1:] * out[:-1], out[:, 1:] * out[:, :-1]):
        assert abs(4 * other.mean()) < 5 / np.sqrt(other.size)


def assert_independent(masks):
    """Masks of p = 0.5 agree on half of their elements, each two of them."""
    masks = [kept(mask).ravel() for mask in masks]
    for i, one in enumerate(masks):
        assert 0.4 < one.mean() < 0.6
        for two in masks[:i]:
            assert abs((one == two).mean() - 0.5) < 5 * 0.5 / np.sqrt(one.size)


WIDE = jnp.ones(2000)


def test_masks_of_calls_and_layers_are_independent():
    one, two = nn.Dropout(0.5), nn.Dropout(0.5)
    call = mt.jit(lambda x: (one(x), two(x), one(x)))
    assert_independent([one(WIDE), one(WIDE), two(WIDE), *call(WIDE), *call(WIDE)])


@pytest.mark.slow
def test_masks_of_micro_batches_and_scan_steps_are_independent():
    layer, drop = nn.Linear(1, 2000, bias=False), nn.Dropout(0.5)
    layer.weight = jnp.ones((2000, 1))
    opt = optim.SGD([layer], lr=0.0)
    x = jnp.ones((1, 1))
    loss = lambda x: (drop(layer(x)).sum(), drop(layer(x)))

    def step():
        opt.zero_grad()
        masks = [mt.backward(loss, x, has_aux=True)[1] for _ in range(2)]
        opt.step()
        return masks

    compiled = mt.jit(step)
    masks = [*compiled(), *compiled(), *step()]
    stacked = mt.scan(step, length=3)
    masks += [mask for both in stacked for mask in both]
    assert len(masks) == 12
    assert_independent(masks)


def test_masks_of_the_members_of_an_ensemble_are_independent(drawn):
    drop = nn.Dropout(0.5)

    def one(key, x):
        with mt.rng(key):
            return drop(x), drop(x)

    made = jax.random.split(jax.random.key(0), 3)
    first, second = jax.vmap(one, in_axes=(0, None))(made, WIDE)
    assert first.shape == (3, 2000)
    assert_independent([*first, *second])
    for i, key in enumerate(made):
        np.testing.assert_array_equal(first[i], one(key, WIDE)[0])

    @mt.jit
    def members(x):
        return jax.vmap(one, in_axes=(0, None))(jax.random.split(mt.next_key(), 2), x)[0]

    assert_independent([*members(WIDE), *members(WIDE)])
    assert drawn() == 2


def test_vmap_over_the_batch_with_one_key_gives_one_mask_to_all():
    def one(key, x):
        with mt.rng(key):
            return nn.Dropout(0.5)(x)

    out = jax.vmap(one, in_axes=(None, 0))(jax.random.key(0), jnp.ones((3, 50)))
    assert (kept(out) == kept(out)[0]).all() and 0 < kept(out).mean() < 1


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
def test_the_gradient_is_the_scaled_mask(p, drawn):
    drop = nn.Dropout(p)
    x, cotangent = jnp.linspace(-2.0, 2.0, 60).reshape(5, 12), jnp.linspace(1.0, 3.0, 60).reshape(5, 12)

    def f(x):
        with mt.rng(SEED):
            return drop(x)

    out, pull = jax.vjp(f, x)
    (gradient,) = pull(cotangent)
    scale = kept(out) * (1 / (1 - p) if p < 1 else 0.0)
    close(gradient, scale * cotangent)
    close(out, scale * x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_gradients_through_a_layer_by_backward(dtype):
    layer, drop = nn.Linear(1, 500, bias=False).astype(dtype), nn.Dropout(0.5)
    layer.weight = jnp.ones((500, 1), dtype)
    _, out = mt.backward(lambda x: ((out := drop(layer(x))).sum(), out), jnp.ones((1, 1), dtype), has_aux=True)
    gradient = layer.grads()[0]
    assert gradient.dtype == out.dtype == dtype
    np.testing.assert_array_equal(np.asarray(gradient, np.float32)[:, 0], 2.0 * kept(out)[0])
    assert 0.3 < kept(out).mean() < 0.7


def test_at_one_everything_is_zero_and_gradients_are_finite(drawn):
    drop = nn.Dropout(1)
    x = jnp.array([1.0, -2.0, jnp.inf, 1e38])
    np.testing.assert_array_equal(drop(x), jnp.zeros(4))
    np.testing.assert_array_equal(jax.grad(lambda x: drop(x).sum())(x), jnp.zeros(4))
    np.testing.assert_array_equal(F.dropout(x.astype(jnp.bfloat16), 1.0), jnp.zeros(4, jnp.bfloat16))
    layer = nn.Linear(4, 2, key=jax.random.key(0))
    assert float(mt.backward(lambda x: drop(layer(x)).sum(), jnp.ones(4))) == 0
    for grad in layer.grads():
        np.testing.assert_array_equal(grad, jnp.zeros_like(grad))
    optim.SGD([layer]).step()  # every parameter was read: no warning
    assert drawn() == 0


def test_nothing_is_drawn_where_nothing_is_random(drawn):
    x = jnp.arange(6.0)
    for drop in (nn.Dropout().eval(), nn.Dropout(0), nn.Dropout(0.0), nn.Dropout(1.0).eval()):
        assert drop(x) is x
        np.testing.assert_array_equal(mt.jit(drop)(x), x)
        np.testing.assert_array_equal(jax.jit(lambda x, drop=drop: drop(x))(x), x)  # and so needs no key
    assert F.dropout(x, 0.5, training=False) is x
    assert F.dropout(x, 0.5, False) is x
    assert F.dropout(x, 0.0) is x
    assert F.dropout(x, key=jax.random.key(0)) is not x
    assert drawn() == 0
    mt.seed(SEED)
    nn.Dropout()(x)
    F.dropout(x)
    assert drawn() == 2


def test_the_functional_form_with_a_key(drawn):
    key = jax.random.key(4)
    one = F.dropout(WIDE, 0.25, key=key)
    np.testing.assert_array_equal(one, F.dropout(WIDE, 0.25, True, key=key))
    np.testing.assert_array_equal(one, jax.jit(lambda key, x: F.dropout(x, 0.25, key=key))(key, WIDE))
    np.testing.assert_array_equal(one, F.dropout(WIDE, 0.25, key=jax.random.PRNGKey(4)))
    assert not np.array_equal(one, F.dropout(WIDE, 0.25, key=jax.random.key(5)))
    assert abs(kept(one).mean() - 0.75) < 0.05
    assert drawn() == 0
    with mt.rng(SEED):
        layer = nn.Dropout(0.25)(WIDE)
    with mt.rng(SEED):
        np.testing.assert_array_equal(F.dropout(WIDE, 0.25), layer)
        key = jax.random.wrap_key_data(jnp.array(keys_of(SEED), jnp.uint32))
        np.testing.assert_array_equal(F.dropout(WIDE, 0.25, key=key), layer)


def keys_of(number):
    with mt.rng(number):
        return taken(1)[0]


def test_the_mode_and_p_take_effect_at_the_next_call_of_compiled_code(drawn):
    drop = nn.Dropout(0.5)
    call = mt.jit(lambda x: drop(x))
    assert 0 < kept(call(WIDE)).mean() < 0.7
    drop.eval()
    np.testing.assert_array_equal(call(WIDE), WIDE)
    drop.train()
    assert 0 < kept(call(WIDE)).mean() < 0.7
    assert call.num_compiles == 2
    drop.p = 0.9
    out = call(WIDE)
    assert 0 < kept(out).mean() < 0.2
    close(np.asarray(out)[kept(out)], 10.0, 1e-5)
    assert call.num_compiles == 3
    assert drawn() == 3


def test_dropout_has_no_state_and_is_copied(drawn):
    drop = nn.Dropout(0.25).eval()
    assert jax.tree.leaves(drop) == [] and dict(drop.state_dict()) == {} and list(drop.parameters()) == []
    for new in (copy.deepcopy(drop), pickle.loads(pickle.dumps(drop)), jax.tree.map(lambda leaf: leaf, drop)):
        assert (new.p, new.training) == (0.25, False)
    assert jax.tree.structure(nn.Dropout(0.25)) == jax.tree.structure(nn.Dropout(0.25))
    assert jax.tree.structure(nn.Dropout(0.25)) != jax.tree.structure(nn.Dropout(0.5))
    assert drawn() == 0


def test_a_model_with_dropout_passed_through_a_plain_transform(mlp, batch, drawn):
    model = nn.Sequential(mlp[0], nn.Dropout(0.5), mlp[2])

    def loss(model, key, x):
        with mt.rng(key):
            return mean_square(model, x)

    value, grads = jax.jit(jax.value_and_grad(loss))(model, jax.random.key(0), batch[0])
    with mt.rng(jax.random.key(0)):
        expected = mt.backward(mean_square, model, batch[0])
    close(value, expected)
    for mine, theirs in zip(grads.parameters(), model.grads(), strict=True):
        close(mine, theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gc.collect()  # no copy with a changed stream dies here
    assert drawn() == 0


# -- torch -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 1.0])
def test_the_layer_is_shown_as_torchs(p):
    assert repr(nn.Dropout(p)) == repr(torch.nn.Dropout(p))
    net, theirs = nn.Sequential(nn.Dropout(), nn.ReLU()), torch.nn.Sequential(torch.nn.Dropout(), torch.nn.ReLU())
    assert repr(net) == repr(theirs)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_modes_mean_what_torchs_mean(p, training):
    x = np.random.default_rng(0).standard_normal((50, 40)).astype(np.float32)
    theirs = torch.nn.Dropout(p).train(training)(torch.from_numpy(x)).numpy()
    ours = np.asarray(nn.Dropout(p).train(training)(jnp.asarray(x)))
    assert abs(kept(ours).mean() - kept(theirs).mean()) < 0.1
    both = kept(ours) & kept(theirs)
    np.testing.assert_allclose(ours[both], theirs[both], rtol=1e-6)
    assert both.any() == (p < 1 or not training)
    functional = np.asarray(F.dropout(jnp.asarray(x), p, training))
    both = kept(functional) & kept(theirs)
    np.testing.assert_allclose(functional[both], theirs[both], rtol=1e-6)


def test_the_default_is_torchs():
    assert nn.Dropout().p == torch.nn.Dropout().p == 0.5
    assert nn.Dropout(p=0.1).p == 0.1
    assert nn.Dropout().training is torch.nn.Dropout().training is True


@pytest.mark.parametrize("p", [-0.1, 1.1, 2, float("nan"), float("inf")])
def test_p_is_a_probability(p, drawn):
    with pytest.raises(ValueError, match=rf"dropout probability has to be between 0 and 1, but got {p}"):
        nn.Dropout(p)
    for training in (True, False):
        with pytest.raises(ValueError, match=rf"dropout probability has to be between 0 and 1, but got {p}"):
            F.dropout(X, p, training)
    drop = nn.Dropout()
    drop.p = p
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        drop(X)
    assert drawn() == 0


@pytest.mark.one_in(4)
@pytest.mark.parametrize("p", [0, 1, np.float32(0.5), np.float64(0.25), jnp.float32(0.5)])
def test_p_is_kept_as_a_float(p):
    drop = nn.Dropout(p)
    assert type(drop.p) is float and drop.p == float(p)
    assert mt.jit(drop)(X).shape == (2,)


@pytest.mark.parametrize("p", [None, "0.5", [0.5]])
def test_p_is_a_number(p):
    with pytest.raises(TypeError):
        nn.Dropout(p)
    with pytest.raises(TypeError):
        F.dropout(X, p)


def test_inplace_changes_nothing():
    with mt.rng(SEED):
        plain = F.dropout(WIDE)
    for call in (nn.Dropout(0.5, inplace=True), lambda x: F.dropout(x, inplace=True)):
        with mt.rng(SEED):
            np.testing.assert_array_equal(call(WIDE), plain)
    np.testing.assert_array_equal(WIDE, jnp.ones(2000))
    assert repr(nn.Dropout(inplace=True)) == repr(torch.nn.Dropout(inplace=True))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_])
def test_integers_cannot_be_scaled(dtype, drawn):
    """As in torch, which cannot cast the result to their type."""
    x = jnp.ones(3, dtype)
    for p in (0.5, 1.0):
        with pytest.raises(TypeError, match=rf"dropout needs a floating input; got {x.dtype}"):
            nn.Dropout(p)(x)
    assert nn.Dropout().eval()(x) is x
    assert drawn() == 0


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (2, 3, 4, 5)])
def test_any_shape(shape):
    out = nn.Dropout(0.5)(jnp.ones(shape))
    assert out.shape == shape and out.dtype == jnp.float32
    assert set(np.unique(out).tolist()) <= {0.0, 2.0}


def test_64_bits(drawn):
    with jax.enable_x64(True):
        out = nn.Dropout(0.3)(jnp.ones(100, jnp.float64))
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(np.asarray(out)[np.asarray(out) != 0], 1 / 0.7, rtol=1e-15)
    with mt.rng(SEED):
        narrow = nn.Dropout(0.3)(jnp.ones(100))
    np.testing.assert_array_equal(np.asarray(out) != 0, kept(narrow))


def test_one_draw_of_bits_and_one_select():
    jaxpr = str(jax.make_jaxpr(lambda key, x: F.dropout(x, 0.5, key=key))(jax.random.key(0), ONES))
    assert jaxpr.count("random_bits[") == 1 and jaxpr.count("select_n") == 1
    assert "bit_width=32" in jaxpr


# -- the numbers -------------------------------------------------------------------------------------------------------

SAMPLES = {
    "uniform": lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -2.0, 3.0),
    "normal": jax.random.normal,
    "bernoulli": lambda key, shape, dtype: jax.random.bernoulli(key, dtype(0.3), shape),
    "gumbel": jax.random.gumbel,
}
SHAPES = [(), (0, 3), (7,), (3, 4), (2, 3, 4), (2, 3, 1, 5), (5000,), (2, 1, 5000)]


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_what_is_drawn_is_what_jax_draws(name, dtype):
    key = jax.random.key(SEED)
    for shape in SHAPES:
        expected = SAMPLES[name](key, shape, dtype)
        found = random.draw(lambda key, shape: SAMPLES[name](key, shape, dtype), key, shape)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.one_in(9)
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("partitionable", [True, False])
def test_compiled_code_and_eager_code_draw_the_same(impl, partitionable):
    with jax.threefry_partitionable(partitionable):
        key = jax.random.key(SEED, impl=impl)
        for shape in [(), (3, 4), (2, 3, 5)]:
            draw = lambda key, shape=shape: random.draw(jax.random.uniform, key, shape)
            np.testing.assert_array_equal(draw(key), jax.jit(draw)(key))
            np.testing.assert_array_equal(draw(key), jax.random.uniform(key, shape))


def test_more_numbers_than_programs_share():
    key = jax.random.key(SEED)
    shape = (3, 1, random._SHARED[-1] // 2)
    np.testing.assert_array_equal(random.draw(jax.random.uniform, key, shape), jax.random.uniform(key, shape))


def test_layers_of_any_shape_share_the_program_that_draws(monkeypatch):
    asked = set()
    uniform = jax.random.uniform
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, *args: asked.add(shape) or uniform(key, shape, *args))
    nn.Linear(3, 4), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.LSTM(5, 6), nn.Bilinear(2, 3, 4)
    assert asked == {(4096,)}
