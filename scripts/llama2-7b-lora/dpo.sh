#!/usr/bin/env bash
# Direct preference optimisation for LLaMA-2 7B with LoRA, on one GPU of 40 GB or more.
# Its flags are in scripts/configs/llama2-7b-lora/dpo.yaml.
#
#   bash scripts/llama2-7b-lora/dpo.sh [further flags, which override the file's]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train.sh" --num_gpus 1 llama2-7b-lora dpo "$@"
