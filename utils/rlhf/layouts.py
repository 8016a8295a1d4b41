"""How the roles of PPO share models: decided here alone."""

from transformers import PreTrainedTokenizerBase

from utils.arguments.steps import PpoConfig
from utils.generation.hybrid_engine import HybridEngine
from utils.models.engine import build_engine, build_frozen_engine
from utils.models.scalar_head import score_scale
from utils.rlhf.ema import ExponentialMovingAverage
from utils.rlhf.roles import Critic, Policy, Roles
from utils.runs.plan import Plan


def build_roles(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> Roles:
    """Separate models for actor and critic, each trained in full or with LoRA.

    The reference is the actor with its adapters off where only these learn, otherwise a separate model.
    """
    config: PpoConfig = plan.config
    flags = config.roles()
    engines = {
        name: build_engine(role, tokenizer, config, total_steps=plan.optimizer_steps[name])
        for name, role in flags.items()
        if role.trains
    }
    actor = Policy(engines["actor"], tokenizer, saves_adapter=config.save_adapter and config.actor_lora_dim > 0)
    critic = None
    if "critic" in engines:
        scale = score_scale(engines["critic"].module.model.config) if config.normalize_scores else None
        mean, std = scale or (0.0, 1.0)
        saves_adapter = config.save_adapter and config.critic_lora_dim > 0
        critic = Critic(engines["critic"], tokenizer, mean, std, saves_adapter)
    if config.shares_reference:
        reference = Policy(actor.engine, tokenizer, uses_adapters=False)
    else:
        reference = Policy(build_frozen_engine(flags["reference"], tokenizer, config), tokenizer)
    average = ExponentialMovingAverage(actor.engine.module, config.ema_decay) if config.enable_ema else None
    return Roles(actor, reference, critic, HybridEngine(actor.engine, tokenizer, config), average)
