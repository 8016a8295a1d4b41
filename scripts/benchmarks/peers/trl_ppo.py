"""TRL's PPOTrainer (up to 1.12.0) on prompts that are already tokenised: one epoch over each rollout, no checkpointing.

The trainer does not report its phases, so the calls that begin them are wrapped: generation is
`batch_generation`, training runs from the first `accumulate` to the end of the iteration, the rest is scoring.

With bf16 the weights are either fp32 under autocast, as under `accelerate launch --mixed_precision bf16` (the trainer
reads no other setting: its own `bf16` has no effect, and generation, reference and reward model stay in fp32), or bf16
alone, which is faster and smaller but loses small updates.
"""

import os

import torch
from adapter import Steps, clock, load_tokenizer, setting
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
from trl_trainer import PACKAGES, Stopwatch, settings


class PhaseStopwatch(Stopwatch):
    """Ends a step when the trainer ends an iteration, whose training phase began at `training_started`."""

    training_started = None

    def on_step_end(self, *args, **kwargs):
        self.steps.count("training", clock() - self.training_started)
        self.training_started = None
        super().on_step_end(*args, **kwargs)


def watch(steps, stopwatch, trainer, pad_id):
    """Wrap the trainer's calls so that they report to `steps` and `stopwatch`."""
    generation, truncation = ppo_trainer.batch_generation, ppo_trainer.truncate_response
    accumulation = trainer.accelerator.accumulate

    def timed_generation(*args, **kwargs):
        started = clock()
        result = generation(*args, **kwargs)
        steps.count("generation", clock() - started)
        return result

    def counted_truncation(*args, **kwargs):
        responses = truncation(*args, **kwargs)
        steps.count("response tokens", int((responses != pad_id).sum()))
        steps.count("sequences", len(responses))
        return responses

    def noticed_accumulation(*args, **kwargs):
        if stopwatch.training_started is None:
            stopwatch.training_started = clock()
        return accumulation(*args, **kwargs)

    ppo_trainer.batch_generation, ppo_trainer.truncate_response = timed_generation, counted_truncation
    trainer.accelerator.accumulate = noticed_accumulation


def main():
    work, steps = setting(), Steps()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[work["weights"]]
    if work["weights"] != work["dtype"]:
        os.environ["ACCELERATE_MIXED_PRECISION"] = work["dtype"]
    tokenizer = load_tokenizer(work["model"], "left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(work["model"], dtype=dtype) for _ in range(2))
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(work["reward_model"], num_labels=1, dtype=dtype)
        for _ in range(2)
    )
    config = PPOConfig(
        per_device_train_batch_size=work["rollout"],
        num_mini_batches=work["rollout"] // work["batch"],
        local_rollout_forward_batch_size=work["batch"],
        total_episodes=len(work["rows"]),
        num_ppo_epochs=1,
        response_length=work["answer"],
        stop_token="eos",
        temperature=1.0,
        bf16=False,
        num_sample_generations=0,
        **settings(work),
    )
    stopwatch = PhaseStopwatch(steps)
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_list([{"input_ids": row["prompt_ids"]} for row in work["rows"]]),
        callbacks=[stopwatch],
    )
    watch(steps, stopwatch, trainer, tokenizer.pad_token_id)
    trainer.train()
    steps.save(*PACKAGES)


if __name__ == "__main__":
    main()
