"""Resuming on another number of processes or ZeRO stage: the state is that of the checkpoint, and the run continues."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from processes import run_ranks
from safetensors.torch import load_file
from step_scripts import flags, run_step
from tiny_models import SIZES

from utils.arguments import PpoConfig, SftConfig
from utils.checkpoints.elastic import divide_average
from utils.checkpoints.run_state import STATE_FORMAT, RunState, read_state, write_state
from utils.errors import InputError

IDS = torch.arange(3, 43).view(4, 10)
Layout = tuple[int, str, int]  # ZeRO stage, dtype, dimension of LoRA


def make_engine(folder: str, layout: Layout):
    from utils.models.lora import add_lora
    from utils.parallel import distributed, zero

    distributed.init_distributed()
    stage, dtype, lora = layout
    config = zero.zero_config(stage, dtype)
    with zero.sharded_loading(config):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=zero.TORCH_DTYPES[dtype])
    torch.manual_seed(1)
    add_lora(model, lora)
    groups = zero.parameter_groups(model, learning_rate=1e-2, weight_decay=0.1, lora_learning_rate=1e-3)
    return zero.initialize_engine(model, config, groups=groups, scheduler="linear", total_steps=10)


def train(engine, steps: int) -> None:
    from utils.parallel.updates import optimizer_step

    for step in range(steps):
        batch = {"input_ids": IDS + step}
        optimizer_step(engine, [batch], lambda batch: engine(**batch).logits.float().square().mean(), what="step")


def full_state(engine) -> dict:
    """Weights that compute, master weights, moments, steps, rates and counters, through DeepSpeed's own interface."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from utils.parallel.zero import gathered

    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    base = getattr(optimizer, "optimizer", optimizer)
    if stage in (1, 2):
        optimizer._hp_optimizer_states_linked = False  # DeepSpeed's own linking only covers the first group
        optimizer._lazy_init_hp_params_optimizer_state()
    state = {"steps": {float(values["step"]) for values in base.state.values() if values}}
    state["rates"] = engine.get_lr(), [group["lr"] for group in optimizer.param_groups]
    state["schedule"] = engine.lr_scheduler.last_epoch
    state["counters"] = engine.global_steps, engine.skipped_steps
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        with gathered([parameter]):
            state[name] = parameter.detach().clone()
        shape = state[name].shape
        master = parameter if stage == 0 else safe_get_full_fp32_param(parameter)
        state[f"{name} master"] = master.detach().clone().view(shape)
        for key in ("exp_avg", "exp_avg_sq") if state["steps"] else ():
            found = base.state[parameter][key] if stage == 0 else safe_get_full_optimizer_state(parameter, key)
            state[f"{name} {key}"] = found.detach().clone().view(shape)
    return state


def check_equal(found: dict, expected: dict, place: str) -> None:
    assert found.keys() == expected.keys(), place
    for name, value in expected.items():
        equal = torch.equal(found[name], value) if torch.is_tensor(value) else found[name] == value
        assert equal, (place, name, found[name], value)


def save_layouts(folder: str, output: str, layouts: list[Layout], steps: list[int]) -> None:
    """Save each layout after its number of `steps`."""
    from utils.checkpoints.engine_state import EngineWriter
    from utils.parallel import distributed

    for number, layout in enumerate(layouts):
        engine = make_engine(folder, layout)
        train(engine, steps[number])
        writer = EngineWriter(Path(output) / str(number))
        writer.folder.mkdir(parents=True, exist_ok=True)
        writer.save(engine, "model")
        assert writer.error is None
        state = full_state(engine)
        if distributed.is_main():
            torch.save(state, Path(output) / str(number) / "full.pt")
        distributed.barrier()


