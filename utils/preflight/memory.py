"""Bytes on one process for an engine of a model: what stays, and what each moment of a step adds.

    n   parameters, of which t train        W   processes        b   bytes of a number in the model's dtype

From DeepSpeed 0.19's zero/stage_1_and_2.py, zero/stage3.py and engine.py, which utils/parallel/zero.py configures:

    stage            0 (fp32 only)     1                      2                      3
    parameters       b n               b n, trained ones flat, in one block          b n / W, whole below 10,000 numbers
    master weights   -                 4 t / W
    Adam             8 t               8 t / W
    gradients        4 t               b t, then              -                      -
                                       4 t (fp16)
    kept gradients   -                 4 t / W (16-bit)       4 t / W, till the step 4 t / W
    reduction        REDUCE_PIECE      bf16: REDUCE_PIECE     a bucket of min(t, REDUCE_BUCKET) numbers, on a GPU of
                     of 4, if W > 1    of 6, if W > 1         REDUCE_BUCKET; the same at stage 1 in other dtypes; at
                                                              stage 3, and at stage 2 in 16 bits, a reduced copy as well
    at the step      -                 4 t / W in fp32, as a flat copy               4 t / W
"""

from dataclasses import dataclass

from utils.algorithms.logprobs import BLOCK, CHUNK, KEPT
from utils.parallel.zero import (
    GATHERED_ON_CPU,
    GATHERED_ON_GPU,
    PERSISTENT,
    REDUCE_PIECE,
    TORCH_DTYPES,
    effective_stage,
)
from utils.preflight.activations import Activations
from utils.preflight.blocks import Blocks, block, blocks_of
from utils.preflight.model_shape import ModelShape

