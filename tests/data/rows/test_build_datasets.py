import json
import socket
from pathlib import Path

import pytest

from utils.arguments import PpoConfig, RewardModelConfig, SftConfig
from utils.data import Corpus, build_datasets
from utils.data.rows.cache import ROW_FORMAT
from utils.errors import InputError

PURPOSES = ("sft", "preference", "prompts")


@pytest.fixture
def corpus(tmp_path):
    """A `Corpus` with a cache below the test's folder."""

    def call(purpose, *paths, **options):
        defaults = {"data_split": "1,1,1", "cache_dir": str(tmp_path / "cache")}
        defaults["max_len"] = 256 if purpose == "prompts" else 512
        return Corpus(purpose=purpose, paths=[str(path) for path in paths], **(defaults | options))

    return call


@pytest.fixture
def build(corpus, tiny_tokenizer):
    """`build_datasets` with the tiny tokenizer and a cache below the test's folder."""

    def call(purpose, *paths, tokenizer=tiny_tokenizer, **options):
        return build_datasets(corpus(purpose, *paths, **options), tokenizer)

    return call


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_row_keys_and_spans(build, write_jsonl, pairs, tiny_tokenizer):
    path = write_jsonl(pairs)
    by_prompt = {row["prompt"]: row for row in pairs}
    eos = tiny_tokenizer.eos_token_id

    for row in build("sft", path)[0]:
        assert set(row) == {"input_ids", "response_start"}
        prompt, response = row["input_ids"][: row["response_start"]], row["input_ids"][row["response_start"] :]
        source = by_prompt[text_of(tiny_tokenizer, prompt)]
        assert prompt == tiny_tokenizer(source["prompt"]).input_ids
        assert text_of(tiny_tokenizer, response) == source["chosen"]
        assert response.count(eos) == 1 and response[-1] == eos

    for row in build("preference", path)[0]:
        assert set(row) == {"prompt_ids", "chosen_ids", "rejected_ids", "source", "margin"}
        assert (row["source"], row["margin"]) == (0, None)
        source = by_prompt[text_of(tiny_tokenizer, row["prompt_ids"])]
        assert text_of(tiny_tokenizer, row["chosen_ids"]) == source["chosen"]
        assert text_of(tiny_tokenizer, row["rejected_ids"]) == source["rejected"]
        assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == eos

    for row in build("prompts", path)[0]:
        assert set(row) == {"prompt_ids", "prompt", "reference", "columns"}
        assert row["prompt_ids"] == tiny_tokenizer(row["prompt"]).input_ids
        assert row["prompt"] in by_prompt


def test_numbers_of_a_pair_reach_its_row(build, write_jsonl, pairs, tiny_tokenizer):
    """The margin in the named column, as a number or as text, and the data set, in training and held-out rows."""
    first = write_jsonl([row | {"strength": i / 4, "margin": -1} for i, row in enumerate(pairs)], "first.jsonl")
    more = [{name: text.replace("question", "thing") for name, text in row.items()} for row in pairs]
    second = write_jsonl([row | {"strength": f"{i}.5"} for i, row in enumerate(more)], "second.jsonl")
    parts = build("preference", first, second, data_split="0,1,0", number_columns={"margin": "strength"})
    found = {
        text_of(tiny_tokenizer, row["prompt_ids"]): (row["source"], row["margin"]) for part in parts for row in part
    }
    expected = {row["prompt"]: (0, i / 4) for i, row in enumerate(pairs)}
    expected |= {row["prompt"]: (1, i + 0.5) for i, row in enumerate(more)}
    assert found == expected
    assert {row["margin"] for part in build("preference", first, second) for row in part} == {None}


