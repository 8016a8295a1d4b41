#!/usr/bin/env bash
# Sets up .venv with the development requirements, checks the code with ruff and runs the tests, two at a time.
# Safe to run again. Flags are passed to pytest, for example
#
#   bash scripts/test.sh tests/arguments -k yaml
#   bash scripts/test.sh -m slow
#   bash scripts/test.sh -m gpu -n 0    # one test at a time, in one process
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup_environment.sh requirements-dev.txt
export PATH="$PWD/.venv/bin:$PATH"
echo "test: ruff check"
ruff check .
echo "test: pytest"
exec python -m pytest -q -n 2 --dist worksteal "$@"
