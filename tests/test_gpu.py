"""What only a GPU can show: the same code in bf16 and fp16 on the device. Run with `-m gpu`; skipped elsewhere."""

import pytest
import torch
import transformers
from step_scripts import flags, run_step
from tiny_models import SIZES

from utils.rlhf.decoder import LlamaDecoder
from utils.rlhf.generation import decode, generate
from utils.rlhf.sampling import SamplingParams

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
    mine = decode(decoder, prompts, sampling, eos_id=2, pad_id=0, seed=0, slots=3)
    theirs = generate(model, prompts, sampling, eos_id=2, pad_id=0, seed=0)
    assert torch.equal(mine.tokens, theirs.tokens) and torch.equal(mine.mask, theirs.mask)


def test_graphs_of_decode_steps_follow_the_weights_and_equal_eager_steps():
    """Recorded once per shape: later calls, other prompts and weights changed in place only replay."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(SIZES["llama"](97)).cuda().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(6.0)
    sampling = SamplingParams(max_new_tokens=60, temperature=0.9, top_k=40, top_p=0.95, min_new_tokens=3)
    graphed, eager = LlamaDecoder(), LlamaDecoder(cuda_graphs=False)
    recorded = []
    for turn in range(4):
        prompts = [[3 + (turn + place) % 90 for place in range(length)] for length in (3, 17, 9, 1, 30, 3, 8, 8, 2, 5)]
        found = []
        for decoder in (graphed, eager):
            decoder.load(model)
            found.append(decode(decoder, prompts, sampling, eos_id=2, pad_id=0, seed=turn, slots=4))
            decoder.unload()
        assert torch.equal(found[0].tokens, found[1].tokens) and torch.equal(found[0].stopped, found[1].stopped)
        torch.testing.assert_close(found[0].logprobs, found[1].logprobs, atol=1e-4, rtol=1e-4)
        recorded.append(len(graphed._graphs._graphs))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    assert recorded[0] > 0 and recorded[1:] == recorded[:1] * 3
    for parameter in model.model.layers[0].parameters():
        parameter.data = parameter.data.clone()
    graphed.load(model)
    moved = decode(graphed, prompts, sampling, eos_id=2, pad_id=0, seed=9, slots=4)
    eager.load(model)
    assert torch.equal(moved.tokens, decode(eager, prompts, sampling, eos_id=2, pad_id=0, seed=9, slots=4).tokens)


def test_the_optimizer_waits_in_host_memory_while_the_actor_generates(world, tmp_path):
    for stage in (0, 2, 3):
        asked = {"offload_optimizer_during_generation": True, "actor_zero_stage": stage, "dtype": "bf16"}
        assert run_step(3, flags(world, 3, tmp_path / str(stage), **asked))["iterations"] == 2
