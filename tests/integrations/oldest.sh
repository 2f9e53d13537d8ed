#!/usr/bin/env bash
# The tests of a trainer with another release of it, such as the oldest that pyproject.toml allows:
#   bash tests/integrations/oldest.sh deepspeed 0.19.8
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
release="$(mktemp -d)"
trap 'rm -rf "$release"' EXIT
python -m pip install --quiet --no-deps --target "$release" "$1==$2"
PYTHONPATH="$release:$PWD" OMP_NUM_THREADS=1 python -m pytest "tests/integrations/test_$1.py"
