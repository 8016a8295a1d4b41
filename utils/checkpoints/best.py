"""--keep_best: the score of the best model lies beside it, so that a resumed run knows what it has to beat.

A checkpoint could not hold it: the evaluation after the last step comes after the last checkpoint. A run that is killed
between writing a model and its score repeats that evaluation, and writes both again.
"""

import json
import math
from pathlib import Path

from utils import distributed
from utils.errors import InputError
from utils.files import atomic_write_text

BEST_FOLDER = "best"
SCORE_FILE = "score.json"


def is_best(output_dir: str | Path, score: float) -> bool:
    """Whether `score` is higher than that of the model in `output_dir/best`; NaN never is.

    Every rank must call it, and gets the answer of rank 0.
    """
    better = distributed.is_main() and math.isfinite(score) and score > _stored_score(output_dir)
    return bool(distributed.all_reduce_scalar(float(better), "max"))


def store_score(output_dir: str | Path, score: float) -> None:
    """Write the score of the model that has just been saved to `output_dir/best`. Every rank must call it.

    Raises:
        InputError: on every rank; the file cannot be written.
    """
    problem = None
    if distributed.is_main():
        try:
            atomic_write_text(_score_path(output_dir), json.dumps({"score": score}) + "\n")
        except OSError as error:
            problem = f"--output_dir {output_dir}: the best score cannot be written ({error}); make room"
    if problem := distributed.first_problem(problem):
        raise InputError(problem)


def forget_score(output_dir: str | Path) -> None:
    """Let the model in `output_dir/best`, if there is one, be that of another run, which any score beats."""
    _score_path(output_dir).unlink(missing_ok=True)


def _stored_score(output_dir: str | Path) -> float:
    """Minus infinity where there is none, or one that cannot be read."""
    try:
        return float(json.loads(_score_path(output_dir).read_text(encoding="utf-8"))["score"])
    except (OSError, ValueError, KeyError, TypeError):
        return -math.inf


def _score_path(output_dir: str | Path) -> Path:
    return Path(output_dir) / BEST_FOLDER / SCORE_FILE
