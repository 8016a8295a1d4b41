#!/usr/bin/env bash
# Step 3 for LLaMA-2 13B: PPO with a 7B critic on one machine with 8 GPUs of 80 GB.
# Run step1.sh and step2.sh first.
# Its flags are in scripts/configs/llama2-13b/step3.yaml.
#
#   bash scripts/llama2-13b/step3.sh [further flags, which override the file's]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train.sh" llama2-13b step3 "$@"
