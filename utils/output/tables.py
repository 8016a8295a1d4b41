"""Plain-text tables that stay aligned: wrapped to the terminal, numbers to the right, with wide (CJK) characters."""

import shutil
import unicodedata
from collections.abc import Sequence

from rich.box import Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

RULE = "─"
RULE_BELOW_THE_HEADER = Box("    \n    \n ── \n    \n    \n    \n    \n    \n")


def format_table(title: str, rows: Sequence[tuple[str, ...]], header: Sequence[str], width: int | None = None) -> str:
    """Rows of text as an aligned table under a title.

    Args:
        rows: cells of one row each, as many as `header` has; a cell may hold several lines.
        header: names of the columns.
        width: in characters; None takes the terminal's, 120 where there is none. The widest columns are wrapped to fit.
    Raises:
        ValueError: a row with too few or too many cells.
    """
    width = width or max(shutil.get_terminal_size((120, 24)).columns, 40)
    cells = [[printable(str(cell)) for cell in row] for row in (header, *rows)]
    columns = list(zip(*cells, strict=True))
    lines = _lines(columns, width, blank_lines=0)
    if len(lines) > len(cells) + 1:  # some row takes several lines
        lines = _lines(columns, width, blank_lines=1)
    rule = RULE * lines[1].count(RULE)
    return "\n".join([title, rule, lines[0], rule, *lines[2:], rule])


def _lines(columns: Sequence[Sequence[str]], width: int, *, blank_lines: int) -> list[str]:
    """The header, its rule and the rows, with blank lines between the rows."""
    table = Table(box=RULE_BELOW_THE_HEADER, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False, leading=blank_lines)
    for name, *column in columns:
        numbers = bool(column) and all(map(_is_number, column))
        table.add_column(Text(name), justify="right" if numbers else "left", overflow="fold")
    for row in zip(*(column[1:] for column in columns), strict=True):
        table.add_row(*map(Text, row))
    console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().rstrip("\n").split("\n")]


def printable(text: str) -> str:
    """`text` with tabs as spaces and other control characters as "·": a model's answer may hold terminal escapes."""
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    return "".join(c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cs") else "·" for c in text)


def _is_number(cell: str) -> bool:
    """True for a number, with or without a unit (% or s), for a dash, and for an empty cell."""
    try:
        float(cell.strip().rstrip("%s ").replace(",", "") or 0)
    except ValueError:
        return cell.strip() in ("-", "–", "—")
    return True
