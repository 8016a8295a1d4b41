"""The decode engine against `transformers`, and against itself in other batches."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, inject_adapter_in_model
from processes import run_ranks
from rlhf_setup import make_config, make_prompts, make_setup, rollout, save_models
from tiny_models import SIZES

import utils.generation.decoder as decoder_module
import utils.generation.scheduler as scheduler
from utils.errors import InputError
from utils.generation.batching import decode
from utils.generation.decoder import LlamaDecoder, Loading, supports
from utils.generation.generate import generate_responses
from utils.generation.graphs import StepGraphs
from utils.generation.hybrid_engine import generation_mode
from utils.generation.responses import Ends
from utils.generation.sampling import SamplingParams, row_keys
from utils.models.lora import adapters_off, add_lora, lora_layers
from utils.parallel import distributed
from utils.rlhf.updates import update

pytestmark = pytest.mark.usefixtures("operations")
VOCABULARY, EOS, PAD = 97, 2, 0
ENDS = Ends(EOS, PAD)
GREEDY = SamplingParams(max_new_tokens=24, greedy=True)
SAMPLED = SamplingParams(max_new_tokens=24)


def make_model(architecture: str = "llama", *, seed: int = 0, **changes) -> torch.nn.Module:
    config = SIZES[architecture](VOCABULARY)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(6.0)
    return model


def prompts_of(lengths, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


PROMPTS = prompts_of([3, 17, 9, 9, 1, 30, 12, 5])


def responses(found) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(found.tokens, found.mask, strict=True)]


def greedy_of_transformers(model, prompts, limit: int = 24, eos_id: int = EOS) -> list[list[int]]:
    """`generate` on each prompt by itself: no batch and no padding."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit, eos_token_id=eos_id,
            pad_token_id=PAD,
        )  # fmt: skip
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def a_token_that_ends_some(model) -> int:
    """An id to use as EOS: greedy responses contain it at different positions, some not at all."""
    answers = greedy_of_transformers(model, PROMPTS, eos_id=VOCABULARY)
    places = {token: {answer.index(token) for answer in answers if token in answer} for token in range(VOCABULARY)}
    return max(places, key=lambda token: len(places[token]))


def run(model, prompts, sampling, *, slots: int = 8, seed: int = 0, eos_id: int = EOS, rows=None, **load):
    decoder = LlamaDecoder()
    decoder.load(model, Loading(**load))
    keys = None if rows is None else row_keys(seed, rows)
    return decode(decoder, prompts, sampling, Ends(eos_id, PAD), seed=seed, slots=slots, keys=keys)


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 16},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {
            "rope_parameters": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16, "rope_theta": 1e4,
            }
        },
        {
            "rope_parameters": {
                "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16,
            }
        },
    ],
    ids=["plain", "tied", "one-kv-head", "no-gqa", "bias", "wide-heads", "rope-linear", "rope-llama3", "rope-yarn"],
)  # fmt: skip
def test_greedy_tokens_equal_transformers_in_fp32(changes, slots):
    model = make_model(**changes)
    for parameter in model.parameters():  # biases start at zero
        if parameter.ndim == 1 and parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.03)
    assert supports(model.config)
    eos_id = a_token_that_ends_some(model)
    expected = greedy_of_transformers(model, PROMPTS, eos_id=eos_id)
    assert len({len(answer) for answer in expected}) > 2, "the test wants responses of different length"
    assert responses(run(model, PROMPTS, GREEDY, slots=slots, eos_id=eos_id)) == expected


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_greedy_tokens_in_bf16_differ_only_at_near_ties(slots):
    """Where the engine first leaves `generate`, the two tokens' logits are within bf16's rounding of each other."""
    model = make_model().bfloat16()
    expected = greedy_of_transformers(model, PROMPTS)
    for prompt, mine, theirs in zip(
        PROMPTS, responses(run(model, PROMPTS, GREEDY, slots=slots)), expected, strict=True
    ):
        places = [place for place, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]]
        if places:
            context = torch.tensor([prompt + mine[: places[0]]])
            logits = model(context).logits[0, -1].float()
            gap = (logits[mine[places[0]]] - logits[theirs[places[0]]]).abs().item()
            assert gap <= 0.02 * logits.abs().max().item()


