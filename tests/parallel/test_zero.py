"""One optimiser step of an engine against plain torch: every stage, one and two ranks, ragged micro-batches."""

import copy
import itertools
import sysconfig

import pytest
import torch
import transformers
from processes import run_ranks
from tiny_models import SIZES

from utils.errors import DivergenceError, InputError
from utils.parallel import zero

STEPS = ((2, 1, 3, 2), 1e-2)  # micro-batches of each optimiser step, learning rate


def train_beside_plain_torch(folder: str, stage: int, dtype: str, max_grad_norm: float) -> dict[str, list[float]]:
    """Train an engine on this rank's share and a plain AdamW on that of all ranks; differences after each step."""
    from deepspeed.utils import safe_get_full_fp32_param

    from utils.parallel import distributed, updates, zero

    micro_batches, rate = STEPS
    config = zero.zero_config(stage, dtype, max_grad_norm=max_grad_norm)
    with zero.sharded_loading(config):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=zero.TORCH_DTYPES[dtype])
    master = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=zero.TORCH_DTYPES[dtype]).float()
    rates = {"learning_rate": rate, "weight_decay": 0.1, "lora_learning_rate": 0.0}
    engine = zero.initialize_engine(
        model, config, groups=zero.parameter_groups(model, **rates), scheduler="linear", total_steps=10
    )
    optimizer = torch.optim.AdamW(zero.parameter_groups(master, **rates), betas=(0.9, 0.95))
    schedule = transformers.get_scheduler("linear", optimizer, 0, 10)
    world, rank = distributed.world_size(), distributed.rank()
    generator = torch.Generator().manual_seed(1)
    found = {"loss": [], "norm": [], "update": []}
    for count in micro_batches:
        ids = torch.randint(0, 64, (world, count, 2, 10), generator=generator)
        tokens = ids.numel() // 10 * 9

        def loss_of(network, rows, tokens=tokens):
            logits = network(input_ids=rows).logits[:, :-1].float()
            return (
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum") / tokens
            )

        loss, norm = updates.optimizer_step(engine, list(ids[rank]), lambda rows: loss_of(engine, rows), what="step")
        network = copy.deepcopy(master).to(zero.TORCH_DTYPES[dtype])
        gradients = [torch.zeros_like(parameter) for parameter in master.parameters()]
        expected_loss = 0.0
        for rows in ids.flatten(0, 1):
            network.zero_grad()
            part = loss_of(network, rows)
            part.backward()
            expected_loss += part.item()
            for total, parameter in zip(gradients, network.parameters(), strict=True):
                total += parameter.grad.float()
        for parameter, gradient in zip(master.parameters(), gradients, strict=True):
            parameter.grad = gradient
        expected_norm = torch.nn.utils.get_total_norm(gradients).item()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(master.parameters(), max_grad_norm)
        optimizer.step()
        schedule.step()
        differences = []
        for mine, theirs in zip(engine.module.parameters(), master.parameters(), strict=True):
            whole = mine if engine.zero_optimization_stage() == 0 else safe_get_full_fp32_param(mine)
            differences.append((whole.detach() - theirs).abs().mean().item() / rate)
        found["loss"].append(abs(loss - expected_loss))
        found["norm"].append(abs(norm - expected_norm) / expected_norm)
        found["update"].append(max(differences))
    assert engine.get_lr()[0] == pytest.approx(schedule.get_last_lr()[0])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(SIZES["llama"](64)).save_pretrained(path)
    return str(path)


# (stage, dtype, gradient norm limit): clipping at stages 1 and 3, none at stages 0 and 2
CASES = [
    (stage, dtype, 0.5 if stage in (1, 3) else 0.0) for stage, dtype in itertools.product(range(4), ("fp32", "bf16"))
]


@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_equal_plain_torch_at_every_stage(folder, world_size):
    for found, (stage, dtype, _) in zip(run_ranks(all_cases, world_size, folder)[0], CASES, strict=True):
        where = f"stage {stage} {dtype}"
        assert max(found["loss"]) < (2e-6 if dtype == "fp32" else 1e-2), where
        assert max(found["norm"]) < (1e-5 if dtype == "fp32" else 3e-2), where
        # In units of the learning rate: Adam's first step moves every weight by about one. A first step of 0.75 would
        # show as 0.25, a lost micro-batch as more.
        assert found["update"][0] < (1e-4 if dtype == "fp32" else 2e-2), where
        assert max(found["update"]) < (1e-3 if dtype == "fp32" else 0.15), where


def all_cases(folder: str):
    return [train_beside_plain_torch(folder, *case) for case in CASES]


