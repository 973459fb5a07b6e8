"""Each recipe is a program on one screen, runs as pasted, and prints what its page shows; the index lists each."""

import re
from pathlib import Path

import pytest
from pages import DOCS, blocks_of, run

FOLDER = DOCS / "recipes"
INDEX = FOLDER / "index.md"
PAGES = sorted(set(FOLDER.glob("*.md")) - {INDEX})
OPTIONAL = ("grain", "tensorboardX", "torch", "tqdm")  # packages that some recipes are about


def stem(page: Path) -> str:
    return page.stem


@pytest.mark.parametrize("page", PAGES, ids=stem)
def test_a_recipe_prints_what_its_page_shows(page, tmp_path, monkeypatch):
    (program,) = blocks_of(page)
    for package in re.findall(r"^(?:import|from) (\w+)", program, flags=re.M):
        if package in OPTIONAL:
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)  # some write files
    (shown,) = blocks_of(page, "text")
    assert shown.strip()
    assert run(page, {"__name__": "__main__"}) == shown


@pytest.mark.parametrize("page", PAGES, ids=stem)
def test_a_recipe_fits_on_a_screen_and_says_why(page):
    lines = page.read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 45
    assert max(map(len, lines)) <= 126
    assert re.search(r"^Why so: ", page.read_text(), flags=re.M)
    assert re.search(r"^When not: ", page.read_text(), flags=re.M)
    (program,) = blocks_of(page)
    assert re.search(r"^assert ", program, flags=re.M)


def test_the_index_lists_each_recipe_once():
    table, _, tree = INDEX.read_text().partition("```{toctree}")
    names = sorted(map(stem, PAGES))
    linked = re.findall(r"\]\(([\w-]+)\.md\)", table)
    assert sorted(linked) == names
    assert sorted(re.findall(r"^[\w-]+$", tree, flags=re.M)) == names
