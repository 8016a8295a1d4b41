import hashlib
import os
import shutil
import time

import pytest

from utils.data.sources import digests
from utils.data.sources.digests import RememberedDigests
from utils.errors import InputError


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file that counts as large and old, the function under test, and the files that were read."""
    monkeypatch.setattr(digests, "SMALLEST", 4)
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -1)
    read, digest_of = [], digests.content_digest
    monkeypatch.setattr(digests, "content_digest", lambda file: read.append(file.name) or digest_of(file))
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"first")
    return file, lambda: RememberedDigests(tmp_path)(file), read


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_an_unchanged_file_is_read_once(large):
    _, digest, read = large
    assert [digest() for _ in range(3)] == [sha(b"first")] * 3
    assert read == ["data.jsonl"]


def test_a_changed_file_of_the_same_size_and_date_is_read_again(large):
    file, digest, _ = large
    digest()
    before = os.stat(file)
    file.write_bytes(b"other")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(file).st_mtime_ns == before.st_mtime_ns
    assert digest() == sha(b"other")


def test_a_file_that_is_replaced_by_another_of_the_same_size_and_date_is_read_again(large):
    file, digest, _ = large
    digest()
    before = os.stat(file)
    new = file.with_name("new")
    new.write_bytes(b"third")
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(new, file)
    assert digest() == sha(b"third")


def test_a_file_changed_a_moment_ago_is_not_remembered(large, monkeypatch):
    _, digest, read = large
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 2.0)
    assert digest() == digest() == sha(b"first")
    assert len(read) == 2
    later = time.time_ns() + 3_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: later)
    assert digest() == digest() == sha(b"first")
    assert len(read) == 3


def test_what_cannot_be_remembered_is_read(large, tmp_path):
    file, digest, read = large
    digest()
    (entry,) = (tmp_path / "digests").iterdir()
    entry.write_text("{")
    assert digest() == sha(b"first")
    shutil.rmtree(tmp_path / "digests")
    (tmp_path / "digests").write_text("in the way")
    assert digest() == sha(b"first")
    assert len(read) == 3
    file.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        digest()
