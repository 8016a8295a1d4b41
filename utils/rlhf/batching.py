"""Continuous batching: many responses from the decode engine, in a fixed number of slots."""

import functools

import torch
import torch.distributed as dist

from utils.rlhf.decoder import CACHE_STEP, LlamaDecoder
from utils.rlhf.responses import Generation, finished
from utils.rlhf.sampling import SamplingParams, choose_tokens, row_keys
from utils.rlhf.stop_strings import StopStrings

PREFILL_TOKENS = 4096  # padded prompt tokens of one prefill pass
CHECK_INTERVAL = {"cpu": 1}  # decode steps between two looks at which rows have finished; elsewhere 4, a look waits
ROW_BUCKET, LENGTH_BUCKET = 8, 128  # in buckets, rows and cache lengths are rounded up to multiples of these


class Slots:
    """State of the rows in the slots of the decoder, and what has been written so far.

    Slot i holds row `row[i]` of the output. A free slot is done and writes to a row of the output that nobody reads.
    """

    def __init__(self, slots: int, rows: int, width: int, device: torch.device):
        self.row, self.token, self.position, self.place, self.key, self.limit = (
            torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(6)
        )
        self.done = torch.ones(slots, dtype=torch.bool, device=device)
        self.tokens = torch.zeros(rows + 1, width, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows + 1, width, dtype=torch.float32, device=device)
        self.free_from(0)

    @property
    def size(self) -> tuple[int, int, int]:
        """The `slots`, `rows` and `width` that it was made for."""
        return len(self.row), len(self.tokens) - 1, self.tokens.size(1)

    def copy(self, sources: list[int], targets: list[int]) -> None:
        for state in (self.row, self.token, self.position, self.place, self.key, self.limit, self.done):
            state[targets] = state[sources]

    def cleared(self) -> "Slots":
        """Itself, with all slots free."""
        self.free_from(0)
        return self

    def free_from(self, first: int) -> None:
        """Mark slot `first` and those behind it as free."""
        self.row[first:] = len(self.tokens) - 1
        self.done[first:] = True
        self.position[first:] = 0
        self.place[first:] = 0

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (
            *(self.row, self.token, self.position, self.place, self.key, self.limit, self.done),
            *(self.tokens, self.logprobs),
        )


def choose(
    slots: Slots, part: slice, logits: torch.Tensor, sampling: SamplingParams, *, eos_id: int, group=None
) -> None:
    """Choose and write the next token of the slots in `part`; with `group`, its first rank's choice is everybody's."""
    row, place, done = slots.row[part], slots.place[part], slots.done[part]
    chosen, chosen_logprobs = choose_tokens(logits, sampling, slots.key[part], place, eos_id=eos_id)
    if group is not None:
        dist.broadcast(chosen, group=group, group_src=0)
    # a row that is done but still in its slot writes what stands there already
    slots.tokens[row, place] = torch.where(done, slots.tokens[row, place], chosen)
    slots.logprobs[row, place] = torch.where(done, slots.logprobs[row, place], chosen_logprobs)
    slots.token[part] = chosen
    slots.done[part] = done | (chosen == eos_id) | (place + 1 >= slots.limit[part])


def advance(
    decoder: LlamaDecoder, slots: Slots, rows: int, length: int, sampling: SamplingParams, *, eos_id: int
) -> None:
    """One more token in each of the first `rows` slots, on the device alone: all shapes follow from the arguments."""
    part = slice(0, rows)
    position = slots.position[part]
    logits = decoder.step(slots.token[part], position, length)
    running = ~slots.done[part]
    position.add_(running)
    slots.place[part].add_(running)
    choose(slots, part, logits, sampling, eos_id=eos_id, group=decoder.group)


