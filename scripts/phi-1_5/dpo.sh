#!/usr/bin/env bash
# Direct preference optimisation for Phi-1.5 (1.3B) with LoRA, on one GPU of 16 GB or more.
# Its flags are in scripts/configs/phi-1_5/dpo.yaml.
#
#   bash scripts/phi-1_5/dpo.sh [further flags, which override the file's]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train.sh" --num_gpus 1 phi-1_5 dpo "$@"
