"""`mt.jit`: gradients, optimizers, hyperparameters, buffers and random numbers in compiled steps."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from training import (
    Line,
    Scale,
    X,
    Y,
    assert_same,
    assert_unchanged,
    eagerly,
    everything,
    pair,
    squared,
    step,
    stream_state,
)

import minitorch_jax as mt
from minitorch_jax import nn, optim

# -- gradients ---------------------------------------------------------------------------------------------------------


def test_value_and_grad_and_aux_inside() -> None:
    model = Line()

    def with_aux(model: Any, x: Any, y: Any) -> Any:
        out = model(x)
        return ((out - y) ** 2).mean(), {"out": out, "name": "aux"}

    @mt.jit
    def fn(model: Any, x: Any, y: Any) -> Any:
        loss, grads = mt.value_and_grad(squared)(model, x, y)
        (loss2, aux), grads2 = mt.value_and_grad(with_aux, has_aux=True)(model, x, y)
        grads3, aux3 = mt.grad(with_aux, has_aux=True)(model, x, y)
        loss4, aux4 = mt.backward(with_aux, model, x, y, has_aux=True)
        assert aux["name"] == aux4["name"] == "aux"
        plain = jax.grad(lambda weight: ((x @ weight + model.bias - y) ** 2).mean())(model.weight)
        return [loss, loss2, loss4], [grads, grads2, grads3], [aux, aux3, aux4], plain

    expected_loss, expected = mt.value_and_grad(squared)(Line(), X, Y)
    losses, grads, auxes, plain = fn(model, X, Y)
    assert_allclose(plain, expected.weight, rtol=1e-5)
    assert_allclose(losses, [expected_loss] * 3, rtol=1e-6)
    for grad in grads:
        assert_allclose(grad.weight, expected.weight, rtol=1e-5)
        assert_allclose(grad.bias, expected.bias, rtol=1e-5)
    for aux in auxes:
        assert_allclose(aux["out"], X @ np.ones(3, np.float32), rtol=1e-6)
        assert aux["name"] == "aux"
    assert_allclose(model.grads()[0], expected.weight, rtol=1e-5)
    assert int(model.count) == 4


def test_gradients_accumulate_over_calls() -> None:
    """One compiled function does only `backward`, another only the step; what is in between is eager code."""
    model, opt = pair()
    expected, opt2 = pair()
    gather, update = mt.jit(lambda x, y: mt.backward(squared, model, x, y)), mt.jit(lambda: opt.step())
    for _ in range(3):
        for backward, o in (
            (gather, opt),
            (functools.partial(mt.backward, squared, expected), opt2),
        ):
            o.zero_grad()
            backward(X, Y)
            backward(X[::-1], Y)
        assert_allclose(model.grads()[0], expected.grads()[0], rtol=1e-5)
        assert update() is None
        opt2.step()
        assert_allclose(model.grads()[0], expected.grads()[0], rtol=1e-5)  # still there after the step
    assert_same(everything(model, opt), everything(expected, opt2))


def halved(model: Any, x: Any, y: Any) -> Any:
    return squared(model, x, y) / 2


def test_micro_batches_in_one_step() -> None:
    def accumulate(model: Any, opt: Any, xs: Any, ys: Any) -> Any:
        opt.zero_grad()
        total = 0.0
        for x, y in zip(xs, ys, strict=True):
            total += mt.backward(halved, model, x, y)
        opt.step()
        return total

    xs, ys = [X[:2], X[2:]], [Y[:2], Y[2:]]
    model, opt = pair()
    compiled = mt.jit(accumulate)
    losses = [float(compiled(model, opt, xs, ys)) for _ in range(3)]
    expected, opt2 = pair()
    assert_allclose(losses, [float(accumulate(expected, opt2, xs, ys)) for _ in range(3)], rtol=1e-5)
    assert_same(everything(model, opt), everything(expected, opt2))
    whole, opt3 = pair()
    assert_allclose(losses, [float(step(whole, opt3, X, Y)) for _ in range(3)], rtol=1e-5)


def test_gradients_can_be_changed_inside() -> None:
    """Clipping by the live list, and the gradients afterwards."""

    def clipped(model: Any, opt: Any, x: Any, y: Any) -> Any:
        opt.zero_grad()
        mt.backward(squared, model, x, y)
        grads = model.grads()
        norm = jnp.sqrt(sum((g**2).sum() for g in grads))
        for i in range(len(grads)):
            grads[i] *= jnp.minimum(1.0, 0.1 / norm)
        opt.step()
        return norm

    model, opt = pair()
    expected, opt2 = pair()
    compiled = mt.jit(clipped)
    norms = [float(compiled(model, opt, X, Y)) for _ in range(3)]
    assert_allclose(norms, [float(clipped(expected, opt2, X, Y)) for _ in range(3)], rtol=1e-5)
    assert min(norms) > 0.1
    assert_same(everything(model, opt), everything(expected, opt2))


def test_zero_grad_at_the_end() -> None:
    model, opt = pair()

    @mt.jit
    def fn(x: Any, y: Any) -> Any:
        loss = mt.backward(squared, model, x, y)
        opt.step()
        opt.zero_grad()
        return loss

    losses, expected = eagerly(4)
    assert_allclose([float(fn(X, Y)) for _ in range(4)], losses, rtol=1e-5)
    assert_same(everything(model, opt), expected)
    assert not any(np.any(grad) for grad in model.grads())
    mt.backward(squared, model, X, Y)
    assert np.any(model.grads()[0])


def test_a_step_without_zero_grad_uses_what_was_accumulated() -> None:
    model = Scale(0.0)
    opt = mt.Optimizer([model], lr=1.0)

    @mt.jit(keep_grads=True)
    def fn(x: Any) -> None:
        mt.backward(lambda model, x: model(x), model, x)
        opt.step()

    weights = []
    for _ in range(3):
        fn(1.0)
        weights.append(float(model.weight))
    assert weights == [-1.0, -3.0, -6.0]
    assert float(model.grads()[0]) == 3.0


def test_a_second_step_with_the_same_gradients() -> None:
    model = Scale(0.0)
    opt = mt.Optimizer([model], lr=1.0)

    @mt.jit
    def fn(x: Any) -> None:
        opt.zero_grad()
        mt.backward(lambda model, x: model(x), model, x)
        opt.step()
        opt.step()

    fn(1.0)
    fn(2.0)
    assert float(model.weight) == -6.0
    assert opt.num_steps == 4


GONE = r"computed inside a function compiled by mt\.jit.*keep_grads=True.*zero_grad\(\) first"


def used_up() -> tuple[Line, optim.SGD, Any]:
    model, opt = pair()
    fn = mt.jit(functools.partial(step, model, opt))
    fn(X, Y)
    return model, opt, fn


def test_gradients_that_were_used_up_say_so() -> None:
    model, opt, fn = used_up()
    before = everything(model, opt)
    for use in (
        lambda: model.grads()[0],
        lambda: list(model.grads()),
        lambda: model.grads()[0] + 1,
        lambda: mt.backward(squared, model, X, Y),
        lambda: opt.step(),
        lambda: mt.jit(lambda: opt.step())(),
        lambda: mt.jit(lambda: mt.backward(squared, model, X, Y))(),
        lambda: model.accumulate([np.ones(3, np.float32), np.ones((), np.float32)]),
    ):
        with pytest.raises(RuntimeError, match=f"(?s){GONE}"):
            use()
        assert_unchanged(before, model, opt)
    assert len(model.grads()) == len(model.parameters()) == 2
    fn(X, Y)  # the function itself goes on, and so does what does not need them
    mt.value_and_grad(squared)(model, X, Y)
    opt.zero_grad()
    assert not np.any(model.grads()[0])
    step(model, opt, X, Y)
    assert np.any(model.grads()[0])
    fn(X, Y)
    assert opt.num_steps == 4


def test_assigning_a_gradient_that_was_used_up() -> None:
    model, _, _ = used_up()
    model.grads()[0] = jnp.ones(3)
    assert_array_equal(model.grads()[0], np.ones(3))
    with pytest.raises(RuntimeError, match=f"(?s){GONE}"):
        model.grads()[1]


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda obj: pickle.loads(pickle.dumps(obj))], ids=["deepcopy", "pickle"]
)
def test_copies_while_gradients_are_used_up(how: Any) -> None:
    model, opt, _ = used_up()
    again = how(opt)
    assert_same(everything(again.modules[0], again), everything(model, opt), rtol=0)
    with pytest.raises(RuntimeError, match=f"(?s){GONE}"):
        again.modules[0].grads()[0]
    step(again.modules[0], again, X, Y)
    step(model, opt, X, Y)
    assert_same(everything(again.modules[0], again), everything(model, opt), rtol=0)


def test_used_up_gradients_are_nan_as_leaves() -> None:
    model, opt, _ = used_up()
    assert sum(bool(np.isnan(leaf).any()) for leaf in jax.tree.leaves(opt) if leaf.dtype == jnp.float32) == 2
    opt.zero_grad()
    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(opt) if leaf.dtype == jnp.float32)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model))


def test_keep_grads() -> None:
    model, opt = pair()
    expected, opt2 = pair()
    fn = mt.jit(functools.partial(step, model, opt), keep_grads=True)
    for _ in range(3):
        fn(X, Y)
        step(expected, opt2, X, Y)
        for mine, theirs in zip(model.grads(), expected.grads(), strict=True):
            assert_allclose(mine, theirs, rtol=1e-5)
    mt.backward(squared, model, X, Y)
    mt.backward(squared, expected, X, Y)
    assert_allclose(model.grads()[0], expected.grads()[0], rtol=1e-5)


def test_a_gradient_read_before_the_step_is_not_lost_outside() -> None:
    """Arrays of gradients that were read outside belong to the reader, as everything else."""
    model, opt = pair()
    fn = mt.jit(functools.partial(step, model, opt))
    mt.backward(squared, model, X, Y)
    grads = [model.grads()[0], model.grads()[1]]
    values = [np.array(g) for g in grads]
    for _ in range(3):
        fn(X, Y)
    for grad, value in zip(grads, values, strict=True):
        assert_array_equal(grad, value)


# -- several modules and optimizers ------------------------------------------------------------------------------------


def gan(compile_: Any) -> tuple[Any, list[float]]:
    """Generator and discriminator, taking turns in one step, each frozen in the other's turn."""
    generator, critic = nn.Linear(2, 3, key=jax.random.key(0)), nn.Linear(3, 1, key=jax.random.key(1))
    opt_g = optim.SGD([generator], lr=0.1, momentum=0.9)
    opt_c = optim.SGD([critic], lr=0.2)

    def critic_loss(real: Any, z: Any) -> Any:
        return (critic(generator(z)) ** 2).mean() - critic(real).mean()

    def generator_loss(z: Any) -> Any:
        return -critic(generator(z)).mean()

    def train(real: Any, z: Any) -> Any:
        opt_c.zero_grad()
        opt_g.zero_grad()
        a = mt.backward(critic_loss, real, z)
        opt_c.step()
        opt_g.zero_grad()
        b = mt.backward(generator_loss, z)
        opt_g.step()
        return a + b

    train = compile_(train)
    losses = [float(train(X, X[:, :2])) for _ in range(3)]
    critic.freeze()
    losses += [
        float(compile_(lambda z: (opt_g.zero_grad(), mt.backward(generator_loss, z), opt_g.step())[1])(X[:, :2]))
    ]
    critic.unfreeze()
    losses.append(float(train(X, X[:, :2])))
    return everything(generator, critic, opt_g, opt_c), losses