@torch.no_grad()
def decode(
    decoder: LlamaDecoder, prompts: list[list[int]], sampling: SamplingParams, *,
    eos_id: int, pad_id: int, seed: int, slots: int, limits: list[int] | None = None,
    stops: StopStrings | None = None, keys: torch.Tensor | None = None, buckets: bool = False,
) -> Generation:  # fmt: skip
    """One response for each prompt, by continuous batching: finished rows leave, waiting prompts take their slots.

    Prompts are processed from the longest to the shortest, without their padding; equal ones (several samples of one
    prompt) are processed once, as far as they decode at the same time. What a row becomes depends on the seed, its
    prompt and how many equal prompts stand before it, not on `slots` or on the other rows.

    Args:
        decoder: loaded with the weights to use.
        prompts: token ids, at least one each; none at all is allowed.
        slots: rows that decode together, at most; the KV cache is allocated for as many.
        limits: tokens of each response, at most; without it `max_new_tokens` for all.
        stops: texts that end a response.
        keys: (B,) random streams of the rows; without them, `row_keys` of the seed and the prompts.
        buckets: round rows and cache lengths up, as is always done for CUDA graphs; padding rows compute for nothing.
    """
    if not prompts:
        empty = torch.zeros(0, 0, dtype=torch.int64, device=decoder.device)
        return finished(empty, empty.sum(1), empty.sum(1).bool(), eos_id=eos_id, pad_id=pad_id, logprobs=empty.float())
    batch = _Batch(decoder, prompts, sampling, eos_id, pad_id, slots, limits, stops, buckets)
    batch.keys = (row_keys(seed, prompts) if keys is None else keys).to(decoder.device)
    batch.run()
    state, count = batch.state, len(prompts)
    return finished(
        state.tokens[:count], batch.lengths, batch.by_string, eos_id=eos_id, pad_id=pad_id,
        logprobs=state.logprobs[:count],
    )  # fmt: skip


