"""Generation speed: the decode engine against `transformers`' generate, on the same weights, in one process.

    python scripts/benchmarks/generation.py                       # the 15 M model, equal and long-tailed lengths
    python scripts/benchmarks/generation.py --model 60M --batch 32
    python scripts/benchmarks/generation.py --lora 16             # the same with LoRA: merged into copies, and beside
    python scripts/benchmarks/generation.py --model 1B --batch 64 --prompt 256 --answer 256   # on a GPU

Random weights; EOS never comes, so that each response has the length the protocol says. With `--tail`, lengths are
drawn from a long-tailed distribution (log-normal, median a quarter of `--answer`) and both sides stop at them:
`generate` runs until the longest of a batch is done, the engine refills slots. Medians of interleaved repetitions.
A repetition includes taking the weights, as each rollout does.
"""

import argparse
import functools
import platform
import statistics
import time

import torch
import transformers

from utils import distributed
from utils.models.lora import add_lora
from utils.rlhf.decoder import LlamaDecoder
from utils.rlhf.generation import decode, generate
from utils.rlhf.sampling import SamplingParams

SIZES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "toy": (128, 352, 4, 4, 4, 320),
    "15M": (288, 768, 6, 6, 6, 32_000),
    "60M": (576, 1536, 10, 9, 9, 32_000),
    "1B": (2048, 5504, 22, 32, 4, 32_000),
    "7B": (4096, 11_008, 32, 32, 32, 32_000),
}


def build(size: str, positions: int, dtype: torch.dtype) -> torch.nn.Module:
    """A random LLaMA of the given size on this process's device."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SIZES[size]
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
    )
    with torch.device(distributed.device()):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def timed(function) -> float:
    """Seconds that `function` takes, the device's work included."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    started = time.perf_counter()
    function()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="15M")
    parser.add_argument("--batch", type=int, default=16, help="rows that decode together")
    parser.add_argument("--rows", type=int, default=0, help="prompts in all; 0 = one batch (with --tail: four)")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--tail", action="store_true", help="long-tailed response lengths")
    parser.add_argument("--lora", type=int, default=0, help="rank of LoRA on all linear layers; 0 = none")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    model = build(options.model, options.prompt + options.answer, dtype)
    vocabulary = model.config.vocab_size
    rows = options.rows or options.batch * (4 if options.tail else 1)
    prompts = torch.randint(3, vocabulary, (rows, options.prompt)).tolist()
    if options.tail:
        lengths = (
            (torch.randn(rows).mul(0.8).exp() * options.answer / 4).round().clamp(1, options.answer).int().tolist()
        )
    else:
        lengths = [options.answer] * rows
    sampling = SamplingParams(max_new_tokens=options.answer)
    if options.lora:
        add_lora(model, options.lora)
        for parameter in model.parameters():  # not the rotary frequencies, a buffer
            parameter.data = parameter.data.to(dtype)
    decoder = LlamaDecoder(keep_copies=True)

    def ours(lora: str = "fused") -> None:
        decoder.load(model, lora=lora)
        decode(
            decoder, prompts, sampling, eos_id=vocabulary, pad_id=0, seed=0, slots=options.batch,
            limits=lengths if options.tail else None,
        )  # fmt: skip

    def theirs() -> None:
        for start in range(0, rows, options.batch):
            limit = max(lengths[start : start + options.batch])
            generate(
                model, prompts[start : start + options.batch], SamplingParams(max_new_tokens=limit),
                eos_id=vocabulary, pad_id=0, seed=0,
            )  # fmt: skip

    ways = {"ours": ours, "generate": theirs}
    if options.lora:
        ways["unfused"] = functools.partial(ours, "unfused")
    for function in ways.values():
        function()
    times = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, function in ways.items():
            times[name].append(timed(function))
    tokens = sum(lengths)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    print(f"{device}, {versions}")
    work = f"{rows} prompts of {options.prompt} tokens, {options.batch} at a time, {tokens} new tokens"
    print(f"{options.model}, {options.dtype}, {work}" + (f", LoRA of rank {options.lora}" if options.lora else ""))
    for name, seconds in times.items():
        median = statistics.median(seconds)
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        print(f"  {name:9s} {median:7.3f} s ({spread})  {tokens / median:9.0f} tokens/s")
    print(f"  ratio     {statistics.median(times['generate']) / statistics.median(times['ours']):.2f}")


if __name__ == "__main__":
    main()