def test_the_column_of_a_margin_is_part_of_the_key_only_where_one_is_named(build, write_jsonl, pairs):
    path = write_jsonl([row | {"a": 1, "b": 2} for row in pairs])
    keys = [
        build("preference", path, number_columns=columns)[0].key for columns in ({}, {"margin": "a"}, {"margin": "b"})
    ]
    assert len(set(keys)) == 3 and build("preference", path)[0].key == keys[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "has no column `strength`, which --margin_column names"),
        ({"strength": None}, "`strength` must be a number, found null; --margin_column needs one in every row"),
        ({"strength": "much"}, "`strength` must be a number, found str 'much'"),
        ({"strength": float("nan")}, "`strength` is nan; --margin_column needs a finite number"),
        ({"strength": True}, "`strength` is True; --margin_column needs a finite number"),
    ],
)
@pytest.mark.parametrize("line", [3, 30])
def test_a_row_without_its_margin_is_named_by_its_line(build, corpus, write_jsonl, pairs, change, message, line):
    rows = [row | {"strength": 1} for row in pairs]
    rows[line - 1] = pairs[line - 1] | change
    data = corpus("preference", write_jsonl(rows), number_columns={"margin": "strength"})
    with pytest.raises(InputError) as error:
        if line < 20:  # the first rows are looked at before anything is loaded
            data.check()
        else:
            build("preference", *data.paths, number_columns=data.number_columns)
    assert f"data.jsonl, line {line}: {message}" in str(error.value)


def test_sources_have_short_names_unless_these_are_equal(corpus):
    assert corpus("preference", "a/x.jsonl", "Dahoas/rm-static/").names == ["x.jsonl", "rm-static"]
    assert corpus("preference", "a/x.jsonl", "b/x.jsonl", "y").names == ["a/x.jsonl", "b/x.jsonl", "y"]


def rows_by_prompt(build, write_jsonl, rows):
    """All rows for prompts by their text, training and held-out ones."""
    train, held_out = build("prompts", write_jsonl(rows), data_split="0,0,1")
    assert len(train) + len(held_out) == len(rows)
    return {row["prompt"]: row for row in (*train, *held_out)}


def test_prompts_carry_their_right_answer(build, write_jsonl, pairs):
    """The row's `reference`; where that is no text, the preferred answer; else None."""
    pairs = [{**row, "reference": [f"right {i}", None, 7, ""][i % 4]} for i, row in enumerate(pairs)]
    found = rows_by_prompt(build, write_jsonl, pairs)
    for i, row in enumerate(pairs):
        wanted = row["chosen"].strip()
        assert found[row["prompt"]]["reference"] == [f"right {i}", wanted, wanted, ""][i % 4]

    rows = [{"prompt": f"q{i} Assistant:", "completion": f" a{i}", "label": i % 2 == 0} for i in range(9)]
    found = rows_by_prompt(build, write_jsonl, rows)
    for i, row in enumerate(rows):
        assert found[row["prompt"]]["reference"] == (None if i % 2 else f"a{i}")

    found = rows_by_prompt(build, write_jsonl, [{"prompt": f"q{i} Assistant:"} for i in range(9)])
    assert {row["reference"] for row in found.values()} == {None}


def test_the_reference_of_a_dialogue_is_its_wanted_answer(build, write_jsonl):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    other = [{"role": "user", "content": "Why"}, {"role": "assistant", "content": "Yes"}]
    alpaca = [{"instruction": question, "output": "Yes"} for question in ("Hi", "Why")]
    for rows in ([{"messages": chat}, {"messages": other}], alpaca):
        rows = [row for part in build("prompts", write_jsonl(rows), data_split="0,0,1") for row in part]
        found = {(row["prompt"], row["reference"]) for row in rows}
        assert found == {(" Human: Hi Assistant:", "Yes"), (" Human: Why Assistant:", "Yes")}


