"""Memory of generation: the engine's own decision whether to stream, sharing, and the optimiser in host memory."""

from types import SimpleNamespace

import pytest
import transformers
from step_scripts import load_step

import utils.generation.decoder as decoder_module
import utils.preflight.generation as generation_module
from utils.data.batches.sizes import Rows
from utils.generation.decoder import LlamaDecoder
from utils.generation.hybrid_engine import HybridEngine
from utils.models.on_meta import build_on_meta
from utils.parallel import distributed, memory
from utils.preflight.estimate import estimate
from utils.preflight.generation import answers_memory, estimate_generation, must_stream, needed_to_gather
from utils.preflight.phases import Machine, total_of
from utils.preflight.report import gathering_line
from utils.preflight.roles import Role, Subject, planned_roles
from utils.preflight.workload import BatchShape, training_batch

LLAMA = transformers.LlamaConfig(
    vocab_size=32_000, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=1024, pad_token_id=0,
)  # fmt: skip
MATRICES = 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512  # of a layer
NORMS, VOCABULARY = 9 * 256, 32_000 * 256
ACTOR = 4 * MATRICES + NORMS + 2 * VOCABULARY
CACHE = 16 * 512 * 2 * 4 * 4 * 32  # numbers: slots x length x keys and values x layers x heads x size of a head


def machine(memory: float | None = None, device_type: str = "cuda") -> Machine:
    return Machine(device_type=device_type, world_size=4, base=0, memory=memory)


def step3_config(**changes):
    names = ("actor_model_name_or_path", "critic_model_name_or_path")
    return load_step(3).Config(**dict.fromkeys(names, "somewhere"), **({"actor_zero_stage": 3} | changes))


def subject_of(step: int, config, model=LLAMA) -> Subject:
    return Subject(load_step(step).plan_of, dict.fromkeys(config.roles(), model), 0, Rows(1000))


def estimated(memory: float | None = None, device_type: str = "cuda", **changes):
    config = step3_config(**changes)
    return estimate(config, subject_of(3, config), machine(memory, device_type))


def generation(*arguments, **changes) -> dict[str, float]:
    return next(phase.items for phase in estimated(*arguments, **changes).phases if phase.name == "generation")


def role_and_batch(step: int, config, name: str, on: Machine, model=LLAMA) -> tuple[Role, BatchShape]:
    """The role of that name, and the micro-batch that it is planned for."""
    subject = subject_of(step, config, model)
    plan = subject.plan(config, on)
    batch = training_batch(plan, subject.rows, max_tokens=0)
    return planned_roles(plan, subject, on, batch)[name], batch


def actor_role(config, device_type: str) -> Role:
    return role_and_batch(3, config, "actor", machine(None, device_type))[0]


@pytest.mark.parametrize("joins", [True, False])  # False: as on a GPU
@pytest.mark.parametrize(
    "changes",
    [
        {"max_prompt_seq_len": 250},
        {"actor_lora_dim": 4, "actor_lora_module_name": "q_proj,down_proj"},
        {"actor_lora_dim": 4, "lora_generation": "unfused"},
        {"enable_hybrid_engine": False},
    ],
)
def test_the_decision_is_that_of_the_engine_down_to_the_byte(monkeypatch, changes, joins):
    for module in (decoder_module, generation_module):
        monkeypatch.setattr(module, "JOIN_ON", (distributed.device().type,) if joins else ())
    config, here = step3_config(**changes), distributed.device().type
    actor = actor_role(config, here)
    needed = needed_to_gather(config, actor, machine(None, here))
    model = SimpleNamespace(model=build_on_meta(LLAMA, actor.flags, config.dtype).model)
    engine = SimpleNamespace(
        _config=config, _partitioned=True, _warned=True, _actor=SimpleNamespace(module=model),
        decoder=LlamaDecoder() if config.enable_hybrid_engine else None,
    )  # fmt: skip
    prompts = [[5] * config.max_prompt_seq_len] * config.per_device_generation_batch_size
    sampling = SimpleNamespace(max_new_tokens=config.max_answer_seq_len)
    for free in (needed / memory.USABLE - 2, needed / memory.USABLE + 2):
        monkeypatch.setattr(memory, "free_memory", lambda free=free: free)
        assert (
            must_stream(needed, free)
            == HybridEngine._must_stream(engine, prompts, sampling)
            == (free < needed / memory.USABLE)
        )


def test_what_the_decision_counts_by_hand():
    def needed(device_type="cuda", **changes):
        config = step3_config(**changes)
        return needed_to_gather(config, actor_role(config, device_type), machine(None, device_type))

    assert needed() == 2 * (ACTOR + CACHE)
    assert needed("cpu") == 2 * (2 * ACTOR + CACHE)  # joined or packed copies
    assert needed(enable_hybrid_engine=False) == 2 * ACTOR
    # factors of q, k, v, o, gate, up and down, and all matrices copied with them merged
    factors = 4 * 4 * ((256 + 256) + (256 + 128) + (256 + 128) + (256 + 256) + 3 * (256 + 512))
    assert needed(actor_lora_dim=4) == 2 * (ACTOR + factors + 4 * MATRICES + CACHE)
    assert needed(actor_lora_dim=4, lora_generation="unfused") == 2 * (ACTOR + factors + CACHE)


