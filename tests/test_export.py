"""`mt.export`: programs that run in another process, without this library; pure functions, and functions of a state."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.runtime.install import command

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)


def batches(*widths: int) -> list[Any]:
    """Shapes of batches of any one size."""
    (n,) = jax.export.symbolic_shape("n")
    return [jax.ShapeDtypeStruct((n, width), jnp.float32) for width in widths]


def make() -> Any:
    mt.seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


class Trainer:
    """A step that draws, changes statistics, and trains."""

    def __init__(self) -> None:
        self.model = make()
        self.opt = optim.SGD([self.model], lr=0.1, momentum=0.9)

    def step(self, x: Any, y: Any) -> Any:
        model, opt = self.model, self.opt
        opt.zero_grad()
        loss = mt.backward(lambda x, y: ((model(x) - y) ** 2).mean(), x, y)
        opt.step()
        return loss


def step_of(trainer: Trainer) -> Any:
    model, opt = trainer.model, trainer.opt

    def step(x: Any, y: Any) -> Any:
        opt.zero_grad()
        loss = mt.backward(lambda model, x: ((model(x) - y) ** 2).mean(), model, x)
        opt.step()
        return {"loss": loss, "mean": x.mean()}

    return step


# -- pure functions -----------------------------------------------------------------------------------------------------


def test_a_model_of_any_batch_size_keeps_its_parameters() -> None:
    model = make().eval()
    exported = mt.export(model, *batches(3), platforms=("cpu", "cuda"))
    expected = np.array(mt.jit(model)(X))
    model[0].weight = 2 * model[0].weight
    assert isinstance(exported, jax.export.Exported) and exported.platforms == ("cpu", "cuda")
    assert exported.fun_name == "Sequential" and exported.in_avals[0].shape[1:] == (3,)
    assert_allclose(exported.call(X), expected, rtol=1e-6)
    assert exported.call(X[:1]).shape == (1, 2)
    assert_allclose(
        jax.jit(exported.call, compiler_options={"xla_cpu_enable_fast_math": False})(X), expected, rtol=1e-6
    )


def test_a_compiled_model_and_a_method_are_exported_too() -> None:
    model = make().eval()
    expected = np.array(model(X))
    model.compile()
    scaled = mt.jit(lambda scale, times, x: model(x) * scale * times, static_argnums=1)
    for exported, args in (
        (mt.export(model, X), (X,)),
        (mt.export(mt.jit(model), X), (X,)),
        (mt.export(model.forward, X), (X,)),
        (mt.export(scaled, 1.0, 1, X), (1.0, X)),
        (mt.export(mt.jit(lambda x, *, unused: model(x), static_argnames="unused"), X, unused=3), (X,)),
    ):
        assert_allclose(exported.call(*args), expected, rtol=1e-5, atol=1e-6)


def test_arguments_without_arrays_become_part_of_the_program() -> None:
    shift = jnp.ones(())

    def predict(model: Any, mode: str, batch: Any, *, key: Any, training: bool) -> Any:
        assert mode == "mean" and training
        with mt.rng(key):
            return model(batch["x"]).mean() + shift, training

    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    args = (model, "mean", {"x": batches(3)[0], "name": "digits"})
    exported = mt.export(predict, *args, key=jax.random.key(0), training=True)
    out, training = exported.call({"x": X, "name": None}, key=jax.random.key(3))
    expected, _ = predict(model, "mean", {"x": X}, key=jax.random.key(3), training=True)
    assert_allclose(out, expected, rtol=1e-5)
    assert bool(training)


def test_nothing_changes_and_nothing_is_left_behind() -> None:
    trainer = Trainer()
    state, key = trainer.opt.state_dict(), jax.random.key_data(mt.next_key())
    mt.seed(0), make()
    mt.export(step_of(trainer), X, X[:, :2], with_state=True)
    assert_array_equal(jax.random.key_data(mt.next_key()), key)
    assert str(trainer.opt.state_dict()) == str(state)
    assert not any(grad.any() for grad in trainer.model.grads())


# -- functions of a state -----------------------------------------------------------------------------------------------


@pytest.mark.one_in(9)
@pytest.mark.parametrize("form", ["function", "jit", "method"])
def test_a_step_is_a_function_of_its_state(form: str) -> None:
    trainer = Trainer()
    step = {"function": step_of(trainer), "jit": mt.jit(step_of(trainer)), "method": trainer.step}[form]
    exported, start = mt.export(step, *batches(3, 2), with_state=True)
    state, losses = start, []
    for size in (4, 4, 3):
        result, state = exported.call(state, X[:size], X[:size, :2])
        losses.append(float(result if form == "method" else result["loss"]))
    expected = [step(X[:size], X[:size, :2]) for size in (4, 4, 3)]
    assert_allclose(losses, [float(loss if form == "method" else loss["loss"]) for loss in expected], rtol=1e-5)
    assert state.keys() == start.keys() and "random_stream" in state
    assert {name: (array.shape, array.dtype) for name, array in state.items()} == {
        name: (array.shape, array.dtype) for name, array in start.items()
    }
    prefix = "self.model." if form == "method" else "model."
    mine = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
    assert mine.keys() == trainer.model.state_dict().keys() and mine["1.num_batches_tracked"].dtype == jnp.int32
    twin = make()
    twin.load_state_dict(mine)
    for name, array in trainer.model.state_dict().items():
        assert_allclose(twin.state_dict()[name], array, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_module_that_trains_its_statistics_and_gradients_that_stay() -> None:
    model, twin = make(), make()
    mt.seed(3)
    exported, state = mt.export(model, X, with_state=True)
    assert {*model.state_dict(), "random_stream"} == state.keys()
    out, state = exported.call(state, X)
    mt.seed(3)
    assert_allclose(out, twin(X), rtol=1e-5, atol=1e-6)
    assert int(state["1.num_batches_tracked"]) == 1

    layer = nn.Linear(3, 1)
    exported, state = mt.export(lambda x: mt.backward(lambda x: layer(x).sum(), x), X, with_state=True)
    for _ in range(2):
        _, state = exported.call(state, X)
    assert_allclose(state["layer.weight's gradient"][0], 2 * X.sum(0), rtol=1e-5, atol=1e-6)


# -- another process ----------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
import jax, numpy as np
folder = sys.argv[1]
x, y = np.load(folder + "/x.npy"), np.load(folder + "/y.npy")
read = lambda name: jax.export.deserialize(bytearray(open(f"{folder}/{name}", "rb").read()))
np.save(folder + "/out.npy", read("model").call(x))
state, step = dict(np.load(folder + "/state.npz")), read("step")
for _ in range(3):
    result, state = step.call(state, x, y)
np.savez(folder + "/result.npz", loss=result["loss"], **state)
assert not any("minitorch" in name for name in sys.modules)
"""


