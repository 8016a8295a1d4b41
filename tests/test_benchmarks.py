"""The benchmarks: each runs on a toy without peers, and its figures agree with those worked out by hand."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import transformers

from utils.arguments import parse_config
from utils.errors import InputError

BENCHMARKS = Path(__file__).resolve().parents[1] / "scripts" / "benchmarks"


@pytest.fixture
def script():
    """Load a module of the benchmarks by name."""
    return lambda name: importlib.import_module(f"scripts.benchmarks.{name}")


TOY = {
    "step1": "--model toy --rows 4 --batch 2 --length 64 --repeats 1 --threads 1 --contenders ours",
    "step2": "--model toy --pairs 4 --batch 2 --length 64 --repeats 1 --threads 1 --contenders ours",
    "dpo": "--model toy --rows 4 --batch 2 --length 64 --repeats 1 --threads 1 --contenders ours",
    "step3": "--model toy --batch 2 --prompt 16 --answer 4 --iterations 1 --repeats 1 --threads 1 --contenders ours",
    "logprobs": "--tokens 16 --vocabulary 64 --hidden 8 --repeats 1",
    "generation": "--model toy --batch 2 --prompt 8 --answer 4 --tail --repeats 1",
}


@pytest.mark.parametrize("name", TOY)
def test_each_runs_on_a_toy_without_peers(script, tmp_path, capsys, name):
    module, results = script(name), tmp_path / "RESULTS.md"
    results.write_text("# Results\n\n## earlier\n", encoding="utf-8")
    config = parse_config(module.Config, [*TOY[name].split(), "--results", str(results)])
    module.main(config)
    output, section = capsys.readouterr().out, results.read_text(encoding="utf-8").partition("## earlier")[2]
    assert "ours" in output and "│" not in output
    rows = [line for line in section.splitlines() if line.startswith("| ours |")]
    assert len(rows) == 1 and "nan" not in rows[0]
    assert f"torch {torch.__version__}" in section and " cores, " in section
    if "contenders" in TOY[name]:
        assert "TRL is left out: --trl_" in output
        assert float(rows[0].split("|")[-2]) > 0.1  # GiB of a process that imports torch


def test_data_of_any_size_is_measured_on_a_toy(script, tmp_path, monkeypatch):
    module, results = script("data_scale"), tmp_path / "RESULTS.md"
    monkeypatch.setattr(module, "alone", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(module, "DIFFERENT", 50)
    words = ["--rows", "60", "--stream_gb", "0.0005", "--stream_rows", "160", "--repeats", "1", "--purposes", "sft"]
    module.main(parse_config(module.Config, [*words, "--results", str(results), "--folder", str(tmp_path)]))
    rows = [line.split("|")[1:-1] for line in results.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    numbers = [row for row in rows if "sft" in (row[0].strip(), row[1].strip())]
    assert [len(row) for row in numbers] == [6, 5]
    assert all(float(row[2].replace(",", "")) > 0 for row in numbers)
    assert [path.name for path in tmp_path.iterdir()] == ["RESULTS.md"]


def test_a_peer_is_run_by_its_own_interpreter_and_compared(script, tmp_path, monkeypatch):
    contenders = script("contenders")
    adapter = tmp_path / "peer.py"
    adapter.write_text(
        "import json, os, sys\n"
        "assert 'PYTHONPATH' not in os.environ and os.environ['OMP_NUM_THREADS'] == '3'\n"
        "work = json.load(open(sys.argv[1]))\n"
        "block = bytearray(work['MiB'] * 2**20)\n"
        "measured = {'steps': [work['batch'], work['scratch']], 'versions': {'peer': '1.2'}}\n"
        "json.dump(measured, open(sys.argv[2], 'w'))\n"
    )
    monkeypatch.setattr(contenders, "ADAPTERS", tmp_path)
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    runner, peaks = contenders.Runner(tmp_path / "work", threads=3), []
    for size in (8, 800):
        steps, memory = runner.run_peer("Peer", "peer", sys.executable, {"batch": 5, "MiB": size})
        assert steps == [5, str(tmp_path / "work" / "peer")]
        peaks.append(memory["GiB"])
    assert runner.versions == {"Peer": {"peer": "1.2"}}
    assert peaks[1] > 800 / 1024 and (torch.cuda.is_available() or peaks[1] < 6)


def test_a_contender_that_fails_ends_the_run_with_its_last_lines(script, tmp_path):
    command = [sys.executable, "-c", "print('the reason'); raise SystemExit(7)"]
    with pytest.raises(SystemExit, match="(?s)ended with code 7.*the reason"):
        script("contenders").run_process(command, tmp_path / "log.txt", 1, {})


def test_interpreters_that_are_not_there_are_refused(script, tmp_path):
    contenders = script("contenders")
    with pytest.raises(InputError, match="--trl_python .*no such file"):
        contenders.TrlArguments(trl_python=str(tmp_path / "python")).trl()
    with pytest.raises(InputError, match="--deepspeed_chat .*no such folder"):
        contenders.DeepSpeedChatArguments(
            deepspeed_chat=str(tmp_path / "chat"), deepspeed_chat_python=sys.executable
        ).deepspeed()


def test_repetitions_are_interleaved_and_ratios_are_of_medians(script):
    contenders, report, order = script("contenders"), script("report"), []

    def contender(name, values):
        values = iter(values)

        def measure():
            order.append(name)
            return {"rate": next(values), "GiB": 2.0 if name == "ours" else 8.0}

        return measure

    everyone = {"ours": contender("ours", [10, 30, 20]), "peer": contender("peer", [4, 5, 100])}
    measured = contenders.interleave(everyone, 3, [])
    assert order == ["ours", "peer"] * 3
    assert report.ratios(measured, "rate", higher_is_faster=True) == [("ours", "peer", "4.00", "0.25")]
    assert report.ratios(measured, "rate", higher_is_faster=False)[0][2] == "0.25"
    with pytest.raises(InputError, match="--contenders 'other' is not one of ours, peer"):
        contenders.interleave(everyone, 1, ["other"])


def test_rates_of_each_step_by_hand(script):
    """Two passes of two steps; two iterations, of which the first is left out."""
    contenders, step3 = script("contenders"), script("step3")
    times = [{"time": 1.0, "eval/loss": 1.0}, *({"time": time, "train/loss": 1.0} for time in (3.0, 4.0, 5.0, 8.0))]
    assert contenders.our_rates(times, {"tokens": 400, "pairs": 100}) == {"tokens/s": 100.0, "pairs/s": 25.0}
    steps = [{"seconds": 9, "tokens": 1, "pairs": 1}, {"seconds": 2, "tokens": 100, "pairs": 40}]
    assert contenders.peer_rates(steps) == {"tokens/s": 50.0, "pairs/s": 20.0}
    rows = [
        {"time": time, "time/generation": 1.0, "time/training": 2.0, "ppo/sequences": 4, "ppo/length_mean": length}
        for time, length in ((5.0, 1.0), (10.0, 7.5))
    ]
    assert step3.averages(step3.our_steps(rows)) == {
        **{"iteration": 5.0, "generation": 1.0, "scoring": 2.0, "training": 2.0},
        "tokens per answer": 7.5,
    }


def test_answers_end_at_the_mean_length_asked_for(script, tmp_path, tiny_tokenizer):
    folder = script("workload").save_language_model(tmp_path / "model", "toy", 64, tiny_tokenizer, mean_length=8)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.randint(3, 300, (16, 32))).logits
    probability = logits.softmax(-1)[..., tiny_tokenizer.eos_token_id]
    assert probability.mean().item() == pytest.approx(1 / 8, rel=0.1)
    assert probability.min() > 0.05 and probability.max() < 0.3


def test_all_ways_to_log_probabilities_compute_the_same(script):
    outcomes = []
    for way in script("logprobs").ways().values():
        torch.manual_seed(0)
        hidden, weight = (torch.randn(rows, 8).requires_grad_() for rows in (20, 50))
        logprobs = way(hidden, weight, torch.arange(20))
        logprobs.sum().backward()
        outcomes.append((logprobs.detach(), hidden.grad, weight.grad))
    assert len(outcomes) == 3
    for other in outcomes[1:]:
        for tensor, expected in zip(other, outcomes[0]):
            torch.testing.assert_close(tensor, expected, atol=1e-5, rtol=1e-4)


def test_roofline_by_hand(script, monkeypatch):
    """Two answers of 2 and 3 tokens to prompts of 4, together, on a machine of 1 byte and 1000 operations a second."""
    generation = script("generation")
    monkeypatch.setattr(generation, "bandwidth", lambda device: 1.0)
    monkeypatch.setattr(generation, "matmul_rate", lambda device, dtype: 1000.0)
    shape = transformers.LlamaConfig(
        vocab_size=10, hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(shape)
    config = generation.Config(batch=2, prompt=4, answer=3)
    layers = 4 * 4 + 2 * (2 * 4) + 4 * 4 + 3 * 4 * 6 + 2 * 4  # q, k and v, o, the three of the MLP, two norms
    prefill = 2 * 2 * (4 * layers + 40) + 4 * 4 * 2 * 8  # the last: 4 x query units x rows x half of 4 squared
    cached = (5 + 5 + 6) * 2 * 2 * 2  # tokens before and with each new one x (key + value) x units x bytes
    reading = 2 * (layers + 40) * 2 + cached  # two steps
    assert generation.roofline(config, model, [2, 3])[0] == pytest.approx(prefill / 1000 + reading)


def test_in_fp32_no_response_depends_on_its_company(script, tmp_path):
    independence, results = script("independence"), tmp_path / "RESULTS.md"
    flags = "--model toy --dtype fp32 --batch 8 --rows 12 --prompt 24 --answer 12 --results"
    independence.main(parse_config(independence.Config, [*flags.split(), str(results)]))
    rows = [line.split("|")[2:5] for line in results.read_text(encoding="utf-8").splitlines() if " of " in line]
    counts = [cells for cells in rows if len(cells) == 3 and "tokens" not in cells[0] and "differ" not in cells[0]]
    assert len(counts) == 10
    assert all(cells[0].strip() in ("0 of 12", "0 of 4") and cells[2].strip() == "-" for cells in counts)


def test_ties_by_hand(script):
    """Words of probability 0.2, 0.3 and 0.5: the random number 0.25 chooses the second, by a margin of 0.05."""
    independence = script("independence")
    contexts = []

    class Model:
        device = "cpu"

        def __call__(self, ids):
            contexts.append(ids.tolist())
            return transformers.modeling_outputs.CausalLMOutput(logits=torch.tensor([[[0.2, 0.3, 0.5]]]).log())

    assert independence.tie(Model(), [7], (0, 1), 0.25) == pytest.approx(0.05)
    assert independence.tie(Model(), [7], (1, 2), 0.25) == pytest.approx(0.25)
    assert independence.tie(Model(), [7], (1, 2), None) == pytest.approx(math.log(5 / 3))

    contexts.clear()
    prompts, expected = [[7], [8], [9]], {0: [1, 2, 2], 1: [1, 2, 2], 2: [0, 0, 0]}
    found = independence.compare(Model(), prompts, expected, {0: [1, 2, 2], 1: [1, 1, 0]}, None)
    assert (found.rows, found.differing, found.compared) == (2, 1, 3 + 2)
    assert contexts == [[[8, 1]]] and found.ties == (pytest.approx(math.log(5 / 3)),)


def test_memory_of_a_function_is_what_it_takes(script):
    machine = script("machine")
    size = machine.peak_memory(lambda: torch.ones(64 * 2**20 // 4, device=torch.get_default_device()))
    assert torch.cuda.is_available() or math.isnan(size) or 60 < size < 80
    assert machine.bandwidth(torch.device("cpu")) > 1e8


def test_what_an_adapter_writes_can_be_read(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))
    monkeypatch.setattr(sys, "argv", ["adapter", "setting.json", str(tmp_path / "measured.json")])
    steps = importlib.import_module("adapter").Steps()
    monkeypatch.setattr(sys, "argv", ["main.py"])  # as DeepSpeed-Chat's own command line
    for tokens in (3, 4):
        steps.count("tokens", tokens)
        steps.count("tokens", 1)
        steps.end()
    steps.save("torch")
    measured = json.loads((tmp_path / "measured.json").read_text())
    assert [step["tokens"] for step in measured["steps"]] == [4, 5]
    assert measured["versions"] == {"torch": torch.__version__}


def test_shared_prompts_are_measured_on_pairs_whose_prompts_are_long(script, tmp_path):
    module, results, data = script("shared_prompts"), tmp_path / "RESULTS.md", tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f" Human: {'why is that so ' * 4}{number} ? Assistant:", "chosen": " it is.", "rejected": " no."}
        for number in range(6)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["--model", "toy", "--data", str(data), "--rows", "5", "--batch", "2", "--length", "128", "--repeats", "1"]
    module.main(parse_config(module.Config, [*words, "--results", str(results)]))
    table = [line for line in results.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in table[-2:]] == ["direct preference", "reward model"]
