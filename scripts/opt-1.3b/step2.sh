#!/usr/bin/env bash
# Step 2 for OPT-1.3B: a reward model from OPT-350M, on all GPUs of this machine.
# Its flags are in scripts/configs/opt-1.3b/step2.yaml.
#
#   bash scripts/opt-1.3b/step2.sh [further flags, which override the file's]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train.sh" opt-1.3b step2 "$@"
