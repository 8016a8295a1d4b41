"""Weights of sources: how many rows of each an epoch has, which ones, and that nothing else changes."""

import itertools
import json
import random
from collections import Counter

import pytest

from utils.arguments import PpoConfig, RewardModelConfig, SftConfig
from utils.data import Corpus, build_dataloader, build_datasets, endless, pack_rows
from utils.data.batches.sizes import measure_rows, pair_tokens
from utils.data.rows.blending import Blend, rows_per_epoch
from utils.errors import InputError


def test_rows_of_an_epoch_by_hand():
    # 700 rows at 0.7 last for an epoch of 1000 rows, 9000 rows at 0.3 for one of 30000: the shorter one counts.
    assert rows_per_epoch([700, 9000], [0.7, 0.3]) == [700, 300]
    assert rows_per_epoch([9000, 300], [0.7, 0.3]) == [700, 300]
    assert rows_per_epoch([5, 5, 50], [0.25, 0.25, 0.5]) == [5, 5, 10]
    assert rows_per_epoch([12], [1.0]) == [12]
    assert rows_per_epoch([1, 1000], [0.99, 0.01]) == [1, 1]  # no source is left out


@pytest.mark.parametrize("seed", range(20))
def test_an_epoch_repeats_nothing_reads_one_source_whole_and_has_the_asked_shares(seed):
    generator = random.Random(seed)
    rows = [generator.randint(1, 5000) for _ in range(generator.randint(1, 6))]
    parts = [generator.uniform(0.01, 1) for _ in rows]
    weights = [part / sum(parts) for part in parts]
    chosen = rows_per_epoch(rows, weights)
    assert all(1 <= count <= available for count, available in zip(chosen, rows, strict=True))
    longest = min(available / weight for available, weight in zip(rows, weights, strict=True))
    assert any(
        count == available and available / weight == longest
        for count, available, weight in zip(chosen, rows, weights, strict=True)
    )
    assert all(abs(count - max(1, longest * weight)) <= 0.5 for count, weight in zip(chosen, weights, strict=True))


def test_epochs_go_on_where_the_last_one_stopped():
    blend = Blend((3, 7, 4), (3, 2, 4))
    epochs = [blend.rows_of(epoch).tolist() for epoch in range(7)]
    assert sorted(epochs[0]) == [0, 1, 2, 3, 4, 10, 11, 12, 13]
    assert sorted(epochs[1]) == [0, 1, 2, 5, 6, 10, 11, 12, 13]
    assert sorted(epochs[3]) == [0, 1, 2, 3, 9, 10, 11, 12, 13]  # the seventh row, and the first again
    seen = Counter(itertools.chain(*epochs))
    assert [seen[number] for number in range(14)] == [7] * 3 + [2] * 7 + [7] * 4
    assert epochs[0] != sorted(epochs[0]) and blend.rows_of(3).tolist() == epochs[3]


def pair(question: str, number: int) -> dict[str, str]:
    return {"prompt": f" Human: {question} Assistant:", "chosen": f" yes {number}", "rejected": f" no {number}"}


def rows_of(name: str, count: int) -> list[dict[str, str]]:
    return [pair(f"{name} {number} ?", number) for number in range(count)]


@pytest.fixture
def build(write_jsonl, tiny_tokenizer, tmp_path):
    paths = [write_jsonl(rows_of("milk", 21), "milk.jsonl"), write_jsonl(rows_of("fox", 105), "fox.jsonl")]

    def call(purpose="preference", blend_weights=(0.5, 0.5), **options):
        defaults = {"paths": paths, "data_split": "0,1,0", "max_len": 256, "cache_dir": str(tmp_path / "cache")}
        corpus = Corpus(purpose=purpose, blend_weights=blend_weights, **(defaults | options))
        return build_datasets(corpus, tiny_tokenizer)

    return call


@pytest.fixture
def prompts(tiny_tokenizer):
    def call(rows) -> list[str]:
        ids = (row.get("prompt_ids") or row["input_ids"][: row["response_start"]] for row in rows)
        return [tiny_tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]

    return call


