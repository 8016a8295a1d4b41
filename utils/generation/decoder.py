"""A LLaMA-shaped model for generation: the live training weights as its passes read them, and its own KV cache.

The cache holds keys as (layers, slots, K, D, length) and values as (layers, slots, K, length, D), K key-value heads of
size D: a part of the length is then a matrix that batched products read in place (bf16 on a CPU copies
`keys[:, :length].transpose`, which takes three times as long as the product). The first n slots are the active rows.
Where several processes share a model in generation, each has its part of the heads.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig

from utils.generation.architectures import find_architecture
from utils.generation.graphs import StepGraphs, cuda_recorder
from utils.generation.packed_matrix import PackedMatrix, can_pack
from utils.generation.passes import compiled, eager, small
from utils.generation.weights import Copies, LayerReader, Projection, Shard, StreamedLayers, read_shards
from utils.kernels.native import usable
from utils.models.lora import ADAPTER, LoraGeneration, lora_layers
from utils.parallel import distributed
from utils.parallel.memory import weight_bytes

JOIN_ON = ("cpu",)  # devices where matrices that read the same input are joined, which costs a copy of them
CACHE_STEP = 16  # the cache is read up to a multiple of this, so that few shapes occur


@dataclass(frozen=True)
class Loading:
    """How a decoder reads the weights of a model.

    Attributes:
        adapter: which LoRA adapter to apply; None for the base model. A model without LoRA ignores it.
        lora: "fused" merges its update into copies of the adapted matrices, never into the training weights;
            "unfused" computes it beside them.
        stream: gather one layer at a time in every pass, on all ranks in lockstep; `finish` must end the passes.
        gather_layers: how many layers are gathered at a time to read a shard.
    """

    adapter: str | None = ADAPTER
    lora: LoraGeneration = "fused"
    stream: bool = False
    gather_layers: int = 8


def supports(config: PreTrainedConfig) -> bool:
    """Whether `LlamaDecoder` computes what the `transformers` model of `config` computes."""
    return find_architecture(config) is not None


class LlamaDecoder:
    """Prefill and decode of a model whose configuration it `supports`.

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
        self.cache: tuple[torch.Tensor, torch.Tensor] | None = None
        self._graphs: StepGraphs | None = None
        self._tables_of: tuple | None = None
        self._keep_copies, self._copies = keep_copies, Copies()

    def load(self, model: nn.Module, how: Loading | None = None) -> None:
        """Take the weights of `model`.

        They must be whole on this rank, except that the layers may be partitioned by ZeRO-3 with `how.stream`, or when
        the decoder has a shard; every rank must call it then.

        Raises:
            ValueError: the architecture is unknown; or the model has LoRA, but no adapter of that name.
        """
        how = how or Loading()
        names = {name for layer in lora_layers(model).values() for name in layer.lora_A}
        if names and how.adapter is not None and how.adapter not in names:
            raise ValueError(f"no LoRA adapter {how.adapter!r}; the model has {', '.join(sorted(names))}")
        config, parts = model.config, self.shard.size if self.shard else 1
        architecture = find_architecture(config)
        if architecture is None:
            raise ValueError(f"the decode engine does not know {config.model_type}")
        self.query_heads, self.kv_heads = config.num_attention_heads // parts, config.num_key_value_heads // parts
        self.head_size = head_size_of(config)
        self.norm_eps, self.mlp_size = config.rms_norm_eps, config.intermediate_size
        self.embedding = model.get_input_embeddings().weight
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self.head = model.get_output_embeddings().weight
        self.head_bias = model.get_output_embeddings().bias
        self.final_norm = architecture.final_norm(model).weight
        self._rotary = architecture.rotary(model)
        if self._graphs is None and self._cuda_graphs and self.device.type == "cuda":
            self._graphs = StepGraphs(cuda_recorder)
        modules, self._small = architecture.layers(model), None
        if how.stream:  # copies would have to be made again in every pass
            reader = LayerReader(architecture, None, how.adapter, fuse=False, join=False)
            self.layers = StreamedLayers(reader, modules)
            return
        joins = self.device.type in JOIN_ON
        packs = joins and self._graphs is None and can_pack(self.head)
        if packs:
            self.head = PackedMatrix(self.head)
        reader = LayerReader(architecture, self._copies, how.adapter, how.lora == "fused", joins, packs, self.shard)
        if self.shard:
            self.layers = read_shards(reader, modules, gather=how.gather_layers)
            return
        self.layers = [reader.read(index, module) for index, module in enumerate(modules)]
        if packs:
            self._small = small.addresses_of(self.layers)

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

    def extra_bytes(self, model: nn.Module, slots: int, length: int, lora: LoraGeneration = "fused") -> int:
        """Bytes that generation needs beyond the weights: cache and copies that are not allocated yet."""
        config, size = model.config, model.get_input_embeddings().weight.element_size()
        heads, head_size = config.num_key_value_heads, head_size_of(config)
        shape = self._cache_shape(config.num_hidden_layers, slots, heads, length, head_size)
        total = 2 * math.prod(shape) * size - sum(tensor.nbytes for tensor in self.cache or ())
        if len(self._copies):
            return total
        if distributed.device().type in JOIN_ON:
            return total + weight_bytes(model)  # at most: every matrix, joined or packed (small ones twice)
        if lora == "fused":
            total += sum(weight_bytes(layer.get_base_layer()) for layer in lora_layers(model).values())
        return total

    def release_cache(self) -> None:
        """Free the KV cache, and the graphs that read it."""
        self.cache = None
        if self._graphs is not None:
            self._graphs.release()

    def tensors(self) -> Iterator[torch.Tensor]:
        """Everything that a pass reads and does not compute itself: weights, tables and the cache."""
        yield from (self.embedding, self.head, self.final_norm, self.cos, self.sin, *self.cache)
        if self.head_bias is not None:
            yield self.head_bias
        for layer in self.layers:
            yield from layer.tensors()

    def allocate(self, slots: int, length: int) -> None:
        """Allocate the cache for `slots` rows of `length` tokens; one that is too small grows, and it never shrinks.

        It grows to the most rows and the most tokens of any call so far. If it were sized for each call, calls with
        many rows and calls with long ones would keep replacing the cache, and the graphs that read it.
        """
        shape = self._cache_shape(len(self.layers), slots, self.kv_heads, length, self.head_size)
        if self.cache is not None:
            values = self.cache[1]
            if (values.shape, values.dtype, values.device) != (shape, self.dtype, self.device):
                self.cache = values = None  # before the next one takes memory
        if self.cache is None:
            # zeros: a masked column must hold numbers, since 0 * nan would reach the result
            values = torch.zeros(shape, dtype=self.dtype, device=self.device)
            self.cache = torch.zeros_like(values.transpose(3, 4), memory_format=torch.contiguous_format), values
        length = shape[3]
        if self._tables_of != (self._rotary, length, self.dtype, self.device):
            self._tables_of = (self._rotary, length, self.dtype, self.device)
            positions = torch.arange(length, device=self.device)[None]
            cos, sin = self._rotary(torch.empty(1, dtype=self.dtype, device=self.device), positions)
            sign = torch.ones(self.head_size, dtype=self.dtype, device=self.device)
            sign[: self.head_size // 2] = -1
            self.cos, self.sin = cos[0], sin[0] * sign  # rotate_half(x) * sin == roll(x) * (sign * sin)

    def _cache_shape(self, layers: int, slots: int, heads: int, length: int, head_size: int) -> tuple[int, ...]:
        """Of the cached values: at least as large as the present cache."""
        shape = (layers, slots, heads, math.ceil(length / CACHE_STEP) * CACHE_STEP, head_size)
        held = shape if self.cache is None else self.cache[1].shape
        same_model = (held[0], held[2], held[4]) == (layers, heads, head_size)
        return tuple(max(sizes) for sizes in zip(held, shape, strict=True)) if same_model else shape

    @property
    def graphs(self) -> StepGraphs | None:
        """CUDA graphs of decode steps; None without them, or where steps communicate with other processes."""
        return None if self.shard is not None or isinstance(self.layers, StreamedLayers) else self._graphs

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The processes that share the model in generation, where there are several."""
        return self.shard.group if self.shard else None

    @property
    def capacity(self) -> int:
        """Tokens that a slot of the cache holds."""
        return self.cache[1].shape[3]

    def copy(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy the first `length` cached tokens of slots `sources` to slots `targets`."""
        keys, values = self.cache
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
        passes = compiled if usable(hidden) else eager
        return passes.prefill(self, hidden, rows, first_slot, last)

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
        """One token for each of the first n slots; (n, V) logits of the next.

        Args:
            tokens, positions: (n,) the newest token of each row and its place in the sequence.
            length: how many cached tokens to read: more than the position of any row that counts.
        """
        hidden = F.embedding(tokens, self.embedding)
        if self._small is not None:
            return small.step(self, self._small, hidden, positions)
        if usable(hidden):
            return compiled.step(self, hidden, positions)
        return eager.step(self, hidden, positions, length)

    def summed_output(self, projection: Projection, inputs: torch.Tensor, *, is_step: bool = False) -> torch.Tensor:
        """The output of the only matrix of a projection, summed over the processes that share the model."""
        output = projection.outputs(inputs, is_step=is_step)[0]
        if self.shard is not None:
            dist.all_reduce(output, group=self.shard.group)
        return output


def head_size_of(config: PreTrainedConfig) -> int:
    """Size of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