def test_prompts_carry_the_columns_that_their_format_does_not_read(build, write_jsonl, pairs):
    def others(i):
        return {"id": i, "tags": ["a", {"b": None}], "reference": "r", "score": 0.5, "note": 'Köln "\n'}

    found = rows_by_prompt(build, write_jsonl, [{**row, **others(i)} for i, row in enumerate(pairs)])
    for i, row in enumerate(pairs):
        assert json.loads(found[row["prompt"]]["columns"]) == others(i)
    found = rows_by_prompt(build, write_jsonl, pairs)
    assert {row["columns"] for row in found.values()} == {"{}"}


def prompts_of(purpose, dataset, tokenizer):
    if purpose == "sft":
        return {text_of(tokenizer, row["input_ids"][: row["response_start"]]) for row in dataset}
    return {text_of(tokenizer, row["prompt_ids"]) for row in dataset}


@pytest.mark.parametrize("count", [4, 40])
def test_the_three_steps_never_share_a_row(build, write_jsonl, pairs, tiny_tokenizer, count):
    path = write_jsonl(pairs[:count])
    parts = {}
    for purpose in PURPOSES:
        train, held_out = build(purpose, path, data_split="2,4,4")
        parts[purpose] = prompts_of(purpose, train, tiny_tokenizer)
        parts["held out"] = parts.get("held out") or prompts_of(purpose, held_out, tiny_tokenizer)
        assert prompts_of(purpose, held_out, tiny_tokenizer) == parts["held out"]
    assert all(parts.values())
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == count


def test_a_row_that_one_step_leaves_out_does_not_move_the_others(build, write_jsonl, pairs, tiny_tokenizer):
    all_used = prompts_of("preference", build("preference", write_jsonl(pairs))[0], tiny_tokenizer)
    ties = {row["prompt"] for row in pairs[::3]}
    tied = write_jsonl([{**row, "rejected": row["chosen"]} if row["prompt"] in ties else row for row in pairs])
    assert prompts_of("preference", build("preference", tied)[0], tiny_tokenizer) == all_used - ties
    assert 0 < len(all_used & ties) < len(all_used)


def test_a_split_of_its_own_is_held_out_whole(build, write_jsonl, pairs):
    write_jsonl(pairs[:9], "set/train.jsonl")
    folder = Path(write_jsonl(pairs[9:14], "set/eval.jsonl")).parent
    for purpose in PURPOSES:
        train, held_out = build(purpose, folder)
        assert (len(train), len(held_out)) == (3, 5)


def test_several_paths_are_blended_and_sft_only_data_goes_to_step_1_whole(build, write_jsonl, pairs, tiny_tokenizer):
    one, two = write_jsonl(pairs[:10], "one.jsonl"), write_jsonl(pairs[10:30], "two.jsonl")
    answers = [{"instruction": f"ask {i}", "output": f"answer {i}"} for i in range(6)]
    extra = write_jsonl(answers, "extra.jsonl")
    train, held_out = build("sft", one, two, data_split="1,0,0", undivided=[extra])
    assert (len(train), len(held_out)) == (9 + 19 + 5, 3)
    order = [text_of(tiny_tokenizer, row["input_ids"]) for row in train]
    first = [int(text.split()[2]) for text in order if "question" in text]
    assert any((a < 10) != (b < 10) for a, b in zip(first, first[1:], strict=False))  # mixed, not one after the other
    model = {"model_name_or_path": "x", "data_path": [one, two]}
    assert Corpus.of(SftConfig(sft_only_data_path=[extra], **model)).undivided == [extra]
    assert Corpus.of(RewardModelConfig(**model)).undivided == []
    assert Corpus.of(PpoConfig(actor_model_name_or_path="x", critic_model_name_or_path="y")).undivided == []
    train, held_out = build("preference", one, two, data_split="0,1,0")
    assert (len(train), len(held_out)) == (28, 2)
    again = build("sft", one, two, data_split="1,0,0", undivided=[extra])[0]
    assert [row["input_ids"] for row in again] == [tiny_tokenizer(text).input_ids + [2] for text in order]
    other = build("sft", one, two, data_split="1,0,0", undivided=[extra], seed=2)[0]
    assert [row["input_ids"] for row in other] != [row["input_ids"] for row in again]