def test_the_shares_of_an_epoch_and_the_log_of_each_source(build, prompts):
    train, held_out = build(blend_weights=(0.25, 0.75))
    sources = Counter(prompt.split()[1] for prompt in prompts(train))
    assert sources == {"milk": 20, "fox": 60} and len(train) == 80
    assert len(held_out) == 1 + 5  # a twentieth of each, whatever the weights
    lines = train.description.splitlines()
    assert lines[0].endswith("milk.jsonl: 21 rows, 1 held out; weight 0.25: 20 of 20 training rows in each epoch")
    assert lines[1].endswith("fox.jsonl: 105 rows, 5 held out; weight 0.75: 60 of 100 training rows in each epoch")
    assert lines[2] == "120 training rows, 80 of them in each epoch, and 6 held-out rows"


def test_later_epochs_have_the_rows_that_earlier_ones_had_not(build, prompts):
    train, _ = build()  # 20 of each in an epoch: five epochs for the larger source
    loader = build_dataloader(train, list, 8, shuffle=True, seed=3, rank=0, world_size=1)
    epochs = []
    for epoch in range(6):
        loader.set_epoch(epoch)
        epochs.append(prompts(itertools.chain(*loader)))
    assert all(len(set(epoch)) == 40 for epoch in epochs)
    foxes = [{prompt for prompt in epoch if "fox" in prompt} for epoch in epochs]
    assert len(set().union(*foxes[:5])) == 100 and foxes[5] == foxes[0]
    assert epochs[5] != epochs[0]  # the same rows in another order
    # From the middle of the second epoch, as after a resumption.
    rows = list(itertools.islice(endless(loader, 7), 3))
    loader.set_epoch(1)
    assert prompts(itertools.chain(*rows)) == prompts(itertools.chain(*list(loader)[2:5]))


@pytest.mark.parametrize("purpose", ["sft", "preference", "prompts"])
def test_the_division_is_the_same_with_and_without_weights(build, prompts, purpose):
    options = {"purpose": purpose, "data_split": "2,4,4"}
    plain, plain_held_out = build(blend_weights=None, **options)
    train, held_out = build(blend_weights=(0.9, 0.1), **options)
    assert prompts(held_out) == prompts(plain_held_out)
    assert sorted(prompts(train.of_all_epochs())) == sorted(prompts(plain))
    assert len(train) < len(plain) and set(prompts(train)) < set(prompts(plain))


def test_weights_belong_to_the_key_only_where_given(build):
    keys = {build(blend_weights=weights)[0].key for weights in (None, (0.5, 0.5), (0.25, 0.75))}
    assert len(keys) == 3
    assert not build(blend_weights=None)[0].has_other_rows


def test_sft_only_data_comes_on_top_of_the_blend(build, prompts, write_jsonl):
    extra = write_jsonl(rows_of("dog", 11), "dog.jsonl")
    train, _ = build("sft", undivided=[extra], data_split="1,0,0")
    for epoch in (0, 1):
        train.set_epoch(epoch)
        assert Counter(prompt.split()[1] for prompt in prompts(train)) == {"milk": 20, "fox": 20, "dog": 10}


def test_a_source_without_a_row_for_the_step_is_refused(build, write_jsonl):
    ties = [row | {"rejected": row["chosen"]} for row in rows_of("fox", 9)]
    paths = [write_jsonl(rows_of("milk", 9)), write_jsonl(ties, "ties.jsonl")]
    with pytest.raises(InputError, match="ties.jsonl: has a weight of 0.5, but no training row for this step; leave"):
        build(paths=paths)


def test_lengths_and_heads_are_those_of_the_epoch_and_memory_counts_on_all_epochs(build, write_jsonl):
    long = [pair("milk " * (i + 1), i) for i in range(42)]
    train, _ = build(paths=[write_jsonl(rows_of("milk", 9)), write_jsonl(long, "long.jsonl")])
    tokens: list[int] = []
    for epoch in range(5):
        train.set_epoch(epoch)
        assert train.lengths("prompt_ids") == [len(row["prompt_ids"]) for row in train]
        assert list(train.head(3)) == [train[0], train[1], train[2]] and len(train.head(0)) == len(train) == 16
        tokens += map(pair_tokens, train)
    for epoch in range(5):
        train.set_epoch(epoch)
        rows = measure_rows(train, "preference", 1)
        assert (rows.count, rows.heaviest[0].tokens) == (16, max(tokens))


