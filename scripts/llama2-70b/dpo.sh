#!/usr/bin/env bash
# Direct preference optimisation for LLaMA-2 70B, on 4 machines with 8 GPUs of 80 GB each.
# HOSTFILE lists the machines, one line each such as: worker-1 slots=8. All must have the repository, .venv and the
# output at the same path, and ssh between them must work without a password.
# Its flags are in scripts/configs/llama2-70b/dpo.yaml.
#
#   bash scripts/llama2-70b/dpo.sh [further flags, which override the file's]
set -euo pipefail
: "${HOSTFILE:?set it to a file that lists the machines}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/../train.sh" --hostfile "$HOSTFILE" llama2-70b dpo "$@"
