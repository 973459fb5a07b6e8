"""What the README shows is run: the first loop, and the errors that it quotes."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lazily import Lazily

import minitorch_jax as mt

nnx, optax = Lazily("flax.nnx"), Lazily("optax")

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_the_first_loop_trains():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 64)).astype(np.float32)
    names = {"batches": [(x, np.arange(32) % 10)] * 20}
    first = BLOCKS[0].replace("    opt.step() ", "    losses.append(float(loss))\n    opt.step() ")
    names["losses"] = []
    exec(first, names)
    assert len(names["losses"]) == 20
    assert names["losses"][-1] < 0.5 * names["losses"][0]


def test_the_compiled_step_trains():
    names = {"batches": []}
    exec(BLOCKS[0], names)
    x, y = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32), np.arange(32) % 10
    losses = [float(names["train_step"](x, y)) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    assert names["train_step"].num_compiles == 1
    assert len(mt.scan(names["train_step"], np.stack([x] * 3), np.stack([y] * 3))) == 3


def test_the_specifications_loop_runs():
    names = {}
    exec(BLOCKS[0].partition("for x, y")[0], names)
    names |= {"modules": [names["model"]], "lr": 0.5}
    names["model"].grads()[1] = jnp.ones(128)
    before = np.array(names["model"][0].bias)
    exec(BLOCKS[1], names)
    np.testing.assert_allclose(names["model"][0].bias, before - 0.5, rtol=1e-6)


def quoted_errors():
    block = next(block for block in BLOCKS if block.startswith(">>>"))
    return re.findall(r">>> (.*)\n(\w+): (.*)\n", block)


@pytest.mark.parametrize("code, error, message", quoted_errors())
def test_the_errors_are_the_ones_quoted(code, error, message):
    names = {"x": jnp.ones((32, 64))}
    exec(BLOCKS[0].partition("for x, y")[0], names)
    with pytest.raises(Exception, match=re.escape(message)) as caught:
        eval(code, names)
    assert isinstance(caught.value, {"AttributeError": AttributeError, "TypeError": TypeError}.get(error, ValueError))


def test_four_errors_are_quoted():
    assert len(quoted_errors()) == 4


def test_the_layers_of_the_readme_are_there():
    block = next(block for block in BLOCKS if "TransformerEncoder" in block)
    names = {"mt": mt, "nn": mt.nn, "jnp": jnp}
    exec(block, names)
    assert names["encoder"].num_parameters() == 2 * 8544
    page = (Path(__file__).parents[1] / "docs" / "coverage.md").read_text(encoding="utf-8")
    here, all_of_them = re.search(r"(\d+) of (\d+)\.", page).groups()
    assert f"{here} of its {all_of_them} classes" in README


def test_the_checkpoint_of_the_readme_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"mt": mt, "model": mt.nn.Linear(2, 1)}
    names["opt"] = mt.optim.SGD([names["model"]], lr=0.1, momentum=0.9)
    exec(next(block for block in BLOCKS if "mt.save" in block), names)
    assert names["epoch"] == 3 and [path.name for path in tmp_path.iterdir()] == ["run.npz"]


def test_the_adapters_of_the_readme_train():
    net = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    names = {"nnx_module": net, "optax": optax}
    exec(next(block for block in BLOCKS if "OptaxOptimizer" in block), names)
    before = np.array(net.kernel[...])
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        mt.backward(lambda model, x: model(x).sum(), names["model"], jnp.ones((4, 3)))
        names["opt"].step()
    np.testing.assert_allclose(net.kernel[...], before - 1e-3, rtol=0, atol=2e-6)
