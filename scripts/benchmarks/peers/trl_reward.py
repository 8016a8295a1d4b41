"""TRL's RewardTrainer on pairs that are already tokenised."""

from adapter import setting
from trl import RewardConfig, RewardTrainer
from trl_trainer import train


def counts(inputs):
    """The pairs of a step, and their tokens that are not padding."""
    return {"pairs": len(inputs["input_ids"]) // 2, "tokens": int(inputs["attention_mask"].sum())}


def main():
    work = setting()
    rows = [{f"{side}_ids": row["prompt_ids"] + row[f"{side}_ids"] for side in ("chosen", "rejected")}
            for row in work["rows"]]  # fmt: skip
    train(RewardTrainer, RewardConfig, work, rows, counts)


if __name__ == "__main__":
    main()