def test_lengths_reasons_and_padding():
    model = make_model()
    eos_id = a_token_that_ends_some(model)
    found = run(model, PROMPTS, GREEDY, eos_id=eos_id)
    for tokens, mask, ended in zip(found.tokens, found.mask, found.ended, strict=True):
        length = int(mask.sum())
        assert mask[:length].all() and not mask[length:].any() and (tokens[length:] == PAD).all()
        assert (eos_id in tokens[:length].tolist()) == bool(ended)
        assert ended == (tokens[length - 1] == eos_id)
        assert bool(ended) or length == GREEDY.max_new_tokens
    assert found.ended.any() and not found.ended.all()


def test_a_row_is_the_same_in_any_company():
    model = make_model()
    together = responses(run(model, PROMPTS, SAMPLED))
    for slots in (1, 2, 5):
        assert responses(run(model, PROMPTS, SAMPLED, slots=slots)) == together
    order = [6, 0, 3, 7, 1]
    some = run(model, [PROMPTS[row] for row in order], SAMPLED, slots=3, rows=order)
    assert responses(some) == [together[row] for row in order]
    alone = [responses(run(model, [prompt], SAMPLED, rows=[row]))[0] for row, prompt in enumerate(PROMPTS)]
    assert alone == together
    assert responses(run(model, PROMPTS, SAMPLED, seed=1)) != together


def test_the_prefill_budget_changes_nothing(monkeypatch):
    model = make_model()
    together = responses(run(model, PROMPTS, SAMPLED))
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 20)
    assert responses(run(model, PROMPTS, SAMPLED)) == together


def test_looking_at_finished_rows_less_often_changes_nothing(monkeypatch):
    """As on a GPU, where every check waits for the device."""
    model = make_model()
    together = run(model, PROMPTS, SAMPLED)
    monkeypatch.setattr(scheduler, "CHECK_INTERVAL", {"cpu": 5})
    later = run(model, PROMPTS, SAMPLED, slots=3)
    assert responses(later) == responses(together)
    torch.testing.assert_close(later.logprobs, together.logprobs, atol=1e-5, rtol=1e-5)
    limit_is_the_cache = SamplingParams(max_new_tokens=34, greedy=True)  # 30 + 34 fills the cache to the last column
    assert responses(run(model, PROMPTS, limit_is_the_cache)) == greedy_of_transformers(model, PROMPTS, 34)


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_padding_rows_and_lengths_up_to_buckets_changes_nothing(monkeypatch, slots):
    model, shapes = make_model(), set()
    together, plain_logprobs = responses(run(model, PROMPTS, SAMPLED)), run(model, PROMPTS, SAMPLED).logprobs
    decoder = LlamaDecoder()
    decoder.load(model)
    step = decoder.step
    monkeypatch.setattr(
        decoder, "step", lambda *arguments: shapes.add((len(arguments[0]), arguments[2])) or step(*arguments)
    )
    monkeypatch.setattr(scheduler, "LENGTH_BUCKET", 32)
    found = decode(decoder, PROMPTS, SAMPLED, ENDS, seed=0, slots=slots, buckets=True)
    assert responses(found) == together
    torch.testing.assert_close(found.logprobs, plain_logprobs, atol=1e-5, rtol=1e-5)
    assert shapes <= {(8, 32), (8, 64)}


class Recorded:
    """Stands in for a CUDA graph on a CPU: a replay is the recorded call itself, with its arguments at that time."""

    made = 0

    def __init__(self, step):
        self.replay = step
        Recorded.made += 1


def test_recorded_steps_give_the_same_tokens_from_call_to_call(monkeypatch):
    """What changes between two calls, and is not part of a step's key, must be in the memory that the step reads."""
    monkeypatch.setattr(Recorded, "made", 0)
    monkeypatch.setattr(scheduler, "LENGTH_BUCKET", 32)
    model, more = with_lora(make_model()), prompts_of([4, 8, 2, 11, 6], seed=5)
    graphs = StepGraphs(lambda: Recorded)
    decoder = LlamaDecoder(keep_copies=True)
    decoder._graphs = graphs
    eos_id = a_token_that_ends_some(model)
    hot = SamplingParams(max_new_tokens=20, temperature=1.7, top_k=9)
    calls = [(PROMPTS, SAMPLED, 8), (more, SAMPLED, 8), (PROMPTS, hot, 8), (more, GREEDY, 5), (PROMPTS, SAMPLED, 3)]
    for turn in range(2):
        for prompts, sampling, slots in calls:
            expected = run(model, prompts, sampling, slots=slots, seed=turn, eos_id=eos_id)
            decoder.load(model)
            found = decode(decoder, prompts, sampling, Ends(eos_id, PAD), seed=turn, slots=slots)
            decoder.unload()
            assert responses(found) == responses(expected) and torch.equal(found.stopped, expected.stopped)
        if turn == 0:
            first = Recorded.made
            with torch.no_grad():  # an optimiser step changes weights where they are
                for parameter in model.parameters():
                    parameter += 0.05 * torch.randn_like(parameter)
    assert 0 < first <= 6 and Recorded.made <= 6, "recorded once for each of 2 lengths and 3 ways to sample"
    for parameter in model.model.norm.parameters():  # now a weight moves, as those that ZeRO-3 gathers do
        parameter.data = parameter.data.clone()
    decoder.load(model)
    decode(decoder, PROMPTS, SAMPLED, Ends(eos_id, PAD), seed=0, slots=8)
    assert Recorded.made > 6
    decoder.release_cache()
    assert graphs.memory is None and not graphs._graphs


