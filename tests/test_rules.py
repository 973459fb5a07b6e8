"""The rules of all optimizers found by discovery: 10 steps of random gradients against float64, torch and optax.

As in test_sgd.py, what is compared is the displacement from a small start, at gradients of scales 1, 1e-4 and 1e-8, and
the state. One test takes one combination of flags, which is one compiled program, and all float options in it.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from oracle import signature, torch
from test_sgd import SCALES, SHAPES, STEPS, Arrays
from test_sides import discovered

import minitorch_jax as mt

CLASSES = {cls.__name__: cls for cls in discovered()}
Options = dict[str, Any]
Run = list[
    dict[str, np.ndarray]
]  # of each parameter: its displacement, `moved`, and its state; the first axis is steps


class Rule(NamedTuple):
    """How an optimizer is tried: every item of `flags` with every item of `numbers`, and what must be rejected."""

    reference: Callable[..., Any]
    numbers: list[Options]
    flags: list[Options] = [{}]
    base: Options = {"lr": 0.1}
    bad: list[Options] = []
    edges: list[Options] = []  # legal, at the ends of the ranges
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    start: float = 0.01  # size of the parameters at first, where gradients have size 1
    cancelled: float = 1e-6  # the error that is allowed where terms cancel, as a part of the largest element
    optax: Callable[..., Any] | None = None  # the same options as a gradient transformation
    optax_state: Callable[[Any], dict[str, Any]] | None = None  # our fields in its state


def every(**choices: tuple[Any, ...]) -> list[Options]:
    """All combinations, the first one being the defaults."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def below_zero(*names: str) -> list[Options]:
    return [{name: -0.1} for name in names]


OFF_ON = (False, True)
DECAY = {"weight_decay": 0.1}
BETAS = {"betas": (0.8, 0.99)}
ADAM_NUMBERS = [{}, {"lr": 0.02}, BETAS, {"eps": 1e-3}, DECAY, {**BETAS, "eps": 1e-5, "weight_decay": 0.3}]
BAD_BETAS = [{"betas": pair} for pair in ((-0.1, 0.9), (1.0, 0.9), (0.9, -0.1), (0.9, 1.0))]
BAD_ADAM = [*below_zero("lr", "eps", "weight_decay"), *BAD_BETAS]
ADAM_EDGES = [{"betas": (0.0, 0.0)}, {"lr": 0.0, "eps": 0.0, "weight_decay": 0.0}]