def test_another_process_runs_the_file_without_the_code(tmp_path: Path) -> None:
    needs_flatbuffers()
    trainer = Trainer()
    model = make().eval()
    exported = mt.export(model, *batches(3))
    step, state = mt.export(step_of(trainer), X, X[:, :2], with_state=True)
    (tmp_path / "model").write_bytes(exported.serialize())
    (tmp_path / "step").write_bytes(step.serialize())
    np.save(tmp_path / "x.npy", X), np.save(tmp_path / "y.npy", X[:, :2])
    np.savez(tmp_path / "state.npz", **{name: np.array(array) for name, array in state.items()})
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_array_equal(np.load(tmp_path / "out.npy"), exported.call(X))
    for _ in range(3):
        result, state = step.call(state, X, X[:, :2])
    found = dict(np.load(tmp_path / "result.npz"))
    assert_array_equal(found.pop("loss"), result["loss"])
    assert found.keys() == state.keys()
    for name, array in state.items():
        assert_array_equal(found[name], array, err_msg=name)


def needs_flatbuffers() -> None:
    pytest.importorskip("flatbuffers", reason="needs flatbuffers")


# -- errors -------------------------------------------------------------------------------------------------------------


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    monkeypatch.delitem(sys.modules, "jax._src.export.serialization", raising=False)
    exported = mt.export(nn.Linear(3, 2), X)
    with pytest.raises(ImportError, match=re.escape(f"Install it {command('export')}")):
        exported.serialize()


def test_a_function_that_changes_state_is_refused() -> None:
    trainer = Trainer()
    with pytest.raises(
        ValueError, match=r"Sequential changes 1.running_mean,.*model.eval\(\).*Sequential, ..., with_state"
    ):
        mt.export(trainer.model, X)
    with pytest.raises(ValueError, match=r"step changes model.0.weight, .* more.*with_state=True"):
        mt.export(step_of(trainer), X, X[:, :2])
    with pytest.raises(
        ValueError, match=r"Dropout draws random numbers. Call `model.eval\(\)` first, or give.*mt.rng\(key"
    ):
        mt.export(nn.Dropout(0.5), X)


def test_what_cannot_be_exported_is_named() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"named returns 'text' \(str\). Leave it out"):
        mt.export(named, X)
    with pytest.raises(TypeError, match="returns .*Linear"):
        mt.export(lambda x: model, X)
    with pytest.raises(TypeError, match="mt.export takes a function"):
        mt.export(X)
    with pytest.raises(ValueError, match="weight has none: it is a model of shapes"):
        mt.export(jax.eval_shape(lambda: nn.Linear(3, 2, key=jax.random.key(0))), X)
    with pytest.raises(mt.TraceError, match="mt.export was called in code that is traced"):
        mt.jit(lambda x: mt.export(model, x))(X)
    opt = mt.Optimizer([model], lr=lambda step: 0.1)

    def step(x: Any) -> None:
        opt.lr = 0.5
        mt.backward(lambda x: model(x).sum(), x)
        opt.step()

    with pytest.raises(mt.TraceError, match="step gives an optimizer another kind of setting"):
        mt.export(step, X, with_state=True)


def named(x: Any) -> Any:
    return x, "text"
