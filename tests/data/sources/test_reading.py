import json
from collections import Counter

import pytest

from utils.data.formats.example import Example
from utils.data.sources.reading import open_source, read_examples
from utils.errors import InputError


def read(path, purpose):
    dropped = Counter()
    return [example for _, example in read_examples(open_source(path), "train", purpose, dropped)], dropped


def test_an_example_keeps_what_its_row_says_besides(write_jsonl):
    row = {"prompt": "Q Assistant:", "completion": " a"}
    others = [
        {"score": 2, "reference": "right", "id": "x"},
        {"score": 0.5, "reference": ["no text"]},
        {"score": True},
        {"score": "3"},
        {},
    ]
    examples, _ = read(write_jsonl([row | other for other in others]), "sft")
    assert examples == [
        Example("Q Assistant:", " a", score=score, reference=reference, columns=other)
        for other, score, reference in zip(
            others, (2.0, 0.5, None, None, None), ("right", None, None, None, None), strict=True
        )
    ]


def test_a_row_that_the_purpose_leaves_out_keeps_its_place(write_jsonl):
    rows = [{"prompt": "Q Assistant:", "completion": f" a{i}", "label": i != 1} for i in range(3)]
    examples, dropped = read(write_jsonl(rows), "sft")
    assert [example and example.chosen for example in examples] == [" a0", None, " a2"]
    assert dropped == {"with a response labelled undesirable": 1}
    examples, dropped = read(write_jsonl(rows), "prompts")
    assert [example.label for example in examples] == [True, False, True] and not dropped


@pytest.mark.parametrize("column", ["prompt", "completion", "reference"])
def test_half_a_character_is_refused_with_its_row(tmp_path, column):
    """JSON can represent it, and tokenizers and Arrow end in a traceback."""
    row = {"prompt": "Hi Assistant:", "completion": "yo", "reference": "r"}
    rows = [row, row | {column: "smile \ud83d"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"a.jsonl, line 2: the text 'smile ' continues with \\ud83d, half of a"):
        read(str(tmp_path / "a.jsonl"), "sft")
    whole = [{"messages": [{"role": "user", "content": "\ud83d\ude00"}, {"role": "assistant", "content": "yo"}]}]
    (tmp_path / "b.jsonl").write_text(json.dumps(whole[0]))
    assert read(str(tmp_path / "b.jsonl"), "sft")[0][0].prompt == (("Human", "\U0001f600"),)
