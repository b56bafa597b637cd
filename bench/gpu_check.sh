#!/usr/bin/env bash
# Builds, tests and benchmarks on a machine with a GPU, with its own python3, in ten minutes at most.
# A stage that fails or runs out of time is reported at the end, and the next one starts all the same.
# Tables come most valuable first; each is written as CSV and JSON under $OUT as soon as it is there.
#   bash bench/gpu_check.sh            OUT=folder PYTHON=python3 BUDGET=590 (seconds) may be set
set -u -o pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/out}
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-590}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
FAILED=()

# stage NAME SECONDS COMMAND...: run COMMAND for SECONDS at most, or for what is left.
stage() {
  local name=$1 limit=$2 left=$((BUDGET - SECONDS)) begin=$SECONDS status
  shift 2
  if ((left < 5)); then
    FAILED+=("$name: no time left")
    return
  fi
  ((limit > left)) && limit=$left
  echo "== $name (at most $limit s)"
  timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  tail -n 12 "$OUT/$name.log"
  ((status == 124)) && FAILED+=("$name: stopped after $limit s")
  ((status != 0 && status != 124)) && FAILED+=("$name: exit status $status, see $name.log")
  echo "== $name: status $status, $((SECONDS - begin)) s"
}

build() {
  local generator=()
  command -v ninja >/dev/null && generator=(-G Ninja)
  local target="-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$PWD/qrlora_kernels"
  cmake -S . -B build/gpu "${generator[@]}" "$target" -DPython_EXECUTABLE="$(command -v "$PYTHON")" &&
    cmake --build build/gpu --parallel "$(nproc)"
}

sanitize() {
  # Under the caching allocator an access beyond a tensor still lies in its block.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$PYTHON" -m bench.gpu small &&
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
      "$PYTHON" -m bench.llama_start --small
}

bench() {
  "$PYTHON" -m bench --device cuda --out "$OUT" "$@"
}
export -f build sanitize bench
export PYTHON OUT

machine() {
  nvidia-smi
  "$PYTHON" -m qrlora_kernels
}
export -f machine

# The families with the same numbers and the two adapters most people use: the others start with a
# full SVD of every weight, for which there is no time here.
FAMILIES=qr,lora_xs,ohora,lokr,lora,vera

stage build 150 bash -c build
stage machine 30 bash -c machine
stage small 45 "$PYTHON" -m bench.gpu small
stage pivot_tests 60 "$PYTHON" -m pytest -q -p no:cacheprovider \
  python_tests/test_cuda_pivoted_qr.py -k gpu
stage llama_start 90 "$PYTHON" -m bench.llama_start --out "$OUT"
stage layer 150 bash -c "bench --suites layer --adapters $FAMILIES --seconds 2"
stage start 60 bash -c "bench --suites start --seconds 1 --variants pivoted_qr,product,kron_factors"
stage decode 60 bash -c "bench --suites decode,overhead --adapters $FAMILIES --seconds 1"
stage tune 60 "$PYTHON" -m bench.tune --out "$OUT"
stage graph 40 "$PYTHON" -m bench.gpu graph
stage repeat 90 "$PYTHON" -m bench.gpu repeat
stage kernel_tests 120 "$PYTHON" -m pytest -q -p no:cacheprovider python_tests/test_triton_kernels.py \
  python_tests/test_cuda_decode.py
if command -v compute-sanitizer >/dev/null; then
  stage memcheck 60 bash -c "sanitize memcheck"
  stage racecheck 60 bash -c "sanitize racecheck"
else
  FAILED+=("memcheck, racecheck: no compute-sanitizer here")
fi
stage model 60 bash -c "bench --suites model --seconds 2"
stage memory 40 bash -c "bench --suites memory --adapters $FAMILIES"
stage backends 60 bash -c \
  "bench --suites layer --cases M=2048 --variants qrlora --backends cuda,triton,composed --seconds 2 \
   --out $OUT/backends"
stage svd 60 bash -c "bench --suites start --seconds 1 --out $OUT/svd"
stage tests 300 "$PYTHON" -m pytest -q -p no:cacheprovider python_tests

echo "== $SECONDS s; tables in $OUT"
if ((${#FAILED[@]})); then
  printf 'FAILED %s\n' "${FAILED[@]}"
  exit 1
fi
echo "all stages passed"
