"""Flags of steps 1 and 2 alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from utils.arguments.base import Arguments, flag
from utils.arguments.choices import PAIRWISE_LOSSES, described
from utils.arguments.data import weighted_path
from utils.errors import InputError


@dataclass(kw_only=True)
class SftArguments(Arguments):
    """Supervised fine-tuning."""

    sft_only_data_path: list[str] = flag([], "additional data for this step only; all of its rows are used")
    train_on: Literal["last", "all"] = flag(
        "last",
        "the assistant's turns of a dialogue that are trained: its last one, or all of them. The form human_assistant "
        "has no end token between turns, so there the earlier ones are trained without one",
    )
    packing: bool = flag(
        False,
        "fill rows of --max_seq_len tokens with several examples, which do not attend to each other; "
        "--per_device_train_batch_size then counts such rows",
    )
    eval_interval: int = flag(
        0, "optimiser steps between evaluations; 0 = only before and after", at_least=0, resume="free"
    )
    num_sample_generations: int = flag(
        3, "held-out prompts whose answers are shown before and after training", at_least=0
    )
    sample_max_new_tokens: int = flag(
        64, "tokens of such an answer, at most", at_least=1, idle_unless="num_sample_generations"
    )
    print_loss: bool = flag(False, "print the loss of every step on a separate line", resume="free")

    def check(self) -> None:
        for value in self.sft_only_data_path:
            source, weight = weighted_path(value)
            if weight is not None:
                raise InputError(
                    f"--sft_only_data_path {value}: weights are for --data_path, all rows of this source are used; "
                    f"give {source}"
                )


def score_weights(words: Sequence[str]) -> dict[str, float]:
    """The weight of each column in words like "helpfulness" or "helpfulness:0.65"; one without a number has weight 1.

    Raises:
        InputError: a column is named twice or not at all, or a weight is no finite number other than 0.
    """
    weights: dict[str, float] = {}
    for word in words:
        name, colon, number = word.rpartition(":") if ":" in word else (word, "", "")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            weight = math.nan
        if not name or not math.isfinite(weight) or weight == 0:
            raise InputError(
                f"--score_column {word!r}: give a column, or a column and its weight in the sum, as in helpfulness:0.65"
            )
        if name in weights:
            raise InputError(f"--score_column {name} is given twice; give it once, with one weight")
        weights[name] = weight
    return weights


@dataclass(kw_only=True)
class PairArguments(Arguments):
    """Pairs from scored or ranked answers."""

    reads_labelled = False  # whether the step reads single answers with a label, not pairs

    score_column: list[str] = flag(
        [],
        "for rows of one answer each: the column with its score, higher is better, or columns with their weights in a "
        "sum (helpfulness:0.65 correctness:0.8 coherence:0.45). The answers to a prompt, wherever they are in their "
        "source, are compared with each other; equal scores make no pair",
    )
    pairs: Literal["best_worst", "all"] = flag(
        "best_worst",
        "of several scored or ranked answers to a prompt: the best against the worst, or each against each. With all, "
        "the pairs of a prompt weigh 1 together and come in one optimiser step (InstructGPT, equation 1), and "
        "--per_device_train_batch_size x --gradient_accumulation_steps counts prompts",
    )

    def check(self) -> None:
        weights = score_weights(self.score_column)
        if weights and getattr(self, "margin_column", None):
            raise InputError(
                "--margin_column is for rows that hold a pair, and --score_column for rows of one answer: give one of "
                "them"
            )
        if self.pairs == "all" and self.reads_labelled:
            raise InputError("--pairs all makes pairs of answers, and --loss kto reads single ones: leave it out")
        if self.pairs == "all" and getattr(self, "data_weights", None):
            raise InputError(
                "--pairs all keeps the pairs of a prompt together, and weights of --data_path choose single rows for "
                "each epoch: leave out the weights, or use --pairs best_worst"
            )

    @property
    def score_columns(self) -> dict[str, float]:
        """The weight of each column of --score_column."""
        return score_weights(self.score_column)


@dataclass(kw_only=True)
class RewardModelArguments(Arguments):
    """Reward model."""

    reward_loss: str = flag(
        "last_token", f"loss of a pair. {described(PAIRWISE_LOSSES)}", choices=tuple(PAIRWISE_LOSSES)
    )
    eval_interval: int = flag(
        0, "optimiser steps between evaluations; 0 = only before and after", at_least=0, resume="free"
    )
    label_smoothing: float = flag(
        0.0,
        "probability with which a pair is taken to be labelled the wrong way round: the loss becomes (1 - e) times its "
        "own plus e times that of the swapped pair",
        at_least=0,
        below=0.5,
    )
    margin: float = flag(
        0.0, "how much higher the chosen response is to score: the loss is that of the difference less it", at_least=0
    )
    margin_column: str | None = flag(
        None, "column that holds the margin of each pair (LLaMA-2's margin loss), in place of --margin"
    )
    center_rewards_coefficient: float = flag(
        0.0, "weight of (chosen + rejected)^2, which keeps scores around zero; 0.01 is usual", at_least=0
    )
    head_hidden_size: int = flag(
        0,
        "width of a hidden layer with tanh in the scalar head; 0 = a linear head. With one, transformers does not open "
        "the saved folder, only this project does",
        at_least=0,
    )
    head_dropout: float = flag(
        0.0,
        "dropout in front of the head's last linear map, apart from --dropout, which leaves the head alone",
        at_least=0,
        below=1,
    )
    eval_iters: int = flag(
        100,
        "batches per evaluation during training; those before and after use all, and so do all with --keep_best",
        at_least=1,
    )
    num_padding_at_beginning: int = flag(
        0,
        "accepted for old scripts (which set 1 for OPT, wrong for LLaMA): attention masks mark the padding",
        at_least=0,
        resume="free",
        idle="attention masks mark the padding",
    )

    @property
    def loss_options(self) -> dict[str, float]:
        """What `reward_losses.total_loss` adds to the loss."""
        return {
            "margin": self.margin,
            "label_smoothing": self.label_smoothing,
            "center_coefficient": self.center_rewards_coefficient,
        }

    def check(self) -> None:
        if self.margin and self.margin_column:
            raise InputError(
                f"--margin {self.margin:g} and --margin_column {self.margin_column} both set the margin of a pair: "
                "give one of them"
            )
        if self.head_hidden_size == 1:
            raise InputError("--head_hidden_size 1: a hidden layer has at least 2 units; give 0 for a linear head")
        if self.margin_column == "":
            raise InputError("--margin_column is empty: name the column that holds the margin of each pair")
