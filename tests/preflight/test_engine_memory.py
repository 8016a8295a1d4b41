"""Bytes of an engine by hand, by ZeRO stage, number format and processes; and what must hold for any flags."""

import dataclasses

import pytest
import transformers
from step_scripts import load_step

from utils.algorithms.logprobs import CHUNK
from utils.data.batches.sizes import Rows, RowSize
from utils.parallel.zero import GATHERED_ON_CPU, GATHERED_ON_GPU
from utils.preflight.blocks import LARGE_BLOCK, Blocks, blocks_of
from utils.preflight.estimate import estimate
from utils.preflight.memory import REDUCE_BUCKET, Engine, vocabulary_head
from utils.preflight.model_shape import Matrix, ModelShape
from utils.preflight.phases import HEAP_WASTE, KEPT_HEAP, Machine, Moment, largest_moments
from utils.preflight.roles import Subject
from utils.preflight.workload import micro_batch, training_batch

MIB = 2**20
SHAPE = ModelShape(
    parameters=(Matrix(20 * MIB, True), Matrix(4 * MIB, True), Matrix(1000, True), Matrix(8 * MIB, False)),
    layers=2, hidden=64, vocabulary=32_000, head_trains=True, adapted=0, matrices=0, cache_per_token=256, decodes=True,
)  # fmt: skip
TRAINED, TOTAL = 24 * MIB + 1000, 32 * MIB + 1000


def engine(stage: int, dtype: str, world_size: int = 1, **changes) -> Engine:
    return Engine(shape=SHAPE, dtype=dtype, stage=stage, world_size=world_size, **changes)


def standing(stage: int, dtype: str, world_size: int) -> dict[str, float]:
    return {name: blocks.total for name, blocks in engine(stage, dtype, world_size).persistent().items()}


def test_blocks_are_told_apart_by_size():
    assert blocks_of([LARGE_BLOCK, LARGE_BLOCK - 1, 5]) == Blocks(LARGE_BLOCK + 4, LARGE_BLOCK)


@pytest.mark.parametrize("world_size", [1, 4])
def test_what_stands_by_stage(world_size):
    part = 4 * TRAINED / world_size
    assert standing(0, "fp32", world_size) == {"parameters": 4 * TOTAL, "optimiser states": 8 * TRAINED}
    for stage in (1, 2):
        assert standing(stage, "fp32", world_size) == {
            "parameters": 4 * TOTAL, "fp32 master weights": part, "optimiser states": 2 * part,
        }  # fmt: skip
    sharded = {"fp32 master weights": part, "optimiser states": 2 * part, "gradients": part}
    assert standing(0, "bf16", world_size) == standing(1, "bf16", world_size) == {"parameters": 2 * TOTAL} | sharded
    assert "gradients" not in standing(2, "bf16", world_size)
    whole = 2000 if world_size > 1 else 0  # the matrix below 10,000 numbers
    assert standing(3, "bf16", world_size) == {"parameters": 2 * TOTAL / world_size + whole} | sharded


def test_an_engine_that_only_evaluates_holds_parameters_alone():
    frozen = {stage: engine(stage, "bf16", 4, trains=False).persistent() for stage in (0, 1, 2, 3)}
    assert {name for items in frozen.values() for name in items} == {"parameters"}
    sizes = [items["parameters"].total for items in frozen.values()]
    assert sizes == [2 * TOTAL, 2 * TOTAL, 2 * TOTAL, 2 * TOTAL / 4 + 2000]


def test_offload_leaves_parameters_on_the_device_below_stage_3():
    part = 4 * TRAINED / 2
    offloaded = engine(2, "bf16", 2, offload=True, on_gpu=True)
    assert {name: b.total for name, b in offloaded.persistent().items() if b.total} == {"parameters": 2 * TOTAL}
    assert offloaded.host_bytes() == 4 * part
    assert engine(3, "bf16", 2, offload=True, on_gpu=True).host_bytes() == 4 * part + 2 * TOTAL / 2


def test_a_pass_at_stage_3_gathers_parameters_up_to_a_limit():
    assert engine(2, "bf16", 4).gathered() == Blocks()
    assert engine(3, "bf16", 4).gathered() == Blocks(2 * (12 * MIB + 1000), 2 * 20 * MIB)
    wide = dataclasses.replace(SHAPE, parameters=SHAPE.parameters + (Matrix(3000 * MIB, True),) * 2)
    for on_gpu, (live, _) in ((False, GATHERED_ON_CPU), (True, GATHERED_ON_GPU)):
        gathered = dataclasses.replace(engine(3, "bf16", 4, on_gpu=on_gpu), shape=wide).gathered()
        assert gathered.total == 2 * (3000 * MIB + live)


