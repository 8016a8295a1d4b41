"""Streams: every row once per epoch over all ranks, the same rows from any batch on, whatever kind the files are."""

import csv
import gzip
import itertools
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from processes import run_ranks

from utils.arguments import SftConfig
from utils.data import Corpus, build_dataloader, build_datasets, pack_rows
from utils.data.batches import stream_loader
from utils.data.batches.dataloader import accumulation_groups
from utils.data.batches.packing import unpack
from utils.errors import InputError
from utils.parallel import distributed


def pairs_of(count: int, word: str = "thing") -> list[dict[str, str]]:
    return [
        {"prompt": f" Human: {word} {i} ? Assistant:", "chosen": f" good {i}", "rejected": f" bad {i}"}
        for i in range(count)
    ]


@pytest.fixture
def stream(tiny_tokenizer):
    """The training and held-out rows of a stream."""

    def build(*paths, purpose="preference", **options):
        defaults = {"data_split": "1,1,1", "max_len": 64, "shuffle_buffer": 40, "held_out_rows": 5}
        corpus = Corpus(purpose=purpose, paths=list(paths), **(defaults | options))
        corpus.check()
        return build_datasets(corpus, tiny_tokenizer)

    return build


def loader_of(rows, *, rank=0, world_size=1, size=3, seed=7):
    return build_dataloader(rows, list, size, shuffle=True, seed=seed, rank=rank, world_size=world_size)


def text_of(row) -> tuple:
    return tuple(tuple(value) for value in row.values() if isinstance(value, list))


def epochs_of(loaders, count: int) -> list[list[tuple]]:
    """The rows of the first `count` epochs in order, the batches of all ranks dealt together again."""
    read, ends = [], []
    batches = [iter(loader) for loader in loaders]
    while len(ends) < count:
        of_ranks = [next(each) for each in batches]
        read += [text_of(row) for row in itertools.chain(*zip(*of_ranks, strict=True))]
        if loaders[0].epoch > len(ends):
            ends.append(len(read))
    size = next(n for n in range(1, len(read) + 1) if Counter(read[:n])[read[n]] == 1)  # the first that comes again
    return [read[start : start + size] for start in range(0, size * count, size)]


def test_every_row_comes_once_in_an_epoch_and_in_another_order_in_the_next(stream, write_jsonl):
    rows, held_out = stream(write_jsonl(pairs_of(300)))
    first, second = epochs_of([loader_of(rows)], 2)
    assert len(first) == len(set(first)) and set(first) == set(second) and first != second
    assert 60 < len(first) < 130  # of 300 rows, 285 are not held out, and a third is for this step
    assert len(held_out) == 5 and not set(first) & {text_of(row) for row in held_out}
    again, _ = epochs_of([loader_of(rows)], 2)
    other, _ = epochs_of([loader_of(rows, seed=8)], 2)
    assert again == first and set(other) == set(first) and other != first


def test_the_steps_share_no_prompt_and_together_have_all(stream, write_jsonl):
    path = write_jsonl(pairs_of(200))
    parts = {purpose: stream(path, purpose=purpose) for purpose in ("sft", "preference", "prompts")}
    prompts = {}
    for purpose, (rows, held_out) in parts.items():
        own, batches = set(), iter(loader := loader_of(rows))
        while loader.epoch == 0:
            batch = next(batches)
            ids = [row.get("prompt_ids") or row["input_ids"][: row["response_start"]] for row in batch]
            own |= set(map(tuple, ids)) if loader.epoch == 0 else set()
        prompts[purpose] = own
        held = [row.get("prompt_ids") or row["input_ids"][: row["response_start"]] for row in held_out]
        assert not set(map(tuple, held)) & own
    assert not prompts["sft"] & prompts["preference"] and not prompts["sft"] & prompts["prompts"]
    assert not prompts["preference"] & prompts["prompts"]
    assert 175 < sum(map(len, prompts.values())) < 200


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("purpose", ["preference", "sft"])
def test_ranks_have_disjoint_rows_and_share_the_batches_of_one(stream, write_jsonl, monkeypatch, purpose, world_size):
    """Also where an example gives no row, or several: pairs that are cut to the same, and long texts."""
    monkeypatch.setattr(stream_loader, "BLOCK", 16)
    rows = pairs_of(90)
    for row in rows[::7]:
        row |= {"chosen": " white" * 90 + " a", "rejected": " white" * 90 + " b"}
    path = write_jsonl(rows)
    text = write_jsonl([{"text": f"{i} " + "milk is white " * (i % 40)} for i in range(60)], "text.jsonl")
    stream_rows, _ = stream(*([path] if purpose == "preference" else [path, text]), purpose=purpose)
    alone, _ = epochs_of([loader_of(stream_rows, size=2 * world_size)], 2)
    ranks = [loader_of(stream_rows, rank=rank, world_size=world_size, size=2) for rank in range(world_size)]
    together, _ = epochs_of(ranks, 2)
    assert together == alone and len(set(alone)) == len(alone)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "parquet", "arrow", "json"])
