"""A model folder's weight files: is every file there, is each complete, and what do they hold? Without loading them."""

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from utils.errors import InputError

INDEX_SUFFIX = ".index.json"
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".json")
GIT_LFS_POINTER = b"version https://git-lfs"


def check_weight_files(folder: Path, label: str) -> None:
    """Refuse a folder whose weight files are missing or truncated; only the beginnings of files are read.

    Args:
        label: the flag and its value, for messages.

    Raises:
        InputError: one line that names the file and what to do.
    """
    first = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if first is None:
        raise InputError(f"{label}: no weights there (model.safetensors or its index); copy them beside config.json")
    names = _shards(first, label) if first.name.endswith(INDEX_SUFFIX) else [first.name]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{label}: {first.name} lists {len(names)} files, of which {', '.join(missing[:3])}"
            f"{' and others' if len(missing) > 3 else ''} are missing; copy the model again"
        )
    for name in names:
        _check_whole(folder / name, label)


def _shards(index: Path, label: str) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{label}: {index.name} cannot be used ({error}); copy the model again") from error


def _check_whole(file: Path, label: str) -> None:
    try:
        with open(file, "rb") as stream:
            head = stream.read(len(GIT_LFS_POINTER))
        if head == GIT_LFS_POINTER:
            raise InputError(f"{label}: {file.name} is a Git LFS pointer, not the weights: run `git lfs pull` there")
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
    except (OSError, SafetensorError) as error:
        raise InputError(f"{label}: {file.name} cannot be read in full ({error}); copy the model again") from error


def check_shapes(folder: Path, label: str, expected: dict[str, tuple[int, ...]]) -> None:
    """Refuse safetensors files in which a tensor's shape differs from `expected`; names on one side only are ignored.

    Raises:
        InputError: names the first such tensor.
    """
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (not a dictionary)
                shape = tuple(stored.get_slice(name).get_shape()) if name in expected else ()
                if name in expected and shape != expected[name]:
                    raise InputError(
                        f"{label}: {name} is {_by(shape)} in {file.name}, but {_by(expected[name])} by config.json; "
                        "the files do not belong together: copy the model again"
                    )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def weights_digest(path: str) -> str:
    """A hash of a model's configuration and weights: of the contents of a local folder's files, or of the files' names
    in the cache of a model from the hub, where they are called by their hash."""
    folder = Path(path)
    digest = hashlib.sha256()
    if folder.is_dir():
        files = [file for file in folder.iterdir() if file.name == "config.json" or file.suffix in WEIGHT_SUFFIXES]
        for file in sorted(files):
            with open(file, "rb") as stream:
                digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
        return digest.hexdigest()
    from transformers.utils import cached_file

    for name in ("config.json", *WEIGHT_FILES):
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        if found:
            digest.update(f"{name} {Path(found).resolve().name}\n".encode())
    return digest.hexdigest()
