"""Sequences laid end to end: what each computes is what it computes alone."""

import pytest
import torch
import transformers
from tiny_models import SIZES, save_causal_lm, save_reward_model

import utils.models.matmul_attention as matmul_module
import utils.models.packed_attention as module
from utils.models.loading import load_causal_lm, load_scalar_model
from utils.models.packed_attention import PACKED, pack
from utils.preflight.activations import saved_storages
from utils.zero import zero_config

ZERO = zero_config(0, "fp32")


def masks(*rows: str) -> torch.Tensor:
    return torch.tensor([[character == "x" for character in row] for row in rows])


def test_layout_puts_the_longest_sequence_first_and_knows_where_each_token_came_from():
    layout = pack(masks("..xx.", "xxxxx", ".....", "...xx", "xxx.."))
    assert layout.index.tolist() == [5, 6, 7, 8, 9, 20, 21, 22, 2, 3, 18, 19]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 0, 1]]
    assert layout.boundaries.tolist() == [0, 5, 8, 10, 12] and layout.longest == 5
    first, second = layout.groups  # 5 and 3 differ by less than a factor of two, 2 and 5 do not
    assert (first.tokens, first.sequences, first.width) == (8, 2, 5)
    assert first.places.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert (second.tokens, second.sequences, second.width, second.places) == (4, 2, 2, None)


def random_batch(vocabulary: int, lengths: list[int], *, left: bool):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (len(lengths), max(lengths)), generator=generator)
    columns = torch.arange(max(lengths))
    sizes = torch.tensor(lengths)[:, None]
    mask = columns >= max(lengths) - sizes if left else columns < sizes
    return ids, mask


@pytest.mark.parametrize("architecture", SIZES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_and_padded_rows_give_the_same_log_probabilities_and_gradients(
    architecture, checkpointing, tiny_tokenizer, tmp_path
):
    folder = save_causal_lm(tmp_path, tiny_tokenizer, architecture)
    packed, padded = (
        load_causal_lm(str(folder), tiny_tokenizer, ZERO, dtype="fp32", dropout=0.0, gradient_checkpointing=use)
        for use in (checkpointing, False)
    )
    padded.model.set_attn_implementation("sdpa")
    assert packed.model.config._attn_implementation == PACKED
    ids, mask = random_batch(len(tiny_tokenizer), [3, 17, 9, 16, 2], left=False)
    targets = mask & (torch.arange(ids.size(1)) > 0)
    results = []
    for model in (packed.train(), padded.train()):
        logprobs, entropy = model(ids, mask, targets, with_entropy=True)
        (logprobs.square().mean() + entropy.mean()).backward()
        results.append((logprobs.detach(), entropy.detach(), {n: p.grad for n, p in model.named_parameters()}))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def test_scores_of_a_packed_batch_equal_those_of_each_row_alone(tiny_tokenizer, tmp_path):
    model = load_scalar_model(
        str(save_reward_model(tmp_path, tiny_tokenizer)), tiny_tokenizer, ZERO, dtype="fp32"
    ).eval()
    ids, mask = random_batch(len(tiny_tokenizer), [4, 11, 7], left=True)
    with torch.no_grad():
        scores = model(ids, mask)
        for row in range(3):
            alone = model(ids[row : row + 1, mask[row]], torch.ones(1, int(mask[row].sum())))
            torch.testing.assert_close(scores[row, mask[row]], alone[0], atol=1e-5, rtol=1e-5)
    assert not scores[~mask].any()


@pytest.fixture(params=["compiled", "torch"])
def operations(request, monkeypatch):
    """A test runs on the compiled operations and on PyTorch's."""
    if request.param == "torch":
        monkeypatch.setattr(matmul_module, "usable", lambda tensor: False)
    elif not matmul_module.usable(torch.zeros(1)):
        pytest.skip("needs a C++ compiler")


@pytest.mark.usefixtures("operations")
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_as_matrix_products_equals_the_fused_kernel(key_heads, scaling, monkeypatch):
    monkeypatch.setattr(matmul_module, "QUERY_BLOCK", 17)  # 40 queries make two blocks and a rest
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(3, heads, 40, 8, generator=generator).requires_grad_() for heads in (4, key_heads, key_heads)]
    expected = torch.nn.functional.scaled_dot_product_attention(*states, is_causal=True, scale=scaling, enable_gqa=True)
    with torch.no_grad():
        found = matmul_module.matmul_attention(*states, scaling)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found = matmul_module.matmul_attention(*states, scaling)
    results = [[out, *torch.autograd.grad(out.square().sum(), states)] for out in (found, expected)]
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("operations")
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_packed_attention_has_the_gradients_of_the_fused_kernel(key_heads, scaling, monkeypatch):
    """Three groups, one of them uneven, in several blocks; the other side computes each sequence alone."""
    monkeypatch.setattr(matmul_module, "QUERY_BLOCK", 17)
    lengths = [41, 29, 4, 1]
    layout = pack(torch.arange(41) < torch.tensor(lengths)[:, None])
    assert [(group.tokens, group.places is None) for group in layout.groups] == [(70, False), (4, True), (1, True)]
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(75, heads, 8, generator=generator).requires_grad_() for heads in (4, key_heads, key_heads)]
    weights = torch.randn(75, 4, 8, generator=generator)
    found = matmul_module.PackedMatmulAttention.apply(*states, layout.groups, scaling)
    expected = torch.cat([
        torch.nn.functional.scaled_dot_product_attention(
            *(part.transpose(0, 1) for part in parts), is_causal=True, scale=scaling, enable_gqa=True
        ).transpose(0, 1)
        for parts in zip(*(state.split(lengths) for state in states), strict=True)
    ])  # fmt: skip
    results = [[out, *torch.autograd.grad((out * weights).sum(), states)] for out in (found, expected)]
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("operations")
def test_groups_beyond_the_width_of_matrix_products_take_the_fused_kernel(monkeypatch):
    """Two groups, one on either side of the width, in bf16 against all in fp32."""
    monkeypatch.setattr(matmul_module, "MATMUL_WIDTH", 20)
    layout = pack(torch.arange(41) < torch.tensor([[41], [17], [12]]))
    states = [torch.randn(1, 2, 70, 8).bfloat16() for _ in range(3)]
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [state.to(dtype).requires_grad_() for state in states]
        attended, _ = module.attend(None, *inputs, None, layout=layout)
        gradients = torch.autograd.grad(attended.float().square().sum(), inputs)
        results.append([tensor.float() for tensor in (attended, *gradients)])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < 0.02 * expected.norm()