def test_plain_text_trains_every_token(build, write_jsonl, tiny_tokenizer):
    texts = [f"the milk is white . number {i}" for i in range(8)] + ["  "]
    train, held_out = build("sft", write_jsonl([{"text": text} for text in texts]), data_split="1,0,0")
    assert (len(train), len(held_out)) == (7, 1)
    assert all(row["response_start"] == 1 for row in train)  # after BOS
    assert {text_of(tiny_tokenizer, row["input_ids"]) for row in (*train, *held_out)} == set(texts[:8])
    short, _ = build("sft", write_jsonl([{"text": text} for text in texts]), data_split="1,0,0", max_len=5)
    assert len(short) > 7 and max(len(row["input_ids"]) for row in short) == 5


def test_unsupervised_text_comes_in_blocks(build, write_jsonl, tiny_tokenizer):
    path = write_jsonl([{"text": f"the milk is white . number {i}"} for i in range(20)])
    train, held_out = build("pretrain", path, max_len=16, data_split="0,0,1")
    assert all(len(row["input_ids"]) == 16 for row in list(train)[:-1])
    assert {row["response_start"] for row in train} == {0}
    ids = [token for row in train for token in row["input_ids"]]
    assert ids.count(tiny_tokenizer.bos_token_id) == 19  # the twentieth text is held out
    assert len(held_out) >= 1


def test_kto_rows_serve_as_answers_and_as_prompts(build, write_jsonl):
    rows = [{"prompt": f"q{i}", "completion": f"a{i}", "label": i % 2 == 0} for i in range(40)]
    path = write_jsonl(rows)
    train, _ = build("sft", path, data_split="1,0,0")
    assert 0 < len(train) <= 20
    assert "20 with a response labelled undesirable" in train.description
    assert len(build("prompts", path, data_split="0,0,1")[0]) == 38


def test_long_rows_are_cut_and_counted(build, write_jsonl, pairs, tiny_tokenizer):
    rows = [{**row, "prompt": " Human: " + "milk " * 50 + row["prompt"]} for row in pairs]
    train, _ = build("preference", write_jsonl(rows), max_len=24, data_split="0,1,0")
    for row in train:
        longest = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        assert len(row["prompt_ids"]) + longest == 24
        assert row["prompt_ids"][0] == tiny_tokenizer.bos_token_id
        assert text_of(tiny_tokenizer, row["prompt_ids"]).endswith("Assistant:")
    assert "to fit 24 tokens: 40 prompts cut" in train.description
    prompts, _ = build("prompts", write_jsonl(rows), max_len=10, data_split="0,0,1")
    assert {len(row["prompt_ids"]) for row in prompts} == {10}


def test_pairs_that_differ_only_beyond_the_length_are_left_out(build, write_jsonl, pairs):
    same = "milk " * 40
    rows = [{**row, "chosen": f" {same}x", "rejected": f" {same}y"} for row in pairs]
    with pytest.raises(InputError, match="no training row is left of 38 .*differ only beyond it"):
        build("preference", write_jsonl(rows), max_len=30, data_split="0,1,0")


def test_rows_are_kept_on_disk_by_content(build, write_jsonl, pairs, tmp_path, gpt_tokenizer, monkeypatch):
    path = Path(write_jsonl(pairs))
    first, _ = build("sft", path)
    calls = []
    monkeypatch.setattr(
        "utils.data.rows.dataset._prepare", lambda *_: calls.append(1) or (_ for _ in ()).throw(KeyError)
    )
    build("sft", path)
    copy = tmp_path / "elsewhere" / path.name
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    assert str(copy) in build("sft", copy)[0].description  # the same content elsewhere
    assert not calls
    changes = [{"seed": 5}, {"max_len": 30}, {"data_split": "2,1,1"}, {"undivided": [str(copy)]}]
    for change in (*changes, {"tokenizer": gpt_tokenizer}):
        with pytest.raises(KeyError):
            build("sft", path, **change)
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr("utils.data.rows.cache.ROW_FORMAT", ROW_FORMAT + 1)
        build("sft", path)
    path.write_text(path.read_text().replace("good 7", "new 7"))
    with pytest.raises(KeyError):
        build("sft", path)  # an edited file is not stale
    assert len(first) == 13


