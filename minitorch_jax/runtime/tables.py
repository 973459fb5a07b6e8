"""Tables of text: printed, and as HTML in a notebook."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Sequence


def as_text(headings: Sequence[str], lines: Sequence[Sequence[str]], numbers: Collection[int], totals: str) -> str:
    """Return a table with a last line under it. Columns in which all lines are empty are left out.

    Args:
        headings: of the columns.
        lines: the cells of each line.
        numbers: the columns of numbers, which stand on the right.
        totals: the last line.
    """
    shown = [i for i in range(len(headings)) if any(line[i] for line in lines)]
    widths = {i: max(len(line[i]) for line in (headings, *lines)) for i in shown}

    def text(line: Sequence[str]) -> str:
        return "  ".join(
            [line[i].rjust(widths[i]) if i in numbers else line[i].ljust(widths[i]) for i in shown]
        ).rstrip()

    rule = "─" * (sum(widths.values()) + 2 * (len(shown) - 1))
    return "\n".join([text(headings), rule, *map(text, lines), rule, totals])


def as_html(headings: Sequence[str], lines: Iterable[Sequence[str]], numbers: Collection[int], totals: str) -> str:
    """Return a table as HTML, with `totals` as its caption. The other arguments are those of `as_text`."""

    def cells(tag: str, line: Sequence[str]) -> str:
        first, *rest = (html.escape(text).replace("  ", "&emsp;") for text in line)
        aligned = [
            f'<{tag} style="text-align: {"right" if i in numbers else "left"}">{t}</{tag}>'
            for i, t in enumerate(rest, 1)
        ]
        return f'<tr><{tag} style="text-align: left">{first}</{tag}>{"".join(aligned)}</tr>'

    head, body = cells("th", headings), "".join([cells("td", line) for line in lines])
    return f"<table><caption>{html.escape(totals)}</caption><thead>{head}</thead><tbody>{body}</tbody></table>"


def in_bytes(count: int) -> str:
    """Return 12345 as "12.35 kB"."""
    return scaled(count, ("B", "kB", "MB", "GB", "TB"))


def scaled(count: int, units: Sequence[str] = ("", "k", "M", "G", "T")) -> str:
    """Return 12345 as "12.35 k"."""
    power = min((len(str(count)) - 1) // 3, len(units) - 1)
    return f"{count / 1000**power:.4g} {units[power]}".rstrip()
