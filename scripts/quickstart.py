"""From nothing to an aligned toy model: makes a small world, trains base, SFT, reward model and PPO, and reports.

Every stage is an ordinary command of this project, printed before it runs. At the end a judge that training never saw
compares the three models on held-out questions. The exit code is 0 only if alignment worked. With `--method dpo`, or
another, direct preference optimisation takes the place of reward model and PPO.

    python scripts/quickstart.py --output_dir output/quickstart
"""

import json
import resource
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers.utils import logging as transformers_logging

from utils.arguments import Arguments, flag, run
from utils.errors import InputError
from utils.files import atomic_write_text
from utils.output.metrics import METRICS_FILE, read_metrics
from utils.parallel.launcher import environment_of_its_own
from utils.runs.session import SUMMARY_FILE
from utils.toy.evaluation import Examiner, load_policy
from utils.toy.files import WorldFiles, write_world
from utils.toy.picture import draw_direct_picture, draw_picture
from utils.toy.report import Examination, build_report, render_markdown, render_text
from utils.toy.rollouts import judged_rollouts
from utils.toy.world import make_questions

REPOSITORY = Path(__file__).resolve().parents[1]
STEP1 = "training/step1_supervised_finetuning/main.py"
STEP2 = "training/step2_reward_model_finetuning/main.py"
DPO = "training/step2_dpo_finetuning/main.py"
STEP3 = "training/step3_rlhf_finetuning/main.py"
REPORTS = ("report.json", "report.md", "report.png")

MAX_ANSWER_TOKENS = 32
SAMPLES_PER_QUESTION = 2
SECONDS_TO_STOP = 10


@dataclass(kw_only=True)
class Config(Arguments):
    """Quickstart."""

    method: Literal["ppo", "dpo", "kto", "orpo", "simpo", "ipo"] = flag("ppo", "how the SFT model is aligned")
    output_dir: str | None = flag(
        None,
        "folder for data, models, logs and the report; if omitted, output/quickstart, or output/quickstart-METHOD for "
        "another method than ppo",
    )
    seed: int = flag(1, "seed of the world, of training and of sampling", at_least=0)


@dataclass(frozen=True)
class Stage:
    """One command of the project. Its output goes to `folder`, what it prints to `folder`.log."""

    title: str
    folder: Path
    script: str
    flags: dict[str, object]

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def arguments(self) -> list[str]:
        """The script and its flags; True stands for a switch."""
        words = [self.script]
        for name, value in (self.flags | {"output_dir": self.folder}).items():
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return words

    def command(self) -> str:
        """What to type to run this stage alone, from the root of the repository."""
        lines, words = ["python " + self.script], self.arguments()[1:]
        while words:
            width = 2 if words[1:] and not words[1].startswith("--") else 1
            lines.append("    " + shlex.join(words[:width]))
            words = words[width:]
        return " \\\n".join(lines)


# The flags of direct preference optimisation by each method; the name is that in the report.
DIRECT = {
    "dpo": ("DPO", {"loss": "sigmoid", "beta": 0.5, "rpo_alpha": 1.0, "learning_rate": 3e-4}),
    "kto": ("KTO", {"loss": "kto", "beta": 0.5, "learning_rate": 3e-4}),
    "orpo": ("ORPO", {"loss": "orpo", "beta": 1.0, "learning_rate": 5e-4}),
    "simpo": ("SimPO", {"loss": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "rpo_alpha": 1.0, "learning_rate": 3e-4}),
    "ipo": ("IPO", {"loss": "ipo", "beta": 0.1, "learning_rate": 3e-4, "num_train_epochs": 2}),
}


def make_stages(files: WorldFiles, folder: Path, seed: int, method: str = "ppo") -> list[Stage]:
    """Base, SFT, and either reward model and PPO or the stage of a direct method.

    The rates are high for a tiny model; 7B needs about a hundredth of them.
    """
    shared = {"dtype": "fp32", "seed": seed, "data_output_path": folder / "cache"}
    supervised = shared | {"max_seq_len": 128, "per_device_train_batch_size": 64, "per_device_eval_batch_size": 64}
    base, sft, reward, ppo = (folder / name for name in ("base", "sft", "reward", "ppo"))
    first = [
        Stage(
            "base model: a random LLaMA is pre-trained on the facts of its world",
            base,
            STEP1,
            {"model_name_or_path": files.random_model, "data_path": files.pretraining, "data_split": "1,0,0"}
            | {"learning_rate": 3e-3, "num_train_epochs": 3, "num_warmup_steps": 20}
            | supervised,
        ),
        Stage(
            "step 1, SFT: it learns to answer from answers of mixed quality",
            sft,
            STEP1,
            {"model_name_or_path": base, "data_path": files.sft, "data_split": "1,0,0"}
            | {"learning_rate": 2e-3, "num_train_epochs": 4, "num_warmup_steps": 20}
            | supervised,
        ),
    ]
    if method != "ppo":
        name, own = DIRECT[method]
        data = files.labelled if method == "kto" else files.preference
        direct = Stage(
            f"step 2, {name}: it learns from judged answers, without a reward model",
            folder / method,
            DPO,
            {"model_name_or_path": sft, "data_path": data, "data_split": "0,1,0"}
            | {"num_train_epochs": 1}
            | own
            | {"num_warmup_steps": 20, "eval_interval": 40}
            | supervised,
        )
        return [*first, direct]
    return [
        *first,
        Stage(
            "step 2, reward model: it learns which of two answers is better",
            reward,
            STEP2,
            {"model_name_or_path": sft, "data_path": files.preference, "data_split": "0,1,0"}
            | {"learning_rate": 1e-3, "num_train_epochs": 2, "num_warmup_steps": 20}
            | supervised,
        ),
        Stage(
            "step 3, PPO: it learns to give answers that the reward model scores higher",
            ppo,
            STEP3,
            {"actor_model_name_or_path": sft, "critic_model_name_or_path": reward}
            | {"data_path": files.prompts, "data_split": "0,0,1", "max_steps": 60}
            | {"max_prompt_seq_len": 64, "max_answer_seq_len": MAX_ANSWER_TOKENS}
            | {"per_device_generation_batch_size": 128, "per_device_training_batch_size": 32}
            | {"actor_learning_rate": 5e-4, "critic_learning_rate": 1e-3, "num_warmup_steps": 12, "kl_ctl": 0.1}
            | {"critic_warmup_steps": 4}
            | {"print_answers": True}
            | shared,
        ),
    ]