def test_auto_gathers_what_fits_and_streams_what_does_not():
    standing = sum(size for name, size in generation().items() if name not in
                   ("KV cache", "generation copies", "gather buffers", "activations", "logits")
                   and not name.startswith("freed"))  # fmt: skip
    enough = standing + 2 * (ACTOR + CACHE) / memory.USABLE
    whole, streamed = estimated(enough + 10), estimated(enough - 10)
    assert not whole.gathering.streams and streamed.gathering.streams
    assert whole.gathering.needed == 2 * (ACTOR + CACHE)
    assert generation(enough + 10)["gather buffers"] == 2 * ACTOR
    one_layer = 2 * (2 * VOCABULARY + NORMS + MATRICES)
    assert generation(enough - 10)["gather buffers"] == one_layer
    assert generation(stream_generation_weights="on")["gather buffers"] == one_layer
    assert generation(enough - 10, stream_generation_weights="off")["gather buffers"] == 2 * ACTOR
    assert "all of its weights once" in gathering_line(whole.gathering)
    assert "one at a time" in gathering_line(streamed.gathering)


def test_sample_answers_gather_all_weights_only_where_they_fit():
    config = load_step(1).Config(model_name_or_path="somewhere", zero_stage=3)
    engine = role_and_batch(1, config, "model", machine(), transformers.LlamaConfig())[0].engine
    enough = total_of(engine.persistent()).total + engine.whole().total / memory.USABLE
    for free, gathers in ((None, engine.whole()), (enough + 10, engine.whole()), (enough - 10, engine.gathered())):
        items = answers_memory(config, engine, machine(free), engine.persistent())
        assert items["gather buffers"] == gathers
        assert ("KV cache" in items) == (free is None), "the decode engine needs room beside the weights"
    assert engine.gathered().total < engine.whole().total / 5


def test_only_auto_at_stage_3_without_sharing_has_a_choice():
    assert estimated(1.0).gathering.streams and not estimated().gathering.streams
    for changes in (
        {"actor_zero_stage": 2},
        {"stream_generation_weights": "off"},
        {"inference_tp_size": 2},
    ):
        assert estimated(1.0, **changes).gathering is None


def test_streaming_without_the_decode_engine_gathers_as_a_forward_pass_does():
    phases = {phase.name: phase.items for phase in
              estimated(enable_hybrid_engine=False, stream_generation_weights="on").phases}  # fmt: skip
    assert phases["generation"]["gather buffers"] == phases["scoring"]["gather buffers"] > 0


def test_processes_that_share_the_actor_hold_a_part_of_it_for_the_rows_of_all():
    alone, shared = generation(), generation(inference_tp_size=2, tp_gather_partition_size=2)
    assert shared["KV cache"] == alone["KV cache"] == 2 * CACHE  # half the heads for twice the rows
    assert "generation copies" not in alone or not alone["generation copies"]
    assert shared["generation copies"] == 2 * 4 * MATRICES / 2
    assert shared["gather buffers"] == 2 * (2 * VOCABULARY + NORMS + 2 * MATRICES)
    assert shared["logits"] == 2 * alone["logits"] == 2 * 16 * 32_000 * (2 + 4 * 4)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_optimiser_is_in_the_hosts_memory_while_generating(stage):
    shards = 4 if stage else 1
    with_it = estimated(actor_zero_stage=stage, dtype="bf16" if stage else "fp32")
    without = estimated(
        actor_zero_stage=stage, dtype="bf16" if stage else "fp32", offload_optimizer_during_generation=True
    )
    moved = (12 if stage else 8) * ACTOR / shards
    assert with_it.host.get("optimiser during generation", 0) == 0
    assert without.host["optimiser during generation"] == moved
    for one, other in zip(with_it.phases, without.phases, strict=True):
        differ = {name for name in one.items if one.items[name] != other.items.get(name, 0)}
        if one.name != "generation":
            assert not differ
        else:
            assert {"optimiser states"} < differ <= {
                "optimiser states", "fp32 master weights", "freed, kept by the allocator"
            }  # fmt: skip
            assert other.items.get("gradients", 0) == one.items.get("gradients", 0)


def test_an_optimiser_that_is_not_on_the_device_does_not_move():
    for arguments in ({"offload": True}, {"device_type": "cpu"}):
        plain = estimated(**arguments)
        moved = estimated(**arguments, offload_optimizer_during_generation=True)
        assert [phase.total for phase in plain.phases] == [phase.total for phase in moved.phases]
        assert plain.host == moved.host


def test_memory_freed_by_the_optimiser_counts_in_the_decision():
    config = step3_config()
    actor, batch = role_and_batch(3, config, "actor", machine())
    persistent = actor.engine.persistent()
    optimiser = 12 * ACTOR / 4
    enough = sum(blocks.total for blocks in persistent.values()) + 2 * (ACTOR + CACHE) / memory.USABLE
    for changes, streams in (({}, True), ({"offload_optimizer_during_generation": True}, False)):
        memory_of = machine(enough - optimiser + 10)
        result = estimate_generation(step3_config(**changes), actor, memory_of, batch, persistent)
        assert result.gathering.streams == streams
