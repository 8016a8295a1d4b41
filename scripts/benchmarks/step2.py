"""Step 2: pairs per second and peak memory, ours against TRL's RewardTrainer.

    python -m scripts.benchmarks.step2 --data pairs.jsonl --tokenizer tokenizer.model --trl_python trl/bin/python

Both run as their users run them, in separate processes, on the same pairs, given as token ids: two passes, of which the
second is timed.
"""

import functools
import statistics
from dataclasses import dataclass

from scripts.benchmarks.contenders import (
    Contender,
    ContenderArguments,
    Measures,
    Runner,
    TrlArguments,
    measure,
    our_rates,
    peer_rates,
)
from scripts.benchmarks.report import MEMORY, Report, median
from scripts.benchmarks.workload import WorkArguments, two_passes
from utils.arguments import flag, run

SPEED, TOKENS = "pairs/s", "tokens/s"


@dataclass(kw_only=True)
class Config(WorkArguments, ContenderArguments, TrlArguments):
    """Step 2."""

    pairs: int = flag(48, "pairs of the data, each of which is read twice", at_least=1)
    batch: int = flag(8, "pairs of an optimiser step", at_least=1)
    length: int = flag(512, "tokens of a sequence, at most", at_least=8)
    budget: int = flag(2048, "--max_tokens_per_batch of the contender `ours, budget`", at_least=1)


def contenders(config: Config, runner: Runner) -> dict[str, Contender]:
    """All contenders that can run, by name."""
    flags, setting = two_passes(
        "preference", config, runner.folder, rows=config.pairs, batch=config.batch, length=config.length
    )
    tokens = sum(
        2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in setting["rows"]
    )

    def ours(name: str, **changes) -> Measures:
        metrics, memory = runner.run_step(name, "step2_reward_model_finetuning", flags | changes)
        return our_rates(metrics, {"pairs": len(setting["rows"]), "tokens": tokens}) | memory

    def trl(python: str) -> Measures:
        steps, memory = runner.run_peer("TRL", "trl_reward", python, setting)
        return peer_rates(steps) | memory

    available: dict[str, Contender] = {
        "ours": functools.partial(ours, "ours"),
        "ours, budget": functools.partial(ours, "ours-budget", max_tokens_per_batch=config.budget),
    }
    if python := config.trl():
        available["TRL"] = functools.partial(trl, python)
    return available


def main(config: Config) -> None:
    """Run the comparison, print its tables and append them to the results."""
    measured, versions = measure(config, contenders)
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
    report.compare(measured, SPEED)
    report.close(config.results)


if __name__ == "__main__":
    run(main, Config)