@pytest.mark.parametrize("lora", ["fused", "unfused"])
def test_graphs_are_dropped_when_any_weight_that_a_step_reads_has_moved(monkeypatch, lora):
    """As on a GPU, where matrices are read in place, except those with LoRA fused in, whose copies stay in place."""
    monkeypatch.setattr(decoder_module, "JOIN_ON", ())
    monkeypatch.setattr(Recorded, "made", 0)
    model = make_model(attention_bias=True, mlp_bias=True)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCABULARY))
    with_lora(model)
    decoder = LlamaDecoder(keep_copies=True)
    decoder._graphs = StepGraphs(lambda: Recorded)

    def recordings() -> int:
        before = Recorded.made
        decoder.load(model, Loading(lora=lora))
        decode(decoder, [[5, 6]], SamplingParams(max_new_tokens=4), Ends(VOCABULARY, PAD), seed=0, slots=1)
        decoder.unload()
        return Recorded.made - before

    assert (recordings(), recordings()) == (1, 0)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.clone()
        copied = lora == "fused" and ("lora_" in name or name.endswith("base_layer.weight"))
        assert recordings() == (not copied), name
    decoder.release_cache()
    assert recordings() == 1


def test_a_recorder_is_not_used_again_once_its_graphs_are_gone():
    """Their memory is gone with them, and torch's allocator fails if a graph is recorded into it again."""
    recorders = []

    def recorder():
        recorders.append(0)
        place = len(recorders) - 1

        def record(step):
            recorders[place] += 1
            return Recorded(step)

        return record

    graphs, done, memory = StepGraphs(recorder), [], [torch.zeros(2), torch.zeros(2)]
    for tensor in (memory[0], memory[0], memory[1]):
        graphs.refresh([tensor])
        for key in (1, 2, 1, 2):
            graphs.run(key, lambda key=key: done.append(key))
    assert recorders == [2, 2] and done == [1, 2] * 6
    graphs.release()
    graphs.run(1, lambda: done.append(1))
    assert recorders == [2, 2, 1]


def test_a_step_that_cannot_be_recorded_ends_the_run_and_says_how_to_do_without():
    def failing(error):
        def record(step):
            raise error

        graphs = StepGraphs(lambda: record)
        graphs.run("key", lambda: None)
        graphs.run("key", lambda: None)

    with pytest.raises(InputError, match=r"add --no_generation_cuda_graphs\. CUDA error: operation not permitted$"):
        failing(RuntimeError("CUDA error: operation not permitted\nCUDA kernel errors might be"))
    with pytest.raises(torch.OutOfMemoryError):
        failing(torch.OutOfMemoryError("CUDA out of memory"))
    try:
        raise torch.OutOfMemoryError("CUDA out of memory")
    except torch.OutOfMemoryError:  # the end of the recording fails as well, with another error
        with pytest.raises(RuntimeError, match="capture was invalidated"):
            failing(RuntimeError("capture was invalidated"))


