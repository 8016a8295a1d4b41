"""Stop strings: where a text first contains one, however it is split into tokens."""

import pytest
import torch
import transformers
from tiny_models import SIZES

import utils.generation.scheduler as scheduler
from utils.generation.batching import decode
from utils.generation.decoder import LlamaDecoder
from utils.generation.generate import generate_responses
from utils.generation.responses import Ends, Stop
from utils.generation.sampling import SamplingParams
from utils.generation.stop_strings import StopStrings

ENDS = Ends(2, 0)
SAMPLED = SamplingParams(max_new_tokens=24)
PROMPTS = [[5, 9, 11], [7] * 8, [30, 31], [5, 9, 11], [44, 5, 6, 7, 8], [60]]


@pytest.fixture
def model(tiny_tokenizer):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(SIZES["llama"](len(tiny_tokenizer))).eval()


def brute_force(tokenizer, tokens: list[int], strings: list[str]) -> int | None:
    texts = (tokenizer.decode(tokens[:length], skip_special_tokens=False) for length in range(1, len(tokens) + 1))
    return next((n for n, text in enumerate(texts, 1) if any(string in text for string in strings)), None)


def test_the_first_place_is_found_wherever_tokens_are_cut(tiny_tokenizer):
    generator = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(60):
        tokens = torch.randint(3, len(tiny_tokenizer), (60,), generator=generator).tolist()
        text = tiny_tokenizer.decode(tokens[20:50])
        start = int(torch.randint(0, len(text) - 9, (1,), generator=generator))
        for strings in ([text[start : start + 3]], [text[start : start + 9]], ["\n\nHuman:", text[start : start + 5]]):
            expected = brute_force(tiny_tokenizer, tokens, strings)
            assert StopStrings(tiny_tokenizer, strings).first_stop(tokens) == expected
            found += expected is not None
    assert found > 60
    tokens = tiny_tokenizer("well\n\nHuman: and more", add_special_tokens=False)["input_ids"]
    stop = StopStrings(tiny_tokenizer, ["\n\nHuman:"]).first_stop(tokens)
    assert tiny_tokenizer.decode(tokens[:stop]).endswith("\n\nHuman:")


def responses(found) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(found.tokens, found.mask, strict=True)]


@pytest.mark.parametrize("interval", [1, 5])  # 5: as on a GPU, rows are checked only now and then
@pytest.mark.parametrize("slots", [2, 6])
def test_a_row_stops_where_its_text_first_holds_a_stop_string(model, tiny_tokenizer, monkeypatch, slots, interval):
    monkeypatch.setattr(scheduler, "CHECK_INTERVAL", {"cpu": interval})
    decoder = LlamaDecoder()
    decoder.load(model)
    settings = {"seed": 0, "slots": slots}
    free = decode(decoder, PROMPTS, SAMPLED, ENDS, **settings)
    rows = responses(free)
    # one string from the middle of a row, one that ends exactly at the limit, and one at a row's first token
    strings = [tiny_tokenizer.decode(rows[0][6:10]), tiny_tokenizer.decode(rows[1][20:24])]
    strings += [tiny_tokenizer.decode(rows[2][:1])]
    stops = [brute_force(tiny_tokenizer, row, strings) for row in rows]
    assert stops[0] <= 10 and stops[1] == 24 and stops[2] == 1
    found = decode(decoder, PROMPTS, SAMPLED, Ends(2, 0, StopStrings(tiny_tokenizer, strings)), **settings)
    assert responses(found) == [row[:stop] for row, stop in zip(rows, stops, strict=True)]
    for row, stop, reason, ended in zip(rows, stops, found.stopped, found.ended, strict=True):
        by_eos = row[: stop or len(row)][-1] == ENDS.eos_id
        assert reason == (Stop.EOS if by_eos else Stop.LENGTH if stop is None else Stop.STRING)
        assert ended == (reason != Stop.LENGTH)
    assert found.lengths.tolist() == [stop or len(row) for row, stop in zip(rows, stops, strict=True)]


def test_transformers_generate_stops_at_the_same_places(model, tiny_tokenizer):
    greedy = SamplingParams(max_new_tokens=24, greedy=True)
    rows = responses(generate_responses(model, PROMPTS, greedy, ENDS, seed=0, slots=4))
    ends = Ends(2, 0, StopStrings(tiny_tokenizer, [tiny_tokenizer.decode(rows[0][6:10])]))
    mine = generate_responses(model, PROMPTS, greedy, ends, seed=0, slots=4, decoder=LlamaDecoder())
    theirs = generate_responses(model, PROMPTS, greedy, ends, seed=0, slots=4)
    assert responses(mine) == responses(theirs) and torch.equal(mine.stopped, theirs.stopped)
    assert (mine.stopped == Stop.STRING).any() and len(responses(mine)[0]) <= 10
