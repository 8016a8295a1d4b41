#!/usr/bin/env bash
# Step 1 for LLaMA-2 7B: full fine-tuning on one machine with 8 GPUs of 80 GB.
# Its flags are in scripts/configs/llama2-7b/step1.yaml.
#
#   bash scripts/llama2-7b/step1.sh [further flags, which override the file's]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train.sh" llama2-7b step1 "$@"
