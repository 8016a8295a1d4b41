"""Time and memory of token log-probabilities: ours, log_softmax, and torch's chunked cross-entropy.

    python -m scripts.benchmarks.logprobs
    python -m scripts.benchmarks.logprobs --tokens 8192 --vocabulary 128256 --hidden 4096       # on a GPU

All three take hidden states and the weight of the vocabulary projection. `log_softmax` computes the logits, casts
them to fp32 and leaves the backward pass to autograd. Memory is what a pass takes beyond what is in use before it.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from scripts.benchmarks.machine import peak_memory, timed
from scripts.benchmarks.report import Report, ReportArguments, median
from utils.algorithms.logprobs import token_logprobs
from utils.arguments import flag, run
from utils.parallel import distributed

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(kw_only=True)
class Config(ReportArguments):
    """Log-probabilities."""

    repeats: int = 5
    tokens: list[int] = flag([1024, 4096], "numbers of tokens")
    vocabulary: int = flag(32_000, "words", at_least=2)
    hidden: int = flag(288, "hidden units", at_least=1)
    dtype: Literal["bf16", "fp32"] = flag("bf16", "number format of hidden states and weight")


def ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return token_logprobs(hidden, targets, weight)[0]


def log_softmax(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(F.linear(hidden, weight).float(), -1).gather(1, targets[:, None]).squeeze(1)


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


def ways() -> dict[str, Callable]:
    """The contenders that this version of torch has."""
    contenders: dict[str, Callable] = {"ours": ours, "log_softmax": log_softmax}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        contenders["linear_cross_entropy"] = linear_cross_entropy
    else:
        print(f"linear_cross_entropy is left out: torch {torch.__version__} does not chunk it; 2.13 does")
    return contenders


def measure(way: Callable, inputs: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """Milliseconds and MiB of a forward pass without gradients, and of a forward and a backward pass."""

    def forward() -> None:
        with torch.no_grad():
            way(*inputs)

    def both() -> None:
        for tensor in inputs[:2]:
            tensor.grad = None
        way(*inputs).sum().backward()

    measured = {}
    for name, function in (("forward", forward), ("forward + backward", both)):
        measured[f"{name} ms"] = 1000 * timed(function)
        measured[f"{name} MiB"] = peak_memory(function)
    return measured


def ratio(theirs: float, ours: float) -> str:
    return f"{theirs / ours:.2f}" if ours else "-"


def main(config: Config) -> None:
    """Measure every contender at every size, print a table for each size and append them to the results."""
    device = distributed.device()
    report = Report(
        f"hidden {config.hidden}, vocabulary {config.vocabulary:,}, {config.dtype}, {torch.get_num_threads()} threads; "
        f"repetitions: {config.repeats}"
    )
    torch.manual_seed(0)
    contenders = ways()
    for tokens in config.tokens:
        hidden, weight = (
            torch.randn(rows, config.hidden, device=device).mul(0.05).to(DTYPES[config.dtype]).requires_grad_()
            for rows in (tokens, config.vocabulary)
        )
        inputs = (hidden, weight, torch.randint(config.vocabulary, (tokens,), device=device))
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        for repetition in range(config.repeats + 1):
            for name, way in contenders.items():
                values = measure(way, inputs)
                if repetition:  # the first is a warm-up
                    measured[name].append(values)
        columns = list(measured["ours"][0])
        medians = {
            name: [statistics.median(row[column] for row in rows) for column in columns]
            for name, rows in measured.items()
        }
        rows = [
            (name, *(median([row[column] for row in measured[name]], 0) for column in columns)) for name in contenders
        ]
        rows += [
            (f"{name} / ours", *(ratio(*pair) for pair in zip(medians[name], medians["ours"])))
            for name in contenders
            if name != "ours"
        ]
        report.table(f"{tokens:,} tokens", rows, ("", *columns))
    report.close(config.results)


if __name__ == "__main__":
    run(main, Config)
