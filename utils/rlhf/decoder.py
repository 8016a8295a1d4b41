"""The forward passes of generation for LLaMA-shaped models, on the live training weights and a KV cache of our own.

    n   rows that decode together          H   hidden size            D   size of a head
    Q   query heads                        K   key-value heads        G = Q / K

The cache holds keys as (layers, slots, K, D, length) and values as (layers, slots, K, length, D): a part of the length
is then a matrix that batched products read in place (bf16 on a CPU copies `keys[:, :length].transpose`, which takes
three times as long as the product). The first n slots are the active rows. Of a model that several processes share in
generation, Q and K are this process's heads.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig

from utils import distributed
from utils.kernels import decoding
from utils.kernels.native import usable
from utils.kernels.shapes import rounded_rows
from utils.models.lora import ADAPTER, lora_layers
from utils.models.packed_attention import causal_attention
from utils.rlhf.decoder_weights import Copies, Layer, LayerReader, Projection, Shard, StreamedLayers, read_shards
from utils.rlhf.memory import weight_bytes
from utils.rlhf.packed_matrix import PackedMatrix, can_pack, linear
from utils.rlhf.step_graphs import StepGraphs, cuda_recorder

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # tables that do not change with the length of the sequence
JOIN_ON = ("cpu",)  # devices where matrices that read the same input are joined, which costs a copy of them
CACHE_STEP = 16  # the cache is read up to a multiple of this, so that few shapes occur


def supports(model: nn.Module) -> bool:
    """Whether `LlamaDecoder` computes what this `transformers` model computes."""
    return supports_config(model.config)


def supports_config(config: PreTrainedConfig) -> bool:
    """`supports` for the model that `config` describes."""
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
    cost of a step is the number of operations, it joins the matrices that read the same input into copies, and packs
    them where it can.

    Args:
        keep_copies: copies of weights (but not packed ones) stay allocated between `unload` and the next `load`, which
            refills them.
        shard: this process's place among those that share the model in generation.
        cuda_graphs: on an NVIDIA GPU, record decode steps and replay them.
    """

    def __init__(self, *, keep_copies: bool = False, shard: Shard | None = None, cuda_graphs: bool = True) -> None:
        self.shard, self._cuda_graphs = shard, cuda_graphs
        self._graphs: StepGraphs | None = None
        self._cache: tuple[torch.Tensor, torch.Tensor] | None = None
        self._tables_of: tuple | None = None
        self._keep_copies, self._copies = keep_copies, Copies()

    def load(
        self,
        model: nn.Module,
        *,
        adapter: str | None = ADAPTER,
        lora: Literal["fused", "unfused"] = "fused",
        stream: bool = False,
        gather_layers: int = 8,
    ) -> None:
        """Take the weights of `model`.

        They must be whole on this rank, except that the layers may be partitioned by ZeRO-3 with `stream`, or when
        the decoder has a shard; every rank must call it then.

        Args:
            adapter: which LoRA adapter to apply; None is the base model, as is a model without LoRA.
            lora: "fused" merges its update into copies of the adapted matrices, never into the training weights;
                "unfused" computes it beside them.
            stream: gather one layer at a time in every pass, on all ranks in lockstep; `finish` must end the passes.
            gather_layers: how many are gathered at a time for a shard.

        Raises:
            ValueError: the model has LoRA, but no adapter of that name.
        """
        names = {name for layer in lora_layers(model).values() for name in layer.lora_A}
        if names and adapter is not None and adapter not in names:
            raise ValueError(f"no LoRA adapter {adapter!r}; the model has {', '.join(sorted(names))}")
        config, parts = model.config, self.shard.size if self.shard else 1
        self.query_heads, self.kv_heads = config.num_attention_heads // parts, config.num_key_value_heads // parts
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.norm_eps = config.rms_norm_eps
        self.embedding = model.get_input_embeddings().weight
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self.head = model.get_output_embeddings().weight
        self.head_bias = model.get_output_embeddings().bias
        self.final_norm = model.model.norm.weight
        self._rotary = model.model.rotary_emb
        if self._graphs is None and self._cuda_graphs and self.device.type == "cuda":
            self._graphs = StepGraphs(cuda_recorder)
        modules, self._small, self._mlp_size = model.model.layers, None, config.intermediate_size
        if stream:  # copies would be made anew in every pass
            self.layers = StreamedLayers(LayerReader(None, adapter, fuse=False, join=False), modules)
        else:
            joins = self.device.type in JOIN_ON
            packs = joins and self._graphs is None and can_pack(self.head)
            if packs:
                self.head = PackedMatrix(self.head)
            reader = LayerReader(self._copies, adapter, lora == "fused", joins, packs, self.shard)
            self.layers = (
                read_shards(reader, modules, gather=gather_layers)
                if self.shard
                else [reader.read(index, module) for index, module in enumerate(modules)]
            )
            if packs and self.shard is None:
                addresses = [layer.addresses() for layer in self.layers]
                self._small = None if None in addresses else torch.tensor(addresses)

    def unload(self) -> None:
        """Drop the references to weights, and their copies unless those are kept; the cache stays."""
        for name in ("embedding", "head", "head_bias", "final_norm", "layers", "_small", "_rotary"):
            setattr(self, name, None)
        if not self._keep_copies:
            self._copies.release()

    def finish(self) -> None:
        """After the last pass of this rank: streamed layers need it for the passes of the others."""
        if isinstance(self.layers, StreamedLayers):
            self.layers.finish()

    def extra_bytes(
        self, model: nn.Module, slots: int, length: int, lora: Literal["fused", "unfused"] = "fused"
    ) -> int:
        """Bytes that generation takes beside the weights: cache and copies, as far as they are not allocated yet."""
        config, size = model.config, model.get_input_embeddings().weight.element_size()
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = self._cache_shape(config.num_hidden_layers, slots, config.num_key_value_heads, length, head_size)
        total = 2 * math.prod(shape) * size - sum(tensor.nbytes for tensor in self._cache or ())
        if len(self._copies):
            return total
        if distributed.device().type in JOIN_ON:
            return total + weight_bytes(model)  # at most: every matrix, joined or packed (small ones twice)
        if lora == "fused":
            total += sum(weight_bytes(layer.get_base_layer()) for layer in lora_layers(model).values())
        return total

    def release_cache(self) -> None:
        """Give the memory of the KV cache back, and the graphs that read it."""
        self._cache = None
        if self._graphs is not None:
            self._graphs.release()

    def tensors(self) -> Iterator[torch.Tensor]:
        """Everything that a pass reads and that was not computed by it: weights, tables and the cache."""
        yield from (self.embedding, self.head, self.final_norm, self._cos, self._sin, *self._cache)
        if self.head_bias is not None:
            yield self.head_bias
        for layer in self.layers:
            yield from layer.tensors()

    def allocate(self, slots: int, length: int) -> None:
        """Make room for `slots` rows of `length` tokens; a cache that is too small grows, and none shrinks.

        It grows to the most rows and the most tokens that were asked for: were it made to the measure of each call,
        one with many rows and one with long ones would replace each other's, and the graphs that read it, for ever.
        """
        shape = self._cache_shape(len(self.layers), slots, self.kv_heads, length, self.head_size)
        if self._cache is not None:
            values = self._cache[1]
            if (values.shape, values.dtype, values.device) != (shape, self.dtype, self.device):
                self._cache = values = None  # before the next one takes memory
        if self._cache is None:
            # zeros: a masked column must hold numbers, since 0 * nan would reach the result
            values = torch.zeros(shape, dtype=self.dtype, device=self.device)
            self._cache = torch.zeros_like(values.transpose(3, 4), memory_format=torch.contiguous_format), values
        length = shape[3]
        if self._tables_of != (self._rotary, length, self.dtype, self.device):
            self._tables_of = (self._rotary, length, self.dtype, self.device)
            positions = torch.arange(length, device=self.device)[None]
            cos, sin = self._rotary(torch.empty(1, dtype=self.dtype, device=self.device), positions)
            sign = torch.ones(self.head_size, dtype=self.dtype, device=self.device)
            sign[: self.head_size // 2] = -1
            self._cos, self._sin = cos[0], sin[0] * sign  # rotate_half(x) * sin == roll(x) * (sign * sin)

    def _cache_shape(self, layers: int, slots: int, heads: int, length: int, head_size: int) -> tuple[int, ...]:
        """Of the cached values, with room for what the present cache holds as well."""
        shape = (layers, slots, heads, math.ceil(length / CACHE_STEP) * CACHE_STEP, head_size)
        held = shape if self._cache is None else self._cache[1].shape
        same_model = (held[0], held[2], held[4]) == (layers, heads, head_size)
        return tuple(max(sizes) for sizes in zip(held, shape, strict=True)) if same_model else shape

    @property
    def graphs(self) -> StepGraphs | None:
        """Graphs of decode steps, where steps can be recorded: not when they talk to other processes."""
        return None if self.shard is not None or isinstance(self.layers, StreamedLayers) else self._graphs

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The processes that share the model in generation, where there are several."""
        return self.shard.group if self.shard else None

    @property
    def capacity(self) -> int:
        """Tokens that a slot of the cache holds."""
        return self._cache[1].shape[3]

    def copy(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy the first `length` cached tokens of slots `sources` to slots `targets`."""
        keys, values = self._cache
        keys[:, targets, :, :, :length] = keys[:, sources, :, :, :length]
        values[:, targets, :, :length] = values[:, sources, :, :length]

    @torch.no_grad()
    def prefill(self, ids: torch.Tensor, lengths: torch.Tensor, first_slot: int) -> torch.Tensor:
        """Process prompts into slots `first_slot` and following; (b, V) logits of the token after each.

        Args:
            ids: (b, T), padded on the right: causal attention never sees it, and decoding overwrites its cache.
            lengths: (b,) tokens of each prompt.
        """
        rows, width = ids.shape
        last = torch.arange(rows, device=ids.device) * width + lengths - 1
        hidden = F.embedding(ids, self.embedding).flatten(0, 1)
        if usable(hidden):
            return self._compiled_pass(hidden, functools.partial(self._prompts, first_slot, rows), last)
        cos, sin = (table[:width].repeat(rows, 1)[:, None] for table in (self._cos, self._sin))
        keys, values = self._cache
        for index, layer in enumerate(self.layers):
            query, key, value = self._project(layer, hidden, cos, sin)
            query, key, value = (x.view(rows, width, -1, self.head_size).transpose(1, 2) for x in (query, key, value))
            keys[index, first_slot : first_slot + rows, :, :, :width] = key.transpose(2, 3)
            values[index, first_slot : first_slot + rows, :, :width] = value
            attended = causal_attention(query, key, value)
            hidden = self._finish(layer, hidden, attended.transpose(1, 2).reshape(rows * width, -1))
        return self._logits(hidden[last])

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
        """One token for each of the first n slots; (n, V) logits of the next.

        Args:
            tokens, positions: (n,) the newest token of each row and its place in the sequence.
            length: how much of the cache to read: more than any position of a row that counts.
        """
        hidden = F.embedding(tokens, self.embedding)
        if self._small is not None:
            normed = decoding.small_step(
                self._small, self.final_norm, hidden, self._cos, self._sin, positions, *self._cache,
                query_heads=self.query_heads, mlp_size=self._mlp_size, eps=self.norm_eps,
                scale=1 / math.sqrt(self.head_size),
            )  # fmt: skip
            return linear(normed, self.head, self.head_bias, few=True)
        if usable(hidden):
            return self._compiled_pass(hidden, functools.partial(self._newest, positions))
        rows = len(tokens)
        keys, values = self._cache
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

    def _compiled_pass(self, hidden: torch.Tensor, attend: Callable, last: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of `hidden` (tokens, H) by the compiled operations of `utils.kernels`.

        Args:
            attend: (number of a layer, its queries, keys and values (tokens, (Q + 2 K) D)) -> attended (tokens, Q D).
            last: of a prefill, whose logits are wanted; without it the tokens are those of a decode step.
        """
        few, count = last is None, len(hidden)
        hidden = _filled_up(hidden)
        attended = hidden.new_zeros(len(hidden), self.query_heads * self.head_size)
        normed, added = torch.empty_like(hidden), None
        for index, layer in enumerate(self.layers):
            decoding.add_rms_norm(hidden, added, layer.input_norm, normed, self.norm_eps)
            attended[:count] = attend(index, layer.qkv.joined_outputs(normed, few=few)[:count])
            added = self._summed(layer.output, attended, few=few)
            decoding.add_rms_norm(hidden, added, layer.mlp_norm, normed, self.norm_eps)
            added = self._summed(layer.down, decoding.gated(layer.gate_up.joined_outputs(normed, few=few)), few=few)
        if last is not None:
            count = len(last)
            hidden, added, normed = (_filled_up(tensor[last]) for tensor in (hidden, added, normed))
        decoding.add_rms_norm(hidden, added, self.final_norm, normed, self.norm_eps)
        return linear(normed, self.head, self.head_bias, few=few)[:count]

    def _newest(self, positions: torch.Tensor, index: int, projected: torch.Tensor) -> torch.Tensor:
        """Attention of one token in each row to what layer `index` has in the cache."""
        keys, values = (part[index] for part in self._cache)
        return decoding.attend(
            projected, self._cos, self._sin, positions, keys, values, query_heads=self.query_heads,
            scale=1 / math.sqrt(self.head_size),
        )  # fmt: skip

    def _prompts(self, first_slot: int, rows: int, index: int, projected: torch.Tensor) -> torch.Tensor:
        """Attention inside the prompts of `rows` rows, whose keys and values go to the cache of layer `index`."""
        keys, values = (part[index, first_slot : first_slot + rows] for part in self._cache)
        attended = decoding.attend_prompts(
            projected.view(rows, -1, projected.size(1)), self._cos, self._sin, keys, values,
            query_heads=self.query_heads, scale=1 / math.sqrt(self.head_size),
        )  # fmt: skip
        return attended.flatten(0, 1)

    def _project(self, layer: Layer, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        """Rotated queries (n, Q, D), rotated keys (n, K, D) and values (n, K, D) of n tokens."""
        normed = F.rms_norm(hidden, hidden.shape[-1:], layer.input_norm, self.norm_eps)
        joined = layer.qkv.joined_outputs(normed).view(len(hidden), -1, self.head_size)
        rotating = joined[:, : self.query_heads + self.kv_heads]
        rotated = torch.addcmul(rotating * cos, rotating.roll(self.head_size // 2, -1), sin)
        query, key = rotated.split((self.query_heads, self.kv_heads), 1)
        return query, key, joined[:, self.query_heads + self.kv_heads :]

    def _finish(self, layer: Layer, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Output projection, MLP and both residual connections."""
        hidden = self._added(hidden, layer.output, attended)
        normed = F.rms_norm(hidden, hidden.shape[-1:], layer.mlp_norm, self.norm_eps)
        projected = layer.gate_up.outputs(normed)
        gate, up = projected if len(projected) == 2 else projected[0].chunk(2, -1)
        return self._added(hidden, layer.down, F.silu(gate).mul_(up))

    def _added(self, residual: torch.Tensor, projection: Projection, inputs: torch.Tensor) -> torch.Tensor:
        """residual + the projection, of which each process of a group that shares the model computes a summand."""
        return (
            projection.added_to(residual, inputs) if self.shard is None else residual + self._summed(projection, inputs)
        )

    def _summed(self, projection: Projection, inputs: torch.Tensor, *, few: bool = False) -> torch.Tensor:
        """The output of the only matrix of a projection, summed over the processes that share the model."""
        output = projection.outputs(inputs, few=few)[0]
        if self.shard is not None:
            dist.all_reduce(output, group=self.shard.group)
        return output

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return linear(F.rms_norm(hidden, hidden.shape[-1:], self.final_norm, self.norm_eps), self.head, self.head_bias)


def _filled_up(rows: torch.Tensor) -> torch.Tensor:
    """(n, H) with zeros behind, to one of few numbers of rows."""
    return F.pad(rows, (0, 0, 0, rounded_rows(len(rows), rows.device) - len(rows)))
