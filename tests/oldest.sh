#!/usr/bin/env bash
# Run the trainers' tests with the oldest versions that pyproject.toml allows: bash tests/oldest.sh [arguments of pytest]
# Makes .venv-oldest, with the torch that launch/setup.sh pins, or DISTOPT_TORCH=2.10.0, the oldest, whose build pip's own
# settings choose (on some indexes one for GPUs, of several gigabytes).
set -euo pipefail
exec </dev/null
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv-oldest
python="${DISTOPT_PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
oldest="$("$venv/bin/python" - <<'PYTHON'
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
wanted = [name for name in project["dependencies"] if name.startswith("safetensors")]
wanted += extras["transformers"] + extras["deepspeed"]
print(*(requirement.replace(">=", "==") for requirement in wanted))
PYTHON
)"
pinned="$(sed -n 's/.*_pip_install torch==\([^ ]*\).*/\1/p' launch/setup.sh)"
torch="torch==${DISTOPT_TORCH:-$pinned}"
echo "installing $torch $oldest into $venv" >&2
# shellcheck disable=SC2086
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$torch" $oldest \
  "jsonargparse[signatures]>=4.40" "pytest>=8" "pytest-timeout>=2.3" pyyaml
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 PYTHONPATH="$PWD"
tests=(tests/integrations/test_{transformers,accelerate,trainers,deepspeed,fsdp1}.py)
exec "$venv/bin/python" -m pytest "${tests[@]}" "$@"
