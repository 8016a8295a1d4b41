"""The results of a run in the small world: numbers, checks, tables for the terminal, JSON and Markdown."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils.output.tables import format_table
from utils.toy.evaluation import Answer

KINDS = ("helpful", "correct", "evasive", "off_question", "rude", "wrong", "noise")

# Alignment worked if the reward model, where there is one, tells good answers from bad ones, SFT alone stayed mediocre,
# and the aligned model did not.
MIN_REWARD_ACCURACY, MAX_SFT_JUDGE = 0.90, 0.60
MIN_JUDGE = {"PPO": 0.85, "DPO": 0.85, "KTO": 0.80, "ORPO": 0.80, "SimPO": 0.80, "IPO": 0.80}  # by method


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
            "reward_greedy": _mean_reward(self.greedy),
            "reward_sampled": _mean_reward(self.sampled),
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
    base: Examination,
    sft: Examination,
    aligned: Examination,
    judged: dict[str, float],
    *,
    has_reward_model: bool = True,
) -> dict[str, Any]:
    """All results as one JSON object.

    Args:
        aligned: called by the name of its method, a key of `MIN_JUDGE`.
        judged: the summary of the stage that learnt from judged answers, with `eval/accuracy` and `eval/margin` on
            held-out ones: the reward model, or without one the aligned model itself.
    """
    models = {model.name: model.numbers() for model in (base, sft, aligned)}
    sft_scores, scores = ([models[m.name][f"judge_{way}"] for way in ("greedy", "sampled")] for m in (sft, aligned))
    least = MIN_JUDGE[aligned.name]
    checks = [
        Check("SFT: judge score, the better of greedy and sampled", max(sft_scores), MAX_SFT_JUDGE, False),
        Check(f"{aligned.name}: judge score, the worse of greedy and sampled", min(scores), least, True),
    ]
    if has_reward_model:
        accuracy = judged["eval/accuracy"]
        checks.insert(0, Check("reward model: accuracy on held-out pairs", accuracy, MIN_REWARD_ACCURACY, True))
    return {
        "passed": all(check.passed for check in checks),
        "checks": [
            {"name": check.name, "value": check.value, "required": check.required, "passed": check.passed}
            for check in checks
        ],
        "method": aligned.name,
        "models": models,
        "judged_answers": {"accuracy": judged["eval/accuracy"], "margin": judged["eval/margin"]},
        "win_rate_over_sft": {
            "greedy": win_rate(aligned.greedy, sft.greedy),
            "sampled": win_rate(aligned.sampled, sft.sampled),
        },
        "samples": _samples((base, sft, aligned)),
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
            _sample_rows(report),
            ("question", *report["models"]),
        ),
        format_table("did alignment work?", _check_rows(report), ("check", "value", "required", "")),
    ]
    return "\n\n".join(tables)


def render_markdown(report: dict[str, Any], picture: str, commands: Sequence[tuple[str, str]]) -> str:
    """The same as a Markdown page, with the picture and the commands that were run, as (title, command) pairs."""
    header, rows = _model_table(report)
    outcome = "Alignment worked." if report["passed"] else "Alignment did not work: see the checks."
    parts = [
        "# A small world, aligned",
        f"{outcome} Seed {report['seed']}, {report['seconds']['total']:.0f} seconds in all.",
        _markdown_table(("check", "value", "required", ""), _check_rows(report)),
        f"![curves]({picture})",
        "## Answers to held-out questions",
        "The judge gives 0 to 1, and training never sees it. Rewards are a reward model's scores in standard "
        "deviations; they should rise together with the judge's score: where they rise alone, the reward is being "
        f"hacked. Perplexity is on held-out answers of the SFT data, from which {report['method']} is meant to move "
        "away.",
        _markdown_table(header, rows),
        "## Sampled answers side by side",
        _markdown_table(("question", *report["models"]), _sample_rows(report)),
        "## Commands",
        *(f"{title}:\n\n```bash\n{command}\n```" for title, command in commands),
    ]
    return "\n\n".join(parts) + "\n"


def _model_table(report: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """One column per model, one row per number."""
    base, sft, aligned = report["models"].values()

    def row(label: str, key: str, models=(base, sft, aligned)) -> tuple[str, ...]:
        known = [None if model is None else model[key] for model in models]
        return (label, *("-" if value is None else f"{value:.2f}" for value in known))

    wins = report["win_rate_over_sft"]
    rows = [
        row("judge score, greedy", "judge_greedy"),
        row("judge score, sampled", "judge_sampled"),
        row("reward, greedy", "reward_greedy"),
        row("reward, sampled", "reward_sampled"),
        row("KL to SFT, nats per answer", "kl_to_sft", models=(None, None, aligned)),
        row("answers that end", "ended"),
        row("perplexity of SFT answers", "perplexity"),
        ("win rate over SFT, greedy", "-", "-", f"{wins['greedy']:.2f}"),
        ("win rate over SFT, sampled", "-", "-", f"{wins['sampled']:.2f}"),
    ]
    return ("", *report["models"]), [row for row in rows if set(row[1:]) != {"-"}]


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


def _sample_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """A question and each model's answer with its score."""
    names = list(report["models"])
    return [(sample["question"], *(_with_score(sample[name]) for name in names)) for sample in report["samples"]]


def _with_score(answer: dict[str, Any]) -> str:
    return f"{answer['text']} ({answer['judge']:.2f})"


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _mean_reward(answers: Sequence[Answer]) -> float | None:
    """None without a reward model."""
    rewards = [answer.reward for answer in answers if answer.reward is not None]
    return _mean(rewards) if rewards else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
