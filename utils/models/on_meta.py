"""A model as it would be loaded and prepared for training, built from its config.json alone on the meta device."""

import copy
import math

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig

from utils.arguments.roles import RoleFlags
from utils.models.causal_lm import CausalLM
from utils.models.loading import set_dropout
from utils.models.lora import add_lora
from utils.models.scalar_head import HIDDEN_SIZE, ScalarHeadModel
from utils.parallel.zero import TORCH_DTYPES


def build_on_meta(
    config: PreTrainedConfig, role: RoleFlags, dtype: str, *, tokens: int = 0, layers: int | None = None
) -> CausalLM | ScalarHeadModel:
    """The model that `models.loading` and `models.engine` would build, without data.

    Args:
        tokens: size of the tokenizer; the embedding grows to hold them, as with `--add_eot_token`.
        layers: build this many instead of all.
    """
    config = copy.deepcopy(config)
    if tokens > config.vocab_size:
        config.vocab_size = 8 * math.ceil(tokens / 8)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    set_dropout(config, role.dropout)
    scalar = role.kind == "scalar"
    if scalar:
        config.num_labels = 1
        if role.new_head and role.head_hidden_size:
            setattr(config, HIDDEN_SIZE, role.head_hidden_size)
    auto_class = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=TORCH_DTYPES[dtype], trust_remote_code=role.trust_remote_code)
        wrapped = ScalarHeadModel(model, head_dropout=role.head_dropout) if scalar else CausalLM(model)
        add_lora(
            model,
            role.lora_dim,
            module_name=role.lora_module_name,
            dropout=role.lora_dropout,
            only_lora=role.only_optimize_lora,
        )
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # off the meta device, peft casts the factors to the matrix's dtype
            parameter.data = parameter.data.to(TORCH_DTYPES[dtype])
    return wrapped
