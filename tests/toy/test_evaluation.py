"""Answers and their numbers from tiny random models, against the same numbers computed one row at a time."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from utils.models.tokenizer import load_tokenizer
from utils.toy.evaluation import Examiner, answer_logprobs, generate_answers, load_policy
from utils.toy.files import WorldSizes, write_world
from utils.toy.world import dialogue_prompt

QUESTIONS = ["What color is the milk?", "Please help me. Where does the fox live?", "Hello! What does the dog say?"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random policy and a random reward model as the steps would have saved them."""
    folder = tmp_path_factory.mktemp("evaluation")
    world = write_world(folder / "world", 3, WorldSizes(pretraining=300, sft=300, preference=10, held_out=6))
    tokenizer = load_tokenizer(str(world.random_model))
    policy = load_policy(world.random_model)
    policy.config.pad_token_id = tokenizer.pad_token_id
    reward = AutoModelForSequenceClassification.from_pretrained(world.random_model, num_labels=1)
    reward.config.score_mean, reward.config.score_std = 0.5, 2.0
    for model, name in ((policy, "sft"), (reward, "reward")):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder, world


@pytest.fixture(scope="module")
def examiner(folders):
    return Examiner(folders[0] / "reward", folders[0] / "sft", max_new_tokens=8)


def test_answers_do_not_depend_on_the_other_questions(examiner):
    together = examiner.ask(examiner.reference, QUESTIONS, greedy=True)
    for question, answer in zip(QUESTIONS, together, strict=True):
        (alone,) = examiner.ask(examiner.reference, [question], greedy=True)
        assert (alone.text, alone.verdict, alone.ended) == (answer.text, answer.verdict, answer.ended)
        assert alone.reward == pytest.approx(answer.reward, abs=1e-5)


def test_sampling_is_seeded_and_leaves_the_global_state_alone(examiner):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = examiner.ask(examiner.reference, QUESTIONS, greedy=False, seed=1)
    assert first == examiner.ask(examiner.reference, QUESTIONS, greedy=False, seed=1)
    assert first != examiner.ask(examiner.reference, QUESTIONS, greedy=False, seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_kl_of_the_reference_to_itself_is_zero_and_of_another_model_is_not(examiner, folders):
    assert all(answer.kl == 0 for answer in examiner.ask(examiner.reference, QUESTIONS, greedy=False))
    other = load_policy(folders[0] / "sft")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    answers = examiner.ask(other, QUESTIONS * 20, greedy=False)
    assert sum(answer.kl for answer in answers) / len(answers) > 0.01


def test_logprobs_one_row_at_a_time(examiner):
    model, tokenizer = examiner.reference, examiner.tokenizer
    prompts = [tokenizer(dialogue_prompt(question))["input_ids"] for question in QUESTIONS]
    responses = generate_answers(model, tokenizer, prompts, 8, greedy=False, seed=4)
    for prompt, response, batched in zip(prompts, responses, answer_logprobs(model, prompts, responses), strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        expected = [logprobs[len(prompt) - 1 + place, token].item() for place, token in enumerate(response)]
        torch.testing.assert_close(batched, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_reward_is_the_normalised_score_at_the_last_token(examiner):
    model, tokenizer = examiner.reference, examiner.tokenizer
    prompts = [tokenizer(dialogue_prompt(question))["input_ids"] for question in QUESTIONS]
    responses = generate_answers(model, tokenizer, prompts, 8, greedy=True, seed=0)
    for answer, prompt, response in zip(examiner.ask(model, QUESTIONS, greedy=True), prompts, responses, strict=True):
        with torch.no_grad():
            hidden = examiner.reward.model(torch.tensor([prompt + response])).last_hidden_state[0, -1]
        score = (hidden @ examiner.reward.score.weight[0]).item()
        assert answer.reward == pytest.approx((score - 0.5) / 2.0, abs=1e-4)


def test_perplexity_counts_response_tokens_and_eos(examiner, folders):
    path = folders[1].sft / "eval.jsonl"
    total, count = 0.0, 0
    for line in path.read_text().splitlines():
        row = json.loads(line)
        prompt = examiner.tokenizer(row["prompt"])["input_ids"]
        ids = [*examiner.tokenizer(row["prompt"] + row["chosen"])["input_ids"], examiner.tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
        with torch.no_grad():
            loss = examiner.reference(torch.tensor([ids]), labels=labels).loss.item()
        total, count = total + loss * (len(ids) - len(prompt)), count + len(ids) - len(prompt)
    expected = torch.tensor(total / count).exp().item()
    assert examiner.perplexity(examiner.reference, path) == pytest.approx(expected, rel=1e-4)