REDUCE_BUCKET = 500_000_000  # numbers: DeepSpeed's reduce_bucket_size, which utils.parallel.zero leaves as it is
BACKWARD_WORK = 0.5  # share of a layer's activations that its backward pass needs besides them, for the gradients


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One model on one process, in the engine that its flags ask for."""

    shape: ModelShape
    dtype: str
    stage: int  # as the flag says
    world_size: int
    trains: bool = True
    offload: bool = False  # as it takes effect: False without a GPU
    on_gpu: bool = False

    @property
    def item_size(self) -> int:
        return TORCH_DTYPES[self.dtype].itemsize

    @property
    def real_stage(self) -> int:
        if self.trains:
            return effective_stage(self.stage, self.dtype, offload=self.offload)
        return 3 if self.stage == 3 else 0

    @property
    def part(self) -> float:
        """Bytes of this process's part of the trainable parameters, in fp32."""
        sharded = self.world_size if self.real_stage else 1
        return 4 * self.shape.trainable / sharded

    def of_parameters(self, item_size: float, *, trained_only: bool = False) -> Blocks:
        """One block per parameter."""
        return blocks_of(p.numel * item_size for p in self.shape.parameters if p.trains or not trained_only)

    def persistent(self) -> dict[str, Blocks]:
        """What stays from the first optimiser step on; without training, the parameters alone."""
        items = {"parameters": self.parameters()}
        if self.trains:
            stays = not self.offload
            if self.real_stage:
                items["fp32 master weights"] = block(self.part) * stays
                items["optimiser states"] = block(self.part) * 2 * stays
            else:
                items["optimiser states"] = self.of_parameters(4, trained_only=True) * 2
            if self.real_stage == 3 or (self.real_stage == 1 and self.dtype != "fp32"):
                items["gradients"] = block(self.part) * stays
        return items

    def parameters(self) -> Blocks:
        trained = self.shape.trainable if self.trains else 0
        frozen = [p.numel for p in self.shape.parameters if not (p.trains and self.trains)]
        size = self.item_size
        if self.real_stage == 3:
            small = sum(p.numel for p in self.shape.parameters if p.numel < PERSISTENT) * size
            if self.offload:
                return Blocks(small)
            parts = blocks_of(numel * size / self.world_size for numel in frozen)
            return block(trained * size / self.world_size) + parts + Blocks(small if self.world_size > 1 else 0)
        if self.real_stage == 0:
            return self.of_parameters(size)
        return block(trained * size) + blocks_of(numel * size for numel in frozen)

    def host_bytes(self) -> float:
        """Bytes that `--offload` moves to host memory."""
        if not self.offload:
            return 0.0
        parameters = self.shape.total * self.item_size / self.world_size if self.real_stage == 3 else 0.0
        return parameters + (4 * self.part if self.trains else 0.0)

    def stored_bytes(self) -> float:
        """Bytes of this engine in a checkpoint, of all processes: what trains, in fp32 and in the model's dtype too
        where stages 1 and 2 keep both, and Adam's two moments."""
        return self.shape.trainable * (12 + (self.item_size if self.real_stage in (1, 2) else 0))

    def largest_stored(self) -> float:
        """Bytes of the largest tensor that a checkpoint takes from this process's device."""
        if not self.real_stage:
            return 4 * self.shape.largest_trainable
        weights = self.shape.trainable * self.item_size if self.real_stage < 3 else 0
        return max(weights, 0 if self.offload else self.part)

    def nan_check(self) -> Blocks:
        """What `divergence.check_weights` allocates for a parameter, or its part: absolute values and three masks."""
        numbers = self.shape.largest / (self.world_size if self.real_stage == 3 else 1)
        return block(numbers * self.item_size) + block(numbers) * 3

    def gathered(self) -> Blocks:
        """Whole parameters that a pass at stage 3 holds at once."""
        if self.real_stage != 3:
            return Blocks()
        live, _ = GATHERED_ON_GPU if self.on_gpu else GATHERED_ON_CPU
        others = min(self.shape.total - self.shape.largest, live)
        return block(self.shape.largest * self.item_size) + Blocks(others * self.item_size)

    def whole(self) -> Blocks:
        """The weights that generation gathers at stage 3."""
        return self.of_parameters(self.item_size) if self.real_stage == 3 else Blocks()

    def piece(self) -> Blocks:
        """What `zero._reduce_gradients` copies of the gradients at a time: in fp32, and from bf16 rounded as well."""
        if self.world_size == 1:
            return Blocks()
        numbers = min(self.shape.trainable, REDUCE_PIECE)
        return block(4 * numbers) + (block(2 * numbers) if self.real_stage else Blocks())

    def bucket(self) -> Blocks:
        """DeepSpeed's reduction buckets, which a CPU process touches only as far as they are filled."""
        if not self.real_stage:
            return Blocks()
        size = 4 if self.real_stage == 1 else self.item_size
        if self.on_gpu:
            return block(REDUCE_BUCKET * size) * (2 if self.real_stage == 2 else 1)
        return block(min(self.shape.trainable, REDUCE_BUCKET) * size)

    def reduction_copy(self) -> Blocks:
        """The copy that the reduction of a bucket makes."""
        if self.real_stage == 3 or (self.real_stage == 2 and self.dtype != "fp32"):
            return block(min(self.shape.trainable, REDUCE_BUCKET) * self.item_size)
        return Blocks()

    def accumulated(self) -> Blocks:
        """Gradients of earlier micro-batches of the same step, where they are not in `persistent`."""
        if self.real_stage > 1:
            return self.reduced() if self.real_stage == 2 else Blocks()
        return self.of_parameters(4, trained_only=True)

    def reduced(self) -> Blocks:
        """This process's part of the reduced gradients, where it is allocated again for each step."""
        if self.real_stage in (1, 2) and self.dtype == "fp32":
            return self.of_parameters(4 / self.world_size, trained_only=True)
        return block(self.part) if self.real_stage == 2 else Blocks()

    def backward_moments(self, activations: Blocks, work: Blocks, head: dict[str, Blocks], steps: int) -> list[dict]:
        """Items besides `persistent` at the start of the backward pass, at its end, and in the optimiser step.

        Args:
            activations: saved by the forward pass. work: what one layer's backward pass needs besides them.
            head: of `vocabulary_head`. steps: micro-batches of an optimiser step.
        """
        earlier = self.accumulated() if steps > 1 else Blocks()
        start = {"activations": activations + work, "gather buffers": self.gathered()} | head
        start["gradients"] = head.get("gradients", Blocks()) + earlier
        stage = self.real_stage
        if self.on_gpu and not (stage == 1 and self.dtype == "bf16"):
            start["gather buffers"] += self.bucket()
        in_pieces = not stage or (stage == 1 and self.dtype == "bf16")
        size = 4 if stage < 2 and self.dtype != "bf16" else self.item_size
        gradients = self.of_parameters(size, trained_only=True) if stage < 2 else self.reduced()
        flat = self.piece() if in_pieces else self.bucket()
        end = {
            "activations": work,
            "gradients": gradients,
            "gather buffers": flat + self.reduction_copy() + self.gathered(),
        }
        if stage == 0:
            return [start, end]
        copy = block(self.part) if self.dtype == "fp32" or stage == 3 else Blocks()
        step = {"gradients": self.reduced() + copy}
        if self.on_gpu and stage == 3:
            step["gather buffers"] = self.bucket()
        return [start, end, step]


def vocabulary_head(engine: Engine, targets: int, *, with_grad: bool) -> dict[str, Blocks]:
    """Logits of `targets` tokens as utils.algorithms.logprobs computes them, and the gradient of the projection."""
    shape, size = engine.shape, engine.item_size
    if not shape.vocabulary or not targets:
        return {}
    numbers = targets * shape.vocabulary
    chunk = min(numbers, max(CHUNK // shape.vocabulary, 1) * shape.vocabulary)
    kept = numbers if with_grad and numbers <= KEPT else chunk
    wide = 4 * min(chunk, BLOCK.get("cpu") if not engine.on_gpu else CHUNK)
    items = {"logits": block(chunk * size) * (kept / chunk) + block(wide) * 3}
    if with_grad and shape.head_trains:
        matrix = shape.vocabulary * shape.hidden
        items["gradients"] = block(matrix * size)
        if numbers > chunk:  # chunks are added up in fp32
            items["gradients"] += block(matrix * 4)
    return items


def saved_activations(activations: Activations, *, checkpointing: bool, layer_input: float) -> Blocks:
    """Activations of a whole model: all layers, or one layer and the inputs of all (`layer_input` bytes each)."""
    if checkpointing:
        return activations.outside + activations.layer + block(layer_input) * activations.layers
    return activations.outside + activations.layer * activations.layers


def backward_work(activations: Activations) -> Blocks:
    return activations.layer * BACKWARD_WORK
