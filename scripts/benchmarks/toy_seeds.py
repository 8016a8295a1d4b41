"""Does alignment work for every seed? Runs the quickstart once per method and seed and writes one table.

python -m scripts.benchmarks.toy_seeds --seeds 1 2 3 --methods ppo dpo kto --output_dir output/toy_seeds
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.arguments import Arguments, flag, run
from utils.errors import InputError
from utils.files import atomic_write_text
from utils.output.tables import format_table

REPOSITORY = Path(__file__).resolve().parents[2]
HEADER = (
    *("method", "seed", "accuracy", "base judge", "SFT judge", "judge", "win rate", "KL", "seconds", "GiB"),
    "alignment",
)


@dataclass(kw_only=True)
class Config(Arguments):
    """Seeds."""

    seeds: list[int] = flag([1, 2, 3], "seeds to run, one after another")
    methods: list[str] = flag(["ppo"], "methods of the quickstart to run with every seed")
    output_dir: str = flag(str(REPOSITORY / "output" / "toy_seeds"), "folder with one folder per seed and the table")

    def check(self) -> None:
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"--seeds {self.seeds}: give different numbers, none below 0")


def run_seed(method: str, seed: int, folder: Path) -> dict[str, Any]:
    """Run the quickstart by `method` with `seed` and return its report.

    Raises:
        SystemExit: it was interrupted or ended without a report; its exit code is passed on.
    """
    command = [sys.executable, str(REPOSITORY / "scripts" / "quickstart.py"), "--method", method, "--seed", str(seed)]
    code = subprocess.run([*command, "--output_dir", str(folder)]).returncode
    report = folder / "report.json"
    if code not in (0, 1) or not report.is_file():
        raise SystemExit(code or 1)
    return json.loads(report.read_text(encoding="utf-8"))


def table_row(report: dict[str, Any]) -> tuple[str, ...]:
    """Judge scores as greedy / sampled; the win rate and the KL are those of sampled answers.

    The accuracy on held-out pairs (KTO: answers) is the reward model's, or without one the aligned model's.
    """
    judge = [f"{model['judge_greedy']:.2f} / {model['judge_sampled']:.2f}" for model in report["models"].values()]
    return (
        report["method"],
        str(report["seed"]),
        f"{report['judged_answers']['accuracy']:.3f}",
        *judge,
        f"{report['win_rate_over_sft']['sampled']:.2f}",
        f"{report['models'][report['method']]['kl_to_sft']:.2f}",
        f"{report['seconds']['total']:.0f}",
        f"{report['peak_memory_gib']:.1f}",
        "worked" if report["passed"] else "FAILED",
    )


def main(config: Config) -> None:
    """Run all seeds, print the table and write it as toy_seeds.md."""
    folder = Path(config.output_dir).resolve()
    reports = [run_seed(method, seed, folder / f"{method}{seed}") for method in config.methods for seed in config.seeds]
    rows = [table_row(report) for report in reports]
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    atomic_write_text(folder / "toy_seeds.md", "".join("| " + " | ".join(line) + " |\n" for line in lines))
    print(format_table("quickstart with several seeds; judge scores greedy / sampled", rows, HEADER))
    if not all(report["passed"] for report in reports):
        raise SystemExit(1)


if __name__ == "__main__":
    run(main, Config)
