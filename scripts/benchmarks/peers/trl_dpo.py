"""TRL's DPOTrainer on pairs that are already tokenised."""

from adapter import setting
from trl import DPOConfig, DPOTrainer
from trl_trainer import train


def counts(inputs):
    """The pairs of a step, and the tokens of their sequences that are not padding."""
    return {"rows": len(inputs["input_ids"]) // 2, "tokens": int(inputs["attention_mask"].sum())}


class TokenisedDPOTrainer(DPOTrainer):
    """Takes rows of token ids as they are."""

    def _prepare_dataset(self, dataset, *args):
        return dataset


def main():
    work = setting()
    rows = [{name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in work["rows"]]
    train(TokenisedDPOTrainer, DPOConfig, work, rows, counts, precompute_ref_log_probs=work["precompute"])


if __name__ == "__main__":
    main()
