"""The flags of each step: its blocks, its models, and its longest row."""

from dataclasses import dataclass

from utils.arguments.adapters import AdapterArguments, LoraArguments, RlhfLoraArguments
from utils.arguments.base import flag
from utils.arguments.choices import ADVANTAGE_ESTIMATORS, PREFERENCE_LOSSES, REWARD_SOURCES
from utils.arguments.data import CorpusArguments, DataArguments, PromptArguments
from utils.arguments.generation import GenerationArguments, RolloutArguments
from utils.arguments.model import LoadingArguments, ModelArguments, RlhfModelArguments, TokenizerArguments
from utils.arguments.optimization import OptimizationArguments, PpoOptimizationArguments, ScheduleArguments
from utils.arguments.output import CheckpointArguments, OutputArguments
from utils.arguments.ppo import PpoArguments, RewardSourceArguments
from utils.arguments.preference import PreferenceArguments
from utils.arguments.roles import RoleFlags, frozen_role, trained_role
from utils.arguments.supervised import PairArguments, RewardModelArguments, SftArguments
from utils.arguments.system import MachineArguments, RlhfSystemArguments, SystemArguments


@dataclass(kw_only=True)
class StepConfig(
    CorpusArguments,
    LoadingArguments,
    ScheduleArguments,
    MachineArguments,
    AdapterArguments,
    OutputArguments,
    CheckpointArguments,
    TokenizerArguments,
):
    """The flags that every step has.

    A step lists it after its own blocks: where both define a flag, the default of the own block applies.
    """

    is_group = False  # of --help, which lists its blocks instead
    purpose = ""  # what the step's rows are for, see `utils.data.formats.example.Purpose`
    train_on = "last"  # of a dialogue's answers, see `SftArguments`
    pairs = "best_worst"  # of several answers to a prompt, see `PairArguments`
    score_threshold = None  # see `PreferenceArguments`
    answer_limit = 0  # tokens that generation adds to a row
    micro_batch_flag = "per_device_train_batch_size"
    written_folders = frozenset({"best"})  # below --output_dir, beside the files of the model itself

    @property
    def row_limit(self) -> int:
        """Tokens that a prepared row holds, at most."""
        raise AttributeError(f"{type(self).__name__} defines no rows")

    @property
    def micro_batch_rows(self) -> int:
        """Rows of a training forward pass on each process."""
        return getattr(self, self.micro_batch_flag)

    @property
    def step_rows(self) -> int:
        """Rows of an optimiser step on each process."""
        return self.micro_batch_rows * self.gradient_accumulation_steps

    @property
    def undivided_paths(self) -> list[str]:
        """Additional data for this step alone; all of its rows are used."""
        return []

    @property
    def number_columns(self) -> dict[str, str]:
        """Columns with a number that every row must have, by the name of the number, as in `--NAME_column`."""
        return {}

    @property
    def score_columns(self) -> dict[str, float]:
        """The weights of the columns whose sum is the score of a row's answer, see `PairArguments`."""
        return {}

    def named_data(self) -> list[tuple[str, str]]:
        """Flag and path (or name) of everything that the step reads as data."""
        return [("--data_path", path) for path in self.data_sources]

    def roles(self) -> dict[str, RoleFlags]:
        """The models of the run by the name of their role, in the order in which they are loaded."""
        raise AttributeError(f"{type(self).__name__} defines no models")

    def longest_sequence(self) -> tuple[int, str]:
        """Tokens of the longest possible sequence, and the flags that set the number."""
        raise AttributeError(f"{type(self).__name__} defines no rows")

    def longest_row(self) -> tuple[int, str]:
        """Tokens of the longest possible row in a forward pass, and the flags that set the number."""
        return self.longest_sequence()


