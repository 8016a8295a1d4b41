#!/usr/bin/env bash
# Direct preference optimisation for OPT-1.3B, on one GPU of 40 GB or more.
# Its flags are in scripts/configs/opt-1.3b/dpo.yaml.
#
#   bash scripts/opt-1.3b/dpo.sh [further flags, which override the file's]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train.sh" --num_gpus 1 opt-1.3b dpo "$@"