RULES: dict[str, Rule] = {
    "Optimizer": Rule(reference.sgd, [{}, {"lr": 0.02}], bad=below_zero("lr"), edges=[{"lr": 0.0}]),
    "SGD": Rule(
        reference.sgd,
        [{}, {"lr": 0.02}, DECAY],
        [
            options
            for options in every(maximize=OFF_ON, momentum=(0, 0.9), dampening=(0, 0.5), nesterov=OFF_ON)
            if options["momentum"] or not (options["dampening"] or options["nesterov"])
            if not (options["dampening"] and options["nesterov"])
        ],
        bad=[
            *below_zero("lr", "momentum", "weight_decay"),
            {"nesterov": True},
            {"nesterov": True, "momentum": 0.9, "dampening": 0.5},
        ],
        edges=[{"lr": 0.0, "momentum": 0.0, "weight_decay": 0.0}, {"momentum": 1.5, "dampening": -1.0}],
    ),
    "Adam": Rule(
        reference.adam,
        ADAM_NUMBERS,
        every(amsgrad=OFF_ON, maximize=OFF_ON, decoupled_weight_decay=OFF_ON),
        bad=BAD_ADAM,
        edges=ADAM_EDGES,
    ),
    "AdamW": Rule(
        reference.adamw,
        [*ADAM_NUMBERS, {"weight_decay": 0.0}],
        every(amsgrad=OFF_ON, maximize=OFF_ON),
        bad=BAD_ADAM,
        edges=ADAM_EDGES,
    ),
    "Adamax": Rule(reference.adamax, ADAM_NUMBERS, every(maximize=OFF_ON), bad=BAD_ADAM, edges=ADAM_EDGES),
    "NAdam": Rule(
        reference.nadam,
        [*ADAM_NUMBERS, {"momentum_decay": 0.5}],
        every(maximize=OFF_ON, decoupled_weight_decay=OFF_ON),
        bad=[*BAD_ADAM, *below_zero("momentum_decay")],
        edges=[*ADAM_EDGES, {"momentum_decay": 0.0}],
    ),
    "RAdam": Rule(
        reference.radam,
        [*ADAM_NUMBERS, {"betas": (0.5, 0.9)}, {"betas": (0.9, 0.6)}],  # from the 6th step on rectified, later, never
        every(maximize=OFF_ON, decoupled_weight_decay=OFF_ON),
        bad=BAD_ADAM,
        edges=ADAM_EDGES,
        cancelled=1e-5,  # the longest average is 2 / (1 - beta2), where a float32 0.999 is off by 1.3e-5
    ),
    "Adagrad": Rule(
        reference.adagrad,
        [
            {},
            {"lr": 0.02},
            {"lr_decay": 0.1},
            DECAY,
            {"initial_accumulator_value": 0.1},
            {"eps": 1e-3},
            {"lr_decay": 0.3, "weight_decay": 0.3, "initial_accumulator_value": 1e-9, "eps": 1e-5},
        ],
        every(maximize=OFF_ON),
        bad=below_zero("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"),
        edges=[dict.fromkeys(("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"), 0.0)],
    ),
    "Adadelta": Rule(
        reference.adadelta,
        [{}, {"lr": 0.3}, {"rho": 0.5}, {"eps": 1e-3}, DECAY, {"rho": 0.99, "eps": 1e-9, "weight_decay": 0.3}],
        every(maximize=OFF_ON),
        base={"lr": 1.0},
        start=1e-3,
        bad=[*below_zero("lr", "rho", "eps", "weight_decay"), {"rho": 1.1}],
        edges=[{"rho": 0.0}, {"rho": 1.0}, {"lr": 0.0, "eps": 0.0, "weight_decay": 0.0}],
    ),
    "RMSprop": Rule(
        reference.rmsprop,
        [{}, {"lr": 0.02}, {"alpha": 0.8}, {"eps": 1e-3}, DECAY, {"alpha": 0.9, "eps": 1e-5, "weight_decay": 0.3}],
        every(maximize=OFF_ON, centered=OFF_ON, momentum=(0, 0.9)),
        bad=below_zero("lr", "alpha", "eps", "weight_decay", "momentum"),
        edges=[dict.fromkeys(("lr", "alpha", "eps", "weight_decay", "momentum"), 0.0), {"alpha": 1.0}],
    ),
    "Rprop": Rule(
        reference.rprop,
        [{}, {"lr": 0.02}, {"etas": (0.3, 1.5)}, {"step_sizes": (0.04, 0.11)}],
        every(maximize=OFF_ON),
        bad=[
            *below_zero("lr"),
            *({"etas": pair} for pair in ((0.0, 1.2), (1.0, 1.2), (0.5, 1.0), (0.5, 0.9), (-0.5, 1.2), (1.2, 0.5))),
        ],
        edges=[{"lr": 0.0}],
    ),
    "ASGD": Rule(
        reference.asgd,
        [
            {},
            {"lr": 0.02},
            {"lambd": 0.5},
            {"lambd": 0.5, "alpha": 0.25},
            {"t0": 3.0},
            {"t0": 0.0, "lambd": 0.1, **DECAY},
        ],
        every(maximize=OFF_ON),
        bad=below_zero("lr", "weight_decay"),
        edges=[dict.fromkeys(("lr", "lambd", "alpha", "t0", "weight_decay"), 0.0)],
    ),
    "Adafactor": Rule(
        reference.adafactor,
        [
            {},
            {"lr": 0.5},  # more than 1 / sqrt(t) from the 5th step on
            {"beta2_decay": -0.3},
            {"eps": (1e-3, 1e-3)},
            {"eps": (1e-12, 0.1)},
            {"d": 2.0},
            DECAY,
            {"beta2_decay": -0.5, "eps": (1e-5, 0.01), "d": 1.5, "weight_decay": 0.3},
        ],
        every(maximize=OFF_ON),
        bad=[
            *below_zero("lr", "weight_decay"),
            *({"beta2_decay": value} for value in (0.1, 1.0)),
            *({"eps": pair} for pair in ((-0.1, 1e-3), (None, -0.1))),
            *({"d": value} for value in (0.0, 0.9)),
        ],
        edges=[{"lr": 0.0, "weight_decay": 0.0, "beta2_decay": 0.0, "eps": (0.0, 0.0), "d": 1.0}],
        shapes=((3,), (2, 3), (2, 3, 2), ()),
    ),
    "Muon": Rule(
        reference.muon,
        [
            {},
            {"lr": 0.02},
            {"weight_decay": 0.3},
            {"momentum": 0.5},
            {"ns_coefficients": (2.0, -1.5, 0.5)},
            {"eps": 1e-3},
            {"weight_decay": 0.0, "momentum": 0.0, "eps": 0.1},
        ],
        [
            *every(nesterov=(True, False), adjust_lr_fn=("original", "match_rms_adamw")),
            {"ns_steps": 2},
        ],
        bad=[*below_zero("lr", "momentum", "weight_decay"), {"adjust_lr_fn": "none of these"}],
        edges=[{"lr": 0.0, "weight_decay": 0.0, "momentum": 0.0}],
        shapes=((2, 2), (4, 2), (2, 3)),
    ),
    "Lion": Rule(
        reference.lion,
        [{}, {"lr": 0.02}, BETAS, DECAY, {**BETAS, **DECAY}],
        bad=[*below_zero("lr", "weight_decay"), *BAD_BETAS],
        edges=[{"lr": 0.0, "betas": (0.0, 0.0), "weight_decay": 0.0}],
        optax=lambda optax, lr, betas=(), **rest: optax.lion(lr, *betas, **rest),
        optax_state=lambda state: {"exp_avg": state[0].mu},
    ),
    "LAMB": Rule(
        reference.lamb,
        [*ADAM_NUMBERS, {"eps_root": 1e-3}, {"eps_root": 1e-6, "eps": 1e-3, "weight_decay": 3.0}],
        bad=[*BAD_ADAM, *below_zero("eps_root")],
        edges=ADAM_EDGES,
        optax=lambda optax, lr, betas=(), **rest: optax.lamb(lr, *betas, **rest),
        optax_state=lambda state: {"exp_avg": state[0].mu, "exp_avg_sq": state[0].nu},
    ),
    "LARS": Rule(
        reference.lars,
        [{}, {"lr": 45.0}, {"weight_decay": 3.0}, {"trust_coefficient": 0.002}, {"eps": 1e-8}, {"eps": 1e-9, **DECAY}],
        [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.0}],
        base={"lr": 30.0},
        bad=below_zero("lr", "momentum", "weight_decay", "trust_coefficient", "eps"),
        edges=[dict.fromkeys(("lr", "momentum", "weight_decay", "trust_coefficient", "eps"), 0.0)],
        optax=lambda optax, lr, **rest: optax.lars(lr, **rest),
        optax_state=lambda state: {"momentum_buffer": [-b for b in state[-1].trace]},  # unused without momentum
    ),
    "AdaBelief": Rule(
        reference.adabelief,
        [{}, {"lr": 0.02}, BETAS, {"eps": 1e-3}, {"eps_root": 1e-6}, {**BETAS, "eps": 1e-5, "eps_root": 1e-12}],
        every(nesterov=OFF_ON),
        bad=[*below_zero("lr", "eps", "eps_root"), *BAD_BETAS],
        edges=[{"betas": (0.0, 0.0)}, {"lr": 0.0, "eps": 0.0, "eps_root": 0.0}],
        optax=lambda optax, lr, betas=(), **rest: optax.adabelief(lr, *betas, **rest),
        optax_state=lambda state: {"exp_avg": state[0].mu, "exp_avg_var": state[0].nu},
    ),
    "Yogi": Rule(
        reference.yogi,
        [{}, {"lr": 0.02}, BETAS, {"eps": 1e-6}, {**BETAS, "eps": 1e-8}],
        bad=[*below_zero("lr", "eps"), *BAD_BETAS],
        edges=[{"betas": (0.0, 0.0)}, {"lr": 0.0, "eps": 0.0}],
        optax=lambda optax, lr, betas=(), **rest: optax.yogi(lr, *betas, **rest),
        optax_state=lambda state: {"exp_avg": state[0].mu, "exp_avg_sq": state[0].nu},
    ),
    "Adan": Rule(
        reference.adan,
        [
            {},
            {"lr": 0.02},
            {"betas": (0.9, 0.7, 0.8)},
            {"eps": 1e-3},
            {"eps_root": 0.0},
            DECAY,
            {"betas": (0.9, 0.7, 0.8), "eps": 1e-5, "eps_root": 1e-12, "weight_decay": 0.3},
        ],
        bad=[
            *below_zero("lr", "eps", "eps_root", "weight_decay"),
            *({"betas": three} for three in ((-0.1, 0.9, 0.9), (0.9, -0.1, 0.9), (0.9, 0.9, -0.1))),
            *({"betas": three} for three in ((1.0, 0.9, 0.9), (0.9, 1.0, 0.9), (0.9, 0.9, 1.0))),
        ],
        edges=[{"betas": (0.0, 0.0, 0.0)}, dict.fromkeys(("lr", "eps", "eps_root", "weight_decay"), 0.0)],
        optax=lambda optax, lr, betas=(), **rest: optax.adan(lr, *betas, **rest),
        optax_state=lambda state: {
            "exp_avg": state[0].m,
            "exp_avg_diff": state[0].v,
            "exp_avg_sq": state[0].n,
            "pre_grad": state[0].g,
        },
    ),
    "ScheduleFreeAdamW": Rule(
        reference.schedule_free_adamw,
        [
            {},
            {"lr": 0.02},
            BETAS,
            {"eps": 1e-3},
            DECAY,
            {"weight_lr_power": 0.0},
            {"warmup_steps": 4},
            {"warmup_steps": 20, "weight_lr_power": 1.0, **BETAS, "weight_decay": 0.3},
        ],
        bad=[*BAD_ADAM, {"betas": (0.0, 0.9)}, *below_zero("warmup_steps", "weight_lr_power")],
        edges=[{"betas": (0.1, 0.0)}, dict.fromkeys(("lr", "eps", "weight_decay", "warmup_steps"), 0.0)],
        optax=lambda optax, lr, betas=(0.9, 0.999), warmup_steps=None, **rest: optax.contrib.schedule_free_adamw(
            lr, warmup_steps, *betas, **rest
        ),
        optax_state=lambda state: {
            "z": state.z,
            "exp_avg_sq": state.base_optimizer_state[0].nu,
            "weight_sum": state.weight_sum,
            "lr_max": state.max_lr,
        },
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# Running a rule


@functools.cache
def problem(scale: float, size: float, shapes: Any) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """A start, and the gradients of each step, whose size changes from step to step."""
    rng = np.random.default_rng(7)
    start = [np.asarray(size * scale * rng.normal(size=shape), np.float32) for shape in shapes]
    sizes = scale * rng.uniform(0.3, 3.0, STEPS)
    return start, [[np.asarray(size * rng.normal(size=shape), np.float32) for shape in shapes] for size in sizes]


def stacked(start: list[np.ndarray], steps: list[list[dict[str, Any]]]) -> Run:
    """Of each step's states, with the parameter as `p` in them: displacements and states, by parameter."""
    runs = []
    for i, p0 in enumerate(start):
        run = {name: np.stack([np.asarray(step[i][name], np.float64) for step in steps]) for name in steps[-1][i]}
        runs.append({"moved": run.pop("p") - p0, **run})
    return runs


def stepped(opt: Any, grads: Any) -> None:
    opt.zero_grad()
    opt.modules[0].accumulate(grads)
    opt.step()


def run_ours(cls: Any, rule: Rule, options: Options, scale: float, step: Callable[..., Any] = stepped) -> Run:
    start, gradients = problem(scale, rule.start, rule.shapes)
    model, steps = Arrays(start), []
    opt = cls([model], **options)
    for t, grads in enumerate(gradients, 1):
        step(opt, grads)
        states = list(opt.state_dict()["state"].values())
        assert [state.pop("step") for state in states] == [t] * len(start)
        steps.append([{"p": p, **state} for p, state in zip(model.parameters(), states, strict=True)])
    return stacked(start, steps)


@functools.cache
def cached_run(name: str, options: tuple[tuple[str, Any], ...], scale: float) -> Run:
    return run_ours(CLASSES[name], RULES[name], dict(options), scale)


def run_reference(rule: Rule, options: Options, scale: float) -> Run:
    start, gradients = problem(scale, rule.start, rule.shapes)
    runs = []
    for i, p0 in enumerate(start):
        ps, states = rule.reference(p0, [grads[i] for grads in gradients], **options)
        runs.append([{"p": p, **state} for p, state in zip(ps, states, strict=True)])
    return stacked(start, [list(step) for step in zip(*runs, strict=True)])


def run_torch(name: str, rule: Rule, options: Options, scale: float) -> Run:
    torch.set_num_threads(1)  # arrays are tiny: a second thread would only wait
    start, gradients = problem(scale, rule.start, rule.shapes)
    params, steps = [torch.nn.Parameter(torch.tensor(p)) for p in start], []
    opt = torch_class(name)(params, **options)
    for grads in gradients:
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.tensor(g)
        opt.step()
        steps.append([{"p": p.detach().numpy().copy(), **torch_state(opt.state[p])} for p in params])
    return stacked(start, steps)


def torch_class(name: str) -> Any:
    optim = torch.optim
    return optim.SGD if name == "Optimizer" else getattr(optim, name, None)


def torch_state(state: Any) -> dict[str, np.ndarray]:
    return {key: value.numpy().copy() for key, value in state.items() if key != "step" and value is not None}


def run_optax(rule: Rule, options: Options, scale: float) -> Run:
    """In float64, whose bias corrections are exact enough, and parameters rounded as ours are."""
    optax = pytest.importorskip("optax")
    start, gradients = problem(scale, rule.start, rule.shapes)
    transformation, steps = rule.optax(optax, **options), []
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params = [jnp.asarray(p, jnp.float64) for p in start]
        state = transformation.init(params)
        for grads in gradients:
            updates, state = transformation.update([jnp.asarray(g, jnp.float64) for g in grads], state, params)
            params = optax.apply_updates(params, updates)
            fields = rule.optax_state(state) if rule.optax_state else {}
            held = [{name: _of(value, i) for name, value in fields.items()} for i in range(len(params))]
            steps.append([{"p": np.float32(p), **state} for p, state in zip(params, held, strict=True)])
    return stacked(start, steps)


def _of(value: Any, i: int) -> Any:
    """The part of a parameter in a state of all, or one that they share."""
    return value[i] if isinstance(value, list) else value


def differences(mine: Run, theirs: Run, rule: Rule, some_fields: bool = False) -> Iterator[str]:
    """Where runs differ by more than rtol 1e-4, and where terms cancel, 1e-6 of the largest element so far."""
    for a, b in zip(mine, theirs, strict=True):
        if a.keys() != b.keys() and not some_fields:
            yield f"the state has {sorted(a)}; expected was {sorted(b)}"
            continue
        for name in a.keys() & b.keys():
            expected = b[name]
            if a[name].shape != expected.shape:
                yield f"{name} has shape {a[name].shape[1:]}; expected was {expected.shape[1:]}"
                continue
            size = np.abs(expected)
            largest = np.maximum.accumulate(size.max(axis=tuple(range(1, size.ndim)), keepdims=True))
            allowed = 1e-4 * size + rule.cancelled * largest
            wrong = ~(np.abs(a[name] - expected) <= allowed)
            if wrong.any():
                step = int(np.argmax(wrong.reshape(len(wrong), -1).any(1)))
                yield f"{name} after step {step + 1} is {a[name][step]}; expected was {expected[step]}"


def label(value: Any) -> str:
    return ",".join(f"{k}={v}" for k, v in value.items()) or "defaults" if isinstance(value, dict) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# What is tried


def test_every_optimizer_has_an_entry() -> None:
    assert set(CLASSES) == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_every_option_is_tried(name: str) -> None:
    """Each flag both ways, each number at a second value."""
    rule = RULES[name]
    tried = [{**rule.base, **flags, **numbers} for flags in rule.flags for numbers in rule.numbers]
    for p in options_of(CLASSES[name]):
        values = {options.get(p.name, p.default) for options in tried}
        assert len(values) > 1, f"{p.name} is tried at {values} alone"
    assert len({options["lr"] for options in tried}) > 1


def options_of(cls: Any) -> list[inspect.Parameter]:
    """All but the modules, and what every optimizer takes over from the base class."""
    common = {"modules", *inspect.signature(mt.Optimizer).parameters} - {"lr"}
    options = inspect.signature(cls).parameters.values()
    return [p for p in options if p.name not in common and p.kind is not p.VAR_KEYWORD]


CASES = [
    pytest.param(name, flags, id=f"{name}-{label(flags)}", marks=pytest.mark.slow if i else ())
    for name, rule in RULES.items()
    for i, flags in enumerate(rule.flags)
]


@pytest.mark.one_in(9)
@pytest.mark.parametrize("oracle", ["float64", "peer"])
@pytest.mark.parametrize(("name", "flags"), CASES)
def test_trajectory(name: str, flags: Options, oracle: str) -> None:
    rule, found = RULES[name], []
    for numbers, scale in itertools.product(rule.numbers, SCALES):
        options = {**rule.base, **flags, **numbers}
        mine = cached_run(name, tuple(options.items()), scale)
        if oracle == "float64":
            theirs = run_reference(rule, options, scale)
        elif rule.optax:
            theirs = run_optax(rule, options, scale)
        else:
            theirs = run_torch(name, rule, options, scale)
        some = oracle == "peer" and rule.optax is not None
        found += [f"{label(numbers)}, scale {scale:g}: {line}" for line in differences(mine, theirs, rule, some)]
    assert not found, "\n".join([f"{len(found)} differences:", *found[:20]])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", RULES)
def test_no_two_ways_of_trying_a_rule_are_the_same(name: str) -> None:
    """So that an option that is ignored, or taken for another one, is noticed."""
    rule = RULES[name]
    by_flags = [
        [run_reference(rule, {**rule.base, **f, **n}, s) for n in rule.numbers for s in SCALES] for f in rule.flags
    ]
    first = {**rule.base, **rule.flags[0]}
    by_numbers = [[run_reference(rule, {**first, **n}, s) for s in SCALES] for n in rule.numbers]
    for kind, tried in ((rule.flags, by_flags), (rule.numbers, by_numbers)):
        for (i, a), (j, b) in itertools.combinations(enumerate(tried), 2):
            assert any(any(differences(*pair, rule)) for pair in zip(a, b, strict=True)), (kind[i], kind[j])


# ---------------------------------------------------------------------------------------------------------------------
# The constructor


def make_ours(name: str, options: Options) -> Any:
    shape = RULES[name].shapes[0]
    return CLASSES[name]([Arrays([np.ones(shape, np.float32)])], **options)


def make_theirs(name: str, options: Options) -> Any:
    return torch_class(name)([torch.nn.Parameter(torch.ones(RULES[name].shapes[0]))], **options)


def with_options(kind: str) -> list[Any]:
    return [
        pytest.param(name, options, id=f"{name}-{','.join(f'{k}={v}' for k, v in options.items())}")
        for name, rule in RULES.items()
        for options in getattr(rule, kind)
    ]


@pytest.mark.parametrize(("name", "options"), with_options("bad"))
def test_what_torch_rejects_is_rejected(name: str, options: Options) -> None:
    option = next(reversed(options))
    with pytest.raises(ValueError, match=f"{name}: .*{option if len(options) == 1 else ''}"):
        make_ours(name, options)
    if not RULES[name].optax:
        with pytest.raises(ValueError):
            make_theirs(name, options)


@pytest.mark.parametrize(("name", "options"), with_options("bad"))
def test_it_is_rejected_in_an_assignment(name: str, options: Options) -> None:
    opt = make_ours(name, {})
    before = opt.state_dict()["hyperparameters"]
    with pytest.raises(ValueError, match=f"{name}: "):
        for option, value in reversed(options.items()):
            setattr(opt, option, value)
    if len(options) == 1:
        assert opt.state_dict()["hyperparameters"] == before


@pytest.mark.parametrize("name", RULES)
def test_what_is_no_number_is_rejected(name: str) -> None:
    """NaN and infinity, which torch rejects here and there only."""
    for p in options_of(CLASSES[name]):
        if isinstance(p.default, float) or p.name == "lr":
            for value in (math.nan, math.inf):
                with pytest.raises(ValueError, match=f"{name}: {p.name} must be .*; got {value}"):
                    make_ours(name, {p.name: value})
        elif isinstance(p.default, tuple):
            for i, value in itertools.product(range(len(p.default)), (math.nan, math.inf)):
                with pytest.raises(ValueError, match=f"{name}: {p.name} .*{value}"):
                    make_ours(name, {p.name: (*p.default[:i], value, *p.default[i + 1 :])})


@pytest.mark.parametrize(("name", "options"), with_options("edges"))
def test_what_torch_accepts_is_accepted(name: str, options: Options) -> None:
    make_ours(name, options)
    if not RULES[name].optax:
        make_theirs(name, options)


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if not rule.optax and name != "Optimizer"])
def test_the_signature_is_torchs(name: str) -> None:
    """Names, order and defaults; and what does not stand where it stands in torch is given by keyword alone."""
    how_torch_runs_it = {"foreach", "fused", "capturable", "differentiable"}
    first, mine = next(iter(inspect.signature(CLASSES[name]).parameters)), options_of(CLASSES[name])
    their_first, *theirs = signature(torch_class(name)).parameters.values()
    assert (first, their_first.name) == ("modules", "params")
    places = {p.name: i for i, p in enumerate(theirs) if p.kind is p.POSITIONAL_OR_KEYWORD}
    theirs = [p for p in theirs if p.name not in how_torch_runs_it]
    assert [p.name for p in mine] == [p.name for p in theirs]
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert a.default == (0.01 if (name, a.name) == ("SGD", "lr") else b.default), a.name
        assert (a.kind is a.POSITIONAL_OR_KEYWORD) == (places.get(b.name) == i), a.name
    rest = [*inspect.signature(CLASSES[name]).parameters.values()][len(mine) + 1 :]
    assert rest and all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in rest)


