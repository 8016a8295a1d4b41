"""Flags for the models and the tokenizer that a step starts from."""

from dataclasses import dataclass

from utils.arguments.base import Arguments, flag
from utils.errors import InputError

NO_DROPOUT = "PPO runs without dropout, which would add noise to its probability ratios"


@dataclass(kw_only=True)
class LoadingArguments(Arguments):
    """How every step loads models."""

    tokenizer_name_or_path: str | None = flag(
        None, "folder, hub name or sentencepiece tokenizer.model; if omitted, the model's own tokenizer"
    )
    trust_remote_code: bool = flag(
        False, "run Python code that comes with a hub model: only for authors that you trust"
    )


@dataclass(kw_only=True)
class ModelArguments(LoadingArguments):
    """Model."""

    model_name_or_path: str = flag(help="folder or hub name of the model to start from")
    dropout: float | None = flag(
        None, "dropout everywhere in the model; if omitted, as in the model's configuration", at_least=0, below=1
    )


@dataclass(kw_only=True)
class RlhfModelArguments(LoadingArguments):
    """Models."""

    actor_model_name_or_path: str = flag(help="the model of step 1; also the reference model of the KL penalty")
    critic_model_name_or_path: str = flag(help="the model of step 2, which initialises the critic")
    actor_dropout: float | None = flag(
        None, "accepted for old scripts: PPO runs without dropout", at_least=0, below=1, idle=NO_DROPOUT
    )
    critic_dropout: float | None = flag(
        None, "accepted for old scripts: PPO runs without dropout", at_least=0, below=1, idle=NO_DROPOUT
    )
    num_padding_at_beginning: int = flag(
        0,
        "accepted for old scripts (which set 1 for OPT, wrong for LLaMA): attention masks mark the padding",
        at_least=0,
        resume="free",
        idle="attention masks mark the padding",
    )


@dataclass(kw_only=True)
class TokenizerArguments(Arguments):
    """Tokenizer."""

    add_eot_token: bool = flag(False, "add --eot_token to the vocabulary and end every response with it")
    eot_token: str = flag("<|endoftext|>", "text of the token that --add_eot_token adds", idle_unless="add_eot_token")

    def check(self) -> None:
        if self.add_eot_token and not self.eot_token:
            raise InputError("--eot_token is empty: name the token that --add_eot_token adds")
