from collections import Counter

from utils.data.formats.example import Example
from utils.data.sources.reading import open_source, read_examples


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
