"""Optimizers that go from torch to here and back: each rule that both have goes on with the same trajectory and state."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lazily import Lazily
from oracle import actual as torch
from training import Arrays

import minitorch_jax as mt
from minitorch_jax import nn, optim

adapter = Lazily("minitorch_jax.adapters.torch")
matching = Lazily("minitorch_jax.adapters.torch.matching")


SHAPES = ((4, 3), (3,))
MATRICES = ((4, 3), (2, 4))
NUM_STEPS = 10

# class: options of torch's optimizer, in each of which all that may differ from the defaults does
CASES: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True},
    ],
    "Adam": [
        {"lr": 0.02, "betas": (0.8, 0.99), "eps": 1e-5, "weight_decay": 0.1, "amsgrad": True},
        {"maximize": True, "decoupled_weight_decay": True, "weight_decay": 0.1},
    ],
    "AdamW": [{"lr": 0.02, "betas": (0.8, 0.99), "weight_decay": 0.3}],
    "Adamax": [{"lr": 0.02, "betas": (0.8, 0.99), "weight_decay": 0.1}],
    "NAdam": [{"lr": 0.02, "momentum_decay": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}],
    "RAdam": [{"lr": 0.02, "betas": (0.8, 0.9), "weight_decay": 0.1}],  # rectified from its 6th step on
    "Adagrad": [{"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.5, "weight_decay": 0.1}],
    "Adadelta": [{"lr": 0.5, "rho": 0.8, "weight_decay": 0.1}],
    "RMSprop": [{"lr": 0.02, "alpha": 0.9}, {"lr": 0.02, "momentum": 0.9, "centered": True, "weight_decay": 0.1}],
    "Rprop": [{"lr": 0.02, "etas": (0.4, 1.3), "step_sizes": (1e-3, 0.1)}],
    "ASGD": [{"lr": 0.1, "lambd": 0.1, "t0": 3.0, "weight_decay": 0.1}],
    "Adafactor": [{"lr": 0.3, "beta2_decay": -0.6, "d": 1.5, "weight_decay": 0.1}],
    "Muon": [{"lr": 0.1, "weight_decay": 0.3, "momentum": 0.8}],
}
ALL = [pytest.param(name, i, id=f"{name}-{i}") for name, cases in CASES.items() for i in range(len(cases))]
FLAGS = {"nesterov", "maximize", "amsgrad", "decoupled_weight_decay", "centered"}


def tensors(arrays: list[np.ndarray]) -> Any:
    """torch's module of the same."""
    module = torch.nn.Module()
    for i, array in enumerate(arrays):
        module.register_parameter(f"p{i}", torch.nn.Parameter(torch.tensor(array)))
    return module