def test_packed_attention_by_matrix_products_keeps_its_inputs_alone():
    layout = pack(torch.arange(200) < torch.tensor([[200], [150], [30]]))
    states = [torch.randn(1, 2, 380, 8).bfloat16().requires_grad_() for _ in range(3)]
    kept = saved_storages(lambda: module.attend(None, *states, None, layout=layout)[0])
    assert sum(kept.values()) == 3 * 2 * 380 * 8 * 2


def test_bf16_on_a_cpu_takes_the_matrix_products_for_short_sequences_only(monkeypatch):
    taken = []
    monkeypatch.setattr(
        matmul_module.PackedMatmulAttention, "apply", lambda query, *others: taken.append(query) or query
    )
    layout = pack(torch.ones(2, 6))
    states = torch.randn(1, 2, 12, 8)
    module.attend(None, states, states, states, None, layout=layout)
    assert not taken
    module.attend(None, *[states.bfloat16()] * 3, None, layout=layout)
    assert len(taken) == 1
    monkeypatch.setattr(matmul_module, "MATMUL_WIDTH", 5)
    module.attend(None, *[states.bfloat16()] * 3, None, layout=layout)
    assert len(taken) == 1


def test_no_layer_computes_padding(tiny_tokenizer, tmp_path):
    model = load_causal_lm(str(save_causal_lm(tmp_path, tiny_tokenizer)), tiny_tokenizer, ZERO, dtype="fp32")
    seen = []
    model.model.model.layers[0].mlp.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0].shape))
    ids, mask = random_batch(len(tiny_tokenizer), [3, 17, 9], left=True)
    model(ids, mask, mask & (torch.arange(17) > 16))
    assert seen == [(1, 29, 32)]


def test_an_architecture_that_is_not_known_to_pack_computes_the_padded_batch(tiny_tokenizer, tmp_path):
    config = transformers.BloomConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, n_layer=2, n_head=4, pad_token_id=0, hidden_dropout=0.0
    )
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    reference.save_pretrained(tmp_path)
    model = load_causal_lm(str(tmp_path), tiny_tokenizer, ZERO, dtype="fp32").eval()
    assert model.model.config._attn_implementation != PACKED
    ids, mask = random_batch(len(tiny_tokenizer), [5, 12], left=False)
    with torch.no_grad():
        found, _ = model(ids, mask, mask & (torch.arange(12) == 4))
        expected = torch.log_softmax(reference(ids[:1, :5]).logits[0, 3], -1)[ids[0, 4]]
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)


def test_the_saved_model_knows_nothing_of_packing(tiny_tokenizer, tmp_path):
    model = load_causal_lm(str(save_causal_lm(tmp_path, tiny_tokenizer)), tiny_tokenizer, ZERO, dtype="fp32")
    model.model.save_pretrained(tmp_path / "out")
    assert PACKED not in (tmp_path / "out" / "config.json").read_text()
    reopened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(reopened.lm_head, torch.nn.Linear)


@pytest.mark.gpu
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_varlen_kernel_equals_padded_groups_with_its_gradients(key_heads, dtype, monkeypatch):
    """The kernel in 16 bits against the padded groups in fp32, from the same numbers."""
    mask = masks("xxxxxxxx" * 4, "xxx....." * 1 + "........" * 3, "xxxxxxxx" * 2 + "........" * 2).cuda()
    layout, heads = pack(mask), (4, key_heads, key_heads)
    generator = torch.Generator("cuda").manual_seed(0)
    states = [
        torch.randn(1, count, len(layout.index), 64, generator=generator, device="cuda").to(dtype) for count in heads
    ]
    weights = torch.randn(1, len(layout.index), 4, 64, generator=generator, device="cuda")
    calls, kernel = [], module.varlen_attn
    monkeypatch.setattr(module, "varlen_attn", lambda *args, **kwargs: calls.append(1) or kernel(*args, **kwargs))
    results = []
    for inputs in (states, [state.float() for state in states]):
        inputs = [state.requires_grad_() for state in inputs]
        attended, _ = module.attend(None, *inputs, None, scaling=0.125, layout=layout)
        gradients = torch.autograd.grad((attended.float() * weights).sum(), inputs)
        results.append([tensor.float() for tensor in (attended, *gradients)])
    assert len(calls) == 1, "only the first of the two takes the kernel"
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < 0.02 * expected.norm()
        torch.testing.assert_close(found, expected, atol=0.1, rtol=0.05)
