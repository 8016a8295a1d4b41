"""The script of direct preference optimisation: what it learns, what it reads, and that it does not matter how."""

import json
import math

import pytest
import torch
import transformers
from dpo_script import config, labelled_file, run_script
from processes import run_ranks
from safetensors.torch import load_file
from step_scripts import write_rows
from tiny_models import save_causal_lm

from utils.errors import InputError
from utils.models.weight_files import weights_digest
from utils.output.metrics import read_metrics
from utils.preference.report import remark_on


def losses_of(folder) -> list[float]:
    return [row["train/loss"] for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row]


def test_it_learns_and_its_first_losses_are_those_of_a_plain_loop(world, tmp_path):
    summary = run_script(config(world, tmp_path, max_steps=8, keep_best=True, eval_interval=3, beta=0.2))
    assert summary["eval/loss_before"] == pytest.approx(math.log(2), abs=1e-6)
    assert summary["eval/accuracy"] == 1.0 and summary["eval/margin"] > 1.0
    assert summary["eval/kl_before"] == 0 and summary["eval/kl"] > 0.1
    assert {"config.json", "model.safetensors", "tokenizer.json", "curves.png", "summary.json", "best"} <= {
        path.name for path in tmp_path.iterdir()
    }
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path)

    assert losses_of(tmp_path)[:3] == pytest.approx(plain_losses(world, steps=3, beta=0.2), abs=1e-5)


def plain_losses(world, *, steps: int, beta: float) -> list[float]:
    """DPO as its paper's code has it: whole logits, two models, AdamW; the rows in the run's order."""
    from utils.data import Corpus, build_dataloader, build_datasets

    flags = config(world)
    tokenizer = transformers.AutoTokenizer.from_pretrained(world["model"])
    rows, _ = build_datasets(Corpus.of(flags), tokenizer)
    loader = build_dataloader(rows, list, 4, shuffle=True, seed=flags.seed)
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(world["model"], dtype=torch.float32) for _ in range(2)
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)

    def logprob(model, prompt, answer):
        ids = torch.tensor([prompt + answer])
        logits = model(ids).logits[0, :-1].log_softmax(-1)
        return logits.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()

    found = []
    for step, batch in zip(range(steps), loader):
        total = 0.0
        for row in batch:
            h = 0.0
            for name, sign in (("chosen_ids", 1), ("rejected_ids", -1)):
                with torch.no_grad():
                    known = logprob(reference, row["prompt_ids"], row[name])
                h = h + sign * (logprob(policy, row["prompt_ids"], row[name]) - known)
            total = total - torch.nn.functional.logsigmoid(beta * h) / len(batch)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / 8))
        optimizer.step()
        found.append(total.item())
    return found


def test_the_reference_is_the_same_precomputed_live_and_with_adapters_off_and_stays_as_it_is(world, tmp_path):
    digest, curves = weights_digest(world["model"]), {}
    for name, flags in {
        "precomputed": {},
        "live": {"reference_logprobs": "live"},
        "sharded": {"reference_logprobs": "live", "zero_stage": 3},
        "budget": {"max_tokens_per_batch": 128},
    }.items():
        run_script(config(world, tmp_path / name, **flags))
        curves[name] = losses_of(tmp_path / name)
    for name in ("live", "sharded", "budget"):
        assert curves[name] == pytest.approx(curves["precomputed"], abs=1e-5), name
    lora = {"lora_dim": 4, "only_optimize_lora": True}
    run_script(config(world, tmp_path / "lora", **lora))
    run_script(config(world, tmp_path / "lora_live", reference_logprobs="live", **lora))
    assert losses_of(tmp_path / "lora") == pytest.approx(losses_of(tmp_path / "lora_live"), abs=1e-6)
    assert losses_of(tmp_path / "lora")[-1] < math.log(2)
    assert weights_digest(world["model"]) == digest


def test_a_streamed_run_resumes_bit_for_bit(world, tmp_path):
    flags = {"streaming": True, "shuffle_buffer_size": 7, "reference_logprobs": "live", "save_interval": 3}
    flags |= {"num_sample_generations": 0, "data_split": "1,1,1", "lr_scheduler_type": "constant"}
    run_script(config(world, tmp_path / "whole", max_steps=6, **flags))
    run_script(config(world, tmp_path / "cut", max_steps=3, **flags))
    run_script(config(world, tmp_path / "cut", max_steps=6, resume_from_checkpoint="auto", **flags))
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
    assert len(losses_of(tmp_path / "whole")) == 6


