import copy

import pytest

from utils.data.formats.example import Example
from utils.data.rows.tokenization import Encoder, chunk_text, fit, pack_blocks, tokenizer_fingerprint, truncate_prompt
from utils.errors import InputError

BOS, EOS = 1, 2

PROMPTS = [" Human: what is the milk ? Assistant:", "\n\nHuman: Hi\n\nAssistant:", "Q", "ends in space ", "日本語:"]
RESPONSES = [" the milk is white .", ")", ":) ok", "\n\nYes", "no space", " ", "日本語", "  two", "0", "a"]


@pytest.fixture(params=["llama_tokenizer", "tiny_tokenizer", "gpt_tokenizer"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_prompt_ids_are_those_of_the_prompt_alone(tokenizer):
    assert Encoder(tokenizer).prompts(PROMPTS) == [tokenizer(prompt).input_ids for prompt in PROMPTS]


def test_both_spans_decode_to_their_texts(tokenizer):
    encoder = Encoder(tokenizer)
    for prompt in PROMPTS:
        for response, ids in zip(RESPONSES, encoder.responses(RESPONSES), strict=True):
            prompt_ids = encoder.prompts([prompt])[0]
            assert ids[-1] == encoder.eos_id and encoder.eos_id not in ids[:-1]
            whole = tokenizer.decode(prompt_ids[len(encoder.prefix) :] + ids[:-1], clean_up_tokenization_spaces=False)
            assert whole == prompt + response


def test_spans_equal_the_whole_text_where_no_merge_straddles(tokenizer):
    prompt, response = " Human: name a city . Assistant:", " paris is a large city ."
    ((prompt_ids, response_ids),) = Encoder(tokenizer).spans([Example(prompt, response)])
    assert prompt_ids + response_ids[:-1] == tokenizer(prompt + response).input_ids


def test_a_merge_across_the_boundary_is_not_made(llama_tokenizer):
    prompt, response = " Human: smile Assistant:", ")"
    whole = llama_tokenizer.convert_ids_to_tokens(llama_tokenizer(prompt + response).input_ids)
    assert whole[-1] == ":)"  # one token over both
    ((prompt_ids, response_ids),) = Encoder(llama_tokenizer).spans([Example(prompt, response)])
    assert prompt_ids == llama_tokenizer(prompt).input_ids
    assert llama_tokenizer.convert_ids_to_tokens(response_ids) == [")", "</s>"]


def test_a_response_gets_no_dummy_space(llama_tokenizer):
    (ids,) = Encoder(llama_tokenizer).responses([" Hello"])
    assert llama_tokenizer.convert_ids_to_tokens(ids) == ["▁Hello", "</s>"]


def test_eos_comes_once_and_never_from_text(llama_tokenizer):
    encoder = Encoder(llama_tokenizer)
    plain, marked, twice, inside = encoder.responses([" Yes", " Yes</s>", " Yes</s> </s>\n", " a</s> b"])
    assert plain == marked == [*llama_tokenizer(" Yes", add_special_tokens=False).input_ids[1:], EOS]
    assert twice[-1] == EOS and twice.count(EOS) == 1
    assert inside.count(EOS) == 1
    assert llama_tokenizer.decode(inside[:-1], clean_up_tokenization_spaces=False) == "a</s> b"  # decode strips a space
    assert encoder.texts(["Yes</s>"])[0].count(EOS) == 1
    # The tokenizer is left as it was: elsewhere special tokens are still read from text.
    assert llama_tokenizer("Yes</s>").input_ids[-1] == EOS


def test_special_tokens_in_a_prompt_count_as_such(llama_tokenizer):
    prompt = "[INST] a [/INST] b</s><s>[INST] c [/INST]"
    assert Encoder(llama_tokenizer).prompts([prompt]) == [llama_tokenizer(prompt).input_ids]


def test_what_a_tokenizer_appends_is_left_out_of_prompts(tiny_tokenizer):
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    backend = type(tiny_tokenizer.backend_tokenizer).from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    appending = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert appending("milk").input_ids[-1] == EOS
    encoder = Encoder(appending)
    assert encoder.prefix == [BOS]
    assert encoder.prompts(["milk"]) == [tiny_tokenizer("milk").input_ids]
    assert encoder.responses([" milk"])[0].count(EOS) == 1


def test_plain_text_is_all_response(llama_tokenizer, gpt_tokenizer):
    text = Example("", "Hello world")
    assert Encoder(llama_tokenizer).spans([text]) == [([BOS], [*llama_tokenizer("Hello world").input_ids[1:], EOS])]
    ((prompt, response),) = Encoder(gpt_tokenizer).spans([text])
    assert prompt == [] and response[:-1] == gpt_tokenizer("Hello world").input_ids


def test_a_tokenizer_without_eos_is_refused(tiny_tokenizer):
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(InputError, match="no EOS token"):
        Encoder(PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer))


def test_a_long_prompt_loses_its_beginning_but_keeps_bos():
    prompt = [BOS, 10, 11, 12, 13, 14]
    assert truncate_prompt(prompt, 6, 1) == prompt
    assert truncate_prompt(prompt, 4, 1) == [BOS, 12, 13, 14]
    assert truncate_prompt(prompt, 1, 1) == [BOS]
    assert truncate_prompt(prompt[1:], 3, 0) == [12, 13, 14]


@pytest.mark.parametrize(
    ("prompt", "responses", "expected"),
    [
        # fits
        ([BOS, 10, 11], [[20, EOS]], ([BOS, 10, 11], [[20, EOS]])),
        # the prompt is cut from the left
        ([BOS, 10, 11, 12, 13, 14, 15], [[20, 21, EOS]], ([BOS, 12, 13, 14, 15], [[20, 21, EOS]])),
        # down to half the length; then the response is cut and has no EOS
        ([BOS, *range(10, 20)], [[*range(20, 30), EOS]], ([BOS, 17, 18, 19], [[20, 21, 22, 23]])),
        # a short prompt leaves its room to the response
        ([BOS, 10], [[*range(20, 30), EOS]], ([BOS, 10], [[20, 21, 22, 23, 24, 25]])),
        # two responses, one prompt: the longer one decides
        (
            [BOS, 10, 11, 12, 13, 14],
            [[20, EOS], [30, 31, 32, EOS]],
            ([BOS, 12, 13, 14], [[20, EOS], [30, 31, 32, EOS]]),
        ),
    ],
)
def test_fitting_into_eight_ids(prompt, responses, expected):
    assert fit(prompt, responses, 8, 1) == expected


def test_long_text_is_cut_into_rows_that_lose_nothing():
    ids = [*range(10, 17), EOS]
    assert list(chunk_text([BOS], ids, 4)) == [([BOS], [10, 11, 12]), ([BOS], [13, 14, 15]), ([BOS], [16, EOS])]
    assert list(chunk_text([], [10, EOS], 4)) == [([], [10, EOS])]
    # A row of nothing but EOS would teach to stop immediately.
    assert list(chunk_text([BOS], [10, 11, 12, EOS], 4)) == [([BOS], [10, 11, 12])]


def test_packing_into_blocks():
    spans = [([BOS], [10, 11, EOS]), ([BOS], [20, EOS]), ([BOS], [30, EOS])]
    assert list(pack_blocks(spans, 4)) == [[BOS, 10, 11, EOS], [BOS, 20, EOS, BOS], [30, EOS]]
    assert list(pack_blocks([([], [1, 2, 3])], 2)) == [[1, 2]]  # one id alone has nothing to be predicted from


def test_the_fingerprint_follows_content_not_state(tiny_tokenizer, gpt_tokenizer):
    used = copy.deepcopy(tiny_tokenizer)  # a tokenizer keeps its padding and truncation, and the fixture is shared
    before = tokenizer_fingerprint(used)
    used(["a", "b c"], padding=True, truncation=True, max_length=1)
    assert tokenizer_fingerprint(used) == before == tokenizer_fingerprint(tiny_tokenizer)
    assert tokenizer_fingerprint(gpt_tokenizer) != before


@pytest.mark.parametrize("text", ["<s>[INST] Hi [/INST]", "<s><s> Hi"])
def test_bos_comes_once_where_the_text_brings_it(tiny_tokenizer, gpt_tokenizer, text):
    bos = tiny_tokenizer.bos_token_id
    (ids,) = Encoder(tiny_tokenizer).prompts([text])
    assert ids[0] == bos and ids.count(bos) == 1
    assert tiny_tokenizer.decode(ids, skip_special_tokens=True) == text.replace("<s>", "")
    assert Encoder(gpt_tokenizer).prompts([text])[0].count(bos) == text.count("<s>"), (
        "without BOS of its own: as written"
    )


def test_bos_comes_once_with_llamas_tokenizer(llama_tokenizer):
    (ids,) = Encoder(llama_tokenizer).prompts(["<s>[INST] Hi [/INST]"])
    assert ids.count(llama_tokenizer.bos_token_id) == 1 and ids[0] == llama_tokenizer.bos_token_id