@pytest.mark.slow
def test_a_gan() -> None:
    state, losses = gan(mt.jit)
    expected, expected_losses = gan(lambda fn: fn)
    assert_allclose(losses, expected_losses, rtol=1e-5)
    assert_same(state, expected)


def test_one_module_in_two_optimizers() -> None:
    """Each trains its own half of one network, by turns of one compiled function."""

    def run(compile_: Any) -> Any:
        halves = Scale(1.0), Scale(2.0)
        opts = optim.SGD([halves[0]], lr=0.1, momentum=0.5), optim.SGD([halves[1]], lr=0.01)

        def fn(opt: Any, x: Any) -> Any:
            for each in opts:
                each.zero_grad()
            loss = mt.backward(lambda x: (halves[1](halves[0](x)) - 1.0) ** 2, x)
            opt.step()
            return loss

        fn = compile_(fn)
        losses = [float(fn(opts[i % 2], 1.5)) for i in range(4)]
        return losses, everything(*halves, *opts)

    (losses, state), (expected, expected_state) = run(mt.jit), run(lambda fn: fn)
    assert_allclose(losses, expected, rtol=1e-5)
    assert_same(state, expected_state)


# -- hyperparameters ---------------------------------------------------------------------------------------------------


def test_lr_outside_and_inside() -> None:
    model = Scale(0.0)
    opt = mt.Optimizer([model], lr=1.0)

    @mt.jit
    def fn(opt: Any, factor: Any) -> Any:
        opt.lr = opt.lr * factor
        opt.zero_grad()
        mt.backward(opt.modules[0], 1.0)
        opt.step()
        return opt.lr

    assert [float(fn(opt, factor)) for factor in (1.0, 0.5, 0.5)] == [1.0, 0.5, 0.25]
    assert float(model.weight) == -1.75
    assert float(opt.lr) == 0.25
    opt.lr = 4
    assert float(fn(opt, 1.0)) == 4.0
    assert float(model.weight) == -5.75
    assert fn.num_compiles == 1

    @mt.jit
    def constant(opt: Any) -> None:
        opt.lr = 0.125

    constant(opt)
    assert float(opt.lr) == 0.125
    assert isinstance(repr(opt), str)


