#!/bin/sh
# Tests the GPU kernels on the device, then measures them: csv and figures under benchmarks/results/.
# Needs Python with torch, Triton and pytest; installs nothing. PYTHON chooses the interpreter.
cd "$(dirname "$0")/.." || exit
export PYTHON=${PYTHON:-python3}
for module in torch triton pytest; do
  "$PYTHON" -c "import $module" 2>/dev/null || {
    echo "$PYTHON cannot import $module: install it there, or set PYTHON to a Python that has torch, triton and pytest."
    exit 1
  }
done
"$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || {
  echo "torch sees no GPU on this machine: run this where torch.cuda.is_available() is True."
  exit 1
}
# cuBLAS repeats bit for bit with a workspace of its own.
export CUBLAS_WORKSPACE_CONFIG=:4096:8
export PYTHONPATH="$PWD" ADDITIVE_ATTN_GPU=triton ADDITIVE_ATTN_CPU=${ADDITIVE_ATTN_CPU:-pytorch}
logs=$(mktemp -d)
export logs
failed=0

# Everything runs on the device, save what is about the CPU, and kernels that are only compiled.
# Files run side by side, since most of their time goes into compiling.
echo "==> tests: everything on the GPU"
for file in tests/promises/test_*.py tests/layers/test_*.py tests/kernels/test_triton*.py; do
  case $file in
    */test_triton_code.py | */test_triton_races.py | */test_errors.py | */test_import.py) echo "cpu $file" ;;
    */test_memory.py | */test_library.py | */test_architecture.py | */test_plot.py) ;;
    *) echo "cuda $file" ;;
  esac
done | xargs -P "$(nproc)" -L 1 sh -c '
  export ADDITIVE_ATTN_TEST_DEVICE=$0
  log=$logs/$(basename "$1")
  timeout 270 "$PYTHON" -m pytest -q -p no:cacheprovider "$1" >"$log" 2>&1
  case $? in 0 | 5) ;; *) touch "$log.failed" ;; esac # 5: none of its tests is for this device
  echo "$1: $(tail -n 1 "$log")"'
for mark in "$logs"/*.failed; do
  [ -e "$mark" ] || continue
  failed=1
  grep -E "^(E  |FAILED|ERROR)" "${mark%.failed}" | head -n 40
done

if command -v compute-sanitizer >/dev/null; then
  echo "==> compute-sanitizer on a few sizes"
  # Each tensor an allocation of its own: what lies between tensors would else belong to the cache.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 ADDITIVE_ATTN_TEST_DEVICE=cuda timeout 90 \
    compute-sanitizer --error-exitcode 1 "$PYTHON" -m pytest -q -p no:cacheprovider tests/kernels/test_triton.py \
    -k "sizes or strides" || failed=1
else
  echo "==> compute-sanitizer is not installed: skipped"
fi

echo "==> benchmark"
shapes=1x1x10x32x20,64x1x400x512x512,32x50x50x1024x1024,1x16x100000x256x512
shapes=$shapes,1x4096x4096x128x128,1x16384x16384x128x128
timeout 230 "$PYTHON" -m benchmarks.run --device cuda --shapes "$shapes" --budget 1 --rounds 15 || failed=1
"$PYTHON" -m benchmarks.table || failed=1
if "$PYTHON" -c "import matplotlib" 2>/dev/null; then
  "$PYTHON" -m benchmarks.plot || failed=1
else
  echo "no matplotlib: no figures"
fi
exit $failed
