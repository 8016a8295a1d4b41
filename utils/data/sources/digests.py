"""SHA-256 sums of data files, remembered as long as the files stay as they are."""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from utils.data.sources.local_files import content_digest
from utils.errors import InputError
from utils.files import atomic_write_text

SMALLEST = 2**20  # bytes; a smaller file is read faster than looked up
SETTLED_SECONDS = 2.0  # a file changed later than that could change again without its times telling


class RememberedDigests:
    """`content_digest`, with the sums of larger files kept in `folder`.

    A sum counts as long as the file's path, device, inode, size and both of its times are the same. The time of the
    last change of the inode (ctime) cannot be set by programs: a file that is edited, or replaced by one with an older
    date, is read again. So is one that was changed within the last `SETTLED_SECONDS`, or while it was read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "digests"

    def __call__(self, file: Path) -> str:
        """The SHA-256 of the file's bytes. Raises InputError if it cannot be read."""
        now = _state(file)
        if now["size"] < SMALLEST:
            return content_digest(file)
        entry = self._folder / f"{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:32]}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none yet, or one that was cut
            known = json.loads(entry.read_text(encoding="utf-8"))
            if known["file"] == now:
                return str(known["sha256"])
        started, digest = time.time_ns(), content_digest(file)
        settled = started - max(now["mtime_ns"], now["ctime_ns"]) > SETTLED_SECONDS * 1e9
        if settled and _state(file) == now:
            with contextlib.suppress(OSError):  # a full disk: the sum is computed again at the next start
                self._folder.mkdir(mode=0o700, exist_ok=True)
                atomic_write_text(entry, json.dumps({"path": str(file.resolve()), "file": now, "sha256": digest}))
        return digest


def _state(file: Path) -> dict[str, int]:
    try:
        status = os.stat(file)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    return {
        "device": status.st_dev,
        "inode": status.st_ino,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }
