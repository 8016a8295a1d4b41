"""The command-line contract of the three steps: their flags and defaults, and that old scripts keep working."""

import dataclasses
import re
import shlex

import pytest
import yaml
from peer_command_lines import DPO, STEP1, STEP2, STEP3
from step_scripts import REPOSITORY, STEPS, flags, load_step, required_models

from utils.arguments import refuse_unavailable, remarks
from utils.arguments.base import known_flag
from utils.arguments.run import parse_config, save_config
from utils.errors import InputError

PEER_COMMAND_LINES = [
    pytest.param(step, line, id=f"{step} {name}")
    for step, lines in (("step1", STEP1), ("step2", STEP2), ("dpo", DPO), ("step3", STEP3))
    for name, line in lines.items()
]


def refusal(capsys: pytest.CaptureFixture, config_class: type, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_config(config_class, list(argv))
    assert stop.value.code == 2
    return capsys.readouterr().err.removeprefix("error: ").rstrip()


@pytest.mark.parametrize(("step", "line"), PEER_COMMAND_LINES)
def test_peer_command_lines_parse(step, line):
    """Each given flag arrives with its value, also under its other name."""
    argv = shlex.split(line)
    config = parse_config(load_step(step).Config, argv)
    other_names = {
        "per_device_train_batch_size": "per_device_generation_batch_size",
        "per_device_mini_train_batch_size": "per_device_training_batch_size",
    }
    tokens = [part for token in argv for part in token.split("=", 1)]
    for position, token in enumerate(tokens):
        if not token.startswith("--"):
            continue
        name = token[2:]
        name = other_names.get(name, name) if step == "step3" else name
        values = []
        for value in tokens[position + 1 :]:
            if value.startswith("--"):
                break
            values.append(value)
        found = getattr(config, name)
        if not values:
            assert found is True, name
        elif isinstance(found, list):
            assert found == values, name
        else:
            assert found == type(found)(values[0]), name


CONTRACT = {
    "step1": """data_path data_split data_output_path max_seq_len sft_only_data_path model_name_or_path
        tokenizer_name_or_path dropout per_device_train_batch_size per_device_eval_batch_size learning_rate weight_decay
        num_train_epochs gradient_accumulation_steps lr_scheduler_type num_warmup_steps seed local_rank
        gradient_checkpointing offload dtype zero_stage compute_fp32_loss deepspeed lora_dim lora_module_name
        only_optimize_lora lora_learning_rate output_dir enable_tensorboard tensorboard_path add_eot_token eot_token
        print_loss""",
    "step2": """data_path data_split data_output_path max_seq_len model_name_or_path tokenizer_name_or_path dropout
        per_device_train_batch_size per_device_eval_batch_size learning_rate weight_decay num_train_epochs
        gradient_accumulation_steps lr_scheduler_type num_warmup_steps seed local_rank gradient_checkpointing offload
        dtype zero_stage compute_fp32_loss deepspeed lora_dim lora_module_name only_optimize_lora lora_learning_rate
        output_dir enable_tensorboard tensorboard_path add_eot_token eot_token num_padding_at_beginning eval_interval
        eval_iters reward_loss""",
    "dpo": """data_path data_split data_output_path max_seq_len model_name_or_path tokenizer_name_or_path dropout
        per_device_train_batch_size per_device_eval_batch_size learning_rate weight_decay num_train_epochs
        gradient_accumulation_steps lr_scheduler_type num_warmup_steps seed local_rank gradient_checkpointing offload
        offload_reference_model dtype zero_stage compute_fp32_loss deepspeed lora_dim lora_module_name
        only_optimize_lora lora_learning_rate output_dir enable_tensorboard tensorboard_path add_eot_token eot_token
        print_loss beta label_smoothing num_padding_at_beginning eval_interval loss reference_logprobs""",
    "step3": """data_path data_split data_output_path unsupervised_dataset_name unsupervised_dataset_config_name
        unsup_coef preprocessing_num_workers actor_model_name_or_path critic_model_name_or_path
        tokenizer_name_or_path num_padding_at_beginning per_device_generation_batch_size
        per_device_training_batch_size generation_batches ppo_epochs max_prompt_seq_len max_answer_seq_len
        actor_learning_rate critic_learning_rate actor_weight_decay critic_weight_decay num_train_epochs
        lr_scheduler_type gradient_accumulation_steps num_warmup_steps seed enable_hybrid_engine unpin_actor_parameters
        release_inference_cache inference_tp_size tp_gather_partition_size offload offload_reference_model
        offload_reward_model dtype actor_zero_stage critic_zero_stage actor_gradient_checkpointing
        critic_gradient_checkpointing actor_dropout critic_dropout local_rank actor_lora_dim critic_lora_dim
        actor_lora_module_name critic_lora_module_name only_optimize_lora actor_lora_learning_rate
        critic_lora_learning_rate enable_mixed_precision_lora enable_ema compute_fp32_loss enable_tensorboard
        tensorboard_path add_eot_token align_overflow print_answers print_answers_interval enable_test_mode
        test_stop_step output_dir kl_ctl clip_reward_value cliprange cliprange_value gamma lam ema_decay deepspeed
        adam_beta1 adam_beta2 max_grad_norm""",
}
DEFAULTS = {
    "step1": {"learning_rate": 1e-3, "num_warmup_steps": 0, "data_path": ["Dahoas/rm-static"], "data_split": "2,4,4"},
    "step2": {"learning_rate": 5e-5, "eval_interval": 0, "eval_iters": 100, "dtype": "bf16", "lora_module_name": ""},
    "dpo": {"beta": 0.1, "label_smoothing": 0.0, "loss": ["sigmoid"], "per_device_train_batch_size": 16},
    "step3": {
        "num_warmup_steps": 100,
        "actor_learning_rate": 9.65e-6,
        "critic_learning_rate": 5e-6,
        "unsup_coef": 27.8,
        "kl_ctl": 0.1,
        "clip_reward_value": 5,
        "cliprange": 0.2,
        "cliprange_value": 0.2,
        "gamma": 1.0,
        "lam": 0.95,
        "ema_decay": 0.992,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
    },
}


@pytest.mark.parametrize("step", CONTRACT)
def test_contract(step):
    config_class = load_step(step).Config
    assert set(CONTRACT[step].split()) <= {field.name for field in dataclasses.fields(config_class)}
    config = parse_config(config_class, required_models(step))
    assert {name: getattr(config, name) for name in DEFAULTS[step]} == DEFAULTS[step]


def test_parsing_touches_no_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--model_name_or_path", "nowhere", "--data_path", "missing.jsonl", "--output_dir", "/proc/none/out"]
    parse_config(load_step(1).Config, argv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("step", "argv", "message"),
    [
        (1, ["--data_split", "2,x,4"], "--data_split '2,x,4': expected three numbers like 2,4,4"),
        (1, ["--data_split", "2,4"], "--data_split '2,4': expected three numbers like 2,4,4, not all zero"),
        (1, ["--data_split", "0,0,0"], "--data_split '0,0,0': expected three numbers like 2,4,4, not all zero"),
        (1, ["--data_split=-1,2,3"], "--data_split '-1,2,3': expected three numbers like 2,4,4, not all zero"),
        (1, ["--data_split", "nan,1,1"], "--data_split 'nan,1,1': expected three numbers like 2,4,4, not all zero"),
        (1, ["--data_path", ""], "--data_path is empty: name at least one file, folder or data set"),
        (1, ["--max_seq_len", "0"], "--max_seq_len must be at least 2, got 0"),
        (1, ["--zero_stage", "5"], "--zero_stage: unknown choice '5'; choose from 0, 1, 2, 3"),
        (1, ["--learning_rate", "-1e-5"], "--learning_rate must be above 0, got -1e-05"),
        (1, ["--dropout", "1"], "--dropout must be below 1, got 1.0"),
        (1, ["--reward_loss", "last_token"], "unknown flag --reward_loss; did you mean --print_loss?"),
        (1, ["--output_dir", ""], "--output_dir is empty: name a folder, or leave the flag out to save nothing"),
        (
            2,
            ["--enable_tensorboard"],
            "--enable_tensorboard needs a folder: give --tensorboard_path or --output_dir",
        ),
        (2, ["--add_eot_token", "--eot_token", ""], "--eot_token is empty: name the token that --add_eot_token adds"),
        (3, ["--actor_zero_stage", "-1"], "--actor_zero_stage: unknown choice '-1'; choose from 0, 1, 2, 3"),
        (3, ["--min_new_tokens", "300"], "--min_new_tokens 300 is more than --max_answer_seq_len 256"),
        (3, ["--enable_test_mode"], "--enable_test_mode needs to know when to stop: give --test_stop_step"),
        (3, ["--stop_strings", "a", ""], "--stop_strings: an empty text would end every answer immediately"),
        (
            3,
            ["--inference_tp_size", "2"],
            "--inference_tp_size 2 needs a partitioned actor: give --actor_zero_stage 3",
        ),
        (
            3,
            ["--inference_tp_size", "2", "--actor_zero_stage", "3", "--no_enable_hybrid_engine"],
            "--inference_tp_size 2 needs the decode engine: leave out --no_enable_hybrid_engine",
        ),
        (
            3,
            ["--inference_tp_size", "2", "--actor_zero_stage", "3", "--stream_generation_weights", "on"],
            "--inference_tp_size 2 and --stream_generation_weights on exclude each other",
        ),
        (3, ["--gamma", "1.1"], "--gamma must be at most 1, got 1.1"),
    ],
)
def test_refused_step_flags(step, argv, message, capsys):
    assert refusal(capsys, load_step(step).Config, *required_models(step), *argv).startswith(message)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--enable_mixed_precision_lora"], "--enable_mixed_precision_lora is not available yet"),
        (["--align_overflow", "--dtype", "fp16"], "--align_overflow with fp16 is not available yet"),
        (["--gradient_accumulation_steps", "3", "--generation_batches", "2"], "for example --generation_batches 3"),
        (["--per_device_training_batch_size", "12"], "for example --generation_batches 3"),
    ],
)
def test_unavailable_flags_are_refused_by_name(argv, message):
    config = parse_config(load_step(3).Config, [*required_models(3), *argv])
    with pytest.raises(InputError, match=re.escape(message)):
        refuse_unavailable(config)