@contextmanager
def precision(dtype: Any) -> Iterator[None]:
    """In float64 torch's numbers (steps, mu_product, eta) are float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if dtype == np.float64 else torch.float32)
    try:
        with jax.enable_x64(dtype == np.float64):
            yield
    finally:
        torch.set_default_dtype(before)


def shapes_of(name: str) -> Any:
    return MATRICES if name == "Muon" else SHAPES


@functools.cache
def problem(shapes: Any, dtype: Any) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """A start, and gradients, whose size and sign change from step to step."""
    rng = np.random.default_rng(7)
    start = [rng.normal(size=shape).astype(dtype) for shape in shapes]
    sizes = rng.uniform(0.3, 3.0, NUM_STEPS)
    return start, [[(size * rng.normal(size=shape)).astype(dtype) for shape in shapes] for size in sizes]


class Sides:
    """The same parameters on both sides, and an optimizer on each, ours with other numbers."""

    def __init__(self, name: str, options: dict[str, Any], dtype: Any, **ours: Any) -> None:
        start, self.gradients = problem(shapes_of(name), dtype)
        self.theirs, self.ours = tensors(start), Arrays([np.zeros_like(array) for array in start])
        self.their_opt = getattr(torch.optim, name)(self.theirs.parameters(), **options)
        structural = {key: options[key] for key in options.keys() & {*FLAGS, "momentum"}}
        ours = {**({} if name == "AdamW" else structural), **ours}
        ours.pop("decoupled_weight_decay", None) if name not in ("Adam", "NAdam", "RAdam") else None
        self.opt = getattr(optim, name)([self.ours], **{"lr": 0.77, **ours})

    def step_theirs(self, steps: range) -> None:
        for t in steps:
            for tensor, grad in zip(self.theirs.parameters(), self.gradients[t], strict=True):
                tensor.grad = torch.tensor(grad)
            self.their_opt.step()

    def step_ours(self, steps: range) -> None:
        for t in steps:
            self.opt.zero_grad()
            self.ours.accumulate([jnp.asarray(grad) for grad in self.gradients[t]])
            self.opt.step()

    def load(self, **options: Any) -> None:
        adapter.load_from_torch(self.ours, self.theirs)
        adapter.load_optimizer_from_torch(self.opt, self.their_opt, self.theirs, **options)

    def copy(self) -> None:
        adapter.copy_to_torch(self.ours, self.theirs)
        adapter.copy_optimizer_to_torch(self.opt, self.their_opt, self.theirs)

    def everything_ours(self) -> dict[str, Any]:
        found: dict[str, Any] = {path: np.array(value) for path, value in self.ours.state_dict().items()}
        for path, fields in self.opt.state_dict()["state"].items():
            found |= {f"{path[2:]}.{name}": np.array(value) for name, value in fields.items()}
        return found

    def everything_theirs(self) -> dict[str, Any]:
        found: dict[str, Any] = {path: value.numpy().copy() for path, value in self.theirs.state_dict().items()}
        for path, tensor in self.theirs.named_parameters():
            state = self.their_opt.state.get(tensor, {})
            found |= {f"{path}.{name}": value.numpy().copy() for name, value in state.items()}
        return found


def assert_agree(mine: dict[str, Any], theirs: dict[str, Any], rtol: float) -> None:
    """Everything that torch has, and nothing else but step counts that it lacks."""
    assert {name for name in mine.keys() ^ theirs.keys() if not name.endswith(".step")} == set()
    assert {name for name in theirs if name not in mine} == set()
    for name in theirs:
        scale = np.abs(theirs[name]).max(initial=0)
        np.testing.assert_allclose(mine[name], theirs[name], rtol=rtol, atol=rtol * scale, err_msg=name)


def close_to(name: str, dtype: Any) -> float:
    if name == "Muon":  # orthogonalizes in bfloat16 on both sides
        return 1e-4
    return 1e-10 if dtype == np.float64 else 1e-5


def test_every_rule_that_both_have_is_tried() -> None:
    assert {cls.__name__ for cls in matching.RULES} == {*CASES, "LBFGS"}
    both = {name for name in dir(torch.optim) if isinstance(getattr(torch.optim, name), type) and hasattr(optim, name)}
    assert both - {"Optimizer"} == {*CASES, "LBFGS"}


@pytest.mark.one_in(6)
@pytest.mark.parametrize("dtype", [np.float64, pytest.param(np.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "case"), ALL)
def test_each_rule_goes_on_as_it_would_have(name: str, case: int, dtype: Any) -> None:
    """From torch to here after 5 steps, and from here to torch after 5: each against 10 in torch, and 10 here."""
    options, rtol = CASES[name][case], close_to(name, dtype)
    with precision(dtype):
        whole = Sides(name, options, dtype)
        whole.load()  # the start, and the settings
        whole.step_theirs(range(NUM_STEPS))
        expected = whole.everything_theirs()
        moved = Sides(name, options, dtype)
        moved.step_theirs(range(5))
        half = moved.everything_theirs()
        moved.load()
        assert_agree(moved.everything_ours(), half, 1e-15)  # nothing is lost on the way
        moved.step_ours(range(5, NUM_STEPS))
        assert_agree(moved.everything_ours(), expected, rtol)
        whole.step_ours(range(5))
        here = {key: value for key, value in whole.everything_ours().items() if key in half}
        whole.theirs, whole.their_opt = (
            (other := Sides(name, {**options, "lr": 0.5}, dtype)).theirs,
            other.their_opt,
        )
        whole.copy()
        assert_agree(whole.everything_theirs(), here, 1e-15)
        whole.step_theirs(range(5, NUM_STEPS))
        assert_agree(whole.everything_theirs(), expected, rtol)


# -- LBFGS ------------------------------------------------------------------------------------------------------------

A = np.random.default_rng(1).normal(size=(12, 5))
B = np.random.default_rng(2).normal(size=(12, 3))
NEWTON = {"lr": 0.9, "max_iter": 4, "history_size": 3}  # so that the history is full after one step, and goes round


class Fit:
    """A loss of two parameters on both sides; torch has them in another order, and a frozen one between them."""

    def __init__(self, dtype: Any, **ours: Any) -> None:
        rng = np.random.default_rng(3)
        start = {"w": rng.normal(size=(5, 3)).astype(dtype), "b": rng.normal(size=3).astype(dtype)}
        self.theirs, self.ours = torch.nn.Module(), Named({name: np.zeros_like(value) for name, value in start.items()})
        for name, value in start.items():
            self.theirs.register_parameter(name, torch.nn.Parameter(torch.tensor(value)))
        frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
        self.their_opt = torch.optim.LBFGS([self.theirs.b, frozen, self.theirs.w], **NEWTON)
        self.opt = optim.LBFGS([self.ours], **{**NEWTON, "lr": 0.1, **ours})
        self.a, self.b = A.astype(dtype), B.astype(dtype)

    def step_theirs(self) -> None:
        a, b = torch.tensor(self.a), torch.tensor(self.b)

        def closure() -> Any:
            self.their_opt.zero_grad()
            loss = ((a @ self.theirs.w + self.theirs.b - b).pow(4)).mean()
            loss.backward()
            return loss

        self.their_opt.step(closure)

    def step_ours(self) -> None:
        def loss_fn(a: Any, b: Any) -> Any:
            return ((a @ self.ours.w + self.ours.b[None] - b) ** 4).mean()

        def closure() -> Any:
            self.opt.zero_grad()
            return mt.backward(loss_fn, self.a, self.b)

        self.opt.step(closure)

    def load(self, **options: Any) -> None:
        adapter.load_from_torch(self.ours, self.theirs)
        adapter.load_optimizer_from_torch(self.opt, self.their_opt, self.theirs, **options)

    def copy(self) -> None:
        adapter.copy_to_torch(self.ours, self.theirs)
        adapter.copy_optimizer_to_torch(self.opt, self.their_opt, self.theirs)

    def check(self, other: "Fit", rtol: float = 1e-9) -> None:
        for name, value in other.theirs.state_dict().items():
            np.testing.assert_allclose(self.ours.state_dict()[name], value.numpy(), rtol=rtol)
            np.testing.assert_allclose(self.theirs.state_dict()[name].numpy(), value.numpy(), rtol=rtol)
        mine, state = (side.their_opt.state[side.theirs.b] for side in (self, other))
        assert mine["n_iter"] == state["n_iter"] and mine["func_evals"] == state["func_evals"]
        for name in ("d", "t", "prev_flat_grad", "H_diag", "old_dirs", "old_stps", "ro"):
            theirs = state[name] if isinstance(state[name], list) else [state[name]]
            found = mine[name] if isinstance(state[name], list) else [mine[name]]
            for one, another in zip(found, theirs, strict=True):
                np.testing.assert_allclose(
                    float_array(one), float_array(another), rtol=1e3 * rtol, atol=1e-9, err_msg=name
                )


def float_array(value: Any) -> np.ndarray:
    return value.double().numpy() if isinstance(value, torch.Tensor) else np.float64(value)


class Named(mt.Module):
    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            setattr(self, name, mt.Parameter(array))


@pytest.mark.parametrize("before", [0, 1, 3])
def test_lbfgs_goes_on_as_it_would_have(before: int) -> None:
    """Steps in torch, then here, then in torch again, with a history that is empty, not full, and overwritten."""
    with precision(np.float64):
        whole, moved = Fit(np.float64), Fit(np.float64)
        for _ in range(before + 3):
            whole.step_theirs()
        for _ in range(before):
            moved.step_theirs()
        moved.load()
        moved.step_ours()
        moved.step_ours()
        moved.copy()
        moved.step_theirs()
        moved.load()
        moved.check(whole)
        assert moved.opt.lr == 0.9 and int(moved.opt.state_dict()["state"]["0.w"]["n_iter"]) == 4 * (before + 3)
        with pytest.raises(ValueError, match="num_steps=0, but torch has taken 1 steps or more"):
            moved.load(num_steps=0)
        moved.load(num_steps=7)
        assert moved.opt.num_steps == 7


def test_lbfgs_that_does_not_fit() -> None:
    sides = Fit(np.float32, history_size=2)
    sides.step_theirs()
    with pytest.raises(
        ValueError, match=r"3 pairs of float32, and this optimizer holds 2 pairs of float32: construct .*history_s"
    ):
        sides.load()
    sides = Fit(np.float32)
    sides.step_theirs()
    state = sides.their_opt.state[sides.theirs.b]
    kept, state["d"] = state["d"], None
    with pytest.raises(ValueError, match="torch's last step was interrupted, so its state has no direction"):
        sides.load()
    state["d"] = kept
    sides.load()
    for side in (sides.ours.astype(jnp.bfloat16), sides.theirs.bfloat16()):
        assert side is not None
    with pytest.raises(
        ValueError, match="the vector of all parameters is float32 here, and has the parameters' dtype in torch"
    ):
        sides.copy()


# -- parameters that are not alike, groups, settings ------------------------------------------------------------------


def linears(**settings: Any) -> tuple[Any, Any, Any, Any]:
    """Two layers on both sides, and AdamW on each."""
    theirs = [torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)]
    ours = [nn.Linear(3, 2), nn.Linear(2, 2)]
    their_opt = torch.optim.AdamW([p for module in theirs for p in module.parameters()], lr=0.1)
    return ours, theirs, optim.AdamW(list(ours), **settings), their_opt


def fill_gradients(theirs: Any) -> None:
    for i, tensor in enumerate(p for module in theirs for p in module.parameters()):
        tensor.grad = torch.full_like(tensor, 0.5 + i)


def state_of(opt: Any) -> Any:
    state = opt.state_dict()
    del state["fingerprints"]
    return jax.tree.map(lambda value: np.array(value) if isinstance(value, jax.Array) else value, state)


def assert_untouched(opt: Any, before: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, state_of(opt), before)


def test_parameters_that_torch_has_not_stepped_begin_here() -> None:
    """A layer without gradients so far: its steps count from the first gradient, on both sides."""
    with precision(np.float64):
        options = CASES["Adam"][0]
        whole, moved = Sides("Adam", options, np.float64), Sides("Adam", options, np.float64)
        late = {1}
        for side, steps in ((whole, NUM_STEPS), (moved, 5)):
            for t in range(steps):
                for i, tensor in enumerate(side.theirs.parameters()):
                    tensor.grad = None if i in late and t < 5 else torch.tensor(side.gradients[t][i])
                side.their_opt.step()
        moved.step_ours(range(3))  # what they had here before does not matter
        moved.load()
        state = moved.opt.state_dict()
        assert [state["state"][f"0.p{i}"]["step"] for i in range(2)] == [5, 0] and state["num_steps"] == 5
        again = Sides("Adam", options, np.float64)
        moved_theirs, moved_opt = moved.theirs, moved.their_opt
        moved.theirs, moved.their_opt = again.theirs, again.their_opt
        moved.copy()
        assert not moved.their_opt.state[moved.theirs.p1] and moved.their_opt.state[moved.theirs.p0]["step"] == 5
        moved.theirs, moved.their_opt = moved_theirs, moved_opt
        moved.step_ours(range(5, NUM_STEPS))
        assert_agree(moved.everything_ours(), whole.everything_theirs(), 1e-10)


def test_groups_and_their_settings_both_ways() -> None:
    ours, theirs, _, _ = linears()
    opt = optim.AdamW([{"modules": [ours[0]], "lr": 0.5}, {"modules": [ours[1]]}], lr=0.25)
    their_opt = torch.optim.AdamW(
        [
            {"params": theirs[0].weight},
            {"params": theirs[0].bias},
            {"params": theirs[1].parameters(), "betas": (0.5, 0.6)},
        ],
        lr=torch.tensor(0.125),
        weight_decay=0.3,
        foreach=False,
    )
    their_opt.param_groups[2]["lr"] = 0.0625
    their_opt.param_groups[0]["name"] = "a name of the user's own"
    fill_gradients(theirs)
    their_opt.step()
    adapter.load_optimizer_from_torch(opt, their_opt, theirs)
    assert [group.lr for group in opt.groups] == [0.125, 0.0625] and opt.lr == 0.0625
    assert [group.betas for group in opt.groups] == [(0.9, 0.999), (0.5, 0.6)]
    assert [group.weight_decay for group in opt.groups] == [0.3, 0.3] and opt.weight_decay == 0.3
    opt.groups[0].lr, opt.weight_decay, opt.groups[1].eps = 0.75, 0.2, 1e-3
    lr = their_opt.param_groups[0]["lr"]
    adapter.copy_optimizer_to_torch(opt, their_opt, theirs)
    assert [float(group["lr"]) for group in their_opt.param_groups] == [0.75, 0.75, 0.0625]
    assert (
        their_opt.param_groups[0]["lr"] is lr
        and [group["weight_decay"] for group in their_opt.param_groups] == [0.2] * 3
    )
    assert [group["eps"] for group in their_opt.param_groups] == [1e-8, 1e-8, 1e-3]
    assert [group["betas"] for group in their_opt.param_groups] == [(0.9, 0.999), (0.9, 0.999), (0.5, 0.6)]
    assert their_opt.param_groups[0]["name"] == "a name of the user's own"


def test_groups_that_cut_through_a_module() -> None:
    ours, theirs, opt, _ = linears()
    before = state_of(opt)
    weights, biases = [[getattr(module, name) for module in theirs] for name in ("weight", "bias")]
    apart = torch.optim.AdamW([{"params": weights}, {"params": biases, "lr": 0.5}], lr=0.1)
    with pytest.raises(
        ValueError, match=r"group 0 here: lr is 0.1 for 0.weight and 0.5 for 0.bias; put them in groups of "
    ):
        adapter.load_optimizer_from_torch(opt, apart, theirs)
    assert_untouched(opt, before)
    one = torch.optim.AdamW([*weights, *biases], lr=0.1)
    grouped = optim.AdamW([{"modules": [ours[0]], "lr": 0.5}, {"modules": [ours[1]]}], lr=0.25)
    with pytest.raises(
        ValueError, match=r"group 0 of torch: lr is 0.5 for 0.weight and 0.25 for 1.weight; construct torch's opt"
    ):
        adapter.copy_optimizer_to_torch(grouped, one, theirs)
    assert one.param_groups[0]["lr"] == 0.1 and not one.state
    adapter.load_optimizer_from_torch(grouped, one, theirs)
    assert [group.lr for group in grouped.groups] == [0.1, 0.1]


def test_biases_without_weight_decay() -> None:
    _, theirs, opt, _ = linears(decay_matrices_only=True)
    weights, biases = [[getattr(module, name) for module in theirs] for name in ("weight", "bias")]
    apart = torch.optim.AdamW([{"params": weights, "weight_decay": 0.3}, {"params": biases, "weight_decay": 0.0}])
    adapter.load_optimizer_from_torch(opt, apart, theirs)
    assert opt.weight_decay == 0.3 and opt.decay_matrices_only
    opt.weight_decay = 0.2
    adapter.copy_optimizer_to_torch(opt, apart, theirs)
    assert [group["weight_decay"] for group in apart.param_groups] == [0.2, 0.0]
    whole = torch.optim.AdamW([*weights, *biases], weight_decay=0.3)
    with pytest.raises(ValueError, match=r"0.bias: torch decays it, and decay_matrices_only=True excludes it"):
        adapter.load_optimizer_from_torch(opt, whole, theirs)
    with pytest.raises(
        ValueError, match=r"group 0 of torch: weight_decay is 0.2 for 0.weight and 0.0 for 0.bias; construct"
    ):
        adapter.copy_optimizer_to_torch(opt, whole, theirs)
    opt.decay_matrices_only = False
    with pytest.raises(
        ValueError, match=r"0.3 for 0.weight and 0.0 for 0.bias; .*, or construct .* decay_matrices_only=True"
    ):
        adapter.load_optimizer_from_torch(
            opt,
            torch.optim.AdamW([{"params": weights, "weight_decay": 0.3}, {"params": biases, "weight_decay": 0.0}]),
            theirs,
        )


def test_schedules() -> None:
    """torch's are outside of its optimizer: ours must go on from the number there, and becomes a number there."""
    ours, theirs, opt, their_opt = linears(lr=lambda step: 0.1 * 0.5 ** jnp.asarray(step, float))
    schedule = opt.state_dict()["hyperparameters"]["lr"]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(their_opt, 0.5)
    for _ in range(3):
        fill_gradients(theirs)
        their_opt.step()
        scheduler.step()
    adapter.load_optimizer_from_torch(opt, their_opt, theirs)
    assert opt.num_steps == 3 and opt.lr == 0.0125 and opt.state_dict()["hyperparameters"]["lr"] is schedule
    for module in ours:
        module.accumulate([jnp.ones_like(p) for p in module.parameters()])
    opt.step()
    adapter.copy_optimizer_to_torch(opt, their_opt, theirs)
    assert their_opt.param_groups[0]["lr"] == pytest.approx(0.00625)
    scheduler.step()  # though its optimizer has taken no step since
    with pytest.raises(
        ValueError, match=r"group 0: lr is 0.003\d* in torch, and the schedule here returns 0.006\d* after 4 steps"
    ):
        adapter.load_optimizer_from_torch(opt, their_opt, theirs)
    adapter.load_optimizer_from_torch(opt, their_opt, theirs, num_steps=5)
    assert opt.num_steps == 5 and opt.lr == pytest.approx(0.003125)
    sgd = optim.SGD(list(ours), lr=schedule)
    theirs_sgd = torch.optim.SGD([p for module in theirs for p in module.parameters()], lr=0.025)
    with pytest.raises(
        ValueError, match=r"returns 0.1.* after 0 steps: .*; or pass the number of torch's steps, num_steps="
    ):
        adapter.load_optimizer_from_torch(sgd, theirs_sgd, theirs)
    adapter.load_optimizer_from_torch(sgd, theirs_sgd, theirs, num_steps=2)
    assert sgd.num_steps == 2 and sgd.state_dict()["state"]["0.weight"]["step"] == 2


