"""Sample answers of a model that is being trained: a few greedy ones, before and after training."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from utils.generation.decoder import Loading
from utils.generation.generate import generate_responses
from utils.generation.hybrid_engine import generation_mode
from utils.generation.responses import Ends
from utils.generation.sampling import SamplingParams
from utils.parallel import distributed
from utils.parallel.memory import advising_on_memory, fits, weight_bytes
from utils.parallel.zero import Engine, is_partitioned

OUT_OF_MEMORY = "lower --num_sample_generations (0 leaves the sample answers out) or --sample_max_new_tokens"


def greedy_answers(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], max_new_tokens: int
) -> list[tuple[str, str]]:
    """Greedy answers of the model in `engine` to the prompts of `rows` (of purpose "sft"), as (prompt, answer) texts.

    Plain-text rows, which have no prompt, are skipped. Under ZeRO-3 every rank must call it, with the same rows:
    weights that do not fit whole are gathered layer by layer in every pass.

    Raises:
        RankError: out of memory; names the flags that reduce it.
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
    with advising_on_memory(OUT_OF_MEMORY), generation_mode(engine, gather="nothing" if streams else "all") as model:
        answers = generate_responses(
            model,
            prompts,
            sampling,
            Ends.of(tokenizer),
            seed=0,
            slots=len(prompts),
            how=Loading(stream=streams),
        )
    texts = (tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts)
    return list(zip(texts, answers.texts(tokenizer), strict=True))
