"""The pages on migrating: both programs of each do the same from the same weights, print what is shown, and all steps run."""

import contextlib
import gc
import inspect
import io
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lazily import Lazily
from numpy.testing import assert_allclose, assert_array_equal
from oracle import HAS_TORCH, NEEDS_TORCH
from oracle import actual as torch
from training import as_jax_comes

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.adapters.numpy import wrap

eqx, nnx, optax = Lazily("equinox"), Lazily("flax.nnx"), Lazily("optax")
of_torch = pytest.mark.skipif(not HAS_TORCH, reason=NEEDS_TORCH)

DOCS = Path(__file__).parents[1] / "docs"
ORIGINS = ("numpy", "pytorch", "flax", "equinox")
DROPPED = np.random.default_rng(0).random((8, 4, 4)) < 0.2  # by channel and place, the same in each image


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.S | re.M)


class Page:
    """The code of a page: the data, both programs as model and training, the steps."""

    def __init__(self, origin: str) -> None:
        self.origin, self.name = origin, f"migrating/{origin}.md"
        self.text = (DOCS / self.name).read_text()
        programs, steps = self.text.split("\n## What differs\n")
        (data,), self.there, self.here = map(blocks, re.split(r"\n### (?:In .*|Here)\n", programs))
        self.there[0], self.here[0] = data + self.there[0], data + self.here[0]
        steps, _, self.styles = steps.partition("\n## Networks in other styles\n")
        self.steps = blocks(steps)

    def run(self, code: str, names: dict[str, Any]) -> str:
        """Run code as a reader would; gives what it prints."""
        printed = io.StringIO()
        with as_jax_comes():
            with contextlib.redirect_stdout(printed):
                exec(compile(code, self.name, "exec"), names)
        return printed.getvalue()

    def function(self, name: str) -> Callable[..., Any]:
        """A function that a step defines at its beginning."""
        step = next(step for step in self.steps if step.startswith(f"def {name}("))
        names: dict[str, Any] = {}
        self.run(step.partition("\n\n\n")[0], names)
        return names[name]


@contextlib.contextmanager
def dropping(channels_last: bool = False) -> Iterator[None]:
    """Dropout that draws the same in all libraries and layouts."""
    kept = ~(DROPPED.transpose(1, 2, 0) if channels_last else DROPPED).reshape(-1)

    def bernoulli(key: Any, p: Any, shape: Any, **_: Any) -> Any:
        return jnp.asarray(np.broadcast_to(kept, shape))

    def dropout(x: Any, p: float, training: bool, inplace: bool) -> Any:
        return x * torch.from_numpy(kept) / (1 - p) if training else x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "bernoulli", bernoulli)
        patch.setattr(torch.nn.functional, "dropout", dropout)
        yield


def weights(page: Page, there: dict[str, Any]) -> dict[str, Any]:
    """The first program's weights by the second one's names, moved as the page does it."""
    if page.origin == "numpy":
        pairs = [(number, there["layers"][number]) for number in (0, 2)]
        found = {
            f"{n}.{name}": value for n, layer in pairs for name, value in (("weight", layer.W.T), ("bias", layer.b))
        }
    elif page.origin == "pytorch":
        found = {name: tensor.numpy() for name, tensor in there["model"].state_dict().items()}
    elif page.origin == "flax":
        found = page.function("from_flax")(there["model"])
    else:
        found = page.function("from_equinox")(there["model"], there["state"])
    return {name: np.array(value) for name, value in found.items()}


class Run:
    """Both programs, from the same weights: what they printed, and the names that they left."""

    def __init__(self, origin: str) -> None:
        self.page = page = Page(origin)
        self.there: dict[str, Any] = {"__name__": "__main__"}
        self.here: dict[str, Any] = {"__name__": "__main__"}
        page.run(page.there[0], self.there)
        page.run(page.here[0], self.here)
        self.start = {name: value for name, value in weights(page, self.there).items() if name in LEARNT}
        self.here["model"].load_state_dict(self.start, strict=False)
        with dropping(channels_last=origin == "flax"):
            shown_there = page.run(page.there[1], self.there)
        with dropping():
            self.shown = shown_there, page.run(page.here[1], self.here)
        self.weights = weights(page, self.there), self.here["model"].state_dict()


