"""The weights of a LLaMA-shaped model as the decode engine reads them: in place, joined, adapted, sharded or streamed.

Nothing here writes to a parameter. What cannot be read in place (matrices joined for a CPU, LoRA merged into a matrix,
this process's part of a matrix) goes to copies in a `Copies`, which may be kept and refreshed in place.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from peft.tuners.lora import LoraLayer
from torch import nn

from utils.generation.architectures import Architecture
from utils.generation.packed_matrix import PackedMatrix, linear
from utils.models.lora import merged_weight
from utils.parallel import distributed
from utils.parallel.zero import gathered


@dataclass(frozen=True)
class Update:
    """A LoRA update that is applied beside the base matrix: scale * up(down(x)) to outputs [start, stop) of a part."""

    part: int
    start: int
    stop: int
    down: torch.Tensor  # (r, in)
    up: torch.Tensor  # (stop - start, r)
    scale: float


@dataclass(frozen=True)
class Projection:
    """Linear layers that read the same input: one joined matrix or a matrix each, with LoRA updates beside them."""

    matrices: list[torch.Tensor | PackedMatrix]  # (out, in) each
    biases: list[torch.Tensor | None]
    updates: list[Update]

    def outputs(self, inputs: torch.Tensor, *, is_step: bool = False) -> list[torch.Tensor]:
        """(n, in) -> (n, out) of each matrix; `is_step` as for `PackedMatrix.product`."""
        parts = [
            linear(inputs, matrix, bias, is_step=is_step)
            for matrix, bias in zip(self.matrices, self.biases, strict=True)
        ]
        for update in self.updates:
            self._apply(update, parts[update.part], inputs)
        return parts

    def joined_outputs(self, inputs: torch.Tensor, *, is_step: bool = False) -> torch.Tensor:
        """(n, in) -> (n, sum of the outs)."""
        parts = self.outputs(inputs, is_step=is_step)
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def added_to(self, residual: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """residual (n, out) + the output of the only matrix, in new memory."""
        (matrix,), (bias,) = self.matrices, self.biases
        if isinstance(matrix, PackedMatrix):
            total = matrix.product(inputs, bias).add_(residual)
        else:
            total = torch.addmm(residual, inputs, matrix.t())
            if bias is not None:
                total += bias
        for update in self.updates:
            self._apply(update, total, inputs)
        return total

    @staticmethod
    def _apply(update: Update, output: torch.Tensor, inputs: torch.Tensor) -> None:
        output[:, update.start : update.stop].addmm_(inputs @ update.down.t(), update.up.t(), alpha=update.scale)

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (matrix for matrix in self.matrices if isinstance(matrix, torch.Tensor))
        yield from (bias for bias in self.biases if bias is not None)
        for update in self.updates:
            yield from (update.down, update.up)


@dataclass(frozen=True)
class Layer:
    """The weights of one transformer layer."""

    input_norm: torch.Tensor
    qkv: Projection
    output: Projection
    mlp_norm: torch.Tensor
    gate_up: Projection
    down: Projection

    def addresses(self) -> list[int] | None:
        """The addresses that `decoding.small_step` reads; None where a matrix is large or has a bias or LoRA update."""
        projections = (self.qkv, self.output, self.gate_up, self.down)
        if any(len(p.matrices) > 1 or p.biases[0] is not None or p.updates for p in projections):
            return None
        panels = [getattr(projection.matrices[0], "panels", None) for projection in projections]
        if any(panel is None for panel in panels):
            return None
        qkv, output, gate_up, down = (panel.data_ptr() for panel in panels)
        return [self.input_norm.data_ptr(), qkv, output, self.mlp_norm.data_ptr(), gate_up, down]

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (self.input_norm, self.mlp_norm)
        for projection in (self.qkv, self.output, self.gate_up, self.down):
            yield from projection.tensors()


@dataclass(frozen=True)
class Shard:
    """This process's place among those that share a model in generation (Megatron-LM, Shoeybi et al. 2019)."""

    rank: int
    size: int
    group: dist.ProcessGroup


