"""Data of any size: what preparing costs for each row, how soon a run has its first batch, and what a stream holds.

    python -m scripts.benchmarks.data_scale --rows 1000 10000 100000 1000000 --stream_gb 2

Rows are invented text. Every measurement is made in a process of its own, several times, and the fastest counts.
`start` is the time from the first look at the data to the first batch, without imports and the tokenizer.
"""

import collections
import itertools
import json
import multiprocessing
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.benchmarks.machine import peak_memory, timed
from scripts.benchmarks.report import Report, ReportArguments
from scripts.benchmarks.workload import SPLITS, made_rows, prepare_tokenizer
from utils.arguments import SftConfig, flag, run
from utils.data import Corpus, build_dataloader, build_datasets, pack_rows
from utils.data.batches.dataloader import endless
from utils.models.tokenizer import load_tokenizer

DIFFERENT = 5_000  # answers that are invented; rows of a larger set repeat them, with prompts that are all different
WORDS = 4  # of a prompt and of an answer, at most: the cost of tokens should not hide that of rows
STREAMED_WORDS = 16
MANY = 1_000_000  # rows, which are prepared only once
LENGTH = 256  # tokens of a row, at most
BATCH = 16
SEED = 1234
HELD_OUT = 512


@dataclass(kw_only=True)
class Config(ReportArguments):
    """Data of any size."""

    purposes: list[str] = flag(["sft", "preference"], "what the rows are prepared for")
    rows: list[int] = flag([1_000, 10_000, 100_000, 1_000_000], "sizes of the sets that are prepared")
    stream_gb: float = flag(2.0, "size of the file that is streamed, in GB (10^9 bytes); 0 = none", at_least=0)
    stream_rows: int = flag(100_000, "rows that are read from it to measure speed and memory", at_least=1)
    folder: str | None = flag(None, "folder for data and caches, emptied afterwards; default: a temporary one")


def rows_of(count: int | None, words: int = WORDS) -> Iterator[dict[str, str]]:
    """`count` rows with a prompt each of its own, and answers of so many words; without `count` ever more."""
    known = [{name: _shortened(text, words) for name, text in row.items()} for row in made_rows(DIFFERENT)]
    source, number = random.Random(SEED), 0
    while count is None or number < count:
        row = known[source.randrange(DIFFERENT)]
        yield {
            "prompt": f" Human: {number}{row['prompt']} Assistant:",
            "chosen": row["chosen"],
            "rejected": row["rejected"] + ".",
        }
        number += 1


def _shortened(text: str, words: int) -> str:
    return " " + " ".join(text.removeprefix(" Human:").removesuffix(" Assistant:").split()[:words])


def write_rows(path: Path, count: int | None = None, size: float = 0) -> int:
    """Write `count` rows, or as many longer ones as make `size` bytes, as JSON lines; returns how many there are."""
    words = STREAMED_WORDS if count is None else WORDS
    written = number = 0
    with open(path, "w", encoding="utf-8") as stream:
        for row in rows_of(count, words):
            if count is None and written >= size:
                break
            written += stream.write(json.dumps(row) + "\n")
            number += 1
    return number


def first_batch(options: dict[str, Any], tokenizer: str, packing: bool = False) -> float:
    """Seconds from the first look at the data to the first batch."""
    import datasets  # noqa: F401 (the step has imported it before, to look for a hub)

    loaded = load_tokenizer(tokenizer)
    config = SftConfig(model_name_or_path="", packing=packing)

    def start() -> None:
        corpus = Corpus(**options)
        corpus.check()
        rows, _ = build_datasets(corpus, loaded)
        rows = pack_rows(rows, config, LENGTH)
        loader = build_dataloader(rows, list, BATCH, shuffle=True, seed=SEED)
        next(iter(endless(loader)))

    return timed(start)


def preparing(options: dict[str, Any], tokenizer: str) -> tuple[float, float, float]:
    """Seconds of all processors and of the clock to prepare the rows, and the MiB of memory that it takes."""
    import datasets  # noqa: F401 (as above)

    loaded, seconds = load_tokenizer(tokenizer), []
    before = time.process_time()
    memory = peak_memory(lambda: seconds.append(timed(lambda: build_datasets(Corpus(**options), loaded))))
    return time.process_time() - before, seconds[0], memory


