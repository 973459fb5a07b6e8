"""`compiler_options` of `mt.jit`, `mt.scan` and `model.compile()`: they reach XLA, compile once, and wrong ones are named."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import minitorch_jax as mt
from minitorch_jax import nn

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
UNFUSED = {"xla_disable_hlo_passes": "fusion"}
NONSENSE = {"xla_nonsense": True}


def make() -> tuple[Any, Any]:
    model = nn.Linear(3, 2, key=jax.random.key(0))
    return model, mt.Optimizer([model], lr=0.1)


def step_of(model: Any, opt: Any) -> Any:
    def step(x: Any) -> Any:
        opt.zero_grad()
        loss = mt.backward(lambda model, x: (model(x) ** 2).mean(), model, x)
        opt.step()
        return loss

    return step


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options with which programs are made from now on."""
    found: list[dict[str, Any]] = []
    jit = jax.jit

    def noting(*args: Any, compiler_options: Any = None, **kwargs: Any) -> Any:
        found.append(compiler_options or {})
        return jit(*args, compiler_options=compiler_options, **kwargs)

    monkeypatch.setattr(jax, "jit", noting)
    return found


def test_the_compiled_text_shows_them() -> None:
    def work(x: Any) -> Any:
        return jnp.tanh(x) * 2 + jnp.sin(x).sum()

    def operations(jitted: Any) -> str:
        return str(jitted.lower(X).compile().as_text())

    plain, unfused = mt.jit(work), mt.jit(work, compiler_options=UNFUSED)
    assert operations(plain) != operations(unfused) == operations(mt.jit(work, compiler_options=UNFUSED))
    expected = jax.jit(work, compiler_options=UNFUSED).lower(X).compile().as_text()
    assert operations(unfused).count("fusion(") == str(expected).count("fusion(")
    assert_allclose(plain(X), unfused(X), rtol=1e-6)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("way", ["jit", "decorator", "scan", "compile"])
def test_they_reach_xla_and_compile_once(way: str, seen: list[dict[str, Any]]) -> None:
    results = []
    for options in (None, UNFUSED):
        model, opt = make()
        step = step_of(model, opt)
        if way == "jit":
            call: Any = mt.jit(step, compiler_options=options)
        elif way == "decorator":
            call = mt.jit(compiler_options=options)(step)
        elif way == "scan":
            call = lambda x, step=step, options=options: mt.scan(step, x[None], compiler_options=options)[0]
        else:
            model.compile(compiler_options=options)
            call = model
        results.append([call(X)])
        made = len(seen)
        results[-1] += [call(X + 1), call(X + 2)]
        assert len(seen) == made
        assert (UNFUSED in seen) == (options is not None)
    assert_allclose(*results, rtol=1e-6)


def test_each_set_of_options_is_a_program_and_the_same_set_none() -> None:
    def work(x: Any) -> Any:
        return x + 1

    one, two = (mt.jit(work, compiler_options={"xla_cpu_enable_fast_math": on}) for on in (True, False))
    assert float(one(1.0)) == float(two(1.0)) == 2
    again = mt.jit(work, compiler_options={"xla_cpu_enable_fast_math": True})
    assert again._function is one._function is not two._function and one.num_compiles == 1


def test_a_methods_options() -> None:
    class Trainer:
        @mt.jit(compiler_options=NONSENSE)
        def run(self, x: Any) -> Any:
            return x

    with pytest.raises(ValueError, match="xla_nonsense"):
        Trainer().run(1.0)


def test_compiling_again_replaces_the_options() -> None:
    model, _ = make()
    model.compile(compiler_options=NONSENSE)
    with pytest.raises(ValueError, match="Linear: XLA refuses its compiler_options.*xla_nonsense"):
        model(X)
    model.compile()
    assert model(X).shape == (4, 2)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("options", [NONSENSE, {"xla_cpu_enable_fast_math": "perhaps"}])
@pytest.mark.parametrize("way", ["jit", "scan"])
def test_what_xla_refuses_is_named_and_changes_nothing(options: Any, way: str) -> None:
    model, opt = make()
    before = model.state_dict()
    step = step_of(model, opt)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"step: XLA refuses its compiler_options.*{next(iter(options))}"):
            if way == "jit":
                mt.jit(step, compiler_options=options)(X)
            else:
                mt.scan(step, X[None], compiler_options=options)
    for name, array in before.items():
        assert_array_equal(model.state_dict()[name], array)
    assert float(mt.jit(step)(X)) > 0


def test_an_error_of_a_program_with_options_stays_what_it_is() -> None:
    def fails(x: Any) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        mt.jit(fails, compiler_options=UNFUSED)(1.0)


WRONG = {
    "no dict": (["xla_x"], r"compiler_options must be a dict of XLA's options.*got \['xla_x'\] \(list\)"),
    "a number as a name": ({3: True}, "each of compiler_options is a name.*got 3: True"),
    "a list": ({"xla_disable_hlo_passes": ["fusion"]}, ".*written as one string, with commas"),
}


@pytest.mark.parametrize("where", ["mt.jit", "mt.scan", r"Linear.compile\(\)"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_options(where: str, case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises(TypeError, match=f"^{where}: {message}"):
        if where == "mt.jit":
            mt.jit(lambda x: x, compiler_options=options)
        elif where == "mt.scan":
            mt.scan(lambda x: x, X, compiler_options=options)
        else:
            make()[0].compile(compiler_options=options)


@pytest.mark.parametrize("outer", ["mt.jit", "jax.jit", "mt.scan", "mt.backward"])
def test_within_another_program_they_are_refused(outer: str) -> None:
    model, _ = make()
    inner = mt.jit(lambda x: (model(x) ** 2).sum(), compiler_options=UNFUSED)
    ways = {
        "mt.jit": lambda: mt.jit(lambda x: inner(x))(X),
        "jax.jit": lambda: jax.jit(lambda x: inner(x))(X),
        "mt.scan": lambda: mt.scan(inner, X),
        "mt.backward": lambda: mt.backward(inner, X),
    }
    with pytest.raises(ValueError, match=r"lambda> has compiler_options \(xla_disable_hlo_passes\).*outermost"):
        ways[outer]()
    with pytest.raises(ValueError, match=r"mt.scan has compiler_options"):
        mt.jit(lambda x: mt.scan(lambda x: x, x, compiler_options=UNFUSED))(X)
    with jax.disable_jit():
        assert mt.scan(inner, X).shape == (4,)
