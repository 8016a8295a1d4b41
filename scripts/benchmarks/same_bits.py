"""Do two checkouts compute the same bits? Runs the steps with both and compares final weights and metrics.

    python -m scripts.benchmarks.same_bits --before ../before --data ../shared/data
    python -m scripts.benchmarks.same_bits --before ../before --data ../shared/data --cases quickstart zero2

Each case is a chain of step 1, step 2 and step 3 on the same rows, the models of one step going into the next, or the
quickstart with seed 1. A small random LLaMA with LLaMA-2's tokenizer starts the chain. What must agree is every tensor
of every safetensors file that a run leaves in its output folder, and every number of `metrics.jsonl` that both
write and that is not a time. The exit code is 0 if everything agrees, 1 if not.

Results of a checkout whose work tree is clean are cached in --output_dir by its commit, the case and the text of this
script, and not computed again.
"""

import hashlib
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from utils.arguments import Arguments, flag, run
from utils.arguments.steps import STEPS
from utils.errors import InputError
from utils.files import atomic_write_text
from utils.parallel.launcher import environment_of_its_own

REPOSITORY = Path(__file__).resolve().parents[2]
DATA, TOKENIZER = "hh_rlhf_harmless_1800.jsonl", "llama2_tokenizer.model"
TEXT = "alpaca_eval_gpt4_pairs.jsonl"
CLOCKS = ("time", "throughput/")  # prefixes of the keys whose values depend on the clock
RATES = "_per_second"

Flags = dict[str, Any]


@dataclass(kw_only=True)
class Config(Arguments):
    """Same bits."""

    before: str = flag(help="checkout to compare with")
    after: str = flag(str(REPOSITORY), "checkout that is compared, by default the one that this script is in")
    data: str = flag(help=f"folder with {DATA} and {TOKENIZER}")
    cases: list[str] = flag([], "names of the cases to run; default: all")
    output_dir: str = flag(str(REPOSITORY / "output" / "same_bits"), "folder for runs and results")

    def check(self) -> None:
        if unknown := set(self.cases) - set(all_cases()):
            raise InputError(f"--cases {sorted(unknown)[0]!r} is not one of {', '.join(all_cases())}")


@dataclass(frozen=True)
class Case:
    """A chain of the three steps with extra flags for each, or the quickstart."""

    processes: int = 1
    flags: dict[str, Flags] = field(default_factory=dict)
    quickstart: bool = False


def _grid_case(stage: int, lora: bool, processes: int) -> Case:
    supervised: Flags = {"zero_stage": stage}
    rlhf: Flags = {"actor_zero_stage": stage, "critic_zero_stage": stage}
    if lora:
        supervised |= {"lora_dim": 4, "only_optimize_lora": True}
        rlhf |= {"actor_lora_dim": 4, "critic_lora_dim": 4, "only_optimize_lora": True}
    return Case(processes, {"step1": supervised, "step2": supervised, "step3": rlhf})