def reading(options: dict[str, Any], tokenizer: str, count: int) -> tuple[float, float, float]:
    """Seconds to read `count` rows of a stream, the MiB that the first tenth takes, and what the rest adds."""
    loaded, seconds = load_tokenizer(tokenizer), []
    rows, _ = build_datasets(Corpus(**options), loaded)
    batches = iter(endless(build_dataloader(rows, list, BATCH, shuffle=True, seed=SEED)))

    def read(some: int) -> None:
        seconds.append(timed(lambda: collections.deque(itertools.islice(batches, some // BATCH), maxlen=0)))

    first = peak_memory(lambda: read(count // 10))
    rest = peak_memory(lambda: read(count - count // 10))
    return sum(seconds), first, rest


def alone(function: Callable, *arguments: Any) -> Any:
    """What `function` returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure_preparing(config: Config, report: Report, folder: Path, tokenizer: str) -> None:
    """Cost of a row of sets of each size, and the start on a warm cache."""
    table = []
    for count in config.rows:
        data = folder / f"{count}.jsonl"
        write_rows(data, count)
        for purpose in config.purposes:
            options = {"purpose": purpose, "paths": [str(data)], "data_split": SPLITS[purpose], "max_len": LENGTH}
            options["cache_dir"] = str(folder / "cache")
            best = (float("inf"), 0.0, 0.0)
            for _ in range(config.repeats if count < MANY else 1):
                shutil.rmtree(folder / "cache", ignore_errors=True)
                best = min(best, alone(preparing, options, tokenizer))
            processor, seconds, memory = best
            cost = f"{processor / count * 1e6:.0f}"
            starts = [
                f"{min(alone(first_batch, options, tokenizer, packing) for _ in range(config.repeats)):.2f}"
                for packing in ([False, True] if purpose == "sft" else [False])
            ]
            warm = starts[0] + (f" ({starts[1]})" if len(starts) > 1 else "")
            print(purpose, count, f"{seconds:.1f} s, {cost} µs of CPU time per row", flush=True)
            table.append((f"{count:,}", purpose, f"{seconds:.2f}", cost, f"{memory:.0f}", warm))
        data.unlink()
    header = ("rows", "purpose", "seconds", "CPU µs per row", "peak MiB", "warm start, seconds (packed)")
    if table:
        report.table("Preparing", table, header)
        report.remark("CPU time is that of all threads, and nearly the same however many other processes are running.")


def measure_stream(config: Config, report: Report, folder: Path, tokenizer: str) -> None:
    """Start, speed and memory of a stream."""
    data = folder / "stream.jsonl"
    count = write_rows(data, size=config.stream_gb * 1e9)
    table = []
    for purpose in config.purposes:
        options = {"purpose": purpose, "paths": [str(data)], "data_split": SPLITS[purpose], "max_len": LENGTH}
        options |= {"shuffle_buffer": 10_000, "held_out_rows": HELD_OUT}
        start = min(alone(first_batch, options, tokenizer) for _ in range(config.repeats))
        seconds, first, rest = alone(reading, options, tokenizer, config.stream_rows)
        rate = f"{config.stream_rows / seconds:,.0f}"
        table.append((purpose, f"{start:.2f}", rate, f"{first:.0f}", f"{rest:.0f}"))
    size = f"{data.stat().st_size / 1e9:.2f} GB of {count:,} rows"
    few = config.stream_rows // 10
    memory = f"MiB for {few:,} rows", f"MiB more for the next {config.stream_rows - few:,}"
    report.table(f"Streaming {size}", table, ("purpose", "start, seconds", "rows/s", *memory))


def main(config: Config) -> None:
    """Measure, print the tables and append them to the results."""
    report = Report(f"rows of up to {LENGTH} tokens, one process; the fastest of up to {config.repeats}")
    with tempfile.TemporaryDirectory(dir=config.folder) as name:
        folder = Path(name)
        prepare_tokenizer(folder, None, made_rows(200))
        tokenizer = str(folder / "tokenizer.model")
        measure_preparing(config, report, folder, tokenizer)
        if config.stream_gb:
            measure_stream(config, report, folder, tokenizer)
    report.close(config.results)


if __name__ == "__main__":
    run(main, Config)