def test_the_precomputed_reference_is_computed_once_and_again_for_other_weights(
    world, tmp_path, monkeypatch, tiny_tokenizer
):
    from utils.preference.reference import Reference

    computed = []
    original = Reference._compute
    monkeypatch.setattr(Reference, "_compute", lambda self, *a: computed.append(a[1]) or original(self, *a))
    flags = {"data_output_path": str(tmp_path / "cache"), "max_steps": 1, "num_sample_generations": 0}
    run_script(config(world, **flags))
    assert computed == ["training", "held-out"]
    run_script(config(world, beta=0.5, loss=["ipo"], **flags))
    assert computed == ["training", "held-out"]
    other = save_causal_lm(tmp_path / "other", tiny_tokenizer, seed=5)
    summary = run_script(config(world, model_name_or_path=str(other), **flags))
    assert computed == ["training", "held-out"] * 2
    assert summary["eval/loss_before"] == pytest.approx(math.log(2), abs=1e-6)
    run_script(config(world, loss=["simpo"], beta=2.0, **flags | {"data_output_path": str(tmp_path / "elsewhere")}))
    assert computed == ["training", "held-out"] * 2, "a loss without a reference needs none"


STEP_LOSSES = (["kto_pair"], ["aot"], ["aot_unpaired:0.7", "bco_pair:0.3"])


def curves_of(world, folder: str, processes: int) -> list[list[float]]:
    from pathlib import Path

    curves = []
    for index, loss in enumerate((*STEP_LOSSES, ["kto"])):
        output = Path(folder) / f"{processes}_{index}"
        data = [world["labelled"]] if loss == ["kto"] else [world["data"]]
        rows = {"per_device_train_batch_size": 4 // processes, "gradient_accumulation_steps": 2, "max_steps": 3}
        run_script(config(world, output, loss=loss, data_path=data, num_sample_generations=0, **rows))
        last = read_metrics(output / "metrics.jsonl")
        curves.append([row["train/loss"] for row in last if "train/loss" in row] + [last[-1]["eval/loss"]])
    return curves


def test_losses_that_compare_a_whole_step_are_the_same_on_one_process_and_on_two(world, tmp_path):
    world = world | {"labelled": labelled_file(tmp_path)}
    expected = curves_of(world, str(tmp_path), 1)
    found = run_ranks(curves_of, 2, world, str(tmp_path), 2)[0]
    for name, one, two in zip((*STEP_LOSSES, "kto"), expected, found, strict=True):
        assert two == pytest.approx(one, abs=2e-5), name


def test_kto_learns_from_single_answers(world, tmp_path):
    data = labelled_file(tmp_path)
    summary = run_script(
        config(world, tmp_path / "kto", data_path=[data], loss=["kto"], max_steps=12, undesirable_weight=1.5)
    )
    assert summary["eval/accuracy"] >= 0.8 and summary["eval/chosen_reward"] > summary["eval/rejected_reward"]
    rows = read_metrics(tmp_path / "kto" / "metrics.jsonl")
    assert all(row["train/kl"] >= 0 for row in rows if "train/kl" in row)


BAD_ROWS = [
    (["kto"], {"prompt": "a", "completion": " b", "label": "maybe"}, "line 1: `label` must be true or false"),
    (["kto"], {"prompt": "a", "completion": " b"}, "line 1: has no `label`"),
    (["kto"], {"prompt": "a", "chosen": " b", "rejected": " c"}, "line 1: the row holds a pair of answers"),
    (
        ["ipo"],
        {"prompt": "a", "completion": " b", "label": True},
        "line 1: the row holds a single answer with a `label`",
    ),
]


@pytest.mark.parametrize("loss, row, message", BAD_ROWS)
def test_rows_of_the_wrong_kind_are_refused_with_file_and_line(world, tmp_path, loss, row, message):
    path = write_rows(tmp_path / "rows.jsonl", [row] * 4)
    with pytest.raises(InputError, match="rows.jsonl, ") as refusal:
        run_script(config(world, data_path=[path], loss=loss))
    assert message in str(refusal.value)


@pytest.mark.parametrize("label, kind", [(True, "desirable"), (False, "undesirable")])
def test_kto_refuses_answers_of_one_kind_only(world, tmp_path, label, kind):
    rows = [{"prompt": f"question {i}", "completion": " b", "label": label} for i in range(8)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match=f"all 7 training rows are {kind}"):
        run_script(config(world, data_path=[path], loss=["kto"]))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"loss": ["dpo"]}, "unknown choice 'dpo'; choose from sigmoid"),
        ({"loss": ["sigmoid:x"]}, "the weight must be a number above 0"),
        ({"loss": ["sigmoid:0"]}, "the weight must be a number above 0"),
        ({"loss": ["sigmoid", "sigmoid:2"]}, "given twice"),
        ({"loss": ["kto", "sigmoid"]}, "use kto_pair with pairs"),
        ({"loss": ["exo_pair"]}, "needs --label_smoothing above 0"),
        ({"loss": ["kto"], "ld_alpha": 0.5}, "--ld_alpha compares the lengths of a pair"),
        ({"loss": ["kto"], "rpo_alpha": 1.0}, "--rpo_alpha needs pairs"),
        ({"label_smoothing": 0.5}, "--label_smoothing must be below 0.5"),
    ],
)
def test_flags_that_cannot_work_are_refused(world, flags, message):
    with pytest.raises(InputError) as refusal:
        config(world, **flags)
    assert message in str(refusal.value)