LEARNT = {f"{layer}.{name}" for layer in ("0", "2", "conv", "norm", "out") for name in ("weight", "bias")}
CARRIED = {  # what the steps use of the first program, by the name that the page gives it
    "numpy": {"layers": "layers", "criterion": "criterion", "forward": "forward"},
    "pytorch": {"torch_model": "model", "torch_opt": "opt"},
    "flax": {"FlaxNet": "Net"},
    "equinox": {"EqxNet": "Net", "batched": "batched", "tx": "tx"},
}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation() -> Iterator[None]:
    """Programs that compile in less time."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(
    scope="module", params=[name if name == "numpy" else pytest.param(name, marks=pytest.mark.slow) for name in ORIGINS]
)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Both programs of a page; the working folder stays theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp(request.param))
        yield Run(request.param)


@pytest.fixture(scope="module")
def stepped(ran: Run) -> dict[str, Any]:
    """The names after all steps of a page; before that, what the programs left."""
    names = ran.here  # not a copy: functions of the program find what the steps rebind
    names.update({name: ran.there[theirs] for name, theirs in CARRIED[ran.page.origin].items()})
    with dropping(channels_last=ran.page.origin == "flax"):
        for step in ran.page.steps:
            ran.page.run(step, names)
            names.setdefault("all_losses", []).append(names["losses"])
    return names


@pytest.mark.slow
def test_both_programs_do_the_same(ran: Run) -> None:
    there, here = np.array(ran.there["losses"]), np.array(ran.here["losses"])
    assert there.shape == here.shape == (90,) and here[-30:].mean() < 0.3 * here[:30].mean()
    assert_allclose(here, there, rtol=2e-5, atol=2e-5)
    theirs, ours = ran.weights
    assert ran.start.keys() == theirs.keys() & LEARNT
    for name, start in ran.start.items():
        assert np.abs(theirs[name] - start).max() > 1e-3, name
        assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_running_statistics_differ_as_the_tables_say(ran: Run) -> None:
    theirs, ours = ran.weights
    if "norm.running_var" not in ours:
        pytest.skip("the program has none")
    n, rest = 50 * 4 * 4, 0.9**90
    unbiased = 1 if ran.page.origin == "pytorch" else n / (n - 1)
    mean, var = theirs["norm.running_mean"], theirs["norm.running_var"]
    if ran.page.origin == "equinox":  # which divides by this
        mean, var = (1 - rest) * mean, (1 - rest) * var
    assert_allclose(ours["norm.running_mean"], mean, rtol=1e-5, atol=5e-6)
    assert_allclose(ours["norm.running_var"] - rest, (var - rest) * unbiased, rtol=1e-4)  # both begin from 1


def test_the_output_shown_is_what_both_print(ran: Run) -> None:
    there, here = ran.shown
    assert there == here and there.count("\n") == 3
    assert f"both print\n\n```\n{here}```\n" in ran.page.text


def test_what_was_saved_loads_into_a_fresh_program(ran: Run) -> None:
    fresh: dict[str, Any] = {"__name__": "__main__"}
    ran.page.run(ran.page.here[0], fresh)
    (load,) = re.findall(r"^mt\.load.*$", ran.page.here[1], flags=re.M)
    ran.page.run(load, fresh)
    assert fresh["opt"].num_steps == 90
    for name, value in fresh["model"].state_dict().items():
        assert_array_equal(value, ran.weights[1][name], err_msg=name)


@pytest.mark.parametrize(
    "ran",
    [pytest.param(name, marks=pytest.mark.slow) for name in ORIGINS],
    indirect=True,
)
def test_the_steps_do_what_they_say(ran: Run, stepped: dict[str, Any]) -> None:
    """Each step has run; those whose result can be told have the values of the first program."""
    theirs, moved = ran.weights[0], {name: np.array(v) for name, v in stepped["model"].state_dict().items()}
    if ran.page.origin == "numpy":
        assert stepped["report"].wrong == [] and {layer.state for layer in stepped["report"].layers} == {"right"}
        assert 0 < np.abs(stepped["layers"][0].W - theirs["0.weight"].T).max() < 0.00101  # a step of Adam's, of lr
        assert np.isfinite(stepped["losses"]).all() and stepped["losses"].mean() < 0.5
    elif ran.page.origin == "pytorch":
        for name, tensor in stepped["torch_model"].state_dict().items():  # it has them back
            assert_array_equal(tensor, moved[name], err_msg=name)
        assert stepped["torch_opt"].state[stepped["torch_model"].out.bias]["step"] == 120
        assert np.abs(moved["out.weight"] - theirs["out.weight"]).max() > 1e-3
    else:  # the module and the transformation as they were, in our loop: the first epoch
        assert_allclose(stepped["all_losses"][0], ran.there["losses"][:30], rtol=2e-5, atol=2e-5)


STYLES = re.split(r"^### (.*)\n", Page("numpy").styles, flags=re.M)  # what they share; then a title and a text for each


@pytest.mark.parametrize(
    "text", [pytest.param(text, id=title) for title, text in zip(STYLES[1::2], STYLES[2::2], strict=True)]
)
def test_a_style_trains_as_before(text: str) -> None:
    """From the same weights, the author's own update and an optimizer that got the result of `wrap` end alike."""
    shared, before, after = re.split(r"^(?:Before|After):$", text, flags=re.M)
    losses, found = [], []
    for loop in (before, after):
        names: dict[str, Any] = {"__name__": "__main__"}
        for code in blocks(STYLES[0] + shared):
            Page("numpy").run(code, names)
        network = wrap(names.get("net") or [names["first"], names["last"]])
        for code in blocks(loop):
            Page("numpy").run(code, names)
        loss = names["loss"]
        losses.append(loss if isinstance(loss, float) else loss.data)
        found.append(network.state_dict())
        assert not names.get("report") or not names["report"].wrong
    assert_allclose(losses[1], losses[0], rtol=1e-9)
    assert len(found[0]) == 4 and losses[0] < 1.0
    for name, array in found[0].items():
        assert_allclose(found[1][name], array, rtol=1e-9, atol=1e-12, err_msg=name)


