"""What saving holds in memory, and what lies on the disk: by hand, and against the files of real runs."""

from collections import namedtuple
from pathlib import Path

import pytest
import transformers
from step_scripts import flags, load_step, run_step

from utils.data.batches.sizes import Rows
from utils.preflight.dry_runs import free_disk
from utils.preflight.estimate import estimate
from utils.preflight.memory import Engine
from utils.preflight.model_shape import Matrix, ModelShape
from utils.preflight.phases import Machine
from utils.preflight.roles import Subject
from utils.preflight.saving import SavedModel, checkpoints_at_once, saving_moments

MIB = 2**20
SHAPE = ModelShape(
    parameters=(Matrix(20 * MIB, True), Matrix(4 * MIB, True), Matrix(8 * MIB, False)),
    layers=2, hidden=64, vocabulary=32_000, head_trains=True, adapted=0, matrices=0, cache_per_token=256, decodes=True,
)  # fmt: skip
TRAINED, TOTAL = 24 * MIB, 32 * MIB
MERGED = 31 * MIB  # numbers of the model without its LoRA factors
LLAMA = transformers.LlamaConfig(
    vocab_size=32_000, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=1024, pad_token_id=0,
)  # fmt: skip
LAYERS = 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512 + 2 * 256) + 256
ACTOR, CRITIC = LAYERS + 2 * 32_000 * 256, LAYERS + 32_000 * 256 + 256


def saved(stage: int, dtype: str, world_size: int = 4, *, on_gpu: bool = False, twice: int = 0) -> SavedModel:
    written = ModelShape(**{**vars(SHAPE), "parameters": (Matrix(MERGED, True),)})
    engine = Engine(shape=SHAPE, dtype=dtype, stage=stage, world_size=world_size, on_gpu=on_gpu)
    return SavedModel(engine, written, twice)


def totals(moments: list) -> list[dict[str, float]]:
    return [{name: blocks.total for name, blocks in items.items()} for items in moments]


@pytest.mark.parametrize("world_size", [1, 4])
def test_bytes_of_a_checkpoint_by_stage_whatever_the_number_of_processes(world_size):
    def stored(stage, dtype):
        return saved(stage, dtype, world_size).engine.stored_bytes() / TRAINED

    assert [stored(stage, "fp32") for stage in (0, 1, 2, 3)] == [12, 16, 16, 12]
    assert [stored(stage, "bf16") for stage in (0, 1, 2, 3)] == [14, 14, 14, 12]


def test_a_cpu_process_holds_a_copy_of_the_merged_model():
    # of the largest parameter: absolute values and three masks
    check, copy = {"check for NaN": 20 * MIB * (2 + 3)}, {"copy to save": 2 * MERGED}
    assert totals(saving_moments([saved(2, "bf16")], None)) == sorted([check, copy], key=lambda x: -sum(x.values()))
    tied = saving_moments([saved(2, "bf16", twice=50 * MIB)], None)
    assert totals(tied)[0] == {"copy to save": 2 * (MERGED + 50 * MIB)}


def test_a_gpu_gathers_one_parameter_and_puts_weights_aside_for_the_average():
    gather, check = {"gather buffers": 2 * 20 * MIB}, {"check for NaN": 20 * MIB * 5 / 4}
    aside = {"weights put aside": 2 * TRAINED / 4}
    model = saved(3, "bf16", on_gpu=True)
    assert totals(saving_moments([model], None)) == [gather, check]
    assert totals(saving_moments([model], model)) == [aside | gather, gather, aside | check, check]
    whole = saved(2, "bf16", on_gpu=True)
    assert totals(saving_moments([], whole))[1] == {"weights put aside": 2 * TRAINED}


Flags = namedtuple("Flags", "save_interval save_total_limit")


@pytest.mark.parametrize(
    ("interval", "limit", "length", "count"),
    [(0, 2, 25, 0), (10, 2, 25, 3), (10, 2, 35, 3), (10, 2, 20, 2), (10, 2, 5, 1), (10, 2, None, 3), (10, 0, 25, 3),
     (10, 0, 1000, 100), (10, 0, None, None)],
)  # fmt: skip
def test_checkpoints_that_lie_on_the_disk_together(interval, limit, length, count):
    assert checkpoints_at_once(Flags(interval, limit), length) == count


# --- whole steps -----------------------------------------------------------------------------------------------------


def estimated(step: int, device_type: str = "cuda", **changes):
    names = ("actor_model_name_or_path", "critic_model_name_or_path") if step == 3 else ("model_name_or_path",)
    config = load_step(step).Config(**dict.fromkeys(names, "somewhere"), **changes)
    machine = Machine(device_type=device_type, world_size=4, base=0, memory=None)
    subject = Subject(load_step(step).plan_of, dict.fromkeys(config.roles(), LLAMA), 0, Rows(1000))
    return estimate(config, subject, machine)


