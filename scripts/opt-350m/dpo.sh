#!/usr/bin/env bash
# Direct preference optimisation for OPT-350M, on one GPU of 16 GB or more.
# Its flags are in scripts/configs/opt-350m/dpo.yaml.
#
#   bash scripts/opt-350m/dpo.sh [further flags, which override the file's]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train.sh" --num_gpus 1 opt-350m dpo "$@"
