"""A reward model as a source of scores."""

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from utils.arguments.steps import PpoConfig
from utils.generation.micro_batches import MicroBatch, plan_batches
from utils.models.engine import build_frozen_engine
from utils.models.scalar_head import score_scale
from utils.parallel import distributed
from utils.rewards.protocol import Answers


class RewardModel:
    """The frozen model of step 2: its score at the last token of an answer."""

    is_collective = True  # under ZeRO-3 its weights are gathered in every pass

    def __init__(self, config: PpoConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config, self._pad_id = config, tokenizer.pad_token_id
        self.engine = build_frozen_engine(config.roles()["reward"], tokenizer, config)
        self.score_mean, self.score_std = 0.0, 1.0
        if scale := score_scale(self.engine.module.model.config):
            self.score_mean, self.score_std = scale
        elif config.normalize_scores:
            distributed.log(
                "note: the reward model's config.json lacks a score_mean or a score_std above 0, which step 2 "
                "writes: scores are not normalised"
            )

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    @torch.no_grad()
    def __call__(self, answers: Answers) -> torch.Tensor:
        """(B,) fp32, computed in micro-batches as training makes them."""
        scores = torch.zeros(len(answers), device=answers.responses.tokens.device)
        for step in plan_batches(answers.prompt_ids, answers.responses, self._config, pad_id=self._pad_id):
            for batch in step:
                scores[list(batch.rows)] = self.score(batch)
        return scores

    def score(self, batch: MicroBatch) -> torch.Tensor:
        """(B,) fp32."""
        values = self.engine(batch.sequences, batch.attention_mask)
        return values.gather(1, batch.last_columns[:, None]).squeeze(1)
