"""Step 1: tokens per second and peak memory, ours against TRL's SFTTrainer and DeepSpeed-Chat.

    python scripts/benchmarks/step1.py --data alpaca.json --tokenizer tokenizer.model \\
        --trl_python trl/bin/python \\
        --deepspeed_chat DeepSpeedExamples --deepspeed_chat_python deepspeed_chat/bin/python

Every contender is a process of its own, runs as its users run it, and is given the same rows, as token ids: two passes,
of which the second is timed. Tokens are those that are not padding; response tokens are those that ours and TRL's loss
is about.
"""

import functools
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from contenders import (
    MEMORY,
    Contender,
    ContenderArguments,
    DeepSpeedChatArguments,
    Measures,
    TrlArguments,
    interleave,
    ratios,
    run_peer,
    run_step,
)
from report import Report, ReportArguments, median
from workload import SEED, WorkArguments, prepare_rows, prepare_tokenizer, save_language_model, tokenized_rows

from utils.config import flag, run

LEARNING_RATE = 1e-5
NOTE = (
    "Ours and DeepSpeed-Chat keep fp32 weights beside the bf16 ones; TRL, as it comes, keeps fp32 weights and casts "
    "them each time (autocast); its checkpointing of activations is off. DeepSpeed-Chat's loss is over prompts as well."
)
SPEED, RESPONSES = "tokens/s", "response tokens/s"


@dataclass(kw_only=True)
class Config(WorkArguments, ContenderArguments, TrlArguments, DeepSpeedChatArguments, ReportArguments):
    """Step 1."""

    rows: int = flag(48, "rows of the data, each of which is read twice", at_least=1)
    batch: int = flag(8, "rows of an optimiser step", at_least=1)
    length: int = flag(512, "tokens of a row, at most", at_least=8)
    budget: int = flag(1024, "--max_tokens_per_batch of the contender `ours, budget`", at_least=1)


def our_rate(rows: list[dict], tokens: int, responses: int) -> Measures:
    """Rates of the second pass, from the times at which the rows of metrics.jsonl were written."""
    times = [row["time"] for row in rows if "train/loss" in row]
    seconds = times[-1] - times[len(times) // 2 - 1]
    return {SPEED: tokens / seconds, RESPONSES: responses / seconds}


def peer_rate(measured: dict) -> Measures:
    """Rates of the second pass from an adapter's steps."""
    second = measured["steps"][len(measured["steps"]) // 2 :]
    seconds = sum(step["seconds"] for step in second)
    return {
        SPEED: sum(step["tokens"] for step in second) / seconds,
        RESPONSES: sum(step["responses"] for step in second) / seconds,
    }


def contenders(config: Config, folder: Path, versions: dict[str, dict]) -> dict[str, Contender]:
    """All that can run, by name; versions of peers are put into `versions` as they run."""
    data, cache = folder / "data", folder / "cache"
    raw = prepare_rows(data, config.data, config.rows)
    tokenizer = prepare_tokenizer(folder, config.tokenizer, raw)
    model = save_language_model(folder / "model", config.model, 2 * config.length, tokenizer)
    rows = tokenized_rows("sft", data, tokenizer, config.length, cache)
    tokens = sum(len(row["input_ids"]) for row in rows)
    responses = tokens - sum(row["response_start"] for row in rows)

    def ours(name: str, **changes) -> Measures:
        metrics, peak = run_step(
            "step1_supervised_finetuning",
            {
                **{"model_name_or_path": model, "data_path": data, "data_split": "1,0,0", "seed": SEED},
                **{"data_output_path": cache, "max_seq_len": config.length, "num_train_epochs": 2},
                **{"per_device_train_batch_size": config.batch, "learning_rate": LEARNING_RATE},
                **{"num_sample_generations": 0, **changes},
            },
            folder / name,
            config.threads,
        )
        return our_rate(metrics, tokens, responses) | {MEMORY: peak}

    def peer(name: str, adapter: str, python: str, **changes) -> Measures:
        work = {
            **{"model": str(model), "rows": rows, "batch": config.batch, "length": config.length, "epochs": 2},
            **{"learning_rate": LEARNING_RATE, "dtype": "bf16", "scratch": str(folder / adapter), **changes},
        }
        measured, peak = run_peer(python, adapter, work, folder / adapter, config.threads)
        versions[name] = measured["versions"]
        return peer_rate(measured) | {MEMORY: peak}

    everyone: dict[str, Contender] = {
        "ours": functools.partial(ours, "ours"),
        "ours, packing": functools.partial(ours, "ours-packing", packing=True),
        "ours, budget": functools.partial(ours, "ours-budget", max_tokens_per_batch=config.budget),
    }
    if python := config.trl():
        everyone["TRL"] = functools.partial(peer, "TRL", "trl_sft", python, packing=False)
        everyone["TRL, packing"] = functools.partial(peer, "TRL", "trl_sft", python, packing=True)
    if given := config.deepspeed():
        name, (python, checkout) = "DeepSpeed-Chat", given
        everyone[name] = functools.partial(peer, name, "deepspeed_chat", python, checkout=checkout, step=1)
    return everyone


def main(config: Config) -> None:
    """Run the comparison, print its tables and append them to the results."""
    with tempfile.TemporaryDirectory() as folder:
        versions: dict[str, dict] = {}
        measured = interleave(contenders(config, Path(folder), versions), config.repeats, config.contenders)
    report = Report(
        f"{config.model} LLaMA, bf16, {config.batch} rows of up to {config.length} tokens a step, {config.rows} "
        f"rows of {config.text}, budget {config.budget}; repetitions: {config.repeats}",
        versions,
    )
    rows = [
        (name, median(values[SPEED], 0), median(values[RESPONSES], 0), f"{statistics.median(values[MEMORY]):.2f}")
        for name, values in measured.items()
    ]
    report.table("Step 1: supervised fine-tuning", rows, ("contender", SPEED, RESPONSES, "peak GiB"))
    if compared := ratios(measured, "ours", SPEED, higher_is_faster=True):
        report.table("Ratios of medians", compared, ("ours", "peer", "times as fast", "share of its memory"))
        report.remark(NOTE)
    report.close(config.results)


if __name__ == "__main__":
    run(main, Config)
