"""TRL's SFTTrainer on rows that are tokenised already, with loss on the responses alone.

Everything is as TRL sets it (fp32 weights under bf16 autocast), but for activation checkpointing: off, because it costs
time and nothing else here has it.
"""

from adapter import Steps, load_tokenizer, setting
from datasets import Dataset
from torch import cuda
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


class CountingTrainer(SFTTrainer):
    """Counts the tokens of each step that are not padding, and those that have a loss."""

    steps: Steps

    def training_step(self, model, inputs, *args, **kwargs):
        mask = inputs.get("attention_mask")
        self.steps.count("tokens", int(inputs["input_ids"].numel() if mask is None else mask.sum()))
        self.steps.count("responses", int((inputs["labels"] != -100).sum()))
        return super().training_step(model, inputs, *args, **kwargs)


class Stopwatch(TrainerCallback):
    """Ends a step when the trainer does."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_begin(self, *args, **kwargs):
        self.steps.begin()

    def on_step_end(self, *args, **kwargs):
        self.steps.end()


def main():
    work, steps = setting(), Steps()
    rows = [
        {
            "input_ids": row["input_ids"],
            "completion_mask": [0] * row["response_start"] + [1] * (len(row["input_ids"]) - row["response_start"]),
        }
        for row in work["rows"]
    ]
    config = SFTConfig(
        output_dir=work["scratch"],
        per_device_train_batch_size=work["batch"],
        max_length=work["length"],
        packing=work["packing"],
        completion_only_loss=True,
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