def test_packing_keeps_the_rows_of_the_first_epoch(build, prompts):
    train, _ = build("sft", data_split="1,0,0")
    config = SftConfig(model_name_or_path="m", packing=True)
    first = sorted(prompts(train))
    loader = build_dataloader(pack_rows(train, config, 256), list, 2, shuffle=True, seed=3, rank=0, world_size=1)
    loader.set_epoch(1)
    assert sorted(prompts(example for batch in loader for row in batch for example in row["rows"])) == first


def test_what_the_flag_means(tmp_path):
    assert SftConfig(model_name_or_path="m", data_path=["a/b", "c"]).data_weights is None
    config = RewardModelConfig(model_name_or_path="m", data_path=["Dahoas/rm-static:0.7", "x/a:b.jsonl:.3"])
    assert config.data_sources == ["Dahoas/rm-static", "x/a:b.jsonl"] and config.data_weights == (0.7, 0.3)
    assert config.named_data() == [("--data_path", "Dahoas/rm-static"), ("--data_path", "x/a:b.jsonl")]
    corpus = Corpus.of(config)
    assert (corpus.paths, corpus.blend_weights) == (config.data_sources, config.data_weights)
    # What is there under the whole name is not taken apart; what no number follows has no weight.
    (tmp_path / "run:0.5").mkdir()
    assert SftConfig(model_name_or_path="m", data_path=[f"{tmp_path}/run:0.5"]).data_weights is None
    assert SftConfig(model_name_or_path="m", data_path=["a:b", "c:"]).data_sources == ["a:b", "c:"]
    thirds = SftConfig(model_name_or_path="m", data_path=["a:0.333333", "b:0.333333", "c:0.333333"])
    assert thirds.data_weights == (0.333333,) * 3


BAD = [
    (["a:0.7", "b"], "--data_path: a:0.7 has a weight and b has none; give every source a weight, or none of them"),
    (["a:0", "b:1"], "--data_path a:0: a weight must be above 0; change it, or leave the source out"),
    (["a:-0.5", "b:1.5"], "--data_path a:-0.5: a weight must be above 0; change it, or leave the source out"),
    (["a:nan", "b:1"], "--data_path a:nan: a weight must be above 0; change it, or leave the source out"),
    (
        ["a:0.7", "b:0.2"],
        "--data_path: the weights 0.7 + 0.2 sum to 0.9 and must sum to 1; for the same proportions give 0.777778 "
        "0.222222",
    ),
    (
        ["a:60", "b:20", "c:20"],
        "--data_path: the weights 60 + 20 + 20 sum to 100 and must sum to 1; for the same proportions give 0.6 0.2 0.2",
    ),
]


@pytest.mark.parametrize(("data_path", "message"), BAD)
def test_weights_that_cannot_be(data_path, message):
    models = {"actor_model_name_or_path": "a", "critic_model_name_or_path": "c"}
    for config, model in ((SftConfig, {"model_name_or_path": "m"}), (PpoConfig, models)):
        with pytest.raises(InputError) as caught:
            config(data_path=data_path, **model)
        assert str(caught.value) == message


def test_sft_only_data_has_no_weight():
    with pytest.raises(InputError, match="^--sft_only_data_path b.jsonl:0.3: weights are for --data_path, .*give b.j"):
        SftConfig(model_name_or_path="m", sft_only_data_path=["b.jsonl:0.3"])


def test_what_is_prepared_is_read_again(build, tmp_path):
    first = list(build()[0])
    (report,) = (tmp_path / "cache").rglob("report.json")
    assert [source["per_epoch"] for source in json.loads(report.read_text())["sources"]] == [20, 20]
    assert list(build()[0]) == first
