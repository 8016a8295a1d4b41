"""The scale of scores that step 2 stores: each model that starts from a reward model has its own."""

import dataclasses
import json

import pytest
import torch
import transformers
from step_scripts import load_step
from tiny_models import save_causal_lm, save_reward_model

from utils.arguments import PpoConfig
from utils.generation.micro_batches import plan_batches
from utils.generation.responses import Ends, finish
from utils.models.checks import check_models, load_matching_tokenizer
from utils.models.scalar_head import score_scale, store_score_scale
from utils.parallel import distributed
from utils.rewards.shaping import build_reward
from utils.rlhf.layouts import build_roles

CRITIC, REWARD = (0.25, 0.5), (-2.0, 4.0)
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]


@pytest.fixture(scope="module")
def models(tiny_tokenizer, tmp_path_factory) -> dict[str, str]:
    """An actor, and two reward models with unlike scales."""
    folder = tmp_path_factory.mktemp("models")
    paths = {"actor": save_causal_lm(folder / "actor", tiny_tokenizer)}
    for seed, (name, (mean, std)) in enumerate({"critic": CRITIC, "reward": REWARD}.items()):
        paths[name] = save_reward_model(folder / name, tiny_tokenizer, seed=seed)
        written = json.loads((paths[name] / "config.json").read_text())
        (paths[name] / "config.json").write_text(json.dumps(written | {"score_mean": mean, "score_std": std}))
    return {f"{name}_model_name_or_path": str(path) for name, path in paths.items()}


def build(**changes):
    """Roles and reward of a run, with rows and responses to score."""
    config = PpoConfig(
        **changes, dtype="fp32", max_prompt_seq_len=32, max_answer_seq_len=8, num_warmup_steps=0, max_steps=1,
        missing_eos_penalty=0.0, clip_reward_value=1e6,
    )  # fmt: skip
    distributed.init_distributed()
    configs = check_models(config)
    tokenizer = load_matching_tokenizer(config, configs)
    plan = load_step(3).plan_of(config, configs, 16, 1)
    ends = Ends.of(tokenizer)
    responses = finish(torch.arange(20, 35).view(3, 5), torch.tensor([5, 2, 3]), torch.zeros(3, dtype=torch.bool), ends)
    rows = [{"prompt_ids": ids, "prompt": "", "reference": None, "columns": "{}"} for ids in PROMPTS]
    [[batch]] = plan_batches(PROMPTS, responses, config, pad_id=ends.pad_id)
    return build_roles(plan, tokenizer), build_reward(config, tokenizer), rows, responses, batch


def check_scales(built, critic: tuple[float, float], reward: tuple[float, float]) -> None:
    """Values and scores are what the models give, less the mean, by the deviation."""
    roles, shaped, rows, responses, batch = built
    assert (roles.critic.mean, roles.critic.std) == critic
    assert (shaped.mean, shaped.std) == reward
    scores = shaped(rows, responses)
    torch.testing.assert_close(scores.shaped, (scores.raw - reward[0]) / reward[1])
    assert shaped.normalized(reward[0] + 3 * reward[1]) == pytest.approx(3)
    with torch.no_grad():
        values, raw = (
            each.values(batch) for each in (roles.critic, dataclasses.replace(roles.critic, mean=0.0, std=1.0))
        )
    mask = batch.response_mask
    assert raw[mask].std() > 0 and not values[~mask].any()
    torch.testing.assert_close(values[mask], (raw[mask] - critic[0]) / critic[1])


def test_critic_and_reward_model_given_apart_have_scales_of_their_own(models):
    built = build(**models)
    check_scales(built, CRITIC, REWARD)
    roles, shaped, rows, responses, batch = built
    last = (
        dataclasses.replace(roles.critic, mean=0.0, std=1.0)
        .values(batch)
        .gather(1, batch.response_mask.sum(1)[:, None] - 1)
    )
    assert not torch.allclose(last.squeeze(1), shaped(rows, responses).raw)  # other weights as well


def test_without_a_reward_model_of_its_own_the_critics_scale_is_that_of_the_scores(models):
    given = {name: path for name, path in models.items() if not name.startswith("reward")}
    check_scales(build(**given), CRITIC, CRITIC)


def test_without_normalisation_both_are_as_the_models_give_them(models):
    check_scales(build(**models, normalize_scores=False), (0.0, 1.0), (0.0, 1.0))


def test_what_is_stored_is_read_back_unless_it_cannot_divide():
    config = transformers.LlamaConfig()
    assert score_scale(config) is None
    store_score_scale(config, 1.5, 0.25)
    assert score_scale(config) == (1.5, 0.25)
    assert score_scale(transformers.LlamaConfig.from_dict(config.to_dict())) == (1.5, 0.25)
    store_score_scale(config, 1.5, 0.0)
    assert score_scale(config) is None
