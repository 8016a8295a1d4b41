"""A stream of training examples: read while training, in constant memory, and resumable at the exact row.

The examples of a step come in windows of `shuffle_buffer` examples, each put in random order. Where a window begins is
a few numbers for each source, and everything random is derived from the seed, the epoch and the number of the window:
so a stream goes on at a window by entering the files there. The division among the steps and the held-out rows is drawn
for each prompt by itself (`splits.part_of`), because the whole set is never known.
"""

import bisect
import copy
import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from utils.data.formats.example import Example, Row
from utils.data.sources.corpus import Corpus, Share
from utils.data.sources.local_files import BEGINNING, LocatedRow, stream_rows
from utils.data.sources.reading import HubSource, LocalSource, read_examples, read_group, settled_form
from utils.data.sources.splits import part_of
from utils.errors import InputError, counted
from utils.parallel import distributed, watchdog

HELD_OUT_SHARE = 0.05  # of the prompts, where a source comes without held-out rows
MOST_SEARCHED = 100  # rows that are searched for each one to evaluate on, or to look at before training
ROWS_PER_REPORT = 512
COMPRESSION = 4  # how many times smaller a compressed file is, roughly

Position = dict[str, Any]  # JSON
_FIRST: Position = {"finished": False, "file": 0, "at": BEGINNING, "read": 0, "used": 0, "dropped": {}}


def held_out_share(corpus: Corpus) -> float:
    """The share of all prompts that is held out: none where every source comes with held-out rows."""
    return 0.0 if all(share.source.has_held_out for share in corpus.shares) else HELD_OUT_SHARE


def held_out_examples(corpus: Corpus) -> list[Example]:
    """At most `corpus.held_out_rows` examples to evaluate on, equally many of each source as far as it has them.

    They are the first ones of its held-out files or split, else the first ones that the draw holds out. Purpose
    "prompts" has each prompt once.

    Raises:
        InputError: there are none.
    """
    searched: Counter[str] = Counter()
    chosen = _first_examples(corpus, corpus.held_out_rows, searched, held_out=True)
    if not chosen:
        names = ", ".join(share.source.label for share in corpus.shares)
        raise InputError(
            f"{names}: --streaming holds out one prompt in {1 / HELD_OUT_SHARE:.0f}, and none is among the first "
            f"{counted(searched['rows'], 'row')}; give a folder with a file of held-out rows (test.jsonl), or another "
            "--data_seed to all steps"
        )
    return chosen


def first_examples(corpus: Corpus, most: int) -> list[Example]:
    """At most `most` training examples of this step, the first ones of each source, to be looked at before training."""
    return _first_examples(corpus, most, Counter(), held_out=False)


