"""A rollout against straightforward recomputation, one sequence at a time and without padding."""

import json

import pytest
import torch
import transformers
from processes import run_ranks
from rlhf_setup import make_config, make_prompts, make_setup, rollout, save_models
from tiny_models import save_reward_model

import utils.rlhf.metrics as metrics_module
from utils.generation.micro_batches import assemble
from utils.generation.responses import Responses
from utils.models.scalar_head import ScalarHeadModel
from utils.rlhf.metrics import PhaseClock, speed_metrics


@pytest.fixture(scope="module")
def paths(tiny_tokenizer, tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"), tiny_tokenizer)


@pytest.fixture(scope="module")
def sampled(paths, tiny_tokenizer):
    config = make_config(paths, whiten_advantages=False, temperature=0.8, missing_eos_penalty=0.75, gamma=0.9)
    setup = make_setup(config, tiny_tokenizer)
    with torch.no_grad():  # the actor must differ from its reference for a KL to show
        for parameter in setup.actor.module.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    prompts = make_prompts(config, len(tiny_tokenizer))
    return setup, prompts, rollout(setup, prompts, seed=7)


def sequence_of(experience, row):
    """Real ids of one row, and how many of them are the prompt."""
    real = experience.attention_mask[row]
    length = int(experience.response_mask[row].sum())
    ids = experience.sequences[row][real]
    return ids, len(ids) - length


def test_every_field_equals_a_recomputation_without_padding(sampled, paths):
    setup, _, samples = sampled
    config = setup.config
    reference = transformers.AutoModelForCausalLM.from_pretrained(paths["actor_model_name_or_path"]).eval()
    reward = ScalarHeadModel(
        transformers.AutoModelForSequenceClassification.from_pretrained(paths["critic_model_name_or_path"]).eval()
    )
    actor = setup.actor.module.model.eval()
    checked = 0
    for experience in samples.micro_batches:
        for row in range(len(experience.scores)):
            ids, start = sequence_of(experience, row)
            count = len(ids) - start
            mask = experience.response_mask[row]
            with torch.no_grad():

                def logprobs(model, ids=ids, start=start):
                    distribution = torch.log_softmax(model(ids[None]).logits[0] / config.temperature, -1)
                    return distribution[start - 1 : -1].gather(1, ids[start:, None])[:, 0]

                mine, theirs = logprobs(actor), logprobs(reference)
                token_scores = reward(ids[None], torch.ones(1, len(ids), dtype=torch.bool))[0]
            torch.testing.assert_close(experience.logprobs[row][mask], mine, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(experience.ref_logprobs[row][mask], theirs, atol=1e-4, rtol=1e-4)
            values = (token_scores[start - 1 : -1] - 0.25) / 0.5  # on the scale of normalised scores
            torch.testing.assert_close(experience.values[row][mask], values, atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(experience.scores[row], token_scores[-1], atol=1e-4, rtol=1e-4)
            ended = ids[-1].item() == 2
            score = max(-5.0, min(5.0, (token_scores[-1].item() - 0.25) / 0.5)) - (0.0 if ended else 0.75)
            rewards = [-0.1 * (mine[t] - theirs[t]).item() for t in range(count)]
            rewards[-1] += score
            values = values.tolist() + [0.0]
            deltas = [rewards[t] + 0.9 * values[t + 1] - values[t] for t in range(count)]
            advantages = [sum((0.9 * 0.95) ** (k - t) * deltas[k] for k in range(t, count)) for t in range(count)]
            torch.testing.assert_close(experience.rewards[row][mask], torch.tensor(rewards), atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(experience.advantages[row][mask], torch.tensor(advantages), atol=1e-3, rtol=1e-3)
            for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
                assert not getattr(experience, name)[row][~mask].any(), name
            checked += 1
    assert checked == 8
    assert samples.metrics["ppo/kl_k1"] > 0.01


def test_metrics_are_those_of_the_rows(sampled):
    samples = sampled[-1]
    scores = torch.cat([e.scores for e in samples.micro_batches])
    kl = torch.cat([(e.logprobs - e.ref_logprobs).sum(1) for e in samples.micro_batches])
    lengths = torch.cat([e.response_mask.sum(1) for e in samples.micro_batches]).float()
    metrics = samples.metrics
    assert metrics["ppo/score_mean"] == pytest.approx(scores.mean().item(), rel=1e-5)
    assert metrics["ppo/score_std"] == pytest.approx(scores.std(unbiased=False).item(), rel=1e-5)
    assert metrics["ppo/score_normalized"] == pytest.approx((scores.mean().item() - 0.25) / 0.5, rel=1e-5)
    assert metrics["ppo/kl_k1"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert metrics["ppo/length_mean"] == pytest.approx(lengths.mean().item())
    assert metrics["ppo/sequences"] == 8


def test_times_are_read_when_the_device_has_finished(sampled, monkeypatch):
    _, prompts, samples = sampled
    waits = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        patch.setattr(torch.accelerator, "synchronize", lambda: waits.append(1))
        first = metrics_module._now()
        assert waits == [1] and metrics_module._now() >= first
    readings = iter([10.0, 12.0, 17.0, 20.0])
    monkeypatch.setattr(metrics_module, "_now", lambda: next(readings))
    clock = PhaseClock()
    for phase in ("generation", "scoring", "training"):
        clock.end_of(phase)
    metrics = speed_metrics(clock, samples.metrics)
    assert [metrics[f"time/{phase}"] for phase in ("generation", "scoring", "training")] == [2.0, 5.0, 3.0]
    tokens = samples.metrics["ppo/length_mean"] * len(prompts)
    assert metrics["throughput/generation_tokens_per_second"] == tokens / 2
    assert metrics["throughput/samples_per_second"] == len(prompts) / 10
    assert metrics["throughput/tokens_per_second"] == tokens / 10


def test_the_same_seed_gives_the_same_rollout_and_another_seed_another(sampled):
    setup, prompts, samples = sampled
    again, other = (rollout(setup, prompts, seed=seed) for seed in (7, 8))
    assert all(
        torch.equal(a.sequences, b.sequences) for a, b in zip(samples.micro_batches, again.micro_batches, strict=True)
    )
    assert any(
        a.sequences.shape != b.sequences.shape or not torch.equal(a.sequences, b.sequences)
        for a, b in zip(samples.micro_batches, other.micro_batches, strict=True)
    )


def test_sampling_leaves_the_global_generator_alone(sampled):
    setup, prompts, _ = sampled
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    rollout(setup, prompts, seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_whitened_advantages_have_mean_zero_and_variance_one_over_the_rollout(paths, tiny_tokenizer):
    config = make_config(paths)
    setup = make_setup(config, tiny_tokenizer)
    samples = rollout(setup, make_prompts(config, len(tiny_tokenizer)), seed=7)
    values = torch.cat([e.advantages[e.response_mask] for e in samples.micro_batches])
    assert values.mean().abs() < 1e-5 and abs(values.var(unbiased=False).item() - 1) < 1e-4
    per_row = [e.advantages[0][e.response_mask[0]].mean().abs().item() for e in samples.micro_batches]
    assert max(per_row) > 0.05  # good and bad answers still differ


def test_assembled_rows_are_trimmed_to_the_longest_of_them():
    prompts = [[5], [6, 7, 8]]
    responses = Responses(
        tokens=torch.tensor([[9, 2], [2, 0]]),
        mask=torch.tensor([[True, True], [True, False]]),
        stopped=torch.tensor([0, 0]),
    )
    both = assemble(prompts, responses, [0, 1], pad_id=0)
    assert both.sequences.tolist() == [[0, 0, 5, 9, 2], [6, 7, 8, 2, 0]]
    assert both.attention_mask.tolist() == [[False, False, True, True, True], [True, True, True, True, False]]
    assert both.response_mask.tolist() == [[True, True], [True, False]]
    assert both.target_mask.tolist() == [[False, False, False, True, True], [False, False, False, True, False]]
    assert both.rows == (0, 1) and both.last_columns.tolist() == [4, 3]
    one = assemble(prompts, responses, [1], pad_id=0)
    assert one.sequences.tolist() == [[6, 7, 8, 2]] and one.response_mask.tolist() == [[True]]
    assert one.attention_mask.all() and one.rows == (1,)


def test_the_engine_and_transformers_generate_give_the_same_experience_when_greedy(paths, tiny_tokenizer):
    """top_k 1 leaves one token to sample, on both sides."""
    outcomes = []
    for enable in (True, False):
        config = make_config(paths, enable_hybrid_engine=enable, top_k=1)
        setup = make_setup(config, tiny_tokenizer)
        assert (setup.decoder is not None) == enable
        prompts = make_prompts(config, len(tiny_tokenizer))
        outcomes.append(rollout(setup, prompts, seed=3))
    for mine, theirs in zip(*(outcome.micro_batches for outcome in outcomes), strict=True):
        for name in ("sequences", "attention_mask", "response_mask", "logprobs", "values", "rewards", "advantages"):
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name))
    assert outcomes[0].metrics["ppo/sampling_logprob_difference_max"] < 1e-4
    assert "ppo/sampling_logprob_difference_max" not in outcomes[1].metrics


def test_missing_score_scale_means_raw_scores(paths, tiny_tokenizer, tmp_path, capsys):
    def scales(**changes) -> list[tuple[float, float]]:
        setup = make_setup(make_config(paths | changes.pop("paths", {}), **changes), tiny_tokenizer)
        reward, critic = setup.reward, setup.roles.critic
        return [(reward.mean, reward.std), (critic.mean, critic.std)]

    assert scales(normalize_scores=False) == [(0.0, 1.0)] * 2
    assert scales() == [(0.25, 0.5)] * 2 and "not normalised" not in capsys.readouterr().out
    for missing in (None, 0.0):  # a foreign reward model; one that saw a single held-out pair
        foreign = save_reward_model(tmp_path / str(missing), tiny_tokenizer)
        stored = json.loads((foreign / "config.json").read_text())
        (foreign / "config.json").write_text(json.dumps(stored | {"score_std": missing}))
        assert scales(paths={"critic_model_name_or_path": str(foreign)}) == [(0.0, 1.0)] * 2
        assert capsys.readouterr().out.count("scores are not normalised") == 1


def test_a_reward_model_of_its_own_has_its_own_scale(paths, tiny_tokenizer, tmp_path):
    own = save_reward_model(tmp_path / "own", tiny_tokenizer, seed=5)
    stored = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(stored | {"score_mean": -1.0, "score_std": 2.0}))
    config = make_config(paths, reward_model_name_or_path=str(own))
    setup = make_setup(config, tiny_tokenizer)
    assert (setup.reward.source.score_mean, setup.reward.source.score_std) == (-1.0, 2.0)
    assert (setup.roles.critic.mean, setup.roles.critic.std) == (0.25, 0.5)
    weights = {role: module.state_dict()["model.score.weight"] for role, module in setup.modules().items()
               if role in ("critic", "reward")}  # fmt: skip
    assert not torch.equal(weights["critic"], weights["reward"])
    samples = rollout(setup, make_prompts(config, len(tiny_tokenizer)), seed=7)
    for batch in samples.micro_batches:
        with torch.no_grad():
            expected = setup.reward.source.score(batch)
        torch.testing.assert_close(batch.scores, expected)
    assert samples.metrics["ppo/score_normalized"] == pytest.approx((samples.metrics["ppo/score_mean"] + 1) / 2)


@pytest.mark.parametrize("release", [False, True])
def test_release_inference_cache_gives_the_memory_back_between_rollouts(paths, tiny_tokenizer, release):
    config = make_config(paths, release_inference_cache=release)
    setup = make_setup(config, tiny_tokenizer)
    rollout(setup, make_prompts(config, len(tiny_tokenizer)), seed=7)
    assert (setup.decoder.cache is None) == release


def test_an_offloaded_reference_stays_whole_without_a_gpu(paths, tiny_tokenizer):
    """Offloading runs at ZeRO-3, which would only slow a CPU down."""
    setup = make_setup(make_config(paths, offload_reference_model=True), tiny_tokenizer)
    assert setup.roles.reference.engine.zero_optimization_stage() == (3 if torch.accelerator.is_available() else 0)


def samples_of_a_rank(paths, tokenizer_path) -> dict[int, list[int]]:
    """This rank's answers to eight prompts, four of them equal, by their numbers in the whole rollout."""
    from utils.data.batches.dataloader import row_numbers
    from utils.models.tokenizer import load_tokenizer
    from utils.parallel import distributed
    from utils.rlhf.evaluation import sampling_params

    tokenizer, world_size = load_tokenizer(tokenizer_path), distributed.world_size()
    config = make_config(paths, per_device_generation_batch_size=8 // world_size, generation_batches=1)
    setup = make_setup(config, tokenizer)
    prompts = [[5, 6, 7]] * 4 + [[8, 9], [10], [11, 12], [13]]
    rows = row_numbers(8 // world_size)
    found = setup.roles.respond([prompts[row] for row in rows], sampling_params(config), seed=3)
    return {row: ids[mask].tolist() for row, ids, mask in zip(rows, found.tokens, found.mask, strict=True)}


def test_samples_do_not_depend_on_the_number_of_processes(paths):
    arguments = paths, paths["actor_model_name_or_path"]
    (alone,) = run_ranks(samples_of_a_rank, 1, *arguments)
    first, second = run_ranks(samples_of_a_rank, 2, *arguments)
    assert alone == first | second and len(alone) == 8
    assert len({tuple(alone[row]) for row in range(4)}) == 4, "equal prompts get answers of their own"
