"""Which template a tokenizer gets, what it changes in the tokenizer, and what is refused."""

import pytest
from chat_tokenizers import chat_tokenizer

from utils.arguments import SftConfig
from utils.chat_templates.choice import FIXED_DATE, choose_template
from utils.chat_templates.rendering import ChatTemplate, TemplateProblem
from utils.errors import InputError
from utils.models.tokenizer import load_tokenizer

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ASK = [("Human", "Hi")]


def choose(chosen, template=None, **options):
    tokenizer = chat_tokenizer(template, adds_bos=False)
    return tokenizer, choose_template(tokenizer, chosen, **options)


def test_the_tokenizers_own_template_is_the_default():
    tokenizer, line = choose(None, CHATML)
    assert tokenizer.chat_template == CHATML
    assert line == (
        "dialogues: written with the tokenizer's own chat template; "
        "EOS is <|im_end|>, with which it ends answers, in place of </s>"
    )
    assert tokenizer.eos_token == "<|im_end|>"


def test_of_several_templates_the_default_one_is_taken():
    tokenizer, _ = choose(None, {"default": CHATML, "tool_use": "tools {{ messages }}"})
    assert tokenizer.chat_template == CHATML


def test_without_a_template_the_text_form_stays():
    tokenizer, line = choose(None)
    assert tokenizer.chat_template is None and tokenizer.eos_token == "</s>"
    assert line == "dialogues: written as ' Human: ... Assistant: ...' (the tokenizer has no chat template)"
    tokenizer, line = choose("human_assistant", CHATML)
    assert tokenizer.chat_template is None and "(--chat_template human_assistant)" in line


def test_the_template_and_its_end_travel_with_the_saved_tokenizer(tmp_path):
    tokenizer, _ = choose("llama3")
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.eos_token == "<|eot_id|>"
    assert choose_template(again, None) == "dialogues: written with the tokenizer's own chat template"
    assert again.chat_template == tokenizer.chat_template
    assert ChatTemplate(again).render(ASK, asks=True) == ChatTemplate(tokenizer).render(ASK, asks=True)


def test_a_file(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    tokenizer, line = choose(str(file))
    assert "so </s> is added there" in line and tokenizer.eos_token == "</s>"
    for text, message in (
        (" \n", "is empty"),
        ("{% if %}", "mine.jinja, line 1: "),
        ("{% for m in messages %}\n{{ m.content + 1 }}{% endfor %}", "turn 1 \\(user\\) cannot be rendered"),
        ("{{ messages[-1].content }}", "the answer of turn 2 cannot be found"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            choose(str(file))
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        choose(str(file))
    with pytest.raises(InputError, match=r"missing.jinja: the file cannot be read \(No such file"):
        choose(str(tmp_path / "missing.jinja"))


def test_an_end_that_is_no_token_is_refused(llama_tokenizer_or_tiny):
    with pytest.raises(InputError, match=r"ends answers with <\|im_end\|>, which is no special token.*--eot_token"):
        choose_template(llama_tokenizer_or_tiny, "chatml")
    llama_tokenizer_or_tiny.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    llama_tokenizer_or_tiny.eos_token = "<|im_end|>"
    choose_template(llama_tokenizer_or_tiny, "chatml", eos_is_given=True)
    assert ChatTemplate(llama_tokenizer_or_tiny).end_token == "<|im_end|>"


@pytest.fixture
def llama_tokenizer_or_tiny(tiny_tokenizer):
    import copy

    return copy.deepcopy(tiny_tokenizer)


def test_two_ends_are_refused():
    tokenizer = chat_tokenizer()
    with pytest.raises(InputError, match=r"ends answers with <\|im_end\|>, --eot_token with </s>"):
        choose_template(tokenizer, "chatml", eos_is_given=True)


def test_a_template_without_a_generation_prompt_is_named_in_the_log():
    _, line = choose(None, CHATML.split("{% if add")[0])
    assert "it writes '<|im_start|>assistant' behind the prompt, which is trained" in line
    assert "behind the prompt" not in choose("vicuna")[1], "a space is no beginning"


def test_todays_date_is_the_same_every_day():
    dated = "{{ strftime_now('%d %b %Y') if strftime_now is defined }} " + CHATML
    tokenizer, line = choose(None, dated)
    assert ChatTemplate(tokenizer).render(ASK).startswith(f"{FIXED_DATE} <|im_start|>user") and FIXED_DATE in line
    before = tokenizer.chat_template
    choose_template(tokenizer, None)
    assert tokenizer.chat_template == before, "once"


def test_a_failure_names_the_turn():
    template = (
        "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no bad') }}{% endif %}{% endfor %}"
    )
    tokenizer = chat_tokenizer(template)
    turns = [("Human", "a"), ("Assistant", "b"), ("Human", "bad"), ("Assistant", "c")]
    with pytest.raises(TemplateProblem, match=r"turn 3 \(user\) cannot be rendered: no bad"):
        ChatTemplate(tokenizer).render(turns)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chat_template": "chatlm"}, r"'chatlm': unknown template \(did you mean chatml\?\); choose from llama2, "),
        ({"chat_template": ""}, "unknown template"),
        ({"system_prompt": " "}, "--system_prompt is empty"),
        ({"train_on": "first"}, "--train_on: unknown choice 'first'"),
    ],
)
def test_values_of_flags(values, message):
    with pytest.raises(InputError, match=message):
        SftConfig(model_name_or_path="m", **values)
