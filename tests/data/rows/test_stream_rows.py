"""A stream makes of each example the rows that preparation makes: chat templates, filters, numbers, audit, report."""

import itertools
import json

import pytest
from chat_tokenizers import chat_tokenizer

from utils.data import Corpus, build_dataloader, build_datasets
from utils.data.batches import stream_loader
from utils.data.rows.filters import Filters
from utils.errors import InputError

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OTHER_END = CHATML.replace("<|im_end|>", "<|eot_id|>")
DATA_SPLIT = {"sft": "1,0,0", "preference": "0,1,0", "prompts": "0,0,1"}


@pytest.fixture
def build(tmp_path):
    """The rows of train.jsonl and test.jsonl, prepared, or streamed as `streams` says."""

    def call(purpose="preference", streams=True, template=CHATML, max_len=128, **options):
        tokenizer = chat_tokenizer(template, adds_bos=False, eos="<|im_end|>" if template else "</s>")
        options = {"paths": [str(tmp_path / "data")], "data_split": DATA_SPLIT[purpose]} | options
        stream = {"shuffle_buffer": 16, "held_out_rows": 99} if streams else {}
        cache = str(tmp_path / "cache")
        corpus = Corpus(purpose=purpose, max_len=max_len, cache_dir=cache, **options, **stream)
        corpus.check()
        return build_datasets(corpus, tokenizer)

    return call


@pytest.fixture
def data(tmp_path):
    """40 training and 6 held-out dialogues of three turns with two answers, and with numbers in other columns."""

    def write(name, numbers):
        rows = [
            {
                "prompt": [
                    {"role": "user", "content": f"milk {i} ?"},
                    {"role": "assistant", "content": "white . " * (i % 3 + 1)},
                    {"role": "user", "content": "and the fox ? " * (i % 9 + 1)},
                ],
                "chosen": [{"role": "assistant", "content": f"the milk is white {i} . " * (i % 5 + 1)}],
                "rejected": [{"role": "assistant", "content": "\u200b" if i % 10 == 3 else "no " * (i % 4 + 1)}],
                "margin": i / 4,
            }
            for i in numbers
        ]
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("train.jsonl", range(40))
    write("test.jsonl", range(40, 46))


def as_set(rows) -> set[str]:
    return {json.dumps({key: value for key, value in row.items() if value is not None}, sort_keys=True) for row in rows}


def an_epoch(rows, count: int) -> list[dict]:
    batches = iter(build_dataloader(rows, list, 1, shuffle=True, seed=1, rank=0, world_size=1))
    return list(itertools.chain(*itertools.islice(batches, count)))


@pytest.mark.parametrize(
    ("purpose", "options"),
    [
        ("preference", {}),
        ("preference", {"template": None, "system_prompt": "Be brief ."}),
        ("preference", {"number_columns": {"margin": "margin"}}),
        ("preference", {"filters": Filters(min_response_tokens=4, max_row_tokens=110)}),
        ("preference", {"filters": Filters(drop_empty=True)}),
        ("sft", {"max_len": 256, "train_on": "all", "system_prompt": "Be brief ."}),
        ("sft", {"max_len": 60, "filters": Filters(drop_truncated=True)}),
        ("prompts", {"max_len": 40}),
        ("prompts", {"max_len": 60, "filters": Filters(drop_truncated=True)}),
    ],
)
def test_the_rows_of_a_stream_are_the_prepared_rows(build, data, purpose, options):
    prepared, held_out = build(purpose, streams=False, **options)
    streamed, streamed_held_out = build(purpose, **options)
    assert as_set(an_epoch(streamed, len(prepared))) == as_set(prepared)
    assert as_set(streamed_held_out) == as_set(held_out)
    filters = options.get("filters", Filters())
    assert (len(prepared) < 40) == bool(filters.active())
    assert streamed.key != prepared.key


def test_a_known_cause_changes_the_key(build, data):
    """A resumed run is one with the same rows."""
    others = [{}, {"template": None}, {"system_prompt": "Be brief ."}, {"filters": Filters(max_row_tokens=120)}]
    others.append({"number_columns": {"margin": "margin"}})
    assert len({build(**options)[0].key for options in others}) == len(others)
    assert build()[0].key == build()[0].key


def test_the_first_rows_of_a_stream_are_audited(build, data):
    rows, _ = build()
    assert "audit: 80 answers of 40 rows checked, which end with <|im_end|>" in rows.description
    with pytest.raises(InputError, match=r"train.jsonl, line 1: answer 1 ends with <\|eot_id\|>, but generation stops"):
        build("sft", template=OTHER_END)


def test_filters_that_leave_nothing_are_refused_after_an_epoch(build, data, tmp_path, monkeypatch):
    monkeypatch.setattr(stream_loader, "FRUITLESS", 50)
    filters = Filters(min_response_tokens=200)
    with pytest.raises(InputError, match="no held-out row is left of 6 .*6 with a response of fewer than 200 tokens"):
        build(filters=filters)
    lines = [json.loads(line) for line in (tmp_path / "data/test.jsonl").read_text().splitlines()]
    for line in lines:
        line["chosen"][0]["content"] = line["rejected"][0]["content"] = "milk " * 300
        line["chosen"][0]["content"] += "white"
    (tmp_path / "data/test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, held_out = build(filters=filters, max_len=4096)
    assert len(held_out) == 6
    with pytest.raises(InputError, match="no training row is left of a whole epoch: .*--min_response_tokens 200"):
        an_epoch(rows, 1)


def test_the_report_says_what_is_known(build, data):
    filters = Filters(max_row_tokens=100)
    rows, held_out = build(filters=filters)
    report = json.loads(json.dumps(rows.report))
    (source,) = report["sources"]
    assert report["training_rows"] is source["training_rows"] is source["rows"] is None
    assert report["held_out_rows"] == source["held_out_rows"] == len(held_out)
    assert sum(source["filtered"].values()) == 6 - len(held_out) > 0
    assert source["share_of_this_step"] == 1 and report["filters"] == {"max_row_tokens": 100}
    assert report["tokens"]["training"] == {} and report["tokens"]["held_out"]["chosen"]["longest"] > 5
    assert report["summary"] == rows.description.splitlines()


def test_pairs_of_two_sources_keep_the_number_of_theirs(build, data, tmp_path, write_jsonl):
    other = write_jsonl([{"prompt": f"fox {i} ?", "chosen": "red", "rejected": "blue"} for i in range(40)])
    rows, _ = build(paths=[str(tmp_path / "data"), other])
    taken = an_epoch(rows, 60)
    tokenizer = chat_tokenizer(CHATML)
    assert {row["source"] for row in taken} == {0, 1}
    assert all((tokenizer.decode(row["rejected_ids"]).startswith("blue")) == (row["source"] == 1) for row in taken)
