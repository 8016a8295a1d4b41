#!/usr/bin/env bash
# Step 1 for LLaMA-2 13B: full fine-tuning on one machine with 8 GPUs of 80 GB.
#
#   bash scripts/llama2-13b/step1.sh [further flags, which win over those below]
#
# Paths in flags are relative to the repository. The model goes to $OUTPUT, what the run prints is added to $OUTPUT.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

OUTPUT=${OUTPUT:-output/llama2-13b/step1}
mkdir -p "$(dirname "$OUTPUT")"

deepspeed training/step1_supervised_finetuning/main.py \
  --model_name_or_path meta-llama/Llama-2-13b-hf \
  --data_path Dahoas/rm-static Dahoas/full-hh-rlhf Dahoas/synthetic-instruct-gptj-pairwise \
    yitingxie/rlhf-reward-datasets \
  --data_split 2,4,4 \
  --max_seq_len 512 \
  --per_device_train_batch_size 4 \
  --per_device_eval_batch_size 4 \
  --gradient_accumulation_steps 2 \
  --learning_rate 1e-5 \
  --num_train_epochs 2 \
  --num_warmup_steps 100 \
  --gradient_checkpointing \
  --zero_stage 3 \
  --output_dir "$OUTPUT" \
  "$@" 2>&1 | (trap '' INT TERM; exec tee -a "$OUTPUT.log") # tee outlives Ctrl-C: a run that saves prints meanwhile
