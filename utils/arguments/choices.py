"""Tables of what can be chosen by name on a command line. A new choice is one row here and the file that it names.

The code behind a choice is imported only when it is used, so that a command line can be parsed without it.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One row: where the code is, as `package.module:name`, and what it is in a few words."""

    code: str
    about: str

    def load(self) -> Callable:
        """The function or class that the row names."""
        module, _, name = self.code.partition(":")
        return getattr(importlib.import_module(module), name)


@dataclass(frozen=True, kw_only=True)
class Estimator(Choice):
    """How rewards become advantages. `code` is a function of a `utils.algorithms.advantages.RewardedTokens`."""

    needs_critic: bool


@dataclass(frozen=True, kw_only=True)
class Source(Choice):
    """What scores answers. `code` is a class as `utils.rewards.protocol.RewardSource` describes."""

    needs_reward_model: bool = False  # --reward_model_name_or_path, which is then one of the run's roles


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss(Choice):
    """A loss of direct preference optimisation; `code` is a function as `utils.algorithms.preference_losses` says.

    Attributes:
        labelled: it takes answers that were judged alone, not pairs.
        needs_reference: it compares with the model before training.
        looks_at_step: it depends on the log-probabilities of all rows of the optimiser step, not of one row at a time.
        per_token: its implicit reward is a mean over the tokens of an answer.
        uses: which of the flags that only some losses read it reads.
    """

    labelled: bool = False
    needs_reference: bool = True
    looks_at_step: bool = False
    per_token: bool = False
    uses: frozenset[str] = frozenset()


PAIRWISE_LOSSES = {
    "last_token": Choice(
        code="utils.algorithms.reward_losses:last_token_loss",
        about="log-sigmoid of the score difference at the last response tokens",
    ),
    "token_span": Choice(
        code="utils.algorithms.reward_losses:token_span_loss",
        about="its mean over the tokens from the first difference of the two responses on, as in DeepSpeed-Chat",
    ),
}

