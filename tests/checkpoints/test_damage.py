"""What is not a whole checkpoint of this run is named and not used, and no foreign pickle is ever read."""

import json
import os
import pickle
import resource
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from processes import run_ranks
from step_scripts import flags, load_step, run_step

from utils.arguments.run import run
from utils.checkpoints import checkpoints, folders
from utils.checkpoints.shards import open_shard
from utils.errors import InputError, RankError
from utils.output.metrics import read_metrics

CHANGES = {"max_steps": 3, "save_interval": 1, "save_total_limit": 0, "num_sample_generations": 0}


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    """The output of a run with checkpoints after steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("finished")
    run_step(1, flags(world, 1, folder, **CHANGES))
    return folder


@pytest.fixture
def output(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "output"))


def resume(world, output: Path, **changes) -> None:
    run_step(1, flags(world, 1, output, **(CHANGES | {"resume_from_checkpoint": "auto"} | changes)))


def refusal(world, output: Path, capsys, *, loads_model: bool = False, **changes) -> str:
    """The line that the resumed run ends with; unless `loads_model`, it must come before a model is loaded."""
    script, before = load_step(1), (output / "run_config.yaml").read_bytes()
    argv = flags(world, 1, output, **(CHANGES | {"resume_from_checkpoint": "auto"} | changes))
    build = script.build_engine if loads_model else lambda *_, **__: pytest.fail("a model was loaded")
    with pytest.raises(SystemExit) as stop, mock.patch.object(script, "build_engine", build):
        run(script.main, script.Config, argv)
    assert stop.value.code == 2
    assert (output / "run_config.yaml").read_bytes() == before
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


def rewrite_manifest(checkpoint: Path) -> None:
    """Make the manifest describe what is there, which takes write access to the folder."""
    (checkpoint / folders.MANIFEST).unlink()
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    content = json.dumps({"files": folders.file_records(checkpoint, files)})
    (checkpoint / folders.MANIFEST).write_text(content)


# --- damage ----------------------------------------------------------------------------------------------------------

STATES = "model/mp_rank_00_model_states.pt"


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / STATES, (checkpoint / STATES).stat().st_size - 1)


def flip_a_bit(checkpoint: Path) -> None:
    content = bytearray((checkpoint / STATES).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / STATES).write_bytes(content)


def remove_a_file(checkpoint: Path) -> None:
    (checkpoint / "rank-0.safetensors").unlink()


def remove_the_manifest(checkpoint: Path) -> None:
    (checkpoint / folders.MANIFEST).unlink()


def cut_the_manifest(checkpoint: Path) -> None:
    os.truncate(checkpoint / folders.MANIFEST, 40)


def link_a_file(checkpoint: Path) -> None:
    moved = shutil.move(checkpoint / "state.json", checkpoint.parent / "elsewhere.json")
    (checkpoint / "state.json").symlink_to(moved)


DAMAGES = [
    (truncate, f"{STATES} has"),
    (flip_a_bit, f"{STATES} is not what was written"),
    (remove_a_file, "rank-0.safetensors is missing"),
    (remove_the_manifest, "manifest.json is missing"),
    (cut_the_manifest, "manifest.json cannot be read"),
    (link_a_file, "state.json is not a plain file"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_damage_is_named_and_the_checkpoint_before_is_used(world, finished, output, capsys, damage, message):
    newest = output / "checkpoints" / "checkpoint-3"
    damage(newest)
    line = refusal(world, output, capsys, resume_from_checkpoint=newest)
    assert str(newest) in line and message in line
    resume(world, output)
    printed = capsys.readouterr()
    warnings = [line for line in printed.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and str(newest) in warnings[0] and message in warnings[0]
    assert "checkpoint-2, after step 2 of 3" in printed.out
    assert not isinstance(folders.read_manifest(newest), str)  # rewritten by step 3
    assert (output / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_no_whole_checkpoint_is_not_a_new_beginning(world, output, capsys):
    for step in (1, 2, 3):
        remove_a_file(output / "checkpoints" / f"checkpoint-{step}")
    assert "no checkpoint in" in refusal(world, output, capsys)


def test_what_a_killed_save_leaves_is_passed_over_and_removed(world, output, capsys):
    checkpoints = output / "checkpoints"
    shutil.move(checkpoints / "checkpoint-3", checkpoints / ".checkpoint-3.tmp")
    shutil.move(checkpoints / "checkpoint-1", checkpoints / ".checkpoint-1.old")
    (checkpoints / ".latest.0123abcd.tmp").touch()
    resume(world, output)
    assert "checkpoint-2, after step 2" in capsys.readouterr().out
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-3", "latest"]
    assert (checkpoints / "latest").read_text() == "checkpoint-3\n"


def test_a_finished_run_resumes_to_its_end(world, finished, output):
    """As after a kill while the model was saved."""
    (output / "model.safetensors").unlink()
    resume(world, output)
    assert (output / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    steps = [[row["step"] for row in read_metrics(folder / "metrics.jsonl")] for folder in (finished, output)]
    assert steps[0] == steps[1]


def test_old_checkpoints_are_removed(world, tmp_path):
    run_step(1, flags(world, 1, tmp_path, **(CHANGES | {"max_steps": 4, "save_total_limit": 2})))
    assert folders.checkpoint_steps(tmp_path / "checkpoints") == [4, 3]


def test_damaged_later_checkpoints_do_not_push_out_the_one_just_written(world, output):
    checkpoints = output / "checkpoints"
    for step in (2, 3):
        remove_a_file(checkpoints / f"checkpoint-{step}")
    shutil.move(checkpoints / "checkpoint-3", checkpoints / "checkpoint-9")
    shutil.move(checkpoints / "checkpoint-2", checkpoints / "checkpoint-8")
    resume(world, output, save_total_limit=1)
    assert folders.checkpoint_steps(checkpoints) == [9, 8, 3]
    assert (checkpoints / "latest").read_text() == "checkpoint-3\n"
    resume(world, output)


def test_old_checkpoints_that_cannot_be_removed_are_a_warning(world, output, monkeypatch, capsys):
    def fail(root: Path, keep: int, newest: int) -> None:
        raise PermissionError(13, "Permission denied", str(root))

    monkeypatch.setattr("utils.checkpoints.checkpoints.prune", fail)
    remove_a_file(output / "checkpoints" / "checkpoint-3")
    resume(world, output)
    assert "old checkpoints" in capsys.readouterr().err
    assert not isinstance(folders.read_manifest(output / "checkpoints" / "checkpoint-3"), str)


def test_a_checkpoint_needs_the_listing_of_every_rank(tmp_path):
    for rank in range(2):
        (tmp_path / f"{rank}.bin").write_bytes(bytes(rank + 1))
        folders.write_listing(tmp_path, rank, [tmp_path / f"{rank}.bin"])
    assert {name: r["bytes"] for name, r in folders.take_listings(tmp_path, 2).items()} == {"0.bin": 1, "1.bin": 2}
    folders.write_listing(tmp_path, 0, [tmp_path / "0.bin"])
    with pytest.raises(FileNotFoundError, match="files-1.json"):
        folders.take_listings(tmp_path, 2)


# --- other people's pickles ------------------------------------------------------------------------------------------


class Payload:
    """An object whose unpickling writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["model/mp_rank_01_model_states.pt", "model/latest", "rank-0.pt"])