def test_what_is_available_is_not_refused():
    for step in STEPS:
        config = parse_config(load_step(step).Config, required_models(step))
        refuse_unavailable(config)
        assert remarks(config, has_accelerator=False) == []


def test_a_rollout_smaller_than_an_optimiser_step_grows_to_its_size():
    """As in DeepSpeed-Chat's scripts with more accumulation steps than generation batches, where no step is refused."""
    config = parse_config(load_step(3).Config, [*required_models(3), "--gradient_accumulation_steps", "2"])
    refuse_unavailable(config)
    assert (config.asked_rollout_rows, config.step_rows, config.rollout_rows) == (16, 32, 32)
    assert remarks(config)[0].startswith("--generation_batches 1 is raised to 2: an optimiser step needs 32 sequences")
    larger = parse_config(load_step(3).Config, [*required_models(3), "--generation_batches", "4"])
    assert (larger.step_rows, larger.rollout_rows) == (16, 64) and not remarks(larger)


def test_flags_that_change_nothing_are_named():
    argv = shlex.split(
        """--num_padding_at_beginning 1 --compute_fp32_loss --actor_dropout 0.1 --offload --align_overflow
        --tp_gather_partition_size 4 --test_stop_step 3 --unsupervised_dataset_config_name x --kl_horizon 5
        --eot_token x --preprocessing_num_workers 8 --actor_lora_module_name q_proj --only_optimize_lora
        --offload_optimizer_during_generation --stream_generation_weights on --lora_generation unfused
        --no_enable_hybrid_engine --unpin_actor_parameters --release_inference_cache"""
    )
    found = remarks(parse_config(load_step(3).Config, [*required_models(3), *argv]), has_accelerator=False)
    named = [remark.split()[0] for remark in found]
    given = {token for token in argv if token.startswith("--")} - {"--no_enable_hybrid_engine"}
    assert sorted(named) == sorted(given)
    assert remarks(parse_config(load_step(3).Config, [*required_models(3), "--offload"])) == []
    for step, dim, count in ((1, "--lora_dim", 0), (3, "--critic_lora_dim", 1)):
        config = parse_config(load_step(step).Config, [*required_models(step), dim, "4", "--lora_dropout", "0.1"])
        assert len(remarks(config)) == count


