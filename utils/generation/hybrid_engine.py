"""One set of weights, two modes: the switch between training and generation."""

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from utils.arguments.steps import PpoConfig
from utils.data.batches.dataloader import row_numbers
from utils.generation.architectures import find_architecture
from utils.generation.decoder import LlamaDecoder, Loading, supports
from utils.generation.generate import generate_responses
from utils.generation.responses import Ends, Responses
from utils.generation.sampling import SamplingParams
from utils.generation.tensor_parallel import join_shard_group
from utils.models.lora import ADAPTER
from utils.parallel import distributed
from utils.parallel.memory import advising_on_memory, fits, weight_bytes
from utils.parallel.zero import Engine, gathered, is_partitioned, optimizer_on_host

OUT_OF_MEMORY = (
    "lower --per_device_generation_batch_size (and raise --generation_batches: the rollout stays the same), "
    "--max_prompt_seq_len or --max_answer_seq_len; or try --unpin_actor_parameters, --release_inference_cache, "
    "--offload_optimizer_during_generation; or, with --actor_zero_stage 3, --stream_generation_weights on or "
    "--inference_tp_size"
)
Gather = Literal["all", "ends", "nothing"]


class HybridEngine:
    """Generates responses of the policy that trains in `actor`.

    Attributes:
        decoder: the decode engine, where it is enabled and supports the architecture; None means that `transformers`
            generates.
    """

    def __init__(self, actor: Engine, tokenizer: PreTrainedTokenizerBase, config: PpoConfig):
        self._actor, self._config = actor, config
        self._ends = Ends.of(tokenizer, config.stop_strings)
        self._partitioned = is_partitioned(next(actor.module.parameters()))
        self._warned = False
        self.decoder = self._make_decoder()

    def _make_decoder(self) -> LlamaDecoder | None:
        config, model = self._config, self._actor.module.model
        if not config.enable_hybrid_engine:
            return None
        if not supports(model.config):
            distributed.log(
                f"note: --enable_hybrid_engine has no fast path for {model.config.model_type}: transformers generates"
            )
            return None
        return LlamaDecoder(
            keep_copies=not config.unpin_actor_parameters,
            shard=join_shard_group(config.inference_tp_size),
            cuda_graphs=config.generation_cuda_graphs,
        )

    def answer(self, prompts: list[list[int]], sampling: SamplingParams, *, seed: int) -> Responses:
        """One response for each prompt of this rank's batch from the data loader.

        Under ZeRO-3 every rank must call it, with any number of prompts.

        Raises:
            RankError: out of memory; names the flags that reduce it.
        """
        config, decoder = self._config, self.decoder
        with advising_on_memory(OUT_OF_MEMORY), self._optimizer_elsewhere():
            stream = self._must_stream(prompts, sampling)
            with generation_mode(self._actor, gather=self._gather(stream)) as model:
                responses = generate_responses(
                    model,
                    prompts,
                    sampling,
                    self._ends,
                    seed=seed,
                    slots=config.per_device_generation_batch_size,
                    rows=row_numbers(len(prompts)),
                    decoder=decoder,
                    how=Loading(ADAPTER, config.lora_generation, stream, config.tp_gather_partition_size),
                )
        if decoder is not None and config.release_inference_cache:
            decoder.release_cache()
        return responses

    def _gather(self, stream: bool) -> Gather:
        """Which weights of a partitioned actor are gathered during generation."""
        if self.decoder is None:
            return "nothing" if stream else "all"
        return "ends" if stream or self.decoder.shard is not None else "all"

    def _optimizer_elsewhere(self) -> contextlib.AbstractContextManager:
        """Keeps the optimiser's state in host memory meanwhile, if that is requested and it is not there anyway."""
        config = self._config
        if not config.offload_optimizer_during_generation or config.offload or not torch.accelerator.is_available():
            return contextlib.nullcontext()
        return optimizer_on_host(self._actor)

    def _must_stream(self, prompts: list[list[int]], sampling: SamplingParams) -> bool:
        """Whether layers are gathered one at a time: when asked to, or when the whole model does not fit."""
        config, decoder = self._config, self.decoder
        if not self._partitioned or (decoder is not None and decoder.shard is not None):
            return False
        if config.stream_generation_weights != "auto":
            return config.stream_generation_weights == "on"
        model = self._actor.module.model
        needed = weight_bytes(model)
        if decoder is not None and prompts:
            slots = min(config.per_device_generation_batch_size, len(prompts))
            length = max(map(len, prompts)) + sampling.max_new_tokens
            needed += decoder.extra_bytes(model, slots, length, config.lora_generation)
        streams = not fits(needed)
        if streams and not self._warned:
            self._warned = True
            distributed.warn(
                f"generation would need {needed / 2**30:.1f} GiB on each process, more than is free: the actor's "
                "layers are gathered one at a time for every token, which is slow. Lower "
                "--per_device_generation_batch_size, share the model with --inference_tp_size, or silence this "
                "with --stream_generation_weights on"
            )
        return streams


@contextlib.contextmanager
def generation_mode(engine: Engine, *, gather: Gather = "all") -> Iterator[nn.Module]:
    """Yield the engine's `transformers` model in evaluation mode, with whole weights and without training hooks.

    Under ZeRO-3 the weights are gathered once, for as long as the block lasts. DeepSpeed's hooks are off meanwhile:
    they would partition the weights again after every forward, and ranks whose responses differ in length would wait
    for each other forever. Nothing inside may change a weight; training continues with bit-identical state.

    Args:
        gather: "ends" gathers only what lies outside the layers (embeddings, last norm, head), for a reader that
            gathers the layers itself. "nothing" leaves the gathering to DeepSpeed's hooks, in every forward.
    """
    model = engine.module.model
    training, checkpointing = engine.module.training, model.is_activation_checkpointing
    engine.eval()
    if checkpointing:  # layers with checkpointing refuse a KV cache
        model.activation_checkpointing_disable()
    try:
        with torch.no_grad(), _weights_gathered(engine, gather):
            yield model
    finally:
        if checkpointing:
            model.activation_checkpointing_enable()
        engine.train(training)


def _weights_gathered(engine: Engine, gather: Gather) -> contextlib.AbstractContextManager:
    model = engine.module.model
    if gather == "all":
        return _whole_weights(engine)
    if gather == "nothing":
        return contextlib.nullcontext()
    layers = find_architecture(model.config).layers(model)
    in_layers = {id(parameter) for parameter in layers.parameters()}
    return gathered(parameter for parameter in model.parameters() if id(parameter) not in in_layers)


@contextlib.contextmanager
def _whole_weights(engine: Engine) -> Iterator[None]:
    parameters = list(engine.module.parameters())
    if not is_partitioned(parameters[0]):
        yield
        return
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    with gathered(parameters):
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload._register_deepspeed_module(offload.module)