def test_many_short_rows_and_few_long_ones_share_one_memory_and_its_graphs(monkeypatch):
    """As rollouts and evaluations, which take turns: after one of each, nothing is allocated or recorded again."""
    monkeypatch.setattr(Recorded, "made", 0)
    model, many, long = make_model(), prompts_of([3] * 16), prompts_of([60] * 4)
    decoder = LlamaDecoder()
    decoder._graphs = graphs = StepGraphs(lambda: Recorded)
    seen = []
    for turn in range(4):
        for prompts, sampling in ((many, GREEDY), (long, SamplingParams(max_new_tokens=40, greedy=True))):
            decoder.load(model)
            found = decode(decoder, prompts, sampling, Ends(VOCABULARY, PAD), seed=0, slots=16)
            assert turn or responses(found) == responses(run(model, prompts, sampling, slots=16, eos_id=VOCABULARY))
        seen.append((Recorded.made, *map(torch.Tensor.data_ptr, decoder.tensors()), graphs.memory))
    assert decoder.cache[1].shape[1] == 16 and decoder.capacity == 112 and graphs.memory.size == (16, 16, 40)
    assert seen[1] == seen[2] == seen[3]


def test_rows_may_have_limits_of_their_own():
    model, limits = make_model(), [5, 1, 24, 7, 2, 24, 3, 9]
    decoder = LlamaDecoder()
    decoder.load(model)
    found = responses(decode(decoder, PROMPTS, SAMPLED, ENDS, seed=0, slots=3, limits=limits))
    whole = responses(run(model, PROMPTS, SAMPLED))
    assert found == [answer[:limit] for answer, limit in zip(whole, limits, strict=True)]


def test_identical_prompts_get_different_samples():
    found = responses(run(make_model(), [PROMPTS[0]] * 4, SAMPLED))
    assert len({tuple(answer) for answer in found}) == 4


@pytest.mark.parametrize("slots", [3, 5, 12])
def test_samples_of_one_prompt_share_its_prefill(monkeypatch, slots):
    model, prompts = make_model(), [PROMPTS[1], PROMPTS[5], PROMPTS[0]] * 4
    keys, alone = row_keys(3, range(len(prompts))), []
    decoder = LlamaDecoder()
    decoder.load(model)
    for prompt, key in zip(prompts, keys, strict=True):
        alone += responses(decode(decoder, [prompt], SAMPLED, ENDS, seed=0, slots=1, keys=key[None]))
    processed, prefill = [], decoder.prefill
    monkeypatch.setattr(
        decoder, "prefill", lambda ids, lengths, slot: processed.append(ids) or prefill(ids, lengths, slot)
    )
    assert responses(decode(decoder, prompts, SAMPLED, ENDS, seed=3, slots=slots)) == alone
    count = sum(len(ids) for ids in processed)
    assert count == 3 if slots == 12 else count <= 6  # what samples have left the slots is processed again


def test_first_tokens_follow_the_distribution_of_the_model():
    model, prompt = make_model(), PROMPTS[1]
    with torch.no_grad():
        probabilities = torch.softmax(model(torch.tensor([prompt])).logits[0, -1] / 1.3, -1)
    count = 3000
    sampling = SamplingParams(max_new_tokens=1, temperature=1.3)
    first = run(model, [prompt] * count, sampling, slots=512).tokens[:, 0]
    top = probabilities.topk(8).indices
    observed = torch.tensor([(first == token).sum().item() for token in top] + [0.0])
    observed[-1] = count - observed.sum()
    expected = torch.cat([probabilities[top], 1 - probabilities[top].sum()[None]]) * count
    assert ((observed - expected).square() / expected).sum().item() < 26.1  # 8 degrees of freedom, p = 0.001


def test_pairs_of_tokens_follow_the_joint_distribution_of_the_model():
    """The second token comes from a decode step, in slots that rows leave and enter."""
    torch.manual_seed(0)
    config = SIZES["llama"](9)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    prompt, count, words = [5, 3, 7, 4], 6000, [word for word in range(9) if word != EOS]
    sampling = SamplingParams(max_new_tokens=2, min_new_tokens=2, temperature=0.8)
    with torch.no_grad():
        contexts = torch.tensor([prompt + [word] for word in range(9)])
        first = model(torch.tensor([prompt])).logits[0, -1, words].div(0.8).softmax(-1)
        second = model(contexts).logits[words, -1][:, words].div(0.8).softmax(-1)
    expected = (first[:, None] * second).flatten() * count
    pairs = run(model, [prompt] * count, sampling, slots=500).tokens
    place = torch.tensor([words.index(word) if word in words else -1 for word in range(9)])[pairs]
    assert (place >= 0).all()
    observed = torch.bincount(place[:, 0] * 8 + place[:, 1], minlength=64).float()
    rare = expected < 5
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    degrees = len(expected) - 1
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3  # Wilson-Hilferty, p = 0.001
    assert degrees > 20 and ((observed - expected).square() / expected.clamp(min=1)).sum().item() < limit


