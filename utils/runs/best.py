"""--keep_best: the model of the best evaluation, and its score beside it, which a resumed run has to beat.

A checkpoint could not hold it: the evaluation after the last step comes after the last checkpoint. A run that is killed
between writing a model and its score repeats that evaluation, and writes both again.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

from utils.arguments.output import CheckpointArguments
from utils.errors import InputError
from utils.files import atomic_write_text
from utils.parallel import distributed

BEST_FOLDER = "best"
SCORE_FILE = "score.json"


def save_if_best(config: CheckpointArguments, score: float, save: Callable[[Path], None]) -> None:
    """With --keep_best, let `save` write the model to `output_dir/best` if `score` beats all before; NaN never does.

    Every rank must call it.

    Args:
        score: of an evaluation; higher is better.
        save: writes the model into a folder, on every rank.

    Raises:
        InputError: on every rank; the score cannot be written.
    """
    if not config.keep_best:
        return
    output_dir = Path(config.output_dir)
    better = distributed.is_main() and math.isfinite(score) and score > _stored_score(output_dir)
    if not distributed.all_reduce_scalar(float(better), "max"):
        return
    save(output_dir / BEST_FOLDER)
    problem = None
    if distributed.is_main():
        try:
            atomic_write_text(_score_path(output_dir), json.dumps({"score": score}) + "\n")
        except OSError as error:
            problem = f"--output_dir {output_dir}: the best score cannot be written ({error}); free disk space"
    if problem := distributed.first_problem(problem):
        raise InputError(problem)


def forget_score(output_dir: str | Path) -> None:
    """Forget the score of the model in `output_dir/best`, if there is one, so that any score beats it."""
    _score_path(output_dir).unlink(missing_ok=True)


def _stored_score(output_dir: str | Path) -> float:
    """The stored score; minus infinity where there is none, or it cannot be read."""
    try:
        return float(json.loads(_score_path(output_dir).read_text(encoding="utf-8"))["score"])
    except (OSError, ValueError, KeyError, TypeError):
        return -math.inf


def _score_path(output_dir: str | Path) -> Path:
    return Path(output_dir) / BEST_FOLDER / SCORE_FILE