def test_sgd_counts_a_step_where_it_has_a_state() -> None:
    """So that dampening does not take its next step for the first one."""
    theirs, ours = torch.nn.Linear(2, 1), nn.Linear(2, 1)
    their_opt = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    opt = optim.SGD([ours], momentum=0.5)
    theirs.weight.grad = torch.ones(1, 2)
    their_opt.step()
    adapter.load_optimizer_from_torch(opt, their_opt, theirs)
    state = opt.state_dict()
    assert (state["state"]["0.weight"]["step"], state["state"]["0.bias"]["step"], state["num_steps"]) == (1, 0, 1)
    assert state["hyperparameters"]["dampening"] == 0.5
    adapter.load_optimizer_from_torch(opt, their_opt, theirs, num_steps=6)
    state = opt.state_dict()
    assert (state["state"]["0.weight"]["step"], state["state"]["0.bias"]["step"], state["num_steps"]) == (6, 0, 6)


def test_adafactors_epsilon() -> None:
    """None is torch's for the dtype, which is a number here; and a number that means None stays None there."""
    theirs, ours = torch.nn.Linear(2, 2), nn.Linear(2, 2)
    their_opt, opt = torch.optim.Adafactor(theirs.parameters()), optim.Adafactor([ours], eps=(1e-3, 1e-2))
    adapter.load_optimizer_from_torch(opt, their_opt, theirs)
    assert opt.eps == (torch.finfo(torch.float32).eps, 1e-3)
    adapter.copy_optimizer_to_torch(opt, their_opt, theirs)
    assert their_opt.param_groups[0]["eps"] == (None, 1e-3)
    muon, their_muon = (
        optim.Muon([nn.Linear(2, 2, bias=False)]),
        torch.optim.Muon([torch.nn.Parameter(torch.ones(2, 2))]),
    )
    holder = torch.nn.Linear(2, 2, bias=False)
    their_muon.param_groups[0]["params"] = [holder.weight]
    adapter.load_optimizer_from_torch(muon, their_muon, holder)
    adapter.copy_optimizer_to_torch(muon, their_muon, holder)
    assert muon.adjust_lr_fn == "original" and their_muon.param_groups[0]["adjust_lr_fn"] is None


