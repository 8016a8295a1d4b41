"""Models from a folder (or a hub name), whole or already split by ZeRO-3, with exactly the weights of the file."""

import math
from pickle import UnpicklingError

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from utils.errors import InputError
from utils.models.causal_lm import CausalLM
from utils.models.checks import load_config
from utils.models.scalar_head import HEAD, HIDDEN_SIZE, ScalarHeadModel, hidden_size_of, with_hidden_head
from utils.parallel import distributed
from utils.parallel.zero import TORCH_DTYPES, gathered, is_partitioned, sharded_loading

PIECE = 1 << 24  # elements that are checked at a time


def set_dropout(config: PreTrainedConfig, dropout: float | None) -> None:
    """Set every dropout probability that the architecture's config has; None keeps the model's own."""
    if dropout is None:
        return
    for name, value in config.to_dict().items():
        if ("dropout" in name or "pdrop" in name) and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, dropout)


def _from_pretrained(
    auto_class, path: str, config: PreTrainedConfig, zero_config: dict, dtype: str, trust_remote_code: bool
):
    try:
        with sharded_loading(zero_config):
            model, report = auto_class.from_pretrained(
                path,
                config=config,
                dtype=TORCH_DTYPES[dtype],
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except UnpicklingError as error:
        raise InputError(
            f"{path}: its .bin file holds more than weights; nothing in it was run. Use a model saved as safetensors"
        ) from error
    return model, set(report["missing_keys"]), set(report["unexpected_keys"])


def _refuse_key_mismatch(path: str, missing: set[str], unexpected: set[str]) -> None:
    for what, names in (("lack", missing), ("hold unknown", unexpected)):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise InputError(f"{path}: the weights {what} {listed}; the file does not belong to its config.json")


@torch.no_grad()
def _refuse_nan(model: nn.Module, label: str) -> None:
    """Refuse NaN and infinite weights: training would end in NaN, and its flags would be blamed.

    Every rank must call it, and checks the weights that it holds.
    """
    problem = None
    for name, parameter in model.named_parameters():
        held = parameter.ds_tensor if is_partitioned(parameter) else parameter
        if not all(bool(piece.isfinite().all()) for piece in held.flatten().split(PIECE)):
            problem = f"{label}: the weights hold NaN or infinite values, first in {name}; give an undamaged model"
            break
    if problem := distributed.first_problem(problem):
        raise InputError(problem)


def _carry_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Copy the tokenizer's pad, BOS and EOS ids into the model's configs, and drop the model's sampling defaults."""
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    for name, value in ids.items():
        setattr(model.config, name, value)
    model.config.use_cache = True
    if hasattr(model, "generation_config"):
        model.generation_config = GenerationConfig(**ids)


def _grow_embedding(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add embedding rows for tokens of `--add_eot_token`, up to a multiple of 8, starting from the others' mean."""
    if len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(8 * math.ceil(len(tokenizer) / 8), mean_resizing=True)


def load_causal_lm(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    zero_config: dict,
    *,
    dtype: str,
    dropout: float | None = None,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    flag: str = "--model_name_or_path",
) -> CausalLM:
    """A causal language model with exactly the weights of `path`, wrapped.

    Args:
        zero_config: from `zero.zero_config`; at stage 3 every rank receives only its part of the weights.
        flag: the flag that gave `path`, for messages.

    Raises:
        InputError: weights are missing from the file or left over in it.
    """
    config = load_config(path, flag, trust_remote_code=trust_remote_code)
    set_dropout(config, dropout)
    model, missing, unexpected = _from_pretrained(
        AutoModelForCausalLM, path, config, zero_config, dtype, trust_remote_code
    )
    _refuse_key_mismatch(path, missing, unexpected)
    _refuse_nan(model, f"{flag} {path}")
    _grow_embedding(model, tokenizer)
    _carry_tokens(model, tokenizer)
    if gradient_checkpointing:
        model.activation_checkpointing_enable()
    return CausalLM(model)


def load_scalar_model(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    zero_config: dict,
    *,
    dtype: str,
    new_head: bool = False,
    head_hidden_size: int = 0,
    head_dropout: float = 0.0,
    dropout: float | None = None,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    flag: str = "--model_name_or_path",
) -> ScalarHeadModel:
    """A model with a scalar head, wrapped.

    Args:
        new_head: `path` is a causal LM whose vocabulary head is dropped; each matrix of the scalar head starts from a
            normal distribution with standard deviation 1 / sqrt(H + 1), H its inputs (Stiennon et al. 2020), a bias
            from 0. Otherwise `path` is a model that step 2 or 3 wrote, and its head must be there.
        head_hidden_size: of a new head: the width of its hidden layer, 0 for none. head_dropout: see `ScalarHeadModel`.

    Raises:
        InputError: weights are missing from the file or left over in it.
    """
    config = load_config(path, flag, trust_remote_code=trust_remote_code)
    set_dropout(config, dropout)
    config.num_labels = 1
    config.pad_token_id = tokenizer.pad_token_id
    if new_head and head_hidden_size:
        setattr(config, HIDDEN_SIZE, head_hidden_size)
    auto_class = _classifier_class(config, trust_remote_code)
    model, missing, unexpected = _from_pretrained(auto_class, path, config, zero_config, dtype, trust_remote_code)
    if new_head:
        missing -= {f"{HEAD}.{name}" for name, _ in model.score.named_parameters()}
        unexpected -= {"lm_head.weight", "lm_head.bias", "embed_out.weight"}
    _refuse_key_mismatch(path, missing, unexpected)
    _refuse_nan(model.base_model, f"{flag} {path}")  # a new head is not initialised yet
    if new_head:
        _initialize_head(model.score)
    _grow_embedding(model, tokenizer)
    _carry_tokens(model, tokenizer)
    if gradient_checkpointing:
        model.activation_checkpointing_enable()
    return ScalarHeadModel(model, head_dropout=head_dropout)


def _classifier_class(config: PreTrainedConfig, trust_remote_code: bool) -> type:
    """What reads a model with the head that `config` describes."""
    if not hidden_size_of(config):
        return AutoModelForSequenceClassification
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)
    return with_hidden_head(type(model))


@torch.no_grad()
def _initialize_head(head: nn.Module) -> None:
    for layer in (module for module in head.modules() if isinstance(module, nn.Linear)):
        with gathered(layer.parameters(recurse=False), write=True):
            layer.weight.normal_(0.0, 1 / math.sqrt(layer.in_features + 1))
            if layer.bias is not None:
                layer.bias.zero_()
