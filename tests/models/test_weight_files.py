"""Weights that are missing, cut short or only Git LFS pointers are refused before anything is loaded."""

import json

import pytest
from safetensors.torch import save_file
from torch import ones

from utils.errors import InputError
from utils.models.weight_files import check_weight_files


@pytest.fixture
def folder(tmp_path):
    """A model in two shards."""
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in names:
        save_file({name: ones(8)}, tmp_path / name)
    index = {"weight_map": {name: name for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def refusal(folder) -> str:
    with pytest.raises(InputError) as refused:
        check_weight_files(folder, "--model_name_or_path there")
    assert str(refused.value).startswith("--model_name_or_path there: ") and "\n" not in str(refused.value)
    return str(refused.value)


def test_whole_shards_pass(folder):
    check_weight_files(folder, "--model_name_or_path there")


def test_a_missing_shard_is_named(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "lists 2 files, of which model-00002-of-00002.safetensors are missing" in refusal(folder)


def test_a_shard_that_was_cut_short_is_named(folder):
    file = folder / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert "model-00001-of-00002.safetensors cannot be read in full" in refusal(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_not_taken_for_weights(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in refusal(tmp_path)


def test_a_broken_index_is_named(folder):
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json cannot be used" in refusal(folder)
