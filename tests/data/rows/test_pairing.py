"""Pairs of ranked and of scored answers, worked out by hand, from files to prepared rows."""

import numpy as np
import pytest

from utils.data import Corpus, build_datasets
from utils.data.rows.pairing import by_prompt, numbered
from utils.data.sources.scoring import Scoring
from utils.errors import InputError

RANKED = {"responses": ["worst", "good", "best", "good too"], "scores": [1, 5, 9, 5]}
ALL_PAIRS = {("best", "good"), ("best", "good too"), ("best", "worst"), ("good", "worst"), ("good too", "worst")}


@pytest.fixture
def corpus(tmp_path):
    def call(*paths, purpose="preference", **options):
        options = {"max_len": 64, "data_split": "0,1,0", "cache_dir": str(tmp_path / "cache"), "seed": 4} | options
        return Corpus(purpose=purpose, paths=[str(path) for path in paths], **options)

    return call


@pytest.fixture
def pairs_of(corpus, tiny_tokenizer):
    """By prompt, the pairs of the training and the held-out rows, and the rows themselves."""

    def call(*paths, **options):
        parts = build_datasets(corpus(*paths, **options), tiny_tokenizer)
        found, rows = {}, [row for part in parts for row in part]

        def text(ids):
            return tiny_tokenizer.decode(ids, skip_special_tokens=True).strip()

        for row in rows:
            question = text(row["prompt_ids"]).removeprefix("Human: ").removesuffix(" Assistant:")
            found.setdefault(question, []).append((text(row["chosen_ids"]), text(row["rejected_ids"])))
        return found, rows, parts

    return call


def ranked_rows(count: int) -> list[dict]:
    return [{"prompt": f"question {i}", **RANKED} for i in range(count)]


def test_best_against_worst_needs_no_flag_and_all_pairs_weigh_one_together(write_jsonl, pairs_of):
    path = write_jsonl(ranked_rows(6))
    found, rows, _ = pairs_of(path)
    assert found == {f"question {i}": [("best", "worst")] for i in range(6)}
    assert all(set(row) == {"prompt_ids", "chosen_ids", "rejected_ids", "source", "margin"} for row in rows)
    found, rows, (train, held_out) = pairs_of(path, pairs="all")
    assert {question: set(pairs) for question, pairs in found.items()} == {f"question {i}": ALL_PAIRS for i in range(6)}
    assert all(len(pairs) == 5 for pairs in found.values())
    assert [row["weight"] for row in rows] == pytest.approx([1 / 5] * 30)
    assert (len(train), len(held_out)) == (25, 5) and sorted(train.groups) == [
        group for group in range(5) for _ in range(5)
    ]
    # the division among the steps is that of the rows: held out is the same prompt, whatever is made of it
    held = {row["group"] for row in held_out}
    assert len(held) == 1 and not held & {row["group"] for row in train}