def test_log_probabilities_are_those_of_the_training_forward():
    model = make_model()
    found = run(model, PROMPTS, SamplingParams(max_new_tokens=24, temperature=0.8, top_p=0.9), slots=3)
    for prompt, tokens, mask, logprobs in zip(PROMPTS, found.tokens, found.mask, found.logprobs, strict=True):
        answer = tokens[mask]
        with torch.no_grad():
            logits = model(torch.cat([torch.tensor(prompt), answer])[None]).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits / 0.8, -1).gather(1, answer[:, None])[:, 0]
        torch.testing.assert_close(logprobs[mask], expected, atol=1e-4, rtol=1e-4)
        assert not logprobs[~mask].any()


def test_minimum_length_is_kept():
    found = run(make_model(), PROMPTS, SamplingParams(max_new_tokens=12, min_new_tokens=10))
    assert found.mask.sum(1).min() >= 10


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "phi", "gpt_neox"])
def test_other_architectures_generate_through_transformers(architecture):
    model = make_model(architecture)
    assert not supports(model.config)
    found = generate_responses(model, PROMPTS, GREEDY, ENDS, seed=0, slots=3)
    assert len(found.tokens) == len(PROMPTS) and found.logprobs is None


def test_transformers_draws_for_each_rank_by_itself(monkeypatch):
    model, found = make_model("gpt2"), []
    for rank in (0, 1, 0):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found.append(responses(generate_responses(model, [PROMPTS[0]] * 4, SAMPLED, ENDS, seed=0, slots=2)))
    assert found[0] == found[2] and not {*map(tuple, found[0])} & {*map(tuple, found[1])}


def test_rope_tables_that_follow_the_length_are_left_to_transformers():
    assert not supports(make_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}).config)


def test_the_cache_is_kept_between_rollouts_and_released():
    model, decoder = make_model(), LlamaDecoder()
    first = generate_responses(model, PROMPTS, SAMPLED, ENDS, seed=0, slots=4, decoder=decoder)
    cache = decoder.cache[0]
    again = generate_responses(model, PROMPTS[:4], SAMPLED, ENDS, seed=0, slots=4, decoder=decoder)
    assert decoder.cache[0] is cache and responses(again) == responses(first)[:4]
    assert decoder.layers is None and decoder.head is None  # no weights are held
    decoder.release_cache()
    assert decoder.cache is None


def with_lora(model, *, name: str = "default", seed: int = 1) -> torch.nn.Module:
    """`model` with LoRA far from its start."""
    add_lora(model, 4)
    torch.manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("lora", ["fused", "unfused"])
@pytest.mark.parametrize("joined", [True, False])  # False: as on a GPU
def test_adapters_are_applied_without_touching_the_weights_and_skipped_when_off(monkeypatch, lora, joined):
    monkeypatch.setattr(decoder_module, "JOIN_ON", ("cpu",) if joined else ())
    model = make_model(attention_bias=True)
    for parameter in model.parameters():
        if parameter.ndim == 1 and parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.03)
    plain = responses(run(model, PROMPTS, GREEDY))
    with_lora(model)
    before = copy.deepcopy(model.state_dict())
    adapted = responses(run(model, PROMPTS, GREEDY, lora=lora))
    assert adapted == greedy_of_transformers(model, PROMPTS) and adapted != plain
    with adapters_off(model):
        assert responses(run(model, PROMPTS, GREEDY, lora=lora)) == plain
    assert responses(run(model, PROMPTS, GREEDY, lora=lora, adapter=None)) == plain
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("lora", ["fused", "unfused"])
def test_what_generation_will_take_is_what_it_takes(monkeypatch, lora):
    """As on a GPU, where only adapted matrices are copied; a CPU joins or packs all of them."""
    monkeypatch.setattr(decoder_module, "JOIN_ON", ())
    model, decoder = make_model(), LlamaDecoder(keep_copies=True)
    add_lora(model, 4, module_name="q_proj,down_proj")
    cache = 2 * 4 * 2 * 3 * 2 * 8  # keys and values, fp32, 2 layers, 3 slots, 2 heads of 8: bytes of a token
    copies = 4 * 2 * (32 * 32 + 64 * 32) * (lora == "fused")
    assert decoder.extra_bytes(model, 3, 32, lora) == cache * 32 + copies
    decoder.load(model, Loading(lora=lora))
    decoder.allocate(3, 32)
    taken = [*decoder.cache, *decoder._copies._kept.values()]
    assert sum(tensor.nbytes for tensor in taken) == cache * 32 + copies
    decoder.unload()
    assert decoder.extra_bytes(model, 2, 20, lora) == 0 and decoder.extra_bytes(model, 2, 33, lora) == cache * 16


