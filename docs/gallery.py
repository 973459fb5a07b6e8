"""Write docs/gallery: the executed notebook of each program in examples/gallery, and a small picture for the index.

    python docs/gallery.py               # all of them: some minutes
    python docs/gallery.py vae ensemble  # these two

Each program runs in full. It needs jupytext, nbclient and ipykernel: pip install -e ".[gallery]"
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import jupytext
import nbformat
from nbformat import NotebookNode

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "examples" / "gallery"
PAGES = ROOT / "docs" / "gallery"
CARD = (400, 300)  # pixels of a picture in the index, at most
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def notebook_of(script: Path) -> NotebookNode:
    """The notebook of a script in jupytext's percent format, not executed. It has nothing that differs at the next call."""
    notebook = jupytext.read(script, fmt="py:percent")
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.from_dict({})
    return notebook


def run(script: Path, pages: Path) -> None:
    """Execute a script as a notebook. Write the notebook, and a small copy of the picture that the script saves."""
    from nbclient import NotebookClient
    from PIL import Image

    notebook = notebook_of(script)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=None, record_timing=False, resources={"metadata": {"path": folder}}, kernel_name="python3"
        )
        client.execute()
        with Image.open(Path(folder, f"{script.stem}.png")) as picture:
            card = picture.convert("RGB")
    card.thumbnail(CARD, Image.Resampling.LANCZOS)
    card.save(pages / f"{script.stem}.png", optimize=True)
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.validate(notebook)
    (pages / f"{script.stem}.ipynb").write_text(nbformat.writes(notebook, version=4) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    scripts = {script.stem: script for script in sorted(SCRIPTS.glob("*.py"))}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(scripts)} (default: all)")
    names = parser.parse_args(arguments).names or list(scripts)
    if unknown := [name for name in names if name not in scripts]:
        parser.error(f"examples/gallery has no {', '.join(unknown)}; it has {', '.join(scripts)}")
    for name in names:
        run(scripts[name], PAGES)
        print(PAGES.relative_to(ROOT) / f"{name}.ipynb", flush=True)


if __name__ == "__main__":
    main()