def test_pairs_left_out_or_already_made_count_in_the_weight_of_their_prompt(write_jsonl, pairs_of):
    long = "good " * 70
    rows = [
        {"prompt": f"question {i}", "responses": ["a", long, long + "x", "b"], "scores": [1, 3, 2, 0]} for i in range(4)
    ]
    found, prepared, _ = pairs_of(write_jsonl(rows), pairs="all")
    assert all(len(pairs) == 5 for pairs in found.values())  # the two long ones are equal once they are cut
    assert {row["weight"] for row in prepared} == {1 / 5}
    pairs = [{"prompt": f"question {i // 3}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(12)]
    found, prepared, _ = pairs_of(write_jsonl(pairs, "pairs.jsonl"), pairs="all")
    assert len(found) == 4 and {row["weight"] for row in prepared} == {1 / 3}


def scored_rows() -> list[dict]:
    """Answers to five prompts, apart from each other: scores 3 1 2, a tie of the best, all equal, one alone, 0 4."""
    answers = {"a": [3, 1, 2], "b": [2, 2, 1], "c": [1, 1], "d": [4], "e": [0, 4], "f": [1, 2]}
    rows = [(prompt, place, score) for prompt, scores in answers.items() for place, score in enumerate(scores)]
    rows.sort(key=lambda row: row[1])
    return [
        {"prompt": f"ask {p}", "response": f"{p}{place}", "quality": score, "length": -score}
        for p, place, score in rows
    ]


def test_scored_answers_are_gathered_by_prompt_over_the_whole_source(write_jsonl, pairs_of):
    path = write_jsonl(scored_rows())
    scoring = Scoring({"quality": 1.0})
    found, _, (train, _) = pairs_of(path, scoring=scoring)
    best_worst = {"ask a": [("a0", "a1")], "ask b": [("b0", "b2")], "ask e": [("e1", "e0")], "ask f": [("f1", "f0")]}
    assert found == best_worst
    assert "1 with a tie" in train.description and "1 with a single answer" in train.description
    found, rows, _ = pairs_of(path, scoring=scoring, pairs="all")
    every = best_worst | {"ask a": [("a0", "a2"), ("a0", "a1"), ("a2", "a1")], "ask b": [("b0", "b2"), ("b1", "b2")]}
    assert found == every
    assert sorted(row["weight"] for row in rows) == pytest.approx([1 / 3] * 3 + [1 / 2] * 2 + [1] * 2)
    turned, _, _ = pairs_of(path, scoring=Scoring({"quality": 1.0, "length": 2.0}))  # -score in all
    assert turned["ask e"] == [("e0", "e1")] and turned["ask a"] == [("a1", "a0")]


def test_the_same_prompt_of_another_source_is_not_compared(write_jsonl, pairs_of):
    first, second = write_jsonl(scored_rows()), write_jsonl(scored_rows(), "second.jsonl")
    found, rows, _ = pairs_of(first, second, scoring=Scoring({"quality": 1.0}), pairs="all")
    assert sorted(found["ask e"]) == [("e1", "e0")] * 2
    assert [row["weight"] for row in rows if row["weight"] == 1] == [1] * 4


def test_every_step_divides_scored_rows_alike(write_jsonl, corpus, tiny_tokenizer):
    rows = [
        {"prompt": f"ask {i}", "response": f"answer {i} {place}", "quality": place}
        for i in range(12)
        for place in (0, 1)
    ]
    path, prompts = write_jsonl(rows), {}
    for purpose, scoring in (("sft", None), ("preference", Scoring({"quality": 1.0})), ("prompts", None)):
        data = corpus(path, purpose=purpose, scoring=scoring, data_split="1,1,1")
        train, held_out = build_datasets(data, tiny_tokenizer)
        texts = []
        for part in (train, held_out):
            ids = [row["input_ids"][: row["response_start"]] if purpose == "sft" else row["prompt_ids"] for row in part]
            texts.append({tiny_tokenizer.decode(row) for row in ids})
        prompts[purpose] = texts
    held_out = [texts[1] for texts in prompts.values()]
    assert held_out[0] == held_out[1] == held_out[2]
    train = [texts[0] for texts in prompts.values()]
    assert sum(len(texts) for texts in train) == len(set.union(*train)) == 12 - len(held_out[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "data.jsonl, line 3: has no column `quality`, which --score_column names"),
        ({"quality": None}, "data.jsonl, line 3: `quality` must be a number, found null; --score_column needs one"),
        ({"quality": "good"}, "data.jsonl, line 3: `quality` must be a number, found str 'good'"),
        ({"quality": float("inf")}, "data.jsonl, line 3: `quality` is inf; --score_column needs a finite number"),
        ({"quality": True}, "data.jsonl, line 3: `quality` is True; --score_column needs a finite number"),
        ({"quality": 1, "label": True}, "data.jsonl, line 3: has a `label`, and --score_column judges answers"),
    ],
)
def test_a_score_that_cannot_be_used_is_refused_with_its_row(write_jsonl, corpus, change, message):
    rows = [{"prompt": "ask", "response": f"a{i}", "quality": i} for i in range(4)]
    rows[2] = {"prompt": "ask", "response": "x", **change}
    with pytest.raises(InputError) as error:
        corpus(write_jsonl(rows), scoring=Scoring({"quality": 1.0})).check()
    assert message in str(error.value)


def test_scores_for_rows_of_several_answers_are_refused(write_jsonl, corpus, pairs_of):
    scoring = Scoring({"quality": 1.0})
    pairs = [{"prompt": f"ask {i}", "chosen": "a", "rejected": "b"} for i in range(4)]
    with pytest.raises(
        InputError, match="line 1: the row holds several answers, and --score_column quality is for rows"
    ):
        corpus(write_jsonl([row | {"quality": 1} for row in pairs]), scoring=scoring).check()
    plain = write_jsonl(pairs, "plain.jsonl")
    with pytest.raises(InputError, match="--score_column quality has no effect"):
        pairs_of(plain, scoring=scoring)
    found, _, _ = pairs_of(plain, write_jsonl(scored_rows(), "scored.jsonl"), scoring=scoring)
    assert found["ask 1"] == [("a", "b")] and found["ask e"] == [("e1", "e0")]


def test_a_threshold_makes_labels(write_jsonl, corpus, tiny_tokenizer):
    path = write_jsonl(scored_rows())
    data = corpus(path, purpose="labelled", scoring=Scoring({"quality": 1.0}, threshold=2))
    rows = [row for part in build_datasets(data, tiny_tokenizer) for row in part]
    found = {tiny_tokenizer.decode(row["response_ids"], skip_special_tokens=True).strip(): row["label"] for row in rows}
    assert len(found) == 13
    assert {answer for answer, label in found.items() if label} == {"a0", "a2", "b0", "b1", "d0", "e1", "f1"}


def test_rows_are_named_by_what_pairs_are_made_of(write_jsonl, corpus, tiny_tokenizer):
    path = write_jsonl(scored_rows())
    keys = {
        build_datasets(corpus(path, scoring=Scoring(columns), pairs=pairs), tiny_tokenizer)[0].key
        for columns in ({"quality": 1.0}, {"quality": 2.0}, {"quality": 1.0, "length": 0.5})
        for pairs in ("best_worst", "all")
    }
    assert len(keys) == 6


def test_numbers_by_hand():
    groups = numbered(np.array([7, -3, 7, 7, -3]), np.array([0, 0, 1, 0, 0]))
    assert groups[0] == groups[3] and groups[1] == groups[4] and len(set(groups)) == 3
    assert by_prompt(np.array([4, 3, 2, 1, 0]), groups).tolist() == [4, 1, 3, 0, 2]