class _Batch:
    """One call of `decode`: which prompts wait, and what the host knows of the rows in the slots."""

    def __init__(self, decoder, prompts, sampling, eos_id, pad_id, slots, limits, stops, buckets):
        self.decoder, self.prompts, self.sampling, self.eos_id, self.pad_id = decoder, prompts, sampling, eos_id, pad_id
        self.graphs = decoder.graphs
        self.stops, self.buckets, self.device = stops, buckets or self.graphs is not None, decoder.device
        limits = limits or [sampling.max_new_tokens] * len(prompts)
        self.limits = torch.tensor(limits, device=self.device)
        first: dict[tuple[int, ...], int] = {}
        self.identity = [first.setdefault(tuple(prompt), row) for row, prompt in enumerate(prompts)]
        self.waiting = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), self.identity[row]))
        self.slots = min(slots, len(prompts))
        longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
        decoder.allocate(self._rounded(self.slots, ROW_BUCKET), longest)
        self.state = self._static_memory(max(limits))
        self.lengths = torch.zeros(len(prompts), dtype=torch.int64, device=self.device)
        self.by_string = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        self.rows: list[int] = []  # row of each active slot
        self.positions: list[int] = []  # of the newest token of each active slot, unless it has finished before
        self.checked = [0] * len(prompts)  # tokens without a stop string, of each row
        self.last: tuple[int, torch.Tensor] | None = None  # the prompt admitted last, and the logits behind it

    def run(self) -> None:
        interval = CHECK_INTERVAL.get(self.device.type, 4)
        while self.waiting or self.rows:
            if self.stops is not None and self.rows:
                self._stop_at_strings()
            self._retire()
            if self.slots - len(self.rows) >= max(1, self.slots // 8) or not self.rows:
                self._admit()
            for _ in range(interval if self.rows else 0):
                self._advance()

    def _static_memory(self, width: int) -> Slots:
        """Slots for this call; with graphs, those of the last call, which grow where they are too small."""
        size = (self._rounded(self.slots, ROW_BUCKET), len(self.prompts), width)
        if self.graphs is None:
            return Slots(*size, self.device)
        if self.graphs.memory is not None:
            size = tuple(max(sizes) for sizes in zip(self.graphs.memory.size, size, strict=True))
        if self.graphs.memory is None or self.graphs.memory.size != size:
            self.graphs.memory = Slots(*size, self.device)
        state = self.graphs.memory.cleared()
        self.graphs.refresh((*self.decoder.tensors(), *state.tensors()))
        return state

    def _rounded(self, value: int, bucket: int) -> int:
        return -(-value // bucket) * bucket if self.buckets else value

    def _advance(self) -> None:
        rows = self._rounded(len(self.rows), ROW_BUCKET)
        bucket = LENGTH_BUCKET if self.buckets else CACHE_STEP
        length = min((max(self.positions) // bucket + 1) * bucket, self.decoder.capacity)
        step = functools.partial(advance, self.decoder, self.state, rows, length, self.sampling, eos_id=self.eos_id)
        if self.graphs is None:
            step()
        else:
            self.graphs.run((rows, length, self.sampling, self.eos_id), step)
        self.positions = [position + 1 for position in self.positions]

    def _admit(self) -> None:
        """Fill free slots with the next prompts, as many at a time as the prefill budget holds."""
        while self.waiting and len(self.rows) < self.slots:
            active, prompts = len(self.rows), self.prompts
            width = len(prompts[self.waiting[0]])
            source = {self.identity[row]: slot for slot, row in enumerate(self.rows)}  # slots that hold a prompt
            place, at_hand = {}, []  # of a prompt's logits among those at hand
            if self.last is not None and self.last[0] in source:
                place[self.last[0]] = 0
                at_hand = [self.last[1]]
            fresh, copies = [], []
            while self.waiting and active + len(fresh) + len(copies) < self.slots:
                prompt = self.identity[self.waiting[0]]
                if prompt in place:
                    copies.append(self.waiting.pop(0))
                elif not fresh or (len(fresh) + 1) * width <= PREFILL_TOKENS:
                    source[prompt], place[prompt] = active + len(fresh), len(at_hand) + len(fresh)
                    fresh.append(self.waiting.pop(0))
                else:
                    break
            if fresh:
                longest = len(prompts[fresh[0]])
                ids = [prompts[row] + [self.pad_id] * (longest - len(prompts[row])) for row in fresh]
                lengths = torch.tensor([len(prompts[row]) for row in fresh], device=self.device)
                at_hand.append(self.decoder.prefill(torch.tensor(ids, device=self.device), lengths, active))
            rows = fresh + copies
            if copies:
                targets = list(range(active + len(fresh), active + len(rows)))
                self.decoder.copy([source[self.identity[row]] for row in copies], targets, width)
            self._enter(rows, torch.cat(at_hand), [place[self.identity[row]] for row in rows])

    def _enter(self, rows: list[int], logits: torch.Tensor, places: list[int]) -> None:
        """Put `rows`, whose prompts are in the cache, into the next slots, and choose their first tokens.

        `places[i]` is the row of `logits` (p, V) that belongs to `rows[i]`.
        """
        state, part = self.state, slice(len(self.rows), len(self.rows) + len(rows))
        index = torch.tensor(rows, device=self.device)
        state.row[part], state.place[part], state.done[part] = index, 0, False
        state.position[part] = torch.tensor([len(self.prompts[row]) for row in rows], device=self.device)
        state.key[part], state.limit[part] = self.keys[index], self.limits[index]
        newest = self.identity[rows[-1]] if self.waiting else None
        repeated = newest is not None and newest == self.identity[self.waiting[0]]
        self.last = (newest, logits[places[-1]][None].clone()) if repeated else None
        if places != list(range(len(logits))):
            logits = logits[places]
        choose(state, part, logits, self.sampling, eos_id=self.eos_id, group=self.decoder.group)
        self.rows += rows
        self.positions += [len(self.prompts[row]) for row in rows]

    def _stop_at_strings(self) -> None:
        """Mark rows whose text contains a stop string as done, where it first did."""
        active, state = len(self.rows), self.state
        lengths = (state.place[:active] + 1).tolist()
        written = state.tokens[self.rows, : max(lengths)].tolist()
        for slot, (row, length) in enumerate(zip(self.rows, lengths, strict=True)):
            stop = self.stops.first_stop(written[slot][:length], self.checked[row])
            self.checked[row] = length
            if stop is not None:
                state.done[slot], state.place[slot], self.by_string[row] = True, stop - 1, True

    def _retire(self) -> None:
        """Take finished rows out and close the gaps with the last active ones."""
        active, state = len(self.rows), self.state
        done = state.done[:active].tolist()
        kept = [slot for slot in range(active) if not done[slot]]
        if len(kept) == active:
            return
        leaving = [slot for slot in range(active) if done[slot]]
        self.lengths[[self.rows[slot] for slot in leaving]] = state.place[leaving] + 1
        gaps = [slot for slot in leaving if slot < len(kept)]
        sources = kept[len(kept) - len(gaps) :]
        if gaps:
            self.decoder.copy(sources, gaps, min(max(self.positions) + 1, self.decoder.capacity))
            state.copy(sources, gaps)
            for source, gap in zip(sources, gaps, strict=True):
                self.rows[gap], self.positions[gap] = self.rows[source], self.positions[source]
        del self.rows[len(kept) :], self.positions[len(kept) :]
        state.free_from(len(kept))