def test_a_wrong_hyperparameter_inside() -> None:
    opt = mt.Optimizer([Scale()], lr=1.0)

    def fn(opt: Any) -> None:
        opt.lr = -1.0

    with pytest.raises(ValueError, match="lr"):
        mt.jit(fn)(opt)
    assert float(opt.lr) == 1.0


def test_schedules_follow_the_steps() -> None:
    model, rates = Scale(0.0), [1.0, 0.5, 0.25, 0.125]
    opt = mt.Optimizer([model], lr=lambda t: 0.5 ** jnp.float32(t))

    @mt.jit
    def fn(opt: Any) -> Any:
        opt.zero_grad()
        mt.backward(opt.modules[0], 1.0)
        rate = opt.lr
        opt.step()
        return rate

    assert_allclose([float(fn(opt)) for _ in range(4)], rates, rtol=1e-6)
    assert_allclose(float(model.weight), -sum(rates), rtol=1e-6)
    assert fn.num_compiles == 1


def test_skip_nonfinite() -> None:
    model, opt = pair(skip_nonfinite=True)
    fn = mt.jit(functools.partial(step, model, opt))
    fn(X, Y)
    before = {name: value for name, value in everything(model, opt).items() if "0.weight" in name or "bias" in name}
    assert np.isnan(fn(np.full_like(X, np.nan), Y))
    now = everything(model, opt)
    for name, value in before.items():
        assert_array_equal(now[name], value)
    assert (opt.num_steps, opt.skipped) == (1, 1)
    fn(X, Y)
    assert (opt.num_steps, opt.skipped) == (2, 1)
    assert fn.num_compiles == 1