def test_models_and_checkpoints_of_the_steps():
    assert estimated(1).disk.models == estimated(1, save_total_limit=3).disk.checkpoint == 0
    sft = estimated(1, output_dir="out", save_interval=5, zero_stage=2)
    assert (sft.disk.checkpoint, sft.disk.models) == (14 * ACTOR, 2 * ACTOR)
    rlhf = {"output_dir": "out", "save_interval": 5, "enable_ema": True, "actor_zero_stage": 3}
    ppo = estimated(3, **rlhf)
    assert ppo.disk.checkpoint == 12 * ACTOR + 14 * CRITIC + 4 * ACTOR
    assert ppo.disk.models == 2 * (2 * ACTOR + CRITIC)
    best = estimated(3, keep_best=True, **rlhf).disk.models
    assert best == 2 * 2 * (2 * ACTOR + CRITIC) + 2 * ACTOR  # a better one is written before the old one goes


def test_with_lora_the_factors_are_merged_or_written_beside():
    lora = {"output_dir": "out", "save_interval": 1, "lora_dim": 4, "only_optimize_lora": True}
    # 4 x (inputs + outputs) of q, k, v, o, gate, up and down
    factors = 4 * 4 * ((256 + 256) + (256 + 128) + (256 + 128) + (256 + 256) + 3 * (256 + 512))
    disk = estimated(1, **lora).disk
    assert (disk.checkpoint, disk.models) == (14 * factors, 2 * ACTOR)
    assert estimated(1, save_adapter=True, **lora).disk.models == 2 * (ACTOR + factors)


def test_a_gpu_process_has_the_saved_copy_in_its_hosts_memory():
    assert "saving" not in estimated(1).host and estimated(1, "cpu", output_dir="out").host == {}
    assert estimated(1, output_dir="out").host["saving"] == 2 * ACTOR
    averaged = {"output_dir": "out", "enable_ema": True}
    assert estimated(3, **averaged).host["saving"] == 2 * ACTOR
    assert estimated(3, save_interval=1, **averaged).host["saving"] == 4 * ACTOR  # the average in fp32


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_saving_an_average_is_counted_beside_what_stands(device_type):
    def saving(**changes):
        return next(phase.items for phase in estimated(3, device_type, output_dir="out", **changes).phases
                    if phase.name == "saving")  # fmt: skip

    assert saving(enable_ema=True)["weights put aside"] == 2 * ACTOR
    assert "weights put aside" not in saving()


# --- against real runs -----------------------------------------------------------------------------------------------


def written_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (".pt", ".safetensors"))


@pytest.mark.parametrize("changes", [
    {"actor_zero_stage": 3, "critic_zero_stage": 2, "enable_ema": True, "dtype": "bf16"},
    {"actor_lora_dim": 16, "only_optimize_lora": True, "save_adapter": True},
], ids=["stages", "lora"])  # fmt: skip
def test_a_run_writes_as_many_bytes_as_predicted(world, tmp_path, changes):
    changes = changes | {"save_interval": 1, "eval_interval": 1, "keep_best": True}
    argv = flags(world, 3, tmp_path / "out", **changes)
    said = run_step(3, [*argv, "--dry_run"])["disk_bytes"]
    run_step(3, argv)
    largest = max(written_bytes(tmp_path / "out" / name) for name in ("actor", "critic"))  # the one being replaced
    # beside the numbers, each of two checkpoints holds names, shapes, random states and DeepSpeed's own flags
    assert 0 < written_bytes(tmp_path / "out") + largest - said < 2 * 110_000


def test_too_small_a_disk_is_warned_of_and_named(world, tmp_path, monkeypatch, capsys):
    argv = flags(world, 1, tmp_path / "out" / "deep", save_interval=1, save_total_limit=3, dry_run=True)
    run_step(1, argv)
    printed = capsys.readouterr()
    assert "on the disk at --output_dir, GiB: " in printed.out and "4 checkpoints of " in printed.out
    assert "are free at" not in printed.err
    monkeypatch.setattr("utils.preflight.dry_runs.free_disk", lambda folder: 1000.0)
    assert run_step(1, argv)["disk_bytes"] > 1000
    warning = capsys.readouterr().err
    assert warning.count("0.00 GiB are free at --output_dir") == 1 and "--save_total_limit" in warning


def test_free_space_is_that_of_the_folder_that_will_hold_the_output(tmp_path):
    assert free_disk(None) is None
    assert free_disk(str(tmp_path / "not" / "there" / "yet")) > 0
