#!/bin/sh
# Tests the GPU kernels on the device, then measures them: csv and figures under benchmarks/results/.
# Needs Python with torch, Triton and pytest; installs nothing. PYTHON chooses the interpreter.
set -e
PYTHON=${PYTHON:-python3}
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD" ADDITIVE_ATTN_GPU=triton ADDITIVE_ATTN_CPU=${ADDITIVE_ATTN_CPU:-pytorch}

echo "==> the kernels' own tests, and the accuracy, range, mask and padding tests, on the GPU"
ADDITIVE_ATTN_TEST_DEVICE=cuda "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_triton.py \
  tests/test_accuracy.py tests/test_ranges.py tests/test_masks.py tests/test_padding.py

if command -v compute-sanitizer >/dev/null; then
  echo "==> compute-sanitizer on a few sizes"
  # Each tensor an allocation of its own: what lies between tensors would else belong to the cache.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 ADDITIVE_ATTN_TEST_DEVICE=cuda compute-sanitizer --error-exitcode 1 \
    "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_triton.py -k "sizes or masks"
else
  echo "==> compute-sanitizer is not installed: skipped"
fi

echo "==> benchmark"
"$PYTHON" -m benchmarks.run --device cuda --shapes small,steps,layers,1x4096x4096x128x128,1x16384x16384x128x128 \
  --budget 1 --rounds 15
"$PYTHON" -m benchmarks.table
echo "==> other block sizes than the package's"
"$PYTHON" -m benchmarks.tune --shapes 1x4096x4096x128x128,1x16x100000x256x512 --budget 0.2 --rounds 5
"$PYTHON" -c "import matplotlib" 2>/dev/null && "$PYTHON" -m benchmarks.plot || echo "no matplotlib: no figures"
