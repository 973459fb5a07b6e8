"""`mt.grad` and `mt.value_and_grad` with `argnums`: gradients by arguments, while state changes as in `backward`."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import minitorch_jax as mt
from minitorch_jax import nn

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
Z = np.linspace(2, 0, 12, dtype=np.float32).reshape(4, 3)


class Critic(mt.Module):
    """A network whose statistics and random stream change when it is called."""

    def __init__(self) -> None:
        self.first = nn.Linear(3, 4, key=jax.random.key(0))
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(4, 1, key=jax.random.key(1))

    def forward(self, x: Any) -> Any:
        return self.last(self.drop(jnp.tanh(self.norm(self.first(x)))))

    def total(self, x: Any) -> Any:
        return (self(x) ** 2).sum()


def loss_fn(critic: Any, x: Any, z: Any = 0.0) -> Any:
    return (critic(x + z) ** 2).sum()


def after_one_call() -> tuple[Any, dict[str, Any]]:
    """The key that the stream has after one eager call in training mode, and the critic's state."""
    critic = Critic()
    mt.seed(5)
    loss_fn(critic, jnp.asarray(X))
    return mt.next_key(), critic.state_dict()


def by_jax(critic: Any, x: Any) -> Any:
    """The gradient of plain JAX, with the random masks that a stream draws first after `mt.seed(5)`."""

    def loss(x: Any) -> Any:
        copied = copy_of(critic)
        with mt.rng(5):
            return loss_fn(copied, x), copied

    return jax.grad(loss, has_aux=True)(jnp.asarray(x))[0]


def copy_of(critic: Any) -> Any:
    return jax.tree.map(lambda array: array, critic)


def eagerly(critic: Any) -> Any:
    return mt.grad(loss_fn, argnums=1)(critic, X)


def by_closure(critic: Any) -> Any:
    return mt.grad(lambda x: loss_fn(critic, x), argnums=0)(X)


def by_position(critic: Any) -> Any:
    return mt.grad(loss_fn, 1)(critic, X)


def from_the_end(critic: Any) -> Any:
    return mt.grad(loss_fn, argnums=-1)(critic, X)


def of_a_method(critic: Any) -> Any:
    return mt.grad(critic.total, argnums=0)(X)


def of_a_partial(critic: Any) -> Any:
    return mt.grad(partial(loss_fn, critic), argnums=0)(X)


def with_the_value(critic: Any) -> Any:
    loss, gradient = mt.value_and_grad(loss_fn, argnums=1)(critic, X)
    assert loss.shape == ()
    return gradient


def with_aux(critic: Any) -> Any:
    def loss_and_more(critic: Any, x: Any) -> Any:
        return loss_fn(critic, x), {"shape": "of x", "twice": 2 * x}

    gradient, aux = mt.grad(loss_and_more, argnums=1, has_aux=True)(critic, X)
    assert aux["shape"] == "of x"
    assert_array_equal(aux["twice"], 2 * X)
    return gradient


def in_a_jit(critic: Any) -> Any:
    return mt.jit(lambda x: mt.grad(loss_fn, argnums=1)(critic, x))(X)


def a_jit_of_it(critic: Any) -> Any:
    return mt.jit(mt.grad(loss_fn, argnums=1))(critic, X)


def in_a_scan(critic: Any) -> Any:
    return mt.scan(lambda x: mt.grad(loss_fn, argnums=1)(critic, x), X[None])[0]


def as_plain_python(critic: Any) -> Any:
    with jax.disable_jit():
        return mt.grad(loss_fn, argnums=1)(critic, X)


WAYS = (
    eagerly, by_closure, by_position, from_the_end, of_a_method, of_a_partial, with_the_value, with_aux,
    in_a_jit, a_jit_of_it, in_a_scan, as_plain_python,
)  # fmt: skip


@pytest.mark.one_in(9)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_gradient_is_that_of_jax_and_state_is_written_back(way: Any, frozen: bool) -> None:
    critic = Critic().requires_grad_(not frozen)
    key, state = after_one_call()
    expected = by_jax(critic, X)
    mt.seed(5)
    gradient = way(critic)
    assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
    assert_array_equal(jax.random.key_data(mt.next_key()), jax.random.key_data(key))
    for name, array in critic.state_dict().items():
        assert_allclose(array, state[name], rtol=1e-6, err_msg=name)
    assert all(not grad.any() for grad in critic.grads())


@pytest.mark.parametrize("plain", [False, True])
def test_several_arguments_and_pytrees(plain: bool) -> None:
    layer = nn.Linear(3, 1, key=jax.random.key(0))

    def loss(tree: Any, layer: Any, z: Any, scale: Any, *, shift: Any) -> Any:
        return (layer(tree["x"] * z + tree["more"][0]) * scale + shift["by"]).sum()

    tree = {"x": X, "more": (jnp.ones((1, 3)), None)}
    with jax.disable_jit(plain):
        value, grads = mt.value_and_grad(loss, argnums=(3, 0, 2))(tree, layer, Z, 2.0, shift={"by": 1})
    expected = jax.grad(loss, argnums=(3, 0, 2))(tree, layer, Z, 2.0, shift={"by": 1})
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    for mine, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert mine.dtype == theirs.dtype
        assert_allclose(mine, theirs, rtol=1e-5)
    assert_allclose(value, loss(tree, layer, Z, 2.0, shift={"by": 1}), rtol=1e-5)
    assert isinstance(mt.grad(loss, argnums=[2])(tree, layer, Z, 2.0, shift={"by": 1}), tuple)


