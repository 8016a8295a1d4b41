"""Generation speed: the decode engine, `transformers`' generate and its continuous batching, on the same weights.

    python -m scripts.benchmarks.generation                       # the 15 M model, answers of equal length
    python -m scripts.benchmarks.generation --tail                # long-tailed lengths
    python -m scripts.benchmarks.generation --model 60M --batch 32
    python -m scripts.benchmarks.generation --lora 16             # ours with LoRA merged into copies, and unmerged
    python -m scripts.benchmarks.generation --model 1B --batch 64 --prompt 256 --answer 256   # on a GPU

Weights are random and EOS is never sampled, so that each response has its planned length. With `--tail`, lengths are
drawn from a long-tailed distribution (log-normal, median a quarter of `--answer`) and all contenders stop at them:
`generate` runs until the longest of a batch is done, the others refill slots. All run in one process, in turn. Ours
loads the weights again each time, as in a rollout. The manager of continuous batching starts before the time is taken
and stops before the next contender's turn: its thread, even idle, slows down whatever else computes in the process.

The roofline is the least time that the machine needs: a prefill pass costs its floating-point operations at the rate
of a large matrix product, a decode step those or the reading of weights and KV cache at the memory's bandwidth,
whichever takes longer. Both are measured here. Weights that fit in a processor's cache are read faster than that.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median as middle
from typing import Literal

import torch
import transformers
from transformers import ContinuousBatchingConfig, ContinuousBatchingManager, GenerationConfig

from scripts.benchmarks.machine import bandwidth, matmul_rate, timed
from scripts.benchmarks.report import Report, ReportArguments, median
from scripts.benchmarks.workload import Size, llama_config
from utils.arguments import flag, run
from utils.generation.batching import decode
from utils.generation.decoder import LlamaDecoder, Loading
from utils.generation.fallback import generate
from utils.generation.responses import Ends
from utils.generation.sampling import SamplingParams
from utils.models.lora import add_lora
from utils.parallel import distributed

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PAGE = 32  # tokens of a page of continuous batching's cache
PREFILL_TOKENS = 4096  # in one pass, for ours and for continuous batching
PATIENCE = 120  # seconds
NO_EOS = -1


@dataclass(kw_only=True)
class Config(ReportArguments):
    """Generation."""

    repeats: int = 5
    model: Size = flag("15M", "size of the LLaMA, whose weights are random")
    batch: int = flag(16, "rows that decode together", at_least=1)
    rows: int = flag(0, "prompts in all; 0 = one batch (with --tail: four)", at_least=0)
    prompt: int = flag(128, "tokens of a prompt", at_least=1)
    answer: int = flag(64, "tokens of an answer, at most", at_least=1)
    tail: bool = flag(False, "long-tailed answer lengths")
    dtype: Literal["bf16", "fp32"] = flag("bf16", "number format of the weights")
    lora: int = flag(0, "rank of LoRA on all linear layers; 0 = none", at_least=0)


def answer_lengths(config: Config, rows: int) -> list[int]:
    """The length of each answer, in tokens."""
    if not config.tail:
        return [config.answer] * rows
    drawn = torch.randn(rows).mul(0.8).exp() * config.answer / 4
    return drawn.round().clamp(1, config.answer).int().tolist()


@contextmanager
def continuous_batching(config: Config, model: torch.nn.Module) -> Iterator[ContinuousBatchingManager]:
    """A manager of `transformers`' continuous batching, with as many slots and prefill tokens in a pass as ours."""
    pages = config.batch * math.ceil((config.prompt + config.answer) / PAGE)
    batching = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=2 * pages,
        max_batch_tokens=max(PREFILL_TOKENS, config.prompt),
        max_requests_per_batch=config.batch,
        allow_block_sharing=False,  # shared blocks would outlive a change of the weights
    )
    settings = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=config.answer, eos_token_id=NO_EOS, pad_token_id=0
    )
    with model.continuous_batching_context_manager(
        generation_config=settings, continuous_batching_config=batching
    ) as manager:
        yield manager


