"""Step 2: the reward model. A language model with a scalar head learns which of two responses people prefer.

The loss is -log sigmoid(chosen - rejected) on the scores at the last response tokens (`--reward_loss last_token`), in
fp32, averaged over the pairs of an optimiser step. Mean and standard deviation of the scores of held-out chosen
responses are stored with the model: step 3 normalises its rewards with them.

    one GPU     python training/step2_reward_model_finetuning/main.py \\
                    --model_name_or_path output/sft --data_path pairs.jsonl --output_dir output/reward
    eight GPUs  deepspeed --num_gpus 8 training/step2_reward_model_finetuning/main.py \\
                    --model_name_or_path output/sft --data_path pairs.jsonl --output_dir output/reward --zero_stage 3
"""

from utils.arguments import RewardModelConfig as Config
from utils.arguments import parse_first, run

if __name__ == "__main__":
    CONFIG = parse_first(Config, __doc__)  # --help and mistyped flags are handled before the slow imports

import functools
import itertools
import time

import torch

from utils.algorithms.reward_losses import Pairs, total_loss
from utils.arguments.choices import PAIRWISE_LOSSES
from utils.checkpoints import Checkpoints
from utils.data import Corpus, accumulation_groups, build_dataloader, build_datasets, collate_preference, micro_batches
from utils.data.batches.sizes import pair_tokens, rows_drawn
from utils.models.checks import check_models, load_matching_tokenizer
from utils.models.engine import build_engine
from utils.models.pair_scores import CHOSEN_LONGER, CHOSEN_SHORTER, PairScores, source_accuracies
from utils.models.saving import save_model
from utils.models.scalar_head import store_score_scale
from utils.parallel import distributed
from utils.parallel.divergence import DivergenceGuard
from utils.parallel.updates import optimizer_step
from utils.preflight import dry_run
from utils.runs.best import save_if_best
from utils.runs.opening import announce
from utils.runs.plan import Models, Plan, passes_over_rows
from utils.runs.session import check_run, log_data, open_metrics, save_summary, start_run

PANELS = {
    "loss per pair": ["train/loss", "eval/loss"],
    "accuracy": ["train/accuracy", "eval/accuracy"],
    "margin: chosen - rejected": ["train/margin", "eval/margin"],
    "scores on held-out rows": ["eval/chosen_mean", "eval/rejected_mean"],
    "length bias": [CHOSEN_SHORTER, CHOSEN_LONGER],
    "calibration error": ["eval/calibration_error"],
}


def plan_of(config: Config, models: Models, rows: int | None, world_size: int) -> Plan:
    """The plan of a run on so many training pairs (prompts with `--pairs all`) and processes."""
    steps = passes_over_rows(config, rows, world_size)
    return Plan(
        title="step 2: reward model",
        config=config,
        models=models,
        length=steps,
        optimizer_steps={"model": steps},
        evaluation_rows=config.per_device_eval_batch_size,
    )


