"""The site's reference has every public name once, and its docstrings become reStructuredText. .ci/run builds the site."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS / "_site"))

import docstrings  # noqa: E402
import public_names  # noqa: E402

PACKAGES = [name for name in public_names.PACKAGES if public_names.source_of(name).stem == "__init__"]


def in_the_reference() -> list[str]:
    """The full names that the blocks of the reference's pages ask for."""
    pages = [page.read_text(encoding="utf-8") for page in (DOCS / "reference").rglob("*.md")]
    blocks = [block for page in pages for block in re.findall(r"^```\{reference\}\n(.*?)^```$", page, re.S | re.M)]
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return [name.full for line in lines for name in public_names.selected(line)]


def test_each_public_name_is_in_the_reference_once() -> None:
    found = Counter(in_the_reference())
    every = {name.full for name in public_names.all_names()}
    assert len(every) >= 444
    assert every - found.keys() == set(), "add them to a page of docs/reference/"
    assert [name for name, times in found.items() if times > 1] == []


@pytest.mark.parametrize("module", PACKAGES)
def test_the_names_read_from_the_source_are_those_of_the_package(module: str) -> None:
    names = {
        name
        for name, value in vars(importlib.import_module(module)).items()
        if not name.startswith("_") and name != "TYPE_CHECKING" and not isinstance(value, types.ModuleType)
    }
    assert {name.name for name in public_names.public_names(module)} == names


def test_each_module_with_public_names_is_looked_at() -> None:
    """A package that is added to `minitorch_jax.nn`, `optim` or the root as a public name is in the list."""
    listed = set(public_names.modules())
    for module in public_names.PACKAGES:
        for name, value in vars(importlib.import_module(module)).items():
            if isinstance(value, types.ModuleType) and re.search(
                rf"^from \. import {name} as {name}$", public_names.source_of(module).read_text(encoding="utf-8"), re.M
            ):
                assert value.__name__ in listed


def test_a_line_selects_names_by_name_and_by_file() -> None:
    assert [name.full for name in public_names.selected("minitorch_jax: jit seed")] == [
        "minitorch_jax.jit",
        "minitorch_jax.seed",
    ]
    assert {name.name for name in public_names.selected("minitorch_jax.nn: distance.py")} == {
        "CosineSimilarity",
        "PairwiseDistance",
    }
    with pytest.raises(ValueError, match="minitorch_jax.nn has no public name or file 'Lineer'"):
        public_names.selected("minitorch_jax.nn: Lineer")


DOCSTRING = """Scale x by `w`, as `nn.Linear`s do; see *x*, W_, |x| (`docs/nn.md`).

    y ← w x

It takes
- `a`: one,
  in two lines;
- b.

Shapes: input `(N,)`. A call takes:
    mask: `(N,)`.
    scale: a number.
The rest is free.

Args:
    w, *args: weights. In
        two lines.

        A second paragraph.
    bias: True adds b.

Raises:
    ValueError: if it is negative.

Source: torch.

Example:
    >>> 1 + 1
    2
"""


def test_a_docstring_becomes_restructuredtext() -> None:
    lines = docstrings.as_rst(
        DOCSTRING.split("\n"), lambda name: "minitorch_jax.nn.Linear" if name == "nn.Linear" else None
    )
    text = re.sub(r"\n{2,}", "\n\n", "\n".join(line.rstrip() for line in lines)).strip()
    assert (
        text
        == r"""Scale x by ``w``, as :py:obj:`nn.Linear <minitorch_jax.nn.Linear>`\ s do; see \*x\*, W\_, \|x\| (:doc:`/nn`).

.. code-block:: text

   y ← w x

It takes

- ``a``: one, in two lines;
- b.

**Shapes:** input ``(N,)``. A call takes:

``mask``
   ``(N,)``.

``scale``
   a number.

The rest is free.

:Args:
   ``w``, ``*args``
      weights. In two lines.

      A second paragraph.

   ``bias``
      True adds b.

:Raises:
   ``ValueError``
      if it is negative.

**Source:** torch.

:Example:

   .. code-block:: pycon

      >>> 1 + 1
      2"""
    )


