"""How often a response depends on the other rows of its batch, and how near a tie the choice was each time.

    python -m scripts.benchmarks.independence                     # the 15 M model, bf16
    python -m scripts.benchmarks.independence --dtype fp32        # every count should be 0 on a CPU
    python -m scripts.benchmarks.independence --model_path /models/llama2-7b   # trained weights, on a GPU

A row's tokens depend on the seed, its prompt and the weights alone, except that in batches of another shape sums may be
rounded differently, which can flip a choice that was nearly a tie. Each row is decoded once in a full batch and again
in other batches, and compared up to the first token that differs; later tokens differ for that reason alone.

How near a tie a choice was is measured with fp32 arithmetic on the same weights and context. Greedy: the difference of
both tokens' logits, in nats. Sampling: a token is chosen by where a random number falls in the cumulative distribution;
the measure is how far, in probability, that number lies outside the interval of the token that it should not have hit.
"""

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import transformers

from scripts.benchmarks.report import Report, ReportArguments
from scripts.benchmarks.workload import Size, llama_config
from utils.arguments import flag, run
from utils.generation.batching import decode
from utils.generation.decoder import LlamaDecoder
from utils.generation.responses import Ends
from utils.generation.sampling import SamplingParams, row_keys, uniform
from utils.parallel import distributed
from utils.parallel.zero import TORCH_DTYPES

SEED = 0
SHORTEST = 16  # tokens of a prompt


@dataclass(kw_only=True)
class Config(ReportArguments):
    """Independence of the batch."""

    repeats: int = 1
    model: Size = flag("15M", "size of the LLaMA, whose weights are random")
    model_path: str | None = flag(None, "folder of a LLaMA to load instead")
    dtype: Literal["bf16", "fp16", "fp32"] = flag("bf16", "number format of the weights")
    batch: int = flag(16, "rows that decode together, at most", at_least=4)
    rows: int = flag(32, "prompts of different length", at_least=4)
    prompt: int = flag(128, "tokens of the longest prompt", at_least=SHORTEST)
    answer: int = flag(64, "tokens of an answer", at_least=1)


@dataclass(frozen=True)
class Comparison:
    """Answers decoded in another batch against those of the full batch.

    Attributes:
        rows, differing: how many there are, and how many of them differ anywhere.
        compared: tokens up to and including each row's first difference.
        ties: how near a tie each first difference was.
    """

    rows: int
    differing: int
    compared: int
    ties: tuple[float, ...]


def tie(model: torch.nn.Module, context: list[int], tokens: tuple[int, int], quantile: float | None) -> float:
    """How near the choice between two tokens after `context` was to a tie.

    Args:
        model: computes in fp32.
        quantile: the random number in [0, 1) that chose by sampling; None for greedy.
    """
    with torch.no_grad():
        logits = model(torch.tensor([context], device=model.device)).logits[0, -1].double()
    if quantile is None:
        return (logits[tokens[0]] - logits[tokens[1]]).abs().item()
    upper = logits.softmax(-1).cumsum(-1).tolist()
    return max(max((upper[token - 1] if token else 0.0) - quantile, quantile - upper[token], 0.0) for token in tokens)


def compare(
    model: torch.nn.Module,
    prompts: Sequence[list[int]],
    expected: Mapping[int, list[int]],
    found: Mapping[int, list[int]],
    keys: torch.Tensor | None,
) -> Comparison:
    """Find the first difference of each row in `found`; `keys` are all rows' random streams, None if greedy."""
    compared, ties = 0, []
    for row, other in found.items():
        one = expected[row]
        place = next((place for place, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), None)
        compared += len(one) if place is None else place + 1
        if place is not None:
            quantile = None if keys is None else uniform(keys[row], torch.tensor(place)).item()
            ties.append(tie(model, prompts[row] + one[:place], (one[place], other[place]), quantile))
    return Comparison(len(found), len(ties), compared, tuple(ties))


def main(config: Config) -> None:
    """Decode in different batches, print the table and append it to the results."""
    distributed.init_distributed()
    torch.manual_seed(SEED)
    dtype = TORCH_DTYPES[config.dtype]
    with torch.device(distributed.device()):
        if config.model_path:
            model = transformers.AutoModelForCausalLM.from_pretrained(config.model_path, dtype=dtype)
        else:
            shape = llama_config(config.model, config.prompt + config.answer)
            model = transformers.AutoModelForCausalLM.from_config(shape, dtype=dtype)
    model = model.to(distributed.device()).eval()
    exact = copy.deepcopy(model).float()
    words = model.config.vocab_size
    chosen = random.Random(SEED)
    lengths = [chosen.randint(SHORTEST, config.prompt) for _ in range(config.rows)]
    prompts = [[chosen.randrange(3, words) for _ in range(length)] for length in lengths]
    decoder = LlamaDecoder(keep_copies=True)
    decoder.load(model)

    def answers(rows: Sequence[int], greedy: bool, slots: int, buckets: bool = False) -> dict[int, list[int]]:
        sampling = SamplingParams(max_new_tokens=config.answer, greedy=greedy)
        found = decode(
            decoder,
            [prompts[row] for row in rows],
            sampling,
            Ends(words, 0),
            seed=SEED,
            slots=slots,
            keys=row_keys(SEED, rows),
            buckets=buckets,
        ).tokens.tolist()
        return dict(zip(rows, found))

    all_rows = range(config.rows)
    batches = {
        f"{config.batch} at a time, again": lambda greedy: answers(all_rows, greedy, config.batch),
        f"{config.batch} at a time, every third row": lambda greedy: answers(all_rows[::3], greedy, config.batch),
        f"{config.batch // 4} at a time": lambda greedy: answers(all_rows, greedy, config.batch // 4),
        "each alone": lambda greedy: answers(all_rows, greedy, 1),
        "rounded up to buckets": lambda greedy: answers(all_rows, greedy, config.batch, buckets=True),
    }
    what = config.model_path or f"{config.model}, random weights"
    report = Report(
        f"{what}, {config.dtype}, {config.rows} prompts of {SHORTEST} to {config.prompt} tokens, {config.answer} new "
        f"tokens each, {torch.get_num_threads()} threads"
    )
    for greedy, unit in ((True, "nats"), (False, "probability")):
        keys = None if greedy else row_keys(SEED, all_rows)
        expected = answers(all_rows, greedy, config.batch)
        table = []
        for name, decoded in batches.items():
            found = compare(exact, prompts, expected, decoded(greedy), keys)
            share = found.differing / found.compared
            widest = f"{max(found.ties):.2g}" if found.ties else "-"
            table.append((name, f"{found.differing} of {found.rows}", f"{share:.3%}", widest))
        header = ("batch", "rows that differ", "share of tokens", f"widest tie, {unit}")
        report.table("Greedy" if greedy else "Sampling", table, header)
    report.remark("Share of tokens: near-ties that were flipped, of the tokens compared.")
    report.close(config.results)


if __name__ == "__main__":
    run(main, Config)