def test_a_file_that_the_manifest_does_not_name_is_not_read(world, output, tmp_path, capsys, name):
    newest = output / "checkpoints" / "checkpoint-3"
    (newest / name).write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    resume(world, output)
    assert f"{name} is not in manifest.json" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["rank-0.safetensors", STATES])
def test_a_pickle_in_place_of_a_file_is_not_read(world, output, tmp_path, capsys, name):
    newest = output / "checkpoints" / "checkpoint-3"
    size = (newest / name).stat().st_size
    (newest / name).write_bytes(pickle.dumps(Payload(tmp_path / "executed")).ljust(size, b"\0"))
    resume(world, output)
    assert f"{name} is not what was written" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


def test_a_pickle_where_ours_belongs_is_not_executed_even_with_a_fitting_manifest(world, output, tmp_path, capsys):
    newest = output / "checkpoints" / "checkpoint-3"
    (newest / "rank-0.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    rewrite_manifest(newest)
    assert "rank-0.safetensors is not a safetensors file" in refusal(world, output, capsys, loads_model=True)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(RankError):  # with several processes, the one that reads the file reports it
        checkpoints._open_tensors(newest / "rank-0.safetensors")


@pytest.mark.parametrize("pattern", ["*_model_states.pt", "*_optim_states.pt"])
def test_code_in_a_shard_is_not_executed_even_with_a_fitting_manifest(world, tmp_path, capsys, pattern):
    run_step(1, flags(world, 1, tmp_path, **(CHANGES | {"zero_stage": 2})))
    newest = tmp_path / "checkpoints" / "checkpoint-3"
    (shard,) = newest.glob(f"model/{pattern}")
    content, payload = open_shard(shard, mapped=False), Payload(tmp_path / "executed")
    for write in (
        lambda: torch.save(content | {"payload": payload}, shard),
        lambda: shard.write_bytes(pickle.dumps(payload)),
    ):
        write()
        rewrite_manifest(newest)
        assert f"{shard}: holds code" in refusal(world, tmp_path, capsys, loads_model=True, zero_stage=2)
        assert not (tmp_path / "executed").exists()


# --- another run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 7}, "--seed is 7"),
        ({"learning_rate": 2e-3}, "--learning_rate is 0.002"),
        ({"per_device_train_batch_size": 2}, "--per_device_train_batch_size 2 x --gradient"),
        ({"max_steps": 2}, "--max_steps"),
        ({"resume_from_checkpoint": "nowhere"}, "--resume_from_checkpoint nowhere"),
        ({"resume_from_checkpoint": "checkpoints/checkpoint-2"}, "checkpoint-3 is later"),
    ],
    ids=str,
)
def test_flags_that_change_the_run_are_refused_by_name(world, output, capsys, monkeypatch, changes, message):
    monkeypatch.chdir(output)
    assert message in refusal(world, output, capsys, **changes)