def load_layouts(folder: str, output: str, layouts: list[Layout]) -> None:
    """Every engine gets the state of the one that was saved under its number, and can train further."""
    from utils.checkpoints.engine_state import load_engine

    for number, layout in enumerate(layouts):
        engine = make_engine(folder, layout)
        load_engine(engine, Path(output) / str(number), "model")
        saved = torch.load(Path(output) / str(number) / "full.pt")
        check_equal(full_state(engine), saved, str(layout))
        train(engine, 1)
        assert engine.global_steps == saved["counters"][0] + 1


SAVED = [(0, "fp32", 0), (1, "fp32", 4), (2, "fp32", 0), (3, "fp32", 4), (1, "bf16", 0), (3, "bf16", 0)]
LOADED = [(2, "fp32", 0), (3, "fp32", 4), (3, "fp32", 0), (1, "fp32", 4), (2, "bf16", 0), (0, "bf16", 0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(SIZES["tied_llama"](63)).save_pretrained(path)  # odd: padding
    return str(path)


def load_and_save(folder: str, loaded: str, saved: str, layouts: list[Layout], steps: list[int]) -> None:
    load_layouts(folder, loaded, LOADED)
    save_layouts(folder, saved, layouts, steps)


def test_state_of_one_process_on_two_and_of_two_on_one(folder, tmp_path):
    """Also before the first step, when the optimiser has no moments yet."""
    of_one, of_two = str(tmp_path / "one"), str(tmp_path / "two")
    save_layouts(folder, of_one, SAVED, [2] * len(SAVED))
    run_ranks(load_and_save, 2, folder, of_one, of_two, SAVED + SAVED[:2], [2] * len(SAVED) + [0, 0])
    load_layouts(folder, of_two, LOADED + LOADED[:2])


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (3, 2), (2, 3)])
def test_state_of_every_stage_at_every_stage(folder, tmp_path, before, after):
    dtypes = [("fp32", 0), ("bf16", 4)]
    pairs = [((a, *kind), (b, *kind)) for a in range(4) for b in range(4) for kind in dtypes]
    run_ranks(save_layouts, before, folder, str(tmp_path), [saved for saved, _ in pairs], [2] * len(pairs))
    run_ranks(load_layouts, after, folder, str(tmp_path), [loaded for _, loaded in pairs])


def run_it(processes: int, step: int, argv: list[str]) -> None:
    run_step(step, argv) if processes == 1 else run_ranks(run_step, processes, step, argv)


