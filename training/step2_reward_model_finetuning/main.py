"""Step 2: the reward model. A language model with a scalar head learns which of two responses people prefer.

The loss is -log sigmoid(chosen - rejected) on the scores at the last response tokens (`--reward_loss last_token`), in
fp32, averaged over the pairs of an optimiser step. Mean and deviation of the scores of held-out chosen responses are
stored with the model: step 3 normalises its rewards with them.

    one GPU     python training/step2_reward_model_finetuning/main.py \\
                    --model_name_or_path output/sft --data_path pairs.jsonl --output_dir output/reward
    eight GPUs  deepspeed --num_gpus 8 training/step2_reward_model_finetuning/main.py \\
                    --model_name_or_path output/sft --data_path pairs.jsonl --output_dir output/reward --zero_stage 3
"""

import functools
import itertools
import math
import time
from dataclasses import dataclass

import torch

from utils import distributed
from utils.algorithms.losses import pairwise_loss, token_span_pairwise_loss
from utils.algorithms.masking import last_index
from utils.arguments import (
    CheckpointArguments,
    DataArguments,
    LoraArguments,
    ModelArguments,
    OptimizationArguments,
    OutputArguments,
    RewardArguments,
    SystemArguments,
    TokenizerArguments,
)
from utils.checkpoints import Checkpoints
from utils.config import run
from utils.data import (
    accumulation_groups,
    build_dataloader,
    build_datasets,
    check_data_paths,
    collate_preference,
    micro_batches,
    preference_tokens,
)
from utils.divergence import DivergenceGuard
from utils.models.checkpoint import save_if_best, save_model, store_score_scale
from utils.models.loading import check_length, check_model, load_matching_tokenizer, load_scalar_model
from utils.models.lora import check_lora
from utils.models.pair_scores import PairScores
from utils.models.training_engine import build_engine
from utils.preflight import dry_run
from utils.session import check_run, open_metrics, save_summary, start_run
from utils.zero import optimizer_step

PANELS = {
    "loss per pair": ["train/loss", "eval/loss"],
    "accuracy": ["train/accuracy", "eval/accuracy"],
    "margin: chosen - rejected": ["train/margin", "eval/margin"],
    "scores on held-out rows": ["eval/chosen_mean", "eval/rejected_mean"],
}


@dataclass(kw_only=True)
class Config(
    DataArguments,
    ModelArguments,
    OptimizationArguments,
    SystemArguments,
    LoraArguments,
    RewardArguments,
    OutputArguments,
    CheckpointArguments,
    TokenizerArguments,
):
    """Flags of step 2."""

    learning_rate: float = 5e-5