def test_frozen_parameters() -> None:
    ours, theirs, opt, their_opt = linears()
    fill_gradients(theirs)
    their_opt.step()
    adapter.load_optimizer_from_torch(opt, their_opt, theirs)
    theirs[0].requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"0.weight: trained here, and frozen in torch; call freeze\(\) or unfreeze\(\) here"
    ):
        adapter.load_optimizer_from_torch(opt, their_opt, theirs)
    ours[0].freeze()
    adapter.load_optimizer_from_torch(opt, their_opt, theirs)  # what it has learnt is kept
    assert opt.state_dict()["state"]["0.weight"]["step"] == 1
    other = torch.optim.AdamW([p for module in theirs for p in module.parameters()])
    adapter.copy_optimizer_to_torch(opt, other, theirs)
    assert torch.equal(other.state[theirs[0].weight]["exp_avg"], their_opt.state[theirs[0].weight]["exp_avg"])
    anew = optim.AdamW(list(ours))
    with pytest.raises(
        ValueError, match=r"0.weight: the state has \['exp_avg', 'exp_avg_sq'\] in torch and nothing here. .*unf"
    ):
        adapter.load_optimizer_from_torch(anew, their_opt, theirs)
    never = torch.optim.AdamW(theirs[1].parameters())
    fill_gradients(theirs)
    never.step()
    adapter.load_optimizer_from_torch(anew, never, theirs)  # frozen, and in no group of torch's
    assert [anew.state_dict()["state"][path]["step"] for path in ("0.weight", "1.weight")] == [0, 1]
    adapter.copy_optimizer_to_torch(anew, never, theirs)
    ours[0].unfreeze()
    with pytest.raises(ValueError, match="0.bias: trained here, and in no group of its optimizer in torch"):
        adapter.load_optimizer_from_torch(anew, never, theirs)
    ours[0].freeze()
    theirs[0].requires_grad_(True)
    with pytest.raises(ValueError, match="0.bias: frozen here, and trained in torch"):
        adapter.load_optimizer_from_torch(opt, their_opt, theirs)


