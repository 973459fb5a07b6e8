"""What JAX does not document stands in one file, and the package does as well without it."""

from __future__ import annotations

import ast
import builtins
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.engine import call_and_store, derivatives, tracing
from minitorch_jax.runtime import jax_private

ROOT = Path(__file__).parents[1]
FILES = [*sorted((ROOT / "minitorch_jax").rglob("*.py")), *sorted((ROOT / "adapters").rglob("*.py"))]
# Modules of JAX, attributes and keys of its objects that its documentation does not name.
MODULES = ("jax._src", "jaxlib", "jax.interpreters")
ATTRIBUTES = {"ctx", "manager", "to_concrete_value", "trace_ctx", "get_opaque_trace_state", "_trace", "full_lower"}
ATTRIBUTES |= {"_clear_cache", "runtime_tokens"}
KEYS = {"inline", "donated_invars", "ctx_mesh"}


def private_names(tree: ast.AST) -> list[str]:
    """What of JAX's private names a file uses."""
    found, nodes = [], list(ast.walk(tree))
    imported = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    imported += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    knows_jax = any(name.partition(".")[0] == "jax" for name in imported)
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith(MODULES)]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [node.module] if (node.module or "").startswith(MODULES) else []
            found += [alias.name for alias in node.names if alias.name in ATTRIBUTES or alias.name == "_src"]
        elif isinstance(node, ast.Attribute) and (node.attr in ATTRIBUTES or node.attr == "_src"):
            found.append(node.attr)
        elif knows_jax and isinstance(node, ast.Constant) and node.value in KEYS | ATTRIBUTES:
            found.append(node.value)
    return found


def test_private_names_stand_in_one_file() -> None:
    found = {path: names for path in FILES if (names := private_names(ast.parse(path.read_text())))}
    assert set(found) == {Path(jax_private.__file__)}, found
    assert len(set(found[Path(jax_private.__file__)])) >= 6  # the scan sees something


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file as it is with a JAX that has none of its private names."""
    usual = builtins.__import__

    def importing(name: str, globals: Any = None, *args: Any) -> Any:
        if name.startswith("jax._src") and globals and globals.get("__name__") == "public_jax":
            raise ImportError(name)
        return usual(name, globals, *args)

    spec = importlib.util.spec_from_file_location("public_jax", jax_private.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(builtins, "__import__", importing)
    spec.loader.exec_module(module)
    monkeypatch.undo()
    return module


def test_calls_that_raised_by_public_names(public: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX takes its slow path then, and gives the same."""
    assert public.forget_effects is not jax_private.forget_effects
    public.forget_effects()
    public.forget_refusals(object())
    monkeypatch.setattr(call_and_store, "forget_effects", public.forget_effects)
    monkeypatch.setattr(call_and_store, "forget_refusals", lambda jitted: None)
    model = nn.Linear(2, 1, key=jax.random.key(0))
    opt = optim.SGD([model], lr=0.5)
    before = model.bias
    for _ in range(3):
        opt.zero_grad()
        mt.backward(lambda m: m(jnp.ones((1, 2))).sum(), model)
        opt.step()
    assert abs(float((before - model.bias)[0]) - 1.5) < 1e-6


def test_the_trace_state_by_public_names(public: ModuleType) -> None:
    assert public.at_top_level is not jax_private.at_top_level
    seen: list[tuple[bool, bool]] = []

    def look(x: Any) -> Any:
        seen.append((public.at_top_level(), jax_private.at_top_level()))
        return 2 * x

    look(1.0)
    jax.jit(look)(1.0)
    jax.grad(look)(1.0)
    jax.vmap(look)(jnp.ones(2))
    jax.lax.scan(lambda c, x: (look(c), x), 1.0, jnp.ones(2))
    with jax.disable_jit():
        jax.jit(look)(1.0)
        jax.grad(look)(1.0)
    assert seen[0] == (True, True) and (False, False) in seen and all(mine == other for mine, other in seen)


def test_the_debugging_switches_by_public_names(public: ModuleType) -> None:
    assert public.is_debugging is not jax_private.is_debugging
    for switch in (jax.debug_nans, jax.debug_infs):
        for on in (True, False):
            with switch(on):
                assert public.is_debugging() is jax_private.is_debugging() is on


def test_what_a_trace_depends_on_by_public_names(public: ModuleType) -> None:
    """Without the settings that a trace was made under, none is used again."""
    assert public.trace_context() != public.trace_context()
    here = jax_private.trace_context()
    with jax.default_matmul_precision("highest"):
        assert jax_private.trace_context() != here
    assert jax_private.trace_context() == here


def sines(x: Any) -> Any:
    for _ in range(5):
        x = jax.lax.sin(x)
    return x


