#!/usr/bin/env bash
# Runs one step with the flags of a preset, through DeepSpeed's launcher.
#
#   bash scripts/train.sh [launcher flags] MODEL STEP [flags of the step, which override the preset's]
#   bash scripts/train.sh --num_gpus 2 llama2-7b step1 --max_steps 10
#
# The preset is scripts/configs/MODEL/STEP.yaml on top of scripts/configs/STEP.yaml. To add a model, write one such file
# for each of its steps. STEP is a name of the table STEPS in utils/arguments/steps.py. Every launcher flag must have one value. Paths in flags are relative to the repository. The
# model is written to $OUTPUT (default: output/MODEL/STEP), and what the run prints is appended to $OUTPUT.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

launcher=()
while [[ ${1-} == --* ]]; do
  [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
  launcher+=("$1" "$2")
  shift 2
done
model=${1-} step=${2-}
if [ -z "$model" ] || [ -z "$step" ]; then
  echo "error: give a model and a step: bash scripts/train.sh MODEL STEP; models: $(cd scripts/configs && echo */)" >&2
  exit 2
fi
shift 2
main=$(python - "$step" <<'PYTHON'
import sys
from utils.arguments.steps import STEPS

step = sys.argv[1]
if step not in STEPS:
    sys.exit(f"error: there is no step {step}; steps: {' '.join(STEPS)}")
print(f"training/{STEPS[step].folder}/main.py")
PYTHON
) || exit 2
preset=scripts/configs/$model/$step.yaml
[ -f "$preset" ] || { echo "error: there is no preset $preset; models: $(cd scripts/configs && echo */)" >&2; exit 2; }

OUTPUT=${OUTPUT:-output/$model/$step}
mkdir -p "$(dirname "$OUTPUT")"

deepspeed ${launcher[@]+"${launcher[@]}"} "$main" \
  --config "scripts/configs/$step.yaml" "$preset" \
  --output_dir "$OUTPUT" \
  "$@" 2>&1 | (trap '' INT TERM; exec tee -a "$OUTPUT.log") # tee survives Ctrl-C: a run that saves still prints
