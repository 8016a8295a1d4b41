"""One set of weights, two modes: the switch between training and generation."""

import contextlib
from collections.abc import Iterator
from typing import Literal

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from utils import distributed
from utils.models.lora import ADAPTER
from utils.rlhf.decoder import LlamaDecoder, supports
from utils.rlhf.generation import respond
from utils.rlhf.memory import fits, naming_flags, optimizer_on_host, weight_bytes
from utils.rlhf.responses import Generation
from utils.rlhf.sampling import SamplingParams
from utils.rlhf.stop_strings import StopStrings
from utils.rlhf.tensor_parallel import join_shard_group
from utils.zero import gathered, is_partitioned

OUT_OF_MEMORY = (
    "lower --per_device_generation_batch_size (and raise --generation_batches: the rollout stays the same), "
    "--max_prompt_seq_len or --max_answer_seq_len; or try --unpin_actor_parameters, --release_inference_cache, "
    "--offload_optimizer_during_generation; or, with --actor_zero_stage 3, --stream_generation_weights on or "
    "--inference_tp_size"
)


class HybridEngine:
    """Responses of the policy that trains in `actor`.

    Attributes:
        decoder: the decode engine, where it is asked for and knows the architecture; None means that `transformers`
            generates.
    """

    def __init__(self, actor: deepspeed.DeepSpeedEngine, tokenizer: PreTrainedTokenizerBase, config):
        self._actor, self._tokenizer, self._config = actor, tokenizer, config
        self._stops = StopStrings(tokenizer, config.stop_strings) if config.stop_strings else None
        self._partitioned = is_partitioned(next(actor.module.parameters()))
        self._warned = False
        self.decoder = self._make_decoder()

    def _make_decoder(self) -> LlamaDecoder | None:
        config, model = self._config, self._actor.module.model
        if not config.enable_hybrid_engine:
            return None
        if not supports(model):
            distributed.log(
                f"note: --enable_hybrid_engine has no fast path for {model.config.model_type}: transformers generates"
            )
            return None
        return LlamaDecoder(
            keep_copies=not config.unpin_actor_parameters,
            shard=join_shard_group(config.inference_tp_size),
            cuda_graphs=config.generation_cuda_graphs,
        )

    def respond(
        self, prompts: list[list[int]], sampling: SamplingParams, *, seed: int, adapter: str | None = ADAPTER
    ) -> Generation:
        """One response for each prompt. Under ZeRO-3 every rank must call it, with as many prompts as it likes.

        Args:
            adapter: the LoRA adapter to apply; None is the base model.

        Raises:
            RankError: out of memory, with the flags that lower it.
        """
        config, decoder = self._config, self.decoder
        elsewhere = (
            config.offload_optimizer_during_generation and torch.accelerator.is_available() and not config.offload
        )
        with naming_flags(OUT_OF_MEMORY), optimizer_on_host(self._actor) if elsewhere else contextlib.nullcontext():
            stream = self._must_stream(prompts, sampling)
            if not stream and (decoder is None or decoder.shard is None):
                gather = "all"
            else:
                gather = "nothing" if decoder is None else "ends"
            with generation_mode(self._actor, gather=gather) as model:
                responses = respond(
                    model,
                    prompts,
                    sampling,
                    eos_id=self._tokenizer.eos_token_id,
                    pad_id=self._tokenizer.pad_token_id,
                    seed=seed,
                    slots=config.per_device_generation_batch_size,
                    decoder=decoder,
                    stops=self._stops,
                    adapter=adapter,
                    lora=config.lora_generation,
                    stream=stream,
                    gather_layers=config.tp_gather_partition_size,
                )
        if decoder is not None and config.release_inference_cache:
            decoder.release_cache()
        return responses

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
                f"generation would need {needed / 2**30:.1f} GiB on each process, which is not free: the actor's "
                "layers are gathered one at a time for every token, which is slow. Lower "
                "--per_device_generation_batch_size, share the model with --inference_tp_size, or silence this "
                "with --stream_generation_weights on"
            )
        return streams


@contextlib.contextmanager
def generation_mode(
    engine: deepspeed.DeepSpeedEngine, *, gather: Literal["all", "ends", "nothing"] = "all"
) -> Iterator[nn.Module]:
    """Yield the engine's `transformers` model in evaluation mode, with whole weights and without training hooks.

    Under ZeRO-3 the weights are gathered once, for as long as the block lasts. DeepSpeed's hooks are off meanwhile:
    they would split the weights again after every forward, and ranks that finish at different lengths would wait for
    each other for ever. Nothing inside may change a weight; training goes on afterwards with bit-identical state.

    Args:
        gather: "ends" gathers only what lies outside the layers (embeddings, last norm, head), for a reader that
            gathers the layers itself. "nothing" leaves the gathering to DeepSpeed's hooks, in every forward.
    """
    model = engine.module.model
    training, checkpointing = engine.module.training, model.is_activation_checkpointing
    engine.eval()
    if checkpointing:  # its layers refuse a KV cache
        model.gradient_checkpointing_disable()
    try:
        with torch.no_grad(), _weights_gathered(engine, gather):
            yield model
    finally:
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        engine.train(training)


def _weights_gathered(engine: deepspeed.DeepSpeedEngine, gather: str) -> contextlib.AbstractContextManager:
    model = engine.module.model
    if gather == "all":
        return _whole_weights(engine)
    if gather == "nothing":
        return contextlib.nullcontext()
    in_layers = {id(parameter) for parameter in model.model.layers.parameters()}
    return gathered(parameter for parameter in model.parameters() if id(parameter) not in in_layers)


@contextlib.contextmanager
def _whole_weights(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
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