def run_stage(stage: Stage) -> float:
    """Run a stage to its end and return the seconds it took. Progress and errors appear on stderr.

    The stage runs in its own process group, so that Ctrl-C reaches it only once, as the SIGINT sent from here, and it
    can shut down cleanly.

    Raises:
        SystemExit(1): it failed.
    """
    started = time.perf_counter()
    environment = environment_of_its_own() | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(stage.log, "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, *stage.arguments()], cwd=REPOSITORY, env=environment, stdout=log, process_group=0
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
    if code != 0:
        print(f"error: {stage.script} ended with exit code {code}; see {stage.log}", file=sys.stderr)
        raise SystemExit(1)
    return time.perf_counter() - started


def examine(stages: list[Stage], files: WorldFiles, seed: int, method: str = "ppo") -> list[Examination]:
    """Ask base, SFT and the aligned model the held-out questions."""
    base, sft, *others = (stage.folder for stage in stages)
    if method == "ppo":
        reward, aligned, called = others[0], others[1] / "actor", "PPO"
    else:
        reward, aligned, called = None, others[0], DIRECT[method][0]
    examiner = Examiner(reward, sft, MAX_ANSWER_TOKENS)
    questions = [question.text for question in make_questions(seed)[1]]
    results = []
    for name, folder in (("base", base), ("SFT", sft), (called, aligned)):
        model = load_policy(folder)
        results.append(
            Examination(
                name=name,
                perplexity=examiner.perplexity(model, files.sft / "eval.jsonl"),
                greedy=examiner.ask(model, questions, greedy=True),
                sampled=examiner.ask(model, questions * SAMPLES_PER_QUESTION, greedy=False, seed=seed),
            )
        )
    return results


def main(config: Config) -> None:
    """Make the world, run the stages, examine the models, and write the report."""
    started = time.perf_counter()
    method = config.method
    default = REPOSITORY / "output" / ("quickstart" if method == "ppo" else f"quickstart-{method}")
    folder = Path(config.output_dir or default).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in REPORTS:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {folder}: cannot be written ({error.strerror})") from error

    print(f"a small world with seed {config.seed} in {folder / 'world'}", flush=True)
    files = write_world(folder / "world", config.seed)
    stages = make_stages(files, folder, config.seed, method)
    seconds = {}
    for number, stage in enumerate(stages, start=1):
        print(f"\n[{number}/{len(stages)}] {stage.title}\n{stage.command()}", flush=True)
        seconds[stage.folder.name] = run_stage(stage)
        print(f"done in {seconds[stage.folder.name]:.0f} s; log: {stage.log}", flush=True)

    print("\nasking the three models the held-out questions\n", flush=True)
    models = examine(stages, files, config.seed, method)
    judged, last = stages[2], stages[-1]
    learnt = json.loads((judged.folder / SUMMARY_FILE).read_text())
    report = build_report(*models, learnt, has_reward_model=method == "ppo")
    seconds["total"] = time.perf_counter() - started
    peak_kib = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF))
    report |= {"seed": config.seed, "seconds": seconds, "peak_memory_gib": peak_kib / 2**20}
    metrics = read_metrics(last.folder / METRICS_FILE)
    if method == "ppo":
        rollouts = judged_rollouts(last.log.read_text(encoding="utf-8"), last.flags["max_steps"])
        draw_picture(folder / "report.png", models, metrics, read_metrics(judged.folder / METRICS_FILE), rollouts)
    else:
        draw_direct_picture(folder / "report.png", models, metrics)
    commands = [(stage.title, stage.command()) for stage in stages]
    atomic_write_text(folder / "report.md", render_markdown(report, "report.png", commands))
    atomic_write_text(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")

    print(render_text(report))
    print(
        f"\n{seconds['total']:.0f} s in all, {report['peak_memory_gib']:.1f} GiB of memory in the largest process\n"
        f"report and picture: {folder / 'report.md'}, {folder / 'report.png'}"
    )
    if not report["passed"]:
        failed = "; ".join(check["name"] for check in report["checks"] if not check["passed"])
        print(f"alignment did not work: {failed}", file=sys.stderr)
        raise SystemExit(1)
    print("alignment worked")


if __name__ == "__main__":
    transformers_logging.disable_progress_bar()
    for name in ("SIGTERM", "SIGHUP"):  # end the running stage first, as for Ctrl-C
        signal.signal(getattr(signal, name), signal.default_int_handler)
    run(main, Config)