def contenders(
    config: Config,
    model: torch.nn.Module,
    prompts: list[list[int]],
    lengths: list[int],
) -> dict[str, Callable[[], float]]:
    """For each contender a function that answers all the prompts, each row to its length, and returns the seconds."""
    words = model.config.vocab_size
    decoder = LlamaDecoder(keep_copies=True)
    counts: list[int] = []
    plain_model = copy.deepcopy(model)  # continuous batching replaces the attention of its model

    def ours(lora: Literal["fused", "unfused"]) -> None:
        decoder.load(model, Loading(lora=lora))
        decode(
            decoder,
            prompts,
            SamplingParams(max_new_tokens=config.answer),
            Ends(words, 0),
            seed=0,
            slots=config.batch,
            limits=lengths,
        )

    def one_batch_after_another() -> None:
        for start in range(0, len(prompts), config.batch):
            part = slice(start, start + config.batch)
            sampling = SamplingParams(max_new_tokens=max(lengths[part]))
            generate(model, prompts[part], sampling, Ends(words, 0), seed=0)

    def answered(manager: ContinuousBatchingManager, limits: list[int]) -> int:
        """Answer the first prompts with the given lengths; the number of new tokens."""
        for prompt, limit in zip(prompts, limits):
            manager.add_request(prompt, max_new_tokens=limit, eos_token_id=NO_EOS)
        tokens = 0
        for _ in limits:
            result = manager.get_result(timeout=PATIENCE)
            if result is None:
                raise SystemExit(f"error: transformers' continuous batching gave no result for {PATIENCE} seconds")
            tokens += len(result.generated_tokens)
        return tokens

    def continuous() -> float:
        with continuous_batching(config, plain_model) as manager:
            answered(manager, [1])  # its cache is made for the first request
            seconds = timed(lambda: counts.append(answered(manager, lengths)))
        if counts[-1] != sum(lengths):
            raise SystemExit(f"error: transformers' continuous batching gave {counts[-1]} tokens, not {sum(lengths)}")
        return seconds

    functions = {
        "ours": lambda: timed(lambda: ours("fused")),
        "generate": lambda: timed(one_batch_after_another),
    }
    if config.lora:  # the first merges LoRA into copies, this one applies it unmerged
        return functions | {"ours, unfused": lambda: timed(lambda: ours("unfused"))}
    return functions | {"continuous batching": continuous}


def roofline(config: Config, model: torch.nn.Module, lengths: list[int]) -> tuple[float, str]:
    """The least seconds that the whole work takes on this machine, and the machine's speed in words."""
    shape, device, dtype = model.config, distributed.device(), DTYPES[config.dtype]
    bytes_per_second, operations_per_second = bandwidth(device), matmul_rate(device, dtype)
    head = shape.vocab_size * shape.hidden_size
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    # attention: 4 operations for each query unit and earlier token; for each of the latter, keys and values are read
    attention = 4 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim
    cached = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * dtype.itemsize

    rows, new_tokens = len(lengths), sum(lengths) - len(lengths)  # the prefill gives the first token of each answer
    context = sum(config.prompt + place for length in lengths for place in range(1, length))
    prefill = 2 * rows * (config.prompt * layers + head) + attention * rows * config.prompt**2 / 2
    steps = max(new_tokens / min(config.batch, rows), max(lengths) - 1)
    reading = (steps * (layers + head) * dtype.itemsize + context * cached) / bytes_per_second
    computing = (2 * new_tokens * (layers + head) + attention * context) / operations_per_second
    speed = f"{bytes_per_second / 1e9:,.0f} GB/s, {operations_per_second / 1e9:,.0f} GFLOP/s"
    return prefill / operations_per_second + max(reading, computing), speed


def main(config: Config) -> None:
    """Run the comparison, print its table and append it to the results."""
    distributed.init_distributed()
    torch.manual_seed(0)
    with torch.device(distributed.device()):
        shape = llama_config(config.model, config.prompt + config.answer)
        model = transformers.AutoModelForCausalLM.from_config(shape, dtype=DTYPES[config.dtype]).eval()
    rows = config.rows or config.batch * (4 if config.tail else 1)
    prompts = torch.randint(3, shape.vocab_size, (rows, config.prompt)).tolist()
    lengths = answer_lengths(config, rows)
    least, speed = roofline(config, model, lengths)
    if config.lora:
        add_lora(model, config.lora)
        for parameter in model.parameters():  # not the rotary frequencies, which are a buffer
            parameter.data = parameter.data.to(DTYPES[config.dtype])
    functions = contenders(config, model, prompts, lengths)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repetition in range(config.repeats + 1):
        for name, function in functions.items():
            seconds = function()
            if repetition:  # the first is a warm-up
                times[name].append(seconds)
    tokens, fastest = sum(lengths), middle(times["ours"])
    kind = "long-tailed lengths" if config.tail else "equal lengths"
    report = Report(
        f"{config.model}, {config.dtype}, {rows} prompts of {config.prompt} tokens, {config.batch} at a time, {tokens} "
        f"new tokens, {kind} up to {config.answer}, {torch.get_num_threads()} threads"
        + (f", LoRA of rank {config.lora}" if config.lora else "")
        + f"; repetitions: {config.repeats}"
    )
    table = [
        (name, median(seconds, 3), f"{tokens / middle(seconds):,.0f}", f"{middle(seconds) / fastest:.2f}")
        for name, seconds in times.items()
    ]
    table.append((f"roofline ({speed})", f"{least:.3f}", f"{tokens / least:,.0f}", f"{least / fastest:.2f}"))
    report.table("Generation", table, ("", "seconds", "tokens/s", "time / ours"))
    report.close(config.results)


if __name__ == "__main__":
    run(main, Config)
