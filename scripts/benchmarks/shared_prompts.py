"""What two answers gain by sharing the computation of their prompt: a forward and a backward pass, with and without.

    python -m scripts.benchmarks.shared_prompts --data pairs.jsonl --tokenizer tokenizer.model

Pairs whose prompt is longer than each of its answers, for a language model (direct preference) and for a model with a
scalar head (the reward model).
"""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn

from scripts.benchmarks.machine import timed
from scripts.benchmarks.report import Report, ReportArguments, median
from scripts.benchmarks.workload import WorkArguments, llama_config, prepare_rows, prepare_tokenizer, tokenized_rows
from utils.arguments import flag, run
from utils.data.batches.collate import Batch, collate_preference
from utils.errors import InputError
from utils.models.causal_lm import CausalLM
from utils.models.scalar_head import ScalarHeadModel
from utils.parallel import distributed


@dataclass(kw_only=True)
class Config(WorkArguments, ReportArguments):
    """Shared prompts."""

    repeats: int = 5
    rows: int = flag(400, "rows of the data among which pairs with long prompts are looked for", at_least=1)
    pairs: int = flag(32, "such pairs", at_least=1)
    batch: int = flag(8, "pairs of a pass", at_least=1)
    length: int = flag(512, "tokens of a sequence, at most", at_least=8)


def batches_of(config: Config) -> tuple[list[Batch], int]:
    """The pairs in batches on this process's device, and the size of the vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        tokenizer = prepare_tokenizer(Path(folder), config.tokenizer, prepare_rows(data, config.data, config.rows))
        rows = tokenized_rows("preference", data, tokenizer, config.length, Path(folder) / "cache")
    answers = ("chosen_ids", "rejected_ids")
    long = [row for row in rows if len(row["prompt_ids"]) > max(len(row[name]) for name in answers)][: config.pairs]
    if not long:
        raise InputError("--data has no pair whose prompt is longer than its answers; give other data")
    parts = [long[start : start + config.batch] for start in range(0, len(long), config.batch)]
    return [distributed.to_device(collate_preference(part, pad_id=0)) for part in parts], len(tokenizer)


def models(config: Config, vocabulary: int) -> dict[str, nn.Module]:
    """A language model and one with a scalar head, with the same random weights, in bf16."""
    llama = llama_config(config.model, 2 * config.length, vocabulary)
    llama.num_labels, llama.pad_token_id = 1, 0
    torch.manual_seed(0)
    language = CausalLM(transformers.LlamaForCausalLM(llama).bfloat16())
    scalar = ScalarHeadModel(transformers.LlamaForSequenceClassification(llama).bfloat16())
    return {"direct preference": language.to(distributed.device()), "reward model": scalar.to(distributed.device())}


def work(model: nn.Module, batches: list[Batch], *, shares: bool) -> Callable[[], None]:
    """A forward and a backward pass over all batches."""

    def passes() -> None:
        for batch in batches:
            model.zero_grad()
            prompts = batch["prompt_lengths"] if shares else None
            inputs, answers = (batch["input_ids"], batch["attention_mask"]), batch["response_mask"]
            if isinstance(model, CausalLM):
                model(*inputs, answers, prompt_lengths=prompts)[0].sum().backward()
            else:
                model(*inputs, prompt_lengths=prompts)[answers].sum().backward()

    return passes


def main(config: Config) -> None:
    """Measure both models, print the table and append it to the results."""
    batches, vocabulary = batches_of(config)
    pairs = sum(len(batch["row_mask"]) for batch in batches)
    prompt = sum(int(batch["prompt_lengths"].sum()) for batch in batches) / pairs
    answer = sum(int(batch["response_mask"].sum()) for batch in batches) / (2 * pairs)
    report = Report(
        f"{config.model} LLaMA, vocabulary {vocabulary:,}, bf16, {pairs} pairs of {config.text}, {config.batch} in a "
        f"pass: {prompt:.0f} tokens of prompt, {answer:.0f} of an answer; {torch.get_num_threads()} threads; "
        f"repetitions: {config.repeats}"
    )
    rows = []
    for name, model in models(config, vocabulary).items():
        ways = {shares: work(model, batches, shares=shares) for shares in (False, True)}
        seconds: dict[bool, list[float]] = {shares: [] for shares in ways}
        for repetition in range(config.repeats + 1):
            for shares, passes in ways.items():
                took = timed(passes)
                if repetition:  # the first is a warm-up
                    seconds[shares].append(took)
        ratio = statistics.median(seconds[False]) / statistics.median(seconds[True])
        rows.append((name, median(seconds[False]), median(seconds[True]), f"{ratio:.2f}"))
    report.table("Shared prompts", rows, ("", "each by itself, s", "shared, s", "times as fast"))
    report.close(config.results)


if __name__ == "__main__":
    run(main, Config)
