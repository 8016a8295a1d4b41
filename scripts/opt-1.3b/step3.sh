#!/usr/bin/env bash
# Step 3 for OPT-1.3B: PPO on all GPUs of this machine (40 GB each).
# Run step1.sh and step2.sh first.
# Its flags are in scripts/configs/opt-1.3b/step3.yaml.
#
#   bash scripts/opt-1.3b/step3.sh [further flags, which override the file's]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train.sh" opt-1.3b step3 "$@"
