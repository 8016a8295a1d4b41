"""Direct preference optimisation: rows per second and peak memory, ours against TRL's DPOTrainer and KTOTrainer.

    python -m scripts.benchmarks.dpo --data pairs.jsonl --tokenizer tokenizer.model --trl_python trl/bin/python
    python -m scripts.benchmarks.dpo --loss kto --data labelled.json --model_path models/real --trl_python ...

All run as their users run them, in separate processes, on the same rows, given as token ids: two passes, of which the
second is timed. Log-probabilities of the reference that are computed before training are in none of the times.
"""

import functools
import statistics
from dataclasses import dataclass
from typing import Literal

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

SPEED, TOKENS = "rows/s", "tokens/s"
NOTE = (
    "A row is a pair, or with KTO an answer. Tokens are those of whole sequences: a prompt counts with each of its two "
    "answers, though ours computes it once. TRL by default keeps fp32 weights and casts them in each pass (autocast), "
    "and a second model for the reference; its activation checkpointing is off."
)


@dataclass(kw_only=True)
class Config(WorkArguments, ContenderArguments, TrlArguments):
    """Direct preference."""

    loss: Literal["sigmoid", "kto"] = flag("sigmoid", "DPO on pairs, or KTO on single answers with a label")
    rows: int = flag(48, "rows of the data, each of which is read twice", at_least=1)
    batch: int = flag(8, "rows of an optimiser step", at_least=1)
    length: int = flag(512, "tokens of a sequence, at most", at_least=8)


def contenders(config: Config, runner: Runner) -> dict[str, Contender]:
    """All contenders that can run, by name."""
    purpose = "labelled" if config.loss == "kto" else "preference"
    flags, setting = two_passes(
        purpose, config, runner.folder, rows=config.rows, batch=config.batch, length=config.length
    )
    flags |= {"loss": config.loss, "num_sample_generations": 0}
    answers = ("response_ids",) if purpose == "labelled" else ("chosen_ids", "rejected_ids")
    tokens = sum(len(row["prompt_ids"]) + len(row[name]) for row in setting["rows"] for name in answers)

    def ours(name: str, **changes) -> Measures:
        metrics, memory = runner.run_step(name, "step2_dpo_finetuning", flags | changes)
        return our_rates(metrics, {"rows": len(setting["rows"]), "tokens": tokens}) | memory

    def trl(python: str, *, precompute: bool) -> Measures:
        adapter = "trl_kto" if config.loss == "kto" else "trl_dpo"
        steps, memory = runner.run_peer("TRL", adapter, python, setting | {"precompute": precompute})
        return peer_rates(steps) | memory

    available: dict[str, Contender] = {
        "ours": functools.partial(ours, "ours"),
        "ours, live reference": functools.partial(ours, "ours-live", reference_logprobs="live"),
    }
    if python := config.trl():
        available["TRL"] = functools.partial(trl, python, precompute=False)
        available["TRL, precomputed"] = functools.partial(trl, python, precompute=True)
    return available


def main(config: Config) -> None:
    """Run the comparison, print its tables and append them to the results."""
    measured, versions = measure(config, contenders)
    report = Report(
        f"{config.loss}: {config.described_model}, bf16, {config.batch} rows of up to {config.length} tokens a "
        f"sequence in a step, {config.rows} rows of {config.text}; repetitions: {config.repeats}",
        versions,
    )
    rows = [
        (name, median(values[SPEED]), median(values[TOKENS], 0), f"{statistics.median(values[MEMORY]):.2f}")
        for name, values in measured.items()
    ]
    report.table("Direct preference optimisation", rows, ("contender", SPEED, TOKENS, "peak GiB"))
    report.compare(measured, SPEED, note=NOTE)
    report.close(config.results)


if __name__ == "__main__":
    run(main, Config)
