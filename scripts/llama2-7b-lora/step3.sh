#!/usr/bin/env bash
# Step 3 for LLaMA-2 7B with LoRA: PPO on one machine with two GPUs of 80 GB or more.
# Run step1.sh and step2.sh before.
#
#   bash scripts/llama2-7b-lora/step3.sh [further flags, which win over those below]
#
# Paths in flags are relative to the repository. The model goes to $OUTPUT, what the run prints is added to $OUTPUT.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

OUTPUT=${OUTPUT:-output/llama2-7b-lora/step3}
mkdir -p "$(dirname "$OUTPUT")"

deepspeed training/step3_rlhf_finetuning/main.py \
  --actor_model_name_or_path output/llama2-7b-lora/step1 \
  --critic_model_name_or_path output/llama2-7b-lora/step2 \
  --data_path Dahoas/rm-static \
  --data_split 2,4,4 \
  --max_prompt_seq_len 256 \
  --max_answer_seq_len 256 \
  --per_device_generation_batch_size 16 \
  --generation_batches 2 \
  --per_device_training_batch_size 4 \
  --gradient_accumulation_steps 4 \
  --ppo_epochs 2 \
  --critic_learning_rate 5e-5 \
  --num_warmup_steps 20 \
  --kl_ctl 0.05 \
  --actor_lora_dim 64 \
  --critic_lora_dim 64 \
  --only_optimize_lora \
  --actor_lora_learning_rate 5e-5 \
  --critic_lora_learning_rate 1e-4 \
  --actor_gradient_checkpointing \
  --critic_gradient_checkpointing \
  --actor_zero_stage 3 \
  --critic_zero_stage 3 \
  --output_dir "$OUTPUT" \
  "$@" 2>&1 | (trap '' INT TERM; exec tee -a "$OUTPUT.log") # tee outlives Ctrl-C: a run that saves prints meanwhile
