"""The forward passes of generation for LLaMA-shaped models, on the live training weights and a KV cache of our own.

    n   rows that decode together          H   hidden size            D   size of a head
    Q   query heads                        K   key-value heads        G = Q / K

The cache holds keys as (layers, slots, K, D, length) and values as (layers, slots, K, length, D): a part of the length
is then a matrix that batched products read in place (bf16 on a CPU copies `keys[:, :length].transpose`, which takes
three times as long as the product). The first n slots are the active rows.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import nn

from utils.models.lora import merged_weight

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # tables that do not change with the length of the sequence
CACHE_STEP = 16  # the cache is read up to a multiple of this, so that few shapes occur


@dataclass(frozen=True)
class _Layer:
    input_norm: torch.Tensor
    qkv: list[torch.Tensor]  # one fused matrix, or three
    qkv_bias: list[torch.Tensor | None]
    output: torch.Tensor
    output_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: list[torch.Tensor]  # one fused matrix, or two
    gate_up_bias: list[torch.Tensor | None]
    down: torch.Tensor
    down_bias: torch.Tensor | None


def supports(model: nn.Module) -> bool:
    """Whether `LlamaDecoder` computes what this `transformers` model computes."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type == "llama"
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in ROPE_TYPES
        and getattr(config, "pretraining_tp", 1) == 1
    )


