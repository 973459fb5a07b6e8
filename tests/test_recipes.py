"""Each recipe is a program on one screen, runs as pasted, and prints what its page shows; the index lists each."""

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "recipes"
INDEX = FOLDER / "index.md"
PAGES = sorted(set(FOLDER.glob("*.md")) - {INDEX})
OPTIONAL = ("grain", "tensorboardX", "torch", "tqdm")  # packages that some recipes are about


def stem(page: Path) -> str:
    return page.stem


def block_of(page: Path, language: str) -> str:
    """The only block of a page in that language."""
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.S | re.M)
    return block


@pytest.mark.parametrize("page", PAGES, ids=stem)
def test_a_recipe_prints_what_its_page_shows(page, capsys, monkeypatch, tmp_path):
    program, shown = block_of(page, "python"), block_of(page, "text")
    for package in re.findall(r"^(?:import|from) (\w+)", program, flags=re.M):
        if package in OPTIONAL:
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)  # some write files
    exec(compile(program, f"recipes/{page.name}", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == shown != ""


@pytest.mark.parametrize("page", PAGES, ids=stem)
def test_a_recipe_fits_on_a_screen_and_says_why(page):
    text = page.read_text()
    assert len([line for line in text.splitlines() if line.strip()]) <= 45
    assert max(map(len, text.splitlines())) <= 126
    assert max(map(len, block_of(page, "python").splitlines())) <= 105  # what a window of 1280 pixels shows
    for line in (r"Why so: ", r"When not: ", r"assert "):
        assert re.search(f"^{line}", text, flags=re.M), line


def test_the_index_lists_each_recipe_once():
    table, _, tree = INDEX.read_text().partition("```{toctree}")
    assert sorted(re.findall(r"\]\(([\w-]+)\.md\)", table)) == sorted(map(stem, PAGES))
    assert sorted(re.findall(r"^[\w-]+$", tree, flags=re.M)) == sorted(map(stem, PAGES))
