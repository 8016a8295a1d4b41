"""What the adapters share. They run under a peer's own interpreter and import nothing of this project.

An adapter is called as `adapter.py SETTING.json MEASURED.json`: it reads what to do from the first file and writes
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
    """The tokenizer in `folder`, by its tokenizer.json alone, which every version of transformers reads alike."""
    stated = json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))
    names = {key: stated[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token") if stated.get(key)}
    names = {key: name["content"] if isinstance(name, dict) else name for key, name in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_file=str(Path(folder) / "tokenizer.json"), padding_side=padding_side, **names
    )


def clock():
    """Seconds, once the device has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Steps:
    """Wall-clock time of successive steps, and what was counted in each."""

    def __init__(self):
        self.target = Path(sys.argv[2])  # now: some peers read the command line, which then is another one
        self.begin()

    def begin(self):
        """The first step begins now; whatever was counted is forgotten."""
        self.rows = []
        self.skip()

    def count(self, name, amount):
        """Add `amount` to the counter `name` of the current step."""
        self.counts[name] = self.counts.get(name, 0) + amount

    def end(self):
        """The current step is over and the next one begins."""
        now = clock()
        self.rows.append({"seconds": now - self.started, **self.counts})
        self.counts, self.started = {}, now

    def skip(self):
        """The current step begins only now."""
        self.counts, self.started = {}, clock()

    def save(self, *packages):
        """Write the steps and the versions of `packages` to the second file."""
        measured = {"steps": self.rows, "versions": {name: version(name) for name in packages}}
        self.target.write_text(json.dumps(measured), encoding="utf-8")
