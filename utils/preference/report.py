"""What the figures of a run of direct preference optimisation say in words."""

from collections.abc import Mapping

from utils.arguments.preference import PreferenceArguments

FALL = 0.1  # of the chosen answers' log-probability, as a share of it, from which on it is worth a warning


def remark_on(config: PreferenceArguments, before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """A warning where the chosen answers have become clearly less likely, the classic failure; empty otherwise.

    Args:
        before, after: figures of the held-out rows, see `Objective.figures`.
    """
    name = "eval/chosen_logprob"
    if "apo_down" in config.loss_weights:  # which is meant to do so
        return ""
    if name not in before or name not in after or after[name] >= before[name] - FALL * abs(before[name]):
        return ""
    return (
        f"the chosen answers of the held-out rows have become less likely: their log-probability fell from "
        f"{before[name]:.1f} to {after[name]:.1f} per answer. The margin grows because the rejected ones fall even "
        "more; the model may write neither. " + _advice(config)
    )


def _advice(config: PreferenceArguments) -> str:
    options = ["a lower --learning_rate", f"a --beta above {config.beta:g}", "fewer epochs"]
    if not config.rpo_alpha and not config.reads_labelled:
        options.append("--rpo_alpha 1, which keeps the chosen answers likely")
    return f"Try {', '.join(options[:-1])} or {options[-1]}"
