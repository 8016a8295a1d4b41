"""TRL's SFTTrainer on rows that are already tokenised, with loss on the responses alone."""

from adapter import setting
from trl import SFTConfig, SFTTrainer
from trl_trainer import train


def counts(inputs):
    """The tokens of a step that are not padding, and those that count in the loss."""
    mask = inputs.get("attention_mask")
    return {
        "tokens": int(inputs["input_ids"].numel() if mask is None else mask.sum()),
        "response tokens": int((inputs["labels"] != -100).sum()),
    }


def main():
    work = setting()
    rows = [
        {
            "input_ids": row["input_ids"],
            "completion_mask": [0] * row["response_start"] + [1] * (len(row["input_ids"]) - row["response_start"]),
        }
        for row in work["rows"]
    ]
    train(SFTTrainer, SFTConfig, work, rows, counts, packing=work["packing"], completion_only_loss=True)


if __name__ == "__main__":
    main()