def all_cases() -> dict[str, Case]:
    """ZeRO stages with and without LoRA on one process and two, and other features of the steps."""
    cases = {
        f"zero{stage}{'_lora' if lora else ''}{'_two' if processes == 2 else ''}": _grid_case(stage, lora, processes)
        for processes, stage, lora in itertools.product((1, 2), (0, 2, 3), (False, True))
    }
    cases["features"] = Case(
        flags={
            "step1": {"packing": True, "max_tokens_per_batch": 512, "gradient_accumulation_steps": 2, "dropout": 0.1},
            "step2": {"reward_loss": "token_span", "max_tokens_per_batch": 512, "gradient_accumulation_steps": 2},
            "step3": {
                **{"generation_batches": 2, "ppo_epochs": 2, "gradient_accumulation_steps": 2, "enable_ema": True},
                **{"kl_target": 1.0, "kl_estimator": "k3", "whiten_rewards": True, "max_tokens_per_batch": 512},
                **{"stop_strings": ["the"], "entropy_coef": 0.01, "critic_warmup_steps": 1, "eval_interval": 1},
                **{"unsupervised_dataset_name": TEXT, "unsup_coef": 0.5},
            },
        }
    )
    cases["sampling"] = Case(
        flags={
            "step1": {"dtype": "fp32"},
            "step2": {"dtype": "fp32", "save_adapter": True, "lora_dim": 4},
            "step3": {
                **{"dtype": "fp32", "top_k": 40, "top_p": 0.9, "min_new_tokens": 3, "temperature": 0.8},
                **{"actor_lora_dim": 4, "lora_generation": "unfused"},
            },
        }
    )
    cases["no_engine"] = Case(flags={"step3": {"no_enable_hybrid_engine": True}})
    cases["streamed_two"] = Case(2, {"step3": {"actor_zero_stage": 3, "stream_generation_weights": "on"}})
    cases["shared_two"] = Case(2, {"step3": {"actor_zero_stage": 3, "inference_tp_size": 2}})
    cases["quickstart"] = Case(quickstart=True)
    return cases


def chain(case: Case, data: Path, model: Path, folder: Path) -> Iterator[tuple[str, Flags]]:
    """The script of each step of a case and all its flags."""
    sft, reward, ppo = folder / "step1", folder / "step2", folder / "step3"
    shared: Flags = {"data_path": data / DATA, "max_steps": 3, "num_warmup_steps": 0, "data_output_path": folder / "c"}
    supervised = shared | {"max_seq_len": 128, "per_device_train_batch_size": 4, "eval_samples": 8}
    rollout = {"max_prompt_seq_len": 96, "max_answer_seq_len": 24, "per_device_generation_batch_size": 4}
    own = {
        "step1": supervised | {"model_name_or_path": model, "learning_rate": 1e-3, "output_dir": sft},
        "step2": supervised | {"model_name_or_path": sft, "learning_rate": 1e-3, "output_dir": reward},
        "step3": shared
        | rollout
        | {"per_device_training_batch_size": 2, "actor_learning_rate": 1e-3, "critic_learning_rate": 1e-3}
        | {"actor_model_name_or_path": sft, "critic_model_name_or_path": reward}
        | {"eval_prompts": 8, "print_answers": True, "output_dir": ppo},
    }
    for step, flags in own.items():
        extra = dict(case.flags.get(step, {}))
        if "unsupervised_dataset_name" in extra:
            extra["unsupervised_dataset_name"] = data / extra["unsupervised_dataset_name"]
        yield f"training/{STEPS[step].folder}/main.py", flags | extra


def words(flags: Flags) -> list[str]:
    """Flags as they are written on a command line."""
    command = []
    for name, value in flags.items():
        command.append(f"--{name}")
        if value is not True:
            command += [str(item) for item in (value if isinstance(value, list) else [value])]
    return command