def test_the_cache_holds_ids_and_the_examples_of_the_audit(build, write_jsonl, pairs, tmp_path):
    build("sft", write_jsonl(pairs))
    files = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert sorted(file.name for file in files) == ["audit.arrow", "eval.arrow", "report.json", "train.arrow"]


def test_local_data_opens_no_connection(build, corpus, write_jsonl, pairs, monkeypatch):
    import datasets
    from huggingface_hub import constants

    def refuse(*args, **__):
        raise AssertionError(f"a connection was opened: {args}")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    path = write_jsonl(pairs)
    for purpose in PURPOSES:
        corpus(purpose, path, data_split="2,4,4").check()
        build(purpose, path)


def test_the_head_of_a_dataset(build, write_jsonl, pairs):
    train, _ = build("sft", write_jsonl(pairs))
    assert list(train.head(2)) == [train[0], train[1]]
    assert len(train.head(0)) == len(train.head(1000)) == len(train)


GOOD = {"prompt": "Q", "chosen": "a", "rejected": "b"}
BAD_ROWS = [
    (
        "sft",
        {"foo": 1, "bar": 2},
        1,
        "columns found: foo, bar; expected for this step one of: prompt.chosen.rejected, ",
    ),
    ("preference", {"instruction": "Q", "output": "a"}, 1, "columns found: instruction, output; expected"),
    ("preference", {"prompt": "Q", "chosen": "a"}, 2, "column `rejected` is missing; columns found: chosen, prompt"),
    (
        "sft",
        {"prompt": "Q", "chosen": "", "rejected": "b"},
        2,
        "has no response: `chosen` is empty; give it one or remove",
    ),
    ("preference", {"prompt": "Q", "chosen": "a", "rejected": None}, 2, "has no response: `rejected` is null"),
    ("prompts", {"prompt": 7, "chosen": "a", "rejected": "b"}, 2, "`prompt` must be text, found int '7'"),
    ("sft", {"prompt": "Q", "chosen": ["a"], "rejected": "b"}, 2, "`chosen` must hold turns"),
]


@pytest.mark.parametrize(("purpose", "row", "line", "message"), BAD_ROWS)
def test_a_bad_row_is_named_by_its_line(build, corpus, write_jsonl, purpose, row, line, message):
    path = write_jsonl([GOOD] * (line - 1) + [row])
    for call in (corpus(purpose, path).check, lambda: build(purpose, path)):
        with pytest.raises(InputError, match=f"data.jsonl, line {line}: {message}") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_bad_row_far_down_is_found_when_the_data_is_built(build, corpus, write_jsonl, pairs):
    path = write_jsonl([*pairs * 5, {"prompt": "Q", "chosen": ["a", "b"], "rejected": "c"}])
    corpus("sft", path).check()
    with pytest.raises(InputError, match="data.jsonl, line 201: "):
        build("sft", path)


def test_dialogues_need_an_assistant(build, write_jsonl):
    path = write_jsonl([{"chosen": "\n\nHuman: hi", "rejected": "\n\nHuman: hi"}])
    with pytest.raises(InputError, match="line 1: has no response: `chosen` has no `Assistant:` turn"):
        build("preference", path)


def test_chat_that_ends_with_a_question_serves_as_prompts_only(build, write_jsonl):
    path = write_jsonl([{"messages": [{"role": "user", "content": f"hi {i}"}]} for i in range(9)])
    assert len(build("prompts", path, data_split="0,0,1")[0]) == 8
    with pytest.raises(InputError, match="line 1: has no response"):
        build("sft", path)