def _first_examples(corpus: Corpus, most: int, searched: Counter[str], *, held_out: bool) -> list[Example]:
    """At most `most` examples, equally many of each source, whose first rows are searched and counted in `searched`."""
    drawn, chosen, numbers = held_out_share(corpus), [], set()
    each = -(-most // len(corpus.shares))
    for place, share in enumerate(corpus.shares):
        part = "held_out" if held_out and share.source.has_held_out else "train"
        rows = read_examples(share.source, part, corpus.purpose, Counter(), **corpus.reading)
        found = 0
        for number, example in itertools.islice(rows, each * MOST_SEARCHED):
            searched["rows"] += 1
            if searched["rows"] % ROWS_PER_REPORT == 0:
                watchdog.working()
            example = _settled(example, corpus, place, Counter())
            if example is None or (corpus.purpose == "prompts" and number in numbers):
                continue
            drawn_part = part_of(number, share.weights, seed=corpus.seed, held_out_share=drawn)
            if part == "train" and drawn_part != (0 if held_out else share.part + 1):
                continue
            numbers.add(number)
            chosen.append(example)
            found += 1
            if found == each:
                break
    return chosen[:most]


def _settled(example: Example | None, corpus: Corpus, source: int, dropped: Counter[str]) -> Example | None:
    """`example` with the number of its source; None where a filter leaves it out, which is counted in `dropped`."""
    if example is not None and (reason := corpus.filters.reason_to_skip(example, corpus.purpose)):
        dropped[reason] += 1
        return None
    return None if example is None else dataclasses.replace(example, source=source)


class _SourceStream:
    """The examples of one source for one step, pass after pass.

    Attributes:
        passes: completed ones. finished: whether the present one is complete, too.
        used: examples of the present pass so far.
    """

    def __init__(self, share: Share, corpus: Corpus, number: int, seed: int, keeps_columns: bool) -> None:
        self._share, self._source, self._corpus, self._number = share, share.source, corpus, number
        self._form, self._held_out_share = None, held_out_share(corpus)
        self._seeds, self._keeps_columns = (seed, number), keeps_columns
        self.start_at(_FIRST | {"passes": 0})

    @property
    def position(self) -> Position:
        """Behind the last example that was given out."""
        place = {"passes": self.passes, "finished": self.finished, "file": self._file, "at": list(self._at)}
        if isinstance(self._source, HubSource):
            place["hub"] = self._hub_state if self._hub is None else self._hub.state_dict()
        return place | {"read": self._read, "used": self.used, "dropped": dict(self._dropped)}

    def start_at(self, position: Position) -> None:
        """Go on behind the example at which `position` was."""
        self.passes, self.finished = position["passes"], position["finished"]
        self._file, self._at, self._hub_state, self._hub = position["file"], position["at"], position.get("hub"), None
        self._read, self.used, self._dropped = position["read"], position["used"], Counter(position["dropped"])
        self._examples = self._pass()

    @property
    def label(self) -> str:
        return self._source.label

    def next(self) -> Example | None:
        """The next example of this pass; None, once, at its end."""
        example = next(self._examples, None)
        if example is None:
            self.finished = True
            self._report()
        return example

    def rewind(self) -> None:
        """Begin another pass."""
        self.start_at(_FIRST | {"passes": self.passes + 1})

    def size(self) -> float:
        """Bytes of its training rows, roughly; 0 where that is not known."""
        if isinstance(self._source, HubSource):
            return float(self._source.stream("train").bytes or 0)
        return float(sum(_size(file) for file in self._source.training))

    def _pass(self) -> Iterator[Example]:
        """The examples of this step from the present place on to the end of the pass."""
        if self.finished:
            return
        corpus = self._corpus
        if self._form is None:
            self._form = settled_form(
                self._source,
                corpus.purpose,
                corpus.prompt_form,
                skip_empty=corpus.filters.drop_empty,
                scoring=corpus.scoring,
            )
        groups = self._hub_rows() if isinstance(self._source, HubSource) else self._file_rows(self._source)
        weights, wanted = self._share.weights, self._share.part + 1
        for first, rows in groups:
            examples = read_group(
                rows, self._source, corpus.purpose, self._dropped, self._form, first=first, **corpus.reading
            )
            for number, example in examples:
                self._read += 1
                if self._read % ROWS_PER_REPORT == 0:
                    watchdog.working()
                part = part_of(number, weights, seed=corpus.seed, held_out_share=self._held_out_share)
                example = _settled(example, corpus, self._number, self._dropped)
                if example is not None and part == wanted:
                    self.used += 1
                    yield example if self._keeps_columns else dataclasses.replace(example, columns={})

    def _file_rows(self, source: LocalSource) -> Iterator[tuple[LocatedRow, Iterator[LocatedRow]]]:
        """The first row of each file, and its rows from the present place on; files are in an order of this pass."""
        files = list(source.training)
        random.Random(distributed.derived_seed(*self._seeds, self.passes)).shuffle(files)
        for index in range(self._file, len(files)):
            if index > self._file:
                self._file, self._at = index, BEGINNING
            first = next(stream_rows(files[index]), None)
            if first is not None:
                yield first[:2], self._rows_from_here(files[index])

    def _rows_from_here(self, file: Path) -> Iterator[LocatedRow]:
        for where, row, behind in stream_rows(file, tuple(self._at)):
            self._at = behind
            yield where, row

    def _hub_rows(self) -> Iterator[tuple[LocatedRow, Iterator[LocatedRow]]]:
        source = self._source
        first = next(iter(source.stream("train")), None)
        if first is None:
            return
        rows = copy.deepcopy(source.stream("train").rows)  # not yet read from, so that it begins at its first row
        if self._hub_state is not None:
            rows.load_state_dict(self._hub_state)
        self._hub = rows
        yield (source.location("train", 1), first), self._counted(rows)

    def _counted(self, rows: Iterable[Row]) -> Iterator[LocatedRow]:
        for row in rows:
            self._at = (self._at[0] + 1, 0)
            yield self._source.location("train", self._at[0]), row

    def _report(self) -> None:
        distributed.log(
            f"{self._source.label}: pass {self.passes + 1} has ended, {counted(self.used, 'row')} of {self._read} for "
            f"this step{_list(self._dropped)}"
        )


class ExampleStream:
    """The examples of a step in windows, epoch after epoch.

    Without weights, an epoch has every example once; sources are mixed in proportion to their size, and an epoch ends
    when all have been read. With weights, each example comes from a source that is drawn by these, sources begin again
    whenever they have been read, and an epoch is a pass over the one that is scarcest for its weight.

    Args:
        seed: of the order.
        keeps_columns: whether the other columns of the rows are needed; they would take memory.
    """

    def __init__(self, corpus: Corpus, seed: int, *, keeps_columns: bool) -> None:
        self._size, self._weights, self._seed = corpus.shuffle_buffer, corpus.blend_weights, seed
        self._sources = [
            _SourceStream(share, corpus, number, seed, keeps_columns) for number, share in enumerate(corpus.shares)
        ]
        self._names = ", ".join(share.source.label for share in corpus.shares)
        self._window, self._used = 0, 0
        self.epoch = 0

    @property
    def position(self) -> Position:
        """Where the next window begins, as JSON."""
        own = {"epoch": self.epoch, "window": self._window, "used": self._used}
        return own | {"sources": [source.position for source in self._sources]}

    def start_at(self, position: Position) -> None:
        """Go on with the window at whose beginning `position` was."""
        self.epoch, self._window, self._used = position["epoch"], position["window"], position["used"]
        for source, place in zip(self._sources, position["sources"], strict=True):
            source.start_at(place)

    def next_window(self) -> list[Example]:
        """The examples of the next window in random order: `shuffle_buffer` of them, fewer at the end of an epoch.

        Raises:
            InputError: a row that cannot be read, with its file and line; or an epoch without a row for this step.
        """
        while True:
            chance = random.Random(distributed.derived_seed(self._seed, self.epoch, self._window))
            examples = self._read(chance)
            self._window += 1
            if examples:
                self._used += len(examples)
                chance.shuffle(examples)
                return examples
            self._next_epoch()

    def _next_epoch(self) -> None:
        if not self._used:
            raise InputError(
                f"{self._names}: no row for this step; give more data, or data that this step can use, or another "
                "--data_split"
            )
        for source in self._sources:
            source.rewind()
        self.epoch, self._window, self._used = self.epoch + 1, 0, 0

    def _read(self, chance: random.Random) -> list[Example]:
        examples: list[Example] = []
        present = [source for source in self._sources if not source.finished or self._weights]
        bounds = self._bounds(present)
        while present and len(examples) < self._size:
            source = present[bisect.bisect(bounds, chance.random() * bounds[-1])] if len(present) > 1 else present[0]
            if (example := source.next()) is not None:
                examples.append(example)
            elif self._weights:
                if not source.used:
                    raise InputError(
                        f"{source.label}: has a weight, but no row for this step; leave it out, or give more data"
                    )
                source.rewind()
                self.epoch = max(source.passes for source in self._sources)
            else:
                present.remove(source)
                bounds = self._bounds(present)
        return examples

    def _bounds(self, sources: Sequence[_SourceStream]) -> list[float]:
        """Where the share of each source ends."""
        if self._weights:
            return list(itertools.accumulate(self._weights))
        sizes = [source.size() for source in sources]
        known = [size for size in sizes if size]
        typical = sum(known) / len(known) if known else 1.0
        return list(itertools.accumulate(size or typical for size in sizes))


def _size(file: Path) -> float:
    return file.stat().st_size * (COMPRESSION if file.name.endswith(".gz") else 1)


def _list(reasons: Counter[str]) -> str:
    found = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    return f", without {found}" if found else ""
