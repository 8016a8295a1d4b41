#!/usr/bin/env bash
# Step 2 for OPT-1.3B: a reward model from OPT-350M, on all GPUs of this machine.
# A reward model much smaller than the actor is enough, and trains more steadily (InstructGPT: 6B for 175B).
#
#   bash scripts/opt-1.3b/step2.sh [further flags, which win over those below]
#
# Paths in flags are relative to the repository. The model goes to $OUTPUT, what the run prints is added to $OUTPUT.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

OUTPUT=${OUTPUT:-output/opt-1.3b/step2}
mkdir -p "$(dirname "$OUTPUT")"

deepspeed training/step2_reward_model_finetuning/main.py \
  --model_name_or_path facebook/opt-350m \
  --data_path Dahoas/rm-static Dahoas/full-hh-rlhf Dahoas/synthetic-instruct-gptj-pairwise \
    yitingxie/rlhf-reward-datasets \
  --data_split 2,4,4 \
  --max_seq_len 512 \
  --per_device_train_batch_size 8 \
  --per_device_eval_batch_size 8 \
  --learning_rate 2e-5 \
  --weight_decay 0.1 \
  --num_train_epochs 1 \
  --num_warmup_steps 100 \
  --eval_interval 500 \
  --zero_stage 2 \
  --output_dir "$OUTPUT" \
  "$@" 2>&1 | (trap '' INT TERM; exec tee -a "$OUTPUT.log") # tee outlives Ctrl-C: a run that saves prints meanwhile