def test_buckets_are_filled_on_a_cpu_and_allocated_on_a_gpu():
    assert engine(1, "bf16").bucket().total == 4 * TRAINED
    assert engine(2, "bf16").bucket().total == 2 * TRAINED
    assert engine(2, "bf16", on_gpu=True).bucket().total == 2 * 2 * REDUCE_BUCKET  # one fills while one is reduced
    assert engine(0, "fp32", on_gpu=True).bucket().total == 0


def test_logits_are_kept_up_to_a_limit_and_then_computed_twice():
    rows = CHUNK // 32_000
    trains = engine(0, "fp32")
    few = vocabulary_head(trains, 100, with_grad=True)
    assert few["logits"].total == 100 * 32_000 * 4 + 3 * 4 * 2**18
    assert few["gradients"].total == 32_000 * 64 * 4
    kept = vocabulary_head(trains, 2 * rows, with_grad=True)
    assert kept["logits"].total == pytest.approx(2 * rows * 32_000 * 4 + 3 * 4 * 2**18)
    assert kept["gradients"].total == 2 * 32_000 * 64 * 4
    many = vocabulary_head(trains, 10 * rows, with_grad=True)
    assert many["logits"].total == rows * 32_000 * 4 + 3 * 4 * 2**18
    assert vocabulary_head(trains, 10 * rows, with_grad=False)["logits"] == many["logits"]
    assert vocabulary_head(trains, 0, with_grad=True) == {}


def test_a_cpu_keeps_its_heap_and_gives_large_blocks_back():
    machine = Machine(device_type="cpu", world_size=1, base=100, memory=None)
    moments = [
        Moment("loading", {"parameters": Blocks(10, 50)}),
        Moment("training", {"parameters": Blocks(10, 20), "activations": Blocks(80, 0)}),
        Moment("training", {"parameters": Blocks(10, 20), "gradients": Blocks(20, 40)}),
    ]
    loading, training = largest_moments(moments, machine)
    heap = 90 + HEAP_WASTE * (90 - 30)
    assert loading.total == 100 + 60
    assert training.total == 100 + 20 + 40 + heap
    assert training.items[KEPT_HEAP] == heap - 30


def test_the_heaviest_micro_batch():
    rows = [RowSize(60, 60, 20), RowSize(40, 40, 10), RowSize(10, 10, 5)]
    batch = micro_batch(rows, RowSize(64, 64, 64), rows=2, steps=3, max_tokens=0)
    assert (batch.tokens, batch.sequences, batch.width, batch.targets, batch.per_step) == (100, 2, 60, 30, 3)
    budget = micro_batch(rows, RowSize(64, 64, 64), rows=3, steps=1, max_tokens=60)
    assert (budget.tokens, budget.sequences, budget.per_step) == (60, 1, 2)
    unknown = micro_batch([], RowSize(64, 64, 64), rows=2, steps=1, max_tokens=0)
    assert (unknown.tokens, unknown.targets) == (128, 128)


# --- whole steps -----------------------------------------------------------------------------------------------------

LLAMA = transformers.LlamaConfig(
    vocab_size=32_000, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=1024, pad_token_id=0,
)  # fmt: skip
MACHINES = {
    "cpu": Machine(device_type="cpu", world_size=4, base=0, memory=None),
    "gpu": Machine(device_type="cuda", world_size=4, base=0, memory=None),
}


def step_config(step: int, **changes):
    names = ("actor_model_name_or_path", "critic_model_name_or_path") if step == 3 else ("model_name_or_path",)
    return load_step(step).Config(**dict.fromkeys(names, "somewhere"), **changes)


