"""Stop strings: texts that end a response."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase, StoppingCriteria

_MARGIN = 8  # tokens: decoding a part of a response may change its first characters


class StopStrings:
    """Finds where the text of a response first contains one of `strings`.

    The text is that of the response alone, special tokens included; a tokenizer that drops the space in front of a
    text drops it in front of the response too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]):
        self.strings = tuple(strings)
        self._tokenizer = tokenizer
        # every token stands for one byte or more, so a string ends within its last tokens or has been found before
        self._window = max(len(text.encode()) for text in self.strings) + _MARGIN

    def first_stop(self, tokens: list[int], checked: int = 0) -> int | None:
        """The smallest n above `checked` for which the text of the first n tokens contains a stop string, or None."""
        for length in range(checked + 1, len(tokens) + 1):
            if self._found(tokens[max(0, length - self._window) : length]) and self._found(tokens[:length]):
                return length
        return None

    def _found(self, tokens: list[int]) -> bool:
        text = self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(string in text for string in self.strings)


class StopStringCriteria(StoppingCriteria):
    """The same for `transformers`' generate, where the first `width` columns of each row are the prompt."""

    def __init__(self, stops: StopStrings, width: int):
        self._stops, self._width = stops, width

    def __call__(self, input_ids, scores, **kwargs):
        """(B,) bool: the newest token completes a stop string."""
        rows = input_ids[:, self._width :].tolist()
        return input_ids.new_tensor([self._stops.first_stop(row, len(row) - 1) is not None for row in rows]).bool()
