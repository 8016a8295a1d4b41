#!/usr/bin/env bash
# Direct preference optimisation for LLaMA-2 13B, on one machine with 8 GPUs of 80 GB.
# Its flags are in scripts/configs/llama2-13b/dpo.yaml.
#
#   bash scripts/llama2-13b/dpo.sh [further flags, which override the file's]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train.sh" llama2-13b dpo "$@"
