"""How the actor does on held-out prompts, and what it writes."""

from collections.abc import Iterable

import torch
from transformers import PreTrainedTokenizerBase

from utils import distributed
from utils.rlhf.engine import RlhfEngine
from utils.rlhf.experience import Experience
from utils.rlhf.rollout import assemble, generate_responses, response_scores, sampling_params


@torch.no_grad()
def evaluate_prompts(engine: RlhfEngine, loader: Iterable[dict[str, torch.Tensor]], config) -> dict[str, float]:
    """Reward-model score, length and share of finished greedy responses to the prompts of `loader`, over all ranks."""
    prompt_batches = [distributed.to_device(batch) for batch in loader]
    responses = generate_responses(engine, prompt_batches, sampling_params(config, greedy=True), seed=config.seed)
    sums = {"sequences": 0, "score": 0.0, "length": 0, "ended": 0}
    for prompts, generation in zip(prompt_batches, responses, strict=True):
        real = prompts["row_mask"]
        for rows in torch.arange(len(real)).split(config.per_device_training_batch_size):
            scores = response_scores(engine, *assemble(prompts, generation, rows))
            sums["score"] += scores[real[rows]].sum().item()
        sums["sequences"] += int(real.sum())
        sums["length"] += int(generation.mask[real].sum())
        sums["ended"] += int(generation.ended[real].sum())
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
    return "\n".join(shown)
