"""The causal language model that trains: a `transformers` model whose forward answers in log-probabilities."""

import torch
import torch.nn.functional as F
from torch import nn

from utils.algorithms.masking import position_ids
from utils.kernels.shapes import rounded_rows
from utils.models.fused_layers import fuse_layers
from utils.models.packed_attention import enable_packing, token_states
from utils.models.vocabulary_head import VocabularyHead

# Architectures with one of these scale or clip their logits after the head, so only their own forward is right.
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class CausalLM(nn.Module):
    """Wraps a `transformers` causal LM; `forward` returns log-probabilities of the marked tokens only.

    Rows are not padded to each other, and the vocabulary projection runs on the marked positions alone. Everything
    goes through this `forward`, and so through the DeepSpeed engine's hooks (gradient reduction, ZeRO-3 gathering).
    """

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
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities of `input_ids` where `target_mask` is true, each given the tokens before it.

        Args:
            input_ids, attention_mask, target_mask: (B, T), padded on either side; the first token of a row is never a
                target.

        Returns:
            (N,) fp32 log-probabilities in row-major order of the mask, and (N,) entropies or None.
        """
        if any(getattr(self.model.config, name, None) for name in LOGIT_TRANSFORMS):
            return self._from_logits(input_ids, attention_mask, target_mask, temperature, with_entropy)
        states, layout = token_states(self.model.base_model, input_ids, attention_mask)
        predicted = target_mask.flatten()[layout.index].nonzero().squeeze(1)
        order = layout.index[predicted].argsort()  # of their places in the flattened batch
        rows = F.pad(predicted, (0, rounded_rows(len(predicted), states.device) - len(predicted)), value=1)
        targets = input_ids.flatten()[layout.index[rows]]
        logprobs, entropy = self.model.get_output_embeddings()(
            states[rows - 1], targets, temperature=temperature, with_entropy=with_entropy
        )
        return logprobs[order], entropy[order] if with_entropy else None

    def _from_logits(self, input_ids, attention_mask, target_mask, temperature: float, with_entropy: bool):
        logits = self.model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids(attention_mask), use_cache=False
        ).logits[:, :-1]
        distribution = (logits[target_mask[:, 1:]].float() / temperature).log_softmax(-1)
        targets = input_ids[:, 1:][target_mask[:, 1:]]
        entropy = -(distribution.exp() * distribution).sum(-1) if with_entropy else None
        return distribution.gather(1, targets[:, None]).squeeze(1), entropy
