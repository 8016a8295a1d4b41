"""Step 3: seconds of a PPO iteration by phase and peak memory, ours against TRL's PPOTrainer and DeepSpeed-Chat.

    python -m scripts.benchmarks.step3 --data alpaca.json --tokenizer tokenizer.model \\
        --trl_ppo_python trl/bin/python \\
        --deepspeed_chat DeepSpeedExamples --deepspeed_chat_python deepspeed_chat/bin/python
    python -m scripts.benchmarks.step3 --mean_answer 32 --answer 128 --generation_batches 4     # long-tailed lengths

Every contender is a separate process, runs as its users run it, and gets the same prompts, as token ids. The first
iteration is left out, the others are averaged. DeepSpeed-Chat generates greedily for LLaMA; in the contender with
"sampling" in its name, its `generate` is patched to sample. TRL trains fp32 weights under autocast, or bf16 weights
only. With --mean_answer, the actor's weights are set so that a sampled answer ends after that many tokens on average (a
geometric distribution), which needs sampling.
"""

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scripts.benchmarks.contenders import (
    Contender,
    ContenderArguments,
    DeepSpeedChatArguments,
    Measures,
    Runner,
    TrlArguments,
    measure,
)
from scripts.benchmarks.report import MEMORY, Report, median
from scripts.benchmarks.workload import (
    SEED,
    SPLITS,
    WorkArguments,
    prepare_rows,
    prepare_tokenizer,
    save_language_model,
    save_reward_model,
    tokenized_rows,
)
from utils.arguments import flag, run

STEP = "step3_rlhf_finetuning"  # ours and DeepSpeed-Chat's
LEARNING_RATE = 1e-6
NOTE = (
    "Ours and DeepSpeed-Chat keep fp32 weights beside the bf16 ones. TRL has fp32 weights and trains under autocast, "
    "or has bf16 weights only. All make one pass over a rollout. DeepSpeed-Chat pads prompts to the maximum length."
)
PHASES = ("generation", "scoring", "training")
ITERATION, LENGTH = "iteration", "tokens per answer"


@dataclass(kw_only=True)
class Config(WorkArguments, ContenderArguments, TrlArguments, DeepSpeedChatArguments):
    """Step 3."""

    trl_python: str | None = flag(
        None, "python of an environment with TRL 1.12.0, the last version with PPO", aliases=["trl_ppo_python"]
    )
    batch: int = flag(16, "prompts that generate together, and sequences of an optimiser step", at_least=1)
    generation_batches: int = flag(1, "batches of a rollout", at_least=1)
    prompt: int = flag(128, "tokens of a prompt, at most", at_least=1)
    answer: int = flag(64, "tokens of an answer, at most", at_least=2)
    mean_answer: float = flag(0.0, "mean length of an answer, in tokens, long-tailed; 0 = all reach --answer")
    iterations: int = flag(3, "iterations that are timed, after one that is not", at_least=1)
    budget: int = flag(1024, "--max_tokens_per_batch of the contender `ours, budget`", at_least=1)


def averages(steps: Sequence[dict[str, float]]) -> Measures:
    """Mean seconds of each phase and mean length of an answer over `steps`; scoring is the remaining time."""
    means = {name: statistics.mean(step[name] for step in steps) for name in ("seconds", "generation", "training")}
    scoring = means["seconds"] - means["generation"] - means["training"]
    length = sum(step["response tokens"] for step in steps) / sum(step["sequences"] for step in steps)
    phases = dict(zip(PHASES, (means["generation"], scoring, means["training"])))
    return {ITERATION: means["seconds"], **phases, LENGTH: length}


def our_steps(rows: Sequence[dict]) -> list[dict[str, float]]:
    """Iterations from the second on; each lasts from the time at which its predecessor's metrics were written."""
    rows = [row for row in rows if "time/generation" in row]
    return [
        {
            **{"seconds": row["time"] - before["time"], "generation": row["time/generation"]},
            **{"training": row["time/training"], "sequences": row["ppo/sequences"]},
            "response tokens": row["ppo/sequences"] * row["ppo/length_mean"],
        }
        for before, row in zip(rows, rows[1:])
    ]


