"""The state on the device of the rows that decode together, and the answers written so far."""

import torch
import torch.distributed as dist

from utils.generation.decoder import LlamaDecoder
from utils.generation.sampling import Kinds, RowSampling, choose_tokens


class Slots:
    """State of the rows in the slots of the decoder.

    Slot i writes into row `row[i]` of the answers. A free slot is marked as done, and writes to a row that is never
    read. Each field has one number per slot; most are views of two tensors, so that slots are copied in few operations:

        row        the row of the answers that it writes to
        token      its newest token
        position   where that token stands in the sequence, prompt included
        place      where it stands in the answer
        key        of the row's random stream
        limit      tokens of its answer, at most
        minimum    tokens of its answer before EOS may be chosen
        top_k, temperature, top_p   how its tokens are drawn, see `RowSampling`
        done       its answer has ended

    Args:
        slots: rows that decode together. rows: answers that are kept. width: tokens of an answer, at most.
    """

    def __init__(self, slots: int, rows: int, width: int, device: torch.device):
        self._integers = torch.zeros(8, slots, dtype=torch.int64, device=device)
        self._numbers = torch.zeros(2, slots, dtype=torch.float64, device=device)
        self.row, self.token, self.position, self.place = self._integers[:4]
        self.key, self.limit, self.minimum, self.top_k = self._integers[4:]
        self.temperature, self.top_p = self._numbers
        self.done = torch.ones(slots, dtype=torch.bool, device=device)
        self.tokens = torch.zeros(rows + 1, width, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows + 1, width, dtype=torch.float32, device=device)
        self.free_from(0)

    @property
    def size(self) -> tuple[int, int, int]:
        """Its `slots`, `rows` and `width`."""
        return len(self.row), len(self.tokens) - 1, self.tokens.size(1)

    def enter(self, first: int, integers: list[tuple[int, ...]], numbers: list[tuple[float, ...]]) -> None:
        """Fill the slots from `first` on.

        Args:
            integers: `row, token, position, place, key, limit, minimum, top_k` of each slot. numbers: `temperature`
                and `top_p` of each.
        """
        part = slice(first, first + len(integers))
        self._integers[:, part] = torch.tensor(integers, dtype=torch.int64).t().to(self.row.device)
        self._numbers[:, part] = torch.tensor(numbers, dtype=torch.float64).t().to(self.row.device)
        self.done[part] = False

    def copy(self, sources: list[int], targets: list[int]) -> None:
        self._integers[:, targets] = self._integers[:, sources]
        self._numbers[:, targets] = self._numbers[:, sources]
        self.done[targets] = self.done[sources]

    def free_from(self, first: int) -> None:
        """Mark slot `first` and all later ones as free."""
        self._integers[:, first:] = 0
        self.row[first:] = len(self.tokens) - 1
        self.done[first:] = True

    def sampling(self, part: slice, kinds: Kinds) -> RowSampling:
        """How the tokens of the slots in `part` are drawn."""
        return RowSampling(self.temperature[part], self.top_p[part], self.top_k[part], self.minimum[part], kinds)

    def grow(self, rows: int) -> None:
        """Make room for `rows` answers, and keep what has been written."""
        kept = len(self.tokens) - 1
        free = self.row == kept
        for name in ("tokens", "logprobs"):
            written = getattr(self, name)
            larger = written.new_zeros(rows + 1, written.size(1))
            larger[:kept] = written[:kept]
            setattr(self, name, larger)
        self.row[free] = rows

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything that a decode step reads or writes."""
        return self._integers, self._numbers, self.done, self.tokens, self.logprobs


def choose(slots: Slots, part: slice, logits: torch.Tensor, kinds: Kinds, *, eos_id: int, group=None) -> None:
    """Choose and write the next token of the slots in `part`; with `group`, its ranks take the first rank's choice."""
    row, place, done = slots.row[part], slots.place[part], slots.done[part]
    chosen, logprobs = choose_tokens(logits, slots.sampling(part, kinds), slots.key[part], place, eos_id=eos_id)
    if group is not None:
        dist.broadcast(chosen, group=group, group_src=0)
    # a row that is done but still in its slot rewrites what is already there
    slots.tokens[row, place] = torch.where(done, slots.tokens[row, place], chosen)
    slots.logprobs[row, place] = torch.where(done, slots.logprobs[row, place], logprobs)
    slots.token[part] = chosen
    slots.done[part] = done | (chosen == eos_id) | (place + 1 >= slots.limit[part])


def advance(decoder: LlamaDecoder, slots: Slots, rows: int, length: int, kinds: Kinds, *, eos_id: int) -> None:
    """Decode one token in each of the first `rows` slots, on the device alone: all shapes follow from the arguments."""
    part = slice(0, rows)
    position = slots.position[part]
    logits = decoder.step(slots.token[part], position, length)
    running = ~slots.done[part]
    position.add_(running)
    slots.place[part].add_(running)
    choose(slots, part, logits, kinds, eos_id=eos_id, group=decoder.group)
