"""Two tables: the formats a row can have, recognised by their columns, and the published data sets by name.

A new format or data set is one entry here and, where its columns are new, one converter.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from utils.data.formats import converters, published
from utils.data.formats.example import Example, Purpose, Row

PAIRS: frozenset[Purpose] = frozenset({"sft", "preference", "prompts", "pretrain"})
ANSWERS: frozenset[Purpose] = frozenset({"sft", "prompts", "pretrain"})
LABELLED: frozenset[Purpose] = ANSWERS | {"labelled"}
TEXT: frozenset[Purpose] = frozenset({"sft", "pretrain"})
PROMPTS: frozenset[Purpose] = frozenset({"prompts"})


@dataclass(frozen=True)
class Format:
    """Rows that hold `columns` (and maybe others), the purposes they serve, and how a row becomes an Example.

    published: rows without a response are known to be in the set: they are dropped and counted, not refused.
    assemble: for sets whose rows must be seen together (trees of messages): (where, row) pairs to examples.
    """

    columns: tuple[str, ...]
    serves: frozenset[Purpose]
    convert: Callable[[Row], Example] | None = None
    published: bool = False
    assemble: Callable[[Iterable[tuple[str, Row]]], Iterator[tuple[str, Example]]] | None = None

    @property
    def name(self) -> str:
        return "+".join(self.columns)


GENERAL_FORMATS = (
    Format(("prompt", "chosen", "rejected"), PAIRS, converters.preference),
    Format(("conversations", "chosen", "rejected"), PAIRS, converters.conversation_preference("conversations")),
    Format(("messages", "chosen", "rejected"), PAIRS, converters.conversation_preference("messages")),
    Format(("chosen", "rejected"), PAIRS, converters.dialogue_preference),
    Format(("instruction", "output"), ANSWERS, converters.alpaca),
    # Evaluation sets of this form hold models' empty answers.
    Format(("instruction", "output_1", "output_2", "preference"), PAIRS, converters.alpaca_preference, published=True),
    Format(("conversations",), LABELLED, converters.conversation("conversations")),
    Format(("messages",), LABELLED, converters.conversation("messages")),
    Format(("prompt", "completion"), LABELLED, converters.prompt_and("completion")),
    Format(("prompt", "chosen"), LABELLED, converters.prompt_and("chosen")),
    Format(("prompt", "response"), LABELLED, converters.prompt_and("response")),
)
LAST_FORMATS = (
    Format(("text",), TEXT, converters.plain_text),
    Format(("prompt",), PROMPTS, converters.prompt_only),
)

AS_IT_STANDS = Format(("prompt", "chosen", "rejected"), PAIRS, published.as_it_stands, published=True)
ASKED_PAIR = Format(("prompt", "chosen", "rejected"), PAIRS, published.asked_pair, published=True)
REWARD_DATASETS = Format(("prompt", "chosen", "rejected"), PAIRS, published.reward_datasets, published=True)
SUMMARIES = Format(("prompt", "chosen", "rejected"), PAIRS, published.summarize_comparisons, published=True)
HH_RLHF = Format(("chosen", "rejected"), PAIRS, converters.dialogue_preference, published=True)
ALPACA = Format(("instruction", "output"), ANSWERS, converters.alpaca, published=True)
MKQA_COLUMNS = ("queries", "answers")
MKQA_CHINESE = Format(MKQA_COLUMNS, ANSWERS, published.translated_question("zh_cn"), published=True)
VICUNA = Format(("prompt", "label"), ANSWERS, published.vicuna, published=True)
MKQA_JAPANESE = Format(MKQA_COLUMNS, ANSWERS, published.translated_question("ja"), published=True)

# Published sets whose columns are their own: a local copy is recognised by them as well.
WEBGPT = Format(("question", "answer_0", "answer_1", "score_0"), PAIRS, published.webgpt_comparisons, published=True)
SHP = Format(("history", "human_ref_A", "human_ref_B", "labels"), PAIRS, published.human_preferences, published=True)
ZHIHU = Format(
    ("INSTRUCTION", "RESPONSE"), ANSWERS, published.question_and_answer("INSTRUCTION", "RESPONSE"), published=True
)
MIRACL = Format(("query", "positive_passages", "negative_passages"), PAIRS, published.passages, published=True)
HC3 = Format(("question", "human_answers"), ANSWERS, published.first_human_answer, published=True)
JAQUAD = Format(
    ("question", "sentence", "paragraph"),
    ANSWERS,
    published.question_and_answer("question", "sentence"),
    published=True,
)
JAQUAD_ALL = Format(("questions", "answers", "paragraph"), ANSWERS, published.first_question, published=True)
GPT4_SCORES = Format(("user_input", "responses_and_scores"), PAIRS, published.scored_responses, published=True)
OASST = Format(("message_id", "parent_id", "role", "text"), PAIRS, published=True, assemble=published.message_trees)
PUBLISHED_FORMATS = (WEBGPT, SHP, ZHIHU, MIRACL, HC3, JAQUAD, JAQUAD_ALL, GPT4_SCORES, OASST)

FORMATS = (*GENERAL_FORMATS, *PUBLISHED_FORMATS, *LAST_FORMATS)


@dataclass(frozen=True)
class DatasetSpec:
    """Where a published set lies on the hub, in which configuration and splits, and its format.

    hub None: the set is published as plain files; `files` says which, and --data_path takes their path.
    format None: determined by the columns.
    left_out: a folder that is not read in a local copy, because it holds rows of another kind.
    """

    hub: str | None
    format: Format | None
    config: str | None = None
    train: str = "train"
    held_out: str | None = None
    files: str = ""
    left_out: str = ""


DATASETS = {
    "Dahoas/rm-static": DatasetSpec("Dahoas/rm-static", AS_IT_STANDS, held_out="test"),
    "Dahoas/full-hh-rlhf": DatasetSpec("Dahoas/full-hh-rlhf", AS_IT_STANDS, held_out="test"),
    "Dahoas/static-hh": DatasetSpec("Dahoas/static-hh", AS_IT_STANDS, held_out="test"),
    "Dahoas/synthetic-instruct-gptj-pairwise": DatasetSpec("Dahoas/synthetic-instruct-gptj-pairwise", ASKED_PAIR),
    "yitingxie/rlhf-reward-datasets": DatasetSpec("yitingxie/rlhf-reward-datasets", REWARD_DATASETS, held_out="test"),
    "openai/webgpt_comparisons": DatasetSpec("openai/webgpt_comparisons", WEBGPT),
    "stanfordnlp/SHP": DatasetSpec("stanfordnlp/SHP", SHP, held_out="validation"),
    "pvduy/sharegpt_alpaca_oa_vicuna_format": DatasetSpec(
        "pvduy/sharegpt_alpaca_oa_vicuna_format", VICUNA, held_out="test"
    ),
    "wangrui6/Zhihu-KOL": DatasetSpec("wangrui6/Zhihu-KOL", ZHIHU),
    "Cohere/miracl-zh-queries-22-12": DatasetSpec("Cohere/miracl-zh-queries-22-12", MIRACL, held_out="dev"),
    "Cohere/miracl-ja-queries-22-12": DatasetSpec("Cohere/miracl-ja-queries-22-12", MIRACL, held_out="dev"),
    "Hello-SimpleAI/HC3-Chinese": DatasetSpec("Hello-SimpleAI/HC3-Chinese", HC3, config="all"),
    "mkqa-Chinese": DatasetSpec("apple/mkqa", MKQA_CHINESE, config="mkqa"),
    "mkqa-Japanese": DatasetSpec("apple/mkqa", MKQA_JAPANESE, config="mkqa"),
    "lmqg/qg_jaquad": DatasetSpec("lmqg/qg_jaquad", JAQUAD, held_out="validation"),
    "lmqg/qag_jaquad": DatasetSpec("lmqg/qag_jaquad", JAQUAD_ALL, held_out="validation"),
    "Anthropic/hh-rlhf": DatasetSpec("Anthropic/hh-rlhf", HH_RLHF, held_out="test", left_out="red-team-attempts"),
    "tatsu-lab/alpaca": DatasetSpec("tatsu-lab/alpaca", ALPACA),
    "alpaca_gpt4": DatasetSpec("vicgalle/alpaca-gpt4", ALPACA),
    "OpenAssistant/oasst1": DatasetSpec("OpenAssistant/oasst1", OASST, held_out="validation"),
    "CarperAI/openai_summarize_comparisons": DatasetSpec(
        "CarperAI/openai_summarize_comparisons", SUMMARIES, held_out="valid1"
    ),
    "wikitext": DatasetSpec("Salesforce/wikitext", None, config="wikitext-103-raw-v1", held_out="validation"),
    "MultiTurnAlpaca": DatasetSpec(
        None, ALPACA, files="data/training_data.txt.train and .test of github.com/l294265421/alpaca-rlhf"
    ),
    "GPT-4-LLM": DatasetSpec(
        None,
        ALPACA,
        files="data/alpaca_gpt4_data.json (answers) or data/comparison_data_v2.json (comparisons) of "
        "github.com/Instruction-Tuning-with-GPT-4/GPT-4-LLM",
    ),
}
ALIASES = {
    "Cohere/miracl-zh": "Cohere/miracl-zh-queries-22-12",
    "Cohere/miracl-ja": "Cohere/miracl-ja-queries-22-12",
    "vicgalle/alpaca-gpt4": "alpaca_gpt4",
    "Salesforce/wikitext": "wikitext",
}


def find_dataset(name: str) -> DatasetSpec | None:
    """The published set called `name` (or by an alias), or None."""
    return DATASETS.get(ALIASES.get(name, name))


def find_format(columns: Collection[str], purpose: Purpose) -> Format | None:
    """The first format that serves `purpose` and whose columns are all among `columns`, or None."""
    for candidate in FORMATS:
        if purpose in candidate.serves and set(candidate.columns) <= set(columns):
            return candidate
    return None


def expected_columns(purpose: Purpose) -> str:
    """The column sets that serve `purpose` in the general formats, for messages."""
    return ", ".join(known.name for known in (*GENERAL_FORMATS, *LAST_FORMATS) if purpose in known.serves)
