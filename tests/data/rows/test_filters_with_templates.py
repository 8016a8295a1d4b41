"""Filters beside chat templates, several trained answers, blending, the sources of pairs, and the audit."""

import pytest
from chat_tokenizers import chat_tokenizer

from utils.data import Corpus, build_datasets
from utils.data.rows.filters import Filters
from utils.errors import InputError

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ALTERNATING = "{% for m in messages %}{{ raise_exception('turns must alternate') if (m.role == 'user') != "
ALTERNATING += "(loop.index0 % 2 == 0) }}{% endfor %}" + CHATML


@pytest.fixture
def build(tmp_path):
    def call(purpose, paths, template=CHATML, max_len=256, train_on="last", numbers=None, weights=None, **filters):
        tokenizer = chat_tokenizer(template, adds_bos=False, eos="<|im_end|>" if template else "</s>")
        corpus = Corpus(
            purpose=purpose,
            paths=paths,
            max_len=max_len,
            data_split={"sft": "1,0,0", "preference": "0,1,0"}[purpose],
            cache_dir=str(tmp_path / "cache"),
            train_on=train_on,
            number_columns=numbers or {},
            blend_weights=weights,
            filters=Filters(**filters),
        )
        corpus.check()
        return build_datasets(corpus, tokenizer)

    return call


def dialogue(*texts):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def pair(number, chosen="the milk is white .", rejected="no", **columns):
    prompt = [{"role": "user", "content": f"milk {number} ?"}]
    answers = {"chosen": chosen, "rejected": rejected}
    return {"prompt": prompt, **columns} | {
        name: [{"role": "assistant", "content": text}] for name, text in answers.items()
    }


def filtered(rows):
    return [source["filtered"] for source in rows.report["sources"]]


def test_lengths_are_those_of_the_prepared_ids(build, write_jsonl):
    """Also the audit compares the rows that remain: half of those that it looks at are left out."""
    path = write_jsonl([pair(i, "the " * (i % 5) + "milk", "colour " * (i % 7 + 1)) for i in range(1, 60)])
    for template in (CHATML, None):
        whole, held_out = build("preference", [path], template=template)
        lengths = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in whole]
        limit = sorted(lengths)[len(lengths) // 2]
        kept = [row for row, length in zip(whole, lengths, strict=True) if length <= limit]
        for _ in range(2):  # prepared, and from the cache
            for options in ({"max_row_tokens": limit}, {"max_len": limit, "drop_truncated": True}):
                rows, _ = build("preference", [path], template=template, **options)
                assert list(rows) == kept and 0 < len(kept) < len(whole)
                assert f"of {len(kept)} rows checked" in rows.description and not rows.report["sources"][0]["cut"]


def test_all_answers_of_a_dialogue_are_kept_or_none(build, write_jsonl):
    path = write_jsonl(
        [dialogue(f"{i} :", "ok" if i % 2 else "white " * 20, "what ?", "white is it") for i in range(40)]
    )
    whole, _ = build("sft", [path], train_on="all")
    assert all(len(row["target_spans"]) == 4 for row in whole)
    lengths = [len(row["input_ids"]) for row in whole]
    limit = (min(lengths) + max(lengths)) // 2
    rows, _ = build("sft", [path], train_on="all", max_len=limit, drop_truncated=True)
    assert list(rows) == [row for row in whole if len(row["input_ids"]) <= limit] and 0 < len(rows) < len(whole)
    # The last answer is measured; the earlier one, "ok", is shorter and leaves out nothing.
    spans = [row["target_spans"] for row in whole]
    last = min(end - start for *_, start, end in spans) - 1
    assert min(end - start for start, end, *_ in spans) - 1 < last
    rows, _ = build("sft", [path], train_on="all", min_response_tokens=last)
    assert list(rows) == list(whole) and filtered(rows) == [{}]
    with pytest.raises(InputError, match="no training row is left"):
        build("sft", [path], train_on="all", min_response_tokens=last + 1)


def test_templates_do_not_decide_which_rows_are_duplicates(build, write_jsonl):
    path = write_jsonl([dialogue(f"what is milk {i % 20} ?", "white") for i in range(60)])
    counts = [filtered(build("sft", [path], template=each, deduplicate="exact")[0]) for each in (None, CHATML)]
    assert counts[0] == counts[1] == [{"that repeat another training row": 38}]


def test_empty_rows_of_your_own_file_are_no_licence_to_leave_out_others(build, write_jsonl):
    """`--drop_empty` skips rows without a response; a dialogue that the template cannot write stays an error."""
    rows = [dialogue(f"what is milk {i} ?", "white") for i in range(30)]
    path = write_jsonl([*rows, dialogue("what ?", " ")])
    assert sum(map(len, build("sft", [path], template=ALTERNATING, drop_empty=True))) == 30
    twice = {"messages": [{"role": "user", "content": "a"}, *rows[0]["messages"]]}
    with pytest.raises(InputError, match="turns must alternate"):
        build("sft", [write_jsonl([*rows, twice], "twice.jsonl")], template=ALTERNATING, drop_empty=True)


def test_pairs_keep_source_and_margin_beside_filters_and_blending(build, write_jsonl):
    ones = write_jsonl(
        [pair(f"1 {i}", "white milk", "no" if i % 2 else "it is not", margin=i) for i in range(40)], "1.jsonl"
    )
    twos = write_jsonl([pair(f"2 {i % 20}", rejected="it is not", margin=i % 20 + 100) for i in range(40)], "2.jsonl")
    for weights in (None, (0.5, 0.5)):
        options = {"numbers": {"margin": "margin"}, "deduplicate": "exact", "min_response_tokens": 3}
        train, held_out = build("preference", [ones, twos], weights=weights, **options)
        whole = train.of_all_epochs()
        assert {row["source"] for row in whole} == {row["source"] for row in held_out} == {0, 1}
        assert all((row["margin"] >= 100) == (row["source"] == 1) for row in whole)
        first, second = train.report["sources"]
        assert first["filtered"] == {"with a response of fewer than 3 tokens": 20}
        assert second["filtered"] == {"that repeat another training row": second["training_rows"]}
        assert [whole.column("source").count(n) for n in (0, 1)] == [
            source["training_rows"] for source in (first, second)
        ]
