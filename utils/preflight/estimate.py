"""Memory of a whole run on one process, phase by phase, and its largest moment."""

from utils.arguments.steps import StepConfig
from utils.preflight.blocks import Blocks, block
from utils.preflight.generation import GenerationMemory, answers_memory, estimate_generation
from utils.preflight.memory import Engine
from utils.preflight.phases import Estimate, Items, Machine, Moment, joined, largest_moments, total_of
from utils.preflight.roles import Role, Subject, planned_roles
from utils.preflight.saving import disk_use, host_bytes, saved_model, saving_moments
from utils.preflight.workload import evaluation_batch, training_batch
from utils.runs.plan import Plan


def estimate(config: StepConfig, subject: Subject, machine: Machine) -> Estimate:
    """The phases of a run with the flags of `config`.

    Raises:
        InputError: the flags do not fit the model, see `check_lora`.
    """
    plan = subject.plan(config, machine)
    batch = training_batch(plan, subject.rows, max_tokens=config.max_tokens_per_batch)
    roles = planned_roles(plan, subject, machine, batch)
    trained = {name: role for name, role in roles.items() if role.flags.trains}
    first, *others = trained.values()
    standing = _standing(plan, roles)
    persistent = joined(first.engine.persistent(), standing)

    moments = _loading_moments(first, others)
    if plan.evaluation_rows:
        evaluation = evaluation_batch(plan, subject.rows)
        evaluated = first.scaled(evaluation.tokens / batch.tokens)
        moments.append(Moment("evaluation", joined(persistent, evaluated.forward(evaluation.targets))))
    if plan.samples_answers:
        moments.append(
            Moment("evaluation", joined(persistent, answers_memory(config, first.engine, machine, persistent)))
        )
    generation, between = None, persistent
    if plan.generates:
        generation = estimate_generation(config, first, machine, batch, persistent)
        between = joined(persistent, generation.kept)
        moments.append(Moment("generation", generation.moment))
        moments += [Moment("scoring", joined(between, role.forward(batch.targets))) for role in roles.values()]
    else:
        frozen = [role for role in roles.values() if not role.flags.trains]
        moments += [Moment("reference", joined(persistent, role.forward(batch.targets))) for role in frozen]
    for name, role in trained.items():
        phase = f"{name} training" if len(trained) > 1 else "training"
        moments += [Moment(phase, joined(between, items)) for items in role.training(batch)]
    models = [saved_model(role, subject) for role in trained.values()]
    averaged = models[list(trained).index(plan.averaged)] if plan.averaged else None
    if config.output_dir:
        moments += [Moment("saving", joined(between, items)) for items in saving_moments(models, averaged)]
    at_once = training_batch(plan, subject.rows, max_tokens=0)  # how rows are grouped does not change their tokens
    return Estimate(
        largest_moments(moments, machine),
        at_once.tokens * at_once.per_step * machine.world_size,
        host=_host(config, roles, generation, models, standing) if machine.on_gpu else {},
        disk=disk_use(config, models, averaged),
        gathering=generation.gathering if generation else None,
    )


def _standing(plan: Plan, roles: dict[str, Role]) -> Items:
    """What persists besides the first model, by model."""
    first, *others = roles.items()
    items: Items = {}
    for name, role in others:
        if role.flags.trains:
            items[name] = total_of(role.engine.persistent())
        else:
            items[f"{name} model"] = role.engine.parameters()
    if plan.averaged:
        engine = roles[plan.averaged].engine
        shards = engine.world_size if engine.real_stage == 3 else 1
        items["moving average"] = engine.of_parameters(4 / shards, trained_only=True)
    return items


def _loading_moments(first: Role, others: list[Role]) -> list[Moment]:
    """Models that train are loaded one after the other, each while those before it are in memory."""
    moments, before = [Moment("loading", _loading(first.engine))], _new(first.engine)
    for role in others:
        moments.append(Moment("loading", joined(before, {role.flags.name: total_of(_loading(role.engine))})))
        before = joined(before, {role.flags.name: total_of(_new(role.engine))})
    return moments


def _host(
    config: StepConfig,
    roles: dict[str, Role],
    generation: GenerationMemory | None,
    models: list,
    standing: Items,
) -> dict[str, float]:
    """Bytes in the host memory of a machine with GPUs, by what puts them there."""
    host = {"offloaded": sum(role.engine.host_bytes() for role in roles.values())}
    if generation:
        host["optimiser during generation"] = generation.host
    if config.output_dir:
        host["saving"] = host_bytes(config, models, standing.get("moving average", Blocks()).total)
    return host


def _new(engine: Engine) -> Items:
    """What persists before the first optimiser step, which creates Adam's states."""
    return {name: blocks for name, blocks in engine.persistent().items() if name != "optimiser states"}


def _loading(engine: Engine) -> Items:
    """The moment in which the optimiser's buffers are created and the weights are still in two places."""
    if engine.real_stage == 3:
        gradients = min(engine.shape.trainable, 10**9) * 4 if engine.on_gpu else engine.part
        return {
            "parameters": engine.parameters() * 2,
            "fp32 master weights": block(engine.part),
            "gradients": block(gradients),
        }
    items = {"parameters": engine.of_parameters(engine.item_size)}
    if engine.real_stage:
        items["flat copy"] = block(engine.shape.trainable * engine.item_size)
        items["fp32 master weights"] = block(engine.part)
        items["gradients"] = block(engine.part)
    return items
