"""The steps on dialogues in a chat template: what is logged, what they hand on, and what is refused."""

import pytest
import transformers
from step_scripts import flags, load_step, run_step, write_rows

from utils.arguments import SftConfig, run
from utils.chat_templates.rendering import ChatTemplate
from utils.models.tokenizer import load_tokenizer


@pytest.fixture
def chat(world, tmp_path):
    """The tiny world with dialogues of two questions in place of pairs."""
    rows = []
    for i in range(40):
        texts = [f"what colour is thing {i} ?", "it is white .", "why ?", f"happy to help {i} ."]
        rows.append({"messages": [{"role": ("user", "assistant")[j % 2], "content": t} for j, t in enumerate(texts)]})
    return {**world, "data": write_rows(tmp_path / "chat.jsonl", rows)}


def test_the_template_of_step_1_is_that_of_step_3(chat, tmp_path, capsys):
    changes = {"chat_template": "vicuna", "train_on": "all", "packing": True, "max_seq_len": 256}
    changes |= {"num_train_epochs": 2, "system_prompt": "Be kind .", "num_sample_generations": 1}
    summary = run_step(1, flags(chat, 1, tmp_path / "sft", **changes))
    assert summary["eval/loss"] < summary["eval/loss_before"]
    log = capsys.readouterr().out
    assert "dialogues: written with --chat_template vicuna\n" in log
    assert "answers of 13 rows checked, which end with </s>" in log
    assert "Be kind . USER: what colour is thing" in log, "sample answers continue rendered prompts"
    tokenizer = load_tokenizer(tmp_path / "sft")
    prompt = ChatTemplate(tokenizer).render([("Human", "Hi")], asks=True)
    assert prompt.startswith("<s>A chat between") and prompt.endswith("USER: Hi ASSISTANT:")

    changes = {"actor_model_name_or_path": str(tmp_path / "sft"), "max_steps": 1, "max_prompt_seq_len": 200}
    changes |= {"print_answers": True, "print_answers_interval": 1}
    run_step(3, flags(chat, 3, tmp_path / "ppo", **changes))
    captured = capsys.readouterr()
    assert "dialogues: written with the tokenizer's own chat template\n" in captured.out
    assert "USER: why ? ASSISTANT:" in captured.out
    assert "its tokenizer has another chat template than the one that dialogues are written in" in captured.err
    assert load_tokenizer(tmp_path / "ppo" / "actor").chat_template == tokenizer.chat_template

    # The text form again: no template stays behind in the folder.
    changes = {"model_name_or_path": str(tmp_path / "ppo" / "actor"), "chat_template": "human_assistant"}
    run_step(1, flags(chat, 1, tmp_path / "sft", **changes, num_sample_generations=0))
    assert not (tmp_path / "sft" / "chat_template.jinja").exists()
    assert load_tokenizer(tmp_path / "sft").chat_template is None


def test_a_new_end_token_is_trained_and_stops_generation(chat, tmp_path, capsys):
    changes = {"chat_template": "chatml", "add_eot_token": True, "eot_token": "<|im_end|>", "max_seq_len": 128}
    run_step(1, flags(chat, 1, tmp_path / "sft", **changes))
    assert "answers of 13 rows checked, which end with <|im_end|>" in capsys.readouterr().out
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    tokenizer = load_tokenizer(tmp_path / "sft")
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chat_template": "lama2"}, "--chat_template 'lama2': unknown template (did you mean llama2?)"),
        ({"chat_template": "none.jinja"}, "--chat_template none.jinja: the file cannot be read"),
        ({"chat_template": "llama3"}, "ends answers with <|eot_id|>, which is no special token of this tokenizer"),
    ],
    ids=str,
)
def test_a_bad_template_is_one_line_before_any_model_is_loaded(chat, capsys, monkeypatch, changes, message):
    monkeypatch.setattr(
        transformers.PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded")
    )
    with pytest.raises(SystemExit) as stop:
        run(load_step(1).main, SftConfig, flags(chat, 1, **changes))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
