"""The Python blocks of `docs/sharding.md` run on 8 devices, and print what is shown below them."""

import re
from pathlib import Path
from typing import Any

import pytest
from lazily import needs
from training import as_jax_comes

needs("orbax.checkpoint", "rich")

PAGE = Path(__file__).parents[2] / "docs" / "sharding.md"


def test_the_blocks_run_in_order_and_print_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    parts = re.findall(r"^```python\n(.*?)^```\n(?:\n```\n(.*?)^```\n)?", PAGE.read_text(), flags=re.S | re.M)
    assert len(parts) > 7
    names: dict[str, Any] = {}
    with as_jax_comes():
        for number, (block, shown) in enumerate(parts, 1):
            exec(compile(block, f"sharding.md, block {number}", "exec"), names)
            assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == shown.splitlines(), number


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https:)([^)#\s]+)\)", PAGE.read_text()):
        assert (PAGE.parent / target).exists(), target
    for path in re.findall(r"`((?:examples|tests)/\w+\.py)`", PAGE.read_text()):
        assert (PAGE.parents[1] / path).exists(), path