def test_tied_parameters() -> None:
    theirs = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    theirs[1].weight = theirs[0].weight
    ours = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    their_opt, opt = torch.optim.Adam(theirs.parameters()), optim.Adam([ours])
    fill_gradients([theirs])
    their_opt.step()
    with pytest.raises(ValueError, match="0.1.weight and 0.0.weight are one tensor in torch, and two here: tie them"):
        adapter.load_optimizer_from_torch(opt, their_opt, theirs)
    ours[1].tie("weight", ours[0], "weight")
    adapter.load_optimizer_from_torch(opt, their_opt, theirs)
    state = opt.state_dict()["state"]
    assert list(state) == ["0.0.weight", "0.0.bias", "0.1.bias"]
    np.testing.assert_array_equal(state["0.0.weight"]["exp_avg"], their_opt.state[theirs[0].weight]["exp_avg"].numpy())
    adapter.copy_optimizer_to_torch(opt, their_opt, theirs)
    theirs[1].weight = torch.nn.Parameter(torch.ones(2, 2))
    their_opt.add_param_group({"params": theirs[1].weight})
    with pytest.raises(
        ValueError, match="0.1.weight: torch's optimizer has it, and this one has no parameter of that name"
    ):
        adapter.load_optimizer_from_torch(opt, their_opt, theirs)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_parameters_of_fewer_bits(name: str) -> None:
    """The state has their dtype on both sides; with master weights it is float32 here, which torch lacks."""
    dtype = getattr(torch, name)
    theirs, ours = torch.nn.Linear(3, 2).to(dtype), nn.Linear(3, 2, dtype=jnp.dtype(name))
    their_opt, opt = torch.optim.NAdam(theirs.parameters()), optim.NAdam([ours])
    fill_gradients([theirs])
    their_opt.step()
    adapter.load_from_torch(ours, theirs)
    adapter.load_optimizer_from_torch(opt, their_opt, theirs)
    state, expected = opt.state_dict()["state"]["0.weight"], their_opt.state[theirs.weight]
    assert state["exp_avg"].dtype == jnp.dtype(name) and state["mu_product"].dtype == jnp.float32
    for field in ("exp_avg", "exp_avg_sq", "mu_product"):
        np.testing.assert_array_equal(np.asarray(state[field], np.float64), expected[field].double().numpy())
    other = torch.optim.NAdam(theirs.parameters())
    adapter.copy_optimizer_to_torch(opt, other, theirs)
    for field, value in other.state[theirs.weight].items():
        assert value.dtype == expected[field].dtype and torch.equal(value, expected[field]), field
    master = optim.NAdam([ours], master_weights=True)
    adapter.load_optimizer_from_torch(master, their_opt, theirs)
    state = master.state_dict()["state"]["0.weight"]
    np.testing.assert_array_equal(state["master_weight"], np.asarray(ours.weight, np.float32))
    assert state["exp_avg"].dtype == jnp.float32
    np.testing.assert_array_equal(state["exp_avg"], expected["exp_avg"].float().numpy())
    with pytest.raises(ValueError, match="group 0: master_weights, which torch lacks: train in float32 on both sides"):
        adapter.copy_optimizer_to_torch(master, other, theirs)
    master.master_weights = False
    with pytest.raises(ValueError, match=rf"0.weight.exp_avg: float32 here, and in torch .* dtype, {name}"):
        adapter.copy_optimizer_to_torch(master, other, theirs)


