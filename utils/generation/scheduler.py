"""Continuous batching: requests join and leave a running batch of the decode engine, token by token.

    scheduler = Scheduler(decoder, ends, slots=32, length=1024, width=256)
    number = scheduler.add(Request(prompt, SamplingParams(max_new_tokens=64, temperature=0.7), key=7))
    while scheduler.is_busy:
        scheduler.step()                                  # admits waiting requests, and writes a token for each row
        print(scheduler.tokens(number))                   # so far
        for done in scheduler.finished():
            print(scheduler.take([done]).tokens)

The tokens of a row depend on its own request and the weights, not on the other rows.
"""

import functools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from utils.generation.decoder import CACHE_STEP, LlamaDecoder
from utils.generation.responses import Ends, Responses, finish
from utils.generation.sampling import Kinds, SamplingParams, real_numbers, whole_numbers
from utils.generation.slots import Slots, advance, choose
from utils.generation.stop_strings import StopStrings

PREFILL_TOKENS = 4096  # padded prompt tokens of one prefill pass
CHECK_INTERVAL = {"cpu": 1}  # decode steps between checks for finished rows; elsewhere 4: a check waits for the device
ROW_BUCKET, LENGTH_BUCKET = 8, 128  # in buckets, rows and cache lengths are rounded up to multiples of these


@dataclass(frozen=True)
class Request:
    """A request for one response.

    Attributes:
        prompt: token ids, at least one.
        sampling: how its tokens are drawn, and how many at most.
        key: its random stream, an int64 as `sampling.row_keys` gives; the same key, prompt and weights give the same
            tokens.
        stops: texts that end it.
    """

    prompt: Sequence[int]
    sampling: SamplingParams
    key: int = 0
    stops: StopStrings | None = None


@dataclass
class _Row:
    """The host's record of a request whose response has not been taken yet."""

    number: int
    request: Request
    identity: int  # equal for equal prompts
    row: int = -1  # of the answers, once it has been admitted
    length: int = 0  # tokens of its answer, once it has ended
    by_string: bool = False
    checked: int = 0  # tokens already found to hold no stop string
    is_cancelled: bool = False


@dataclass
class _Prompts:
    """Prompts of the requests that have not finished, numbered so that equal ones are processed once."""

    numbers: dict[tuple[int, ...], int] = field(default_factory=dict)
    uses: dict[tuple[int, ...], int] = field(default_factory=dict)
    next: int = 0

    def add(self, prompt: tuple[int, ...]) -> int:
        self.uses[prompt] = self.uses.get(prompt, 0) + 1
        if prompt not in self.numbers:
            self.numbers[prompt] = self.next
            self.next += 1
        return self.numbers[prompt]

    def remove(self, prompt: tuple[int, ...]) -> None:
        self.uses[prompt] -= 1
        if not self.uses[prompt]:
            del self.uses[prompt], self.numbers[prompt]


