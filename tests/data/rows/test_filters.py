"""Filters of rows: what each leaves out, that it is counted, and that no other row moves to another step."""

import json

import pytest

from utils.arguments import DpoConfig, PpoConfig, SftConfig
from utils.data import Corpus, build_datasets
from utils.data.rows.filters import Filters
from utils.errors import InputError

MODELS = {"actor_model_name_or_path": "a", "critic_model_name_or_path": "c"}
ALL = {"sft": "1,0,0", "preference": "0,1,0", "labelled": "0,1,0", "prompts": "0,0,1", "pretrain": "1,1,1"}


@pytest.fixture
def build(tiny_tokenizer, tmp_path):
    def call(purpose, *paths, max_len=256, data_split=None, **filters):
        corpus = Corpus(
            purpose=purpose,
            paths=list(paths),
            max_len=max_len,
            data_split=data_split or ALL[purpose],
            cache_dir=str(tmp_path / "cache"),
            filters=Filters(**filters),
        )
        corpus.check()
        return build_datasets(corpus, tiny_tokenizer)

    return call


@pytest.fixture
def prompts(tiny_tokenizer):
    def call(rows) -> list[str]:
        ids = (row.get("prompt_ids") or row["input_ids"][: row["response_start"]] for row in rows)
        return [tiny_tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]

    return call


def pair(question: str, chosen: str = " yes", rejected: str = " no") -> dict[str, str]:
    return {"prompt": f" Human: {question} Assistant:", "chosen": chosen, "rejected": rejected}


def test_defaults_leave_out_nothing_and_are_no_part_of_the_key(build, write_jsonl, pairs):
    path = write_jsonl([*pairs, *pairs])
    plain, _ = build("sft", path)
    assert Filters().active() == {} and Filters.of(SftConfig(model_name_or_path="m")) == Filters()
    assert plain.report["filters"] == {} and not any(source["filtered"] for source in plain.report["sources"])
    assert build("sft", path, min_response_tokens=1)[0].key != plain.key


def test_flags_reach_the_corpus_of_each_step():
    flags = {"deduplicate": "near", "max_row_tokens": 9, "drop_truncated": True, "drop_empty": True}
    config = DpoConfig(model_name_or_path="m", min_response_tokens=3, **flags)
    assert Corpus.of(config).filters == Filters(min_response_tokens=3, **flags)
    config = PpoConfig(unsupervised_dataset_name="t", **MODELS, **flags)
    assert Corpus.of(config).filters == Filters(**flags)
    assert Corpus.of_texts(config).filters == Filters(deduplicate="near")


@pytest.mark.parametrize("purpose", ["sft", "preference", "prompts"])
def test_filters_do_not_move_a_row_to_another_step(build, write_jsonl, prompts, purpose):
    long = " it is white " * 5
    rows = [pair(f"milk {i} ?", chosen=long if i % 3 else " white", rejected=f"{long} no") for i in range(60)]
    path = write_jsonl(rows)
    split = {"data_split": "2,4,4"}
    plain, held_out = (prompts(part) for part in build(purpose, path, **split))
    some, held_out_some = (
        prompts(part)
        for part in build(
            purpose, path, min_response_tokens=12 if purpose != "prompts" else 0, drop_empty=True, **split
        )
    )
    assert [prompt for prompt in plain if prompt in some] == some
    assert set(held_out_some) <= set(held_out)
    assert len(some) < len(plain) or purpose == "prompts"


