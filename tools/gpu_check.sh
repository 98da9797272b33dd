#!/bin/sh
# Tests the GPU kernels on the device, then measures them: csv and figures under benchmarks/results/.
# Needs Python with torch, Triton and pytest; installs nothing. PYTHON chooses the interpreter.
cd "$(dirname "$0")/.." || exit
export PYTHON=${PYTHON:-python3}
# cuBLAS repeats bit for bit with a workspace of its own.
export CUBLAS_WORKSPACE_CONFIG=:4096:8
export PYTHONPATH="$PWD" ADDITIVE_ATTN_GPU=triton ADDITIVE_ATTN_CPU=${ADDITIVE_ATTN_CPU:-pytorch}
logs=$(mktemp -d)
export logs
failed=0

# What a file of tests does on the device, or with kernels that are compiled and not run. Files run
# side by side, since most of their time goes into compiling.
on_device="triton accuracy dropout empty_rows gradients layout masks merge module padding ranges
reference repeatable transforms upstream_strides"
on_cpu="triton_code errors import"

echo "==> tests: everything on the GPU"
{
  for name in $on_device; do echo "cuda $name"; done
  for name in $on_cpu; do echo "cpu $name"; done
} | xargs -P "$(nproc)" -L 1 sh -c '
  export ADDITIVE_ATTN_TEST_DEVICE=$0
  timeout 270 "$PYTHON" -m pytest -q -p no:cacheprovider "tests/test_$1.py" >"$logs/$1" 2>&1 || touch "$logs/$1.failed"
  echo "$1: $(tail -n 1 "$logs/$1")"'
for mark in "$logs"/*.failed; do
  [ -e "$mark" ] || continue
  failed=1
  grep -E "^(E  |FAILED|ERROR)" "${mark%.failed}" | head -n 40
done

if command -v compute-sanitizer >/dev/null; then
  echo "==> compute-sanitizer on a few sizes"
  # Each tensor an allocation of its own: what lies between tensors would else belong to the cache.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 ADDITIVE_ATTN_TEST_DEVICE=cuda timeout 90 \
    compute-sanitizer --error-exitcode 1 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_triton.py \
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