@dataclass(kw_only=True)
class SftConfig(
    DataArguments,
    ModelArguments,
    OptimizationArguments,
    SystemArguments,
    LoraArguments,
    SftArguments,
    StepConfig,
):
    """Flags of step 1."""

    purpose = "sft"

    @property
    def row_limit(self) -> int:
        return self.max_seq_len

    @property
    def undivided_paths(self) -> list[str]:
        return self.sft_only_data_path

    def named_data(self) -> list[tuple[str, str]]:
        return super().named_data() + [("--sft_only_data_path", path) for path in self.sft_only_data_path]

    def roles(self) -> dict[str, RoleFlags]:
        return {"model": trained_role(self, "model", "causal_lm")}

    def longest_sequence(self) -> tuple[int, str]:
        return self.max_seq_len, "--max_seq_len"


@dataclass(kw_only=True)
class RewardModelConfig(
    DataArguments,
    ModelArguments,
    OptimizationArguments,
    SystemArguments,
    LoraArguments,
    RewardModelArguments,
    PairArguments,
    StepConfig,
):
    """Flags of step 2."""

    purpose = "preference"
    learning_rate: float = 5e-5

    @property
    def row_limit(self) -> int:
        return self.max_seq_len

    @property
    def number_columns(self) -> dict[str, str]:
        return {"margin": self.margin_column} if self.margin_column else {}

    def roles(self) -> dict[str, RoleFlags]:
        head = {"head_hidden_size": self.head_hidden_size, "head_dropout": self.head_dropout}
        return {"model": trained_role(self, "model", "scalar", new_head=True, **head)}

    def longest_sequence(self) -> tuple[int, str]:
        return self.max_seq_len, "--max_seq_len"

    def longest_row(self) -> tuple[int, str]:
        return 2 * self.max_seq_len, "twice --max_seq_len"


def _reference_role(config: "DpoConfig | PpoConfig", prefix: str = "") -> RoleFlags:
    """The frozen copy of the model whose flags begin with `prefix`."""
    return frozen_role(
        "reference",
        "causal_lm",
        path=getattr(config, f"{prefix}model_name_or_path"),
        path_flag=f"--{prefix}model_name_or_path",
        zero_stage=getattr(config, f"{prefix}zero_stage"),
        offload=config.offload_reference_model,
        trust_remote_code=config.trust_remote_code,
    )


@dataclass(kw_only=True)
class DpoConfig(
    DataArguments,
    ModelArguments,
    OptimizationArguments,
    SystemArguments,
    LoraArguments,
    PreferenceArguments,
    PairArguments,
    StepConfig,
):
    """Flags of direct preference optimisation."""

    learning_rate: float = flag(
        1e-6,
        "peak rate; 5e-7 to 5e-6 suits full fine-tuning (DeepSpeed-Chat's default of 1e-3 ruins a language model)",
        above=0,
    )

    @property
    def purpose(self) -> str:
        return "labelled" if self.reads_labelled else "preference"

    @property
    def row_limit(self) -> int:
        return self.max_seq_len

    @property
    def number_columns(self) -> dict[str, str]:
        reads = any("margin_column" in PREFERENCE_LOSSES[name].uses for name in self.loss_weights)
        return {"margin": self.margin_column} if self.margin_column and reads else {}

    @property
    def needs_reference(self) -> bool:
        """Whether a loss compares with the model before training."""
        return not self.reference_free and any(PREFERENCE_LOSSES[name].needs_reference for name in self.loss_weights)

    @property
    def shares_reference(self) -> bool:
        """Whether the reference is the model with its adapters off rather than a separate one."""
        return self.lora_dim > 0 and self.only_optimize_lora

    def roles(self) -> dict[str, RoleFlags]:
        """The model, and a live reference where that is a separate one."""
        roles = {"model": trained_role(self, "model", "causal_lm")}
        if self.needs_reference and self.reference_logprobs == "live" and not self.shares_reference:
            roles["reference"] = _reference_role(self)
        return roles

    def longest_sequence(self) -> tuple[int, str]:
        return self.max_seq_len, "--max_seq_len"

    def longest_row(self) -> tuple[int, str]:
        if self.reads_labelled:
            return self.longest_sequence()
        return 2 * self.max_seq_len, "twice --max_seq_len"


