"""DeepSpeed-Chat's steps 1 and 3: its own main.py from a checkout, with its own loop, models and optimiser.

Only two things are replaced: its loading of data and tokenizer, which needs the hub, by rows that are already
tokenised, in its own `PromptDataset` and with its own padding; and its printing of throughput, which is called once per
step and ends the time of that step. Step 3 reads a `pytorch_model.bin` with its own parameter names, which is written
here. For LLaMA it generates greedily, whatever the settings say; `sampling` makes its `generate` sample. On a CPU,
DeepSpeed's shared-memory collectives are not compiled, because a single process does not need them.
"""

import importlib.util
import os
import shutil
import socket
import sys
from pathlib import Path

import torch
from adapter import Steps, clock, load_tokenizer, setting
from safetensors.torch import load_file


def load_main(checkout, step):
    """Import the main.py of the step in the folder `step` as a module."""
    root = Path(checkout)
    if (root / "applications" / "DeepSpeed-Chat").is_dir():
        root = root / "applications" / "DeepSpeed-Chat"
    sys.path.insert(0, str(root))
    spec = importlib.util.spec_from_file_location("main", root / "training" / step / "main.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not torch.cuda.is_available():
        module.deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return module


def join_alone():
    """A process group of one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def tokens(ids, width, pad_id):
    """Ids and attention mask padded on the right to `width`."""
    padding = width - len(ids)
    return {
        "input_ids": torch.tensor(ids + [pad_id] * padding),
        "attention_mask": torch.tensor([1] * len(ids) + [0] * padding),
    }


def run_step1(work, steps, main, tokenizer):
    """Run step 1; count tokens and response tokens (its loss is over all tokens)."""
    from dschat.utils.data.data_utils import PromptDataset

    pad_id, to_device, reduce = tokenizer.pad_token_id, main.to_device, main.get_all_reduce_mean
    responses = {tuple(row["input_ids"]): len(row["input_ids"]) - row["response_start"] for row in work["rows"]}

    def datasets(*args, **kwargs):
        rows = [tokens(row["input_ids"], work["length"], pad_id) for row in work["rows"]]
        return tuple(PromptDataset([], part, [], pad_id, 1) for part in (rows, rows[:1]))

    def counted_to_device(batch, device):
        masks = batch["attention_mask"].bool()
        steps.count("tokens", int(masks.sum()))
        for ids, mask in zip(batch["input_ids"], masks):
            steps.count("response tokens", responses[tuple(ids[mask].tolist())])
        return to_device(batch, device)

    def evaluated(losses):
        """Reduce the losses of an evaluation, the last work between epochs, and restart the current step."""
        mean = reduce(losses)
        steps.skip()
        return mean

    main.create_prompt_dataset = datasets
    main.get_all_reduce_mean = evaluated
    main.to_device = counted_to_device
    main.print_throughput = lambda *args, **kwargs: steps.end()
    sys.argv = ["main.py", "--local_rank", "0", "--model_name_or_path", work["model"], "--dtype", work["dtype"]]
    sys.argv += ["--per_device_train_batch_size", str(work["batch"]), "--max_seq_len", str(work["length"])]
    sys.argv += ["--num_train_epochs", str(work["epochs"]), "--learning_rate", str(work["learning_rate"])]
    main.main()


def write_reward_model(source, target):
    """Write the reward model in `source` as DeepSpeed-Chat's step 2 would have saved it."""
    target.mkdir(parents=True, exist_ok=True)
    weights = load_file(Path(source) / "model.safetensors")
    renamed = {"v_head.weight": weights.pop("score.weight")}
    renamed |= {name.replace("model.", "rwtransformer.", 1): weight for name, weight in weights.items()}
    torch.save(renamed, target / "pytorch_model.bin")
    shutil.copy(Path(source) / "config.json", target / "config.json")
    return str(target)


def run_step3(work, steps, main, tokenizer):
    """Run step 3; time generation and training, count sequences and response tokens."""
    from dschat.utils.data.data_utils import PromptDataset

    class TimedTrainer(main.DeepSpeedPPOTrainer):
        """The trainer with a stopwatch at its phases."""

        def _generate_sequence(self, prompts, mask, step):
            started = clock()
            sequences = super()._generate_sequence(prompts, mask, step)
            steps.count("generation", clock() - started)
            steps.count("sequences", len(sequences))
            steps.count("response tokens", int((sequences[:, prompts.shape[1] :] != self.tokenizer.pad_token_id).sum()))
            return sequences

        def train_rlhf(self, inputs):
            started = clock()
            losses = super().train_rlhf(inputs)
            steps.count("training", clock() - started)
            return losses

    def trainer(engine, args):
        if work["sampling"]:
            generate = engine.actor.module.generate
            engine.actor.module.generate = lambda *positional, **named: generate(
                *positional, **(named | {"do_sample": True, "top_k": 0})
            )
        steps.begin()
        return TimedTrainer(engine, args)

    def datasets(*args, **kwargs):
        rows = [tokens(row["prompt_ids"][::-1], len(row["prompt_ids"]), tokenizer.pad_token_id)
                for row in work["rows"]]  # fmt: skip
        return PromptDataset(rows, [], [], tokenizer.pad_token_id, 3), None

    main.create_prompt_dataset = datasets
    main.DeepSpeedPPOTrainer = trainer
    main.print_throughput_step3 = lambda *args, **kwargs: steps.end()
    reward_model = write_reward_model(work["reward_model"], Path(work["scratch"]) / "reward")
    sys.argv = ["main.py", "--local_rank", "0", "--actor_model_name_or_path", work["model"], "--dtype", work["dtype"]]
    sys.argv += ["--critic_model_name_or_path", reward_model, "--num_padding_at_beginning", "0"]
    sys.argv += ["--per_device_generation_batch_size", str(work["batch"])]
    sys.argv += ["--per_device_training_batch_size", str(work["batch"])]
    sys.argv += ["--generation_batches", str(work["rollout"] // work["batch"])]
    sys.argv += ["--max_prompt_seq_len", str(work["prompt"]), "--max_answer_seq_len", str(work["answer"])]
    sys.argv += ["--actor_learning_rate", str(work["learning_rate"])]
    sys.argv += ["--critic_learning_rate", str(work["learning_rate"])]
    main.main()


RUNNERS = {"step1_supervised_finetuning": run_step1, "step3_rlhf_finetuning": run_step3}


def main():
    work, steps = setting(), Steps()
    join_alone()
    module = load_main(work["checkout"], work["step"])
    tokenizer = load_tokenizer(work["model"], "right")
    module.load_hf_tokenizer = lambda *args, **kwargs: tokenizer
    RUNNERS[work["step"]](work, steps, module, tokenizer)
    steps.save("deepspeed", "transformers", "torch")


if __name__ == "__main__":
    main()