def test_what_torch_cannot_do() -> None:
    ours, theirs, opt, their_opt = linears(skip_nonfinite=True, track_grad_norm=True, master_weights=True)
    adapter.load_optimizer_from_torch(opt, their_opt, theirs)
    assert opt.skip_nonfinite and opt.track_grad_norm and opt.master_weights and opt.lr == 0.1
    with pytest.raises(
        ValueError, match="group 0: skip_nonfinite, which torch lacks: assign `opt.skip_nonfinite = False`"
    ):
        adapter.copy_optimizer_to_torch(opt, their_opt, theirs)
    opt.skip_nonfinite = False
    adapter.copy_optimizer_to_torch(opt, their_opt, theirs)


def test_a_state_of_another_structure() -> None:
    """Which follows from settings: those of torch, with the state of ours, would be another rule."""
    theirs, ours = torch.nn.Linear(3, 2), nn.Linear(3, 2)
    their_opt, opt = torch.optim.SGD(theirs.parameters(), momentum=0.9), optim.SGD([ours])
    message = (
        r"0.weight: the state has nothing in torch and nothing here. With torch's settings it should have"
        r" \['momentum_buffer'\]: construct this optimizer with the same settings"
    )
    with pytest.raises(ValueError, match=message):
        adapter.load_optimizer_from_torch(opt, their_opt, theirs)
    amsgrad, adam = torch.optim.Adam(theirs.parameters(), amsgrad=True), optim.Adam([ours])
    fill_gradients([theirs])
    amsgrad.step()
    with pytest.raises(
        ValueError, match=r"in torch and \['exp_avg', 'exp_avg_sq'\] here\. .*'max_exp_avg_sq'\]: construct"
    ):
        adapter.load_optimizer_from_torch(adam, amsgrad, theirs)
    amsgrad.param_groups[0]["amsgrad"] = False
    amsgrad.state[theirs.bias] = {**amsgrad.state[theirs.bias], "exp_avg": torch.zeros(3)}
    for state in amsgrad.state.values():
        del state["max_exp_avg_sq"]
    with pytest.raises(ValueError, match=r"0.bias.exp_avg: float32\[3\] in torch, float32\[2\] here"):
        adapter.load_optimizer_from_torch(adam, amsgrad, theirs)


