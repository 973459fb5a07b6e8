"""What an error shows that leaves this package: the user's lines, the module's path, the user's names."""

from __future__ import annotations

import builtins
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.nn import functional as F
from minitorch_jax.runtime import tracebacks

X = jnp.ones((4, 3))


class Inner(mt.Module):
    def __init__(self) -> None:
        self.proj = nn.Linear(3, 3, key=jax.random.key(0))

    def forward(self, x: Any) -> Any:
        return self.proj(x) * undefined  # type: ignore[name-defined]  # noqa: F821


class Middle(mt.Module):
    def __init__(self) -> None:
        self.inner = Inner()

    def forward(self, x: Any) -> Any:
        return self.inner(x)


class Outer(mt.Module):
    def __init__(self) -> None:
        self.blocks = [nn.ReLU(), Middle()]

    def forward(self, x: Any) -> Any:
        return self.blocks[1](x)


def plain_inner(x: Any) -> Any:
    return x * undefined  # type: ignore[name-defined]  # noqa: F821


def plain_middle(x: Any) -> Any:
    return plain_inner(x)


def plain_outer(x: Any) -> Any:
    return plain_middle(x)


def plain_loss(x: Any) -> Any:
    return plain_outer(x).sum()


def loss(model: Any, x: Any) -> Any:
    return model(x).sum()


def shown(run: Callable[[], Any]) -> list[str]:
    """The lines that Python prints for the error of a call, without those that mark a part of the line above."""
    with pytest.raises(Exception) as raised:  # noqa: PT011
        run()
    lines = "".join(traceback.format_exception(raised.value)).splitlines()
    return [line for line in lines if line.strip(" ~^")]


