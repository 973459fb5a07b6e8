"""Eager code compiles each of its programs once: what `LayerContract` does not reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_contract import check_later_calls
from test_sides import discovered

import minitorch_jax as mt
from minitorch_jax import nn, optim

F = nn.functional


@pytest.mark.slow
@pytest.mark.one_in(9)
@pytest.mark.parametrize("lengths", ["tuples", "arrays"])
def test_a_third_ctc_loss_compiles_nothing(lengths):
    make = tuple if lengths == "tuples" else jnp.asarray
    args = jnp.array([[1, 2], [2, 1]]), make([4, 3]), make([2, 1])
    scores = jax.nn.log_softmax(jnp.arange(24.0).reshape(4, 2, 3))
    layer = nn.CTCLoss()
    check_later_calls("the loss", lambda: layer(scores, *args))
    check_later_calls("its gradient", lambda: jax.grad(lambda x: layer(x, *args))(scores))
    check_later_calls("a loss by itself", lambda: F.ctc_loss(scores[:, 0], args[0][0], 4, 2, blank=np.int32(0)))


@pytest.mark.one_in(9)
@pytest.mark.parametrize("transform", [jax.jacfwd, jax.hessian, jax.vmap], ids=lambda f: f.__name__)
def test_a_third_transform_of_a_recurrent_layer_compiles_nothing(transform):
    layer, x = nn.GRU(2, 3, key=jax.random.key(0)), jnp.ones((4, 2))
    x = x if transform is not jax.vmap else jnp.stack([x, x])
    check_later_calls(transform.__name__, lambda: transform(lambda x: layer(x)[0].sum())(x))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("cls", discovered(), ids=lambda cls: cls.__name__)
def test_a_third_step_compiles_nothing(cls):
    layer, x = nn.Linear(2, 2, bias=False, key=jax.random.key(0)), jnp.ones((3, 2))
    opt = cls([layer])

    def loss_fn():
        return (layer(x) ** 2).mean()

    def step():
        opt.zero_grad()
        mt.backward(loss_fn)
        opt.step()

    check_later_calls("a step", step)


def test_a_third_step_of_lbfgs_compiles_nothing():
    layer, x = nn.Linear(2, 2, key=jax.random.key(0)), jnp.ones((3, 2))
    opt = optim.LBFGS([layer], lr=0.1, max_iter=2)

    def closure():
        opt.zero_grad()
        return mt.backward(loss_fn)

    def loss_fn():
        return (layer(x) ** 2).mean()

    check_later_calls("a step", lambda: opt.step(closure))


def test_a_third_clipping_compiles_nothing():
    layer, x = nn.Linear(2, 2, key=jax.random.key(0)), jnp.ones((3, 2))
    mt.backward(lambda layer, x: layer(x).sum(), layer, x)
    for norm_type in (1.0, 2.0, float("inf")):
        check_later_calls("clip_grad_norm", lambda p=norm_type: mt.clip_grad_norm(layer, 1.0, norm_type=p))
    check_later_calls("clip_grad_value", lambda: mt.clip_grad_value(layer, 0.5))
    check_later_calls("scale_grads", lambda: mt.scale_grads(layer, 0.5))
