"""What the adapters share. They run under a peer's own interpreter and import nothing of this project.

An adapter is called as `adapter.py SETTING.json MEASURED.json`: it reads its settings from the first file and writes
what it measured, one object per step, to the second.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast


def setting():
    """The content of the first file."""
    return json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))


def load_tokenizer(folder, padding_side):
    """The tokenizer in `folder`, from its tokenizer.json alone, which all versions of transformers read alike."""
    stated = json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))
    names = {key: stated[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token") if stated.get(key)}
    names = {key: name["content"] if isinstance(name, dict) else name for key, name in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_file=str(Path(folder) / "tokenizer.json"), padding_side=padding_side, **names
    )


def clock():
    """The time in seconds, once the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Steps:
    """Wall-clock time of successive steps, and what was counted in each."""

    def __init__(self):
        self.target = Path(sys.argv[2])  # read now: adapters may replace the command line for their peer
        self.begin()

    def begin(self):
        """Begin the first step now; discard what was counted before."""
        self.rows = []
        self.skip()

    def count(self, name, amount):
        """Add `amount` to the counter `name` of the current step."""
        self.counts[name] = self.counts.get(name, 0) + amount

    def end(self):
        """End the current step and begin the next one."""
        now = clock()
        self.rows.append({"seconds": now - self.started, **self.counts})
        self.counts, self.started = {}, now

    def skip(self):
        """Begin the current step again: discard its time and counts."""
        self.counts, self.started = {}, clock()

    def save(self, *packages):
        """Write the steps and the versions of `packages` to the second file."""
        measured = {"steps": self.rows, "versions": {name: version(name) for name in packages}}
        self.target.write_text(json.dumps(measured), encoding="utf-8")
