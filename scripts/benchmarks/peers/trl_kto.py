"""TRL's KTOTrainer on answers that are already tokenised."""

from adapter import setting
from trl import KTOConfig, KTOTrainer
from trl_trainer import train


def counts(inputs):
    """The answers of a step, and the tokens of their sequences that are not padding."""
    return {"rows": len(inputs["input_ids"]), "tokens": int(inputs["attention_mask"].sum())}


class TokenisedKTOTrainer(KTOTrainer):
    """Takes rows of token ids as they are; each batch's answers, moved on by one, are its mismatched answers."""

    def _prepare_dataset(self, dataset, processing_class, args, name):
        def mismatch(rows):
            rows["KL_completion_ids"] = [rows["completion_ids"][-1], *rows["completion_ids"][:-1]]
            return rows

        return dataset.map(mismatch, batched=True, batch_size=args.per_device_train_batch_size)


def main():
    work = setting()
    rows = [{"prompt_ids": row["prompt_ids"], "completion_ids": row["response_ids"], "label": row["label"]}
            for row in work["rows"]]  # fmt: skip
    train(TokenisedKTOTrainer, KTOConfig, work, rows, counts, precompute_ref_log_probs=work["precompute"])


if __name__ == "__main__":
    main()
