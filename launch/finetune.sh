#!/usr/bin/env bash
# Set up if needed, then fine-tune: bash launch/finetune.sh [--config configs/<recipe>.yaml] [--method.kind lora ...]
# One process, on a GPU if there is one. The default makes a tiny model and its own data, and takes a minute on a CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
setup_venv launch finetune

case " $* " in
  *" --config"*) ;;
  *) set -- --config configs/finetune_tiny.yaml "$@" ;;
esac
exec python launch/finetune.py "$@"
