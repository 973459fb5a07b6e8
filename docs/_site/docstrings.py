"""Docstrings of this project as reStructuredText, for autodoc.

They are plain text in Markdown's manner: paragraphs, lists with `- `, code and maths indented by four spaces, code in single
backticks, among which `docs/nn.md` is a page of the site. A line `Args:`, `Raises:`, `Returns:`, `Attributes:` or `Example:`
begins a section, which is indented. `Shapes:`, `Source:` and `Differs from PyTorch:` begin a paragraph.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from itertools import takewhile

SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Attributes|Example):$")
LED = re.compile(r"^(Shapes|Sources?|Letters|Differs from [\w' ]+):(?= )")
ENTRY = re.compile(r"^(\**\w[^:`()]*?): ?(.*)$", flags=re.S)
PAGE = re.compile(r"docs/([\w/-]+)\.md")
Link = Callable[[str], str | None]  # the full name that a name in backticks stands for, or None


def blocks(lines: list[str]) -> Iterator[list[str]]:
    """The paragraphs of a text: lines between empty ones."""
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
        elif block:
            yield block
            block = []


def indent_of(line: str) -> int:
    return len(line) - len(line.lstrip())


def dedented(lines: list[str]) -> list[str]:
    least = min((indent_of(line) for line in lines if line.strip()), default=0)
    return [line[least:] for line in lines]


def inline(text: str, link: Link) -> str:
    """A paragraph: code in backticks becomes code or a link, all else is plain text."""
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    out = ""
    for i, part in enumerate(parts):
        if part.startswith("`") and part.endswith("`") and len(part) > 2:
            code = part[1:-1]
            page = PAGE.fullmatch(code)
            target = link(code)
            role = f":py:obj:`{code} <{target}>`" if target else f":doc:`/{page[1]}`" if page else f"``{code}``"
            before = r"\ " if out and (out[-1].isalnum() or out[-1] in "_*`") else ""
            after = parts[i + 1][:1] if i + 1 < len(parts) else ""
            out += before + role + (r"\ " if after.isalnum() or after == "_" else "")
        else:
            out += re.sub(r"([\\*_|`])", r"\\\1", part)
    return out


def is_python(lines: list[str]) -> bool:
    try:
        ast.parse("\n".join(lines))
    except SyntaxError:
        return False
    return True


def code_block(lines: list[str]) -> Iterator[str]:
    lines = dedented(lines)
    language = "pycon" if lines[0].startswith(">>>") else "python" if is_python(lines) else "text"
    yield from ["", f".. code-block:: {language}", "", *(f"   {line}" for line in lines), ""]


def led_text(lines: list[str], link: Link) -> str:
    """A paragraph, with the words that introduce it in bold."""
    text = " ".join(lines)
    led = LED.match(text)
    return f"**{led[0]}** {inline(text[led.end() :], link)}" if led else inline(text, link)


def paragraphs(lines: list[str], link: Link) -> Iterator[str]:
    """Text without sections."""
    lines = dedented(lines)
    found = list(blocks(lines))
    while found:
        block = found.pop(0)
        if indent_of(block[0]) >= 4 or block[0].startswith(">>>"):
            while found and indent_of(found[0][0]) >= 4:
                block += ["", *found.pop(0)]
            yield from code_block(block)
        elif block[0].startswith("- "):
            items = re.split(r"\n(?=- )", "\n".join(block))
            yield from ["", *(f"- {inline(item[2:], link)}" for item in items), ""]
        else:
            # a list, or named entries that are indented, may follow its paragraph without an empty line
            start = next((i for i, line in enumerate(block) if i and (line[:2] == "- " or indent_of(line) >= 4)), None)
            if start is not None:
                found.insert(0, block[start:])
                block = block[:start]
                if not found[0][0].startswith("- "):
                    inner = list(takewhile(lambda line: indent_of(line) >= 4, found[0]))
                    rest = found.pop(0)[len(inner) :]
                    found[:0] = [rest] if rest else []
                    yield from ["", led_text(block, link), ""]
                    yield from entries(inner, link)
                    continue
            yield from ["", led_text(block, link), ""]


def entries(lines: list[str], link: Link) -> Iterator[str]:
    """The entries `name: text` of a section, as a definition list."""
    lines = dedented(lines)
    for entry in re.split(r"\n(?=\S)", "\n".join(lines).strip("\n")):
        first, *rest = entry.split("\n")
        match = ENTRY.match(first)
        if match is None:
            yield from paragraphs(entry.split("\n"), link)
            continue
        names = ", ".join(inline(f"`{name.strip()}`", link) for name in match[1].split(","))
        body = [match[2], *dedented(rest)] if match[2] else dedented(rest)
        text = "\n".join(paragraphs(_joined(body), link)).strip("\n")
        yield from [names, *(f"   {line}" for line in text.split("\n")), ""]


def _joined(lines: list[str]) -> list[str]:
    """The first paragraph begins on the line of the name, so its later lines may be indented otherwise."""
    return [line if not line.strip() or line.startswith("    ") else line.strip() for line in lines]


def sections(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each section and its lines. The text before and between sections has the name ``""``."""
    name, held = "", list[str]()
    for line in lines:
        match = SECTION.match(line)
        if match or (name and line.strip() and not line.startswith(" ")):
            yield name, held
            name, held = (match[1], []) if match else ("", [line])
        else:
            held.append(line)
    yield name, held


def as_rst(lines: list[str], link: Link = lambda name: None) -> list[str]:
    """A docstring's lines as reStructuredText."""
    out: list[str] = []
    for name, held in sections(lines):
        if not any(line.strip() for line in held):
            continue
        if not name:
            out += paragraphs(held, link)
            continue
        made = entries(held, link) if name in ("Args", "Raises", "Attributes") else paragraphs(held, link)
        out += ["", f":{name}:", *(f"   {line}" if line else "" for line in made), ""]
    return out


def summary(doc: str | None, link: Link = lambda name: None) -> str:
    """The first sentence of a docstring."""
    first = next(blocks((doc or "").strip().split("\n")), [""])
    text = " ".join(" ".join(first).split())
    sentence = re.match(r".*?[^.][.](?= [A-Z(`]|$)", re.sub(r"\be\.g\.", "for example", text))
    return inline((sentence[0] if sentence else text).rstrip(":"), link)
