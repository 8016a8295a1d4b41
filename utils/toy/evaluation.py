"""Evaluates a checkpoint: its answers to questions, their judge scores and rewards, and its KL to the SFT model.

Checkpoints are opened with nothing but `transformers`, as any user of them would.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from utils.toy.judge import Verdict, judge
from utils.toy.world import dialogue_prompt

Ids = list[int]


@dataclass(frozen=True)
class Answer:
    """One answer. `reward` is the reward model's score in its standard deviations, None where there is no reward model;
    `kl` is in nats over the answer."""

    question: str
    text: str
    verdict: Verdict
    reward: float | None
    kl: float
    ended: bool


class Examiner:
    """Asks models the same questions; the reward model of step 2 scores the answers, and the KL is to the SFT model.

    Args:
        reward_folder, reference_folder: outputs of step 2 and of step 1; the tokenizer is the latter's. With None in
            place of a reward model, answers get no rewards.
        max_new_tokens: limit of an answer.
    """

    def __init__(
        self, reward_folder: str | os.PathLike | None, reference_folder: str | os.PathLike, max_new_tokens: int
    ) -> None:
        self.reward = None
        if reward_folder is not None:
            self.reward = AutoModelForSequenceClassification.from_pretrained(reward_folder, dtype=torch.float32).eval()
        self.reference = load_policy(reference_folder)
        self.tokenizer = AutoTokenizer.from_pretrained(reference_folder)
        self.max_new_tokens = max_new_tokens

    def ask(self, model: nn.Module, questions: Sequence[str], *, greedy: bool, seed: int = 0) -> list[Answer]:
        """The model's answer to each question, graded; sampled at temperature 1 unless `greedy`."""
        prompts = [self.tokenizer(dialogue_prompt(question))["input_ids"] for question in questions]
        responses = generate_answers(model, self.tokenizer, prompts, self.max_new_tokens, greedy=greedy, seed=seed)
        rewards = self._rewards(prompts, responses)
        kl = [
            (own - reference).sum().item()
            for own, reference in zip(
                answer_logprobs(model, prompts, responses),
                answer_logprobs(self.reference, prompts, responses),
                strict=True,
            )
        ]
        answers = []
        for question, response, reward, divergence in zip(questions, responses, rewards, kl, strict=True):
            text = self.tokenizer.decode(response, skip_special_tokens=True).strip()
            ended = response[-1] == self.tokenizer.eos_token_id
            answers.append(Answer(question, text, judge(question, text), reward, divergence, ended))
        return answers

    def perplexity(self, model: nn.Module, path: str | os.PathLike) -> float:
        """exp of the mean loss per response token, EOS included, on prompt/chosen rows of a jsonl file."""
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        prompts = [self.tokenizer(row["prompt"])["input_ids"] for row in rows]
        texts = [self.tokenizer(row["prompt"] + row["chosen"])["input_ids"] for row in rows]
        end = [self.tokenizer.eos_token_id]
        responses = [text[len(prompt) :] + end for prompt, text in zip(prompts, texts, strict=True)]
        return torch.cat(answer_logprobs(model, prompts, responses)).mean().neg().exp().item()

    @torch.no_grad()
    def _rewards(self, prompts: Sequence[Ids], responses: Sequence[Ids]) -> list[float] | list[None]:
        """The reward model's scores at the last tokens, normalised with the mean and deviation that step 2 stored."""
        if self.reward is None:
            return [None] * len(prompts)
        input_ids, attention_mask = _padded(prompts, responses)
        hidden = self.reward.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(1) - 1
        scores = self.reward.score(hidden[torch.arange(len(last)), last]).squeeze(-1)
        return ((scores - self.reward.config.score_mean) / self.reward.config.score_std).tolist()


def load_policy(folder: str | os.PathLike) -> nn.Module:
    """A causal language model as a step saved it, in fp32, without dropout."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def generate_answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Ids], max_new_tokens: int, *,
    greedy: bool, seed: int,
) -> list[Ids]:  # fmt: skip
    """Response ids for each prompt, up to and including the first EOS; the global random state does not change."""
    width = max(map(len, prompts))
    padding = [[tokenizer.pad_token_id] * (width - len(prompt)) for prompt in prompts]
    input_ids = torch.tensor([pad + prompt for pad, prompt in zip(padding, prompts, strict=True)])
    attention_mask = torch.tensor(
        [[0] * len(pad) + [1] * len(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    )
    sampling = {} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sequences = model.generate(
            input_ids=input_ids, attention_mask=attention_mask, generation_config=settings
        ).tolist()
    responses = [sequence[width:] for sequence in sequences]
    end = tokenizer.eos_token_id
    return [response[: response.index(end) + 1] if end in response else response for response in responses]


@torch.no_grad()
def answer_logprobs(model: nn.Module, prompts: Sequence[Ids], responses: Sequence[Ids]) -> list[torch.Tensor]:
    """Log-probability of each response token, one tensor (R,) per row."""
    input_ids, attention_mask = _padded(prompts, responses)
    logprobs = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].log_softmax(-1)
    taken = logprobs.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    spans = [(len(prompt) - 1, len(response)) for prompt, response in zip(prompts, responses, strict=True)]
    return [row[start : start + length] for row, (start, length) in zip(taken, spans, strict=True)]


def _padded(prompts: Sequence[Ids], responses: Sequence[Ids]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) ids and mask of prompts with their responses, padded on the right with id 0, which the mask excludes."""
    rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    attention_mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return input_ids, attention_mask
