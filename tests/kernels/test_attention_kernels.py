"""The compiled operations between the matrix products of attention against PyTorch's; the passes over logits as well
do not depend on threads."""

import pytest
import torch

from utils.kernels import attention, vocabulary
from utils.kernels.native import usable

pytestmark = pytest.mark.skipif(not usable(torch.zeros(1)), reason="needs a C++ compiler")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "first"), [(1, 0), (5, 0), (33, 0), (20, 31)])
def test_causal_softmax_and_its_gradient(queries, first, dtype):
    generator = torch.Generator().manual_seed(0)
    scores, gradient = (torch.randn(3, queries, first + queries, generator=generator).to(dtype) for _ in range(2))
    seen = torch.arange(first + queries) <= first + torch.arange(queries)[:, None]
    exact = scores.double().masked_fill(~seen, -torch.inf).requires_grad_()
    expected = exact.softmax(-1)
    attention.causal_softmax_(scores, first)
    tolerance = {"atol": 1e-6, "rtol": 1e-5 if dtype == torch.float32 else 2**-8}
    torch.testing.assert_close(scores.double(), expected, **tolerance)
    assert not scores[:, ~seen].any()
    weights = scores.double()  # as they are rounded
    of_scores = weights * (gradient.double() - (gradient.double() * weights).sum(-1, keepdim=True))
    attention.causal_softmax_backward_(gradient, scores, first)
    torch.testing.assert_close(gradient.double(), of_scores, **tolerance)


def test_heads_are_gathered_repeated_and_added_up():
    """Two sequences of 3 and 2 tokens, one head read by two queries' heads."""
    tokens = torch.arange(1.0, 11.0).view(5, 1, 2)
    places = torch.tensor([0, 1, 2, 3, 4])
    rectangle = attention.gather_heads(tokens, places, sequences=2, width=3, query_heads=2)
    first, second = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [[7.0, 8.0], [9.0, 10.0], [0.0, 0.0]]
    assert rectangle.tolist() == [first, first, second, second]
    back = torch.empty_like(tokens)
    attention.scatter_heads(rectangle, places, back, query_heads=2)
    assert torch.equal(back, 2 * tokens)


def test_threads_change_nothing():
    generator = torch.Generator().manual_seed(0)
    scores, logits, tokens = (
        torch.randn(*shape, generator=generator).bfloat16() for shape in ((40, 30, 50), (40, 1100), (600, 2, 48))
    )
    targets, threads, results = torch.arange(40), torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        weights, gradient = scores.clone(), scores.clone()
        attention.causal_softmax_(weights, 20)
        attention.causal_softmax_backward_(gradient, weights, 20)
        normalizer, at_target, entropy = torch.empty(3, 40)
        vocabulary.log_normalize(logits, targets, 0.7, normalizer=normalizer, at_target=at_target, entropy=entropy)
        of_logits = logits.clone()
        vocabulary.log_normalize_backward(
            of_logits, targets, 0.7, normalizer=normalizer, entropy=entropy, of_logprobs=at_target, of_entropy=entropy
        )
        rectangle = attention.gather_heads(tokens, None, sequences=3, width=200, query_heads=4)
        results.append([weights, gradient, normalizer, at_target, entropy, of_logits, rectangle])
    torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other, strict=True))
