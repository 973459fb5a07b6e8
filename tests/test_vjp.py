"""`mt.vjp`: a function runs once, and gradients of its output are pulled back to its parameters later."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from oracle import torch

import minitorch_jax as mt
from minitorch_jax import nn, optim

STEPS = 20
NUMBERS = np.random.default_rng(0)
REAL, Z = (NUMBERS.standard_normal((STEPS, 6, n)).astype(np.float32) for n in (3, 4))
X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
softplus = nn.functional.softplus


# -- a GAN --------------------------------------------------------------------------------------------------------------


def networks() -> tuple[Any, Any]:
    mt.seed(0)
    G = nn.Sequential(
        nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.25), nn.Linear(8, 3)
    )  # fmt: skip
    return G, nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))


class Gan:
    """Our GAN: `shared` runs the generator once a step, `twice` runs it for each loss."""

    def __init__(self) -> None:
        self.G, self.D = networks()
        self.opt_G, self.opt_D = optim.Adam([self.G], lr=1e-2), optim.Adam([self.D], lr=1e-2)
        mt.seed(5)

    def loss_D(self, real: Any, fake: Any) -> Any:
        return softplus(-self.D(real)).mean() + softplus(self.D(fake)).mean()

    def loss_G(self, fake: Any) -> Any:
        return softplus(-self.D(fake)).mean()

    def shared(self, real: Any, z: Any) -> Any:
        fake, pull = mt.vjp(self.G, z)
        self.opt_D.zero_grad()
        loss_D = mt.backward(self.loss_D, real, fake)
        self.opt_D.step()
        self.opt_G.zero_grad()
        loss_G, gradient = mt.value_and_grad(self.loss_G, argnums=0)(fake)
        pull(gradient)
        self.opt_G.step()
        return loss_D, loss_G

    def twice(self, real: Any, z: Any) -> Any:
        key = mt.next_key()
        self.opt_D.zero_grad()
        with mt.rng(key):
            fake = self.G(z)
        loss_D = mt.backward(self.loss_D, real, fake)
        self.opt_D.step()
        self.opt_G.zero_grad()
        with mt.rng(key):
            loss_G = mt.backward(lambda z: self.loss_G(self.G(z)), z)
        self.opt_G.step()
        return loss_D, loss_G


def losses_of(step: Any, how: str) -> Any:
    if how == "scan":
        return np.stack(mt.scan(step, REAL, Z), 1)
    step = mt.jit(step) if how == "jit" else step
    with jax.disable_jit(how == "plain Python"):
        losses = np.array([step(*batch) for batch in zip(REAL, Z, strict=True)])
    if how == "jit":
        assert step.num_compiles == 1
    return losses


def by_torch(masks: Any) -> tuple[Any, dict[str, Any]]:
    """The losses of the GAN in torch, with our initial weights and dropout's masks, and the generator's last state."""
    states = [{name: torch.tensor(np.array(array)) for name, array in net.state_dict().items()} for net in networks()]
    relu, plus = torch.nn.ReLU(), torch.nn.functional.softplus
    first, norm, last = torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3)
    G = torch.nn.Sequential(first, norm, relu, torch.nn.Identity(), last)
    D = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.LeakyReLU(0.2), torch.nn.Linear(8, 1))
    for net, state in zip((G, D), states, strict=True):
        net.load_state_dict(state)
    opt_G, opt_D = torch.optim.Adam(G.parameters(), lr=1e-2), torch.optim.Adam(D.parameters(), lr=1e-2)
    losses = []
    for real, z, mask in zip(REAL, Z, masks, strict=True):
        fake = last(relu(norm(first(torch.tensor(z)))) * torch.tensor(mask))
        opt_D.zero_grad()
        loss_D = plus(-D(torch.tensor(real))).mean() + plus(D(fake.detach())).mean()
        loss_D.backward()
        opt_D.step()
        opt_G.zero_grad()
        loss_G = plus(-D(fake)).mean()
        loss_G.backward()
        opt_G.step()
        losses.append((loss_D.item(), loss_G.item()))
    return np.array(losses), {name: tensor.numpy() for name, tensor in G.state_dict().items()}


@pytest.mark.slow
@pytest.mark.one_in(9)
@pytest.mark.parametrize("how", ["eager", "jit", "scan", "plain Python"])
def test_a_gan_trains_as_in_torch(how: str) -> None:
    mt.seed(5)
    masks = [np.array(nn.Dropout(0.25)(jnp.ones((6, 8)))) for _ in range(STEPS)]
    key = jax.random.key_data(mt.next_key())
    gan = Gan()
    found = losses_of(gan.shared, how)
    assert_array_equal(jax.random.key_data(mt.next_key()), key)  # the stream was drawn from once a step
    expected, state = by_torch(masks)
    assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    for name, array in gan.G.state_dict().items():
        assert_allclose(array, state[name], rtol=1e-5, atol=1e-5, err_msg=name)
    assert int(gan.G[1].num_batches_tracked) == STEPS


@pytest.mark.slow
def test_the_form_that_runs_the_generator_twice_trains_alike() -> None:
    one, two = Gan(), Gan()
    mt.seed(5)
    keys = [mt.next_key() for _ in range(STEPS)]
    losses = []
    for key, *batch in zip(keys, REAL, Z, strict=True):
        with mt.rng(key):
            inner = mt.next_key()
        with mt.rng(inner):
            losses.append(one.shared(*batch))
    mt.seed(5)
    for key, *batch in zip(keys, REAL, Z, strict=True):
        with mt.rng(key):
            expected = two.twice(*batch)
        assert_allclose(losses.pop(0), expected, rtol=1e-5, atol=1e-5)
    assert (int(one.G[1].num_batches_tracked), int(two.G[1].num_batches_tracked)) == (STEPS, 2 * STEPS)
    for name, parameter in one.G.named_parameters():
        assert_allclose(parameter, dict(two.G.named_parameters())[name], rtol=1e-5, atol=1e-5, err_msg=name)


# -- one pull -----------------------------------------------------------------------------------------------------------


class Net(mt.Module):
    """A network whose statistics and random stream change when it is called."""

    def __init__(self) -> None:
        self.first = nn.Linear(3, 4, key=jax.random.key(0))
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.spare = nn.Linear(2, 2, key=jax.random.key(1))  # not used

    def forward(self, x: Any, scale: Any = 1.0) -> Any:
        return jnp.tanh(self.drop(self.norm(self.first(x))) * scale)

    def parts(self, x: Any) -> Any:
        out = self(x)
        return {"out": out, "sum": out.sum()}


GRADIENT = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)


def expected_after(call: Any) -> tuple[Any, Any]:
    """The network and the next key after `backward` of the output times the gradient."""
    net = Net()
    mt.seed(5)
    mt.backward(lambda net: (call(net) * GRADIENT).sum(), net)
    return net, mt.next_key()


def check(net: Any, expected: Any, key: Any) -> None:
    assert_array_equal(jax.random.key_data(mt.next_key()), jax.random.key_data(key))
    for name, array in expected.state_dict().items():
        assert_allclose(net.state_dict()[name], array, rtol=1e-6, err_msg=name)
    for mine, theirs in zip(net.grads(), expected.grads(), strict=True):
        assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def given(net: Any) -> Any:
    return mt.vjp(Net.__call__, net, X)


def by_closure(net: Any) -> Any:
    return mt.vjp(lambda x: net(x), X)


def of_a_partial(net: Any) -> Any:
    return mt.vjp(partial(net, scale=1.0), X)


def in_a_container(net: Any) -> Any:
    return mt.vjp(lambda parts, *, x: parts["net"][0](x), {"net": [net], "mode": "unused"}, x=X)


def through_an_optimizer(net: Any) -> Any:
    opt = mt.Optimizer([net])
    return mt.vjp(lambda x: opt.modules[0](x), X)


def through_a_hidden_list(net: Any) -> Any:
    hidden = [[[[[[net]]]]]]
    return mt.vjp(lambda x: next(iter(hidden[0][0][0][0]))[0](x), X)


def made_in_a_jit(net: Any) -> Any:
    return mt.jit(lambda x: mt.vjp(net, x))(X)


def of_a_jit(net: Any) -> Any:
    return mt.vjp(mt.jit(net), X)


WAYS = (
    lambda net: mt.vjp(net, X), given, by_closure, of_a_partial, in_a_container, through_an_optimizer,
    through_a_hidden_list, made_in_a_jit, of_a_jit,
)  # fmt: skip


@pytest.mark.one_in(9)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_pull_adds_the_gradients_of_one_run(way: Any) -> None:
    net = Net()
    expected, key = expected_after(lambda net: net(X))
    mt.seed(5)
    out, pull = way(net)
    assert all(not grad.any() for grad in net.grads())
    assert pull(GRADIENT) is None
    assert out.shape == (4, 4)
    check(net, expected, key)


PULLS = {
    "in a jit, as an argument": lambda pull: mt.jit(lambda pull, g: pull(g))(pull, GRADIENT),
    "in a jit, by closure": lambda pull: mt.jit(lambda g: pull(g))(GRADIENT),
    "in a scan": lambda pull: mt.scan(lambda g: pull(g), GRADIENT[None]),
    "as plain Python": lambda pull: plainly(pull, GRADIENT),
}


def plainly(pull: Any, gradient: Any) -> None:
    with jax.disable_jit():
        pull(gradient)


@pytest.mark.one_in(9)
@pytest.mark.filterwarnings("ignore:.*cannot be followed by name")  # by closure: an argument is better
@pytest.mark.parametrize("way", PULLS)
def test_a_pull_within_another_program(way: str) -> None:
    net = Net()
    expected, key = expected_after(lambda net: net(X))
    mt.seed(5)
    _, pull = mt.vjp(net, X)
    PULLS[way](pull)
    check(net, expected, key)


def test_pulling_again_accumulates_and_later_values_of_parameters_do_not_count() -> None:
    net, (expected, _) = Net(), expected_after(lambda net: net(X))
    net.spare.freeze(), expected.spare.freeze()
    mt.seed(5)
    out, pull = mt.vjp(net, X)
    pull(GRADIENT)
    before = np.array(out)
    mt.Optimizer([net], lr=1.0).step()
    net.first.bias = 7 + net.first.bias
    net.eval()
    pull(GRADIENT)
    pull(0 * GRADIENT)
    for mine, theirs in zip(net.grads(), expected.grads(), strict=True):
        assert_allclose(mine, 2 * theirs, rtol=1e-5, atol=1e-6)
    assert_array_equal(out, before)


@pytest.mark.one_in(9)
@pytest.mark.parametrize("plain", [False, True])
def test_gradients_by_arguments_and_outputs_of_several_arrays(plain: bool) -> None:
    net, twin = Net(), Net()
    gradient = {"out": jnp.asarray(GRADIENT), "sum": 3.0}

    def loss(net: Any, x: Any) -> Any:
        parts = net.parts(x)
        return (parts["out"] * gradient["out"]).sum() + parts["sum"] * gradient["sum"]

    mt.seed(5)
    mt.backward(loss, twin, X)
    mt.seed(5)
    by_x = mt.grad(loss, argnums=1)(Net(), X)
    mt.seed(5)
    with jax.disable_jit(plain):
        out, pull = mt.vjp(net.parts, X, argnums=0)
        found = pull(gradient)
        _, both = mt.vjp(lambda tree, y: tree["x"] * y, {"x": X}, X, argnums=(1, 0))
        by_y, by_tree = both(X)
    assert out["out"].shape == (4, 4)
    assert_allclose(found, by_x, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(net.grads(), twin.grads(), strict=True):
        assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    assert_allclose(by_y, X * X)
    assert_allclose(by_tree["x"], X * X)


def test_frozen_parameters_get_none_and_two_networks_are_chained() -> None:
    encoder, decoder = nn.Linear(3, 2, key=jax.random.key(0)), nn.Linear(2, 3, key=jax.random.key(1))
    twins = nn.Linear(3, 2, key=jax.random.key(0)), nn.Linear(2, 3, key=jax.random.key(1)).freeze()
    decoder.freeze()
    code, pull_code = mt.vjp(encoder, X)
    out, pull = mt.vjp(decoder, code, argnums=0)
    pull_code(pull(jnp.ones_like(out)))
    mt.backward(lambda x: twins[1](twins[0](x)).sum(), X)
    for mine, theirs in zip(encoder.grads(), twins[0].grads(), strict=True):
        assert_allclose(mine, theirs, rtol=1e-5)
    decoder.unfreeze()
    assert not any(grad.any() for grad in decoder.grads())
    _, pull = mt.vjp(encoder, X)
    encoder.zero_grad()
    encoder.freeze()
    pull(np.ones((4, 2), np.float32))
    encoder.unfreeze()
    assert not any(grad.any() for grad in encoder.grads())


def test_tied_and_packed_parameters() -> None:
    class Tied(mt.Module):
        def __init__(self) -> None:
            self.a, self.b = nn.Linear(3, 3, key=jax.random.key(0)), nn.Linear(3, 3, key=jax.random.key(1))
            self.b.tie("weight", self.a, "weight")

        def forward(self, x: Any) -> Any:
            return self.b(jnp.tanh(self.a(x)))

    tied, packed = Tied(), Tied()
    mt.pack(packed)
    for net in (tied, packed):
        _, pull = mt.vjp(net, X)
        pull(X)
    other = Tied()
    mt.backward(lambda net, x: (net(x) * X).sum(), other, X)
    for grads in zip(tied.grads(), packed.grads(), other.grads(), strict=True):
        assert_allclose(grads[0], grads[2], rtol=1e-5, atol=1e-6)
        assert_allclose(grads[1], grads[2], rtol=1e-5, atol=1e-6)


def test_a_loop_compiles_once_and_old_pullbacks_are_freed() -> None:
    runs = []

    def fn(net: Any, x: Any) -> Any:
        runs.append(1)
        return net(x)

    net, gone = Net(), []
    for i in range(4):
        out, pull = mt.vjp(fn, net, X + i)
        pull(out)
        if i == 1:
            count, compiled = len(runs), compiles()
        gone.append(weakref.ref(pull))
    assert len(runs) == count and compiles() == compiled
    gc.collect()
    assert [ref() is None for ref in gone] == [True, True, True, False]
    assert repr(pull).startswith("<pullback of fn, ")


def compiles() -> int:
    from minitorch_jax.vjp import _pulled

    return len(_pulled.programs._entries)


def test_autocast_and_the_dtype_of_the_gradient() -> None:
    net = nn.Linear(3, 2, key=jax.random.key(0))
    with mt.autocast(jnp.bfloat16):
        out, pull = mt.vjp(net, X)
    assert out.dtype == jnp.bfloat16
    with pytest.raises(
        ValueError, match=r"takes a gradient of.*bfloat16\[4, 2\]; got float32\[4, 2\].*astype\(bfloat16"
    ):
        pull(jnp.ones((4, 2)))
    pull(jnp.ones((4, 2), jnp.bfloat16))
    assert [grad.dtype for grad in net.grads()] == [jnp.float32] * 2
    assert_allclose(net.grads()[1], [4, 4])


def test_the_functional_form() -> None:
    """In plain JAX, on copies that are returned, as everything else."""

    @jax.jit
    def step(opt: Any, x: Any) -> Any:
        (net,) = opt.modules
        out, pull = mt.vjp(net, x)
        opt.zero_grad()
        pull(out)
        opt.step()
        return opt

    opt, other = (mt.Optimizer([nn.Linear(3, 2, key=jax.random.key(0))], lr=0.1) for _ in range(2))
    opt = step(opt, X)
    other.zero_grad()
    mt.backward(lambda net, x: (net(x) ** 2).sum() / 2, other.modules[0], X)
    other.step()
    assert_allclose(opt.modules[0].weight, other.modules[0].weight, rtol=1e-6)


# -- errors -------------------------------------------------------------------------------------------------------------

OUTPUTS = {
    "integers": (lambda x: jnp.arange(3), r"fn must return floating arrays; it returned int32\[3\]"),
    "a string": (lambda x: (x, "text"), r"it returned 'text' \(str\)"),
    "nothing": (lambda x: None, "must return floating arrays; it returned None"),
    "a module": (lambda x: nn.ReLU(), "it returned .*ReLU"),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("where", ["eager", "jit", "plain"])
@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs_without_a_gradient_change_nothing(case: str, where: str) -> None:
    make, message = OUTPUTS[case]
    net = Net()
    before = net.state_dict()

    def fn(x: Any) -> Any:
        net(x)
        return make(x)

    call = lambda x: mt.vjp(fn, x)
    with jax.disable_jit(where == "plain"), pytest.raises(TypeError, match=message):
        (mt.jit(call) if where == "jit" else call)(X)
    for name, array in before.items():
        assert_array_equal(net.state_dict()[name], array)


GRADIENTS = {
    "shape": (
        np.ones((4, 3), np.float32),
        ValueError,
        r"of Linear takes.*float32\[4, 2\]; got float32\[4, 3\]",
    ),
    "dtype": (np.ones((4, 2), np.int32), ValueError, r"got int32\[4, 2\]. Convert it with `.astype\(float32\)`"),
    "form": (
        (np.ones((4, 2), np.float32),),
        TypeError,
        r"in the output's form, float32\[4, 2\]; got \(float32\[4, 2\],\)",
    ),
    "number": (1.0, ValueError, r"got 1.0 \(float\)"),
    "None": (None, TypeError, "got None"),
}


@pytest.mark.parametrize("where", ["eager", "jit", "plain"])
@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_of_another_form_are_named(case: str, where: str) -> None:
    wrong, error, message = GRADIENTS[case]
    net = nn.Linear(3, 2)

    def call(x: Any) -> Any:
        _, pull = mt.vjp(net, x)
        pull(wrong)

    with jax.disable_jit(where == "plain"), pytest.raises(error, match=message):
        (mt.jit(call) if where == "jit" else call)(X)
    assert not any(grad.any() for grad in net.grads())


def test_a_parameter_that_has_gone_is_named() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    _, pull = mt.vjp(net, X)
    net[1] = nn.ReLU()
    with pytest.raises(ValueError, match=r"Sequential.1.weight is no longer the float32\[2, 2\].*call `mt.vjp` again"):
        pull(np.ones((4, 2), np.float32))


def test_wrong_calls() -> None:
    with pytest.raises(TypeError, match="mt.vjp takes a function"):
        mt.vjp(X, X)
    with pytest.raises(ValueError, match="uses no trainable parameter"):
        mt.vjp(lambda x: x, X)
    with pytest.raises(TypeError, match="mt.vjp: argnums must be the position"):
        mt.vjp(lambda x: x, X, argnums="x")
    with pytest.raises(ValueError, match="argnums has 1, but 1 positional"):
        mt.vjp(nn.Linear(3, 2), X, argnums=1)
    with pytest.raises(TypeError, match="argument 0 of fn.*holds int32"):
        mt.vjp(fn, np.arange(3), argnums=0)


def fn(x: Any) -> Any:
    return x * 1.0


@pytest.mark.slow
def test_an_anomaly_is_named() -> None:
    class Root(mt.Module):
        def __init__(self) -> None:
            self.weight = mt.Parameter(np.zeros((1, 3), np.float32))

        def forward(self, x: Any) -> Any:
            return jnp.sqrt(self.weight) + x

    with mt.detect_anomaly():
        out, pull = mt.vjp(Root(), X)
        with pytest.raises(FloatingPointError, match="The gradient of Root.weight is not finite"):
            pull(jnp.ones_like(out))
