"""The operations of a decode step against the same mathematics in fp64, also at sizes that do not fill a vector."""

import math

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from utils.generation.sampling import RowSampling, SamplingParams, choose_tokens, row_keys, uniform
from utils.kernels import decoding, native

pytestmark = pytest.mark.skipif(native.library() is None, reason="this machine compiles no operations")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS = [(1, 1, 8), (4, 4, 24), (6, 2, 48), (5, 1, 80), (8, 2, 64), (9, 1, 16), (4, 1, 144)]  # Q, K, D


@pytest.fixture(params=[1, 2])
def threads(request):
    """Small sizes are computed by one thread in any case."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=DTYPES)
def dtype(request) -> torch.dtype:
    return DTYPES[request.param]


def close(found: torch.Tensor, expected: torch.Tensor, scale: float = 1.0) -> None:
    """Within a few roundings of the result's own number format."""
    tolerance = scale * (2e-6 if found.dtype == torch.float32 else 1e-2)
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("rows, size", [(1, 8), (3, 24), (5, 288), (130, 301)])
@pytest.mark.parametrize("with_added", [False, True])
def test_residual_and_norm_are_those_of_transformers_to_the_bit(dtype, threads, rows, size, with_added):
    norm = LlamaRMSNorm(size, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    residual = torch.randn(rows, size).to(dtype)
    added = torch.randn(rows, size).to(dtype) if with_added else None
    expected = residual + added if with_added else residual.clone()
    normed = torch.empty_like(residual)
    decoding.add_rms_norm(residual, added, norm.weight, normed, 1e-5)
    assert torch.equal(residual, expected)
    with torch.no_grad():
        wanted = norm(expected)
    if dtype == torch.float32:
        torch.testing.assert_close(normed, wanted, atol=1e-6, rtol=1e-6)
    else:  # the sum of squares is added up in another order, which may change a rounding
        assert (normed != wanted).float().mean() < 0.01
        torch.testing.assert_close(normed, wanted, atol=0, rtol=2**-7)


def tables(positions: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, and sin with the sign of rotate_half."""
    angles = torch.arange(positions)[:, None] / 10_000 ** (torch.arange(0, size, 2) / size)
    sign = torch.cat([-torch.ones(size // 2), torch.ones(size // 2)])
    return angles.cos().repeat(1, 2).to(dtype), (angles.sin().repeat(1, 2) * sign).to(dtype)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(..., D) in fp64, by tables that hold one row for each."""
    return x.double() * cos.double() + x.double().roll(x.size(-1) // 2, -1) * sin.double()


def attention(queries, keys, values, lengths):
    """(n, Q, D) queries, (n, K, T, D) keys and values, each row's first `lengths`; fp64."""
    group = queries.size(1) // keys.size(1)
    keys, values = (part.double().repeat_interleave(group, 1) for part in (keys, values))
    scores = (keys @ queries.double()[..., None]).squeeze(-1) / math.sqrt(queries.size(-1))
    hidden = torch.arange(keys.size(2)) >= lengths[:, None, None]
    return (scores.masked_fill(hidden, -math.inf).softmax(-1)[:, :, None] @ values).squeeze(2).flatten(1)


@pytest.mark.parametrize("query_heads, kv_heads, size", HEADS)
def test_a_token_attends_to_its_own_past_alone(dtype, threads, query_heads, kv_heads, size):
    capacity, positions = 96, torch.tensor([0, 1, 15, 16, 17, 63, 95])
    rows, slots = len(positions), len(positions) + 1
    cos, sin = tables(capacity, size, dtype)
    keys = torch.randn(slots, kv_heads, size, capacity).to(dtype)
    values = torch.randn(slots, kv_heads, capacity, size).to(dtype)
    for row, position in enumerate(positions.tolist()):  # what earlier rows have left there
        keys[row, :, :, position:], values[row, :, position:] = 1e4, -1e4
    others = keys[-1].clone(), values[-1].clone()
    projected = torch.randn(rows, (query_heads + 2 * kv_heads) * size).to(dtype)
    found = decoding.decode_attention(
        projected, cos, sin, positions, keys, values, query_heads=query_heads, scale=1 / math.sqrt(size)
    )

    queries, fresh_keys, fresh_values = projected.view(rows, -1, size).split((query_heads, kv_heads, kv_heads), 1)
    cos, sin = cos[positions][:, None], sin[positions][:, None]
    row = torch.arange(rows)
    assert torch.equal(values[row, :, positions], fresh_values)
    close(keys[row, :, :, positions], rotated(fresh_keys, cos, sin))
    expected = attention(rotated(queries, cos, sin), keys[:-1].transpose(2, 3), values[:-1], positions + 1)
    close(found, expected, scale=3)
    assert torch.equal(keys[-1], others[0]) and torch.equal(values[-1], others[1])


@pytest.mark.parametrize("query_heads, kv_heads, size", HEADS)
@pytest.mark.parametrize("width", [1, 6, 16, 37])
def test_prompts_are_what_their_tokens_are_one_by_one(dtype, threads, query_heads, kv_heads, size, width):
    rows, capacity = 3, 48
    cos, sin = tables(capacity, size, dtype)
    projected = torch.randn(rows, width, (query_heads + 2 * kv_heads) * size).to(dtype)
    keys = torch.full((rows, kv_heads, size, capacity), 7.0).to(dtype)
    values = torch.full((rows, kv_heads, capacity, size), 7.0).to(dtype)
    step_keys, step_values = keys.clone(), values.clone()
    found = decoding.attend_prompts(projected, cos, sin, keys, values, query_heads=query_heads, scale=0.2)
    for place in range(width):
        one = decoding.decode_attention(
            projected[:, place].contiguous(), cos, sin, torch.full((rows,), place), step_keys, step_values,
            query_heads=query_heads, scale=0.2,
        )  # fmt: skip
        close(found[:, place], one.double())
    assert torch.equal(keys, step_keys) and torch.equal(values, step_values)
    assert (keys[..., width:] == 7).all() and (values[:, :, width:] == 7).all()


def test_gates_over_the_whole_range_of_numbers(dtype, threads):
    gate = torch.cat([torch.linspace(-120, 120, 997), torch.tensor([0.0, -0.0, 1e4, -1e4, 1e30, -1e30])]).to(dtype)
    up = torch.randn(len(gate)).to(dtype)
    found = decoding.gated(torch.cat([gate, up])[None])
    gate = gate.double()
    expected = gate * torch.sigmoid(gate) * up.double()
    torch.testing.assert_close(found[0].double(), expected, atol=1e-35, rtol=3e-6 if dtype == torch.float32 else 1e-2)
    assert decoding.gated(torch.tensor([[math.nan, 1.0]], dtype=dtype)).isnan().all()
    rows = torch.randn(130, 2 * 301).to(dtype)
    close(decoding.gated(rows), (lambda g, u: g * torch.sigmoid(g) * u)(*rows.double().chunk(2, -1)))


@pytest.mark.parametrize("outputs, size", [(5, 3), (16, 8), (33, 40), (48, 128), (320, 128)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_row_of_a_small_product_does_not_depend_on_the_others(dtype, threads, outputs, size, with_bias):
    weight, bias = torch.randn(outputs, size).to(dtype), torch.randn(outputs).to(dtype) if with_bias else None
    inputs, matrix = torch.randn(31, size).to(dtype), decoding.panels(weight)
    together = decoding.small_product(inputs, matrix, outputs, bias)
    expected = inputs.double() @ weight.double().t() + (bias.double() if with_bias else 0)
    close(together, expected, scale=math.sqrt(size))
    for rows in (1, 2, 4, 7, 8, 13):
        assert torch.equal(decoding.small_product(inputs[:rows], matrix, outputs, bias), together[:rows])


@pytest.mark.parametrize("sampling", [
    SamplingParams(max_new_tokens=1), SamplingParams(max_new_tokens=1, temperature=0.6),
    SamplingParams(max_new_tokens=1, min_new_tokens=3), SamplingParams(max_new_tokens=1, greedy=True, min_new_tokens=3),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("words", [5, 97, 128, 5000])
def test_tokens_are_those_that_pytorch_chooses(dtype, threads, monkeypatch, sampling, words):
    logits = (3 * torch.randn(400, words)).to(dtype)
    logits[:, 1] = 12  # the one that may be forbidden matters
    keys, counters = row_keys(1, range(400)), torch.arange(400) % 7
    kept = logits.clone()
    tokens, logprobs = choose_tokens(logits, RowSampling.of([sampling] * 400), keys, counters, eos_id=1)
    assert torch.equal(logits, kept)
    monkeypatch.setattr(native, "library", lambda: None)
    expected, expected_logprobs = choose_tokens(logits, RowSampling.of([sampling] * 400), keys, counters, eos_id=1)
    same = tokens == expected
    assert same.float().mean() > 0.99  # sums in another order decide otherwise where the number lies between two words
    torch.testing.assert_close(logprobs[same], expected_logprobs[same], atol=2e-5, rtol=2e-5)
    if sampling.min_new_tokens:
        assert not (tokens[counters < 3] == 1).any() and (tokens[counters >= 3] == 1).any()


def test_the_last_words_are_found_and_words_without_weight_never():
    """Only words at the ends of blocks have weight: rounding must not select another one."""
    words = 128 * 5 + 3
    allowed = torch.tensor([0, 127, 128, 511, 639, 642])
    logits = torch.full((words,), -math.inf)
    logits[allowed] = 0.0
    rows = 6000
    tokens, logprobs = choose_tokens(
        logits.repeat(rows, 1), RowSampling.of([SamplingParams(max_new_tokens=1)] * rows),
        torch.zeros(rows, dtype=torch.int64), torch.arange(rows), eos_id=0,
    )  # fmt: skip
    counts = torch.bincount(tokens, minlength=words)
    assert counts.sum() == counts[allowed].sum() and (counts[allowed] - rows / 6).abs().max() < 150
    torch.testing.assert_close(logprobs, torch.full((rows,), -math.log(6)))


SMALLEST_KEY, LARGEST_KEY = 1_612_200, 10_786_582  # whose first uniform numbers are 0 and 1 - 2^-23


def test_the_smallest_and_the_largest_number_choose_words_with_weight():
    keys, counters = torch.tensor([SMALLEST_KEY, LARGEST_KEY]), torch.zeros(2, dtype=torch.int64)
    assert uniform(keys, counters).tolist() == [0.0, 1 - 2.0**-23]
    logits = torch.full((2, 300), -math.inf)
    # a block whose sum, vector by vector in fp32, exceeds that of its words, so that the search runs off its end
    logits[:, 130:250:16], logits[:, 130] = math.log(8e-8), 0.0
    tokens, _ = choose_tokens(logits, RowSampling.of([SamplingParams(max_new_tokens=1)] * 2), keys, counters, eos_id=0)
    assert tokens.tolist() == [130, 242]


def test_a_whole_small_model_is_what_its_layers_are(monkeypatch):
    """`small_step` against the same operations called one by one, bit for bit."""
    from utils.generation.decoder import LlamaDecoder
    from utils.generation.passes import small

    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=48, intermediate_size=72, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    decoder = LlamaDecoder()
    decoder.load(model)
    assert decoder._small is not None
    decoder.allocate(5, 40)
    tokens, positions = torch.tensor([5, 9, 100]), torch.tensor([0, 7, 39])
    at_once = decoder.step(tokens, positions, 48)
    cache = [part.clone() for part in decoder.cache]
    decoder.release_cache()
    decoder.allocate(5, 40)
    monkeypatch.setattr(decoder, "_small", None)
    monkeypatch.setattr(small.decoding, "small_step", None)
    assert torch.equal(decoder.step(tokens, positions, 48), at_once)
    assert all(torch.equal(part, other) for part, other in zip(decoder.cache, cache, strict=True))


def test_a_tensor_that_is_not_contiguous_is_refused(dtype):
    with pytest.raises(ValueError, match="gated: a tensor is not contiguous"):
        decoding.gated(torch.randn(8, 6).to(dtype).t())
