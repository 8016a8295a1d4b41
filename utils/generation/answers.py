"""Sample answers of a model that is being trained: a few, before and after training."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from utils.generation.decoder import LlamaDecoder, Loading, supports
from utils.generation.generate import generate_responses
from utils.generation.hybrid_engine import generation_mode
from utils.generation.responses import Ends, Responses
from utils.generation.sampling import SamplingParams
from utils.parallel import distributed
from utils.parallel.memory import advising_on_memory, fits, weight_bytes
from utils.parallel.zero import Engine, is_partitioned

OUT_OF_MEMORY = "lower --num_sample_generations (0 leaves the sample answers out) or --sample_max_new_tokens"


def sample_answers(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: SamplingParams,
    *,
    seed: int = 0,
) -> Responses:
    """One answer of the model in `engine` to each of at least one prompt.

    The decode engine gives them where it knows the architecture and there is room for what it allocates, otherwise
    `transformers` does. Under ZeRO-3 every rank must call it, with the same prompts: weights that do not fit whole are
    gathered layer by layer in every pass.

    Raises:
        RankError: out of memory; names the flags that reduce it.
    """
    model = engine.module.model
    whole = weight_bytes(model) if is_partitioned(next(model.parameters())) else 0
    streams = bool(whole) and not fits(whole)
    if streams:
        distributed.log(
            "note: the whole model does not fit on each process: sample answers gather its layers for every token, "
            "which is slow (--num_sample_generations 0 leaves them out)"
        )
    decoder = None
    if supports(model.config) and not streams:
        decoder = LlamaDecoder(cuda_graphs=False)  # recording them costs more than a few answers gain
        length = max(map(len, prompts)) + sampling.max_new_tokens
        if not fits(whole + decoder.extra_bytes(model, len(prompts), length)):
            decoder = None
    with advising_on_memory(OUT_OF_MEMORY), generation_mode(engine, gather="nothing" if streams else "all") as model:
        return generate_responses(
            model,
            list(prompts),
            sampling,
            Ends.of(tokenizer),
            seed=seed,
            slots=len(prompts),
            decoder=decoder,
            how=Loading(stream=streams),
        )


def greedy_answers(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], max_new_tokens: int
) -> list[tuple[str, str]]:
    """Greedy answers of the model in `engine` to the prompts of `rows` (of purpose "sft"), as (prompt, answer) texts.

    Plain-text rows, which have no prompt, are skipped; for the rest see `sample_answers`.
    """
    prompts = [row["input_ids"][: row["response_start"]] for row in rows if row["response_start"] > 1]
    if not prompts:
        return []
    answers = sample_answers(engine, tokenizer, prompts, SamplingParams(max_new_tokens=max_new_tokens, greedy=True))
    texts = (tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts)
    return list(zip(texts, answers.texts(tokenizer), strict=True))
