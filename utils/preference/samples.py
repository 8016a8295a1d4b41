"""Answers to a few held-out prompts before and after training, and how far the policy has moved away on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from utils.arguments.preference import PreferenceArguments
from utils.data.batches.collate import pad
from utils.generation.answers import sample_answers
from utils.generation.responses import Responses
from utils.generation.sampling import SamplingParams
from utils.parallel import distributed
from utils.parallel.zero import Engine

SHOWN = 3


@dataclass(frozen=True)
class Samples:
    """The prompts of `--num_sample_generations` held-out rows, answered by sampling at temperature 1.

    The KL is estimated on answers of the model before training, whose log-probabilities are known from then on: so no
    second model is needed for it.
    """

    prompts: list[list[int]]
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    seed: int

    @staticmethod
    def of(
        rows: Sequence[dict[str, Any]], engine: Engine, tokenizer: PreTrainedTokenizerBase, config: PreferenceArguments
    ) -> "Samples":
        """The first rows' prompts, each once."""
        prompts: dict[tuple[int, ...], None] = {}
        for index in range(len(rows)):
            if len(prompts) == config.num_sample_generations:
                break
            prompts[tuple(rows[index]["prompt_ids"])] = None
        return Samples([list(p) for p in prompts], engine, tokenizer, config.sample_max_new_tokens, config.seed)

    def answer(self) -> dict[str, list]:
        """Answers of the policy as it is now: "tokens" of each, and its "logprobs" under the policy. JSON values."""
        if not self.prompts:
            return {"tokens": [], "logprobs": []}
        sampling = SamplingParams(max_new_tokens=self.max_new_tokens)
        answers: Responses = sample_answers(self.engine, self.tokenizer, self.prompts, sampling, seed=self.seed)
        tokens = [row[mask].tolist() for row, mask in zip(answers.tokens.cpu(), answers.mask.cpu(), strict=True)]
        return {"tokens": tokens, "logprobs": self._logprobs(tokens).tolist()}

    def kl(self, before: dict[str, list]) -> dict[str, float]:
        """KL(model before training || policy) in nats per answer: how much less likely its answers have become.

        The mean over `before`, which `answer` gave before training, of log p(before) - log p(now) (k1, Schulman 2020).
        """
        if not before["tokens"]:
            return {}
        moved = torch.tensor(before["logprobs"], dtype=torch.float64) - self._logprobs(before["tokens"])
        return {"eval/kl": moved.mean().item() + 0.0}  # never -0.0

    def texts(self, before: dict[str, list], after: dict[str, list]) -> list[tuple[str, str, str]]:
        """(prompt, answer before, answer after) of the first ones."""
        first = zip(self.prompts[:SHOWN], before["tokens"], after["tokens"], strict=False)
        return [tuple(self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in row) for row in first]

    @torch.no_grad()
    def _logprobs(self, answers: list[list[int]]) -> torch.Tensor:
        """(answers,) summed over the tokens of each; every rank computes all of them."""
        rows = [prompt + answer for prompt, answer in zip(self.prompts, answers, strict=True)]
        ids, mask = (tensor.to(distributed.device()) for tensor in pad(rows, self.tokenizer.pad_token_id))
        starts = torch.tensor([max(len(prompt), 1) for prompt in self.prompts], device=ids.device)
        targets = mask.bool() & (torch.arange(ids.size(1), device=ids.device) >= starts[:, None])
        training = self.engine.module.training
        self.engine.eval()
        logprobs, _ = self.engine(ids, mask, targets)
        self.engine.train(training)
        spread = torch.zeros(targets.shape, dtype=logprobs.dtype, device=ids.device).masked_scatter(targets, logprobs)
        return spread.double().sum(1).cpu()
