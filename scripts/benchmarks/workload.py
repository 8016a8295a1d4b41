"""The workload of the benchmarks: random models, a tokenizer, and rows of real or generated text."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from utils.arguments import Arguments, flag
from utils.data import Corpus, build_datasets
from utils.data.sources.local_files import read_rows
from utils.errors import InputError
from utils.files import atomic_write_text
from utils.models.tokenizer import load_tokenizer
from utils.toy.tokenizer import train_tokenizer

SIZES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "toy": (128, 352, 4, 4, 4, 320),
    "15M": (288, 768, 6, 6, 6, 32_000),
    "60M": (576, 1536, 10, 9, 9, 32_000),
    "1B": (2048, 5504, 22, 32, 4, 32_000),
    "7B": (4096, 11_008, 32, 32, 32, 32_000),
}
Size = Literal["toy", "15M", "60M", "1B", "7B"]
SEED = 1234
LEARNING_RATE = 1e-5  # of steps 1 and 2
# All rows to the step in question.
SPLITS = {"sft": "1,0,0", "preference": "0,1,0", "labelled": "0,1,0", "prompts": "0,0,1"}
EOS_DIRECTION = 0.5  # value of hidden unit 0 in every embedding; the others have a deviation of 0.02


@dataclass(kw_only=True)
class WorkArguments(Arguments):
    """The work."""

    model: Size = flag("15M", "size of the LLaMA, whose weights are random")
    model_path: str | None = flag(None, "folder of a real model and its tokenizer, in place of random weights")
    data: str | None = flag(None, "file of rows that the steps read (Alpaca, pairs, ...); default: generated text")
    tokenizer: str | None = flag(None, "tokenizer.model or folder; default: one trained on the text")

    @property
    def described_model(self) -> str:
        """The model in words."""
        return f"the model {Path(self.model_path).name}" if self.model_path else f"{self.model} LLaMA"

    @property
    def text(self) -> str:
        """What the rows are, in words."""
        return "text from a file" if self.data else "generated text"


def llama_config(size: str, positions: int, vocabulary: int = 0) -> transformers.LlamaConfig:
    """The configuration of a LLaMA of a named size; `vocabulary` overrides its number of words."""
    hidden, intermediate, layers, heads, kv_heads, words = SIZES[size]
    return transformers.LlamaConfig(
        vocab_size=vocabulary or words,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
    )


def save_language_model(
    folder: Path, size: str, positions: int, tokenizer: PreTrainedTokenizerBase, mean_length: float = 0.0
) -> Path:
    """A random causal LM in fp32 and its tokenizer.

    Args:
        mean_length: mean length of sampled responses, in tokens. Their lengths follow a geometric distribution:
            whatever came before, the next token is EOS with probability 1 / mean_length. 0 leaves EOS as unlikely as
            any token.
    """
    torch.manual_seed(SEED)
    config = llama_config(size, positions, max(SIZES[size][-1], len(tokenizer)))
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    config.bos_token_id = tokenizer.bos_token_id
    model = transformers.AutoModelForCausalLM.from_config(config)
    if mean_length:
        _set_mean_length(model, tokenizer.eos_token_id, mean_length)
    _save(folder, model, tokenizer)
    return folder


def save_reward_model(folder: Path, size: str, positions: int, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A random scalar-head model as step 2 writes it, and its tokenizer."""
    torch.manual_seed(SEED + 1)
    config = llama_config(size, positions, max(SIZES[size][-1], len(tokenizer)))
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    config.bos_token_id, config.num_labels = tokenizer.bos_token_id, 1
    config.score_mean, config.score_std = 0.0, 1.0
    _save(folder, transformers.AutoModelForSequenceClassification.from_config(config), tokenizer)
    return folder


