#!/usr/bin/env bash
# Step 1 for OPT-1.3B: full fine-tuning on all GPUs of this machine (one of 40 GB, or four of 24 GB).
# Its flags are in scripts/configs/opt-1.3b/step1.yaml.
#
#   bash scripts/opt-1.3b/step1.sh [further flags, which override the file's]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train.sh" opt-1.3b step1 "$@"
