"""Plain-text tables that stay aligned: wrapped to the terminal, numbers to the right, wide (CJK) characters counted."""

import shutil
import unicodedata
from collections.abc import Sequence

COLUMN_GAP = "  "
NARROWEST_COLUMN = 8


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
    natural = [max(_display_width(line) for cell in column for line in cell.split("\n")) for column in columns]
    limits = _fit(natural, width - len(COLUMN_GAP) * (len(columns) - 1))
    to_the_right = [all(_is_number(cell) for cell in column[1:]) and len(column) > 1 for column in columns]

    blocks = []
    for row in cells:
        wrapped = [_wrap(cell, limit) for cell, limit in zip(row, limits, strict=True)]
        height = max(len(lines) for lines in wrapped)
        padded = [lines + [""] * (height - len(lines)) for lines in wrapped]
        block = []
        for line in zip(*padded, strict=True):
            fitted = (_pad(text, limit, right) for text, limit, right in zip(line, limits, to_the_right, strict=True))
            block.append(COLUMN_GAP.join(fitted).rstrip())
        blocks.append("\n".join(block))

    rule = "─" * (sum(limits) + len(COLUMN_GAP) * (len(columns) - 1))
    between_rows = "\n\n" if any("\n" in block for block in blocks[1:]) else "\n"
    return "\n".join([title, rule, blocks[0], rule, between_rows.join(blocks[1:]), rule])


def printable(text: str) -> str:
    """`text` with tabs as spaces and other control characters as "·": a model's answer may hold terminal escapes."""
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    return "".join(c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cs") else "·" for c in text)


def _fit(natural: list[int], available: int) -> list[int]:
    """Column widths that add up to `available` at most where possible, taken from the widest columns first."""
    cap = max(natural)
    while cap > NARROWEST_COLUMN and sum(min(width, cap) for width in natural) > available:
        cap -= 1
    return [min(width, cap) for width in natural]


def _wrap(text: str, limit: int) -> list[str]:
    """Break `text` at spaces into lines of at most `limit` columns, and inside a word only when it is longer still."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            candidate = f"{line} {word}" if line else word
            if _display_width(candidate) <= limit:
                line = candidate
                continue
            if line:
                lines.append(line)
            while _display_width(word) > limit:
                head = _head(word, limit)
                lines.append(head)
                word = word[len(head) :]
            line = word
        lines.append(line)
    return lines


def _head(word: str, limit: int) -> str:
    """The longest beginning of `word` within `limit` columns, at least one character."""
    end = 1
    while end < len(word) and _display_width(word[: end + 1]) <= limit:
        end += 1
    return word[:end]


def _pad(text: str, width: int, to_the_right: bool) -> str:
    padding = " " * (width - _display_width(text))
    return padding + text if to_the_right else text + padding


def _display_width(text: str) -> int:
    """Columns a terminal gives to `text`: two for wide characters, none for combining marks."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)


def _is_number(cell: str) -> bool:
    """True for a figure, with or without a unit or a sign around it, and for an empty cell."""
    try:
        float(cell.strip().rstrip("%s ").replace(",", "") or 0)
    except ValueError:
        return cell.strip() in ("-", "–", "—")
    return True