def test_everything_left_out(build, write_jsonl, pairs):
    ties = write_jsonl([{**row, "rejected": row["chosen"]} for row in pairs])
    with pytest.raises(
        InputError, match=r"no training row is left of 38 \(40 whose chosen equals its rejected response\)"
    ):
        build("preference", ties, data_split="0,1,0")
    unwanted = write_jsonl([{"prompt": "q", "completion": "a", "label": False} for _ in range(9)])
    with pytest.raises(InputError, match="9 with a response labelled undesirable"):
        build("sft", unwanted)
    open_ended = {"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant:"}
    with pytest.raises(InputError, match=r"0 prompts in 0 usable rows \(3 with an empty last turn\) are too few"):
        build("preference", write_jsonl([open_ended] * 3))


def test_too_few_rows_and_too_short_a_length(build, write_jsonl, pairs):
    with pytest.raises(InputError, match="3 prompts in 3 usable rows are too few: one is held out and every part of"):
        build("sft", write_jsonl(pairs[:3]))
    with pytest.raises(InputError, match="--max_seq_len 2 is too short for a row; give at least 3"):
        build("sft", write_jsonl(pairs), max_len=2)
    with pytest.raises(InputError, match="--max_prompt_seq_len 1 is too short"):
        build("prompts", write_jsonl(pairs), max_len=1)


def test_messages_name_the_flag(build, corpus, write_jsonl, pairs):
    path = write_jsonl(pairs)
    with pytest.raises(InputError, match="^--sft_only_data_path nowhere.json: no such file"):
        build("sft", path, undivided=["nowhere.json"])
    with pytest.raises(InputError, match="^--sft_only_data_path nowhere.json: no such file"):
        corpus("sft", path, undivided=["nowhere.json"]).check()
    with pytest.raises(InputError, match="^--unsupervised_dataset_name nowhere.json: no such file"):
        corpus("pretrain", "nowhere.json").check()
    with pytest.raises(InputError, match="--data_split 0,1,1 leaves no rows for step 1"):
        corpus("sft", path, data_split="0,1,1").check()


def test_a_folder_of_parquet_is_read_like_any_file(build, pairs, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(pairs[:30]), folder / "train-00000-of-00001.parquet")
    pyarrow.parquet.write_table(pa.Table.from_pylist(pairs[30:]), folder / "test-00000-of-00001.parquet")
    (folder.parent / "README.md").write_text("---")
    train, held_out = build("preference", folder.parent)
    assert (len(train), len(held_out)) == (10, 10)


def test_a_column_of_mixed_types_is_refused_not_turned_into_text(build, tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"instruction": "a", "output": "b"}, {"instruction": "c", "output": 4}]))
    with pytest.raises(InputError, match="a.json, row 2: `output` must be text, found int '4'"):
        build("sft", file)


def test_no_step_sees_a_prompt_of_another_nor_one_that_is_held_out(build, write_jsonl, pairs, tiny_tokenizer):
    """Several pairs for each prompt, in two spellings of the dialogue and two files, as blends of known sets have."""

    def asked(row, answer):
        return [{"role": "user", "content": row["prompt"].split("Human:")[1].split(" Assistant:")[0]},
                {"role": "assistant", "content": answer}]  # fmt: skip

    again = [{"chosen": asked(row, f"yes {i}"), "rejected": asked(row, "no")} for i, row in enumerate(pairs)]
    paths = [write_jsonl(pairs * 2, "a.jsonl"), write_jsonl(again[5:] + again[:20], "b.jsonl")]
    found = {}
    for purpose in PURPOSES:
        parts = build(purpose, *paths)
        columns = [
            [row.get("prompt_ids") or row["input_ids"][: row["response_start"]] for row in part] for part in parts
        ]
        found[purpose] = [{text_of(tiny_tokenizer, ids) for ids in column} for column in columns]
        if purpose == "prompts":
            assert all(len(column) == len(texts) for column, texts in zip(columns, found[purpose], strict=True))
    training = [texts for texts, _ in found.values()]
    held_out = [texts for _, texts in found.values()]
    assert held_out[0] == held_out[1] == held_out[2] and len(held_out[0]) >= 1
    assert sum(map(len, training)) + len(held_out[0]) == len(set().union(*training, held_out[0])) == len(pairs)