class Copies:
    """Memory for weights that are not read in place, by name; refilled in place while shapes stay the same."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def joined(self, name: str, tensors: list[torch.Tensor]) -> torch.Tensor:
        """`torch.cat(tensors)`, written to the memory that `name` had the last time."""
        first, rows = tensors[0], sum(len(tensor) for tensor in tensors)
        shape = (rows, *first.shape[1:])
        kept = self._kept.get(name)
        if kept is None or (kept.shape, kept.dtype, kept.device) != (shape, first.dtype, first.device):
            kept = self._kept[name] = torch.empty(shape, dtype=first.dtype, device=first.device)
        return torch.cat(tensors, out=kept)

    def release(self) -> None:
        """Free the memory."""
        self._kept = {}

    def __len__(self) -> int:
        return len(self._kept)


@dataclass(frozen=True)
class LayerReader:
    """How the layers of a model become `Layer`s.

    Args:
        architecture: names the parts of a layer.
        copies: where copies go; None reads everything in place, which rules out `join` and `shard`.
        adapter: name of the LoRA adapter to apply; None is the base model.
        fuse: LoRA is merged into a copy of the matrix; otherwise it is computed beside the matrix at every step.
        join: matrices with the same input become one, which saves operations on a CPU.
        pack: matrices become `PackedMatrix`es, which are packed again at every reading.
        shard: read only this process's part: heads and MLP columns are divided, so the outputs of the two row-parallel
            matrices (attention output, MLP down) must be summed over the group.
    """

    architecture: Architecture
    copies: Copies | None
    adapter: str | None
    fuse: bool
    join: bool
    pack: bool = False
    shard: Shard | None = None

    def read(self, index: int, layer: nn.Module) -> Layer:
        """`layer` number `index` of the model; its parameters must be whole."""
        parts = self.architecture.parts(layer)
        return Layer(
            input_norm=self._vector(parts.input_norm.weight),
            qkv=self._projection(f"{index}.qkv", [parts.query, parts.key, parts.value]),
            output=self._projection(f"{index}.output", [parts.output], by_inputs=True),
            mlp_norm=self._vector(parts.mlp_norm.weight),
            gate_up=self._projection(f"{index}.gate_up", [parts.gate, parts.up]),
            down=self._projection(f"{index}.down", [parts.down], by_inputs=True),
        )

    def _projection(self, name: str, modules: list[nn.Module], *, by_inputs: bool = False) -> Projection:
        matrices, biases, updates, copied, start = [], [], [], [], 0
        for part, module in enumerate(modules):
            weight, update = self._weight(module)
            weight = self._part(weight, 1 if by_inputs else 0)
            bias = module.bias
            if bias is not None and self.shard is not None:  # with divided inputs, the first process adds the bias
                bias = self._part(bias, 0).clone() if not by_inputs else (bias.clone() if not self.shard.rank else None)
            copied.append(self.shard is not None or (self.fuse and update is not None))
            if update is not None and not self.fuse:
                down, up, scale = update
                down = self._part(down, 1) if by_inputs else down
                up = up if by_inputs else self._part(up, 0)
                if self.shard is not None:
                    down, up = down.clone(), up.clone()
                begin = start if self.join else 0
                updates.append(Update(0 if self.join else part, begin, begin + len(up), down, up, scale))
            start += len(weight)
            matrices.append(weight)
            biases.append(bias)
        if self.join and len(modules) > 1:
            joined_bias = None if biases[0] is None else torch.cat(biases)
            joined = PackedMatrix(torch.cat(matrices)) if self.pack else self.copies.joined(name, matrices)
            return Projection([joined], [joined_bias], updates)
        if self.pack:
            return Projection([PackedMatrix(matrix) for matrix in matrices], biases, updates)
        matrices = [
            self.copies.joined(f"{name}.{part}", [matrix]) if copy else matrix
            for part, (matrix, copy) in enumerate(zip(matrices, copied, strict=True))
        ]
        return Projection(matrices, biases, updates)

    def _weight(self, module: nn.Module) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, float] | None]:
        """The matrix of a linear layer (adapted, when fusing) and its LoRA update (down, up, scale), if any."""
        if not isinstance(module, LoraLayer):
            return module.weight, None
        weight = module.get_base_layer().weight
        if self.adapter not in module.lora_A or module._disable_adapters:
            return weight, None
        update = (
            module.lora_A[self.adapter].weight,
            module.lora_B[self.adapter].weight,
            module.scaling[self.adapter],
        )
        return (merged_weight(module, self.adapter) if self.fuse else weight), update

    def _part(self, tensor: torch.Tensor, dimension: int) -> torch.Tensor:
        return tensor if self.shard is None else tensor.chunk(self.shard.size, dimension)[self.shard.rank]

    def _vector(self, weight: torch.Tensor) -> torch.Tensor:
        return weight if self.shard is None else weight.clone()


def read_shards(reader: LayerReader, modules: nn.ModuleList, *, gather: int) -> list[Layer]:
    """This process's part of all layers, gathered `gather` at a time by ZeRO-3 and only while they are copied."""
    layers = []
    for start in range(0, len(modules), gather):
        chunk = list(modules)[start : start + gather]
        with gathered(parameter for module in chunk for parameter in module.parameters()):
            layers += [reader.read(start + offset, module) for offset, module in enumerate(chunk)]
    return layers


class StreamedLayers:
    """Layers of a model that ZeRO-3 has partitioned, gathered one at a time in every pass.

    Gathering is a collective, so the ranks go through the layers in lockstep: before each pass they agree that some
    rank still has one to do, and a rank that has none left takes part in those of the others.
    """

    def __init__(self, reader: LayerReader, modules: nn.ModuleList):
        self._reader, self._modules = reader, modules

    def __iter__(self) -> Iterator[Layer]:
        self._any_rank_is_busy(True)
        for index, module in enumerate(self._modules):
            with gathered(module.parameters()):
                yield self._reader.read(index, module)

    def __len__(self) -> int:
        return len(self._modules)

    def finish(self) -> None:
        """Take part in the passes of the other ranks until none has any left."""
        while self._any_rank_is_busy(False):
            for module in self._modules:
                with gathered(module.parameters()):
                    pass

    @staticmethod
    def _any_rank_is_busy(busy: bool) -> bool:
        return bool(distributed.all_reduce_scalar(float(busy), "max"))
