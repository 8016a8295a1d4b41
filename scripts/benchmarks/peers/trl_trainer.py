"""What the adapters of TRL's trainers share: settings, a stopwatch, and a run of a trainer that counts its tokens.

Activation checkpointing, which TRL turns on by default, is off: it costs time, and no other contender uses it.
"""

from adapter import Steps, load_tokenizer
from datasets import Dataset
from torch import cuda
from transformers import TrainerCallback

PACKAGES = ("trl", "transformers", "torch")


def settings(work):
    """Settings that all trainers share."""
    return {
        "output_dir": work["scratch"],
        "learning_rate": work["learning_rate"],
        "use_cpu": not cuda.is_available(),
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


class Stopwatch(TrainerCallback):
    """Ends a step when the trainer does."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_begin(self, *args, **kwargs):
        self.steps.begin()

    def on_step_end(self, *args, **kwargs):
        self.steps.end()


def train(trainer_class, config_class, work, rows, counts, **own_settings):
    """Train on `rows`, which are already tokenised, and write what was measured.

    Everything that `own_settings` does not set has TRL's default, such as fp32 weights under bf16 autocast. `counts`
    takes the inputs of a step and returns what they contain, by name.
    """
    steps = Steps()

    class CountingTrainer(trainer_class):
        """Counts what the inputs of each step contain."""

        def training_step(self, model, inputs, *args, **kwargs):
            for name, amount in counts(inputs).items():
                steps.count(name, amount)
            return super().training_step(model, inputs, *args, **kwargs)

    config = config_class(
        per_device_train_batch_size=work["batch"],
        max_length=work["length"],
        num_train_epochs=work["epochs"],
        bf16=work["dtype"] == "bf16",
        **settings(work),
        **own_settings,
    )
    trainer = CountingTrainer(
        model=work["model"],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(work["model"], "right"),
        callbacks=[Stopwatch(steps)],
    )
    trainer.train()
    steps.save(*PACKAGES)