def test_lengths_by_hand(build, write_jsonl, tiny_tokenizer):
    rows = [pair(f"a {i} ?", chosen=" it is white", rejected=" no" if i % 2 else " not at all") for i in range(40)]
    path = write_jsonl(rows)
    train, held_out = build("preference", path)
    lengths = sorted({min(len(row["chosen_ids"]), len(row["rejected_ids"])) - 1 for row in train})
    assert len(lengths) == 2  # without EOS
    kept, _ = build("preference", path, min_response_tokens=lengths[1])
    assert [row for row in train if len(row["rejected_ids"]) > lengths[1]] == list(kept)
    (source,) = kept.report["sources"]
    assert source["filtered"] == {f"with a response of fewer than {lengths[1]} tokens": 20}
    assert f"left out by filters: 20 with a response of fewer than {lengths[1]} tokens" in kept.description
    assert (kept.report["training_rows"], kept.report["held_out_rows"]) == (len(kept), 40 - 20 - len(kept))

    longest = max(map(tokens_of, train))
    assert len(build("preference", path, max_row_tokens=longest)[0]) == len(train)
    kept, _ = build("preference", path, max_row_tokens=longest - 1)
    assert [row for row in train if tokens_of(row) < longest] == list(kept) and 0 < len(kept) < len(train)
    assert (
        sum(kept.report["sources"][0]["filtered"].values())
        + kept.report["training_rows"]
        + kept.report["held_out_rows"]
        == 40
    )


def tokens_of(row: dict) -> int:
    """Of the longest sequence of a row."""
    answers = [len(row[name]) for name in ("chosen_ids", "rejected_ids", "response_ids", "input_ids") if name in row]
    return len(row.get("prompt_ids", ())) + max(answers, default=0)


@pytest.mark.parametrize("purpose", ["sft", "preference", "prompts", "labelled"])
def test_rows_that_would_be_cut_are_dropped_and_the_others_are_unchanged(build, write_jsonl, purpose):
    rows = [pair(f"{i} " + "milk " * (i % 12), chosen=f" white {i}") for i in range(80)]
    if purpose == "labelled":
        rows = [
            {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 3 == 0} for i, row in enumerate(rows)
        ]
    path = write_jsonl(rows)
    whole, held_out = build(purpose, path)
    limit = sorted(map(tokens_of, [*whole, *held_out]))[60]
    cut, _ = build(purpose, path, max_len=limit)
    kept, held_out = build(purpose, path, max_len=limit, drop_truncated=True)
    assert sum(cut.report["sources"][0]["cut"].values()) > 0 and not kept.report["sources"][0]["cut"]
    assert list(kept) == [row for row in whole if tokens_of(row) <= limit] and 0 < len(kept) < len(whole)
    assert kept.report["sources"][0]["filtered"] == {
        f"that would be cut to {limit} tokens": 80 - len(kept) - len(held_out)
    }


def test_plain_text_is_divided_and_not_cut(build, write_jsonl):
    path = write_jsonl([{"text": f"the milk is white . number {i}"} for i in range(20)])
    rows, _ = build("sft", path, max_len=6, drop_truncated=True)
    assert len(rows) > 20 and not rows.report["sources"][0]["filtered"]
    with pytest.raises(InputError, match="no training row is left of 19 .*of more than 6 tokens"):
        build("sft", path, max_len=6, max_row_tokens=6)


def test_equal_training_rows_and_those_of_the_held_out_ones(build, write_jsonl, prompts):
    """The first of equal rows stays; held-out rows stay, also where they are equal to each other."""
    write_jsonl([pair("a"), pair("b"), pair("a"), pair("a", " other"), pair("held"), pair("c")], "set/train.jsonl")
    folder = write_jsonl([pair("held"), pair("held"), pair("far")], "set/test.jsonl").rpartition("/")[0]
    train, held_out = build("preference", folder, deduplicate="exact")
    asked = sorted(prompt.split()[1] for prompt in prompts(train))
    assert asked == ["a", "a", "b", "c"] and len(held_out) == 3
    assert train.report["sources"][0]["filtered"] == {
        "that repeat another training row": 1,
        "that repeat a held-out row": 1,
    }
    # Step 1 does not read the rejected answer, and a rows for PPO is its prompt alone.
    write_jsonl([pair("a", rejected=" 1"), pair("a", rejected=" 2"), pair("b"), pair("c")], "set/train.jsonl")
    assert len(build("sft", folder, deduplicate="exact")[0]) == 3
    assert len(build("preference", folder, deduplicate="exact")[0]) == 4