@dataclass(kw_only=True)
class PpoConfig(
    PromptArguments,
    RlhfModelArguments,
    RolloutArguments,
    RewardSourceArguments,
    PpoOptimizationArguments,
    PpoArguments,
    RlhfSystemArguments,
    GenerationArguments,
    RlhfLoraArguments,
    StepConfig,
):
    """Flags of step 3."""

    purpose = "prompts"
    micro_batch_flag = "per_device_training_batch_size"
    written_folders = frozenset({"best", "actor", "critic", "actor_ema"})

    @property
    def row_limit(self) -> int:
        return self.max_prompt_seq_len

    @property
    def held_out_limit(self) -> int:
        return self.eval_prompts

    def named_data(self) -> list[tuple[str, str]]:
        text = self.unsupervised_dataset_name
        return super().named_data() + ([("--unsupervised_dataset_name", text)] if text else [])

    def roles(self) -> dict[str, RoleFlags]:
        """Actor, critic (if the estimator needs one), reference (unless it shares the actor), and reward model.

        Dropout is off in all of them, so that rollout and training compute the same log-probabilities.
        """
        without_dropout = {"dropout": 0.0, "lora_dropout": 0.0}
        roles = {"actor": trained_role(self, "actor", "causal_lm", "actor_", **without_dropout)}
        if ADVANTAGE_ESTIMATORS[self.advantage_estimator].needs_critic:
            roles["critic"] = trained_role(self, "critic", "scalar", "critic_", **without_dropout)
        if not self.shares_reference:
            roles["reference"] = _reference_role(self, "actor_")
        if REWARD_SOURCES[self.reward_source].needs_reward_model:
            own_path = self.reward_model_name_or_path
            roles["reward"] = frozen_role(
                "reward",
                "scalar",
                path=own_path or self.critic_model_name_or_path,
                path_flag="--reward_model_name_or_path" if own_path else "--critic_model_name_or_path",
                zero_stage=self.critic_zero_stage,
                offload=self.offload_reward_model,
                trust_remote_code=self.trust_remote_code,
            )
        return roles

    @property
    def rollout_rows(self) -> int:
        """Prompts of a rollout on each process; an optimiser step's rows where the requested number divides these.

        DeepSpeed-Chat accumulates the gradients of several rollouts for such a step. No weight changes between them, so
        here they are one rollout with correspondingly more generation batches.
        """
        return self.step_rows if self.step_rows % self.asked_rollout_rows == 0 else self.asked_rollout_rows

    @property
    def rollout_flags(self) -> str:
        """The flags that set `rollout_rows`."""
        if self.rollout_rows == self.asked_rollout_rows:
            return "--per_device_generation_batch_size or --generation_batches"
        return "--per_device_training_batch_size or --gradient_accumulation_steps"

    @property
    def asked_rollout_rows(self) -> int:
        """Prompts of a rollout on each process, as its two flags request."""
        return self.per_device_generation_batch_size * self.generation_batches

    @property
    def shares_reference(self) -> bool:
        """Whether the reference is the actor with its adapters off rather than a separate model."""
        return self.actor_lora_dim > 0 and self.only_optimize_lora

    @property
    def answer_limit(self) -> int:
        return self.max_answer_seq_len

    def longest_sequence(self) -> tuple[int, str]:
        return self.max_prompt_seq_len + self.max_answer_seq_len, "--max_prompt_seq_len + --max_answer_seq_len"


@dataclass(frozen=True)
class Step:
    """A script, `training/FOLDER/main.py`, and its flags."""

    folder: str
    config: type[StepConfig]


# By the names that the presets in scripts/configs/ have.
STEPS = {
    "step1": Step("step1_supervised_finetuning", SftConfig),
    "step2": Step("step2_reward_model_finetuning", RewardModelConfig),
    "dpo": Step("step2_dpo_finetuning", DpoConfig),
    "step3": Step("step3_rlhf_finetuning", PpoConfig),
}
CONFIGS = {step.folder: step.config for step in STEPS.values()}  # by folder
