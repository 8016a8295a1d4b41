"""Saving a model as a folder that `transformers` opens, with LoRA merged and the tokenizer, at any ZeRO stage."""

import copy
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from utils.errors import InputError
from utils.files import atomic_files
from utils.models.lora import ADAPTER, lora_layers, merged_weight
from utils.parallel import distributed
from utils.parallel.divergence import check_weights
from utils.parallel.zero import gathered

MAX_SHARD_SIZE = "5GB"


@torch.no_grad()
def merged_state_dict(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """The weights of a `transformers` model on the CPU of rank 0 (None elsewhere), under their ordinary names.

    LoRA is merged into copies. ZeRO-3 parameters are gathered one at a time, so every rank must call this.
    """
    layers = lora_layers(model)
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        prefix = name.partition(".lora_")[0].partition(".base_layer.")[0]
        if ".lora_" in name:
            continue
        if prefix in layers and name.endswith(".base_layer.weight"):
            with gathered(layers[prefix].parameters()):
                if distributed.is_main():
                    state[f"{prefix}.weight"] = merged_weight(layers[prefix]).cpu()
            continue
        with gathered([tensor]):
            if distributed.is_main():
                state[name.replace(".base_layer.", ".")] = tensor.detach().cpu().clone()
    return state if distributed.is_main() else None


def save_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    state: dict | None = None,
    save_adapter: bool = False,
) -> None:
    """Write config, safetensors weights and tokenizer into `folder`. Every rank must call it.

    Args:
        model: the `transformers` model inside a wrapper (`CausalLM.model`, `ScalarHeadModel.model`).
        state: weights to write instead of the model's own (rank 0; from `merged_state_dict` of the same model).
        save_adapter: also write what was trained to `folder/adapter` in peft's format: the LoRA factors, and as
            `modules_to_save` everything else that was trained, such as the head of a reward model.

    Raises:
        DivergenceError: a weight is NaN or infinite; nothing was written.
        InputError: on every rank; the folder cannot be written; its content is unchanged.
    """
    check_weights(model)
    state = merged_state_dict(model) if state is None else state
    adapter = _adapter_state_dict(model) if save_adapter and lora_layers(model) else None
    problem = None
    if distributed.is_main():
        try:
            _write(model, tokenizer, Path(folder), state, adapter)
        except (OSError, SafetensorError) as error:
            problem = f"{folder}: the model cannot be saved ({error}); free disk space, or choose another --output_dir"
    if problem := distributed.first_problem(problem):
        raise InputError(problem)


def _write(model, tokenizer, folder: Path, state: dict, adapter: dict | None) -> None:
    if getattr(model.config, "tie_word_embeddings", False):
        state.pop("lm_head.weight", None)
    with atomic_files(folder, replacing=["model*.safetensors*", "adapter", "chat_template.jinja"]) as temporary:
        model.save_pretrained(temporary, state_dict=state, max_shard_size=MAX_SHARD_SIZE)
        tokenizer.save_pretrained(temporary)
        if adapter:
            (temporary / "adapter").mkdir()
            save_file(adapter, temporary / "adapter" / "adapter_model.safetensors")
            _adapter_config(model).save_pretrained(temporary / "adapter")


@torch.no_grad()
def _adapter_state_dict(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """What was trained, under the names that peft's files use, on rank 0: LoRA factors and whole modules."""
    state = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if not parameter.requires_grad:
                continue
            full_name = f"{module_name}.{name}".replace(f".{ADAPTER}.", ".")
            with gathered([parameter]):
                state[f"base_model.model.{full_name}"] = parameter.detach().cpu().clone()
    return state if distributed.is_main() else None


def _adapter_config(model: nn.Module) -> LoraConfig:
    """The config with which peft turns the model that training began with, and the adapter, into the trained model."""
    config = copy.copy(model.peft_config[ADAPTER])
    config.base_model_name_or_path = str(model.config.name_or_path)
    config.task_type = "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM"
    whole = {
        module_name
        for module_name, module in model.named_modules()
        if ".lora_" not in module_name
        for _, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if parameter.requires_grad
    }
    # A module includes those inside it: a head with a hidden layer is saved as one.
    config.modules_to_save = sorted(name for name in whole if name.rpartition(".")[0] not in whole) or None
    return config
