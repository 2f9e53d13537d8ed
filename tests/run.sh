#!/usr/bin/env bash
# Set up if needed, then run every check: bash tests/run.sh [arguments of pytest, such as -k muon, or -m slow]
# Ends with one line that says what failed, and with exit code 0 only if nothing did.
set -euo pipefail
exec </dev/null
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
setup_venv launch test

# One thread per process: distributed tests run up to four, and results are compared bit for bit.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# No test downloads anything.
export HF_HUB_OFFLINE=1

failed=()
check() { # check <name> <command>…
  local name="$1"
  shift
  echo "== $*"
  "$@" || failed+=("$name")
}

check "ruff check" ruff check .
check "ruff format" ruff format --check .
check mypy mypy
# The import-direction test comes first (tests/conftest.py); a later -m takes the place of this one.
check pytest pytest -m "not slow" "$@"

if [ "${#failed[@]}" -gt 0 ]; then
  printf -v list ', %s' "${failed[@]}"
  echo "tests/run.sh: FAILED after $SECONDS s: ${list:2}"
  exit 1
fi
echo "tests/run.sh: all checks passed in $SECONDS s"
