"""Real files through the whole path with LLaMA-2's tokenizer, checked against plain readings of the same files."""

import functools
import json

import pytest

from utils.data import Corpus, build_dataloader, build_datasets, collate_preference, collate_sft

EOS = 2


@pytest.fixture
def build(llama_tokenizer, tmp_path, shared_data):
    def call(purpose, name, **options):
        options = {"data_split": "1,1,1", "max_len": 256 if purpose == "prompts" else 512} | options
        corpus = Corpus(purpose=purpose, paths=[str(shared_data / name)], cache_dir=str(tmp_path), **options)
        corpus.check()
        return build_datasets(corpus, llama_tokenizer)

    return call


@pytest.fixture
def decode(llama_tokenizer):
    """Ids to text: LLaMA's decoder takes one space off the front."""
    return lambda ids: " " + llama_tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_alpaca(build, shared_data, decode, llama_tokenizer):
    rows = json.loads((shared_data / "alpaca_en_demo.json").read_text())
    question = {f"{row['instruction']}\n{row['input']}".strip(): row["output"].strip() for row in rows}
    train, held_out = build("sft", "alpaca_en_demo.json", data_split="1,0,0", max_len=4096)
    assert (len(train), len(held_out)) == (949, 50)
    for row in train:
        prompt = decode(row["input_ids"][: row["response_start"]])[1:]
        response = decode(row["input_ids"][row["response_start"] : -1])
        asked = prompt.removeprefix(" Human: ").removesuffix(" Assistant:")
        assert question[asked.strip()] == response.strip()
        assert row["input_ids"][-1] == EOS
        assert row["input_ids"][: row["response_start"]] == llama_tokenizer(prompt).input_ids


def test_hh_rlhf(build, shared_data, decode):
    lines = (shared_data / "hh_rlhf_harmless_1800.jsonl").read_text().splitlines()
    last = lambda text: text[text.rindex("\n\nAssistant:") + len("\n\nAssistant:") :].strip()  # noqa: E731
    answers = {(last(row["chosen"]), last(row["rejected"])) for row in map(json.loads, lines)}
    train, held_out = build("preference", "hh_rlhf_harmless_1800.jsonl", data_split="0,1,0", max_len=4096)
    assert len(train) + len(held_out) == 1794
    assert "4 with an empty last turn, 2 whose dialogues differ before the last turn" in train.description
    for row in train:
        chosen, rejected = (decode(row[name][:-1]).strip() for name in ("chosen_ids", "rejected_ids"))
        assert (chosen, rejected) in answers
        prompt = decode(row["prompt_ids"])
        assert "Human:" in prompt and prompt.endswith("Assistant:")


def test_preferences_over_conversations(build, decode):
    train, held_out = build("preference", "dpo_en_demo.json", data_split="0,1,0", max_len=4096)
    assert (len(train), len(held_out)) == (285, 15)
    assert all(decode(row["prompt_ids"]).endswith("Assistant:") for row in train)
    assert sum(" System: " in decode(row["prompt_ids"]) for row in (*train, *held_out)) == 80


def test_labelled_chat(build):
    train, held_out = build("sft", "kto_en_demo.json", data_split="1,0,0")
    assert len(train) + len(held_out) == 150
    train, held_out = build("prompts", "kto_en_demo.json", data_split="0,0,1")
    assert len(train) + len(held_out) == 297 and "3 that repeat a prompt" in train.description


def test_judged_pairs(build):
    train, held_out = build("preference", "alpaca_eval_gpt4_pairs.jsonl", data_split="0,1,0", max_len=64)
    assert "2 without a response" in train.description
    assert all(row["chosen_ids"] != row["rejected_ids"] for row in train)


def test_batches_for_two_ranks(build, llama_tokenizer):
    train, held_out = build("preference", "hh_rlhf_harmless_1800.jsonl", max_len=256)
    collate = functools.partial(collate_preference, pad_id=llama_tokenizer.pad_token_id)
    loaders = [
        build_dataloader(held_out, collate, 16, shuffle=False, seed=0, rank=rank, world_size=2) for rank in range(2)
    ]
    batches = [list(loader) for loader in loaders]
    assert len(batches[0]) == len(batches[1])
    assert sum(int(batch["row_mask"].sum()) for rank in batches for batch in rank) == len(held_out)
    for batch in batches[0]:
        assert batch["input_ids"].shape == batch["response_mask"].shape == batch["attention_mask"].shape
        assert batch["input_ids"].shape[0] == 2 * len(batch["row_mask"])
        assert batch["input_ids"].shape[1] <= 256
        assert batch["response_mask"].any(1).all()
        assert not (batch["response_mask"] & (batch["attention_mask"] == 0)).any()


def test_only_response_tokens_are_targets(build, llama_tokenizer):
    train, _ = build("sft", "alpaca_en_demo.json", max_len=128)
    loader = build_dataloader(train, functools.partial(collate_sft, pad_id=0), 8, shuffle=True, seed=0)
    batch = next(iter(loader))
    for ids, attended, targets in zip(*batch.values(), strict=True):
        text = llama_tokenizer.decode(ids[attended.bool() & ~targets])
        assert text.endswith("Assistant:")
        assert int(targets.sum()) > 0
