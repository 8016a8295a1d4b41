"""Step 3: PPO. The SFT model (actor) learns to write responses that the reward model scores higher.

Each iteration samples one response per prompt, rewards it with the reward model's score at its last token minus a price
on its distance (KL) to the SFT model, and improves actor and critic with clipped updates over a few epochs.

    one GPU     python training/step3_rlhf_finetuning/main.py --actor_model_name_or_path output/sft \\
                    --critic_model_name_or_path output/reward --data_path prompts.jsonl --output_dir output/ppo
    eight GPUs  deepspeed --num_gpus 8 training/step3_rlhf_finetuning/main.py --actor_model_name_or_path output/sft \\
                    --critic_model_name_or_path output/reward --data_path prompts.jsonl --output_dir output/ppo \\
                    --actor_zero_stage 3 --critic_zero_stage 3
"""

import functools
import itertools
import math
import time
from dataclasses import dataclass

from utils import distributed
from utils.algorithms.kl import adaptive_kl_ctl
from utils.arguments import (
    CheckpointArguments,
    OutputArguments,
    PpoArguments,
    PpoOptimizationArguments,
    PromptArguments,
    RlhfLoraArguments,
    RlhfModelArguments,
    RlhfSystemArguments,
    RolloutArguments,
    TokenizerArguments,
)
from utils.checkpoints import Checkpoints
from utils.config import run
from utils.data import (
    build_dataloader,
    build_datasets,
    check_data_paths,
    collate_sft,
    endless,
    micro_batches,
    sft_tokens,
)
from utils.models.loading import check_length, check_model, check_scalar_model, load_matching_tokenizer
from utils.models.lora import check_lora
from utils.models.tokenizer import check_same_tokens
from utils.preflight import dry_run
from utils.rlhf.engine import RlhfEngine
from utils.rlhf.evaluation import evaluate_prompts, show_answers
from utils.rlhf.ppo import ExplosionAlarm, explained_variance_over_ranks, mean_metrics, ppo_minibatches, ppo_step
from utils.rlhf.rollout import rollout
from utils.rlhf.tensor_parallel import check_tensor_parallel
from utils.session import check_run, open_metrics, save_summary, start_run

PANELS = {
    "score of the reward model": ["ppo/score_mean", "eval/score_mean"],
    "KL to the SFT model, nats per response": ["ppo/kl_k1", "ppo/kl_k3"],
    "reward per response": ["ppo/reward_mean"],
    "response length, tokens": ["ppo/length_mean"],
    "share of responses that ended": ["ppo/ended_fraction", "eval/ended_fraction"],
    "entropy, nats per token": ["ppo/entropy"],
    "policy loss": ["ppo/policy_loss"],
    "value loss": ["ppo/value_loss"],
    "clipped fraction": ["ppo/clip_fraction", "ppo/value_clip_fraction"],
    "explained variance": ["ppo/explained_variance"],
    "seconds": ["time/generation", "time/scoring", "time/training"],
}


@dataclass(kw_only=True)
class Config(
    PromptArguments,
    RlhfModelArguments,
    RolloutArguments,
    PpoOptimizationArguments,
    PpoArguments,
    RlhfSystemArguments,
    RlhfLoraArguments,
    OutputArguments,
    CheckpointArguments,
    TokenizerArguments,
):
    """Flags of step 3."""


