"""Tables stay aligned whatever is in their cells."""

import unicodedata

import pytest

from utils.output.tables import format_table, printable


def columns_of(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in line)


def test_a_table_by_hand():
    table = format_table("Results", [("perplexity", "12.1", "8"), ("win rate", "", "61 %")], ("metric", "base", "PPO"))
    assert table.splitlines() == [
        "Results",
        "──────────────────────",
        "metric      base   PPO",
        "──────────────────────",
        "perplexity  12.1     8",
        "win rate          61 %",
        "──────────────────────",
    ]


def test_long_cells_are_wrapped_to_the_width():
    rows = [("why is milk white ?", "of course . the milk is white . " * 5, "x" * 90), ("short", "a", "b")]
    table = format_table("Answers", rows, ("question", "SFT", "PPO"), width=60)
    assert all(columns_of(line) <= 60 for line in table.splitlines())
    assert table.count("x") == 90
    assert "\n\nshort" in table  # a blank line between rows once one of them takes several lines


def test_wide_characters_take_two_columns():
    table = format_table("t", [("牛奶是白色的", "1"), ("milk", "22")], ("answer", "n"))
    first, second = table.splitlines()[4:6]
    assert columns_of(first) == columns_of(second)
    narrow = format_table("t", [("牛奶是白色的" * 10, "1")], ("answer", "n"), width=30)
    assert all(columns_of(line) <= 30 for line in narrow.splitlines())
    assert sum(line.count("牛") for line in narrow.splitlines()) == 10


def test_line_breaks_in_cells_are_kept():
    table = format_table("t", [("one\ntwo", "x")], ("a", "b"))
    assert table.splitlines()[4:6] == ["one  x", "two"]


def test_no_rows():
    assert "metric" in format_table("Nothing", [], ("metric", "value"))


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError):
        format_table("t", [("a", "b", "c")], ("x", "y"))


def test_control_characters_are_shown_as_dots():
    assert printable("\x1b[31mred\x00\r\n\tb") == "·[31mred·\n    b"
    assert printable("naïve 牛奶 ✓") == "naïve 牛奶 ✓"
    assert "\x1b" not in format_table("t", [("\x1b]0;title\x07", "x")], ("a", "b"))
