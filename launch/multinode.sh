#!/usr/bin/env bash
# Run a script of launch/ on several machines. The same line on every machine, HEAD being the first one's host name:
#
#   HEAD=node-0 NODES=2 bash launch/multinode.sh launch/train_hf.py --config configs/train_hf_fsdp2.yaml
#   HEAD=node-0 NODES=2 bash launch/multinode.sh launch/pretrain.py --config configs/pretrain_124m_fsdp_tp.yaml
#
# PROCESSES per machine (one per GPU, or 1), PORT on the head (29500), JOB names the run. The repository, its .venv
# (`bash launch/pretrain.sh` or `bash launch/train_hf.sh` makes it) and the run's folder lie on a file system that all share.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${HEAD:?set it to the host name of the first machine}"
: "${NODES:?set it to the number of machines}"
if [ "$#" -eq 0 ]; then
  echo "usage: HEAD=<host> NODES=<n> bash launch/multinode.sh <script> [arguments]" >&2
  exit 2
fi
if [ -f .venv/bin/activate ]; then
  # shellcheck disable=SC1091
  source .venv/bin/activate
fi
if [ -z "${PROCESSES:-}" ]; then
  gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
  PROCESSES=$((gpus > 0 ? gpus : 1))
fi
exec torchrun --nnodes "$NODES" --nproc-per-node "$PROCESSES" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id "${JOB:-distopt}" "$@"