@pytest.mark.parametrize("missing", ["context_of", "inlined"])
def test_equations_by_public_names(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a way to have like equations derived once, each is derived by itself."""
    derivatives._call.cache_clear()
    closed = jax.make_jaxpr(sines)(1.0)
    quick = derivatives.with_cached_derivatives(closed)
    assert {eqn.primitive.name for eqn in quick.eqns} != {"sin"}
    derivatives._call.cache_clear()
    monkeypatch.setattr(jax_private, missing, lambda _: None)
    slow = derivatives.with_cached_derivatives(closed)
    assert {eqn.primitive.name for eqn in slow.eqns} == {"sin"}
    for form in (jax.grad, jax.jit):
        mine, other = (form(lambda x, c=c: jaxpr_as_fun(c)(x)[0])(1.0) for c in (quick, slow))
        assert mine == other
    derivatives._call.cache_clear()


def test_equations_that_do_not_tell_have_no_context() -> None:
    class Bare:
        params: dict[str, Any] = {}

    assert jax_private.context_of(Bare()) is None and jax_private.inlined(Bare()) is None
    with jax_private.under(None):
        assert jax_private.value_of(Bare()) is None


class Half(mt.Module):
    """A network of which the loss uses one part only."""

    def __init__(self) -> None:
        self.used = nn.Linear(3, 2, key=jax.random.key(0))
        self.unused = nn.Linear(300, 200, key=jax.random.key(1))
        self.mask = mt.Buffer(np.ones((1, 2), np.float32))

    def forward(self, x: Any) -> Any:
        return jnp.sin(self.used(x)) * self.mask * np.array([[0.5, 1.5]], np.float32)


def test_a_program_is_one_call_of_its_first_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a way to say so, each of its equations is traced again; the results are the same."""
    found = []
    for keep_grads in (False, True):  # else the second would use the first one's program
        model = Half()
        opt = optim.SGD([model.used], lr=0.5, momentum=0.9)
        scale = jnp.float32(2.0)  # an input that the code names

        @mt.jit(keep_grads=keep_grads)
        def a_step(x: Any, model: Any = model, opt: Any = opt, scale: Any = scale) -> Any:
            opt.zero_grad()
            loss = mt.backward(lambda x: (model(x) * scale).sum(), x)
            opt.step()
            return loss, model.mask, x  # two of them unchanged

        x = jnp.linspace(-1, 1, 12).reshape(4, 3)
        text = a_step.lower(x).as_text()
        results = [a_step(x) for _ in range(3)]
        found.append((text, jax.tree.map(np.asarray, results), np.asarray(model.used.weight)))
        monkeypatch.setattr(tracing, "as_one_call", lambda *_: None)
    (one, *mine), (other, *theirs) = found
    assert "func.func private @a_step" in one and "func.func private @a_step" not in other
    assert one.count("stablehlo.sine") == other.count("stablehlo.sine") == 1
    assert "300" not in one  # what is not used is no constant of the program
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_calls_are_inlined_by_what_this_jax_calls_it() -> None:
    closed = jax.make_jaxpr(jax.jit(sines))(1.0)
    inlined = jax_private.with_equations(closed, [jax_private.inlined(call) for call in closed.eqns])
    again = jax.make_jaxpr(jaxpr_as_fun(inlined))(1.0)
    assert [eqn.primitive.name for eqn in again.eqns] == ["sin"] * 5


TRAIN = """
import builtins
usual = builtins.__import__
def importing(name, globals=None, *args):
    if name.startswith("jax._src") and globals and globals.get("__name__", "").startswith("minitorch_jax"):
        raise ImportError(name)
    return usual(name, globals, *args)
builtins.__import__ = importing
import jax, jax.numpy as jnp
import minitorch_jax as mt
from minitorch_jax import nn
from minitorch_jax.runtime import jax_private
assert jax_private.trace_context is object and jax_private.at_top_level is jax_private._at_top_level
jax_private.context_of = lambda eqn: None
model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
opt = mt.optim.SGD([model], lr=0.1)
@mt.jit
def step(x):
    opt.zero_grad()
    loss = mt.backward(lambda x: (model(x) ** 2).mean(), x)
    opt.step()
    return loss
x = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)
losses = [float(step(x)) for _ in range(3)]
assert step.num_compiles == 1 and losses[2] < losses[0], losses
opt.zero_grad()
mt.backward(lambda x: (model(x) ** 2).mean(), x)
opt.step()
print("trained")
"""


def test_the_package_trains_without_any_private_name() -> None:
    done = subprocess.run([sys.executable, "-c", TRAIN], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "trained\n", done.stderr[-2000:]