def _save(folder: Path, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def _set_mean_length(model: torch.nn.Module, eos_id: int, mean_length: float) -> None:
    """Give EOS the logit that makes its probability 1 / mean_length, by a hidden unit that is equal everywhere."""
    vocabulary = model.config.vocab_size
    model.get_input_embeddings().weight[:, 0] = EOS_DIRECTION
    unit = model.model(torch.randint(3, vocabulary, (4, 32))).last_hidden_state[..., 0].mean()
    head = model.get_output_embeddings().weight
    head[:, 0] = 0.0
    head[eos_id] = 0.0
    head[eos_id, 0] = math.log(vocabulary / (mean_length - 1)) / unit


def made_rows(count: int) -> list[dict[str, str]]:
    """Prompts with a chosen and a rejected response, of invented words.

    Word frequencies follow Zipf's law; lengths are log-normal, as those of real instructions and answers.
    """
    source = random.Random(SEED)
    syllables = [first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = ["".join(source.choices(syllables, k=source.randint(1, 4))) for _ in range(2000)]
    weights = [1 / (rank + 1) for rank in range(len(words))]

    def text(median: float, most: int) -> str:
        length = max(3, min(most, round(source.lognormvariate(math.log(median), 0.8))))
        return " ".join(source.choices(words, weights, k=length))

    return [
        {
            "prompt": f" Human: {text(15, 80)} Assistant:",
            "chosen": f" {text(50, 250)}",
            "rejected": f" {text(50, 250)}",
        }
        for _ in range(count)
    ]


def prepare_rows(folder: Path, data: str | None, count: int) -> list[dict]:
    """Fill `folder` with `count` rows to train on and one held out, from the file `data` or generated; return them.

    Raises:
        InputError: the file has fewer rows.
    """
    if data is None:
        rows = made_rows(count + 1)
    else:
        rows = [row for _, row in read_rows(Path(data))]
        if len(rows) <= count:
            raise InputError(f"--data {data} has {len(rows)} rows; this needs {count + 1}: reduce the workload")
        rows = random.Random(SEED).sample(rows, count + 1)
    for name, part in (("train", rows[:count]), ("eval", rows[count:])):
        atomic_write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))
    return rows


def prepare_tokenizer(folder: Path, path: str | None, rows: Sequence[dict]) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, or a small one trained on the values of `rows`, which fits the toy model."""
    if path is None:
        path = str(folder / "tokenizer.model")
        texts = (str(value) for row in rows for value in row.values())
        try:
            train_tokenizer(texts, path, vocab_size=SIZES["toy"][-1])
        except RuntimeError as error:  # sentencepiece's, for a vocabulary smaller than the set of characters
            raise InputError(
                f"--data: its text has more different characters than the small tokenizer made here: give --tokenizer "
                f"({str(error).strip().splitlines()[-1]})"
            ) from error
    return load_tokenizer(path)


def tokenized_rows(
    purpose: Literal["sft", "preference", "labelled", "prompts"],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    cache: Path,
) -> list[dict]:
    """The rows of `prepare_rows` as the step tokenises them, so that peers get the same ids.

    Args:
        length: --max_seq_len, or for "prompts" --max_prompt_seq_len.
        cache: folder for tokenised data, not within `folder`.
    """
    corpus = Corpus(
        purpose=purpose,
        paths=[str(folder)],
        max_len=length,
        data_split=SPLITS[purpose],
        seed=SEED,
        cache_dir=str(cache),
    )
    rows, _ = build_datasets(corpus, tokenizer)
    return [rows[index] for index in range(len(rows))]


def two_passes(
    purpose: Literal["sft", "preference", "labelled"],
    config: WorkArguments,
    folder: Path,
    *,
    rows: int,
    batch: int,
    length: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Training twice on the same rows: the flags of our step, and the setting of a peer's adapter, with token ids.

    Args:
        folder: for data, tokenizer and model.
        rows: number of rows, each of which is read twice.
        batch: rows of an optimiser step.
        length: maximum tokens of a row.
    """
    data, cache = folder / "data", folder / "cache"
    raw = prepare_rows(data, config.data, rows)
    tokenizer = prepare_tokenizer(folder, config.tokenizer or config.model_path, raw)
    if config.model_path:
        model = Path(config.model_path).resolve()
    else:
        model = save_language_model(folder / "model", config.model, 2 * length, tokenizer)
    flags = {
        **{"model_name_or_path": model, "data_path": data, "data_split": SPLITS[purpose], "data_output_path": cache},
        **{"per_device_train_batch_size": batch, "max_seq_len": length, "num_train_epochs": 2},
        **{"learning_rate": LEARNING_RATE, "seed": SEED},
    }
    setting = {
        **{"model": str(model), "rows": tokenized_rows(purpose, data, tokenizer, length, cache), "dtype": "bf16"},
        **{"batch": batch, "length": length, "epochs": 2, "learning_rate": LEARNING_RATE},
    }
    return flags, setting
