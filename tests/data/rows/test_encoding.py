"""Rows of dialogues in a chat template or in the text form: several trained answers, cuts, known sets, refusals."""

import pytest
from chat_tokenizers import chat_tokenizer

from utils.data import Corpus, build_datasets, collate_sft
from utils.data.batches.sizes import ROW_KINDS
from utils.data.formats.dialogue import answered, settled, turns_of, undecided
from utils.data.formats.registry import DATASETS, find_format
from utils.data.rows.audit import marked
from utils.data.rows.encoding import CannotRender, ExampleEncoder
from utils.data.rows.token_rows import rows_of
from utils.errors import InputError

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ALTERNATING = "{% for m in messages %}{{ raise_exception('turns must alternate') if (m.role == 'user') != "
ALTERNATING += "(loop.index0 % 2 == 0) }}{% endfor %}" + CHATML
# Reasoning is written in a last answer, and left out of earlier ones.
FORGETFUL = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('why : ')[-1] }}")
TURNS = [("Human", "Hi"), ("Assistant", "Hello there ."), ("Human", "Why ?")]
ASKED = "<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n"
MULTI = "<|im_start|>user\\nWhy ?<|im_end|>\\n<|im_start|>assistant\\n"


def tokenizer_of(template):
    return chat_tokenizer(template, adds_bos=False, eos="<|im_end|>" if template else "</s>")


def sft_row(template, example, max_len=500, train_on="all", **options):
    encoder = ExampleEncoder(tokenizer_of(template), train_on=train_on, **options)
    ((_, _, row),) = rows_of("sft", encoder, [example], max_len)
    return encoder.tokenizer, row


def trained(tokenizer, row):
    """The row's text with the tokens that the loss counts between marks."""
    mask = collate_sft([row], pad_id=0)["target_mask"][0].tolist()
    edges = [i for i in range(len(mask) + 1) if (i > 0 and mask[i - 1]) != (i < len(mask) and mask[i])]
    assert ROW_KINDS["sft"].size(row, 0).targets == sum(mask)
    return marked(tokenizer, row["input_ids"], list(zip(edges[::2], edges[1::2])))


def test_all_answers_of_a_dialogue_or_its_last_one():
    example = answered(TURNS, "Fine .")
    assert trained(*sft_row(CHATML, example)) == f"{ASKED}⟦Hello there .<|im_end|>⟧\\n{MULTI}⟦Fine .<|im_end|>⟧"
    tokenizer, row = sft_row(CHATML, example, train_on="last")
    assert trained(tokenizer, row) == f"{ASKED}Hello there .<|im_end|>\\n{MULTI}⟦Fine .<|im_end|>⟧"
    assert set(row) == {"input_ids", "response_start"}


def test_the_text_form_has_no_end_between_turns():
    example = answered(TURNS, "Fine .")
    assert (
        trained(*sft_row(None, example)) == " Human: Hi Assistant:⟦ Hello there .⟧ Human: Why ? Assistant:⟦ Fine .</s>⟧"
    )
    assert trained(*sft_row(None, example, system_prompt="Be kind .")).startswith(" System: Be kind . Human: Hi")
    text = "\n\nHuman: Hi\n\nAssistant: Hello there .\n\nHuman: Why ?\n\nAssistant:"
    known = DATASETS["Dahoas/rm-static"].format.convert({"prompt": text, "chosen": " Fine .", "rejected": " No"})
    assert trained(*sft_row(None, known)) == (
        "\\n\\nHuman: Hi\\n\\nAssistant:⟦ Hello there .⟧\\n\\nHuman: Why ?\\n\\nAssistant:⟦ Fine .</s>⟧"
    )


def test_an_opening_of_the_assistants_is_not_trained():
    assert trained(*sft_row(CHATML, answered([("Assistant", "Hello"), ("Human", "Hi")], "Fine ."))) == (
        "<|im_start|>assistant\\nHello<|im_end|>\\n" + ASKED + "⟦Fine .<|im_end|>⟧"
    )


def test_a_cut_on_the_left_drops_answers_that_lost_their_beginning():
    example = answered(TURNS, "Fine .")
    tokenizer, whole = sft_row(CHATML, example)
    start, end, *_ = whole["target_spans"]
    _, row = sft_row(CHATML, example, max_len=len(whole["input_ids"]) - start + 1)
    assert trained(tokenizer, row) == f"\\n⟦Hello there .<|im_end|>⟧\\n{MULTI}⟦Fine .<|im_end|>⟧"
    _, row = sft_row(CHATML, example, max_len=len(whole["input_ids"]) - start - 1)
    assert trained(tokenizer, row).count("⟦") == 1 and "target_spans" not in row
    tokenizer, row = sft_row("{{ bos_token }}" + CHATML, example, max_len=20)
    assert row["input_ids"][0] == tokenizer.bos_token_id and len(row["input_ids"]) == 20


