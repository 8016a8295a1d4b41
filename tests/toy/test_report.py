"""The report's numbers, and that it calls a failure a failure."""

import json

import pytest

from utils.toy.report import build_report, render_markdown, render_text, win_rate

REWARD_MODEL = {"eval/accuracy": 0.95, "eval/margin": 4.0}


@pytest.fixture
def models(make_examination):
    return (
        make_examination("base", [0.1] * 6, [0.1] * 6),
        make_examination("SFT", [0.5] * 6, [0.5, 0.5, 0.1, 0.1, 1.0, 0.0]),
        make_examination("PPO", [1.0] * 6, [1.0, 1.0, 1.0, 1.0, 1.0, 0.5]),
    )


def complete(report):
    return report | {"seed": 1, "seconds": {"total": 60.0}, "peak_memory_gib": 1.0}


def test_numbers(models):
    report = build_report(*models, REWARD_MODEL)
    assert report["models"]["SFT"]["judge_sampled"] == pytest.approx(2.2 / 6)
    assert report["models"]["PPO"]["judge_greedy"] == 1.0
    assert report["models"]["PPO"]["kl_to_sft"] == 0.5
    assert sum(report["models"]["PPO"]["kinds_sampled"].values()) == pytest.approx(1.0)
    assert report["win_rate_over_sft"] == {"greedy": 1.0, "sampled": pytest.approx((5 + 0.5) / 6)}
    assert report["passed"]


def test_a_tie_is_half_a_win(make_examination):
    one, other = make_examination("a", [1.0], [1.0, 0.5, 0.1]), make_examination("b", [1.0], [0.5, 0.5, 1.0])
    assert win_rate(one.greedy, other.greedy) == 0.5
    assert win_rate(one.sampled, other.sampled) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changed", "failing"),
    [
        ({"accuracy": 0.89}, "reward model"),
        ({"sft_greedy": 0.61}, "SFT"),
        ({"sft_sampled": 0.61}, "SFT"),
        ({"ppo_greedy": 0.84}, "PPO"),
        ({"ppo_sampled": 0.84}, "PPO"),
    ],
)
def test_each_bound_fails_alone(make_examination, changed, failing):
    models = (
        make_examination("base", [0.0] * 3, [0.0] * 3),
        make_examination("SFT", [changed.get("sft_greedy", 0.60)] * 3, [changed.get("sft_sampled", 0.60)] * 3),
        make_examination("PPO", [changed.get("ppo_greedy", 0.85)] * 3, [changed.get("ppo_sampled", 0.85)] * 3),
    )
    report = build_report(*models, REWARD_MODEL | {"eval/accuracy": changed.get("accuracy", 0.90)})
    assert not report["passed"]
    assert [check["name"].startswith(failing) for check in report["checks"] if not check["passed"]] == [True]


def test_rendering(models):
    report = complete(build_report(*models, REWARD_MODEL))
    assert json.loads(json.dumps(report)) == report
    text = render_text(report)
    assert "judge score, sampled" in text and "question 1?" in text and "FAILED" not in text
    page = render_markdown(report, "report.png", [("a stage", "python main.py")])
    assert "Alignment worked." in page and "(report.png)" in page and "```bash\npython main.py\n```" in page


def test_samples_are_the_same_questions_for_all(models):
    samples = build_report(*models, REWARD_MODEL)["samples"]
    assert [sample["question"] for sample in samples] == ["question 1?", "question 3?", "question 5?"]
    assert samples[0]["PPO"] == {"text": "PPO 1", "judge": 1.0, "kind": "correct"}