class LlamaDecoder:
    """Prefill and decode of a `LlamaForCausalLM`.

    `load` must be called whenever weights may have changed. It keeps references to the parameters; on a CPU, where the
    cost of a step is the number of operations, it joins the matrices that read the same input into copies. LoRA is
    merged into copies of the adapted matrices, never into the training weights.
    """

    def __init__(self) -> None:
        self._cache: tuple[torch.Tensor, torch.Tensor] | None = None

    def load(self, model: nn.Module) -> None:
        """Take the weights of `model`, which must be whole (not partitioned) on this rank."""
        config = model.config
        self.query_heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.norm_eps = config.rms_norm_eps
        self.embedding = model.get_input_embeddings().weight
        self.head = model.get_output_embeddings().weight
        self.head_bias = model.get_output_embeddings().bias
        self.final_norm = model.model.norm.weight
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self.fused = self.device.type == "cpu"
        self.layers = [self._read_layer(layer) for layer in model.model.layers]
        self._rotary = model.model.rotary_emb

    def unload(self) -> None:
        """Drop the references and copies of weights; the cache stays."""
        for name in ("embedding", "head", "head_bias", "final_norm", "layers", "_rotary"):
            setattr(self, name, None)

    def release_cache(self) -> None:
        """Give the memory of the KV cache back."""
        self._cache = None

    def _read_layer(self, layer: nn.Module) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        qkv, qkv_bias = self._joined([attention.q_proj, attention.k_proj, attention.v_proj])
        gate_up, gate_up_bias = self._joined([mlp.gate_proj, mlp.up_proj])
        return _Layer(
            input_norm=layer.input_layernorm.weight,
            qkv=qkv,
            qkv_bias=qkv_bias,
            output=_weight(attention.o_proj),
            output_bias=attention.o_proj.bias,
            mlp_norm=layer.post_attention_layernorm.weight,
            gate_up=gate_up,
            gate_up_bias=gate_up_bias,
            down=_weight(mlp.down_proj),
            down_bias=mlp.down_proj.bias,
        )

    def _joined(self, modules: list[nn.Module]) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        weights, biases = [_weight(module) for module in modules], [module.bias for module in modules]
        if not self.fused:
            return weights, biases
        return [torch.cat(weights)], [None if biases[0] is None else torch.cat(biases)]

    def allocate(self, slots: int, length: int) -> None:
        """Make room for `slots` rows of `length` tokens; a cache that is large enough already is kept."""
        length = math.ceil(length / CACHE_STEP) * CACHE_STEP
        shape = (len(self.layers), slots, self.kv_heads, length, self.head_size)
        if self._cache is not None:
            values = self._cache[1]
            fits = all(have >= need for have, need in zip(values.shape[1:4], shape[1:4], strict=True))
            if fits and (values.dtype, values.device, values.shape[0]) == (self.dtype, self.device, shape[0]):
                length = values.shape[3]
            else:
                self._cache = None
        if self._cache is None:
            # zeros: a masked column must hold numbers, since 0 * nan would reach the result
            values = torch.zeros(shape, dtype=self.dtype, device=self.device)
            self._cache = torch.zeros_like(values.transpose(3, 4), memory_format=torch.contiguous_format), values
        positions = torch.arange(length, device=self.device)[None]
        cos, sin = self._rotary(torch.empty(1, dtype=self.dtype, device=self.device), positions)
        sign = torch.ones(self.head_size, dtype=self.dtype, device=self.device)
        sign[: self.head_size // 2] = -1
        self._cos, self._sin = cos[0], sin[0] * sign  # rotate_half(x) * sin == roll(x) * (sign * sin)

    @property
    def capacity(self) -> int:
        """Tokens that a slot of the cache holds."""
        return self._cache[1].shape[3]

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copy the cached rows of slots `sources` to slots `targets`, where others have finished."""
        for cache in self._cache:
            cache[:, targets] = cache[:, sources]

    @torch.no_grad()
    def prefill(self, ids: torch.Tensor, lengths: torch.Tensor, first_slot: int) -> torch.Tensor:
        """Process prompts into slots `first_slot` and following; (b, V) logits of the token after each.

        Args:
            ids: (b, T), padded on the right: causal attention never sees it, and decoding overwrites its cache.
            lengths: (b,) tokens of each prompt.
        """
        rows, width = ids.shape
        hidden = F.embedding(ids, self.embedding).flatten(0, 1)
        cos, sin = (table[:width].repeat(rows, 1)[:, None] for table in (self._cos, self._sin))
        keys, values = self._cache
        for index, layer in enumerate(self.layers):
            query, key, value = self._project(layer, hidden, cos, sin)
            query, key, value = (x.view(rows, width, -1, self.head_size).transpose(1, 2) for x in (query, key, value))
            keys[index, first_slot : first_slot + rows, :, :, :width] = key.transpose(2, 3)
            values[index, first_slot : first_slot + rows, :, :width] = value
            attended = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=self.query_heads != self.kv_heads
            )
            hidden = self._finish(layer, hidden, attended.transpose(1, 2).reshape(rows * width, -1))
        last = torch.arange(rows, device=ids.device) * width + lengths - 1
        return self._logits(hidden[last])

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, positions: torch.Tensor, longest: int) -> torch.Tensor:
        """One token for each of the first n slots; (n, V) logits of the next.

        Args:
            tokens, positions: (n,) the newest token of each row and its place in the sequence.
            longest: the greatest of the positions, known without asking the device.
        """
        rows = len(tokens)
        keys, values = self._cache
        length = min((longest // CACHE_STEP + 1) * CACHE_STEP, self.capacity)
        hidden = F.embedding(tokens, self.embedding)
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        future = torch.arange(length, device=tokens.device) > positions[:, None]
        bias = torch.zeros(rows, length, dtype=self.dtype, device=tokens.device).masked_fill_(future, float("-inf"))
        group = self.query_heads // self.kv_heads
        bias = bias[:, None, None].expand(rows, self.kv_heads, group, length).reshape(-1, group, length)
        scale = 1 / math.sqrt(self.head_size)
        row, head = torch.arange(rows, device=tokens.device)[:, None], torch.arange(self.kv_heads, device=tokens.device)
        place = positions[:, None]
        for index, layer in enumerate(self.layers):
            query, key, value = self._project(layer, hidden, cos, sin)
            keys[index].transpose(2, 3).index_put_((row, head, place), key)
            values[index].index_put_((row, head, place), value)
            cached_keys = keys[index, :rows].flatten(0, 1)[:, :, :length]
            cached_values = values[index, :rows].flatten(0, 1)[:, :length]
            query = query.reshape(-1, group, self.head_size)
            weights = torch.baddbmm(bias, query, cached_keys, alpha=scale).softmax(-1)
            hidden = self._finish(layer, hidden, torch.bmm(weights, cached_values).view(rows, -1))
        return self._logits(hidden)

    def _project(self, layer: _Layer, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        """Rotated queries (n, Q, D), rotated keys (n, K, D) and values (n, K, D) of n tokens."""
        normed = F.rms_norm(hidden, hidden.shape[-1:], layer.input_norm, self.norm_eps)
        projected = [F.linear(normed, w, b) for w, b in zip(layer.qkv, layer.qkv_bias, strict=True)]
        joined = projected[0] if len(projected) == 1 else torch.cat(projected, -1)
        joined = joined.view(len(hidden), -1, self.head_size)
        rotating = joined[:, : self.query_heads + self.kv_heads]
        rotated = torch.addcmul(rotating * cos, rotating.roll(self.head_size // 2, -1), sin)
        query, key = rotated.split((self.query_heads, self.kv_heads), 1)
        return query, key, joined[:, self.query_heads + self.kv_heads :]

    def _finish(self, layer: _Layer, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Output projection, MLP and both residual connections."""
        hidden = torch.addmm(hidden, attended, layer.output.t())
        if layer.output_bias is not None:
            hidden += layer.output_bias
        normed = F.rms_norm(hidden, hidden.shape[-1:], layer.mlp_norm, self.norm_eps)
        projected = [F.linear(normed, w, b) for w, b in zip(layer.gate_up, layer.gate_up_bias, strict=True)]
        gate, up = projected if len(projected) == 2 else projected[0].chunk(2, -1)
        hidden = torch.addmm(hidden, F.silu(gate).mul_(up), layer.down.t())
        return hidden if layer.down_bias is None else hidden + layer.down_bias

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(
            F.rms_norm(hidden, hidden.shape[-1:], self.final_norm, self.norm_eps), self.head, self.head_bias
        )


def _weight(module: nn.Module) -> torch.Tensor:
    """The matrix that a linear layer applies, its LoRA factors included unless they are switched off."""
    if isinstance(module, LoraLayer):
        return module.get_base_layer().weight if module._disable_adapters else merged_weight(module)
    return module.weight
