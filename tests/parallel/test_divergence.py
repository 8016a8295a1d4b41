"""NaN and infinities: the run stops, or the step is skipped on every rank alike, and a file records what it was."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from processes import run_ranks
from step_scripts import flags, load_step, run_step
from tiny_models import SIZES

from utils.errors import DivergenceError
from utils.output.metrics import read_metrics

IDS = torch.arange(3, 43).view(4, 10)


def make_engine(folder: str, stage: int, dtype: str):
    from utils.parallel import distributed, zero

    distributed.init_distributed()
    config = zero.zero_config(stage, dtype)
    with zero.sharded_loading(config):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=zero.TORCH_DTYPES[dtype])
    groups = zero.parameter_groups(model, learning_rate=1e-2, weight_decay=0.1, lora_learning_rate=0.0)
    return zero.initialize_engine(model, config, groups=groups, scheduler="linear", total_steps=10)


def weights(engine) -> list[torch.Tensor]:
    from utils.parallel.zero import gathered

    with gathered(engine.module.parameters()):
        return [parameter.detach().clone() for parameter in engine.module.parameters()]


BATCHES = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in (IDS[:2], IDS[2:])]


def mean_logit(engine, batch) -> torch.Tensor:
    return engine(**batch).logits.float().square().mean()


BAD_LOSSES = {
    "nan": lambda engine, batch: mean_logit(engine, batch) * math.nan,
    "infinite with a finite gradient": lambda engine, batch: mean_logit(engine, batch) + math.inf,
    "finite with an infinite gradient": lambda engine, batch: (mean_logit(engine, batch) * 0.0).sqrt(),
}


def skip_between_steps(folder: str, stage: int, dtype: str, output: str) -> list[str]:
    """Steps with one bad micro-batch, on the last rank alone, change nothing: later steps are those without them."""
    from utils.parallel import distributed
    from utils.parallel.divergence import DivergenceGuard
    from utils.parallel.updates import optimizer_step

    undisturbed, engine = make_engine(folder, stage, dtype), make_engine(folder, stage, dtype)
    guard, last = DivergenceGuard("skip", output), distributed.world_size() - 1
    reports = []
    for number, bad in enumerate(BAD_LOSSES.values(), start=1):
        for one in (undisturbed, engine):
            optimizer_step(one, BATCHES, lambda batch, one=one: mean_logit(one, batch), what="good")

        def loss_function(batch, bad=bad, engine=engine):
            is_bad = distributed.rank() == last and batch is BATCHES[1]
            return (bad if is_bad else mean_logit)(engine, batch)

        loss, norm = optimizer_step(engine, BATCHES, loss_function, what=f"step {number}", guard=guard)
        assert not math.isfinite(loss + norm)
        assert engine.skipped_steps == number and engine.get_lr() == undisturbed.get_lr()
        assert all(torch.equal(a, b) for a, b in zip(weights(engine), weights(undisturbed), strict=True))
        distributed.barrier()
        with open(f"{output}/divergence.json") as file:
            reports.append(json.load(file))
        distributed.barrier()
        with pytest.raises(DivergenceError, match="step of stop"):
            stop = DivergenceGuard("stop")
            optimizer_step(engine, BATCHES, loss_function, what="step of stop", guard=stop)
        engine = make_engine(folder, stage, dtype)
        undisturbed = make_engine(folder, stage, dtype)
        engine.skipped_steps = number
    return reports


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(SIZES["llama"](64)).save_pretrained(path)
    return str(path)


def check_reports(reports: list[dict], rank: int) -> None:
    assert [report["step"] for report in reports] == ["step 1", "step 2", "step 3"]
    assert all(report["rank"] == rank and report["rows"] == IDS[2:].tolist() for report in reports[:2])
    assert reports[2]["rank"] == 0 and reports[2]["rows"] == IDS.tolist()  # no loss shows where it came from
    assert [report["loss"] for report in reports[:2]] == ["nan", "inf"]


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_a_bad_step_is_as_if_it_had_not_been(folder, tmp_path, stage, dtype):
    check_reports(skip_between_steps(folder, stage, dtype, str(tmp_path)), rank=0)


def on_two_ranks(folder: str, output: str) -> list[list[dict]]:
    return [skip_between_steps(folder, stage, dtype, output) for stage, dtype in ((0, "fp32"), (1, "bf16"))]


def test_all_ranks_skip_what_is_bad_on_one(folder, tmp_path):
    for reports in run_ranks(on_two_ranks, 2, folder, str(tmp_path))[0]:
        check_reports(reports, rank=1)


def test_the_file_holds_the_rows_that_the_guard_is_told_to_read(tmp_path):
    from utils.parallel.divergence import DivergenceGuard

    guard = DivergenceGuard("skip", str(tmp_path), tokens_of=lambda batch: batch["tokens"])
    batches = [{"tokens": [[1, 2], [3]]}, {"tokens": [[4]]}]
    guard.report("step 1", math.nan, math.nan, batches, [1.0, math.nan])
    assert json.loads((tmp_path / "divergence.json").read_text())["rows"] == [[4]]
    guard.report("step 2", 1.0, math.inf, batches, [1.0, 1.0])
    assert json.loads((tmp_path / "divergence.json").read_text())["rows"] == [[1, 2], [3], [4]]


def test_fp16_whose_scale_can_sink_no_further_stops_with_advice():
    """On a stand-in: fp16 itself needs a GPU."""
    from utils.parallel.updates import _step

    scaler = SimpleNamespace(min_scale=1.0)
    optimizer = SimpleNamespace(loss_scale=2.0, loss_scaler=scaler, overflow=True)
    engine = SimpleNamespace(
        optimizer=optimizer, zero_optimization_stage=lambda: 1, fp16_enabled=lambda: True, step=lambda: None
    )
    assert _step(engine, "step 1") == math.inf  # the scale is lowered, training goes on
    optimizer.loss_scale = 1.0
    with pytest.raises(DivergenceError, match="step 2: the loss scale .* --dtype bf16"):
        _step(engine, "step 2")


def bad_second_step(monkeypatch) -> None:
    """The second optimiser step of step 1 has the loss NaN."""
    script, calls = load_step(1), []

    def step_with_nan(engine, batches, loss_function, **options):
        calls.append(1)
        factor = math.nan if len(calls) == 2 else 1.0
        return original(engine, batches, lambda batch: loss_function(batch) * factor, **options)

    original = script.optimizer_step
    monkeypatch.setattr(script, "optimizer_step", step_with_nan)


def test_a_run_that_skips_counts_and_goes_on(world, tmp_path, monkeypatch):
    bad_second_step(monkeypatch)
    run_step(1, flags(world, 1, tmp_path, max_steps=4, on_nan="skip"))
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in row]
    assert [row["train/skipped_steps"] for row in rows] == [0, 1, 1, 1]
    assert [row["train/loss"] is None for row in rows] == [False, True, False, False]
    assert rows[1]["train/learning_rate"] == rows[2]["train/learning_rate"]


def test_a_run_that_stops_says_where(world, tmp_path, monkeypatch):
    bad_second_step(monkeypatch)
    with pytest.raises(DivergenceError, match="step 2: the loss is nan"):
        run_step(1, flags(world, 1, tmp_path, max_steps=4))
    report = json.loads((tmp_path / "divergence.json").read_text())
    assert report["step"] == "step 2" and report["last_metrics"]["step"] == 1 and len(report["rows"]) == 4
    assert not (tmp_path / "model.safetensors").exists()


def test_one_warning_of_a_policy_that_jumps(capsys):
    from utils.rlhf.metrics import ExplosionAlarm

    alarm = ExplosionAlarm()
    alarm.check(1, {"ppo/ratio_max": 4.0, "ppo/approx_kl_k3": 0.02})
    alarm.check(2, {})
    assert capsys.readouterr().err == ""
    alarm.check(3, {"ppo/ratio_max": 4.0, "ppo/approx_kl_k3": 2.5})
    alarm.check(4, {"ppo/ratio_max": 1e9, "ppo/approx_kl_k3": 2.5})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "iteration 3" in lines[0] and "2.5 nats" in lines[0]
