"""Sequences laid end to end: what each computes is what it computes alone."""

import pytest
import torch
import transformers
from tiny_models import SIZES, save_causal_lm, save_reward_model

import utils.models.causal_lm as causal_lm
import utils.models.packed_attention as module
from utils.kernels import native
from utils.kernels.shapes import rounded_rows
from utils.models.loading import load_causal_lm, load_scalar_model
from utils.models.packed_attention import PACKED, packed_layout
from utils.parallel.zero import zero_config
from utils.preflight.activations import saved_storages

ZERO = zero_config(0, "fp32")


def masks(*rows: str) -> torch.Tensor:
    return torch.tensor([[character == "x" for character in row] for row in rows])


def test_layout_puts_the_longest_sequence_first_and_knows_where_each_token_came_from():
    layout = packed_layout(masks("..xx.", "xxxxx", ".....", "...xx", "xxx.."))
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


@pytest.fixture(params=["compiled", "PyTorch"])
def operations(request, monkeypatch):
    """A test runs on the compiled operations and on PyTorch's."""
    if request.param == "PyTorch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("this machine compiles no operations")


def each_alone(states, lengths, scaling):
    """PyTorch's attention of each sequence by itself, (N, heads, D)."""
    return torch.cat([
        torch.nn.functional.scaled_dot_product_attention(
            *(part.transpose(0, 1) for part in parts), is_causal=True, scale=scaling, enable_gqa=True
        ).transpose(0, 1)
        for parts in zip(*(state.split(lengths) for state in states), strict=True)
    ])  # fmt: skip


@pytest.mark.usefixtures("operations")
@pytest.mark.parametrize("heads, size", [((4, 4), 8), ((4, 2), 24), ((6, 1), 48), ((2, 2), 80), ((1, 1), 144)])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_packed_attention_and_its_gradients_are_those_of_each_sequence_alone(heads, size, scaling):
    """Several groups, one of them uneven, and tokens behind the last sequence, which get zeros."""
    lengths, spare = [41, 29, 4, 1, 17], 5
    layout = packed_layout(torch.arange(41) < torch.tensor(sorted(lengths, reverse=True))[:, None])
    lengths.sort(reverse=True)
    assert layout.groups[0].places is not None and len(layout.groups) > 1
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(sum(lengths) + spare, count, size, generator=generator).requires_grad_()
        for count in (heads[0], heads[1], heads[1])
    ]
    weights = torch.randn(states[0].shape, generator=generator)
    found, _ = module.attend_packed(
        None, *(state.transpose(0, 1)[None] for state in states), None, scaling=scaling, layout=layout
    )
    assert not found[0, sum(lengths) :].any()
    real = [state[: sum(lengths)] for state in states]
    expected = torch.cat([each_alone(real, lengths, scaling), states[0].new_zeros(spare, *states[0].shape[1:])])
    results = [[out, *torch.autograd.grad((out * weights).sum(), states)] for out in (found[0], expected)]
    torch.testing.assert_close(*results, atol=2e-5, rtol=2e-5)


