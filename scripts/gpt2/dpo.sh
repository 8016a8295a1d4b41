#!/usr/bin/env bash
# Direct preference optimisation for GPT-2 (124M), on one GPU of 16 GB or more.
# Its flags are in scripts/configs/gpt2/dpo.yaml.
#
#   bash scripts/gpt2/dpo.sh [further flags, which override the file's]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train.sh" --num_gpus 1 gpt2 dpo "$@"
