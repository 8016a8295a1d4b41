"""Heads with a hidden layer: what they compute, and that everything that builds, reads or counts a head knows them."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import SIZES, save_causal_lm

from utils.arguments import PpoConfig
from utils.arguments.roles import RoleFlags
from utils.errors import InputError
from utils.models.checks import check_models
from utils.models.loading import load_scalar_model
from utils.models.lora import add_lora, find_linear_layers
from utils.models.saving import merged_state_dict, save_model
from utils.models.scalar_head import HiddenHead, ScalarHead
from utils.parallel.zero import zero_config
from utils.preflight.model_shape import model_shape

ZERO = zero_config(0, "fp32")
IDS = torch.arange(3, 19).view(2, 8)


def new_model(folder, tokenizer, **options):
    return load_scalar_model(str(folder), tokenizer, ZERO, dtype="fp32", new_head=True, **options)


@pytest.fixture
def language_model(tiny_tokenizer, tmp_path):
    return save_causal_lm(tmp_path / "lm", tiny_tokenizer)


@pytest.fixture
def saved(language_model, tiny_tokenizer, tmp_path):
    """A reward model with a hidden layer of 12, in memory and in a folder."""
    torch.manual_seed(0)
    model = new_model(language_model, tiny_tokenizer, head_hidden_size=12).eval()
    model.model.score.bias.data.normal_()
    save_model(model.model, tiny_tokenizer, tmp_path / "reward")
    return model, tmp_path / "reward"


def scores_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, torch.ones_like(IDS))


def test_scores_are_those_of_the_formula(saved):
    model, folder = saved
    weights = load_file(folder / "model.safetensors")
    names = {name: tuple(tensor.shape) for name, tensor in weights.items() if name.startswith("score")}
    assert names == {"score.weight": (12, 32), "score.bias": (12,), "score.output.weight": (1, 12)}
    with torch.no_grad():
        states = model.model.base_model(IDS).last_hidden_state
        hidden = torch.tanh(states @ weights["score.weight"].T + weights["score.bias"])
    torch.testing.assert_close(scores_of(model), (hidden @ weights["score.output.weight"].T).squeeze(-1))


def test_a_folder_gives_back_the_scores(saved, tiny_tokenizer):
    model, folder = saved
    assert json.loads((folder / "config.json").read_text())["score_head_hidden_size"] == 12
    loaded = load_scalar_model(str(folder), tiny_tokenizer, ZERO, dtype="fp32").eval()
    assert torch.equal(scores_of(loaded), scores_of(model))
    save_model(loaded.model, tiny_tokenizer, folder.parent / "again")  # as step 3 writes its critic
    config = json.loads((folder.parent / "again" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and config["score_head_hidden_size"] == 12


def test_transformers_refuses_the_folder_rather_than_start_a_random_head(saved):
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        transformers.AutoModelForSequenceClassification.from_pretrained(saved[1])


@pytest.mark.parametrize("name", ["score.weight", "score.bias", "score.output.weight"])
def test_a_head_that_lacks_a_weight_is_refused(saved, tiny_tokenizer, name):
    file = saved[1] / "model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"the weights lack {name}"):
        load_scalar_model(str(saved[1]), tiny_tokenizer, ZERO, dtype="fp32")


def test_a_width_that_is_not_that_of_the_weights_is_found_before_they_are_read(saved, language_model):
    config = json.loads((saved[1] / "config.json").read_text())
    (saved[1] / "config.json").write_text(json.dumps(config | {"score_head_hidden_size": 8}))
    run = PpoConfig(
        actor_model_name_or_path=str(language_model), critic_model_name_or_path=str(saved[1]),
        max_prompt_seq_len=32, max_answer_seq_len=8,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"score\.\w+(\.weight)? is 12.* but 8"):
        check_models(run)


def test_a_new_hidden_layer_has_the_stated_spread(language_model, tiny_tokenizer):
    torch.manual_seed(0)
    head = new_model(language_model, tiny_tokenizer, head_hidden_size=64).model.score
    assert isinstance(head, HiddenHead) and not head.bias.any()
    assert 0.95 < head.weight.std().item() * 33**0.5 < 1.05
    assert 0.7 < head.output.weight.std().item() * 65**0.5 < 1.3


@pytest.mark.parametrize("width", [0, 12])
def test_dropout_of_the_head_is_there_in_training_alone(language_model, tiny_tokenizer, width):
    """In front of the last map: a share of its inputs is 0, the others are enlarged; --dropout does not reach it."""
    model = new_model(language_model, tiny_tokenizer, head_hidden_size=width, head_dropout=0.5, dropout=0.0)
    last = model.model.score.output if width else model.model.score
    last.weight.data.fill_(1.0)
    inputs = torch.ones(4000, last.in_features)
    with torch.no_grad():
        dropped = ScalarHead.forward(last.train(), inputs) / 2
        kept = ScalarHead.forward(last.eval(), inputs)
    assert torch.equal(kept, torch.full((4000, 1), float(last.in_features)))
    assert torch.equal(dropped, dropped.round()) and dropped.mean().item() == pytest.approx(
        last.in_features / 2, rel=0.05
    )
    assert not torch.equal(scores_of(model.train()), scores_of(model))
    assert torch.equal(scores_of(model.eval()), scores_of(model))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_head_computes_in_fp32(language_model, tiny_tokenizer, dtype):
    config = zero_config(0, dtype)
    options = {"dtype": dtype, "new_head": True, "head_hidden_size": 12}
    model = load_scalar_model(str(language_model), tiny_tokenizer, config, **options)
    assert model.model.score.weight.dtype == model.model.score.output.weight.dtype == model.model.dtype
    assert scores_of(model).dtype == torch.float32


def test_lora_leaves_the_head_alone_and_trains_it(language_model, tiny_tokenizer):
    model = new_model(language_model, tiny_tokenizer, head_hidden_size=12).model
    assert not any("score" in name for name in find_linear_layers(model))
    add_lora(model, 4, only_lora=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name}
    assert trained == {"score.weight", "score.bias", "score.output.weight"}
    assert {name for name in merged_state_dict(model) if "score" in name} == trained


@pytest.mark.parametrize("architecture", SIZES)
@pytest.mark.parametrize("lora", [{}, {"lora_dim": 4, "only_optimize_lora": True}], ids=["full", "lora"])
def test_the_preflight_counts_the_parameters_of_the_head(tiny_tokenizer, tmp_path, architecture, lora):
    folder = save_causal_lm(tmp_path / architecture, tiny_tokenizer, architecture)
    model = new_model(folder, tiny_tokenizer, head_hidden_size=12).model
    add_lora(model, lora.get("lora_dim", 0), only_lora=bool(lora))
    known = {"name": "model", "kind": "scalar", "path": "", "path_flag": ""}
    config = transformers.AutoConfig.from_pretrained(folder)
    shape = model_shape(config, RoleFlags(**known, new_head=True, head_hidden_size=12, **lora), "fp32")
    real = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    assert [(matrix.numel, matrix.trains) for matrix in shape.parameters] == real
    started = model_shape(model.config, RoleFlags(**known, **lora), "fp32")  # from the folder of such a model
    assert [(matrix.numel, matrix.trains) for matrix in started.parameters] == real
    width = model.score.in_features
    linear = model_shape(config, RoleFlags(**known, new_head=True, **lora), "fp32")
    assert shape.total - linear.total == 12 * width + 12 + 12 - width
