"""The switch between training and generation: gathered, streamed or shared weights, and training state as it was."""

import contextlib
import hashlib
import itertools

import pytest
import torch
from processes import run_ranks
from rlhf_setup import make_config, make_prompts, make_setup, rollout, save_models
from tiny_models import SIZES

import utils.generation.decoder as decoder_module
from utils.errors import InputError, RankError
from utils.generation import answers, hybrid_engine, tensor_parallel
from utils.generation.responses import Stop
from utils.generation.sampling import SamplingParams
from utils.generation.weights import StreamedLayers
from utils.parallel import distributed, memory, zero
from utils.parallel.zero import gathered
from utils.rlhf.evaluation import sampling_params
from utils.rlhf.updates import update

GREEDY = SamplingParams(max_new_tokens=12, greedy=True)


@pytest.fixture
def paths(tmp_path, tiny_tokenizer):
    return save_models(tmp_path, tiny_tokenizer)


def responses(found) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(found.tokens, found.mask, strict=True)]


def weights(module) -> dict[str, torch.Tensor]:
    with zero.gathered(module.parameters()):
        return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def base_digest(setup) -> str:
    names = sorted(name for name, _ in setup.actor.module.named_parameters() if "lora_" not in name)
    weights = dict(setup.actor.module.named_parameters())
    return hashlib.sha256(b"".join(weights[name].detach().numpy().tobytes() for name in names)).hexdigest()


@pytest.mark.parametrize("lora_generation", ["fused", "unfused"])
def test_a_thousand_switches_leave_the_base_weights_bit_identical(paths, tiny_tokenizer, lora_generation):
    config = make_config(paths, actor_lora_dim=2, lora_generation=lora_generation)
    setup = make_setup(config, tiny_tokenizer)
    for name, parameter in setup.actor.module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    before, first = base_digest(setup), None
    for turn in range(1000):
        found = responses(setup.hybrid.answer([[5, 6]], SamplingParams(max_new_tokens=1, greedy=True), seed=turn))
        first = first or found
        assert found == first and setup.actor.module.training
    assert base_digest(setup) == before


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_optimizer_state_waits_on_the_host_and_comes_back_bit_identical(paths, tiny_tokenizer, stage, dtype):
    """Here the host is another place in CPU memory: no byte of the moments stays, and training is unaffected."""
    outcomes = []
    for offload in (False, True):
        config = make_config(paths, actor_zero_stage=stage, actor_lora_dim=2, dtype=dtype)
        setup = make_setup(config, tiny_tokenizer)
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in setup.actor.module.parameters() if p.requires_grad)
        prompts = make_prompts(config, len(tiny_tokenizer))
        for turn in range(3):
            if offload:
                storages = list(zero._optimizer_storages(setup.actor))
                before = [zero._bytes_of(storage).clone() for storage in storages]
                with zero.optimizer_on_host(setup.actor, pin_memory=False):
                    assert not any(storage.nbytes() for storage in storages)
                    setup.hybrid.answer(prompts, GREEDY, seed=0)
                assert all(torch.equal(zero._bytes_of(s), b) for s, b in zip(storages, before, strict=True))
                master = 0 if dtype == "fp32" and stage == 0 else 4  # bytes of a number's master weight
                assert turn == 0 or sum(map(len, before)) >= (8 + master) * trained
            samples = rollout(setup, prompts, seed=turn)
            step = update(setup.roles, samples.micro_batches, config, what="test")
        outcomes.append((step, weights(setup.actor.module)))
    assert outcomes[0][0] == outcomes[1][0]
    assert all(torch.equal(outcomes[1][1][name], weight) for name, weight in outcomes[0][1].items())