DIFFER = "group 0 here: lr is 0.5 for 0.weight and 0.1 for 1.weight"
APART = f"{DIFFER}; put them in groups of their own, by their modules or names"


def test_one_error_lists_everything_and_nothing_is_loaded() -> None:
    ours, theirs, opt, their_opt = linears()
    theirs[0] = torch.nn.Linear(3, 3, bias=False)
    theirs[1].half().bias.requires_grad_(False)
    their_opt.add_param_group({"params": [theirs[0].weight], "lr": 0.5})
    their_opt.add_param_group({"params": torch.nn.Parameter(torch.ones(1))})
    their_opt.defaults["novelty"] = 1
    before = state_of(opt)
    lines = [
        "load_optimizer_from_torch: torch's AdamW does not fit; nothing was loaded:",
        "0.bias: torch's modules do not have this parameter",
        r"0.weight: float32\[3, 3\] in torch, float32\[2, 3\] here",
        r"1.bias: float16\[2\] in torch, float32\[2\] here: convert one of them, .*",
        "1.bias: trained here, and frozen in torch; .*",
        r"1.weight: float16\[2, 2\] in torch, float32\[2, 2\] here: convert one of them, .*",
        APART,
        "novelty: a setting of torch's AdamW that this optimizer does not have",
        "parameter 0 of group 0: torch's optimizer has it, and this one has no parameter of that name",
        "parameter 0 of group 2: torch's optimizer has it, and this one has no parameter of that name",
        "parameter 1 of group 0: torch's optimizer has it, and this one has no parameter of that name",
    ]
    with pytest.raises(ValueError, match=r"\n  ".join(lines) + "$"):
        adapter.load_optimizer_from_torch(opt, their_opt, theirs)
    assert_untouched(opt, before)
    lines[0] = "copy_optimizer_to_torch: this AdamW does not fit torch's; nothing was copied:"
    lines.remove(APART)
    with pytest.raises(ValueError, match=r"\n  ".join(lines) + "$"):
        adapter.copy_optimizer_to_torch(opt, their_opt, theirs)
    assert not their_opt.state and [group["lr"] for group in their_opt.param_groups] == [0.1, 0.5, 0.1]


