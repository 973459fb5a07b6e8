"""Write docs/gallery: the executed notebook of each program in examples/gallery, and a small picture for the index.

    python docs/gallery.py               # all of them: some minutes
    python docs/gallery.py vae ensemble  # these two
    python docs/gallery.py --text vae    # runs nothing and keeps the outputs: for a change of the text between the code

Otherwise each program runs in full. It needs jupytext, nbclient and ipykernel: pip install -e ".[gallery]"
"""

from __future__ import annotations

import argparse
import sys
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
            notebook,
            timeout=None,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
            extra_arguments=["--log-level=40"],  # errors of the kernel, not its warnings
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
    _write(notebook, pages / f"{script.stem}.ipynb")


def update_text(script: Path, pages: Path) -> None:
    """Write the text of a script into its notebook, and keep the outputs there. The code must be what it was."""
    notebook = notebook_of(script)
    old = nbformat.read(pages / f"{script.stem}.ipynb", as_version=4)
    ours, theirs = ([cell for cell in each.cells if cell.cell_type == "code"] for each in (notebook, old))
    if [cell.source for cell in ours] != [cell.source for cell in theirs]:
        sys.exit(f"the code of {script.name} has changed, too: run it without --text")
    for cell, executed in zip(ours, theirs, strict=True):
        cell.execution_count, cell.outputs = executed.execution_count, executed.outputs
    _write(notebook, pages / f"{script.stem}.ipynb")


def _write(notebook: NotebookNode, path: Path) -> None:
    nbformat.validate(notebook)
    path.write_text(nbformat.writes(notebook, version=4) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    scripts = {script.stem: script for script in sorted(SCRIPTS.glob("*.py"))}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(scripts)} (default: all)")
    parser.add_argument("--text", action="store_true", help="run nothing; only the text has changed")
    options = parser.parse_args(arguments)
    names = options.names or list(scripts)
    if unknown := [name for name in names if name not in scripts]:
        parser.error(f"examples/gallery has no {', '.join(unknown)}; it has {', '.join(scripts)}")
    for name in names:
        (update_text if options.text else run)(scripts[name], PAGES)
        print(PAGES.relative_to(ROOT) / f"{name}.ipynb", flush=True)


if __name__ == "__main__":
    main()
