"""One set of weights, two modes: the switch between training and generation."""

import contextlib
from collections.abc import Iterator

import deepspeed
import torch
from torch import nn

from utils.zero import gathered, is_partitioned


@contextlib.contextmanager
def generation_mode(engine: deepspeed.DeepSpeedEngine) -> Iterator[nn.Module]:
    """Yield the engine's `transformers` model with whole weights and without training hooks.

    Under ZeRO-3 the weights are gathered once, for as long as the block lasts. DeepSpeed's hooks are off meanwhile:
    they would split the weights again after every forward, and ranks that finish at different lengths would wait for
    each other for ever. Nothing inside may change a weight; training goes on afterwards with bit-identical state.
    """
    model = engine.module.model
    training, checkpointing = engine.module.training, model.is_activation_checkpointing
    engine.eval()
    if checkpointing:  # its layers refuse a KV cache
        model.gradient_checkpointing_disable()
    try:
        with torch.no_grad(), _whole_weights(engine):
            yield model
    finally:
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        engine.train(training)


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
