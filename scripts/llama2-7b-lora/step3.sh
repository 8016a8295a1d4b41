#!/usr/bin/env bash
# Step 3 for LLaMA-2 7B with LoRA: PPO on one machine with two GPUs of 80 GB or more.
# Run step1.sh and step2.sh first.
# Its flags are in scripts/configs/llama2-7b-lora/step3.yaml.
#
#   bash scripts/llama2-7b-lora/step3.sh [further flags, which override the file's]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train.sh" llama2-7b-lora step3 "$@"