@pytest.mark.parametrize("lora", ["fused", "unfused"])
def test_one_base_may_carry_an_adapter_for_each_role(lora):
    """The requested adapter is applied, even where peft's active ones are the others."""
    model = with_lora(make_model())
    first = responses(run(model, PROMPTS, GREEDY, lora=lora))
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    del model.peft_config  # else peft warns of a second adapter
    inject_adapter_in_model(config, model, adapter_name="value")
    for name, parameter in model.named_parameters():
        if ".value." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    decoder = LlamaDecoder(keep_copies=True)
    settings = {"seed": 0, "slots": 8, "decoder": decoder}
    own, other = Loading(lora=lora), Loading("value", lora)
    second = responses(generate_responses(model, PROMPTS, GREEDY, ENDS, how=other, **settings))
    assert responses(generate_responses(model, PROMPTS, GREEDY, ENDS, how=own, **settings)) == first != second
    assert responses(generate_responses(model, PROMPTS, GREEDY, ENDS, how=other, **settings)) == second
    for layer in lora_layers(model).values():
        layer._active_adapter = ["value"]
    assert second == greedy_of_transformers(model, PROMPTS)
    with pytest.raises(ValueError, match="no LoRA adapter 'reward'; the model has default, value"):
        decoder.load(model, Loading("reward"))


@pytest.mark.parametrize("keep_copies", [True, False])
def test_kept_copies_are_refilled_and_others_freed(keep_copies, monkeypatch):
    """Pinned memory must not hold on to old weights."""
    monkeypatch.setattr(decoder_module, "can_pack", lambda weight: False)
    model = with_lora(make_model())
    decoder = LlamaDecoder(keep_copies=keep_copies)
    settings = {"seed": 0, "slots": 8, "decoder": decoder}
    first = responses(generate_responses(model, PROMPTS, GREEDY, ENDS, **settings))
    addresses = {name: tensor.data_ptr() for name, tensor in decoder._copies._kept.items()}
    assert bool(addresses) == keep_copies
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    second = responses(generate_responses(model, PROMPTS, GREEDY, ENDS, **settings))
    assert first != second == greedy_of_transformers(model, PROMPTS)
    assert addresses == {name: tensor.data_ptr() for name, tensor in decoder._copies._kept.items()}


# --- on the weights being trained ------------------------------------------------------------------------------------


def switch_and_compare(paths, tokenizer_path: str, cases: list[dict]) -> list[int]:
    """For each case: the engine's greedy tokens equal transformers' on the same weights, before and after a step."""
    from utils.models.tokenizer import load_tokenizer

    tokenizer, agreements = load_tokenizer(tokenizer_path), []
    for case in cases:
        config = make_config(paths, **case)
        setup = make_setup(config, tokenizer)
        prompts = make_prompts(config, len(tokenizer))
        seen = []
        for _ in range(2):
            with generation_mode(setup.actor) as model:
                found = generate_responses(model, prompts, GREEDY, ENDS, seed=0, slots=3, decoder=setup.decoder)
                mine = responses(found)
                assert mine == greedy_of_transformers(model, prompts), case
            samples = rollout(setup, prompts, seed=1)
            assert samples.metrics["ppo/sampling_logprob_difference_max"] < 1e-3, case
            update(setup.roles, samples.micro_batches, config, what="test")
            seen.append(mine)
        agreements.append(sum(a == b for a, b in zip(*seen, strict=True)))
    return agreements


CASES = [
    {"actor_zero_stage": stage, "actor_lora_dim": lora, "actor_learning_rate": 0.05, "actor_lora_learning_rate": 0.05}
    for stage in range(4)
    for lora in (0, 4)
]


@pytest.mark.parametrize("operations", ["small model"], indirect=True)
def test_the_next_rollout_uses_the_weights_of_the_last_optimizer_step(tiny_tokenizer, tmp_path):
    paths = save_models(tmp_path, tiny_tokenizer)
    arguments = (paths, paths["actor_model_name_or_path"], CASES)
    for agreements in run_ranks(switch_and_compare, 2, *arguments):
        # after an optimiser step with a large rate the next rollout must show the new weights
        assert all(agreement < 8 for agreement in agreements), agreements
