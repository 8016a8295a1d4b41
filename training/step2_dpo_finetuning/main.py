"""Step 2 without a reward model, direct preference optimisation: a language model learns from judged answers.

The loss of a pair is -log sigmoid(beta * h), where h is by how much more the policy prefers the chosen answer than the
reference does, the model before training (`--loss sigmoid`, DPO). Many others can be chosen by name; `kto` reads single
answers with a label. The reference's log-probabilities are computed once, before the first step.

    one GPU     python training/step2_dpo_finetuning/main.py \\
                    --model_name_or_path output/sft --data_path pairs.jsonl --output_dir output/dpo --learning_rate 5e-7
    eight GPUs  deepspeed --num_gpus 8 training/step2_dpo_finetuning/main.py --learning_rate 5e-7 \\
                    --model_name_or_path output/sft --data_path pairs.jsonl --output_dir output/dpo --zero_stage 3
"""

from utils.arguments import DpoConfig as Config
from utils.arguments import parse_first, run

if __name__ == "__main__":
    CONFIG = parse_first(Config, __doc__)  # --help and mistyped flags are handled before the slow imports

import functools
import time

import torch

from utils.checkpoints import Checkpoints
from utils.data import (
    Corpus,
    accumulation_groups,
    build_dataloader,
    build_datasets,
    collate_labelled,
    collate_preference,
    micro_batches,
)
from utils.data.batches.sizes import ROW_KINDS, rows_drawn
from utils.models.checks import check_models, load_matching_tokenizer
from utils.models.engine import build_engine
from utils.models.saving import save_model
from utils.parallel import distributed
from utils.parallel.divergence import DivergenceGuard
from utils.parallel.updates import optimizer_step
from utils.preference.answers import read_answers
from utils.preference.mates import MatedRows, check_labels
from utils.preference.objective import Objective
from utils.preference.reference import Reference
from utils.preference.report import remark_on
from utils.preference.samples import Samples
from utils.preflight import dry_run
from utils.runs.best import save_if_best
from utils.runs.opening import announce
from utils.runs.plan import Models, Plan, passes_over_rows
from utils.runs.session import check_run, log_data, open_metrics, save_summary, start_run

PANELS = {
    "loss per row": ["train/loss", "eval/loss"],
    "accuracy": ["train/accuracy", "eval/accuracy"],
    "implied rewards on held-out rows": ["eval/chosen_reward", "eval/rejected_reward", "eval/margin"],
    "log-probabilities of held-out answers": ["eval/chosen_logprob", "eval/rejected_logprob"],
    "KL to the model before training": ["eval/kl"],
    "gradient norm": ["train/grad_norm"],
}


def plan_of(config: Config, models: Models, rows: int | None, world_size: int) -> Plan:
    """The plan of a run on so many training rows (prompts with `--pairs all`) and processes."""
    steps = passes_over_rows(config, rows, world_size)
    return Plan(
        title="direct preference",
        config=config,
        models=models,
        length=steps,
        optimizer_steps={"model": steps},
        evaluation_rows=config.per_device_eval_batch_size,
        samples_answers=config.num_sample_generations > 0,
    )


@torch.no_grad()
def evaluate(engine, loader, objective, reference) -> dict[str, float]:
    """Loss, accuracy, implied rewards and log-probabilities over the held-out rows of all ranks."""
    engine.eval()
    wait = distributed.wait("held-out rows, batches", len(loader))
    parts = [read_answers(engine, reference.add(distributed.to_device(batch))) for batch in wait.over(loader)]
    engine.train()
    return objective.figures(parts, prefix="eval")


