"""From the score of an answer to what PPO maximises: normalised, clipped, and lowered if the answer is cut."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from utils.algorithms.kl import normalize_scores
from utils.arguments.choices import REWARD_SOURCES
from utils.arguments.ppo import RewardSourceArguments
from utils.arguments.steps import PpoConfig
from utils.errors import InputError
from utils.generation.responses import Responses
from utils.parallel import distributed
from utils.rewards.protocol import Answers, RewardSource, Row


@dataclass(frozen=True)
class Scores:
    """Scores of the B answers of this process, (B,) fp32 each."""

    raw: torch.Tensor  # as their source gives them
    shaped: torch.Tensor  # as PPO rewards them


class Reward:
    """A source of scores, and the flags that shape its scores.

    Attributes:
        mean, std: what scores are normalised with; 0 and 1 without `--normalize_scores`.
    """

    def __init__(self, source: RewardSource, tokenizer: PreTrainedTokenizerBase, config: RewardSourceArguments) -> None:
        self.source, self._tokenizer, self._config = source, tokenizer, config
        self.mean, self.std = (source.score_mean, source.score_std) if config.normalize_scores else (0.0, 1.0)

    def __call__(self, rows: Sequence[Row], responses: Responses) -> Scores:
        """Score the answers of this process to `rows`. Every process must call it.

        Raises:
            InputError: on every process; the source has failed on one of them.
        """
        raw = self._raw(Answers(rows, responses, self._tokenizer)).to(responses.tokens.device)
        shaped = normalize_scores(raw, self.mean, self.std, self._config.clip_reward_value)
        return Scores(raw, shaped - self._config.missing_eos_penalty * (~responses.ended).float())

    def normalized(self, score: float) -> float:
        """A raw score, as standard deviations from the mean; unchanged without `--normalize_scores`."""
        return (score - self.mean) / self.std

    def _raw(self, answers: Answers) -> torch.Tensor:
        if self.source.is_collective:
            return self.source(answers)
        scores, problem = torch.zeros(len(answers)), None
        try:
            scores = self.source(answers)
            problem = _wrong(scores, len(answers))
        except Exception as error:  # any error in a source must end the run on all processes
            problem = f"{type(error).__name__}: {error}"
        if problem := distributed.first_problem(problem):
            raise InputError(f"--reward_source {self._config.reward_source}: {problem}")
        return scores


def _wrong(scores: torch.Tensor, expected: int) -> str | None:
    if not isinstance(scores, torch.Tensor) or scores.shape != (expected,):
        found = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        return f"gave {found} instead of a tensor with {expected} scores"
    if not scores.isfinite().all():
        row = int((~scores.isfinite()).nonzero()[0])
        return f"gave {scores[row].item()} to answer {row} of its batch"
    return None


def build_reward(config: PpoConfig, tokenizer: PreTrainedTokenizerBase) -> Reward:
    """The reward that the flags ask for. Every process must call it."""
    source = REWARD_SOURCES[config.reward_source].load()(config, tokenizer)
    return Reward(source, tokenizer, config)
