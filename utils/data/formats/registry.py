"""Two tables: the formats a row can have, recognised by their columns, and the published data sets by name.

A new format or data set is one entry here and, where its columns are new, one converter.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from utils.data.formats import converters, published, ranked
from utils.data.formats.example import Example, Purpose, Row

PAIRS: frozenset[Purpose] = frozenset({"sft", "preference", "prompts", "pretrain"})
ANSWERS: frozenset[Purpose] = frozenset({"sft", "prompts", "pretrain"})
JUDGED: frozenset[Purpose] = ANSWERS | {"labelled"}
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
    def holds_answers(self) -> bool:
        """Whether a row is a prompt with one answer, of which pairs can be made by `--score_column`."""
        return "preference" not in self.serves and self.serves >= ANSWERS

    @property
    def name(self) -> str:
        return "+".join(self.columns)


GENERAL_FORMATS = (
    Format(("prompt", "chosen", "rejected"), PAIRS, converters.preference),
    Format(("conversations", "chosen", "rejected"), PAIRS, converters.conversation_preference("conversations")),
    Format(("messages", "chosen", "rejected"), PAIRS, converters.conversation_preference("messages")),
    Format(("chosen", "rejected"), PAIRS, converters.dialogue_preference),
    Format(("prompt", "responses", "scores"), PAIRS, ranked.ranked_answers("responses", "scores")),
    Format(("prompt", "responses", "ranks"), PAIRS, ranked.ranked_answers("responses", "ranks", lower_is_better=True)),
    Format(("prompt", "ranked_responses"), PAIRS, ranked.ranked_answers("ranked_responses")),
    Format(("instruction", "output"), ANSWERS, converters.alpaca),
    # Evaluation sets of this form hold models' empty answers.
    Format(("instruction", "output_1", "output_2", "preference"), PAIRS, converters.alpaca_preference, published=True),
    Format(("conversations",), JUDGED, converters.conversation("conversations")),
    Format(("messages",), JUDGED, converters.conversation("messages")),
    Format(("prompt", "completion"), JUDGED, converters.prompt_and("completion")),
    Format(("prompt", "chosen"), JUDGED, converters.prompt_and("chosen")),
    Format(("prompt", "response"), JUDGED, converters.prompt_and("response")),
)
LAST_FORMATS = (
    Format(("text",), TEXT, converters.plain_text),
    Format(("prompt",), PROMPTS, converters.prompt_only),
)

AS_IT_STANDS = Format(("prompt", "chosen", "rejected"), PAIRS, published.as_it_stands, published=True)
ASKED_PAIR = Format(("prompt", "chosen", "rejected"), PAIRS, published.asked_pair, published=True)
REWARD_DATASETS = Format(("prompt", "chosen", "rejected"), PAIRS, published.reward_datasets, published=True)
SUMMARIES = Format(("prompt", "chosen", "rejected"), PAIRS, published.summarize_comparisons, published=True)
DIALOGUE_PAIRS = Format(("chosen", "rejected"), PAIRS, converters.dialogue_preference, published=True)
CHAT_PAIRS = Format(("prompt", "chosen", "rejected"), PAIRS, converters.preference, published=True)
ALPACA = Format(("instruction", "output"), ANSWERS, converters.alpaca, published=True)
CHAT = Format(("messages",), ANSWERS, converters.conversation("messages"), published=True)
COMPLETION = Format(("prompt", "completion"), ANSWERS, converters.prompt_and("completion"), published=True)
LABELLED = Format(("prompt", "completion", "label"), JUDGED, converters.prompt_and("completion"), published=True)
MKQA_COLUMNS = ("queries", "answers")
MKQA_CHINESE = Format(MKQA_COLUMNS, ANSWERS, published.translated_question("zh_cn"), published=True)
VICUNA = Format(("prompt", "label"), ANSWERS, published.vicuna, published=True)
MKQA_JAPANESE = Format(MKQA_COLUMNS, ANSWERS, published.translated_question("ja"), published=True)

DOLLY = Format(("instruction", "context", "response"), ANSWERS, published.instruction_in_context, published=True)
OPEN_ORCA_COLUMNS = ("system_prompt", "question", "response")
OPEN_ORCA = Format(OPEN_ORCA_COLUMNS, ANSWERS, published.system_and_question(*OPEN_ORCA_COLUMNS), published=True)
ORCA_PAIRS_COLUMNS = ("system", "question", "chosen", "rejected")
ORCA_PAIRS = Format(ORCA_PAIRS_COLUMNS, PAIRS, published.system_and_question(*ORCA_PAIRS_COLUMNS), published=True)
JUDGED_ORCA_COLUMNS = ("system", "input", "chosen", "rejected")
JUDGED_ORCA = Format(JUDGED_ORCA_COLUMNS, PAIRS, published.system_and_question(*JUDGED_ORCA_COLUMNS), published=True)
SAFE_RLHF = Format(
    ("prompt", "response_0", "response_1", "better_response_id"), PAIRS, published.safe_rlhf, published=True
)
# One answer with several scores; pairs are made of them with --score_column.
HELPSTEER = Format(("prompt", "response"), ANSWERS, ranked.helpsteer, published=True)
PROMPT_COLLECTION = Format(("context_messages",), PROMPTS, published.context_messages, published=True)

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
# The mean of the four ratings comes before the overall score, of which some were wrong in the first release.
ULTRAFEEDBACK = Format(
    ("instruction", "completions"),
    PAIRS,
    ranked.scored_list("completions", "response", ("fine-grained_score", "overall_score"), "instruction"),
    published=True,
)
NECTAR = Format(
    ("prompt", "answers"), PAIRS, ranked.scored_list("answers", "answer", ("rank",), "prompt", sign=-1), published=True
)
PUBLISHED_FORMATS = (WEBGPT, SHP, ZHIHU, MIRACL, HC3, JAQUAD, JAQUAD_ALL, GPT4_SCORES, OASST, ULTRAFEEDBACK, NECTAR)

FORMATS = (*GENERAL_FORMATS, *PUBLISHED_FORMATS, *LAST_FORMATS)


@dataclass(frozen=True)
class DatasetSpec:
    """Where a published set lies on the hub, in which configuration and splits, and its format.

    hub None: the set is published as plain files; `files` says which, and --data_path takes their path.
    format None: determined by the columns.
    left_out: folders and splits that are not read in a local copy, because they hold rows of another kind.
    """

    hub: str | None
    format: Format | None
    config: str | None = None
    train: str = "train"
    held_out: str | None = None
    files: str = ""
    left_out: tuple[str, ...] = ()


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
    "Anthropic/hh-rlhf": DatasetSpec(
        "Anthropic/hh-rlhf", DIALOGUE_PAIRS, held_out="test", left_out=("red-team-attempts",)
    ),
    "tatsu-lab/alpaca": DatasetSpec("tatsu-lab/alpaca", ALPACA),
    "alpaca_gpt4": DatasetSpec("vicgalle/alpaca-gpt4", ALPACA),
    "OpenAssistant/oasst1": DatasetSpec("OpenAssistant/oasst1", OASST, held_out="validation"),
    "OpenAssistant/oasst2": DatasetSpec("OpenAssistant/oasst2", OASST, held_out="validation"),
    "CarperAI/openai_summarize_comparisons": DatasetSpec(
        "CarperAI/openai_summarize_comparisons", SUMMARIES, held_out="valid1"
    ),
    "HuggingFaceH4/ultrachat_200k": DatasetSpec(
        "HuggingFaceH4/ultrachat_200k", CHAT, train="train_sft", held_out="test_sft", left_out=("train_gen", "test_gen")
    ),
    "HuggingFaceH4/ultrafeedback_binarized": DatasetSpec(
        "HuggingFaceH4/ultrafeedback_binarized",
        CHAT_PAIRS,
        train="train_prefs",
        held_out="test_prefs",
        left_out=("train_sft", "test_sft", "train_gen", "test_gen"),
    ),
    "openbmb/UltraFeedback": DatasetSpec("openbmb/UltraFeedback", ULTRAFEEDBACK),
    "berkeley-nest/Nectar": DatasetSpec("berkeley-nest/Nectar", NECTAR),
    "nvidia/HelpSteer": DatasetSpec("nvidia/HelpSteer", HELPSTEER, held_out="validation"),
    "nvidia/HelpSteer2": DatasetSpec(
        "nvidia/HelpSteer2", HELPSTEER, held_out="validation", left_out=("preference", "disagreements")
    ),
    "argilla/dpo-mix-7k": DatasetSpec("argilla/dpo-mix-7k", DIALOGUE_PAIRS, held_out="test"),
    "argilla/ultrafeedback-binarized-preferences-cleaned": DatasetSpec(
        "argilla/ultrafeedback-binarized-preferences-cleaned", CHAT_PAIRS
    ),
    "argilla/distilabel-intel-orca-dpo-pairs": DatasetSpec("argilla/distilabel-intel-orca-dpo-pairs", JUDGED_ORCA),
    "argilla/kto-mix-15k": DatasetSpec("argilla/kto-mix-15k", LABELLED),
    "trl-lib/kto-mix-14k": DatasetSpec("trl-lib/kto-mix-14k", LABELLED, held_out="test"),
    "trl-lib/ultrafeedback_binarized": DatasetSpec("trl-lib/ultrafeedback_binarized", DIALOGUE_PAIRS, held_out="test"),
    "trl-lib/hh-rlhf-helpful-base": DatasetSpec("trl-lib/hh-rlhf-helpful-base", CHAT_PAIRS, held_out="test"),
    "trl-lib/tldr": DatasetSpec("trl-lib/tldr", COMPLETION, held_out="validation"),
    "trl-lib/Capybara": DatasetSpec("trl-lib/Capybara", CHAT, held_out="test"),
    "databricks/databricks-dolly-15k": DatasetSpec("databricks/databricks-dolly-15k", DOLLY),
    "Intel/orca_dpo_pairs": DatasetSpec("Intel/orca_dpo_pairs", ORCA_PAIRS),
    "Open-Orca/OpenOrca": DatasetSpec("Open-Orca/OpenOrca", OPEN_ORCA),
    "PKU-Alignment/PKU-SafeRLHF": DatasetSpec("PKU-Alignment/PKU-SafeRLHF", SAFE_RLHF, held_out="test"),
    "OpenRLHF/prompt-collection-v0.1": DatasetSpec("OpenRLHF/prompt-collection-v0.1", PROMPT_COLLECTION),
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
SPELLINGS = {name.lower(): name for name in (*DATASETS, *ALIASES)}  # the hub, too, ignores the case of a name


def find_dataset(name: str) -> DatasetSpec | None:
    """The published set called `name` (or by an alias), in whatever case, or None."""
    spelling = SPELLINGS.get(name.lower())
    return None if spelling is None else DATASETS[ALIASES.get(spelling, spelling)]


def find_format(columns: Collection[str], purpose: Purpose) -> Format | None:
    """The first format that serves `purpose` and whose columns are all among `columns`, or None."""
    for candidate in FORMATS:
        if purpose in candidate.serves and set(candidate.columns) <= set(columns):
            return candidate
    return None


def find_answer_format(columns: Collection[str]) -> Format | None:
    """The first format of single answers to a prompt whose columns are all among `columns`, or None."""
    return next((known for known in FORMATS if known.holds_answers and set(known.columns) <= set(columns)), None)


def expected_columns(purpose: Purpose) -> str:
    """The column sets that serve `purpose` in the general formats, for messages."""
    return ", ".join(known.name for known in (*GENERAL_FORMATS, *LAST_FORMATS) if purpose in known.serves)
