#!/usr/bin/env bash
# All checks that need a GPU, in one run: the tests marked gpu, and cases under compute-sanitizer.
# Fails if any of them fails, is skipped or cannot be run. jax_flashmla must be installed with its
# kernels; PYTHON names the interpreter it is installed for (default python3).
#
#   tests/gpu/run_gpu_tests.sh [pytest arguments]
#   JOBS=8 runs the tests in so many processes (pytest-xdist).
#   PARTS="tests memcheck racecheck" chooses parts (default these three). PARTS=grid runs the whole
#   grid of dense decode cases, or what of it is missing in $GRID_OUT (default grid.jsonl), and
#   PARTS=sparse_grid that of sparse decode, in $SPARSE_GRID_OUT (default sparse_grid.jsonl).
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
parts=${PARTS:-tests memcheck racecheck}
processes=()
if [ "${JOBS:-1}" != 1 ]; then
  # Oracles in numpy would else take all cores in every process.
  cores=$((($(nproc) + JOBS - 1) / JOBS))
  export OPENBLAS_NUM_THREADS=$cores OMP_NUM_THREADS=$cores
  processes=(-n "$JOBS" --dist loadgroup)
fi
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
failed=()

for part in $parts; do
  case $part in
    tests | memcheck | racecheck | grid | sparse_grid) ;;
    *)
      echo "unknown part '$part'; expected tests, memcheck, racecheck, grid or sparse_grid" >&2
      exit 2
      ;;
  esac
done

step() { printf '\n=== %s (after %d s)\n' "$*" "$SECONDS"; }

step "versions"
"$python" -P - <<'PYTHON' || exit 1
import jax, jaxlib, sys
from jax_flashmla import _ffi

print("python", sys.version.split()[0], "jax", jax.__version__, "jaxlib", jaxlib.__version__)
print(_ffi.build_info())
device = jax.devices("cuda")[0]
print(device.device_kind, "compute capability", device.compute_capability)
reason = _ffi.kernels_decline(device.compute_capability)
sys.exit(f"the kernels cannot run here: {reason}" if reason else 0)
PYTHON

if [[ " $parts " == *" tests "* ]]; then
  step "tests marked gpu"
  "$python" -P -m pytest -m gpu --require-gpu --durations=10 "${processes[@]}" tests "$@" ||
    failed+=("tests")
fi

# Every allocation its own cudaMalloc, so that an access past an array is seen.
sanitize() {
  local tool=$1
  shift
  step "compute-sanitizer $tool"
  XLA_PYTHON_CLIENT_ALLOCATOR=platform compute-sanitizer --tool "$tool" --error-exitcode 86 \
    --report-api-errors no "$@" "$python" -P tests/gpu/sanitizer_cases.py "$tool" ||
    failed+=("$tool")
}
if [[ " $parts " == *" memcheck "* ]]; then
  sanitize memcheck --leak-check no
fi
if [[ " $parts " == *" racecheck "* ]]; then
  sanitize racecheck --racecheck-report all
fi

if [[ " $parts " == *" grid "* ]]; then
  step "grid of dense decode cases"
  "$python" -P tests/gpu/grid.py --out "${GRID_OUT:-grid.jsonl}" || failed+=("grid")
fi

if [[ " $parts " == *" sparse_grid "* ]]; then
  step "grid of sparse decode cases"
  "$python" -P tests/gpu/sparse_grid.py --out "${SPARSE_GRID_OUT:-sparse_grid.jsonl}" ||
    failed+=("sparse_grid")
fi

step "result"
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all passed: $parts"
