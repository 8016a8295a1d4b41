"""The scheduler: requests that come and go while others run, each with its own parameters."""

import random

import pytest
import torch
from test_generation import ENDS, VOCABULARY, a_token_that_ends_some, make_model, prompts_of

from utils.generation.decoder import LlamaDecoder
from utils.generation.responses import Ends, Stop
from utils.generation.sampling import SamplingParams
from utils.generation.scheduler import Request, Scheduler
from utils.generation.stop_strings import StopStrings

pytestmark = pytest.mark.usefixtures("operations")
LIMIT = 12
SIZES = {"length": 20 + LIMIT, "width": LIMIT}


class LetterTokenizer:
    """Token i is the letter chr(i + 33): enough for stop strings."""

    def decode(self, tokens, **options) -> str:
        return "".join(chr(token + 33) for token in tokens)


def make_decoder(model) -> LlamaDecoder:
    decoder = LlamaDecoder()
    decoder.load(model)
    return decoder


def mixed_requests(count: int, seed: int = 0) -> list[Request]:
    """Prompts of 1 to 20 tokens, some of them equal, with parameters of every kind, alone and together."""
    chance = random.Random(seed)
    prompts = prompts_of([chance.randint(1, 20) for _ in range(count)], seed)
    requests = []
    for number in range(count):
        stops = StopStrings(LetterTokenizer(), ["".join(chr(chance.randrange(3, 97) + 33)) for _ in range(3)])
        sampling = SamplingParams(
            max_new_tokens=chance.randint(1, LIMIT),
            min_new_tokens=chance.choice([0, 0, 3]),
            temperature=chance.choice([0.3, 1.0, 1.0, 1.7]),
            top_k=chance.choice([0, 0, 5, 30]),
            top_p=chance.choice([1.0, 1.0, 0.8]),
            greedy=chance.random() < 0.2,
        )
        prompt = prompts[number - 1] if number and chance.random() < 0.2 else prompts[number]
        requests.append(Request(prompt, sampling, key=chance.getrandbits(63), stops=chance.choice([None, None, stops])))
    return requests


def result(scheduler: Scheduler, number: int) -> tuple[list[int], int, torch.Tensor]:
    taken = scheduler.take([number])
    return taken.tokens[0][taken.mask[0]].tolist(), int(taken.stopped), taken.logprobs[0]


def alone(decoder: LlamaDecoder, requests: list[Request], ends: Ends) -> list[tuple]:
    """Each request by itself."""
    scheduler = Scheduler(decoder, ends, slots=1, **SIZES)
    results = []
    for request in requests:
        number = scheduler.add(request)
        while scheduler.is_busy:
            scheduler.step()
        results.append(result(scheduler, number))
    return results


def test_requests_that_arrive_while_others_run_get_the_tokens_that_they_get_alone():
    model = make_model()
    ends = Ends(a_token_that_ends_some(model), 0)
    decoder, requests, chance = make_decoder(model), mixed_requests(200), random.Random(1)
    expected = alone(decoder, requests, ends)
    scheduler = Scheduler(decoder, ends, slots=7, **SIZES)
    waiting, order, found, most = list(enumerate(requests)), {}, {}, 0
    while waiting or scheduler.is_busy:
        for _ in range(chance.choice([0, 0, 1, 4])):
            if waiting:
                place, request = waiting.pop()
                order[scheduler.add(request)] = place
        scheduler.step()
        most = max(most, len(order) - len(found))
        for number in scheduler.finished():
            found[order[number]] = result(scheduler, number)
    assert most > 7 and len(found) == 200, "the test must let some wait"
    kinds = {stopped for _, stopped, _ in expected}
    assert kinds == {Stop.EOS, Stop.STRING, Stop.LENGTH}, "the test must see every kind of end"
    for place, (tokens, stopped, logprobs) in enumerate(expected):
        assert found[place][:2] == (tokens, stopped), requests[place]
        torch.testing.assert_close(found[place][2], logprobs, atol=1e-5, rtol=0)


def test_tokens_can_be_read_as_they_come():
    decoder = make_decoder(make_model())
    requests = [Request(prompt, SamplingParams(max_new_tokens=9), key=5) for prompt in prompts_of([4, 6])]
    scheduler = Scheduler(decoder, Ends(VOCABULARY + 1, 0), slots=1, **SIZES)
    first, second = (scheduler.add(request) for request in requests)
    assert scheduler.tokens(first) == scheduler.tokens(second) == []
    seen: list[list[int]] = []
    while not (done := scheduler.finished()):
        scheduler.step()
        seen.append(scheduler.tokens(first))
    assert done == [first]
    assert [len(tokens) for tokens in seen] == [2, 3, 4, 5, 6, 7, 8, 9, 9]  # prefill and a step, then one by one
    assert all(seen[-1][: len(tokens)] == tokens for tokens in seen)
    assert scheduler.tokens(first) == result(scheduler, first)[0]
    assert scheduler.tokens(second), "it has taken the slot in the same step"


