#!/usr/bin/env bash
# Check and time everything that a CUDA device changes, in a few minutes: bash benchmarks/gpu.sh
# Needs torch with CUDA and this package importable; leaves JSON with the device's name in benchmarks/results.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.__version__, torch.cuda.get_device_name())'
timeout 150 python -m pytest tests/gpu tests/test_checkpoint_files.py -m gpu -q
timeout 120 python -m benchmarks.adamw_step --device cuda
timeout 90 torchrun --standalone --nproc-per-node "$(python -c 'import torch; print(torch.cuda.device_count())')" \
  launch/pretrain.py --config configs/pretrain_60s.yaml
