"""LLaMA's layers with the compiled operations of `utils.kernels` between their matrix products, on a CPU.

`fuse_layers` gives modules of `transformers` these classes: same parameters, names and hooks, a different forward.
Where the operations do not exist for a tensor (a GPU, fp16, no compiler), the forward is transformers' own. On the meta
device it is the CPU's, because only what it saves for the backward pass matters there.
"""

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from utils.kernels import training
from utils.kernels.native import DTYPES, library, usable


def _fuses(x: Tensor, weight: Tensor) -> bool:
    if x.dtype != weight.dtype:
        return False
    return usable(x) or (x.is_meta and x.dtype in DTYPES and library() is not None)


class FusedRMSNorm(LlamaRMSNorm):
    """Saves its input and one number per token for the backward pass."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _fuses(hidden_states, self.weight):
            return super().forward(hidden_states)
        return training.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class GatedLinear(nn.Linear):
    """The last matrix of an MLP, whose input is silu(gate) * up: given both, it does not save their product.

    Everything happens in this module's forward, because DeepSpeed's ZeRO-3 hooks gather the matrix for it.
    """

    def forward(self, inputs: Tensor, up: Tensor | None = None) -> Tensor:
        if up is None:
            return super().forward(inputs)
        return training.swiglu_linear(inputs, up, self.weight, self.bias)


class FusedMLP(LlamaMLP):
    """Saves its input, gate and up for the backward pass; with LoRA on the last matrix, their product too."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not _fuses(gate, up):
            return self.down_proj(self.act_fn(gate) * up)
        if isinstance(self.down_proj, GatedLinear) and gate.dtype == self.down_proj.weight.dtype:
            return self.down_proj(gate, up)
        return self.down_proj(training.swiglu(gate, up))


class FusedAttention(LlamaAttention):
    """Rotates queries and keys of packed rows in one operation each, which saves neither for the backward pass."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values=None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        cos, sin = position_embeddings
        packed = kwargs.get("layout") is not None and past_key_values is None and len(hidden_states) == 1
        if not packed or not _fuses(hidden_states, cos):
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        query, key, value = (
            projection(hidden_states)[0].unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (training.rotary(tensor, cos[0], sin[0]) for tensor in (query, key))
        attended, weights = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation](
            self,
            *(tensor.transpose(0, 1)[None] for tensor in (query, key, value)),
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attended.flatten(2)), weights


FUSED = {LlamaRMSNorm: FusedRMSNorm, LlamaMLP: FusedMLP, LlamaAttention: FusedAttention}


def fuse_layers(model: nn.Module) -> None:
    """Let the unmodified LLaMA layers of `model` use the compiled operations where these are available."""
    for module in model.modules():
        fused = FUSED.get(type(module))
        if fused is None or (fused is FusedMLP and not _fusible(module)):
            continue
        module.__class__ = fused
        if fused is FusedMLP:
            module.down_proj.__class__ = GatedLinear


def _fusible(mlp: LlamaMLP) -> bool:
    return mlp.config.hidden_act == "silu" and type(mlp.down_proj) is nn.Linear


def unfuse_layers(model: nn.Module) -> None:
    """Undo `fuse_layers`."""
    originals = {fused: original for original, fused in FUSED.items()} | {GatedLinear: nn.Linear}
    for module in model.modules():
        module.__class__ = originals.get(type(module), type(module))