def main(config: Config) -> dict[str, float]:
    """Run direct preference optimisation and return its summary."""
    # 1. Refuse what cannot work, then set up
    check_run(config)
    models, corpus = check_models(config), Corpus.of(config)
    corpus.check()
    tokenizer = load_matching_tokenizer(config, models)
    start_run(config)

    # 2. Data
    train_rows, eval_rows = build_datasets(corpus, tokenizer)
    eval_rows = eval_rows.head(config.eval_samples)
    data_report = log_data(train_rows)
    collate = collate_preference
    data_keys = [eval_rows.key]
    if config.reads_labelled:
        check_labels(train_rows, "training")
        train_rows, eval_rows = (MatedRows(rows, train_rows, config.max_seq_len) for rows in (train_rows, eval_rows))
        collate = collate_labelled
    collate = functools.partial(collate, pad_id=tokenizer.pad_token_id)

    if config.dry_run:
        return dry_run(plan_of, config, models, tokenizer, train_rows)

    # 3. Model, and what it thinks of all answers before training
    plan = plan_of(config, models, rows_drawn(train_rows), distributed.world_size())
    announce(plan)
    checkpoints = Checkpoints(config, total_steps=plan.length, data_keys=data_keys)
    engine = build_engine(plan.roles["model"], tokenizer, config, total_steps=plan.length)
    objective, samples = Objective(config), Samples.of(eval_rows, engine, tokenizer, config)
    reference = Reference(config, engine, plan.roles, tokenizer, collate)
    known_rows = reference.known(train_rows, "training")
    batch_size, groups = config.micro_batch_rows, train_rows.groups  # with groups the size counts prompts
    train_loader = build_dataloader(known_rows, list, batch_size, shuffle=True, seed=config.seed, groups=groups)
    known_rows, eval_size = reference.known(eval_rows, "held-out"), config.per_device_eval_batch_size
    eval_loader = build_dataloader(known_rows, collate, eval_size, shuffle=False, seed=config.seed)

    def save(folder) -> None:
        save_model(engine.module.model, tokenizer, folder, save_adapter=config.save_adapter)

    # 4. Train, from the beginning or from a checkpoint
    guard = DivergenceGuard(config.on_nan, config.output_dir)
    state = checkpoints.resume({"model": engine}, rows=train_loader, frozen=reference.frozen)
    with open_metrics(plan, state, data_report) as writer, checkpoints:
        if state.step == 0:
            state.own |= {"answers": samples.answer(), "shift": objective.shift}
            state.before = evaluate(engine, eval_loader, objective, reference) | samples.kl(state.own["answers"])
            writer.log(0, state.before)
        objective.shift = state.own["shift"]
        step, started = state.step, time.perf_counter() - state.seconds
        groups = accumulation_groups(train_loader, config.gradient_accumulation_steps, step, plan.length)
        for step, epoch, rows in groups:
            step_started = time.perf_counter()
            parts = micro_batches(rows, config.max_tokens_per_batch, ROW_KINDS[config.purpose].weight, batch_size)
            batches = [reference.add(distributed.to_device(collate(part))) for part in parts]
            count = distributed.all_reduce_scalar(sum(int(batch["row_mask"].sum()) for batch in batches))
            weight = distributed.all_reduce_scalar(sum(float(batch["weight"].sum()) for batch in batches))
            whole, seen = objective.look_ahead(engine, batches), []

            def loss_function(batch, whole=whole, seen=seen, weight=weight):
                answers = objective.read(engine, batch)
                seen.append(answers.detached())
                return objective.losses(answers, whole).sum() / weight

            learning_rate = engine.get_lr()[0]  # before the step, which advances the schedule
            loss, norm = optimizer_step(engine, batches, loss_function, what=f"step {step}", guard=guard)
            metrics = objective.figures(seen, whole, prefix="train") | {
                "train/loss": loss,
                "train/grad_norm": norm,
                "train/learning_rate": learning_rate,
                "train/epoch": epoch + 1,
                "train/skipped_steps": engine.skipped_steps,
                "train/rows_per_second": count / (time.perf_counter() - step_started),
            }
            writer.log(step, metrics, bar=["train/loss", "train/accuracy", "train/rows_per_second"])
            if config.print_loss:
                writer.print(f"step {step}: loss {loss:.4f}")
            if config.eval_interval and step % config.eval_interval == 0 and step < plan.length:
                evaluated = evaluate(engine, eval_loader, objective, reference) | samples.kl(state.own["answers"])
                writer.log(step, evaluated)
                save_if_best(config, evaluated["eval/accuracy"], save)
            checkpoints.step_done(state, writer, step=step, seconds=time.perf_counter() - started)
        after = evaluate(engine, eval_loader, objective, reference) | samples.kl(state.own["answers"])
        writer.log(step, after)
        for prompt, old, new in samples.texts(state.own["answers"], samples.answer()):
            writer.print(f"\n{prompt}\n  before: {old}\n  after:  {new}")
        writer.compare("held-out rows", state.before, after)
        if remark := remark_on(config, state.before, after):
            distributed.warn(remark)

        # 5. Save, then draw
        if config.output_dir:
            save(config.output_dir)
            save_if_best(config, after["eval/accuracy"], save)
        writer.plot(PANELS, per=plan.unit)
    return save_summary(plan, state, after, steps=step)


if __name__ == "__main__":
    run(main, CONFIG)
