#!/usr/bin/env bash
# From a fresh clone to an aligned toy model: sets up .venv, then trains base, SFT, reward model and PPO, and prints a
# report. Exit code 0 means that alignment worked. Safe to run again. Flags are passed to scripts/quickstart.py, such as
#
#   bash scripts/quickstart.sh --output_dir /tmp/quickstart
#   bash scripts/quickstart.sh --method dpo     # or kto, orpo, simpo, ipo: in place of reward model and PPO
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

bash "$root/scripts/setup_environment.sh" requirements.txt
export PATH="$root/.venv/bin:$PATH" # the deepspeed launcher, and ninja for its extensions
exec python "$root/scripts/quickstart.py" "$@"
