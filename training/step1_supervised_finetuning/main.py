"""Step 1: supervised fine-tuning (SFT). A causal language model learns to answer as the data answers.

The loss is cross-entropy on response tokens only, averaged over all response tokens of an optimiser step. Perplexity on
held-out rows and sample answers are shown before and after. The output folder opens in `transformers` and in the next
steps.

    one GPU     python training/step1_supervised_finetuning/main.py \\
                    --model_name_or_path llama-2-7b --data_path data.jsonl --output_dir output/sft --lora_dim 64
    eight GPUs  deepspeed --num_gpus 8 training/step1_supervised_finetuning/main.py \\
                    --model_name_or_path llama-2-7b --data_path data.jsonl --output_dir output/sft --zero_stage 3
"""

import functools
import math
import time
from dataclasses import dataclass

import torch

from utils import distributed
from utils.arguments import (
    CheckpointArguments,
    DataArguments,
    LoraArguments,
    ModelArguments,
    OptimizationArguments,
    OutputArguments,
    SftArguments,
    SystemArguments,
    TokenizerArguments,
)
from utils.checkpoints import Checkpoints
from utils.config import run
from utils.data import (
    PackedRows,
    accumulation_groups,
    build_dataloader,
    build_datasets,
    check_data_paths,
    collate_sft,
    micro_batches,
    sft_tokens,
)
from utils.divergence import DivergenceGuard, check_finite
from utils.models.checkpoint import save_if_best, save_model
from utils.models.loading import check_length, check_model, load_causal_lm, load_matching_tokenizer
from utils.models.lora import check_lora
from utils.models.training_engine import build_engine
from utils.preflight import dry_run
from utils.rlhf.evaluation import greedy_answers
from utils.session import check_run, open_metrics, save_summary, start_run
from utils.zero import optimizer_step

PANELS = {
    "loss per response token": ["train/loss", "eval/loss"],
    "perplexity on held-out rows": ["eval/perplexity"],
    "learning rate": ["train/learning_rate"],
    "gradient norm": ["train/grad_norm"],
}


@dataclass(kw_only=True)
class Config(
    DataArguments,
    ModelArguments,
    OptimizationArguments,
    SystemArguments,
    LoraArguments,
    SftArguments,
    OutputArguments,
    CheckpointArguments,
    TokenizerArguments,
):
    """Flags of step 1."""


@torch.no_grad()
def evaluate(engine, loader) -> dict[str, float]:
    """Mean loss per response token over the held-out rows of all ranks, and its exponential, the perplexity."""
    engine.eval()
    sums = {"loss": 0.0, "tokens": 0}
    for batch in loader:
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
    model_config = check_model(config, "model_name_or_path")
    check_length(model_config, config.max_seq_len, "--max_seq_len")
    check_lora(model_config, config.lora_dim, config.lora_module_name)
    check_data_paths(
        config.data_path, purpose="sft", data_split=config.data_split, sft_only_data_path=config.sft_only_data_path
    )
    tokenizer = load_matching_tokenizer(config, config.model_name_or_path, [model_config])
    start_run(config)

    # 2. Data
    train_rows, eval_rows = build_datasets(
        "sft",
        data_path=config.data_path,
        sft_only_data_path=config.sft_only_data_path,
        data_split=config.data_split,
        tokenizer=tokenizer,
        max_seq_len=config.max_seq_len,
        seed=config.seed,
        cache_dir=config.data_output_path,
        is_writer=distributed.local_rank() == 0,
    )
    eval_rows = eval_rows.head(config.eval_samples)
    distributed.log(train_rows.description)
    if config.packing:
        train_rows = PackedRows(train_rows, train_rows.lengths(), config.max_seq_len)
        distributed.log(f"--packing: {len(train_rows)} rows of {config.max_seq_len} tokens, {train_rows.fill:.0%} full")
    collate = functools.partial(collate_sft, pad_id=tokenizer.pad_token_id)
    ranks = {"rank": distributed.rank(), "world_size": distributed.world_size(), "seed": config.seed}
    train_loader = build_dataloader(train_rows, list, config.per_device_train_batch_size, shuffle=True, **ranks)
    eval_loader = build_dataloader(eval_rows, collate, config.per_device_eval_batch_size, shuffle=False, **ranks)
    steps_per_epoch = math.ceil(len(train_loader) / config.gradient_accumulation_steps)
    total_steps = config.max_steps or steps_per_epoch * config.num_train_epochs

    # 3. Model
    if config.dry_run:
        return dry_run(config, 1, {"model": model_config}, tokenizer, train_rows)
    checkpoints = Checkpoints(config, total_steps=total_steps, data_keys=[eval_rows.key])
    engine = build_engine(
        load_causal_lm,
        tokenizer,
        config,
        micro_batch_size=config.per_device_train_batch_size,
        total_steps=total_steps,
        dropout=config.dropout,
        lora_dropout=config.lora_dropout,
    )

    # 4. Train, from the beginning or from a checkpoint
    guard = DivergenceGuard(config.on_nan, config.output_dir)
    state = checkpoints.resume({"model": engine})
    with open_metrics(config, "step 1: SFT", total_steps, state) as writer, checkpoints:
        shown_rows = [eval_rows[index] for index in range(min(config.num_sample_generations, len(eval_rows)))]
        if state.step == 0:
            state.answers = greedy_answers(engine, tokenizer, shown_rows, config.sample_max_new_tokens)
            state.before = evaluate(engine, eval_loader)
            writer.log(0, state.before)
        step, started = state.step, time.perf_counter() - state.seconds
        groups = accumulation_groups(train_loader, config.gradient_accumulation_steps, step, total_steps)
        for step, epoch, rows in groups:
            step_started = time.perf_counter()
            parts = micro_batches(rows, config.max_tokens_per_batch, sft_tokens)
            batches = [distributed.to_device(collate(part)) for part in parts]
            tokens = distributed.all_reduce_scalar(sum(int(batch["target_mask"].sum()) for batch in batches))

            def loss_function(batch, tokens=tokens):
                logprobs, _ = engine(**batch)
                return -logprobs.sum() / tokens

            learning_rate = engine.get_lr()[0]  # before the step, which moves the schedule on
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
            if config.eval_interval and step % config.eval_interval == 0 and step < total_steps:
                evaluated = evaluate(engine, eval_loader)
                writer.log(step, evaluated)
                save_if_best(config, -evaluated["eval/loss"], engine.module.model, tokenizer)
            checkpoints.step_done(state, writer, step=step, seconds=time.perf_counter() - started)
        after = evaluate(engine, eval_loader)
        writer.log(step, after)
        answers_after = greedy_answers(engine, tokenizer, shown_rows, config.sample_max_new_tokens)
        for (prompt, old), (_, new) in zip(state.answers, answers_after, strict=True):
            writer.print(f"\n{prompt.strip()}\n  before: {old.strip()}\n  after:  {new.strip()}")
        writer.compare("held-out rows", state.before, after)

        # 5. Save, then draw
        if config.output_dir:
            save_model(engine.module.model, tokenizer, config.output_dir, save_adapter=config.save_adapter)
            save_if_best(config, -after["eval/loss"], engine.module.model, tokenizer)
        writer.plot(PANELS)
    return save_summary(config, state.before, after, steps=step, train_seconds=state.seconds)


if __name__ == "__main__":
    run(main, Config)