def run_case(checkout: Path, name: str, case: Case, data: Path, model: Path, folder: Path) -> dict[str, Any]:
    """Run a case with the code in `checkout`; the checksums of all tensors and the metrics that it writes, by path.

    Raises:
        SystemExit: a run failed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if case.quickstart:
        call(checkout, ["scripts/quickstart.py", "--seed", "1", "--output_dir", str(folder)], folder / "log.txt", 1)
    else:
        for script, flags in chain(case, data, model, folder):
            call(checkout, [script, *words(flags)], folder / "log.txt", case.processes)
    return fingerprint(folder)


def call(checkout: Path, command: list[str], log: Path, processes: int) -> None:
    variables = environment_of_its_own() | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    variables |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    python = [sys.executable, *(launcher if processes > 1 else [])]
    with open(log, "a", encoding="utf-8") as output:
        code = subprocess.run([*python, *command], cwd=checkout, env=variables, stdout=output, stderr=output).returncode
    if code:
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise SystemExit(f"error: {command[0]} of {checkout} ended with code {code}:\n{end}")


def fingerprint(folder: Path) -> dict[str, Any]:
    """SHA-256 of each tensor below `folder`, and each row of metrics without what depends on the clock."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in sorted(opened.keys()):
                tensor = opened.get_tensor(name).contiguous()
                digest = hashlib.sha256(str((tensor.dtype, tuple(tensor.shape))).encode())
                digest.update(tensor.view(torch.uint8).numpy().tobytes())
                found[f"{file.relative_to(folder)}: {name}"] = digest.hexdigest()
    for file in sorted(folder.rglob("metrics.jsonl")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            row = {key: value for key, value in json.loads(line).items() if not depends_on_the_clock(key)}
            found[f"{file.relative_to(folder)}: line {number}"] = row
    return found


def depends_on_the_clock(key: str) -> bool:
    return key.startswith(CLOCKS) or key.endswith(RATES)


def write_model(folder: Path, data: Path) -> Path:
    """A random LLaMA of two layers with LLaMA-2's own tokenizer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32_000, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    shutil.copyfile(data / TOKENIZER, folder / "tokenizer.model")
    return folder


def commit(checkout: Path) -> str:
    """The commit of a checkout; empty if it has uncommitted changes or is no git checkout."""
    status = ["git", "-C", str(checkout), "status", "--porcelain", "--untracked-files=no"]
    head = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    if subprocess.run(status, capture_output=True, text=True).stdout.strip():
        return ""
    return subprocess.run(head, capture_output=True, text=True).stdout.strip()


def result(checkout: Path, name: str, case: Case, config: Config, model: Path) -> dict[str, Any]:
    """The result of `run_case`, or the cached one of an earlier run of the same commit."""
    output, known = Path(config.output_dir).resolve(), commit(checkout)
    work = hashlib.sha256(repr(case).encode() + Path(__file__).read_bytes()).hexdigest()[:12]
    kept = output / "results" / (known or "unknown") / f"{name}-{work}.json"
    if known and kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    found = run_case(checkout, name, case, Path(config.data).resolve(), model, output / "runs" / name)
    shutil.rmtree(output / "runs" / name)
    if known:
        atomic_write_text(kept, json.dumps(found, indent=1))
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs, one line each; metrics that only one of them has are ignored."""
    lines = [f"{key} is only {'before' if key in before else 'after'}" for key in sorted(before.keys() ^ after.keys())]
    for key in sorted(before.keys() & after.keys()):
        old, new = before[key], after[key]
        if isinstance(old, dict):
            shared = old.keys() & new.keys()
            lines += [f"{key}: {name} {old[name]} -> {new[name]}" for name in sorted(shared) if old[name] != new[name]]
        elif old != new:
            lines.append(f"{key}: the tensor differs")
    return lines


def main(config: Config) -> None:
    """Run the cases with both checkouts and say what differs."""
    before, after = Path(config.before).resolve(), Path(config.after).resolve()
    for checkout in (before, after):
        if not (checkout / "training").is_dir():
            raise InputError(f"{checkout} is not a checkout of this project")
    for name in (DATA, TOKENIZER):
        if not (Path(config.data) / name).is_file():
            raise InputError(f"--data {config.data}: {name} is not there")
    model = write_model(Path(config.output_dir).resolve() / "model", Path(config.data).resolve())
    failed = []
    for name, case in all_cases().items():
        if config.cases and name not in config.cases:
            continue
        old, new = (result(checkout, name, case, config, model) for checkout in (before, after))
        lines = differences(old, new)
        print(
            f"{name}: {f'{len(lines)} differences' if lines else f'the same, {len(new)} tensors and rows'}", flush=True
        )
        for line in lines[:8]:
            print(f"  {line}", flush=True)
        failed += [name] * bool(lines)
    if failed:
        print(f"not the same bits: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)
    print("the same bits")


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    run(main, Config)
