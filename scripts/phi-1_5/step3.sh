#!/usr/bin/env bash
# Step 3 for Phi-1.5 (1.3B) with LoRA: PPO on one GPU of 24 GB or more.
# Run step1.sh and step2.sh first.
# Its flags are in scripts/configs/phi-1_5/step3.yaml.
#
#   bash scripts/phi-1_5/step3.sh [further flags, which override the file's]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train.sh" --num_gpus 1 phi-1_5 step3 "$@"
