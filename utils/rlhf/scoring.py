"""Log-probabilities and values of a rollout, in exactly the micro-batches that train."""

import torch

from utils.arguments.generation import RolloutArguments
from utils.generation.micro_batches import MicroBatch
from utils.output.progress import Wait
from utils.parallel import distributed, watchdog
from utils.rlhf.experience import Samples
from utils.rlhf.roles import Roles


@torch.no_grad()
def score_tokens(roles: Roles, batches: list[list[MicroBatch]], config: RolloutArguments) -> list[list[Samples]]:
    """Every micro-batch with its log-probabilities under actor and reference, and with the critic's values.

    The same batches train afterwards, so the first ratio of an update is 1 to the last bit.
    """
    watchdog.alive("scoring")
    with distributed.wait("log-probabilities and values, micro-batches", sum(map(len, batches))) as bar:
        return [[_score(roles, batch, config.temperature, bar) for batch in step] for step in batches]


def _score(roles: Roles, batch: MicroBatch, temperature: float, bar: Wait) -> Samples:
    samples = Samples(
        **vars(batch),
        logprobs=roles.actor.logprobs(batch, temperature=temperature)[0],
        ref_logprobs=roles.reference.logprobs(batch, temperature=temperature)[0],
        values=roles.critic.values(batch) if roles.critic else None,
    )
    bar.update()
    return samples
