"""`optim.SGD`: trajectories of random, changing gradients against a float64 reference, torch and optax.

What is compared is the displacement from a start that is small enough for float32 to resolve it: a rule that is wrong
for tiny gradients, or only in its first steps, is wrong here by far more than the tolerance.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from oracle import says, signature, torch
from training import Arrays

import minitorch_jax as mt
from minitorch_jax import optim

STEPS = 10
LR = 0.1
SHAPES = ((3,), (2, 2), ())
SCALES = (1.0, 1e-4, 1e-8)

EVERY = [
    dict(zip(("momentum", "dampening", "weight_decay", "nesterov", "maximize"), values, strict=True))
    for values in itertools.product((0, 0.9), (0, 0.5), (0, 0.1), (False, True), (False, True))
]


def is_legal(options: dict[str, Any]) -> bool:
    return not options["nesterov"] or (options["momentum"] > 0 and options["dampening"] == 0)


LEGAL = [options for options in EVERY if is_legal(options)]
ILLEGAL = [options for options in EVERY if not is_legal(options)]


def name_of(options: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in options.items() if value) or "plain"


def problem(scale: float) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """A start, and the gradients of each step, whose size changes from step to step."""
    rng = np.random.default_rng(7)
    start = [np.asarray(0.1 * LR * scale * rng.normal(size=shape), np.float32) for shape in SHAPES]
    sizes = scale * rng.uniform(0.3, 3.0, STEPS)
    gradients = [[np.asarray(size * rng.normal(size=shape), np.float32) for shape in SHAPES] for size in sizes]
    return start, gradients


def assert_same(mine: list[Any], theirs: list[Any]) -> None:
    """Equal at rtol 1e-4, and where terms cancel, at 1e-6 of the largest element."""
    for a, b in zip(mine, theirs, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())


def ours(scale: float, options: dict[str, Any], lr: Any = LR) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]]]:
    """Displacements and momentum buffers (if there are any) after each step."""
    start, gradients = problem(scale)
    model = Arrays(start)
    opt = optim.SGD([model], lr, **options)
    moved, buffers = [], []
    for grads in gradients:
        opt.zero_grad()
        model.accumulate(grads)
        opt.step()
        moved.append([np.asarray(p, np.float64) - p0 for p, p0 in zip(model.parameters(), start, strict=True)])
        state = opt.state_dict()["state"].values()
        buffers.append([np.asarray(s["momentum_buffer"]) for s in state if "momentum_buffer" in s])
    return moved, buffers


def reference(scale: float, options: dict[str, Any]) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]]]:
    """The same in float64, from the formula in torch's documentation, one array at a time."""
    start, gradients = problem(scale)
    mu, tau, decay = options["momentum"], options["dampening"], options["weight_decay"]
    moved: list[list[np.ndarray]] = [[] for _ in gradients]
    buffers: list[list[np.ndarray]] = [[] for _ in gradients]
    for i, p0 in enumerate(start):
        theta, b = p0.astype(np.float64), None
        for t, grads in enumerate(gradients):
            g = -grads[i].astype(np.float64) if options["maximize"] else grads[i].astype(np.float64)
            if decay != 0:
                g = g + decay * theta
            if mu != 0:
                b = mu * b + (1 - tau) * g if b is not None else g
                g = g + mu * b if options["nesterov"] else b
                buffers[t].append(b)
            theta = theta - LR * g
            moved[t].append(theta - p0)
    return moved, buffers


@pytest.mark.one_in(9)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("options", LEGAL, ids=name_of)
def test_trajectory_against_the_reference(options: dict[str, Any], scale: float) -> None:
    moved, buffers = ours(scale, options)
    expected_moved, expected_buffers = reference(scale, options)
    for step in range(STEPS):
        assert_same(moved[step], expected_moved[step])
        assert_same(buffers[step], expected_buffers[step])
    assert len(buffers[0]) == (len(SHAPES) if options["momentum"] else 0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("options", LEGAL, ids=name_of)
def test_trajectory_against_torch(options: dict[str, Any], scale: float) -> None:
    start, gradients = problem(scale)
    params = [torch.nn.Parameter(torch.tensor(p)) for p in start]
    opt = torch.optim.SGD(params, lr=LR, **options)
    moved, buffers = ours(scale, options)
    for step, grads in enumerate(gradients):
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.tensor(g)
        opt.step()
        now = [p.detach().numpy().astype(np.float64) - p0 for p, p0 in zip(params, start, strict=True)]
        assert_same(moved[step], now)
        held = [opt.state[p]["momentum_buffer"].numpy() for p in params if options["momentum"]]
        assert_same(buffers[step], held)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    "options", [options for options in LEGAL if not options["dampening"] and not options["maximize"]], ids=name_of
)
def test_trajectory_against_optax(options: dict[str, Any], scale: float) -> None:
    optax = pytest.importorskip("optax")
    start, gradients = problem(scale)
    rule = optax.chain(
        optax.add_decayed_weights(options["weight_decay"]),
        optax.sgd(LR, momentum=options["momentum"] or None, nesterov=options["nesterov"]),
    )
    params = [jnp.asarray(p) for p in start]
    state = rule.init(params)
    moved, buffers = ours(scale, options)
    for step, grads in enumerate(gradients):
        updates, state = rule.update([jnp.asarray(g) for g in grads], state, params)
        params = optax.apply_updates(params, updates)
        assert_same(moved[step], [np.asarray(p, np.float64) - p0 for p, p0 in zip(params, start, strict=True)])
        if options["momentum"]:
            assert_same(buffers[step], optax.tree.get(state, "trace"))