def test_a_cut_in_front_of_a_turn_that_begins_with_bos_does_not_double_it():
    tokenizer = tokenizer_of(CHATML)
    tokenizer.bos_token = "<|im_start|>"  # as SmolLM2's tokenizer has it
    encoder = ExampleEncoder(tokenizer, train_on="all")
    for purpose, name in (("sft", "input_ids"), ("prompts", "prompt_ids")):
        for length in range(20, 50):
            ((_, encoded, row),) = rows_of(purpose, encoder, [answered(TURNS, "Fine .")], length)
            first, second, *_ = row[name]
            whole = len(encoded.prompt) + sum(map(len, encoded.answers.values()))
            assert first == tokenizer.bos_token_id != second and len(row[name]) >= min(length - 1, whole)
            if purpose == "sft":
                assert "⟦Fine .<|im_end|>⟧" in trained(tokenizer, row)


def test_known_sets_become_turns_and_local_text_stays_as_it_is():
    hh = "\n\nHuman: Hi\n\nAssistant: Hello there .\n\nHuman: Why ?\n\nAssistant:"
    row = {"prompt": hh, "chosen": " Fine .", "rejected": " No"}
    expected = f"{ASKED}Hello there .<|im_end|>\\n{MULTI}⟦Fine .<|im_end|>⟧"
    for name in ("Dahoas/rm-static", "Dahoas/full-hh-rlhf", "Dahoas/static-hh"):
        assert trained(*sft_row(CHATML, DATASETS[name].format.convert(row), train_on="last")) == expected
    rewards = {"prompt": hh.removesuffix("Assistant:"), "chosen": "Assistant: Fine .", "rejected": "Assistant: No"}
    example = DATASETS["yitingxie/rlhf-reward-datasets"].format.convert(rewards)
    assert trained(*sft_row(CHATML, example, train_on="last")) == expected
    vicuna = {"prompt": "USER: Hi ASSISTANT: Hello there . USER: Why ? ASSISTANT:", "label": "Fine ."}
    example = DATASETS["pvduy/sharegpt_alpaca_oa_vicuna_format"].format.convert(vicuna)
    assert trained(*sft_row(CHATML, example, train_on="last")) == expected
    dialogues = {"chosen": hh + " Fine .", "rejected": hh + " No"}
    example = DATASETS["Anthropic/hh-rlhf"].format.convert(dialogues)
    assert trained(*sft_row(CHATML, example, train_on="last")) == expected
    alpaca = find_format({"instruction", "output"}, "sft").convert({"instruction": hh, "output": "Fine ."})
    assert trained(*sft_row(CHATML, alpaca, train_on="last")) == expected

    local = undecided(hh, " Fine .", " No")
    assert trained(*sft_row(CHATML, settled(local, "dialogue"), train_on="last")) == expected
    shown = hh.replace("\n", "\\n")
    assert trained(*sft_row(CHATML, settled(local, "raw"), train_on="last")) == f"{shown}⟦ Fine .<|im_end|>⟧"
    question = settled(undecided("Hi", "Fine ."), "dialogue")
    assert trained(*sft_row(CHATML, question)) == f"{ASKED}⟦Fine .<|im_end|>⟧"


def test_turns_of_a_text():
    assert turns_of("\n\nHuman: a\n\nHuman: b\n\nAssistant:") == (("Human", "a\n\nb"),)
    assert turns_of("Be kind.\n\nHuman: a\n\nAssistant:") == (("System", "Be kind."), ("Human", "a"))
    assert turns_of("Assistant:") is turns_of("Human: a") is turns_of("Assistant: a Human: b Assistant: c") is None


@pytest.fixture
def build(write_jsonl, tmp_path):
    def call(template, rows, purpose="sft", **options):
        path = write_jsonl(rows)
        split = {"sft": "1,0,0", "preference": "0,1,0", "prompts": "0,0,1", "pretrain": "1,1,1"}[purpose]
        corpus = Corpus(
            purpose=purpose, paths=[path], max_len=200, data_split=split, cache_dir=str(tmp_path), **options
        )
        corpus.check()
        return build_datasets(corpus, tokenizer_of(template))

    return call


