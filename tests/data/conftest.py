import json
from pathlib import Path

import pytest


@pytest.fixture
def write_jsonl(tmp_path: Path):
    """Write rows as JSON lines to a file below the test's folder, and return its path as text."""

    def write(rows: list, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def pairs() -> list[dict[str, str]]:
    """Forty preference rows in the text form, each told apart by its number."""
    return [
        {"prompt": f" Human: question {i} ? Assistant:", "chosen": f" good {i}", "rejected": f" bad {i}"}
        for i in range(40)
    ]
