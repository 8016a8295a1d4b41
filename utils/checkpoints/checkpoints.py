"""The checkpoints of a run: when one is due, how it is written and found again, and how a signal ends the run.

    checkpoint-20/state.json            `RunState`, the flags, data and libraries of the run
    checkpoint-20/rank-0.safetensors    states of random generators, averaged weights; one file for each process
    checkpoint-20/<engine>/             DeepSpeed's files: weights, optimiser, schedule, loss scale
    checkpoint-20/manifest.json         what makes it a checkpoint, see `folders`

DeepSpeed's files are pickles. They are read only after all checksums in the manifest have been verified, without
running any code in them, and a folder with a file that the manifest does not list is not read at all. That guards
against damage and added files, not against other weights with a matching manifest: docs/resuming.md says whom to trust.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from utils.arguments.steps import StepConfig
from utils.checkpoints.elastic import divide_average
from utils.checkpoints.engine_state import EngineWriter, frozen_weight_sums, load_engine
from utils.checkpoints.folders import (
    CHECKPOINTS_FOLDER,
    checkpoint_path,
    prune,
    publish,
    remove_leftovers,
    sync,
    take_listings,
    temporary_path,
    write_listing,
)
from utils.checkpoints.random_state import random_state, set_random_state
from utils.checkpoints.run_state import RunState, describe_run, write_state
from utils.checkpoints.search import check_shared, find_checkpoint
from utils.checkpoints.signals import StopSignals
from utils.data.batches.stream_loader import StreamLoader
from utils.errors import InputError, RankError, RunStopped
from utils.output.metrics import METRICS_FILE, MetricsWriter, read_metrics
from utils.parallel import distributed
from utils.parallel.divergence import check_weights
from utils.parallel.zero import Engine


class Checkpoints:
    """Saves and resumes a run. All methods are called by every rank.

    The constructor finds what the run continues from, or refuses it, before any model is loaded.

    Args:
        config: without --save_interval nothing is saved and signals keep their default behaviour.
        total_steps: length of the run, in the unit of --save_interval.
        data_keys: of the rows that the run trains on (`TokenDataset.key`).

    Raises:
        InputError: the checkpoint is damaged, or of a run with other flags or data; --output_dir is not shared; its
            metrics, which the run would continue, cannot be read.
    """

    def __init__(self, config: StepConfig, *, total_steps: int, data_keys: Sequence[str]) -> None:
        self._config, self._total_steps = config, total_steps
        self._run = describe_run(config, list(data_keys))
        self._root = Path(config.output_dir) / CHECKPOINTS_FOLDER if config.output_dir else None
        self._signals = StopSignals()
        if config.save_interval or config.resume_from_checkpoint:
            check_shared(Path(config.output_dir))
        self._found = find_checkpoint(config, self._run, total_steps)
        if self._found and self._found.state.metrics_position and distributed.is_main():
            try:
                read_metrics(Path(config.output_dir) / METRICS_FILE, end=self._found.state.metrics_position)
            except InputError as error:  # of this process alone
                raise RankError(str(error)) from error
        self._finished = self._found is not None and self._found.state.step == total_steps

    def __enter__(self) -> "Checkpoints":
        if self._config.save_interval and not self._finished:
            self._signals.activate()
        return self

    def __exit__(self, *exception: object) -> None:
        self._signals.deactivate()

    def resume(
        self,
        engines: Mapping[str, Engine],
        *,
        rows: object = None,
        frozen: Sequence[torch.nn.Module | None] = (),
        averages: Sequence[torch.Tensor] = (),
    ) -> RunState:
        """The state to start from: that of a new run, or that of the checkpoint that was found, once all is loaded.

        Args:
            engines: the DeepSpeed engines that train, by name, freshly built.
            rows: the loader of the training rows; a stream goes on where it was, and its position is saved.
            frozen: other models that the run reads, None where there is none.
            averages: further tensors of this rank, overwritten when the run resumes.

        Raises:
            InputError: the checkpoint is of a run with other weights.
        """
        self._engines, self._averages = engines, averages
        self._stream = rows if isinstance(rows, StreamLoader) else None
        if self._config.save_interval or self._found:
            models = [engine.module for engine in engines.values()]
            self._frozen_sums = frozen_weight_sums([*models, *(model for model in frozen if model is not None)])
        if not self._found:
            self._seed_rank(0)
            return RunState()
        folder, state, processes = self._found.folder, self._found.state, self._found.processes
        is_new = distributed.rank() >= processes  # a process that is new to the run
        tensors, texts = _read_tensors(folder / _rank_file(0 if is_new else distributed.rank()))
        different = not torch.equal(tensors["frozen_sums"], self._frozen_sums)
        if distributed.all_reduce_scalar(float(different), "max"):
            raise InputError(
                f"{folder}: the frozen weights are not those of the run that wrote it: a model folder that the flags "
                "name has been changed; restore it, or start again with another --output_dir"
            )
        for name, engine in self._engines.items():
            load_engine(engine, folder, name)
        self._load_averages(folder, processes)
        if is_new:
            self._seed_rank(state.step)
        else:
            set_random_state({name: tensors[name] for name in tensors if name.startswith("torch_")}, texts)
        if self._stream is not None:
            self._stream.start_at(state.stream)
        distributed.log(f"resumed from {folder}, after step {state.step} of {self._total_steps}")
        return state

    def _seed_rank(self, step: int) -> None:
        """Seed this rank separately, from `step` on: dropout masks differ between ranks, as their rows do."""
        distributed.seed_everything(distributed.derived_seed(self._config.seed, step, distributed.rank()) % 2**32)

    def step_done(self, state: RunState, writer: MetricsWriter, *, step: int, seconds: float) -> None:
        """To be called after each step, once its metrics are logged: saves if due, and stops if a signal asked for it.

        Args:
            step: how many steps are done. seconds: of training so far. Both are stored in `state`.

        Raises:
            RunStopped: SIGTERM or Ctrl-C arrived on any rank; the step was saved.
            InputError: the checkpoint cannot be written. Earlier ones stay as they are.
            DivergenceError: the weights are NaN or infinite; nothing was saved.
        """
        state.step, state.seconds = step, seconds
        interval = self._config.save_interval
        if not interval:
            return
        stops = bool(distributed.all_reduce_scalar(float(bool(self._signals.name)), "max"))
        self._finished = state.step == self._total_steps
        if stops or self._finished or state.step % interval == 0:
            state.metrics_position = writer.position
            state.stream = self._stream.position if self._stream is not None else None
            self._save(state)
        if self._finished:
            self._signals.deactivate()  # what follows is quickly repeated from here
        elif stops:
            raise RunStopped(
                f"{self._signals.name or 'a signal'} after step {state.step}, which was saved; continue with the same "
                "command and --resume_from_checkpoint auto"
            )

    def _save(self, state: RunState) -> None:
        for engine in self._engines.values():
            check_weights(engine.module)
        temporary, problem = temporary_path(self._root, state.step), None
        if distributed.is_main():
            try:
                remove_leftovers(self._root)
                temporary.mkdir(parents=True)
                if (metrics := Path(self._config.output_dir) / METRICS_FILE).exists():
                    sync(metrics)
            except OSError as error:
                problem = str(error)
        self._stop_on(problem, state)
        problem = self._write_own_files(temporary, state)
        self._stop_on(problem, state)
        if distributed.is_main():
            try:
                records = take_listings(temporary, distributed.world_size())
                publish(temporary, checkpoint_path(self._root, state.step), records)
            except (OSError, ValueError) as error:
                problem = str(error)
        self._stop_on(problem, state)
        if distributed.is_main():
            try:
                prune(self._root, self._config.save_total_limit, state.step)
            except OSError as error:
                distributed.warn(f"old checkpoints in {self._root} cannot be removed ({error})")

    def _write_own_files(self, temporary: Path, state: RunState) -> str | None:
        """Write this rank's part of a checkpoint, and a listing of it; returns what went wrong, or None."""
        writer = EngineWriter(temporary)
        for name, engine in self._engines.items():
            writer.save(engine, name)
        tensors, texts = random_state()
        tensors["frozen_sums"] = self._frozen_sums
        tensors |= {f"average_{index}": average.cpu() for index, average in enumerate(self._averages)}
        try:
            if writer.error:
                raise writer.error
            save_file(tensors, temporary / _rank_file(distributed.rank()), metadata=texts)
            files = [*writer.files, temporary / _rank_file(distributed.rank())]
            if distributed.is_main():
                files.append(write_state(temporary, state, self._run))
            write_listing(temporary, distributed.rank(), files)
        except (OSError, RuntimeError, SafetensorError) as error:
            # torch reports a full disk as "unexpected pos 33565888 vs 33565776"
            return "no space left on the device" if "unexpected pos" in str(error) else str(error)
        return None

    def _load_averages(self, folder: Path, processes: int) -> None:
        """Fill the averages from those of the `processes` ranks that wrote them, whether partitioned alike or not."""
        if not self._averages:
            return
        files = [folder / _rank_file(rank) for rank in range(processes)]
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(_open_tensors(file)) for file in files]
            named = [set(file.keys()) for file in opened]
            for index, average in enumerate(self._averages):
                name = f"average_{index}"
                parts = [file.get_tensor(name) for file, names in zip(opened, named, strict=True) if name in names]
                divide_average(parts, average, distributed.rank())

    def _stop_on(self, problem: str | None, state: RunState) -> None:
        """Raise InputError on every rank if any has a problem."""
        problem = distributed.first_problem(problem)
        if not problem:
            return
        if distributed.is_main():
            remove_leftovers(self._root)
        raise InputError(
            f"--output_dir {self._config.output_dir}: the checkpoint of step {state.step} cannot be written "
            f"({problem}); earlier ones are unchanged: free disk space, then --resume_from_checkpoint auto"
        )


def _read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors but averages, and the texts, of a rank's file."""
    with _open_tensors(path) as opened:
        names = [name for name in opened.keys() if not name.startswith("average_")]  # noqa: SIM118 (not a dictionary)
        return {name: opened.get_tensor(name) for name in names}, opened.metadata()


def _open_tensors(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise RankError(f"{path} is not a safetensors file of a checkpoint: {error}") from error


def _rank_file(rank: int) -> str:
    return f"rank-{rank}.safetensors"