def test_flags_that_do_not_change_what_is_computed_may_differ(world, output, capsys):
    resume(world, output, max_steps=5, save_interval=2, logging_interval=2, eval_interval=1, lr_scheduler_type="cosine")
    assert "after step 3 of 5" in capsys.readouterr().out
    assert folders.checkpoint_steps(output / "checkpoints") == [5, 4, 3, 2, 1]


def test_a_flag_that_the_checkpoint_does_not_know_had_its_default(world, output, capsys):
    """The checkpoint is of a version that did not have the flag yet."""
    newest = output / "checkpoints" / "checkpoint-3"
    content = json.loads((newest / "state.json").read_text())
    for name in ("weight_decay", "lora_module_name"):
        content["run"]["config"].pop(name)
    (newest / "state.json").write_text(json.dumps(content))
    rewrite_manifest(newest)
    assert "--weight_decay is 0.3" in refusal(world, output, capsys, weight_decay=0.3)
    resume(world, output)


@pytest.mark.parametrize("wanted", ["auto", "checkpoints/checkpoint-3"])
def test_a_checkpoint_of_version_0_1_is_refused_by_name(world, output, capsys, monkeypatch, wanted):
    monkeypatch.chdir(output)
    newest = output / "checkpoints" / "checkpoint-3"
    content = json.loads((newest / "state.json").read_text())
    content["run"].pop("format")
    state = content["state"]
    state |= {"answers": state.pop("own")["answers"], "kl_ctl": None, "text_batches": 0}  # what that version kept
    (newest / "state.json").write_text(json.dumps(content))
    rewrite_manifest(newest)
    line = refusal(world, output, capsys, resume_from_checkpoint=wanted)
    assert "checkpoints/checkpoint-3 was written by version 0.1" in line and "--output_dir" in line
    assert (str(newest) in line) == (wanted == "auto")


def test_a_checkpoint_of_another_format_is_refused_with_both_numbers(world, output, capsys):
    newest = output / "checkpoints" / "checkpoint-3"
    content = json.loads((newest / "state.json").read_text())
    content["run"]["format"] = 99
    (newest / "state.json").write_text(json.dumps(content))
    rewrite_manifest(newest)
    assert "another version of this project (format 99 of state.json, this version reads 2)" in refusal(
        world, output, capsys
    )


def test_a_checkpoint_of_another_step_is_refused_as_such(world, output, capsys):
    """And not because of one of its flags."""
    script = load_step(2)
    argv = flags(world, 2, output, resume_from_checkpoint="auto", save_interval=1)
    with pytest.raises(SystemExit) as stop:
        run(script.main, script.Config, argv)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "checkpoint-3 is a checkpoint of another step" in line
    assert "'sft'" in line and "'preference'" in line


@pytest.mark.parametrize(
    ("garbage", "message"),
    [(b"garbage\n", "line 1: not JSON"), (b"\xff\xfe\n", "not text"), (b"7\n", "line 1: expected")],
)
def test_metrics_that_cannot_be_continued_are_refused_before_training(world, output, capsys, garbage, message):
    metrics = output / "metrics.jsonl"
    metrics.write_bytes(garbage + metrics.read_bytes())
    assert f"{metrics}" in (line := refusal(world, output, capsys)) and message in line


