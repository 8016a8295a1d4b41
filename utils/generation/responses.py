"""What generation returns, and what ends a response."""

import enum
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from utils.algorithms.masking import lengths_to_mask
from utils.generation.stop_strings import StopStrings


class Stop(enum.IntEnum):
    """Why a response ended."""

    EOS = 0
    STRING = 1  # its text contains a stop string
    LENGTH = 2  # it reached the limit of tokens


@dataclass(frozen=True)
class Ends:
    """The id that ends a response, the id that pads it, and stop strings, which end a response too."""

    eos_id: int
    pad_id: int
    stops: StopStrings | None = None

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase, stop_strings: list[str] | None = None) -> "Ends":
        """The ids of a tokenizer, and the user's stop strings."""
        stops = StopStrings(tokenizer, stop_strings) if stop_strings else None
        return Ends(tokenizer.eos_token_id, tokenizer.pad_token_id, stops)


@dataclass(frozen=True, kw_only=True)
class Responses:
    """Responses to B prompts. R is the longest response of this batch, in tokens."""

    tokens: torch.Tensor  # (B, R) ids, right-padded
    mask: torch.Tensor  # (B, R) bool, true on the tokens of the response, including its EOS or stop string
    stopped: torch.Tensor  # (B,) int64, a `Stop` each
    logprobs: torch.Tensor | None = None  # (B, R) fp32 at sampling time, before top-k and top-p; None from `generate`

    @property
    def lengths(self) -> torch.Tensor:
        """(B,) tokens of each response."""
        return self.mask.sum(1)

    @property
    def ended(self) -> torch.Tensor:
        """(B,) bool: the response is complete, by EOS or by a stop string, rather than cut at the length limit."""
        return self.stopped != Stop.LENGTH

    def rows(self, part: slice) -> "Responses":
        """Some of the rows, trimmed to the longest of them."""
        mask = self.mask[part]
        width = int(mask.sum(1).max()) if len(mask) else 0
        logprobs = None if self.logprobs is None else self.logprobs[part, :width]
        return Responses(
            tokens=self.tokens[part, :width], mask=mask[:, :width], stopped=self.stopped[part], logprobs=logprobs
        )

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Each response as text, without special tokens."""
        rows = zip(self.tokens, self.mask, strict=True)
        return [tokenizer.decode(ids[mask], skip_special_tokens=True) for ids, mask in rows]


def finish(
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    by_string: torch.Tensor,
    ends: Ends,
    *,
    logprobs: torch.Tensor | None = None,
) -> Responses:
    """`Responses` from rows that may continue after their end.

    Args:
        tokens: (B, T). lengths: (B,) in 1..T. logprobs: (B, T) or None.
        by_string: (B,) bool, a stop string ended the row at its length. Otherwise EOS, its last token, or the limit
            did.
    """
    width = int(lengths.max()) if len(lengths) else 0
    mask = lengths_to_mask(lengths, width)
    last = tokens.gather(1, (lengths - 1)[:, None]).squeeze(1)
    stopped = torch.where(
        last == ends.eos_id, int(Stop.EOS), torch.where(by_string, int(Stop.STRING), int(Stop.LENGTH))
    )
    return Responses(
        tokens=tokens[:, :width].masked_fill(~mask, ends.pad_id),
        mask=mask,
        stopped=stopped,
        logprobs=None if logprobs is None else logprobs[:, :width].masked_fill(~mask, 0.0),
    )


def no_responses(device: torch.device, *, with_logprobs: bool = True) -> Responses:
    """The responses to no prompts."""
    ids = torch.zeros(0, 0, dtype=torch.int64, device=device)
    return Responses(tokens=ids, mask=ids.bool(), stopped=ids.sum(1), logprobs=ids.float() if with_logprobs else None)


def stacked(parts: list[Responses], *, pad_id: int) -> Responses:
    """The rows of several batches without log-probabilities, one after the other."""
    width = max(part.tokens.size(1) for part in parts)
    return Responses(
        tokens=torch.cat([F.pad(part.tokens, (0, width - part.tokens.size(1)), value=pad_id) for part in parts]),
        mask=torch.cat([F.pad(part.mask, (0, width - part.mask.size(1)), value=False) for part in parts]),
        stopped=torch.cat([part.stopped for part in parts]),
    )
