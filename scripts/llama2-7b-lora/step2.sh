#!/usr/bin/env bash
# Step 2 for LLaMA-2 7B with LoRA: a reward model on one GPU of 40 GB or more.
# The scalar head trains in full, at --learning_rate.
#
#   bash scripts/llama2-7b-lora/step2.sh [further flags, which win over those below]
#
# Paths in flags are relative to the repository. The model goes to $OUTPUT, what the run prints is added to $OUTPUT.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

OUTPUT=${OUTPUT:-output/llama2-7b-lora/step2}
mkdir -p "$(dirname "$OUTPUT")"

deepspeed --num_gpus 1 training/step2_reward_model_finetuning/main.py \
  --model_name_or_path meta-llama/Llama-2-7b-hf \
  --data_path Dahoas/rm-static \
  --data_split 2,4,4 \
  --max_seq_len 512 \
  --per_device_train_batch_size 4 \
  --per_device_eval_batch_size 4 \
  --gradient_accumulation_steps 8 \
  --learning_rate 1e-4 \
  --num_train_epochs 1 \
  --num_warmup_steps 20 \
  --eval_interval 500 \
  --lora_dim 64 \
  --only_optimize_lora \
  --lora_learning_rate 2e-4 \
  --gradient_checkpointing \
  --zero_stage 0 \
  --output_dir "$OUTPUT" \
  "$@" 2>&1 | (trap '' INT TERM; exec tee -a "$OUTPUT.log") # tee outlives Ctrl-C: a run that saves prints meanwhile