def messages(*texts, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def test_a_dialogue_that_the_template_refuses_is_named_by_row_and_turn(build):
    good = {"messages": messages("Hi", "Fine .")}
    bad = {
        "messages": [
            *messages("Hi", "Fine ."),
            *messages("a", "b", first="assistant"),
            *messages("c", first="assistant"),
        ]
    }
    with pytest.raises(InputError, match=r"data.jsonl, line 4: .*turn 3 \(assistant\) cannot be rendered: turns must"):
        build(ALTERNATING, [good, good, good, bad, good])
    example = answered([("Human", "a"), ("Human", "b")], "c")
    published = ExampleEncoder(tokenizer_of(ALTERNATING))
    with pytest.raises(InputError, match="turn 2"):
        published([example])
    object.__setattr__(example, "published", True)
    (reason,) = published([example])
    assert isinstance(reason, CannotRender) and "turn 2 (user)" in str(reason)


def test_a_mask_that_cannot_be_found_names_the_row_and_the_turn(build):
    rows = [{"messages": messages(f"Hi {i}", "why : milk . Hello", "Why ?", "why : user . Fine .")} for i in range(8)]
    assert "7 training rows" in build(FORGETFUL, rows)[0].description
    with pytest.raises(InputError, match=r"line \d: .*the answer of turn 2 cannot be found: as an earlier turn"):
        build(FORGETFUL, rows, train_on="all")
    other_header = CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>bot\n{% endif")
    with pytest.raises(InputError, match=r"line \d: .*the answer of turn 4 cannot be found: without it .*bot"):
        build(other_header, rows)


def test_rows_of_all_purposes(build, write_jsonl):
    chat = [{"messages": messages(f"Hi {i}", "Hello there .", "Why ?", f"Fine {i}")} for i in range(8)]
    pairs = [
        {"chosen": messages(f"Hi {i}", "Hello there ."), "rejected": messages(f"Hi {i}", "Fine .")} for i in range(8)
    ]
    tokenizer = tokenizer_of(CHATML)
    everything = {tokenizer.decode(row["input_ids"]) for part in build(CHATML, chat) for row in part}
    prompts = {row["prompt"] for part in build(CHATML, chat, "prompts") for row in part}
    for i in range(8):
        prompt = f"{ASKED.replace('Hi', f'Hi {i}')}Hello there .<|im_end|>\\n{MULTI}".replace("\\n", "\n")
        assert prompt in prompts and f"{prompt}Fine {i}<|im_end|>" in everything
    for row in build(CHATML, chat, "prompts")[0]:
        assert tokenizer.decode(row["prompt_ids"]) == row["prompt"] and row["reference"].startswith("Fine")
    for row in build(CHATML, pairs, "preference")[0]:
        assert tokenizer.decode(row["prompt_ids"]).endswith("<|im_start|>assistant\n")
        answers = [tokenizer.decode(row[name]) for name in ("chosen_ids", "rejected_ids")]
        assert answers == ["Hello there .<|im_end|>", "Fine .<|im_end|>"]
    text = tokenizer.decode(build(CHATML, chat, "pretrain")[0][0]["input_ids"])
    assert text.startswith("<|im_start|>user\nHi ") and "<|im_end|><|im_start|>user\nHi " in text


def test_rows_depend_on_template_system_prompt_and_trained_answers_but_their_division_does_not(build):
    rows = [{"messages": messages(f"Hi {i}", "Hello there .", "Why ?", f"Fine {i}")} for i in range(30)]
    variants = [{"template": None}, {"template": CHATML}, {"template": "{# mine #}" + CHATML}]
    variants += [{"template": CHATML, "system_prompt": "Be kind ."}, {"template": CHATML, "train_on": "all"}]
    built = [build(variant.pop("template"), rows, **variant) for variant in variants]
    assert len({train.key for train, _ in built}) == len(built)

    def held_out(part):
        return {i for i in range(30) for row in part if f"Hi {i} " in f"{decoded(row)} "}

    def decoded(row):
        return tokenizer_of(CHATML).decode(row["input_ids"]).replace("<|im_end|>", " ")

    assert len({frozenset(held_out(part)) for _, part in built}) == 1


def test_prompts_of_text_get_no_system_prompt_and_the_log_says_so(build):
    rows = [{"prompt": f" Human: {i} ? Assistant:", "chosen": " Fine", "rejected": " No"} for i in range(8)]
    assert (
        "; form: 8 prompts that are text and get no --system_prompt"
        in build(None, rows, system_prompt="a")[0].description
    )