def estimated(step: int, machine: str = "cpu", **changes):
    config = step_config(step, **changes)
    subject = Subject(load_step(step).plan_of, dict.fromkeys(config.roles(), LLAMA), 0, Rows(1000))
    return estimate(config, subject, MACHINES[machine])


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("step", [1, 2, 3])
def test_more_rows_or_longer_ones_never_need_less(step, machine):
    size = "per_device_training_batch_size" if step == 3 else "per_device_train_batch_size"
    length = "max_answer_seq_len" if step == 3 else "max_seq_len"
    for name, values in {size: (1, 2, 4, 8, 16), length: (64, 128, 256, 512)}.items():
        peaks = [estimated(step, machine, **{name: value}).peak for value in values]
        assert peaks[-1] > peaks[0], name
        # on a CPU logits that grow beyond 32 MiB leave the heap, and take their share of its waste along
        dip = 0.9 if machine == "cpu" else 1.0
        assert all(peak >= dip * max(peaks[: place + 1]) for place, peak in enumerate(peaks)), name


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("step", [1, 2, 3])
def test_checkpointing_and_a_token_budget_lower_the_peak(step, machine):
    size = "per_device_training_batch_size" if step == 3 else "per_device_train_batch_size"
    roles = ("actor_", "critic_") if step == 3 else ("",)
    plain = estimated(step, machine, **{size: 16})
    checkpointed = estimated(step, machine, **{size: 16}, **{f"{role}gradient_checkpointing": True for role in roles})
    budget = estimated(step, machine, **{size: 16}, max_tokens_per_batch=1024)
    assert checkpointed.peak < plain.peak and budget.peak < plain.peak
    assert budget.tokens_per_step == plain.tokens_per_step


@pytest.mark.parametrize("machine", MACHINES)
def test_higher_stages_never_hold_more_that_stands(machine):
    for dtype in ("bf16", "fp32"):
        held = []
        for stage in (0, 1, 2, 3):
            items = estimated(1, machine, zero_stage=stage, dtype=dtype).phases[-1].items
            held.append(items["parameters"] + items["optimiser states"])
        assert held == sorted(held, reverse=True) and held[3] < held[2]


def test_step3_counts_every_model_and_lora_shares_the_reference():
    phases = {phase.name: phase.items for phase in estimated(3, enable_ema=True).phases}
    assert {"generation", "scoring", "actor training", "critic training"} <= set(phases)
    for name in ("reference model", "reward model", "critic", "moving average", "KV cache"):
        assert phases["actor training"][name] > 0, name
    slots, length, per_token = 16, 512, 2 * 4 * 4 * 32
    assert phases["generation"]["KV cache"] == slots * length * per_token * 2
    released = {phase.name: phase.items for phase in estimated(3, release_inference_cache=True).phases}
    assert "KV cache" not in released["actor training"] and released["generation"]["KV cache"] > 0
    matrices = 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
    assert phases["generation"]["generation copies"] == 2 * (matrices + 32_000 * 256)
    shared = estimated(3, actor_lora_dim=4, critic_lora_dim=4, only_optimize_lora=True)
    assert all("reference model" not in phase.items for phase in shared.phases)


def test_adapted_copies_of_weights_stay_unless_they_are_unpinned():
    def copies(machine="gpu", **changes):
        items = {phase.name: phase.items for phase in estimated(3, machine, actor_lora_dim=4, **changes).phases}
        return items["generation"]["generation copies"], items["actor training"].get("generation copies", 0)

    adapted = 2 * 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
    assert copies() == (adapted, adapted)
    assert copies(unpin_actor_parameters=True) == (adapted, 0)
    assert copies(lora_generation="unfused") == (0, 0)


@pytest.mark.parametrize("packs", [True, False])
def test_copies_on_a_cpu_stay_unless_they_are_packed(monkeypatch, packs):
    monkeypatch.setattr("utils.preflight.generation.can_pack", lambda weight: packs)
    training = next(phase for phase in estimated(3).phases if phase.name == "actor training")
    assert (training.items.get("generation copies", 0) == 0) == packs


def test_tokens_and_rows_known_from_the_data_count_rather_than_the_flags():
    config = step_config(1, per_device_train_batch_size=2)
    short = Rows(10, (RowSize(30, 30, 12), RowSize(20, 20, 8)))
    subject = Subject(load_step(1).plan_of, {"model": LLAMA}, 0, short)
    assert training_batch(subject.plan(config, MACHINES["cpu"]), short, max_tokens=0).tokens == 50
    assert estimate(config, subject, MACHINES["cpu"]).tokens_per_step == 4 * 50
    longest = estimate(config, dataclasses.replace(subject, rows=Rows(10)), MACHINES["cpu"])
    assert longest.peak > estimate(config, subject, MACHINES["cpu"]).peak