def test_modules_can_be_added_between_calls() -> None:
    first, second = Scale(1.0), Scale(1.0)
    opt = optim.SGD([first], lr=1.0, momentum=0.5)

    @mt.jit
    def fn(opt: Any, x: Any) -> Any:
        opt.zero_grad()
        mt.backward(lambda x: first(x) + second(x), x)
        opt.step()

    fn(opt, 1.0)
    assert (float(first.weight), float(second.weight)) == (0.0, 1.0)
    opt.modules.append(second)
    fn(opt, 1.0)
    assert (float(first.weight), float(second.weight)) == (-1.5, 0.0)


# -- buffers, parameters, random numbers -------------------------------------------------------------------------------


def test_parameters_and_buffers_replaced_inside() -> None:
    model, ema = Line(2.0), Line(0.0)

    @mt.jit
    def fn(rate: Any) -> Any:
        ema.weight = ema.weight * (1 - rate) + model.weight * rate
        model.weight = jnp.zeros(3)
        model.parameters()[1] = model.bias + 1.0
        model.count = model.count + 2
        return model.weight

    for _ in range(2):
        model.weight = jnp.full((3,), 2.0)
        assert_array_equal(fn(0.5), np.zeros(3))
    assert_array_equal(model.weight, np.zeros(3))
    assert_array_equal(ema.weight, np.full(3, 1.5))
    assert (float(model.bias), int(model.count), model.count.dtype) == (2.0, 4, jnp.int32)
    assert fn.num_compiles == 1


