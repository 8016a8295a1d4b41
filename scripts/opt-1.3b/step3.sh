#!/usr/bin/env bash
# Step 3 for OPT-1.3B: PPO on all GPUs of this machine (40 GB each).
# Run step1.sh and step2.sh before.
#
#   bash scripts/opt-1.3b/step3.sh [further flags, which win over those below]
#
# Paths in flags are relative to the repository. The model goes to $OUTPUT, what the run prints is added to $OUTPUT.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

OUTPUT=${OUTPUT:-output/opt-1.3b/step3}
mkdir -p "$(dirname "$OUTPUT")"

deepspeed training/step3_rlhf_finetuning/main.py \
  --actor_model_name_or_path output/opt-1.3b/step1 \
  --critic_model_name_or_path output/opt-1.3b/step2 \
  --data_path Dahoas/rm-static \
  --data_split 2,4,4 \
  --max_prompt_seq_len 256 \
  --max_answer_seq_len 256 \
  --per_device_generation_batch_size 16 \
  --generation_batches 1 \
  --per_device_training_batch_size 8 \
  --ppo_epochs 2 \
  --actor_learning_rate 3e-6 \
  --critic_learning_rate 5e-6 \
  --num_warmup_steps 100 \
  --kl_ctl 0.05 \
  --actor_gradient_checkpointing \
  --actor_zero_stage 2 \
  --critic_zero_stage 2 \
  --enable_ema \
  --output_dir "$OUTPUT" \
  "$@" 2>&1 | (trap '' INT TERM; exec tee -a "$OUTPUT.log") # tee outlives Ctrl-C: a run that saves prints meanwhile
