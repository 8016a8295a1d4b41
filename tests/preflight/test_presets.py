"""Each preset fits the machine that its first line names, by the project's own estimate."""

import re

import pytest
import transformers
from step_scripts import REPOSITORY, STEPS, load_step

from utils.arguments import parse_config
from utils.data.batches.sizes import Rows
from utils.preflight.estimate import estimate
from utils.preflight.machine import gpu_machine
from utils.preflight.roles import Subject

CONFIGS = REPOSITORY / "scripts" / "configs"
PRESETS = sorted(preset for step in STEPS for preset in CONFIGS.glob(f"*/{step}.yaml"))
CHAIN = {"step1", "step2", "step3"}
NUMBERS = {"one": 1, "two": 2, "all": 1}
GIB_OF_A_GB = 0.98 * 2**30  # usable for each GB on a card's label: an H100 with 80 GB has 79.2 GiB


def llama(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int | None = None) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=32_000, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads or heads, max_position_embeddings=4096,
    )  # fmt: skip


def opt(hidden: int, layers: int, heads: int, projection: int | None = None) -> transformers.OPTConfig:
    return transformers.OPTConfig(
        hidden_size=hidden, ffn_dim=4 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
        word_embed_proj_dim=projection or hidden,
    )  # fmt: skip


# By the name on the hub, and by the folder that an earlier step writes.
MODELS = {
    "gpt2": transformers.GPT2Config(),
    "opt-350m": opt(1024, 24, 16, 512),
    "opt-1.3b": opt(2048, 24, 32),
    "phi-1_5": transformers.PhiConfig(),
    "llama2-7b": llama(4096, 11008, 32, 32),
    "llama2-13b": llama(5120, 13824, 40, 40),
    "llama2-70b": llama(8192, 28672, 80, 64, 8),
}
HUB = {
    "gpt2": "gpt2", "facebook/opt-350m": "opt-350m", "facebook/opt-1.3b": "opt-1.3b", "microsoft/phi-1_5": "phi-1_5",
    "meta-llama/Llama-2-7b-hf": "llama2-7b", "meta-llama/Llama-2-13b-hf": "llama2-13b",
    "meta-llama/Llama-2-70b-hf": "llama2-70b",
}  # fmt: skip


def by_name(path) -> str:
    return f"{path.parent.name}-{path.stem}"


def base_model(path: str) -> str:
    """The model of a hub name, or of the folder that a preset's earlier step writes."""
    while path not in HUB:
        _, model, step = path.split("/")
        config = parse_config(load_step(step).Config, ["--config", *files(CONFIGS / model / f"{step}.yaml")])
        path = config.model_name_or_path
    return HUB[path]


def files(preset) -> list[str]:
    return [str(CONFIGS / preset.name), str(preset)]


def machine_of(preset) -> tuple[int, float]:
    """Processes, and bytes that each has, from the preset's first line."""
    line = preset.read_text(encoding="utf-8").splitlines()[0]
    shared = re.search(r"(?:(\d+) machines with )?(\w+) (?:GPUs?|of) (?:of )?(\d+) GB|all GPUs of this machine", line)
    assert shared, line
    if shared[3] is None or line.count("all GPUs"):
        memory = re.search(r"(\d+) GB", line)
        return 1, (int(memory[1]) if memory else 24) * GIB_OF_A_GB
    machines = int(shared[1] or 1)
    processes = NUMBERS.get(shared[2]) or int(shared[2])
    return machines * processes, int(shared[3]) * GIB_OF_A_GB


def test_machines_are_read_off_the_first_lines():
    read = {by_name(preset): machine_of(preset) for preset in PRESETS}
    assert read["llama2-70b-step1"] == (32, 80 * GIB_OF_A_GB) and read["gpt2-step3"] == (1, 24 * GIB_OF_A_GB)
    assert read["llama2-7b-lora-step3"] == (2, 80 * GIB_OF_A_GB) and read["opt-1.3b-step1"] == (1, 40 * GIB_OF_A_GB)


@pytest.mark.parametrize("preset", PRESETS, ids=by_name)
def test_a_preset_fits_its_machine(preset):
    step = load_step(preset.stem)
    config = parse_config(step.Config, ["--config", *files(preset)])
    models = {name: MODELS[base_model(role.path)] for name, role in config.roles().items()}
    processes, memory = machine_of(preset)
    found = estimate(config, Subject(step.plan_of, models, 0, Rows(20_000)), gpu_machine(processes, memory))
    assert found.peak < memory, f"{found.peak / 2**30:.1f} GiB"
    assert found.peak > 0.1 * memory, "a smaller machine would do"


def test_every_model_has_all_steps():
    models = {preset.parent.name for preset in PRESETS}
    assert models == {folder.name for folder in (REPOSITORY / "scripts").iterdir() if (folder / "step1.sh").is_file()}
    for model in models:
        assert {preset.stem for preset in PRESETS if preset.parent.name == model} >= CHAIN, model
