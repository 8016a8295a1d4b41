"""Saving models where nothing can be written."""

from processes import run_ranks
from tiny_models import SIZES


def save_beneath_a_file(file: str) -> str:
    import transformers

    from utils.errors import InputError
    from utils.models.saving import save_model

    model = transformers.AutoModelForCausalLM.from_config(SIZES["llama"](97))
    try:
        save_model(model, None, f"{file}/model")
    except InputError as error:
        return str(error)
    return "saved"


def test_all_ranks_learn_that_the_first_cannot_save(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    messages = run_ranks(save_beneath_a_file, 2, str(file))
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"{file}/model: the model cannot be saved") and "--output_dir" in messages[0]
