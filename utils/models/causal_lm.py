"""The causal language model that trains: a `transformers` model whose forward returns log-probabilities."""

import torch
import torch.nn.functional as F
from torch import nn

from utils.algorithms.masking import left_aligned, position_ids
from utils.kernels.shapes import rounded_rows
from utils.models.fused_layers import fuse_layers
from utils.models.packed_attention import enable_packing, token_states
from utils.models.vocabulary_head import VocabularyHead
from utils.parallel import distributed


class CausalLM(nn.Module):
    """Wraps a `transformers` causal LM; `forward` returns log-probabilities of the target tokens only.

    Rows are not padded to each other, and the vocabulary projection runs on the target positions alone. Everything
    goes through this `forward`, and so through the DeepSpeed engine's hooks (gradient reduction, ZeRO-3 gathering).

    Attributes:
        own_logits: log-probabilities come from the logits of the model's own forward, because the architecture scales
            or clips something around its head; see `find_own_logits`.
    """

    own_logits = False

    def __init__(self, model: nn.Module):
        super().__init__()
        enable_packing(model)
        fuse_layers(model)
        model.set_output_embeddings(VocabularyHead(model.get_output_embeddings()))
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        target_mask: torch.Tensor,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
        prompt_lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities of `input_ids` where `target_mask` is true, each given the tokens before it.

        Args:
            input_ids, attention_mask, target_mask: (B, T), padded on either side; the first token of a row is never a
                target.
            prompt_lengths: (B/2,) the first tokens that rows i and B/2 + i of a batch padded on the right have in
                common; they are computed once, where the architecture is packed.

        Returns:
            (N,) fp32 log-probabilities in row-major order of the mask, and (N,) entropies or None.
        """
        if self.own_logits:
            return self._from_logits(input_ids, attention_mask, target_mask, temperature, with_entropy)
        states, layout = token_states(self.model.base_model, input_ids, attention_mask, prompt_lengths)
        predicted = target_mask.flatten()[layout.index].nonzero().squeeze(1)
        order = layout.index[predicted].argsort()  # back to the order of the flattened batch
        rows = F.pad(predicted, (0, rounded_rows(len(predicted), states.device) - len(predicted)), value=1)
        targets = input_ids.flatten()[layout.index[rows]]
        logprobs, entropy = self.model.get_output_embeddings()(
            states[layout.in_row(rows - 1)], targets, temperature=temperature, with_entropy=with_entropy
        )
        return logprobs[order], entropy[order] if with_entropy else None

    def _from_logits(self, input_ids, attention_mask, target_mask, temperature: float, with_entropy: bool):
        mask, ids, targets = left_aligned(attention_mask.bool(), input_ids, target_mask)
        targets = targets & mask
        logits = self.model(ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False).logits[:, :-1]
        distribution = (logits[targets[:, 1:]].float() / temperature).log_softmax(-1)
        entropy = -(distribution.exp() * distribution).sum(-1) if with_entropy else None
        return distribution.gather(1, ids[:, 1:][targets[:, 1:]][:, None]).squeeze(1), entropy


@torch.no_grad()
def find_own_logits(wrapper: CausalLM) -> bool:
    """Set `own_logits` by running the model on a few tokens, and return it. All ranks must call it.

    It is False where the head gets the last hidden states unchanged and its output is the logits, as in LLaMA. Other
    models scale the states before the head, or scale or clip the logits after it (Gemma2, Cohere, Granite, Falcon-H1,
    ...).

    This calls the inner model, not the module whose forward passes DeepSpeed counts: ZeRO-3 gathers each layer's
    weights, but does not record an order of modules for later prefetching.
    """
    model, training, seen = wrapper.model, wrapper.training, {}
    base = model.base_model
    # OPT's forward calls the decoder of its base model, and not the base model itself
    parts = {"head": model.get_output_embeddings(), "model": model, "base": base, **dict(base.named_children())}

    def note(name: str):
        return lambda module, args, output: seen.update({name: (args, output)})

    hooks = [part.register_forward_hook(note(name)) for name, part in parts.items()]
    ids = torch.arange(8, device=distributed.device())[None] % model.config.vocab_size
    wrapper.eval()
    try:
        model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        wrapper.train(training)
        for hook in hooks:
            hook.remove()
    wrapper.own_logits = not _head_is_plain(seen)
    return wrapper.own_logits


def _head_is_plain(seen: dict[str, tuple]) -> bool:
    """Whether the head's input is what the base model returned, and its output the logits.

    `seen` has (arguments, output) of the modules that were called: "head", "model", and the base model and its parts.
    """
    if "head" not in seen:
        return False
    (states, *_), logits = seen.pop("head")
    _, answer = seen.pop("model")
    is_unchanged = any(_is_same(output, states) for _, output in seen.values())
    return is_unchanged and torch.equal(answer.logits.float(), logits.float())


def _is_same(output: object, states: torch.Tensor) -> bool:
    first = next(iter(output.values() if isinstance(output, dict) else output), None) if _has_parts(output) else output
    return isinstance(first, torch.Tensor) and torch.equal(first, states)


def _has_parts(output: object) -> bool:
    return isinstance(output, tuple | list | dict)