def test_no_flag_is_ignored_in_silence():
    """Each flag is read somewhere, under its own name or that without its role, or a remark is made about it."""
    utils = [path for path in (REPOSITORY / "utils").rglob("*.py") if "arguments" not in path.parts]
    arguments = [REPOSITORY / "utils" / "arguments" / name for name in ("rules.py", "steps.py")]  # without help texts
    readers = [*utils, *STEPS.values(), *arguments]
    text = "\n".join(path.read_text(encoding="utf-8") for path in readers)
    for step in STEPS:
        config_class = load_step(step).Config
        for field in dataclasses.fields(config_class):
            of_either_role = re.sub("^(actor|critic)_", "", field.name)
            read = re.search(rf"\b({field.name}|_?{of_either_role})\b", text)
            known = known_flag(config_class, field.name)
            remarked_upon = known.idle or known.unavailable
            assert read or remarked_upon or field.name in ("deepspeed", "local_rank"), field.name


@pytest.mark.parametrize("step", STEPS)
def test_saved_step_configuration_reads_back(step, tmp_path):
    config_class = load_step(step).Config
    config = parse_config(config_class, [*required_models(step), "--local_rank=1"])
    save_config(config, tmp_path / "run_config.yaml")
    assert "local_rank" not in yaml.safe_load((tmp_path / "run_config.yaml").read_text())
    again = parse_config(config_class, ["--config", str(tmp_path / "run_config.yaml"), "--local_rank=1"])
    assert again == config


