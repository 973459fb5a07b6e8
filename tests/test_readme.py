"""What the README shows is run: the first loop, and the errors that it quotes."""

import re
import tomllib
from importlib.metadata import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lazily import Lazily
from training import as_jax_comes

import minitorch_jax as mt

nnx, optax = Lazily("flax.nnx"), Lazily("optax")

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.fixture
def first(capsys):
    """The names that the first example leaves, run as pasted, and what it prints."""
    names = {"__name__": "__main__"}
    with as_jax_comes():
        exec(BLOCKS[0], names)
    return names | {"printed": capsys.readouterr().out}


def test_the_first_example_trains_as_pasted(first):
    start, end = map(float, re.search(r"loss ([\d.]+) to ([\d.]+)", first["printed"]).groups())
    assert end < 0.5 * start < 0.5
    assert float(re.search(r"([\d.]+)% of the points are right", first["printed"])[1]) > 95
    assert first["fast_step"].num_compiles == 1


def test_the_first_example_is_what_the_readme_says_a_module_is():
    assert "class Net(mt.Module):" in BLOCKS[0] and BLOCKS[0].startswith("import")


def test_the_specifications_loop_runs(first):
    names = first | {"modules": [first["model"]], "lr": 0.5}
    names["opt"].zero_grad()
    names["model"].grads()[1] = jnp.ones(64)
    before = np.array(names["model"].hidden.bias)
    exec(BLOCKS[1], names)
    np.testing.assert_allclose(names["model"].hidden.bias, before - 0.5, rtol=1e-6)


def quoted_errors():
    block = next(block for block in BLOCKS if block.startswith(">>>"))
    return re.findall(r">>> (.*)\n(\w+): (.*)\n", block)


@pytest.mark.parametrize("code, error, message", quoted_errors())
def test_the_errors_are_the_ones_quoted(code, error, message):
    names = {"x": jnp.ones((64, 2))}
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


@pytest.mark.parametrize("page", ["README.md", "docs/adapters.md", "docs/differences.md", "docs/releasing.md"])
def test_links_lead_somewhere(page):
    """To a file, and to a heading in it."""
    here = ROOT / page
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]+)?\)", here.read_text()):
        path = here.parent / target if target else here
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.M)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor[1:] in slugs, target + anchor


def test_install_lines_name_extras_that_are_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    section = README.partition("\n## Install\n")[2].partition("\n## ")[0]
    (listed,) = re.findall(r"library: (.*), or adapters for all", section)
    assert {*listed.split(", ")} == {need for need in re.findall(r"[a-z]+(?=[,\]])", extras["adapters"][0])}
    here = metadata("jax").get_all("Provides-Extra")
    assert {*re.findall(r"jax\[(\w+)\]", section)} <= set(here)