def changes_of(step: int, stage: int, lora: int, rows: int) -> dict:
    """Flags of a run whose processes have `rows` rows per step, without dropout, whose masks would differ."""
    shared = {"max_steps": 4, "save_interval": 2, "save_total_limit": 0, "lr_scheduler_type": "linear"}
    if step == 1:
        return shared | {"zero_stage": stage, "lora_dim": lora, "per_device_train_batch_size": rows}
    shared |= {"actor_zero_stage": stage, "critic_zero_stage": stage, "actor_lora_dim": lora, "critic_lora_dim": lora}
    shared |= {"enable_ema": True, "kl_target": 0.5, "kl_horizon": 20, "actor_learning_rate": 1e-3}
    return shared | {"per_device_generation_batch_size": rows, "per_device_training_batch_size": rows // 2}


def continue_elsewhere(world: dict, folder: Path, step: int, lora: int, before: list[int], after: list[int]) -> None:
    """Run on `before` = [processes, stage] to the end, and from the middle on `after`; compare the final weights."""
    whole, cut = folder / "whole", folder / "cut"
    run_it(before[0], step, flags(world, step, whole, **changes_of(step, before[1], lora, 8 // before[0])))
    shutil.copytree(whole / "checkpoints/checkpoint-2", cut / "checkpoints/checkpoint-2")
    shutil.copy(whole / "metrics.jsonl", cut / "metrics.jsonl")
    changes = changes_of(step, after[1], lora, 8 // after[0])
    run_it(after[0], step, flags(world, step, cut, resume_from_checkpoint="auto", **changes))
    weights = [path.relative_to(whole) for path in whole.rglob("model*.safetensors")]
    assert len(weights) == (1 if step == 1 else 3)
    for path in weights:
        expected, found = load_file(whole / path), load_file(cut / path)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-5, msg=f"{path} {name}")
    states = [json.loads((run / "checkpoints/checkpoint-4/state.json").read_text())["state"] for run in (whole, cut)]
    assert states[0]["step"] == states[1]["step"] == 4


@pytest.mark.parametrize(
    ("step", "lora", "before", "after"),
    [
        (1, 4, [2, 2], [1, 3]),
        pytest.param(3, 0, [1, 0], [2, 3], marks=pytest.mark.slow),
        pytest.param(1, 0, [1, 0], [2, 2], marks=pytest.mark.slow),
        pytest.param(1, 0, [2, 3], [2, 1], marks=pytest.mark.slow),
        pytest.param(3, 4, [2, 3], [1, 2], marks=pytest.mark.slow),
        pytest.param(3, 0, [2, 2], [2, 3], marks=pytest.mark.slow),
    ],
)
def test_a_run_continues_elsewhere(world, tmp_path, step, lora, before, after):
    continue_elsewhere(world, tmp_path, step, lora, before, after)


def test_averages_are_divided_anew():
    whole = torch.arange(6.0).view(3, 2)
    parts = [torch.tensor([0.0, 1, 2, 3]), torch.tensor([4.0, 5, -1, -1])]  # of two ranks, the last padded
    own = torch.zeros(3, 2)
    divide_average(parts, own, rank=0)
    assert torch.equal(own, whole)
    thirds = [torch.zeros(2) for _ in range(3)]
    for rank, own in enumerate(thirds):
        divide_average([whole], own, rank)
    assert torch.equal(torch.cat(thirds), whole.flatten())


def described(config: dict, world_size: int = 1) -> dict:
    """A run as a checkpoint describes it."""
    run = {"format": STATE_FORMAT, "purpose": "sft", "config": config, "data": []}
    return run | {"world_size": world_size, "libraries": {}}


def test_rows_of_a_step_must_stay_the_same(tmp_path, capsys):
    config = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "zero_stage": 2}
    run = described(config, 2)
    write_state(tmp_path, RunState(step=3), run)
    assert read_state(tmp_path, run, SftConfig) == (RunState(step=3), 2) and capsys.readouterr().out == ""
    with pytest.raises(
        InputError, match="batch_size 4 x --gradient_accumulation_steps 3 x 1 processes make 12 .* = 24"
    ):
        read_state(tmp_path, run | {"world_size": 1}, SftConfig)
    fitting = config | {"gradient_accumulation_steps": 6, "zero_stage": 3}
    assert read_state(tmp_path, run | {"config": fitting, "world_size": 1}, SftConfig) == (RunState(step=3), 2)
    assert "of 2 processes continues with 1, --gradient_accumulation_steps 6, --zero_stage 3" in capsys.readouterr().out


def test_rollouts_and_text_must_stay_the_same(tmp_path):
    sizes = {"per_device_training_batch_size": 2, "gradient_accumulation_steps": 2}
    sizes |= {"per_device_generation_batch_size": 4, "generation_batches": 2}
    text = {"unsupervised_dataset_name": "text.jsonl"}

    def check(now: dict, then: dict) -> None:
        write_state(tmp_path, RunState(step=3), described(then))
        assert read_state(tmp_path, described(now), PpoConfig) == (RunState(step=3), 1)

    check(sizes | {"per_device_generation_batch_size": 8, "generation_batches": 1}, sizes)
    with pytest.raises(InputError, match="--per_device_generation_batch_size 4 x --generation_batches 1 x 1 processes"):
        check(sizes | {"generation_batches": 1}, sizes)
    regrouped = sizes | {"per_device_training_batch_size": 4, "gradient_accumulation_steps": 1}
    check(regrouped, sizes)
    check(sizes | text, sizes | text)
    with pytest.raises(InputError, match="--per_device_training_batch_size 4 x 1 processes make 4 rows"):
        check(regrouped | text, sizes | text)
