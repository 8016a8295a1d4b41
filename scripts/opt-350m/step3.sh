#!/usr/bin/env bash
# Step 3 for OPT-350M: PPO on one GPU of 24 GB or more.
# Run step1.sh and step2.sh first.
# Its flags are in scripts/configs/opt-350m/step3.yaml.
#
#   bash scripts/opt-350m/step3.sh [further flags, which override the file's]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train.sh" --num_gpus 1 opt-350m step3 "$@"
