"""What a run is about to do, known before any weights are read: its models, its rows, its optimiser steps."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedConfig

from utils.arguments.optimization import OptimizationArguments
from utils.arguments.roles import RoleFlags
from utils.arguments.steps import StepConfig
from utils.data.batches.dataloader import batches_per_epoch

Models = Mapping[str, PreTrainedConfig]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Made by each step's main.py, and handed to the preflight, the summary and messages.

    Attributes:
        title: of the run, on its progress bar and its plot.
        models: configuration of each role's model; the roles themselves are `config.roles()`.
        length: of the run, counted in `unit`s; None where the number of rows is not known.
        optimizer_steps: of each role that trains, over the whole run; None likewise.
        evaluation_rows: rows of a forward pass on held-out rows, 0 where there is none.
        generates: each unit begins with generating answers, by the flags of `GenerationArguments`, and scoring them.
        samples_answers: a few answers are generated before and after training.
        trains_on_texts: whole texts are trained on as well as the rows.
        averaged: the role whose moving average is kept and saved too; empty for none.
    """

    title: str
    config: StepConfig
    models: Models
    length: int | None
    optimizer_steps: Mapping[str, int | None]
    unit: str = "optimiser step"
    evaluation_rows: int = 0
    generates: bool = False
    samples_answers: bool = False
    trains_on_texts: bool = False
    averaged: str = ""

    @property
    def roles(self) -> dict[str, RoleFlags]:
        return self.config.roles()


# A step's function that makes its plan from flags, models, the number of training rows (None: not known) and the number
# of processes. The preflight calls it again for flags that it suggests.
Planner = Callable[[StepConfig, Models, int | None, int], Plan]


def passes_over_rows(config: OptimizationArguments, rows: int | None, world_size: int) -> int | None:
    """Optimiser steps of a step that passes over its rows: all epochs, or --max_steps. None if not known."""
    if config.max_steps or rows is None:
        return config.max_steps or None
    batches = batches_per_epoch(rows, config.per_device_train_batch_size, world_size)
    return math.ceil(batches / config.gradient_accumulation_steps) * config.num_train_epochs