# -- the page of adapters ----------------------------------------------------------------------------------------------

ADAPTERS = (DOCS / "adapters.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", ADAPTERS, flags=re.S | re.M))


def in_the_layout_of_the_hub(cache: Path, model: Any) -> None:
    """Write the files that a download of `org/model` leaves."""
    from minitorch_jax.adapters import safetensors

    folder, commit = cache / "models--org--model", "0123456789abcdef"
    for path in (folder / "refs", folder / "snapshots" / commit):
        path.mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    safetensors.save(folder / "snapshots" / commit / "model.safetensors", model)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", [pytest.param("torch", marks=of_torch) if n == "torch" else n for n in SECTIONS])
def test_the_examples_of_an_adapter_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "hub":
        in_the_layout_of_the_hub(tmp_path / "cache", nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    names: dict[str, Any] = {"__name__": "__main__"}
    page = Page.__new__(Page)
    page.name = f"adapters.md, {name}"
    shown = "".join(page.run(block, names) for block in blocks(SECTIONS[name]))
    assert f"minitorch_jax.adapters.{name} import" in SECTIONS[name] or f"adapters import {name}\n" in SECTIONS[name]
    assert without_rounding(shown).strip() in without_rounding(SECTIONS[name])
    assert bool(shown) == ("\n```\n" in re.sub(r"^```python\n.*?^```$", "", SECTIONS[name], flags=re.S | re.M))


def without_rounding(text: str) -> str:
    """Errors of the size of one rounding are others on another machine."""
    return re.sub(r"\b\d\.\de(-1\d|\+00)\b", "~0", text)


def test_each_adapter_has_a_section_and_a_row_with_its_extra() -> None:
    folder = Path(__file__).parents[1] / "adapters"
    there = {path.stem for path in folder.iterdir() if path.stem[0] not in "_." and path.suffix in ("", ".py")}
    extras = tomllib.loads((folder.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = dict(re.findall(r"^\| \[`(\w+)`\]\(#\w+\) \| (.*?) \|", ADAPTERS, flags=re.M))
    assert SECTIONS.keys() == rows.keys() == there
    for name, row in rows.items():
        assert (f"`{name}`" == row) == (name in extras)
        assert "**Not supported**" in SECTIONS[name]


# -- what the tables say, and links ------------------------------------------------------------------------------------


def default(function: Any, name: str) -> Any:
    function = function.__init__ if inspect.isclass(function) else function
    return inspect.signature(function).parameters[name].default


@pytest.mark.parametrize(
    "function, name, value",
    [
        ("nnx.Conv", "padding", "SAME"),
        ("nn.Conv2d", "padding", 0),
        ("nnx.max_pool", "strides", None),
        ("eqx.nn.MaxPool2d", "stride", 1),
        ("nnx.BatchNorm", "momentum", 0.99),
        ("eqx.nn.BatchNorm", "momentum", 0.99),
        ("nn.BatchNorm2d", "momentum", 0.1),
        ("nnx.LayerNorm", "epsilon", 1e-6),
        ("nnx.GroupNorm", "epsilon", 1e-6),
        ("nn.LayerNorm", "eps", 1e-5),
        ("nn.GroupNorm", "eps", 1e-5),
        ("nnx.gelu", "approximate", True),
        ("jax.nn.gelu", "approximate", True),
        ("nn.functional.gelu", "approximate", "none"),
        ("optax.adamw", "weight_decay", 1e-4),
        pytest.param("torch.optim.AdamW", "weight_decay", 0.01, marks=of_torch),
        ("optim.AdamW", "weight_decay", 0.01),
        ("optax.rmsprop", "decay", 0.9),
        ("optax.rmsprop", "eps_in_sqrt", True),
        ("optim.RMSprop", "alpha", 0.99),
        ("optax.adagrad", "initial_accumulator_value", 0.1),
        ("optax.adagrad", "eps", 1e-7),
        ("optim.Adagrad", "initial_accumulator_value", 0.0),
        ("optim.Adagrad", "eps", 1e-10),
    ],
)
def test_the_defaults_in_the_tables(function: str, name: str, value: Any) -> None:
    assert default(eval(function), name) == value


@pytest.mark.slow
def test_what_the_tables_say_of_layers() -> None:
    image = jnp.arange(64.0).reshape(1, 8, 8, 1)
    assert nnx.max_pool(image, (2, 2)).shape == (1, 7, 7, 1)
    assert nn.MaxPool2d(2)(image.transpose(0, 3, 1, 2)).shape == (1, 1, 4, 4)
    same, valid = (nnx.Conv(1, 1, (3, 3), strides=2, padding=p, rngs=nnx.Rngs(0)) for p in ("SAME", "VALID"))
    assert_allclose(same(image), valid(jnp.pad(image, ((0, 0), (0, 1), (0, 1), (0, 0)))), rtol=1e-5)
    assert nnx.Linear(4, 8, rngs=nnx.Rngs(0)).kernel.shape == (4, 8) and nn.Linear(4, 8).weight.shape == (8, 4)
    assert nnx.Conv(1, 2, (3, 5), rngs=nnx.Rngs(0)).kernel.shape == (3, 5, 1, 2)
    assert nn.Conv2d(1, 2, (3, 5)).weight.shape == (2, 1, 3, 5)
    assert eqx.nn.Conv2d(1, 2, 3, key=jax.random.key(0)).bias.shape == (2, 1, 1)
    with jax.numpy_dtype_promotion("standard"):
        flax_embed, embed = nnx.Embed(50, 100, rngs=nnx.Rngs(0)).embedding[...], nn.Embedding(50, 100).weight
    assert abs(flax_embed.std() - 0.1) < 0.01 and abs(embed.std() - 1) < 0.1


def test_an_update_in_jax_jit_is_lost_there_and_told_here() -> None:
    theirs = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    with jax.numpy_dtype_promotion("standard"):
        opt = nnx.Optimizer(theirs, optax.sgd(0.1), wrt=nnx.Param)
    before = theirs.kernel[...]

    def loss_fn(model: Any) -> Any:
        return (model(jnp.ones((1, 2))) ** 2).sum()

    jax.jit(lambda model, opt: opt.update(model, jax.grad(loss_fn)(model)))(theirs, opt)
    assert_array_equal(theirs.kernel[...], before)

    def step(opt: Any) -> None:
        mt.backward(loss_fn, opt.modules[0])
        opt.step()

    with pytest.warns(mt.DroppedUpdateWarning, match="return opt"):
        jax.jit(step)(optim.SGD([nn.Linear(2, 1)], lr=0.1))
        gc.collect()


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "name", ["migrating.md", "adapters.md", *(f"migrating/{page}.md" for page in (*ORIGINS, "tensors"))]
)
def test_links_lead_somewhere(name: str) -> None:
    page = DOCS / name
    links = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text())
    assert links
    for target, anchor in links:
        found = page.parent / target if target else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), f"{target}#{anchor}"


def test_the_index_has_each_page() -> None:
    pages = {path.stem for path in (DOCS / "migrating").glob("*.md")}
    linked = re.findall(r"^\| \[.*?\]\(migrating/(\w+)\.md\)", (DOCS / "migrating.md").read_text(), flags=re.M)
    assert set(linked) == pages - {"tensors"} == set(ORIGINS) and len(linked) == 4
    assert "(migrating/tensors.md)" in (DOCS / "migrating.md").read_text()
