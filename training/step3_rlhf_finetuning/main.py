"""Step 3: PPO. The SFT model (actor) learns to write responses that the reward model scores higher.

Each iteration samples one response per prompt, rewards it with the reward model's score at its last token minus a
penalty on its distance (KL) to the SFT model, and improves actor and critic with clipped updates over a few epochs.

    one GPU     python training/step3_rlhf_finetuning/main.py --actor_model_name_or_path output/sft \\
                    --critic_model_name_or_path output/reward --data_path prompts.jsonl --output_dir output/ppo
    eight GPUs  deepspeed --num_gpus 8 training/step3_rlhf_finetuning/main.py --actor_model_name_or_path output/sft \\
                    --critic_model_name_or_path output/reward --data_path prompts.jsonl --output_dir output/ppo \\
                    --actor_zero_stage 3 --critic_zero_stage 3
"""

from utils.arguments import PpoConfig as Config
from utils.arguments import parse_first, run

if __name__ == "__main__":
    CONFIG = parse_first(Config, __doc__)  # --help and mistyped flags are handled before the slow imports

import time

from utils.checkpoints import Checkpoints
from utils.data import Corpus, build_dataloader, build_datasets
from utils.data.batches.dataloader import batches_per_epoch, numbered_batches
from utils.data.batches.sizes import rows_drawn
from utils.generation.micro_batches import plan_batches
from utils.generation.tensor_parallel import check_tensor_parallel
from utils.models.checks import check_models, load_matching_tokenizer
from utils.parallel import distributed
from utils.preflight import dry_run
from utils.rewards.shaping import build_reward
from utils.rlhf.estimators import estimate_advantages, group_numbers
from utils.rlhf.evaluation import evaluate_prompts, sampling_params, show_answers
from utils.rlhf.layouts import build_roles
from utils.rlhf.metrics import (
    ExplosionAlarm,
    PhaseClock,
    next_kl_ctl,
    rollout_metrics,
    speed_metrics,
    update_metrics,
)
from utils.rlhf.minibatches import minibatches
from utils.rlhf.scoring import score_tokens
from utils.rlhf.texts import TextBatches
from utils.rlhf.updates import update
from utils.runs.best import save_if_best
from utils.runs.opening import announce
from utils.runs.plan import Models, Plan
from utils.runs.session import check_run, log_data, open_metrics, save_summary, start_run

PANELS = {
    "score of the reward model": ["ppo/score_mean", "eval/score_mean"],
    "KL to the SFT model, nats per response": ["ppo/kl_k1", "ppo/kl_k3"],
    "reward per response": ["ppo/reward_mean"],
    "response length, tokens": ["ppo/length_mean"],
    "share of responses that ended": ["ppo/ended_fraction", "eval/ended_fraction"],
    "entropy, nats per token": ["ppo/entropy"],
    "policy loss": ["ppo/policy_loss"],
    "value loss": ["ppo/value_loss"],
    "clipped fraction": ["ppo/clip_fraction", "ppo/value_clip_fraction"],
    "explained variance": ["ppo/explained_variance"],
    "seconds": ["time/generation", "time/scoring", "time/training"],
}
BAR = ["ppo/score_mean", "ppo/kl_k1", "ppo/value_loss", "throughput/tokens_per_second"]


