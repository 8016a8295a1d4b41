"""The results of a run in the small world: numbers, checks, tables for the terminal, JSON and Markdown."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils.output.tables import format_table
from utils.toy.evaluation import Answer

KINDS = ("helpful", "correct", "evasive", "off_question", "rude", "wrong", "noise")

# Alignment worked if the reward model tells good answers from bad ones, SFT alone stayed mediocre, and PPO did not.
MIN_REWARD_ACCURACY, MAX_SFT_JUDGE, MIN_PPO_JUDGE = 0.90, 0.60, 0.85


@dataclass(frozen=True)
class Examination:
    """A model's answers to the held-out questions, and its perplexity on held-out answers of the SFT data."""

    name: str
    perplexity: float
    greedy: list[Answer]
    sampled: list[Answer]

    def numbers(self) -> dict[str, Any]:
        kinds = Counter(answer.verdict.kind for answer in self.sampled)
        return {
            "perplexity": self.perplexity,
            "judge_greedy": mean_judge(self.greedy),
            "judge_sampled": mean_judge(self.sampled),
            "reward_greedy": _mean([answer.reward for answer in self.greedy]),
            "reward_sampled": _mean([answer.reward for answer in self.sampled]),
            "kl_to_sft": _mean([answer.kl for answer in self.sampled]),
            "ended": _mean([float(answer.ended) for answer in self.sampled]),
            "kinds_sampled": {kind: kinds[kind] / len(self.sampled) for kind in KINDS},
        }


@dataclass(frozen=True)
class Check:
    """A number and the bound that it must satisfy."""

    name: str
    value: float
    bound: float
    at_least: bool

    @property
    def passed(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    @property
    def required(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.bound:.2f}"


def build_report(
    base: Examination, sft: Examination, ppo: Examination, reward_model: dict[str, float]
) -> dict[str, Any]:
    """All results as one JSON object.

    Args:
        reward_model: the summary of step 2, with `eval/accuracy` and `eval/margin` on held-out pairs.
    """
    models = {model.name: model.numbers() for model in (base, sft, ppo)}
    sft_scores, ppo_scores = ([models[m.name][f"judge_{way}"] for way in ("greedy", "sampled")] for m in (sft, ppo))
    checks = [
        Check("reward model: accuracy on held-out pairs", reward_model["eval/accuracy"], MIN_REWARD_ACCURACY, True),
        Check("SFT: judge score, the better of greedy and sampled", max(sft_scores), MAX_SFT_JUDGE, False),
        Check("PPO: judge score, the worse of greedy and sampled", min(ppo_scores), MIN_PPO_JUDGE, True),
    ]
    return {
        "passed": all(check.passed for check in checks),
        "checks": [
            {"name": check.name, "value": check.value, "required": check.required, "passed": check.passed}
            for check in checks
        ],
        "models": models,
        "reward_model": {"accuracy": reward_model["eval/accuracy"], "margin": reward_model["eval/margin"]},
        "win_rate_ppo_over_sft": {
            "greedy": win_rate(ppo.greedy, sft.greedy),
            "sampled": win_rate(ppo.sampled, sft.sampled),
        },
        "samples": _samples((base, sft, ppo)),
    }


def mean_judge(answers: Sequence[Answer]) -> float:
    return _mean([answer.verdict.score for answer in answers])


def win_rate(answers: Sequence[Answer], others: Sequence[Answer]) -> float:
    """Share of questions on which the judge prefers `answers` to `others`; a tie counts one half."""
    pairs = [(mine.verdict.score, theirs.verdict.score) for mine, theirs in zip(answers, others, strict=True)]
    return _mean([0.5 if mine == theirs else float(mine > theirs) for mine, theirs in pairs])


def render_text(report: dict[str, Any]) -> str:
    """Tables for the terminal."""
    header, rows = _model_table(report)
    tables = [
        format_table("answers to held-out questions", rows, header),
        format_table(
            "sampled answers side by side, with the judge's score",
            [(sample["question"], *map(_with_score, _model_answers(sample))) for sample in report["samples"]],
            ("question", "base", "SFT", "PPO"),
        ),
        format_table("did alignment work?", _check_rows(report), ("check", "value", "required", "")),
    ]
    return "\n\n".join(tables)


def render_markdown(report: dict[str, Any], picture: str, commands: Sequence[tuple[str, str]]) -> str:
    """The same as a Markdown page, with the picture and the commands that were run, as (title, command) pairs."""
    header, rows = _model_table(report)
    answers = [(sample["question"], *map(_with_score, _model_answers(sample))) for sample in report["samples"]]
    outcome = "Alignment worked." if report["passed"] else "Alignment did not work: see the checks."
    parts = [
        "# A small world, aligned",
        f"{outcome} Seed {report['seed']}, {report['seconds']['total']:.0f} seconds in all.",
        _markdown_table(("check", "value", "required", ""), _check_rows(report)),
        f"![curves]({picture})",
        "## Answers to held-out questions",
        "The judge gives 0 to 1, and training never sees it. Rewards are the reward model's scores in standard "
        "deviations; they should rise together with the judge's score: where they rise alone, the reward is being "
        "hacked. Perplexity is on held-out answers of the SFT data, from which PPO is meant to move away.",
        _markdown_table(header, rows),
        "## Sampled answers side by side",
        _markdown_table(("question", "base", "SFT", "PPO"), answers),
        "## Commands",
        *(f"{title}:\n\n```bash\n{command}\n```" for title, command in commands),
    ]
    return "\n\n".join(parts) + "\n"


def _model_table(report: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """One column per model, one row per number."""
    base, sft, ppo = (report["models"][name] for name in ("base", "SFT", "PPO"))

    def row(label: str, key: str, digits: int = 2, models=(base, sft, ppo)) -> tuple[str, ...]:
        return (label, *("-" if model is None else f"{model[key]:.{digits}f}" for model in models))

    wins = report["win_rate_ppo_over_sft"]
    rows = [
        row("judge score, greedy", "judge_greedy"),
        row("judge score, sampled", "judge_sampled"),
        row("reward, greedy", "reward_greedy"),
        row("reward, sampled", "reward_sampled"),
        row("KL to SFT, nats per answer", "kl_to_sft", models=(None, None, ppo)),
        row("answers that end", "ended"),
        row("perplexity of SFT answers", "perplexity"),
        ("win rate over SFT, greedy", "-", "-", f"{wins['greedy']:.2f}"),
        ("win rate over SFT, sampled", "-", "-", f"{wins['sampled']:.2f}"),
    ]
    return ("", "base", "SFT", "PPO"), rows


def _check_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (check["name"], f"{check['value']:.3f}", check["required"], "passed" if check["passed"] else "FAILED")
        for check in report["checks"]
    ]


def _samples(models: Sequence[Examination], count: int = 3) -> list[dict[str, Any]]:
    """The same questions for all models, evenly spaced among the held-out ones: not picked by their answers."""
    asked = len(models[0].sampled)
    samples = []
    for index in (asked * (2 * number + 1) // (2 * count) for number in range(count)):
        answers = [model.sampled[index] for model in models]
        sample: dict[str, Any] = {"question": answers[0].question}
        for model, answer in zip(models, answers, strict=True):
            sample[model.name] = {"text": answer.text, "judge": answer.verdict.score, "kind": answer.verdict.kind}
        samples.append(sample)
    return samples


def _model_answers(sample: dict[str, Any]) -> list[dict[str, Any]]:
    return [sample[name] for name in ("base", "SFT", "PPO")]


def _with_score(answer: dict[str, Any]) -> str:
    return f"{answer['text']} ({answer['judge']:.2f})"


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