def test_optimizers_that_are_refused() -> None:
    ours, theirs, opt, their_opt = linears()

    class Own(torch.optim.AdamW):
        pass

    parameters = [p for module in theirs for p in module.parameters()]
    for other in (torch.optim.SparseAdam(parameters), Own(parameters), torch.optim.Adam(parameters)):
        message = rf"the same name, one of SGD, Adam, .*, LBFGS; got a AdamW and a [\w.<>]*{type(other).__name__}$"
        with pytest.raises(TypeError, match=message):
            adapter.load_optimizer_from_torch(opt, other, theirs)
        with pytest.raises(TypeError, match=message):
            adapter.copy_optimizer_to_torch(opt, other, theirs)
    with pytest.raises(TypeError, match=r"got a Optimizer and a torch\.optim\.sgd\.SGD"):
        adapter.load_optimizer_from_torch(mt.Optimizer(ours), torch.optim.SGD(parameters), theirs)
    message = r"must be the 2 torch modules of opt.modules, in the same order; got \[{}\]"
    for modules, shown in (
        (theirs[0], "Linear"),
        ([*theirs, theirs[0]], "Linear, Linear, Linear"),
        (parameters[:2], "Par"),
    ):
        with pytest.raises(ValueError, match=message.format(shown)[: -2 if shown == "Par" else None]):
            adapter.load_optimizer_from_torch(opt, their_opt, modules)
    for number in (-1, True, 1.5):
        with pytest.raises(ValueError, match=f"num_steps must be an integer >= 0; got {number}"):
            adapter.load_optimizer_from_torch(opt, their_opt, theirs, num_steps=number)  # type: ignore[arg-type]

    class Mini:
        arrays, slopes = [np.ones(2)], [np.ones(2)]

        def parameters(self) -> Any:
            return self.arrays

        def grads(self) -> Any:
            return self.slopes

    with pytest.raises(TypeError, match="opt.modules holds a module of NumPy arrays; convert it with"):
        adapter.load_optimizer_from_torch(optim.AdamW([Mini()]), their_opt, theirs[:1])


def test_states_share_no_memory_and_stay_on_their_devices() -> None:
    there = jax.devices()[1]
    ours, theirs, _, their_opt = linears()
    opt = optim.AdamW([module.to(there) for module in ours])
    fill_gradients(theirs)
    their_opt.step()
    adapter.load_optimizer_from_torch(opt, their_opt, theirs)
    found = opt.state_dict()["state"]["0.weight"]["exp_avg"]
    before = np.array(found)
    assert found.devices() == {there}
    their_opt.step()
    np.testing.assert_array_equal(found, before)
    adapter.copy_optimizer_to_torch(opt, their_opt, theirs)
    for module in ours:
        module.accumulate([jnp.ones_like(p) for p in module.parameters()])
    opt.step()
    np.testing.assert_array_equal(their_opt.state[theirs[0].weight]["exp_avg"].numpy(), before)
    assert opt.state_dict()["state"]["0.weight"]["exp_avg"].devices() == {there}


def test_packed_parameters() -> None:
    """Which are updated as one array, and keep being so."""
    ours, theirs, opt, their_opt = linears()
    other, _, plain, _ = linears()
    mt.pack(*ours)
    fill_gradients(theirs)
    for mine in (ours, other):
        for module, torchs in zip(mine, theirs, strict=True):
            adapter.load_from_torch(module, torchs)
    their_opt.step()
    for mine, packed_or_not in ((ours, opt), (other, plain)):
        adapter.load_optimizer_from_torch(packed_or_not, their_opt, theirs)
        for module in mine:
            module.accumulate([jnp.full_like(p, 0.5) for p in module.parameters()])
        packed_or_not.step()
    assert opt.num_steps == plain.num_steps == 2
    assert all(cell.pack is not None for module in ours for cell in module._cells.values())
    for one, another in zip(ours, other, strict=True):
        np.testing.assert_allclose(one.weight, another.weight, rtol=1e-6)
    adapter.copy_optimizer_to_torch(opt, their_opt, theirs)
    expected = plain.state_dict()["state"]["1.bias"]["exp_avg"]
    np.testing.assert_allclose(their_opt.state[theirs[1].bias]["exp_avg"].numpy(), expected, rtol=1e-6)


def test_adagrad_begins_before_its_first_step() -> None:
    """With a sum that torch makes when it is constructed, from the value that its optimizer had then."""
    theirs, ours = torch.nn.Linear(3, 2), nn.Linear(3, 2)
    their_opt, opt = torch.optim.Adagrad(theirs.parameters()), optim.Adagrad([ours], initial_accumulator_value=0.5)
    adapter.copy_optimizer_to_torch(opt, their_opt, theirs)
    state = their_opt.state[theirs.bias]
    assert state["step"] == 0 and state["sum"].tolist() == [0.5, 0.5]
    adapter.load_optimizer_from_torch(opt := optim.Adagrad([ours]), their_opt, theirs)
    assert opt.num_steps == 0 and opt.initial_accumulator_value == 0.5
    np.testing.assert_array_equal(opt.state_dict()["state"]["0.bias"]["sum"], [0.5, 0.5])