def plan_of(config: Config, models: Models, rows: int | None, world_size: int) -> Plan:
    """The plan of a run on so many prompts and processes."""
    rollouts = config.max_steps or None
    if rollouts is None and rows is not None:
        per_epoch = batches_per_epoch(rows, config.rollout_rows, world_size, drop_last=True)
        rollouts = per_epoch * config.num_train_epochs
    if config.enable_test_mode:
        rollouts = config.test_stop_step if rollouts is None else min(rollouts, config.test_stop_step)
    updates = config.ppo_epochs * (config.rollout_rows // config.step_rows)
    warmup = {"actor": config.critic_warmup_steps, "critic": 0}
    trained = [name for name, role in config.roles().items() if role.trains]
    return Plan(
        title="step 3: PPO",
        config=config,
        models=models,
        unit="rollout",
        length=rollouts,
        optimizer_steps={
            name: None if rollouts is None else max(rollouts - warmup[name], 0) * updates for name in trained
        },
        generates=True,
        trains_on_texts=config.unsupervised_dataset_name is not None,
        averaged="actor" if config.enable_ema else "",
    )


def main(config: Config) -> dict[str, float]:
    """Run step 3 and return its summary."""
    # 1. Refuse what cannot work, then set up
    check_run(config)
    models, corpus, texts_corpus = check_models(config), Corpus.of(config), Corpus.of_texts(config)
    check_tensor_parallel(models["actor"], config.inference_tp_size)
    for data in filter(None, (corpus, texts_corpus)):
        data.check()
    tokenizer = load_matching_tokenizer(config, models)
    start_run(config)

    # 2. Data
    prompt_rows, eval_rows = build_datasets(corpus, tokenizer)
    eval_rows = eval_rows.head(config.eval_prompts)
    data_report = log_data(prompt_rows)
    prompt_loader = build_dataloader(
        prompt_rows,
        list,
        config.rollout_rows,
        shuffle=True,
        seed=config.seed,
        drop_last=True,
        size_flags=config.rollout_flags,
    )
    eval_loader = build_dataloader(eval_rows, list, config.rollout_rows, shuffle=False, seed=config.seed)
    if config.dry_run:
        return dry_run(plan_of, config, models, tokenizer, prompt_rows)
    texts = TextBatches(config, tokenizer)

    # 3. Models
    plan = plan_of(config, models, rows_drawn(prompt_rows), distributed.world_size())
    announce(plan)
    checkpoints = Checkpoints(config, total_steps=plan.length, data_keys=[prompt_rows.key, *texts.keys])
    roles, reward = build_roles(plan, tokenizer), build_reward(config, tokenizer)

    # 4. Train, from the beginning or from a checkpoint
    frozen = [*roles.frozen, reward.source.module]
    state = checkpoints.resume(roles.trained, rows=prompt_loader, frozen=frozen, averages=roles.averages)
    texts.start_at(state.own.get("text_batches", 0))
    with open_metrics(plan, state, data_report | texts.report) as writer, checkpoints:
        if state.step == 0:
            state.before = evaluate_prompts(roles, reward, eval_loader, config)
            writer.log(0, state.before)
            state.own["kl_ctl"] = config.kl_ctl
        iteration, kl_ctl, started = state.step, state.own["kl_ctl"], time.perf_counter() - state.seconds
        alarm = ExplosionAlarm()
        for iteration, rows in numbered_batches(prompt_loader, state.step, plan.length):
            clock, prompts = PhaseClock(), [row["prompt_ids"] for row in rows]
            seed = distributed.derived_seed(config.seed, iteration)
            responses = roles.respond(prompts, sampling_params(config), seed=seed)
            clock.end_of("generation")

            batches = plan_batches(prompts, responses, config, pad_id=tokenizer.pad_token_id)
            scores = reward(rows, responses)
            samples = score_tokens(roles, batches, config)
            rollout = estimate_advantages(samples, scores, group_numbers(rows), config, kl_ctl=kl_ctl)
            metrics = rollout_metrics(rollout, reward, responses) | {"ppo/kl_ctl": kl_ctl}
            clock.end_of("scoring")

            steps, what, trains_actor = [], f"iteration {iteration}", iteration > config.critic_warmup_steps
            for minibatch in minibatches(rollout, config, seed=seed):
                text = texts.next_step()
                steps.append(update(roles, minibatch, config, what=what, train_actor=trains_actor, texts=text))
            clock.end_of("training")

            metrics |= update_metrics(steps) | speed_metrics(clock, metrics)
            metrics["ppo/skipped_steps"] = sum(engine.skipped_steps for engine in roles.trained.values())
            writer.log(iteration, metrics, bar=BAR)
            alarm.check(iteration, metrics)
            if config.print_answers and iteration % config.print_answers_interval == 0:
                writer.print(show_answers(rollout[0][0], tokenizer))
            kl_ctl = next_kl_ctl(kl_ctl, metrics, config)
            if config.eval_interval and iteration % config.eval_interval == 0 and iteration < plan.length:
                evaluated = evaluate_prompts(roles, reward, eval_loader, config)
                writer.log(iteration, evaluated)
                save_if_best(config, evaluated["eval/score_mean"], roles.save)
            state.own |= {"kl_ctl": kl_ctl, "text_batches": texts.used}
            checkpoints.step_done(state, writer, step=iteration, seconds=time.perf_counter() - started)
        after = evaluate_prompts(roles, reward, eval_loader, config)
        writer.log(iteration, after)
        writer.compare("greedy answers to held-out prompts", state.before, after)

        # 5. Save, then draw
        if config.output_dir:
            roles.save(config.output_dir)
            if after:
                save_if_best(config, after["eval/score_mean"], roles.save)
        writer.plot(PANELS, per=plan.unit)
    return save_summary(plan, state, after, iterations=iteration)


if __name__ == "__main__":
    run(main, CONFIG)