def test_a_flag_that_no_loss_reads_is_named(world):
    from utils.arguments import remarks

    named = remarks(config(world, loss=["simpo"], simpo_gamma=1.0, reference_logprobs="live", discopop_tau=0.1))
    assert any("--discopop_tau has no effect: --loss simpo does not use it" in line for line in named)
    assert any("--reference_logprobs has no effect: --loss simpo has no reference" in line for line in named)
    assert not any("simpo_gamma" in line for line in named)


def test_a_falling_log_probability_of_the_chosen_answers_is_said_in_words(world):
    before, little, much = ({"eval/chosen_logprob": value} for value in (-100.0, -109.0, -111.0))
    assert not remark_on(config(world), before, little)
    remark = remark_on(config(world), before, much)
    assert "their log-probability fell from -100.0 to -111.0 per answer" in remark and "--rpo_alpha 1" in remark
    assert "--rpo_alpha" not in remark_on(config(world, rpo_alpha=0.5), before, much)
    assert not remark_on(config(world, loss=["apo_down"]), before, much), "which is meant to do so"


def test_the_summary_and_the_configuration_can_be_read(world, tmp_path):
    run_script(config(world, tmp_path, loss=["sigmoid:0.5", "sft:0.5"], max_steps=1))
    assert json.loads((tmp_path / "summary.json").read_text())["run"]["title"] == "direct preference"
    assert "sigmoid:0.5" in (tmp_path / "run_config.yaml").read_text()
    assert load_file(tmp_path / "model.safetensors")


def test_weighted_sources_find_their_reference_in_every_epoch(world, tmp_path):
    """The second epoch has other rows of the larger source: at a learning rate of nearly 0, all losses stay ln 2."""
    rows = [{"prompt": f" Human: {i} ? Assistant:", "chosen": f" yes {i * 7}", "rejected": " no ."} for i in range(20)]
    few = write_rows(tmp_path / "few.jsonl", rows)
    data = [f"{world['data']}:0.5", f"{few}:0.5"]
    run_script(config(world, tmp_path / "out", data_path=data, max_steps=0, num_train_epochs=2, learning_rate=1e-12))
    assert losses_of(tmp_path / "out") == pytest.approx([math.log(2)] * len(losses_of(tmp_path / "out")), abs=1e-6)


def test_a_step_whose_loss_is_nan_is_skipped_on_request(world, tmp_path, monkeypatch):
    from utils.preference.objective import Objective

    original, calls = Objective.losses, []

    def second_is_nan(self, answers, step):
        if answers.policy.requires_grad:
            calls.append(1)
        return original(self, answers, step) * (math.nan if len(calls) == 2 and answers.policy.requires_grad else 1.0)

    monkeypatch.setattr(Objective, "losses", second_is_nan)
    run_script(config(world, tmp_path, on_nan="skip", max_steps=3, num_sample_generations=0))
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in row]
    assert [row["train/skipped_steps"] for row in rows] == [0, 1, 1]
    assert rows[1]["train/loss"] is None and rows[2]["train/loss"] is not None