def test_an_array_given_in_becomes_no_ones_victim() -> None:
    """A parameter replaced by an argument: both the argument and the parameter stay."""
    model, opt = pair()
    array = jnp.full((3,), 5.0)

    @mt.jit
    def give(array: Any) -> None:
        model.weight = array

    train = mt.jit(functools.partial(step, model, opt))
    for _ in range(4):
        give(array)
        train(X, Y)
        assert_array_equal(array, np.full(3, 5.0))
        assert not np.array_equal(model.weight, array)


def test_swapping_two_parameters() -> None:
    a, b = Line(1.0), Line(2.0)

    @mt.jit
    def swap() -> None:
        a.weight, b.weight = b.weight, a.weight

    for i in range(4):
        swap()
        assert (float(a.weight[0]), float(b.weight[0])) == ((2.0, 1.0) if i % 2 == 0 else (1.0, 2.0))


@pytest.mark.parametrize("value", [jnp.zeros(4), jnp.zeros(3, jnp.bfloat16)], ids=["shape", "dtype"])
def test_a_wrong_array_assigned_inside(value: Any) -> None:
    model = Line()
    before = everything(model)

    def fn() -> None:
        model.bias = model.bias + 1.0
        model.weight = value

    with pytest.raises(ValueError, match=r"weight is float32\[3\].*and was given"):
        mt.jit(fn)()
    assert_unchanged(before, model)


def test_random_numbers_advance_as_in_eager_code() -> None:
    def draw(x: Any) -> Any:
        return jax.random.normal(mt.next_key(), x.shape) + jax.random.normal(mt.next_key(), x.shape)

    mt.seed(3)
    expected = [np.array(draw(X)) for _ in range(3)]
    end = stream_state()
    mt.seed(3)
    compiled = mt.jit(draw)
    got = [np.array(compiled(X)) for _ in range(3)]
    assert_allclose(got, expected, rtol=1e-6)
    assert not np.array_equal(got[0], got[1])
    assert_array_equal(stream_state(), end)
    with mt.rng(jax.random.key(9)):
        first = np.array(compiled(X))
    with mt.rng(9):
        assert_array_equal(compiled(X), first)
    assert_array_equal(stream_state(), end)
    assert compiled.num_compiles == 1


def test_rng_and_seed_inside() -> None:
    @mt.jit
    def fn(key: Any) -> Any:
        with mt.rng(key):
            return jax.random.normal(mt.next_key(), (2,))

    start = stream_state()
    a, b, c = fn(jax.random.key(1)), fn(jax.random.key(2)), fn(jax.random.key(1))
    assert_array_equal(a, c)
    assert not np.array_equal(a, b)
    assert_array_equal(stream_state(), start)

    @mt.jit
    def reseeded() -> Any:
        mt.seed(5)
        return jax.random.normal(mt.next_key(), (2,))

    first = reseeded()
    assert_array_equal(reseeded(), first)
    mt.seed(5)
    mt.next_key()
    end = stream_state()
    reseeded()
    assert_array_equal(stream_state(), end)


def test_layers_made_inside_draw_from_the_stream() -> None:
    @mt.jit
    def fn(x: Any) -> Any:
        return nn.Linear(3, 2)(x)

    mt.seed(1)
    expected = [np.array(nn.Linear(3, 2)(X)) for _ in range(2)]
    mt.seed(1)
    assert_allclose([fn(X), fn(X)], expected, rtol=1e-5)