@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_goes_on_at_the_exact_row(stream, tmp_path, monkeypatch, kind, packing):
    """From every batch of two epochs, over the ends of blocks, windows and files, for every kind of file."""
    monkeypatch.setattr(stream_loader, "BLOCK", 16)
    for number in range(3):
        write(tmp_path / f"data/{number}.{kind}", pairs_of(60, f"thing {number}"))
    rows, _ = stream(str(tmp_path / "data"), purpose="sft")
    if packing:
        rows = pack_rows(rows, SftConfig(model_name_or_path="x", packing=True), 64)
    loader = loader_of(rows)
    batches, taken, positions = iter(loader), [], []
    while loader.epoch < 2:
        taken.append(next(batches))
        positions.append(json.loads(json.dumps(loader.position)))
    assert len(taken) > 12
    for number in range(0, len(taken) - 1, 1 if kind == "jsonl" else 5):
        resumed = loader_of(rows)
        resumed.start_at(positions[number])
        assert next(iter(resumed)) == taken[number + 1]
        assert resumed.position == positions[number + 1]


def write(path, rows) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    table = pa.Table.from_pylist(rows)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([list(rows[0]), *(row.values() for row in rows)])
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as opened:
            opened.write_table(table, max_chunksize=11)
    else:
        path.write_text(lines)


def test_packed_rows_hold_every_row_once(stream, write_jsonl):
    path = write_jsonl(pairs_of(150))
    plain, _ = stream(path, purpose="sft", data_split="1,0,0")
    single, _ = epochs_of([loader_of(plain)], 2)
    packed = loader_of(pack_rows(plain, SftConfig(model_name_or_path="x", packing=True), 64))
    read, batches = [], iter(packed)
    while len(read) < len(single):
        for row in next(batches):
            assert sum(len(example["input_ids"]) for example in unpack(row)) <= 64
            read += [text_of(example) for example in unpack(row)]
    assert set(read[: len(single)]) == set(single)


def test_resuming_with_another_number_of_processes_goes_on_with_the_same_rows(stream, write_jsonl):
    rows, _ = stream(write_jsonl(pairs_of(200)))
    whole = loader_of(rows, size=4)
    batches = iter(whole)
    for _ in range(5):
        next(batches)
    ranks = [loader_of(rows, rank=rank, world_size=2, size=2) for rank in range(2)]
    for loader in ranks:
        loader.start_at(whole.position)
    for _ in range(20):
        halves = [next(iter(loader)) for loader in ranks]
        assert list(itertools.chain(*zip(*halves, strict=True))) == next(batches)


def test_accumulation_groups_of_a_stream_are_full_and_count_on(stream, write_jsonl):
    rows, _ = stream(write_jsonl(pairs_of(100)))
    loader = loader_of(rows)
    groups = list(accumulation_groups(loader, 2, 3, 20))
    assert [step for step, _, _ in groups] == list(range(4, 21))
    assert {len(group) for _, _, group in groups} == {2} and groups[-1][1] > groups[0][1] == 0


def test_weights_are_shares_of_the_rows(stream, write_jsonl, tiny_tokenizer):
    paths = [write_jsonl(pairs_of(300, word), f"{word}.jsonl") for word in ("milk", "fox")]
    rows, _ = stream(*paths, blend_weights=(0.8, 0.2), data_split="0,1,0")
    batches, words = iter(loader_of(rows)), Counter()
    for _ in range(200):
        words.update(tiny_tokenizer.decode(row["prompt_ids"]).split()[2] for row in next(batches))
    assert 0.74 < words["milk"] / 600 < 0.86


