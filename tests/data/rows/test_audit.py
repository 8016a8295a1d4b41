"""Each check of the audit against a broken template that it alone refuses."""

import re

import pytest
from chat_tokenizers import chat_tokenizer

from utils.data import Corpus, build_datasets
from utils.data.rows import audit
from utils.errors import InputError


def dialogue(*texts):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


ROWS = [
    dialogue(
        f"what is milk {i} ?", "the milk is white .", "what colour ?", "Fine , thanks .", "user ?", "Hello there ."
    )
    for i in range(12)
]
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
HEAD, LOOP, END = "{{ bos_token }}", "{% for m in messages %}", "{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
SOUND = HEAD + LOOP + TURN + END + ASK
BROKEN = {
    "bos_stands_once": (HEAD + SOUND, "it begins with <s> twice"),
    "no_answer_is_empty": (
        HEAD + LOOP + "<|im_start|>{{ m.role }}\n{{ m.content if m.role == 'user' }}<|im_end|>\n" + END + ASK,
        "answer 1 is empty",
    ),
    "the_end_is_trained": (
        HEAD + LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}{{ '<|im_end|>' if loop.index != 4 }}\n" + END + ASK,
        "no token that ends answer 2 is trained",
    ),
    "generation_stops_there": (
        HEAD
        + LOOP
        + "<|im_start|>{{ m.role }}\n{{ m.content }}{{ '<|im_end|>' if loop.index < 6 else '<|eot_id|>' }}\n"
        + END
        + ASK,
        "answer 3 ends with <|eot_id|>, but generation stops at <|im_end|>",
    ),
    "prompts_are_those_of_rollouts": (
        HEAD
        + LOOP
        + "{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}{{ m.content }}<|im_end|>"
        + END
        + "{% if add_generation_prompt %}ASSISTANT: {% endif %}",
        "the tokens in front of the answer to turn 3 are not those of a rollout's prompt",
    ),
}


@pytest.fixture
def build(write_jsonl, tmp_path):
    def call(template, rows=ROWS, purpose="sft", **options):
        tokenizer = chat_tokenizer(template, adds_bos=False, eos="<|im_end|>")
        options = {"train_on": "all", "max_len": 200} | options
        path = write_jsonl(rows)
        split = {"sft": "1,0,0", "preference": "0,1,0", "prompts": "0,0,1"}[purpose]
        corpus = Corpus(purpose=purpose, paths=[path], data_split=split, cache_dir=str(tmp_path), **options)
        return build_datasets(corpus, tokenizer)[0]

    return call


def test_the_table_of_checks_is_the_table_of_tests():
    assert [check.__name__ for check in audit.CHECKS] == list(BROKEN)


def test_a_sound_template_passes_and_the_log_counts(build):
    assert build(SOUND).description.endswith("audit: 33 answers of 11 rows checked, which end with <|im_end|>")
    assert build(SOUND, train_on="last").description.endswith(
        "audit: 11 answers of 11 rows checked, which end with <|im_end|>"
    )
    assert build(SOUND, purpose="prompts", train_on="last").description.endswith(
        "audit: 11 answers of 11 rows checked, which end with <|im_end|>"
    )


@pytest.mark.parametrize("check", BROKEN)
def test_a_broken_template_is_refused_by_its_check_alone(build, check, monkeypatch):
    template, message = BROKEN[check]
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        build(template)
    assert re.search(r"data.jsonl, line \d+: ", str(caught.value))
    assert "⟦" in str(caught.value) and "⟧" in str(caught.value)
    monkeypatch.setattr(audit, "CHECKS", [other for other in audit.CHECKS if other.__name__ != check])
    assert len(build(template)) == 11


def test_the_refused_row_is_shown_with_its_trained_tokens(build):
    with pytest.raises(InputError) as caught:
        build(BROKEN["the_end_is_trained"][0])
    assert (
        "<|im_start|>assistant\\n⟦the milk is white .<|im_end|>⟧\\n<|im_start|>user\\nwhat colour ?<|im_end|>\\n"
        "<|im_start|>assistant\\n⟦Fine , thanks .⟧\\n<|im_start|>user\\nuser ?<|im_end|>\\n"
        "<|im_start|>assistant\\n⟦Hello there .<|im_end|>⟧"
    ) in str(caught.value)


def test_the_audit_runs_again_on_rows_from_the_cache(build, monkeypatch):
    template, message = BROKEN["bos_stands_once"]
    monkeypatch.setattr(audit, "CHECKS", ())
    build(template)
    monkeypatch.undo()
    with pytest.raises(InputError, match=message):
        build(template)


def test_every_step_is_audited(build):
    pairs = [
        {"chosen": row["messages"], "rejected": [*row["messages"][:-1], {"role": "assistant", "content": "user"}]}
        for row in ROWS
    ]
    for name in ("bos_stands_once", "generation_stops_there"):
        template, message = BROKEN[name]
        message = re.escape(message).replace("answer\\ 3", "answer 1")
        with pytest.raises(InputError, match=message):
            build(template, pairs, "preference", train_on="last")
        with pytest.raises(InputError, match=message):
            build(template, ROWS, "prompts", train_on="last")
    assert "22 answers of 11 rows" in build(SOUND, pairs, "preference", train_on="last").description


def test_rows_that_a_template_gives_no_longer_are_refused(build, monkeypatch):
    from utils.data.rows import dataset

    build(SOUND)
    monkeypatch.setattr(dataset, "_form_of_dialogues", lambda *_: ["the same"])
    build(SOUND)
    with pytest.raises(InputError, match="the prepared rows are not those that are made of it now"):
        build(SOUND.replace("{{ m.content }}", "{{ m.content }}!"))


def test_answers_that_were_cut_need_no_end(build):
    rows = [dialogue(f"what is milk {i} ?", "the milk is white . " * 30) for i in range(12)]
    train = build(SOUND, rows, max_len=60)
    assert len(train) == 11 and train.description.endswith("which end with <|im_end|>, except 11 that were cut")