def diverge(folder: str) -> str:
    from utils.parallel import distributed, updates, zero

    config = zero.zero_config(2, "fp32")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    rates = {"learning_rate": 1e-3, "weight_decay": 0.0, "lora_learning_rate": 0.0}
    engine = zero.initialize_engine(model, config, groups=zero.parameter_groups(model, **rates))
    before = [parameter.detach().clone() for parameter in engine.module.parameters()]
    bad = float("nan") if distributed.rank() == 1 else 1.0
    try:
        rows = torch.arange(10)[None]
        updates.optimizer_step(engine, [rows], lambda ids: engine(input_ids=ids).logits.mean() * bad, what="step 7")
    except DivergenceError as error:
        assert all(torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True))
        return str(error)
    return "no error"


def test_nan_on_one_rank_stops_all_ranks_before_the_update(folder):
    for message in run_ranks(diverge, 2, folder):
        assert message.startswith("step 7: the loss is nan") and "--learning_rate" in message


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_frozen_bf16_model_computes_bit_for_bit_what_the_training_one_does(folder, stage):
    from utils.parallel import distributed, zero

    distributed.init_distributed()
    ids, logits = torch.arange(60)[None], []
    for trainable in (True, False):
        config = zero.zero_config(stage, "bf16", trainable=trainable)
        with zero.sharded_loading(config):
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        rates = {"learning_rate": 1e-3, "weight_decay": 0.0, "lora_learning_rate": 0.0}
        groups = zero.parameter_groups(model, **rates) if trainable else None
        engine = zero.initialize_engine(model, config, groups=groups)
        engine.eval()
        assert all(buffer.dtype == torch.float32 for buffer in engine.module.buffers())  # rotary frequencies
        with torch.no_grad():
            logits.append(engine(input_ids=ids).logits)
    assert logits[0].dtype == torch.bfloat16 and torch.equal(*logits)


def test_fp16_needs_a_gpu():
    from utils.parallel.zero import check_precision

    if torch.accelerator.is_available():
        check_precision("fp16")
    else:
        with pytest.raises(InputError, match="--dtype fp16"):
            check_precision("fp16")


def test_gradient_clipping_is_always_stated():
    from utils.parallel.zero import zero_config

    assert zero_config(2, "bf16", max_grad_norm=0)["gradient_clipping"] == 0.0
    assert zero_config(0, "bf16")["zero_optimization"]["stage"] == 1
    assert zero_config(2, "bf16", trainable=False)["zero_optimization"]["stage"] == 0


def test_gradients_are_reduced_in_place_in_pieces_and_not_at_all_by_one_process(monkeypatch):
    gradients, seen = [torch.arange(10.0).view(2, 5), torch.arange(3.0)], []

    def reduce(pieces, limit):
        seen.append((limit, [piece.tolist() for piece in pieces]))
        for piece in pieces:
            piece += 1

    monkeypatch.setattr(zero, "REDUCE_PIECE", 4)
    zero._reduce_gradients(reduce, gradients, 500_000_000)
    assert not seen
    monkeypatch.setattr(zero.distributed, "world_size", lambda: 2)
    zero._reduce_gradients(reduce, gradients, 500_000_000)
    assert seen == [(4, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2]])]
    assert gradients[0].flatten().tolist() == list(range(1, 11)) and gradients[1].tolist() == [1, 2, 3]


def test_offloading_at_stage_0_runs_at_stage_1(monkeypatch):
    """DeepSpeed does not offload at stage 0, and its optimiser for the CPU would get parameters on the device."""
    assert (
        "offload_optimizer" not in zero.zero_config(0, "fp32", offload=True)["zero_optimization"]
    )  # nothing to offload from
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for dtype in ("fp32", "bf16"):
        found = zero.zero_config(0, dtype, offload=True)["zero_optimization"]
        assert found["stage"] == 1 and found["offload_optimizer"]["device"] == "cpu"
    assert zero.zero_config(0, "fp32")["zero_optimization"]["stage"] == 0


def test_gathering_ahead_is_limited_on_a_cpu_alone(monkeypatch):
    names = ("stage3_max_live_parameters", "stage3_prefetch_bucket_size")
    assert [zero.zero_config(3, "bf16")["zero_optimization"][name] for name in names] == [30_000_000, 30_000_000]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert [zero.zero_config(3, "bf16")["zero_optimization"][name] for name in names] == [1_000_000_000, 200_000_000]


def test_offload_without_a_compiler_is_refused_before_anything_is_loaded(monkeypatch, tmp_path):
    zero.check_offload()  # no GPU, no offload
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"^--offload compiles .* has no C\+\+ compiler: install g\+\+, or leave"):
        zero.check_offload()
    (tmp_path / "g++").touch(mode=0o755)
    with pytest.raises(InputError, match=r"^--offload compiles .* needs .*Python.h: install Python's headers"):
        zero.check_offload()
    (tmp_path / "Python.h").touch()
    zero.check_offload()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(zero, "installed_ops", {"cpu_adam": True})
    zero.check_offload()