def test_the_optimizer_is_moved_only_where_that_is_asked_for_and_means_something(paths, tiny_tokenizer, monkeypatch):
    calls = []
    monkeypatch.setattr(
        hybrid_engine, "optimizer_on_host", lambda actor: calls.append(actor) or contextlib.nullcontext()
    )
    for asked, has_gpu in itertools.product((False, True), (False, True)):
        setup = make_setup(make_config(paths, offload_optimizer_during_generation=asked), tiny_tokenizer)
        with monkeypatch.context() as patch:
            patch.setattr(torch.accelerator, "is_available", lambda has_gpu=has_gpu: has_gpu)
            calls.clear()
            setup.hybrid.answer([[5]], GREEDY, seed=0)
        assert calls == [setup.actor] * (asked and has_gpu)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("can't allocate memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_names_the_flags_that_lower_it(paths, tiny_tokenizer, monkeypatch, error):
    setup = make_setup(make_config(paths), tiny_tokenizer)

    def fail(*arguments):
        raise error

    monkeypatch.setattr(setup.decoder, "prefill", fail)
    with pytest.raises(RankError, match=r"out of memory in generation.*--per_device_generation_batch_size.*--max_ans"):
        setup.hybrid.answer([[5]], GREEDY, seed=0)
    error = RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED")
    with pytest.raises(RuntimeError, match="EXECUTION_FAILED"):
        setup.hybrid.answer([[5]], GREEDY, seed=0)


@pytest.mark.parametrize("enable", [True, False])
def test_stop_strings_of_the_flag_end_answers(paths, tiny_tokenizer, enable):
    config = make_config(paths, enable_hybrid_engine=enable)
    setup = make_setup(config, tiny_tokenizer)
    prompts = make_prompts(config, len(tiny_tokenizer))
    free = responses(setup.hybrid.answer(prompts, GREEDY, seed=0))
    stop = tiny_tokenizer.decode(free[0][4:6])
    setup = make_setup(make_config(paths, enable_hybrid_engine=enable, stop_strings=[stop]), tiny_tokenizer)
    found = setup.hybrid.answer(prompts, GREEDY, seed=0)
    assert found.stopped[0] == Stop.STRING and found.ended[0] and len(responses(found)[0]) <= 6
    assert stop in tiny_tokenizer.decode(responses(found)[0])
    assert all(mine == row[: len(mine)] for mine, row in zip(responses(found), free, strict=True))


def test_unpinned_copies_are_freed_between_rollouts(paths, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(decoder_module, "can_pack", lambda weight: False)
    for unpin in (False, True):
        setup = make_setup(make_config(paths, unpin_actor_parameters=unpin), tiny_tokenizer)
        setup.hybrid.answer([[5]], GREEDY, seed=0)
        assert (len(setup.decoder._copies) == 0) == unpin


# --- partitioned weights ---------------------------------------------------------------------------------------------


def matrix_elements(decoder) -> int:
    """Elements of the layers' matrices, as this rank holds them while it generates; none of streamed layers."""
    if decoder.shard is None:
        return 0
    projections = [p for layer in decoder.layers for p in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    return sum(matrix.shape.numel() for projection in projections for matrix in projection.matrices)


def outcomes_of(way: dict, paths, tokenizer, sizes: list[list[int]]) -> list:
    """The responses of this rank to `sizes[turn][rank]` prompts in each turn, the first before an optimiser step."""
    config = make_config(paths, actor_zero_stage=3, actor_learning_rate=0.01, **way)
    setup = make_setup(config, tokenizer)
    for name, parameter in setup.actor.module.named_parameters():
        if "lora_B" in name or name.endswith("bias"):
            with gathered([parameter], write=True):
                torch.nn.init.normal_(parameter, std=0.2)
    prompts = make_prompts(config, len(tokenizer), seed=distributed.rank())
    passes = []
    if setup.decoder:
        finish = setup.decoder.finish
        setup.decoder.finish = lambda: (passes.append(type(setup.decoder.layers)), finish())
        unload = setup.decoder.unload
        setup.decoder.unload = lambda: (held.append(matrix_elements(setup.decoder)), unload())
    found, held = [], []
    for turn, counts in enumerate(sizes):
        mine = prompts[: counts[distributed.rank()]]
        # the second rank's responses are far shorter
        sampling = SamplingParams(max_new_tokens=30 if distributed.rank() == 0 else 4, greedy=not setup.decoder)
        found.append(responses(setup.hybrid.answer(mine, sampling, seed=turn)))
        for parameter in setup.actor.module.parameters():
            assert parameter.ds_persist or parameter.ds_status.name == "NOT_AVAILABLE"
        if turn == 0:
            samples = rollout(setup, prompts, seed=turn)
            assert samples.metrics.get("ppo/sampling_logprob_difference_max", 0) < 1e-3, way
            update(setup.roles, samples.micro_batches, config, what="test")
    if setup.decoder and setup.decoder.shard is None:
        assert {kind is StreamedLayers for kind in passes} == {way.get("stream_generation_weights") == "on"}
    elif setup.decoder:
        matrices = sum(p.ds_numel for p in setup.actor.module.model.model.layers.parameters() if len(p.ds_shape) > 1)
        assert config.actor_lora_dim or {elements * 2 for elements in held} == {matrices}, "half of every matrix"
    return found


LORA, STREAM = {"actor_lora_dim": 4}, {"stream_generation_weights": "on"}
SHARE, WITHOUT = {"inference_tp_size": 2, "tp_gather_partition_size": 1}, {"enable_hybrid_engine": False}
FAMILIES = {  # ways to generate whose tokens must be equal
    "plain": [{}, STREAM, SHARE],
    "lora": [LORA, LORA | STREAM, LORA | SHARE, LORA | SHARE | {"lora_generation": "unfused"}],
    "transformers": [WITHOUT, WITHOUT | STREAM],
}
COUNTS = [[8, 3], [0, 5], [2, 0]]  # prompts of the two ranks in each turn


def outcomes_of_all(paths) -> dict[str, list]:
    from utils.models.tokenizer import load_tokenizer

    free_memory, memory.free_memory = memory.free_memory, lambda: [1000, 50][distributed.rank()]
    assert not memory.fits(100), "the rank with less memory decides for all"
    memory.free_memory = free_memory
    tokenizer = load_tokenizer(paths["actor_model_name_or_path"])
    counts = {"plain": COUNTS, "lora": COUNTS, "transformers": [[2, 0]]}
    return {name: [outcomes_of(way, paths, tokenizer, counts[name]) for way in ways] for name, ways in FAMILIES.items()}


def test_streamed_and_shared_weights_give_the_tokens_of_whole_ones_on_two_processes(tmp_path, tiny_tokenizer):
    """Ranks have unequal numbers of prompts, at times none, and responses of very unequal lengths."""
    paths = save_models(tmp_path, tiny_tokenizer, attention_bias=True, mlp_bias=True)
    for rank, outcomes in enumerate(run_ranks(outcomes_of_all, 2, paths)):
        for name, ways in outcomes.items():
            assert all(way == ways[0] for way in ways[1:]), (rank, name)
        for ways in (outcomes["plain"], outcomes["lora"]):
            assert [len(turn) for turn in ways[0]] == [counts[rank] for counts in COUNTS]


def test_weights_that_do_not_fit_are_streamed_with_one_warning(paths, tiny_tokenizer, monkeypatch, capsys):
    setup = make_setup(make_config(paths, actor_zero_stage=3), tiny_tokenizer)
    needed = memory.weight_bytes(setup.actor.module.model)
    assert needed == 4 * sum(parameter.ds_numel for parameter in setup.actor.module.parameters())
    whole = responses(setup.hybrid.answer([[5, 6, 7]], GREEDY, seed=0))
    assert not capsys.readouterr().err
    monkeypatch.setattr(memory, "free_memory", lambda: needed)  # enough for the weights, but not for anything else
    for _ in range(2):
        assert responses(setup.hybrid.answer([[5, 6, 7]], GREEDY, seed=0)) == whole
    warning = capsys.readouterr().err
    assert warning.count("warning:") == 1 and "--stream_generation_weights on" in warning
    assert setup.hybrid._must_stream([[5]], sampling_params(setup.config))
    monkeypatch.setattr(memory, "free_memory", lambda: 100 * needed)
    assert not setup.hybrid._must_stream([[5]], sampling_params(setup.config))


def test_sample_answers_of_a_model_that_does_not_fit_whole_are_streamed(paths, tiny_tokenizer, monkeypatch, capsys):
    engine = make_setup(make_config(paths, actor_zero_stage=3), tiny_tokenizer).actor
    rows = [{"input_ids": list(range(3, 20)), "response_start": start} for start in (5, 9, 0)]
    forwards = []
    capsys.readouterr()
    engine.module.model.register_forward_hook(lambda *_: forwards.append(engine.module.model.lm_head.weight.numel()))
    whole = answers.greedy_answers(engine, tiny_tokenizer, rows, 8)
    assert len(whole) == 2 and not capsys.readouterr().out and all(forwards)
    monkeypatch.setattr(memory, "free_memory", lambda: memory.weight_bytes(engine.module.model))
    forwards.clear()
    assert answers.greedy_answers(engine, tiny_tokenizer, rows, 8) == whole
    assert "--num_sample_generations 0" in capsys.readouterr().out and not any(forwards)

    def fail(*arguments, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(answers, "generate_responses", fail)
    with pytest.raises(InputError, match="out of memory in generation: lower --num_sample_generations"):
        answers.greedy_answers(engine, tiny_tokenizer, rows, 8)


def test_numbers_that_do_not_divide_are_refused_with_them(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 12)
    config = SIZES["llama"](97)
    tensor_parallel.check_tensor_parallel(config, 1)
    tensor_parallel.check_tensor_parallel(config, 2)
    for size, message in [(5, "12 processes"), (3, "4 attention heads"), (4, "2 key-value heads")]:
        with pytest.raises(InputError, match=f"--inference_tp_size {size} does not divide the {message}"):
            tensor_parallel.check_tensor_parallel(config, size)
    config.intermediate_size = 65
    with pytest.raises(InputError, match="--inference_tp_size 2 does not divide the 65 columns"):
        tensor_parallel.check_tensor_parallel(config, 2)
    with pytest.raises(InputError, match="no fast path for this opt"):
        tensor_parallel.check_tensor_parallel(SIZES["opt"](97), 2)
