#!/usr/bin/env bash
# Step 3 for LLaMA-2 70B with LoRA: PPO with a 13B critic on 4 machines with 8 GPUs of 80 GB each.
# In a rollout the 8 GPUs of a machine share the actor, whose weights are 140 GB in bf16.
# Run step1.sh and step2.sh before.
# HOSTFILE lists the machines, one line each such as: worker-1 slots=8. All see the repository, .venv and the output at
# the same path, and ssh works between them without a password.
#
#   bash scripts/llama2-70b/step3.sh [further flags, which win over those below]
#
# Paths in flags are relative to the repository. The model goes to $OUTPUT, what the run prints is added to $OUTPUT.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

: "${HOSTFILE:?set it to a file that lists the machines}"
OUTPUT=${OUTPUT:-output/llama2-70b/step3}
mkdir -p "$(dirname "$OUTPUT")"

deepspeed --hostfile "$HOSTFILE" training/step3_rlhf_finetuning/main.py \
  --actor_model_name_or_path output/llama2-70b/step1 \
  --critic_model_name_or_path output/llama2-70b/step2 \
  --data_path Dahoas/rm-static \
  --data_split 2,4,4 \
  --max_prompt_seq_len 256 \
  --max_answer_seq_len 256 \
  --per_device_generation_batch_size 4 \
  --generation_batches 2 \
  --per_device_training_batch_size 1 \
  --gradient_accumulation_steps 4 \
  --ppo_epochs 2 \
  --critic_learning_rate 5e-6 \
  --num_warmup_steps 20 \
  --kl_ctl 0.05 \
  --actor_lora_dim 64 \
  --only_optimize_lora \
  --actor_lora_learning_rate 2e-5 \
  --actor_gradient_checkpointing \
  --critic_gradient_checkpointing \
  --actor_zero_stage 3 \
  --critic_zero_stage 3 \
  --inference_tp_size 8 \
  --output_dir "$OUTPUT" \
  "$@" 2>&1 | (trap '' INT TERM; exec tee -a "$OUTPUT.log") # tee outlives Ctrl-C: a run that saves prints meanwhile
