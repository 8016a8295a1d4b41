#!/usr/bin/env bash
# Step 1 for GPT-2 (124M): full fine-tuning on one GPU of 16 GB or more.
# Its flags are in scripts/configs/gpt2/step1.yaml.
#
#   bash scripts/gpt2/step1.sh [further flags, which override the file's]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train.sh" --num_gpus 1 gpt2 step1 "$@"
