"""Declared hyperparameters: what a class says once, and what follows; the old way beside it; contracts over all rules."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable
from dataclasses import KW_ONLY
from types import SimpleNamespace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optimizers import OPTIMIZERS, matrix, stepped

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.optim.declaration import BELOW_ONE, FINITE, LARGEST, OPTIONS

PARAMETERS = {name: inspect.signature(cls).parameters for name, cls in OPTIMIZERS.items()}
OWN = {name: [p for p in found if p not in ("modules", *OPTIONS)] for name, found in PARAMETERS.items()}
NUMBERS = [
    (name, own)
    for name, found in PARAMETERS.items()
    for own in OWN[name]
    if isinstance(found[own].default, int | float | tuple) and not isinstance(found[own].default, bool)
]


class Signum(optim.Optimizer):
    """Steps along the sign of momentum.

    Source: nowhere.
    """

    elementwise = True
    momentum: float = 0.9

    @staticmethod
    def init_state(p: Any, h: Any) -> Any:
        return {"m": jnp.zeros_like(p)}

    @staticmethod
    def update(p: Any, g: Any, s: Any, h: Any) -> Any:
        m = h.momentum * s["m"] + h.one_minus.momentum * g
        return p - h.lr * jnp.sign(m), {"m": m}


class Many(optim.Optimizer):
    """Of every kind."""

    lr: optim.Rate = optim.setting(default=0.5, doc="how fast")
    betas: tuple[float, float] = optim.setting(default=(0.9, 0.99), within=BELOW_ONE, doc="(β₁, β₂), each")
    rounds: int = optim.setting(default=3, within=(1, 9), doc="k; not too many")
    how: str | None = None
    twice: bool = optim.setting(default=False, doc="take two", kw_only=True)
    fixed: float = optim.setting(default=2.0, init=False)
    KINDS: ClassVar[int] = 6
    _private: int = 7


# -- what follows from a declaration ----------------------------------------------------------------------------------


def test_a_short_rule_has_a_constructor_checks_and_a_docstring() -> None:
    opt = Signum([matrix()], 0.1, 0.5, skip_nonfinite=True)
    assert repr(opt) == "Signum([Linear], lr=0.1, momentum=0.5, skip_nonfinite=True)"
    assert str(inspect.signature(Signum)).replace("'", "") == (
        "(modules: Any, lr: float | Callable[[Any], Any] = 0.01, momentum: float = 0.9, **options: Any) -> None"
    )
    assert inspect.getdoc(Signum) == (
        "Steps along the sign of momentum.\n\nArgs:\n    modules: a list of modules; see `Optimizer`.\n"
        "    lr: learning rate, >= 0, or a schedule.\n    momentum: >= 0.\n    **options: `skip_nonfinite`,"
        " `track_grad_norm`, `decay_matrices_only`, `master_weights`, `state_dtype`; see\n"
        "        `Optimizer`.\n\nSource: nowhere."
    )
    with pytest.raises(ValueError, match=r"Signum: momentum must be a finite number >= 0; got -1"):
        Signum([matrix()], momentum=-1)
    before = opt.modules[0].weight
    stepped(opt)
    np.testing.assert_allclose(jnp.abs(opt.modules[0].weight - before), 0.1, rtol=1e-5)
    opt.momentum = 0.25
    assert opt.momentum == 0.25 and {"momentum", "lr", "skip_nonfinite"} <= set(dir(opt))


def test_settings_of_every_kind() -> None:
    opt = Many([matrix()], betas=[0.5, 0.5], rounds=4, how="so", twice=True)
    assert (opt.lr, opt.betas, opt.rounds, opt.how, opt.twice, opt.fixed) == (0.5, (0.5, 0.5), 4, "so", True, 2.0)
    assert isinstance(opt.rounds, int) and Many.KINDS == opt.KINDS == 6 and Many._private == 7
    opt.fixed = 3.0
    assert opt.fixed == 3.0
    kinds = {p.name: p.kind.name for p in inspect.signature(Many).parameters.values()}
    assert kinds.pop("twice") == "KEYWORD_ONLY" and kinds.pop("options") == "VAR_KEYWORD"
    assert [*kinds] == ["modules", "lr", "betas", "rounds", "how"] and {*kinds.values()} == {"POSITIONAL_OR_KEYWORD"}
    for line in (
        "lr: how fast, >= 0, or a schedule.",
        "betas: (β₁, β₂), each in [0, 1).",
        "rounds: k, a whole number in [1, 9]; not too many.",
        "twice: take two.",
    ):
        assert f"    {line}\n" in inspect.getdoc(Many)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"betas": (0.9, 1.0)}, ValueError, r"Many: betas must be a finite number in \[0, 0.99999994\]; got \(0.9, 1"),
        ({"betas": (0.9,)}, ValueError, r"Many: betas must be a tuple of 2 numbers; got \(0.9,\)"),
        ({"rounds": 10}, ValueError, r"Many: rounds must be a finite number in \[1, 9\]; got 10"),
        ({"twice": 2}, ValueError, r"Many: twice must be a bool; got 2"),
        ({"fixed": 2.0}, TypeError, r"Many\(\) got an unexpected keyword argument 'fixed'"),
        ({"round": 2}, TypeError, r"Many\(\) got an unexpected keyword argument 'round'; did you mean `rounds`"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Many([matrix()], **settings)


def test_arguments_that_python_itself_refuses() -> None:
    with pytest.raises(TypeError, match=r"Signum\(\): missing a required argument: 'modules'"):
        Signum()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"Signum\(\): too many positional arguments"):
        Signum([matrix()], 0.1, 0.9, 1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"Signum\(\): multiple values for argument 'lr'"):
        Signum([matrix()], 0.1, lr=0.1)  # type: ignore[misc]


def test_copies_and_groups_of_a_declared_rule() -> None:
    opt = Signum([{"modules": [matrix()], "momentum": 0.5}, {"modules": [matrix(2.0)]}], lr=0.1)
    stepped(opt)
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)), jax.tree.map(jnp.copy, opt)):
        assert type(other) is Signum and [group.momentum for group in other.groups] == [0.5, 0.9]
        stepped(other)


# -- other defaults, and the old way ----------------------------------------------------------------------------------


def test_a_subclass_may_state_another_default() -> None:
    class Fast(optim.SGD):
        lr = 0.5
        momentum: float = 0.8

    opt = Fast([matrix()])
    assert (opt.lr, opt.momentum, opt.dampening) == (0.5, 0.8, 0)
    assert [*inspect.signature(Fast).parameters] == [*inspect.signature(optim.SGD).parameters]
    with pytest.raises(ValueError, match="Fast: momentum must be a finite number >= 0"):
        Fast([matrix()], momentum=-1)


def test_a_type_alone_leaves_the_default_and_a_constant_stays_one() -> None:
    class Typed(optim.SGD):
        momentum: float
        elementwise: bool = False

    opt = Typed([matrix()])
    assert opt.momentum == 0 and Typed.elementwise is False and "elementwise" not in inspect.signature(Typed).parameters


def test_constructors_of_two_bases_all_run() -> None:
    ran = []

    class ByHand(optim.SGD):
        def __init__(self, modules: Any, lr: Any = 0.1, **options: Any) -> None:
            ran.append("by hand")
            super().__init__(modules, lr, **options)

    class Declared(optim.SGD):
        sigma: float = 0.5

    class Both(Declared, ByHand):
        pass

    assert (Both([matrix()], momentum=0.25).momentum, ran) == (0.25, ["by hand"])


def test_a_subclass_may_add_a_setting_to_a_rule() -> None:
    class Noted(optim.SGD):
        _: KW_ONLY
        note: str = "none"

    opt = Noted([matrix()], 0.1, 0.9, note="mine")
    assert (opt.momentum, opt.note) == (0.9, "mine")
    stepped(opt)
    with pytest.raises(TypeError, match="too many positional"):
        Noted([matrix()], 0.1, 0.9, 0, 0, False, "mine")  # type: ignore[misc]


def test_constructors_by_hand_go_on_passing_hyperparameters_by_keyword() -> None:
    class ByHand(mt.Optimizer):
        scale: float = 3.0  # a constant of the class: next to `__init__` nothing is declared

        def __init__(self, modules: Any, lr: Any = 0.1, rho: float = 0.9, *, loud: bool = False, **options: Any):
            assert not loud
            super().__init__(modules, lr, rho=rho, **options)

    class OfOurs(optim.SGD):
        def __init__(self, modules: Any, lr: Any = 0.1, extra: float = 1.0, **options: Any) -> None:
            super().__init__(modules, lr, 0.75, extra=extra, **options)

    opt = ByHand([matrix()], 0.2, 0.5, skip_nonfinite=True)
    assert (opt.lr, opt.rho, opt.skip_nonfinite, opt.scale) == (0.2, 0.5, True, 3.0) and "loud" not in opt.groups[
        0
    ].keys()
    ours = OfOurs([matrix()], extra=4.0, nesterov=True)
    assert (ours.lr, ours.momentum, ours.nesterov, ours.extra) == (0.1, 0.75, True, 4.0)
    stepped(ours)
    with pytest.raises(
        TypeError, match=r"ByHand\(\) got an unexpected keyword argument 'skip_nonfinit'.*`skip_nonfinite`"
    ):
        ByHand([matrix()], skip_nonfinit=True)

    class Declared(ByHand):
        sigma: float = 0.5

    both = Declared([matrix()], 0.2, 0.5, 0.25)
    assert (both.lr, both.rho, both.sigma) == (0.2, 0.5, 0.25)
    with pytest.raises(AssertionError):  # the constructor written by hand runs, too
        Declared([matrix()], loud=True)


def test_what_cannot_be_declared() -> None:
    with pytest.raises(TypeError, match=r"Bad.rho is declared without a default. Give it one, `rho: float = ...`"):
        type("Bad", (optim.Optimizer,), {"__annotations__": {"rho": "float"}})
    for name in ("step", "groups", "t", "one_minus"):
        with pytest.raises(TypeError, match=rf"Bad.{name}: a rule has a `{name}` already; choose another name"):
            type("Bad", (optim.Optimizer,), {"__annotations__": {name: "float"}, name: 0.5})
    with pytest.raises(TypeError, match=r"Bad.rho needs a type, such as `rho: float = setting\(...\)`"):
        type("Bad", (optim.Optimizer,), {"rho": optim.setting(default=0.5)})


# -- contracts over every optimizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "Optimizer"])
def test_the_docstring_lists_what_the_constructor_takes(name: str) -> None:
    text = inspect.getdoc(OPTIMIZERS[name])
    args = text[text.index("Args:\n") : text.index("\nRaises:")]
    assert re.findall(r"^    \*{0,2}(\w+): ", args, flags=re.M) == [*PARAMETERS[name]]
    assert [*PARAMETERS[name]][:2] == ["modules", "lr"]


@pytest.mark.parametrize(("name", "setting"), NUMBERS)
def test_every_number_has_its_range(name: str, setting: str) -> None:
    """Which the message states, at construction and in an assignment; and whose ends are legal, but for other conditions."""
    cls, default = OPTIMIZERS[name], PARAMETERS[name][setting].default
    low, high = cls._settings[setting].within
    wrong = [*([low - 1] if low > FINITE[0] else []), *([high * 1.5 + 1] if high < FINITE[1] else [])] or [np.inf]
    opt = cls([matrix()])
    before = getattr(opt, setting)
    for bad in wrong:
        value = (bad, *default[1:]) if isinstance(default, tuple) else bad
        message = (
            rf"{name}: {setting} must be a finite number, ?.*; got" if setting == "lr" else f"{name}: {setting} must be"
        )
        with pytest.raises(ValueError, match=message):
            cls([matrix()], **{setting: value})
        with pytest.raises(ValueError, match=message):
            setattr(opt, setting, value)
        assert getattr(opt, setting) == before
    assert FINITE[0] <= low < high <= LARGEST


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_every_optimizer_raises(name: str) -> None:
    """The errors that `Optimizer` promises, of which each rule says `as Optimizer`."""
    cls, layer = OPTIMIZERS[name], matrix()
    for modules, error, message in (
        ([], ValueError, "modules is empty"),
        ([layer, layer], ValueError, "the same parameter is reached twice"),
        ([nn.ReLU()], ValueError, "hold no parameters"),
        (layer, TypeError, "modules must be a list of modules"),
        (3, TypeError, "modules must be a list of modules; got 3"),
        ([object()], TypeError, r"has no `parameters\(\)` and `grads\(\)`"),
    ):
        with pytest.raises(error, match=message):
            cls(modules)


def _numpy_module() -> Any:
    array, gradient = np.ones(2, np.float32), np.zeros(2, np.float32)
    return SimpleNamespace(parameters=lambda: [array], grads=lambda: [gradient])


def _step_compiled() -> None:
    opt = optim.LBFGS([matrix()])
    mt.jit(lambda: opt.step(lambda: None))()


PROMISED: dict[str, dict[str, list[tuple[Callable[[], Any], type[Exception], str]]]] = {
    "SGD": {
        "for nesterov without momentum or with dampening": [
            (lambda: optim.SGD([matrix()], nesterov=True), ValueError, "nesterov needs a momentum > 0"),
            (lambda: optim.SGD([matrix()], momentum=0.9, dampening=0.1, nesterov=True), ValueError, "zero dampening"),
        ]
    },
    "Muon": {
        "for a trainable parameter that is no matrix and in no such group": [
            (
                lambda: optim.Muon([nn.Linear(2, 1)]),
                ValueError,
                r"Muon takes parameters of two axes only, and not 0\.bias \(float32\[1\]\)",
            )
        ]
    },
    "LBFGS": {
        "for groups, modules of NumPy arrays, and options of other optimizers (`skip_nonfinite`, `track_grad_norm`, …),"
        " which do not apply here": [
            (lambda: optim.LBFGS([{"modules": [matrix()]}]), ValueError, "groups"),
            (lambda: optim.LBFGS([_numpy_module()]), TypeError, "trains Modules only"),
            (lambda: optim.LBFGS([matrix()], skip_nonfinite=True), TypeError, "unexpected keyword argument 'skip_n"),
            (lambda: setattr(optim.LBFGS([matrix()]), "track_grad_norm", True), ValueError, "does not apply"),
        ],
        "by `step` in compiled code, since what the closure gives decides, in Python, how to go on": [
            (_step_compiled, mt.TraceError, "inside compiled code")
        ],
    },
}


def promises(name: str) -> set[str]:
    """What the docstring says of errors, apart from those that another class has, too."""
    text = re.search(r"^Raises:\n(.*?)\n\n", inspect.getdoc(OPTIMIZERS[name]), flags=re.S | re.M)[1]
    entries = re.findall(r"^    [\w, ]+: (.*?)\.$(?=\n    \w|\Z)", text, flags=re.S | re.M)
    assert entries
    parts = [part.strip() for entry in entries for part in " ".join(entry.split()).split(";")]
    return {part for part in parts if not re.fullmatch(r"as `\w+`", part)}


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "Optimizer"])  # (its own: see above)
def test_what_a_docstring_promises_is_raised(name: str) -> None:
    promised = PROMISED.get(name, {})
    assert promises(name) == set(promised)
    for call, error, message in [case for cases in promised.values() for case in cases]:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.one_in(9)
@pytest.mark.parametrize("change", [{"momentum": 0.9}, {"centered": True}, {"momentum": 0.9, "centered": True}])
def test_momentum_and_centered_of_rmsprop_may_begin_later(change: dict[str, Any]) -> None:
    """Where torch has no state for them and fails with a KeyError; their averages begin at zero, as at construction."""
    late, plain = optim.RMSprop([matrix()]), optim.RMSprop([matrix()])
    stepped(late)
    stepped(plain)
    for name, value in change.items():
        setattr(late, name, value)
    stepped(late)
    (state,), (before,) = (opt.state_dict()["state"].values() for opt in (late, plain))
    assert {"momentum": "momentum_buffer" in state, "centered": "grad_avg" in state} == {
        name: name in change for name in ("momentum", "centered")
    }
    model = plain.modules[0]
    g = jax.grad(lambda model: ((model(jnp.ones((3, 2))) - 1) ** 2).mean())(model).weight
    h = SimpleNamespace(
        **{name: plain._hyper.given.get(name) for name in plain._hyper.given},
        maximize=False,
        centered="centered" in change,
        one_minus=SimpleNamespace(alpha=1 - plain.alpha),
    )
    h.momentum = change.get("momentum", 0)
    begun = optim.RMSprop.init_state(model.weight, h)._replace(square_avg=before["square_avg"])
    expected, _ = optim.RMSprop.update(model.weight, g, begun, h)
    np.testing.assert_allclose(late.modules[0].weight, expected, rtol=1e-5)
