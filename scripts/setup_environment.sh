#!/usr/bin/env bash
# Create .venv in the checkout and install a requirements file into it, unless that has been done already.
#
#   bash scripts/setup_environment.sh [requirements.txt | requirements-dev.txt]
#
# On a machine with NVIDIA GPUs torch comes with CUDA. Elsewhere set TORCH_INDEX_URL to a package index of CPU-only
# torch wheels to save several gigabytes; without it pip uses the index of its own configuration.
# PYTHON names the interpreter for .venv (default: the first of python3.11, python3.12, python3.13, python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

requirements=${1:-requirements.txt}
environment=.venv

say() { echo "setup: $*"; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: found no Python 3.11 or newer with the venv module; install one, or set PYTHON to it" >&2
  return 2
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU'; }

has_torch_for_cpus() {
  "$environment/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' 2>/dev/null
}

# A checksum of all that an installation of the file $1 depends on. That includes the location, because the project
# itself is installed in place.
fingerprint() {
  { cat "$1" pyproject.toml; echo "$PWD" "$torch"; "$environment/bin/python" --version; } | cksum
}

stamp() { echo "$environment/installed-$1.cksum"; }

[ -f "$requirements" ] || { echo "error: $PWD has no $requirements" >&2; exit 2; }

# Two runs at once (say, quickstart.sh and test.sh in two terminals) take turns.
if command -v flock >/dev/null; then
  exec 9<"scripts/setup_environment.sh"
  flock 9
fi

if ! "$environment/bin/python" -c 'import pip' 2>/dev/null; then
  python=$(find_python)
  say "creating $environment with $("$python" --version)"
  "$python" -m venv --clear "$environment"
fi

if has_gpu; then torch="torch with CUDA"; else torch="torch for CPUs"; fi
if [ "$(cat "$(stamp "$requirements")" 2>/dev/null)" = "$(fingerprint "$requirements")" ]; then
  say "$environment has everything in $requirements"
  exit 0
fi

install=("$environment/bin/python" -m pip install --quiet --quiet --disable-pip-version-check)
torch_pin=$(grep -o 'torch==[0-9.]*' pyproject.toml)
say "installing $torch_pin ($torch); the first time this takes minutes"
if has_gpu && has_torch_for_cpus; then # CPU torch satisfies the pin, so pip would keep it
  "${install[@]}" --force-reinstall "$torch_pin"
elif ! has_gpu && [ -n "${TORCH_INDEX_URL:-}" ]; then
  # Only torch itself: its dependencies come from the usual index with the next command.
  "${install[@]}" --no-deps --index-url "$TORCH_INDEX_URL" "$torch_pin"
else
  "${install[@]}" "$torch_pin"
fi
say "installing the rest of $requirements"
"${install[@]}" -r "$requirements"

for file in requirements.txt "$requirements"; do # the others include what is in requirements.txt
  fingerprint "$file" >"$(stamp "$file")"
done
say "done"