@pytest.mark.usefixtures("operations")
def test_packed_attention_in_bf16_rounds_its_results_alone():
    lengths = [130, 65, 64]
    layout = packed_layout(torch.arange(130) < torch.tensor(lengths)[:, None])
    states = [torch.randn(1, 2, 259, 48, generator=torch.Generator().manual_seed(place)) for place in range(3)]
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [state.bfloat16().to(dtype).requires_grad_() for state in states]
        attended, _ = module.attend_packed(None, *inputs, None, layout=layout)
        results.append([attended, *torch.autograd.grad(attended.float().square().sum(), inputs)])
    for found, expected in zip(*results, strict=True):
        assert (found.float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.skipif(native.library() is None, reason="this machine compiles no operations")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_operation_keeps_its_inputs_alone_and_does_not_depend_on_threads(dtype):
    layout = packed_layout(torch.arange(200) < torch.tensor([[200], [150], [30]]))
    states = [torch.randn(1, 2, 380, 8).to(dtype).requires_grad_() for _ in range(3)]
    kept = saved_storages(lambda: module.attend_packed(None, *states, None, layout=layout)[0])
    assert sum(kept.values()) == 3 * 2 * 380 * 8 * dtype.itemsize
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        attended = module.attend_packed(None, *states, None, layout=layout)[0]
        results.append([attended, *torch.autograd.grad(attended.float().square().sum(), states)])
    torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_matrices_of_real_tokens_come_in_few_shapes(tiny_tokenizer, tmp_path):
    """Rows are filled up in bf16 on a CPU; what is computed for real tokens stays the same, gradients included."""
    sizes = {rounded_rows(count, torch.device("cpu")) for count in range(1024, 2049)}
    assert len(sizes) == 17 and max(sizes) == 2048
    assert all(count <= rounded_rows(count, torch.device("cpu")) <= count * 17 / 16 + 7 for count in range(5000))
    assert rounded_rows(1025, torch.device("meta")) == 1025

    model = load_causal_lm(str(save_causal_lm(tmp_path, tiny_tokenizer)), tiny_tokenizer, ZERO, dtype="fp32")
    model = model.bfloat16()
    rows = []
    model.model.model.layers[0].mlp.register_forward_hook(lambda layer, inputs, output: rows.append(inputs[0].size(1)))
    ids, mask = random_batch(len(tiny_tokenizer), [3, 17, 9], left=True)
    targets = mask & (torch.arange(17) > 14)
    results = []
    for change in (False, True):
        model.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            if not change:
                patch.setattr(module, "rounded_rows", lambda count, device: count)
                patch.setattr(causal_lm, "rounded_rows", lambda count, device: count)
            logprobs, entropy = model(ids, mask, targets, with_entropy=True)
        (logprobs.square().sum() + entropy.sum()).backward()
        results.append([logprobs.detach(), entropy.detach(), *(parameter.grad for parameter in model.parameters())])
    assert rows == [29, 32]
    for plain, filled in zip(*results, strict=True):
        assert plain.shape == filled.shape
        assert (plain.float() - filled.float()).norm() <= 0.01 * plain.float().norm()


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
    layout, heads = packed_layout(mask), (4, key_heads, key_heads)
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
        attended, _ = module.attend_packed(None, *inputs, None, scaling=0.125, layout=layout)
        gradients = torch.autograd.grad((attended.float() * weights).sum(), inputs)
        results.append([tensor.float() for tensor in (attended, *gradients)])
    assert len(calls) == 1, "only the first of the two takes the kernel"
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < 0.02 * expected.norm()
        torch.testing.assert_close(found, expected, atol=0.1, rtol=0.05)


def pairs_with_prompts(vocabulary: int, prompts: list[int], answers: list[tuple[int, int]]):
    """2B rows padded on the right, B pairs of answers to B prompts; ids, mask, targets, prompt lengths."""
    generator = torch.Generator().manual_seed(2)
    beginnings = [torch.randint(3, vocabulary, (length,), generator=generator) for length in prompts]
    rows = [
        torch.cat([beginning, torch.randint(3, vocabulary, (lengths[side],), generator=generator)])
        for side in (0, 1)
        for beginning, lengths in zip(beginnings, answers, strict=True)
    ]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    columns = torch.arange(ids.size(1))
    mask = columns < torch.tensor([len(row) for row in rows])[:, None]
    return ids, mask, mask & (columns >= torch.tensor(prompts * 2)[:, None]), torch.tensor(prompts)


@pytest.mark.parametrize("architecture", SIZES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_prompt_that_two_answers_share_is_computed_once_with_the_same_result(
    architecture, checkpointing, tiny_tokenizer, tmp_path, monkeypatch
):
    folder = save_causal_lm(tmp_path, tiny_tokenizer, architecture)
    model = load_causal_lm(
        str(folder), tiny_tokenizer, ZERO, dtype="fp32", dropout=0.0, gradient_checkpointing=checkpointing
    ).train()
    ids, mask, targets, prompts = pairs_with_prompts(len(tiny_tokenizer), [12, 1, 7], [(3, 5), (4, 2), (1, 6)])
    tokens = []
    embedding = model.model.get_input_embeddings()
    embedding.register_forward_hook(lambda layer, inputs, output: tokens.append(inputs[0].numel()))
    weights = torch.randn(int(targets.sum()), generator=torch.Generator().manual_seed(1))
    results = []
    for lengths in (None, prompts):
        model.zero_grad()
        logprobs, _ = model(ids, mask, targets, prompt_lengths=lengths)
        (logprobs * weights).sum().backward()
        results.append((logprobs.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-5)
    largest = max(gradient.abs().max().item() for gradient in results[0][1].values())
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-5 * largest, rtol=1e-4)
    assert tokens == [int(mask.sum()), int(mask.sum() - prompts.sum())]


def test_scores_with_shared_prompts_stand_where_they_stand_without(tiny_tokenizer, tmp_path):
    model = load_scalar_model(
        str(save_reward_model(tmp_path, tiny_tokenizer)), tiny_tokenizer, ZERO, dtype="fp32"
    ).eval()
    ids, mask, _, prompts = pairs_with_prompts(len(tiny_tokenizer), [12, 9], [(3, 5), (4, 2)])
    with torch.no_grad():
        torch.testing.assert_close(model(ids, mask, prompt_lengths=prompts), model(ids, mask), atol=1e-5, rtol=1e-5)


def test_short_prompts_are_not_worth_sharing():
    _, mask, _, prompts = pairs_with_prompts(50, [1, 1], [(40, 30), (35, 50)])
    assert packed_layout(mask, prompts).shared is None
    _, mask, _, prompts = pairs_with_prompts(50, [0, 30], [(40, 30), (35, 50)])
    assert len(packed_layout(mask, prompts).shared.left_out) == 30, "a pair without a prompt has nothing to share"
