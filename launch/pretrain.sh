#!/usr/bin/env bash
# Set up if needed, then pretrain: bash launch/pretrain.sh [--config configs/<recipe>.yaml] [--optimizer.lr 3e-3 ...]
# Two processes on a CPU; on a machine with NVIDIA GPUs, one per GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
setup_venv launch

processes=2
gpus=0
if command -v nvidia-smi >/dev/null 2>&1; then
  gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
fi
if [ "$gpus" -gt 0 ]; then
  processes="$gpus"
else
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
case " $* " in
  *" --config"*) ;;
  *) set -- --config configs/pretrain_tiny.yaml "$@" ;;
esac
exec torchrun --standalone --nproc-per-node "$processes" launch/pretrain.py "$@"
