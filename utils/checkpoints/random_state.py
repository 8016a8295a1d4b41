"""The generators of random numbers of one process, as bytes and JSON."""

import json
import random

import numpy as np
import torch


def random_state() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """torch's generators (CPU and this process's device) as uint8 tensors, python's and numpy's as JSON."""
    tensors = {"torch_cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["torch_cuda"] = torch.cuda.get_rng_state()
    kind, keys, *rest = np.random.get_state()
    texts = {"python": json.dumps(random.getstate()), "numpy": json.dumps([kind, keys.tolist(), *rest])}
    return tensors, texts


def set_random_state(tensors: dict[str, torch.Tensor], texts: dict[str, str]) -> None:
    """Bring all generators to a state that `random_state` gave."""
    torch.set_rng_state(tensors["torch_cpu"])
    if "torch_cuda" in tensors:
        torch.cuda.set_rng_state(tensors["torch_cuda"])
    version, words, gauss = json.loads(texts["python"])
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = json.loads(texts["numpy"])
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