def score_pairs(engine, batch, loss_of) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted losses, chosen and rejected scores of B pairs, each (B,) fp32, from 2B rows with the chosen ones first.

    Pairs that only fill up a batch (`row_mask` false) are left out.
    """
    pairs = Pairs.of(engine(batch["input_ids"], batch["attention_mask"], prompt_lengths=batch["prompt_lengths"]), batch)
    chosen_scores, rejected_scores = pairs.scores
    losses = loss_of(pairs) * batch["weight"]
    return losses[pairs.row_mask], chosen_scores[pairs.row_mask], rejected_scores[pairs.row_mask]


@torch.no_grad()
def evaluate(engine, loader, loss_of, sources, batches: int | None = None) -> dict[str, float]:
    """The metrics of `PairScores` over held-out pairs of all ranks; `sources` are the names of their data sets."""
    engine.eval()
    scores = PairScores(sources)
    count = min(batches or len(loader), len(loader))
    for batch in distributed.wait("held-out pairs, batches", count).over(itertools.islice(loader, batches)):
        batch = distributed.to_device(batch)
        scores.add(*score_pairs(engine, batch, loss_of), batch)
    engine.train()
    return scores.metrics()


def main(config: Config) -> dict[str, float]:
    """Run step 2 and return its summary."""
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
    collate = functools.partial(collate_preference, pad_id=tokenizer.pad_token_id)
    size, groups = config.micro_batch_rows, train_rows.groups  # with groups, the size of a batch counts prompts
    train_loader = build_dataloader(train_rows, list, size, shuffle=True, seed=config.seed, groups=groups)
    eval_size = config.per_device_eval_batch_size
    eval_loader = build_dataloader(eval_rows, collate, eval_size, shuffle=False, seed=config.seed)

    if config.dry_run:
        return dry_run(plan_of, config, models, tokenizer, train_rows)

    # 3. Model
    plan = plan_of(config, models, rows_drawn(train_rows), distributed.world_size())
    announce(plan)
    checkpoints = Checkpoints(config, total_steps=plan.length, data_keys=[eval_rows.key])
    engine = build_engine(plan.roles["model"], tokenizer, config, total_steps=plan.length)
    loss_of = functools.partial(total_loss, PAIRWISE_LOSSES[config.reward_loss].load(), **config.loss_options)

    def save(evaluated, folder) -> None:
        store_score_scale(engine.module.model.config, evaluated["eval/chosen_mean"], evaluated["eval/chosen_std"])
        save_model(engine.module.model, tokenizer, folder, save_adapter=config.save_adapter)

    # 4. Train, from the beginning or from a checkpoint
    guard = DivergenceGuard(config.on_nan, config.output_dir)
    state = checkpoints.resume({"model": engine}, rows=train_loader)
    with open_metrics(plan, state, data_report) as writer, checkpoints:
        if state.step == 0:
            state.before = evaluate(engine, eval_loader, loss_of, corpus.names)
            writer.log(0, state.before)
        step, started = state.step, time.perf_counter() - state.seconds
        groups = accumulation_groups(train_loader, config.gradient_accumulation_steps, step, plan.length)
        for step, epoch, rows in groups:
            step_started = time.perf_counter()
            parts = micro_batches(rows, config.max_tokens_per_batch, pair_tokens, size)
            batches = [distributed.to_device(collate(part)) for part in parts]
            pairs = distributed.all_reduce_scalar(sum(int(batch["row_mask"].sum()) for batch in batches))
            weight = distributed.all_reduce_scalar(sum(float(batch["weight"].sum()) for batch in batches))
            margins = []

            def loss_function(batch, margins=margins, weight=weight):
                losses, chosen, rejected = score_pairs(engine, batch, loss_of)
                margins.append((chosen - rejected).detach())
                return losses.sum() / weight

            learning_rate = engine.get_lr()[0]  # before the step, which advances the schedule
            loss, norm = optimizer_step(engine, batches, loss_function, what=f"step {step}", guard=guard)
            margin = torch.cat(margins)
            sums = distributed.all_reduce_dict({"margin": margin.sum(), "correct": (margin > 0).sum()})
            metrics = {
                "train/loss": loss,
                "train/accuracy": sums["correct"] / pairs,
                "train/margin": sums["margin"] / pairs,
                "train/grad_norm": norm,
                "train/learning_rate": learning_rate,
                "train/epoch": epoch + 1,
                "train/skipped_steps": engine.skipped_steps,
                "train/pairs_per_second": pairs / (time.perf_counter() - step_started),
            }
            writer.log(step, metrics, bar=["train/loss", "train/accuracy", "train/pairs_per_second"])
            if config.eval_interval and step % config.eval_interval == 0 and step < plan.length:
                batches = None if config.keep_best else config.eval_iters
                evaluated = evaluate(engine, eval_loader, loss_of, corpus.names, batches)
                writer.log(step, evaluated)
                save_if_best(config, evaluated["eval/accuracy"], functools.partial(save, evaluated))
            checkpoints.step_done(state, writer, step=step, seconds=time.perf_counter() - started)
        after = evaluate(engine, eval_loader, loss_of, corpus.names)
        writer.log(step, after)
        writer.compare("held-out pairs", state.before, after)

        # 5. Save, then draw
        if config.output_dir:
            save(after, config.output_dir)
            save_if_best(config, after["eval/accuracy"], functools.partial(save, after))
        writer.plot(PANELS | {"accuracy by data set": source_accuracies(corpus.names)}, per=plan.unit)
    return save_summary(plan, state, after, steps=step)


if __name__ == "__main__":
    run(main, CONFIG)
