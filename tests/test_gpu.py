"""What only a GPU can show: the same code in bf16 and fp16 on the device. Run with `-m gpu`; skipped elsewhere."""

import pytest
import torch
import transformers
from checkpoint_contents import same, state_of
from step_scripts import flags, run_step
from tiny_models import SIZES

from utils.checkpoints import Checkpoints
from utils.generation.batching import decode
from utils.generation.decoder import LlamaDecoder, Loading
from utils.generation.fallback import generate
from utils.generation.responses import Ends
from utils.generation.sampling import SamplingParams
from utils.models.causal_lm import CausalLM
from utils.models.lora import add_lora

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_three_steps_run_on_the_device(world, tmp_path, dtype, stage):
    sft, reward, ppo = (tmp_path / name for name in ("sft", "reward", "ppo"))
    run_step(1, flags(world, 1, sft, max_steps=4, dtype=dtype, zero_stage=stage))
    run_step(2, flags(world, 2, reward, max_steps=4, dtype=dtype, zero_stage=stage, model_name_or_path=sft))
    models = {"actor_model_name_or_path": sft, "critic_model_name_or_path": reward}
    stages = {"actor_zero_stage": stage, "critic_zero_stage": stage}
    assert run_step(3, flags(world, 3, ppo, dtype=dtype, **models, **stages))["iterations"] == 2


def test_offloaded_optimizer_and_parameters(world, tmp_path):
    offload = {"offload": True, "offload_reference_model": True, "offload_reward_model": True, "dtype": "bf16"}
    argv = flags(world, 3, tmp_path, actor_zero_stage=3, critic_zero_stage=2, **offload)
    assert run_step(3, argv)["iterations"] == 2


def test_the_decode_engine_equals_generate_on_the_device():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(SIZES["llama"](97)).cuda().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(6.0)
    prompts = [list(range(3, 3 + length)) for length in (3, 17, 9, 1, 30)]
    sampling = SamplingParams(max_new_tokens=24, greedy=True)
    decoder = LlamaDecoder()
    decoder.load(model)
    mine = decode(decoder, prompts, sampling, Ends(2, 0), seed=0, slots=3)
    theirs = generate(model, prompts, sampling, Ends(2, 0), seed=0)
    assert torch.equal(mine.tokens, theirs.tokens) and torch.equal(mine.mask, theirs.mask)


def assert_same_responses(found, expected, dtype) -> None:
    """Equal in fp32; in 16 bits nearly all rows, and up to a row's first difference the same log-probabilities."""
    if dtype == torch.float32:
        assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.stopped, expected.stopped)
        torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-4, rtol=1e-4)
        return
    width = min(found.tokens.size(1), expected.tokens.size(1))
    equal = (found.tokens[:, :width] == expected.tokens[:, :width]).cummin(1).values
    assert equal.all(1).float().mean() >= 0.7
    difference = (found.logprobs[:, :width] - expected.logprobs[:, :width])[equal].abs()
    assert len(difference) and difference.max() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lora", [None, "fused", "unfused"])
def test_graphs_of_decode_steps_follow_what_moves_and_equal_eager_steps(dtype, lora):
    """Recorded once per shape: other prompts and weights changed in place only replay; what moves is recorded again."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(SIZES["llama"](97)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(6.0)
    add_lora(model, 4 if lora else 0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.to("cuda", dtype)
    graphed, eager = LlamaDecoder(keep_copies=True), LlamaDecoder(keep_copies=True, cuda_graphs=False)

    def compare(prompts: list[list[int]], seed: int, *, slots: int = 4, limit: int = 60) -> int:
        """The number of graphs that exist after a call of each decoder, whose responses agree."""
        sampling = SamplingParams(max_new_tokens=limit, temperature=0.9, top_k=40, top_p=0.95, min_new_tokens=3)
        found = []
        for decoder in (graphed, eager):
            decoder.load(model, Loading(lora=lora or "fused"))
            found.append(decode(decoder, prompts, sampling, Ends(2, 0), seed=seed, slots=slots, buckets=True))
            decoder.unload()
        assert_same_responses(*found, dtype)
        return len(graphed._graphs._graphs)

    def prompts_of(turn: int) -> list[list[int]]:
        return [[3 + (turn + place) % 90 for place in range(length)] for length in (3, 17, 9, 1, 30, 3, 8, 8, 2, 5)]

    recorded = []
    for turn in range(4):
        recorded.append(compare(prompts_of(turn), turn))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    assert recorded[0] > 0 and recorded[1:] == recorded[:1] * 3
    for parameter in model.parameters():  # like gathered ZeRO-3 weights; their old memory then holds something else
        old = parameter.data
        parameter.data = old.clone()
        old.zero_()
    compare(prompts_of(5), 5)
    capacity = graphed.capacity
    assert compare(prompts_of(6), 6, slots=10, limit=200) > 0 and graphed.capacity > capacity  # a larger cache
    kept = compare(prompts_of(7), 7)
    assert kept > 0
    graphed.release_cache()
    torch.cuda.empty_cache()
    for turn in (8, 9):
        assert compare(prompts_of(turn), turn) > 0


def test_the_optimizer_waits_in_host_memory_while_the_actor_generates(world, tmp_path):
    for stage in (0, 2, 3):
        asked = {"offload_optimizer_during_generation": True, "actor_zero_stage": stage, "dtype": "bf16"}
        assert run_step(3, flags(world, 3, tmp_path / str(stage), **asked))["iterations"] == 2


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_resumed_run_begins_with_the_bits_that_were_saved(world, tmp_path, monkeypatch, dtype, stage):
    """Weights, moments, loss scale, the device's generator. What follows may differ in its last digits."""
    changes = {"dtype": dtype, "zero_stage": stage, "dropout": 0.2, "save_interval": 2, "num_sample_generations": 0}
    run_step(1, flags(world, 1, tmp_path, max_steps=2, **changes))
    resume = Checkpoints.resume

    def resume_and_save(self, engines, **models):
        state = resume(self, engines, **models)
        root, self._root = self._root, tmp_path / "again"
        self._save(state)
        self._root = root
        return state

    monkeypatch.setattr(Checkpoints, "resume", resume_and_save)
    run_step(1, flags(world, 1, tmp_path, max_steps=4, resume_from_checkpoint="auto", **changes))
    saved, found = (state_of(tmp_path / root / "checkpoint-2") for root in ("checkpoints", "again"))
    assert "torch_cuda" in saved["tensors"]
    same(found, saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_share_their_prompt_on_the_device(dtype):
    torch.manual_seed(0)
    model = CausalLM(transformers.AutoModelForCausalLM.from_config(SIZES["llama"](97))).cuda().to(dtype)
    ids = torch.randint(3, 97, (4, 24), device="cuda")
    ids[2:, :16] = ids[:2, :16]
    mask = torch.arange(24, device="cuda") < torch.tensor([[24], [20], [18], [23]], device="cuda")
    targets = mask & (torch.arange(24, device="cuda") >= 16)
    results = []
    for prompts in (None, torch.tensor([16, 16], device="cuda")):
        model.zero_grad()
        logprobs, _ = model(ids, mask, targets, prompt_lengths=prompts)
        logprobs.sum().backward()
        results.append((logprobs.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(results[1], results[0], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("reference", ["precompute", "live"])
def test_direct_preference_runs_on_the_device(world, tmp_path, stage, reference):
    argv = flags(world, "dpo", tmp_path, max_steps=3, dtype="bf16", zero_stage=stage, reference_logprobs=reference)
    summary = run_step("dpo", argv)
    assert summary["eval/loss_before"] == pytest.approx(0.6931, abs=0.05)