def test_the_tests_can_tell_wrong_rules_apart() -> None:
    """No two of the legal combinations that differ in meaning have the same trajectory."""
    distinct = [o for o in LEGAL if o["momentum"] or not o["dampening"]]
    for scale in SCALES:
        ends = [np.concatenate([a.ravel() for a in reference(scale, options)[0][-1]]) for options in distinct]
        for a, b in itertools.combinations(ends, 2):
            assert np.abs(a - b).max() > 1e-3 * np.abs(b).max()


# ---------------------------------------------------------------------------------------------------------------------
# The constructor


@pytest.mark.parametrize("options", ILLEGAL, ids=name_of)
def test_what_torch_rejects_is_rejected(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="nesterov needs a momentum > 0 and zero dampening"):
        optim.SGD([Arrays([np.ones(1, np.float32)])], LR, **options)


@pytest.mark.parametrize("options", EVERY, ids=name_of)
def test_torch_rejects_the_same(options: dict[str, Any]) -> None:
    params = [torch.nn.Parameter(torch.ones(1))]
    if is_legal(options):
        torch.optim.SGD(params, **options)
        optim.SGD([Arrays([np.ones(1, np.float32)])], **options)
    else:
        with pytest.raises(ValueError, match="Nesterov momentum requires a momentum and zero dampening"):
            torch.optim.SGD(params, **options)


@pytest.mark.parametrize(
    ("name", "value"), [("lr", -0.1), ("momentum", -0.1), ("weight_decay", -0.1)], ids=lambda value: str(value)
)
def test_out_of_range_as_in_torch(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"SGD: {name} must be .* >= 0; got -0.1"):
        optim.SGD([Arrays([np.ones(1, np.float32)])], **{name: value})
    with pytest.raises(ValueError, match="Invalid"):
        torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], **{name: value})


@pytest.mark.parametrize("dampening", [-0.5, 1.5])
def test_dampening_is_free_as_in_torch(dampening: float) -> None:
    options = {**LEGAL[0], "momentum": 0.9, "dampening": dampening}
    assert_same(ours(1.0, options)[0][-1], reference(1.0, options)[0][-1])


def test_the_signature_is_torchs() -> None:
    mine = list(inspect.signature(optim.SGD).parameters.values())
    theirs = list(signature(torch.optim.SGD).parameters.values())
    left_out = {"foreach", "differentiable", "fused"}  # how torch runs it, not what it does
    theirs = [p for p in theirs if p.name not in left_out]
    assert mine[0].name == "modules" and theirs[0].name == "params"
    assert [p.name for p in mine[1:]] == [p.name for p in theirs[1:]] + ["options"]
    for a, b in zip(mine[1:-1], theirs[1:], strict=True):
        assert a.kind == b.kind, a.name
        assert a.default == (0.01 if a.name == "lr" else b.default), a.name
    assert mine[-1].kind is inspect.Parameter.VAR_KEYWORD


def test_the_signature() -> None:
    params = inspect.signature(optim.SGD).parameters.values()
    assert [(p.name, p.default) for p in params if p.kind is p.POSITIONAL_OR_KEYWORD] == [
        ("modules", inspect.Parameter.empty),
        ("lr", 0.01),
        ("momentum", 0),
        ("dampening", 0),
        ("weight_decay", 0),
        ("nesterov", False),
    ]
    assert [(p.name, p.default) for p in params if p.kind is p.KEYWORD_ONLY] == [("maximize", False)]


