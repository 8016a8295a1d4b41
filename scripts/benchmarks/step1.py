"""Step 1: tokens per second and peak memory, ours against TRL's SFTTrainer and DeepSpeed-Chat.

    python -m scripts.benchmarks.step1 --data alpaca.json --tokenizer tokenizer.model \\
        --trl_python trl/bin/python \\
        --deepspeed_chat DeepSpeedExamples --deepspeed_chat_python deepspeed_chat/bin/python

Every contender is a separate process, runs as its users run it, and gets the same rows, as token ids: two passes, of
which the second is timed. Tokens do not include padding; response tokens are those in the loss of ours and of TRL.
"""

import functools
import statistics
from dataclasses import dataclass

from scripts.benchmarks.contenders import (
    Contender,
    ContenderArguments,
    DeepSpeedChatArguments,
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

NOTE = (
    "Ours and DeepSpeed-Chat keep fp32 weights beside the bf16 ones; TRL by default keeps fp32 weights and casts "
    "them in each pass (autocast); its activation checkpointing is off. DeepSpeed-Chat's loss includes the prompts."
)
STEP = "step1_supervised_finetuning"  # ours and DeepSpeed-Chat's
SPEED, RESPONSES = "tokens/s", "response tokens/s"


@dataclass(kw_only=True)
class Config(WorkArguments, ContenderArguments, TrlArguments, DeepSpeedChatArguments):
    """Step 1."""

    rows: int = flag(48, "rows of the data, each of which is read twice", at_least=1)
    batch: int = flag(8, "rows of an optimiser step", at_least=1)
    length: int = flag(512, "tokens of a row, at most", at_least=8)
    budget: int = flag(1024, "--max_tokens_per_batch of the contender `ours, budget`", at_least=1)


def contenders(config: Config, runner: Runner) -> dict[str, Contender]:
    """All contenders that can run, by name."""
    flags, setting = two_passes(
        "sft", config, runner.folder, rows=config.rows, batch=config.batch, length=config.length
    )
    tokens = sum(len(row["input_ids"]) for row in setting["rows"])
    responses = tokens - sum(row["response_start"] for row in setting["rows"])
    flags["num_sample_generations"] = 0

    def ours(name: str, **changes) -> Measures:
        metrics, memory = runner.run_step(name, STEP, flags | changes)
        return our_rates(metrics, {"tokens": tokens, "response tokens": responses}) | memory

    def peer(name: str, adapter: str, python: str, **changes) -> Measures:
        steps, memory = runner.run_peer(name, adapter, python, setting | changes)
        return peer_rates(steps) | memory

    available: dict[str, Contender] = {
        "ours": functools.partial(ours, "ours"),
        "ours, packing": functools.partial(ours, "ours-packing", packing=True),
        "ours, budget": functools.partial(ours, "ours-budget", max_tokens_per_batch=config.budget),
    }
    if python := config.trl():
        available["TRL"] = functools.partial(peer, "TRL", "trl_sft", python, packing=False)
        available["TRL, packing"] = functools.partial(peer, "TRL", "trl_sft", python, packing=True)
    if given := config.deepspeed():
        name, (python, checkout) = "DeepSpeed-Chat", given
        available[name] = functools.partial(peer, name, "deepspeed_chat", python, checkout=checkout, step=STEP)
    return available


def main(config: Config) -> None:
    """Run the comparison, print its tables and append them to the results."""
    measured, versions = measure(config, contenders)
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
    report.compare(measured, SPEED, note=NOTE)
    report.close(config.results)


if __name__ == "__main__":
    run(main, Config)
