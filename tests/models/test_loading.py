"""What loading refuses while it reads weights, and what it makes of them."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import save_causal_lm

from utils.arguments import SftConfig
from utils.errors import InputError
from utils.models.checks import load_matching_tokenizer
from utils.models.loading import load_causal_lm, load_scalar_model
from utils.parallel.zero import zero_config

ZERO = zero_config(0, "fp32")


@pytest.fixture
def folder(tiny_tokenizer, tmp_path):
    return save_causal_lm(tmp_path / "model", tiny_tokenizer)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_weights_that_do_not_fit_the_config_are_an_error(folder, tiny_tokenizer, change):
    state = load_file(folder / "model.safetensors")
    if change == "missing":
        state.pop("model.layers.1.mlp.up_proj.weight")
    else:
        state["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.\d\.mlp\.up_proj\.weight"):
        load_causal_lm(str(folder), tiny_tokenizer, ZERO, dtype="fp32")


def test_a_language_model_has_no_scalar_head(folder, tiny_tokenizer):
    with pytest.raises(InputError, match=r"score\.weight"):
        load_scalar_model(str(folder), tiny_tokenizer, ZERO, dtype="fp32")


def test_new_scalar_head_has_the_stated_spread(folder, tiny_tokenizer):
    torch.manual_seed(0)
    weight = load_scalar_model(str(folder), tiny_tokenizer, ZERO, dtype="fp32", new_head=True).model.score.weight
    assert weight.shape == (1, 32)
    assert 0.6 < weight.std().item() * 33**0.5 < 1.4


def test_dropout_reaches_every_probability(tiny_tokenizer, tmp_path):
    folder = save_causal_lm(tmp_path, tiny_tokenizer, "opt")
    model = load_causal_lm(str(folder), tiny_tokenizer, ZERO, dtype="fp32", dropout=0.0)
    assert model.model.config.dropout == model.model.config.attention_dropout == 0.0
    assert load_causal_lm(str(folder), tiny_tokenizer, ZERO, dtype="fp32").model.config.dropout == 0.1


def test_added_token_grows_the_embedding_once(folder, tiny_tokenizer):
    config = SftConfig(model_name_or_path=str(folder), add_eot_token=True)
    tokenizer = load_matching_tokenizer(config, {"model": transformers.AutoConfig.from_pretrained(folder)})
    model = load_causal_lm(str(folder), tokenizer, ZERO, dtype="fp32")
    rows = model.model.get_input_embeddings().num_embeddings
    assert rows >= len(tokenizer) and rows % 8 == 0
    assert model.model.config.eos_token_id == tokenizer.eos_token_id


def test_sampling_defaults_of_the_checkpoint_do_not_leak(folder, tiny_tokenizer):
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "do_sample": True}))
    generation = load_causal_lm(str(folder), tiny_tokenizer, ZERO, dtype="fp32").model.generation_config
    assert not generation.do_sample and generation.top_p in (None, 1.0) and generation.temperature in (None, 1.0)


@pytest.mark.parametrize("load", [load_causal_lm, load_scalar_model])
def test_weights_that_are_nan_are_refused_when_they_are_loaded(folder, tiny_tokenizer, load):
    """Not after training, with the learning rate to blame."""
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    options = {"new_head": True} if load is load_scalar_model else {}
    with pytest.raises(InputError, match=r"--model_name_or_path .* NaN .* first in .*layers.1.mlp.up_proj.weight"):
        load(str(folder), tiny_tokenizer, ZERO, dtype="fp32", **options)


class Malicious:
    def __reduce__(self):
        import os

        return os.system, ("touch " + MARK,)


MARK = "/tmp/threestep-rlhf-test-was-run"


def test_code_in_a_bin_file_is_not_run_and_torchs_advice_to_run_it_not_shown(folder, tiny_tokenizer):
    state = load_file(folder / "model.safetensors")
    torch.save(state | {"extra": Malicious()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    Path(MARK).unlink(missing_ok=True)
    with pytest.raises(InputError, match="its .bin file holds more than weights; nothing in it was run") as error:
        load_causal_lm(str(folder), tiny_tokenizer, ZERO, dtype="fp32")
    assert "weights_only" not in str(error.value) and not Path(MARK).exists()