@pytest.mark.parametrize(
    ("doc", "sentence"),
    [
        ("Add a number. Then more.\n\nMore.", "Add a number."),
        ("y = x W^T + b.", "y = x W^T + b."),
        ("Write `a.b` (e.g. 1.5) to it,\nin two lines.", "Write ``a.b`` (for example 1.5) to it, in two lines."),
        ("Take a list:\n\n- one", "Take a list"),
        (None, ""),
    ],
)
def test_the_one_line_table_has_the_first_sentence(doc: str | None, sentence: str) -> None:
    assert docstrings.summary(doc) == sentence


CONF = f"""
import sys
sys.path[:0] = [{str(DOCS / "_site")!r}, {str(DOCS.parent)!r}]
extensions = ["myst_nb", "sphinx.ext.autodoc", "mathml", "pages"]
myst_enable_extensions = ["dollarmath"]
html_math_renderer = "mathml"
html_theme = "basic"
autodoc_typehints = "none"
suppress_warnings = ["ref.doc"]  # docstrings name pages that are not here
repository = "https://example.org/repository"
navigation = {{"index": {{"": ["names"]}}}}
"""
INDEX = """# Title

See `mt.jit`, `mt.jit()`, `mt.nothing`, [a file](../examples/my_net.py), [a folder](../tests/ports), [names](names.md).

$$
\\begin{aligned} m &= 1 \\\\ v &= 2 \\end{aligned}
$$
"""
NAMES = """# Names

```{reference}
minitorch_jax: jit Module
minitorch_jax.nn: Linear Module
```
"""


def built(folder: Path, names: str) -> subprocess.CompletedProcess[str]:
    """Build a site of two pages as the project's is built."""
    for name, text in {"conf.py": CONF, "index.md": INDEX, "names.md": names}.items():
        (folder / name).write_text(text, encoding="utf-8")
    options = ["-q", "-W", "--keep-going", "-b", "html"]  # and not -n: these pages lack most of the names
    command = [sys.executable, "-m", "sphinx", *options, str(folder), str(folder / "out")]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_pages_lead_to_the_repository_and_to_the_reference(tmp_path: Path) -> None:
    pytest.importorskip("myst_nb", reason="needs the extra docs")
    result = built(tmp_path, NAMES)
    assert (result.returncode, result.stderr) == (0, "")
    index, names = ((tmp_path / "out" / f"{name}.html").read_text(encoding="utf-8") for name in ("index", "names"))
    assert 'href="https://example.org/repository/blob/main/examples/my_net.py"' in index
    assert 'href="https://example.org/repository/tree/main/tests/ports"' in index
    assert index.count('href="names.html#minitorch_jax.jit"') == 2
    assert "<math" in index and "<mtable" in index
    ids = set(re.findall(r'<dt class="sig[^>]* id="([^"]+)"', names))
    assert {
        "minitorch_jax.jit",
        "minitorch_jax.Module.tie",
        "minitorch_jax.nn.Linear",
        "minitorch_jax.nn.Module",
    } <= ids
    assert "minitorch_jax.nn.Linear.tie" not in ids, "methods are with the class that has them"
    text = re.sub(r"<[^>]+>", "", names)
    assert "nn.Linear(in_features, out_features, bias=True, *, dtype=jnp.float32, key=None)" in text
    assert "The same as mt.Module." in text


def test_a_wrong_name_in_a_reference_block_stops_the_build(tmp_path: Path) -> None:
    pytest.importorskip("myst_nb", reason="needs the extra docs")
    result = built(tmp_path, NAMES.replace("jit", "jitt"))
    assert result.returncode == 1
    assert "minitorch_jax has no public name or file 'jitt'" in result.stderr
