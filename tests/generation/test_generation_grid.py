"""Greedy tokens, over all combinations of what could disturb them, are those of `transformers` without a batch."""

import itertools

import pytest
import torch
from processes import run_ranks
from rlhf_setup import make_config, save_models

from utils.generation.hybrid_engine import HybridEngine, generation_mode
from utils.generation.sampling import SamplingParams
from utils.parallel import distributed
from utils.parallel.zero import gathered

GREEDY = SamplingParams(max_new_tokens=7, greedy=True)
PROMPTS = [[5, 9, 11, 40, 17, 8, 100, 31, 6], [77], [20, 21, 22, 23], [9, 8]]  # unequal: `generate` pads on the left
MODELS = {  # name -> changes of a LLaMA with 4 query heads
    f"{4 // kv_heads} queries per key, {'tied' if tied else 'untied'}": {
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
    }
    for kv_heads in (1, 2, 4)
    for tied in (False, True)
}


def responses(found) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(found.tokens, found.mask, strict=True)]


def one_by_one(model, tokenizer) -> list[list[int]]:
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=GREEDY.max_new_tokens,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def compare_all(paths: dict[str, dict[str, str]]) -> int:
    """Number of combinations in which the decode engine and `generate` on a padded batch give the expected tokens."""
    from utils.models.engine import build_engine
    from utils.models.tokenizer import load_tokenizer

    distributed.seed_everything(0)
    combinations = list(itertools.product(paths, range(4), (0, 4)))
    for name, stage, dim in combinations:
        way = {"actor_zero_stage": stage, "actor_lora_dim": dim}
        tokenizer = load_tokenizer(paths[name]["actor_model_name_or_path"])
        configs = [make_config(paths[name], enable_hybrid_engine=on, **way) for on in (True, False)]
        actor = build_engine(configs[0].roles()["actor"], tokenizer, configs[0], total_steps=1)
        for parameter_name, parameter in actor.module.named_parameters():
            if "lora_B" in parameter_name:
                with gathered([parameter], write=True):
                    torch.nn.init.normal_(parameter, std=0.2)
        with generation_mode(actor) as model:
            expected = one_by_one(model, tokenizer)
        for config in configs:
            hybrid = HybridEngine(actor, tokenizer, config)
            assert (hybrid.decoder is not None) == config.enable_hybrid_engine
            assert responses(hybrid.answer(PROMPTS, GREEDY, seed=0)) == expected, (name, way)
    return len(combinations)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_greedy_tokens_are_those_of_transformers(tmp_path, tiny_tokenizer, world_size):
    paths = {
        name: save_models(tmp_path / str(index), tiny_tokenizer, **changes)
        for index, (name, changes) in enumerate(MODELS.items())
    }
    assert run_ranks(compare_all, world_size, paths) == [48] * world_size