def contenders(config: Config, runner: Runner) -> dict[str, Contender]:
    """All contenders that can run, by name."""
    rollout = config.batch * config.generation_batches
    count = rollout * (config.iterations + 1)
    folder = runner.folder
    data, cache = folder / "data", folder / "cache"
    raw = prepare_rows(data, config.data, count)
    tokenizer = prepare_tokenizer(folder, config.tokenizer, raw)
    positions = config.prompt + config.answer
    actor = save_language_model(folder / "actor", config.model, positions, tokenizer, config.mean_answer)
    critic = save_reward_model(folder / "critic", config.model, positions, tokenizer)
    rows = tokenized_rows("prompts", data, tokenizer, config.prompt, cache)
    rows = [{"prompt_ids": row["prompt_ids"]} for row in rows]

    def ours(name: str, **changes) -> Measures:
        metrics, memory = runner.run_step(
            name,
            STEP,
            {
                **{"actor_model_name_or_path": actor, "critic_model_name_or_path": critic, "seed": SEED},
                **{"data_path": data, "data_split": SPLITS["prompts"], "data_output_path": cache, "eval_prompts": 0},
                **{"per_device_generation_batch_size": config.batch, "generation_batches": config.generation_batches},
                **{"per_device_training_batch_size": config.batch, "max_prompt_seq_len": config.prompt},
                **{"max_answer_seq_len": config.answer, "max_steps": config.iterations + 1, **changes},
                **{"actor_learning_rate": LEARNING_RATE, "critic_learning_rate": LEARNING_RATE},
            },
        )
        return averages(our_steps(metrics)) | memory

    def peer(name: str, adapter: str, python: str, **changes) -> Measures:
        work = {
            **{"model": str(actor), "reward_model": str(critic), "rows": rows, "learning_rate": LEARNING_RATE},
            **{"batch": config.batch, "rollout": rollout, "prompt": config.prompt, "answer": config.answer},
            **{"dtype": "bf16", **changes},
        }
        steps, memory = runner.run_peer(name, adapter, python, work)
        return averages(steps[1:]) | memory

    available: dict[str, Contender] = {
        "ours": functools.partial(ours, "ours"),
        "ours, budget": functools.partial(ours, "ours-budget", max_tokens_per_batch=config.budget),
    }
    if python := config.trl("pip install trl==1.12.0"):
        available["TRL"] = functools.partial(peer, "TRL", "trl_ppo", python, weights="fp32")
        available["TRL, bf16 weights"] = functools.partial(peer, "TRL", "trl_ppo", python, weights="bf16")
    if given := config.deepspeed():
        python, checkout = given
        chat = functools.partial(peer, "DeepSpeed-Chat", "deepspeed_chat", python, checkout=checkout, step=STEP)
        if not config.mean_answer:
            available["DeepSpeed-Chat"] = functools.partial(chat, sampling=False)
        available["DeepSpeed-Chat, sampling"] = functools.partial(chat, sampling=True)
    return available


def main(config: Config) -> None:
    """Run the comparison, print its tables and append them to the results."""
    measured, versions = measure(config, contenders)
    lengths = f"{config.mean_answer:g} on average, long-tailed, at most " if config.mean_answer else ""
    report = Report(
        f"{config.model} LLaMA, bf16, {config.generation_batches} x {config.batch} prompts of up to {config.prompt} "
        f"tokens of {config.text}, answers of {lengths}{config.answer} tokens, budget {config.budget}, "
        f"{config.iterations} iterations; repetitions: {config.repeats}",
        versions,
    )
    rows = [
        (
            name,
            median(values[ITERATION]),
            *(f"{statistics.median(values[phase]):.2f}" for phase in PHASES),
            f"{statistics.median(values[LENGTH]):.1f}",
            f"{statistics.median(values[MEMORY]):.2f}",
        )
        for name, values in measured.items()
    ]
    report.table("Step 3: seconds of a PPO iteration", rows, ("contender", ITERATION, *PHASES, LENGTH, "peak GiB"))
    report.compare(measured, ITERATION, higher_is_faster=False, note=NOTE)
    report.close(config.results)


if __name__ == "__main__":
    run(main, Config)
