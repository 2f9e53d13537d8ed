# Sourced by launch/pretrain.sh and tests/run.sh: defines setup_venv. Works under `set -euo pipefail`, without a stdin.

# setup_venv <extra>...   Leave a virtual environment active in which this package is installed with those extras.
#
# It is .venv in the repository, made if there is none; DISTOPT_PYTHON names the interpreter to make it from. When nothing
# has changed since the last call with the same extras, this takes no time.
setup_venv() {
  local root venv python stamp wanted extras
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  venv="$root/.venv"
  extras="$(IFS=,; echo "$*")"
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python="$(_find_python)" || return 1
    "$python" -m venv "$venv"
  fi
  # shellcheck disable=SC1091
  source "$venv/bin/activate"

  stamp="$venv/.distopt-installed-$extras"
  wanted="$root $(cksum <"$root/pyproject.toml") $(python -V)"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    return 0
  fi
  echo "installing into $venv" >&2
  # Pinned to a known-good release; an installed torch of another build (such as one for CPU only) is left alone.
  if ! python -c 'import torch' >/dev/null 2>&1; then
    _pip_install torch==2.13.0
  fi
  _pip_install --editable "$root${extras:+[$extras]}"
  echo "$wanted" >"$stamp"
}

# Networks fail now and then: try twice.
_pip_install() {
  python -m pip install --quiet --disable-pip-version-check "$@" </dev/null ||
    python -m pip install --quiet --disable-pip-version-check "$@" </dev/null
}

_find_python() {
  local candidate
  for candidate in ${DISTOPT_PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      echo "$candidate"
      return 0
    fi
  done
  echo "no Python >= 3.11 found; install one, or set DISTOPT_PYTHON to its path" >&2
  return 1
}
