"""Groups of an optimizer, schedules for any hyperparameter, and weight decay that leaves vectors alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from oracle import torch
from training import everything

import minitorch_jax as mt
from minitorch_jax import optim
from minitorch_jax.state.packed import stored_cells

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)


class Layer(mt.Module):
    def __init__(self, value: float) -> None:
        self.weight = mt.Parameter(np.full((3, 3), value, np.float32))
        self.bias = mt.Parameter(np.full((3,), value, np.float32))

    def forward(self, x: Any) -> Any:
        return jnp.tanh(x @ self.weight + self.bias[None])


class Net(mt.Module):
    def __init__(self) -> None:
        self.body, self.head = Layer(0.5), Layer(-0.3)

    def forward(self, x: Any) -> Any:
        return self.head(self.body(x))


def loss_fn(net: Any, x: Any) -> Any:
    return (net(x) ** 2).sum()


def make(own: Any = None, rest: Any = None, **settings: Any) -> tuple[Any, Any]:
    net = Net()
    settings = {"lr": 0.1, "momentum": 0.9, **settings}
    groups = [{"modules": [net.body], **(own or {})}, {"modules": [net.head], **(rest or {})}]
    return net, optim.SGD(groups, **settings)


def step(net: Any, opt: Any, x: Any) -> Any:
    opt.zero_grad()
    loss = mt.backward(loss_fn, net, x)
    opt.step()
    return loss


def train(net: Any, opt: Any, steps: int = 3) -> None:
    for _ in range(steps):
        step(net, opt, X)


# -- what it computes --------------------------------------------------------------------------------------------------

OWN: list[dict[str, Any]] = [
    {"lr": 0.01},
    {"lr": 0.02, "momentum": 0.5, "weight_decay": 0.1},
    {"nesterov": True, "weight_decay": 0.2},
    {"maximize": True},
    {"momentum": 0},
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("own", OWN, ids=lambda own: "-".join(own))
def test_groups_are_torchs(own: dict[str, Any]) -> None:
    net, opt = make(own, weight_decay=0.05)
    body, head = ([torch.tensor(np.asarray(p)) for p in part.parameters()] for part in (net.body, net.head))
    theirs = torch.optim.SGD([{"params": body, **own}, {"params": head}], lr=0.1, momentum=0.9, weight_decay=0.05)
    for _ in range(4):
        opt.zero_grad()
        mt.backward(loss_fn, net, X)
        for p, g in zip((*body, *head), net.grads(), strict=True):
            p.grad = torch.tensor(np.asarray(g))
        opt.step()
        theirs.step()
    for mine, p in zip(net.parameters(), (*body, *head), strict=True):
        assert_allclose(mine, p.numpy(), rtol=1e-5, atol=1e-7)


def test_groups_are_two_optimizers() -> None:
    net, opt = make({"lr": 0.01, "nesterov": True})
    train(net, opt)
    other = Net()
    opts = (
        optim.SGD([other.body], lr=0.01, momentum=0.9, nesterov=True),
        optim.SGD([other.head], lr=0.1, momentum=0.9),
    )
    for _ in range(3):
        other.zero_grad()
        mt.backward(loss_fn, other, X)
        for each in opts:
            each.step()
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert_allclose(mine, theirs, rtol=1e-6)


def jitted(net: Any, opt: Any) -> tuple[Any, Any]:
    compiled = mt.jit(step)
    for _ in range(3):
        compiled(net, opt, X)
    assert compiled.num_compiles == 1
    return net, opt


def scanned(net: Any, opt: Any) -> tuple[Any, Any]:
    mt.scan(lambda x: step(net, opt, x), np.stack([X] * 3))
    return net, opt


def functional(net: Any, opt: Any) -> tuple[Any, Any]:
    def pure(opt: Any, x: Any) -> Any:
        opt.zero_grad()

        def loss(body: Any, head: Any) -> Any:
            return (head(body(x)) ** 2).sum()

        mt.backward(loss, *opt.modules)
        opt.step()
        return opt

    compiled = jax.jit(pure)
    for _ in range(3):
        opt = compiled(opt, X)
    net.body, net.head = opt.modules
    return net, opt


def packed(net: Any, opt: Any) -> tuple[Any, Any]:
    mt.pack(net.body)
    mt.pack(net.head)
    train(net, opt)
    return net, opt


def packed_together(net: Any, opt: Any) -> tuple[Any, Any]:
    mt.pack(net)
    train(net, opt)
    return net, opt


SIDES: list[Callable[[Any, Any], tuple[Any, Any]]] = [jitted, scanned, functional, packed, packed_together]


@pytest.mark.one_in(9)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("decay_matrices_only", [False, True])
def test_every_side_gives_the_same(side: Any, decay_matrices_only: bool) -> None:
    settings = {"weight_decay": 0.1, "decay_matrices_only": decay_matrices_only}
    own = {"lr": 0.01, "nesterov": True, "weight_decay": lambda t: 0.1 / (1.0 + jnp.float32(t))}
    expected = make(own, **settings)
    train(*expected)
    found, wanted = everything(*side(*make(own, **settings))), everything(*expected)
    mine, theirs = found.pop("1.groups"), wanted.pop("1.groups")
    assert [group.keys() for group in mine] == [group.keys() for group in theirs] == [own.keys(), {}.keys()]
    assert mine[0]["lr"] == theirs[0]["lr"] == 0.01
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if not callable(value):
            assert_allclose(found[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_are_the_groups_own_or_the_optimizers() -> None:
    _, opt = make({"lr": 0.01})
    body, head = opt.groups
    assert (body.lr, head.lr, opt.lr) == (0.01, 0.1, 0.1)
    assert body["momentum"] == head.momentum == 0.9
    opt.lr, opt.momentum = 0.2, 0.5
    assert (body.lr, head.lr, opt.lr) == (0.01, 0.2, 0.2)
    assert body.momentum == head.momentum == 0.5
    head["lr"] = 0.3
    assert (body.lr, head.lr, opt.lr) == (0.01, 0.3, 0.2)  # both have one of their own now
    body.nesterov = True
    assert (body.nesterov, head.nesterov, opt.nesterov) == (True, False, False)
    assert opt.param_groups[1]["modules"] is head.modules
    assert dict(body)["lr"] == 0.01 and list(body) == body.keys()
    assert repr(body) == "Group([Layer], lr=0.01, nesterov=True)"
    assert repr(opt).startswith("SGD([Group([Layer], lr=0.01, nesterov=True), Group([Layer], lr=0.3)], lr=0.2, ")


def test_assigning_what_every_group_has_of_its_own_is_an_error() -> None:
    _, opt = make({"lr": 0.01}, {"lr": 0.02})
    with pytest.raises(AttributeError, match=r"every group has a `lr` of its own: assign `opt.groups\[i\].lr`"):
        opt.lr = 0.5


def test_changing_numbers_compiles_nothing() -> None:
    net, opt = make({"lr": 0.01})
    compiled = mt.jit(step)
    for i in range(5):
        compiled(net, opt, X)
        opt.groups[0].lr = 0.01 * i
        opt.lr = 0.1 * i
        opt.groups[0].weight_decay = 0.001 * i
    assert compiled.num_compiles == 2  # the second as the group has got a weight decay of its own


def test_numbers_assigned_to_groups_count() -> None:
    found = []
    for assigned in (True, False):
        net, opt = make({"lr": 1.0 if assigned else 0.01}, momentum=0.5 if assigned else 0.9)
        if assigned:
            opt.groups[0].lr = 0.01
            opt.momentum = 0.9
        train(net, opt)
        found.append(everything(net))
    for name, value in found[0].items():
        assert_array_equal(found[1][name], value)


@pytest.mark.parametrize("jit", [False, True])
def test_numbers_assigned_within_compiled_code(jit: bool) -> None:
    def run(net: Any, opt: Any, lr: Any) -> None:
        opt.groups[0].lr = lr
        opt.lr = lr * 2
        step(net, opt, X)

    net, opt = make({"lr": 1.0})
    call = mt.jit(run) if jit else run
    for lr in (0.25, 0.125):
        call(net, opt, jnp.float32(lr))
    assert [group.lr for group in opt.groups] == [0.125, 0.25] and opt.lr == 0.25


def test_groups_of_an_ensemble_and_of_copies() -> None:
    net, opt = make({"lr": 0.01})
    train(net, opt)
    for other in (copy.deepcopy((net, opt)), pickle.loads(pickle.dumps((net, opt))), (net, jax.jit(lambda o: o)(opt))):
        assert [group.lr for group in other[1].groups] == [0.01, 0.1]
        other[1].groups[1].lr = 0.5
        other[1].momentum = 0.75
        assert [group.momentum for group in other[1].groups] == [0.75, 0.75]
        assert [group.lr for group in other[1].groups] == [0.01, 0.5]
    assert [group.lr for group in opt.groups] == [0.01, 0.1]


def test_a_state_dict_has_the_groups() -> None:
    net, opt = make({"lr": 0.01, "nesterov": True})
    train(net, opt)
    state = opt.state_dict()
    assert state["groups"] == [{"lr": 0.01, "nesterov": True}, {}]
    _, other = make({"lr": 1.0})
    other.load_state_dict(state)
    assert other.groups[0].lr == 0.01 and other.groups[0].nesterov and not other.groups[1].nesterov
    with pytest.raises(ValueError, match="2 groups were given for 0"):
        optim.SGD([net], momentum=0.9).load_state_dict(state)


# -- modules -----------------------------------------------------------------------------------------------------------


def test_modules_of_groups() -> None:
    net, opt = make()
    assert opt.modules == (net.body, net.head)
    with pytest.raises(AttributeError):
        opt.modules.append(Layer(1.0))
    with pytest.raises(AttributeError, match=r"has groups: assign `opt.groups\[i\].modules`"):
        opt.modules = [net]
    train(net, opt)
    buffer = opt.state_dict()["state"]["1.weight"]["momentum_buffer"]
    new = Layer(1.0)
    opt.groups[0].modules.append(new)
    opt.groups[1].lr = 0.0
    before = np.array(net.head.weight)
    new.accumulate([jnp.ones((3, 3)), jnp.ones(3)])
    opt.step()
    assert_array_equal(new.weight, np.full((3, 3), 0.9, np.float32))
    assert_array_equal(net.head.weight, before)
    assert not np.array_equal(opt.state_dict()["state"]["2.weight"]["momentum_buffer"], buffer)
    assert opt.state_dict()["state"]["2.weight"]["step"] == 4
    opt.groups[0].modules = [new]
    assert opt.modules == (new, net.head)


def test_moving_a_module_to_another_group() -> None:
    net, opt = make({"lr": 0.5}, {"lr": 0.0})
    opt.groups[0].modules.remove(net.body)
    opt.groups[1].modules.insert(0, net.body)
    before = np.array(net.body.weight)
    train(net, opt, 1)
    assert_array_equal(net.body.weight, before)


def test_adding_a_group() -> None:
    net = Net()
    opt = optim.SGD([net.body], lr=0.25, momentum=0.5)
    net.body.accumulate([jnp.ones((3, 3)), jnp.ones(3)])
    opt.step()
    opt.add_group({"modules": [net.head], "lr": 1.0})
    assert [group.lr for group in opt.groups] == [0.25, 1.0]
    opt.lr = 0.5
    assert [group.lr for group in opt.groups] == [0.5, 1.0]
    net.head.accumulate([jnp.ones((3, 3)), jnp.ones(3)])
    opt.step()
    assert_allclose(net.head.bias, np.full(3, -1.3), rtol=1e-6)
    assert_allclose(net.body.bias, np.full(3, 0.5 - 0.25 - 0.5 * 1.5), rtol=1e-6)
    with pytest.raises(ValueError, match="reached twice"):
        opt.add_group({"modules": [net.body]})
    assert len(opt.groups) == 2


@pytest.mark.parametrize(
    ("modules", "error", "match"),
    [
        (lambda net: [{"params": [net.body]}], ValueError, "a group needs 'modules'.*'params'"),
        (lambda net: [{"modules": [net.body], "momentun": 1}], ValueError, "'momentun'; did you mean 'momentum'"),
        (lambda net: [{"modules": net.body}], TypeError, r"write `\[model\]`"),
        (lambda net: [{"modules": [net.body], "lr": -1}], ValueError, "lr must be a finite number.*got -1"),
        (lambda net: [{"modules": [net.body], "nesterov": 3}], ValueError, "nesterov must be a bool"),
        (lambda net: [{"modules": [net.body], "nesterov": True}], ValueError, "nesterov needs a momentum"),
        (lambda net: [{"modules": [net.body]}, {"modules": [net]}], ValueError, "reached twice"),
        (lambda net: [{"modules": []}], ValueError, "modules is empty"),
    ],
)
def test_bad_groups(modules: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        optim.SGD(modules(Net()))


@pytest.mark.parametrize(("name", "value"), [("lr", -1), ("nesterov", True), ("momentum", np.nan), ("lr", "much")])
def test_a_bad_assignment_to_a_group_changes_nothing(name: str, value: Any) -> None:
    _, opt = make(momentum=0.0)
    before = repr(opt)
    with pytest.raises(ValueError, match=name):
        setattr(opt.groups[0], name, value)
    assert repr(opt) == before
    with pytest.raises(AttributeError, match="did you mean `momentum`"):
        opt.groups[0].momentun = 1
    with pytest.raises(KeyError):
        opt.groups[0]["momentun"]


# -- weight decay ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [False, True])
def test_weight_decay_of_matrices_only(pack: bool) -> None:
    layer = Layer(1.0)
    opt = optim.SGD([layer], lr=0.5, weight_decay=0.5, decay_matrices_only=True)
    if pack:
        mt.pack(layer)
    layer.zero_grad()
    layer.accumulate([jnp.zeros((3, 3)), jnp.zeros(3)])
    opt.step()
    assert_array_equal(layer.weight, np.full((3, 3), 0.75))
    assert_array_equal(layer.bias, np.ones(3))
    opt.decay_matrices_only = False
    opt.step()
    assert_array_equal(layer.bias, np.full(3, 0.75))
    assert not pack or len(stored_cells(opt._plan.outside(opt).grads)) == 1


# -- schedules of any hyperparameter -----------------------------------------------------------------------------------


def test_any_hyperparameter_may_follow_a_schedule() -> None:
    layer = Layer(1.0)
    opt = optim.SGD([layer], lr=1.0, weight_decay=lambda t: jnp.where(t < 2, 0.0, 0.5))
    layer.accumulate([jnp.zeros((3, 3)), jnp.zeros(3)])
    found = []
    for _ in range(3):
        found.append(opt.weight_decay)
        opt.step()
    assert found == [0.0, 0.0, 0.5]
    assert_array_equal(layer.bias, np.full(3, 0.5))
    opt.weight_decay = 0.0
    opt.step()
    assert_array_equal(layer.bias, np.full(3, 0.5))


MOVING = {
    "momentum": (lambda o, m: o.SGD(m, lr=0.1, momentum=0.9)),
    "decay": (lambda o, m: o.SGD(m, lr=0.1, weight_decay=0.1)),
    "adam": (lambda o, m: o.Adam(m, lr=0.1)),
    "adamw": (lambda o, m: o.AdamW(m, lr=0.1)),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", MOVING)
def test_an_unread_parameter_is_stepped_with_zeros_and_a_frozen_one_is_not(name: str) -> None:
    """What the pages say: torch does the same where its gradient is zeros, not None."""
    torch = pytest.importorskip("torch")
    body, head = Layer(0.5), Layer(-0.3)
    opt = MOVING[name](optim, [body, head])
    theirs = torch.nn.Parameter(torch.tensor(np.asarray(head.weight)))
    peer = MOVING[name](torch.optim, [theirs])

    def step(*read: Layer) -> None:
        opt.zero_grad()
        mt.backward(lambda *layers: sum(layer(X).sum() for layer in layers), *read)
        theirs.grad = torch.tensor(np.asarray(head.grads()[0])) if head.grads() else None
        opt.step()
        peer.step()

    step(body, head)
    before = np.asarray(head.weight)
    step(body)  # zeros, for the head
    assert np.abs(np.asarray(head.weight) - before).max() > 1e-4
    assert_allclose(head.weight, theirs.detach(), rtol=1e-5)
    head.freeze()
    before, moved = np.asarray(head.weight), np.asarray(body.weight)
    step(body)
    assert_array_equal(head.weight, before)
    assert np.abs(np.asarray(body.weight) - moved).max() > 1e-4
    head.unfreeze()
    step(body, head)  # with the state that it had
    assert_allclose(head.weight, theirs.detach(), rtol=1e-5)
