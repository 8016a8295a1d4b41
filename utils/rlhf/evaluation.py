"""Evaluation of the actor on held-out prompts, and samples of its answers."""

from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from utils.arguments.generation import RolloutArguments
from utils.arguments.steps import PpoConfig
from utils.generation.sampling import SamplingParams
from utils.parallel import distributed
from utils.rewards.shaping import Reward
from utils.rlhf.experience import Experience
from utils.rlhf.roles import Roles


def sampling_params(config: RolloutArguments, *, greedy: bool = False) -> SamplingParams:
    """Step 3's sampling flags as sampling parameters."""
    return SamplingParams(
        max_new_tokens=config.max_answer_seq_len,
        min_new_tokens=config.min_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        greedy=greedy,
    )


@torch.no_grad()
def evaluate_prompts(
    roles: Roles, reward: Reward, loader: Iterable[Sequence[dict]], config: PpoConfig
) -> dict[str, float]:
    """Mean raw score, mean length and share of complete answers, for greedy answers to `loader`'s prompts on all ranks.

    Empty with `--eval_prompts 0`.
    """
    if not config.eval_prompts:
        return {}
    rows = [row for batch in loader for row in batch]
    prompts = [row["prompt_ids"] for row in rows]
    real = torch.tensor([not row.get("filler", False) for row in rows], device=distributed.device())
    responses = roles.respond(prompts, sampling_params(config, greedy=True), seed=config.seed)
    scores = reward(rows, responses).raw
    sums = {
        "sequences": real.sum(),
        "score": scores[real].sum(),
        "length": responses.mask[real].sum(),
        "ended": responses.ended[real].sum(),
    }
    sums = distributed.all_reduce_dict(sums)
    count = sums.pop("sequences")
    return {
        "eval/score_mean": sums["score"] / count,
        "eval/length_mean": sums["length"] / count,
        "eval/ended_fraction": sums["ended"] / count,
    }


def show_answers(experience: Experience, tokenizer: PreTrainedTokenizerBase, limit: int = 3) -> str:
    """Prompts, responses and scores of the first rows of a micro-batch, as text."""
    width = experience.response_mask.size(1)
    shown = []
    for row in range(min(limit, len(experience.scores))):
        ids, mask = experience.sequences[row], experience.attention_mask[row]
        prompt = tokenizer.decode(ids[:-width][mask[:-width]], skip_special_tokens=True)
        response = tokenizer.decode(ids[-width:][experience.response_mask[row]], skip_special_tokens=True)
        shown.append(f"{prompt.strip()}\n  {response.strip()}\n  score {experience.scores[row].item():.3f}")
    return "\n\n".join(shown) + "\n"