def test_muon_is_for_matrices_as_in_torch() -> None:
    for shape in ((3,), (), (2, 2, 2)):
        with pytest.raises(ValueError, match="Muon takes parameters of two axes only"):
            CLASSES["Muon"]([Arrays([np.ones(shape, np.float32)])])
        with pytest.raises(ValueError, match="2D"):
            torch.optim.Muon([torch.nn.Parameter(torch.ones(shape))])


# ---------------------------------------------------------------------------------------------------------------------
# The comparison can fail: Adams that are subtly wrong


WRONG = {  # and the scales at which it shows
    "epsilon inside of the root": (1e-4, 1e-8),
    "no bias correction of the second moment": (1.0, 1e-4, 1e-8),
    "epsilon before the bias correction": (1e-4, 1e-8),
    "coupled weight decay": (1.0, 1e-4, 1e-8),
    "t off by one": (1.0, 1e-4, 1e-8),
    "beta2 for beta1": (1.0, 1e-4, 1e-8),
}


class Moments(NamedTuple):
    exp_avg: jax.Array
    exp_avg_sq: jax.Array


def written_adam(wrong: str | None) -> type[mt.Optimizer]:
    """AdamW as a user would write it, with one thing wrong."""

    class Written(mt.Optimizer):
        def __init__(self, modules: Any, lr: Any, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
            super().__init__(modules, lr, betas=betas, eps=eps, weight_decay=weight_decay)

        @staticmethod
        def init_state(p: jax.Array, h: SimpleNamespace) -> Moments:
            return Moments(jnp.zeros_like(p), jnp.zeros_like(p))

        @staticmethod
        def update(p: jax.Array, g: jax.Array, s: Moments, h: SimpleNamespace) -> tuple[jax.Array, Moments]:
            b1, b2 = h.betas if wrong != "beta2 for beta1" else (h.betas[1], h.betas[1])
            t = h.t + 1 if wrong == "t off by one" else h.t
            if wrong == "coupled weight decay":
                g = g + h.weight_decay * p
            else:
                p = p - h.lr * h.weight_decay * p
            m = b1 * s.exp_avg + (1 - b1) * g
            v = b2 * s.exp_avg_sq + (1 - b2) * g**2
            correction = 1.0 if wrong == "no bias correction of the second moment" else 1 - b2**t
            if wrong == "epsilon inside of the root":
                root = jnp.sqrt(v / correction + h.eps)
            elif wrong == "epsilon before the bias correction":
                root = (jnp.sqrt(v) + h.eps) / jnp.sqrt(correction)
            else:
                root = jnp.sqrt(v / correction) + h.eps
            return p - h.lr * m / (1 - b1**t) / root, Moments(m, v)

    return Written


@pytest.mark.one_in(3)
@pytest.mark.parametrize("wrong", [None, *WRONG])
def test_a_wrong_adam_is_caught(wrong: str | None) -> None:
    """By its displacement; a misplaced epsilon shows at small gradients alone."""
    options = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    cls, rule = written_adam(wrong), RULES["AdamW"]
    caught = []
    for scale in SCALES:
        mine, right = run_ours(cls, rule, options, scale), run_reference(rule, options, scale)
        if any(line.startswith("moved") for line in differences(mine, right, rule)):
            caught.append(scale)
    assert tuple(caught) == (WRONG[wrong] if wrong else ())


# ---------------------------------------------------------------------------------------------------------------------
# A user's own optimizer


class Signum(mt.Optimizer):
    elementwise = True

    def __init__(self, modules: Any, lr: Any = 0.01, momentum: float = 0.9) -> None:
        super().__init__(modules, lr, momentum=momentum)

    @staticmethod
    def init_state(p: jax.Array, h: SimpleNamespace) -> Any:
        return {"m": jnp.zeros_like(p)}

    @staticmethod
    def update(p: jax.Array, g: jax.Array, s: Any, h: SimpleNamespace) -> tuple[jax.Array, Any]:
        m = h.momentum * s["m"] + (1 - h.momentum) * g
        return p - h.lr * jnp.sign(m), {"m": m}


@reference.rule
def signum(p, grads, lr=0.01, momentum=0.9) -> Iterator[tuple[Any, dict[str, Any]]]:
    m = 0.0 * p
    for g in grads:
        m = momentum * m + (1 - momentum) * g
        p = p - lr * np.sign(m)
        yield p, {"m": m}


def test_an_optimizer_of_the_users_own() -> None:
    """In under 15 lines; the same in eager code, compiled, and on paper."""
    assert len(inspect.getsource(Signum).splitlines()) < 15
    rule = Rule(signum, [{}, {"lr": 0.02}, {"momentum": 0.5}])
    compiled = mt.jit(stepped)
    for numbers, scale in itertools.product(rule.numbers, SCALES):
        options = {"lr": 0.1, **numbers}
        eager = run_ours(Signum, rule, options, scale)
        jitted = run_ours(Signum, rule, options, scale, compiled)
        assert not [*differences(eager, run_reference(rule, options, scale), rule)]
        assert not [*differences(jitted, eager, rule)]
    assert compiled.num_compiles == 1