MODEL = Outer()
FORMS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {  # ours, and JAX's own
    "eager": (lambda: loss(MODEL, X), lambda: jax.jit(plain_loss)(X)),
    "mt.jit": (lambda: mt.jit(loss)(MODEL, X), lambda: jax.jit(plain_loss)(X)),
    "lower": (lambda: mt.jit(loss).lower(MODEL, X), lambda: jax.jit(plain_loss).lower(X)),
    "mt.backward": (lambda: mt.backward(loss, MODEL, X), lambda: jax.grad(plain_loss)(X)),
    "value_and_grad": (lambda: mt.value_and_grad(loss)(MODEL, X), lambda: jax.value_and_grad(plain_loss)(X)),
    "grad": (lambda: mt.grad(loss)(MODEL, X), lambda: jax.grad(plain_loss)(X)),
    "mt.scan": (lambda: mt.scan(loss, MODEL, X[None]), lambda: jax.lax.map(plain_loss, X[None])),
    "jax.jit": (lambda: jax.jit(lambda x: loss(MODEL, x))(X), lambda: jax.jit(lambda x: plain_loss(x))(X)),
    "backward in jit": (
        lambda: mt.jit(lambda m, x: mt.backward(loss, m, x))(MODEL, X),
        lambda: jax.jit(lambda x: jax.grad(plain_loss)(x))(X),
    ),
    "backward in scan": (
        lambda: mt.scan(lambda m, x: mt.backward(loss, m, x), MODEL, X[None]),
        lambda: jax.lax.map(lambda x: jax.grad(plain_loss)(x), X[None]),
    ),
    "LossScaler": (lambda: mt.LossScaler().backward(loss, MODEL, X), lambda: jax.grad(plain_loss)(X)),
    "LBFGS": (
        lambda: optim.LBFGS([MODEL]).step(lambda: mt.backward(loss, MODEL, X)),
        lambda: jax.jit(lambda x: jax.grad(plain_loss)(x))(X),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_an_error_of_the_users_shows_as_many_lines_as_in_jax(form: str) -> None:
    """Two more at most: the module's path is one of them."""
    ours, theirs = map(shown, FORMS[form])
    assert len(ours) <= len(theirs) + 2, "\n".join(ours)
    text = "\n".join(ours)
    assert "minitorch_jax/" not in text and "jax/_src" not in text
    assert "NameError: name 'undefined'" in text and text.count("JAX_TRACEBACK_FILTERING") == 1
    for line in ("self.blocks[1](x)", "self.inner(x)", "self.proj(x) * undefined", "model(x).sum()"):
        assert text.count(line) == 1


def test_the_second_error_of_a_model_shows_the_same() -> None:
    step = mt.jit(loss)
    first, second = shown(lambda: step(MODEL, X)), shown(lambda: step(MODEL, X))
    assert first[1:] and len(first) == len(second)


OF_OURS: dict[str, Callable[[], Any]] = {
    "layer": lambda: nn.Linear(3, 3)(jnp.ones((4, 2))),
    "function": lambda: F.linear(X, jnp.ones((3, 3), jnp.bfloat16)),
    "backward": lambda: mt.backward(lambda m, x: m(x), nn.Linear(3, 3), X),
    "no function": lambda: mt.backward(X),  # type: ignore[arg-type]
    "scan": lambda: mt.scan(lambda x: x, X, length=5),
    "step": lambda: optim.SGD([nn.Linear(3, 3)]).step(1),  # type: ignore[arg-type]
    "summary": lambda: mt.summary(X),  # type: ignore[arg-type]
    "scaler": lambda: mt.LossScaler().step(),
}


@pytest.mark.parametrize("kind", OF_OURS)
def test_an_error_of_ours_shows_the_users_line_last(kind: str) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        OF_OURS[kind]()
    last = traceback.extract_tb(raised.value.__traceback__)[-1]
    assert last.filename == __file__ and last.name == "<lambda>"
    assert tracebacks.NOTE in raised.value.__notes__ or "JAX_TRACEBACK_FILTERING" in str(raised.value.__notes__)


def files_of(error: BaseException) -> list[str]:
    return [entry.filename for entry in traceback.extract_tb(error.__traceback__)]


@pytest.mark.parametrize("form", ["eager", "mt.jit", "mt.backward"])
def test_jaxs_setting_says_what_is_left_out(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = jax.config.jax_traceback_filtering
    try:
        jax.config.update("jax_traceback_filtering", "off")
        with pytest.raises(NameError) as raised:
            FORMS[form][0]()
        assert any("minitorch_jax/module/module.py" in file for file in files_of(raised.value))
        assert not any("JAX_TRACEBACK" in note for note in raised.value.__notes__)

        jax.config.update("jax_traceback_filtering", "tracebackhide")
        with pytest.raises(NameError) as raised:
            FORMS[form][0]()
        entries = [frame for frame, _ in traceback.walk_tb(raised.value.__traceback__)]
        hidden = {frame.f_code.co_filename: "__tracebackhide__" in frame.f_locals for frame in entries}
        assert any("minitorch_jax/module/module.py" in file for file in hidden)
        assert all(hidden[file] for file in hidden if "minitorch_jax/" in file) and not hidden[__file__]

        jax.config.update("jax_traceback_filtering", "remove_frames")
        with pytest.raises(NameError) as raised:
            FORMS[form][0]()
        assert not any("minitorch_jax/" in file for file in files_of(raised.value))
        cause = raised.value.__cause__
        assert cause is not None and any("minitorch_jax/" in file for file in files_of(cause))

        jax.config.update("jax_traceback_filtering", "auto")
        monkeypatch.setattr(builtins, "get_ipython", lambda: None, raising=False)
        assert tracebacks._mode() == "tracebackhide"
    finally:
        jax.config.update("jax_traceback_filtering", before)


def test_a_ctrl_c_is_left_as_it_is() -> None:
    class Interrupted(mt.Module):
        def forward(self, x: Any) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        Interrupted()(X)
    assert not hasattr(raised.value, "__notes__")
    assert any("minitorch_jax/" in file for file in files_of(raised.value))


# -- the module's path ----------------------------------------------------------------------------------------------------


class Attention(mt.Module):
    def __init__(self, size: int) -> None:
        self.size, self.proj = size, nn.Linear(8, 8, key=jax.random.key(0))

    def forward(self, x: Any) -> Any:
        return self.proj(x[:, : self.size])


class Block(mt.Module):
    def __init__(self, size: int) -> None:
        self.attn = Attention(size)

    def forward(self, x: Any) -> Any:
        return x + self.attn(x)


class Deep(mt.Module):
    def __init__(self) -> None:
        self.blocks = nn.ModuleList([Block(8), Block(8), Block(8), Block(7)])

    def forward(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return x


WIDE = jnp.ones((2, 8))
CALLS: dict[str, Callable[[Any], Any]] = {
    "eager": lambda model: model(WIDE),
    "backward": lambda model: mt.backward(loss, model, WIDE),
    "jit": lambda model: mt.jit(loss)(model, WIDE),
    "closure": lambda model: mt.jit(lambda x: model(x))(WIDE),
    "scan": lambda model: mt.scan(loss, model, WIDE[None]),
    "backward in jit": lambda model: mt.jit(lambda m, x: mt.backward(loss, m, x))(model, WIDE),
    "jax.grad": lambda model: jax.grad(loss)(model, WIDE),
    "vmap": lambda model: jax.vmap(model)(WIDE[None]),
    "summary": lambda model: mt.summary(model, WIDE),
    "disable_jit": lambda model: without_jit(model),
}


def without_jit(model: Any) -> Any:
    with jax.disable_jit():
        return mt.backward(loss, model, WIDE)


def notes_of(error: BaseException) -> list[str]:
    return [note for note in error.__notes__ if note.startswith("while calling")]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("call", CALLS)
def test_an_error_names_the_path_of_the_module(call: str) -> None:
    with pytest.raises(ValueError, match="takes inputs of shape") as raised:
        CALLS[call](Deep())
    assert notes_of(raised.value) == ["while calling blocks.3.attn.proj: Linear(8, 8), given float32[2, 7]"]


def test_the_path_begins_at_the_outermost_module_that_was_called() -> None:
    model, alone = Deep(), nn.Linear(8, 8)
    for call, expected in {
        lambda: model.blocks[3](WIDE): "attn.proj: Linear(8, 8), given float32[2, 7]",
        lambda: alone(X): "Linear(8, 8), given float32[4, 3]",
        lambda: nn.Sequential(nn.ReLU(), alone)(X): "1: Linear(8, 8), given float32[4, 3]",
    }.items():
        with pytest.raises(ValueError, match="takes inputs") as raised:
            call()
        assert notes_of(raised.value) == [f"while calling {expected}"]


def test_a_module_that_the_outer_one_does_not_hold_begins_a_path_of_its_own() -> None:
    hidden = nn.Sequential(nn.Linear(8, 8))

    class Calls(mt.Module):
        def forward(self, x: Any) -> Any:
            return hidden(x)

    with pytest.raises(ValueError, match="takes inputs") as raised:
        nn.Sequential(Calls())(X)
    assert notes_of(raised.value) == ["while calling 0: Linear(8, 8), given float32[4, 3]"]


def test_an_error_of_the_users_module_has_one_note_and_keeps_its_own() -> None:
    class Raises(mt.Module):
        def __init__(self, *sizes: int, first: Any) -> None:
            self.first = first

        def forward(self, x: Any, *, other: Any = None) -> Any:
            error = KeyError("no")
            error.add_note("mine")
            raise error

    model = nn.Sequential(nn.Sequential(Raises(first=1)))
    with pytest.raises(KeyError) as raised:
        model(X)
    assert raised.value.__notes__[:2] == ["mine", "while calling 0.0: Raises, given float32[4, 3]"]
    with pytest.raises(KeyError) as raised:
        model[0][0](X, other=WIDE)
    assert notes_of(raised.value) == ["while calling Raises, given float32[4, 3], float32[2, 8]"]


# -- the user's names in JAX's messages -----------------------------------------------------------------------------------

NET = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
OPT = optim.Adam([NET])


def is_positive(model: Any, batch: Any, *rest: Any, flag: bool = False, **named: Any) -> Any:
    look = {"batch": lambda: batch["a"][0], "rest": lambda: rest[1], "named": lambda: named["z"]}[named["which"]]
    return X.sum() if look().sum() > 0 else model(X).sum()


class Trainer:
    def __init__(self) -> None:
        self.net = NET

    def step(self, x: Any) -> Any:
        return x if self.net[1].bias.sum() > 0 else -x

    def __call__(self, x: Any) -> Any:
        return x if x.sum() > 0 else -x


class Branches(mt.Module):
    def forward(self, given: Any) -> Any:
        return given.sum() if given[0, 0] > 0 else -given.sum()


def pick(model: Any, x: Any, y: Any) -> Any:
    return x if (x + y).sum() > 0 else y


def by_shape(x: Any) -> Any:
    return x if len(x) == 4 or x.sum() > 0 else -x


def drawn(model: Any) -> Any:
    return model[0].weight if jax.random.normal(mt.next_key()) > 0 else 0.0


def all_of(which: str, make: Callable[..., Any]) -> Any:
    return make(is_positive)(NET, {"a": [X]}, X, X, which=which, z=X)


def again() -> None:
    compiled = mt.jit(by_shape)
    compiled(X)
    compiled(X[:2])


def accumulated() -> Any:
    mt.backward(loss, NET, X)
    return mt.jit(lambda m: X if m.grads()[0].sum() > 0 else -X)(NET)


USES_MODEL = lambda x: x if NET[0].weight.sum() > 0 else -x  # noqa: E731
NAMES: dict[str, tuple[Callable[[], Any], str, str]] = {  # the call, the function and the argument in the message
    "dict": (lambda: all_of("batch", mt.jit), "is_positive", r"batch\['a'\]\[0\]"),
    "*rest": (lambda: all_of("rest", mt.jit), "is_positive", r"rest\[1\]"),
    "**named": (lambda: all_of("named", mt.jit), "is_positive", "z"),
    "donated": (
        lambda: all_of("rest", lambda fn: mt.jit(fn, donate_argnums=1, static_argnames="flag")),
        "is_positive",
        r"rest\[1\]",
    ),
    "backward": (lambda: all_of("batch", lambda fn: partial(mt.backward, fn)), "is_positive", r"batch\['a'\]\[0\]"),
    "grad": (lambda: all_of("batch", mt.grad), "is_positive", r"batch\['a'\]\[0\]"),
    "two": (lambda: mt.jit(pick)(NET, X, X), "pick", "x and y"),
    "scan": (lambda: mt.scan(pick, NET, X[None], X[None]), "pick", "x and y"),
    "partial": (lambda: mt.jit(partial(pick, NET))(X, X), "pick", "x and y"),
    "again": (again, "by_shape", "x"),
    "method": (lambda: mt.jit(Trainer().step)(X), "step", r"self\.net\.1\.bias"),
    "object": (lambda: mt.jit(Trainer())(X), "__call__", "x"),
    "module": (lambda: mt.backward(Branches(), X), "forward", "given"),
    "module's jit": (lambda: mt.jit(Branches())(X), "forward", "given"),
    "closure": (lambda: mt.jit(USES_MODEL)(X), "<lambda>", r"NET\.0\.weight"),
    "in jit": (
        lambda: mt.jit(lambda x: mt.backward(lambda x: USES_MODEL(x).sum(), x))(X),
        "<lambda>",
        r"\w+\.0\.weight",
    ),
    "both": (lambda: mt.jit(lambda pair: X if pair[1].sum() > 0 else pair[0](X))((NET, X)), "<lambda>", r"pair\[1\]"),
    "optimizer": (
        lambda: mt.jit(lambda opt: X if opt.modules[0][0].weight.sum() > 0 else -X)(OPT),
        "<lambda>",
        r"opt\.modules\.0\.0\.weight",
    ),
    "gradient": (accumulated, "<lambda>", r"m\.0\.weight's gradient"),
    "stream": (lambda: mt.jit(drawn)(NET), "drawn", "random_stream"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_an_array_used_as_a_python_value_is_named_as_the_user_names_it(kind: str) -> None:
    call, function, argument = NAMES[kind]
    place = rf"the function {function} at {__file__}:\d+ for jit"
    with pytest.raises(
        jax.errors.TracerBoolConversionError, match=rf"{place}.* of the arguments? {argument}(\.|$|\n)"
    ) as raised:
        call()
    assert "minitorch_jax/" not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize(
    ("use", "error"),
    [
        (lambda x: [1, 2, 3][x], jax.errors.TracerIntegerConversionError),
        (lambda x: float(x), jax.errors.ConcretizationTypeError),
        (lambda x: range(int(x)), jax.errors.ConcretizationTypeError),
    ],
)
def test_other_uses_of_a_value_are_named_too(use: Callable[[Any], Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"(?s)the function <lambda> at {__file__}.*of the argument x\."):
        mt.jit(use)(1)


def test_what_cannot_be_named_is_no_error() -> None:
    class Strange:
        @property
        def __signature__(self) -> Any:
            raise RuntimeError("not to be asked")

        def __call__(self, x: Any) -> Any:
            return 2 * x

    assert mt.jit(Strange())(X).shape == X.shape
    assert mt.jit(jnp.sum)(X) == 12 and mt.jit(abs)(-1) == 1


# -- what is no array -----------------------------------------------------------------------------------------------------

NO_ARRAYS = {"list": [[1.0, 2.0, 3.0]], "tuple": (1.0, 2.0, 3.0), "float": 1.5, "int": 3}
LAYERS = {
    "Linear": (lambda: nn.Linear(3, 2), r"Linear\(3, 2\)"),
    "LSTM": (lambda: nn.LSTM(3, 2), r"LSTM\(3, 2\)"),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), r"BatchNorm1d\(3\)"),
    "in Sequential": (lambda: nn.Sequential(nn.Linear(3, 2)), r"Linear\(3, 2\)"),
}


@pytest.mark.parametrize("kind", NO_ARRAYS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_that_is_given_no_array_names_the_line_to_write(layer: str, kind: str) -> None:
    make, name = LAYERS[layer]
    value: Any = NO_ARRAYS[kind]
    with pytest.raises(TypeError, match=rf"{name} takes an array; it was given an? {kind}: write `jnp\.asarray\(x\)`"):
        make()(value)
    if kind in ("list", "tuple"):
        for call in (lambda: mt.backward(loss, make(), value), lambda: mt.jit(loss)(make(), value)):
            with pytest.raises(TypeError, match=rf"{name} takes an array; it was given a {kind}: write `jnp\.asarray"):
                call()


def test_an_error_of_a_layer_that_was_given_an_array_stays() -> None:
    with pytest.raises(ValueError, match="takes inputs of shape"):
        nn.Linear(3, 2)(jnp.ones((1, 4)))
    with pytest.raises(TypeError, match="takes an array; it was given a NoneType(?!:)"):
        nn.Linear(3, 2)(None)  # type: ignore[arg-type]


# -- arrays that are not declared -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda a: a, lambda a: [a], lambda a: {"k": a}])
def test_the_error_for_a_bare_array_has_a_public_name(wrap: Callable[[Any], Any]) -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(mt.UndeclaredArrayError, match="Linear.scale was given a bare array|Linear.scale.*a bare array"):
        layer.scale = wrap(X)
    assert issubclass(mt.UndeclaredArrayError, AttributeError) and issubclass(mt.UndeclaredArrayError, TypeError)
    assert mt.UndeclaredArrayError.__doc__ and not hasattr(layer, "scale")


# -- arrays of other libraries --------------------------------------------------------------------------------------------


class Foreign:
    """An array of another library, as NumPy sees it."""

    shape, dtype = (4, 3), "float32"

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.ones((4, 3), np.float32)


TAKE_ARRAYS: dict[str, Callable[[Any], Any]] = {
    "module": lambda x: NET(x),
    "function": lambda x: F.relu(x),
    "backward": lambda x: mt.backward(loss, NET, x),
    "jit": lambda x: mt.jit(loss)(NET, x),
    "scan": lambda x: mt.scan(loss, NET, x),
    "grad": lambda x: mt.grad(loss)(NET, x),
}


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: {"x": x}], ids=["bare", "list", "dict"])
@pytest.mark.parametrize("take", TAKE_ARRAYS)
def test_an_array_of_another_library_is_refused_in_every_call(take: str, wrap: Callable[[Any], Any]) -> None:
    with pytest.raises(
        TypeError, match=r"an argument is a \w+\.Foreign, float32\[4, 3\], .*: write `jnp\.asarray\(np\.asarray\(x\)\)`"
    ):
        TAKE_ARRAYS[take](wrap(Foreign()))


@pytest.mark.parametrize("take", TAKE_ARRAYS)
def test_a_torch_tensor_is_refused_with_the_line_to_write(take: str) -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(
        TypeError, match=r"an argument is a torch\.Tensor, float32\[4, 3\], .*: write `jnp\.asarray\(x\.numpy\(\)\)`"
    ):
        TAKE_ARRAYS[take](torch.ones(4, 3))
    for tensor in (torch.ones(4, 3, requires_grad=True), torch.ones(4, 3, dtype=torch.bfloat16)):
        with pytest.raises(TypeError, match=r"a torch Tensor, .*NumPy cannot read.*: write `from_torch\(tensor\)`"):
            TAKE_ARRAYS[take](tensor)
    assert TAKE_ARRAYS[take](jnp.asarray(torch.ones(4, 3).numpy())) is not None


def _untied() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    a.weight = b.weight


def _step_without_gradients() -> None:
    optim.SGD([nn.Linear(2, 2)], lr=0.1).step()


def _recompiled() -> None:
    @mt.jit
    def double(x: Any) -> Any:
        return 2 * x

    for n in range(8):
        double(jnp.ones(n + 1))


class _Drops(mt.Module):
    """Warns within a module's `forward`."""

    def forward(self, x: Any) -> Any:
        return F.softmax(x)


WARNINGS: dict[str, Callable[[], Any]] = {
    "a loss": lambda: F.mse_loss(jnp.ones((3, 1)), jnp.ones(3)),
    "a loss, called by its layer": lambda: nn.L1Loss()(jnp.ones((3, 1)), jnp.ones(3)),
    "a loss under autocast": lambda: mt.autocast(jnp.bfloat16)(lambda: F.mse_loss(jnp.ones((3, 1)), jnp.ones(3)))(),
    "a loss in a compiled function": lambda: mt.jit(lambda x: F.mse_loss(x, jnp.ones(3)))(jnp.ones((3, 1))),
    "a loss under jax.vmap": lambda: jax.vmap(lambda x: F.mse_loss(x, jnp.ones(3)))(jnp.ones((2, 3, 1))),
    "softmax": lambda: F.softmax(jnp.ones(3)),
    "softmax in a module": lambda: _Drops()(jnp.ones(3)),
    "a layer is made": lambda: nn.LSTM(2, 2, dropout=0.5),
    "arrays that are not tied": _untied,
    "a step without gradients": _step_without_gradients,
    "many programs": _recompiled,
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("what", list(WARNINGS))
def test_a_warning_points_to_a_line_of_the_users(what):
    with pytest.warns() as found:
        WARNINGS[what]()
    assert {warning.filename for warning in found} == {__file__}


def test_all_warnings_are_given_by_one_function():
    package = Path(mt.__file__).parent
    others = [path for path in package.rglob("*.py") if "warnings.warn(" in path.read_text(encoding="utf-8")]
    assert [path.name for path in others] == ["tracebacks.py"]