def test_what_was_logged_after_the_checkpoint_need_not_be_readable(world, output):
    metrics = output / "metrics.jsonl"
    position = json.loads((output / "checkpoints" / "checkpoint-3" / "state.json").read_text())["state"][
        "metrics_position"
    ]
    metrics.write_bytes(metrics.read_bytes()[:position] + b"\xffgarbage\n")
    resume(world, output)


def test_other_rows_are_refused(world, output, tmp_path, capsys):
    original = Path(world["data"]).read_text()
    try:
        Path(world["data"]).write_text(original.replace("milk", "tea").replace("happy", "glad"))
        assert "--data_path: the rows" in refusal(world, output, capsys)
    finally:
        Path(world["data"]).write_text(original)


def test_frozen_weights_that_changed_are_refused(world, tiny_tokenizer, tmp_path, capsys):
    """With LoRA a checkpoint holds no frozen weights: those in the model's folder must be the same."""
    from tiny_models import save_causal_lm

    model = tmp_path / "model"
    shutil.copytree(world["model"], model)
    changes = {"model_name_or_path": model, "lora_dim": 2, "only_optimize_lora": True}
    run_step(1, flags(world, 1, tmp_path / "output", **(CHANGES | changes)))
    checkpoint = tmp_path / "output" / "checkpoints" / "checkpoint-3"
    stored = sum(path.stat().st_size for path in checkpoint.rglob("*.pt"))
    assert stored < (model / "model.safetensors").stat().st_size
    save_causal_lm(model, tiny_tokenizer, seed=5)
    assert "frozen weights" in refusal(world, tmp_path / "output", capsys, loads_model=True, **changes)


def test_a_run_with_checkpoints_is_not_begun_again_by_accident(world, output, capsys):
    script = load_step(1)
    with pytest.raises(SystemExit) as stop:
        run(script.main, script.Config, flags(world, 1, output, **CHANGES))
    assert stop.value.code == 2
    assert "--resume_from_checkpoint auto" in capsys.readouterr().err


def test_auto_without_a_checkpoint_begins_and_says_so(world, tmp_path, capsys):
    resume(world, tmp_path / "new", max_steps=1)
    assert "starting from the beginning" in capsys.readouterr().out


# --- no room ---------------------------------------------------------------------------------------------------------


def save_without_room(world: dict, output: str) -> str:
    """Two steps with a checkpoint each; before the second, rank 1 may not write files of more than some bytes."""
    from utils.parallel import distributed

    changes = CHANGES | {"zero_stage": 2, "lr_scheduler_type": "constant"}
    run_step(1, flags(world, 1, output, **(changes | {"max_steps": 1})))
    if distributed.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))
    try:
        run_step(1, flags(world, 1, output, **(changes | {"resume_from_checkpoint": "auto", "max_steps": 2})))
    except InputError as error:
        return str(error)
    return "it was saved"


def test_a_full_disk_stops_every_rank_and_leaves_earlier_checkpoints(world, tmp_path):
    messages = run_ranks(save_without_room, 2, world, str(tmp_path))
    assert messages[0] == messages[1] and "--output_dir" in messages[0]
    assert "step 2 cannot be written (no space left on the device)" in messages[0] or "File too large" in messages[0]
    checkpoints = tmp_path / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-1", "latest"]
    records = folders.read_manifest(checkpoints / "checkpoint-1")
    assert folders.wrong_checksum(checkpoints / "checkpoint-1", records, records) is None


# --- several machines ------------------------------------------------------------------------------------------------


def share(folder: str) -> list[str]:
    """The outcomes for a folder that both ranks share, and for one that each has for itself."""
    from utils.checkpoints.search import check_shared
    from utils.parallel import distributed

    messages = []
    for output in (Path(folder), Path(folder) / str(distributed.rank())):
        output.mkdir(exist_ok=True)
        try:
            check_shared(output)
            messages.append("shared")
        except InputError as error:
            messages.append(str(error))
    return messages


def test_a_folder_that_the_processes_do_not_share_is_refused_at_the_start(tmp_path):
    for rank, (first, second) in enumerate(run_ranks(share, 2, str(tmp_path))):
        assert first == "shared"
        assert "--output_dir" in second and "process 1 does not see the files that process 0 writes" in second
        assert not list((tmp_path / str(rank)).iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