class Scheduler:
    """Requests in the slots of a decoder, and those that wait for one.

    Args:
        decoder: loaded with the weights to use; it must not be loaded again while there are requests.
        ends: the ids that end and pad a response.
        slots: rows that decode together, at most; the KV cache is allocated for as many.
        length: tokens of prompt and response that a slot holds. width: tokens of a response, at most.
        rows: responses that can be kept until they are taken; the memory grows when there are more.
        admit_at: free slots at which waiting requests are admitted while others run: a prefill pass of many requests
            is cheaper, one of few lets them begin sooner.
        buckets: round rows and cache lengths up, as always for CUDA graphs; the results of padding rows are unused.
    """

    def __init__(
        self,
        decoder: LlamaDecoder,
        ends: Ends,
        *,
        slots: int,
        length: int,
        width: int,
        rows: int | None = None,
        admit_at: int = 1,
        buckets: bool = False,
    ) -> None:
        self._decoder, self._ends, self._graphs = decoder, ends, decoder.graphs
        self._slots, self._length, self._width, self._admit_at = slots, length, width, admit_at
        self._buckets, self._device = buckets or self._graphs is not None, decoder.device
        decoder.allocate(self._rounded(slots, ROW_BUCKET), length)
        self._state = self._memory(rows or 2 * slots)
        self._free_rows = list(range(self._state.size[1] - 1, -1, -1))
        self._waiting: deque[_Row] = deque()
        self._active: list[_Row] = []  # by slot
        self._positions: list[int] = []  # of the newest token of each slot; too large once it has finished
        self._rows: dict[int, _Row] = {}  # by the request's number, until it is taken
        self._finished: list[int] = []
        self._prompts = _Prompts()
        self._last: tuple[int, torch.Tensor] | None = None  # the prompt admitted last, and the logits after it
        self._kinds = Kinds.of([])
        self._next = 0

    @property
    def is_busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._waiting or self._active)

    def add(self, request: Request) -> int:
        """Queue a request for a slot; returns the number that identifies it from now on.

        Raises:
            ValueError: the prompt is empty, or the request is longer than a slot.
        """
        prompt, limit = tuple(request.prompt), request.sampling.max_new_tokens
        if not prompt:
            raise ValueError("the prompt is empty")
        if len(prompt) + limit > self._length or limit > self._width:
            raise ValueError(
                f"{len(prompt)} tokens of prompt and up to {limit} of the response are more than a slot holds: "
                f"{self._length} in all, {self._width} of the response"
            )
        row = _Row(self._next, request, self._prompts.add(prompt))
        self._next += 1
        self._rows[row.number] = row
        self._waiting.append(row)
        return row.number

    @torch.no_grad()
    def step(self) -> None:
        """Remove finished rows and admit waiting requests, then write a token for every row (several on a GPU)."""
        if self._active:
            self._stop_at_strings()
        self._retire()
        if self._slots - len(self._active) >= self._admit_at or not self._active:
            self._admit()
        for _ in range(CHECK_INTERVAL.get(self._device.type, 4) if self._active else 0):
            self._advance()

    def finished(self) -> list[int]:
        """Numbers of the requests that have ended since the last call, without cancelled ones."""
        finished, self._finished = self._finished, []
        return finished

    def tokens(self, number: int) -> list[int]:
        """What has been written of a response so far; on a GPU, waits for the device."""
        row = self._rows[number]
        if row.row < 0:
            return []
        length = row.length
        if not length:
            slot = self._active.index(row)
            length = int(self._state.place[slot]) + 1
        return self._state.tokens[row.row, :length].tolist()

    def take(self, numbers: Sequence[int]) -> Responses:
        """Return the responses to requests that have finished, in this order, and forget them.

        Raises:
            ValueError: one of them has not finished.
        """
        unfinished = next((number for number in numbers if not self._rows[number].length), None)
        if unfinished is not None:
            raise ValueError(f"request {unfinished} has not finished; cancel it, or go on with step()")
        rows = [self._rows.pop(number) for number in numbers]
        taken = set(numbers)
        self._finished = [number for number in self._finished if number not in taken]
        places = [row.row for row in rows]
        lengths = torch.tensor([row.length for row in rows], dtype=torch.int64, device=self._device)
        by_string = torch.tensor([row.by_string for row in rows], dtype=torch.bool, device=self._device)
        width = max((row.length for row in rows), default=0)
        tokens, logprobs = self._state.tokens[places, :width], self._state.logprobs[places, :width]
        self._free_rows += places
        return finish(tokens, lengths, by_string, self._ends, logprobs=logprobs)

    def cancel(self, number: int) -> None:
        """Forget a request, whether it waits, runs or has finished; its slot is free from the next step on."""
        row = self._rows.pop(number)
        row.is_cancelled = True
        if row.row < 0:
            self._waiting.remove(row)
            self._prompts.remove(tuple(row.request.prompt))
        elif row.length:
            self._free_rows.append(row.row)
            self._finished = [other for other in self._finished if other != number]
        else:
            self._state.done[self._active.index(row)] = True

    def _memory(self, rows: int) -> Slots:
        """Slots for these requests; with graphs, those of the last scheduler, which grow where they are too small."""
        size = (self._rounded(self._slots, ROW_BUCKET), rows, self._width)
        if self._graphs is None:
            return Slots(*size, self._device)
        if self._graphs.memory is not None:
            size = tuple(max(sizes) for sizes in zip(self._graphs.memory.size, size, strict=True))
        if self._graphs.memory is None or self._graphs.memory.size != size:
            self._graphs.memory = Slots(*size, self._device)
        state = self._graphs.memory
        state.free_from(0)
        self._graphs.refresh((*self._decoder.tensors(), *state.tensors()))
        return state

    def _rounded(self, value: int, bucket: int) -> int:
        return -(-value // bucket) * bucket if self._buckets else value

    def _advance(self) -> None:
        rows = self._rounded(len(self._active), ROW_BUCKET)
        bucket = LENGTH_BUCKET if self._buckets else CACHE_STEP
        length = min((max(self._positions) // bucket + 1) * bucket, self._decoder.capacity)
        step = functools.partial(
            advance, self._decoder, self._state, rows, length, self._kinds, eos_id=self._ends.eos_id
        )
        if self._graphs is None:
            step()
        else:
            self._graphs.run((rows, length, self._kinds, self._ends.eos_id), step)
        self._positions = [position + 1 for position in self._positions]

    def _admit(self) -> None:
        """Fill free slots with the next requests, as many at a time as the prefill budget holds."""
        while self._waiting and len(self._active) < self._slots:
            active = len(self._active)
            source = {row.identity: slot for slot, row in enumerate(self._active)}  # by prompt, a slot that holds it
            place: dict[int, int] = {}  # by prompt, the row of `ready` that holds the logits after it
            ready: list[torch.Tensor] = []
            if self._last is not None and self._last[0] in source:
                place[self._last[0]] = 0
                ready = [self._last[1]]
            fresh: list[_Row] = []
            copies: list[_Row] = []
            width = 0
            while self._waiting and active + len(fresh) + len(copies) < self._slots:
                row = self._waiting[0]
                wider = max(width, len(row.request.prompt))
                if row.identity in place:
                    copies.append(self._waiting.popleft())
                elif not fresh or (len(fresh) + 1) * wider <= PREFILL_TOKENS:
                    source[row.identity], place[row.identity] = active + len(fresh), len(ready) + len(fresh)
                    fresh.append(self._waiting.popleft())
                    width = wider
                else:
                    break
            if fresh:
                pad_id = self._ends.pad_id
                prompts = [row.request.prompt for row in fresh]
                ids = [[*prompt, *[pad_id] * (width - len(prompt))] for prompt in prompts]
                lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
                ready.append(self._decoder.prefill(torch.tensor(ids, device=self._device), lengths, active))
            rows = fresh + copies
            if copies:
                targets = list(range(active + len(fresh), active + len(rows)))
                longest = max(len(row.request.prompt) for row in copies)
                self._decoder.copy([source[row.identity] for row in copies], targets, longest)
            self._enter(rows, torch.cat(ready), [place[row.identity] for row in rows])

    def _enter(self, rows: list[_Row], logits: torch.Tensor, places: list[int]) -> None:
        """Put `rows`, whose prompts are in the cache, into the next slots, and choose their first tokens.

        `places[i]` is the row of `logits` (p, V) that belongs to `rows[i]`.
        """
        for row in rows:
            if not self._free_rows:
                self._grow_rows()
            row.row = self._free_rows.pop()
        first = len(self._active)
        self._state.enter(first, [_integers(row) for row in rows], [real_numbers(row.request.sampling) for row in rows])
        newest = rows[-1].identity if self._waiting else None
        repeated = newest is not None and newest == self._waiting[0].identity
        self._last = (newest, logits[places[-1]][None].clone()) if repeated else None
        if places != list(range(len(logits))):
            logits = logits[places]
        self._active += rows
        self._positions += [len(row.request.prompt) for row in rows]
        self._kinds = _kinds_of(self._active)
        part = slice(first, first + len(rows))
        choose(self._state, part, logits, _kinds_of(rows), eos_id=self._ends.eos_id, group=self._decoder.group)

    def _grow_rows(self) -> None:
        """Double the number of responses that can be kept."""
        rows = self._state.size[1]
        self._state.grow(2 * rows)
        self._free_rows += range(2 * rows - 1, rows - 1, -1)
        if self._graphs is not None:
            self._graphs.refresh((*self._decoder.tensors(), *self._state.tensors()))

    def _stop_at_strings(self) -> None:
        """Mark rows whose text contains a stop string as done, and end them where it first occurs."""
        stopping = [(slot, row) for slot, row in enumerate(self._active) if row.request.stops is not None]
        if not stopping:
            return
        state, slots = self._state, [slot for slot, _ in stopping]
        lengths = (state.place[slots] + 1).tolist()
        written = state.tokens[[row.row for _, row in stopping], : max(lengths)].tolist()
        for (slot, row), tokens, length in zip(stopping, written, lengths, strict=True):
            stop = row.request.stops.first_stop(tokens[:length], row.checked)
            row.checked = length
            if stop is not None:
                state.done[slot], state.place[slot], row.by_string = True, stop - 1, True

    def _retire(self) -> None:
        """Remove finished rows and fill the gaps with the last active ones."""
        active, state = len(self._active), self._state
        done = state.done[:active].tolist()
        kept = [slot for slot in range(active) if not done[slot]]
        if len(kept) == active:
            return
        leaving = [slot for slot in range(active) if done[slot]]
        for slot, place in zip(leaving, state.place[leaving].tolist(), strict=True):
            self._leave(self._active[slot], place + 1)
        gaps = [slot for slot in leaving if slot < len(kept)]
        sources = kept[len(kept) - len(gaps) :]
        if gaps:
            self._decoder.copy(sources, gaps, min(max(self._positions) + 1, self._decoder.capacity))
            state.copy(sources, gaps)
            for source, gap in zip(sources, gaps, strict=True):
                self._active[gap], self._positions[gap] = self._active[source], self._positions[source]
        del self._active[len(kept) :], self._positions[len(kept) :]
        state.free_from(len(kept))
        self._kinds = _kinds_of(self._active)

    def _leave(self, row: _Row, length: int) -> None:
        row.length = length
        self._prompts.remove(tuple(row.request.prompt))
        if row.is_cancelled:
            self._free_rows.append(row.row)
        else:
            self._finished.append(row.number)


def _kinds_of(rows: list[_Row]) -> Kinds:
    return Kinds.of({id(row.request.sampling): row.request.sampling for row in rows}.values())  # many share an object


def _integers(row: _Row) -> tuple[int, ...]:
    """A row's numbers in the order of `Slots.enter`."""
    sampling, length = row.request.sampling, len(row.request.prompt)
    top_k, minimum = whole_numbers(sampling)
    return row.row, 0, length, 0, row.request.key, sampling.max_new_tokens, minimum, top_k
