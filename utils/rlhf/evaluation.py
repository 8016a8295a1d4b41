"""How the actor does on held-out prompts, and what it writes."""

import functools
from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from utils import distributed
from utils.rlhf.engine import RlhfEngine
from utils.rlhf.experience import Experience
from utils.rlhf.generation import generate
from utils.rlhf.hybrid_engine import generation_mode
from utils.rlhf.memory import fits, naming_flags, weight_bytes
from utils.rlhf.rollout import assemble, generate_responses, response_scores, sampling_params
from utils.rlhf.sampling import SamplingParams
from utils.zero import is_partitioned

OUT_OF_MEMORY = "lower --num_sample_generations (0 leaves the sample answers out) or --sample_max_new_tokens"


@torch.no_grad()
def evaluate_prompts(engine: RlhfEngine, loader: Iterable[Sequence[dict]], config) -> dict[str, float]:
    """Reward-model score, length and share of finished greedy responses to the prompts of `loader`, over all ranks."""
    rows = [row for batch in loader for row in batch]
    prompts = [row["prompt_ids"] for row in rows]
    real = torch.tensor([not row.get("filler", False) for row in rows], device=distributed.device())
    responses = generate_responses(engine, prompts, sampling_params(config, greedy=True), seed=config.seed)
    parts = torch.arange(len(rows)).split(config.per_device_training_batch_size)
    batches = [assemble(prompts, responses, part.tolist(), engine.tokenizer.pad_token_id) for part in parts]
    scores = torch.cat([response_scores(engine, *batch) for batch in batches])
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


def greedy_answers(engine, tokenizer: PreTrainedTokenizerBase, rows, max_new_tokens: int) -> list[tuple[str, str]]:
    """Greedy answers of the model in `engine` to the prompts of step 1's `rows`, as (prompt, answer) texts.

    Plain-text rows, which have no prompt, are passed over. Under ZeRO-3 every rank must call it, with the same rows:
    weights that do not fit whole are gathered layer by layer in every pass.

    Raises:
        RankError: out of memory, with the flags that lower it.
    """
    prompts = [row["input_ids"][: row["response_start"]] for row in rows if row["response_start"] > 1]
    if not prompts:
        return []
    sampling = SamplingParams(max_new_tokens=max_new_tokens, greedy=True)
    weights = engine.module.model
    streams = is_partitioned(next(weights.parameters())) and not fits(weight_bytes(weights))
    if streams:
        distributed.log(
            "note: the whole model does not fit on each process: sample answers gather its layers for every token, "
            "which is slow (--num_sample_generations 0 leaves them out)"
        )
    ends = {"eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}
    with naming_flags(OUT_OF_MEMORY), generation_mode(engine, gather="nothing" if streams else "all") as model:
        answers = generate(model, prompts, sampling, seed=0, synced=streams, **ends)
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    responses = [decode(ids[mask]) for ids, mask in zip(answers.tokens, answers.mask, strict=True)]
    return [(decode(prompt), response) for prompt, response in zip(prompts, responses, strict=True)]


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
