"""The hub cannot be reached from a test: loading is replaced, and what happens without a network is real."""

import json
import time
import types
from collections import Counter

import datasets
import pytest

from utils.data import Corpus, build_dataloader, build_datasets
from utils.data.formats.example import Example
from utils.data.sources.reading import HubSource, open_source, read_examples
from utils.errors import InputError

ROWS = [
    {"prompt": f"\n\nHuman: q{i}\n\nAssistant:", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(30)
]
ROWS[3]["chosen"] = ""


@pytest.fixture
def connected(monkeypatch):
    """Pretend that the hub answers; returns the calls of `load_dataset`."""
    calls = []

    def load_dataset(path, name=None, *, split, **options):
        calls.append((path, name, split, options))
        return datasets.Dataset.from_list(ROWS if split == "train" else ROWS[:4])

    for module in ("hub", "corpus"):
        monkeypatch.setattr(f"utils.data.sources.{module}.is_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_known_set_is_loaded_by_the_table(connected, tiny_tokenizer, tmp_path):
    corpus = Corpus(
        purpose="preference", paths=["Dahoas/rm-static"], max_len=512, data_split="0,1,0", cache_dir=str(tmp_path)
    )
    train, held_out = build_datasets(corpus, tiny_tokenizer)
    assert connected == [("Dahoas/rm-static", None, "train", {}), ("Dahoas/rm-static", None, "test", {})]
    # The row without a response is dropped and counted, not refused: users cannot correct a published set.
    assert (len(train), len(held_out)) == (29, 3)
    assert "2 without a response" in train.description


def test_configurations_splits_and_unknown_names(connected):
    open_source("mkqa-Japanese").fingerprint()
    open_source("Cohere/miracl-zh").fingerprint()
    open_source("huggingfaceh4/UltraChat_200k").fingerprint()
    open_source("someone/something", "config").fingerprint()
    assert connected == [
        ("apple/mkqa", "mkqa", "train", {}),
        ("Cohere/miracl-zh-queries-22-12", None, "train", {}),
        ("Cohere/miracl-zh-queries-22-12", None, "dev", {}),
        ("HuggingFaceH4/ultrachat_200k", None, "train_sft", {}),
        ("HuggingFaceH4/ultrachat_200k", None, "test_sft", {}),
        ("someone/something", "config", "train", {}),
    ]


@pytest.mark.parametrize("name", ["Dahoas/rm-static", "Cohere/miracl-ja", "mkqa-Japanese"])
def test_the_case_of_a_known_name_changes_nothing(connected, name):
    sources = [open_source(spelling) for spelling in (name, name.upper(), name.lower())]
    assert len({source.fingerprint() for source in sources}) == 1
    assert {(source.name, source.hub, source.format) for source in sources} == {
        (name, sources[0].hub, sources[0].format)
    }
    assert sources[1].label == f"--data_path {name.upper()}"  # messages repeat what was given


def test_two_readings_of_one_hub_set_have_different_keys(connected):
    assert open_source("mkqa-Japanese").fingerprint() != open_source("mkqa-Chinese").fingerprint()


def test_a_set_published_as_a_script_is_read_from_the_hubs_parquet_copy(connected, monkeypatch):
    loaded = datasets.load_dataset

    def load_dataset(path, name=None, **options):
        if "revision" not in options:
            raise RuntimeError("Dataset scripts are no longer supported, but found mkqa.py")
        return loaded(path, name, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    open_source("mkqa-Japanese").fingerprint()
    assert connected == [("apple/mkqa", None, "train", {"data_dir": "mkqa", "revision": "refs/convert/parquet"})]


def test_what_the_hub_refuses_becomes_one_line(connected, monkeypatch):
    def load_dataset(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub.\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        InputError, match=r"^--data_path a/b: cannot be loaded from the hub \(Dataset 'a/b' doesn't.*Hub"
    ):
        open_source("a/b").fingerprint()


def refusal(name):
    started = time.monotonic()
    with pytest.raises(InputError) as caught:
        Corpus(purpose="sft", paths=[name], max_len=512).check()
    assert time.monotonic() - started < 5
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_hub_name_when_offline_by_choice(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = refusal("Dahoas/rm-static")
    assert message.startswith("--data_path Dahoas/rm-static: no such local file or folder")
    assert "HF_HUB_OFFLINE is set" in message
    assert "hf download --repo-type dataset Dahoas/rm-static --local-dir data/Dahoas/rm-static" in message


def test_a_hub_name_without_a_network(monkeypatch):
    from huggingface_hub import constants

    def refuse(*_, **__):
        raise OSError("network is unreachable")

    for variable in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.create_connection", refuse)
    assert "no connection to huggingface.co" in refusal("Dahoas/rm-static")
    assert datasets.config.HF_HUB_OFFLINE is False  # as it was


def test_names_that_can_be_nothing():
    assert refusal("missing.jsonl") == "--data_path missing.jsonl: no such file or folder"
    assert refusal("/no/such/folder") == "--data_path /no/such/folder: no such file or folder"
    assert refusal("anthropic/hh_rlhf").startswith("--data_path anthropic/hh_rlhf (did you mean Anthropic/hh-rlhf?): ")
    assert refusal("wikitex") == "--data_path wikitex: no such file or folder (did you mean wikitext?)"
    assert "published as files; fetch data/training_data.txt.train" in refusal("MultiTurnAlpaca")


def test_a_local_path_wins_over_a_known_name(tmp_path, monkeypatch):
    folder = tmp_path / "stanfordnlp" / "SHP"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    source = open_source("stanfordnlp/SHP")
    assert not isinstance(source, HubSource)
    assert source.copy_of == "stanfordnlp/SHP"


@pytest.mark.parametrize("name", ["vicgalle/alpaca-gpt4", "Vicgalle/Alpaca-GPT4", "ALPACA_GPT4"])
def test_a_local_copy_may_have_another_name_of_the_set_and_in_another_case(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("{}")
    assert open_source(str(folder)).copy_of == "alpaca_gpt4"


def test_a_local_copy_is_read_as_the_set_it_is_called_like(tmp_path):
    folder = tmp_path / "yitingxie" / "rlhf-reward-datasets"
    folder.mkdir(parents=True)
    row = {"prompt": "\n\nHuman: Why?\n\n", "chosen": "Assistant: Because.", "rejected": "Assistant: Dunno."}
    (folder / "train.jsonl").write_text(json.dumps(row))
    examples = read_examples(open_source(str(folder)), "train", "preference", Counter())
    assert [example for _, example in examples] == [Example("\n\nHuman: Why?\n\nAssistant:", " Because.", " Dunno.")]


def test_a_copy_of_hh_rlhf_leaves_its_other_rows_out(tmp_path):
    folder = tmp_path / "Anthropic" / "hh-rlhf"
    for name in ("harmless-base/train.jsonl", "harmless-base/test.jsonl", "red-team-attempts/red_team_attempts.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    source = open_source(str(folder))
    assert [file.name for file in (*source.training, *source.held_out)] == ["train.jsonl", "test.jsonl"]


def test_a_copy_of_a_set_with_splits_of_several_kinds_holds_those_of_the_table(tmp_path):
    """As `hf download` makes it, and as `datasets.save_to_disk` does."""
    folder = tmp_path / "HuggingFaceH4" / "ultrafeedback_binarized"
    for split in ("train_prefs", "test_prefs", "train_sft", "test_sft", "train_gen", "test_gen"):
        for file in (f"data/{split}-00000-of-00001.jsonl", f"{split}/data-00000-of-00001.jsonl"):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text("{}")
    source = open_source(str(folder))
    assert {str(file.relative_to(folder)) for file in source.training} == {
        "data/train_prefs-00000-of-00001.jsonl",
        "train_prefs/data-00000-of-00001.jsonl",
    }
    assert {str(file.relative_to(folder)) for file in source.held_out} == {
        "data/test_prefs-00000-of-00001.jsonl",
        "test_prefs/data-00000-of-00001.jsonl",
    }


def test_a_configuration_is_a_subfolder_of_a_local_copy(tmp_path):
    for config in ("wikitext-2-raw-v1", "wikitext-103-raw-v1"):
        (tmp_path / "wikitext" / config).mkdir(parents=True)
        (tmp_path / "wikitext" / config / "train.jsonl").write_text('{"text": "x"}')
    name = str(tmp_path / "wikitext")
    assert [file.parent.name for file in open_source(name, "wikitext-2-raw-v1").training] == ["wikitext-2-raw-v1"]
    assert [file.parent.name for file in open_source(name).training] == ["wikitext-103-raw-v1"]


@pytest.fixture
def streamed(monkeypatch, tmp_path):
    """Pretend that the hub answers with streams of two shards; returns the calls of `load_dataset`."""
    calls = []
    for number, rows in enumerate((ROWS[:17], ROWS[17:])):
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    load = datasets.load_dataset

    def load_dataset(path, name=None, *, split, **options):
        calls.append((path, name, split, options))
        files = [str(tmp_path / f"{number}.jsonl") for number in range(2)]
        return load("json", data_files=files, split="train", streaming=True)

    for module in ("hub", "corpus"):
        monkeypatch.setattr(f"utils.data.sources.{module}.is_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    commit = types.SimpleNamespace(sha="abc")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: commit)
    return calls


def prompts_of(batches, tokenizer) -> list[str]:
    return [tokenizer.decode(row["prompt_ids"]) for batch in batches for row in batch]


def test_a_set_is_streamed_from_the_hub_and_resumed_at_the_exact_row(streamed, tiny_tokenizer):
    corpus = Corpus(
        purpose="preference",
        paths=["Dahoas/rm-static"],
        max_len=512,
        data_split="0,1,0",
        shuffle_buffer=4,
        held_out_rows=3,
    )
    corpus.check()
    rows, held_out = build_datasets(corpus, tiny_tokenizer)
    streaming = {"streaming": True}
    assert streamed == [("Dahoas/rm-static", None, "train", streaming), ("Dahoas/rm-static", None, "test", streaming)]
    assert len(held_out) == 3
    loader = build_dataloader(rows, list, 2, shuffle=True, seed=3)
    batches, taken, positions = iter(loader), [], []
    for _ in range(29):  # two epochs of 29 rows: one has no response
        taken.append(next(batches))
        positions.append(json.loads(json.dumps(loader.position)))
    prompts = prompts_of(taken, tiny_tokenizer)
    assert len(set(prompts[:29])) == 29 and sorted(prompts[:29]) == sorted(prompts[29:])
    for number in (0, 3, 7, 14, 20, 27):
        resumed = build_dataloader(rows, list, 2, shuffle=True, seed=3)
        resumed.start_at(positions[number])
        assert next(iter(resumed)) == taken[number + 1]
        assert json.loads(json.dumps(resumed.position)) == positions[number + 1]


def test_without_a_network_a_set_is_streamed_from_the_local_cache(connected, monkeypatch, tiny_tokenizer):
    monkeypatch.setattr("utils.data.sources.hub.is_reachable", lambda: False)
    corpus = Corpus(
        purpose="sft", paths=["Dahoas/rm-static"], max_len=99, data_split="1,0,0", shuffle_buffer=4, held_out_rows=3
    )
    rows, _ = build_datasets(corpus, tiny_tokenizer)
    loader = build_dataloader(rows, list, 29, shuffle=True, seed=3)
    batches = iter(loader)
    first = next(batches)
    assert len({tuple(row["input_ids"]) for row in first}) == 29
    resumed = build_dataloader(rows, list, 29, shuffle=True, seed=3)
    resumed.start_at(loader.position)
    assert next(iter(resumed)) == next(batches)


def test_a_set_of_messages_cannot_be_streamed(connected, monkeypatch, tiny_tokenizer):
    row = {"message_id": "1", "parent_id": None, "role": "prompter", "text": "Hi", "lang": "en", "rank": None}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([row]))
    monkeypatch.setattr("utils.data.sources.hub.is_reachable", lambda: False)
    corpus = Corpus(purpose="sft", paths=["OpenAssistant/oasst1"], max_len=99, shuffle_buffer=4, held_out_rows=3)
    with pytest.raises(InputError, match="^--data_path OpenAssistant/oasst1: its rows are messages, .*leave this set"):
        build_datasets(corpus, tiny_tokenizer)