def test_a_function_without_modules_and_an_unused_argument() -> None:
    assert float(mt.grad(lambda x, y: x**2, argnums=0)(3.0, 1.0)) == 6
    assert float(mt.grad(lambda x, y: x**2, argnums=1)(3.0, 1.0)) == 0
    assert mt.grad(lambda x: abs(x) ** 2, argnums=0)(1 + 1j) == jax.grad(lambda x: abs(x) ** 2)(1 + 1j)


@pytest.mark.slow
def test_a_gradient_penalty_trains_a_critic() -> None:
    """The gradient by the input, inside the loss whose gradient by the parameters is taken."""
    critic = Critic()
    twin = Critic()
    critic.drop.eval(), twin.drop.eval()

    def penalty(gradient_of: Any, critic: Any, x: Any) -> Any:
        return ((jnp.linalg.norm(gradient_of(critic, x), axis=1) - 1) ** 2).mean()

    def slope(critic: Any, x: Any) -> Any:
        def loss(x: Any) -> Any:
            copied = copy_of(critic)
            return loss_fn(copied, x), copied

        return jax.grad(loss, has_aux=True)(x)[0]

    mine = mt.backward(partial(penalty, mt.grad(loss_fn, argnums=1)), critic, X)
    theirs, grads = jax.value_and_grad(partial(penalty, slope))(twin, jnp.asarray(X))
    assert_allclose(mine, theirs, rtol=1e-5)
    assert int(critic.norm.num_batches_tracked) == 1
    for (name, theirs), mine in zip(grads.named_parameters(), critic.grads(), strict=True):
        assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6, err_msg=name)


def test_it_compiles_once_for_each_set_of_arguments() -> None:
    traces = []

    def loss(x: Any, y: Any) -> Any:
        traces.append(1)
        return (x * y).sum()

    for _ in range(2):
        assert float(mt.grad(loss, argnums=0)(2.0, 3.0)) == 3
    before = len(traces)
    for x in (4.0, 5.0):
        assert float(mt.grad(loss, argnums=0)(x, x)) == x
    assert len(traces) == before
    assert float(mt.grad(loss, argnums=1)(2.0, 3.0)) == 2
    one, two = mt.grad(loss, argnums=(0, 1))(2.0, 3.0)
    assert (float(one), float(two)) == (3, 2)


def test_examples_by_vmap() -> None:
    layer = nn.Linear(3, 1, key=jax.random.key(0))
    gradients = jax.vmap(mt.grad(lambda layer, x: layer(x).sum() ** 2, argnums=1), in_axes=(None, 0))(layer, X)
    expected = 2 * layer(X) * layer.weight
    assert_allclose(gradients, expected, rtol=1e-5)


@pytest.mark.one_in(9)
@pytest.mark.parametrize("where", ["eager", "jit", "disable_jit"])
def test_an_error_changes_nothing(where: str) -> None:
    critic = Critic()
    before = critic.state_dict()

    def loss(critic: Any, x: Any) -> Any:
        loss_fn(critic, x)
        return critic(x)  # no scalar

    call = mt.grad(loss, argnums=1)
    mt.seed(5)
    key = mt.next_key()
    mt.seed(5)
    with jax.disable_jit(where == "disable_jit"), pytest.raises(TypeError, match=r"loss must return a scalar loss"):
        (mt.jit(call) if where == "jit" else call)(critic, X)
    assert_array_equal(jax.random.key_data(mt.next_key()), jax.random.key_data(key))
    for name, array in critic.state_dict().items():
        assert_array_equal(array, before[name])


WRONG_ARGUMENTS = {
    "out of range": (2, (X, X), ValueError, "argnums has 2, but 2 positional arguments were passed to the gradient of loss"),
    "far from the end": (-3, (X, X), ValueError, "argnums has -3, but 2 positional"),
    "one argument": ((0, 1), (X,), ValueError, "argnums has 1, but 1 positional argument was passed.*by position"),
    "twice": ((0, -2), (X, X), ValueError, "names an argument of loss twice"),
    "a module": (0, (nn.ReLU(), X), TypeError, "argument 0 of loss.*module or an optimizer .ReLU.*Leave argnums out"),
    "a module in a dict": (1, (X, {"net": nn.ReLU()}), TypeError, "argument 1 of loss.*holds a module"),
    "integers": (0, (np.arange(3), X), TypeError, r"argument 0 of loss.*holds int32.*astype\(jnp.float32\)"),
    "an integer": ((1, 0), (X, 3), TypeError, "argument 1 of loss.*holds int32"),
    "booleans": (0, (X > 0, X), TypeError, "holds bool"),
    "a boolean": (0, (True, X), TypeError, "holds True .bool., which is no floating array"),
    "a string": (1, (X, [X, "mean"]), TypeError, "holds 'mean' .str., which is no floating array"),
    "nothing": (1, (X, None), TypeError, "argument 1 of loss.*holds no array; leave it out"),
}  # fmt: skip


@pytest.mark.parametrize("where", ["eager", "jit", "disable_jit"])
@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
def test_arguments_without_a_gradient_are_named(case: str, where: str) -> None:
    argnums, args, error, message = WRONG_ARGUMENTS[case]

    def loss(x: Any, y: Any) -> Any:
        return jnp.zeros(())

    call = mt.grad(loss, argnums=argnums)
    with jax.disable_jit(where == "disable_jit"), pytest.raises(error, match=message):
        (mt.jit(call) if where == "jit" else call)(*args)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("transform", [mt.grad, mt.value_and_grad])
@pytest.mark.parametrize("argnums", ["x", 1.0, (), (0, "x"), True, X])
def test_argnums_are_positions(transform: Any, argnums: Any) -> None:
    with pytest.raises(TypeError, match=rf"mt.{transform.__name__}: argnums must be the position of an argument"):
        transform(loss_fn, argnums=argnums)