def test_sources_without_weights_are_mixed(stream, write_jsonl, tiny_tokenizer):
    paths = [write_jsonl(pairs_of(size, word), f"{word}.jsonl") for word, size in (("milk", 300), ("fox", 100))]
    rows, _ = stream(*paths, data_split="0,1,0")
    batches, words = iter(loader_of(rows)), Counter()
    for _ in range(40):
        words.update(tiny_tokenizer.decode(row["prompt_ids"]).split()[2] for row in next(batches))
    assert 15 < words["fox"] < 50


def on_a_rank(paths: list[str], tokenizer: str, packing: bool) -> list[list[dict]]:
    """The first 30 batches of this process."""
    from utils.models.tokenizer import load_tokenizer

    stream_loader.BLOCK = 16
    corpus = Corpus(purpose="sft", paths=paths, data_split="1,1,1", max_len=64, shuffle_buffer=40, held_out_rows=5)
    rows, _ = build_datasets(corpus, load_tokenizer(tokenizer))
    if packing:
        rows = pack_rows(rows, SftConfig(model_name_or_path="x", packing=True), 64)
    batches = iter(build_dataloader(rows, list, 4 // distributed.world_size(), shuffle=True, seed=7))
    return [next(batches) for _ in range(30)]


@pytest.mark.parametrize("packing", [False, True])
def test_real_processes_share_the_batches_of_one(write_jsonl, tiny_tokenizer, tmp_path, monkeypatch, packing):
    monkeypatch.setattr(stream_loader, "BLOCK", 16)
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = write_jsonl([{"text": f"{i} " + "milk is white " * (i % 40)} for i in range(60)], "text.jsonl")
    arguments = ([write_jsonl(pairs_of(90)), text], str(tmp_path / "tokenizer"), packing)
    ranks = run_ranks(on_a_rank, 2, *arguments)
    together = [list(itertools.chain(*zip(*batches, strict=True))) for batches in zip(*ranks, strict=True)]
    assert together == on_a_rank(*arguments)


def test_held_out_files_are_the_held_out_rows(stream, tmp_path):
    write(tmp_path / "data/train.jsonl", pairs_of(60))
    write(tmp_path / "data/test.jsonl", pairs_of(9, "other"))
    rows, held_out = stream(str(tmp_path / "data"), data_split="0,1,0")
    (epoch,) = epochs_of([loader_of(rows)], 1)
    assert len(held_out) == 5 and len(set(epoch)) == 60


def test_a_row_that_cannot_be_read_is_named_while_training(stream, write_jsonl):
    rows = pairs_of(320)
    del rows[290]["chosen"]
    stream_rows, _ = stream(write_jsonl(rows), held_out_rows=1, data_split="0,1,0")
    with pytest.raises(InputError, match=r"data.jsonl, line 291: column `chosen` is missing"):
        epochs_of([loader_of(stream_rows)], 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", json.dumps(pairs_of(3)), "a.json: not one JSON object per line, and --streaming cannot read"),
        ("a.json", json.dumps({"data": pairs_of(3)}, indent=1), "a.json: not one JSON object per line"),
        ("a.jsonl", '{"prompt": \n', "a.jsonl, line 1: not valid JSON"),
        ("a.jsonl", "", "a.jsonl is empty"),
    ],
)
def test_files_that_cannot_be_streamed(stream, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        stream(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_data_without_rows_for_the_step(stream, write_jsonl, tmp_path):
    path = write_jsonl([row | {"rejected": row["chosen"]} for row in pairs_of(60)])
    with pytest.raises(InputError, match="--streaming holds out one prompt in 20, and none is among the first 60 rows"):
        stream(path)
    write_jsonl(pairs_of(3, "other"), "test.jsonl")
    rows, _ = stream(str(tmp_path))
    with pytest.raises(InputError, match="no row for this step"):
        next(iter(loader_of(rows)))


def test_memory_does_not_grow_with_the_rows(stream, tmp_path):
    """Resident memory after 500 rows and after 4,500 differs by less than a fifth of the file."""
    path = tmp_path / "data.jsonl"
    filler = "x" * 20_000
    with open(path, "w") as file:
        for i in range(5_000):
            file.write(json.dumps(pairs_of(1, f"thing {i}")[0] | {"other": filler}) + "\n")
    rows, _ = stream(str(path), data_split="0,1,0", shuffle_buffer=100)
    batches, resident = iter(loader_of(rows, size=50)), []
    for number in range(1, 91):
        next(batches)
        if number in (10, 90):
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    assert resident[1] - resident[0] < path.stat().st_size / 5