@pytest.mark.parametrize("cls", [mt.Optimizer, optim.SGD])
def test_an_unknown_argument(cls: Any) -> None:
    with pytest.raises(
        TypeError, match=f"{cls.__name__}.. got an unexpected keyword argument 'skip_nonfinit'.*`skip_nonfinite`"
    ):
        cls([Arrays([np.ones(1, np.float32)])], skip_nonfinit=True)


def test_arguments_by_position() -> None:
    opt = optim.SGD([Arrays([np.ones(1, np.float32)])], 0.5, 0.25, 0.125, 0.0625)
    assert (opt.lr, opt.momentum, opt.dampening, opt.weight_decay) == (0.5, 0.25, 0.125, 0.0625)
    assert optim.SGD([Arrays([np.ones(1, np.float32)])], 0.5, 0.25, 0, 0, True).nesterov is True


def test_it_is_an_optimizer_and_plain_by_default() -> None:
    assert issubclass(optim.SGD, mt.Optimizer)
    start, gradients = problem(1.0)
    plain, default = Arrays(start), Arrays(start)
    for opt, model in ((mt.Optimizer([plain], lr=LR), plain), (optim.SGD([default], lr=LR), default)):
        for grads in gradients:
            opt.zero_grad()
            model.accumulate(grads)
            opt.step()
    for a, b, p0 in zip(plain.parameters(), default.parameters(), start, strict=True):
        assert_allclose(np.asarray(a) - p0, np.asarray(b) - p0, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# Hyperparameters that change in mid-training


CHANGES: dict[str, list[dict[str, Any]]] = {
    "lr": [{"lr": 0.1 / (i + 1)} for i in range(STEPS)],
    "momentum": [{"momentum": 0.9 - 0.05 * i} for i in range(STEPS)],
    "weight decay from 0": [{"weight_decay": 0.1 * (i > 3)} for i in range(STEPS)],
    "maximize": [{"maximize": i % 3 == 0} for i in range(STEPS)],
    "nesterov": [{"nesterov": i > 4} for i in range(STEPS)],
    "momentum begins later": [{"momentum": 0.9 * (i > 3)} for i in range(STEPS)],
    "damped momentum begins later": [{"dampening": 0.5, "momentum": 0.9 * (i > 3)} for i in range(STEPS)],
    "momentum ends": [{"momentum": 0.9 * (i <= 3)} for i in range(STEPS)],
    "momentum pauses": [{"momentum": 0.9 * (not 3 <= i <= 5)} for i in range(STEPS)],
}


@pytest.mark.parametrize("name", CHANGES)
def test_hyperparameters_changed_in_mid_training_as_in_torch(name: str) -> None:
    start, gradients = problem(1.0)
    begin = {"lr": LR, "momentum": 0.9, **CHANGES[name][0]}
    model = Arrays(start)
    opt = optim.SGD([model], **begin)
    params = [torch.nn.Parameter(torch.tensor(p)) for p in start]
    theirs = torch.optim.SGD(params, **begin)
    for change, grads in zip(CHANGES[name], gradients, strict=True):
        for key, value in change.items():
            setattr(opt, key, value)
        says(lambda opt, change=change: opt.param_groups[0].update(change), theirs)
        opt.zero_grad()
        model.accumulate(grads)
        opt.step()
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.tensor(g)
        theirs.step()
        mine = [np.asarray(p, np.float64) - p0 for p, p0 in zip(model.parameters(), start, strict=True)]
        assert_same(mine, [p.detach().numpy().astype(np.float64) - p0 for p, p0 in zip(params, start, strict=True)])


def test_nesterov_is_checked_when_it_is_assigned() -> None:
    opt = optim.SGD([Arrays([np.ones(1, np.float32)])], lr=0.5, momentum=0.5, nesterov=True)
    for name, value in (("momentum", 0), ("dampening", 0.5)):
        before = getattr(opt, name)
        with pytest.raises(ValueError, match="nesterov needs"):
            setattr(opt, name, value)
        assert getattr(opt, name) == before
    plain = optim.SGD([Arrays([np.ones(1, np.float32)])], lr=0.5)
    with pytest.raises(ValueError, match="nesterov needs"):
        plain.nesterov = True
    assert plain.nesterov is False


def test_a_constant_schedule_is_a_constant() -> None:
    options = {**LEGAL[0], "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    by_number, by_schedule = ours(1.0, options), ours(1.0, options, lr=lambda step: jnp.float32(LR))
    assert_same(by_schedule[0][-1], by_number[0][-1])
    assert_same(by_schedule[1][-1], by_number[1][-1])
