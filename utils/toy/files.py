"""The small world on disk: data sets in the documented formats, and a random tiny LLaMA for step 1 to pre-train."""

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from utils.files import atomic_path, atomic_write_text
from utils.toy.tokenizer import VOCAB_SIZE, train_tokenizer
from utils.toy.world import (
    dialogue_prompt,
    labelled_rows,
    make_questions,
    preference_rows,
    pretraining_rows,
    sft_rows,
)

Row = dict[str, str | bool]


@dataclass(frozen=True)
class WorldSizes:
    """Number of rows of each data set; the prompts of step 3 are all questions, once each.

    Training rows ask training questions only, held-out rows held-out questions only.
    """

    pretraining: int = 9600
    sft: int = 6400
    preference: int = 12000
    labelled: int = 12000
    held_out: int = 512


@dataclass(frozen=True)
class WorldFiles:
    """Where `write_world` wrote its files. Each data folder holds train.jsonl and eval.jsonl."""

    pretraining: Path
    sft: Path
    preference: Path
    labelled: Path
    prompts: Path
    random_model: Path


def write_world(folder: str | os.PathLike, seed: int, sizes: WorldSizes | None = None) -> WorldFiles:
    """Write the data sets and the random model below `folder`; the same seed and sizes give the same bytes."""
    folder, sizes = Path(folder), sizes or WorldSizes()
    files = WorldFiles(
        *(folder / name for name in ("pretraining", "sft", "preference", "labelled", "prompts", "random_model"))
    )
    training, held_out = make_questions(seed)
    makers = {
        files.pretraining: (pretraining_rows, sizes.pretraining),
        files.sft: (sft_rows, sizes.sft),
        files.preference: (preference_rows, sizes.preference),
        files.labelled: (labelled_rows, sizes.labelled),
    }
    texts: list[str] = []
    for path, (make, count) in makers.items():
        train_rows = make(random.Random(f"{seed}/{path.name}/train"), training, count)
        eval_rows = make(random.Random(f"{seed}/{path.name}/eval"), held_out, min(count, sizes.held_out))
        _write_rows(path / "train.jsonl", train_rows)
        _write_rows(path / "eval.jsonl", eval_rows)
        if path in (files.pretraining, files.sft):
            texts += ["".join(row.values()) for row in train_rows]
    for name, questions in (("train", training), ("eval", held_out)):
        _write_rows(files.prompts / f"{name}.jsonl", [{"prompt": dialogue_prompt(q.text)} for q in questions])
    write_random_llama(files.random_model, texts, seed)
    return files


def write_random_llama(folder: str | os.PathLike, texts: Sequence[str], seed: int) -> None:
    """A LLaMA of 0.9 M random parameters in `folder`, with a bare tokenizer.model trained on `texts`."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with atomic_path(folder) as temporary:
        model.save_pretrained(temporary)
        train_tokenizer(texts, temporary / "tokenizer.model")


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
