#!/usr/bin/env bash
# Everything that only a GPU can tell, in the order in which a failure makes the rest pointless:
# accuracy, tests on the device, memory and race checks, speed, where a layer's time goes, graphs.
#
#   tools/bench/gpu_check.sh [FOLDER]     about 20 minutes; BENCH_MINUTES=4 shortens the bench
#
# Needs torch and Triton; pytest and compute-sanitizer where they are.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-tools/bench/results/check-$(date +%Y-%m-%d)}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
unset TRITON_INTERPRET
mkdir -p "$out"
failed=()

check() {
    local name=$1
    shift
    printf '\n=== %s (after %d s): %s\n' "$name" "$SECONDS" "$*"
    "$@" 2>&1 | tee "$out/$name.txt"
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed+=("$name")
}

absent() {
    printf '\n=== %s: not installed, left out\n' "$1" | tee "$out/$1.txt"
}

for dtype in bf16 fp32; do
    check "accuracy-$dtype" "$python" -m megatron_mhc kernels accuracy --device cuda --dtype $dtype
done
if "$python" -c 'import pytest' 2>/dev/null; then
    check tests "$python" -m pytest -q tests/kernels
else
    absent tests
fi
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        check "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$python" -m megatron_mhc kernels accuracy --device cuda --tokens 67 --hidden-size 200
    done
else
    absent compute-sanitizer
fi
check bench "$python" tools/bench/bench.py --budget-minutes "${BENCH_MINUTES:-10}" \
    --output "$out/bench"
check profile "$python" tools/bench/profile_layer.py
# What --mhc-cuda-graphs waits for; Megatron's loop needs Megatron-Core.
if "$python" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("megatron.core"))' \
    2>/dev/null; then
    check graphs "$python" tools/bench/graph_check.py
else
    absent graphs
fi

if [ ${#failed[@]} -gt 0 ]; then
    printf '\nfailed: %s (see %s)\n' "${failed[*]}" "$out"
    exit 1
fi
printf '\nall passed in %d s; results in %s\n' "$SECONDS" "$out"
