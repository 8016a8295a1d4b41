"""Prepared rows are named by the number of their format: whoever changes the rows changes the number as well."""

import hashlib
import json

import pytest
from chat_tokenizers import chat_tokenizer

from utils.chat_templates.choice import choose_template
from utils.data import Corpus, build_datasets
from utils.data.rows.cache import ROW_FORMAT

# What the rows below are in each format: a new number gets a new line, and old lines stay.
DIGESTS = {
    1: "8678e505267ed9003cbd99a3b9d1a539d788ddc2ec51ad1084a910c536690863",
    2: "b39695f355be94dfccee84a04c1dee6f2d1c2f1ebf39df8fe0f5604d61781f77",
}
# The same for dialogues in a chat template, which there are from format 2 on.
CHAT_DIGESTS = {
    2: "1119f88795b6a6fed00915798ce6fe93ea965f6786ddc5c5323b49e019537114",
}
TOKENIZER = "4979a997d18b2602b75969a59391636f8773ba1ece845981279ef03e278f471d"  # of the vocabulary of their ids

COLOURS = ["white", "black", "green", "red", "blue"]


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


# One file each, of rows in one format. Some are longer than a row may be, some are left out by a step.
PAIRS = [
    {"prompt": f" Human: what is thing {i} ? Assistant:", "chosen": f" it is {COLOURS[i % 5]} .", "rejected": " no !"}
    for i in range(8)
] + [
    {"prompt": "Is it ?", "chosen": " yes\n", "rejected": "no", "id": 7, "reference": "yes"},
    {"prompt": "\n\nHuman: Is it ?\n\nAssistant:", "chosen": "yes", "rejected": " no</s>", "score": 0.5},
    {"prompt": "milk " * 40 + ":", "chosen": " white .", "rejected": " black ."},
    {"prompt": "the milk is", "chosen": " white" * 40, "rejected": " black ."},
    {"prompt": "the milk is", "chosen": "white", "rejected": "white "},
]
OPEN = "\n\nHuman: Hi\n\nAssistant: Yo.\n\nHuman: And {} ?\n\nAssistant:"
DIALOGUES = [
    {"chosen": f"{OPEN.format(i // 2)} {colour} .", "rejected": f"{OPEN.format(i // 2)} no !"}
    for i, colour in enumerate(COLOURS * 2)
]
CHAT_PAIRS = [
    {"prompt": chat(f"Hi {colour}"), "chosen": chat(f"Hi {colour}", "Hi ."), "rejected": chat(f"Hi {colour}", "no !")}
    for colour in COLOURS
]
CHAT = [{"messages": chat(f"Hi {i}", " Yo. ", "And ?", answer)} for i, answer in enumerate(COLOURS)] + [
    {"messages": [{"role": "system", "content": "Be kind ."}, *chat("日本語 ?", "日本語")], "tags": ["a", None]}
]
ALPACA = [
    *({"instruction": f"Name {i} .", "input": "a, b" * (i % 2), "output": f"It is {i} ."} for i in range(5)),
    {"instruction": "Human: a Assistant: b Human: c Assistant:", "input": "", "output": "d", "source": "x"},
]
JUDGED = [{"prompt": f"Thing {i} ?", "completion": f"It is {i} .", "label": i % 3 > 0} for i in range(8)]
JUDGED_CHAT = [{"messages": chat(f"Thing {i} ?", f"It is {i} ."), "label": i % 2} for i in range(6)]
TEXT = [
    *({"text": f"The quick brown fox {i} jumps over the lazy dog. " * (1 + i % 3)} for i in range(6)),
    {"text": " "},
]
PROMPTS = [
    *({"prompt": f"Thing {i} ?", "reference": f"It is {i} ."} for i in range(5)),
    {"prompt": "Thing:", "n": 1.5},
]

FILES = {
    "sft": (PAIRS, CHAT, ALPACA, JUDGED, JUDGED_CHAT, TEXT),
    "preference": (PAIRS, DIALOGUES, CHAT_PAIRS),
    "prompts": (PAIRS, CHAT_PAIRS, CHAT, ALPACA, JUDGED, JUDGED_CHAT, PROMPTS),
    "pretrain": (TEXT, PAIRS, CHAT),
}


WHOLE = {"sft": "1,0,0", "preference": "0,1,0", "prompts": "0,0,1", "pretrain": "1,1,1"}


@pytest.fixture
def prepared(write_jsonl, tiny_tokenizer, tmp_path):
    """The rows of each purpose, from a third of the data and from all: training rows first, in their order."""

    def call() -> dict[str, list[dict]]:
        rows = {}
        for purpose, files in FILES.items():
            paths = [write_jsonl(content, f"{purpose}/{number}.jsonl") for number, content in enumerate(files)]
            undivided = [write_jsonl(ALPACA, f"{purpose}/more.jsonl")] if purpose == "sft" else []
            rows[purpose] = []
            for data_split in ("1,1,1", WHOLE[purpose]):
                corpus = Corpus(
                    purpose=purpose,
                    paths=paths,
                    undivided=undivided,
                    max_len=32,
                    data_split=data_split,
                    seed=5,
                    cache_dir=str(tmp_path),
                )
                rows[purpose] += [row for part in build_datasets(corpus, tiny_tokenizer) for row in part]
        return rows

    return call


def digest_of(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def test_rows_are_those_of_their_format_number(prepared, tiny_tokenizer):
    tokenizer = digest_of(tiny_tokenizer.get_vocab())
    assert tokenizer == TOKENIZER, (
        f"the tiny tokenizer has another vocabulary ({tokenizer}), so the digests say nothing about the code that "
        "prepares rows: check out code that is known to be right, and note this digest and that of the rows anew"
    )
    found = digest_of(prepared())
    number = ROW_FORMAT + 1 if ROW_FORMAT in DIGESTS else ROW_FORMAT
    assert found == DIGESTS.get(ROW_FORMAT), (
        f"rows of the same data are not those of ROW_FORMAT {ROW_FORMAT}. If the change is meant, set ROW_FORMAT in "
        f'utils/data/rows/cache.py to {number} and add `{number}: "{found}"` to DIGESTS in {__file__}. Otherwise '
        "caches would give old rows to new code, and checkpoints go on with other rows than those they stopped at"
    )


def test_rows_in_a_chat_template_are_those_of_their_format_number(write_jsonl, tmp_path):
    tokenizer, rows = chat_tokenizer(), {}
    choose_template(tokenizer, "chatml")
    for purpose, files in FILES.items():
        paths = [write_jsonl(content, f"{purpose}/{number}.jsonl") for number, content in enumerate(files)]
        for train_on in ("last", "all"):
            corpus = Corpus(
                purpose=purpose,
                paths=paths,
                max_len=60,
                data_split=WHOLE[purpose],
                cache_dir=str(tmp_path),
                train_on=train_on,
                system_prompt="Be kind .",
            )
            rows[f"{purpose} {train_on}"] = [row for part in build_datasets(corpus, tokenizer) for row in part]
    assert digest_of(rows) == CHAT_DIGESTS.get(ROW_FORMAT), "see the message of the test above"


def test_every_format_number_has_its_digest():
    assert sorted(CHAT_DIGESTS) == list(range(2, ROW_FORMAT + 1))
    assert sorted(DIGESTS) == list(range(1, ROW_FORMAT + 1)), (
        f"ROW_FORMAT is {ROW_FORMAT}: raise it by one, and add the digest that the test above names to DIGESTS"
    )
