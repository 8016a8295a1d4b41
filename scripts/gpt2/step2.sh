#!/usr/bin/env bash
# Step 2 for GPT-2 (124M): a reward model on one GPU of 16 GB or more.
# Its flags are in scripts/configs/gpt2/step2.yaml.
#
#   bash scripts/gpt2/step2.sh [further flags, which override the file's]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train.sh" --num_gpus 1 gpt2 step2 "$@"
