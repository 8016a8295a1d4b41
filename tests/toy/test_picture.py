"""The picture is drawn from whatever a run has left."""

import pytest

from utils.toy.picture import draw_direct_picture, draw_picture

PPO = [
    {"step": step, "ppo/score_normalized": step / 5 - 1, "ppo/kl_k1": 0.1 * step, "ppo/entropy": 0.5}
    for step in range(9)
]
REWARD = [{"step": 0, "eval/accuracy": 0.5}, {"step": 1, "train/accuracy": 0.6}, {"step": 1, "eval/accuracy": 0.7}]


@pytest.mark.parametrize("rollouts", [[], [(1.0, 0.5), (1.0, 0.1), (2.0, 1.0)]], ids=["no answers", "answers"])
def test_draws_a_png(make_examination, tmp_path, rollouts):
    models = [make_examination(name, [0.5] * 4, [0.1, 0.5, 1.0]) for name in ("base", "SFT", "PPO")]
    path = tmp_path / "report.png"
    draw_picture(path, models, PPO, REWARD, rollouts)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000
    assert list(tmp_path.iterdir()) == [path]


def test_draws_a_png_of_a_direct_method(make_examination, tmp_path):
    models = [make_examination(name, [0.5] * 4, [0.1, 0.5, 1.0]) for name in ("base", "SFT", "KTO")]
    rows = [{"step": 0, "eval/accuracy": 0.0, "eval/kl": 0.0}, {"step": 3, "train/accuracy": 0.7, "eval/kl": 2.0}]
    draw_direct_picture(tmp_path / "report.png", models, rows)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