def main(config: Config) -> dict[str, float]:
    """Run step 3 and return its summary."""
    # 1. Refuse what cannot work, then set up
    check_run(config)
    actor_config = check_model(config, "actor_model_name_or_path")
    critic_config = check_scalar_model(config, "critic_model_name_or_path")
    for model_config, role in ((actor_config, "actor"), (critic_config, "critic")):
        check_length(
            model_config,
            config.max_prompt_seq_len + config.max_answer_seq_len,
            "--max_prompt_seq_len + --max_answer_seq_len",
        )
        check_lora(model_config, getattr(config, f"{role}_lora_dim"), getattr(config, f"{role}_lora_module_name"))
    check_tensor_parallel(actor_config, config.inference_tp_size)
    check_data_paths(config.data_path, purpose="prompts", data_split=config.data_split)
    text_source = config.unsupervised_dataset_name
    if text_source:
        check_data_paths([text_source], purpose="pretrain", config_name=config.unsupervised_dataset_config_name)
    tokenizer = load_matching_tokenizer(config, config.actor_model_name_or_path, [actor_config, critic_config])
    critic = config.critic_model_name_or_path
    check_same_tokens(tokenizer, critic, f"--critic_model_name_or_path {critic}")
    start_run(config)

    # 2. Data
    source = {
        "tokenizer": tokenizer,
        "seed": config.seed,
        "cache_dir": config.data_output_path,
        "is_writer": distributed.local_rank() == 0,
    }
    prompt_rows, eval_rows = build_datasets(
        "prompts",
        data_path=config.data_path,
        data_split=config.data_split,
        max_prompt_len=config.max_prompt_seq_len,
        **source,
    )
    eval_rows = eval_rows.head(config.eval_prompts)
    distributed.log(prompt_rows.description)
    ranks = {"rank": distributed.rank(), "world_size": distributed.world_size(), "seed": config.seed}
    rollout_size = config.per_device_generation_batch_size * config.generation_batches
    rollout_flags = "--per_device_generation_batch_size or --generation_batches"
    prompt_loader = build_dataloader(
        prompt_rows, list, rollout_size, shuffle=True, drop_last=True, size_flags=rollout_flags, **ranks
    )
    eval_loader = build_dataloader(eval_rows, list, rollout_size, shuffle=False, **ranks)
    collate_text = functools.partial(collate_sft, pad_id=tokenizer.pad_token_id)
    text_loader, data_keys = None, [prompt_rows.key]
    if text_source:
        text_rows, _ = build_datasets(
            "pretrain",
            data_path=[text_source],
            config_name=config.unsupervised_dataset_config_name,
            max_seq_len=config.max_prompt_seq_len + config.max_answer_seq_len,
            **source,
        )
        text_loader = build_dataloader(
            text_rows,
            list,
            config.per_device_training_batch_size,
            shuffle=True,
            drop_last=True,
            size_flags="--per_device_training_batch_size",
            **ranks,
        )
        data_keys.append(text_rows.key)

    iterations = config.max_steps or len(prompt_loader) * config.num_train_epochs
    if config.enable_test_mode:
        iterations = min(iterations, config.test_stop_step)
    step_size = config.per_device_training_batch_size * config.gradient_accumulation_steps
    steps_per_iteration = config.ppo_epochs * rollout_size // step_size

    # 3. Models
    if config.dry_run:
        return dry_run(config, 3, {"actor": actor_config, "critic": critic_config}, tokenizer, prompt_rows)
    checkpoints = Checkpoints(config, total_steps=iterations, data_keys=data_keys)
    engine = RlhfEngine(
        config,
        tokenizer,
        actor_steps=max(iterations - config.critic_warmup_steps, 0) * steps_per_iteration,
        critic_steps=iterations * steps_per_iteration,
    )

    # 4. Train, from the beginning or from a checkpoint
    engines = {"actor": engine.actor, "critic": engine.critic}
    averages = engine.ema.shadow if engine.ema else ()
    state = checkpoints.resume(engines, frozen=[engine.ref, engine.reward], averages=averages)
    unsupervised_batches = endless(text_loader, state.text_batches) if text_loader else iter(())
    with open_metrics(config, "step 3: PPO", iterations, state) as writer, checkpoints:
        if state.step == 0:
            state.before = evaluate_prompts(engine, eval_loader, config) if config.eval_prompts else {}
            writer.log(0, state.before)
            state.kl_ctl = config.kl_ctl
        iteration, kl_ctl, started = state.step, state.kl_ctl, time.perf_counter() - state.seconds
        alarm = ExplosionAlarm()
        rollouts_per_epoch = len(prompt_loader)
        for epoch in range(iteration // rollouts_per_epoch, math.ceil(iterations / rollouts_per_epoch)):
            prompt_loader.set_epoch(epoch, iteration % rollouts_per_epoch)
            for prompt_batch in itertools.islice(prompt_loader, iterations - iteration):
                iteration += 1
                prompts = [row["prompt_ids"] for row in prompt_batch]
                samples = rollout(engine, prompts, config, kl_ctl=kl_ctl, seed=config.seed + iteration)
                metrics = samples.metrics | {
                    "ppo/kl_ctl": kl_ctl,
                    "ppo/explained_variance": explained_variance_over_ranks(samples.micro_batches),
                }
                training_started, steps = time.perf_counter(), []
                for ppo_epoch in range(config.ppo_epochs):
                    order_seed = config.seed + iteration * config.ppo_epochs + ppo_epoch
                    for minibatch in ppo_minibatches(samples.minibatches, seed=order_seed):
                        texts = list(itertools.islice(unsupervised_batches, config.gradient_accumulation_steps))
                        state.text_batches += len(texts)
                        parts = micro_batches(texts, config.max_tokens_per_batch, sft_tokens)
                        steps.append(
                            ppo_step(
                                engine,
                                minibatch,
                                config,
                                what=f"iteration {iteration}",
                                train_actor=iteration > config.critic_warmup_steps,
                                unsupervised=[distributed.to_device(collate_text(part)) for part in parts],
                            )
                        )
                metrics["ppo/skipped_steps"] = engine.actor.skipped_steps + engine.critic.skipped_steps
                metrics |= mean_metrics(steps) | {"time/training": time.perf_counter() - training_started}
                seconds = sum(metrics[f"time/{phase}"] for phase in ("generation", "scoring", "training"))
                metrics["throughput/samples_per_second"] = samples.num_sequences / seconds
                metrics["throughput/tokens_per_second"] = samples.num_sequences * metrics["ppo/length_mean"] / seconds
                bar = ["ppo/score_mean", "ppo/kl_k1", "ppo/value_loss", "throughput/tokens_per_second"]
                writer.log(iteration, metrics, bar=bar)
                alarm.check(iteration, metrics)
                if config.print_answers and iteration % config.print_answers_interval == 0:
                    writer.print(show_answers(samples.micro_batches[0], tokenizer))
                if config.kl_target is not None and math.isfinite(samples.kl):  # not so with --on_nan skip
                    kl_ctl = adaptive_kl_ctl(
                        kl_ctl, samples.kl, config.kl_target, config.kl_horizon, samples.num_sequences
                    )
                if config.eval_interval and iteration % config.eval_interval == 0 and iteration < iterations:
                    evaluated = evaluate_prompts(engine, eval_loader, config)
                    writer.log(iteration, evaluated)
                    engine.save_if_best(evaluated)
                state.kl_ctl = kl_ctl
                checkpoints.step_done(state, writer, step=iteration, seconds=time.perf_counter() - started)
        after = evaluate_prompts(engine, eval_loader, config) if config.eval_prompts else {}
        writer.log(iteration, after)
        writer.compare("greedy answers to held-out prompts", state.before, after)

        # 5. Save, then draw
        if config.output_dir:
            engine.save(config.output_dir)
            engine.save_if_best(after)
        writer.plot(PANELS, per="rollout")
    return save_summary(config, state.before, after, iterations=iteration, train_seconds=state.seconds)


if __name__ == "__main__":
    run(main, Config)
