"""The Python blocks of the pages run, and print what is shown; what the tables say of optimizers is so."""

import inspect
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_sides import discovered
from training import as_jax_comes

import minitorch_jax as mt
from minitorch_jax import nn, optim

DOCS = Path(__file__).parents[1] / "docs"
ELSEWHERE = {  # whose blocks run in other tests
    "adapters.md": "test_migrating.py",
    "migrating.md": "test_ports.py",
    "migrating": "test_migrating.py, test_migrating_tensors.py",
    "sharding.md": "mesh/test_docs_of_sharding.py",
    "recipes": "test_recipes.py",
    "gallery": "test_gallery.py",
}
BLOCK = re.compile(r"^```python\n(.*?)^```$", flags=re.S | re.M)  # what is not to run has a fence without a language
GIVEN: dict[str, dict[str, Any]] = {  # names that a page takes from its reader
    "schedules.md": {"validation_loss": 1.0},
    "performance.md": {"jax": jax, "step": jnp.sin},
}
SLOW = ("nn.md", "optim/groups-and-tools.md")
CLASSES = {cls.__name__: cls for cls in discovered()}


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


PAGES = sorted(DOCS.rglob("*.md"), key=name_of)
RUN = [page for page in PAGES if name_of(page).split("/")[0] not in ELSEWHERE and BLOCK.search(page.read_text())]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if name_of(page) in SLOW else ()) for page in RUN],
    ids=name_of,
)
def test_the_blocks_of_a_page_run_in_order(
    page: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    names = dict(GIVEN.get(name_of(page), {}))
    with as_jax_comes():
        for number, block in enumerate(BLOCK.findall(page.read_text()), 1):
            exec(compile(block, f"{name_of(page)}, block {number}", "exec"), names)
            assert capsys.readouterr().out.strip() in page.read_text()


def test_pages_are_found_whose_blocks_run() -> None:
    names = {name_of(page) for page in RUN}
    assert {"index.md", "first-steps.md", "training-loops.md", "saving.md", "extending.md", "optim/adam.md"} <= names
    assert GIVEN.keys() | set(SLOW) <= names


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target


def index_rows() -> list[list[str]]:
    lines = (DOCS / "optimizers.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]


@pytest.mark.parametrize("row", index_rows(), ids=lambda row: row[0].strip("`"))
def test_the_index_says_what_is_so(row: list[str]) -> None:
    name, _, _, defaults, state, packed = row
    cls = CLASSES[name.strip("`")]
    assert packed == ("yes" if cls.elementwise else "no")
    parameters = inspect.signature(cls).parameters
    for option, value in re.findall(r"(\w+)=(\([^)]*\)|[^,]+)", defaults):
        assert repr(parameters[option].default) == value
    if cls is not optim.Adafactor:
        found = cls([nn.Linear(3, 2, bias=False, key=jax.random.key(0))]).state_dict()["state"]["0.weight"]
        shapes = [jnp.shape(value) for field, value in found.items() if field != "step"]
        arrays, numbers = (sum(shape == wanted for shape in shapes) for wanted in ((2, 3), ()))
        stated = dict.fromkeys(("array", "number"), 0)
        for count, what in re.findall(r"(\d+|an) (array|number)", state.split(";")[0].replace("a number", "1 number")):
            stated[what] = 1 if count == "an" else int(count)
        assert (arrays, numbers) == (stated["array"], stated["number"])


def test_the_index_names_each_class_once() -> None:
    names = [row[0].strip("`") for row in index_rows()]
    assert len(names) == len(set(names)) >= 21 and set(names) <= CLASSES.keys()


def test_each_class_has_a_heading_on_its_page() -> None:
    for name, page, *_ in index_rows():
        text = (DOCS / re.findall(r"\((.*)\)", page)[0]).read_text()
        assert re.search(rf"^## .*\b{name.strip('`')}\b", text, flags=re.M), name


@pytest.mark.slow
def test_your_own_optimizer_is_short() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "optimizers.md").read_text(), flags=re.S)
    (own,) = [block[block.index("class ") :] for block in blocks if "class " in block]
    assert len([line for line in own.splitlines() if line.strip()]) < 15
    assert "optim.Optimizer" in own and mt.Optimizer is optim.Optimizer
