"""Flags of direct preference optimisation alone."""

import math
from dataclasses import dataclass
from typing import Literal

from utils.arguments.base import Arguments, flag
from utils.arguments.choices import PREFERENCE_LOSSES, described
from utils.errors import InputError


def loss_weights(words: list[str]) -> dict[str, float]:
    """The weight of each loss in words like "sigmoid" or "sigmoid:0.8"; one without a number has weight 1.

    Raises:
        InputError: a loss is unknown or named twice, a weight is not a number above 0, or losses cannot be combined.
    """
    weights: dict[str, float] = {}
    for word in words:
        name, colon, number = word.partition(":")
        if name not in PREFERENCE_LOSSES:
            raise InputError(f"--loss: unknown choice {name!r}; choose from {', '.join(PREFERENCE_LOSSES)}")
        if name in weights:
            raise InputError(f"--loss {name} is given twice; give it once, with one weight")
        try:
            weights[name] = float(number) if colon else 1.0
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] < math.inf:
            raise InputError(f"--loss {word}: the weight must be a number above 0, as in {name}:0.5")
    if not weights:
        raise InputError(f"--loss is empty: name at least one of {', '.join(PREFERENCE_LOSSES)}")
    alone = [name for name in weights if PREFERENCE_LOSSES[name].labelled]
    if alone and len(weights) > 1:
        others = ", ".join(name for name in weights if name not in alone)
        raise InputError(
            f"--loss {alone[0]} reads rows of one answer, and {others} pairs: they cannot be added up; "
            f"use {alone[0]}_pair with pairs"
        )
    return weights


@dataclass(kw_only=True)
class PreferenceArguments(Arguments):
    """Direct preference."""

    loss: list[str] = flag(
        ["sigmoid"],
        f"loss of a pair, or a weighted sum such as sigmoid:0.8 sft:0.2. {described(PREFERENCE_LOSSES)}",
    )
    beta: float = flag(0.1, "strength of the tie to the reference; orpo's lambda; simpo wants 2 to 2.5", above=0)
    label_smoothing: float = flag(
        0.0, "share of the pairs that is taken to be the wrong way round", at_least=0, below=0.5
    )
    simpo_gamma: float = flag(0.5, "SimPO's target margin of the mean log-probabilities times beta", at_least=0)
    discopop_tau: float = flag(0.05, "DiscoPOP's temperature of the blend", above=0)
    desirable_weight: float = flag(
        1.0,
        "weight of desirable answers in KTO; the authors want weight times number of rows of the two kinds to be "
        "within a factor of 4/3 of each other",
        above=0,
    )
    undesirable_weight: float = flag(1.0, "weight of undesirable answers in KTO", above=0)
    margin_column: str | None = flag(
        None,
        "column with a number for each pair, by which the reward of the chosen answer should exceed that of the "
        "rejected one (DPO with an offset)",
    )
    score_threshold: float | None = flag(
        None,
        "with --score_column, for losses of single answers (kto): answers with at least this score are desirable, the "
        "others undesirable",
    )
    reference_free: bool = flag(False, "take the reference to be uniform: its log-probabilities are left out")
    rpo_alpha: float = flag(
        0.0, "weight of the language-modelling loss of the chosen answer, per token, added to --loss", at_least=0
    )
    length_normalize: bool = flag(False, "use mean log-probabilities per token in place of sums over the answer")
    ld_alpha: float = flag(
        1.0,
        "weight of the tokens by which the longer answer of a pair exceeds the shorter (LD-DPO); 1 = like the others",
        at_least=0,
        at_most=1,
    )
    reference_logprobs: Literal["precompute", "live"] = flag(
        "precompute",
        "the reference's log-probabilities: computed once before training and kept in the data cache, so that training "
        "holds one model; or live, by a frozen second model, which --only_optimize_lora spares",
    )
    offload_reference_model: bool = flag(
        False, "keep a live reference model in CPU memory", needs_gpu=True, idle_unless="reference_logprobs == live"
    )
    eval_interval: int = flag(
        0, "optimiser steps between evaluations; 0 = only before and after", at_least=0, resume="free"
    )
    num_sample_generations: int = flag(
        16,
        "held-out prompts that are answered before and after training; on these answers the KL to the model before "
        "training is measured, and three of them are shown",
        at_least=0,
    )
    sample_max_new_tokens: int = flag(
        128, "tokens of such an answer, at most", at_least=1, idle_unless="num_sample_generations"
    )
    print_loss: bool = flag(False, "print the loss of every step on a separate line", resume="free")
    num_padding_at_beginning: int = flag(
        0,
        "accepted for old scripts (DeepSpeed-Chat's sweep sets 1 for OPT): attention masks mark the padding",
        at_least=0,
        resume="free",
        idle="attention masks mark the padding",
    )

    @property
    def loss_weights(self) -> dict[str, float]:
        """`loss_weights` of --loss."""
        return loss_weights(self.loss)

    @property
    def reads_labelled(self) -> bool:
        """Whether the rows are single answers with a label; otherwise they are pairs."""
        return any(PREFERENCE_LOSSES[name].labelled for name in self.loss_weights)

    def check(self) -> None:
        weights = loss_weights(self.loss)
        if "exo_pair" in weights and not self.label_smoothing:
            raise InputError("--loss exo_pair needs --label_smoothing above 0, such as 0.001")
        if self.reads_labelled and self.ld_alpha != 1:
            raise InputError(
                f"--ld_alpha compares the lengths of a pair, and --loss {self.loss[0]} reads single answers"
            )
        has_scores, has_threshold = bool(self.score_columns), self.score_threshold is not None
        if self.reads_labelled and has_scores != has_threshold:
            given, missing = ("column", "threshold") if has_scores else ("threshold", "column")
            raise InputError(
                f"--loss {self.loss[0]} makes labels of scores with both --score_column and --score_threshold: add "
                f"--score_{missing}, or leave out --score_{given}"
            )
        if has_threshold and not self.reads_labelled:
            raise InputError(
                "--score_threshold is for --loss kto; pairs are made of the scores themselves: leave it out"
            )
        if self.margin_column == "":
            raise InputError("--margin_column is empty: name the column that holds the margin of each pair")
        if self.reads_labelled and self.rpo_alpha:
            raise InputError(f"--rpo_alpha needs pairs, and --loss {self.loss[0]} reads single answers")