def test_one_answer_judged_in_both_ways_is_no_repetition(build, write_jsonl):
    rows = [{"prompt": f"q{i} Assistant:", "completion": "a", "label": i % 2 == 0} for i in range(20)]
    twice = [{**row, "label": not row["label"]} for row in rows]
    train, held_out = build("labelled", write_jsonl([*rows, *twice, *rows]), deduplicate="exact")
    assert len({json.dumps(row) for row in train}) == len(train) and len(train) + len(held_out) > 38


def test_near_duplicates_of_held_out_rows_leave_training(build, write_jsonl, prompts):
    pytest.importorskip("rensa", reason="MinHash is optional: pip install rensa")
    question = "what is the colour of the old milk that the small dog did not drink this morning"
    others = [pair(f"{word} is a word that nobody says to the fox", f" {word} {word}") for word in "abcdefghij"]
    write_jsonl([*others, pair(question.replace("small", "big"), " it is white as snow")], "set/train.jsonl")
    folder = write_jsonl([pair(question, " it is white as snow")], "set/test.jsonl").rpartition("/")[0]
    train, held_out = build("sft", folder, deduplicate="near")
    assert len(train) == 10 and len(held_out) == 1 and not any("milk" in prompt for prompt in prompts(train))
    assert train.report["sources"][0]["filtered"] == {"that repeat a held-out row": 1}


def test_sources_are_counted_each(build, write_jsonl):
    one = write_jsonl([pair(f"a {i}") for i in range(20)], "one.jsonl")
    two = write_jsonl([pair(f"b {i}", rejected=" yes" if i < 5 else " no") for i in range(40)] * 2, "two.jsonl")
    train, held_out = build("preference", one, two, deduplicate="exact", data_split="1,1,1")
    first, second = train.report["sources"]
    assert (first["rows"], second["rows"], first["unusable"]) == (20, 80, {})
    assert second["unusable"] == {"whose chosen equals its rejected response": 10}
    assert first["divided"].keys() == {"step 1", "step 2", "step 3"}
    for source in (first, second):
        assert source["held_out"] + sum(source["divided"].values()) == source["rows"]
        assert set(source["tokens"]["training"]) == {"prompt", "chosen", "rejected"}
    assert first["training_rows"] == first["divided"]["step 2"] and not first["filtered"]
    # Every usable row of the second is there twice, with both of them in the same part.
    assert second["filtered"] == {"that repeat another training row": second["training_rows"]}
    assert first["training_rows"] + second["training_rows"] == train.report["training_rows"] == len(train)
    assert first["held_out_rows"] + second["held_out_rows"] == len(held_out)
    tokens = train.report["tokens"]["training"]["prompt"]
    lengths = train.lengths("prompt_ids")
    assert tokens["mean"] == round(sum(lengths) / len(lengths), 2) and tokens["longest"] == max(lengths)


def test_rows_in_which_nothing_is_visible(build, write_jsonl):
    good = [pair(f"a {i}") for i in range(40)]
    bad = [pair("x", " \u200b\ufeff"), pair("y", " yes", " yes\u200b "), pair("z", " caf\u00e9", " cafe\u0301")]
    path = write_jsonl([*good, *bad])
    assert sum(map(len, build("preference", path))) == 43
    train, held_out = build("preference", path, drop_empty=True)
    assert len(train) + len(held_out) == 40
    assert train.report["sources"][0]["unusable"] == {
        "in which nothing is visible": 1,
        "whose answers differ in nothing visible": 2,
    }
    path = write_jsonl([*good, {**pair("w"), "rejected": ""}])
    with pytest.raises(InputError, match="line 41: has no response: `rejected` is empty"):
        build("preference", path)
    train, held_out = build("preference", path, drop_empty=True)
    assert len(train) + len(held_out) == 40 and "1 without a response" in train.description


def test_rows_prepared_before_there_was_a_report(build, write_jsonl, pairs, tmp_path):
    path = write_jsonl(pairs)
    build("sft", path)
    (file,) = (tmp_path / "cache").rglob("report.json")
    report = json.loads(file.read_text())
    del report["data"]
    file.write_text(json.dumps(report))
    again = build("sft", path)[0].report
    assert again["sources"][0]["rows"] == 40 and "clear the cache" in again["note"]
