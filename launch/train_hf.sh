#!/usr/bin/env bash
# Set up if needed, then train with the Transformers Trainer: bash launch/train_hf.sh [--optim distopt_soap ...]
# Two processes on a CPU; on a machine with NVIDIA GPUs, one per GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
setup_venv launch transformers

processes=2
gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
if [ "$gpus" -gt 0 ]; then
  processes="$gpus"
else
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
case " $* " in
  *" --config"*) ;;
  *) set -- --config configs/train_hf.yaml "$@" ;;
esac
exec torchrun --standalone --nproc-per-node "$processes" launch/train_hf.py "$@"