def score_pairs(
    engine, batch: dict[str, torch.Tensor], reward_loss: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses, chosen and rejected scores of B pairs, each (B,) fp32, from 2B rows with the chosen ones first.

    Pairs that only fill up a batch (`row_mask` false) are left out.
    """
    input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    values = engine(input_ids, attention_mask)
    scores = values.gather(1, last_index(batch["response_mask"])[:, None]).squeeze(1)
    chosen_scores, rejected_scores = scores.chunk(2)
    if reward_loss == "last_token":
        losses = pairwise_loss(chosen_scores, rejected_scores)
    else:
        losses = token_span_pairwise_loss(*values.chunk(2), *input_ids.chunk(2), *attention_mask.chunk(2))
    real = batch["row_mask"]
    return losses[real], chosen_scores[real], rejected_scores[real]


@torch.no_grad()
def evaluate(engine, loader, config: Config, batches: int | None = None) -> dict[str, float]:
    """Loss, accuracy, margin, and mean and deviation of the scores over held-out pairs of all ranks."""
    engine.eval()
    scores = PairScores()
    for batch in itertools.islice(loader, batches):
        scores.add(*score_pairs(engine, distributed.to_device(batch), config.reward_loss))
    engine.train()
    return scores.metrics()


def main(config: Config) -> dict[str, float]:
    """Run step 2 and return its summary."""
    # 1. Refuse what cannot work, then set up
    check_run(config)
    model_config = check_model(config, "model_name_or_path")
    check_length(model_config, config.max_seq_len, "--max_seq_len")
    check_lora(model_config, config.lora_dim, config.lora_module_name)
    check_data_paths(config.data_path, purpose="preference", data_split=config.data_split)
    tokenizer = load_matching_tokenizer(config, config.model_name_or_path, [model_config])
    start_run(config)

    # 2. Data
    train_rows, eval_rows = build_datasets(
        "preference",
        data_path=config.data_path,
        data_split=config.data_split,
        tokenizer=tokenizer,
        max_seq_len=config.max_seq_len,
        seed=config.seed,
        cache_dir=config.data_output_path,
        is_writer=distributed.local_rank() == 0,
    )
    eval_rows = eval_rows.head(config.eval_samples)
    distributed.log(train_rows.description)
    collate = functools.partial(collate_preference, pad_id=tokenizer.pad_token_id)
    ranks = {"rank": distributed.rank(), "world_size": distributed.world_size(), "seed": config.seed}
    train_loader = build_dataloader(train_rows, list, config.per_device_train_batch_size, shuffle=True, **ranks)
    eval_loader = build_dataloader(eval_rows, collate, config.per_device_eval_batch_size, shuffle=False, **ranks)
    steps_per_epoch = math.ceil(len(train_loader) / config.gradient_accumulation_steps)
    total_steps = config.max_steps or steps_per_epoch * config.num_train_epochs

    # 3. Model
    if config.dry_run:
        return dry_run(config, 2, {"model": model_config}, tokenizer, train_rows)
    checkpoints = Checkpoints(config, total_steps=total_steps, data_keys=[eval_rows.key])
    engine = build_engine(
        functools.partial(load_scalar_model, new_head=True),
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
    with open_metrics(config, "step 2: reward model", total_steps, state) as writer, checkpoints:
        if state.step == 0:
            state.before = evaluate(engine, eval_loader, config)
            writer.log(0, state.before)
        step, started = state.step, time.perf_counter() - state.seconds
        groups = accumulation_groups(train_loader, config.gradient_accumulation_steps, step, total_steps)
        for step, epoch, rows in groups:
            step_started = time.perf_counter()
            parts = micro_batches(rows, config.max_tokens_per_batch, preference_tokens)
            batches = [distributed.to_device(collate(part)) for part in parts]
            pairs = distributed.all_reduce_scalar(sum(int(batch["row_mask"].sum()) for batch in batches))
            margins = []

            def loss_function(batch, margins=margins, pairs=pairs):
                losses, chosen, rejected = score_pairs(engine, batch, config.reward_loss)
                margins.append((chosen - rejected).detach())
                return losses.sum() / pairs

            learning_rate = engine.get_lr()[0]  # before the step, which moves the schedule on
            loss, norm = optimizer_step(engine, batches, loss_function, what=f"step {step}", guard=guard)
            margin = torch.cat(margins)
            sums = distributed.all_reduce_dict({"margin": margin.sum(), "correct": (margin > 0).sum()})
            metrics = {
                "train/loss": loss,
                "train/accuracy": sums["correct"] / pairs,
                "train/margin": sums["margin"] / pairs,
                "train/grad_norm": norm,
                "train/learning_rate": learning_rate,
                "train/epoch": epoch + 1,
                "train/skipped_steps": engine.skipped_steps,
                "train/pairs_per_second": pairs / (time.perf_counter() - step_started),
            }
            writer.log(step, metrics, bar=["train/loss", "train/accuracy", "train/pairs_per_second"])
            if config.eval_interval and step % config.eval_interval == 0 and step < total_steps:
                evaluated = evaluate(engine, eval_loader, config, None if config.keep_best else config.eval_iters)
                writer.log(step, evaluated)
                store_score_scale(engine.module.model, evaluated)
                save_if_best(config, evaluated["eval/accuracy"], engine.module.model, tokenizer)
            checkpoints.step_done(state, writer, step=step, seconds=time.perf_counter() - started)
        after = evaluate(engine, eval_loader, config)
        writer.log(step, after)
        writer.compare("held-out pairs", state.before, after)

        # 5. Save, then draw
        if config.output_dir:
            store_score_scale(engine.module.model, after)
            save_model(engine.module.model, tokenizer, config.output_dir, save_adapter=config.save_adapter)
            save_if_best(config, after["eval/accuracy"], engine.module.model, tokenizer)
        writer.plot(PANELS)
    return save_summary(config, state.before, after, steps=step, train_seconds=state.seconds)


if __name__ == "__main__":
    run(main, Config)
