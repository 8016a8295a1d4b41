"""What --streaming cannot do is refused in one line, before anything is loaded."""

import functools

import pytest

from utils.arguments import DpoConfig, PpoConfig, RewardModelConfig, SftConfig, refuse_unavailable, remarks
from utils.data import Corpus
from utils.errors import InputError

STEPS = {
    SftConfig: {"model_name_or_path": "x"},
    RewardModelConfig: {"model_name_or_path": "x"},
    DpoConfig: {"model_name_or_path": "x", "reference_logprobs": "live"},
    PpoConfig: {"actor_model_name_or_path": "x", "critic_model_name_or_path": "y"},
}
PAIRS = (RewardModelConfig, DpoConfig)


@pytest.mark.parametrize("config_class", STEPS)
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_stream_needs_the_number_of_steps(config_class, schedule):
    flags = STEPS[config_class] | {"streaming": True, "lr_scheduler_type": schedule}
    with pytest.raises(InputError, match=f"^--streaming needs --max_steps: .*{schedule}.*give --max_steps N$"):
        refuse_unavailable(config_class(**flags))
    refuse_unavailable(config_class(**flags, max_steps=9))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"loss": ["kto"]}, "^--loss kto compares each row .*leave --streaming out$"),
        ({"reference_logprobs": "precompute"}, "^--reference_logprobs precompute .*give --reference_logprobs live$"),
    ],
)
def test_direct_preference_losses_that_need_all_rows(flags, message):
    with pytest.raises(InputError, match=message):
        refuse_unavailable(DpoConfig(**(STEPS[DpoConfig] | {"streaming": True, "max_steps": 9} | flags)))


@pytest.mark.parametrize(
    ("config_classes", "flags", "message"),
    [
        (STEPS, {"deduplicate": "near"}, "^--deduplicate near compares .*leave --streaming out$"),
        (PAIRS, {"score_column": ["score:0.5"]}, "^--score_column score:0.5 compares .*leave --streaming out$"),
        (PAIRS, {"pairs": "all"}, "^--pairs all keeps .*leave --streaming out$"),
    ],
)
def test_flags_that_look_at_several_rows(config_classes, flags, message):
    for config_class in config_classes:
        with pytest.raises(InputError, match=message):
            refuse_unavailable(config_class(**STEPS[config_class], streaming=True, max_steps=9, **flags))


def test_filters_of_single_rows_work_in_a_stream():
    flags = {"max_row_tokens": 100, "drop_truncated": True, "drop_empty": True, "streaming": True, "max_steps": 9}
    for config_class, needed in STEPS.items():
        config = config_class(**needed, **flags)
        refuse_unavailable(config)
        assert set(Corpus.of(config).filters.active()) == {"max_row_tokens", "drop_truncated", "drop_empty"}


@pytest.mark.parametrize("flags", [{"loss": ["simpo"]}, {"reference_free": True}])
def test_without_a_reference_nothing_is_computed_beforehand(flags):
    refuse_unavailable(DpoConfig(model_name_or_path="x", streaming=True, max_steps=9, **flags))


def test_sources_without_a_weight_cannot_be_mixed_with_weighted_ones():
    flags = {"streaming": True, "max_steps": 9, "data_path": ["a:0.5", "b:0.5"], "sft_only_data_path": ["c"]}
    with pytest.raises(InputError, match="^--sft_only_data_path has no weight, .*leave the weights out$"):
        refuse_unavailable(SftConfig(model_name_or_path="x", **flags))


def test_the_buffer_is_for_streams():
    config = functools.partial(SftConfig, model_name_or_path="x")
    assert any("shuffle_buffer_size has no effect" in line for line in remarks(config(shuffle_buffer_size=9)))
    assert not remarks(config(shuffle_buffer_size=9, streaming=True))


def test_the_number_of_held_out_rows_is_limited():
    def limit(config_class, **flags):
        config = config_class(**STEPS[config_class], streaming=True, max_steps=9, **flags)
        return Corpus.of(config).held_out_rows

    assert limit(SftConfig) == 512 and limit(RewardModelConfig, eval_samples=7) == 7
    assert limit(PpoConfig, eval_prompts=5) == 5
    assert Corpus.of(SftConfig(model_name_or_path="x")).shuffle_buffer == 0