def test_the_division_has_a_seed_of_its_own():
    for config in (
        SftConfig(model_name_or_path="m", seed=7),
        RewardModelConfig(model_name_or_path="m", seed=8),
        PpoConfig(actor_model_name_or_path="a", critic_model_name_or_path="c", seed=9),
    ):
        assert Corpus.of(config).seed == 1234
    assert Corpus.of(SftConfig(model_name_or_path="m", data_seed=5)).seed == 5


def test_the_log_says_what_became_of_each_source(build, write_jsonl, pairs, tmp_path):
    first = write_jsonl(pairs, "a.jsonl")
    folder = tmp_path / "b"
    write_jsonl(pairs[:10], "b/train.jsonl"), write_jsonl(pairs[30:33], "b/test.jsonl")
    (folder / "old.tsv").touch(), (folder / "README.md").touch()
    train, held_out = build("preference", first, folder, data_split="2,4,4")
    lines = train.description.splitlines()
    assert lines[0] == (
        f"--data_path {first}: 40 rows, 2 held out; --data_split 2,4,4 gives 15 to this step, 8 to step 1, 15 to step 3"
    )
    assert lines[1].startswith(f"--data_path {folder}: 13 rows, 3 held out; --data_split 2,4,4 gives ")
    assert lines[1].endswith("; not read: old.tsv")
    assert lines[2] == f"{len(train)} training rows and {len(held_out)} held-out rows"
    one = build("preference", first, data_split="0,1,0")[0].description.splitlines()
    assert one == [
        f"--data_path {first}: 40 rows, 2 held out",
        "38 training rows and 2 held-out rows",
        "audit: 76 answers of 38 rows checked, which end with </s>",
    ]


def test_a_data_set_decides_what_its_prompts_are_and_not_each_row(build, write_jsonl):
    """Among questions some end like finished prompts, and one is in the project's own form."""
    questions = [f"Sort the list [{i},1]" for i in range(6)] + [f"Explain <div{i}>" for i in range(6)] + ["Translate:"]
    own = " Human: Hi Assistant:"
    path = write_jsonl([{"prompt": text, "completion": "Yes"} for text in [*questions, own]])

    def prompts(**options):
        return {row["prompt"] for part in build("prompts", path, data_split="0,0,1", **options) for row in part}

    assert prompts() == {f" Human: {text} Assistant:" for text in questions} | {own}
    assert prompts(prompt_form="raw") == {*questions, own}
    assert prompts(prompt_form="dialogue") == {f" Human: {text.strip()} Assistant:" for text in [*questions, own]}
    alike = write_jsonl([{"prompt": f"[INST] {text} [/INST]", "completion": "Yes"} for text in questions], "b.jsonl")
    train, _ = build("prompts", alike, data_split="0,0,1")
    assert all(row["prompt"].startswith("[INST]") and row["prompt"].endswith("[/INST]") for row in train)


def test_held_out_files_are_read_as_the_training_files_are(build, write_jsonl, tmp_path):
    write_jsonl([{"prompt": f"Thing {i} A:"} for i in range(6)], "set/train.jsonl")
    write_jsonl([{"prompt": f"Thing {i} A:"} for i in range(6, 8)], "set/test.jsonl")
    _, held_out = build("prompts", tmp_path / "set", data_split="0,0,1")
    assert {row["prompt"] for row in held_out} == {"Thing 6 A:", "Thing 7 A:"}
