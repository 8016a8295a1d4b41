"""Checkpoint folders: they appear complete or not at all, and damage is found before anything in them is used.

checkpoints/checkpoint-20/manifest.json     sizes and SHA-256 sums of all other files; written last
checkpoints/latest                          the name of the newest one, for human readers
checkpoints/.checkpoint-30.tmp              one that is being written, or that a killed run left behind
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from utils.files import atomic_write_text

CHECKPOINTS_FOLDER = "checkpoints"  # in --output_dir
MANIFEST = "manifest.json"
LATEST = "latest"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_path(root: Path, step: int) -> Path:
    return root / f"checkpoint-{step}"


def temporary_path(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it is renamed; the same on every rank."""
    return root / f".checkpoint-{step}.tmp"


def checkpoint_steps(root: Path) -> list[int]:
    """Steps of the checkpoints in `root`, whole or damaged, newest first; none where the folder does not exist."""
    if not root.is_dir():
        return []
    names = (_NAME.fullmatch(path.name) for path in root.iterdir() if path.is_dir())
    return sorted((int(name[1]) for name in names if name), reverse=True)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_records(folder: Path, files: Iterable[Path]) -> dict[str, dict]:
    """Size and SHA-256 sum of each of `files`, by its path inside `folder`, once they are on the disk."""
    records = {}
    for file in files:
        sync(file)
        records[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    return records


def write_listing(temporary: Path, rank: int, files: Iterable[Path]) -> None:
    """Write the `file_records` of the files of one rank to `temporary`, for `take_listings`."""
    _listing(temporary, rank).write_text(json.dumps(file_records(temporary, files)), encoding="utf-8")


def take_listings(temporary: Path, processes: int) -> dict[str, dict]:
    """Return the records of the files of all ranks, and remove their listings.

    The listings are opened by name, because the folder's entries may be stale on a shared file system.

    Raises:
        FileNotFoundError: the listing of a rank is not there.
    """
    records = {}
    for rank in range(processes):
        listing = _listing(temporary, rank)
        records |= json.loads(listing.read_text(encoding="utf-8"))
        listing.unlink()
    return records


def publish(temporary: Path, final: Path, records: dict[str, dict]) -> None:
    """Write the manifest of `temporary`, rename it to `final`, and point `latest` to it.

    A folder that already has that name, from before a resume, is replaced.
    """
    manifest = temporary / MANIFEST
    manifest.write_text(json.dumps({"files": dict(sorted(records.items()))}, indent=1) + "\n", encoding="utf-8")
    for path in (manifest, *(path for path in temporary.rglob("*") if path.is_dir()), temporary):
        sync(path)
    if final.exists():
        _remove(final)
    os.replace(temporary, final)
    sync(final.parent)
    atomic_write_text(final.parent / LATEST, final.name + "\n")


def prune(root: Path, keep: int, newest: int) -> None:
    """Remove all but the `keep` last checkpoints up to that of step `newest`; 0 keeps all.

    Later ones are those that a resumed run found damaged. They do not count, and are replaced when the run reaches
    their steps.
    """
    steps = [step for step in checkpoint_steps(root) if step <= newest]
    for step in steps[keep:] if keep else []:
        _remove(checkpoint_path(root, step))


def remove_leftovers(root: Path) -> None:
    """Remove what killed runs left half-written or half-removed."""
    for path in [*root.glob(".checkpoint-*.tmp"), *root.glob(".checkpoint-*.old")]:
        shutil.rmtree(path)
    for path in root.glob(f".{LATEST}.*.tmp"):
        path.unlink()


def read_manifest(folder: Path) -> dict[str, dict] | str:
    """The records of `folder`'s manifest, or what is wrong: it is missing, or the files are not those it lists."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        records = {name: {"bytes": int(r["bytes"]), "sha256": str(r["sha256"])} for name, r in content["files"].items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    present = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not _is_folder(path)}
    del present[MANIFEST]
    if missing := sorted(records.keys() - present.keys()):
        return f"{missing[0]} is missing"
    if strangers := sorted(present.keys() - records.keys()):
        return f"{strangers[0]} is not in {MANIFEST}"
    for name, record in records.items():
        if present[name].is_symlink() or not present[name].is_file():
            return f"{name} is not a plain file"
        if (size := present[name].stat().st_size) != record["bytes"]:
            return f"{name} has {size} bytes instead of {record['bytes']}"
    return records


def wrong_checksum(folder: Path, records: dict[str, dict], names: Iterable[str]) -> str | None:
    """What is wrong with the content of the first of `names` that is not as its record says; None if all are."""
    for name in names:
        try:
            found = _sha256(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != records[name]["sha256"]:
            return f"{name} is not what was written (its SHA-256 sum differs)"
    return None


def _listing(temporary: Path, rank: int) -> Path:
    return temporary / f"files-{rank}.json"


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that a half-removed one never has its name."""
    doomed = folder.with_name(f".{folder.name}.old")
    if doomed.exists():
        shutil.rmtree(doomed)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)
