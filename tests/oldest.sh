#!/usr/bin/env bash
# Run the trainers' tests with the oldest versions that pyproject.toml allows: bash tests/oldest.sh [arguments of pytest]
# Makes .venv-oldest, with the torch that launch/setup.sh pins; pip's own settings say where torch comes from.
set -euo pipefail
exec </dev/null
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv-oldest
python="${DISTOPT_PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
oldest="$("$venv/bin/python" - <<'PYTHON'
import tomllib

extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
print(*(requirement.replace(">=", "==") for requirement in extras["transformers"]))
PYTHON
)"
torch="$(sed -n 's/.*_pip_install \(torch==[^ ]*\).*/\1/p' launch/setup.sh)"
echo "installing $torch $oldest into $venv" >&2
# shellcheck disable=SC2086
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$torch" $oldest \
  "jsonargparse[signatures]>=4.40" "pytest>=8" "pytest-timeout>=2.3" pyyaml
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 PYTHONPATH="$PWD"
exec "$venv/bin/python" -m pytest tests/integrations/test_transformers.py tests/integrations/test_accelerate.py "$@"
