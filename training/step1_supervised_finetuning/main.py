"""Step 1: supervised fine-tuning (SFT). A causal language model learns to answer as the data answers.

The loss is cross-entropy on response tokens only, averaged over all response tokens of an optimiser step. Perplexity on
held-out rows and sample answers are shown before and after. The output folder opens in `transformers` and in the next
steps.

    one GPU     python training/step1_supervised_finetuning/main.py \\
                    --model_name_or_path llama-2-7b --data_path data.jsonl --output_dir output/sft --lora_dim 64
    eight GPUs  deepspeed --num_gpus 8 training/step1_supervised_finetuning/main.py \\
                    --model_name_or_path llama-2-7b --data_path data.jsonl --output_dir output/sft --zero_stage 3
"""

from utils.arguments import SftConfig as Config
from utils.arguments import parse_first, run

if __name__ == "__main__":
    CONFIG = parse_first(Config, __doc__)  # --help and mistyped flags are handled before the slow imports

import functools
import math
import time

import torch

from utils.checkpoints import Checkpoints
from utils.data import (
    Corpus,
    accumulation_groups,
    build_dataloader,
    build_datasets,
    collate_sft,
    micro_batches,
    pack_rows,
)
from utils.data.batches.sizes import rows_drawn, sequence_tokens
from utils.generation.answers import greedy_answers
from utils.models.checks import check_models, load_matching_tokenizer
from utils.models.engine import build_engine
from utils.models.saving import save_model
from utils.parallel import distributed
from utils.parallel.divergence import DivergenceGuard, check_finite
from utils.parallel.updates import optimizer_step
from utils.preflight import dry_run
from utils.runs.best import save_if_best
from utils.runs.opening import announce
from utils.runs.plan import Models, Plan, passes_over_rows
from utils.runs.session import check_run, log_data, open_metrics, save_summary, start_run

PANELS = {
    "loss per response token": ["train/loss", "eval/loss"],
    "perplexity on held-out rows": ["eval/perplexity"],
    "learning rate": ["train/learning_rate"],
    "gradient norm": ["train/grad_norm"],
}


def plan_of(config: Config, models: Models, rows: int | None, world_size: int) -> Plan:
    """The plan of a run on so many training rows and processes."""
    steps = passes_over_rows(config, rows, world_size)
    return Plan(
        title="step 1: SFT",
        config=config,
        models=models,
        length=steps,
        optimizer_steps={"model": steps},
        evaluation_rows=config.per_device_eval_batch_size,
        samples_answers=config.num_sample_generations > 0,
    )


@torch.no_grad()
def evaluate(engine, loader) -> dict[str, float]:
    """Mean loss per response token over the held-out rows of all ranks, and its exponential, the perplexity."""
    engine.eval()
    sums = {"loss": 0.0, "tokens": 0}
    for batch in distributed.wait("held-out rows, batches", len(loader)).over(loader):
        logprobs, _ = engine(**distributed.to_device(batch))
        sums["loss"] -= logprobs.double().sum().item()
        sums["tokens"] += logprobs.numel()
    engine.train()
    sums = distributed.all_reduce_dict(sums)
    loss = sums["loss"] / sums["tokens"]
    check_finite(loss, "held-out rows")
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}


def main(config: Config) -> dict[str, float]:
    """Run step 1 and return its summary."""
    # 1. Refuse what cannot work, then set up
    check_run(config)
    models, corpus = check_models(config), Corpus.of(config)
    corpus.check()
    tokenizer = load_matching_tokenizer(config, models)
    start_run(config)

    # 2. Data
    train_rows, eval_rows = build_datasets(corpus, tokenizer)
    eval_rows = eval_rows.head(config.eval_samples)
    data_report = log_data(train_rows)
    train_rows = pack_rows(train_rows, config, config.max_seq_len)
    collate = functools.partial(collate_sft, pad_id=tokenizer.pad_token_id)
    train_loader = build_dataloader(train_rows, list, config.micro_batch_rows, shuffle=True, seed=config.seed)
    eval_size = config.per_device_eval_batch_size
    eval_loader = build_dataloader(eval_rows, collate, eval_size, shuffle=False, seed=config.seed)

    if config.dry_run:
        return dry_run(plan_of, config, models, tokenizer, train_rows)

    # 3. Model
    plan = plan_of(config, models, rows_drawn(train_rows), distributed.world_size())
    announce(plan)
    checkpoints = Checkpoints(config, total_steps=plan.length, data_keys=[eval_rows.key])
    engine = build_engine(plan.roles["model"], tokenizer, config, total_steps=plan.length)

    def save(folder) -> None:
        save_model(engine.module.model, tokenizer, folder, save_adapter=config.save_adapter)

    # 4. Train, from the beginning or from a checkpoint
    guard = DivergenceGuard(config.on_nan, config.output_dir)
    state = checkpoints.resume({"model": engine}, rows=train_loader)
    with open_metrics(plan, state, data_report) as writer, checkpoints:
        shown_rows = [eval_rows[index] for index in range(min(config.num_sample_generations, len(eval_rows)))]
        if state.step == 0:
            state.own["answers"] = greedy_answers(engine, tokenizer, shown_rows, config.sample_max_new_tokens)
            state.before = evaluate(engine, eval_loader)
            writer.log(0, state.before)
        step, started = state.step, time.perf_counter() - state.seconds
        groups = accumulation_groups(train_loader, config.gradient_accumulation_steps, step, plan.length)
        for step, epoch, rows in groups:
            step_started = time.perf_counter()
            parts = micro_batches(rows, config.max_tokens_per_batch, sequence_tokens)
            batches = [distributed.to_device(collate(part)) for part in parts]
            tokens = distributed.all_reduce_scalar(sum(int(batch["target_mask"].sum()) for batch in batches))

            def loss_function(batch, tokens=tokens):
                logprobs, _ = engine(**batch)
                return -logprobs.sum() / tokens

            learning_rate = engine.get_lr()[0]  # before the step, which advances the schedule
            loss, norm = optimizer_step(engine, batches, loss_function, what=f"step {step}", guard=guard)
            metrics = {
                "train/loss": loss,
                "train/grad_norm": norm,
                "train/learning_rate": learning_rate,
                "train/epoch": epoch + 1,
                "train/skipped_steps": engine.skipped_steps,
                "train/response_tokens_per_second": tokens / (time.perf_counter() - step_started),
            }
            writer.log(step, metrics, bar=["train/loss", "train/response_tokens_per_second"])
            if config.print_loss:
                writer.print(f"step {step}: loss {loss:.4f}")
            if config.eval_interval and step % config.eval_interval == 0 and step < plan.length:
                evaluated = evaluate(engine, eval_loader)
                writer.log(step, evaluated)
                save_if_best(config, -evaluated["eval/loss"], save)
            checkpoints.step_done(state, writer, step=step, seconds=time.perf_counter() - started)
        after = evaluate(engine, eval_loader)
        writer.log(step, after)
        answers_after = greedy_answers(engine, tokenizer, shown_rows, config.sample_max_new_tokens)
        for (prompt, old), (_, new) in zip(state.own["answers"], answers_after, strict=True):
            writer.print(f"\n{prompt.strip()}\n  before: {old.strip()}\n  after:  {new.strip()}")
        writer.compare("held-out rows", state.before, after)

        # 5. Save, then draw
        if config.output_dir:
            save(config.output_dir)
            save_if_best(config, -after["eval/loss"], save)
        writer.plot(PANELS, per=plan.unit)
    return save_summary(plan, state, after, steps=step)


if __name__ == "__main__":
    run(main, CONFIG)
