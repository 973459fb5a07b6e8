"""Each notebook of docs/gallery is its script's, executed, with pictures; and `docs/gallery.py` makes such notebooks.

The scripts themselves are run by CI: `python examples/gallery/NAME.py --short`.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from lazily import needs

needs("jupytext")

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "gallery"
SCRIPTS = sorted((ROOT / "examples" / "gallery").glob("*.py"))
INDEX = (PAGES / "index.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def gallery() -> Any:
    """docs/gallery.py as a module."""
    spec = importlib.util.spec_from_file_location("gallery", ROOT / "docs" / "gallery.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells_of(notebook: Any) -> list[tuple[str, str]]:
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


def outputs_of(notebook: Any) -> list[Any]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", ())]


def pictures_of(notebook: Any) -> list[bytes]:
    data = [output.get("data", {}) for output in outputs_of(notebook)]
    return [base64.b64decode("".join(each["image/png"])) for each in data if "image/png" in each]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_notebook_is_its_script_executed(script: Path, gallery: Any) -> None:
    path = PAGES / f"{script.stem}.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    stale = f"{script.stem}.ipynb is not made from the script as it is: python docs/gallery.py {script.stem}"
    assert cells_of(notebook) == cells_of(gallery.notebook_of(script)), stale
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = outputs_of(notebook)
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert {output.get("name") for output in outputs} <= {None, "stdout"}
    assert any(output.get("name") == "stdout" for output in outputs)
    pictures = pictures_of(notebook)
    assert pictures and all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert path.stat().st_size < 400_000
    assert (PAGES / f"{script.stem}.png").stat().st_size < 100_000


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_program_says_what_it_is_and_asserts_that_it_learnt(script: Path, gallery: Any) -> None:
    cells = cells_of(gallery.notebook_of(script))
    kind, text = cells[0]
    assert kind == "markdown" and text.startswith("# ")
    code = [source for kind, source in cells if kind == "code"]
    assert 'SHORT = "--short" in sys.argv' in code[0]
    assert f'savefig("{script.stem}.png"' in "\n".join(code)
    assert re.search(r"^assert .*\bSHORT\b", code[-1], flags=re.M)


def test_the_index_shows_each_program() -> None:
    rows = re.findall(r"^\| \[!\[(\w+)\]\(\1\.png\)\]\(\1\.ipynb\) \| \[(.+)\]\(\1\.ipynb\): ", INDEX, flags=re.M)
    names = [script.stem for script in SCRIPTS]
    assert sorted(name for name, _ in rows) == names
    for name, title in rows:
        assert (
            json.loads((PAGES / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"][0]["source"][0] == f"# {title}\n"
        )
    (toctree,) = re.findall(r"^```\{toctree\}\n:hidden:\n\n(.*?)^```$", INDEX, flags=re.S | re.M)
    assert sorted(toctree.split()) == names


PROGRAM = """\
# %% [markdown]
# # A title

# %%
import sys

import matplotlib.pyplot as plt

SHORT = "--short" in sys.argv
print("a line", SHORT)
print("a warning", file=sys.stderr)

# %%
fig, axes = plt.subplots(figsize=(1, 1))
fig.savefig("program.png")

# %%
assert {asserted}
"""


@pytest.mark.slow
def test_the_command_makes_a_notebook(gallery: Any, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(asserted="not SHORT"))
    gallery.run(script, tmp_path)
    first = (tmp_path / "program.ipynb").read_text()
    gallery.run(script, tmp_path)
    assert (tmp_path / "program.ipynb").read_text() == first
    notebook = json.loads(first)
    assert cells_of(notebook)[0] == ("markdown", "# A title")
    assert notebook["cells"][1]["outputs"] == [{"name": "stdout", "output_type": "stream", "text": ["a line False\n"]}]
    assert len(pictures_of(notebook)) == 1
    assert set(notebook["metadata"]) == {"kernelspec"} and not any(cell["metadata"] for cell in notebook["cells"])
    assert (tmp_path / "program.png").read_bytes().startswith(b"\x89PNG")
    script.write_text(script.read_text().replace("A title", "Another title"))
    gallery.update_text(script, tmp_path)
    assert (tmp_path / "program.ipynb").read_text() == first.replace("A title", "Another title")
    script.write_text(script.read_text().replace("a line", "another line"))
    with pytest.raises(SystemExit, match="the code of program.py has changed, too"):
        gallery.update_text(script, tmp_path)


@pytest.mark.slow
def test_a_program_that_fails_makes_no_notebook(gallery: Any, tmp_path: Path) -> None:
    from nbclient.exceptions import CellExecutionError

    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(asserted="SHORT"))
    with pytest.raises(CellExecutionError, match="AssertionError"):
        gallery.run(script, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["program.py"]


def test_a_name_that_is_not_in_the_gallery(gallery: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gallery.main(["nothing"])
    assert "examples/gallery has no nothing; it has " in capsys.readouterr().err