def test_a_late_request_joins_in_the_middle_and_leaves_before_the_others():
    decoder = make_decoder(make_model())
    long, short = prompts_of([5, 3])
    scheduler = Scheduler(decoder, Ends(VOCABULARY + 1, 0), slots=2, **SIZES)
    first = scheduler.add(Request(long, SamplingParams(max_new_tokens=LIMIT)))
    for _ in range(4):
        scheduler.step()
    late = scheduler.add(Request(short, SamplingParams(max_new_tokens=2)))
    scheduler.step()
    scheduler.step()
    assert scheduler.finished() == [late] and len(scheduler.tokens(first)) == 7
    assert len(result(scheduler, late)[0]) == 2


@pytest.mark.parametrize("when", ["waiting", "running", "finished"])
def test_a_cancelled_request_leaves_the_others_alone(when):
    decoder = make_decoder(make_model())
    requests = [
        Request(prompt, SamplingParams(max_new_tokens=8), key=i) for i, prompt in enumerate(prompts_of([4] * 4))
    ]
    ends = Ends(VOCABULARY + 1, 0)
    expected = alone(decoder, requests, ends)
    scheduler = Scheduler(decoder, ends, slots=2, rows=4, **SIZES)
    numbers = [scheduler.add(request) for request in requests]
    cancelled = 3 if when == "waiting" else 0
    if when == "running":
        scheduler.step()
    while when == "finished" and len(scheduler.tokens(numbers[0])) < 8:
        scheduler.step()
    if when == "finished":
        scheduler.step()
    scheduler.cancel(numbers[cancelled])
    with pytest.raises(KeyError):
        scheduler.tokens(numbers[cancelled])
    done = []
    while scheduler.is_busy:
        scheduler.step()
        done += scheduler.finished()
    assert sorted(done) == [number for i, number in enumerate(numbers) if i != cancelled]
    for i, number in enumerate(numbers):
        if i != cancelled:
            assert result(scheduler, number)[:2] == expected[i][:2]
    again = [scheduler.add(request) for request in requests]  # all slots are free again
    while scheduler.is_busy:
        scheduler.step()
    assert [result(scheduler, number)[:2] for number in again] == [tokens[:2] for tokens in expected]
    assert scheduler._state.size[1] == 4


def test_a_cancelled_request_frees_its_slot():
    decoder = make_decoder(make_model())
    scheduler = Scheduler(decoder, Ends(VOCABULARY + 1, 0), slots=1, **SIZES)
    first, second = (scheduler.add(Request(prompt, SamplingParams(max_new_tokens=8))) for prompt in prompts_of([4, 4]))
    scheduler.step()
    assert not scheduler.tokens(second)
    scheduler.cancel(first)
    scheduler.step()
    assert scheduler.tokens(second)


def test_answers_are_kept_until_they_are_taken():
    decoder = make_decoder(make_model())
    requests, ends = mixed_requests(30, seed=3), ENDS
    expected = alone(decoder, requests, ends)
    scheduler = Scheduler(decoder, ends, slots=3, rows=2, **SIZES)
    numbers = [scheduler.add(request) for request in requests]
    while scheduler.is_busy:
        scheduler.step()
    taken = scheduler.take(numbers)
    assert [row[mask].tolist() for row, mask in zip(taken.tokens, taken.mask, strict=True)] == [
        tokens for tokens, _, _ in expected
    ]
    assert scheduler.finished() == []


def test_what_a_slot_cannot_hold_is_refused():
    scheduler = Scheduler(make_decoder(make_model()), ENDS, slots=2, length=10, width=6)
    for prompt, limit in (([], 3), ([3] * 8, 3), ([3], 7)):
        with pytest.raises(ValueError, match="empty|more than a slot holds: 10 in all, 6 of the response"):
            scheduler.add(Request(prompt, SamplingParams(max_new_tokens=limit)))
    assert not scheduler.is_busy
    number = scheduler.add(Request([3] * 4, SamplingParams(max_new_tokens=6)))
    scheduler.step()
    with pytest.raises(ValueError, match="request 0 has not finished"):
        scheduler.take([number])
    with pytest.raises(KeyError):
        scheduler.take([99])