@pytest.mark.parametrize("step", STEPS)
def test_help_of_a_step(step, capsys):
    """Every flag has a help text, no group or flag appears twice, and the description of the step comes first."""
    module = load_step(step)
    with pytest.raises(SystemExit):
        parse_config(module.Config, ["--help"], description=module.__doc__)
    text = capsys.readouterr().out
    assert module.__doc__.splitlines()[0] in text
    for field in dataclasses.fields(module.Config):
        assert len(re.findall(rf"^  --{field.name}\b", text, flags=re.MULTILINE)) == 1
        assert known_flag(module.Config, field.name).help
    groups = re.findall(r"^(\S[^\n]*):$", text, flags=re.MULTILINE)
    assert len(groups) == len(set(groups)) >= 8


@pytest.mark.parametrize(
    ("step", "changes", "expected"),
    [
        (1, {"max_seq_len": 64, "max_tokens_per_batch": 63}, r"63 cannot hold one row of up to 64 tokens"),
        (2, {"max_seq_len": 64, "max_tokens_per_batch": 127}, r"128 tokens \(twice --max_seq_len\): raise"),
        (3, {"max_tokens_per_batch": 39}, r"of up to 40 tokens \(--max_prompt_seq_len \+ --max_answer_seq_len\)"),
    ],
)  # fmt: skip
def test_a_token_budget_below_one_row_is_refused_with_the_numbers(step, changes, expected, world):
    config = parse_config(load_step(step).Config, flags(world, step, **changes))
    with pytest.raises(InputError, match=expected):
        refuse_unavailable(config)
