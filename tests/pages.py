"""What tests of documentation share: the Python blocks of a page, what it shows of their output, and running them."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


def blocks_of(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.S | re.M)


def run(page: Path, names: dict[str, Any]) -> str:
    """Run the Python blocks of a page in order, with these names. Returns what they print."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, block in enumerate(blocks_of(page), 1):
            exec(compile(block, f"{name_of(page)}, block {number}", "exec"), names)
    return printed.getvalue()
