"""Step 2: pairs per second and peak memory, ours against TRL's RewardTrainer.

    python scripts/benchmarks/step2.py --data pairs.jsonl --tokenizer tokenizer.model --trl_python trl/bin/python

Both run as their users run them, a process each, on the same pairs, given as token ids: two passes, of which the second
is timed.
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
SPEED, TOKENS = "pairs/s", "tokens/s"


@dataclass(kw_only=True)
class Config(WorkArguments, ContenderArguments, TrlArguments, ReportArguments):
    """Step 2."""

    pairs: int = flag(48, "pairs of the data, each of which is read twice", at_least=1)
    batch: int = flag(8, "pairs of an optimiser step", at_least=1)
    length: int = flag(512, "tokens of a sequence, at most", at_least=8)
    budget: int = flag(2048, "--max_tokens_per_batch of the contender `ours, budget`", at_least=1)


def contenders(config: Config, folder: Path, versions: dict[str, dict]) -> dict[str, Contender]:
    """All that can run, by name; versions of peers are put into `versions` as they run."""
    data, cache = folder / "data", folder / "cache"
    raw = prepare_rows(data, config.data, config.pairs)
    tokenizer = prepare_tokenizer(folder, config.tokenizer, raw)
    model = save_language_model(folder / "model", config.model, 2 * config.length, tokenizer)
    rows = tokenized_rows("preference", data, tokenizer, config.length, cache)
    tokens = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)

    def ours(name: str, **changes) -> Measures:
        metrics, peak = run_step(
            "step2_reward_model_finetuning",
            {
                **{"model_name_or_path": model, "data_path": data, "data_split": "0,1,0", "seed": SEED},
                **{"data_output_path": cache, "max_seq_len": config.length, "num_train_epochs": 2},
                **{"per_device_train_batch_size": config.batch, "learning_rate": LEARNING_RATE, **changes},
            },
            folder / name,
            config.threads,
        )
        times = [row["time"] for row in metrics if "train/loss" in row]
        seconds = times[-1] - times[len(times) // 2 - 1]
        return {SPEED: len(rows) / seconds, TOKENS: tokens / seconds, MEMORY: peak}

    def trl(python: str) -> Measures:
        work = {
            **{"model": str(model), "rows": rows, "batch": config.batch, "length": config.length, "epochs": 2},
            **{"learning_rate": LEARNING_RATE, "dtype": "bf16", "scratch": str(folder / "trl")},
        }
        measured, peak = run_peer(python, "trl_reward", work, folder / "trl", config.threads)
        versions["TRL"] = measured["versions"]
        second = measured["steps"][len(measured["steps"]) // 2 :]
        seconds = sum(step["seconds"] for step in second)
        counts = {name: sum(step[name] for step in second) for name in ("pairs", "tokens")}
        return {SPEED: counts["pairs"] / seconds, TOKENS: counts["tokens"] / seconds, MEMORY: peak}

    everyone: dict[str, Contender] = {
        "ours": functools.partial(ours, "ours"),
        "ours, budget": functools.partial(ours, "ours-budget", max_tokens_per_batch=config.budget),
    }
    if python := config.trl():
        everyone["TRL"] = functools.partial(trl, python)
    return everyone


def main(config: Config) -> None:
    """Run the comparison, print its tables and append them to the results."""
    with tempfile.TemporaryDirectory() as folder:
        versions: dict[str, dict] = {}
        measured = interleave(contenders(config, Path(folder), versions), config.repeats, config.contenders)
    report = Report(
        f"{config.model} LLaMA, bf16, {config.batch} pairs of up to {config.length} tokens a side in a step, "
        f"{config.pairs} pairs of {config.text}, budget {config.budget}; repetitions: {config.repeats}",
        versions,
    )
    rows = [
        (name, median(values[SPEED]), median(values[TOKENS], 0), f"{statistics.median(values[MEMORY]):.2f}")
        for name, values in measured.items()
    ]
    report.table("Step 2: reward model", rows, ("contender", SPEED, TOKENS, "peak GiB"))
    if compared := ratios(measured, "ours", SPEED, higher_is_faster=True):
        report.table("Ratios of medians", compared, ("ours", "peer", "times as fast", "share of its memory"))
    report.close(config.results)


if __name__ == "__main__":
    run(main, Config)
