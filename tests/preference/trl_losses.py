"""Run by the python of an environment with TRL: losses of its DPOTrainer, step by step, on rows of token ids.

`trl_losses.py SETTING.json LOSSES.json`
"""

import json
import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer


class TokenisedDPOTrainer(DPOTrainer):
    """Takes rows of token ids as they are."""

    def _prepare_dataset(self, dataset, *args):
        return dataset


def main():
    setting, target = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    config = DPOConfig(
        output_dir=setting["scratch"], per_device_train_batch_size=setting["batch"], max_length=None, bf16=False,
        learning_rate=setting["learning_rate"], lr_scheduler_type="constant", adam_beta1=0.9, adam_beta2=0.95,
        weight_decay=0.0, max_grad_norm=1.0, num_train_epochs=1, logging_steps=1, gradient_checkpointing=False,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, beta=setting["beta"],
        train_sampling_strategy="sequential", disable_dropout=True,
    )  # fmt: skip
    trainer = TokenisedDPOTrainer(
        model=setting["model"], args=config, train_dataset=Dataset.from_list(setting["rows"]),
        processing_class=AutoTokenizer.from_pretrained(setting["model"]),
    )  # fmt: skip
    trainer.train()
    target.write_text(json.dumps([row["loss"] for row in trainer.state.log_history if "loss" in row]))


if __name__ == "__main__":
    main()
