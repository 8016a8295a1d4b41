#!/usr/bin/env bash
# Step 2 for LLaMA-2 7B: a reward model on one machine with 8 GPUs of 80 GB.
#
#   bash scripts/llama2-7b/step2.sh [further flags, which win over those below]
#
# Paths in flags are relative to the repository. The model goes to $OUTPUT, what the run prints is added to $OUTPUT.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

OUTPUT=${OUTPUT:-output/llama2-7b/step2}
mkdir -p "$(dirname "$OUTPUT")"

deepspeed training/step2_reward_model_finetuning/main.py \
  --model_name_or_path meta-llama/Llama-2-7b-hf \
  --data_path Dahoas/rm-static Dahoas/full-hh-rlhf Dahoas/synthetic-instruct-gptj-pairwise \
    yitingxie/rlhf-reward-datasets \
  --data_split 2,4,4 \
  --max_seq_len 512 \
  --per_device_train_batch_size 8 \
  --per_device_eval_batch_size 8 \
  --learning_rate 1e-5 \
  --weight_decay 0.1 \
  --num_train_epochs 1 \
  --num_warmup_steps 100 \
  --eval_interval 500 \
  --gradient_checkpointing \
  --zero_stage 3 \
  --output_dir "$OUTPUT" \
  "$@" 2>&1 | (trap '' INT TERM; exec tee -a "$OUTPUT.log") # tee outlives Ctrl-C: a run that saves prints meanwhile
