#!/usr/bin/env bash
# Check and time everything that a CUDA device changes, in less than 8 minutes on an H100: bash benchmarks/gpu.sh
# Needs torch with CUDA and this package importable, no network; leaves JSON with the device's name in benchmarks/results.
# bash benchmarks/gpu.sh --dry-run lists the commands, and runs on a CPU what can be run there.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
dry="${1:-}"
failed=()

run() { # run <seconds> <name> <command>…; what fails or takes too long is named at the end, the rest still runs
  local limit="$1" name="$2"
  shift 2
  echo "== $name: $*"
  if [ "$dry" = --dry-run ]; then return; fi
  local start=$SECONDS
  timeout "$limit" "$@" || failed+=("$name")
  echo "== $name took $((SECONDS - start)) s"
}

if [ "$dry" != --dry-run ]; then
  python -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.__version__, torch.cuda.get_device_name())' || exit 1
fi
run 95 "tests on the device" python -m pytest tests/gpu tests/test_checkpoint_files.py -m gpu -q
run 69 "kernels compiled ahead of time" python -m tests.ahead_of_time
run 60 "fused steps" python -m benchmarks.gpu_kernels
run 30 "AdamW fp32" python -m benchmarks.adamw_step --device cuda
run 45 "int8 and small tensors" python -m benchmarks.int8_step --device cuda
run 55 "pages" python -m benchmarks.paging --device cuda
run 45 "Newton-Schulz" python -m benchmarks.newton_schulz --model llama3_8b --device cuda --rounds 5
run 75 "60 seconds of training" torchrun --standalone --nproc-per-node 1 launch/pretrain.py --config configs/pretrain_60s.yaml
if [ "$dry" = --dry-run ]; then
  python -m benchmarks.gpu_kernels --dry-run || failed+=("gpu_kernels --dry-run")
  python -m benchmarks.paging --dry-run || failed+=("paging --dry-run")
fi

if [ "${#failed[@]}" -gt 0 ]; then
  printf -v list ', %s' "${failed[@]}"
  echo "benchmarks/gpu.sh: FAILED after $SECONDS s: ${list:2}"
  exit 1
fi
echo "benchmarks/gpu.sh: all done in $SECONDS s"