_LOSSES = "utils.algorithms.preference_losses"
PREFERENCE_LOSSES = {
    "sigmoid": PreferenceLoss(
        code=f"{_LOSSES}:sigmoid_loss",
        about="DPO; with --label_smoothing conservative DPO",
        uses=frozenset({"beta", "label_smoothing", "margin_column"}),
    ),
    "robust": PreferenceLoss(
        code=f"{_LOSSES}:robust_loss",
        about="DPO, unbiased where a share --label_smoothing of the pairs is the wrong way round",
        uses=frozenset({"beta", "label_smoothing", "margin_column"}),
    ),
    "ipo": PreferenceLoss(
        code=f"{_LOSSES}:ipo_loss",
        about="squared distance of the preference from 1 / (2 beta)",
        uses=frozenset({"beta"}),
    ),
    "hinge": PreferenceLoss(
        code=f"{_LOSSES}:hinge_loss", about="SLiC's hinge on DPO's reward", uses=frozenset({"beta", "margin_column"})
    ),
    "kto": PreferenceLoss(
        code=f"{_LOSSES}:kto_loss",
        about="KTO, for rows of one answer with a label",
        labelled=True,
        looks_at_step=True,
        uses=frozenset({"beta", "desirable_weight", "undesirable_weight"}),
    ),
    "kto_pair": PreferenceLoss(
        code=f"{_LOSSES}:kto_pair_loss", about="KTO for pairs", looks_at_step=True, uses=frozenset({"beta"})
    ),
    "apo_zero": PreferenceLoss(
        code=f"{_LOSSES}:apo_zero_loss",
        about="APO for chosen answers better than the model's",
        uses=frozenset({"beta"}),
    ),
    "apo_down": PreferenceLoss(
        code=f"{_LOSSES}:apo_down_loss",
        about="APO for chosen answers worse than the model's",
        uses=frozenset({"beta"}),
    ),
    "bco_pair": PreferenceLoss(
        code=f"{_LOSSES}:bco_pair_loss",
        about="BCO, a classifier of good and bad answers",
        looks_at_step=True,
        uses=frozenset({"beta"}),
    ),
    "nca_pair": PreferenceLoss(
        code=f"{_LOSSES}:nca_pair_loss", about="NCA, which keeps the chosen answers likely", uses=frozenset({"beta"})
    ),
    "sppo_hard": PreferenceLoss(
        code=f"{_LOSSES}:sppo_hard_loss", about="SPPO with certain wins", uses=frozenset({"beta"})
    ),
    "exo_pair": PreferenceLoss(
        code=f"{_LOSSES}:exo_pair_loss",
        about="EXO, whose label needs --label_smoothing above 0",
        uses=frozenset({"beta", "label_smoothing", "margin_column"}),
    ),
    "aot": PreferenceLoss(
        code=f"{_LOSSES}:aot_loss",
        about="AOT for pairs, which sorts the preferences of a step",
        looks_at_step=True,
        uses=frozenset({"beta", "label_smoothing"}),
    ),
    "aot_unpaired": PreferenceLoss(
        code=f"{_LOSSES}:aot_unpaired_loss",
        about="AOT that sorts the chosen and the rejected answers of a step each by themselves",
        looks_at_step=True,
        uses=frozenset({"beta", "label_smoothing"}),
    ),
    "discopop": PreferenceLoss(
        code=f"{_LOSSES}:discopop_loss",
        about="DiscoPOP's blend of logistic and exponential loss",
        uses=frozenset({"beta", "discopop_tau"}),
    ),
    "orpo": PreferenceLoss(
        code=f"{_LOSSES}:orpo_loss",
        about="ORPO: odds ratio and language modelling, without a reference",
        needs_reference=False,
        per_token=True,
        uses=frozenset({"beta"}),
    ),
    "simpo": PreferenceLoss(
        code=f"{_LOSSES}:simpo_loss",
        about="SimPO: means over tokens, without a reference; --beta 2, --simpo_gamma 1",
        needs_reference=False,
        per_token=True,
        uses=frozenset({"beta", "label_smoothing", "simpo_gamma", "margin_column"}),
    ),
    "cpo": PreferenceLoss(
        code=f"{_LOSSES}:cpo_loss",
        about="CPO: preference and language modelling, without a reference",
        needs_reference=False,
        uses=frozenset({"beta", "label_smoothing"}),
    ),
    "sft": PreferenceLoss(
        code=f"{_LOSSES}:sft_loss",
        about="language modelling of the chosen answers, for weighted sums",
        needs_reference=False,
    ),
}

REWARD_SOURCES = {
    "model": Source(
        code="utils.rewards.model:RewardModel", about="the reward model of step 2", needs_reward_model=True
    ),
}

ADVANTAGE_ESTIMATORS = {
    "gae": Estimator(
        code="utils.algorithms.advantages:generalized_advantages",
        about="generalised advantage estimation with a critic",
        needs_critic=True,
    ),
}

TEXT_FORM = "human_assistant"  # the form of dialogues without a chat template
# Named chat templates: utils/chat_templates/NAME.jinja each.
CHAT_TEMPLATES = {
    "llama2": "[INST] ... [/INST]",
    "llama3": "<|start_header_id|>user<|end_header_id|> ... <|eot_id|>",
    "chatml": "<|im_start|>user ... <|im_end|>",
    "zephyr": "<|user|> ... </s>",
    "vicuna": "USER: ... ASSISTANT:",
    "alpaca": "### Instruction: ... ### Response:",
    "mistral": "[INST] ... [/INST], a system prompt in front of the first question",
    "gemma": "<start_of_turn>user ... <end_of_turn>",
    "qwen": "chatml with Qwen's system prompt",
    "plain": "the texts alone, one below the other",
}


def described(table: dict[str, Choice]) -> str:
    """The rows of a table for a help text: "a: what it is; b: what it is"."""
    return "; ".join(f"{name}: {choice.about}" for name, choice in table.items())
