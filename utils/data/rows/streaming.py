"""Rows of a step that are read and tokenised while training (`--streaming`), and its held-out rows, kept in memory."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from utils.data.formats.example import Example
from utils.data.rows.arrow_rows import KEEPS_COLUMNS, as_written, row_schema, rows_in_memory
from utils.data.rows.audit import AUDITED, audit
from utils.data.rows.cache import key_of
from utils.data.rows.dataset import TokenDataset, content_of
from utils.data.rows.division import listed
from utils.data.rows.encoding import ExampleEncoder
from utils.data.rows.report import Tally, counted_rows, tokens_report, total
from utils.data.rows.token_rows import Tallies, TokenRow, rows_of_each
from utils.data.sources.corpus import Corpus, Share
from utils.data.sources.streaming import ExampleStream, first_examples, held_out_examples, held_out_share
from utils.errors import InputError, counted

NOT_COUNTED = "training rows are read while training (--streaming): null where their number is not known"


@dataclass(frozen=True)
class StreamedRows:
    """Training rows, whose number is not known; see `utils.data.batches.stream_loader`.

    Attributes:
        description, key, report: as those of `TokenDataset`. The key holds a digest of parts of each file, not of all
            of it.
        capacity: tokens of a row that several examples are packed into; 0: one row for each example.
        groups: None, since the pairs of a prompt are not looked for in a stream.
    """

    corpus: Corpus
    encoder: ExampleEncoder
    description: str
    key: str
    report: dict[str, Any] = field(default_factory=dict)
    capacity: int = 0
    groups = None

    def packed(self, capacity: int) -> "StreamedRows":
        """Several examples in each row of `capacity` tokens."""
        return replace(self, capacity=capacity)

    def examples(self, seed: int) -> ExampleStream:
        """The examples from which the rows are made, in an order by `seed`."""
        return ExampleStream(self.corpus, seed, keeps_columns=self.corpus.purpose in KEEPS_COLUMNS)

    def tokenised(self, examples: Sequence[Example]) -> list[list[TokenRow]]:
        """The rows of each example: usually one, none where nothing is left, several of a long text."""
        return _tokenised(self.corpus, self.encoder, examples)

    def refusal(self) -> InputError:
        """For an epoch of which no row is left."""
        corpus = self.corpus
        filters = [f"--{name} {value}" for name, value in corpus.filters.active().items()]
        causes = " or ".join([f"{corpus.length_flag} {corpus.max_len}", *filters])
        return InputError(
            f"{_names(corpus)}: no training row is left of a whole epoch: {causes} leaves out all of them; "
            "give more data, or data that this step can use"
        )


def stream_datasets(corpus: Corpus, encoder: ExampleEncoder) -> tuple[StreamedRows, TokenDataset]:
    """The training rows of a corpus that is streamed, and its held-out rows; for `build_datasets`.

    Raises:
        InputError: there is no held-out row, or one cannot be read, or one of the first training rows is no good
            (`audit`).
    """
    key = key_of({"stream": [corpus.shuffle_buffer, corpus.held_out_rows]} | content_of(corpus, encoder))
    tallies = [Tally() for _ in corpus.shares]
    examples = held_out_examples(corpus)
    made = zip(examples, _tokenised(corpus, encoder, examples, tallies), strict=True)
    located = [(example.source, row) for example, own in made for row in own][: corpus.held_out_rows]
    rows = list(counted_rows(located, "eval", tallies))
    if not rows:
        raise InputError(
            f"{_names(corpus)}: no held-out row is left of {len(examples)} ({listed(_left_out(tallies))}); "
            "give more data, or data that this step can use"
        )
    first = _as_written(corpus, first_examples(corpus, AUDITED))
    audited = audit(corpus.purpose, encoder, first, [], corpus.max_len, corpus.filters)
    lines = [*(_line(share, corpus) for share in corpus.shares), _about_rows(corpus, len(rows), tallies), audited]
    description = "\n".join(filter(None, lines))
    report = _data_report(corpus, len(rows), tallies, description)
    schema = row_schema(corpus.purpose, corpus.train_on, corpus.pairs)
    held_out = TokenDataset(rows_in_memory(schema, rows), description, key)
    return StreamedRows(corpus, encoder, description, key, report), held_out


def _line(share: Share, corpus: Corpus) -> str:
    """The line about a source in the log."""
    text = f"{share.source.label}: streamed"
    if drawn := held_out_share(corpus):
        text += f", {drawn:.0%} of the prompts held out"
    if sum(share.weights) != share.weights[share.part]:
        text += f"; --data_split {corpus.data_split} draws {_share_of_step(share):.0%} of the prompts for this step"
    if share.blend_weight is not None:
        text += f"; weight {share.blend_weight:g}"
    return text + share.source.remark


def _about_rows(corpus: Corpus, held_out: int, tallies: Sequence[Tally]) -> str:
    text = f"{corpus.shuffle_buffer} training rows at a time in random order; {counted(held_out, 'held-out row')}"
    filtered, cut, form = (total(getattr(tally, kind) for tally in tallies) for kind in ("filtered", "cut", "form"))
    remarks = {"left out by filters": filtered, f"to fit {corpus.max_len} tokens": cut, "form": form}
    return text + "".join(f"; {name}: {listed(why)}" for name, why in remarks.items() if any(why.values()))


def _data_report(corpus: Corpus, held_out: int, tallies: Sequence[Tally], description: str) -> dict[str, Any]:
    """What `data_report.json` says: what the flags say, and the counts of the held-out rows."""
    sources = []
    for share, tally in zip(corpus.shares, tallies, strict=True):
        known = {"source": share.source.label, "rows": None, "share_of_this_step": _share_of_step(share)}
        known |= {"weight": share.blend_weight} if share.blend_weight is not None else {}
        sources.append(known | tally.report() | {"training_rows": None})
    report = {"purpose": corpus.purpose, "longest_row": corpus.max_len, "filters": corpus.filters.active()}
    report |= {"note": NOT_COUNTED, "shuffle_buffer": corpus.shuffle_buffer, "training_rows": None}
    report |= {"held_out_rows": held_out, "held_out_share": held_out_share(corpus), "tokens": tokens_report(tallies)}
    return report | {"sources": sources, "summary": description.splitlines()}


def _share_of_step(share: Share) -> float:
    return share.weights[share.part] / sum(share.weights)


def _left_out(tallies: Sequence[Tally]) -> Counter[str]:
    return total(counter for tally in tallies for counter in (tally.filtered, tally.cut, tally.form))


def _names(corpus: Corpus) -> str:
    return ", ".join(share.source.label for share in corpus.shares)


def _as_written(corpus: Corpus, examples: Sequence[Example]) -> list[Example]:
    """The examples as they are after the files of prepared rows."""
    keeps = corpus.purpose in KEEPS_COLUMNS
    return [as_written(example, corpus.purpose) for example in examples] if keeps else list(examples)


def _tokenised(
    corpus: Corpus, encoder: ExampleEncoder, examples: Sequence[Example], tallies: Tallies | None = None
) -> list[list[TokenRow]]:
    batch = _as_written(corpus, examples)
    return rows_of_each(corpus.purpose, encoder, batch, corpus.max_len, corpus.filters, tallies)
