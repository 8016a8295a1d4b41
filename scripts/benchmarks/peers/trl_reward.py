"""TRL's RewardTrainer on pairs that are tokenised already, as TRL sets it but for activation checkpointing: off."""

from adapter import Steps, load_tokenizer, setting
from datasets import Dataset
from torch import cuda
from trl import RewardConfig, RewardTrainer
from trl_sft import Stopwatch


class CountingTrainer(RewardTrainer):
    """Counts the pairs of each step, and their tokens that are not padding."""

    steps: Steps

    def training_step(self, model, inputs, *args, **kwargs):
        self.steps.count("pairs", len(inputs["input_ids"]) // 2)
        self.steps.count("tokens", int(inputs["attention_mask"].sum()))
        return super().training_step(model, inputs, *args, **kwargs)


def main():
    work, steps = setting(), Steps()
    rows = [{f"{side}_ids": row["prompt_ids"] + row[f"{side}_ids"] for side in ("chosen", "rejected")}
            for row in work["rows"]]  # fmt: skip
    config = RewardConfig(
        output_dir=work["scratch"],
        per_device_train_batch_size=work["batch"],
        max_length=work["length"],
        num_train_epochs=work["epochs"],
        learning_rate=work["learning_rate"],
        bf16=work["dtype"] == "bf16",
        use_cpu=not cuda.is_available(),
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    CountingTrainer.steps = steps
    trainer = CountingTrainer(
        model=work["model"],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(work["model"], "right"),
        callbacks=[Stopwatch(steps)],
    )
    trainer.train()
    steps.save("trl", "transformers", "torch")


if __name__ == "__main__":
    main()
